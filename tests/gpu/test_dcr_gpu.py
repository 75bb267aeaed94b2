"""The objective on a GPU: same numbers as on the CPU, in memory that does not grow with the square of the batch."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    from tests.tiny_models import save_tiny_denoiser

    path = tmp_path_factory.mktemp("denoiser") / "sd"
    return save_tiny_denoiser(path, cross_attention_dim=32, sample_size=16, block_channels=(64, 128))


def batch(size, device):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "conditions": (size, 32),
        "positives": (size, 32),
        "latents": (size, 4, 16, 16),
        "noise": (size, 4, 16, 16),
    }
    tensors = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
    return tensors, torch.randint(0, 1000, (size,), generator=generator).to(device)


def step(denoiser, size, device, rows_per_chunk):
    from stage1_dcr.objective import dcr_loss

    tensors, times = batch(size, device)
    noisy = denoiser.add_noise(tensors["latents"], tensors["noise"], times)
    target = denoiser.target(tensors["latents"], tensors["noise"], times)
    leaves = [tensors[name].requires_grad_() for name in ("conditions", "positives")]
    loss, _ = dcr_loss(*leaves, noisy, times, target, denoiser.predict, rows_per_chunk=rows_per_chunk)
    loss.backward()
    return loss.detach().cpu(), torch.cat([leaf.grad for leaf in leaves]).cpu()


@pytest.mark.parametrize("rows_per_chunk", [1, 4])
def test_same_as_on_the_cpu(directory, rows_per_chunk):
    from dcr_mllm.hardware import set_tf32
    from stage1_dcr.denoiser import Denoiser

    set_tf32(False)
    expected_loss, expected = step(Denoiser.load(directory), 6, "cpu", 1)
    loss, grads = step(Denoiser.load(directory, device="cuda"), 6, "cuda", rows_per_chunk)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    assert (grads - expected).norm() < 1e-3 * expected.norm()


def test_bf16_points_the_same_way(directory):
    from stage1_dcr.denoiser import Denoiser

    _, expected = step(Denoiser.load(directory, device="cuda"), 6, "cuda", 2)
    _, grads = step(Denoiser.load(directory, device="cuda", dtype=torch.bfloat16), 6, "cuda", 2)
    assert torch.nn.functional.cosine_similarity(grads.flatten(), expected.flatten(), dim=0) > 0.98


def test_memory_grows_linearly(directory):
    from stage1_dcr.denoiser import Denoiser

    denoiser = Denoiser.load(directory, device="cuda")
    peaks = []
    for size in (8, 16, 32):
        step(denoiser, size, "cuda", 1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(denoiser, size, "cuda", 1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] < 2.4 * peaks[1] < 2.4**2 * peaks[0]


def test_a_row_does_not_wait_for_the_device(directory):
    """No host synchronisation in the loss: the CPU must be able to run ahead of the GPU."""
    from stage1_dcr.denoiser import Denoiser

    denoiser = Denoiser.load(directory, device="cuda")
    step(denoiser, 4, "cuda", 1)  # kernels and constants are in place
    tensors, times = batch(4, "cuda")
    noisy = denoiser.add_noise(tensors["latents"], tensors["noise"], times)
    leaf = tensors["conditions"].requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        from stage1_dcr.objective import dcr_loss

        loss, _ = dcr_loss(leaf, tensors["positives"], noisy, times, tensors["noise"], denoiser.predict)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
