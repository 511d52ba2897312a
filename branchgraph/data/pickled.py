"""Reader of the pickles that hold CIFAR's Python version, without ever running them.

A pickle is a program for a stack machine. This machine knows the instructions that build
dictionaries, lists, tuples, strings, numbers and one NumPy array of bytes, and no other. A name
that is looked up gives an inert record, only the two that make an empty array and a dtype can be
called, and nothing is ever imported. Strings are bounded by the size of the file, and the number of
instructions has a limit.

Source: CPython, Lib/pickletools.py, which defines the instructions of all protocols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from branchgraph.ir.errors import FormatError

#: Most instructions; the largest file of CIFAR-100 takes about 300 000.
MOST_INSTRUCTIONS = 10**6

_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NDARRAY = "numpy ndarray"
_DTYPE = "numpy dtype"
_NAMES = {*_RECONSTRUCT, _NDARRAY, _DTYPE}
_MARK = object()


def read_pickled(content: bytes | bytearray, shown: str) -> dict[str, Any]:
    """The dictionary that a pickle describes: strings as text, arrays of bytes as uint8.

    Raises `FormatError`, which calls the file `shown`, for everything else.
    """
    value = _Machine(content, shown).run()
    if not isinstance(value, dict):
        raise FormatError(f"{shown}: expected a pickled dictionary, got {type(value).__name__}")
    return {k: v.value if isinstance(v, _Array) else v for k, v in value.items()}


@dataclass(frozen=True)
class _Name:
    """What stands for a global of Python."""

    name: str


@dataclass
class _Array:
    """What stands for an array until its state comes."""

    value: np.ndarray | None = None


@dataclass(frozen=True)
class _Dtype:
    spelling: str


class _Machine:
    def __init__(self, content: bytes | bytearray, shown: str) -> None:
        self.content = memoryview(content)
        self.shown = shown
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.arrays = 0

    def fail(self, what: str) -> NoReturn:
        raise FormatError(
            f"{self.shown}: {what} at byte {self.at}; expected the pickle of a CIFAR batch, and "
            "no other is read because pickles can run code. Download the file again, or the "
            "binary version"
        )

    def run(self) -> Any:
        count = 0
        while (code := self.take(1)[0]) != ord("."):
            count += 1
            if count > MOST_INSTRUCTIONS:
                self.fail(f"more than {MOST_INSTRUCTIONS} instructions")
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                self.fail(f"the instruction {code:#04x}, which is not allowed")
            instruction(self)
        return self.pop()

    # -- the stack and the bytes

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count < 0 or count > len(self.content) - self.at:
            self.fail("the file is cut short")
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            self.fail("an instruction that lacks its operand")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        found: list[Any] = []
        while self.stack and self.stack[-1] is not _MARK:
            found.append(self.stack.pop())
        if not self.stack:
            self.fail("an instruction that lacks its mark")
        self.stack.pop()
        return found[::-1]

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            self.fail(f"an instruction that lacks its {kind.__name__.strip('_').lower()}")
        return self.stack[-1]

    # -- instructions

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def text(self, size: int) -> None:
        """A string of one byte a character; what an array holds is one too in Python 2."""
        self.push(str(self.take(self.number(size)), "latin-1"))

    def unicode(self, size: int) -> None:
        try:
            self.push(str(self.take(self.number(size)), "utf-8"))
        except UnicodeDecodeError:
            self.fail("a string that is no UTF-8")

    def byte_string(self, size: int) -> None:
        self.push(self.take(self.number(size)))

    def gather(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def remember(self, size: int) -> None:
        if not self.stack:
            self.fail("nothing to remember")
        self.memo[self.number(size)] = self.stack[-1]

    def memoize(self) -> None:
        if not self.stack:
            self.fail("nothing to remember")
        self.memo[len(self.memo)] = self.stack[-1]

    def recall(self, size: int) -> None:
        number = self.number(size)
        if number not in self.memo:
            self.fail(f"the value {number}, which was not remembered")
        self.push(self.memo[number])

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top(dict)
        if len(values) % 2 or not all(isinstance(key, str) for key in values[::2]):
            self.fail("a dictionary whose keys are not text")
        target.update(zip(values[::2], values[1::2]))

    def look_up(self) -> None:
        lines = bytes(self.content[self.at : self.at + 200]).split(b"\n", 2)
        name = b" ".join(lines[:2]).decode("latin-1")
        if len(lines) < 3 or name not in _NAMES:
            self.fail(f"the name {name[:80]!r}, which is not allowed")
        self.take(len(lines[0]) + len(lines[1]) + 2)
        self.push(_Name(name))

    def stack_look_up(self) -> None:
        name = [self.pop(), self.pop()][::-1]
        if not all(isinstance(part, str) and len(part) < 80 for part in name):
            self.fail("a name that is no short text")
        if " ".join(name) not in _NAMES:
            self.fail(f"the name {' '.join(name)!r}, which is not allowed")
        self.push(_Name(" ".join(name)))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            self.fail("a call that is not allowed")
        if function.name in _RECONSTRUCT and arguments[:1] == (_Name(_NDARRAY),):
            if self.arrays:  # each would copy a string that may be remembered once
                self.fail("a second array")
            self.arrays += 1
            self.push(_Array())
        elif function.name == _DTYPE and arguments[:1] in (("u1",), ("uint8",)):
            self.push(_Dtype("u1"))
        else:
            self.fail(f"a call of {function.name} that is not allowed")

    def build(self) -> None:
        """The state of an array: version, shape, dtype, whether by columns, bytes."""
        state = self.pop()
        if self.stack and isinstance(self.stack[-1], _Dtype):
            return  # byte order and alignment say nothing about bytes
        array = self.top(_Array)
        if not isinstance(state, tuple) or len(state) != 5 or array.value is not None:
            self.fail("an array without its state")
        _, shape, dtype, by_columns, content = state
        if isinstance(content, str):
            content = content.encode("latin-1", "replace")
        if (
            not isinstance(shape, tuple)
            or len(shape) != 2
            or not all(type(n) is int and n >= 0 for n in shape)
            or not isinstance(dtype, _Dtype)
            or not isinstance(content, (bytes, memoryview))
            or shape[0] * shape[1] != len(content)
        ):
            self.fail("an array that is no matrix of bytes, or holds fewer or more than it says")
        array.value = np.frombuffer(content, np.uint8).reshape(
            shape, order="F" if by_columns else "C"
        )


_INSTRUCTIONS: dict[int, Callable[[_Machine], Any]] = {
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    ord("("): lambda m: m.push(_MARK),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.number(1)),
    ord("M"): lambda m: m.push(m.number(2)),
    ord("J"): lambda m: m.push(m.number(4, signed=True)),
    0x8A: lambda m: m.push(int.from_bytes(m.take(m.number(1)), "little", signed=True)),
    ord("U"): lambda m: m.text(1),
    ord("T"): lambda m: m.text(4),
    ord("X"): lambda m: m.unicode(4),
    0x8C: lambda m: m.unicode(1),
    ord("C"): lambda m: m.byte_string(1),
    ord("B"): lambda m: m.byte_string(4),
    0x8E: lambda m: m.byte_string(8),
    ord("t"): lambda m: m.push(tuple(m.pop_to_mark())),
    0x85: lambda m: m.gather(1),
    0x86: lambda m: m.gather(2),
    0x87: lambda m: m.gather(3),
    ord("q"): lambda m: m.remember(1),
    ord("r"): lambda m: m.remember(4),
    0x94: lambda m: m.memoize(),
    ord("h"): lambda m: m.recall(1),
    ord("j"): lambda m: m.recall(4),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.pop_to_mark()),
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.pop_to_mark()),
    ord("c"): lambda m: m.look_up(),
    0x93: lambda m: m.stack_look_up(),
    ord("R"): lambda m: m.call(),
    ord("b"): lambda m: m.build(),
    0x80: lambda m: m.take(1),  # the protocol
    0x95: lambda m: m.take(8),  # the size of a frame
}
