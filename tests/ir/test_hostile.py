"""Files and texts made to harm are refused: with a message, in little time, in little memory."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import branches_of_every_kind, one_norm_applied_twice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import branchgraph.ir.file_header as file_header
from branchgraph.ir.builder import dense, relu
from branchgraph.ir.errors import BranchgraphError, FormatError
from branchgraph.ir.file import load, load_graph, load_values, save
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Store
from branchgraph.ir.text import LONGEST_TEXT, format_graph, parse_graph
from branchgraph.passes.specialise import specialise

#: Generous on a slow and busy machine; what runs away takes minutes.
SECONDS = 8.0
#: Beyond what the attack itself weighs.
MEBIBYTES = 64


@contextmanager
def bounded(weight: int = 0) -> Iterator[None]:
    """The block is quick, and takes little memory besides a few times `weight` bytes."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        yield
        elapsed = time.perf_counter() - start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert elapsed < SECONDS
    assert peak < MEBIBYTES * 2**20 + 4 * weight


def small() -> tuple[Graph, Store]:
    graph = Graph("small")
    graph.output("y", relu(dense(graph.input("x", ("N", 3)), 2, name="fc")))
    return graph, Store.initialised(graph.states)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.bg"


def refused(path: Path, message: str, weight: int = 0) -> None:
    with bounded(weight), pytest.raises(BranchgraphError, match=message) as caught:
        load(path)
    assert "net.bg: " in str(caught.value)
    assert len(str(caught.value)) < 2000


# -- the bytes of a file ---------------------------------------------------------------------------


def file_of(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """Bytes of a safetensors file, the length of the header being a lie if `length` is given."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def metadata(**changes: str | None) -> dict[str, str]:
    good = {"format": "branchgraph", "version": "1", "graph": format_graph(small()[0])}
    return {k: v for k, v in {**good, **changes}.items() if v is not None}


#: The tensors that belong to `small`, 32 bytes.
TENSORS = {"fc.weight": entry([2, 3], 0, 24), "fc.bias": entry([2], 24, 32)}


def good(tensors: dict[str, Any] | None = None, data: bytes = bytes(32), **changes: Any) -> bytes:
    tensors = TENSORS if tensors is None else tensors
    return file_of({"__metadata__": metadata(**changes), **tensors}, data)


def member(name: str, text: str) -> bytes:
    """A good header with one more member, given as JSON text."""
    start = json.dumps({"__metadata__": metadata(), **TENSORS})[:-1]
    return file_of(f"{start}, {json.dumps(name)}: {text}}}".encode(), bytes(32))


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "got 0 bytes"),
    "seven bytes": (bytes(7), "got 7 bytes; the file is cut short"),
    "header longer than the file": (file_of(b"{}", length=99), "got 10 bytes and a header of 99"),
    "header of 2^63": (file_of(b"{}", length=2**63), "a header of 9223372036854775808"),
    "header of 2^64-1": (file_of(b"{}", length=2**64 - 1), "a header of 18446744073709551615"),
    "header of nothing": (file_of(b""), "expected { at character 0, got its end"),
    "header not JSON": (file_of(b"hello world"), "expected { at character 0, got 'hello world'"),
    "header a list": (file_of(b"[1, 2]"), "expected { at character 0"),
    "header without end": (file_of(b'{"a"'), "expected : at character 4, got its end"),
    "header with a tail": (file_of(b"{} {}"), "expected nothing after the last }"),
    "header not UTF-8": (file_of(b'{"\xff": 1}'), "UTF-8, got the byte 0xff at 10"),
    "header nested deeply": (member("a", "[" * 10**6), "expected { at"),
    "metadata nested deeply": (
        file_of(b'{"__metadata__": ' + b'{"a":' * 10**6), "expected text for a"),
    "shape nested deeply": (
        member("a", '{"dtype": "U8", "shape": ' + "[" * 10**6), "expected shape as a list"),
    "metadata of a number": (file_of(b'{"__metadata__": {"a": 1}}'), "expected text for a"),
    "metadata of 10^5 entries": (
        file_of({"__metadata__": {str(i): "" for i in range(10**5)}}), "at most 64 members"),
    "duplicate tensor": (
        member("fc.bias", json.dumps(TENSORS["fc.bias"])), "duplicate 'fc.bias'"),
    "duplicate metadata": (
        member("__metadata__", '{"format": "x"}'), "duplicate '__metadata__'"),
    "duplicate key of the metadata": (
        file_of(b'{"__metadata__": {"graph": "a", "graph": "b"}}'), "duplicate 'graph'"),
    "duplicate field": (member("a", '{"dtype": "U8", "dtype": "U8"}'), "duplicate 'dtype'"),
    "unknown field": (
        member("a", '{"dtype": "U8", "x": []}'), "expected dtype, shape and data_offsets only"),
    "missing field": (
        member("a", '{"dtype": "U8"}'), "expected dtype, shape and data_offsets of 'a'"),
    "negative shape": (member("a", '{"dtype": "U8", "shape": [-1]}'), "expected shape as a list"),
    "number beyond 64 bits": (
        member("a", '{"dtype": "U8", "shape": [' + "9" * 10**6 + "]}"), "expected shape as a list"),
    "shape of 10^6 axes": (
        member("a", '{"dtype": "U8", "shape": [' + "0," * 10**6 + "0]}"), "at most 32 sizes"),
    "shape of text": (member("a", '{"dtype": "U8", "shape": ["3"]}'), "expected shape as a list"),
    "lone surrogate": (
        file_of(b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
        "not one of branchgraph"),
    "name without end": (file_of(b'{"' + b"a" * 10**6), "expected a name at character 1"),
    "unknown dtype": (
        good({**TENSORS, "fc.bias": entry([2], 24, 32, "F33")}), r"expected F32\[2\] .* got F33"),
    "huge tensor": (
        good({**TENSORS, "fc.bias": entry([2**62], 24, 32)}), r"fc.bias: expected F32\[2\] as"),
    "tensor whose size overflows": (
        good({**TENSORS, "fc.bias": entry([2**62, 2**62], 24, 32)}), r"fc.bias: expected F32\[2\]"),
    "overlapping offsets": (
        good({**TENSORS, "fc.bias": entry([2], 16, 24)}), "broken tensors: .*save the file again"),
    "offsets out of range": (
        good({**TENSORS, "fc.bias": entry([2], 2**40, 2**40 + 8)}), "broken tensors: "),
    "offsets backwards": (good({**TENSORS, "fc.bias": entry([2], 32, 24)}), "broken tensors: "),
    "offsets of another size": (good({**TENSORS, "fc.bias": entry([2], 24, 28)}), "broken tensors"),
    "offsets of 2^64": (
        good({**TENSORS, "fc.bias": entry([2], 2**64 - 1, 2**64 + 7)}), "broken tensors: "),
    "hole between tensors": (
        good({**TENSORS, "fc.bias": entry([2], 28, 36)}, bytes(36)), "broken tensors: "),
    "data cut short": (good(data=bytes(31)), "broken tensors: "),
    "data too long": (good(data=bytes(33)), "broken tensors: "),
    "no metadata": (
        file_of(TENSORS, bytes(32)), "not one of branchgraph: .* 'branchgraph', got none"),
    "another format": (good(format="pt"), "the format 'branchgraph', got the format 'pt'"),
    "newer version": (
        good(version="2", needs="0.7.1"),
        "in version 2 of the format; this branchgraph reads version 1.*'branchgraph>=0.7.1'"),
    "newer version that asks for a command": (
        good(version="9", needs="1'; rm -rf /; '"), "--upgrade 'branchgraph'$"),
    "no version": (good(version=None), "expected version 1 of the format, got ''"),
    "version of a million digits": (good(version="9" * 10**6), "expected version 1 of the format"),
    "version in other digits": (good(version="\u0662"), "expected version 1 of the format"),
    "no graph": (good(graph=None), "expected the text of a graph in the metadata, got none"),
    "unknown tensor": (
        good({**TENSORS, "more": entry([0], 32, 32)}), "holds more, which its graph does not"),
    "many unknown tensors": (
        good({**TENSORS, **{f"t{i}": entry([0], 32, 32) for i in range(1000)}}),
        "holds t0, t1, t2, t3, t4 and 995 more, which"),
    "tensor of another shape": (
        good({**TENSORS, "fc.weight": entry([3, 2], 0, 24)}),
        r"state fc.weight: expected F32\[2, 3\] as the graph declares, got F32\[3, 2\]"),
    "tensor of another dtype": (
        good({**TENSORS, "fc.weight": entry([2, 3], 0, 24, "I32")}),
        r"state fc.weight: expected F32\[2, 3\] as the graph declares, got I32"),
    "NaN": (
        good(data=struct.pack("<8f", *[float("nan")] * 3, *[1.0] * 5)),
        "state fc.weight: expected finite values, got 3 of 6 that are NaN or infinite"),
    "graph of a million lines": (good(graph="x\n" * 10**6), "in the text of the graph, line 1"),
    "graph that the verifier refuses": (
        good({}, b"", graph=
             "graph g {\n  %0 = full() {value=1.0, shape=[M], dtype=f32} : f32[M]\n}\n"),
        "the graph breaks a rule: .*symbol M comes from no input"),
    "a pickle": (pickle.dumps({"w": np.zeros(99)}, protocol=4), "this looks like a pickle"),
    "an npz": (b"PK\x03\x04" + bytes(range(99)), "this looks like a zip archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(range(99)), "this looks like gzip"),
    "bare text": (format_graph(small()[0]).encode(), "the bare text of a graph"),
}  # fmt: skip


@pytest.mark.parametrize("attack", FILES)
def test_a_hostile_file_is_refused(attack: str, path: Path) -> None:
    content, message = FILES[attack]
    path.write_bytes(content)
    refused(path, message, len(content))


def test_a_truth_value_other_than_0_and_1_is_refused(path: Path) -> None:
    text = "graph g {\n  state w : bool[2] param init=zeros()\n  output y = w\n}\n"
    path.write_bytes(good({"w": entry([2], 0, 2, "BOOL")}, b"\x01\x02", graph=text))
    refused(path, "state w: expected 0 and 1 as bool")


def test_a_good_file_made_by_other_means_is_taken(path: Path) -> None:
    path.write_bytes(good())
    graph, store = load(path)
    assert len(graph.states) == len(store) == 2


def test_a_folder_is_refused(path: Path) -> None:
    path.mkdir()
    refused(path, "expected a branchgraph file, got a folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this file system")
def test_a_pipe_is_refused_at_once(path: Path) -> None:
    os.mkfifo(path)
    refused(path, "expected a branchgraph file, got no regular file")


def test_an_unreadable_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    path.write_bytes(good())
    monkeypatch.setattr(file_header, "open", refuse, raising=False)
    refused(path, "cannot be read: Permission denied; check the permissions")


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(path: Path) -> None:
    size = file_header.LARGEST_HEADER + 1
    with path.open("wb") as file:
        file.write(struct.pack("<Q", size))
        file.truncate(size + 8)  # a sparse file: nothing is on the disk
    refused(path, rf"a header of {size} bytes; the limit is")


@pytest.mark.parametrize("read", [load_graph, lambda p: load_values(p, *small())])
def test_every_way_of_reading_checks(read: Callable[[Path], object], path: Path) -> None:
    path.write_bytes(good(format="pt"))
    with pytest.raises(FormatError, match=r"net.bg: .*not one of branchgraph"):
        read(path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_large_headers_stay_within_a_few_times_their_size(tmp_path: Path) -> None:
    """Native memory counts here: 768 MiB of address space besides the libraries, 40 MB headers."""
    script = """
        import pathlib, resource, struct, sys, time
        from branchgraph.ir.errors import FormatError
        from branchgraph.ir.file import load

        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + 768 * 2**20,) * 2)
        size = 40_000_000
        path = pathlib.Path(sys.argv[1]) / "net.bg"
        zero = '"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
        for header in (
            '{"a":' + "[]," * (size // 3),
            "".join(zero % i for i in range(size // 60)).join("{}").replace(",}", "}"),
            '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(size // 12)) + "}}",
            '{"' + "a" * size + '":' + "{" * 10,
        ):
            path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
            start = time.perf_counter()
            try:
                load(path)
            except FormatError as error:
                assert len(str(error)) < 500
                print("refused", time.perf_counter() - start)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    seconds = re.findall(r"refused (\S+)", result.stdout)
    assert len(seconds) == 4, result.stdout
    assert all(float(s) < SECONDS for s in seconds)


# -- the text of a graph ---------------------------------------------------------------------------


def graph_of(*lines: str) -> str:
    return "\n".join(["graph g {", *lines, "}", ""])


BIG = 2**40
MILLION = 10**6
TEXTS: dict[str, tuple[str, str]] = {
    "nothing": ("", "line 1: expected 'graph'"),
    "cycle": (
        graph_of("%0 = relu(%1) : f32[1]", "%1 = relu(%0) : f32[1]"),
        "line 2: expected a value defined above .graphs are acyclic., got '%1'"),
    "node that reads itself": (graph_of("%0 = relu(%0) : f32[1]"), "line 2: expected a value"),
    "value defined twice": (
        graph_of("input x : f32[1]", "%0 = relu(x) : f32[1]", "%0 = relu(x) : f32[1]"),
        "line 4: .*%0 is defined twice"),
    "state declared twice": (
        graph_of(*["state w : f32[1] param init=zeros()"] * 2), "line 3: .*declared twice"),
    "input declared twice": (graph_of(*["input x : f32[1]"] * 2), "line 3: input 'x' exists"),
    "input named like a state": (
        graph_of("state w : f32[1] param init=zeros()", "input w : f32[1]"), "line 3: .*w is a"),
    "output declared twice": (
        graph_of("input x : f32[1]", *["output y = x"] * 2), "line 4: output 'y' exists already"),
    "state updated twice": (
        graph_of("state w : f32[1] param init=zeros()", *["update w = w"] * 2),
        "line 4: expected one update a state"),
    "gradient given twice": (
        graph_of("state w : f32[1] param init=zeros()", *["gradient w = w"] * 2),
        "line 4: expected one gradient a state"),
    "unknown op": (graph_of("%0 = exec() : f32[1]"), "line 2: unknown op 'exec'"),
    "unknown initialiser": (
        graph_of("state w : f32[1] param init=eval()"), "line 2: unknown initialiser 'eval'"),
    "unknown attribute": (
        graph_of("input x : f32[1]", "%0 = relu(x) {__class__=1} : f32[1]"),
        "line 3: op relu has no attribute '__class__'"),
    "unknown role": (graph_of("state w : f32[1] root init=zeros()"), "line 2: expected one of the"),
    "unknown dtype": (graph_of("input x : object[1]"), "line 2: unknown dtype 'object'"),
    "wrong type": (
        graph_of("input x : f32[1]", "%0 = relu(x) : f64[1]"), r"line 3: .*the types f32\[1\]"),
    "attribute of a wrong type": (
        graph_of("input x : f32[1]", '%0 = elu(x) {alpha="1"} : f32[1]'), "line 3: .*expected fl"),
    "default that is no number": (graph_of("input t : f64[] = abc"), "line 2: expected a number"),
    "huge size": (graph_of(f"input x : f32[{BIG + 1}]"), "line 2: .*1099511627777"),
    "size beyond 64 bits": (graph_of(f"input x : f32[{2**70}]"), "line 2: unexpected character"),
    "negative size": (graph_of("input x : f32[-1]"), "line 2: .*-1"),
    "huge state": (
        graph_of(f"state w : f32[{BIG}, 2] param init=zeros()"), "line 2: expected a state of"),
    "state of a symbolic size": (
        graph_of("state w : f32[N] param init=zeros()"), "line 2: expected a concrete shape"),
    "size not affine": (graph_of("input x : f32[N*N]"), "line 2: 'N.N' is no dimension"),
    "a thousand axes": (graph_of(f"input x : f32[{'1, ' * 1000}1]"), "line 2: .*at most 32 axes"),
    "a sum of a thousand symbols": (
        graph_of(f"input x : f32[{'+'.join(f's{i}' for i in range(1000))}]"),
        "line 2: expected a shorter expression"),
    "33 symbols": (
        graph_of(f"input x : f32[{'+'.join(f's{i}' for i in range(33))}]"),
        "line 2: expected dimensions of at most 32 terms"),
    "sizes that double 1000 times": (
        graph_of("input x : f32[1, N]", *(
            f"%{i} = concat({p}, {p}) {{axis=1}} : f32[1, {2 ** (i + 1)}*N]"
            for i in range(1000) for p in [f"%{i - 1}" if i else "x"])),
        "line 6[0-9]: unexpected character"),
    "ten thousand operands": (
        graph_of("input x : f32[1]", f"%0 = sum({'x, ' * 10_000}x) : f32[1]"),
        "line 3: expected at most 1024 operands"),
    "deep scopes": (
        graph_of(*["scope a {"] * 10_000), "line 66: expected at most 64 nested scopes"),
    "scope without end": (graph_of("scope a {"), "line 3: expected '}', got 'end of text'"),
    "one end too many": ("graph g {\n}\n}\n", "line 3: expected the end of the text"),
    "deep lists": (graph_of("%0 = full() {shape=" + "[" * 10_000), "line 2: expected an attribute"),
    "lone surrogate": (graph_of('input "\\ud800" : f32[1]'), "line 2: .*lone surrogates"),
    "null character": (graph_of("input x\0 : f32[1]"), "line 2: unexpected character"),
    "other digits": (graph_of("%\u0661 = relu(x) : f32[1]"), "line 2: unexpected character"),
    "other letters": (graph_of("input \u0445 : f32[1]"), "line 2: unexpected character"),
    "string without end": (graph_of('input "x'), "line 2: unexpected character"),
    "10 MB of brackets": ("{" * 10 * MILLION, "line 1: 10000000 characters; the limit is"),
    "10 MB of letters": ("a" * 10 * MILLION, "line 1: 10000000 characters; the limit is"),
    "10 MB of an open string": ('"' + "\\a" * 5 * MILLION, "line 1: 10000001 characters"),
    "10 MB of empty lines": ("\n" * 10 * MILLION, "line 10000001: expected 'graph'"),
    "10 MB of words": ("word\n" * 2 * MILLION, "line 1: expected 'graph', got 'word'"),
    "ten thousand scopes": ("graph g {\n" + "scope a {\n}\n" * 10_000 + "x", "expected '}'"),
    "a line of brackets": (graph_of("input x : f32" + "[" * 250_000), "line 2: expected"),
    "a line of digits": (graph_of("input x : f32[" + "1" * 250_000), "line 2: unexpected char"),
    "a line of signs": (graph_of("input x : f32[" + "-" * 250_000), "line 2: expected a shorter"),
    "a line of quotes": (graph_of('input "' + "\\" * 250_000), "line 2: unexpected character"),
    "a long name": (graph_of("output " + "a" * 200_000), "line 2: expected '='"),
    "a long attribute name": (
        graph_of("input x : f32[1]", f"%0 = relu(x) {{{'a' * 200_000}=1}} : f32[1]"),
        "line 3: op relu has no attribute"),
    "longer than any text": ("a" * (LONGEST_TEXT + 1), "the limit is"),
}  # fmt: skip


@pytest.mark.parametrize("attack", TEXTS)
def test_a_hostile_text_is_refused(attack: str) -> None:
    text, message = TEXTS[attack]
    with bounded(len(text)), pytest.raises(FormatError, match=message) as caught:
        parse_graph(text)
    assert len(str(caught.value)) < 1100


def test_a_long_text_that_is_sound_takes_time_in_proportion() -> None:
    states = (f"state s{i} : f32[1] param init=zeros()" for i in range(2000))
    nodes = (f"%{i} = relu({f'%{i - 1}' if i else 's0'}) : f32[1]" for i in range(2000))
    text = graph_of(*states, *nodes)
    with bounded(len(text)):
        graph = parse_graph(text)
    assert (len(graph.states), len(graph.nodes)) == (2000, 2000)


# -- random damage ---------------------------------------------------------------------------------

SOUND = [
    format_graph(branches_of_every_kind()),
    format_graph(one_norm_applied_twice()),
    format_graph(specialise(branches_of_every_kind(), training=False)),
    format_graph(small()[0]),
]
_TOKEN = re.compile(r'"[^"\n]*"|%\d+|[A-Za-z_][\w./]*|-?\d+\.\d+|-?\d+|\S')
TOKENS = sorted({t for text in SOUND for t in _TOKEN.findall(text)}) + [
    "-1", "0", "1099511627776", "999999999999999999", "1e308", "1e999", "-inf", "nan", "none",
    "true", "3*N", "N*N", "N + M - 1", '"\\u0000"', '"\\ud800"', "~2", "\0", "\n", "é", "",
]  # fmt: skip


@st.composite
def damaged_texts(draw: st.DrawFn) -> str:
    """A sound text with up to three tokens, lines or characters changed."""
    text = draw(st.sampled_from(SOUND))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["token", "token", "line", "character", "cut"]))
        if kind == "token":
            tokens = list(_TOKEN.finditer(text)) or [re.match("", text)]
            found = tokens[draw(st.integers(0, len(tokens) - 1))]
            assert found is not None
            text = text[: found.start()] + draw(st.sampled_from(TOKENS)) + text[found.end() :]
        elif kind == "line":
            lines = text.split("\n")
            source, target = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
            lines.insert(target, lines[source])
            text = "\n".join(lines)
        elif kind == "character":
            at = draw(st.integers(0, len(text)))
            text = text[:at] + draw(st.characters()) + text[at + 1 :]
        else:
            text = text[: draw(st.integers(0, len(text)))]
    return text


def complaint(read: Callable[[], object]) -> str | None:
    """What `read` complains of, if it does."""
    try:
        read()
    except BranchgraphError as error:
        return str(error)
    return None


@settings(max_examples=150, deadline=SECONDS * 1000)
@given(text=damaged_texts())
def test_a_damaged_text_parses_or_is_refused(text: str) -> None:
    message = complaint(lambda: parse_graph(text))
    if message is not None:
        assert message.startswith("line ")
    else:
        again = format_graph(parse_graph(text))
        assert format_graph(parse_graph(again)) == again


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_loads_or_is_refused(data: st.DataObject, path: Path) -> None:
    save(path, *small())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([None, -1, -40, 9, 200]))])
    message = complaint(lambda: load(path))
    assert message is None or "net.bg: " in message
