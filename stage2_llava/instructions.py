"""Instruction data: LLaVA's JSON, JSON Lines or WebDataset tars, checked as a whole before anything is trained.

    python -m stage2_llava.instructions validate DATA... [--images ROOT ...]     (see `stage2_llava.validate`)

Records stay serialised in one `bytes` object and are parsed on access: hundreds of thousands of dicts would take
gigabytes, and every forked worker would copy them by counting references.
"""

from __future__ import annotations

import hashlib
import io
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dcr_mllm.conversation import IMAGE_TOKEN, Turn
from dcr_mllm.errors import UserError
from dcr_mllm.log import get_logger, rank
from stage2_llava.image_roots import Images
from stage2_llava.record_files import Refused, expand, read_records, split_weight

if TYPE_CHECKING:
    from PIL import Image

VALIDATE = "python -m stage2_llava.instructions validate DATA --images ROOT"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

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


def main(argv: list[str] | None = None) -> int:
    """`python -m stage2_llava.instructions validate ...`; returns its exit code."""
    from stage2_llava.validate import main as validate

    return validate(argv)


if __name__ == "__main__":
    sys.exit(main())
