"""Where a benchmark's rows come from: the drawn ones, public files, copies of hub repositories, the hub cache."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.mllm_data import load_task, mmvp_rows, pope_rows
from dcr_mllm.evaluation.mllm_tasks import TASKS, mmvp_item
from dcr_mllm.mini.groups import write_pope
from tests.benchmarks import ROWS, image_bytes, mmvp, picture, write_copy_of
from tests.dcr_mllm.evaluation.test_run import write_mmvp

WITH_DEFAULTS = Path("unused")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("task", TASKS)
def test_copies_of_hub_repositories(task: str, tmp_path: Path):
    write_copy_of(task, tmp_path)
    data = load_task(task, str(tmp_path), WITH_DEFAULTS)
    rows = ROWS[task]()
    assert data.name == task and [Path(file).parent.parent for file in data.files or []] == [tmp_path / task]
    for expected, row in zip(rows, data.rows, strict=True):
        assert {**row, "image_digest": None} == {
            **{key: value for key, value in expected.items() if key != TASKS[task].image},
            "image_digest": None,
        }
    assert data.image(1) == rows[1][TASKS[task].image]["bytes"]
    items = data.items(["Yes"] * len(rows))
    assert len(data.score(items).right) == len(rows)
    assert all(len(TASKS[task].options(row)) >= 2 for row in data.rows)


def test_scores_of_a_whole_copy_are_the_official_ones(tmp_path: Path):
    """Right answers score full marks in every benchmark, and the rule's wrong answer none."""
    right = {
        "mmvp": lambda row: row["Correct Answer"][1].upper(),
        "pope": lambda row: row["answer"].capitalize(),
        "cv_bench": lambda row: "B",
        "naturalbench": lambda row: row["Answer"],
        "mme": lambda row: row["answer"],
        "scienceqa_img": lambda row: "ABC"[row["answer"]],
        "hallusion_bench_image": lambda row: "Yes" if row["gt_answer"] == "1" else "No",
    }
    for task, answer in right.items():
        write_copy_of(task, tmp_path)
        data = load_task(task, str(tmp_path), WITH_DEFAULTS)
        best = data.score(data.items([answer(row) for row in data.rows]))
        worst = data.score(data.items([TASKS[task].wrong(row) for row in data.rows]))
        full = 200 if task == "mme" else 100
        assert best.right.all() and best.values()[best.headline] == full, task
        assert not worst.right.any() and worst.values()[worst.headline] == 0, task


def test_labels_that_the_hub_copy_of_mmvp_swaps(tmp_path: Path):
    rows = mmvp(300)
    original = {row["Index"]: row["Correct Answer"] for row in rows}
    swapped = [
        {**row, "Correct Answer": {"(a)": "(b)", "(b)": "(a)"}[row["Correct Answer"]]}
        if row["Index"] in (99, 100, 279, 280)
        else row
        for row in rows
    ]
    write_copy_of("mmvp", tmp_path / "original", rows)
    write_copy_of("mmvp", tmp_path / "hub", [{**row, "Index": str(row["Index"])} for row in swapped])
    for limit in (None, 100):
        both = [load_task("mmvp", str(tmp_path / name), WITH_DEFAULTS, limit) for name in ("original", "hub")]
        for data in both:
            assert {int(row["Index"]): row["Correct Answer"] for row in data.rows} == dict(
                list(original.items())[: limit or 300]
            )
        scores = both[1].score(both[1].items([row["Correct Answer"][1].upper() for row in both[1].rows])).values()
        disputed = 1 if limit else 2
        assert scores["pair_accuracy"] == 100
        pairs = len(both[1].rows) / 2
        assert scores["pair_accuracy_hub_labels"] == pytest.approx(100 * (1 - disputed / pairs))


def test_limit_keeps_whole_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for task, limit, kept in (("naturalbench", 7, 4), ("mmvp", 1, 2), ("pope", 5, 5), ("mme", 3, 2)):
        write_copy_of(task, tmp_path)
        data = load_task(task, str(tmp_path), WITH_DEFAULTS, limit)
        assert len(data.rows) == len(data.table) == kept and data.files is None
        said = capsys.readouterr().out
        assert f"{task}: {kept} of {len(ROWS[task]())} questions" in said
        assert (f", whole {TASKS[task].unit_name}s" in said) == (kept != limit)


def test_a_part_of_a_benchmark_is_told_from_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """An interrupted download is refused; what has other rows than were published is scored, and said."""
    write_copy_of("pope", tmp_path)
    data = load_task("pope", str(tmp_path), WITH_DEFAULTS)
    assert data.notes == ["12 questions, where the published benchmark has 9000: not the whole of it"]
    assert f"pope: {data.notes[0]}" in capsys.readouterr().out
    (file,) = (tmp_path / "pope" / "data").iterdir()
    file.rename(file.with_name("test-00001-of-00003.parquet"))
    with pytest.raises(UserError, match="pope: .* has not all 3 parts of test; get it with `hf download"):
        load_task("pope", str(tmp_path), WITH_DEFAULTS)
    write_copy_of("mmvp", tmp_path, mmvp(300))
    assert load_task("mmvp", str(tmp_path), WITH_DEFAULTS, 4).notes == []


@pytest.mark.parametrize("task", ["mmvp", "pope", "hallusion_bench_image"])
def test_images_that_cannot_be_decoded_count_as_wrong(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = ROWS[task]()
    cut = {"bytes": rows[1]["image"]["bytes"][:200], "path": "cut.png"}
    rows[0] = {**rows[0], "image": {"bytes": b"no picture", "path": "x.png"}}
    rows[1] = {**rows[1], "image": cut}
    write_copy_of(task, tmp_path, rows)
    data = load_task(task, str(tmp_path), WITH_DEFAULTS)
    assert f"{task}: 2 images cannot be decoded and count as wrong, the first: row 0 (no image that" in (
        capsys.readouterr().out
    )
    assert list(data.undecodable) == [0, 1] and len(data.table) == len(rows) - 2 and data.files is None
    assert data.image(2) == rows[2]["image"]["bytes"]
    items = data.items(["?"] * (len(rows) - 2))
    assert [bool(item.get("undecodable")) for item in items[:3]] == [True, True, False]
    assert not data.score(items).right[:2].any()


def test_what_is_missing_is_told_in_a_sentence(tmp_path: Path, own_cache: Path):
    with pytest.raises(UserError, match=r"has no folder cv_bench/; get it with `hf download nyu-visionx/CV-Ben"):
        load_task("cv_bench", str(tmp_path), WITH_DEFAULTS)
    with pytest.raises(UserError, match=r"mme: lmms-lab-encoder/MME is not in the hub cache; get it with `hf download"):
        load_task("mme", "hub", WITH_DEFAULTS)
    with pytest.raises(UserError, match=r"there is no drawn mme; with --data mini ask mmvp, pope"):
        load_task("mme", "mini", WITH_DEFAULTS)
    (tmp_path / "mme").mkdir()
    with pytest.raises(UserError, match=r"mme: \S*mme cannot be read \("):
        load_task("mme", str(tmp_path), WITH_DEFAULTS)
    rows = [{key: value for key, value in row.items() if key != "hint"} for row in ROWS["scienceqa_img"]()]
    write_copy_of("scienceqa_img", tmp_path, rows)
    with pytest.raises(UserError, match=r"scienceqa_img: \S* has no column hint but image, question, choices, answer"):
        load_task("scienceqa_img", str(tmp_path), WITH_DEFAULTS)
    write_copy_of("pope", tmp_path, [{**row, "image": {"bytes": b"", "path": None}} for row in ROWS["pope"]()])
    with pytest.raises(UserError, match="pope: none of the images"):
        load_task("pope", str(tmp_path), WITH_DEFAULTS)


def test_hub_cache(tmp_path: Path, own_cache: Path):
    folder = own_cache / "datasets--lmms-lab-eval--MMVP"
    write_copy_of("mmvp", tmp_path)
    (folder / "snapshots").mkdir(parents=True)
    (tmp_path / "mmvp").rename(folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    data = load_task("mmvp", "hub", WITH_DEFAULTS)
    assert [row["Index"] for row in data.rows] == [1, 2, 3, 4]


def test_equal_data_have_equal_digests(tmp_path: Path):
    """Wherever they lie, and only if rows and pixels are the same."""

    def digest(name: str, rows: list[dict[str, Any]]) -> str:
        write_copy_of("mmvp", tmp_path / name, rows)
        return load_task("mmvp", str(tmp_path / name), WITH_DEFAULTS).digest()

    first = digest("a", mmvp())
    assert digest("b", mmvp()) == first
    assert digest("c", [{**row, "image": picture(7)} if row["Index"] == 2 else row for row in mmvp()]) != first
    assert digest("d", [{**row, "Question": "?"} if row["Index"] == 2 else row for row in mmvp()]) != first


def test_mmvp_layout(tmp_path: Path):
    rows = mmvp_rows(write_mmvp(tmp_path / "a", index_name="Index") / "mmvp")
    misspelt = mmvp_rows(write_mmvp(tmp_path / "b") / "mmvp")
    assert [{**row, "image": 0} for row in misspelt] == [{**row, "image": 0} for row in rows]
    assert mmvp_item(rows[1], "B") == {"index": 2, "options": ["left", "it is right"], "target": "(b)", "answer": "B"}
    data = load_task("mmvp", str(tmp_path / "a"), WITH_DEFAULTS)
    assert data.image(3) == (tmp_path / "a" / "mmvp" / "MMVP Images" / "4.jpg").read_bytes()
    for index in (3, 5, 6, 9):
        (tmp_path / "a" / "mmvp" / "MMVP Images" / f"{index}.jpg").unlink()
    with pytest.raises(UserError, match=r"4 images are missing, the first: \S.*3\.jpg, .*5\.jpg, .*6\.jpg$"):
        mmvp_rows(tmp_path / "a" / "mmvp")
    table = tmp_path / "b" / "mmvp" / "Questions.csv"
    table.write_text(table.read_text().replace("Options", "Choices"))
    with pytest.raises(UserError, match="Questions.csv line 2 has no column Options"):
        mmvp_rows(tmp_path / "b" / "mmvp")


def test_pope_layout(tmp_path: Path):
    folder = tmp_path / "pope"
    write_pope(folder, num_images=2)
    rows = pope_rows(folder)
    assert len(rows) == 36 and [row["id"] for row in rows] == [str(k) for k in range(36)]
    assert [row["category"] for row in rows[::12]] == ["random", "popular", "adversarial"]
    assert {row["image_source"] for row in rows} == {"mini_000000", "mini_000001"}
    first = json.loads((folder / "coco_pope_random.json").read_text().splitlines()[0])
    assert (rows[0]["question"], rows[0]["answer"]) == (first["text"], first["label"])
    (folder / "val2014" / "mini_000001.png").unlink()
    with pytest.raises(UserError, match=r"1 images are missing, the first: \S*mini_000001.png"):
        pope_rows(folder)
    (folder / "coco_pope_popular.json").write_text('{"image": "a.png", "text": "Is it?", "label": "yes"}\n{"image"')
    with pytest.raises(UserError, match="coco_pope_popular.json line 2 is no question"):
        pope_rows(folder)
    (folder / "coco_pope_adversarial.json").unlink()
    (folder / "coco_pope_popular.json").write_text("")
    with pytest.raises(UserError, match="coco_pope_adversarial.json is missing"):
        pope_rows(folder)


def test_pictures_of_the_test_are_pictures():
    assert Image.open(io.BytesIO(image_bytes(3))).size == (24, 20)
