"""The rows of an MLLM benchmark: drawn, in the public file layout, or as a copy of its hub repository.

Rows and images are an Arrow table that is read from disk as it is needed; of images in files it holds the paths.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.local_datasets import load_parquet, split_files
from dcr_mllm.evaluation.mllm_tasks import TASKS, MllmTask, Row
from dcr_mllm.evaluation.pillow import strict
from dcr_mllm.evaluation.scored import Scored
from dcr_mllm.evaluation.scorers import MMVP_DISPUTED, POPE_CATEGORIES, SCORERS, Item, score_mmvp

MINI, HUB = "mini", "hub"
_MMVP_ROWS = TASKS["mmvp"].size


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A benchmark's rows.

    Attributes:
        task: Of `TASKS`.
        name: In results; begins with `mini-` for the drawn one.
        table: `datasets.Dataset` with the images undecoded, and without the rows of `undecodable`.
        rows: All rows without their images, `image_digest` in their place.
        undecodable: By row, what is wrong with its image: such rows are not asked and count as wrong.
        notes: What a reader of the scores has to know about the data.
        files: Parquet files that hold exactly `table`; None: it has to be written before lmms-eval can read it.
        score: The benchmark's scorer.
    """

    task: str
    name: str
    table: Any
    rows: list[Row]
    undecodable: dict[int, str]
    notes: list[str]
    files: list[str] | None
    score: Callable[[Sequence[Item]], Scored]

    @functools.cached_property
    def asked(self) -> list[int]:
        """Positions of the rows that are asked."""
        return [k for k in range(len(self.rows)) if k not in self.undecodable]

    def items(self, answers: Sequence[str]) -> list[Item]:
        """What the scorer needs, of every row, from the answers to the rows that were asked."""
        spec, found = TASKS[self.task], dict(zip(self.asked, answers, strict=True))
        items = [spec.item(row, found.get(k, spec.wrong(row))) for k, row in enumerate(self.rows)]
        return [{**item, "undecodable": True} if k in self.undecodable else item for k, item in enumerate(items)]

    def image(self, position: int) -> bytes:
        """The file of a row's image; `position` is one of `asked`."""
        return _content(self.table[self.asked.index(position)][TASKS[self.task].image])

    def digest(self) -> str:
        """A hash of all rows and images: equal data, equal digest."""
        text = json.dumps(self.rows, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def load_task(name: str, data: str, runs_dir: Path, limit: int | None = None) -> TaskData:
    """Read one benchmark and look at every image of it.

    Args:
        name: Of `TASKS`.
        data: `mini`, `hub` (what is in the hub cache), or a folder with `<name>/`, a copy of the hub repository or,
            for mmvp and pope, the public files.
        runs_dir: Where drawn data are kept.
        limit: Only so many of the first rows; whole units are kept.

    Raises:
        UserError: The data are not there or not complete; says what is expected where.
    """
    spec, score = TASKS[name], SCORERS[name].score
    if data == MINI:
        from dcr_mllm.mini.data import write_benchmarks

        if name not in PUBLIC_LAYOUTS:
            raise UserError(f"there is no drawn {name}; with --data mini ask {', '.join(PUBLIC_LAYOUTS)}")
        table, files = _public(name, write_benchmarks(runs_dir / "mini-data" / "test") / name), None
    else:
        directory = _from_cache(name) if data == HUB else Path(data) / name
        if not directory.is_dir():
            raise UserError(f"{data} has no folder {name}/; {_wanted(name)}")
        if name in PUBLIC_LAYOUTS and (directory / PUBLIC_LAYOUTS[name].sign).is_file():
            table, files = _public(name, directory), None
        else:
            table, files = _hub_copy(name, directory)
    if not len(table):
        raise UserError(f"{name}: there are no questions in {data}")
    notes = []
    if data != MINI and len(table) != spec.size:
        notes.append(f"{len(table)} questions, where the published benchmark has {spec.size}: not the whole of it")
        print(f"{name}: {notes[0]}")
    swapped = name == "mmvp" and _has_swapped_labels(table)
    if name == "mmvp" and len(table) != _MMVP_ROWS:
        score = partial(score_mmvp, disputed=())
    if limit is not None and limit < len(table):
        kept = max(spec.unit_size, limit - limit % spec.unit_size)
        said = f", whole {spec.unit_name}s" if kept != limit else ""
        print(f"{name}: {kept} of {len(table)} questions{said}")
        table, files = table.select(range(kept)), None
    found = _look_at_images(table, spec)
    rows = [
        {**row, "image_digest": digest}
        for row, (digest, _) in zip(table.remove_columns(spec.image).to_list(), found, strict=True)
    ]
    undecodable = {k: problem for k, (_, problem) in enumerate(found) if problem}
    if undecodable:
        first = ", ".join(f"row {k} ({problem})" for k, problem in list(undecodable.items())[:3])
        print(f"{name}: {len(undecodable)} images cannot be decoded and count as wrong, the first: {first}")
        table, files = table.select([k for k in range(len(rows)) if k not in undecodable]), None
        if not len(table):
            raise UserError(f"{name}: none of the images in {data} can be decoded")
    if swapped:
        rows = [{**row, "Correct Answer": MMVP_DISPUTED.get(int(row["Index"]), row["Correct Answer"])} for row in rows]
    label = f"mini-{name}" if data == MINI else name
    return TaskData(
        task=name, name=label, table=table, rows=rows, undecodable=undecodable, notes=notes, files=files, score=score
    )


def _wanted(name: str) -> str:
    spec = TASKS[name]
    command = f"hf download {spec.repository} --repo-type dataset --local-dir DIR/{name}"
    files = f", or put its public files there ({PUBLIC_LAYOUTS[name].files})" if name in PUBLIC_LAYOUTS else ""
    return f"get it with `{command}` and give --data DIR{files}"


def _from_cache(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository = TASKS[name].repository
    try:
        return Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name}: {repository} is not in the hub cache; get it with `hf download {repository} --repo-type "
            f"dataset`, or give --data DIR with a copy of it in DIR/{name}/"
        ) from None


def _hub_copy(name: str, directory: Path) -> tuple[Any, list[str]]:
    """The split of a copy of the hub repository, and the files that it is in."""
    from datasets import Image

    spec = TASKS[name]
    try:
        files = split_files(directory, spec.config).get(spec.split, [])
        _check_shards(name, files)
        table = load_parquet(directory, {spec.split: files}, spec.config)[spec.split] if files else None
    except UserError:
        raise
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: {directory} cannot be read ({reason}); {_wanted(name)}") from None
    if table is None:
        raise UserError(f"{name}: {directory} has no split {spec.split}; {_wanted(name)}")
    absent = [column for column in (*spec.columns, spec.image) if column not in table.column_names]
    if absent:
        raise UserError(
            f"{name}: {directory} has no column {', '.join(absent[:3])} but {', '.join(table.column_names)}; "
            f"{_wanted(name)}"
        )
    return table.cast_column(spec.image, Image(decode=False)), files


def _check_shards(name: str, files: Sequence[str]) -> None:
    """Refuse a copy of which a part is missing, as an interrupted download leaves it."""
    for file in files:
        match = re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.parquet", Path(file).name)
        if match and sum(Path(other).name.startswith(f"{match[1]}-") for other in files) < int(match[3]):
            raise UserError(
                f"{name}: {Path(file).parent} has not all {int(match[3])} parts of {match[1]}; {_wanted(name)}"
            )


def _public(name: str, directory: Path) -> Any:
    """A table of public files; images stay where they are."""
    from datasets import Dataset, Image

    rows = PUBLIC_LAYOUTS[name].rows(directory)
    return Dataset.from_list(rows).cast_column(TASKS[name].image, Image(decode=False))


def _look_at_images(table: Any, spec: MllmTask) -> list[tuple[str, str | None]]:
    """Per row the hash of its image's file and, if it cannot be decoded, why; every image is decoded once."""
    seen: dict[str, str | None] = {}
    by_path: dict[str, str] = {}
    images = table.select_columns(spec.image)

    def look(position: int) -> tuple[str, str | None]:
        entry = images[position][spec.image]
        if entry is None:
            return "", "no image"
        path = None if entry["bytes"] is not None else entry["path"]
        if path is None or path not in by_path:
            content = _content(entry)
            digest = hashlib.sha256(content).hexdigest()
            if digest not in seen:
                seen[digest] = _problem(content)
            if path is None:
                return digest, seen[digest]
            by_path[path] = digest
        return by_path[path], seen[by_path[path]]

    with strict(), ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        return list(pool.map(look, range(len(images))))


def _content(entry: dict[str, Any]) -> bytes:
    return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()


def _problem(content: bytes) -> str | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except UnidentifiedImageError:
        return "no image that Pillow knows"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error)
    return None


def _has_swapped_labels(table: Any) -> bool:
    """Whether this is the copy of MMVP in which lmms-eval's authors swapped four labels."""
    labels = dict(zip(map(int, table["Index"]), table["Correct Answer"], strict=True))
    other = {"(a)": "(b)", "(b)": "(a)"}
    return len(table) == _MMVP_ROWS and all(labels.get(k) == other[label] for k, label in MMVP_DISPUTED.items())


def mmvp_rows(directory: Path) -> list[Row]:
    """Rows of MMVP's public layout: `Questions.csv` (Index or lndex, ...) and `MMVP Images/<Index>.jpg`.

    Raises:
        UserError: A missing column or image, the first three named.
    """
    questions = directory / "Questions.csv"
    with questions.open(newline="", encoding="utf-8-sig") as file:
        records = list(csv.DictReader(file))
    rows, missing = [], []
    for number, record in enumerate(records, start=2):
        known = {"Index" if key in ("Index", "lndex") else key: value for key, value in record.items()}
        absent = {"Index", "Question", "Options", "Correct Answer"} - set(known)
        if absent:
            raise UserError(f"mmvp: {questions} line {number} has no column {', '.join(sorted(absent))}")
        image = directory / "MMVP Images" / f"{known['Index']}.jpg"
        missing += [] if image.is_file() else [str(image)]
        rows.append({**known, "Index": int(known["Index"]), "image": str(image)})
    if missing:
        raise UserError(f"mmvp: {len(missing)} images are missing, the first: {', '.join(missing[:3])}")
    if not rows:
        raise UserError(f"mmvp: {questions} has no questions")
    return rows


def pope_rows(directory: Path) -> list[Row]:
    """Rows of POPE's public layout: `coco_pope_<category>.json`, a JSON object per line, and the images in `val2014/`.

    Raises:
        UserError: A missing file, key or image, the first three named.
    """
    rows: list[Row] = []
    for category in POPE_CATEGORIES:
        path = directory / f"coco_pope_{category}.json"
        if not path.is_file():
            raise UserError(f"pope: {path} is missing; {directory} has to hold POPE's three JSON files and val2014/")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                name, question, label = (str(record[key]) for key in ("image", "text", "label"))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"pope: {path} line {number} is no question with image, text and label: {error}"
                ) from None
            rows.append(
                {
                    "id": str(len(rows)),
                    "question_id": str(record.get("question_id", number)),
                    "question": question,
                    "answer": label,
                    "image_source": Path(name).stem,
                    "category": category,
                    "image": str(directory / "val2014" / name),
                }
            )
    missing = [path for path in dict.fromkeys(row["image"] for row in rows) if not Path(path).is_file()]
    if missing:
        raise UserError(f"pope: {len(missing)} images are missing, the first: {', '.join(missing[:3])}")
    return rows


@dataclass(frozen=True, kw_only=True)
class PublicLayout:
    """The files that a benchmark's authors published: their names, the one that tells them, and how they are read."""

    files: str
    sign: str
    rows: Callable[[Path], list[Row]]


PUBLIC_LAYOUTS = {
    "mmvp": PublicLayout(files="Questions.csv and 'MMVP Images/'", sign="Questions.csv", rows=mmvp_rows),
    "pope": PublicLayout(
        files="coco_pope_random.json, _popular and _adversarial, and val2014/",
        sign="coco_pope_random.json",
        rows=pope_rows,
    ),
}
