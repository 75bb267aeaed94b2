"""Stopping in time and bad steps, on a toy module in this process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dcr_mllm.bad_step import WEIGHTS_FILE, read_rank, read_step, refuse_to_repeat
from dcr_mllm.errors import UserError
from dcr_mllm.launch import Launch
from dcr_mllm.stopping import TOLD_TO_STOP, Stopped, listening
from dcr_mllm.trainer import COMPLETE, Metrics, StreamTrainer, last_checkpoint, stage_arguments
from stage1_dcr.config import Stage1Config

STEPS, ACCUMULATION = 5, 2


class Toy(nn.Module):
    """A linear layer with dropout; a large first number makes the gradient infinite, but not the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        loss = self.layer(self.dropout(x)).square().mean()
        if (x[:, 0] > 50).any():
            loss = loss + (self.layer.weight.sum() * 0).sqrt()  # zero, with an infinite derivative
        return {"loss": loss}


class Numbers(Dataset):
    """Item i is drawn from seed i; `change` may do something to it, and something else besides."""

    def __init__(self, change: Callable[[int, Tensor], None]):
        self.change = change

    def __len__(self) -> int:
        return 2 * STEPS * ACCUMULATION

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        self.change(index, x)
        return {"x": x}


class NoPosition:
    def update(self, batch: dict[str, Any]) -> None: ...

    def to_json(self) -> str:
        return "{}"


def trainer(
    folder: Path,
    change: Callable[[int, Tensor], None] = lambda i, x: None,
    *,
    start: int = 0,
    workers=0,
    save_every=100,
) -> StreamTrainer:
    config = Stage1Config(tower="t", denoiser="d", save_every=save_every, log_every=1, report_to="none")
    launch = Launch(device="cpu", num_processes=1, precision="fp32", deepspeed=None)
    arguments = stage_arguments(
        config,
        launch,
        "toy",
        folder / "checkpoints",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        learning_rate=0.1,
    )
    items = torch.utils.data.Subset(Numbers(change), range(2 * ACCUMULATION * start, 2 * ACCUMULATION * STEPS))
    return StreamTrainer(
        model=Toy(),
        args=arguments,
        loader=DataLoader(items, batch_size=2, num_workers=workers, generator=torch.Generator()),
        position=NoPosition(),
        metrics=Metrics(),
        metrics_file=folder / "metrics.jsonl",
        phase="toy",
        config=config,
        replay="toy.replay",
    )


def weights(trainer: StreamTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_the_running_step_and_the_rest_is_the_same(tmp_path: Path, number: signal.Signals):
    whole = trainer(tmp_path / "whole")
    whole.train()

    def kill(index: int, x: Tensor) -> None:
        if index == 5:  # the first micro-step of step 2
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    first = trainer(tmp_path / "parts", kill)
    with pytest.raises(Stopped, match=f"stopped by {number.name} at step 2 of the toy phase; the same command"):
        with listening():
            first.train()
    assert signal.getsignal(number) is before
    checkpoint = last_checkpoint(tmp_path / "parts" / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-2" and (checkpoint / COMPLETE).is_file()

    second = trainer(tmp_path / "parts", start=2)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(second).items())
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path):
    def kill(index: int, x: Tensor) -> None:
        if index == 4 * STEPS - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with listening():
        trainer(tmp_path, kill).train()
    assert (tmp_path / "checkpoints" / f"checkpoint-{STEPS}" / COMPLETE).is_file()


def test_told_before_it_began(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TOLD_TO_STOP, "1")
    with pytest.raises(Stopped, match="before anything began"):
        with listening():
            raise AssertionError


def test_signals_do_not_reach_loading_workers(tmp_path: Path):
    """Slurm signals every process of a step; a worker that died of it would be an error in training."""

    def kill(index: int, x: Tensor) -> None:
        if index == 5:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)

    training = trainer(tmp_path, kill, workers=1)
    training.train()
    assert training.state.global_step == STEPS


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_loss_keeps_the_step_before_it_changes_anything(tmp_path: Path, value: float):
    def poison(index: int, x: Tensor) -> None:
        if index == 10:  # in the second micro-step of step 3
            x[2] = value

    training = trainer(tmp_path, poison, save_every=1)
    with pytest.raises(UserError, match=r"step 3 of the toy phase \(rank 0\).*python -m toy.replay .*bad-step-3"):
        training.train()
    directory = tmp_path / "bad-step-3"
    record = read_step(directory)
    assert record["step"] == 3 and record["num_processes"] == 1 and record["weights_finite"]
    (good, bad), steps = record["losses"][0], read_rank(directory, 0)
    assert good == good and not torch.tensor(bad).isfinite() and len(steps) == 2

    # Nothing after the step before was saved, and the weights are those of that step.
    checkpoint = last_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-2"
    before = load_file(directory / WEIGHTS_FILE)
    saved = load_file(checkpoint / "model.safetensors")
    assert before.keys() == saved.keys() and all(torch.equal(before[name], saved[name]) for name in saved)

    # From the folder alone, dropout included: the good micro-step to the bit, the bad one as bad.
    module = Toy()
    module.load_state_dict(before)
    again = []
    for step in steps:
        step.restore_random()
        again.append(module.train()(**step.inputs)["loss"].item())
    assert again[0] == good and not torch.tensor(again[1]).isfinite()


def test_an_infinite_gradient_of_a_finite_loss_is_never_saved(tmp_path: Path):
    def poison(index: int, x: Tensor) -> None:
        if index == 12:  # in step 4, which saves
            x[0] = 100.0

    training = trainer(tmp_path, poison, save_every=2)
    with pytest.raises(UserError, match="weights are not finite after step 4.*gradient.*checkpoint-2"):
        training.train()
    checkpoint = last_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-2"


def test_an_infinite_gradient_is_named_when_the_next_loss_shows_it(tmp_path: Path):
    def poison(index: int, x: Tensor) -> None:
        if index == 8:
            x[0] = 100.0

    with pytest.raises(UserError, match="step 4 of the toy phase"):
        trainer(tmp_path, poison).train()
    assert not read_step(tmp_path / "bad-step-4")["weights_finite"]


def test_a_restarted_process_does_not_run_into_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(UserError):
        trainer(tmp_path, lambda index, x: x.fill_(torch.nan)).train()
    refuse_to_repeat(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="bad-step-1: not trying again"):
        refuse_to_repeat(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    refuse_to_repeat(tmp_path)
