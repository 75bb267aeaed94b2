"""Which of lmms-eval's tasks pass through, and what their files tell before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation import lmms_tasks
from dcr_mllm.evaluation.lmms_tasks import check_other_tasks, lmms_name, other_task_folders
from dcr_mllm.evaluation.mllm_tasks import TASKS
from dcr_mllm.evaluation.pillow import kept_strict


def test_every_benchmark_is_a_task_of_lmms_eval():
    for spec in TASKS.values():
        definition = lmms_tasks._tasks_folder() / spec.yaml
        text = definition.read_text()
        template = definition.parent / "_default_template_yaml"
        text += template.read_text() if template.is_file() else ""
        assert f"dataset_path: {spec.repository}" in text
        assert f"test_split: {spec.split}" in text
        if spec.config:
            assert f'dataset_name: "{spec.config}"' in text or f"dataset_name: {spec.config}\n" in text


def test_other_tasks_are_found_in_their_folders(monkeypatch: pytest.MonkeyPatch):
    for key in lmms_tasks._JUDGE_KEYS:
        monkeypatch.delenv(key, raising=False)
    check_other_tasks(["gqa", "textvqa_val"])
    folders = other_task_folders(["gqa", "textvqa_val", "gqa"])
    assert [Path(folder).name for folder in folders] == ["gqa", "textvqa"]
    with pytest.raises(UserError, match=r"task 'gqaa' is unknown, did you mean 'gqa'"):
        check_other_tasks(["gqa", "gqaa"])


def test_tasks_of_a_judge_model_are_refused_without_its_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for key in lmms_tasks._JUDGE_KEYS:
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(UserError, match=r"task mmvet is judged by a model behind an API \(\S+ has gpt_eval\)"):
        check_other_tasks(["mmvet"])
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    check_other_tasks(["mmvet"])
    assert "mmvet: its answers are sent to a judge model" in capsys.readouterr().out


def test_judge_in_the_code_that_a_task_names(tmp_path: Path):
    (tmp_path / "_template_yaml").write_text("process_results: !function other.score\n")
    (tmp_path / "task.yaml").write_text("include: _template_yaml\ntask: t # comment\n")
    (tmp_path / "other.py").write_text("x = 1\n")
    (tmp_path / "unused.py").write_text("import openai\n")
    assert lmms_tasks._judge_in(tmp_path / "task.yaml") is None
    (tmp_path / "other.py").write_text("key = os.getenv('OPENAI_API_KEY')\n")
    assert lmms_tasks._judge_in(tmp_path / "task.yaml") == "other.py has OPENAI_API"
    assert list(lmms_tasks._names_in(tmp_path / "task.yaml")) == ["t"]


def test_names_do_not_clash_with_those_of_lmms_eval():
    assert lmms_name("mini-mmvp") == "dcr_mini_mmvp"
    assert not {lmms_name(name) for name in TASKS} & set(lmms_tasks._files_by_task())


def test_drawn_benchmarks_are_registered_for_lmms_evals_own_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`lmms-eval --include_path eval/tasks --tasks mini_mmvp,mini_pope`, from the repository's folder."""
    with kept_strict():  # for the tests that come after this one
        from lmms_eval.tasks import TaskManager, get_task_dict

    from dcr_mllm.evaluation.mllm_data import load_task
    from dcr_mllm.mini.data import write_mmvp
    from dcr_mllm.mini.groups import write_pope

    monkeypatch.chdir(tmp_path)
    drawn = Path("runs", "mini-data", "test")
    write_mmvp(drawn / "mmvp", "test", 1)
    write_pope(drawn / "pope", num_images=2)
    for name in ("mmvp", "pope"):
        lmms_tasks.write_drawn_rows(load_task(name, str(drawn), Path("runs")), Path("runs"))
    folder = Path(__file__).parents[3] / "eval" / "tasks"
    tasks = get_task_dict(["mini_mmvp", "mini_pope"], TaskManager(include_path=str(folder), include_defaults=False))
    row = tasks["mini_mmvp"].dataset["test"][0]
    assert row["image"].size == (48, 48) and row["Index"] == 1
    question = tasks["mini_mmvp"].doc_to_text(row)
    assert question.startswith(row["Question"]) and question.endswith("from the given choices directly.")
    assert len(tasks["mini_pope"].dataset["test"]) == 36
    assert tasks["mini_pope"].doc_to_visual(tasks["mini_pope"].dataset["test"][5])[0].mode == "RGB"
