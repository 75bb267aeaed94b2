"""A scored benchmark: every score is a function of sums over items.

Of right answers, of pairs with both right, of true positives: a scorer returns what each item adds to these sums, and
the function. So the same function gives the score of the test set and of every bootstrap resample of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Measures = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Answers to one benchmark, scored.

    Attributes:
        sums: [N, K] what each item adds to the sums that the measures are made of.
        measure: From sums [..., K] to named values [...], in percent unless its name says otherwise.
        headline: The measure that the benchmark is quoted by.
        clusters: [N] items that belong together, for resampling: an image, a pair, a group.
        units: [U] right or wrong per independent unit, for McNemar's test; None where units are not independent.
        unit_name: What a unit is.
        right: [N] whether the answer to each item is right.
        unparsable: Positions of answers that say nothing the rule can read.
        chance: A measure that guessing brings to a known value, and that value.
        measure_weighted: From how often each item counts [R, N] to named values [R], where the measures are no function
            of sums over items, such as clustering scores; it then stands in for `measure`.
        undecodable: Images that could not be read. All that depends on them counts as wrong.
    """

    sums: np.ndarray
    measure: Callable[[np.ndarray], Measures]
    headline: str
    clusters: list[str]
    units: np.ndarray | None
    unit_name: str
    right: np.ndarray
    unparsable: list[int]
    chance: tuple[str, float] | None = None
    measure_weighted: Callable[[np.ndarray], Measures] | None = None
    undecodable: tuple[str, ...] = ()

    def resample(self, weights: np.ndarray) -> Measures:
        """Every measure [R] in R resamples of the items, given how often each item occurs in each, [R, N]."""
        if self.measure_weighted is not None:
            return self.measure_weighted(weights)
        return self.measure(weights @ self.sums)

    def values(self) -> dict[str, float]:
        """Every measure on the whole test set."""
        if self.measure_weighted is not None:
            whole = self.measure_weighted(np.ones((1, len(self.clusters))))
            return {name: float(value[0]) for name, value in whole.items()}
        return {name: float(value) for name, value in self.measure(self.sums.sum(axis=0)).items()}


class Columns:
    """Collects the columns of `Scored.sums` under names, so that measures can be written by name."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._values: list[np.ndarray] = []

    def add(self, name: str, values: Sequence[bool] | np.ndarray) -> None:
        self._index[name] = len(self._values)
        self._values.append(np.asarray(values, dtype=float))

    def column(self, name: str) -> np.ndarray:
        return self._values[self._index[name]]

    def matrix(self) -> np.ndarray:
        return np.stack(self._values, axis=1)

    def add_accuracies(self, right: np.ndarray, group: Sequence[str]) -> tuple[str, ...]:
        """Columns `right_*` and `all_*` for each group of items; returns the groups."""
        groups = tuple(dict.fromkeys(group))
        for name in groups:
            inside = np.array([other == name for other in group])
            self.add(f"right_{name}", right & inside)
            self.add(f"all_{name}", inside)
        return groups

    def add_all_right(self, right: np.ndarray, members: Sequence[Hashable], top: str, bottom: str) -> None:
        """Columns that count groups of items (`bottom`) and those that are all right (`top`), at each first item."""
        positions: dict[Hashable, list[int]] = {}
        for position, member in enumerate(members):
            positions.setdefault(member, []).append(position)
        firsts, hits = np.zeros(len(members)), np.zeros(len(members))
        for group in positions.values():
            firsts[group[0]], hits[group[0]] = 1, right[group].all()
        self.add(bottom, firsts)
        self.add(top, hits)

    def ratio(self, sums: np.ndarray, top: str, bottom: str) -> np.ndarray:
        """Percent; NaN where nothing is counted."""
        return percent(sums[..., self._index[top]], sums[..., self._index[bottom]])

    def get(self, sums: np.ndarray, name: str) -> np.ndarray:
        return sums[..., self._index[name]]


def percent(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """100 * top / bottom; NaN where nothing is counted."""
    top, bottom = np.asarray(top, dtype=float), np.asarray(bottom, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * top / bottom
