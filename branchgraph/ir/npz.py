"""Reader of `.npz` archives: a zip file with one `.npy` member an array. Never unpickles anything.

    with open_npz(path) as archive:
        for name in archive:
            array = archive[name]

An entry is read when it is asked for. Before anything is allocated, its header must declare what
the entry holds, the entry what its packed bytes can hold, and the whole archive no more than
`LARGEST_FACTOR` times what it weighs, so a small file cannot fill the memory. An entry of Python
objects is a pickle: one without axes is how Chainer writes None, and is read as None; others are
refused.

Source: NumPy Enhancement Proposal 1, "A simple file format for NumPy arrays".
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np

from branchgraph.ir.errors import FormatError, MissingError

#: Longest list of entries, in bytes; each takes about 50 and its name.
LARGEST_DIRECTORY = 8 * 2**20
#: An archive may always unpack to this many bytes,
LARGEST_SMALL = 256 * 2**20
#: and to this many times its own size.
LARGEST_FACTOR = 64
#: Longest name of an entry, in characters.
LONGEST_NAME = 500
#: Longest header of an entry, in bytes; NumPy parses at most 10 000.
LARGEST_HEADER = 10_000
#: Most axes of an array.
MOST_AXES = 32

#: Deflate writes at least one byte for about so many equal ones.
_MOST_DEFLATE = 1032
#: Flags of entries that are encrypted.
_ENCRYPTED = 0x1 | 0x40

#: What reading a damaged zip file raises.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, OSError,
    OverflowError, RuntimeError, UnicodeError, ValueError,
)  # fmt: skip

#: The beginning of each version, the bytes of the length that follows, and NumPy's parser.
_HEADERS: dict[bytes, tuple[int, Callable[[IO[bytes]], Any]]] = {
    b"\x93NUMPY\x01\x00": (2, np.lib.format.read_array_header_1_0),
    b"\x93NUMPY\x02\x00": (4, np.lib.format.read_array_header_2_0),
}


@contextlib.contextmanager
def open_npz(file: str | os.PathLike[str] | IO[bytes]) -> Iterator[Archive]:
    """The entries of the archive at a path or in an open file.

    Raises `MissingError` when there is no file and `FormatError` when it is no zip archive, has
    entries that are unsafe or come twice, or goes beyond a limit.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(file, (str, os.PathLike)):
            shown = os.fspath(file)
            stream: IO[bytes] = stack.enter_context(_opened(shown))
        else:
            shown, stream = "the file", file
        _check_directory(stream, shown)
        try:
            archive = stack.enter_context(zipfile.ZipFile(stream))
        except _DAMAGED as error:
            raise FormatError(f"{shown}: not an .npz file, or cut off: {error}") from error
        yield Archive(archive, shown)


def _opened(shown: str) -> IO[bytes]:
    if os.path.exists(shown) and not os.path.isfile(shown):
        raise FormatError(f"{shown}: expected an .npz file, got something that is no file")
    try:
        return open(shown, "rb")
    except FileNotFoundError:
        raise MissingError(f"{shown}: there is no such file; check the path") from None
    except OSError as error:
        raise FormatError(
            f"{shown}: cannot be read: {error.strerror or error}; check the permissions"
        ) from error


def _check_directory(stream: IO[bytes], shown: str) -> None:
    """Refuse a list of entries that is too long, which the library would turn into objects."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - 2**16 - 22, 0))
    tail = stream.read(2**16 + 22)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise FormatError(f"{shown}: not an .npz file, or cut off: it has no list of entries")
    sizes = [int.from_bytes(tail[end + 12 : end + 16], "little")]
    if tail[max(end - 20, 0) : end].startswith(b"PK\x06\x07"):  # sizes in 64 bits count instead
        said = int.from_bytes(tail[end - 12 : end - 4], "little")
        sizes = [_wide_size(stream, at) for at in (size - len(tail) + end - 76, said)]
    stream.seek(0)
    if max(sizes) > LARGEST_DIRECTORY:
        raise FormatError(
            f"{shown}: a list of entries of {max(sizes)} bytes; the limit is {LARGEST_DIRECTORY}"
        )


def _wide_size(stream: IO[bytes], at: int) -> int:
    """The size of the list of entries that the record at `at` gives in 64 bits, 0 for no record."""
    if not 0 <= at < 2**63:
        return 0
    stream.seek(at)
    record = stream.read(56)
    return int.from_bytes(record[40:48], "little") if record.startswith(b"PK\x06\x06") else 0


class Archive(Mapping[str, "np.ndarray | None"]):
    """The entries of an `.npz` file, read when they are asked for; None for entries of None."""

    def __init__(self, archive: zipfile.ZipFile, shown: str = "the archive") -> None:
        self._archive = archive
        self._shown = shown
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = _name(info.filename, shown)
            if name in self._members:
                raise FormatError(f"{shown}: two entries {name!r}")
            if info.file_size > _most(info):
                raise FormatError(
                    f"{shown}: {name}: {info.compress_size} packed bytes cannot hold "
                    f"{info.file_size}"
                )
            self._members[name] = info
        packed = sum(info.compress_size for info in self._members.values())
        unpacked = sum(info.file_size for info in self._members.values())
        if unpacked > max(LARGEST_SMALL, LARGEST_FACTOR * min(packed, _size(archive))):
            raise FormatError(
                f"{shown}: would unpack from {packed} to {unpacked} bytes; the limit is "
                f"{LARGEST_FACTOR} times as many. If you trust it, save it again uncompressed"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> np.ndarray | None:
        return self.read(name)

    def read(
        self, name: str, check: Callable[[tuple[int, ...]], None] | None = None
    ) -> np.ndarray | None:
        """One entry; `check` sees its shape before the data are read, and may raise."""
        info = self._members[name]
        name = f"{self._shown}: {name}"
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(f"{name}: expected a stored or deflated entry")
        if info.flag_bits & _ENCRYPTED:
            raise FormatError(f"{name}: the entry is encrypted")
        with _unharmed(name):
            member = self._archive.open(info)
        with member:
            header = _header(member, name)
            if header is None:
                return None
            shape, by_columns, dtype = header
            _check_size(name, info, member.tell(), math.prod(shape) * dtype.itemsize, shape)
            if check is not None:
                check(shape)
            array = np.empty(math.prod(shape), dtype)
            if array.nbytes:
                with _unharmed(name):
                    _fill(member, array.view(np.uint8).data, name)
            return array.reshape(shape, order="F" if by_columns else "C")


def _size(archive: zipfile.ZipFile) -> int:
    """The size of the file, beyond which no entry can have packed bytes."""
    stream = archive.fp
    assert stream is not None
    position = stream.tell()
    size = stream.seek(0, os.SEEK_END)
    stream.seek(position)
    return size


@contextlib.contextmanager
def _unharmed(name: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise FormatError(f"{name}: the entry is damaged or unreadable: {error}") from error


def _name(name: str, shown: str) -> str:
    """The name of the array in a member; very old files of Chainer start it with a slash."""
    climbs = ".." in PurePosixPath(name).parts or "\\" in name
    if climbs or not name.isprintable() or len(name) > LONGEST_NAME:
        raise FormatError(f"{shown}: an entry with an unsafe name, {name[:200]!r}")
    return name.removesuffix(".npy").lstrip("/")


def _most(info: zipfile.ZipInfo) -> int:
    """What the packed bytes of a member can hold."""
    if info.compress_type == zipfile.ZIP_STORED:
        return info.compress_size
    return info.compress_size * _MOST_DEFLATE + 64


def _header(member: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]] | None:
    """Shape, whether by columns, and dtype; None for an entry of None."""
    with _unharmed(name):
        magic = member.read(8)
        if magic not in _HEADERS:
            raise FormatError(f"{name}: expected a .npy entry, version 1 or 2, got {magic.hex()}")
        size, parse = _HEADERS[magic]
        length = member.read(size)
        if int.from_bytes(length, "little") > LARGEST_HEADER:
            raise FormatError(f"{name}: a .npy header of more than {LARGEST_HEADER} bytes")
        text = io.BytesIO(length + member.read(int.from_bytes(length, "little")))
    try:
        shape, by_columns, dtype = parse(text)
    except Exception as error:  # NumPy's parser of headers raises whatever Python's does
        raise FormatError(f"{name}: no valid .npy header: {str(error)[:200]}") from error
    if dtype.hasobject:
        if shape != ():
            raise FormatError(f"{name}: an array of Python objects is not read, it could run code")
        return None
    if dtype.kind not in "biufcSUV" or dtype.names is not None or len(shape) > MOST_AXES:
        raise FormatError(f"{name}: expected an array of numbers or text, got {str(dtype)[:200]}")
    return shape, by_columns, dtype


def _check_size(
    name: str, info: zipfile.ZipInfo, header: int, data: int, shape: tuple[int, ...]
) -> None:
    """The header must declare what the member holds."""
    possible = all(n >= 0 for n in shape) and (data or 0 in shape or shape == ())
    if not possible or header + data != info.file_size:
        raise FormatError(
            f"{name}: the header declares shape {shape}, {data} bytes, but the entry of "
            f"{info.compress_size} packed bytes holds {max(info.file_size - header, 0)}"
        )


def _fill(member: IO[bytes], view: memoryview, name: str) -> None:
    done = 0
    while done < len(view):
        block = member.read(min(len(view) - done, 1 << 20))
        if not block:
            raise FormatError(f"{name}: the entry ends after {done} of {len(view)} bytes")
        view[done : done + len(block)] = block
        done += len(block)
    if member.read(1):
        raise FormatError(f"{name}: the entry is longer than it declares")
