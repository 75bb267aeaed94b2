"""Where images come from: tars, folders, Parquet files and Hugging Face datasets, each as a list of shards.

A shard yields encoded images and always in the same order, which is all that the stream in `images` needs to be shuffled,
split over ranks and workers, and restarted. Shards are small and can be sent to worker processes; they open nothing before they are read.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dcr_mllm.errors import UserError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm"})
_TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz")
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixel_values")
_FILES_PER_SHARD = 64
_ROWS_PER_SHARD = 256
_PROBED_SHARDS = 8
_PROBED_ENTRIES = 1000

Wanted = Callable[[int], bool]


class Encoded(NamedTuple):
    """One entry of a shard: an encoded image, or the reason why there is none."""

    index: int  # running number in its shard
    key: str  # unique in the source
    data: bytes | None
    problem: str = ""


class Shard(Protocol):
    """A part of a source that is read from its beginning, in an order that never changes.

    `name` is relative to the source, so that moved data keep their fingerprint; `location` is for people.
    """

    @property
    def name(self) -> str: ...

    @property
    def location(self) -> str: ...

    @property
    def size(self) -> int: ...

    def samples(self, wanted: Wanted) -> Iterator[Encoded]:
        """Yields the entries whose index is wanted. A break yields an entry without data and ends the shard."""
        ...


@dataclass(kw_only=True, frozen=True)
class Source:
    """All shards of the data, sorted, and a fingerprint over their names and sizes."""

    shards: tuple[Shard, ...]
    fingerprint: str
    description: str


@dataclass(kw_only=True, frozen=True)
class _FileShard:
    """A shard that is one file, local or remote."""

    name: str
    file: Any  # fsspec.core.OpenFile
    location: str
    size: int
    prefix: str = ""


class _CheckedHeader(tarfile.TarInfo):
    """Lets a damaged header raise: in the middle of a file tarfile takes it for the end and says nothing."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or cut tar ({error})") from None


class TarShard(_FileShard):
    """WebDataset: everything before the first dot of the base name is the key, `jpg` and its kin are the image."""

    def samples(self, wanted: Wanted) -> Iterator[Encoded]:
        index = 0
        last = None
        try:
            with self.file as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_CheckedHeader) as tar:
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if not member.isfile() or extension.lower() not in IMAGE_EXTENSIONS or not stem or key == last:
                        continue
                    last = key
                    if wanted(index):
                        content = tar.extractfile(member)
                        assert content is not None  # it is a regular file
                        yield Encoded(index, f"{self.name}/{key}", content.read())
                    index += 1
        # What a compression library or a file system raises on damage is not limited to tarfile's errors.
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if wanted(index):
                yield Encoded(index, f"{self.name}/{last or ''}", None, f"the shard breaks off after this: {error}")


class ParquetShard(_FileShard):
    """A Parquet file with a column of encoded images (bytes, or the dict of Hugging Face datasets)."""

    def samples(self, wanted: Wanted) -> Iterator[Encoded]:
        import pyarrow.parquet

        index = 0
        try:
            with self.file as stream:
                table = pyarrow.parquet.ParquetFile(stream)
                column = _image_column(table.schema_arrow.names, self.location)
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if not any(wanted(i) for i in range(index, index + rows)):
                        index += rows
                        continue
                    for batch in table.iter_batches(batch_size=64, row_groups=[group], columns=[column]):
                        for value in batch.column(0):
                            if wanted(index):
                                yield _from_cell(index, f"{self.prefix}{self.name}/{index:08d}", value.as_py())
                            index += 1
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            if isinstance(error, UserError):
                raise
            if wanted(index):
                yield Encoded(index, f"{self.name}/{index:08d}", None, f"the shard breaks off here: {error}")


@dataclass(kw_only=True, frozen=True)
class FolderShard:
    """Some consecutive files of a folder of images."""

    name: str
    location: str
    size: int
    files: tuple[str, ...]
    prefix: str = ""

    def samples(self, wanted: Wanted) -> Iterator[Encoded]:
        for index, file in enumerate(self.files):
            if not wanted(index):
                continue
            try:
                yield Encoded(index, self.prefix + file, Path(self.location, file).read_bytes())
            except OSError as error:
                yield Encoded(index, self.prefix + file, None, str(error))


@functools.lru_cache(maxsize=4)
def _saved_dataset(path: str) -> tuple[Any, str]:
    """A dataset of `save_to_disk` with undecoded images, and its image column. Once per process."""
    import datasets

    data = datasets.load_from_disk(path)
    if isinstance(data, datasets.DatasetDict):
        splits = list(data)
        if "train" not in splits and len(splits) > 1:
            raise UserError(f"{path} holds the splits {splits} and no 'train': name one of their directories")
        data = data["train" if "train" in splits else splits[0]]
    return _undecoded(data, path)


@functools.lru_cache(maxsize=4)
def _hub_dataset(name: str, split: str) -> tuple[Any, str]:
    import datasets

    return _undecoded(datasets.load_dataset(name, split=split, streaming=True), f"hf:{name}:{split}")


def _undecoded(data: Any, where: str) -> tuple[Any, str]:
    import datasets

    features = data.features or {}
    names = data.column_names or list(features)
    images = [name for name in names if isinstance(features.get(name), datasets.Image)]
    column = images[0] if images else _image_column(names, where)
    data = data.select_columns([column])
    return (data.cast_column(column, datasets.Image(decode=False)) if images else data), column


@dataclass(kw_only=True, frozen=True)
class SavedRowsShard:
    """Rows [start, stop) of a Hugging Face dataset saved by `save_to_disk`."""

    name: str
    location: str
    size: int
    start: int
    stop: int
    prefix: str = ""

    def samples(self, wanted: Wanted) -> Iterator[Encoded]:
        data, column = _saved_dataset(self.location)
        for index in range(self.stop - self.start):
            if wanted(index):
                row = self.start + index
                yield _from_cell(index, f"{self.prefix}{row:08d}", data[row][column])


@dataclass(kw_only=True, frozen=True)
class HubShard:
    """One of the parts of a dataset on the Hugging Face hub, streamed."""

    name: str
    location: str
    size: int
    hub: str
    split: str
    part: int
    num_parts: int

    def samples(self, wanted: Wanted) -> Iterator[Encoded]:
        data, column = _hub_dataset(self.hub, self.split)
        for index, row in enumerate(data.shard(num_shards=self.num_parts, index=self.part)):
            if wanted(index):
                yield _from_cell(index, f"{self.name}/{index:08d}", row[column])


def _image_column(names: Sequence[str], where: str) -> str:
    for name in _IMAGE_COLUMNS:
        if name in names:
            return name
    raise UserError(f"{where} has no image column: found {list(names)}, expected one of {list(_IMAGE_COLUMNS[:4])}")


def _from_cell(index: int, key: str, value: Any) -> Encoded:
    """The image of a table cell: bytes, or a dict of bytes and path."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            import fsspec

            try:
                with fsspec.open(value["path"], "rb") as file:
                    return Encoded(index, key, file.read())
            except OSError as error:
                return Encoded(index, key, None, str(error))
        value = value.get("bytes")
    if isinstance(value, (bytes, bytearray, memoryview)) and len(value):
        return Encoded(index, key, bytes(value))
    return Encoded(index, key, None, f"no encoded image in this row but {type(value).__name__}")


def open_source(data: str | os.PathLike[str] | Sequence[str] | Source) -> Source:
    """Lists the shards of the data and makes sure that there are images; reads at most a few entries.

    Args:
        data: one of these or a list of them: WebDataset tars (`dir/*.tar`, `dir/{00000..00331}.tar`, a directory of tars, fsspec
            URLs), a folder of images (recursive), Parquet files or a folder of them, the directory of a dataset saved by
            `save_to_disk`, `hf:NAME[:SPLIT]`.

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
    _probe(shards, ", ".join(specs))
    digest = hashlib.sha256("".join(f"{shard.name}\t{shard.size}\n" for shard in shards).encode()).hexdigest()
    return Source(shards=tuple(shards), fingerprint=digest, description=f"{', '.join(specs)} ({len(shards)} shards)")


def fingerprint(data: str | os.PathLike[str] | Sequence[str]) -> str:
    """SHA-256 over the names (relative to the source) and sizes of all shards."""
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
    shards: list[Shard] = []
    for pattern in [path] if os.path.exists(path) else expand_braces(path):
        shards += _list_files(pattern, spec, prefix)
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Expands `{00..12}` (zero padded as written) and `{a,b}`, all combinations, from left to right."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is not None:
        parts = words.split(",")
    else:
        low, high = int(first), int(last)
        parts = [str(i).zfill(len(first)) for i in range(low, high + 1)]
        if not parts:
            raise UserError(f"{pattern}: the range {first}..{last} runs backwards")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [head + part + rest for part in parts for rest in expand_braces(tail)]


def _list_files(pattern: str, spec: str, prefix: str) -> list[Shard]:
    import fsspec

    remote = "://" in pattern
    try:
        if not remote and os.path.exists(pattern):  # a literal name may hold the magic characters of a pattern
            files = [fsspec.core.OpenFile(fsspec.filesystem("file"), os.path.abspath(pattern))]
        else:
            files = sorted(fsspec.open_files(pattern, "rb"), key=lambda file: file.path)
        sizes = [int(file.fs.info(file.path).get("size") or -1) for file in files]
    except FileNotFoundError:
        files = []
    except (ImportError, ValueError) as error:
        raise UserError(f"data {spec} cannot be opened: {error}") from None
    if not files:
        hint = "" if pattern == spec else f" (from {spec})"
        raise UserError(
            f"no data at {pattern}{hint}: check the path; patterns are DIR/*.tar or DIR/{{00000..00331}}.tar"
        )
    # Names are relative to the part of the pattern that is fixed, so they hold on another machine.
    fixed = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    depth = len([part for part in (fixed if remote else os.path.abspath(fixed or ".")).split("/") if part])
    shards: list[Shard] = []
    for file, size in zip(files, sizes, strict=True):
        location = f"{pattern.split('://')[0]}://{file.path}" if remote else file.path
        parts = [part for part in location.split("/") if part]
        name = prefix + "/".join(parts[depth:] or parts[-1:])
        kind = _kind(file.path)
        if kind == "tar":
            shards.append(TarShard(name=name, file=file, location=location, size=size))
        elif kind == "parquet":
            shards.append(ParquetShard(name=name, file=file, location=location, size=size))
        else:
            raise UserError(f"data {location} is neither a tar nor a Parquet file; name a folder to read single images")
    return shards


def _kind(name: str) -> str:
    lowered = name.lower()
    if lowered.endswith(_TAR_EXTENSIONS):
        return "tar"
    extension = lowered.rpartition(".")[2]
    return "parquet" if extension == "parquet" else "image" if extension in IMAGE_EXTENSIONS else ""


def _list_directory(path: str, prefix: str) -> list[Shard]:
    if any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
        return _list_saved(path, prefix)
    found: dict[str, list[str]] = {"tar": [], "parquet": [], "image": []}
    sizes: dict[str, int] = {}
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            kind = _kind(name)
            if kind and not name.startswith("."):
                file = os.path.join(folder, name)
                relative = Path(file).relative_to(path).as_posix()
                found[kind].append(relative)
                sizes[relative] = os.path.getsize(file)
    kinds = [kind for kind, files in found.items() if files]
    if not kinds:
        raise UserError(f"{path} holds no images, tars or Parquet files; name a folder that does")
    if len(kinds) > 1:
        raise UserError(f"{path} holds {' and '.join(kinds)} files: say which by a pattern such as {path}/*.tar")
    files = sorted(found[kinds[0]])
    if kinds[0] != "image":
        return [
            shard
            for file in files
            for shard in (_renamed(_list_files(os.path.join(path, file), path, prefix)[0], prefix + file),)
        ]
    shards: list[Shard] = []
    for start in range(0, len(files), _FILES_PER_SHARD):
        part = tuple(files[start : start + _FILES_PER_SHARD])
        digest = hashlib.sha256("\n".join(part).encode()).hexdigest()[:16]
        name = f"{prefix}{start // _FILES_PER_SHARD:06d}-{digest}"
        size = sum(sizes[file] for file in part)
        shards.append(FolderShard(name=name, location=path, size=size, files=part, prefix=prefix))
    return shards


def _renamed(shard: Any, name: str) -> Shard:
    return type(shard)(name=name, file=shard.file, location=shard.location, size=shard.size)


def _list_saved(path: str, prefix: str) -> list[Shard]:
    data, _ = _saved_dataset(path)
    total = len(data)
    if total == 0:
        raise UserError(f"the dataset {path} has no rows")
    sizes = sum(file.stat().st_size for file in Path(path).rglob("*.arrow"))
    return [
        SavedRowsShard(
            name=f"{prefix}rows-{start:08d}-of-{total}-{sizes}",
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
        data, _ = _hub_dataset(name, split)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many types: network, missing, gated, unknown split
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
