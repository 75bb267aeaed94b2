"""Benchmarks of vision towers for `eval/run.py`: where their data are, and how a tower is measured on them.

Everything runs in fp32 through `features.DualEncoder`, and every tower sees the same images in the same batches.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.captioned import CaptionedSet, read_captioned_set
from dcr_mllm.evaluation.labelled import Split
from dcr_mllm.evaluation.labelled_sources import NamedSet, read_named_set
from dcr_mllm.evaluation.llava_tower import tower_of as tower_of
from dcr_mllm.evaluation.mllm_data import MINI
from dcr_mllm.evaluation.mmvp_vlm import PROMPT, Pair, pair_logits, read_pairs, score_pairs
from dcr_mllm.evaluation.tower import (
    KMEANS_STARTS,
    PROBE_ITERATIONS,
    PROBE_STRENGTH,
    probe_attributes,
    whole_tower,
)
from dcr_mllm.log import get_logger
from dcr_mllm.runs import sha256_file

if TYPE_CHECKING:
    from dcr_mllm.evaluation.features import DualEncoder, Picture
    from dcr_mllm.evaluation.scored import Scored

logger = get_logger(__name__)

KMEANS_SEEDS = 5


@dataclass(frozen=True, kw_only=True)
class TowerTask:
    """A benchmark's data.

    Attributes:
        name: In results; begins with `mini-` for the drawn one.
        task: Of `TOWER_TASKS`.
        sets: What is measured, by name of the result: `zero_shot/cifar10` for each set of a task that has several.
        settings: What a reader of each result has to know, JSON-able: numbers of items, prompts, method.
    """

    name: str
    task: str
    sets: dict[str, Any]
    settings: dict[str, dict[str, Any]]


class _Embedder:
    """A tower that embeds a set of images once, however many tasks use it."""

    def __init__(self, encoder: DualEncoder) -> None:
        self._encoder = encoder
        self._done: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}

    def images(self, pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings [N, D], and [N] which images could be decoded.

        Raises:
            UserError: None of them could.
        """
        names = tuple(str(picture) for picture in pictures)
        if names not in self._done:
            found = self._encoder.embed_images(pictures, skip_unreadable=True)
            readable = np.ones(len(names), dtype=bool)
            readable[list(found.unreadable)] = False
            if not readable.any():
                raise UserError(f"none of {len(names)} images can be decoded, the first: {', '.join(names[:3])}")
            self._done[names] = found.projected, readable
        return self._done[names]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Normalised embeddings [N, D]."""
        return self._encoder.embed_texts(texts)


def _chosen(count: int, limit: int | None) -> np.ndarray:
    """Indices of at most `limit` items, at random, since sets are sorted by class; the same for every tower."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, max(limit, 1), replace=False))


def _part(split: Split, chosen: np.ndarray) -> Split:
    return Split(
        files=[split.files[index] for index in chosen.tolist()],
        classes=split.classes[chosen],
        attributes={name: values[chosen] for name, values in split.attributes.items()},
    )


def _truth(data: NamedSet, split: Split) -> np.ndarray:
    """[N] class indices, in the order of the prompts."""
    index = {value: number for number, value in enumerate(data.labelled.prompts)}
    return np.array([index[value] for value in split.classes])


def _with_unreadable(scored: Scored, pictures: Sequence[Picture], readable: np.ndarray) -> Scored:
    return dataclasses.replace(
        scored, undecodable=tuple(str(pictures[index]) for index in np.flatnonzero(~readable).tolist())
    )


def _measure_mmvp_vlm(tower: _Embedder, pairs: list[Pair], limit: int | None) -> Scored:
    from dcr_mllm.evaluation.tower_scorers import score_mmvp_vlm

    kept = [pairs[index] for index in _chosen(len(pairs), None if limit is None else limit // 2).tolist()]
    files = [file for pair in kept for file in pair.images]
    images, readable = tower.images(files)
    correct = score_pairs(pair_logits(images, tower.texts([text for pair in kept for text in pair.texts])))
    both_readable = readable[::2] & readable[1::2]
    return _with_unreadable(score_mmvp_vlm(kept, correct, both_readable), files, readable)


def _measure_zero_shot(tower: _Embedder, data: NamedSet, limit: int | None) -> Scored:
    from dcr_mllm.evaluation.measures import zero_shot_scores
    from dcr_mllm.evaluation.tower_scorers import score_zero_shot

    test = _part(data.labelled.test, _chosen(len(data.labelled.test), limit))
    images, readable = tower.images(test.files)
    prompts = data.labelled.prompts.values()
    texts = tower.texts([prompt for lines in prompts for prompt in lines])
    similarities = zero_shot_scores(images, texts.reshape(len(prompts), -1, texts.shape[1]))
    return _with_unreadable(score_zero_shot(similarities, _truth(data, test), readable), test.files, readable)


def _measure_clustering(tower: _Embedder, data: NamedSet, limit: int | None) -> Scored:
    from dcr_mllm.evaluation.measures import cluster
    from dcr_mllm.evaluation.tower_scorers import score_clustering

    test = _part(data.labelled.test, _chosen(len(data.labelled.test), limit))
    images, readable = tower.images(test.files)
    # There is no wrong cluster for an image that nobody could read, so it is left out.
    truth = _truth(data, test)[readable]
    assignments = cluster(images[readable], len(np.unique(truth)), range(KMEANS_SEEDS), KMEANS_STARTS)
    return _with_unreadable(score_clustering(truth, assignments), test.files, readable)


def _measure_linear_probe(tower: _Embedder, data: NamedSet, limit: int | None) -> Scored:
    from dcr_mllm.evaluation.measures import probe_correct
    from dcr_mllm.evaluation.tower_scorers import score_linear_probe

    train, test = (_part(split, _chosen(len(split), limit)) for split in (data.labelled.train, data.labelled.test))
    seen, seen_readable = tower.images(train.files)
    images, readable = tower.images(test.files)
    train, seen = _part(train, np.flatnonzero(seen_readable)), seen[seen_readable]
    right = probe_correct(seen, train.classes, images, test.classes, PROBE_STRENGTH, PROBE_ITERATIONS)
    correct = {"class": right.astype(float)}
    attributes = probe_attributes(train, test, seen, images)
    correct |= {name.removeprefix("probe:"): values for name, values in attributes.items()}
    return _with_unreadable(score_linear_probe(correct, readable), test.files, readable)


def _measure_retrieval(tower: _Embedder, data: CaptionedSet, limit: int | None) -> Scored:
    from dcr_mllm.evaluation.tower_scorers import score_retrieval

    chosen = _chosen(len(data.pictures), limit)
    pictures = [data.pictures[index] for index in chosen.tolist()]
    captions = [data.captions[index] for index in chosen.tolist()]
    images, readable = tower.images(pictures)
    owner = np.repeat(np.arange(len(captions)), [len(lines) for lines in captions])
    texts = tower.texts([line for lines in captions for line in lines])
    return _with_unreadable(score_retrieval(images, texts, owner, readable), pictures, readable)


def _read_mmvp_vlm(directory: Path) -> tuple[list[Pair], dict[str, Any]]:
    pairs = read_pairs(directory)
    sha256 = sha256_file(directory / "Questions.csv")
    return pairs, {"num_pairs": len(pairs), "prompt": PROMPT, "questions_sha256": sha256}


def _sizes(data: NamedSet) -> dict[str, Any]:
    return {"num_images": len(data.labelled.test), "num_classes": len(data.labelled.prompts)}


def _read_zero_shot(directory: Path) -> tuple[NamedSet, dict[str, Any]]:
    data = read_named_set(directory, ("test",))
    return data, {**_sizes(data), "prompts": data.prompts_from, "classifier": "mean text embedding of all templates"}


def _read_clustering(directory: Path) -> tuple[NamedSet, dict[str, Any]]:
    data = read_named_set(directory, ("test",), prompts=False)
    method = f"k-means on normalised projected embeddings, {KMEANS_STARTS} starts, means over {KMEANS_SEEDS} seeds"
    return data, {**_sizes(data), "method": method, "interval": "over test images, cluster assignments fixed"}


def _read_linear_probe(directory: Path) -> tuple[NamedSet, dict[str, Any]]:
    data = read_named_set(directory, prompts=False)
    method = (
        f"logistic regression on standardised projected embeddings, C={PROBE_STRENGTH}, L-BFGS of {PROBE_ITERATIONS} "
        "iterations"
    )
    return data, {**_sizes(data), "num_train": len(data.labelled.train), "method": method}


def _read_retrieval(directory: Path) -> tuple[CaptionedSet, dict[str, Any]]:
    data = read_captioned_set(directory)
    return data, {"num_images": len(data.pictures), "num_captions": sum(map(len, data.captions))}


def _mini_part(name: str) -> Callable[[Path], Path]:
    def draw(directory: Path) -> Path:
        from dcr_mllm.mini.data import write_benchmarks

        return write_benchmarks(directory) / name

    return draw


def _mini_retrieval(directory: Path) -> Path:
    from dcr_mllm.mini.data import write_retrieval

    return write_retrieval(directory)


class _Task(NamedTuple):
    """How a benchmark is read, measured and drawn.

    Attributes:
        read: A set and its settings, from its directory.
        measure: A tower on a set, on at most so many images.
        mini: Draws the set into a folder of drawn data, unless it is there, and says where.
        has_sets: Its folder holds a folder per set, not one set.
    """

    read: Callable[[Path], tuple[Any, dict[str, Any]]]
    measure: Callable[[_Embedder, Any, int | None], Scored]
    mini: Callable[[Path], Path]
    has_sets: bool


_TASKS = {
    "mmvp_vlm": _Task(_read_mmvp_vlm, _measure_mmvp_vlm, _mini_part("mmvp_vlm"), False),
    "zero_shot": _Task(_read_zero_shot, _measure_zero_shot, _mini_part("labelled"), True),
    "clustering": _Task(_read_clustering, _measure_clustering, _mini_part("labelled"), True),
    "retrieval": _Task(_read_retrieval, _measure_retrieval, _mini_retrieval, True),
    "linear_probe": _Task(_read_linear_probe, _measure_linear_probe, _mini_part("labelled"), True),
}
TOWER_TASKS: tuple[str, ...] = tuple(_TASKS)


def load_tower_task(name: str, data: str, runs_dir: Path) -> TowerTask:
    """Find a benchmark's data; images are read when they are measured.

    Args:
        name: Of `TOWER_TASKS`.
        data: `mini`, or a folder that holds `<name>/`: for mmvp_vlm its public layout, for the others a folder per set.
        runs_dir: Where drawn data are kept.

    Raises:
        UserError: The data are not there or not complete.
    """
    task = _TASKS[name]
    if data == MINI:
        places = {f"{MINI}-{name}": task.mini(runs_dir / "mini-data" / "test")}
    else:
        places = _places(name, Path(data))
    sets, settings = {}, {}
    for result, place in places.items():
        sets[result], settings[result] = task.read(place)
        settings[result]["directory"] = str(place)
    return TowerTask(name=f"{MINI}-{name}" if data == MINI else name, task=name, sets=sets, settings=settings)


def _places(name: str, data: Path) -> dict[str, Path]:
    """Directories of a task's sets by name of the result."""
    folder = data / name
    if not folder.is_dir():
        raise UserError(f"--data {data} has no folder {name}/; put a copy of the benchmark's files there")
    if not _TASKS[name].has_sets:
        return {name: folder}
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    loose = {"train", "test", "val", "validation", "images", "data"} & {path.name for path in found}
    if not found or loose:
        raise UserError(f"{folder} has to hold a folder per set, such as {name}/cifar10/; move the files into one")
    return {f"{name}/{path.name}": path for path in found}


def measure_tower_tasks(
    towers: dict[str, Path], tasks: Sequence[TowerTask], *, batch_size: int, device: str, limit: int | None = None
) -> dict[str, dict[str, Scored]]:
    """Measure towers on benchmarks; each tower is loaded once, and embeds images that several tasks use once.

    Args:
        towers: Tower directories by name, see `tower_of`.
        tasks: Loaded.
        batch_size: Images or texts per forward pass.
        device: auto, cpu or cuda.
        limit: Images per set (and, for a probe, per split), chosen at random; whole pairs are kept.

    Returns:
        Per tower and result.

    Raises:
        UserError: A tower is not whole, or an image set has no image that can be decoded.
    """
    summaries = {path: whole_tower(path) for path in dict.fromkeys(towers.values())}
    from dcr_mllm.evaluation.features import DualEncoder

    measured: dict[Path, dict[str, Scored]] = {}
    for path, summary in summaries.items():
        tower = _Embedder(DualEncoder(summary, device=device, batch_size=batch_size))
        measured[path] = {}
        for task in tasks:
            for result, data in task.sets.items():
                started = time.perf_counter()
                measured[path][result] = _TASKS[task.task].measure(tower, data, limit)
                logger.info("%s: %s in %.1f s", path, result, time.perf_counter() - started)
    return {name: measured[path] for name, path in towers.items()}
