"""What happens to runs on clusters: nodes die, schedulers send signals, losses overflow. Two processes on loopback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dcr_mllm.bad_step import read_step
from tests.processes import clean_environment, free_port, run_to_end, wait_for
from tests.stage1_dcr.test_train import losses

REPOSITORY = Path(__file__).parents[2]
NUM_STEPS = 6


@pytest.fixture(scope="module")
def settings(tiny_clip: Path, tiny_denoiser: Path, tiny_shards: str) -> dict:
    return {
        "run": "test",
        "tower": str(tiny_clip),
        "denoiser": str(tiny_denoiser),
        "data": tiny_shards,
        "projector_width": 16,
        "projector_steps": NUM_STEPS,
        "tower_steps": 0,
        "projector_learning_rate": 1e-3,
        "negatives": "global",
        "batch_size": 3,
        "accumulation": 1,
        "deepspeed": "none",
        "num_workers": 1,
        "shuffle_buffer": 10,
        "save_every": 1,
        "log_every": 1,
        "report_to": "none",
    }


def config(folder: Path, settings: dict, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**settings, "runs_dir": str(folder / "runs"), **changes}))
    return file


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, settings: dict) -> Path:
    """The judge: one process that sees the joint batches of both, in this process."""
    import stage1_dcr.train as train
    from dcr_mllm.config import load_config
    from dcr_mllm.launch import Launch
    from dcr_mllm.runs import open_run
    from stage1_dcr.config import Stage1Config

    parsed = load_config(Stage1Config, config(tmp_path_factory.mktemp("judge"), settings), [])
    real = train.make_loader

    class Joint:
        def __init__(self, **arguments):
            del arguments["position"]  # each loader keeps its own
            ranks = [{**arguments, "rank": rank, "world_size": 2} for rank in range(2)]
            self.loaders = [real(parsed.data, **rank) for rank in ranks]

        def __iter__(self):
            for pair in zip(*self.loaders, strict=True):
                names = [name for name, value in pair[0].items() if isinstance(value, torch.Tensor)]
                yield {name: torch.cat([part[name] for part in pair]) for name in names}

    launch = Launch(device="cpu", num_processes=1, precision="fp32", deepspeed=None)
    run = open_run(parsed.runs_dir, parsed)
    with (
        mock.patch.object(train, "make_loader", lambda data, **arguments: Joint(**arguments)),
        mock.patch.object(train.StreamPosition, "update", lambda self, batch: None),
    ):
        train.run_stage1(parsed, launch, run, parsed.data)
    return run.path


def equals_uninterrupted(run: Path, judge: Path) -> None:
    found, expected = losses(run), losses(judge)
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    assert all(abs(a[2] - b[2]) < 1e-5 for a, b in zip(found, expected, strict=True))
    one, other = (load_file(path / "projector" / "model.safetensors") for path in (run, judge))
    assert all((one[name] - other[name]).abs().max() < 1e-5 for name in other)


class Node:
    """One node's torchrun with one process; the first to come holds the rendezvous."""

    def __init__(self, port: int, arguments: list[str], log: Path):
        options = "--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-id=test".split()
        command = [sys.executable, "-m", "dcr_mllm.torchrun", *options, f"--rdzv-endpoint=127.0.0.1:{port}"]
        environment = {**clean_environment(), "RANK": "7", "MASTER_ADDR": "gone"}  # left over from something else
        with log.open("a") as file:
            command = [*command, "-m", "stage1_dcr", *arguments]
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def kill(self) -> None:
        """As when the machine goes: agent, process and data workers at once."""
        agent = psutil.Process(self.process.pid)
        for process in (*agent.children(recursive=True), agent):
            process.kill()
        self.process.wait()


def start(file: Path, log: Path) -> list[Node]:
    port = free_port()
    return [Node(port, [str(file)], log) for _ in range(2)]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "runs" / "test" / "checkpoints" / "projector" / f"checkpoint-{step}" / "COMPLETE"


@pytest.mark.slow
def test_a_node_dies_and_both_go_on_to_the_same_loss(tmp_path: Path, settings: dict, uninterrupted: Path):
    file, log = config(tmp_path, settings), tmp_path / "log.txt"
    first, second = start(file, log)
    wait_for(checkpoint(tmp_path, 2), first.process, log)
    second.kill()
    assert first.process.wait(timeout=60) != 0, "the other node must not wait for ever"
    assert not (tmp_path / "runs" / "test" / "projector").exists()
    for node in start(file, log):
        assert node.process.wait(timeout=120) == 0, log.read_text()[-4000:]
    equals_uninterrupted(tmp_path / "runs" / "test", uninterrupted)
    assert "goes on from step" in log.read_text()


@pytest.mark.slow
def test_a_dead_process_is_started_again_by_itself(tmp_path: Path, settings: dict, uninterrupted: Path):
    """MAX_RESTARTS: SIGKILL of one worker, nobody does anything, the run ends as if nothing had happened."""
    file, log = config(tmp_path, settings), tmp_path / "log.txt"
    environment = {**clean_environment(2), "MAX_RESTARTS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "stage1_dcr", str(file)], env=environment, stdout=output, stderr=output
        )
    wait_for(checkpoint(tmp_path, 2), process, log)
    psutil.Process(process.pid).children()[1].kill()
    assert process.wait(timeout=200) == 0, log.read_text()[-4000:]
    equals_uninterrupted(tmp_path / "runs" / "test", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["none", "zero2"])
def test_a_signal_to_the_script_costs_nothing(tmp_path: Path, settings: dict, uninterrupted: Path, deepspeed: str):
    """SIGTERM to what a person or Slurm has started: exit 0, and the same command goes on."""
    # Steps are saved by the signal alone.
    file, log = config(tmp_path, settings, save_every=1000, deepspeed=deepspeed), tmp_path / "log.txt"
    command = ["bash", str(REPOSITORY / "scripts" / "stage1.sh"), str(file)]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=clean_environment(2), stdout=output, stderr=output)
    wait_for(tmp_path / "runs" / "test" / "metrics.jsonl", process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 0, log.read_text()[-4000:]
    text = log.read_text()
    assert text.count("stopped by SIGTERM at step") == 1 and "the same command goes on" in text
    assert not (tmp_path / "runs" / "test" / "projector").exists()
    run_to_end(command, clean_environment(2))
    equals_uninterrupted(tmp_path / "runs" / "test", uninterrupted)


@pytest.mark.slow
def test_a_signal_to_one_node_stops_both(tmp_path: Path, settings: dict):
    file, log = config(tmp_path, settings, projector_steps=1000, save_every=1000), tmp_path / "log.txt"
    first, second = start(file, log)
    wait_for(tmp_path / "runs" / "test" / "metrics.jsonl", first.process, log)
    second.process.send_signal(signal.SIGUSR1)
    assert [node.process.wait(timeout=60) for node in (first, second)] == [0, 0], log.read_text()[-4000:]
    assert "stopped by SIGUSR1 at step" in log.read_text()


def test_a_bad_step_of_one_process_is_kept_and_replayed(
    tmp_path: Path, settings: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """In the tower phase, with dropout, in this process."""
    from stage1_dcr import replay, train
    from stage1_dcr.__main__ import main
    from tests.stage1_dcr import poisoned

    monkeypatch.setenv("NPROC", "1")
    monkeypatch.setattr(train, "make_loader", train.make_loader)  # restored at the end
    poisoned.poison(0, 3)
    file = config(tmp_path, settings, projector_steps=1, tower_steps=4, accumulation=2, num_workers=0)
    assert main([str(file)]) == 2
    assert "step 2 of the tower phase" in capsys.readouterr().err
    directory = tmp_path / "runs" / "test" / "bad-step-2"
    record = read_step(directory)
    (good, bad) = record["losses"][0]
    assert record["phase"] == "tower" and good == good and bad != bad
    checkpoints = directory.parent / "checkpoints" / "tower"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-1"]

    assert replay.main([str(directory)]) == 0
    assert "not finite in the inputs: noise" in capsys.readouterr().out
    assert replay.main([str(directory), "--rank", "0"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[0][:2] == ["0", "0"] and rows[0][2] == rows[0][3]  # the good micro-step, to all printed digits
    assert replay.main([str(tmp_path)]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["none", "zero2", "zero3"])
def test_a_bad_step_of_two_processes(
    tmp_path: Path, settings: dict, deepspeed: str, capsys: pytest.CaptureFixture[str]
):
    """Global negatives: replaying one rank needs the other's inputs."""
    from stage1_dcr import replay
    from tests.stage1_dcr import poisoned

    file = config(tmp_path, settings, deepspeed=deepspeed)
    command = [sys.executable, "-m", "dcr_mllm.torchrun", "--standalone", "--nproc-per-node=2", poisoned.__file__]
    done = subprocess.run(
        [*command, "1", "2", str(file)], env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "in step 3 of the projector phase (rank 1)" in done.stderr, done.stderr[-3000:]
    directory = tmp_path / "runs" / "test" / "bad-step-3"
    (good,), (bad,) = read_step(directory)["losses"]
    assert good == good and bad != bad
    saved = [path.name for path in (directory.parent / "checkpoints" / "projector").iterdir()]
    assert sorted(saved) == ["checkpoint-1", "checkpoint-2"]
    before = load_file(directory.parent / "checkpoints" / "projector" / "checkpoint-2" / "model.safetensors")
    kept = load_file(directory / "model.safetensors")
    assert all(torch.equal(kept[name], value.float()) for name, value in before.items())
    for rank, status in ((1, 0), (0, 1)):
        assert replay.main([str(directory), "--rank", str(rank)]) == status
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[2] == row[3] == f"{good:.6g}"
