"""Where an image stream is: small enough for a line of JSON, exact enough to go on with the very next sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dcr_mllm.errors import UserError


@dataclass(kw_only=True)
class Cursor:
    """A place in the order of one rank.

    Attributes:
        epoch: counts passes over the data.
        shard: position in the epoch's shard list where the current block starts.
        offset: index in that shard where the current block starts.
        block: number of the current block in its epoch.
        done: how many samples of the block have been dealt with, in shuffled order.
        seen: samples dealt with since the start of training.
        skipped: those among them that were broken.
    """

    epoch: int = 0
    shard: int = 0
    offset: int = 0
    block: int = 0
    done: int = 0
    seen: int = 0
    skipped: int = 0

    def to_list(self) -> list[int]:
        """All fields in order."""
        return list(vars(self).values())

    @classmethod
    def from_list(cls, values: Sequence[int]) -> Cursor:
        """The inverse of `to_list`."""
        return cls(**dict(zip(cls.__dataclass_fields__, map(int, values), strict=True)))


@dataclass(kw_only=True)
class StreamPosition:
    """How far one rank has come: counted when the training loop consumes a batch, not when it is prefetched.

    Attributes:
        identity: what the order of the stream depends on; a restart must agree with it.
        batches: consumed by this rank.
        cursor: place after the last consumed batch.
    """

    identity: dict[str, Any] = field(default_factory=dict)
    batches: int = 0
    cursor: Cursor = field(default_factory=Cursor)

    def update(self, batch: Mapping[str, Any]) -> None:
        """Notes that `batch` has been consumed. Batches must come in the order of the loader."""
        self.cursor = Cursor.from_list(batch["cursor"])
        self.batches += 1

    @property
    def seen(self) -> int:
        """Samples that this rank has dealt with, the broken ones included."""
        return self.cursor.seen

    @property
    def skipped(self) -> int:
        """Broken images and shards that this rank has skipped."""
        return self.cursor.skipped

    @property
    def epoch(self) -> int:
        """The epoch of the last consumed sample."""
        return self.cursor.epoch

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"identity": self.identity, "batches": self.batches, "cursor": self.cursor.to_list()})

    @classmethod
    def from_json(cls, text: str) -> StreamPosition:
        """The inverse of `to_json`; also reads what release 0.1 wrote, if it ran with one worker."""
        values = json.loads(text)
        identity = values["identity"]
        if "cursors" in values:  # 0.1 had an order and a cursor for each worker
            num_workers = identity.pop("num_workers")
            if num_workers > 1:
                raise UserError(
                    f"the image stream was begun by release 0.1 with num_workers={num_workers} and in another order: "
                    "finish the run with that release, or start a new one"
                )
            values["cursor"] = values["cursors"].get("0", Cursor().to_list())
        return cls(identity=identity, batches=values["batches"], cursor=Cursor.from_list(values["cursor"]))

    def bind(self, identity: dict[str, Any]) -> None:
        """Takes over the identity of a new stream, or makes sure that a saved one is the same."""
        if not self.identity:
            self.identity = dict(identity)
        names = sorted(self.identity.keys() | identity.keys())
        wrong = [n for n in names if self.identity.get(n) != identity.get(n)]
        if wrong:
            differences = ", ".join(f"{n} was {self.identity.get(n)} and is {identity.get(n)}" for n in wrong)
            raise UserError(f"the image stream cannot go on where it was: {differences}; undo this or start a new run")
