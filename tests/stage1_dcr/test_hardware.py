"""Settings for an accelerator: inert or equal on the CPU, refused or warned of where they cannot work."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcr_mllm.config import load_config
from dcr_mllm.errors import UserError
from dcr_mllm.hardware import choose_tf32, exact_fp32, set_tf32, warn_ignored
from dcr_mllm.runs import open_run
from stage1_dcr.config import Stage1Config
from stage1_dcr.denoiser import Denoiser
from stage1_dcr.hardware import Stage1Hardware, choose_attention, prepare_denoiser
from stage1_dcr.objective import auto_rows_per_chunk
from stage1_dcr.train import Stage1
from stage2_llava.config import Stage2Hardware
from tests.stage1_dcr import hardware_cases as cases
from tests.stage1_dcr.test_step import batch, build


@pytest.fixture
def kernels():
    """Any choice of attention kernels is undone."""
    yield
    choose_attention("auto")


def test_channels_last(tiny_denoiser: Path):
    cases.channels_last_changes_nothing(tiny_denoiser, "cpu")


def test_compiled_blocks_are_whole_graphs(tiny_denoiser: Path):
    cases.compiled_blocks_change_nothing(tiny_denoiser, "cpu", "eager")


@pytest.mark.slow  # minutes of C++ compilation
@pytest.mark.timeout(1200)
def test_compiled_blocks(tiny_denoiser: Path):
    cases.compiled_blocks_change_nothing(tiny_denoiser, "cpu", "inductor")


# In chunks of one size there is one recording; a last chunk of its own size needs another.
@pytest.mark.parametrize("rows_per_chunk, num_recordings", [(1, 1), (2, 1), (3, 2), (4, 1)])
def test_steps_from_recordings_are_the_plain_ones(tiny_denoiser: Path, rows_per_chunk: int, num_recordings: int):
    cases.recorded_changes_nothing(tiny_denoiser, "cpu", cases.record_on_the_cpu, rows_per_chunk, num_recordings)


def test_recorded_gradients_are_kept(tiny_denoiser: Path):
    cases.recorded_gradients_are_kept(tiny_denoiser, "cpu", cases.record_on_the_cpu)


def test_recording_is_for_cuda_only(tiny_denoiser: Path):
    """On a CPU the setting leaves the plain call, which would otherwise fail: there is nothing to record."""
    denoiser = Denoiser.load(tiny_denoiser)
    expected = cases.loss_and_gradients(denoiser)
    prepare_denoiser(denoiser, Stage1Hardware(cuda_graphs=True))
    for found, wanted in zip(cases.loss_and_gradients(denoiser), expected, strict=True):
        assert torch.equal(found, wanted)


def test_recording_is_refused_where_other_threads_would_spoil_it(tiny_denoiser: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda callables, sample_args, num_warmup_iters=3: None)
    config = Stage1Config(tower="-", denoiser="-", hardware=Stage1Hardware(cuda_graphs=True))
    with pytest.raises(UserError, match="hardware.cuda_graphs needs a PyTorch"):
        Stage1.load_denoiser(SimpleNamespace(config=config, denoiser_path=tiny_denoiser, dtype=torch.float32))


class Kernels(TorchDispatchMode):
    """Collects the attention kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.__name__:
            self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_attention_kernels(tiny_denoiser: Path, kernels: None):
    denoiser = Denoiser.load(tiny_denoiser)
    expected = cases.loss_and_gradients(denoiser)
    for choice, flash in (("auto", True), ("fused", True), ("math", False)):
        choose_attention(choice)
        with Kernels() as used:
            cases.assert_same(cases.loss_and_gradients(denoiser), expected)
        assert ("_scaled_dot_product_flash_attention_for_cpu" in used.seen) == flash, (choice, used.seen)


def test_bf16_denoiser_keeps_losses_and_noise_in_fp32(tiny_denoiser: Path):
    expected = cases.loss_and_gradients(Denoiser.load(tiny_denoiser))
    denoiser = Denoiser.load(tiny_denoiser, dtype=torch.bfloat16)
    loss, gradients = cases.loss_and_gradients(denoiser)
    assert loss.dtype == gradients.dtype == torch.float32
    rounded = torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
    assert denoiser.add_noise(rounded, rounded, torch.tensor([0])).dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(gradients.flatten(), expected[1].flatten(), dim=0)
    assert cosine > 0.98 and torch.allclose(loss, expected[0], rtol=0.02)


@pytest.mark.parametrize("phase", ["projector", "tower"])
def test_host_waits_for_nothing_within_a_step(tiny_clip: Path, tiny_denoiser: Path, phase: str):
    step, inputs = build(tiny_clip, tiny_denoiser, phase, keep_close=1.0, batch_size=4, rows_per_chunk=2), batch()
    with cases.NoHostSync() as mode:
        step(**inputs)["loss"].backward()
    assert mode.num_operations > 1000


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor(1.0),
    ],
)
def test_what_the_host_would_wait_for_is_noticed(read):
    x = torch.randn(4)
    with pytest.raises(AssertionError, match="the host would wait"), cases.NoHostSync():
        read(x)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_automatic_chunks_have_one_shape(device: str):
    for batch_size in range(2, 65):
        rows = auto_rows_per_chunk(batch_size, device)
        assert batch_size % rows == 0
        if device == "cuda":
            assert rows * (batch_size + 1) <= 68 or rows == 1
    assert auto_rows_per_chunk(8, "cuda") == 4
    assert auto_rows_per_chunk(12, "cuda") == 4


def test_only_what_changes_no_number_may_change_within_a_run(tmp_path: Path):
    def opened(**hardware: object):
        return open_run(tmp_path, Stage1Config(tower="a", denoiser="b", hardware=Stage1Hardware(**hardware)))

    assert opened().state == "new"
    assert opened(prefetch=True, cuda_graphs=True).state == "resumable"
    for setting in ("tf32", "channels_last", "compile"):
        with pytest.raises(UserError, match=f"hardware.{setting}: false -> true"):
            opened(**{setting: True})


@pytest.mark.parametrize("setting", ["compile", "cuda_graphs"])
def test_ragged_chunks_are_refused_where_shapes_must_be_fixed(setting: str):
    arguments = ["tower=a", "denoiser=b", "data=c", "batch_size=16", "rows_per_chunk=3"]
    load_config(Stage1Config, overrides=arguments)
    with pytest.raises(UserError, match="rows_per_chunk 3 does not divide batch_size 16"):
        load_config(Stage1Config, overrides=[*arguments, f"hardware.{setting}=true"])


def test_ignored_settings_are_warned_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging.getLogger("dcr_mllm"), "propagate", True)
    warn_ignored(Stage1Hardware(tf32=True, cuda_graphs=True, prefetch=True, channels_last=True, compile=True), "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        f"hardware.{name} does nothing on a CPU and is ignored" for name in ("tf32", "prefetch", "cuda_graphs")
    ]
    caplog.clear()
    warn_ignored(Stage2Hardware(), "cpu")  # on by default: nobody asked for it
    warn_ignored(Stage1Hardware(), "cpu")
    warn_ignored(Stage1Hardware(prefetch=True), "cuda")
    assert not caplog.records


@pytest.fixture
def tf32():
    """PyTorch's switches, which are put back: of products and of convolutions."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    yield lambda: tuple(switch.allow_tf32 for switch in switches)
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


def test_tf32_is_refused_by_no_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tf32):
    """Asked of an older GPU, it is a warning."""
    from transformers.utils import import_utils

    for available in (True, False):
        monkeypatch.setattr(import_utils, "is_torch_tf32_available", lambda available=available: available)
        caplog.clear()
        monkeypatch.setattr(logging.getLogger("dcr_mllm"), "propagate", True)
        warn_ignored(Stage1Hardware(tf32=True), "cuda")
        choose_tf32(Stage1Hardware(tf32=True), "cuda")
        assert tf32() == (available, available)
        choose_tf32(Stage1Hardware(), "cuda")
        assert tf32() == (False, False)
        assert ["Ampere" in record.getMessage() for record in caplog.records] == [True] * (not available)
    set_tf32(True)
    choose_tf32(Stage2Hardware(tf32=False), "cpu")
    assert tf32() == (True, True)


def test_tf32_can_be_chosen_again_and_is_off_where_fp32_is_measured(tf32):
    for on in (False, True, False, True):
        set_tf32(on)
        assert tf32() == (on, on)
        with exact_fp32():
            assert tf32() == (False, False)
        assert tf32() == (on, on)


def test_a_run_sets_tf32_and_nothing_else_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tf32):
    """On CUDA, through the arguments of training; `TrainingArguments` itself must leave the switches alone."""
    from dcr_mllm import hardware, trainer

    monkeypatch.setattr(hardware, "_has_tf32", lambda: True)
    config = Stage1Config(tower="-", denoiser="-", hardware=Stage1Hardware(tf32=True), report_to="none")
    launch = trainer.Launch(device="cuda", num_processes=1, precision="fp32", deepspeed=None)
    monkeypatch.setattr(trainer, "TrainingArguments", lambda **arguments: arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    arguments = trainer.stage_arguments(config, launch, "tower", tmp_path)
    assert tf32() == (True, True) and "tf32" not in arguments
