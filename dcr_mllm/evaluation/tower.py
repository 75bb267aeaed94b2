"""`python -m dcr_mllm.evaluation.tower BASE TOWER [TOWER ...]`: what did the towers gain and lose against BASE?

Every tower goes through the same code at the same batch size in fp32; every difference comes with a paired interval,
a test where one is valid, and the effect that the test could have found.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.labelled import LabelledSet, Split, read_labelled_set
from dcr_mllm.evaluation.mmvp_vlm import PROMPT, Pair, pair_logits, read_pairs, score_pairs, summarise
from dcr_mllm.evaluation.table import print_table
from dcr_mllm.headers import TowerSummary, resolve_weights, tower_summary
from dcr_mllm.log import get_logger
from dcr_mllm.runs import hash_directory, sha256_file, write_text_atomic

if TYPE_CHECKING:
    from dcr_mllm.evaluation.compare import Measured
    from dcr_mllm.evaluation.features import DualEncoder, ImageFeatures

logger = get_logger(__name__)

FEATURES = ("projected", "pooled")
NUM_NEIGHBOURS = 20
NUM_TOKEN_IMAGES = 512
PROBE_STRENGTH, PROBE_ITERATIONS = 0.1, 100
KMEANS_STARTS = 4


def _measure_pairs(encoder: DualEncoder, pairs: Sequence[Pair], num_token_images: int) -> tuple[np.ndarray, Any]:
    """Which pairs [P] are right, and the image features [2P]."""
    files = [file for pair in pairs for file in pair.images]
    images = encoder.embed_images(files, num_token_images=num_token_images)
    texts = encoder.embed_texts([text for pair in pairs for text in pair.texts])
    return score_pairs(pair_logits(images.projected, texts)), images


def probe_attributes(
    split_train: Split, split_test: Split, train: np.ndarray, test: np.ndarray
) -> dict[str, np.ndarray]:
    """Per attribute, [N] of 0 and 1, NaN where the attribute does not apply."""
    from dcr_mllm.evaluation.measures import probe_correct

    correct = {}
    for name, test_values in split_test.attributes.items():
        train_values = split_train.attributes[name]
        train_valid, test_valid = train_values != "", test_values != ""
        if not train_valid.any() or not test_valid.any():
            continue
        result = np.full(len(test_values), np.nan)
        result[test_valid] = probe_correct(
            train[train_valid],
            train_values[train_valid],
            test[test_valid],
            test_values[test_valid],
            strength=PROBE_STRENGTH,
            max_iterations=PROBE_ITERATIONS,
        )
        correct[f"probe:{name}"] = result
    return correct


def _measure_labelled(
    encoder: DualEncoder, labelled: LabelledSet, images: dict[str, ImageFeatures], feature: str, seeds: Sequence[int]
) -> tuple[dict[str, np.ndarray], np.ndarray, dict]:
    """Results per test image, cluster assignments [S, N] and the clustering report."""
    from dcr_mllm.evaluation import measures

    names = list(labelled.prompts)
    index = {name: number for number, name in enumerate(names)}
    truth = {split: np.array([index[value] for value in getattr(labelled, split).classes]) for split in images}
    texts = encoder.embed_texts([prompt for name in names for prompt in labelled.prompts[name]])
    prompts = texts.reshape(len(names), -1, texts.shape[-1])
    chosen = {split: getattr(features, feature) for split, features in images.items()}
    correct = {
        "zero_shot": measures.zero_shot_correct(images["test"].projected, prompts, truth["test"]),
        "knn": measures.knn_correct(chosen["train"], truth["train"], chosen["test"], truth["test"], NUM_NEIGHBOURS),
        **probe_attributes(labelled.train, labelled.test, chosen["train"], chosen["test"]),
    }
    num_clusters = len(np.unique(truth["test"]))
    clusters = measures.cluster(chosen["test"], num_clusters, seeds, KMEANS_STARTS)
    summary = measures.clustering_summary(truth["test"], clusters)
    report: dict = {"num_clusters": num_clusters}
    for score, entry in summary.items():
        values = [100 * value for value in entry["values"]]
        report[score] = {"mean": 100 * entry["mean"], "std": 100 * entry["std"], "values": values}
    return {name: values.astype(float) for name, values in correct.items()}, clusters, report


def _measure(
    summary: TowerSummary,
    pairs: Sequence[Pair] | None,
    labelled: LabelledSet | None,
    *,
    batch_size: int,
    device: str,
    feature: str,
    seeds: Sequence[int],
) -> Measured:
    """One tower's results on everything there is."""
    from dcr_mllm.evaluation.compare import Measured
    from dcr_mllm.evaluation.features import DualEncoder

    encoder = DualEncoder(summary, device=device, batch_size=batch_size)
    measured = Measured(description=encoder.description)
    report: dict = {"description": {**encoder.description, "sha256": hash_directory(summary.path)}}
    if labelled is not None:
        images = {
            "train": encoder.embed_images(labelled.train.files),
            "test": encoder.embed_images(labelled.test.files, num_token_images=NUM_TOKEN_IMAGES),
        }
        measured.tokens = images["test"].tokens
        measured.correct, measured.clusters, clustering = _measure_labelled(encoder, labelled, images, feature, seeds)
        for name in ("zero_shot", "knn"):
            values = measured.correct[name]
            report[name] = {"accuracy": 100 * float(values.mean()), "correct": [int(value) for value in values]}
        probes = {name: values for name, values in measured.correct.items() if name.startswith("probe:")}
        report["probes"] = {
            name.removeprefix("probe:"): 100 * float(np.nanmean(values)) for name, values in probes.items()
        }
        report["clustering"] = clustering
    if pairs is not None:
        token_images = NUM_TOKEN_IMAGES if labelled is None else 0
        measured.pairs, features = _measure_pairs(encoder, pairs, token_images)
        report["mmvp_vlm"] = summarise(pairs, measured.pairs)
        measured.tokens = measured.tokens or features.tokens
    measured.report = report
    return measured


def whole_tower(path: str | Path) -> TowerSummary:
    """Refuse what is no dual encoder, from headers alone, before anything heavy is imported."""
    summary = tower_summary(resolve_weights(path, "tower"))
    if not summary.has_text_side:
        raise UserError(f"{summary.path} has no text side, which pairs and zero-shot need; give the full model")
    return summary


def evaluate_towers(
    towers: dict[str, str | Path],
    *,
    mmvp_vlm: str | Path | None = None,
    labelled: str | Path | None = None,
    out: str | Path | None = None,
    batch_size: int = 256,
    device: str = "auto",
    num_seeds: int = 5,
    feature: str = "projected",
) -> dict:
    """Measure towers and compare each with the first.

    Args:
        towers: Name -> tower directory; the first is the baseline.
        mmvp_vlm: Directory in the public MMVP-VLM layout.
        labelled: Labelled image set, see `labelled`.
        out: Where to write `tower_evaluation.json` and `.png`; None = write nothing.
        batch_size: Images per forward pass, for every tower.
        device: auto, cpu or cuda.
        num_seeds: k-means seeds.
        feature: What k-NN, probes and clustering see: "projected" (the embedding that the contrastive logits use, for
            SigLIP its pooled output) or "pooled" (CLIP's class feature before the projection).

    Returns:
        JSON-able: `settings`, `towers` (per tower), `comparisons` (per tower but the first). Percent and points.
    """
    if len(towers) < 1:
        raise UserError("no tower to measure: give BASE and at least one TOWER.")
    if mmvp_vlm is None and labelled is None:
        raise UserError("nothing to measure on: give an MMVP-VLM directory, a labelled set, or both.")
    if batch_size < 1 or num_seeds < 1:
        raise UserError(f"batch size is {batch_size} and seeds is {num_seeds}; both must be at least 1.")
    if feature not in FEATURES:
        raise UserError(f"feature is '{feature}'; use {' or '.join(FEATURES)}.")
    summaries = {name: whole_tower(path) for name, path in towers.items()}
    pairs = read_pairs(mmvp_vlm) if mmvp_vlm is not None else None
    labelled_set = read_labelled_set(labelled) if labelled is not None else None

    from dcr_mllm.evaluation import compare

    items = compare.Items()
    settings: dict[str, Any] = {
        "baseline": next(iter(towers)),
        "units": "percent; differences in points",
        "dtype": "float32",
        "batch_size": batch_size,
        "device": device,
        "confidence": 0.95,
        "tests": "exact two-sided McNemar on independent units, Holm over the tests of one comparison",
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn", "numpy", "pillow")},
    }
    if pairs is not None and mmvp_vlm is not None:
        items.patterns = np.array([pair.pattern for pair in pairs])
        questions = sha256_file(Path(mmvp_vlm) / "Questions.csv")
        settings["mmvp_vlm"] = {"num_pairs": len(pairs), "prompt": PROMPT, "sha256": {"Questions.csv": questions}}
    if labelled_set is not None and labelled is not None:
        values = sorted(set(labelled_set.test.classes))
        items.classes = np.searchsorted(values, labelled_set.test.classes)
        settings["labelled"] = {
            "num_train": len(labelled_set.train),
            "num_test": len(labelled_set.test),
            "num_prompted_classes": len(labelled_set.prompts),
            "sha256": {name: sha256_file(Path(labelled) / name) for name in ("labels.csv", "classes.json")},
            "feature": f"{feature} image embedding, L2-normalised for k-NN and k-means, standardised for probes",
            "zero_shot": "mean of the normalised text embeddings of all templates",
            "knn": {"num_neighbours": NUM_NEIGHBOURS, "similarity": "cosine", "vote": "majority, ties by cosine"},
            "probes": {"model": "logistic regression", "C": PROBE_STRENGTH, "iterations": PROBE_ITERATIONS},
            "clustering": {"algorithm": "k-means", "starts": KMEANS_STARTS, "seeds": list(range(num_seeds))},
            "clustering_interval": f"bootstrap over test images, {compare.NUM_CLUSTERING_RESAMPLES} resamples, "
            "cluster assignments fixed",
        }
    measured = {}
    for name, summary in summaries.items():
        started = time.perf_counter()
        measured[name] = _measure(
            summary,
            pairs,
            labelled_set,
            batch_size=batch_size,
            device=device,
            feature=feature,
            seeds=range(num_seeds),
        )
        logger.info("measured %s in %.1f s", name, time.perf_counter() - started)
    base, *others = towers
    result = {
        "settings": settings,
        "towers": {name: value.report for name, value in measured.items()},
        "comparisons": {name: compare.compare(measured[base], measured[name], items) for name in others},
    }
    if out is not None:
        write_result(result, Path(out))
    return result


def write_result(result: dict, out: Path) -> None:
    """Write `tower_evaluation.json` and, where there is a comparison, `tower_evaluation.png`."""
    from dcr_mllm.evaluation.plot import plot_result

    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2, allow_nan=False)
    # A list of numbers stays on one line: thousands of per-item results would otherwise take a line each.
    text = re.sub(r"\[\s+[\d\s.,eE+-]+\]", lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "["), text)
    write_text_atomic(out / "tower_evaluation.json", text.replace(" ]", "]") + "\n")
    plot_result(result, out / "tower_evaluation.png")


def tower_names(paths: Sequence[str]) -> dict[str, str | Path]:
    """Short and distinct names: the run's for `runs/NAME/tower`, else the directory's; whole paths if they clash."""
    names = []
    for path in paths:
        parts = Path(path).resolve().parts
        names.append(parts[-2] if parts[-1] == "tower" and len(parts) > 2 else parts[-1])
    if len(set(names)) < len(names):
        names = list(paths)
    if len(set(names)) < len(names):
        raise UserError("the same tower is given twice; each needs its own directory.")
    return dict(zip(names, paths, strict=True))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dcr_mllm.evaluation.tower",
        description="Measure vision towers and compare each with the first: pairs, zero-shot, k-NN, probes, "
        "clustering, drift. Writes tower_evaluation.json and .png and prints a table.",
    )
    parser.add_argument("base", metavar="BASE", help="tower directory of the baseline")
    parser.add_argument("towers", metavar="TOWER", nargs="+", help="tower directories to compare with it")
    parser.add_argument("--mmvp-vlm", type=Path, metavar="DIR", help="Questions.csv and 'MLLM_VLM Images/'")
    parser.add_argument("--labelled", type=Path, metavar="DIR", help="labels.csv, classes.json and images")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/tower_evaluation"), help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="%(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="%(default)s")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="k-means seeds (%(default)s)")
    parser.add_argument(
        "--feature", choices=FEATURES, default="projected", help="for k-NN, probes and clustering (%(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        result = evaluate_towers(
            tower_names([arguments.base, *arguments.towers]),
            mmvp_vlm=arguments.mmvp_vlm,
            labelled=arguments.labelled,
            out=arguments.out,
            batch_size=arguments.batch_size,
            device=arguments.device,
            num_seeds=arguments.seeds,
            feature=arguments.feature,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(result)
    print(f"\nwritten: {arguments.out / 'tower_evaluation.json'}, {arguments.out / 'tower_evaluation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
