"""`.params` files: every layout is read, one is written, nothing is believed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from branchgraph.ir.errors import BranchgraphError, FormatError, MissingError
from branchgraph.mx import params
from branchgraph.mx.params import (
    Checkpoint,
    load_arrays,
    load_checkpoint,
    read_arrays,
    save_arrays,
    save_checkpoint,
    write_arrays,
)
from tests.goldens import golden

FILES = ["dense_v2.params", "list_unnamed_v2.nd", "sparse_v2.nd", "npshape_v3.npx",
         "legacy_v0.params", "legacy_v1.params"]  # fmt: skip


def expected(file: str) -> dict[str, np.ndarray]:
    with np.load(golden("mxnet/formats/expected.npz")) as stored:
        return {k.partition("|")[2]: stored[k] for k in stored if k.startswith(f"{file}|")}


@pytest.mark.parametrize("file", FILES)
def test_every_layout_is_read(file: str) -> None:
    found = load_arrays(golden(f"mxnet/formats/{file}"))
    arrays = found if isinstance(found, dict) else {str(i): a for i, a in enumerate(found)}
    listed = json.loads(golden("mxnet/formats/formats.json").read_text())["arrays"]
    names = next(d["names"] for d in listed if d["file"] == file)
    assert names == (list(found) if isinstance(found, dict) else [])
    for name, reference in expected(file).items():
        assert arrays[name].dtype == reference.dtype
        np.testing.assert_array_equal(arrays[name], reference)
    assert set(arrays) == set(expected(file))


@pytest.mark.parametrize("file", ["dense_v2.params", "list_unnamed_v2.nd"])
def test_what_is_written_is_what_mxnet_writes(file: str) -> None:
    content = golden(f"mxnet/formats/{file}").read_bytes()
    assert write_arrays(read_arrays(content)) == content


@pytest.mark.parametrize("tag", ["plain_d5w1c10_s11", "cross_d14w1c10_s11"])
def test_a_checkpoint_is_written_back_byte_for_byte(tag: str, tmp_path: Path) -> None:
    source = golden(f"mxnet/nets/{tag}-0000.params")
    save_arrays(tmp_path / "copy.params", load_arrays(source))
    assert (tmp_path / "copy.params").read_bytes() == source.read_bytes()


DTYPES = ["float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool", "int16",
          "uint16", "uint32", "uint64"]  # fmt: skip


@pytest.mark.parametrize("dtype", [*map(np.dtype, DTYPES), np.dtype(ml_dtypes.bfloat16)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (1,), (), (0, 3)], ids=str)
def test_arrays_come_back(dtype: np.dtype, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape)).reshape(shape) % 2).astype(dtype)
    found = read_arrays(write_arrays({"a": array}))
    assert isinstance(found, dict)
    assert (found["a"].dtype, found["a"].shape) == (dtype, shape)
    np.testing.assert_array_equal(found["a"], array)


def test_strided_and_big_endian_arrays_are_written_by_value() -> None:
    array = np.arange(6.0).reshape(2, 3)
    twice = write_arrays([array.T, array.astype(">f8")])
    assert twice == write_arrays([array.T.copy(), array])


def test_a_checkpoint_splits_names_at_the_first_colon(tmp_path: Path) -> None:
    arrays = {"arg:a:b": np.ones(2), "aux:m": np.zeros(1), "other": np.ones(1), "x:y": np.ones(1)}
    save_arrays(tmp_path / "p", arrays)
    checkpoint = load_checkpoint(tmp_path / "p")
    assert (list(checkpoint.arguments), list(checkpoint.auxiliary)) == (["a:b"], ["m"])
    save_checkpoint(tmp_path / "q", checkpoint)
    assert list(load_arrays(tmp_path / "q")) == ["arg:a:b", "aux:m"]
    save_arrays(tmp_path / "none", [])
    assert load_checkpoint(tmp_path / "none") == Checkpoint()
    save_arrays(tmp_path / "list", [np.ones(1)])
    with pytest.raises(FormatError, match="have no names"):
        load_checkpoint(tmp_path / "list")


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    save_arrays(tmp_path / "p", {"a": np.ones(2)})
    before = (tmp_path / "p").read_bytes()
    with pytest.raises(FormatError, match="complex128 have no place"):
        save_arrays(tmp_path / "p", {"a": np.ones(2, complex)})
    assert (tmp_path / "p").read_bytes() == before
    with pytest.raises(BranchgraphError):
        save_arrays(tmp_path / "missing" / "p", [])
    with pytest.raises(MissingError, match="no such file"):
        load_arrays(tmp_path / "q")


# -- hostile files -------------------------------------------------------------------------------


def head(count: int) -> bytes:
    return struct.pack("<QQQ", 0x112, 0, count)


def shape(*sizes: int) -> bytes:
    return struct.pack(f"<i{len(sizes)}q", len(sizes), *sizes)


def v2(stored: bytes, dtype: int = 0, storage: int = 0, data: bytes = b"") -> bytes:
    context = struct.pack("<iii", 1, 0, dtype)
    return head(1) + struct.pack("<Ii", 0xF993FAC9, storage) + stored + context + data


NO_NAMES = struct.pack("<Q", 0)
ONE = v2(shape(1), data=b"\0" * 4)


def sparse(storage: int, parts: list[tuple[int, bytes]], data: bytes) -> bytes:
    described = b"".join(struct.pack("<i", d) + s for d, s in parts)
    return v2(shape(1, 2) + shape(4, 2), storage=storage, data=described + data) + NO_NAMES


HOSTILE: list[tuple[str, bytes, str]] = [
    ("empty", b"", "needs 16 bytes, 0 are left"),
    ("magic", struct.pack("<QQQ", 0x113, 0, 0) + NO_NAMES, "begins with 0x113"),
    ("reserved", struct.pack("<QQQ", 0x112, 1, 0) + NO_NAMES, "no NDArray list"),
    ("huge count", head(2**62), "more than the file can hold"),
    ("huge count of names", ONE + struct.pack("<Q", 2**60), "more than the file can hold"),
    ("huge shape", v2(shape(2**31, 2**31)), "larger than any array"),
    ("huge beside zero", v2(shape(0, 2**62)), "larger than any array"),
    ("large shape", v2(shape(2**20, 2**18)), "the file is cut off"),
    ("negative size", v2(shape(-3)), "negative size"),
    ("many axes", head(1) + struct.pack("<Iii", 0xF993FAC9, 0, 2**30), "at most 32"),
    ("negative axes", head(1) + struct.pack("<Iii", 0xF993FAC9, 0, -7), "-7 axes"),
    ("many axes of v0", head(1) + struct.pack("<I", 2**31), "at most 32"),
    ("dtype", v2(shape(1), dtype=13, data=b"\0" * 4), "array 0: the element type 13"),
    ("storage", v2(shape(1), storage=3), "storage type 3"),
    ("sparse v3", head(1) + struct.pack("<Ii", 0xF993FACA, 1), "storage type 1"),
    ("trailing", ONE + NO_NAMES + b"\0", "1 bytes follow"),
    ("names", ONE + struct.pack("<QQQ", 2, 0, 0), "1 arrays, but 2 names"),
    ("long name", ONE + struct.pack("<QQ", 1, 2**40), "at most 4096"),
    ("name beyond the end", ONE + struct.pack("<QQ", 1, 9), "a name needs 9 bytes"),
    ("name in latin-1", ONE + struct.pack("<QQ", 1, 1) + b"\xe9", "no UTF-8"),
    ("row beyond", sparse(1, [(6, shape(1))], b"\0" * 8 + struct.pack("<q", 4)), "do not fit"),
    ("negative row", sparse(1, [(6, shape(1))], b"\0" * 8 + struct.pack("<q", -1)), "negative"),
    ("float rows", sparse(1, [(0, shape(1))], b"\0" * 12), "one row of integers"),
    ("matrix of rows", sparse(1, [(6, shape(1, 1))], b"\0" * 16), "one row of integers"),
    ("csr", sparse(2, [(6, shape(1)), (6, shape(1))], b"\0" * 24), "compressed rows"),
]


@pytest.mark.parametrize(("content", "rule"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_hostile_files_are_refused(content: bytes, rule: str) -> None:
    with pytest.raises(FormatError, match=rule) as refusal:
        read_arrays(content, "bad")
    assert str(refusal.value).startswith("bad: ")


def test_a_name_that_comes_twice_is_refused() -> None:
    record = ONE[24:]
    names = struct.pack("<QQ", 2, 1) + b"a" + struct.pack("<Q", 1) + b"a"
    with pytest.raises(FormatError, match="'a' comes twice"):
        read_arrays(head(2) + record * 2 + names)


def test_a_tiny_sparse_file_cannot_ask_for_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    content = sparse(1, [(6, shape(1))], b"\0" * 8 + struct.pack("<q", 0))
    assert len(read_arrays(content)) == 1
    monkeypatch.setattr(params, "LARGEST_DENSE", 8)
    with pytest.raises(FormatError, match="more than 8 bytes"):
        read_arrays(content)


@pytest.mark.parametrize("file", FILES)
def test_a_cut_file_is_refused_wherever_it_is_cut(file: str) -> None:
    content = golden(f"mxnet/formats/{file}").read_bytes()
    for end in range(len(content)):
        with pytest.raises(FormatError):
            read_arrays(content[:end])
