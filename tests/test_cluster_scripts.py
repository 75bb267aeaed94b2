"""The cluster scripts, with stand-ins for Slurm, SSH and pdsh that run or record what they are given."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.processes import clean_environment, free_port, wait_for

REPOSITORY = Path(__file__).parents[1]
CLUSTER = REPOSITORY / "scripts" / "cluster"
SCRIPTS = [CLUSTER / name for name in ("slurm.sbatch", "torchrun_ssh.sh", "deepspeed_hostfile.sh")]

# In place of Python: tells where a run goes, and "trains" until it is told to stop.
PYTHON = """#!/bin/bash
case "$*" in
    *--print-config) printf 'run: test\\nviews:\\n  hue: 0.1\\nruns_dir: %s\\n' "$RUNS"; exit ;;
esac
printf '%s\\n' "$*" >> "$LOG"
trap 'echo "stopped $NODE" >> "$LOG"; exit 0' TERM
touch "$RUNS/started-$NODE"
for _ in {1..600}; do if [ -e "$RUNS/end" ]; then exit "$(cat "$RUNS/end")"; fi; sleep 0.02; done
exit 9
"""
# Runs the command once for each of two nodes and forwards TERM, as srun does.
SRUN = """#!/bin/bash
echo "srun $1" >> "$LOG"
shift
pids=()
for NODE in 0 1; do NODE=$NODE "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
status=0
for pid in "${pids[@]}"; do
    while kill -0 $pid 2>/dev/null; do wait $pid; status=$?; done
done
exit $status
"""
SCONTROL = """#!/bin/bash
case "$*" in
    "show hostnames nodes[1-2]") printf 'nodes1\\nnodes2\\n' ;;
    *) echo "scontrol $*" >> "$LOG" ;;
esac
"""
# The "machines" are this one; what the script wants to run there is one word, which a shell takes apart.
SSH = """#!/bin/bash
[ "$1" = -o ] && shift 2
mkdir -p "$RUNS/tmp-$1"
TMPDIR="$RUNS/tmp-$1" NODE="$1" exec bash -c "$2"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With the stand-ins first on the path, and a place for what they record."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL, "ssh": SSH}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "test").mkdir()
    return {
        **clean_environment(),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": str(tools / "python"),
        "LOG": str(tmp_path / "log"),
        "RUNS": str(tmp_path),
        "NPROC": "4",
    }


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "nodes[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "16",
    "CONFIG": "mini",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", str(script)], check=True)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_job_that_is_told_to_stop_goes_back_into_the_queue(
    tmp_path: Path, environment: dict[str, str], number: signal.Signals
):
    command = ["bash", str(CLUSTER / "slurm.sbatch"), "tau=0.2"]
    process = subprocess.Popen(command, env={**environment, **SLURM}, cwd=REPOSITORY)
    for node in "01":
        wait_for(tmp_path / f"started-{node}", process, tmp_path / "log")
    process.send_signal(number)
    assert process.wait(timeout=20) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    torchrun = (
        "-m dcr_mllm.torchrun --nnodes=2 --nproc-per-node=4 --max-restarts=3 --rdzv-backend=c10d --rdzv-id=77 "
        "--rdzv-endpoint=nodes1:20077 -m stage1_dcr mini tau=0.2"
    )
    assert lines[:3] == ["srun --kill-on-bad-exit=1", torchrun, torchrun]
    assert sorted(lines[3:5]) == ["stopped 0", "stopped 1"]
    assert lines[5:] == ["scontrol requeue 77"]


@pytest.mark.parametrize(("status", "finished"), [(0, True), (3, False)])
def test_slurm_job_that_has_ended_stays_ended(tmp_path: Path, environment: dict[str, str], status: int, finished: bool):
    (tmp_path / "end").write_text(str(status))
    if finished:
        (tmp_path / "test" / "finished.json").touch()
    command = ["bash", str(CLUSTER / "slurm.sbatch")]
    done = subprocess.run(command, env={**environment, **SLURM}, cwd=REPOSITORY, check=False)
    assert done.returncode == status
    assert "requeue" not in (tmp_path / "log").read_text()


def test_ssh_starts_and_stops_every_machine(tmp_path: Path, environment: dict[str, str]):
    settings = {"HOSTS": "a b", "ENVIRONMENT": "ONE=1 TWO=2", "REPO": str(tmp_path)}
    command = ["bash", str(CLUSTER / "torchrun_ssh.sh"), "mini", "data=a b.tar"]
    process = subprocess.Popen(command, env={**environment, **settings})
    for node in "ab":
        wait_for(tmp_path / f"started-{node}", process, tmp_path / "log")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == lines[1] and "--nnodes=2 --nproc-per-node=4" in lines[0]
    assert "--rdzv-endpoint=a:29500 -m stage1_dcr mini data=a b.tar" in lines[0]
    assert sorted(lines[2:]) == ["stopped a", "stopped b"]
    assert not list(tmp_path.glob("tmp-*/*.pid"))


def test_ssh_reports_a_machine_that_failed(tmp_path: Path, environment: dict[str, str]):
    (tmp_path / "end").write_text("3")
    settings = {"HOSTS": "a b", "REPO": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(CLUSTER / "torchrun_ssh.sh"), "mini"], env={**environment, **settings}, check=False
    )
    assert done.returncode == 3


@pytest.mark.slow
def test_ssh_trains_on_two_nodes(
    tmp_path: Path, environment: dict[str, str], tiny_clip: Path, tiny_denoiser: Path, tiny_shards: str
):
    """Nothing but SSH is a stand-in: two torchruns with a process each find each other and train."""
    config = {
        "tower": str(tiny_clip),
        "denoiser": str(tiny_denoiser),
        "data": tiny_shards,
        "run": "two",
        "runs_dir": str(tmp_path),
        "projector_width": 16,
        "projector_steps": 2,
        "tower_steps": 0,
        "batch_size": 2,
        "num_workers": 0,
        "negatives": "global",
        "report_to": "none",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    settings = {
        "HOSTS": "localhost 127.0.0.1",
        "NPROC": "1",
        "PORT": str(free_port()),
        "PYTHON": sys.executable,
        "ENVIRONMENT": "DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1",
    }
    command = ["bash", str(CLUSTER / "torchrun_ssh.sh"), str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env={**environment, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu, fp32, zero2" in done.stdout
    assert (tmp_path / "two" / "projector" / "model.safetensors").is_file()


@pytest.mark.slow
def test_deepspeed_gets_the_hosts_of_the_file(tmp_path: Path, environment: dict[str, str]):
    tools = tmp_path / "tools"
    (tools / "pdsh").write_text('#!/bin/bash\nprintf "%s\\n" "$*" >> "$LOG"\n')
    (tools / "pdsh").chmod(0o755)
    (tools / "ssh").write_text("#!/bin/bash\necho 10.0.0.1\n")
    settings = {"HOSTFILE": "hostfile.example", "DEEPSPEED": str(Path(sys.executable).parent / "deepspeed")}
    command = ["bash", str(CLUSTER / "deepspeed_hostfile.sh"), "mini", "tau=0.2"]
    environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        command, env={**environment, **settings}, cwd=CLUSTER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    recorded = (tmp_path / "log").read_text()
    assert "-w node1,node2" in recorded and "--master_addr=10.0.0.1 --master_port=29500" in recorded
    assert "--module" in recorded and "--no_local_rank" in recorded and "stage1_dcr mini tau=0.2" in recorded
