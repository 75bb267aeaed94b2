"""Reading files wherever fsspec finds them; what is not on a local disk is read in pieces and survives hiccups."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

from dcr_mllm.log import get_logger

logger = get_logger(__name__)

_PIECE = 1 << 20  # bytes
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before the second, third ... attempt

T = TypeVar("T")


def open_binary(file: Any) -> BinaryIO:
    """Opens an `fsspec.core.OpenFile`. Reading raises OSError when a remote file fails several times in a row."""
    if "file" in file.fs.protocol:
        return cast(BinaryIO, file.fs.open(file.path, "rb"))
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(file.fs, file.path), _PIECE))


class _RemoteFile(io.RawIOBase):
    """A remote file that is opened anew where it was when reading fails."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        self._position = 0
        self._file: Any = None
        self._options: dict[str, Any] = {}
        self._sought = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            offset += int(self._fs.info(self._path)["size"])
        if offset != self._position:
            self._position, self._sought = offset, True
            self._drop()
        return offset

    def readinto(self, buffer: Any) -> int:
        try:
            data = patiently(lambda: self._read(len(buffer)), f"{without_query(self._path)}, byte {self._position}")
        # HTTP clients and stores raise errors of their own that have nothing in common.
        except Exception as error:
            raise OSError(_describe(error)) from error
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._open()
            return self._file.read(size)
        except Exception as error:
            self._drop()
            if self._options or not (isinstance(error, ValueError) and "range requests" in str(error)):
                raise
        if self._sought:
            raise PermissionError("its server gives whole files only, and this one is not read in order")
        self._options = {"block_size": 0}  # one long answer instead of many ranges
        return self._read(size)

    def _open(self) -> Any:
        file = self._fs.open(self._path, "rb", **self._options)
        try:
            file.seek(self._position)
        except (ValueError, OSError):  # a stream: read up to there
            left = self._position
            while left:
                data = file.read(min(left, _PIECE))
                if not data:
                    raise EOFError(f"ends before byte {self._position}") from None
                left -= len(data)
        return file

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        self._drop()
        super().close()


def patiently(attempt: Callable[[], T], what: str) -> T:
    """Calls until there is an answer, with growing pauses; a last failure, or one that will not pass, is raised."""
    for wait in (*_WAITS, None):
        try:
            return attempt()
        except Exception as error:
            if wait is None or _is_final(error):
                raise
            logger.warning("%s: %s; trying again in %g s", what, _describe(error), wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use: not there, not allowed, not possible."""
    status = getattr(error.__cause__ or error, "status", None)  # of HTTP
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    # Some file systems report whatever went wrong as a file that is not there; they name the cause.
    return isinstance(error, (FileNotFoundError, PermissionError)) and error.__cause__ is None


def _describe(error: Exception) -> str:
    cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ is not None else ""
    return without_query(f"{type(error).__name__}: {error}{cause}")


def without_query(text: str) -> str:
    """Text without what follows `?` in URLs: signatures expire, and belong into neither names nor logs."""
    return re.sub(r"(\w+://[^\s?'\")]*)\?[^\s'\")]*", r"\1", text)
