"""Tiny copies of the MLLM benchmarks' hub repositories: columns, configs and splits as they are there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."


def image_bytes(seed: int) -> bytes:
    """A noise picture as a PNG file."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def picture(seed: int) -> dict[str, Any]:
    """A cell of an image column."""
    return {"bytes": image_bytes(seed), "path": f"{seed}.png"}


def write_hub_copy(directory: Path, rows: list[dict[str, Any]], *, image: str, split: str, config: str | None) -> None:
    """A repository of the hub with one Parquet file, its README naming the config."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    (directory / "data").mkdir(parents=True)
    table = Dataset.from_list(rows).cast_column(image, ImageFeature())
    table.to_parquet(directory / "data" / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"data/{split}-*"}]
    header = yaml.safe_dump({"configs": [{"config_name": config or "default", "data_files": files}]})
    (directory / "README.md").write_text(f"---\n{header}---\n")


def write_copy_of(task: str, directory: Path, rows: list[dict[str, Any]] | None = None) -> None:
    """`directory/<task>/` as the hub has it."""
    from dcr_mllm.evaluation.mllm_tasks import TASKS

    spec = TASKS[task]
    rows = ROWS[task]() if rows is None else rows
    write_hub_copy(directory / task, rows, image=spec.image, split=spec.split, config=spec.config)


def mmvp(count: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "Index": index,
            "Question": f"Is {index} red?",
            "Options": "(a) left (b) it is right",
            "Correct Answer": "(a)" if index % 2 else "(b)",
            "image": picture(index),
        }
        for index in range(1, count + 1)
    ]


def pope() -> list[dict[str, Any]]:
    return [
        {
            "id": str(3 * k + number),
            "question_id": str(k + 1),
            "question": f"Is there a dog{k} in the image?",
            "answer": "yes" if k % 2 == 0 else "no",
            "image_source": f"COCO_val2014_{k // 2:012d}",
            "image": picture(k // 2),
            "category": category,
        }
        for number, category in enumerate(("adversarial", "popular", "random"))
        for k in range(4)
    ]


def cv_bench() -> list[dict[str, Any]]:
    return [
        {
            "idx": k,
            "type": "2D" if source != "Omni3D" else "3D",
            "task": "Count",
            "image": picture(k // 2),
            "question": f"How many {k}?",
            "choices": ["0", "1", "2"][: 2 + k % 2],
            "answer": "(B)",
            "prompt": f"How many {k}?\nSelect from the following choices.\n(A) 0\n(B) 1",
            "source": source,
        }
        for k, source in enumerate(("ADE20K", "ADE20K", "COCO", "Omni3D"))
    ]


def naturalbench() -> list[dict[str, Any]]:
    rows = []
    for index in range(8):
        yes_no = index < 4
        first = index % 4 in (0, 3)
        rows.append(
            {
                "Index": index,
                "Question": f"Is it {index % 4 // 2}?" if yes_no else f"What is {index % 4 // 2}? Option: A: x; B: y;",
                "Image": picture(10 + 2 * (index // 4) + index % 2),
                "Question_Type": "yes_no" if yes_no else "multiple_choice",
                "Answer": ("Yes" if first else "No") if yes_no else ("A" if first else "B"),
            }
        )
    return rows


def mme() -> list[dict[str, Any]]:
    return [
        {
            "question_id": f"{category}/{k // 2}.png",
            "image": picture(20 + k // 2),
            "question": f"Is it {k}? Please answer yes or no.",
            "answer": "Yes" if k % 2 == 0 else "No",
            "category": category,
        }
        for category in ("existence", "code_reasoning")
        for k in range(4)
    ]


def scienceqa() -> list[dict[str, Any]]:
    return [
        {
            "image": picture(30 + k),
            "question": f"Which is {k}?",
            "choices": ["one", "two", "three"],
            "answer": k % 3,
            "hint": "Look." if k == 0 else "",
            "task": "closed choice",
        }
        for k in range(3)
    ]


def hallusion_bench() -> list[dict[str, Any]]:
    return [
        {
            "category": "VD",
            "subcategory": "illusion",
            "visual_input": "1",
            "set_id": "0",
            "figure_id": str(k // 2),
            "sample_note": "note",
            "question_id": str(k % 2),
            "question": f"Is circle {k} larger?",
            "gt_answer_details": "Yes." if k % 2 else "No.",
            "gt_answer": str(k % 2),
            "filename": f"./{k // 2}.png",
            "image": picture(40 + k // 2),
        }
        for k in range(4)
    ]


ROWS = {
    "mmvp": mmvp,
    "pope": pope,
    "cv_bench": cv_bench,
    "naturalbench": naturalbench,
    "mme": mme,
    "scienceqa_img": scienceqa,
    "hallusion_bench_image": hallusion_bench,
}


def prompt_of(task: str, row: dict[str, Any]) -> str:
    """What a model is asked, written out from the benchmarks' definitions (docs of lmms-eval), after the image."""
    if task == "mmvp":
        return f"{row['Question']}\nA. left\nB. it is right\n{LETTER}"
    if task == "pope":
        return f"{row['question']}\n{WORD}"
    if task == "cv_bench":
        letters = ", ".join("ABC"[: len(row["choices"])])
        said = f"Note: You only need to respond with {letters} without providing any additional information.\n"
        return f"{said}\n{row['prompt']}"
    if task == "naturalbench":
        suffix = "Please answer Yes or No."
        if row["Question_Type"] != "yes_no":
            suffix = "Please output the letter corresponding to the correct option."
        return f"{row['Question']} {suffix}"
    if task == "mme":
        return f"{row['question'].removesuffix(' Please answer yes or no.')}\n{WORD}"
    if task == "scienceqa_img":
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        return f"{context}{row['question']}\nA. one\nB. two\nC. three\n{LETTER}"
    return row["question"]
