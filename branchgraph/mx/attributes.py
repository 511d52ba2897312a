"""MXNet's text of parameter values, read into typed values.

In a symbol every parameter is a text, the way Python prints the value:

    boolean   True true 1 False false 0
    integer   3  -1                         (2.0 is none)
    number    0.5  2e-05  1  inf
    tuple     (3, 3)  [3,3]  (3L, 3L)  ()   (a bare 3 is the tuple of it)
    word      relu
    None      where the parameter may be absent

The parameters of an operator are the fields of a dataclass; the annotation of a field decides what
its text may be. A field without default is required.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from branchgraph.ir.errors import FormatError
from branchgraph.mx.dtypes import NAMES

#: Longest text of one value; the longest that MXNet writes is a shape.
LONGEST_VALUE = 4096

#: Sizes, one an axis.
Shape = tuple[int, ...]
#: Name of an element type (`float32`).
DTypeName = typing.NewType("DTypeName", str)

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}L?\Z")
_NUMBER = re.compile(
    r"[+-]?(?:(?:[0-9]{1,64}(?:\.[0-9]{0,64})?|\.[0-9]{1,64})(?:[eE][+-]?[0-9]{1,4})?f?"
    r"|inf|nan)\Z"
)
_BOOLEANS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
_BRACKETS = {"(": ")", "[": "]"}

P = TypeVar("P")


class _Unreadable(ValueError):
    """A text is none of what its kind accepts."""


class Kind(typing.NamedTuple):
    """How a text is read, and what it may be, in words."""

    read: Callable[[str], Any]
    accepts: str


def _boolean(text: str) -> bool:
    if text not in _BOOLEANS:
        raise _Unreadable
    return _BOOLEANS[text]


def _integer(text: str) -> int:
    if not _INTEGER.match(text):
        raise _Unreadable
    return int(text.rstrip("L"))


def _number(text: str) -> float:
    if not _NUMBER.match(text):
        raise _Unreadable
    return float(text.rstrip("f") if not text.endswith("inf") else text)


def _dtype(text: str) -> str:
    if text not in NAMES:
        raise _Unreadable
    return text


def _one_of(words: tuple[str, ...]) -> Kind:
    def read(text: str) -> str:
        if text not in words:
            raise _Unreadable
        return text

    return Kind(read, "one of " + ", ".join(words))


def _optional(kind: Kind) -> Kind:
    def read(text: str) -> Any:
        return None if text == "None" else kind.read(text)

    return Kind(read, f"{kind.accepts}, or None")


def _tuple(kind: Kind) -> Kind:
    def read(text: str) -> tuple[Any, ...]:
        inner = text
        if text[:1] in _BRACKETS:
            if not text.endswith(_BRACKETS[text[0]]) or len(text) < 2:
                raise _Unreadable
            inner = text[1:-1].strip()
            if not inner:
                return ()
            inner = inner[:-1] if inner.endswith(",") else inner
        return tuple(kind.read(part.strip()) for part in inner.split(","))

    return Kind(read, f"a tuple such as (2, 2), each {kind.accepts}")


_SCALARS: dict[Any, Kind] = {
    bool: Kind(_boolean, "True or False"),
    int: Kind(_integer, "an integer"),
    float: Kind(_number, "a number"),
    str: Kind(lambda text: text, "a text"),
    DTypeName: Kind(_dtype, "an element type such as float32"),
}


def kind_of(annotation: Any) -> Kind:
    """How texts of a field with this annotation are read."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _one_of(inner)
    if origin is tuple:
        return _tuple(kind_of(inner[0]))
    if origin in (Union, types.UnionType):
        (given,) = (a for a in inner if a is not type(None))
        return _optional(kind_of(given))
    return _SCALARS[annotation]


_KINDS: dict[type, dict[str, Kind]] = {}


def _kinds(cls: type) -> dict[str, Kind]:
    if cls not in _KINDS:
        hints = typing.get_type_hints(cls)
        _KINDS[cls] = {f.name: kind_of(hints[f.name]) for f in fields(cls)}
    return _KINDS[cls]


def shown(text: str) -> str:
    """A text from a file, short enough for a message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def is_hidden(key: str) -> bool:
    """Whether an attribute is the user's (`__lr_mult__`) and no parameter of the operator."""
    return len(key) > 4 and key.startswith("__") and key.endswith("__")


def parse(kind: Kind, text: str, what: str) -> Any:
    """The value of a text, or `FormatError` that says what is accepted for `what`."""
    if len(text) > LONGEST_VALUE:
        raise FormatError(f"{what}: {len(text)} characters, at most {LONGEST_VALUE} are read")
    try:
        return kind.read(text.strip())
    except _Unreadable:
        raise FormatError(f"{what}: {shown(text)} is not {kind.accepts}") from None


def read_parameters(cls: type[P], texts: Mapping[str, str], what: str) -> P:
    """An instance of the parameter dataclass `cls` from texts; hidden keys are passed over.

    Raises `FormatError`, naming `what` (the operator and its node) and the parameter, where one is
    unknown or missing or its text is not accepted.
    """
    kinds = _kinds(cls)
    values = {}
    for key, text in texts.items():
        if is_hidden(key):
            continue
        if key not in kinds:
            known = ", ".join(kinds) or "no parameters"
            raise FormatError(f"{what}: no parameter {shown(key)}; it has: {known}")
        values[key] = parse(kinds[key], text, f"{what}: {key}")
    for field in fields(cls):  # type: ignore[arg-type]
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in values:
            accepted = kinds[field.name].accepts
            raise FormatError(f"{what}: {field.name} is missing; it is {accepted}")
    return cls(**values)
