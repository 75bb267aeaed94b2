"""Negatives across processes: the objective with a larger batch's conditions, and two processes against one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcr_mllm.errors import UserError
from stage1_dcr.config import Stage1Config
from stage1_dcr.objective import auto_rows_per_chunk, dcr_loss
from tests.processes import clean_environment, run_to_end
from tests.stage1_dcr.dense import dense_dcr_loss
from tests.stage1_dcr.test_objective import ToyDenoiser, make_batch

TOTAL, PARTS = 6, 2


@pytest.mark.parametrize("rows", [1, 2, 99])
@pytest.mark.parametrize("num_negatives", [None, 1, 4, TOTAL - 1])
def test_parts_of_a_batch_with_all_conditions_equal_the_dense_whole(num_negatives: int | None, rows: int):
    """The mean over parts of losses and gradients is that of the joint batch."""
    denoiser = ToyDenoiser()
    conditions, positives, *rest = make_batch(TOTAL)
    judged = [t.clone().requires_grad_() for t in (conditions, positives)]
    expected = dense_dcr_loss(*judged, *rest, denoiser, num_negatives=num_negatives)
    expected_grads = torch.autograd.grad(expected, judged)

    leaves = [t.clone().requires_grad_() for t in (conditions, positives)]
    losses = []
    for first in range(0, TOTAL, TOTAL // PARTS):
        part = slice(first, first + TOTAL // PARTS)
        loss, stats = dcr_loss(
            leaves[0],
            leaves[1][part],
            *(t[part] for t in rest),
            denoiser.predict,
            rows_per_chunk=rows,
            first_row=first,
            num_negatives=num_negatives,
        )
        (loss / PARTS).backward()
        losses.append(loss.detach())
        assert stats.num_negatives == (num_negatives or TOTAL - 1)
    torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected_grads), rtol=1e-9, atol=1e-12)


def test_negatives_are_the_ones_that_follow():
    """The denoiser sees the row's own condition and the two after it, around the end."""
    conditions, positives, *rest = make_batch(5)
    seen = []

    def predict(latents, timesteps, grid):
        seen.append(grid)
        return ToyDenoiser().predict(latents, timesteps, grid)

    part = slice(3, 5)
    dcr_loss(conditions, positives[part], *(t[part] for t in rest), predict, first_row=3, num_negatives=2)
    expected = [[3, 4, 0], [4, 0, 1]]
    for grid, row, view in zip(seen, expected, positives[part], strict=True):
        torch.testing.assert_close(grid[0], torch.cat([conditions[row], view[None]]))


def test_statistics_are_those_of_the_chosen_negatives():
    denoiser = ToyDenoiser()
    conditions, positives, latents, timesteps, target = make_batch()
    _, stats = dcr_loss(conditions, positives, latents, timesteps, target, denoiser.predict, num_negatives=1)
    batch = len(conditions)
    cos = torch.nn.functional.cosine_similarity
    one = [
        [denoiser(latents[i, None], timesteps[i, None], c[None]).flatten() for c in conditions] for i in range(batch)
    ]
    expected = torch.stack([cos(one[i][i], one[i][(i + 1) % batch], dim=0) for i in range(batch)]).mean()
    torch.testing.assert_close(stats.cos_negative, expected)


def test_refusals():
    denoiser = ToyDenoiser()
    conditions, positives, *rest = make_batch()
    with pytest.raises(ValueError, match="num_negatives must be in 1..4"):
        dcr_loss(conditions, positives, *rest, denoiser.predict, num_negatives=5)
    with pytest.raises(ValueError, match="first_row"):
        dcr_loss(conditions, positives, *rest, denoiser.predict, first_row=1)
    with pytest.raises(UserError, match="negatives must be local, global"):
        Stage1Config(tower="t", denoiser="d", negatives=0)


def test_number_of_negatives():
    def config(negatives: object) -> Stage1Config:
        return Stage1Config(tower="t", denoiser="d", batch_size=4, negatives=negatives)

    assert [config("local").num_negatives(n) for n in (1, 3)] == [3, 3]
    assert [config("global").num_negatives(n) for n in (1, 3)] == [3, 11]
    assert config(11).num_negatives(3) == 11
    with pytest.raises(UserError, match="3 x 4 images.*at most 11 others"):
        config(12).num_negatives(3)
    # A row of 129 samples leaves no room for a second one; seven of 9 would fit, and four divide the batch.
    assert auto_rows_per_chunk(16, "cuda", num_negatives=127) == 1
    assert auto_rows_per_chunk(14, "cuda", num_negatives=7) == 7
    assert auto_rows_per_chunk(16, "cuda", num_negatives=7) == 4
    assert auto_rows_per_chunk(16, "cuda", num_negatives=15) == auto_rows_per_chunk(16, "cuda") == 4


def test_too_many_negatives_are_refused_before_anything_loads(
    tiny_clip: Path, tiny_denoiser: Path, tiny_shards: str, tmp_path: Path
):
    settings = [f"tower={tiny_clip}", f"denoiser={tiny_denoiser}", f"data={tiny_shards}", "batch_size=4", "negatives=8"]
    settings.append(f"runs_dir={tmp_path}")
    command = [sys.executable, "-m", "stage1_dcr", "mini", *settings]
    environment = {**clean_environment(), "NPROC": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "negatives is 8" in done.stderr and "at most 7" in done.stderr


def test_two_processes_equal_one_with_the_joint_batch(tiny_clip: Path, tiny_denoiser: Path, tmp_path: Path):
    """Losses and trained weights of two steps of AdamW, for both phases, all negatives and some of them."""
    from tests.stage1_dcr import joint_batch

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(tiny_clip), str(tiny_denoiser), str(tmp_path)]
    run_to_end([*command, joint_batch.__file__, *arguments], clean_environment())
    results = torch.load(tmp_path / "two.pt", weights_only=True)
    for phase, negatives in joint_batch.CASES:
        judge = joint_batch.train(tiny_clip, tiny_denoiser, phase, negatives, range(2))
        two = results[f"{phase} {negatives}"]
        assert torch.allclose(two["losses"], judge["losses"], rtol=0, atol=1e-5)
        moved = {key: (judge["weights"][key] - judge["before"][key]).norm() for key in judge["weights"]}
        assert max(moved.values()) > 1e-3
        for key, value in judge["weights"].items():
            assert (two["weights"][key] - value).norm() <= 1e-3 * moved[key] + 1e-6, key
    assert results["tower global"]["losses"][0] > results["tower 4"]["losses"][0]  # more to be told apart
