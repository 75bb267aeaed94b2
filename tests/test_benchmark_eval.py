"""The benchmark of the evaluation on tiny sizes: what it prints, and that unequal answers show. Nothing is timed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dcr_mllm.evaluation import generation
from dcr_mllm.evaluation.lmms_tasks import lmms_name
from dcr_mllm.evaluation.mllm_tasks import TASKS
from scripts import benchmark_eval
from tests.processes import clean_environment, run_to_end
from tests.tiny_llms import vicuna_tokenizer

SCRIPT = Path(benchmark_eval.__file__)


def measure(**changes: Any) -> dict[str, Any]:
    options = {"images": 2, "batch_size": 3, "repeats": 1, "quick": True, **changes}
    return benchmark_eval.measure_pope(argparse.Namespace(**options))


@pytest.mark.slow
def test_prints_one_object():
    command = [sys.executable, str(SCRIPT), "--quick", "--starts", "1", "--repeats", "1"]
    found = json.loads(run_to_end(command, clean_environment()))
    judged = {"pope_time_ratio", "answers_equal", "startup_seconds_ratio", "task_index_seconds"}
    assert set(found["limits"]) == set(found["within_limits"]) == judged <= set(found)
    assert found["answers_equal"] == 1.0 and found["within_limits"]["answers_equal"]
    assert found["pope_time_ratio"] == found["ours_seconds"] / found["plain_seconds"]
    startup = found["sides"]["startup"]
    assert found["startup_seconds_ratio"] == startup["help_seconds"] / startup["torch_seconds"]
    assert found["task_index_seconds"] == found["sides"]["index"]["seconds"] > 0
    assert found["sides"]["index"]["tasks"] == sorted(map(lmms_name, TASKS))
    assert found["batch_size"] == 32 and found["sides"]["pope"]["questions"] == 8 and found["quick"]


def test_answers_depend_on_what_is_asked_and_are_equal():
    found = measure()
    assert found["answers_equal"] == 1.0 and found["distinct_answers"] >= 6


def test_unequal_answers_show(monkeypatch: pytest.MonkeyPatch):
    """One of three answers of a batch belongs to another question."""
    answer_batch = generation._answer_batch

    def mixed_up(*arguments: Any) -> list[str]:
        first, *rest = answer_batch(*arguments)
        return ["of another question", *rest]

    monkeypatch.setattr(generation, "_answer_batch", mixed_up)
    assert measure(batch_size=4)["answers_equal"] == 0.75


def test_questions_have_the_length_of_popes():
    assert len(set(benchmark_eval.questions())) == benchmark_eval.SIZES["full"]["questions"] == 18
    assert benchmark_eval.question_tokens(vicuna_tokenizer()) == [14, 16]


@pytest.mark.parametrize("option", ["--images", "--batch-size", "--repeats", "--starts"])
def test_sizes_are_checked(option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark_eval, "compare", lambda options: {})
    with pytest.raises(SystemExit):
        benchmark_eval.main([option, "0"])
    assert "must be at least 1" in capsys.readouterr().err
