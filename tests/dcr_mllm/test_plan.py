"""The command `plan`: which stage a config is of, what fits, and what parameters cost under ZeRO."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from dcr_mllm import plan
from dcr_mllm.errors import UserError
from dcr_mllm.launch import launch_on
from dcr_mllm.plan import Problem, disk_block, find_stage, fits_block, largest_that_fits
from dcr_mllm.zero import BUCKETS, FROZEN_BESIDE, GRADIENTS, OPTIMIZER, TRAINED, checkpoint_bytes, parameter_memory


def target(gpus: int = 8, gib: float = 80) -> plan.Target:
    return plan.Target(gpus=gpus, gpu_memory=int(gib * plan.GIB), throughput=None, measure=False)


@pytest.mark.parametrize("usable", [0, 99, 100, 101, 450, 1000, 5000])
@pytest.mark.parametrize("curve", [lambda n: 100 * n, lambda n: 90 + 10 * n * n, lambda n: 100 + 50 * (n > 3)])
def test_largest_that_fits_is_that_of_trying_all(usable: int, curve):
    calls: list[int] = []

    def peak(n: int) -> int:
        calls.append(n)
        return curve(n)

    expected = max((n for n in range(1, 17) if curve(n) <= usable), default=0)
    assert largest_that_fits(peak, 16, usable) == expected
    assert len(calls) == len(set(calls)) <= 8


def test_the_stage_is_found_by_keys_and_an_ambiguous_name_is_refused(tmp_path: Path):
    one, two = tmp_path / "a.yaml", tmp_path / "b.yaml"
    one.write_text("tower: mini\ndenoiser: mini\n")
    two.write_text("llm: mini\n")
    assert find_stage(str(one), [], None)[0].CONFIG.__name__ == "Stage1Config"
    assert find_stage(str(two), ["towers.x=mini"], None)[0].CONFIG.__name__ == "Stage2Config"
    assert find_stage("openai-l14-224", [], None)[0].CONFIG.__name__ == "Stage1Config"
    with pytest.raises(UserError, match="--stage"):
        find_stage("mini", [], None)
    assert find_stage("mini", [], "2")[0].CONFIG.__name__ == "Stage2Config"
    with pytest.raises(UserError, match="keys that stage 1 does not know"):
        find_stage(str(one), ["llm=mini"], None)
    with pytest.raises(UserError, match="did you mean 'openai-l14-224'"):
        find_stage("openai-l14-22", [], None)


def test_a_peak_fits_up_to_the_share_that_may_be_planned():
    assert not isinstance(fits_block(int(71.9 * plan.GIB), target(), ""), Problem)
    assert isinstance(fits_block(int(72.1 * plan.GIB), target(), ""), Problem)
    assert fits_block(1, plan.Target(gpus=1, gpu_memory=None, throughput=None, measure=False), "") is None


def test_a_full_disk_is_a_problem(tmp_path: Path):
    assert not isinstance(disk_block(tmp_path / "not" / "there", {"tower": 1}), Problem)
    assert isinstance(disk_block(tmp_path, {"tower": 2**60}), Problem)


def test_packages_as_required_are_no_problem_and_an_old_one_is(monkeypatch: pytest.MonkeyPatch):
    import importlib.metadata

    assert plan.check_packages() == []
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["torch>=99", "nosuchpackage", "pytest>=99; extra=='x'"]
    )
    old, missing = plan.check_packages()
    assert "torch is" in old and "torch>=99" in old
    assert "nosuchpackage is not installed" in missing


class Trained(nn.Module):
    """1000 parameters that train, 3000 that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.lora = nn.Linear(100, 10, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(100, 10, bias=False).requires_grad_(False) for _ in range(3)])


@pytest.mark.parametrize(
    ("deepspeed", "expected"),
    [
        # bytes of: trained weights, frozen ones beside, gradients, optimizer, buffers; four processes
        ("none", (2000, 6000, 2000, 8000, 0)),
        ("zero1", (2000, 6000, 4000, 3000, 4 * 50_000_000)),
        ("zero2", (2000, 6000, 1000, 3000, 2 * 2 * 50_000_000)),
        ("zero2_offload", (2000, 6000, 1000, 0, 2 * 2 * 50_000_000)),
        ("zero3", (500, 1500, 1000, 3000, 2 * 2000 + 2 * 50_000_000)),
        ("zero3_offload", (0, 0, 1000, 0, 2 * 2000 + 2 * 50_000_000)),
    ],
)
def test_bytes_under_each_zero_stage(deepspeed: str, expected: tuple[int, ...]):
    found = parameter_memory(Trained().bfloat16(), launch_on("cuda", 4, "bf16", deepspeed))
    assert tuple(found[name] for name in (TRAINED, FROZEN_BESIDE, GRADIENTS, OPTIMIZER, BUCKETS)) == expected


def test_a_checkpoint_holds_what_trains_and_its_optimizer():
    assert checkpoint_bytes(Trained(), launch_on("cpu", 1, "fp32", "none")) == 12_000
    assert checkpoint_bytes(Trained(), launch_on("cuda", 8, "bf16", "zero2")) == 18_000


def test_arguments_are_refused_in_a_sentence(capsys: pytest.CaptureFixture):
    for arguments, words in (
        (["mini", "--stage", "1", "--gpus", "-1"], "--gpus must not be negative"),
        (["mini", "--stage", "1", "--gpu-memory", "0"], "--gpu-memory must be positive"),
        (["mini", "--stage", "1", "--gpus", "0", "--gpu-memory", "8"], "--gpu-memory is given with --gpus 0"),
        (["mini", "--stage", "1", "tau=0"], "tau must be positive"),
    ):
        assert plan.main(arguments) == 2
        assert words in capsys.readouterr().err
