"""Settings for an accelerator on a GPU: the cases that the CPU runs too, and what only CUDA has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.stage1_dcr import hardware_cases as cases
from tests.stage1_dcr.test_step import batch, build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def fp32_is_fp32():
    from dcr_mllm.hardware import set_tf32

    set_tf32(False)


def test_channels_last(tiny_denoiser: Path):
    cases.channels_last_changes_nothing(tiny_denoiser, "cuda")


def test_compiled_blocks(tiny_denoiser: Path):
    cases.compiled_blocks_change_nothing(tiny_denoiser, "cuda", "inductor")


@pytest.mark.parametrize("rows_per_chunk, num_recordings", [(1, 1), (2, 1), (3, 2), (4, 1)])
def test_cuda_graphs(tiny_denoiser: Path, rows_per_chunk: int, num_recordings: int):
    from stage1_dcr.graphs import record

    cases.recorded_changes_nothing(tiny_denoiser, "cuda", record, rows_per_chunk, num_recordings)


def test_gradients_from_cuda_graphs_are_kept(tiny_denoiser: Path):
    from stage1_dcr.graphs import record

    cases.recorded_gradients_are_kept(tiny_denoiser, "cuda", record)


def test_cuda_graphs_of_compiled_blocks_under_autocast(tiny_denoiser: Path):
    """The way training uses them: all settings at once, the first step within the Trainer's autocast."""
    from stage1_dcr.denoiser import Denoiser
    from stage1_dcr.hardware import Stage1Hardware, prepare_denoiser

    expected = cases.loss_and_gradients(Denoiser.load(tiny_denoiser, device="cuda"))
    denoiser = Denoiser.load(tiny_denoiser)
    prepare_denoiser(denoiser, Stage1Hardware(channels_last=True, compile=True, cuda_graphs=True))
    denoiser.to("cuda")
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            cases.assert_same(cases.loss_and_gradients(denoiser), expected, "cuda")


def test_row_loop_can_be_recorded_whole(tiny_denoiser: Path):
    """Loop, loss and backward pass of the batch in one CUDA graph: nothing in it depends on values."""
    from stage1_dcr.denoiser import Denoiser
    from stage1_dcr.objective import dcr_loss

    denoiser = Denoiser.load(tiny_denoiser, device="cuda")
    shape = denoiser.latent_shape(32)
    leaves = [torch.randn(4, cases.WIDTH, device="cuda", requires_grad=True) for _ in range(2)]
    noisy, target = (torch.randn(4, *shape, device="cuda") for _ in range(2))
    timesteps = torch.randint(0, 1000, (4,), device="cuda")

    def step():
        loss, _ = dcr_loss(*leaves, noisy, timesteps, target, denoiser.predict, rows_per_chunk=2)
        return loss, *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for tensor in (*leaves, noisy, target):
        tensor.data.normal_()
    timesteps.random_(0, 1000)
    graph.replay()
    for found, expected in zip(recorded, step(), strict=True):
        assert (found - expected).norm() <= 3e-4 * expected.norm()


def test_attention_kernels(tiny_denoiser: Path):
    from stage1_dcr.denoiser import Denoiser
    from stage1_dcr.hardware import choose_attention

    denoiser = Denoiser.load(tiny_denoiser, device="cuda")
    expected = cases.loss_and_gradients(denoiser)
    try:
        for choice in ("auto", "fused", "math"):
            choose_attention(choice)
            cases.assert_same(cases.loss_and_gradients(denoiser), expected, "cuda")
    finally:
        choose_attention("auto")


def test_flash_attention_in_bf16():
    """`fused` finds a kernel for the shapes of Stable Diffusion 2, which `math` agrees with."""
    from stage1_dcr.hardware import choose_attention

    query = torch.randn(2, 5, 784, 64, device="cuda", dtype=torch.bfloat16)
    prompt = torch.randn(1, 5, 77, 64, device="cuda", dtype=torch.bfloat16).expand(2, -1, -1, -1)
    vae = torch.randn(1, 1, 784, 512, device="cuda", dtype=torch.bfloat16)
    found = {}
    try:
        for choice in ("fused", "math"):
            choose_attention(choice)
            attention = torch.nn.functional.scaled_dot_product_attention
            found[choice] = [attention(query, query, query), attention(query, prompt, prompt), attention(vae, vae, vae)]
    finally:
        choose_attention("auto")
    for fused, math in zip(found["fused"], found["math"], strict=True):
        torch.testing.assert_close(fused, math, rtol=2e-2, atol=2e-2)


def test_losses_do_not_use_tf32():
    from transformers.utils.import_utils import is_torch_tf32_available

    from dcr_mllm.hardware import set_tf32
    from stage1_dcr.objective import contrast

    if not is_torch_tf32_available():
        pytest.skip("this GPU has no TF32")
    predictions, rows = torch.randn(2, 5, 4, 16, 16, device="cuda"), torch.arange(2, device="cuda")
    matrix = torch.randn(256, 256, device="cuda")
    results = []
    for tf32 in (False, True):
        set_tf32(tf32)
        results.append((contrast(predictions, predictions[:, 0], rows, tau=0.1)[1], matrix @ matrix))
    set_tf32(False)
    (exact_loss, exact_product), (loss, product) = results
    assert torch.equal(loss, exact_loss) and not torch.equal(product, exact_product)


def on_gpu(step):
    step.move_frozen(torch.device("cuda"), torch.float32)
    return step.to("cuda"), {name: value.cuda() for name, value in batch().items()}


def test_whole_step_in_bf16_autocast(tiny_clip: Path, tiny_denoiser: Path):
    step, inputs = on_gpu(build(tiny_clip, tiny_denoiser, batch_size=4))
    expected = step(**inputs)["loss"]
    with torch.autocast("cuda", torch.bfloat16):
        loss = step(**inputs)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected, rtol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in step.parameters() if p.requires_grad)


@pytest.mark.parametrize("phase", ["projector", "tower"])
def test_host_waits_for_nothing_within_a_step(tiny_clip: Path, tiny_denoiser: Path, phase: str):
    step, inputs = on_gpu(build(tiny_clip, tiny_denoiser, phase, keep_close=1.0, batch_size=4, rows_per_chunk=2))
    step(**inputs)["loss"].backward()  # kernels and constants are in place
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(**inputs)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_prefetched_batches_are_whole():
    """While the consumer is busy, copies overtake it; what it reads must be its own batch, and the cursor at home."""
    from dcr_mllm.prefetch import Prefetcher

    images = [torch.full((64, 1024), float(i)) for i in range(8)]
    items = [{"images": image, "cursor": torch.tensor([i]), "keys": str(i)} for i, image in enumerate(images)]
    loader = DataLoader(items, batch_size=None, pin_memory=True)
    sums = []
    for i, found in enumerate(Prefetcher(loader, torch.device("cuda"))):
        assert found["images"].is_cuda and found["cursor"].device.type == "cpu" and found["keys"] == str(i)
        torch.cuda._sleep(10_000_000)
        sums.append(found["images"].double().mean())
        del found
    assert torch.stack(sums).tolist() == [float(i) for i in range(8)]
