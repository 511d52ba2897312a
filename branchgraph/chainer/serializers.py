"""`chainer.serializers`: models and optimizers in `.npz` files, byte layout of Chainer.

One `.npy` member an entry, keys without a leading slash. An entry that is None is a 0-d object
array in Chainer's files, that is a pickle; `branchgraph.ir.npz`, which reads, never unpickles.
"""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from branchgraph.chainer.serializer import AbstractSerializer, Deserializer, Serializer
from branchgraph.ir.atomic import replacing
from branchgraph.ir.npz import Archive, open_npz

__all__ = ["DictionarySerializer", "NpzDeserializer", "load_npz", "save_npz"]


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


def _fitting(key: str, into: np.ndarray) -> Callable[[tuple[int, ...]], None]:
    """A check that an array of some shape can be copied `into` this one."""

    def check(shape: tuple[int, ...]) -> None:
        try:
            fits = np.broadcast_shapes(shape, into.shape) == into.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{key}: the file has shape {shape}, the model {into.shape}")

    return check


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
            return self.npz.read(
                key, _fitting(key, value) if isinstance(value, np.ndarray) else None
            )
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
    if isinstance(file, (str, os.PathLike)) and not os.path.exists(file):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(file))
    with open_npz(file) as archive:
        NpzDeserializer(archive, path, strict, ignore_names).load(obj)
