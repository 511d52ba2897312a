"""`chainer.serializers`: models and optimizers in `.npz` files, byte layout of Chainer.

One `.npy` member an entry, keys without a leading slash. An entry that is None is a 0-d object
array in Chainer's files, that is a pickle; it is recognised by its dtype and never unpickled. What
a file declares is checked against what it can hold before anything is allocated.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np

from branchgraph.chainer.serializer import AbstractSerializer, Deserializer, Serializer
from branchgraph.ir.atomic import replacing
from branchgraph.ir.errors import FormatError

__all__ = ["DictionarySerializer", "NpzDeserializer", "load_npz", "save_npz"]

#: Deflate writes at least one byte for about so many equal ones.
_MOST_DEFLATE = 1032

#: What reading a damaged zip file raises.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, OSError,
    OverflowError, RuntimeError, UnicodeError,
)  # fmt: skip

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class DictionarySerializer(Serializer):
    """Writes an object into a dictionary of arrays."""

    def __init__(self, target: dict[str, Any] | None = None, path: str = "") -> None:
        self.target = {} if target is None else target
        self.path = path

    def __getitem__(self, key: str) -> DictionarySerializer:
        return DictionarySerializer(self.target, f"{self.path}{key.strip('/')}/")

    def __call__(self, key: str, value: Any) -> Any:
        self.target[self.path + key.lstrip("/")] = np.asarray(value)
        return value


def save_npz(file: Any, obj: Any, compression: bool = True) -> None:
    """Write an object, or a dictionary of arrays, to a path (whole or not at all) or open file."""
    if isinstance(obj, Mapping):
        entries = dict(obj)
    else:
        serializer = DictionarySerializer()
        serializer.save(obj)
        entries = serializer.target
    if hasattr(file, "write"):
        _write(file, entries, compression)
        return
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        _write(stream, entries, compression)


def _write(stream: IO[bytes], entries: Mapping[str, Any], compression: bool) -> None:
    method = zipfile.ZIP_DEFLATED if compression else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", method, allowZip64=True) as archive:
        for key, value in entries.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(value))


class Archive(Mapping[str, Any]):
    """The entries of an `.npz` file, read when they are asked for; None for object entries."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            key = _key(info.filename)
            if key in self._members:
                raise FormatError(f"the archive has two entries {key!r}")
            self._members[key] = info

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, key: object) -> bool:
        return key in self._members

    def __getitem__(self, key: str) -> np.ndarray | None:
        return self.read(key)

    def read(self, key: str, into: np.ndarray | None = None) -> np.ndarray | None:
        """One entry; its shape is compared with the array it will be copied `into` first."""
        info = self._members[key]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(f"{key}: expected a stored or deflated entry")
        try:
            with self._archive.open(info) as member:
                return _read(member, key, info, into)
        except _DAMAGED as e:
            raise FormatError(f"{key}: the entry is damaged or unreadable: {e}") from e


def _key(name: str) -> str:
    """The key of a member; very old files start it with a slash."""
    if not name.isprintable() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise FormatError(f"the archive has an entry with an unsafe name, {name!r}")
    return name.removesuffix(".npy").lstrip("/")


def _read(
    member: IO[bytes], key: str, info: zipfile.ZipInfo, into: np.ndarray | None
) -> np.ndarray | None:
    try:
        version = np.lib.format.read_magic(member)
        if version not in _HEADERS:
            raise ValueError(f"npy version {version} is not supported")
        shape, fortran, dtype = _HEADERS[version](member)
    except _DAMAGED:
        raise
    except Exception as error:  # NumPy's parser of headers raises whatever Python's does
        raise FormatError(f"{key}: no valid .npy header: {error}") from error
    if dtype.hasobject:
        if shape != ():
            raise FormatError(f"{key}: an array of Python objects is not read, it could run code")
        return None
    _check_size(key, info, member.tell(), math.prod(shape) * dtype.itemsize, shape)
    if into is not None:
        _check_fits(key, shape, into)
    array = np.empty(math.prod(shape), dtype)
    if array.nbytes:
        _fill(member, memoryview(array.view(np.uint8)), key)
    return array.reshape(shape, order="F" if fortran else "C")


def _check_size(key: str, info: zipfile.ZipInfo, header: int, data: int, shape: Any) -> None:
    """The header must declare what the member holds, and the member what its bytes can hold."""
    stored = info.compress_type == zipfile.ZIP_STORED
    most = info.compress_size if stored else info.compress_size * _MOST_DEFLATE + 64
    possible = all(n >= 0 for n in shape) and (data or 0 in shape or shape == ())
    if not possible or header + data != info.file_size or info.file_size > most:
        raise FormatError(
            f"{key}: the header declares shape {shape}, {data} bytes, but the entry of "
            f"{info.compress_size} packed bytes holds {max(info.file_size - header, 0)}"
        )


def _check_fits(key: str, shape: tuple[int, ...], into: np.ndarray) -> None:
    try:
        fits = np.broadcast_shapes(shape, into.shape) == into.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{key}: the file has shape {shape}, the model {into.shape}")


def _fill(member: IO[bytes], view: memoryview, key: str) -> None:
    done = 0
    while done < len(view):
        block = member.read(min(len(view) - done, 1 << 20))
        if not block:
            raise FormatError(f"{key}: the entry ends after {done} of {len(view)} bytes")
        view[done : done + len(block)] = block
        done += len(block)
    if member.read(1):
        raise FormatError(f"{key}: the entry is longer than it declares")


Ignore = str | Callable[[str], bool] | list[str | Callable[[str], bool]] | None


class NpzDeserializer(Deserializer):
    """Reads an object from a mapping of arrays: an open `.npz` file or a dictionary."""

    def __init__(
        self, npz: Any, path: str = "", strict: bool = True, ignore_names: Ignore = None
    ) -> None:
        self.npz = Archive(npz.zip) if isinstance(npz, np.lib.npyio.NpzFile) else npz
        self.path = path
        self.strict = strict
        self.ignore_names = ignore_names

    def __getitem__(self, key: str) -> AbstractSerializer:
        path = f"{self.path}{key.strip('/')}/"
        return NpzDeserializer(self.npz, path, self.strict, self.ignore_names)

    def __call__(self, key: str, value: Any) -> Any:
        key = self.path + key.lstrip("/")
        if self._ignored(key):
            return value
        if key not in self.npz:
            if self.strict:
                raise KeyError(f"{key} is not a file in the archive")
            return value
        read = self._read(key, value)
        if read is None or value is None:
            return read
        if isinstance(value, np.ndarray):
            _copy(key, value, read)
            return value
        return _scalar(key, value, read)

    def _read(self, key: str, value: Any) -> np.ndarray | None:
        if isinstance(self.npz, Archive):
            return self.npz.read(key, value if isinstance(value, np.ndarray) else None)
        array = np.asarray(self.npz[key])
        return None if array.dtype == object and array[()] is None else array

    def _ignored(self, key: str) -> bool:
        given = self.ignore_names
        if given is None:
            return False
        rules = given if isinstance(given, (list, tuple, set)) else [given]
        return any(rule(key) if callable(rule) else rule == key for rule in rules)


def _copy(key: str, target: np.ndarray, read: np.ndarray) -> None:
    try:
        np.copyto(target, read)
    except TypeError as error:
        raise TypeError(f"{key}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


#: The array kinds that a Python value of a kind accepts.
_ACCEPTED = {"b": "b", "i": "biu", "u": "biu", "f": "biuf", "c": "biufc", "U": "U", "S": "S"}


def _scalar(key: str, value: Any, read: np.ndarray) -> Any:
    """An array of the file as a value of the type the object had."""
    kind = np.asarray(value).dtype.kind
    if read.dtype.kind not in _ACCEPTED.get(kind, ""):
        raise TypeError(f"{key}: {read.dtype} of the file cannot become {type(value).__name__}")
    if read.ndim:
        raise ValueError(f"{key}: expected one value, the file has shape {read.shape}")
    return type(value)(read[()])


def load_npz(
    file: Any, obj: Any, path: str = "", strict: bool = True, ignore_names: Ignore = None
) -> None:
    """Read an object from a path or an open file.

    `path` is a prefix inside the file; `strict=False` leaves missing entries alone.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else "the file"
        raise FormatError(f"{name}: not an .npz file, or cut off: {error}") from error
    with archive:
        NpzDeserializer(Archive(archive), path, strict, ignore_names).load(obj)
