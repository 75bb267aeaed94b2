"""Shards: the parts that image data are made of, be it tars, folders, Parquet files or Hugging Face datasets.

A shard yields encoded images, always in the same order, which is all that the stream in `images` needs to be shuffled,
split over ranks, and restarted. Shards open nothing before they are read.
"""

from __future__ import annotations

import functools
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dcr_mllm.errors import UserError
from dcr_mllm.log import get_logger
from stage1_dcr.remote import open_binary

logger = get_logger(__name__)

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm"})
TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz")
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixel_values")
_TAR_PIECE = 1 << 18  # bytes read at a time

Wanted = Callable[[int], bool]


@dataclass(frozen=True)
class Encoded:
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
class FileShard:
    """A shard that is one file, local or remote."""

    name: str
    file: Any  # fsspec.core.OpenFile
    location: str
    size: int


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


class TarShard(FileShard):
    """WebDataset: everything before the first dot of the base name is the key, `jpg` and its kin are the image."""

    def samples(self, wanted: Wanted) -> Iterator[Encoded]:
        index = 0  # number of images begun, so that a break has the same index whether or not they are wanted
        key = ""
        try:
            with (
                open_binary(self.file) as stream,
                tarfile.open(fileobj=stream, mode="r|*", tarinfo=_CheckedHeader, bufsize=_TAR_PIECE) as tar,
            ):
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    name = f"{folder}/{stem}" if folder else stem
                    if not member.isfile() or extension.lower() not in IMAGE_EXTENSIONS or not stem or name == key:
                        continue
                    key = name
                    index += 1
                    if wanted(index - 1):
                        content = tar.extractfile(member)
                        assert content is not None  # it is a regular file
                        yield Encoded(index - 1, f"{self.name}/{key}", content.read())
        # What a compression library or a file system raises on damage is not limited to tarfile's errors.
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            if wanted(index):
                where = f"{self.name}/{key}" if key else self.name
                yield Encoded(index, where, None, f"the shard {self.location} breaks off here: {error}")


class ParquetShard(FileShard):
    """A Parquet file with a column of encoded images (bytes, or the dict of Hugging Face datasets)."""

    def samples(self, wanted: Wanted) -> Iterator[Encoded]:
        import pyarrow.parquet

        first = index = num_empty = 0
        damage = (OSError, ValueError)  # pyarrow's ArrowInvalid is a ValueError
        try:
            with open_binary(self.file) as stream:
                table = pyarrow.parquet.ParquetFile(stream)
                column = image_column(table.schema_arrow.names, self.location)
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    index = first
                    try:
                        if any(wanted(i) for i in range(first, first + rows)):
                            for batch in table.iter_batches(batch_size=64, row_groups=[group], columns=[column]):
                                for cell in batch.column(0):
                                    if wanted(index):
                                        value = cell.as_py()
                                        if _is_empty(value):
                                            num_empty += 1
                                        else:
                                            yield _from_cell(index, f"{self.name}/{index:08d}", value)
                                    index += 1
                    except damage as error:
                        if wanted(index):
                            problem = f"{self.location}: the rest of row group {group} cannot be read: {error}"
                            yield Encoded(index, f"{self.name}/{index:08d}", None, problem)
                    first += rows
            if num_empty:
                logger.info("%s: %d rows without an image", self.location, num_empty)
        except UserError:
            raise
        except damage as error:
            if wanted(first):
                yield Encoded(first, self.name, None, f"{self.location} cannot be read: {error}")


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
def saved_dataset(path: str) -> tuple[Any, str]:
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
def hub_dataset(name: str, split: str) -> tuple[Any, str]:
    """A streamed dataset of the hub with undecoded images, and its image column."""
    import datasets

    return _undecoded(datasets.load_dataset(name, split=split, streaming=True), f"hf:{name}:{split}")


def _undecoded(data: Any, where: str) -> tuple[Any, str]:
    import datasets

    features = data.features or {}
    names = data.column_names or list(features)
    images = [name for name in names if isinstance(features.get(name), datasets.Image)]
    column = images[0] if images else image_column(names, where)
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
        data, column = saved_dataset(self.location)
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
        data, column = hub_dataset(self.hub, self.split)
        for index, row in enumerate(data.shard(num_shards=self.num_parts, index=self.part)):
            if wanted(index):
                yield _from_cell(index, f"{self.name}/{index:08d}", row[column])


def image_column(names: Sequence[str], where: str) -> str:
    """Picks the column that holds images by its name; UserError if there is none."""
    for name in _IMAGE_COLUMNS:
        if name in names:
            return name
    raise UserError(
        f"{where} has no image column: found {list(names)}, expected one of {list(_IMAGE_COLUMNS[:4])} "
        "(beside the tars of img2dataset lies a Parquet file of metadata for each: name the tars)"
    )


def _is_empty(value: Any) -> bool:
    """Whether a table says that there is no image, as img2dataset's do of a failed download: then nothing is broken."""
    return value is None or (isinstance(value, dict) and value.get("bytes") is None and not value.get("path"))


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
