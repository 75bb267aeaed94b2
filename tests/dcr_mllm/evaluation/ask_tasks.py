"""Asks a LLaVA some tasks through lmms-eval, alone or as one of several processes: ANSWERS LLAVA DEFINITIONS TASK...

The first process writes the samples beside the answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dcr_mllm.evaluation.lmms_model import DcrLlava
from dcr_mllm.evaluation.pillow import kept_strict
from dcr_mllm.log import rank

with kept_strict():
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager


def ask(answers: Path, llava: str, definitions: str, *tasks: str) -> None:
    """Samples of each task in the order of its documents; every third question has options."""
    found = simple_evaluate(
        model=DcrLlava(
            llava, batch_size=2, answers=answers, options=lambda _, doc_id: None if doc_id % 3 else ("Yes", "No")
        ),
        tasks=list(tasks),
        task_manager=TaskManager("WARNING", include_path=definitions, include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        batch_size=2,
    )
    assert (found is None) == (rank() > 0)
    if found is not None:
        samples = {task: sorted(found["samples"][task], key=lambda sample: sample["doc_id"]) for task in tasks}
        answers.with_suffix(".samples").write_text(json.dumps(samples, default=str))


if __name__ == "__main__":
    ask(Path(sys.argv[1]), *sys.argv[2:])
