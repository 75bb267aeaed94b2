"""Trains a few steps on the batches of some ranks: each rank its own in one of two processes, or all in one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

BATCH, STEPS = 3, 2
CASES = (("projector", "global"), ("tower", "global"), ("tower", 4))


def train(tower: Path, denoiser: Path, phase: str, negatives: object, ranks: Sequence[int]) -> dict:
    """Losses [STEPS] and trainable weights before and after; gradients are averaged over processes by DDP."""
    from tests.stage1_dcr.test_step import batch, build

    step = build(tower, denoiser, phase, negatives=negatives, batch_size=BATCH)
    torch.manual_seed(1)
    for name, parameter in step.named_parameters():
        if ".lora_B." in name:  # zero at first, which would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    trained = {name: p for name, p in step.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    module = torch.nn.parallel.DistributedDataParallel(step) if dist.is_initialized() else step
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, eps=1e-4)
    losses = []
    for index in range(STEPS):
        parts = [batch(seed=10 * index + rank, num=BATCH) for rank in ranks]
        loss = module(**{key: torch.cat([part[key] for part in parts]) for key in parts[0]})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean)
    after = {name: p.detach().clone() for name, p in trained.items()}
    return {"losses": torch.stack(losses), "before": before, "weights": after}


def main() -> None:
    tower, denoiser, out = map(Path, sys.argv[1:])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {f"{phase} {negatives}": train(tower, denoiser, phase, negatives, [rank]) for phase, negatives in CASES}
    if rank == 0:
        torch.save(results, out / "two.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
