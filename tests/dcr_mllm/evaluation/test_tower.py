"""The command from end to end on tiny towers, and what it says of each kind of difference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.compare import Items, Measured, compare
from dcr_mllm.evaluation.features import ImageFeatures
from dcr_mllm.evaluation.measures import clustering_summary
from dcr_mllm.evaluation.mmvp_vlm import PATTERNS, Pair
from dcr_mllm.evaluation.table import format_table
from dcr_mllm.evaluation.tower import _measure_pairs, evaluate_towers, main, tower_names
from tests.tiny_models import save_tiny_clip, save_tiny_siglip


@pytest.fixture(scope="module")
def sets(tmp_path_factory, write_pairs, write_labelled):
    directory = tmp_path_factory.mktemp("sets")
    return {"mmvp_vlm": write_pairs(directory / "pairs", 4), "labelled": write_labelled(directory / "labelled")}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("towers")
    return {
        "base": save_tiny_clip(directory / "base", seed=0),
        "same": save_tiny_clip(directory / "same", seed=0),
        "other": save_tiny_clip(directory / "runs" / "other" / "tower", seed=1),
        "wide": save_tiny_clip(directory / "wide", seed=2, image_size=40),
        "siglip": save_tiny_siglip(directory / "siglip"),
        "siglip2": save_tiny_siglip(directory / "siglip2", seed=1),
    }


@pytest.fixture(scope="module")
def result(towers, sets, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    chosen = {name: towers[name] for name in ("base", "same", "other", "wide")}
    return evaluate_towers(chosen, **sets, out=out, device="cpu", batch_size=32, num_seeds=2), out


def test_result_has_everything(result):
    data, out = result
    assert json.loads((out / "tower_evaluation.json").read_text()) == data
    report = data["towers"]["base"]
    assert list(report["mmvp_vlm"]["per_pattern"]) == list(PATTERNS)
    assert len(report["mmvp_vlm"]["pairs"]) == 36
    assert len(report["zero_shot"]["correct"]) == len(report["knn"]["correct"]) == 48
    assert report["zero_shot"]["accuracy"] == pytest.approx(100 * np.mean(report["zero_shot"]["correct"]))
    assert report["knn"]["accuracy"] > 90  # even a random tower tells colours apart
    assert set(report["probes"]) == {"bright", "sometimes"} and report["probes"]["bright"] > 80
    assert report["clustering"]["num_clusters"] == 4
    assert len(report["clustering"]["nmi"]["values"]) == 2
    assert list(data["comparisons"]) == ["same", "other", "wide"]
    measures = data["comparisons"]["other"]["measures"]
    assert list(measures) == [
        "mmvp_vlm", "zero_shot", "knn", "probe:bright", "probe:sometimes", "probes_mean", "nmi", "acc", "ari",
    ]  # fmt: skip
    assert measures["probe:sometimes"]["num_units"] == 32
    for entry in measures.values():
        assert entry["difference"] == pytest.approx(entry["tower"] - entry["base"])
        assert entry["interval"][0] <= entry["interval"][1]
    tested = {name: entry for name, entry in measures.items() if "p_value" in entry}
    assert set(tested) == {"mmvp_vlm", "zero_shot", "knn", "probe:bright", "probe:sometimes"}
    assert all(entry["p_holm"] >= entry["p_value"] for entry in tested.values())


def test_a_tower_against_its_copy_differs_in_nothing(result):
    comparison = result[0]["comparisons"]["same"]
    for entry in comparison["measures"].values():
        assert entry["difference"] == 0 and entry["interval"] == [0, 0] and entry.get("p_value", 1.0) == 1.0
    drift = comparison["drift"]
    assert drift["llava_layer"] == 2 and len(drift["layers"]) == 4
    for layer in drift["layers"]:
        for token in ("class", "patch"):
            assert layer[token]["cosine"] == pytest.approx(1.0, abs=1e-6)
            assert layer[token]["relative_l2"] == pytest.approx(0.0, abs=1e-6)
            assert layer[token]["cka"] is None or layer[token]["cka"] == pytest.approx(1.0, abs=1e-6)
    assert drift["layers"][0]["class"]["cka"] is None  # before the first block every class token is the same


def test_a_large_difference_of_clusterings_lies_in_its_interval():
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(30), 10)

    def tower(share: float) -> Measured:
        clusters = np.where(rng.random(300) < share, rng.integers(30, size=300), classes)[None]
        summary = clustering_summary(classes, clusters)
        report = {score: {"mean": 100 * summary[score]["mean"]} for score in summary}
        return Measured(description={"model_type": "clip"}, clusters=clusters, report={"clustering": report})

    measures = compare(tower(0.0), tower(0.6), Items(classes=classes))["measures"]
    for score in ("nmi", "acc", "ari"):
        low, high = measures[score]["interval"]
        assert low < measures[score]["difference"] < high
        assert np.mean(measures[score]["draws"]) == pytest.approx(measures[score]["difference"], abs=1e-3)


def test_cautions(result):
    data, _ = result
    assert "36 pairs detect" in data["comparisons"]["same"]["cautions"][0]
    wide = data["comparisons"]["wide"]
    assert wide["drift"] is None
    assert any("image_size differs" in caution for caution in wide["cautions"])
    assert any("differ in shape" in caution for caution in wide["cautions"])


def test_table(result):
    text = format_table(result[0])
    for expected in ("other against base", "MMVP-VLM pairs", "probe bright", "clustering NMI", "caution: 36 pairs"):
        assert expected in text
    for pattern in (*PATTERNS, "average", "drift at hidden_states[-2]"):
        assert pattern in text


def test_picture(result):
    with Image.open(result[1] / "tower_evaluation.png") as picture:
        assert picture.format == "PNG" and picture.width > 1200 and picture.height > 400
        assert len(set(picture.convert("RGB").resize((160, 60)).getdata())) > 20


def test_siglip_and_pairs_alone(towers, sets, tmp_path):
    chosen = {name: towers[name] for name in ("siglip", "siglip2")}
    data = evaluate_towers(chosen, mmvp_vlm=sets["mmvp_vlm"], out=tmp_path, device="cpu")
    layers = data["comparisons"]["siglip2"]["drift"]["layers"]
    assert layers[0]["class"] is None and layers[-1]["patch"]["cosine"] < 0.9
    assert list(data["comparisons"]["siglip2"]["measures"]) == ["mmvp_vlm"]
    assert (tmp_path / "tower_evaluation.png").stat().st_size > 10_000


def test_one_tower_alone_and_the_pooled_feature(towers, sets):
    reports = [
        evaluate_towers({"base": towers["base"]}, labelled=sets["labelled"], device="cpu", feature=feature, num_seeds=1)
        for feature in ("projected", "pooled")
    ]
    assert reports[0]["comparisons"] == {}
    assert format_table(reports[0]) == ""
    assert "pooled" in reports[1]["settings"]["labelled"]["feature"]
    zero_shot, clustering = (
        [report["towers"]["base"][key] for report in reports] for key in ("zero_shot", "clustering")
    )
    assert zero_shot[0] == zero_shot[1] and clustering[0] != clustering[1]


def test_pairs_meet_their_own_images():
    class Encoder:
        """Embeds images and texts as given: the second pair's texts both lie nearest to its first image."""

        def embed_images(self, files, num_token_images):
            return ImageFeatures(
                projected=np.array([[9.0, 1], [1, 2], [3, 1], [1, 9]]), pooled=np.zeros(4), tokens=None
            )

        def embed_texts(self, texts):
            assert texts == ["a photo of a", "a photo of b"] * 2
            return np.array([[1.0, 0], [0, 1], [1, 0.2], [1, 0]])

    pair = Pair(pattern=PATTERNS[0], images=(Path("1.jpg"), Path("2.jpg")), statements=("a", "b"))
    correct, _ = _measure_pairs(Encoder(), [pair, pair], 0)  # type: ignore[arg-type]
    assert correct.tolist() == [True, False]


def test_unequal_patterns_weigh_the_same():
    patterns = np.array(["a"] * 9 + ["b"])
    tower = Measured(description={"model_type": "clip"}, pairs=np.array([False] * 9 + [True]))
    base = Measured(description={"model_type": "clip"}, pairs=np.zeros(10, dtype=bool))
    entry = compare(base, tower, Items(patterns=patterns))["measures"]["mmvp_vlm"]
    assert entry["difference"] == pytest.approx(50.0) and (entry["gained"], entry["lost"]) == (1, 0)


def test_command_line(towers, sets, tmp_path):
    command = [sys.executable, "-m", "dcr_mllm.evaluation.tower", str(towers["base"]), str(towers["other"])]
    command += ["--mmvp-vlm", str(sets["mmvp_vlm"]), "--out", str(tmp_path / "out"), "--device", "cpu", "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "other against base" in done.stdout and "tower_evaluation.json" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tower_evaluation.json", "tower_evaluation.png"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--mmvp-vlm": None}, "nothing to measure on"),
        ({"--mmvp-vlm": "nowhere"}, "Questions.csv is missing"),
        ({"--batch-size": "0"}, "batch size is 0"),
        ({"base": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(towers, sets, tmp_path, capsys, change, said):
    options = {"--mmvp-vlm": str(sets["mmvp_vlm"]), "--out": str(tmp_path)}
    base = change.get("base", str(towers["base"]))
    options |= {key: value for key, value in change.items() if key != "base"}
    flags = [part for key, value in options.items() if value is not None for part in (key, value)]
    assert main([base, str(towers["other"]), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_tower_names(tmp_path):
    runs = [
        str(tmp_path / "base"),
        str(tmp_path / "runs" / "mini" / "tower"),
        str(tmp_path / "runs" / "long" / "tower"),
    ]
    assert list(tower_names(runs)) == ["base", "mini", "long"]
    clash = [str(tmp_path / "a" / "x"), str(tmp_path / "b" / "x")]
    assert list(tower_names(clash)) == clash
    with pytest.raises(UserError, match="twice"):
        tower_names([clash[0], clash[0]])
