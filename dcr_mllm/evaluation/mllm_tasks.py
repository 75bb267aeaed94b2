"""The benchmarks of MLLMs: where their data are published, how they are asked, what a scorer needs of a row."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from dcr_mllm.evaluation.scorers import Item

Row = dict[str, Any]

LETTERS = "ABCDEFGHIJ"
YES_NO = ("Yes", "No")


class MllmTask(NamedTuple):
    """One benchmark.

    Attributes:
        yaml: Its definition among lmms-eval's tasks: prompt, generation settings, columns.
        repository: Its data set on the hub.
        config: Of that data set.
        split: Of that data set.
        size: Rows of that split.
        columns: What has to be in it, the column of images aside.
        item: What the scorer needs, from a row without its image and the answer.
        options: The answers that likelihood scoring chooses from.
        wrong: An answer that is wrong by the benchmark's rule, for rows whose image cannot be decoded.
        unit_size: Rows that belong together, so that a limit keeps whole units.
        unit_name: What they are.
        image: The column of images.
        own_score: Whether lmms-eval's own score can be had: without a judge model, on any number of rows.
    """

    yaml: str
    repository: str
    config: str | None
    split: str
    size: int
    columns: tuple[str, ...]
    item: Callable[[Row, str], Item]
    options: Callable[[Row], tuple[str, ...]]
    wrong: Callable[[Row], str] = lambda row: ""
    unit_size: int = 1
    unit_name: str = "question"
    image: str = "image"
    own_score: bool = True


def _mmvp_options(row: Row) -> list[str]:
    return re.findall(r"\([a-z]\)\s*(.*?)(?=\s*\([a-z]\)|$)", row["Options"])


def mmvp_item(row: Row, answer: str) -> Item:
    """What `score_mmvp` needs."""
    target = row["Correct Answer"]
    return {"index": int(row["Index"]), "options": _mmvp_options(row), "target": target, "answer": answer}


def pope_item(row: Row, answer: str) -> Item:
    """What `score_pope` needs."""
    return {"category": row["category"], "image": row["image_source"], "target": row["answer"], "answer": answer}


def cv_bench_item(row: Row, answer: str) -> Item:
    """What `score_cv_bench` needs; several questions may show one picture, whatever its file is called."""
    return {
        "source": row["source"],
        "options": list(row["choices"]),
        "target": row["answer"],
        "image": row["image_digest"],
        "answer": answer,
    }


def naturalbench_item(row: Row, answer: str) -> Item:
    """What `score_naturalbench` needs; four consecutive indices are a group: q0 i0, q0 i1, q1 i0, q1 i1."""
    group, cell = divmod(int(row["Index"]), 4)
    question, image = divmod(cell, 2)
    target = str(row["Answer"]).strip()
    return {
        "group": group,
        "question": question,
        "image": image,
        "type": row["Question_Type"],
        "target": target.capitalize() if row["Question_Type"] == "yes_no" else target.upper(),
        "answer": answer,
    }


def mme_item(row: Row, answer: str) -> Item:
    """What `score_mme` needs; both questions on an image have its name as their id."""
    return {"category": row["category"], "image": row["question_id"], "target": row["answer"], "answer": answer}


def scienceqa_item(row: Row, answer: str) -> Item:
    """What `score_scienceqa` needs."""
    return {"options": list(row["choices"]), "target": LETTERS[int(row["answer"])], "answer": answer}


def hallusion_bench_item(row: Row, answer: str) -> Item:
    """What `score_hallusion_bench` needs."""
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    return {**{name: row[name] for name in names}, "target": row["gt_answer"], "answer": answer}


def _letters(count: int) -> tuple[str, ...]:
    return tuple(LETTERS[:count])


TASKS = {
    "mmvp": MllmTask(
        yaml="mmvp/mmvp.yaml",
        repository="lmms-lab-eval/MMVP",
        config=None,
        split="train",
        size=300,
        columns=("Index", "Question", "Options", "Correct Answer"),
        item=mmvp_item,
        options=lambda row: _letters(len(_mmvp_options(row))),
        unit_size=2,
        unit_name="pair",
    ),
    "pope": MllmTask(
        yaml="pope/pope.yaml",
        repository="lmms-lab-encoder/POPE",
        config=None,
        split="test",
        size=9_000,
        columns=("question", "answer", "image_source", "category"),
        item=pope_item,
        options=lambda row: YES_NO,
        wrong=lambda row: "No" if row["answer"].strip().lower() == "yes" else "Yes",  # by its rule no answer is a yes
    ),
    "cv_bench": MllmTask(
        yaml="cv_bench/cv_bench.yaml",
        repository="nyu-visionx/CV-Bench",
        config="default",
        split="test",
        size=2_638,
        columns=("idx", "type", "task", "choices", "answer", "prompt", "source"),
        item=cv_bench_item,
        options=lambda row: _letters(len(row["choices"])),
    ),
    "naturalbench": MllmTask(
        yaml="naturalbench/naturalbench.yaml",
        repository="BaiqiL/NaturalBench-lmms-eval",
        config=None,
        split="test",
        size=7_600,
        columns=("Index", "Question", "Question_Type", "Answer"),
        item=naturalbench_item,
        options=lambda row: YES_NO if row["Question_Type"] == "yes_no" else ("A", "B"),
        unit_size=4,
        unit_name="group",
        image="Image",
        own_score=False,  # it stops unless all 7,600 rows are there
    ),
    "mme": MllmTask(
        yaml="mme/mme.yaml",
        repository="lmms-lab-encoder/MME",
        config=None,
        split="test",
        size=2_374,
        columns=("question_id", "question", "answer", "category"),
        item=mme_item,
        options=lambda row: YES_NO,
        unit_size=2,
        unit_name="image",
    ),
    "scienceqa_img": MllmTask(
        yaml="scienceqa/scienceqa_img.yaml",
        repository="lmms-lab-encoder/ScienceQA",
        config="ScienceQA-IMG",
        split="test",
        size=2_017,
        columns=("question", "choices", "answer", "hint"),
        item=scienceqa_item,
        options=lambda row: _letters(len(row["choices"])),
    ),
    "hallusion_bench_image": MllmTask(
        yaml="hallusion_bench/hallusion_bench_image.yaml",
        repository="lmms-lab-encoder/HallusionBench",
        config=None,
        split="image",
        size=951,
        columns=("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer"),
        item=hallusion_bench_item,
        options=lambda row: YES_NO,
        wrong=lambda row: "No" if str(row["gt_answer"]) == "1" else "Yes",
        own_score=False,  # its judge is GPT-4
    ),
}
