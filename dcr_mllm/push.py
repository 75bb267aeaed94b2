"""`dcr-mllm push DIR REPO_ID`: a finished tower, adapter, projector, LLaVA or export on the Hugging Face hub.

What is uploaded is said before: weights as they are, and every text file without paths of this machine. Half-written
directories are refused; optimizer state, checkpoints' side files and pickles never leave.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr_mllm.cli import run_main
from dcr_mllm.errors import UserError
from dcr_mllm.headers import read_json, read_safetensors_header
from dcr_mllm.inspection import inspect, kind_of
from dcr_mllm.machine_paths import without_paths
from dcr_mllm.model_card import is_hub_id, published_card
from dcr_mllm.runs import CONFIG_FILE, FINISHED_FILE, PROVENANCE_FILE

HUB_NAME = "OWNER/NAME"
"""Stands in exports where the id of the repository belongs that they will lie in."""
_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")
# Suffixes fit, but these belong to a training run.
_TRAINING_FILES = ("trainer_state.json", "stream_rank*.json", "optimizer*", "scheduler*", "rng_state*", "*.partial")
# Vocabularies: large, and what looks like a path in them is a token.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt", "special_tokens_map.json")
_MARKED_KINDS = ("adapter", "projector")


@dataclass(kw_only=True, frozen=True)
class Upload:
    """One file that goes to the hub.

    Attributes:
        name: Path in the repository.
        size: Bytes.
        content: New text, or the file to send as it is.
        note: What was changed, for the list.
    """

    name: str
    size: int
    content: bytes | Path
    note: str = ""


def check_finished(directory: Path, kind: str) -> dict[str, Any]:
    """The provenance of a directory that is whole.

    An adapter or a projector has none of its own: they are whole once their run's `finished.json` is there.

    Raises:
        UserError: It is half-written, of an unfinished run, or not of this project.
    """
    if directory.resolve().name.startswith("."):
        raise UserError(f"{directory} is a folder that a killed command left behind; run that command again")
    if (directory / PROVENANCE_FILE).is_file():
        return read_json(directory / PROVENANCE_FILE)
    if kind in _MARKED_KINDS:
        run = next((folder for folder in directory.resolve().parents[:2] if (folder / CONFIG_FILE).is_file()), None)
        if run is not None and (run / FINISHED_FILE).is_file():
            return {}
        if run is not None:
            raise UserError(f"{run} is not finished ({FINISHED_FILE} is missing); start it again to finish it")
    raise UserError(f"{directory / PROVENANCE_FILE} is missing: half-written, or not made by this project")


def uploads(
    directory: Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license_id: str | None = None,
    evaluation: Path | None = None,
) -> tuple[list[Upload], list[str]]:
    """What would be uploaded, and the names of the files that stay.

    Args:
        directory: A finished directory.
        repo_id: Where it goes.
        base_model: Hub id of the model it was made from; for an adapter also what PEFT will load.
        license_id: See `published_card`.
        evaluation: See `published_card`; None takes a run's own `evaluation/` for its tower.

    Raises:
        UserError: It is not finished, damaged, or contradicts itself.
    """
    kind = _kind(directory)
    record = check_finished(directory, kind)
    if kind != "export" and (problems := inspect(directory)["problems"]):
        raise UserError(f"{directory}: {problems[0]}; mend it before others load it")
    if evaluation is None and kind == "tower":
        own = directory.resolve().parent / "evaluation" / "tower_evaluation.json"
        evaluation = own if own.is_file() else None
    card = published_card(directory, kind, record, base_model=base_model, license_id=license_id, evaluation=evaluation)
    sent, left = [], []
    for path in sorted(file for file in directory.rglob("*") if file.is_file()):
        name = path.relative_to(directory).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        training = any(path.match(pattern) for pattern in _TRAINING_FILES)
        if hidden or training or path.suffix not in _SUFFIXES:
            left.append(name)
        elif name != "README.md":
            sent.append(_upload(path, name, repo_id, base_model if kind == "adapter" else None))
    sent.append(_text_upload("README.md", card, repo_id, "card"))
    return sorted(sent, key=lambda upload: upload.name), left


def push(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    update: bool = False,
    base_model: str | None = None,
    license_id: str | None = None,
    evaluation: str | Path | None = None,
) -> str | None:
    """Upload a directory as one commit, after printing what it consists of.

    Args:
        directory: A finished tower, adapter, projector, LLaVA or export.
        repo_id: `owner/name`.
        private: Of a new repository.
        dry_run: Print the list and stop.
        update: Allow a repository that exists; its history is kept.
        base_model: See `uploads`.
        license_id: See `published_card`.
        evaluation: See `published_card`.

    Returns:
        Address of the repository; None for a dry run.

    Raises:
        UserError: See `uploads`; or the hub refused.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repository {repo_id!r}: {str(error).splitlines()[0]}") from None
    if "/" not in repo_id:
        raise UserError(f"repository {repo_id!r} has no owner, expected OWNER/NAME")
    sent, left = uploads(
        Path(directory),
        repo_id,
        base_model=base_model,
        license_id=license_id,
        evaluation=None if evaluation is None else Path(evaluation),
    )
    print(listing(sent, left, repo_id, private))
    if dry_run:
        return None
    api = HfApi()
    try:
        url = str(api.create_repo(repo_id, private=private, exist_ok=update))
        operations = [CommitOperationAdd(path_in_repo=u.name, path_or_fileobj=u.content) for u in sent]
        message = f"Upload {Path(directory).resolve().name} with dcr-mllm"
        api.create_commit(repo_id, operations, commit_message=message)
    except LocalTokenNotFoundError:
        raise UserError("no token for the hub was found; log in with `hf auth login`") from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 409 and not update:
            raise UserError(f"{repo_id} exists already; --update adds a commit to it") from None
        raise UserError(f"the hub refused {repo_id}: {str(error).strip().splitlines()[0]}") from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from None
    except httpx.RequestError as error:
        raise UserError(f"the hub cannot be reached at {api.endpoint}: {error}") from None
    return url


def listing(sent: list[Upload], left: list[str], repo_id: str, private: bool) -> str:
    """The list of files with sizes and changes, as a dry run prints it."""
    lines = [f"{repo_id} ({'private' if private else 'public'}), {sum(u.size for u in sent):,} bytes:"]
    lines += [f"  {u.size:>15,}  {u.name}{f'  ({u.note})' if u.note else ''}" for u in sent]
    lines += [f"not uploaded: {', '.join(left)}"] if left else []
    return "\n".join(lines)


def _kind(directory: Path) -> str:
    """As `kind_of`; `export` for the layouts of other projects, which are written here and not read."""
    if directory.is_dir():
        config = directory / "config.json"
        model_type = str(read_json(config).get("model_type")) if config.is_file() else ""
        if (directory / "open_clip_config.json").is_file() or model_type.startswith("llava_"):
            for file in directory.rglob("*.safetensors"):
                read_safetensors_header(file)
            return "export"
    return kind_of(directory)


def _upload(path: Path, name: str, repo_id: str, adapter_base: str | None) -> Upload:
    if path.suffix == ".json" and path.name not in _VOCABULARIES and not path.name.endswith(".index.json"):
        data, count = without_paths(read_json(path))
        notes = [_replaced(count)] if count else []
        if path.name == "adapter_config.json":
            data["base_model_name_or_path"] = base = adapter_base or data["base_model_name_or_path"]
            notes += [] if is_hub_id(base) else [f"PEFT cannot load its base {base!r} from the hub: --base-model ID"]
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        return _text_upload(name, text, repo_id, ", ".join(notes))
    return Upload(name=name, size=path.stat().st_size, content=path)


def _text_upload(name: str, text: str, repo_id: str, note: str) -> Upload:
    """A file that may have been changed; whatever of this machine is still in it is an error.

    Raises:
        UserError: It names the home or the working directory.
    """
    if name.endswith(".md"):
        text, count = without_paths(text)
        note += f", {_replaced(count)}" if count else ""
    for place in {str(Path.home()), str(Path.cwd())} - {"/", "/root"}:
        if place in text:
            raise UserError(f"{name} still speaks of {place}; take that out of the file before it is published")
    content = text.replace(HUB_NAME, repo_id).encode()
    return Upload(name=name, size=len(content), content=content, note=note)


def _replaced(count: int) -> str:
    return f"{count} path{'s' * (count > 1)} of this machine left out, names kept"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="dcr-mllm push", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", metavar="DIR", help="finished tower, adapter, projector, LLaVA or export")
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME on the hub")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--dry-run", action="store_true", help="print what would be uploaded, and stop")
    parser.add_argument("--update", action="store_true", help="allow a repository that exists, as one more commit")
    parser.add_argument("--base-model", metavar="ID", help="hub id of the model it was made from")
    parser.add_argument("--license", metavar="ID", dest="license_id", help="default: the base's if it states one")
    parser.add_argument("--evaluation", metavar="FILE", help="tower_evaluation.json or results.json to quote")
    options = parser.parse_args(argv)

    def call() -> None:
        url = push(**vars(options))
        if url is not None:
            print(url)

    return run_main(call)


if __name__ == "__main__":
    raise SystemExit(main())
