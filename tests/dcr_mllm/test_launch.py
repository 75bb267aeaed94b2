"""How processes are started, and what of the environment counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcr_mllm import launch
from dcr_mllm.errors import UserError
from tests.processes import clean_environment

STALE = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "gone", "MASTER_PORT": "1", "PET_NNODES": "4"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*launch._RENDEZVOUS, *STALE, "NPROC", "MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_variables_of_another_launch_are_ignored(environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    for name, value in STALE.items():
        environment.setenv(name, value)
    assert not launch.is_child()
    assert launch.decide("auto", "auto").num_processes == 1
    assert not any(name in os.environ for name in STALE)


def test_variables_of_a_launcher_count(environment: pytest.MonkeyPatch):
    for name, value in {**STALE, "LOCAL_RANK": "1"}.items():
        environment.setenv(name, value)
    decided = launch.decide("auto", "auto")
    assert decided.num_processes == 8 and os.environ["MASTER_ADDR"] == "gone"


def test_the_command_that_starts_several(environment: pytest.MonkeyPatch):
    started: list[list[str]] = []
    environment.setattr(os, "execv", lambda path, command: started.append(command))
    environment.setenv("MAX_RESTARTS", "2")
    launch.start_processes(1, "stage1_dcr", [])
    launch.start_processes(2, "stage1_dcr", ["mini", "seed=1"])
    expected = "-m dcr_mllm.torchrun --standalone --nproc-per-node=2 --max-restarts=2 -m stage1_dcr mini seed=1"
    assert started == [[sys.executable, *expected.split()]]
    environment.setenv("MAX_RESTARTS", "often")
    with pytest.raises(UserError, match="MAX_RESTARTS must be a number of restarts, at least 0, found 'often'"):
        launch.start_processes(2, "stage1_dcr", [])


WORKER = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(number, frame):
    (folder / f"signal-{number}").touch()
    time.sleep(0.5)  # saves
    sys.exit(int(sys.argv[2]))
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, stop)
(folder / "started").touch()
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 3)])
def test_torchrun_passes_signals_on_and_takes_the_status_of_its_workers(tmp_path: Path, number: int, status: int):
    """With plain torchrun the status would be 1 in both cases, and SIGUSR1 would kill it."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "dcr_mllm.torchrun", "--standalone", "--nproc-per-node=1", str(script)]
    process = subprocess.Popen([*command, str(tmp_path), str(status)], env=clean_environment(), stderr=subprocess.PIPE)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert (process.returncode == 0) == (status == 0)
    assert (tmp_path / f"signal-{number}").exists()
