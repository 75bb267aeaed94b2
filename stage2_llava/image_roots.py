"""Where the images of instruction data lie: folders and tars, looked up by the names that records give them."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import posixpath
import tarfile
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dcr_mllm.errors import UserError
from stage2_llava.record_files import Refused, expand, read_members

if TYPE_CHECKING:
    from PIL import Image

_MAX_OPEN = 128  # tars that a process keeps open


class Images:
    """Looks images up by name and reads them.

    Args:
        roots: Folders and tars as in `load_instructions`.

    Raises:
        UserError: A root is missing or unreadable.
    """

    def __init__(self, roots: Sequence[str]):
        self.own = TarIndex()
        self.roots: list[str | TarIndex] = []
        self._names = ", ".join(roots)
        self._listings: dict[tuple[str, str], set[str]] = {}
        for pattern in roots:
            paths = expand(pattern, "images")
            self.roots += [path.rstrip("/") or "/" for path in paths if os.path.isdir(path)]
            tars = [path for path in paths if not os.path.isdir(path)]
            if tars:
                self.roots.append(_index_images(tars))

    def finish(self) -> None:
        """Ends the listing of folders and the adding to `own`."""
        self.own.finish()
        self._listings = {}

    def locate(self, name: str, *, listed: bool = False) -> tuple[str, int, int]:
        """File, offset and size (-1: the whole file) of an image.

        Args:
            name: As in `Sample.images`.
            listed: Trust a listing of the folder, which is made once: asking for each file takes far longer.

        Raises:
            Refused: It leads out of its root, or there is none, or several of this name.
        """
        if not listed and (places := self.own.find(name)):
            return places[0]
        inside = posixpath.normpath(name)
        if inside.startswith(("/", "../")) or inside in ("..", "."):
            raise Refused("image path", f"image {name!r} leads out of its folder, expected a path relative to images")
        for root in self.roots:
            if isinstance(root, str):
                if self._is_file(root, inside, listed):
                    return f"{root}/{inside}", 0, -1
            elif places := root.find(inside):
                if len(places) > 1:
                    tars = f"{places[0][0]} and {places[1][0]}"
                    raise Refused("ambiguous image", f"image {name!r} could be {len(places)} members, of {tars}")
                return places[0]
        raise Refused("missing image", f"image {name!r} is not in {self._names}")

    def open(self, name: str) -> Image.Image:
        """The image as RGB, its first frame.

        Raises:
            Refused: It is missing or cannot be decoded.
        """
        from PIL import Image, UnidentifiedImageError

        path, offset, size = self.locate(name)
        try:
            with Image.open(io.BytesIO(_read(path, offset, size))) as image:
                return image.convert("RGB")
        # What decoders raise on damaged bytes is not limited to OSError.
        except Exception as error:
            file = path if size < 0 else f"{path}, member {name}"
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "no format that Pillow knows" if unknown else str(error).replace("\n", " ")
            raise Refused("unreadable image", f"image {file} cannot be read: {reason}") from None

    def _is_file(self, root: str, name: str, listed: bool) -> bool:
        if not listed:
            return os.path.isfile(f"{root}/{name}")
        folder, _, base = name.rpartition("/")
        listing = self._listings.get((root, folder))
        if listing is None:
            try:
                with os.scandir(f"{root}/{folder}") as entries:
                    listing = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
            except (FileNotFoundError, NotADirectoryError, ValueError):
                listing = set()
            except OSError as error:
                raise UserError(f"cannot list images in {root}/{folder}: {error.strerror or error}") from None
            self._listings[root, folder] = listing
        return base in listing


class TarIndex:
    """Where the members of tars lie, by hashes of their names; a dict of the names would be ten times as large."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._places: Any = array("q")  # tar, offset and size of each member
        self._hashes: Any = array("Q")
        self._members: Any = array("q")  # that the hashes belong to

    def add(self, member: tarfile.TarInfo, *names: str) -> None:
        """Adds a member of the last path under some names."""
        for name in names:
            self._hashes.append(_hash(name))
            self._members.append(len(self._places) // 3)
        self._places.extend((len(self.paths) - 1, member.offset_data, member.size))

    def finish(self) -> None:
        """Ends the adding."""
        hashes = np.array(self._hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._members = hashes[order], np.array(self._members, dtype=np.int64)[order]
        self._places = np.array(self._places, dtype=np.int64).reshape(-1, 3)

    def find(self, name: str) -> list[tuple[str, int, int]]:
        """Tar, offset and size of all members of this name; of this base name if there are none."""
        for text in (name, f"*/{name}"):
            value = np.uint64(_hash(text))
            first, last = (int(np.searchsorted(self._hashes, value, side)) for side in ("left", "right"))
            if last > first:
                places = self._places[np.unique(self._members[first:last])].tolist()
                return [(self.paths[tar], offset, size) for tar, offset, size in places]
        return []


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _index_images(paths: Sequence[str]) -> TarIndex:
    index = TarIndex()
    for path in paths:
        if not path.endswith(".tar"):
            raise UserError(f"images {path} is neither a folder nor an uncompressed tar (.tar); unpack it")
        index.paths.append(path)
        for member, _ in read_members(path):
            name = posixpath.normpath(member.name)
            index.add(member, name, f"{os.path.basename(path)}/{name}", f"*/{posixpath.basename(name)}")
    index.finish()
    return index


class _Handle:
    """An open file; closed with its last reference."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


# Read by position only, so that forked processes and threads may share the handles.
_open_handle = functools.lru_cache(maxsize=_MAX_OPEN)(_Handle)


def _read(path: str, offset: int, size: int) -> bytes:
    if size < 0:
        with open(path, "rb") as file:
            return file.read()
    handle = _open_handle(path)
    content = os.pread(handle.descriptor, size, offset)
    if len(content) < size:
        raise OSError(f"{path} is shorter than when it was listed")
    return content
