"""The row-wise loss against the dense judge, against NumPy, and against what is known of its values."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from stage1_dcr.objective import auto_rows_per_chunk, contrast, dcr_loss, reconstruction_loss
from tests.stage1_dcr.dense import dense_dcr_loss

BATCH, WIDTH, SHAPE = 5, 6, (2, 3, 4)


class ToyDenoiser(nn.Module):
    """A small non-linear function of latent, time and condition with frozen weights, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = math.prod(SHAPE)
        self.a = torch.randn(WIDTH, size, generator=generator, dtype=torch.float64)
        self.b = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5

    def forward(self, latents, timesteps, conditions):
        """``latents [S, C, h, w], timesteps [S], conditions [S, D]``."""
        hidden = torch.tanh(latents.flatten(1) @ self.b + conditions @ self.a + timesteps[:, None].double() / 1000)
        return (hidden @ self.b).view_as(latents)

    def predict(self, latents, timesteps, conditions):
        rows, n, _ = conditions.shape
        flat = self(latents.repeat_interleave(n, 0), timesteps.repeat_interleave(n), conditions.flatten(0, 1))
        return flat.unflatten(0, (rows, n))


def make_batch(batch=BATCH, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    conditions = torch.randn(batch, WIDTH, generator=generator, dtype=dtype)
    positives = conditions + 0.3 * torch.randn(batch, WIDTH, generator=generator, dtype=dtype)
    latents = torch.randn(batch, *SHAPE, generator=generator, dtype=dtype)
    target = torch.randn(batch, *SHAPE, generator=generator, dtype=dtype)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    return conditions, positives, latents, timesteps, target


def numpy_loss(outputs, views, target, tau):
    """The formula of the paper, from scratch: ``outputs [B, B, F]``, ``views [B, F]``, ``target [B, F]``."""
    batch = len(outputs)

    def d(u, v):
        return np.exp(np.dot(u, v) / np.linalg.norm(u) / np.linalg.norm(v) / tau)

    total = 0.0
    for i in range(batch):
        anchor = outputs[i, i]
        positives = [d(anchor, views[i]), d(anchor, target[i])]
        everything = sum(positives) + sum(d(anchor, outputs[i, j]) for j in range(batch) if j != i)
        total += -sum(np.log(p / everything) for p in positives) / 2
    return total / batch


def numpy_toy(denoiser, conditions, positives, latents, timesteps, target, tau):
    a, b = denoiser.a.numpy(), denoiser.b.numpy()
    batch = len(conditions)

    def run(i, condition):
        return np.tanh(latents[i].ravel() @ b + condition @ a + timesteps[i] / 1000) @ b

    outputs = np.array([[run(i, conditions[j]) for j in range(batch)] for i in range(batch)])
    views = np.array([run(i, positives[i]) for i in range(batch)])
    return numpy_loss(outputs, views, target.reshape(batch, -1), tau)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 99])
def test_rowwise_equals_dense(rows):
    denoiser = ToyDenoiser()
    conditions, positives, *rest = make_batch()
    judged = [t.clone().requires_grad_() for t in (conditions, positives)]
    expected = dense_dcr_loss(*judged, *rest, denoiser)
    expected_grads = torch.autograd.grad(expected, judged)

    leaves = [t.clone().requires_grad_() for t in (conditions, positives)]
    loss, stats = dcr_loss(*leaves, *rest, denoiser.predict, rows_per_chunk=rows)
    grads = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-12)
    assert stats.loss == loss


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_value_and_gradient_against_numpy(tau):
    denoiser = ToyDenoiser()
    batch = make_batch(4)
    arrays = [t.numpy() for t in batch]
    leaves = [t.clone().requires_grad_() for t in batch[:2]]
    loss, _ = dcr_loss(*leaves, *batch[2:], denoiser.predict, tau=tau)
    loss.backward()
    assert loss.item() == pytest.approx(numpy_toy(denoiser, *arrays, tau), rel=1e-10)
    step = 1e-5
    for which in (0, 1):
        numeric = np.zeros_like(arrays[which])
        for index in np.ndindex(*numeric.shape):
            ends = []
            for sign in (1, -1):
                moved = [a.copy() for a in arrays]
                moved[which][index] += sign * step
                ends.append(numpy_toy(denoiser, *moved, tau))
            numeric[index] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(leaves[which].grad.numpy(), numeric, rtol=1e-5, atol=1e-7)


def test_gradients_reach_what_made_the_conditions():
    """Through a network in front, with accumulation over two calls and a factor on the loss, as a trainer does it."""
    denoiser = ToyDenoiser()
    features, views, *rest = make_batch()
    network = nn.Linear(WIDTH, WIDTH).double()
    expected = 0.5 * dense_dcr_loss(network(features), network(views), *rest, denoiser)
    expected_grad = torch.autograd.grad(expected, network.weight)[0]
    for _ in range(2):
        loss, _ = dcr_loss(network(features), network(views), *rest, denoiser.predict, rows_per_chunk=2)
        (loss * 0.5).backward()
    torch.testing.assert_close(network.weight.grad, 2 * expected_grad)


@pytest.mark.parametrize("grads", [(True, False), (False, True)])
def test_only_one_of_the_two_needs_a_gradient(grads):
    conditions, positives, *rest = make_batch()
    leaves = [t.requires_grad_(g) for t, g in zip((conditions, positives), grads, strict=True)]
    denoiser = ToyDenoiser()
    dcr_loss(*leaves, *rest, denoiser.predict)[0].backward()
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    expected = torch.autograd.grad(dense_dcr_loss(*leaves, *rest, denoiser), needed)
    torch.testing.assert_close([leaf.grad for leaf in needed], list(expected))
    assert [leaf.grad is not None for leaf in leaves] == list(grads)


def test_validation_builds_no_graph_and_gives_the_same_value():
    denoiser = ToyDenoiser()
    batch = make_batch()
    seen = []

    def predict(*args):
        seen.append(torch.is_grad_enabled())
        return denoiser.predict(*args)

    with torch.no_grad():
        loss, _ = dcr_loss(batch[0].requires_grad_(), *batch[1:], predict)
    assert not loss.requires_grad and not any(seen)
    torch.testing.assert_close(loss, dcr_loss(*batch, denoiser.predict)[0].detach())


def test_equal_similarities_give_log_of_the_number_of_candidates():
    *_, target = batch = make_batch()

    def indifferent(latents, timesteps, conditions):
        rows, n, _ = conditions.shape
        index = [int((target == t).flatten(1).all(1).nonzero()) for t in latents]
        return target[index][:, None].expand(rows, n, *SHAPE)

    loss, stats = dcr_loss(batch[0], batch[1], target, batch[3], target, indifferent)
    assert loss.item() == pytest.approx(math.log(BATCH + 1))
    assert stats.cos_target.item() == stats.cos_view.item() == pytest.approx(1.0)
    assert stats.cos_negative.item() == pytest.approx(1.0)


def test_statistics():
    denoiser = ToyDenoiser()
    conditions, positives, latents, timesteps, target = make_batch()
    loss, stats = dcr_loss(conditions, positives, latents, timesteps, target, denoiser.predict, rows_per_chunk=2)
    table = torch.stack([denoiser.predict(latents, timesteps, c.expand(BATCH, 1, -1))[:, 0] for c in conditions], 1)
    views = denoiser.predict(latents, timesteps, positives[:, None])[:, 0].flatten(1)
    anchors = torch.stack([table[i, i] for i in range(BATCH)]).flatten(1)
    cos = nn.functional.cosine_similarity
    negatives = [cos(anchors[i], table[i, j].flatten(), dim=0) for i in range(BATCH) for j in range(BATCH) if i != j]
    torch.testing.assert_close(stats.cos_view, cos(anchors, views).mean())
    torch.testing.assert_close(stats.cos_target, cos(anchors, target.flatten(1)).mean())
    torch.testing.assert_close(stats.cos_negative, torch.stack(negatives).mean())
    torch.testing.assert_close((stats.loss_view + stats.loss_target) / 2, loss)
    gap = (stats.loss_view - stats.loss_target) * 0.1
    torch.testing.assert_close(gap, stats.cos_target - stats.cos_view)
    assert not any(value.requires_grad for value in stats[:-1])


def test_num_negatives_is_the_width_of_the_logits_minus_two(monkeypatch):
    widths = []
    original = torch.Tensor.logsumexp

    def spy(self, *args, **kwargs):
        widths.append(self.shape[-1])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "logsumexp", spy)
    _, stats = dcr_loss(*make_batch(), ToyDenoiser().predict)
    assert set(widths) == {stats.num_negatives + 2} == {BATCH + 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_temperature_is_finite_and_right(dtype):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(4, 1, 50, generator=generator)
    outputs = (base + 0.2 * torch.randn(4, 6, 50, generator=generator)).to(dtype)
    target = (base[:, 0] + 0.2 * torch.randn(4, 50, generator=generator)).to(dtype)
    rows = torch.arange(4)
    outputs.requires_grad_()
    loss, _ = contrast(outputs, target, rows, tau=0.01)
    loss.backward()
    judged = outputs.detach().double().requires_grad_()
    expected, _ = contrast(judged, target.double(), rows, tau=0.01)
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    error = (outputs.grad.double() - judged.grad).norm() / judged.grad.norm()
    assert error < {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


def test_autocast_does_not_reach_the_loss():
    outputs, target = torch.randn(2, 4, 30), torch.randn(2, 30)
    expected, _ = contrast(outputs, target, torch.arange(2), tau=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = contrast(outputs, target, torch.arange(2), tau=0.1)
        mse = reconstruction_loss(torch.randn(2, 3), target, torch.arange(2), target * 2, lambda x, t, c: x[:, None])
    assert loss.dtype == mse.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_gradients_add_up_in_fp32_for_half_precision_conditions():
    """Summing B rows in bf16 would lose a percent; the only rounding allowed is the one of the result."""
    denoiser = ToyDenoiser()
    batch = [t.float() if t.is_floating_point() else t for t in make_batch(16)]
    halves = [t.bfloat16().requires_grad_() for t in batch[:2]]
    dcr_loss(*halves, *batch[2:], lambda x, t, c: denoiser.predict(x.double(), t, c.double()))[0].backward()
    judged = [t.detach().double().requires_grad_() for t in halves]
    expected = dense_dcr_loss(*judged, *(t.double() for t in batch[2:]), denoiser)
    for half, grad in zip(halves, torch.autograd.grad(expected, judged), strict=True):
        assert half.grad.dtype == torch.bfloat16
        torch.testing.assert_close(half.grad, grad.bfloat16(), rtol=2**-7, atol=1e-7)


def test_zero_predictions_stay_finite():
    conditions, positives, *rest = make_batch()
    leaf = conditions.requires_grad_()

    def silent(latents, timesteps, conditions):
        return conditions.sum() * torch.zeros(*conditions.shape[:2], *SHAPE, dtype=torch.float64)

    loss, _ = dcr_loss(leaf, positives, *rest, silent)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(BATCH + 1)) and leaf.grad.isfinite().all()


def test_memory_holds_one_chunk_of_rows():
    """Nothing that autograd saved for one chunk is left when the next begins."""
    denoiser = ToyDenoiser()
    saved: weakref.WeakSet[SavedTensor] = weakref.WeakSet()
    left, most = [], 0

    def pack(tensor):
        box = SavedTensor(tensor)
        saved.add(box)
        return box

    def predict(*args):
        nonlocal most
        left.append(len(saved))
        outputs = denoiser.predict(*args)
        most = max(most, len(saved))
        return outputs

    conditions, *rest = make_batch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        dcr_loss(conditions.requires_grad_(), *rest, predict)
    assert most > 0 and left == [0] * BATCH


class SavedTensor:
    def __init__(self, tensor):
        self.tensor = tensor


def test_refusals():
    denoiser = ToyDenoiser()
    with pytest.raises(ValueError, match="at least 2"):
        dcr_loss(*make_batch(1), denoiser.predict)
    conditions, positives, *rest = make_batch()
    with pytest.raises(ValueError, match="shape"):
        dcr_loss(conditions, positives[:3], *rest, denoiser.predict)
    with pytest.raises(ValueError, match="rows"):
        dcr_loss(conditions, positives, rest[0][:2], *rest[1:], denoiser.predict)
    with pytest.raises(ValueError, match="tau"):
        dcr_loss(conditions, positives, *rest, denoiser.predict, tau=0.0)


def test_reconstruction_loss():
    denoiser = ToyDenoiser()
    conditions, _, *rest = make_batch()
    leaf = conditions.requires_grad_()
    loss = reconstruction_loss(leaf, *rest, denoiser.predict)
    latents, timesteps, target = rest
    torch.testing.assert_close(loss, (denoiser(latents, timesteps, leaf) - target).square().mean())
    assert torch.autograd.grad(loss, leaf)[0].abs().sum() > 0


def test_auto_rows_per_chunk():
    assert auto_rows_per_chunk(16, "cpu") == 1
    assert auto_rows_per_chunk(8, "cpu", latent_area=12 * 12) == 4  # the miniature
    assert auto_rows_per_chunk(8, "cpu", latent_area=64 * 64) == 1
    assert auto_rows_per_chunk(16, "cuda") == 4
    assert auto_rows_per_chunk(16, torch.device("cuda", 0), latent_area=42 * 42) == 1
    assert auto_rows_per_chunk(2, "cuda") == 2
    assert auto_rows_per_chunk(256, "cuda") == 1
