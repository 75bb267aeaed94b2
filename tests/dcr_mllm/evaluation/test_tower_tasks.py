"""Tower benchmarks on tiny towers: the numbers of `evaluate_towers` and of scikit-learn, from every layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.features import DualEncoder
from dcr_mllm.evaluation.labelled import LabelledSet, read_labelled_set
from dcr_mllm.evaluation.scored import Scored
from dcr_mllm.evaluation.tower import evaluate_towers
from dcr_mllm.evaluation.tower_tasks import TOWER_TASKS, load_tower_task, measure_tower_tasks
from dcr_mllm.evaluation.verdicts import add_verdicts, compare_task
from dcr_mllm.headers import tower_summary
from dcr_mllm.mini import data as mini
from tests.dcr_mllm.evaluation import layouts


@pytest.fixture(scope="module")
def towers(tiny_clip: Path, tiny_siglip: Path) -> dict[str, Path]:
    return {"clip": tiny_clip, "siglip": tiny_siglip}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs whose drawn benchmarks are there already, only smaller."""
    runs = tmp_path_factory.mktemp("runs")
    drawn = runs / "mini-data" / "test"
    mini.write_mmvp_vlm(drawn / "mmvp_vlm", "test", 3)
    mini.write_labelled(drawn / "labelled", "test", num_train=150, num_test=120)
    mini.write_captioned(drawn / "retrieval", "test", num_images=30)
    for other in ("mmvp", "pope"):
        (drawn / other).mkdir()
    return runs


@pytest.fixture(scope="module")
def measured(runs: Path, towers: dict[str, Path]) -> dict[str, dict[str, Scored]]:
    tasks = [load_tower_task(name, "mini", runs) for name in TOWER_TASKS]
    return measure_tower_tasks(towers, tasks, batch_size=32, device="cpu")


def embed(tower: Path, files) -> np.ndarray:
    return DualEncoder(tower_summary(tower), device="cpu", batch_size=32).embed_images(files).projected


def probe_right(tower: Path, labelled: LabelledSet, chosen: np.ndarray) -> np.ndarray:
    """Which test images a probe on the chosen training images names right."""
    train, test = embed(tower, labelled.train.files)[chosen], embed(tower, labelled.test.files)
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=0.1, max_iter=100, tol=1e-3)
    model.fit(scaler.transform(train), labelled.train.classes[chosen])
    return model.predict(scaler.transform(test)) == labelled.test.classes


def test_drawn_benchmarks_have_the_numbers_of_the_tower_evaluation(measured, runs: Path, towers: dict[str, Path]):
    drawn = runs / "mini-data" / "test"
    expected = evaluate_towers(
        dict(towers), mmvp_vlm=drawn / "mmvp_vlm", labelled=drawn / "labelled", batch_size=32, device="cpu"
    )
    for name in towers:
        report, values = expected["towers"][name], {task: scored.values() for task, scored in measured[name].items()}
        assert set(values) == {f"mini-{task}" for task in TOWER_TASKS}
        assert values["mini-mmvp_vlm"]["pair_accuracy"] == pytest.approx(report["mmvp_vlm"]["average"], rel=1e-12)
        assert measured[name]["mini-mmvp_vlm"].right.tolist() == [bool(hit) for hit in report["mmvp_vlm"]["pairs"]]
        assert values["mini-zero_shot"]["accuracy"] == pytest.approx(report["zero_shot"]["accuracy"], rel=1e-12)
        assert measured[name]["mini-zero_shot"].right.tolist() == [bool(hit) for hit in report["zero_shot"]["correct"]]
        for score in ("nmi", "acc", "ari"):
            assert values["mini-clustering"][score] == pytest.approx(report["clustering"][score]["mean"], abs=1e-9)
        for attribute, accuracy in report["probes"].items():
            assert values["mini-linear_probe"][f"accuracy_{attribute}"] == pytest.approx(accuracy)
        assert not any(scored.undecodable for scored in measured[name].values())
    measures = expected["comparisons"]["siglip"]["measures"]
    for task, old in (("mmvp_vlm", "mmvp_vlm"), ("zero_shot", "zero_shot"), ("clustering", "nmi")):
        entry = compare_task([measured["clip"][f"mini-{task}"]], [measured["siglip"][f"mini-{task}"]])
        assert entry["measures"][entry["headline"]]["difference"] == pytest.approx(measures[old]["difference"])
        if task != "clustering":  # whose interval has more resamples here
            assert entry["p_value"] == measures[old]["p_value"]
            assert entry["measures"][entry["headline"]]["interval"] == pytest.approx(measures[old]["interval"])


def test_linear_probe_against_sklearn(measured, runs: Path, towers: dict[str, Path]):
    labelled = read_labelled_set(runs / "mini-data" / "test" / "labelled")
    for name, tower in towers.items():
        expected = probe_right(tower, labelled, np.arange(150))
        assert (measured[name]["mini-linear_probe"].right == expected).all()
        assert measured[name]["mini-linear_probe"].values()["accuracy"] == pytest.approx(100 * expected.mean())


def test_retrieval_against_sorted_cosines(measured, runs: Path, towers: dict[str, Path]):
    task = load_tower_task("retrieval", "mini", runs)
    data = task.sets["mini-retrieval"]
    owner = np.repeat(np.arange(30), 2)
    for name, tower in towers.items():
        encoder = DualEncoder(tower_summary(tower), device="cpu", batch_size=32)
        images = encoder.embed_images(data.pictures).projected
        cosines = cosine_similarity(images, encoder.embed_texts([line for lines in data.captions for line in lines]))
        values = measured[name]["mini-retrieval"].values()
        nearest = np.argsort(-cosines, axis=1)[:, :10]
        assert values["image_to_text_recall@10"] == pytest.approx(
            100 * np.mean([image in owner[row] for image, row in enumerate(nearest)])
        )
        nearest = np.argsort(-cosines, axis=0)[:5].T
        assert values["text_to_image_recall@5"] == pytest.approx(
            100 * np.mean([image in row for image, row in zip(owner, nearest, strict=True)])
        )


def test_results_can_be_compared_and_judged(measured):
    comparisons = {
        task: compare_task([measured["clip"][task]], [measured["siglip"][task]]) for task in measured["clip"]
    }  # fmt: skip
    add_verdicts(comparisons)
    assert all(entry["verdict"] for entry in comparisons.values())
    assert comparisons["mini-mmvp_vlm"]["test"] == "exact McNemar on 27 pairs"
    assert comparisons["mini-zero_shot"]["test"] == "exact McNemar on 120 images"
    assert comparisons["mini-retrieval"]["test"] == "paired bootstrap over 30 images or groups"


def test_each_tower_embeds_an_image_set_once(runs: Path, towers: dict[str, Path], monkeypatch):
    seen: list[int] = []
    embed_images = DualEncoder.embed_images

    def counted(self, files, **options):
        seen.append(len(files))
        return embed_images(self, files, **options)

    monkeypatch.setattr(DualEncoder, "embed_images", counted)
    tasks = [load_tower_task(name, "mini", runs) for name in ("zero_shot", "clustering", "linear_probe")]
    both = {"clip": towers["clip"], "again": towers["clip"]}
    found = measure_tower_tasks(both, tasks, batch_size=32, device="cpu")
    assert seen == [120, 150] and found["again"] == found["clip"]


def test_every_layout_gives_the_same_numbers(tiny_clip: Path, tmp_path: Path, write_labelled, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    places = tmp_path / "data" / "zero_shot"
    labelled = read_labelled_set(write_labelled(places / "plain", 24, 20))
    layouts.write_folders(places / "folders", labelled)
    layouts.write_tars(places / "tars", labelled)
    layouts.write_datasets(places / "saved", labelled, parquet=False)
    layouts.write_datasets(places / "parquet", labelled, parquet=True)
    for name in ("folders", "tars", "saved", "parquet"):
        layouts.write_names(places / name, labelled)
    for task in ("clustering", "linear_probe"):
        (tmp_path / "data" / task).symlink_to(places)
    tasks = [load_tower_task(task, str(tmp_path / "data"), tmp_path) for task in ("zero_shot", "linear_probe")]
    found = measure_tower_tasks({"clip": tiny_clip}, tasks, batch_size=8, device="cpu")["clip"]
    assert len(found) == 10 and tasks[0].settings["zero_shot/tars"]["num_images"] == 20
    assert "classnames.txt" in tasks[0].settings["zero_shot/tars"]["prompts"]
    for task in ("zero_shot", "linear_probe"):
        plain = found[f"{task}/plain"].values()
        for name in ("folders", "tars", "saved", "parquet"):
            values = found[f"{task}/{name}"].values()
            # Only the labelled layout has attributes; single images may flip where batches round in another way.
            assert values == pytest.approx({key: plain[key] for key in values}, abs=1e-6), name


def damaged(directory: Path, write_labelled, *numbers: int) -> Path:
    write_labelled(directory, 24, 20)
    for number in numbers:
        path = directory / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:200])
    return directory


def test_images_that_cannot_be_decoded_are_listed_and_wrong(tiny_clip: Path, tmp_path: Path, write_labelled):
    for task in ("zero_shot", "clustering", "linear_probe"):
        damaged(tmp_path / "data" / task / "walls", write_labelled, 3, 26, 40)
        damaged(tmp_path / "whole" / task / "walls", write_labelled)
    for task in ("zero_shot", "clustering", "linear_probe"):
        scored, whole = (
            measure_tower_tasks(
                {"clip": tiny_clip}, [load_tower_task(task, str(tmp_path / data), tmp_path)], batch_size=8, device="cpu"
            )["clip"][f"{task}/walls"]
            for data in ("data", "whole")
        )  # fmt: skip
        assert [Path(name).name for name in scored.undecodable] == ["26.png", "40.png"], task
        assert not whole.undecodable
        if task == "zero_shot":
            kept = np.delete(np.arange(20), [2, 16])
            assert (scored.right[kept] == whole.right[kept]).all() and not scored.right[[2, 16]].any()
        if task == "clustering":
            assert len(scored.right) == 18  # there is no wrong cluster
        if task == "linear_probe":
            labelled = read_labelled_set(tmp_path / "whole" / task / "walls")
            expected = probe_right(tiny_clip, labelled, np.delete(np.arange(24), 3))
            kept = np.delete(np.arange(20), [2, 16])
            assert (scored.right[kept] == expected[kept]).all() and scored.right.sum() > 10
            assert not scored.right[[2, 16]].any()


def test_a_set_of_damaged_images_is_refused(tiny_clip: Path, tmp_path: Path, write_labelled):
    damaged(tmp_path / "zero_shot" / "walls", write_labelled, *range(24, 44))
    task = load_tower_task("zero_shot", str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="none of 20 images can be decoded, the first: .*24.png, .*25.png, .*26.png"):
        measure_tower_tasks({"clip": tiny_clip}, [task], batch_size=8, device="cpu")


def test_a_limit_chooses_at_random_and_keeps_pairs(runs: Path, tiny_clip: Path):
    tasks = [load_tower_task(name, "mini", runs) for name in TOWER_TASKS]
    found = measure_tower_tasks({"clip": tiny_clip}, tasks, batch_size=32, device="cpu", limit=21)["clip"]
    assert {name: len(scored.right) for name, scored in found.items()} == {
        "mini-mmvp_vlm": 10,
        "mini-zero_shot": 21,
        "mini-clustering": 21,
        "mini-retrieval": 21,
        "mini-linear_probe": 21,
    }
    assert len([name for name in found["mini-mmvp_vlm"].values() if name.startswith("accuracy_")]) > 4


def test_mmvp_vlm_lies_directly_in_its_folder(tiny_clip: Path, tmp_path: Path, write_pairs, monkeypatch):
    # A tower that gets every pair right, so that only the damage makes one wrong.
    monkeypatch.setattr("dcr_mllm.evaluation.tower_tasks.score_pairs", lambda logits: np.ones(len(logits), dtype=bool))
    write_pairs(tmp_path / "mmvp_vlm", 2)
    (tmp_path / "mmvp_vlm" / "MLLM_VLM Images" / "Texts" / "29.jpg").write_bytes(b"no image")
    task = load_tower_task("mmvp_vlm", str(tmp_path), tmp_path)
    scored = measure_tower_tasks({"clip": tiny_clip}, [task], batch_size=8, device="cpu")["clip"]["mmvp_vlm"]
    assert np.flatnonzero(~scored.right).tolist() == [14] and len(scored.undecodable) == 1
    assert task.settings["mmvp_vlm"]["num_pairs"] == 18 and task.name == "mmvp_vlm"


def test_data_that_are_not_there_are_refused(tmp_path: Path, write_labelled, tiny_llava: Path, runs: Path):
    with pytest.raises(UserError, match="has no folder zero_shot/"):
        load_tower_task("zero_shot", str(tmp_path), tmp_path)
    write_labelled(tmp_path / "zero_shot", 8, 8)
    with pytest.raises(UserError, match="has to hold a folder per set, such as zero_shot/cifar10/"):
        load_tower_task("zero_shot", str(tmp_path), tmp_path)
    shutil.rmtree(tmp_path / "zero_shot")
    (tmp_path / "zero_shot" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match="has no test images: neither labels.csv"):
        load_tower_task("zero_shot", str(tmp_path), tmp_path)
    task = load_tower_task("zero_shot", "mini", runs)
    with pytest.raises(UserError, match="model_type 'llava'"):
        measure_tower_tasks({"llava": tiny_llava}, [task], batch_size=8, device="cpu")
