"""Stage 1 with one bad image: `python poisoned.py RANK BATCH CONFIG`, also as a launcher's script."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import stage1_dcr.train as train
from stage1_dcr.__main__ import main


def poison(rank: int, number: int) -> None:
    """Make the noise of one image infinite, in batch `number` (from 0) of a rank."""
    real = train.make_loader

    def make_loader(data: Any, **arguments: Any) -> Any:
        loader = real(data, **arguments)
        if arguments["rank"] != rank:
            return loader
        made = loader._batches

        def batches(chunks: Iterator[Any]) -> Iterator[Any]:
            for index, batch in enumerate(made(chunks)):
                if index == number:
                    batch["noise"][1, 0, 0, 0] = float("inf")
                yield batch

        loader._batches = batches
        return loader

    train.make_loader = make_loader


if __name__ == "__main__":
    poison(int(sys.argv[1]), int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
