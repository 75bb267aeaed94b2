"""Every layout yields the same images, classes and prompts; what is missing or does not fit is named."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.labelled import LabelledSet, read_labelled_set
from dcr_mllm.evaluation.labelled_sources import CLASS_NAMES, TEMPLATES, class_prompts, read_named_set
from tests.dcr_mllm.evaluation import layouts


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, write_labelled) -> LabelledSet:
    return read_labelled_set(write_labelled(tmp_path_factory.mktemp("labelled"), 20, 12))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


WRITERS = {
    "folders": layouts.write_folders,
    "tars": layouts.write_tars,
    "saved": lambda directory, labelled: layouts.write_datasets(directory, labelled, parquet=False),
    "parquet": lambda directory, labelled: layouts.write_datasets(directory, labelled, parquet=True),
}


def contents(split, names: list[str]) -> list[tuple[bytes, str]]:
    """Pixels and class name of each image, in an order of their own."""
    found = []
    for picture, value in zip(split.files, split.classes, strict=True):
        with Image.open(io.BytesIO(picture.read_bytes())) as image:
            found.append((np.asarray(image).tobytes(), names[int(value)] if value.isdigit() else value))
    return sorted(found)


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_has_the_same_images_and_prompts(layout: str, labelled: LabelledSet, tmp_path: Path):
    directory = WRITERS[layout](tmp_path / "set", labelled)
    layouts.write_names(directory, labelled)
    found = read_named_set(directory)
    names = sorted(labelled.prompts)
    for split in ("train", "test"):
        assert contents(getattr(found.labelled, split), names) == contents(getattr(labelled, split), names)
    assert list(found.labelled.prompts.values()) == [labelled.prompts[name] for name in names]
    assert found.prompts_from == f"4 names: {CLASS_NAMES}; 2 templates: {TEMPLATES}"
    only = read_named_set(directory, ("test",), prompts=False)
    assert len(only.labelled.train) == 0 and len(only.labelled.test) == 12 and only.prompts_from is None
    assert list(only.labelled.prompts) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("layout", ["folders", "saved"])
def test_names_without_files_are_the_sets_own(layout: str, labelled: LabelledSet, tmp_path: Path):
    found = read_named_set(WRITERS[layout](tmp_path / "set", labelled), ("test",))
    assert found.prompts_from == "4 names: the set's own names; 7 templates: open_clip"
    prompts = list(found.labelled.prompts.values())
    assert (
        prompts[0][0] == "itap of a blue." and prompts[3][-1] == "a photo of the small white." and len(prompts[0]) == 7
    )


def test_labelled_layout_may_lack_the_split_that_is_not_measured(tmp_path: Path, write_labelled):
    directory = write_labelled(tmp_path, 1, 8)
    table = (directory / "labels.csv").read_text().replace(",train,", ",test,")
    (directory / "labels.csv").write_text(table)
    assert len(read_named_set(directory, ("test",)).labelled.test) == 9
    with pytest.raises(UserError, match="no rows of the split 'train'"):
        read_named_set(directory)


def test_test_folder_goes_before_val_and_numbers_are_sorted_as_numbers(labelled: LabelledSet, tmp_path: Path):
    picture = labelled.test.files[0].read_bytes()
    for number in range(12):
        for split, copies in (("test", number == 11), ("val", 1)):
            folder = tmp_path / split / str(number)
            folder.mkdir(parents=True)
            for copy in range(copies):
                (folder / f"{copy}.png").write_bytes(picture)
    (tmp_path / CLASS_NAMES).write_text("\n".join(f"name {number}" for number in range(12)))
    found = read_named_set(tmp_path, ("test",)).labelled
    assert list(found.test.classes) == ["11"]
    assert found.prompts["11"][0] == "itap of a name 11."


def test_imagenet_is_known_by_wnids_numbers_and_words(tmp_path: Path):
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    for classes in (info.label_names(), [str(number) for number in range(1000)], info.label_descriptions()):
        prompts, source = class_prompts(tmp_path, classes)
        assert source == "1000 names: open_clip's ImageNet names; 80 templates: open_clip"
        assert [lines[0] for lines in prompts] == [OPENAI_IMAGENET_TEMPLATES[0](name) for name in IMAGENET_CLASSNAMES]
        assert len(prompts[0]) == 80
    some = [info.label_names()[index] for index in (1, 600)]  # as ImageNet-R has two hundred of them
    assert [lines[0] for lines in class_prompts(tmp_path, some)[0]] == [
        f"a bad photo of a {IMAGENET_CLASSNAMES[index]}." for index in (1, 600)
    ]
    others = ["n99999999", "n01440764"]
    assert "own names" in class_prompts(tmp_path, others)[1]


def _cut(directory: Path) -> None:
    tar = directory / "test" / "1.tar"
    tar.write_bytes(tar.read_bytes()[:700])


def _bad_label(directory: Path) -> None:
    layouts.write_tar(directory / "test" / "1.tar", [{"cls": b"red", "png": b"x"}])


def _no_label(directory: Path) -> None:
    layouts.write_tar(directory / "test" / "1.tar", [{"png": b"x"}])


def _large_label(directory: Path) -> None:
    layouts.write_tar(directory / "test" / "1.tar", [{"cls": b"7", "png": b"x"}])


@pytest.mark.parametrize(
    ("layout", "damage", "message"),
    [
        ("folders", lambda d: shutil.rmtree(d / "val"), "has no test images"),
        ("folders", lambda d: (d / "train" / "red").rename(d / "train" / "pink"), "in their classes, the first: pink"),
        ("folders", lambda d: (d / CLASS_NAMES).write_text("a\nb\n"), "has 2 lines, but there are 4 classes"),
        ("folders", lambda d: (d / TEMPLATES).write_text("a photo\n"), "template 'a photo'"),
        ("tars", lambda d: (d / CLASS_NAMES).unlink(), "has numbers for classes"),
        ("tars", _cut, "1.tar cannot be read"),
        ("tars", _bad_label, "s0000000.png: its .cls holds no number"),
        ("tars", _no_label, "1 samples lack their image or their .cls, the first: /s0000000"),
        ("tars", _large_label, "there are 8 classes"),
        ("saved", lambda d: shutil.rmtree(d / "test"), "cannot be read as a datasets directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(layout: str, damage, message: str, labelled: LabelledSet, tmp_path: Path):
    directory = WRITERS[layout](tmp_path / "set", labelled)
    layouts.write_names(directory, labelled)
    damage(directory)
    with pytest.raises(UserError, match=message):
        read_named_set(directory)


def test_datasets_without_known_labels_or_with_strange_columns(tmp_path: Path):
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, format="PNG")
    rows = {"image": [{"bytes": picture.getvalue(), "path": None}] * 2, "label": [-1, -1]}
    withheld = datasets.Dataset.from_dict(rows, features=kinds)
    known = datasets.Dataset.from_dict({**rows, "label": [1, 0]}, features=kinds)
    datasets.DatasetDict({"test": withheld, "validation": known}).save_to_disk(str(tmp_path / "both"))
    assert list(read_named_set(tmp_path / "both", ("test",)).labelled.test.classes) == ["1", "0"]
    withheld.save_to_disk(str(tmp_path / "withheld"))
    with pytest.raises(UserError, match="splits test, none of which is test or val or validation with labels"):
        read_named_set(tmp_path / "withheld", ("test",))
    datasets.Dataset.from_dict({"image": [1], "label": [0]}).save_to_disk(str(tmp_path / "odd"))
    with pytest.raises(UserError, match="0 are of type ClassLabel; name the one to use 'label'"):
        read_named_set(tmp_path / "odd", ("test",))


def test_copies_of_one_name_are_not_one_set(tmp_path: Path):
    """`zero_shot/cifar10` and `linear_probe/cifar10`: `datasets` caches folders by their last name."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    for number, place in enumerate(("a", "b")):
        folder = tmp_path / place / "pets"
        (folder / "data").mkdir(parents=True)
        rows = [{"image": {"bytes": b"x", "path": None}, "label": label} for label in (0, number, 1)]
        Dataset.from_list(rows, features=features).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test-*\n---\n"
        )
    found = [read_named_set(tmp_path / place / "pets", ("test",)).labelled.test.classes.tolist() for place in "ab"]
    assert found == [["0", "0", "1"], ["0", "1", "1"]]
