"""The plan of stage 2: the memory of its step against the step itself, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dcr_mllm import plan
from dcr_mllm.launch import Launch
from dcr_mllm.memory import held_by, step_memory
from stage2_llava.config import AlignConfig, InstructConfig, Stage2Config
from stage2_llava.plan import micro_batch_that_fits
from stage2_llava.plan_step import REST, PlannedStep, planned_memory

CPU = Launch(device="cpu", num_processes=1, precision="fp32", deepspeed=None)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("tower", ["tiny_clip", "tiny_siglip"])
def test_the_estimate_is_that_of_the_step_with_real_tensors(
    tower: str, tuning: str, tiny_llama: Path, request: pytest.FixtureRequest
):
    instruct = InstructConfig(data="mini", micro_batch_size=2, batch_size=2, tuning=tuning, lora_rank=2)  # type: ignore[arg-type]
    config = Stage2Config(
        towers={"baseline": str(request.getfixturevalue(tower))}, llm=str(tiny_llama), instruct=instruct
    )
    arguments = (config, CPU, "instruct", instruct, 40)
    torch.manual_seed(0)
    step = PlannedStep.build(*arguments)
    before = [*held_by(step.module), *step.batch.values()]
    expected = step_memory(step.run, step.components(), before, rest=REST)
    _, found = planned_memory(*arguments)
    # Tensors that exist need no attention mask where nothing is padded; the plan counts one, as for padded batches.
    mask = 2 * 40 * 40 * 5
    assert abs(sum(found.values()) - sum(expected.values())) <= 0.01 * sum(expected.values()) + mask


def test_checkpointing_saves_the_layers_activations(tiny_clip: Path, tiny_llama: Path):
    def layers(checkpointing: bool) -> int:
        phase = AlignConfig(data="mini", micro_batch_size=2, batch_size=2)
        towers = {"baseline": str(tiny_clip)}
        config = Stage2Config(towers=towers, llm=str(tiny_llama), align=phase, gradient_checkpointing=checkpointing)
        return sum(planned_memory(config, CPU, "align", phase, 100)[1].values())

    assert layers(True) < 0.8 * layers(False)


def test_the_command_prints_every_part_and_what_fits(tiny_clip: Path, tiny_llama: Path, tmp_path: Path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red square."}]
    (tmp_path / "data.json").write_text(
        json.dumps([{"id": str(k), "image": "a.png", "conversations": turns} for k in range(48)])
    )
    arguments = [
        "llava-1.5-7b",
        f"towers={{baseline: {tiny_clip}}}",
        f"llm={tiny_llama}",
        f"runs_dir={tmp_path}",
        *(f"{phase}.data={tmp_path / 'data.json'}" for phase in ("align", "instruct")),
        *(f"{phase}.images={tmp_path}" for phase in ("align", "instruct")),
        "align.batch_size=16",
        "align.micro_batch_size=4",
        "instruct.batch_size=16",
        "instruct.micro_batch_size=4",
        "--gpus=2",
        "--throughput=2",
    ]
    assert plan.main([*arguments, "--gpu-memory=1"]) == 0
    text = capsys.readouterr().out
    assert "align: 3 steps of 16 = 48 samples for each of 1 tower" in text
    assert "largest instruct.micro_batch_size that fits: 8" in text
    # 16 image tokens, and two for each of the sample's words.
    assert "instruct with every sample 3" in text
    assert "align 24 s, instruct 24 s" in text
    for part in ("step: language model", "optimizer state", "disk:", "align fits: "):
        assert part in text


class Linear:
    """A `Memory` of 2 GiB and 1 more per sample, on two processes."""

    phase = "instruct"
    launch = Launch(device="cuda", num_processes=2, precision="bf16", deepspeed=None)

    def peak(self, micro_batch_size: int) -> int:
        return (2 + micro_batch_size) * plan.GIB


def test_the_largest_micro_batch_makes_up_the_global_one():
    phase = InstructConfig(batch_size=16, micro_batch_size=1)
    found = micro_batch_that_fits(Linear(), phase, 9 * plan.GIB)  # type: ignore[arg-type]
    assert "largest instruct.micro_batch_size that fits: 4 (6 GiB)" in found, "7 would fit, but not divide 8"
    assert isinstance(micro_batch_that_fits(Linear(), phase, plan.GIB), plan.Problem)  # type: ignore[arg-type]
