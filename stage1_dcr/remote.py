"""Reading files wherever fsspec finds them; what is not on a local disk is read in pieces and survives hiccups."""

from __future__ import annotations

import io
import time
from typing import Any, BinaryIO, cast

from dcr_mllm.log import get_logger

logger = get_logger(__name__)

_PIECE = 1 << 20  # bytes
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before the second, third ... attempt


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
        attempt = 0
        while True:
            try:
                if self._file is None:
                    self._file = self._open()
                data = self._file.read(len(buffer))
                break
            # HTTP clients and stores raise errors of their own that have nothing in common.
            except Exception as error:
                self._drop()
                if not self._options and isinstance(error, ValueError) and "range requests" in str(error):
                    if self._sought:
                        raise OSError("its server gives whole files only, and this one is not read in order") from error
                    self._options = {"block_size": 0}  # one long answer instead of many ranges
                    continue
                if attempt == len(_WAITS):
                    raise OSError(f"{_name(error)} ({attempt + 1} attempts)") from error
                logger.warning("%s, byte %d: %s; trying again", without_query(self._path), self._position, _name(error))
                time.sleep(_WAITS[attempt])
                attempt += 1
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

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


def _name(error: Exception) -> str:
    """An error with the one that caused it, since file systems turn everything into FileNotFoundError."""
    cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ is not None else ""
    return f"{type(error).__name__}: {without_query(str(error))}{cause}"


def without_query(location: str) -> str:
    """A URL without what follows `?`: signatures change, and belong into no log."""
    return location.partition("?")[0] if "://" in location else location
