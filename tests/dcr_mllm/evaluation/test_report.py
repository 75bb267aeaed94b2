"""The report says what was measured, shows the pairs that flipped, and asks nothing of the network."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from dcr_mllm.evaluation.mllm_data import TaskData
from dcr_mllm.evaluation.mllm_tasks import mmvp_item
from dcr_mllm.evaluation.report import write_report
from dcr_mllm.evaluation.scorers import score_mmvp
from dcr_mllm.evaluation.verdicts import add_verdicts, compare_task

PATTERNS = ("Orientation", "Count <of> things", "Texts")


def picture(seed: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{seed}.png"}


def write(out: Path, base_right: set[int], new_right: set[int], patterns: tuple[str, ...] | None = PATTERNS) -> str:
    """A report on 12 pairs of which each model gets some right."""
    rows = [
        {
            "Index": index,
            "Question": f"What about {index}?",
            "Options": "(a) left (b) right",
            "Correct Answer": "(a)" if index % 2 else "(b)",
            **({"Pattern": patterns[(index - 1) // 8]} if patterns else {}),
        }
        for index in range(1, 25)
    ]

    def answers(right: set[int]) -> list[dict[str, Any]]:
        said = []
        for row in rows:
            truth = row["Correct Answer"][1].upper()
            hit = (row["Index"] + 1) // 2 in right
            said.append(
                mmvp_item(row, truth if hit else ("B" if truth == "A" else "A") if row["Index"] % 2 else "<b>hm")
            )
        return said

    items = {"old": {"mini-mmvp": answers(base_right)}, "new": {"mini-mmvp": answers(new_right)}}
    scored = {model: {task: score_mmvp(found, ()) for task, found in tasks.items()} for model, tasks in items.items()}
    comparison = {"mini-mmvp": compare_task([scored["old"]["mini-mmvp"]], [scored["new"]["mini-mmvp"]])}
    add_verdicts(comparison)
    results = {
        "config": {
            "models": {"old": "/a/old", "new": "/a/new"},
            "groups": {"old": ["old"], "new": ["new"]},
            "model_hashes": {"old": "0" * 64, "new": "1" * 64},
            "data": "mini",
            "batch_size": 4,
            "device": "cpu",
            "limit": None,
        },
        "decoding": "greedy",
        "conditions": {
            model: {"precision": "float32", "template": "abc", "image_padding": "pad", "data": {"mini-mmvp": "d" * 64}}
            for model in ("old", "new")
        },
        "notes": {"mmvp": ["24 questions, where the published benchmark has 300: not the whole of it"]},
        "differences": [],
        "passed_through": {"old": {"gqa": {"exact_match": 0.25}}},
        "undecodable": {},
        "scores": {
            model: {
                task: {
                    "measures": entry.values(),
                    "questions": 24,
                    "unparsable": len(entry.unparsable),
                    "lmms_eval": {"mmvp_accuracy": 0.5},
                }
                for task, entry in tasks.items()
            }
            for model, tasks in scored.items()
        },
        "comparisons": {"new": comparison},
        "packages": {"torch": "1.0", "absent": None},
    }
    table = Dataset.from_list([{"image": picture(row["Index"])} for row in rows])
    data = TaskData(
        task="mmvp", name="mini-mmvp", table=table, rows=rows, undecodable={}, notes=[], files=None, score=score_mmvp
    )
    write_report(results, {"mmvp": data}, items, scored, out)
    return (out / "report.html").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("report"), {1, 2}, {2, *range(3, 12)})


def test_verdict_and_numbers_come_first(page: str):
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    words = " ".join(text.split())
    assert words.index("mini-mmvp: better") < words.index("pair accuracy") < words.index("pairs by pattern")
    assert "new 83.3, old 16.7 (pair accuracy): +66.7 points" in words
    assert "9 gained, 1 lost" in words and "exact McNemar on 12 pairs, p 0.021" in words
    assert "controlled experiment" in words and "sha256 1111111111111111" in words and "absent" not in words


def test_flipped_pairs_are_shown_with_both_images(page: str):
    gained, lost = page.split("Gained by new")[1].split("Lost by new")
    assert gained.count("<img ") == 18 and lost.count("<img ") == 2
    assert "What about 5?" in gained and "What about 3?" not in page
    assert "What about 1?" in lost and "What about 2?" in lost
    assert gained.count('class="right">✓ new: ') == 18 and lost.count('class="right">✓ old: ') == 2


def test_answers_of_a_model_are_text_and_nothing_else(page: str):
    assert "&lt;b&gt;hm" in page and "<b>hm" not in page


def test_page_asks_nothing_of_the_network(page: str):
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "<script" not in page and "@import" not in page


def test_plot_has_a_dot_per_pattern_and_the_ink_of_the_page(page: str):
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert "currentColor" in svg and "#010203" not in svg


def test_without_patterns_there_is_no_plot(tmp_path: Path):
    page = write(tmp_path, {1}, {1}, patterns=None)
    assert "<svg" not in page and "pairs by pattern" not in page
    assert "0 pairs" in page and "no difference detected" in page


def test_markdown_says_the_same(tmp_path: Path):
    write(tmp_path, {1, 2}, {2, *range(3, 12)})
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# new against old\n\nDrawn benchmarks")
    assert "**mini-mmvp: better**\n\nnew 83.3, old 16.7 (pair accuracy): +66.7 points" in text
    assert "One training run each: training variance not measured, so verdicts speak of these two models and" in text
    table = text.split("## mini-mmvp\n\n")[1].split("\n\n")[0].splitlines()
    assert table[0] == "| 24 questions | old | new | new − old | 95 % interval |"
    assert set(table[1]) == {"|", "-"} and table[2].startswith("| **pair accuracy** | 16.7 | 83.3 | +66.7 |")
    assert {line.count("|") for line in table} == {6}
    assert "lmms-eval's own score, new: mmvp accuracy 0.5." in text
    assert "## mini-mmvp: Lost by new\n\n1 pair." in text and "; ✓ old `A`, ✗ new" in text
    assert "## Passed through: scored by lmms-eval alone\n\ngqa, old: exact match 0.25" in text
    assert "\n\n\n" not in text and "| data | mini |" in text
