"""Run directories: what was asked, what came out, and nothing half-written in between.

A run lives in `<runs_dir>/<name>/`. `config.yaml` is written first and `finished.json` last, so the folder itself says
whether a run is new, can be resumed, or is finished. Only rank 0 may write here; the callers see to that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from dcr_mllm.config import differences, read_yaml, to_dict, to_yaml, with_defaults
from dcr_mllm.errors import UserError

CONFIG_FILE = "config.yaml"
FINISHED_FILE = "finished.json"
PROVENANCE_FILE = "provenance.json"

RECORDED_PACKAGES = (
    "dcr-mllm",
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "open_clip_torch",
    "diffusers",
    "deepspeed",
    "accelerate",
    "datasets",
    "lmms_eval",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
)


@dataclasses.dataclass(kw_only=True, frozen=True)
class Run:
    """A run directory and what state it was found in.

    Attributes:
        name: `run` of the config, the name of the folder.
        path: the folder.
        state: `new` (nothing was there), `resumable` (started with an equal config, not finished) or `finished`.
    """

    name: str
    path: Path
    state: Literal["new", "resumable", "finished"]

    def results(self) -> dict[str, Any]:
        """What `finish` was given.

        Raises:
            UserError: the run is not finished or its marker is damaged.
        """
        marker = self.path / FINISHED_FILE
        try:
            return json.loads(marker.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"run {self.name!r} is not finished: {marker} does not exist") from None
        except ValueError:
            raise UserError(f"{marker} is damaged; delete it and run again to finish run {self.name!r}") from None

    def finish(self, results: Mapping[str, Any]) -> None:
        """Marks the run as finished. Write everything else before: after this the folder is never touched again."""
        write_json_atomic(self.path / FINISHED_FILE, results)


def open_run(
    root: str | Path,
    config: Any,
    *,
    create: bool = True,
    ignore: Iterable[str] = ("runs_dir", "report_to", "num_workers", "hardware.prefetch", "hardware.cuda_graphs"),
    option: str = "run=",
) -> Run:
    """Opens `root/<config.run>` for exactly this config.

    Args:
        root: folder of all runs.
        config: config dataclass with a field `run`.
        create: make the folder and write the resolved config; False only looks (dry runs, other ranks).
        ignore: keys that may differ between start and resumption, since they change no result.
        option: what a user puts before another name.

    Returns:
        The run with its state; a finished run comes back only if its config equals this one.

    Raises:
        UserError: another config was used there (what differs is listed), or the folder is not a run.
    """
    root, name = Path(root), config.run
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"run is {name!r}, expected a folder name of letters, digits and . _ + -")
    path = root / name
    stored_file = path / CONFIG_FILE
    if stored_file.is_file():
        stored = with_defaults(type(config), read_yaml(stored_file))
        changed = [line for line in differences(stored, config) if line.split(":")[0] not in set(ignore)]
        finished = (path / FINISHED_FILE).is_file()
        if changed:
            raise UserError(
                f"{path} was {'finished' if finished else 'started'} with another config ({'; '.join(changed)}); "
                f"choose another name, e.g. {option}{_free_name(root, name)}, or repeat the command with the old values"
            )
        return Run(name=name, path=path, state="finished" if finished else "resumable")
    if path.exists() and (not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())):
        raise UserError(
            f"{path} exists but holds no {CONFIG_FILE}, so it is not a run; choose another name, "
            f"e.g. {option}{_free_name(root, name)}"
        )
    if create:
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_text_atomic(stored_file, to_yaml(config))
        except OSError as error:
            raise UserError(f"cannot write run directory {path}: {error.strerror or error}") from None
    return Run(name=name, path=path, state="new")


@contextlib.contextmanager
def atomic_directory(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives a temporary sibling folder that takes the wanted name only when the block ends without an exception.

    Args:
        path: the folder to be. Leftovers of a killed earlier attempt are removed.
        replace: allow an existing folder to be replaced; for an unfinished run that writes its export again.

    Yields:
        The temporary folder; fill it, everything in it is flushed to disk before the renaming.

    Raises:
        UserError: the folder exists with something in it, and `replace` is not set.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, expected a free name for a folder")
    if path.exists() and any(path.iterdir()) and not replace:
        raise UserError(f"{path} exists already and is not overwritten; move it away or choose another name")
    partial, outgoing = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.outgoing")
    for leftover in (partial, outgoing):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            _flush(file)
        _flush(partial)
        if path.exists():
            os.replace(path, outgoing)
        os.replace(partial, path)
        _flush(path.parent)
        shutil.rmtree(outgoing, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new one, never a part."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _flush(path.parent)


def write_json_atomic(path: str | Path, data: Any) -> None:
    """Writes JSON atomically; paths become text, NumPy and torch scalars become numbers."""
    write_text_atomic(path, json.dumps(data, indent=2, ensure_ascii=False, default=_jsonable) + "\n")


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's content as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_directory(path: str | Path) -> str:
    """One stable SHA-256 over the names and contents of all `*.safetensors` and `*.json` below a folder.

    `provenance.json` and hidden files are left out: they say when and where something was made, not what it is.

    Raises:
        UserError: there is no such file below the folder.
    """
    path = Path(path)
    digest = hashlib.sha256()
    names = sorted(
        name.as_posix()
        for name in (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        if name.suffix in (".safetensors", ".json")
        and name.name != PROVENANCE_FILE
        and not any(part.startswith(".") for part in name.parts)
    )
    if not names:
        raise UserError(f"{path} holds no .safetensors or .json file to identify it by")
    for name in names:
        digest.update(f"{name}\0{sha256_file(path / name)}\n".encode())
    return digest.hexdigest()


def provenance(config: Any, **inputs: Any) -> dict[str, Any]:
    """Everything needed to say how a result was made.

    Args:
        config: the resolved config dataclass.
        inputs: further facts by name, e.g. `steps=500`. A `Path` to a folder or file is recorded with its hash.

    Returns:
        A mapping ready for `write_json_atomic`.
    """
    resolved = to_dict(config)
    recorded = {name: _identify(value) if isinstance(value, Path) else value for name, value in inputs.items()}
    return {
        "config": resolved,
        "seeds": {key: value for key, value in resolved.items() if key == "seed" or key.endswith("_seed")},
        **recorded,
        "packages": package_versions(),
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def package_versions(packages: Iterable[str] = RECORDED_PACKAGES) -> dict[str, str | None]:
    """Installed versions without importing anything; None for what is not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def git_state() -> dict[str, Any] | None:
    """Revision of the checkout this code runs from and whether it has uncommitted changes; None if installed."""
    repository = Path(__file__).resolve().parents[1]
    if not (repository / ".git").exists():
        return None

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(repository), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"revision": revision, "dirty": None if status is None else bool(status)}


def _free_name(root: Path, name: str) -> str:
    stem = re.sub(r"-\d+$", "", name)
    number = 2
    while (root / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def _identify(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": hash_directory(path) if path.is_dir() else sha256_file(path)}


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _flush(path: Path) -> None:
    """Hands a file or folder to the disk; file systems that cannot flush folders are let off."""
    if path.is_symlink():
        return
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
