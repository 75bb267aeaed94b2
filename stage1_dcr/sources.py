"""From what a person writes under `data` to a list of shards: patterns, directories, URLs, dataset names."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr_mllm.errors import UserError
from dcr_mllm.log import get_logger
from dcr_mllm.patterns import expand_braces
from stage1_dcr.remote import patiently, without_query
from stage1_dcr.shards import (
    IMAGE_EXTENSIONS,
    TAR_EXTENSIONS,
    FolderShard,
    HubShard,
    ParquetShard,
    SavedRowsShard,
    Shard,
    TarShard,
    hub_dataset,
    saved_dataset,
)

logger = get_logger(__name__)

_FILES_PER_SHARD = 64
_ROWS_PER_SHARD = 256
_PARALLEL_REQUESTS = 16
_PROBED_SHARDS = 8
_PROBED_ENTRIES = 1000


@dataclass(kw_only=True, frozen=True)
class Source:
    """All shards of the data in a fixed order, and a fingerprint over their names and sizes."""

    shards: tuple[Shard, ...]
    fingerprint: str
    description: str


def open_source(data: str | os.PathLike[str] | Sequence[str] | Source) -> Source:
    """Lists the shards of the data and makes sure that there are images; reads at most a few entries.

    Args:
        data: one of these or a list of them: WebDataset tars (`dir/*.tar`, `dir/{00000..00331}.tar`, a directory of
            tars, fsspec URLs), a folder of images (recursive), Parquet files or a folder of them, the directory of a
            dataset saved by `save_to_disk`, `hf:NAME[:SPLIT]`.

    Raises:
        UserError: nothing there, or nothing that is an image.
    """
    if isinstance(data, Source):
        return data
    specs = [str(data)] if isinstance(data, (str, os.PathLike)) else [str(spec) for spec in data]
    if not specs or not all(specs):
        raise UserError("data is empty: name image shards, a folder of images, Parquet files or hf:NAME")
    shards: list[Shard] = []
    for number, spec in enumerate(specs):
        shards += _list_shards(spec, f"{number}:" if len(specs) > 1 else "")
    what = without_query(", ".join(specs))
    _probe(shards, what)
    digest = hashlib.sha256("".join(f"{shard.name}\t{shard.size}\n" for shard in shards).encode()).hexdigest()
    return Source(shards=tuple(shards), fingerprint=digest, description=f"{what} ({len(shards)} shards)")


def fingerprint(data: str | os.PathLike[str] | Sequence[str]) -> str:
    """SHA-256 over the names (relative to the source, so that data may move) and sizes of all shards."""
    return open_source(data).fingerprint


def _probe(shards: Sequence[Shard], what: str) -> None:
    """Refuses data in which no image is found near the beginning of the first shards."""
    problem = ""
    for shard in shards[:_PROBED_SHARDS]:
        for entry in itertools.islice(shard.samples(lambda index: index < _PROBED_ENTRIES), _PROBED_ENTRIES):
            if entry.data:
                return
            problem = f" ({entry.key}: {entry.problem})"
    raise UserError(
        f"no image found in {what}{problem}; images are files or tar members KEY.EXT with EXT one of "
        f"{', '.join(sorted(IMAGE_EXTENSIONS))}, or rows of an image column"
    )


def _list_shards(spec: str, prefix: str) -> list[Shard]:
    if spec.startswith("hf:"):
        return _list_hub(spec, prefix)
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        return _list_directory(path, prefix)
    # Names are relative to what every file has in common, so that they are the same on another machine.
    literal = os.path.exists(path)
    common = (path if literal else re.split(r"[*?\[{]", without_query(path))[0]).rpartition("/")[0]
    patterns = [path] if literal else expand_braces(path)
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as threads:
        try:
            found = list(threads.map(lambda pattern: _find(pattern, spec), patterns))
        finally:
            threads.shutdown(cancel_futures=True)  # nobody waits for the others once one is missing
    return [_named_shard(file, size, common, prefix) for files in found for file, size in files]


def _find(pattern: str, spec: str) -> list[tuple[Any, int]]:
    """Files (fsspec) and sizes behind a path, URL or pattern without braces; nothing is listed without `*` or `[`."""
    import fsspec

    remote = "://" in pattern
    try:
        if not remote and os.path.exists(pattern):  # a literal name may hold the magic characters of a pattern
            files = [_local_file(pattern)]
        else:
            expand = bool(re.search(r"[*\[]" if remote else r"[*?\[]", pattern))  # `?` begins the query of a URL
            files = sorted(fsspec.open_files(pattern, "rb", expand=expand), key=lambda file: file.path)
        found = [(file, _size(file)) for file in files]
    except FileNotFoundError as error:
        found, why = [], without_query(f" ({error.__cause__})") if error.__cause__ else ""
    # Stores have errors of their own: a package is not installed, no credentials, no such bucket, no network.
    except Exception as error:
        message = without_query(f"data {spec} cannot be opened: {type(error).__name__}: {error}")
        raise UserError(f"{message}; check the address and your access to it") from error
    else:
        why = ""
    if not found:
        origin = "" if pattern == spec else f" (from {without_query(spec)})"
        raise UserError(
            f"no data at {without_query(pattern)}{origin}{why}: check the path; patterns are DIR/*.tar or "
            "DIR/{000..331}.tar"
        )
    return found


def _size(file: Any) -> int:
    """Bytes of an fsspec file; -1 if its server does not tell."""
    ask = functools.partial(file.fs.info, file.path)
    info = ask() if "file" in file.fs.protocol else patiently(ask, without_query(file.path))
    return int(info.get("size") or -1)


def _named_shard(file: Any, size: int, common: str, prefix: str) -> Shard:
    local = "file" in file.fs.protocol
    root = file.fs._strip_protocol(common) if common or not local else os.getcwd()
    name = without_query(file.path).removeprefix(root).lstrip("/")
    return _file_shard(file, prefix + name, file.path if local else without_query(file.full_name), size)


def _local_file(path: str) -> Any:
    import fsspec

    return fsspec.core.OpenFile(fsspec.filesystem("file"), os.path.abspath(path))


def _file_shard(file: Any, name: str, location: str, size: int) -> TarShard | ParquetShard:
    kind = _kind(location)
    if kind not in ("tar", "parquet"):
        raise UserError(f"data {location} is neither a tar nor a Parquet file; name a folder to read single images")
    make = TarShard if kind == "tar" else ParquetShard
    return make(name=name, file=file, location=location, size=size)


def _kind(name: str) -> str:
    lowered = name.lower()
    if lowered.endswith(TAR_EXTENSIONS):
        return "tar"
    extension = lowered.rpartition(".")[2]
    return "parquet" if extension == "parquet" else "image" if extension in IMAGE_EXTENSIONS else ""


def _list_directory(path: str, prefix: str) -> list[Shard]:
    if any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
        return _list_saved(path, prefix)
    found: dict[str, dict[str, int]] = {}  # kind -> relative path -> size
    visited: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link back up
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            kind = _kind(name)
            file = os.path.join(folder, name)
            if kind and not name.startswith(".") and os.path.isfile(file):
                found.setdefault(kind, {})[Path(file).relative_to(path).as_posix()] = os.path.getsize(file)
    _leave_out_metadata(found, path)
    if not found:
        raise UserError(f"{path} holds no images, tars or Parquet files: name a folder that does")
    if len(found) > 1:
        kinds = " and ".join(sorted(found))
        raise UserError(f"{path} holds {kinds} files: say which by a pattern such as {os.path.join(path, '*.tar')}")
    [(kind, sizes)] = found.items()
    files = sorted(sizes)
    if kind != "image":
        return [
            _file_shard(_local_file(os.path.join(path, file)), prefix + file, os.path.join(path, file), sizes[file])
            for file in files
        ]
    shards: list[Shard] = []
    for start in range(0, len(files), _FILES_PER_SHARD):
        part = tuple(files[start : start + _FILES_PER_SHARD])
        digest = hashlib.sha256("\n".join(part).encode()).hexdigest()[:16]
        name = f"{prefix}{start // _FILES_PER_SHARD:06d}-{digest}"
        size = sum(sizes[file] for file in part)
        shards.append(FolderShard(name=name, location=path, size=size, files=part, prefix=prefix))
    return shards


def _leave_out_metadata(found: dict[str, dict[str, int]], path: str) -> None:
    """Drops the Parquet files that img2dataset writes beside `00000.tar`, or beside the images in `00000/`."""
    data = {file.removesuffix(".tar") for file in found.get("tar", ())}
    data |= {os.path.dirname(file) for file in found.get("image", ())}
    metadata = [file for file in found.get("parquet", ()) if file.removesuffix(".parquet") in data]
    for file in metadata:
        del found["parquet"][file]
    if metadata:
        logger.info("%s: %d Parquet files beside the data hold their metadata and are not read", path, len(metadata))
        if not found["parquet"]:
            del found["parquet"]


def _list_saved(path: str, prefix: str) -> list[Shard]:
    data, _ = saved_dataset(path)
    total = len(data)
    num_bytes = sum(file.stat().st_size for file in Path(path).rglob("*.arrow"))
    return [
        SavedRowsShard(
            name=f"{prefix}rows-{start:08d}-of-{total}-{num_bytes}",
            location=path,
            size=min(_ROWS_PER_SHARD, total - start),
            start=start,
            stop=min(start + _ROWS_PER_SHARD, total),
            prefix=prefix,
        )
        for start in range(0, total, _ROWS_PER_SHARD)
    ]


def _list_hub(spec: str, prefix: str) -> list[Shard]:
    name, _, split = spec.removeprefix("hf:").partition(":")
    split = split or "train"
    try:
        data, _ = hub_dataset(name, split)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many types: no network, missing, gated, unknown split
        raise UserError(f"data {spec} cannot be opened: {type(error).__name__}: {error}") from error
    parts = data.num_shards
    return [
        HubShard(
            name=f"{prefix}{name}:{split}:{part:05d}-of-{parts:05d}",
            location=spec,
            size=-1,
            hub=name,
            split=split,
            part=part,
            num_parts=parts,
        )
        for part in range(parts)
    ]
