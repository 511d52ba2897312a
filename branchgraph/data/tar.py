"""Reader of named members of a .tar.gz archive. Nothing is ever written to the disk.

    per member: a header of 512 bytes (name at 0, size at 124 in octal, sum of its bytes at 148,
    kind at 156, "ustar" at 257, folder of the name at 345), the content, zeros up to 512 bytes;
    two blocks of zeros end the archive

Only regular files whose names were asked for are read, each up to its limit; links, devices,
extended headers and other files are gone over. The sum of everything that is decompressed has a
limit too, so an archive that would expand without end stops early.

Source: IEEE Std 1003.1-2017, "pax - portable archive interchange", ustar interchange format.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator, Mapping
from typing import NoReturn

from branchgraph.data.opening import opened
from branchgraph.ir.errors import FormatError

#: Most members of an archive.
MOST_MEMBERS = 1000
#: What an archive may hold beside the members asked for, in bytes.
LARGEST_REST = 16 * 2**20

_BLOCK = 512
_CHUNK = 2**20
_REGULAR = b"0\0"


def read_members(path: str | os.PathLike[str], limits: Mapping[str, int]) -> dict[str, bytearray]:
    """The members of the archive at `path` named in `limits`, which gives the most bytes of each.

    A name that is not in the archive is not in the answer. Raises `MissingError` when there is no
    file, and `FormatError` when it is no sound .tar.gz archive or goes beyond a limit.
    """
    with opened(path, "a .tar.gz archive") as raw, gzip.GzipFile(fileobj=raw) as file:
        return _Archive(file, os.fspath(path), limits).members()


class _Archive:
    """A walk over an archive, forwards only."""

    def __init__(self, file: gzip.GzipFile, shown: str, limits: Mapping[str, int]) -> None:
        self.file = file
        self.shown = shown
        self.limits = limits
        self.left = sum(limits.values()) + LARGEST_REST

    def fail(self, what: str) -> NoReturn:
        raise FormatError(f"{self.shown}: {what}; download the file again")

    def members(self) -> dict[str, bytearray]:
        found: dict[str, bytearray] = {}
        for header in self.headers():
            name, size = self.name_and_size(header)
            if name not in self.limits or header[156] not in _REGULAR:
                self.skip(-(-size // _BLOCK) * _BLOCK)
                continue
            if name in found:
                self.fail(f"two members {name!r}")
            if size > self.limits[name]:
                self.fail(f"{name} of {size} bytes; the limit is {self.limits[name]}")
            found[name] = self.content(size)
            self.skip(-size % _BLOCK)
        self.to_the_end()
        return found

    def headers(self) -> Iterator[bytes]:
        """The headers up to the block of zeros, one whenever the one before is gone over."""
        for _ in range(MOST_MEMBERS):
            header = bytes(self.content(_BLOCK))
            if not any(header):
                return
            yield header
        self.fail(f"more than {MOST_MEMBERS} members")

    def name_and_size(self, header: bytes) -> tuple[str, int]:
        """What a header says, once its sum is right."""
        expected = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if _octal(header[148:156]) != expected:
            self.fail("no tar archive, or a damaged one: a header whose sum is wrong")
        size = _octal(header[124:136])
        if size is None:
            self.fail("a member whose size is no octal number")
        name = _text(header[:100])
        if header[257:263] == b"ustar\0" and header[345]:  # GNU tar keeps times here
            name = f"{_text(header[345:500])}/{name}"
        return name.removeprefix("./"), size

    def content(self, count: int) -> bytearray:
        """Exactly `count` bytes, taken piece by piece so that a lie about a size costs nothing."""
        found = bytearray()
        while len(found) < count:
            found += self.piece(count - len(found))
        return found

    def skip(self, count: int) -> None:
        while count:
            count -= len(self.piece(count))

    def piece(self, most: int) -> bytes:
        """Between 1 and `most` bytes."""
        if most > self.left:
            self.fail("holds more than the files of the data set")
        chunk = self.file.read(min(most, _CHUNK))
        if not chunk:
            self.fail("the archive is cut short")
        self.left -= len(chunk)
        return chunk

    def to_the_end(self) -> None:
        """Go over what fills up the archive; gzip compares its checksum at the end of the data."""
        while chunk := self.file.read(_CHUNK):
            self.left -= len(chunk)
            if self.left < 0:
                self.fail("holds more than the files of the data set")


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    if any(d not in b"01234567" for d in digits):
        return None
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("latin-1")
