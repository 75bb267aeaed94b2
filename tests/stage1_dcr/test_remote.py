"""Shards behind URLs: read in pieces, tried again, restarted exactly. The servers run in this process."""

from __future__ import annotations

import http.server
import io
import logging
import re
import threading
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from dcr_mllm.errors import UserError
from stage1_dcr import remote
from stage1_dcr.images import StreamPosition
from stage1_dcr.remote import open_binary, without_query
from stage1_dcr.sources import fingerprint, open_source
from tests.stage1_dcr.image_data import (
    assert_same,
    epoch_keys,
    keys_of,
    loader_of,
    take,
    write_parquet,
    write_tars,
)

COUNTS = [9, 5, 14, 3]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files of a folder as the server's attributes say; folders are not listed."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        server: Server = self.server  # type: ignore[assignment]
        path = self.path.partition("?")[0]
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        file = Path(server.folder + path)
        if not file.is_file():
            return self.send_error(404)
        if server.fail(self.command, path, self.headers.get("Range")):
            return self.send_error(503)
        content = file.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and server.ranges:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}")
            part = content[start : end + 1]
        else:
            self.send_response(200)
            part = content
        if server.sizes:
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            cut = server.cut(path)
            try:
                self.wfile.write(part if cut is None else part[:cut])
            except ConnectionError:  # the client has read enough
                pass
            server.sent += len(part) if cut is None else cut

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = str(folder)
        self.requests: list[tuple[str, str, str | None]] = []
        self.ranges = self.sizes = True
        self.sent = 0
        self.fail = lambda command, path, asked: False
        self.cut = lambda path: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0))
    write_tars(tmp_path / "tars", COUNTS)
    served = Server(tmp_path)
    thread = threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()
    thread.join()
    fsspec.get_filesystem_class("http").clear_instance_cache()


@pytest.fixture
def memory(tmp_path):
    """A store that is like s3 to fsspec: files behind a protocol, found by name, sought in."""
    fs = fsspec.filesystem("memory")
    pattern = write_tars(tmp_path / "tars", COUNTS)
    for file in Path(pattern).parent.iterdir():
        fs.pipe_file(f"/bucket/tars/{file.name}", file.read_bytes())
    yield "memory://bucket/tars"
    fs.rm("/bucket", recursive=True)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dcr_mllm"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def local_pattern(server: Server) -> str:
    return f"{server.folder}/tars/{{00000..00003}}.tar"


def remote_pattern(server: Server) -> str:
    return f"{server.url}/tars/{{00000..00003}}.tar"


@pytest.mark.parametrize(("ranges", "sizes"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_what_local_ones_give(server, ranges, sizes, workers):
    """Keys, pixels, noise, positions: all of it. No folder is listed, and nothing but the shards is asked for."""
    server.ranges, server.sizes = ranges, sizes
    expected = take(loader_of(local_pattern(server)), 24)
    assert_same(take(loader_of(remote_pattern(server), num_workers=workers), 24), expected)
    assert {path for _, path, _ in server.requests} == {f"/tars/{i:05d}.tar" for i in range(4)}
    assert (fingerprint(remote_pattern(server)) == fingerprint(local_pattern(server))) == sizes


@pytest.mark.parametrize("ranges", [True, False])
def test_restart_of_remote_shards_is_exact(server, ranges):
    server.ranges = ranges
    expected = take(loader_of(remote_pattern(server)), 24)
    for stop in (1, 4, 11):
        loader = loader_of(remote_pattern(server))
        head = take(loader, stop)
        position = StreamPosition.from_json(loader.position.to_json())
        tail = take(loader_of(remote_pattern(server), position=position, num_workers=1), 24 - stop)
        assert_same(head + tail, expected)


def test_other_stores(memory, tmp_path):
    expected = take(loader_of(f"{tmp_path}/tars/*.tar"), 24)
    for pattern in ("*", "{00000..00003}"):
        assert_same(take(loader_of(f"{memory}/{pattern}.tar"), 24), expected)
        assert len(epoch_keys(f"{memory}/{pattern}.tar", world_size=2)) == sum(COUNTS)


def test_signed_urls(server):
    """What follows `?` is sent, but is part of no name: on the next day it is another one."""
    pattern = f"{remote_pattern(server)}?X-Signature=secret"
    source = open_source(pattern)
    assert [shard.name for shard in source.shards] == [f"{i:05d}.tar" for i in range(4)]
    assert source.fingerprint == fingerprint(f"{remote_pattern(server)}?X-Signature=other")
    assert "secret" not in repr([shard.location for shard in source.shards])
    assert_same(take(loader_of(pattern), 5), take(loader_of(local_pattern(server)), 5))
    assert all("?X-Signature=" in path for _, path, _ in server.requests)
    with pytest.raises(UserError, match="no data at") as error:
        open_source(f"{server.url}/none.tar?X-Signature=secret")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("ranges", [True, False])
def test_passing_failures_are_tried_again(server, ranges, warnings):
    """A third of all requests fail, and connections break: nothing is lost, and it is said what was tried again."""
    server.ranges = ranges
    expected = take(loader_of(local_pattern(server)), 24)
    count = Counter()

    def fail(command: str, path: str, asked: str | None) -> bool:
        count[command] += 1
        return command == "GET" and count[command] % 3 == 0

    def cut(path: str) -> int | None:
        count[path] += 1
        return 700 if count[path] % 3 == 1 else None

    server.fail, server.cut = fail, cut
    loader = loader_of(remote_pattern(server))
    assert_same(take(loader, 24), expected)
    assert loader.position.skipped == 0
    assert "trying again" in warnings.text and "skipped" not in warnings.text


def test_lasting_failure_is_counted_and_named(server, warnings):
    """As a local tar that breaks off: what came before is used, one more is counted, the other shards go on."""
    source = open_source(remote_pattern(server))
    server.fail = lambda command, path, asked: path == "/tars/00002.tar"
    loader = loader_of(source, max_skipped_fraction=0.5)
    keys = set(keys_of(take(loader, 12)))
    assert {key.partition("/")[0] for key in keys} == {"00000.tar", "00001.tar", "00003.tar"}
    assert loader.position.skipped >= 1
    assert f"skipped 00002.tar: the shard {server.url}/tars/00002.tar breaks off here" in warnings.text
    attempts = [request for request in server.requests if request[1] == "/tars/00002.tar" and request[0] == "GET"]
    assert len(attempts) >= 4  # one and three more


def test_missing_shard_is_refused_at_once(server, monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (60.0,))  # what is not there will not come by waiting
    with pytest.raises(UserError, match=r"no data at http://.*/tars/00004.tar .from .*00000..00004.*404"):
        open_source(f"{server.url}/tars/{{00000..00004}}.tar")
    with pytest.raises(UserError, match="no data at memory://"):
        open_source("memory://none/{0..3}.tar")


def test_missing_package_is_named():
    """Neither is a requirement of this project, and the file systems say themselves what they need."""
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")):
        try:
            __import__(package)
        except ImportError:
            with pytest.raises(UserError, match=f"data {protocol}://bucket/.* cannot be opened.*{package}"):
                open_source(f"{protocol}://bucket/{{00000..00331}}.tar")
    with pytest.raises(UserError, match="nonsense"):
        open_source("nonsense://bucket/0.tar")


def test_large_file_is_read_in_pieces(server, monkeypatch):
    """40 MB: after the first megabyte no more than a few blocks have been asked for, and memory holds no more."""
    content = bytes(range(256)) * (40 << 12)
    Path(server.folder, "large.bin").write_bytes(content)
    [file] = fsspec.open_files(f"{server.url}/large.bin", expand=False)
    with open_binary(file) as stream:
        assert stream.read(1 << 20) == content[: 1 << 20]
        assert server.sent < 12 << 20
        assert b"".join(iter(lambda: stream.read(1 << 20), b"")) == content[1 << 20 :]
    assert max(
        int(asked.split("-")[1]) - int(re.findall(r"\d+", asked)[0]) for *_, asked in server.requests if asked
    ) < (8 << 20)


@pytest.mark.parametrize("ranges", [True, False])
def test_large_file_goes_on_where_it_broke(server, ranges):
    content = bytes(range(251)) * 60_000  # 15 MB: three blocks
    Path(server.folder, "large.bin").write_bytes(content)
    server.ranges = ranges
    cuts = iter([None, 6_000_000, 100, 9_000_000])
    server.cut = lambda path: next(cuts, None)
    [file] = fsspec.open_files(f"{server.url}/large.bin", expand=False)
    with open_binary(file) as stream:
        assert stream.read() == content


def test_remote_parquet(server, warnings):
    """Read by seeking, so a server of whole files cannot give it; that is said, and not tried again."""
    write_parquet(Path(server.folder) / "a.parquet", 20, raw=True)
    expected = take(loader_of(f"{server.folder}/a.parquet"), 5)
    assert_same(take(loader_of(f"{server.url}/a.parquet"), 5), expected)


def test_remote_parquet_without_ranges_is_refused(server, monkeypatch):
    monkeypatch.setattr(fsspec.implementations.http, "DEFAULT_BLOCK_SIZE", 1000)
    fsspec.get_filesystem_class("http").clear_instance_cache()
    write_parquet(Path(server.folder) / "a.parquet", 20, raw=True)
    server.ranges = False
    with pytest.raises(UserError, match="no image found.*whole files only"):
        open_source(f"{server.url}/a.parquet")


def test_file_is_a_file(memory):
    """Seeking and telling as any other."""
    [file] = fsspec.open_files(f"{memory}/00000.tar")
    with file as plain:
        content = plain.read()
    with open_binary(file) as stream:
        assert isinstance(stream, io.BufferedReader) and stream.seekable()
        assert stream.seek(-7, io.SEEK_END) == len(content) - 7 and stream.read() == content[-7:]
        assert stream.seek(5) == 5 and stream.read(4) == content[5:9] and stream.tell() == 9
        assert stream.seek(10, io.SEEK_CUR) == 19 and stream.read(3) == content[19:22]


def test_without_query():
    assert without_query("at https://h/a.tar?sig=1&b=2: gone (http://x/y?z)") == "at https://h/a.tar gone (http://x/y)"
    assert without_query("/data/what?/0.tar") == "/data/what?/0.tar"
