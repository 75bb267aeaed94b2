"""`dcr-mllm`: registered commands, loaded only when called; mistakes are one line and exit status 2."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest

from dcr_mllm import cli
from dcr_mllm.errors import UserError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("stand_in_command")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    points = [
        importlib.metadata.EntryPoint("good", f"{module.__name__}:main", cli.GROUP),
        importlib.metadata.EntryPoint("unimportable", "no_such_module:main", cli.GROUP),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == cli.GROUP else [])
    return module


def test_passes_arguments_and_exit_status_on(command: types.ModuleType) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 3

    command.main = main  # type: ignore[attr-defined]
    assert cli.main(["good", "--help", "a=b"]) == 3
    assert seen == [["--help", "a=b"]]


def test_mistakes_are_one_line(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        raise UserError("the field x is 3, expected 4")

    command.main = main  # type: ignore[attr-defined]
    assert cli.main(["good"]) == 2
    assert capsys.readouterr().err == "error: the field x is 3, expected 4\n"
    assert cli.main(["goood"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'goood', did you mean 'good'?\n"


def test_help_lists_commands_without_loading_them(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--help"]) == 0
    assert "good, unimportable" in capsys.readouterr().out


def test_the_stages_are_registered() -> None:
    assert {"stage1", "evaluate-tower"} <= set(cli.commands())
