"""The header of a safetensors file, read before the library sees the file.

    8 bytes                 length n of the header, little-endian
    n bytes                 JSON: {"__metadata__": {...}, "w": {"dtype": "F32", "shape": [2, 3],
                            "data_offsets": [0, 24]}, ...}
    the rest                the tensors, one after another

The library checks offsets, sizes and dtypes. It takes duplicate names and unknown fields, however,
and builds whatever the JSON asks for, so a small file could fill the memory. This reader goes over
the JSON member by member, takes nothing but what is drawn above, and stops at limits.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, TypeVar

from branchgraph.ir.errors import FormatError, MissingError

#: Longest header, in bytes.
LARGEST_HEADER = 64 * 2**20
#: Most tensors of a file.
MOST_TENSORS = 2**16
#: Most entries of the metadata.
MOST_METADATA = 64
#: Most axes of a tensor.
MOST_AXES = 32

_NAME_OF_METADATA = "__metadata__"
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBERS = re.compile(
    rf"\[ *(?:[0-9]{{1,20}}(?: *, *[0-9]{{1,20}}){{0,{MOST_AXES - 1}}})? *\]", re.ASCII
)
_NUMBER = re.compile(r"[0-9]+")
_DECODER = json.JSONDecoder()
#: How other formats begin, to say what a file is instead.
_BEGINNINGS = {
    b"\x80\x02": "a pickle, which is never loaded",
    b"\x80\x03": "a pickle, which is never loaded",
    b"\x80\x04": "a pickle, which is never loaded",
    b"\x80\x05": "a pickle, which is never loaded",
    b"PK\x03\x04": "a zip archive (.npz or PyTorch)",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a .npy file",
    b"\x1f\x8b": "gzip data",
    b"graph ": "the bare text of a graph (read it with parse_graph)",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor; `dtype` as safetensors spells it (`F32`, `BF16`)."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Header:
    """Metadata and tensors of a file, in its order."""

    metadata: dict[str, str]
    tensors: dict[str, Entry]


def read_header(path: str | os.PathLike[str], shown: str = "") -> Header:
    """The header of the file at `path`; messages call it `shown`.

    Raises `MissingError` when there is no file and `FormatError` when it cannot be opened, is no
    safetensors file, or exceeds a limit.
    """
    shown = shown or os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            kind = "a folder" if os.path.isdir(path) else "no regular file"
            raise FormatError(f"{shown}: expected a branchgraph file, got {kind}; name a file")
        with open(path, "rb") as file:
            text = _header_text(file, shown)
    except FileNotFoundError:
        raise MissingError(
            f"{shown}: there is no such file; check the path, or write it first with "
            "branchgraph.ir.file.save"
        ) from None
    except OSError as error:
        raise FormatError(
            f"{shown}: cannot be read: {error.strerror or error}; check the permissions"
        ) from error
    return _Reader(text, shown).header()


def _header_text(file: BinaryIO, shown: str) -> str:
    size = os.fstat(file.fileno()).st_size
    beginning = file.read(8)
    length = int.from_bytes(beginning, "little")
    if len(beginning) < 8 or length > size - 8:
        beginnings = (what for start, what in _BEGINNINGS.items() if beginning.startswith(start))
        looks = next((f"; this looks like {what}" for what in beginnings), "")
        raise FormatError(
            f"{shown}: expected a branchgraph file (safetensors: 8 bytes with the length of the "
            f"header, then the header), got {size} bytes"
            + (f" and a header of {length}" if len(beginning) == 8 else "")
            + (looks or "; the file is cut short or of another kind")
        )
    if length > LARGEST_HEADER:
        raise FormatError(
            f"{shown}: a header of {length} bytes; the limit is {LARGEST_HEADER}. "
            "branchgraph writes no such file"
        )
    try:
        return file.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{shown}: expected a header in UTF-8, got the byte {error.object[error.start]:#04x} "
            f"at {error.start + 8}; copy or save the file again"
        ) from None


class _Reader:
    """A cursor over the JSON text of a header."""

    def __init__(self, text: str, shown: str) -> None:
        self.text = text
        self.shown = shown
        self.at = 0

    def fail(self, expected: str) -> NoReturn:
        got = repr(self.text[self.at : self.at + 20]) if self.at < len(self.text) else "its end"
        raise FormatError(
            f"{self.shown}: broken header: expected {expected} at character {self.at}, got {got}; "
            "copy or save the file again"
        )

    def header(self) -> Header:
        """The whole text as a header."""
        metadata: dict[str, str] = {}

        def member(name: str) -> Entry | None:
            if name != _NAME_OF_METADATA:
                return self.entry(name)
            metadata.update(self.members(lambda key: self.string(f"text for {key}"), MOST_METADATA))
            return None

        found = self.members(member, MOST_TENSORS + 1)
        self.skip()
        if self.at < len(self.text):
            self.fail("nothing after the last }")
        return Header(metadata, {name: e for name, e in found.items() if e is not None})

    def entry(self, name: str) -> Entry:
        """What is said of the tensor `name`."""
        fields: dict[str, object] = {}

        def field(key: str) -> object:
            if key == "dtype":
                return self.string("a dtype")
            if key in ("shape", "data_offsets"):
                return self.numbers(key)
            return self.fail("dtype, shape and data_offsets only")

        fields = self.members(field, 3)
        if len(fields) != 3:
            self.fail(f"dtype, shape and data_offsets of {name[:80]!r} before this")
        shape = fields["shape"]
        assert isinstance(shape, tuple)
        return Entry(str(fields["dtype"]), shape)

    def members(self, value: Callable[[str], T], most: int) -> dict[str, T]:
        """The object here; `value(name)` reads each value. Every name comes once."""
        found: dict[str, T] = {}
        self.mark("{")
        self.skip()
        if self.text.startswith("}", self.at):
            self.at += 1
            return found
        while True:
            if len(found) == most:
                self.fail(f"at most {most} members")
            start = self.at
            name = self.string("a name")
            if name in found:
                self.at = start
                self.fail(f"each name once (duplicate {name[:80]!r})")
            self.mark(":")
            found[name] = value(name)
            if self.mark(",}") == "}":
                return found

    def mark(self, allowed: str) -> str:
        """One of the characters `allowed`."""
        self.skip()
        mark = self.text[self.at : self.at + 1]
        if not mark or mark not in allowed:
            self.fail(" or ".join(allowed))
        self.at += 1
        return mark

    def string(self, what: str) -> str:
        """A JSON string."""
        self.skip()
        if not self.text.startswith('"', self.at):
            self.fail(what)
        try:
            value, self.at = _DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError:
            self.fail(what)
        return str(value)

    def numbers(self, what: str) -> tuple[int, ...]:
        """A list of at most `MOST_AXES` sizes."""
        self.skip()
        match = _NUMBERS.match(self.text, self.at)
        if match is None:
            self.fail(f"{what} as a list of at most {MOST_AXES} sizes")
        self.at = match.end()
        return tuple(map(int, _NUMBER.findall(match.group())))

    def skip(self) -> None:
        """Go over white space."""
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
