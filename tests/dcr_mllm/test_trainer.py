"""The pieces that both stages add to the Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dcr_mllm.errors import UserError
from dcr_mllm.trainer import (
    COMPLETE,
    Metrics,
    cut_metrics,
    keep_trainable_only,
    last_checkpoint,
    read_position,
    trainable_state,
)


def test_metrics_are_means_since_the_last_reading():
    metrics = Metrics()
    for value in (1.0, 2.0, 6.0):
        metrics.add({"a": torch.tensor(value), "b": torch.tensor(-value)})
    names, means = metrics.take()
    assert names == ["a", "b"] and means.tolist() == [3.0, -3.0]
    assert metrics.take()[1] is None


def test_state_dict_speaks_of_trainable_tensors_only():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    keep_trainable_only(module)
    state = module.state_dict()
    assert set(state) == {"1.weight", "1.bias"} == set(trainable_state(module))
    module.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="1.bias"):
        module.load_state_dict({"1.weight": state["1.weight"]}, strict=True)


def test_half_written_checkpoints_are_passed_over(tmp_path: Path):
    for step, complete in ((9, True), (10, True), (100, False)):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        if complete:
            (directory / COMPLETE).touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "nothing") is None


def test_another_number_of_processes_is_refused(tmp_path: Path):
    (tmp_path / "stream_rank0.json").write_text("{}")
    assert read_position(tmp_path, 0, 1) == "{}"
    with pytest.raises(UserError, match="1 processes and cannot go on with 2"):
        read_position(tmp_path, 0, 2)


def test_resumed_run_does_not_log_steps_twice(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    records = [{"phase": phase, "step": step} for phase in ("projector", "tower") for step in (1, 2, 3)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"phase": "tow')
    cut_metrics(file, "tower", 2)
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert kept == records[:5]
