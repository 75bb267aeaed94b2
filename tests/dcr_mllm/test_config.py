"""Configs: defaults, then a file, then the command line, with errors that name the key and the way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from dcr_mllm.config import differences, load_config, resolve_config_path, to_dict, to_yaml
from dcr_mllm.errors import UserError


@dataclasses.dataclass(kw_only=True)
class Optimizer:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)


@dataclasses.dataclass(kw_only=True)
class Example:
    run: str = "mini"
    tower: str
    tower_steps: int = 500
    image_size: int | None = None
    data: str | list[str] | None = None
    rows: int | Literal["auto"] = "auto"
    objective: Literal["dcr", "reconstruction"] = "dcr"
    flip: bool = False
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)

    def __post_init__(self) -> None:
        if self.tower_steps < 0:
            raise UserError(f"tower_steps must not be negative, found {self.tower_steps}")


def load(*overrides: str, path: Path | None = None) -> Example:
    return load_config(Example, path, ["tower=t", *overrides])


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("tower_steps: 3\nrun: file\noptimizer:\n  lr: 1e-3\n")
    config = load("run=typed", "optimizer.betas=[0.5, 0.9]", path=file)
    assert (config.run, config.tower_steps, config.flip) == ("typed", 3, False)
    assert config.optimizer == Optimizer(lr=1e-3, betas=(0.5, 0.9))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("tower_steps=7", "tower_steps", 7),
        ("image_size=48", "image_size", 48),
        ("image_size=null", "image_size", None),
        ("image_size=", "image_size", None),
        ("data=a/{0..3}.tar", "data", "a/{0..3}.tar"),
        ("data=[a, b]", "data", ["a", "b"]),
        ("data=a=b", "data", "a=b"),
        ("rows=4", "rows", 4),
        ("rows=auto", "rows", "auto"),
        ("run=7", "run", "7"),
        ("run=1e-4", "run", "1e-4"),
        ("run=no", "run", "no"),
        ("run=2024-01-01", "run", "2024-01-01"),
        ("flip=true", "flip", True),
    ],
)
def test_values(override: str, key: str, value: object) -> None:
    found = getattr(load(override), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "+1e-4"])
def test_learning_rates_as_people_write_them(text: str) -> None:
    assert load(f"optimizer.lr={text}").optimizer.lr == pytest.approx(1e-4, rel=1e-12)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tower_stps=3", "unknown key 'tower_stps' on the command line, did you mean 'tower_steps'"),
        ("optimizer.lrr=3", "unknown key 'optimizer.lrr' on the command line, did you mean 'optimizer.lr'"),
        ("zzz=3", "unknown key 'zzz' on the command line; known are run, tower,"),
        ("tower_steps=many", "command line: tower_steps is many, expected an integer"),
        ("tower_steps=1.5", "command line: tower_steps is 1.5, expected an integer"),
        ("tower_steps='5'", "command line: tower_steps is 5, expected an integer"),
        ("tower_steps=true", "command line: tower_steps is true, expected an integer"),
        ("tower_steps=-1", "command line: tower_steps must not be negative, found -1"),
        ("rows=x", "command line: rows is x, expected an integer or 'auto'"),
        ("flip=1", "command line: flip is 1, expected a boolean"),
        ("objective=dcl", "command line: objective is dcl, expected 'dcr' or 'reconstruction'"),
        ("data={a: 1}", "expected a string or a list"),
        ("optimizer=3", "command line: optimizer is 3, expected a mapping"),
        ("optimizer.betas=[1]", "optimizer.betas.1 is missing"),
        ("tower_steps", "'tower_steps' on the command line is not of the form key=value"),
        ("=3", "is not of the form key=value"),
        ("data=[a", "not valid YAML"),
    ],
)
def test_errors_name_key_and_expectation(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    for text, message in [
        ("tower_stps: 3", "unknown key 'tower_stps' in {file}, did you mean 'tower_steps'"),
        ("tower_steps: many", "{file}: tower_steps is many, expected an integer"),
        ("run: 3", "{file}: run is 3, expected a string"),
        ("- 1", "{file} must hold a mapping"),
        ("a: [", "{file} is not valid YAML"),
        ("run: a\nrun: b", "'run' appears twice"),
        ("run: !!python/object/apply:os.getcwd []", "{file} is not valid YAML"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            load(path=file)
        assert message.format(file=file) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read config"):
        load(path=tmp_path / "none.yaml")


def test_several_mistakes_at_once_and_missing_values() -> None:
    with pytest.raises(UserError) as caught:
        load("tower_steps=x", "flip=y")
    assert "tower_steps" in str(caught.value) and "flip" in str(caught.value)
    with pytest.raises(UserError, match="tower is missing and has no default"):
        load_config(Example)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load("run=1e-4", "optimizer.lr=1e-5", "data=['no', '3']")
    file = tmp_path / "a.yaml"
    file.write_text(to_yaml(config))
    assert load_config(Example, file) == config
    assert to_dict(config)["optimizer"] == {"lr": 1e-5, "betas": [0.9, 0.999]}


def test_differences() -> None:
    a, b = load(), load("tower_steps=600", "optimizer.lr=1e-3")
    assert differences(a, a) == differences(to_dict(a), a) == []
    assert differences(a, b) == ["tower_steps: 500 -> 600", "optimizer.lr: 0.0001 -> 0.001"]
    assert differences({"old": 1, "x": 2}, {"x": 2, "new": 3}) == ["old: 1 -> (absent)", "new: (absent) -> 3"]
    assert differences({"old": None, "x": 2}, {"x": 2, "new": None}) == []
    assert differences({"x": None}, {"x": 0}) == ["x: None -> 0"]


def test_shipped_configs_by_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "configs"
    shipped.mkdir()
    for name in ("mini.yaml", "openai-l14-336.yaml"):
        (shipped / name).write_text("")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("")
    (tmp_path / "mini").mkdir()
    assert resolve_config_path("mini", shipped) == shipped / "mini.yaml"
    assert resolve_config_path("mini.yaml", shipped) == shipped / "mini.yaml"
    assert resolve_config_path("own.yaml", shipped) == Path("own.yaml")
    with pytest.raises(UserError, match=r"'minni'.*\(mini, openai-l14-336\), did you mean 'mini'\?"):
        resolve_config_path("minni", shipped)
    with pytest.raises(UserError, match="neither a file nor"):
        resolve_config_path("some/where.yaml", shipped)
