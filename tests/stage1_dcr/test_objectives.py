"""The objectives and their options: against NumPy, and what trains under each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from stage1_dcr.condition import TowerFeatures, distance_to_base, projector_input, read_tower
from stage1_dcr.contrastive import contrastive_loss
from stage1_dcr.objective import dcr_loss
from stage1_dcr.step import TrainingStep
from stage1_dcr.timesteps import NUM_BINS, by_timestep, draw_timesteps
from tests.stage1_dcr import test_step
from tests.stage1_dcr.test_objective import ToyDenoiser, make_batch
from tests.stage1_dcr.test_step import BATCH, batch


def build(tower_dir: Path, denoiser_dir: Path, **settings: object) -> TrainingStep:
    """A step of the tower phase whose LoRA has moved away from zero."""
    step = test_step.build(tower_dir, denoiser_dir, **settings)
    torch.manual_seed(1)
    for name, parameter in step.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return step


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def numpy_info_nce(anchors, positives, others, tau):
    """`anchors [B, D]`, `positives` and `others` lists of `[D]` per anchor: mean of -log softmax over positives."""
    losses = []
    for anchor, good, bad in zip(anchors, positives, others, strict=True):
        cosines = np.array([unit(anchor) @ unit(vector) for vector in (*good, *bad)]) / tau
        log_softmax = cosines - np.log(np.exp(cosines).sum())
        losses.append(-log_softmax[: len(good)].mean())
    return np.mean(losses)


@pytest.mark.parametrize("used", ["view+target", "view", "target"])
def test_dcr_with_fewer_positives_against_numpy(used):
    denoiser, (conditions, views, latents, timesteps, target) = ToyDenoiser(), make_batch()
    size = len(conditions)
    table = denoiser.predict(latents, timesteps, conditions.expand(size, -1, -1)).flatten(2).numpy()  # [B, B, F]
    of_views = denoiser.predict(latents, timesteps, views[:, None])[:, 0].flatten(1).numpy()
    candidates = {"view": of_views, "target": target.flatten(1).numpy()}
    expected = numpy_info_nce(
        [table[i, i] for i in range(size)],
        [[candidates[name][i] for name in used.split("+")] for i in range(size)],
        [[table[i, j] for j in range(size) if j != i] for i in range(size)],
        tau=0.2,
    )
    loss, found = dcr_loss(
        conditions, views, latents, timesteps, target, denoiser.predict, tau=0.2, positives_used=used
    )
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert found.cosines.shape == (size, 3)
    assert found.cos_view.item() == pytest.approx(np.mean([unit(table[i, i]) @ unit(of_views[i]) for i in range(size)]))


def test_the_parts_of_dcr_add_up_in_value_and_gradient():
    denoiser, inputs = ToyDenoiser(), make_batch()
    results = []
    for only in (None, "view", "target"):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs[:2]]
        loss, _ = dcr_loss(*leaves, *inputs[2:], denoiser.predict, only=only, rows_per_chunk=2)
        loss.backward()
        results.append((loss.detach(), torch.cat([leaf.grad for leaf in leaves])))
    (whole, gradient), *parts = results
    torch.testing.assert_close(sum(part[0] for part in parts), whole)
    torch.testing.assert_close(sum(part[1] for part in parts), gradient)
    with pytest.raises(ValueError, match="only is target"):
        dcr_loss(*inputs, denoiser.predict, positives_used="view", only="target")


@pytest.mark.parametrize("num_negatives", [None, 2])
@pytest.mark.parametrize("first_row", [None, 3])
def test_contrastive_loss_against_numpy(num_negatives, first_row):
    generator = torch.Generator().manual_seed(0)
    everyone = torch.randn(8, 5, generator=generator)
    own = slice(0, 8) if first_row is None else slice(first_row, first_row + 4)
    views = everyone[own] + 0.5 * torch.randn(everyone[own].shape, generator=generator)
    rows = range(8)[own]
    around = [[(row + 1 + step) % 8 for step in range(7 if num_negatives is None else num_negatives)] for row in rows]
    expected = numpy_info_nce(
        everyone[own].double().numpy(),
        [[view] for view in views.double().numpy()],
        [[everyone[j].double().numpy() for j in others] for others in around],
        tau=0.1,
    )
    loss, cosines = contrastive_loss(everyone, views, tau=0.1, first_row=first_row, num_negatives=num_negatives)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)
    assert cosines["feature_cos_negative"].item() == pytest.approx(
        np.mean(
            [
                unit(everyone[r].numpy()) @ unit(everyone[j].numpy())
                for r, o in zip(rows, around, strict=True)
                for j in o
            ]
        )
    )


def test_joint_is_the_weighted_sum_of_the_other_two(tiny_clip: Path, tiny_denoiser: Path):
    """And each of them is what its formula says, from pixels to loss."""
    inputs = batch()
    losses = {}
    for objective in ("contrastive", "reconstruction", "joint"):
        weights = {"contrastive_weight": 0.3, "reconstruction_weight": 2.0} if objective == "joint" else {}
        step = build(tiny_clip, tiny_denoiser, objective=objective, **weights)
        losses[objective] = step(**inputs)["loss"].item()
    assert losses["joint"] == pytest.approx(0.3 * losses["contrastive"] + 2 * losses["reconstruction"], rel=1e-5)

    pixels = inputs["images"].float() / 255
    seen = step._normalise(pixels)
    with torch.no_grad():
        tower, denoiser = step._tower(), step._denoiser()
        embeddings, views = tower(seen), tower(step._view(pixels, seen, inputs["view_params"]))
        timesteps = (inputs["timestep_uniform"] * 1000).long()
        noisy = denoiser.add_noise(denoiser.encode(pixels), inputs["noise"], timesteps)
        conditions = step._projector()(embeddings)
        predicted = denoiser.predict(noisy, timesteps, conditions[:, None], shared_prompt=False)[:, 0].numpy()
    assert losses["reconstruction"] == pytest.approx(np.mean((predicted - inputs["noise"].numpy()) ** 2), rel=1e-4)
    expected = numpy_info_nce(
        embeddings.numpy(),
        [[view] for view in views.numpy()],
        [[embeddings[j].numpy() for j in range(BATCH) if j != i] for i in range(BATCH)],
        tau=0.1,
    )
    assert losses["contrastive"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", ["dcr", "joint"])
def test_parts_add_up_to_the_loss_without_keep_close(tiny_clip: Path, tiny_denoiser: Path, objective: str):
    step = build(tiny_clip, tiny_denoiser, objective=objective, contrastive_weight=0.5, keep_close=0.0)
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
    found: list[torch.Tensor] = []

    def look(parts):
        for part in parts.values():
            gradients = torch.autograd.grad(part(), trained, retain_graph=True)
            found.append(torch.cat([gradient.flatten() for gradient in gradients]))

    step.on_parts = look
    step(**batch())["loss"].backward()
    assert len(found) == 2 and all(gradient.norm() > 0 for gradient in found)
    torch.testing.assert_close(sum(found), torch.cat([p.grad.flatten() for p in trained]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("objective", ["reconstruction", "contrastive"])
def test_objectives_of_one_part_have_none_to_compare(tiny_clip: Path, tiny_denoiser: Path, objective: str):
    step = build(tiny_clip, tiny_denoiser, objective=objective)
    step.on_parts = lambda parts: pytest.fail("there are no two parts")
    step(**batch())


def test_contrastive_runs_without_the_denoiser(tiny_clip: Path, tiny_denoiser: Path, monkeypatch: pytest.MonkeyPatch):
    step = build(tiny_clip, tiny_denoiser, objective="contrastive")
    for name in ("encode", "predict"):
        monkeypatch.setattr(step._denoiser(), name, lambda *_: pytest.fail("not needed"))
    step(**batch())["loss"].backward()


def test_end_to_end_trains_both_and_nothing_else(tiny_clip: Path, tiny_denoiser: Path):
    step = build(tiny_clip, tiny_denoiser, objective="dcr-end-to-end")
    step(**batch())["loss"].backward()
    for name, parameter in step.named_parameters():
        expected = name.startswith("projector.") or ".lora_" in name
        assert parameter.requires_grad == expected == (parameter.grad is not None), name
    assert step.frozen() == [step._reference()]
    same = build(tiny_clip, tiny_denoiser, objective="dcr")
    assert torch.equal(step(**batch())["loss"], same(**batch())["loss"])


@pytest.mark.parametrize("condition", ["class", "class+pooled-patches", "pooled-patches@-2"])
@pytest.mark.parametrize("tower", ["tiny_clip", "tiny_siglip"])
def test_conditions_read_what_they_name(request, tiny_denoiser: Path, tower: str, condition: str):
    directory = request.getfixturevalue(tower)
    step = build(directory, tiny_denoiser, condition=condition)
    pixels = step._normalise(batch()["images"].float() / 255)
    model = step._tower()
    with torch.no_grad():
        found = projector_input(read_tower(model, pixels, patches=condition != "class"), condition)
        plain = model.vision_model(pixel_values=pixels, output_hidden_states=True)
        tokens = plain.hidden_states[-2][:, 1 if tower == "tiny_clip" else 0 :]
    pooled = tokens.numpy().mean(axis=1)
    expected = {"class": [model(pixels).detach()], "class+pooled-patches": [model(pixels).detach(), pooled]}.get(
        condition, [pooled]
    )
    np.testing.assert_allclose(found.numpy(), np.concatenate(expected, axis=1), atol=1e-5)

    step(**batch())["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in step.parameters() if p.requires_grad)
    blocks = {name.split(".layers.")[1].split(".")[0] for name, p in step.named_parameters() if p.requires_grad}
    assert len(blocks) == model.num_layers - (condition == "pooled-patches@-2")


@pytest.mark.parametrize("tokens", ["class", "patches", "class+patches"])
def test_distance_to_base_against_numpy(tokens: str):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        TowerFeatures(torch.randn(3, 5, generator=generator), torch.randn(3, 4, 6, generator=generator))
        for _ in range(2)
    )
    chosen = [index for index, name in enumerate(("class", "patches")) if name in tokens]
    pairs = [(ours[index].double().numpy(), theirs[index].double().numpy()) for index in chosen]
    cosine = sum(np.mean(1 - (unit(a) * unit(b)).sum(-1)) for a, b in pairs)
    mse = sum(np.mean((a - b) ** 2) for a, b in pairs)
    for distance, expected in (("cosine", cosine), ("mse", mse)):
        assert distance_to_base(ours, theirs, tokens=tokens, distance=distance).item() == pytest.approx(expected)
        assert distance_to_base(ours, ours, tokens=tokens, distance=distance).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("tokens", "distance"), [("class", "cosine"), ("class+patches", "mse")])
def test_keep_close_at_infinity_leaves_the_tower_unchanged(tiny_clip: Path, tiny_denoiser: Path, tokens, distance):
    """From a tower that has moved, descent on the loss leads back to the base if the weight is huge, and only then."""
    moved = {}
    for weight in (1e-9, 1e9):
        settings = {
            "objective": "reconstruction",
            "keep_close": weight,
            "keep_close_tokens": tokens,
            "keep_close_distance": distance,
        }
        step = build(tiny_clip, tiny_denoiser, **settings)
        trained = [p for p in step.parameters() if p.requires_grad]
        pixels = step._normalise(batch()["images"].float() / 255)

        def drift(step=step, pixels=pixels):
            with torch.no_grad():
                ours, base = (read_tower(t, pixels, patches=True) for t in (step._tower(), step._reference()))
                return distance_to_base(ours, base, tokens=tokens, distance="mse").item()

        before = drift()
        optimizer = torch.optim.Adam(trained, lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        for _ in range(60):
            optimizer.zero_grad()
            step(**batch())["loss"].backward()
            optimizer.step()
            schedule.step()
        moved[weight] = drift() / before
    assert moved[1e9] < 0.05 < 0.5 < moved[1e-9]


def test_logit_normal_times_have_the_distribution_of_their_name():
    uniform = (torch.arange(4000) + 0.5) / 4000
    times = draw_timesteps(uniform, sampling="logit-normal", low=0, high=1000)
    expected = 1 / (1 + np.exp(-stats.norm.ppf(uniform.numpy().astype(np.float64))))
    assert np.abs(times.numpy() - np.floor(1000 * expected)).max() <= 1
    assert times.float().std() < draw_timesteps(uniform, sampling="uniform", low=0, high=1000).float().std()
    ends = draw_timesteps(torch.tensor([0.0, 1 - 1e-7]), sampling="logit-normal", low=100, high=400)
    assert ends.min() >= 100 and ends.max() < 400


def test_values_by_timestep_against_numpy():
    rng = np.random.default_rng(0)
    times, values = rng.integers(0, 600, 50), rng.normal(size=50)
    means, weights = by_timestep({"cos": torch.from_numpy(values)}, torch.from_numpy(times), 1000)
    assert len(means) == NUM_BINS and list(means)[0] == "cos@0-200"
    for index, name in enumerate(means):
        inside = (times >= 200 * index) & (times < 200 * (index + 1))
        assert weights[name].item() == inside.sum()
        if inside.any():
            assert means[name].item() == pytest.approx(values[inside].mean(), abs=1e-6)
    assert weights["cos@800-1000"].item() == 0
