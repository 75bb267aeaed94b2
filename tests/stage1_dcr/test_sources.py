"""All kinds of image data, and what happens when they are wrong or broken."""

from __future__ import annotations

import io
import logging
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from dcr_mllm.errors import UserError
from stage1_dcr import sources
from stage1_dcr.images import StreamPosition
from stage1_dcr.position import Cursor
from stage1_dcr.sources import expand_braces, fingerprint, open_source
from tests.stage1_dcr.image_data import (
    assert_same,
    encode,
    epoch_keys,
    keys_of,
    loader_of,
    take,
    write_folder,
    write_parquet,
    write_saved,
    write_tar,
    write_tars,
)


def make_source(kind: str, tmp_path: Path):
    if kind == "brace":
        write_tars(tmp_path / "b", [10, 10, 10])
        return f"{tmp_path}/b/{{00000..00002}}.tar"
    if kind == "tar directory":
        return str(Path(write_tars(tmp_path / "d", [10, 20])).parent)
    if kind == "url":
        return "file://" + write_tars(tmp_path / "u", [10, 20])
    if kind == "folder":
        return write_folder(tmp_path / "f", 30)
    if kind == "parquet":
        return str(write_parquet(tmp_path / "p.parquet", 30))
    if kind == "raw parquet folder":
        write_parquet(tmp_path / "q" / "a.parquet", 15, raw=True)
        return str(write_parquet(tmp_path / "q" / "b.parquet", 15, raw=True).parent)
    if kind == "saved dataset":
        return str(write_saved(tmp_path / "s", 30))
    assert kind == "list"
    return [
        write_tars(tmp_path / "l1", [10]),
        write_tars(tmp_path / "l2", [10]),
        str(write_folder(tmp_path / "l3", 10)),
    ]


KINDS = ["brace", "tar directory", "url", "folder", "parquet", "raw parquet folder", "saved dataset", "list"]


@pytest.mark.parametrize("kind", KINDS)
def test_sources(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_FILES_PER_SHARD", 7)
    monkeypatch.setattr(sources, "_ROWS_PER_SHARD", 7)
    data = make_source(kind, tmp_path)
    for world_size in (1, 2, 10):
        keys = epoch_keys(data, world_size=world_size, shuffle_buffer=4)
        assert len(keys) == 30 and len(set(keys)) == 30
    whole = take(loader_of(data, shuffle_buffer=4), 12)
    loader = loader_of(data, shuffle_buffer=4)
    take(loader, 5)
    assert_same(take(loader_of(data, shuffle_buffer=4, position=loader.position), 7), whole[5:])


def test_hub_dataset_is_streamed(tmp_path, monkeypatch):
    """The hub itself is out of reach of tests: a folder of Parquet files takes the same way through `datasets`."""
    for part in range(3):
        write_parquet(tmp_path / "hub" / f"train-{part}.parquet", 10)
    data = f"hf:{tmp_path / 'hub'}:train"
    source = open_source(data)
    assert len(source.shards) == 3
    keys = epoch_keys(source, world_size=2)
    assert len(set(keys)) == len(keys) == 30
    with pytest.raises(UserError, match="cannot be opened"):
        open_source(f"hf:{tmp_path / 'hub'}:nonsense")


def test_fingerprint_holds_when_data_move_and_changes_with_them(tmp_path):
    here = fingerprint(write_tars(tmp_path / "here", [4, 5]))
    assert here == fingerprint(write_tars(tmp_path / "there", [4, 5]))
    assert here != fingerprint(write_tars(tmp_path / "more", [4, 5, 6]))
    assert here != fingerprint(write_tars(tmp_path / "other", [4, 95]))
    folder = write_folder(tmp_path / "folder", 5)
    before = fingerprint(str(folder))
    (folder / "class0" / "000.png").rename(folder / "class0" / "x.png")
    assert fingerprint(str(folder)) != before


def test_shards_of_the_same_name_in_several_folders(tmp_path):
    """Keys decide about noise and crops: they must be unique."""
    for folder in "ab":
        write_tars(tmp_path / folder, [3, 3])
    for data in (f"{tmp_path}/{{a,b}}/{{00000..00001}}.tar", f"{tmp_path}/*/*.tar", f"file://{tmp_path}/{{a,b}}/*.tar"):
        assert [shard.name for shard in open_source(data).shards] == [f"{f}/0000{i}.tar" for f in "ab" for i in (0, 1)]
        assert len(epoch_keys(data)) == 12
    assert [shard.name for shard in open_source(f"{tmp_path}/a/{{00000..00001}}.tar").shards] == [
        "00000.tar",
        "00001.tar",
    ]


def write_img2dataset(folder: Path, form: str) -> str:
    """The output folder of img2dataset: two shards of four images, and one download in each that failed."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    for shard in range(2):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(5):
                key = f"{shard:05d}{number:04d}"
                failed = number == 2
                row = {"key": key, "url": "u", "caption": "a photo", "status": "failed_to_download", "width": None}
                rows.append(row if failed else {**row, "status": "success", "width": 12})
                if form == "parquet":
                    rows[-1]["jpg"] = None if failed else encode(5 * shard + number, fmt="JPEG")
                if failed:
                    continue
                files = {"jpg": encode(5 * shard + number, fmt="JPEG"), "txt": b"a photo", "json": b"{}"}
                for extension, content in files.items():
                    if form == "webdataset":
                        member = tarfile.TarInfo(f"{key}.{extension}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                    elif form == "files":
                        (folder / f"{shard:05d}").mkdir(exist_ok=True)
                        (folder / f"{shard:05d}" / f"{key}.{extension}").write_bytes(content)
        if form != "webdataset":
            (folder / f"{shard:05d}.tar").unlink()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return str(folder)


@pytest.mark.parametrize("form", ["webdataset", "parquet", "files"])
def test_output_of_img2dataset_as_it_is(form, tmp_path):
    """Nothing is taken for an image that is none, and a failed download is no broken image."""
    folder = write_img2dataset(tmp_path / "cc3m", form)
    names = {shard.name.partition("-")[0] for shard in open_source(folder).shards}
    kind = {"webdataset": "tar", "parquet": "parquet"}.get(form)
    assert names == ({f"00000.{kind}", f"00001.{kind}"} if kind else {"000000"})
    loader = loader_of(folder, batch_size=2, max_skipped_fraction=0.0)
    assert Counter(Counter(keys_of(take(loader, 8))).values()) == {2: 8}
    assert loader.position.seen == 16 and loader.position.skipped == 0
    if form == "webdataset":
        assert len(epoch_keys(f"{folder}/{{00000..00001}}.tar")) == 8
        with pytest.raises(UserError, match="no image column.*name the tars"):
            open_source(f"{folder}/*.parquet")


def test_expand_braces():
    assert expand_braces("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    with pytest.raises(UserError, match="backwards"):
        expand_braces("{3..1}.tar")


@pytest.mark.parametrize(
    "kind", ["nothing", "missing", "brace", "empty", "imageless tar", "imageless parquet", "mixed", "text"]
)
def test_bad_data_are_refused(kind, tmp_path):
    (tmp_path / "empty").mkdir()
    if kind == "imageless tar":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("0.txt"))
    if kind == "imageless parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"caption": ["a"]}), tmp_path / "a.parquet")
    if kind == "mixed":
        write_folder(tmp_path, 2)
        write_tar(tmp_path / "a.tar", 0, 2)
    (tmp_path / "a.txt").write_text("text")
    data, message = {
        "nothing": ("", "data is empty"),
        "missing": (f"{tmp_path}/none/*.tar", "no data at"),
        "brace": (f"{tmp_path}/{{0..1}}.tar", "no data at .*0.tar .from"),
        "empty": (str(tmp_path / "empty"), "holds no images"),
        "imageless tar": (f"{tmp_path}/*.tar", "no image found"),
        "imageless parquet": (f"{tmp_path}/a.parquet", "no image column.*caption"),
        "mixed": (str(tmp_path), "image and tar"),
        "text": (str(tmp_path / "a.txt"), "neither"),
    }[kind]
    with pytest.raises(UserError, match=message):
        open_source(data)


def logged(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dcr_mllm"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def test_broken_image_is_skipped_counted_and_named(tmp_path, warnings):
    write_tar(tmp_path / "0.tar", 0, 20, broken=(4,))
    loader = loader_of(f"{tmp_path}/*.tar", batch_size=2, max_skipped_fraction=0.1)
    keys = keys_of(take(loader, 19))  # 38 samples: two epochs of 19 good ones
    assert Counter(Counter(keys).values()) == {2: 19} and "0.tar/000004" not in keys
    assert loader.position.seen in (39, 40) and loader.position.skipped == 2
    assert "0.tar/000004" in logged(warnings)


def test_broken_images_leave_batches_full_and_restarts_exact(tmp_path):
    """A broken image shifts the batches against the chunks that workers decode; a restart begins with a fresh chunk."""
    write_tar(tmp_path / "0.tar", 0, 20, broken=(3, 10, 11, 12, 17))
    data, changes = f"{tmp_path}/*.tar", {"max_skipped_fraction": 0.5}
    expected = take(loader_of(data, **changes), 14)
    assert all(len(batch["keys"]) == len(batch["images"]) == 3 for batch in expected)
    assert_same(take(loader_of(data, num_workers=2, **changes), 14), expected)
    for stop in (1, 2, 3, 6, 9):
        loader = loader_of(data, **changes)
        head = take(loader, stop)
        assert_same(head + take(loader_of(data, position=loader.position, **changes), 14 - stop), expected)


def cut(path: Path, keep: int) -> Path:
    path.write_bytes(path.read_bytes()[:keep])
    return path


def member_offset(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


@pytest.mark.parametrize("where", ["content", "header", "boundary", "garbage"])
@pytest.mark.parametrize("consumers", [1, 5])
def test_truncated_tar_keeps_what_came_before(tmp_path, warnings, where, consumers):
    write_tar(tmp_path / "0.tar", 0, 20)
    write_tar(tmp_path / "1.tar", 20, 20)
    offset = member_offset(tmp_path / "0.tar", "000012.png")
    if where == "garbage":
        content = bytearray((tmp_path / "0.tar").read_bytes())
        content[offset : offset + 512] = b"\xff" * 512
        (tmp_path / "0.tar").write_bytes(content)
    else:
        cut(tmp_path / "0.tar", offset + {"content": 520, "header": 100, "boundary": 0}[where])
    data = f"{tmp_path}/*.tar"
    keys = epoch_keys(data, world_size=consumers, max_skipped_fraction=0.5)
    assert sorted(int(key[-6:]) for key in keys) == [*range(12), *range(20, 40)]
    begun = 12 if where == "content" else 11
    assert f"0.tar/0000{begun}: the shard {tmp_path}/0.tar breaks off here" in logged(warnings)


@pytest.mark.parametrize("where", [520, 100, 0])
@pytest.mark.parametrize("world_size", [1, 3])
def test_break_counts_once_over_all_consumers_and_restarts_exactly(tmp_path, where, world_size):
    write_tar(tmp_path / "0.tar", 0, 20)
    write_tar(tmp_path / "1.tar", 20, 4)
    cut(tmp_path / "0.tar", member_offset(tmp_path / "0.tar", "000012.png") + where)
    data = f"{tmp_path}/*.tar"
    breaks = []
    for rank in range(world_size):
        changes = {"world_size": world_size, "rank": rank, "batch_size": 2, "max_skipped_fraction": 0.5}
        changes["shuffle_buffer"] = 3
        whole = loader_of(data, **changes)
        entries = whole.order._epoch(Cursor())
        breaks += [entry.key for _, entry in entries if entry.data is None]
        expected = take(whole, 16)
        for stop in range(0, 16, 3):
            loader = loader_of(data, **changes)
            head = take(loader, stop)
            loader = loader_of(data, position=StreamPosition.from_json(loader.position.to_json()), **changes)
            assert_same(head + take(loader, 16 - stop), expected)
            assert loader.position == whole.position
    assert len(breaks) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_end_the_run(tmp_path, workers):
    write_tar(tmp_path / "0.tar", 0, 40, broken=tuple(range(0, 40, 8)))
    write_tar(tmp_path / "1.tar", 40, 40, broken=tuple(range(40, 80, 8)))
    with pytest.raises(UserError, match=r"^\d+ of \d+ images are broken, more than .*\d.tar/\d{6} in ") as error:
        take(loader_of(f"{tmp_path}/*.tar", num_workers=workers), 60)
    assert "Traceback" not in str(error.value)
    loader = loader_of(f"{tmp_path}/*.tar", num_workers=workers, max_skipped_fraction=0.2)
    assert len(take(loader, 60)) == 60


def test_rate_is_not_judged_by_the_first_few(tmp_path):
    write_tar(tmp_path / "0.tar", 0, 200, broken=tuple(range(4)))
    # Four in the first block of ten are 40 % of what has been seen by then, but 2 % of all.
    assert len(take(loader_of(f"{tmp_path}/*.tar", shuffle_buffer=10), 60)) == 60


def test_nothing_but_broken_images(tmp_path):
    write_tar(tmp_path / "0.tar", 0, 5, broken=tuple(range(5)))
    with pytest.raises(UserError, match="5 of 5 images are broken"):
        take(loader_of(f"{tmp_path}/*.tar"), 1)
    with pytest.raises(UserError, match="no image for rank 0"):
        take(loader_of(f"{tmp_path}/*.tar", max_skipped_fraction=1.0), 1)


def test_broken_rows_and_parquet_files(tmp_path, warnings):
    import pyarrow
    import pyarrow.parquet

    write_parquet(tmp_path / "a.parquet", 20)
    cut(write_parquet(tmp_path / "b.parquet", 20), 500)
    rows = [encode(0), None, b"", encode(3)]  # None is no image, not a broken one
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "c.parquet")
    keys = epoch_keys(f"{tmp_path}/*.parquet", max_skipped_fraction=0.5)
    assert sorted(keys) == [f"a.parquet/{i:08d}" for i in range(20)] + ["c.parquet/00000000", "c.parquet/00000003"]
    text = logged(warnings)
    assert "b.parquet cannot be read" in text and "c.parquet/00000002" in text and "00000001" not in text


@pytest.mark.parametrize("world_size", [1, 3])
def test_damaged_row_group_leaves_the_others(tmp_path, warnings, world_size):
    import pyarrow.parquet

    path = write_parquet(tmp_path / "a.parquet", 20, raw=True)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(1)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 16] = b"\xff" * 16
    path.write_bytes(content)
    keys = epoch_keys(str(path), world_size=world_size, max_skipped_fraction=0.5)
    assert sorted(int(key[-8:]) for key in keys) == [*range(8), *range(12, 20)]
    assert "rest of row group 2" in logged(warnings)


def test_vanished_file_is_skipped(tmp_path, warnings):
    folder = write_folder(tmp_path / "f", 10)
    loader = loader_of(str(folder), max_skipped_fraction=0.5, batch_size=3)
    (folder / "class0" / "003.png").unlink()
    assert len(set(keys_of(take(loader, 3)))) == 9
    assert "class0/003.png" in logged(warnings)


@pytest.mark.parametrize(
    ("shards", "world_size", "message"),
    [
        (3, 8, "only 3 shards for 8 processes: each process reads all of them"),
        (9, 8, "9 shards for 8 processes: in an epoch some read 2 and others 1"),
        (8, 8, None),
        (33, 8, None),
        (1, 1, None),
    ],
)
def test_a_poor_split_is_told(tmp_path, warnings, shards, world_size, message):
    loader_of(write_tars(tmp_path, [2] * shards), world_size=world_size)
    assert logged(warnings).startswith(message) if message else not logged(warnings)


def test_small_data_warn_of_doubles(tmp_path, warnings):
    take(loader_of(write_tars(tmp_path, [4]), batch_size=6), 2)
    assert "only 4 images for a batch of 6" in logged(warnings)
