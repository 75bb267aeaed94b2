"""Validation during the tower phase: true numbers, untouched training, the right step exported, also after a kill."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dcr_mllm.errors import UserError
from dcr_mllm.headers import tower_summary
from dcr_mllm.launch import Launch
from dcr_mllm.mini.data import write_labelled, write_mmvp_vlm
from dcr_mllm.runs import open_run
from stage1_dcr.config import Stage1Config
from stage1_dcr.selection import Measurement, choose, loss_warning, read_measurements, trajectory, write_measurements
from stage1_dcr.validation_split import MAX_LABELLED, check_validation, read_split

NUM_STEPS, EVERY = 6, 2


def measured(step: int, pairs: float | None, zero_shot: float | None, num_pairs: int = 900) -> Measurement:
    return Measurement(step=step, pairs=pairs, zero_shot=zero_shot, num_pairs=num_pairs, num_images=1000)


BASE = measured(0, 20.0, 90.0)


# The rule, on hand-made trajectories.


@pytest.mark.parametrize(
    ("steps", "expected", "within"),
    [
        ([(21.0, 90.0), (25.0, 89.0), (23.0, 89.5)], 2, True),  # a peak
        ([(21.0, 90.0), (25.0, 87.9), (23.0, 88.0)], 3, True),  # the peak costs more than the margin, exactly 2 is kept
        ([(24.0, 89.0), (24.0, 90.0), (23.0, 90.0)], 1, True),  # of equals the earlier one
        ([(19.0, 90.0), (18.0, 90.0), (17.0, 90.0)], 1, True),  # the base itself is no candidate
        ([(25.0, 80.0), (21.0, 86.0), (30.0, 70.0)], 2, False),  # none is within the margin: the smallest loss
        ([(25.0, None), (26.0, None), (24.0, None)], 2, True),  # without labelled images by pairs alone
    ],
)
def test_best_validation(steps: list[tuple[float, float | None]], expected: int, within: bool) -> None:
    base = BASE if steps[0][1] is not None else measured(0, 20.0, None)
    measurements = [base, *(measured(number, *values) for number, values in enumerate(steps, start=1))]
    choice = choose(measurements, "best-validation", 2.0)
    assert choice is not None and (choice.chosen.step, choice.within_margin) == (expected, within)
    final = choose(measurements, "final", 2.0)
    assert final is not None and final.chosen.step == 3
    # What a run keeps: whatever is chosen among all steps was chosen when it was measured.
    then = choose(measurements[: expected + 1], "best-validation", 2.0)
    assert then is not None and then.chosen.step == expected


def test_margin_is_not_missed_by_rounding() -> None:
    base, step = measured(0, 20.0, 64.4), measured(1, 20.0, 62.4)
    assert 64.4 - 62.4 > 2.0
    assert loss_warning(base, step, 2.0) is None
    warning = loss_warning(base, dataclasses.replace(step, zero_shot=62.3), 2.0)
    assert warning is not None and "2.1 points below" in warning and "zero_shot_margin 2" in warning


@pytest.mark.parametrize(
    ("pairs", "rule", "words"),
    [
        # Two standard errors of 900 pairs at 30 %: 2 sqrt(0.3 * 0.7 / 900) = 3.06 points.
        ([22.0, 22.5, 21.0], "best-validation", "within noise of it (two binomial standard errors, 2.8 points)"),
        ([25.0, 30.0, 25.0], "best-validation", "a peak in the middle"),
        ([25.0, 30.0, 27.0], "best-validation", "a plateau, not a peak"),
        ([25.0, 27.0, 30.0], "best-validation", "more steps might change it further"),
        ([25.0, 32.0, 27.0], "final", "the peak lay before it"),
    ],
)
def test_trajectory_in_words(pairs: list[float], rule: str, words: str) -> None:
    measurements = [BASE, *(measured(number, value, 90.0) for number, value in enumerate(pairs, start=1))]
    choice = choose(measurements, rule, 2.0)
    assert choice is not None and words in trajectory(measurements, choice)


def test_trajectory_whose_best_step_lost_its_classes() -> None:
    measurements = [BASE, measured(1, 33.0, 90.0), measured(2, 45.0, 80.0)]
    choice = choose(measurements, "best-validation", 2.0)
    assert choice is not None and choice.chosen.step == 1
    words = trajectory(measurements, choice)
    assert "the last step, 2, names more (45.0 %), but lost more zero-shot accuracy" in words


# What is refused before anything is loaded.


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 pairs and 40 labelled images of the drawn world."""
    directory = tmp_path_factory.mktemp("validation")
    write_mmvp_vlm(directory / "mmvp_vlm", "validation", 4)
    write_labelled(directory / "labelled", "validation", num_train=2, num_test=40)
    return directory


def test_split_that_cannot_be_measured_is_refused(split: Path, tiny_clip: Path, tmp_path: Path) -> None:
    tower = tower_summary(tiny_clip)

    def check(validation: Path, text_side: bool = True, **changes: Any) -> list[str]:
        config = Stage1Config(tower="t", denoiser="d", validation=str(validation), **changes)
        return check_validation(config, dataclasses.replace(tower, has_text_side=text_side))

    with pytest.raises(UserError, match="is no directory"):
        check(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has neither mmvp_vlm/ nor labelled/"):
        check(tmp_path)
    with pytest.raises(UserError, match="needs a tower with a text side"):
        check(split, text_side=False)
    (tmp_path / "labelled").symlink_to(split / "labelled")
    with pytest.raises(UserError, match="has no mmvp_vlm/"):
        check(tmp_path, select="best-validation")
    assert check(tmp_path)
    assert "36 pairs, 40 labelled" in check(split)[0]
    assert "ignored" in check(split, tower_steps=0)[0]


def test_few_of_many_images_are_the_same_each_time(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_LABELLED > 40
    whole = read_split(split)
    monkeypatch.setattr("stage1_dcr.validation_split.MAX_LABELLED", 15)
    few, again = read_split(split), read_split(split)
    assert len(few.files) == len(few.truth) == 15 and few.files == again.files
    index = dict(zip(whole.files, whole.truth.tolist(), strict=True))
    assert [index[file] for file in few.files] == few.truth.tolist()
    assert few.files != whole.files[:15]


# Whole runs on tiny models.


LAUNCH = Launch(device="cpu", num_processes=1, precision="fp32", deepspeed=None)


@pytest.fixture(scope="module")
def configure(tiny_clip: Path, tiny_denoiser: Path, tiny_shards: str) -> Callable[..., Stage1Config]:
    def build(folder: Path, **changes: Any) -> Stage1Config:
        values = {
            **{"tower": str(tiny_clip), "denoiser": str(tiny_denoiser), "data": tiny_shards, "projector_width": 16},
            **{"projector_steps": 1, "tower_steps": NUM_STEPS, "tower_learning_rate": 1e-2, "lora_rank": 4},
            **{"batch_size": 3, "accumulation": 1, "num_workers": 0, "shuffle_buffer": 10, "save_every": 4},
            **{"log_every": 1, "report_to": "none", "run": "test", "runs_dir": str(folder), "validate_every": EVERY},
        }
        return Stage1Config(**{**values, **changes})  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="module")
def train(configure: Callable[..., Stage1Config], tiny_shards: str) -> Callable[..., Path]:
    """Runs stage 1 in this process; returns the run's directory."""

    def run(folder: Path, **changes: Any) -> Path:
        from stage1_dcr.train import run_stage1

        config = configure(folder, **changes)
        run_stage1(config, LAUNCH, open_run(config.runs_dir, config), tiny_shards)
        return folder / "test"

    return run


@pytest.fixture(scope="module")
def plain(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def validated(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, split: Path) -> Path:
    return train(tmp_path_factory.mktemp("validated"), validation=str(split))


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "tower" / "model.safetensors")


def losses(run: Path) -> list[tuple[str, int, float, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["phase"], record["step"], record["loss"], record["grad_norm"]) for record in records]


def same(one: Path, other: Path) -> bool:
    first, second = trained(one), trained(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_validation_changes_no_bit_of_training(plain: Path, validated: Path) -> None:
    assert losses(plain) == losses(validated)  # with dropout, so that a random number drawn aside would show
    assert same(plain, validated)
    assert not (plain / "validation.jsonl").exists()


def test_numbers_are_those_of_the_evaluation(validated: Path, split: Path, tiny_clip: Path) -> None:
    from dcr_mllm.evaluation.tower import evaluate_towers

    found = read_measurements(validated)
    assert [measurement.step for measurement in found] == [0, 2, 4, 6]
    towers = {"base": tiny_clip, "new": validated / "tower"}
    judged = evaluate_towers(towers, mmvp_vlm=split / "mmvp_vlm", labelled=split / "labelled")["towers"]
    for measurement, name in ((found[0], "base"), (found[-1], "new")):
        pairs = judged[name]["mmvp_vlm"]
        assert measurement.pairs == pytest.approx(100 * pairs["num_correct"] / pairs["num_pairs"])
        assert measurement.zero_shot == pytest.approx(judged[name]["zero_shot"]["accuracy"])
        assert (measurement.num_pairs, measurement.num_images) == (36, 40)
    assert len({(measurement.pairs, measurement.zero_shot) for measurement in found}) > 1, "training changed nothing"


# A trajectory with a peak at step 2, whatever the tower does.
SCRIPT = [
    measured(step, pairs, zero_shot)
    for step, pairs, zero_shot in ((0, 20.0, 90.0), (2, 30.0, 89.0), (4, 25.0, 80.0), (6, 22.0, 85.0))
]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    from stage1_dcr.validation import Validation

    lines = {measurement.step: measurement for measurement in SCRIPT}
    monkeypatch.setattr(Validation, "_measure", lambda self, step: lines[step])


@pytest.fixture(scope="module")
def two_steps(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("two"), tower_steps=2)


def test_best_step_is_exported(
    scripted: None, train: Callable[..., Path], plain: Path, two_steps: Path, split: Path, tmp_path: Path
) -> None:
    best = train(tmp_path, validation=str(split), select="best-validation")
    assert same(best, two_steps) and not same(best, plain)
    assert losses(best) == losses(plain)
    record = json.loads((best / "tower" / "provenance.json").read_text())["selected"]
    assert (record["step"], record["rule"], record["validation"]["pairs"]) == (2, "best-validation", 30.0)
    card = (best / "tower" / "README.md").read_text()
    assert "step 2, best-validation; 900 validation pairs: 30.0 % (base 20.0 %)" in card


def test_resumed_run_chooses_the_same_step(
    scripted: None, train: Callable[..., Path], two_steps: Path, split: Path, tmp_path: Path, monkeypatch
) -> None:
    """Killed after the checkpoint of step 4; what lies after it is dropped and measured again."""
    from stage1_dcr.validation import Validate

    settings = {"validation": str(split), "select": "best-validation"}

    class Killed(Exception):
        pass

    real = Validate.on_step_end

    def die(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Validate, "on_step_end", die)
        with pytest.raises(Killed):
            train(tmp_path, **settings)
    run = tmp_path / "test"
    # As if a step after the checkpoint had been the best.
    write_measurements(run, [*read_measurements(run), measured(5, 99.0, 90.0)])
    states = run / "checkpoints" / "validation"
    (states / "step-5.safetensors").write_bytes((states / "step-2.safetensors").read_bytes())
    train(tmp_path, **settings)
    assert read_measurements(run) == SCRIPT
    assert [file.name for file in states.iterdir()] == ["step-2.safetensors"]
    assert same(run, two_steps)


@pytest.fixture(scope="module")
def measure(
    configure: Callable[..., Stage1Config], split: Path, validated: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """A `Validation` that has gone through the steps of a run."""
    from stage1_dcr.train import Stage1
    from stage1_dcr.validation import Validation

    stage = Stage1(configure(tmp_path_factory.mktemp("stage")), LAUNCH)
    state = load_file(validated / "checkpoints" / "tower" / f"checkpoint-{NUM_STEPS}" / "model.safetensors")

    def go(run: Path, directory: Path = split, steps: tuple[int, ...] = (2, 4, 6), **changes: Any) -> Any:
        stage.config = configure(run, validation=str(directory), **changes)
        run.mkdir(exist_ok=True)
        validation = Validation(stage, directory, run)
        for step in steps:
            validation.measure(step, state)
        return validation

    return go


def test_loss_of_zero_shot_is_named_once_and_at_the_end(scripted: None, measure, tmp_path: Path, caplog) -> None:
    validation = measure(tmp_path)
    assert [line for line in caplog.messages if "points below" in line] == [caplog.messages[-1]]
    assert "80.0 % at step 4" in caplog.messages[-1] and "10.0 points below" in caplog.messages[-1]
    assert validation.selected_state() is None
    assert caplog.messages[-1].startswith("the exported tower: ") and "85.0 % at step 6" in caplog.messages[-1]
    assert not (tmp_path / "checkpoints").exists()  # only best-validation keeps states


def test_chosen_step_within_the_margin_is_no_news(scripted: None, measure, tmp_path: Path, caplog) -> None:
    validation = measure(tmp_path, select="best-validation")
    caplog.clear()
    assert validation.selected_state() is not None
    assert all(record.levelname == "INFO" for record in caplog.records)
    margin = measure(tmp_path / "none", select="best-validation", zero_shot_margin=0.5)
    margin.selected_state()
    assert any("no measured step kept" in line for line in caplog.messages)


def test_images_that_do_not_fit_are_decoded_each_time(
    measure, validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage1_dcr.validation.MAX_KEPT_BYTES", 1)
    measure(tmp_path, steps=(6,))
    assert read_measurements(tmp_path) == [read_measurements(validated)[index] for index in (0, -1)]


def test_damaged_image_is_seen_before_training(measure, split: Path, tmp_path: Path) -> None:
    shutil.copytree(split / "labelled", tmp_path / "split" / "labelled")
    image = next((tmp_path / "split" / "labelled" / "images").glob("test-*"))
    image.write_bytes(b"no image")
    with pytest.raises(UserError, match=image.name):
        measure(tmp_path / "run", tmp_path / "split")
