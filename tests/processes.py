"""Commands in processes of their own, as a user starts them: run to the end, or killed at a given point."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def clean_environment(num_processes: int = 1) -> dict[str, str]:
    """One thread, no GPU, no network, and nothing of a launcher that runs the tests."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NPROC": str(num_processes),
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    return environment


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(marker: Path, process: subprocess.Popen, log: Path, timeout: float = 280) -> None:
    """Until a file exists; the process must live that long."""
    deadline = time.monotonic() + timeout
    while not marker.exists():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, f"no {marker}"
        time.sleep(0.002)


def run_to_end(argv: list[str], environment: dict[str, str], timeout: float = 800) -> str:
    """Run, expect success, and give what was printed. Children go with their parent when time is up."""
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, out[-2000:] + err[-6000:]
    return out


def kill_when_there(argv: list[str], environment: dict[str, str], marker: Path, log: Path) -> None:
    """Start, and kill -9 with all children as soon as a file exists."""
    with log.open("w") as file:
        process = subprocess.Popen(argv, env=environment, stdout=file, stderr=file, start_new_session=True)
        wait_for(marker, process, log)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
