"""Run directories: new, resumable, finished, refused; nothing half-written; provenance."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcr_mllm.errors import UserError
from dcr_mllm.runs import (
    atomic_directory,
    hash_directory,
    open_run,
    provenance,
    sha256_file,
    write_json_atomic,
)


@dataclasses.dataclass(kw_only=True)
class Example:
    run: str = "mini"
    runs_dir: str = "runs"
    tower_steps: int = 500
    learning_rate: float = 1e-5
    sizes: tuple[int, int] = (1, 2)
    seed: int = 3
    num_workers: int = 4


def tree(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_new_resumable_finished(tmp_path: Path) -> None:
    run = open_run(tmp_path / "runs", Example())
    assert (run.state, run.path) == ("new", tmp_path / "runs" / "mini")
    assert open_run(tmp_path / "runs", Example()).state == "resumable"
    run.finish({"pairs": 0.5})
    again = open_run(tmp_path / "runs", Example(runs_dir="elsewhere", num_workers=1))  # neither changes a result
    assert (again.state, again.results()) == ("finished", {"pairs": 0.5})


@pytest.mark.parametrize("finished", [False, True])
def test_another_config_is_refused_and_nothing_touched(tmp_path: Path, finished: bool) -> None:
    run = open_run(tmp_path, Example())
    (tmp_path / "mini-2").mkdir()
    if finished:
        run.finish({})
    before = tree(tmp_path)
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, Example(tower_steps=600, sizes=(1, 3)))
    message = str(caught.value)
    assert "tower_steps: 500 -> 600; sizes: [1, 2] -> [1, 3]" in message
    assert "run=mini-3" in message and ("finished" if finished else "started") in message
    assert tree(tmp_path) == before


@dataclasses.dataclass(kw_only=True)
class Hardware:
    tf32: bool = False


@dataclasses.dataclass(kw_only=True)
class LaterExample(Example):
    """What a later release has made of it."""

    negatives: str = "local"
    range: tuple[int, int] = (0, 9)
    hardware: Hardware = dataclasses.field(default_factory=Hardware)


def test_run_of_an_earlier_release_goes_on_where_new_keys_have_their_defaults(tmp_path: Path) -> None:
    path = open_run(tmp_path, Example()).path
    assert open_run(tmp_path, LaterExample()).state == "resumable"
    for changed in (LaterExample(negatives="global"), LaterExample(hardware=Hardware(tf32=True))):
        with pytest.raises(UserError, match="local -> global|tf32: false -> true"):
            open_run(tmp_path, changed)
    (path / "config.yaml").write_text((path / "config.yaml").read_text() + "hardware: {}\n")
    assert open_run(tmp_path, LaterExample()).state == "resumable"


def test_foreign_folders_and_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no config.yaml"):
        open_run(tmp_path, Example())
    for name in ("", "..", "a/b", "/a", ".hidden"):
        with pytest.raises(UserError, match="expected a folder name"):
            open_run(tmp_path, Example(run=name))


def test_looking_creates_nothing(tmp_path: Path) -> None:
    assert open_run(tmp_path / "runs", Example(), create=False).state == "new"
    assert list(tmp_path.iterdir()) == []


def test_start_that_died_before_its_config_is_new(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / ".config.yaml.partial").write_text("run: mi")
    assert open_run(tmp_path, Example()).state == "new"
    assert open_run(tmp_path, Example()).state == "resumable"


def test_unfinished_or_damaged_results(tmp_path: Path) -> None:
    run = open_run(tmp_path, Example())
    with pytest.raises(UserError, match="not finished"):
        run.results()
    (run.path / "finished.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        run.results()


def test_atomic_directory(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "tower"
    with pytest.raises(RuntimeError):
        with atomic_directory(target) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError
    assert not target.exists() and list(target.parent.iterdir()) == []
    with atomic_directory(target) as folder:
        (folder / "whole").write_text("x")
        assert not target.exists()
    assert tree(target) == {"whole": b"x"}
    with pytest.raises(UserError, match="exists already"):
        with atomic_directory(target):
            pass
    with atomic_directory(target, replace=True) as folder:
        (folder / "new").write_text("y")
    assert tree(target) == {"new": b"y"}
    assert [entry.name for entry in target.parent.iterdir()] == ["tower"]


def test_killed_export_leaves_no_folder_and_the_next_one_succeeds(tmp_path: Path) -> None:
    code = (
        "import sys, time; from dcr_mllm.runs import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    target = tmp_path / "tower"
    process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not target.exists()
    with atomic_directory(target) as folder:
        (folder / "whole").write_text("x")
    assert tree(tmp_path) == {"tower/whole": b"x"}


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json_atomic(file, {"path": tmp_path})
    with pytest.raises(TypeError):
        write_json_atomic(file, {"bad": object()})
    assert json.loads(file.read_text()) == {"path": str(tmp_path)}


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "config.json").write_text("{}")
    assert sha256_file(tmp_path / "a" / "model.safetensors") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    first = hash_directory(tmp_path)
    (tmp_path / "README.md").write_text("not part of the model")
    write_json_atomic(tmp_path / "provenance.json", {"created": "now"})
    assert hash_directory(tmp_path) == first
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    renamed = hash_directory(tmp_path)
    (tmp_path / "other.json").write_text("{ }")
    assert len({first, renamed, hash_directory(tmp_path)}) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no .safetensors or .json"):
        hash_directory(tmp_path / "empty")


def test_provenance_says_how_something_was_made(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    facts = provenance(Example(), tower=tmp_path, steps=7)
    assert facts["config"]["tower_steps"] == 500 and facts["seeds"] == {"seed": 3} and facts["steps"] == 7
    assert facts["tower"] == {"path": str(tmp_path), "sha256": hash_directory(tmp_path)}
    assert facts["packages"]["pillow"] and "torch" in facts["packages"]
    assert facts["git"] is None or set(facts["git"]) == {"revision", "dirty"}
    assert facts["created"].endswith("+00:00") and facts["created"][:4] == time.strftime("%Y", time.gmtime())
    write_json_atomic(tmp_path / "provenance.json", facts)
