"""Reader of idx files, the format of MNIST and its relatives, plain or gzip-compressed.

    2 zero bytes, a dtype code, the rank r, r sizes (u32), then the elements; all big-endian

The size that the header declares is checked against a limit and bounds what is read: of a gzip file
no more than that and one byte is ever decompressed, however far its content would expand.

Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", file format.
"""

from __future__ import annotations

import gzip
import os
from math import prod
from typing import IO

import numpy as np

from branchgraph.data.opening import opened
from branchgraph.ir.errors import FormatError

#: Largest content that is read, in bytes.
LARGEST_CONTENT = 2 * 2**30

_DTYPES: dict[int, np.dtype] = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_MOST_AXES = 8
_CHUNK = 2**20
_GZIP = b"\x1f\x8b"


def read_idx(path: str | os.PathLike[str], *, limit: int = LARGEST_CONTENT) -> np.ndarray:
    """The array of an idx file in native byte order; gzip is recognised by its content.

    Raises `MissingError` when there is no file, and `FormatError` when the file is no idx file,
    declares more than `limit` bytes, or holds fewer or more than it declares.
    """
    shown = os.fspath(path)
    with opened(path, "an idx file") as raw:
        compressed = raw.read(2) == _GZIP
        raw.seek(0)
        if not compressed:
            return _read(raw, shown, limit, os.fstat(raw.fileno()).st_size)
        with gzip.GzipFile(fileobj=raw) as file:
            return _read(file, shown, limit, None)


def _read(file: IO[bytes] | gzip.GzipFile, shown: str, limit: int, size: int | None) -> np.ndarray:
    """The array in `file`, which is `size` bytes long where that is known beforehand."""
    dtype, shape = _header(file, shown)
    count = dtype.itemsize * prod(shape)
    if dtype.itemsize * prod(max(n, 1) for n in shape) > limit:
        raise FormatError(
            f"{shown}: declares {list(shape)} of {dtype.name}; the limit is {limit} bytes. Check "
            "that this is the file you mean"
        )
    if size is not None and size - 4 - 4 * len(shape) < count:
        raise _cut_short(shown, count, size - 4 - 4 * len(shape))
    content = _at_most(file, count + 1)
    if len(content) < count:
        raise _cut_short(shown, count, len(content))
    if len(content) > count:
        raise FormatError(
            f"{shown}: expected {count} bytes of elements as declared, got more; "
            "download the file again"
        )
    array = np.frombuffer(content, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _header(file: IO[bytes] | gzip.GzipFile, shown: str) -> tuple[np.dtype, tuple[int, ...]]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES:
        codes = ", ".join(f"{code:02x}" for code in _DTYPES)
        raise FormatError(
            f"{shown}: expected an idx file (0000, a dtype code of {codes}, the rank), "
            f"got {magic.hex() or 'nothing'}; check that this is an idx file"
        )
    rank = magic[3]
    if rank > _MOST_AXES:
        raise FormatError(f"{shown}: expected at most {_MOST_AXES} axes, got {rank}")
    sizes = file.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise FormatError(f"{shown}: cut short within its header; download the file again")
    return _DTYPES[magic[2]], tuple(int(n) for n in np.frombuffer(sizes, ">u4"))


def _at_most(file: IO[bytes] | gzip.GzipFile, count: int) -> bytearray:
    """Up to `count` bytes, so that a file that declares much and holds little costs little."""
    content = bytearray()
    while len(content) < count:
        chunk = file.read(min(_CHUNK, count - len(content)))
        if not chunk:
            break
        content += chunk
    return content


def _cut_short(shown: str, expected: int, got: int) -> FormatError:
    return FormatError(
        f"{shown}: cut short: expected {expected} bytes of elements as declared, got {got}; "
        "download the file again"
    )
