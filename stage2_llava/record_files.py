"""Files of instruction records: what their names stand for, and the records in JSON, JSON Lines and WebDataset tars."""

from __future__ import annotations

import glob
import json
import math
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dcr_mllm.conversation import IMAGE_TOKEN
from dcr_mllm.errors import UserError
from dcr_mllm.patterns import expand_braces

if TYPE_CHECKING:
    from stage2_llava.image_roots import TarIndex

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif"})

_CHUNK = 1 << 22  # characters of a JSON array that are read at a time


class Refused(Exception):
    """What is wrong with a record or an image; becomes a `Problem` or a `UserError` where its sample is known."""

    def __init__(self, kind: str, text: str):
        super().__init__(kind, text)
        self.kind, self.text = kind, text


def split_weight(spec: str) -> tuple[str, float]:
    """Path and weight of `PATH@WEIGHT`; an @ in the name of a file that exists is meant literally.

    Raises:
        UserError: The weight is not positive.
    """
    path, at, text = spec.rpartition("@")
    if not at or os.path.exists(os.path.expanduser(spec)):
        return spec, 1.0
    try:
        weight = float(text)
    except ValueError:
        return spec, 1.0
    if not 0 < weight < math.inf:
        raise UserError(f"data {spec!r} has the weight {text}, expected a positive number such as 2 or 0.5")
    return path, weight


def expand(pattern: str, setting: str) -> list[str]:
    """Paths behind a path, a glob or braces (`{000..012}`, `{a,b}`), in order.

    Raises:
        UserError: Something that it names does not exist.
    """
    found: dict[str, None] = {}
    path = os.path.expanduser(pattern)
    # A file whose name holds braces or * is meant literally if it is there.
    for text in [path] if os.path.exists(path) else expand_braces(path):
        matches = [text] if os.path.exists(text) else sorted(glob.glob(text, recursive=True))
        if not matches:
            named = "" if text == pattern else f" names {text}, which"
            raise UserError(f"{setting} {pattern!r}{named} does not exist (looked from {os.getcwd()})")
        found.update(dict.fromkeys(matches))
    return list(found)


Items = Iterator[tuple["int | str", Any]]  # place in the file; a record as parsed, or the `Refused` in its place


def read_records(path: str, members: TarIndex | None = None) -> tuple[str, Items]:
    """Opens a file of records.

    Args:
        path: JSON array, JSON Lines or tar.
        members: Learns where the images of a tar are.

    Returns:
        How a place is written behind the path, and the records with their places.

    Raises:
        UserError: The file is of no such kind; while reading: it is broken.
    """
    if path.endswith(".tar"):
        return ":{}", _read_tar(path, members)
    if os.path.isdir(path) or path.lower().endswith((".gz", ".tgz", ".zip", ".parquet")):
        raise UserError(f"data {path} is not supported, expected LLaVA JSON or JSONL files or uncompressed tars")
    try:
        with open(path, "rb") as file:
            begin = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except OSError as error:
        raise UserError(f"cannot read data {path}: {error.strerror or error}") from None
    if begin == b"[":
        return "[{}]", _read_array(path)
    if begin == b"{":
        return ":{}", _read_lines(path)
    found = f"begins with {begin!r}" if begin else "is empty"
    raise UserError(f"data {path} {found}, expected a JSON array or JSON Lines in UTF-8")


def _read_lines(path: str) -> Items:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            record: Any
            try:
                record = json.loads(line.rstrip(b"\r\n").decode())
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                if number == 1 and not path.lower().endswith(".jsonl"):
                    raise UserError(
                        f"data {path} holds neither an array nor one object per line (line 1: {reason}); "
                        "LLaVA's JSON is one array of samples"
                    ) from None
                record = Refused("line", f"is not valid JSON: {reason}")
            yield number, record


def _read_array(path: str) -> Items:
    """Parses one element after the other: as a whole, the objects would take several times the size of the file."""
    scan, blanks = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*").match
    line, column = 1, 1  # of text[0]
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read(_CHUNK)
            start = text.index("[") + 1
            while True:
                try:
                    start = stop = blanks(text, start).end()  # type: ignore[union-attr]
                    if number == 0 and text[start] == "]":
                        break
                    record, stop = scan(text, start)
                    stop = blanks(text, stop).end()  # type: ignore[union-attr]
                    if text[stop] not in ",]":
                        raise json.JSONDecodeError("Expecting ',' delimiter", text, stop)
                except (IndexError, json.JSONDecodeError, RecursionError) as error:
                    # Far from the end of what was read it is an error for good, elsewhere perhaps only a cut element.
                    where = error.pos if isinstance(error, json.JSONDecodeError) else len(text)
                    is_open = where > len(text) - 16 or str(error).startswith("Unterminated string")
                    more = file.read(max(_CHUNK, len(text) - start)) if is_open else ""
                    if not more:
                        raise _broken(path, error, *_advance(text[:where], line, column)) from None
                    line, column = _advance(text[:start], line, column)
                    text, start = text[start:] + more, 0
                    continue
                yield number, record
                number += 1
                start = stop + 1
                if text[stop] == "]":
                    break
            if (text[stop + 1 :] + file.read()).strip():
                raise UserError(f"data {path} goes on behind the array of {number:,} samples, expected its end there")
    except UnicodeDecodeError as error:
        raise UserError(f"data {path} is not UTF-8 behind line {line} ({error.reason}); save it as UTF-8") from None


def _broken(path: str, error: Exception, line: int, column: int) -> UserError:
    reason = getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else "cut off")
    return UserError(
        f"data {path} is not valid JSON at line {line}, column {column} ({reason}); make sure that the file is whole"
    )


def _advance(text: str, line: int, column: int) -> tuple[int, int]:
    """Line and column behind a text that begins at a line and column."""
    num_lines = text.count("\n")
    return line + num_lines, len(text) - text.rfind("\n") if num_lines else column + len(text)


def _read_tar(path: str, index: TarIndex | None) -> Items:
    """Records of a WebDataset tar; members that share a key need not be neighbours."""
    images: dict[str, list[str]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    if index is not None:
        index.paths.append(path)
    for member, content in read_members(path, (".json", ".txt")):
        folder, _, base = posixpath.normpath(member.name).rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not stem:
            continue
        if extension.lower() in IMAGE_EXTENSIONS:
            name = posixpath.normpath(member.name)
            if index is not None:
                index.add(member, f"{path}/{name}")
            images.setdefault(key, []).append(name)
        elif content is not None and extension.lower() in ("json", "txt"):
            texts.setdefault(key, {})[extension.lower()] = content
    for key in dict.fromkeys([*images, *texts]):
        yield key, _tar_record(key, images.get(key, []), texts.get(key, {}))


def _tar_record(key: str, images: list[str], texts: dict[str, bytes]) -> dict[str, Any] | Refused:
    try:
        record = json.loads(texts.get("json", b"{}"))
        # img2dataset writes a json of its own beside each caption.
        if isinstance(record, dict) and "conversations" in record:
            return {"id": key, **record, "image": images}
        if "txt" not in texts:
            return Refused("conversations", f"has neither {key}.json with conversations nor {key}.txt with a caption")
        question = {"from": "human", "value": IMAGE_TOKEN}
        answer = {"from": "gpt", "value": texts["txt"].decode().strip()}
        return {"id": key, "image": images, "conversations": [question, answer]}
    except (ValueError, RecursionError) as error:
        return Refused("text", f"has a json or txt that cannot be read: {error}")


def read_members(path: str, wanted: tuple[str, ...] = ()) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Regular files of an uncompressed tar, with the content of those whose name ends as wanted.

    Raises:
        UserError: It is no tar, compressed, or damaged.
    """
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # or it keeps them all
                if member.isreg():
                    content = archive.extractfile(member) if member.name.lower().endswith(wanted) else None
                    yield member, content.read() if content else None
            # tarfile takes a damaged header for the end and says nothing.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged or cut at byte {archive.offset}")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as an uncompressed tar ({error}); unpack it or fetch it again"
        ) from None
