"""The pieces that both stages add to the Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dcr_mllm.errors import UserError
from dcr_mllm.launch import Launch
from dcr_mllm.prefetch import Prefetcher
from dcr_mllm.trainer import (
    COMPLETE,
    Metrics,
    StreamTrainer,
    cut_metrics,
    keep_trainable_only,
    last_checkpoint,
    read_position,
    stage_arguments,
    trainable_state,
)


def test_metrics_are_means_since_the_last_reading():
    metrics = Metrics()
    for value in (1.0, 2.0, 6.0):
        metrics.add({"a": torch.tensor(value), "b": torch.tensor(-value)})
    names, sums = metrics.take()
    assert names == ["a", "b"] and sums.tolist() == [[9.0, -9.0], [3.0, 3.0]]
    assert metrics.take()[1] is None


def test_metrics_weigh_what_they_are_told_to():
    metrics = Metrics()
    for value, weight in ((1.0, 3.0), (5.0, 1.0), (7.0, 0.0)):
        metrics.add({"a": torch.tensor(value), "b": torch.tensor(value)}, {"b": torch.tensor(weight)})
    _, sums = metrics.take()
    assert sums.tolist() == [[13.0, 8.0], [3.0, 4.0]]


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


@pytest.mark.parametrize("prefetch", [False, True])
def test_batches_come_through_the_prefetcher_where_it_is_asked_for(tmp_path: Path, prefetch: bool):
    from torch.utils.data import DataLoader
    from transformers import TrainingArguments

    from stage1_dcr.config import Stage1Config
    from stage1_dcr.images import StreamPosition

    loader = DataLoader([1, 2])
    trainer = StreamTrainer(
        model=nn.Linear(1, 1),
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        loader=loader,
        position=StreamPosition(),
        metrics=Metrics(),
        metrics_file=tmp_path / "metrics.jsonl",
        phase="projector",
        config=Stage1Config(tower="a", denoiser="b"),
        replay="stage1_dcr.replay",
        prefetch=prefetch,
    )
    found = trainer.get_train_dataloader()
    assert isinstance(found, Prefetcher) == prefetch
    assert (found.loader if prefetch else found) is loader


@pytest.mark.parametrize("device, tf32", [("cpu", True), ("cuda", False)])
def test_tf32_is_decided_and_not_left_to_pytorch(tmp_path: Path, device: str, tf32: bool):
    """PyTorch's default has convolutions in TF32 and products not; on CUDA both are set, and not by the Trainer."""
    from stage1_dcr.config import Stage1Config

    config = Stage1Config(tower="a", denoiser="b", report_to="none")
    launch = Launch(device=device, num_processes=1, precision="fp32", deepspeed=None)
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        assert stage_arguments(config, launch, "tower", tmp_path).tf32 is None
        assert [switch.allow_tf32 for switch in switches] == [tf32, tf32]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
