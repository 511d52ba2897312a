"""Fetching goes on after a cut, keeps nothing that is not what was published, and says so."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from cifar_files import TEN, archive_of, batch, records
from click.testing import CliRunner

from branchgraph.cli.data import data as command
from branchgraph.data import fetch as fetching
from branchgraph.data.fetch import SOURCES, Remote, Source, check, fetch
from branchgraph.ir.errors import BranchgraphError, FormatError, MissingError

CONTENT = archive_of(
    {
        f"cifar-10-batches-bin/{name}.bin": records(*batch(number, 10, 40))
        for number, name in enumerate(TEN)
    }
)
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
NAME = "cifar-10-binary.tar.gz"


class Server(ThreadingHTTPServer):
    """Answers with `reply`, and keeps the ranges that it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.reply: Callable[[Handler], None] = whole

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range"))
        self.server.reply(self)

    def send(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def start(self) -> int:
        asked = self.headers.get("Range")
        return int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0

    def log_message(self, *args: object) -> None: ...


def whole(handler: Handler) -> None:
    start = handler.start()
    if not start:
        handler.send(200, CONTENT)
        return
    span = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
    handler.send(206, CONTENT[start:], Content_Range=span)


def cut(handler: Handler) -> None:
    handler.send(200, CONTENT[:1000], len(CONTENT))


def without_ranges(handler: Handler) -> None:
    handler.send(200, CONTENT)


def other(handler: Handler) -> None:
    handler.send(200, bytes(len(CONTENT)))


def too_much(handler: Handler) -> None:
    handler.send(200, CONTENT + bytes(10**7))


def no_such_file(handler: Handler) -> None:
    handler.send(404, b"none")


def no_such_range(handler: Handler) -> None:
    handler.send(416, b"none")


def elsewhere(target: str) -> Callable[[Handler], None]:
    return lambda handler: handler.send(302, b"", Location=target)


def wrong_range(handler: Handler) -> None:
    handler.send(206, CONTENT, Content_Range=f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}")


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The miniature counts as what is published, and nothing goes through a proxy."""
    source = Source(SOURCES["cifar10"].base, (Remote(NAME, len(CONTENT), MD5),))
    monkeypatch.setitem(SOURCES, "cifar10", source)
    monkeypatch.setenv("BRANCHGRAPH_DATA", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Bar:
    done = 0

    def update(self, n: int) -> None:
        self.done += n


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once_and_loads(server: Server, tmp_path: Path) -> None:
    bar = Bar()
    assert fetch("cifar10", base=server.base, progress=bar) == [tmp_path / NAME]
    assert names(tmp_path) == [NAME]
    assert bar.done == len(CONTENT)
    assert fetch("cifar10", base=server.base, progress=bar) == [tmp_path / NAME]
    assert (server.asked, bar.done) == ([None], 2 * len(CONTENT))
    condition = check("cifar10")
    assert (condition.code, condition.word) == (0, "usable")
    assert f"{tmp_path / NAME}: {len(CONTENT)} bytes, checksum as published" in condition.lines


def test_a_folder_may_be_named(server: Server, tmp_path: Path) -> None:
    fetch("cifar10", tmp_path / "new", base=server.base)
    assert names(tmp_path / "new") == [NAME]


def test_a_cut_is_gone_on_from(server: Server, tmp_path: Path) -> None:
    server.reply = cut
    with pytest.raises(MissingError, match=r"Run the command again to go on where it stopped"):
        fetch("cifar10", base=server.base)
    assert names(tmp_path) == [f"{NAME}.part"]
    server.reply = whole
    bar = Bar()
    fetch("cifar10", base=server.base, progress=bar)
    assert server.asked == [None, "bytes=1000-"]
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert names(tmp_path) == [NAME]
    assert bar.done == len(CONTENT)


@pytest.mark.parametrize("reply", [without_ranges, wrong_range])
def test_a_server_that_cannot_go_on_starts_again(
    server: Server, tmp_path: Path, reply: Callable[[Handler], None]
) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
    server.reply = reply
    bar = Bar()
    fetch("cifar10", base=server.base, progress=bar)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert bar.done == len(CONTENT)


def test_what_was_complete_only_needs_its_name(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    fetch("cifar10", base=server.base)
    assert (server.asked, names(tmp_path)) == ([], [NAME])


def test_a_rest_of_something_else_does_not_stay(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 1000)
    with pytest.raises(FormatError, match="got others; they were thrown away"):
        fetch("cifar10", base=server.base)
    assert names(tmp_path) == []


def test_a_rest_that_is_too_long_is_not_gone_on_from(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * (len(CONTENT) + 1))
    fetch("cifar10", base=server.base)
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_a_range_that_there_is_not_starts_again_next_time(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
    server.reply = no_such_range
    with pytest.raises(MissingError, match="answers 416"):
        fetch("cifar10", base=server.base)
    assert names(tmp_path) == []


def test_a_file_with_the_name_but_other_content_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"old")
    condition = check("cifar10")
    assert condition.code == 2
    assert "not the published file" in condition.lines[-1]
    fetch("cifar10", base=server.base)
    assert (tmp_path / NAME).read_bytes() == CONTENT


#: What a server does, the error, words of its message.
ATTACKS: dict[str, tuple[Callable[[Handler], None], type[BranchgraphError], str]] = {
    "other content": (other, FormatError, f"with MD5 {MD5}, got others; they were thrown away"),
    "more than published": (too_much, FormatError, "sends more than the published"),
    "no such file": (no_such_file, MissingError, "answers 404"),
    "on to a file": (elsewhere("file:///etc/passwd"), FormatError, "only https is followed"),
    "on to ftp": (elsewhere("ftp://example.org/a"), FormatError, "only https is followed"),
    "on to http": (elsewhere("http://127.0.0.1:1/"), FormatError, "only https is followed"),
    "on to itself": (elsewhere("/again"), FormatError, "only https is followed"),
    "on to https that is none": (elsewhere("https://127.0.0.1:1/"), MissingError, "be reached"),
    "on to nowhere": (elsewhere(""), FormatError, "only https is followed"),
    "no http": (lambda h: h.wfile.write(b"hello\r\n\r\n") and None, MissingError, "broke"),
    "silence": (lambda h: h.close_connection and None, MissingError, "broke"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_kept_of_what_was_not_published(
    attack: str, server: Server, tmp_path: Path
) -> None:
    server.reply, kind, message = ATTACKS[attack]
    start = time.perf_counter()
    with pytest.raises(kind, match=message):
        fetch("cifar10", base=server.base)
    assert time.perf_counter() - start < 8
    assert names(tmp_path) == []


def test_a_server_that_stalls_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()

    def stall(handler: Handler) -> None:
        cut(handler)
        handler.wfile.flush()
        done.wait(8)

    monkeypatch.setattr(fetching, "TIMEOUT", 0.3)
    server.reply = stall
    with pytest.raises(MissingError, match="broke"):
        fetch("cifar10", base=server.base)
    done.set()
    assert (tmp_path / f"{NAME}.part").stat().st_size == 1000


def test_without_a_network_the_files_to_bring_are_named(tmp_path: Path) -> None:
    with socket.socket() as reserved:  # bound but not listening: nobody answers
        reserved.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{reserved.getsockname()[1]}/"
        with pytest.raises(MissingError) as caught:
            fetch("mnist", base=base)
    message = str(caught.value)
    assert "cannot be reached" in message
    for remote in SOURCES["mnist"].files:
        assert f"{base}{remote.name} ({remote.size} bytes, MD5 {remote.md5})" in message
        assert f"to {tmp_path / remote.path}" in message


def test_only_addresses_of_the_web_are_opened(tmp_path: Path) -> None:
    with pytest.raises(BranchgraphError, match="expected an http or https address"):
        fetch("cifar10", base=f"file://{tmp_path}/")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(BranchgraphError, match="cannot be written"):
        fetch("cifar10", tmp_path / "taken", base="http://127.0.0.1:1/")


def test_what_is_published_where_is_a_table() -> None:
    for name, source in SOURCES.items():
        assert source.base.startswith("https://")
        assert source.base.endswith("/")
        for remote in source.files:
            assert len(remote.md5) == 32
            assert remote.name.endswith(".gz"), name
    with pytest.raises(MissingError, match="no data set 'minst' to fetch; there are: cifar10, "):
        fetch("minst")
    with pytest.raises(MissingError, match="digits comes with scikit-learn"):
        fetch("digits")


# -- the commands ----------------------------------------------------------------------------------


def test_the_command_fetches_and_names_the_files(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Source(server.base, SOURCES["cifar10"].files)
    monkeypatch.setitem(SOURCES, "cifar10", here)
    result = CliRunner().invoke(command, ["fetch", "cifar10"])
    assert (result.exit_code, result.output) == (0, f"{tmp_path / NAME}\n")


def test_check_says_usable_missing_or_broken(server: Server, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["check", "cifar10"])
    assert result.exit_code == 1
    assert result.output.startswith("cifar10: missing\n")
    assert f"looked in {tmp_path}" in result.output
    assert "branchgraph data fetch cifar10" in result.output
    fetch("cifar10", base=server.base)
    result = CliRunner().invoke(command, ["check", "cifar10"])
    assert result.exit_code == 0
    assert "200 + 40 images [3, 32, 32], 10 classes" in result.output
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in TEN:
        (folder / f"{name}.bin").write_bytes(records(*batch(1, 10)))
    result = CliRunner().invoke(command, ["check", "cifar10"])
    assert result.exit_code == 0
    assert "data_batch_1.bin: 12292 bytes, no checksum known" in result.output
    (folder / "test_batch.bin").write_bytes(b"broken")
    result = CliRunner().invoke(command, ["check", "cifar10"])
    assert result.exit_code == 2
    assert "test_batch.bin: expected records of 3073 bytes" in result.output
    result = CliRunner().invoke(command, ["check"])
    assert result.exit_code == 2
    assert "cifar100: missing" in result.output
    assert "mnist: missing" in result.output


def test_check_of_a_name_that_there_is_not() -> None:
    result = CliRunner().invoke(command, ["check", "minst"])
    assert isinstance(result.exception, MissingError)


def test_mnist_is_compared_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    for name, shape in (("images-idx3", (2, 28, 28)), ("labels-idx1", (2,))):
        for part in ("train", "t10k"):
            head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
            content = head + np.zeros(shape, np.uint8).tobytes()
            (tmp_path / "mnist" / f"{part}-{name}-ubyte").write_bytes(content)
    condition = check("mnist")
    assert condition.code == 0
    assert "readable, but not the published content" in "\n".join(condition.lines)
