"""The idx reader gives what was written, and refuses what is broken or made to harm."""

from __future__ import annotations

import gzip
import os
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from branchgraph.data.idx import read_idx
from branchgraph.ir.errors import BranchgraphError, FormatError, MissingError

SECONDS = 8.0
CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def header(code: int, *shape: int) -> bytes:
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def idx(array: np.ndarray) -> bytes:
    big = array.astype(array.dtype.newbyteorder(">"))
    return header(CODES[array.dtype.str[1:]], *array.shape) + big.tobytes()


def write(folder: Path, content: bytes) -> Path:
    path = folder / "images"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3, 4)])
def test_arrays_round_trip(dtype: str, shape: tuple[int, ...], pack, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    array = np.random.default_rng(0).normal(0, 50, shape).astype(dtype)
    read = read_idx(write(tmp_path, pack(idx(array))))
    assert read.dtype == np.dtype(dtype)
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, array)


def test_arrays_may_be_edited(tmp_path: Path) -> None:
    array = read_idx(write(tmp_path, idx(np.zeros(3, np.uint8))))
    array[0] = 1
    assert array.tolist() == [1, 0, 0]


def bomb(head: bytes) -> bytes:
    """A gzip file of a few MB whose content would be 2 GiB of zeros behind `head`."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    first = (
        squeeze.compress(head) + squeeze.compress(bytes(2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    )
    # After a full flush the same block can be repeated without compressing it again.
    block = squeeze.compress(bytes(2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return first + block * 2047


SOUND = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
ZIPPED = gzip.compress(SOUND)
ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected an idx file .*got nothing"),
    "three bytes": (SOUND[:3], "expected an idx file .*got 000008"),
    "wrong magic": (b"\x01" + SOUND[1:], "expected an idx file .*got 01000803"),
    "unknown dtype code": (header(0x0A, 3) + bytes(3), "a dtype code of 08, 09, .*got 00000a01"),
    "a pickle": (b"\x80\x04\x95" + bytes(99), "expected an idx file"),
    "too many axes": (header(0x08, *[1] * 200) + bytes(1), "expected at most 8 axes, got 200"),
    "header cut short": (SOUND[:10], "cut short within its header"),
    "content cut short": (SOUND[:-1], "expected 24 bytes of elements as declared, got 23"),
    "trailing byte": (SOUND + b"\0", "expected 24 bytes of elements as declared, got more"),
    "huge sizes": (header(0x08, *[2**32 - 1] * 8), "the limit is 2147483648 bytes"),
    "sizes whose product is 2^64": (header(0x0E, 2**31, 2**30), "the limit is 2147483648 bytes"),
    "huge sizes beside a zero": (header(0x08, 0, *[2**32 - 1] * 7), "the limit is 2147483648"),
    "2 GiB declared, nothing there": (header(0x08, 2**31), "2147483648 bytes .*, got 0"),
    "gzip cut short": (ZIPPED[:-9], "gzip data is cut short"),
    "gzip header only": (ZIPPED[:10], "gzip data is cut short"),
    "gzip with a wrong checksum": (ZIPPED[:-8] + bytes(8), "broken gzip data"),
    "gzip with damaged content": (ZIPPED[:10] + b"\x07" + ZIPPED[11:], "broken gzip data"),
    "gzip of something else": (gzip.compress(b"hello world"), "expected an idx file"),
    "gzip with content cut short": (gzip.compress(SOUND[:-1]), "declared, got 23"),
    "gzip with a trailing byte": (gzip.compress(SOUND + b"\0"), "declared, got more"),
    "two gzip members": (ZIPPED + ZIPPED, "declared, got more"),
    "gzip bomb that declares little": (bomb(header(0x08, 100)), "declared, got more"),
    "gzip bomb that declares too much": (
        bomb(header(0x08, 2**31, 2)), "the limit is 2147483648 bytes"),
    "small gzip that declares 2 GiB": (gzip.compress(header(0x08, 2**31)), "declared, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_broken_or_hostile_file_is_refused_quickly(attack: str, tmp_path: Path) -> None:
    content, message = ATTACKS[attack]
    path = write(tmp_path, content)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(FormatError, match=message) as caught:
            read_idx(path)
        elapsed, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert elapsed < SECONDS
    assert peak < 16 * 2**20


def test_a_bomb_within_its_declaration_is_cut_off_by_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path, bomb(header(0x08, 2**30)))
    with pytest.raises(FormatError, match="the limit is 1000 bytes"):
        read_idx(path, limit=1000)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="absent: there is no such file"):
        read_idx(tmp_path / "absent")
    with pytest.raises(FormatError, match="expected an idx file, got something that is no file"):
        read_idx(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this file system")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="got something that is no file"):
        read_idx(tmp_path / "pipe")


def test_random_damage_is_read_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for content in (SOUND, ZIPPED):
        for _ in range(300):
            damaged = bytearray(content)
            damaged[rng.integers(len(damaged))] = rng.integers(256)
            try:
                array = read_idx(write(tmp_path, bytes(damaged)))
            except BranchgraphError:
                continue
            assert array.nbytes == 24
