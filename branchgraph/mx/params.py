"""`.params` files: lists of arrays with or without names (little-endian throughout).

    u64 0x112, u64 0, u64 n, n arrays, u64 m (0 or n), m names (u64 length, bytes)

The first u32 of an array tells its layout:

    V2 0xF993FAC9   i32 storage (0 dense, 1 row_sparse, 2 csr), then the stored shape if sparse,
                    shape, context, i32 dtype, for each auxiliary array i32 dtype and shape, data,
                    auxiliary data; nothing follows the shape of an empty array (ndim 0)
    V3 0xF993FACA   like dense V2, but ndim 0 is a number and ndim -1 is empty
    V1 0xF993FAC8   shape, context, i32 dtype, data
    V0 anything     the u32 is ndim, then that many u32 dims; context, i32 dtype, data

A shape is i32 ndim and ndim times i64; a context is i32 device type and i32 device number. Nothing
is allocated before the file is known to hold it.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np

from branchgraph.ir.atomic import replacing
from branchgraph.ir.errors import FormatError, MissingError
from branchgraph.mx.dtypes import FLAGS, flag_of

#: How every file of arrays begins.
MAGIC = 0x112
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DENSE, _ROW_SPARSE, _CSR = 0, 1, 2
#: Auxiliary arrays of each storage type.
_AUXILIARY = {-1: 0, _DENSE: 0, _ROW_SPARSE: 1, _CSR: 2}
_CPU = struct.pack("<ii", 1, 0)

#: Most axes of an array, and longest name in bytes.
MOST_AXES = 32
LONGEST_NAME = 4096
#: Most elements of an array, axes of no elements counted as one.
MOST_ELEMENTS = 2**40
#: Most bytes of a sparse array once it is dense; its file may be tiny.
LARGEST_DENSE = 2**30
#: Shortest array and shortest name, so that a count can be judged by the bytes that are left.
_SHORTEST_ARRAY = 4
_SHORTEST_NAME = 8

Arrays = dict[str, np.ndarray] | list[np.ndarray]


@dataclass
class Checkpoint:
    """Arguments and auxiliary states of a network by name."""

    arguments: dict[str, np.ndarray] = field(default_factory=dict)
    auxiliary: dict[str, np.ndarray] = field(default_factory=dict)


def load_arrays(path: str | os.PathLike[str]) -> Arrays:
    """The arrays of a file: a dictionary when they have names, a list otherwise."""
    target = Path(path)
    if not target.is_file():
        raise MissingError(f"{target}: there is no such file; give the path of a .params file")
    return read_arrays(target.read_bytes(), str(target))


def read_arrays(content: bytes, what: str = "arrays") -> Arrays:
    """The arrays in the bytes of a file; errors are `FormatError` and begin with `what`."""
    try:
        return _Reader(content).arrays()
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None


def save_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray] | Iterable[np.ndarray]
) -> None:
    """Write a dictionary or a list of arrays, whole or not at all; bytes as MXNet 1.x writes."""
    content = write_arrays(arrays)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_arrays(arrays: Mapping[str, np.ndarray] | Iterable[np.ndarray]) -> bytes:
    """The bytes of a file with these arrays, dense and in the layout V2.

    V2 has no array without axes and none without elements; such arrays are written as V3.
    """
    named = arrays if isinstance(arrays, Mapping) else {}
    values = [np.asarray(a) for a in (named.values() if named else arrays)]
    encoded = [name.encode() for name in named]
    parts = [struct.pack("<QQQ", MAGIC, 0, len(values)), *map(_record, values)]
    parts.append(struct.pack("<Q", len(encoded)))
    parts += [struct.pack("<Q", len(name)) + name for name in encoded]
    return b"".join(parts)


def _record(array: np.ndarray) -> bytes:
    flag = flag_of(array.dtype.newbyteorder("="))
    if flag is None:
        known = ", ".join(map(str, FLAGS.values()))
        raise FormatError(f"arrays of {array.dtype} have no place in the file; known: {known}")
    shape = struct.pack(f"<i{array.ndim}q", array.ndim, *array.shape)
    head = struct.pack("<Ii", _V2 if array.size and array.ndim else _V3, _DENSE)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return head + shape + _CPU + struct.pack("<i", flag) + little.tobytes()


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Arguments and auxiliary states of a `.params` file; other names are passed over."""
    found = load_arrays(path)
    if isinstance(found, list):
        if found:
            raise FormatError(f"{path}: the arrays have no names, so they are no checkpoint")
        return Checkpoint()
    checkpoint = Checkpoint()
    kinds = {"arg": checkpoint.arguments, "aux": checkpoint.auxiliary}
    for key, array in found.items():
        kind, _, name = key.partition(":")
        if kind in kinds:
            kinds[kind][name] = array
    return checkpoint


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write arguments and auxiliary states as `arg:` and `aux:`."""
    arguments = {f"arg:{n}": a for n, a in checkpoint.arguments.items()}
    save_arrays(path, {**arguments, **{f"aux:{n}": a for n, a in checkpoint.auxiliary.items()}})


class _Reader:
    """A cursor over the bytes of a file, which never passes their end."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def arrays(self) -> Arrays:
        magic, reserved = self.unpack("<QQ", "the head of the file")
        if magic != MAGIC or reserved != 0:
            raise FormatError(f"no NDArray list: it begins with {magic:#x}, expected {MAGIC:#x}")
        count = self.count("arrays", _SHORTEST_ARRAY)
        values = [self.array(number) for number in range(count)]
        names = [self.name() for _ in range(self.count("names", _SHORTEST_NAME))]
        if self.position != len(self.content):
            left = len(self.content) - self.position
            raise FormatError(f"{left} bytes follow the last name")
        if not names:
            return values
        if len(names) != count:
            raise FormatError(f"{count} arrays, but {len(names)} names")
        if len(set(names)) != count:
            ((repeated, _),) = Counter(names).most_common(1)
            raise FormatError(f"the name {repeated!r} comes twice")
        return dict(zip(names, values))

    # -- pieces --------------------------------------------------------------------------------

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.content) - self.position:
            left = len(self.content) - self.position
            raise FormatError(f"{what} needs {size} bytes, {left} are left; the file is cut off")
        self.position += size
        return self.content[self.position - size : self.position]

    def unpack(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))

    def count(self, what: str, shortest: int) -> int:
        (count,) = self.unpack("<Q", f"the number of {what}")
        if count * shortest > len(self.content) - self.position:
            raise FormatError(f"{count} {what} are announced, more than the file can hold")
        return count

    def name(self) -> str:
        (length,) = self.unpack("<Q", "the length of a name")
        if length > LONGEST_NAME:
            raise FormatError(f"a name of {length} bytes; at most {LONGEST_NAME} are read")
        try:
            return self.take(length, "a name").decode()
        except UnicodeDecodeError:
            raise FormatError("a name is no UTF-8") from None

    def shape(self) -> tuple[int, ...] | None:
        """A shape, or None where ndim is -1."""
        (axes,) = self.unpack("<i", "a shape")
        if axes == -1:
            return None
        return self.dims(axes, "q")

    def dims(self, axes: int, code: str) -> tuple[int, ...]:
        if not 0 <= axes <= MOST_AXES:
            raise FormatError(f"{axes} axes; at most {MOST_AXES} are read")
        sizes = self.unpack(f"<{axes}{code}", "a shape")
        if any(d < 0 for d in sizes):
            raise FormatError(f"the shape {sizes} has a negative size")
        if prod(max(d, 1) for d in sizes) > MOST_ELEMENTS:
            raise FormatError(f"the shape {sizes} is larger than any array")
        return sizes

    def dtype(self) -> np.dtype:
        (flag,) = self.unpack("<i", "an element type")
        if flag not in FLAGS:
            raise FormatError(f"the element type {flag} is unknown")
        return FLAGS[flag]

    def data(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        content = self.take(prod(shape) * dtype.itemsize, f"{dtype} data of shape {shape}")
        if dtype == np.bool_:
            return (np.frombuffer(content, np.uint8) != 0).reshape(shape)
        stored: np.ndarray = np.frombuffer(content, dtype.newbyteorder("<"))
        return stored.astype(dtype).reshape(shape)

    # -- arrays --------------------------------------------------------------------------------

    def array(self, number: int) -> np.ndarray:
        try:
            return self._array()
        except FormatError as error:
            raise FormatError(f"array {number}: {error}") from None

    def _array(self) -> np.ndarray:
        (first,) = self.unpack("<I", "an array")
        if first in (_V2, _V3):
            return self.with_storage(scalars=first == _V3)
        shape = self.shape() if first == _V1 else self.dims(first, "I")
        return self.dense(shape or None)

    def dense(self, shape: tuple[int, ...] | None) -> np.ndarray:
        """What follows a shape; an array of no shape is empty and has nothing."""
        if shape is None:
            return np.zeros(0, np.float32)
        self.take(8, "a context")
        dtype = self.dtype()
        return self.data(dtype, shape)

    def with_storage(self, scalars: bool) -> np.ndarray:
        (storage,) = self.unpack("<i", "a storage type")
        count = _AUXILIARY.get(storage)
        if count is None or (scalars and count):
            raise FormatError(f"the storage type {storage} is unknown")
        stored = self.shape() if count else None
        shape = self.shape()
        if not count:
            return self.dense(shape if scalars else shape or None)
        if not shape:
            return np.zeros(0, np.float32)
        self.take(8, "a context")
        dtype = self.dtype()
        described = [(self.dtype(), self.shape() or ()) for _ in range(count)]
        values = self.data(dtype, stored or ())
        indices = [self.indices(d, s) for d, s in described]
        if prod(shape) * dtype.itemsize > LARGEST_DENSE:
            raise FormatError(f"dense, the sparse {shape} has more than {LARGEST_DENSE} bytes")
        return (
            _from_rows(shape, values, *indices)
            if count == 1
            else _from_csr(shape, values, *indices)
        )

    def indices(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        if dtype.kind not in "iu" or len(shape) != 1:
            raise FormatError(f"indices are one row of integers, got {dtype} of shape {shape}")
        found = self.data(dtype, shape)
        if found.size and (found.min() < 0 or found.max() > 2**62):
            raise FormatError("indices are negative")
        return found.astype(np.int64)


def _from_rows(shape: tuple[int, ...], values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows at their positions, zeros elsewhere."""
    if values.shape != (len(rows), *shape[1:]) or (rows.size and rows.max() >= shape[0]):
        raise FormatError(f"{len(rows)} stored rows {values.shape} do not fit the shape {shape}")
    dense = np.zeros(shape, values.dtype)
    dense[rows] = values
    return dense


def _from_csr(
    shape: tuple[int, ...], values: np.ndarray, starts: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Compressed rows: row r has the values from starts[r] to starts[r + 1]."""
    fits = (
        len(shape) == 2
        and len(starts) == shape[0] + 1
        and values.shape == columns.shape
        and starts[0] == 0
        and starts[-1] == len(columns)
        and (np.diff(starts) >= 0).all()
        and not (columns.size and columns.max() >= shape[1])
    )
    if not fits:
        raise FormatError(f"the compressed rows do not fit the shape {shape}")
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(starts)), columns] = values
    return dense
