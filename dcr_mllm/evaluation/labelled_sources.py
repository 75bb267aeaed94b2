"""Image sets with one class per image in the layouts that people have them in, all as a `LabelledSet`.

- `labels.csv` and `classes.json`, see `labelled`;
- folders as torchvision's `ImageFolder` reads them, `{train,test|val}/<class>/*.jpg`;
- WebDataset tars as CLIP_benchmark publishes them, `{train,test}/*.tar`;
- a `datasets` directory: of `save_to_disk`, or a copy of a hub repository with Parquet files.

The last three may bring `classnames.txt` (a line per class) and `zeroshot_classification_templates.txt` (with `{c}` or
`{}` for the class). Images are read when they are needed; here they are only found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.labelled import SPLITS, LabelledSet, Split, read_labelled_set
from dcr_mllm.evaluation.local_datasets import load_parquet, split_files
from dcr_mllm.evaluation.tar_images import tar_samples, tars_in

if TYPE_CHECKING:
    from dcr_mllm.evaluation.features import Picture

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}
_NUM_IMAGENET = 1000


class NamedSet(NamedTuple):
    """A labelled set and where the words of its prompts are from; empty prompts and None if none were asked for."""

    labelled: LabelledSet
    prompts_from: str | None


class Pictures(NamedTuple):
    """One split as its layout has it: N pictures and their classes [N], indices into `classes`."""

    pictures: Sequence[Picture]
    labels: np.ndarray
    classes: list[str]


def read_named_set(directory: str | Path, needed: Sequence[str] = SPLITS, *, prompts: bool = True) -> NamedSet:
    """Read a labelled image set in any of the layouts.

    Args:
        directory: Of the set.
        needed: Which of train and test are read; the other one stays empty.
        prompts: Whether classes have to be put into words.

    Raises:
        UserError: The layout is none of these, a split or file is missing, or names and classes do not fit.
    """
    directory = Path(directory).resolve()  # a set that two tasks link to is one set
    if (directory / "labels.csv").is_file():
        return NamedSet(read_labelled_set(directory, needed), "classes.json")
    found = {split: _read_split(directory, split) for split in needed}
    classes = found[needed[0]].classes
    for split, pictures in found.items():
        if pictures.classes != classes:
            odd = sorted(set(pictures.classes) ^ set(classes)) or ["their order"]
            raise UserError(f"{directory}: {needed[0]} and {split} differ in their classes, the first: {odd[0]}")
        if not len(pictures.labels):
            raise UserError(f"{directory} has no images for {split}")
    # Only tars do not say how many classes there are.
    count = 1 + max(int(pictures.labels.max()) for pictures in found.values())
    classes = classes or [str(number) for number in range(count)]
    texts, prompts_from = class_prompts(directory, classes) if prompts else ([[]] * len(classes), None)
    splits = {split: _split(found.get(split)) for split in SPLITS}
    named = {str(number): list(lines) for number, lines in enumerate(texts)}
    return NamedSet(LabelledSet(train=splits["train"], test=splits["test"], prompts=named), prompts_from)


def _split(found: Pictures | None) -> Split:
    if found is None:
        return Split(files=[], classes=np.array([], dtype=str), attributes={})
    return Split(files=found.pictures, classes=found.labels.astype(str), attributes={})


def _read_split(directory: Path, split: str) -> Pictures:
    """One split, by whichever layout has it."""
    if any((directory / name).is_file() for name in ("dataset_dict.json", "state.json")) or _parquets(directory):
        return _datasets_split(directory, split)
    for name in _FOLDERS[split]:
        if tars_in(directory / name):
            return _tar_split(directory / name)
        if any(path.is_dir() for path in (directory / name).glob("*")):
            return _folder_split(directory / name)
    folders = "/ or ".join(_FOLDERS[split])
    raise UserError(
        f"{directory} has no {split} images: neither labels.csv, nor {folders}/ with a folder per class or with tars, "
        "nor a datasets directory with Parquet or Arrow files"
    )


def _folder_split(folder: Path) -> Pictures:
    """Folders per class: sorted, by number where all of them are numbers."""
    from torchvision.datasets import ImageFolder

    found = ImageFolder(str(folder), allow_empty=True)
    names = sorted(found.classes, key=int) if all(name.isdigit() for name in found.classes) else found.classes
    position = np.array([names.index(name) for name in found.classes])
    labels = position[np.array(found.targets, dtype=int)] if found.targets else np.array([], dtype=int)
    return Pictures([Path(path) for path, _ in found.samples], labels, list(names))


def _tar_split(folder: Path) -> Pictures:
    samples = list(tar_samples(folder, "cls"))
    wrong = [str(picture) for picture, label in samples if not label.isdigit()]
    if wrong:
        raise UserError(f"{wrong[0]}: its .cls holds no number of a class")
    return Pictures([picture for picture, _ in samples], np.array([int(label) for _, label in samples]), [])


@dataclass(frozen=True)
class RowPicture:
    """An encoded image in a row of a `datasets` table, whose image column is not decoded."""

    table: Any
    row: int
    place: str

    def __str__(self) -> str:
        return f"{self.place}[{self.row}]"

    def read_bytes(self) -> bytes:
        """Its bytes."""
        stored = next(iter(self.table[self.row].values()))
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()


def _parquets(directory: Path) -> bool:
    return any(directory.glob("*.parquet")) or any(directory.glob("*/*.parquet"))


def _datasets_split(directory: Path, split: str) -> Pictures:
    import datasets

    try:
        if _parquets(directory):
            stored = load_parquet(directory, split_files(directory))
        else:
            stored = datasets.load_from_disk(str(directory))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{directory} cannot be read as a datasets directory ({reason}); save or copy it again"
        ) from None
    if not isinstance(stored, datasets.DatasetDict):
        stored = {"test": stored}
    for name in _FOLDERS[split]:
        if name not in stored:
            continue
        table = stored[name]
        label = _column(directory, table.features, datasets.ClassLabel, ("label", "fine_label"))
        image = _column(directory, table.features, datasets.Image, ("image", "img"))
        labels = np.array(table[label][:], dtype=int)
        if (labels < 0).all():  # the test labels of some hub copies are withheld
            continue
        if (labels < 0).any():
            raise UserError(f"{directory}: {(labels < 0).sum()} of {len(labels)} images of {name} have no {label}")
        undecoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        place = f"{directory}/{name}"
        pictures = [RowPicture(undecoded, row, place) for row in range(len(labels))]
        return Pictures(pictures, labels, list(table.features[label].names))
    raise UserError(
        f"{directory} has the splits {', '.join(stored)}, none of which is {' or '.join(_FOLDERS[split])} with labels"
    )


def _column(directory: Path, features: Any, kind: type, preferred: Sequence[str]) -> str:
    """The column of a kind: one of the usual names, else the only one."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    for name in preferred:
        if name in names:
            return name
    if len(names) != 1:
        raise UserError(
            f"{directory} has the columns {', '.join(features)}, of which {len(names)} are of type {kind.__name__}; "
            f"name the one to use '{preferred[0]}'"
        )
    return names[0]


def class_prompts(directory: Path, classes: Sequence[str]) -> tuple[list[list[str]], str]:
    """Prompts for every class [K][T], and where their words are from.

    The set's own files come first, then open_clip's names and templates for ImageNet, then the classes' own names in
    open_clip's seven templates.

    Args:
        directory: May hold `classnames.txt` and `zeroshot_classification_templates.txt`.
        classes: K names as folders or labels have them.
    """
    names = _lines(directory / CLASS_NAMES)
    templates = [line.replace("{c}", "{}") for line in _lines(directory / TEMPLATES)]
    bad = next((line for line in templates if "{}" not in line), None)
    if bad is not None:
        raise UserError(f"{directory / TEMPLATES} has the template {bad!r}, which has no {{c}} for the class")
    numbered = list(classes) == [str(number) for number in range(len(classes))]
    if names and len(names) != len(classes) and not (numbered and len(names) > len(classes)):
        raise UserError(f"{directory / CLASS_NAMES} has {len(names)} lines, but there are {len(classes)} classes")
    names_from, templates_from = CLASS_NAMES, TEMPLATES
    known = [] if names and templates else _imagenet_positions(classes)
    if not names and not known and all(name.isdigit() for name in classes):
        raise UserError(f"{directory} has numbers for classes; name them in {CLASS_NAMES}, a line for each")
    if not names:
        names, names_from = [name.replace("_", " ") for name in classes], "the set's own names"
        if known:
            from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

            names, names_from = [IMAGENET_CLASSNAMES[position] for position in known], "open_clip's ImageNet names"
    if len(names) < 2:
        raise UserError(f"{directory} has {len(names)} class, but there have to be at least 2")
    if not templates:
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        made = OPENAI_IMAGENET_TEMPLATES if known else SIMPLE_IMAGENET_TEMPLATES
        templates, templates_from = [template("{}") for template in made], "open_clip"
    prompts = [[template.replace("{}", name) for template in templates] for name in names]
    return prompts, f"{len(names)} names: {names_from}; {len(templates)} templates: {templates_from}"


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _imagenet_positions(classes: Sequence[str]) -> list[int]:
    """For classes that are ImageNet's, their positions among its thousand; empty for others.

    ImageNet's are told by wnids (all or some, as in ImageNet-R), by the numbers 0 to 999, or by WordNet's words as the
    hub's copy has them.
    """
    wnids = all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in classes)
    if not wnids and len(classes) != _NUM_IMAGENET:
        return []
    if all(name.isdigit() for name in classes):
        numbers = [int(name) for name in classes]
        return numbers if sorted(numbers) == list(range(_NUM_IMAGENET)) else []
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    if wnids:
        position = {wnid: number for number, wnid in enumerate(info.label_names())}
        return [position[name] for name in classes] if all(name in position for name in classes) else []
    same = sum(
        own.split(",")[0].lower() == words.split(",")[0].lower()
        for own, words in zip(classes, info.label_descriptions(), strict=True)
    )
    # Copies differ in the spelling of a few.
    return list(range(_NUM_IMAGENET)) if same > 0.95 * _NUM_IMAGENET else []
