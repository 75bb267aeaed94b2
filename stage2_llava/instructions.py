"""Instruction data: LLaVA's JSON, JSON Lines or WebDataset tars, checked as a whole before anything is trained.

    python -m stage2_llava.instructions validate DATA... [--images ROOT ...]     (see `stage2_llava.validate`)

Records stay serialised in one `bytes` object and are parsed on access: hundreds of thousands of dicts would take
gigabytes, and every forked worker would copy them by counting references.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
import math
import os
import posixpath
import re
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dcr_mllm.conversation import IMAGE_TOKEN, Turn
from dcr_mllm.errors import UserError
from dcr_mllm.log import get_logger, rank

if TYPE_CHECKING:
    from PIL import Image

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif"})
VALIDATE = "python -m stage2_llava.instructions validate DATA --images ROOT"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_CHUNK = 1 << 22  # characters of a JSON array that are read at a time
_MAX_OPEN = 128  # tars that a process keeps open

logger = get_logger(__name__)


@dataclass(frozen=True)
class Sample:
    """A conversation and its images.

    Attributes:
        id: As in the file, or `where` if it has none.
        turns: Alternating, the user first and the assistant last.
        images: Names as in the file; for WebDataset tars `TAR/MEMBER`.
        where: File and place for messages: `llava.json[17]`, `a.jsonl:18`, `shard.tar:key`.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    where: str


class Problem(NamedTuple):
    """What is wrong with a sample, and a short `kind` to count by."""

    kind: str
    where: str
    id: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}{f' (id {self.id!r})' if self.id else ''}: {self.text}"


class Refused(Exception):
    """What is wrong with a record or an image; becomes a `Problem` or a `UserError` where its sample is known."""

    def __init__(self, kind: str, text: str):
        super().__init__(kind, text)
        self.kind, self.text = kind, text


class Instructions:
    """Samples by index; made by `load_instructions`, can be sent to worker processes.

    Attributes:
        num_words: Words over all turns of each sample, int [N], at least 1: what LLaVA groups by.
        has_image: Which samples have images, bool [N].
        images: Where images are looked up.
        num_records: Good samples in the files, each counted once whatever its weight.
        num_dropped: Samples that were left out.
        num_system: Samples whose system turn is ignored.
        report: Lines that say what was left out or ignored.
    """

    def __init__(self, records: Records, order: np.ndarray, images: Images, problems: Sequence[Problem]):
        self._records, self._order, self.images = records, order, images
        self.num_words = records.num_words[order]
        self.has_image = records.has_image[order]
        self.num_records, self.num_dropped, self.num_system = len(records), len(problems), records.num_system
        examples = {problem.kind: problem for problem in reversed(problems)}
        self.report = [
            f"samples left out for {kind}: {count:,}, the first is {examples[kind]}"
            for kind, count in Counter(problem.kind for problem in problems).items()
        ]
        if self.num_system:
            self.report.append(f"samples whose system turn is ignored, as LLaVA-1.5 does: {self.num_system:,}")

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._records.sample(int(self._order[index]))

    def __iter__(self) -> Iterator[Sample]:
        return (self._records.sample(int(index)) for index in self._order)

    def open_image(self, sample: Sample, name: str) -> Image.Image:
        """An image of a sample as RGB: the first frame, not turned as its EXIF tag says; LLaVA does the same.

        Args:
            sample: For messages.
            name: One of its `images`.

        Raises:
            UserError: The image is missing or damaged.
        """
        try:
            return self.images.open(name)
        except Refused as error:
            problem = Problem(error.kind, sample.where, sample.id, error.text)
            raise UserError(f"{problem}; leave such samples out with `{VALIDATE} --drop-missing CLEAN.json`") from None

    def fingerprint(self) -> str:
        """SHA-256 over all records in their order; moving or renaming files does not change it."""
        digest = hashlib.sha256()
        for index in range(len(self._records)):
            digest.update(self._records.serialised(index) + b"\n")
        digest.update(self._order.astype("<i8").tobytes())
        return digest.hexdigest()


def load_instructions(
    data: str | Sequence[str], images: str | Sequence[str] | None, *, drop_missing: bool = False
) -> Instructions:
    """Reads instruction data, checks every record and that every image is there; decodes no image.

    Args:
        data: `PATH` or `PATH@WEIGHT`, or several. PATH is LLaVA's JSON (one array), JSON Lines, or WebDataset tars,
            with globs and braces. WEIGHT says how often its samples are seen in an epoch: 2 is twice, 0.5 a fixed half.
            A tar holds `key.jpg` (png, webp, jpeg, gif) and `key.json` with conversations or `key.txt` with a caption.
        images: Folders and tars in which image names are looked up, in this order. Members of a tar are called
            `MEMBER`, `TAR/MEMBER`, or by their base name if only one has it. None if there are no images, or the data
            are tars that hold them.
        drop_missing: Leave out and count samples whose record is damaged or whose image is not there.

    Raises:
        UserError: A file is missing or unreadable, a sample is wrong and `drop_missing` is not set, or none is left.
    """
    instructions, problems = read_instructions(data, images)
    if problems and not drop_missing:
        total = instructions.num_records + len(problems)
        raise UserError(
            f"{problems[0]}; {len(problems):,} of {total:,} samples have problems, list them with `{VALIDATE}`, or "
            "leave them out with drop_missing=true"
        )
    if not len(instructions):
        reason = f": {problems[0]} ({len(problems):,} of {len(problems):,} samples have problems)" if problems else ""
        raise UserError(f"data {data!r} holds no sample to train on{reason}")
    if rank() == 0:
        for line in instructions.report:
            logger.warning(line)
    return instructions


def read_instructions(
    data: str | Sequence[str], images: str | Sequence[str] | None
) -> tuple[Instructions, list[Problem]]:
    """As `load_instructions`, but gives the good samples together with what is wrong with the others.

    Raises:
        UserError: A file is missing, or cannot be read as a whole.
    """
    specs = [data] if isinstance(data, str) else list(data)
    if not specs or not all(specs):
        raise UserError("data is not set; give LLaVA JSON or JSONL files or WebDataset tars")
    sources = [(expand(path, "data"), weight) for path, weight in map(split_weight, specs)]
    found = Images([images] if isinstance(images, str) else images or ())
    records, problems = Records(), []
    order = []
    for paths, weight in sources:
        first = len(records)
        for path in paths:
            problems += _add_file(path, records, found)
        order.append(_weighted(np.arange(first, len(records)), weight))
    records.finish()
    found.finish()
    return Instructions(records, np.concatenate(order), found, problems), problems


def _add_file(path: str, records: Records, images: Images) -> list[Problem]:
    """Adds the good records of a file; those of a tar bring their images along."""
    is_tar = path.endswith(".tar")
    form, items = read_records(path, images.own)
    records.add_source(path, form)
    problems = []
    for place, record in items:
        where = path + form.format(place)
        try:
            names, texts, has_system = check_record(record)
            if not is_tar:
                if names and not images.roots:
                    raise UserError(f"{where} names image {names[0]!r}, but images is not set; give its folder or tars")
                for name in names:
                    images.locate(name, listed=True)
            records.add(record_id(record), names, texts, place)
            records.num_system += has_system
        except Refused as error:
            problems.append(Problem(error.kind, where, record_id(record), error.text))
    return problems


def _weighted(indices: np.ndarray, weight: float) -> np.ndarray:
    """The indices as often as the weight says; its fraction is a choice that depends on nothing but their number."""
    whole, fraction = divmod(weight, 1)
    chosen = np.random.default_rng(0).permutation(len(indices))[: round(fraction * len(indices))]
    return np.concatenate([*[indices] * int(whole), indices[np.sort(chosen)]])


class Records:
    """Checked records, serialised: id, key in a tar, number of images, their names, texts; with NUL in between."""

    def __init__(self) -> None:
        self.num_words: Any = array("q")
        self.has_image: Any = array("b")
        self.num_system = 0
        self._sources: list[tuple[str, str]] = []  # path, and how a place in it is written
        self._places: Any = array("q")  # source and number of each record
        self._ends: Any = array("q", [0])
        self._content: Any = io.BytesIO()

    def __len__(self) -> int:
        return len(self.num_words)

    def add_source(self, path: str, form: str) -> None:
        """Says where the following records come from."""
        self._sources.append((path, form))

    def add(self, id: str, names: list[str], texts: list[str], place: int | str) -> None:
        """Appends a record.

        Raises:
            Refused: It cannot be stored as text.
        """
        key, number = (place, 0) if isinstance(place, str) else ("", place)
        fields = (id, key, str(len(names)), *names, *texts)
        content = "\0".join(fields)
        if content.count("\0") != len(fields) - 1:
            raise Refused("text", "holds a NUL character, which no text has")
        try:
            self._content.write(content.encode())
        except UnicodeEncodeError:
            raise Refused("text", "holds half a character (a lone surrogate), which no tokenizer takes") from None
        self._ends.append(self._content.tell())
        self._places.extend((len(self._sources) - 1, number))
        self.num_words.append(max(len(" ".join(texts).split()), 1))
        self.has_image.append(bool(names))

    def finish(self) -> None:
        """Ends the appending: one `bytes` object and arrays are left."""
        self._content = self._content.getvalue()
        self._ends = np.array(self._ends, dtype=np.int64)
        self._places = np.array(self._places, dtype=np.int64).reshape(-1, 2)
        self.num_words = np.array(self.num_words, dtype=np.int64)
        self.has_image = np.array(self.has_image, dtype=bool)

    def serialised(self, index: int) -> bytes:
        """A record as it is stored, without the file that it came from."""
        return self._content[self._ends[index] : self._ends[index + 1]]

    def sample(self, index: int) -> Sample:
        """A record as a sample."""
        id, key, num_images, *fields = self.serialised(index).decode().split("\0")
        names, texts = fields[: int(num_images)], fields[int(num_images) :]
        source, number = self._places[index].tolist()
        path, form = self._sources[source]
        where = path + form.format(key or number)
        turns = tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
        return Sample(id or where, turns, tuple(f"{path}/{name}" if key else name for name in names), where)


# ---- records and what is asked of them


def record_id(record: object) -> str:
    """The id as text, "" if there is none."""
    id = record.get("id") if isinstance(record, dict) else None
    return "" if id is None else str(id)


def check_record(record: object) -> tuple[list[str], list[str], bool]:
    """Takes a record of LLaVA apart.

    Returns:
        Image names, texts of the turns, and whether a system turn was skipped.

    Raises:
        Refused: Something is wrong with it.
    """
    if isinstance(record, Refused):
        raise record
    if not isinstance(record, dict):
        raise Refused("record", f"is {type(record).__name__}, expected an object with conversations")
    image = record.get("image")
    names = image if isinstance(image, list) else [] if image is None else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise Refused("image field", f"has image {image!r}, expected a file name or a list of file names")
    texts, has_system = _check_turns(record.get("conversations"))
    num_marks = " ".join(texts).count(IMAGE_TOKEN)
    if num_marks != len(names):
        raise Refused("image marks", f"names {len(names)} image(s), but its turns have {num_marks} {IMAGE_TOKEN} marks")
    if num_marks and IMAGE_TOKEN in " ".join(texts[1::2]):
        raise Refused("image marks", f"has {IMAGE_TOKEN} in an answer, expected it in the turns of human only")
    return names, texts, has_system


def _check_turns(turns: object) -> tuple[list[str], bool]:
    if not isinstance(turns, list) or not turns:
        raise Refused("conversations", "has no conversations, expected a list of turns from human and gpt")
    texts: list[str] = []
    has_system = False
    for number, turn in enumerate(turns):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            raise Refused("conversations", f'turn {number} is not {{"from": ROLE, "value": TEXT}}')
        if role == "system" and number == 0:
            has_system = True
            continue
        if role not in _ROLES:
            raise Refused("roles", f"turn {number} is from {role!r}, expected human or gpt (or user and assistant)")
        if not texts and _ROLES[role] != "user":
            raise Refused("order", f"begins with {role}, expected human; LLaVA would skip this turn silently")
        if _ROLES[role] != ("assistant" if len(texts) % 2 else "user"):
            raise Refused("order", f"turn {number} is from {role} as the one before, expected them to alternate")
        if not text or text.isspace():
            raise Refused("empty turn", f"turn {number} is empty")
        texts.append(text)
    if len(texts) % 2 or not texts:
        raise Refused("order", f"ends with {turns[-1]['from']}, expected an answer of gpt")
    return texts, has_system


# ---- files


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
    for text in _expand_braces(os.path.expanduser(pattern)):
        matches = [text] if os.path.exists(text) else sorted(glob.glob(text, recursive=True))
        if not matches:
            named = "" if text == pattern else f" names {text}, which"
            raise UserError(f"{setting} {pattern!r}{named} does not exist (looked from {os.getcwd()})")
        found.update(dict.fromkeys(matches))
    return list(found)


def _expand_braces(pattern: str) -> list[str]:
    match = None if os.path.exists(pattern) else re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    parts = words.split(",") if words else [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    if not parts:
        raise UserError(f"{pattern}: the range {first}..{last} runs backwards")
    return [pattern[: match.start()] + part + tail for part in parts for tail in _expand_braces(pattern[match.end() :])]


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
        return ":{}", _read_tar(path, members or TarIndex())
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


def _read_tar(path: str, index: TarIndex) -> Items:
    """Records of a WebDataset tar; members that share a key need not be neighbours."""
    images: dict[str, list[str]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    index.paths.append(path)
    for member, content in read_members(path, (".json", ".txt")):
        folder, _, base = posixpath.normpath(member.name).rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not stem:
            continue
        if extension.lower() in IMAGE_EXTENSIONS:
            name = posixpath.normpath(member.name)
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


# ---- images


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


def main(argv: list[str] | None = None) -> int:
    """`python -m stage2_llava.instructions validate ...`; returns its exit code."""
    from stage2_llava.validate import main as validate

    return validate(argv)


if __name__ == "__main__":
    sys.exit(main())
