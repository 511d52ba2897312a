"""Typed attributes: dataclass fields that print to text and come back equal.

Ops, initialisers and passes are frozen dataclasses whose fields are their attributes. A field's
annotation decides what may stand in it: `int`, `float`, `bool`, `str`, `DType`, `DimLike`,
`X | None` and `tuple[X, ...]` of these. Nothing is guessed: 2 is not 2.0, and 1 is not True.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Union, get_args, get_origin

from branchgraph.ir.dims import Dim, DimLike, parse_dim
from branchgraph.ir.errors import FormatError, GraphError
from branchgraph.ir.types import DType


class Word(str):
    """A bare word read from text: `true`, `none`, `f32`, `inf` or a dimension such as `3*N`."""


_FIELD_TYPES: dict[Any, dict[str, Any]] = {}


def field_types(cls: Any) -> dict[str, Any]:
    """Field name to annotation, for the dataclass fields of `cls` in order."""
    if cls not in _FIELD_TYPES:
        hints = typing.get_type_hints(cls)
        _FIELD_TYPES[cls] = {f.name: hints[f.name] for f in fields(cls)}
    return _FIELD_TYPES[cls]


def normalise(value: Any, annotation: Any, what: str) -> Any:
    """`value` in the canonical form of `annotation`, or `GraphError` naming `what`.

    Lists become tuples and an int may stand for a float; a bool never stands for an int.
    """
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType) and Dim in get_args(annotation):
        return _dimension(value, what)
    if origin in (Union, types.UnionType):
        return _optional(value, annotation, what)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise GraphError(f"{what}: expected a list, got {value!r}")
        element = get_args(annotation)[0]
        return tuple(normalise(v, element, f"{what}[{i}]") for i, v in enumerate(value))
    return _scalar(value, annotation, what)


def _optional(value: Any, annotation: Any, what: str) -> Any:
    if value is None or (value == Word("none") and isinstance(value, Word)):
        return None
    inner = [a for a in get_args(annotation) if a is not type(None)]
    return normalise(value, inner[0], what)


def _dimension(value: Any, what: str) -> DimLike:
    if isinstance(value, Dim):
        return value
    if isinstance(value, (Word, str)):
        return parse_dim(value)
    return typing.cast(int, _scalar(value, int, what))


def _scalar(value: Any, annotation: Any, what: str) -> Any:
    if annotation is float and isinstance(value, Word) and value in ("inf", "-inf", "nan"):
        return float(value)
    if annotation is bool and isinstance(value, Word) and value in ("true", "false"):
        return value == "true"
    if annotation is DType:
        return DType.of(value)
    if annotation is bool and isinstance(value, bool):
        return value
    if isinstance(value, (bool, Word)):
        raise GraphError(f"{what}: expected {annotation.__name__}, got {value!r}")
    if annotation is int and hasattr(value, "__index__"):
        return int(value.__index__())
    if annotation is float and isinstance(value, (int, float)):
        return float(value)
    if annotation is str and isinstance(value, str):
        return str(value)
    raise GraphError(f"{what}: expected {annotation.__name__}, got {value!r}")


_Accepts = Callable[[Any], bool]
_ACCEPTS: dict[Any, _Accepts] = {}
_CHECKS: dict[Any, tuple[tuple[str, Any, _Accepts], ...]] = {}


def _accepts(annotation: Any) -> _Accepts:
    """A quick test that a value is in canonical form, so that `normalise` can be skipped."""
    if annotation not in _ACCEPTS:
        if get_origin(annotation) is tuple:
            inner = _accepts(get_args(annotation)[0])
            _ACCEPTS[annotation] = lambda v: type(v) is tuple and all(map(inner, v))
        else:
            options = get_args(annotation) or (annotation,)
            exact = frozenset(options)
            _ACCEPTS[annotation] = lambda v: type(v) in exact
    return _ACCEPTS[annotation]


def _checks(cls: Any) -> tuple[tuple[str, Any, _Accepts], ...]:
    """Name, annotation and quick test of every field of an attribute dataclass."""
    if cls not in _CHECKS:
        types = field_types(cls)
        _CHECKS[cls] = tuple((name, a, _accepts(a)) for name, a in types.items())
    return _CHECKS[cls]


def format_value(value: Any) -> str:
    """The text of one attribute value; `normalise` of what is parsed from it gives it back."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(value) if math.isinf(value) or math.isnan(value) else repr(value)
    if isinstance(value, DType):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(format_value(v) for v in value) + "]"
    if isinstance(value, (int, Dim)):
        return str(value)
    raise TypeError(f"attribute value {value!r} has no text form")


class Attributes:
    """Mixin for frozen dataclasses whose fields are typed attributes."""

    def __post_init__(self) -> None:
        cls = type(self)
        for name, annotation, accepts in _checks(cls):
            value = getattr(self, name)
            if accepts(value):
                continue
            canonical = normalise(value, annotation, f"{cls.__name__}.{name}")
            if canonical is not value:
                object.__setattr__(self, name, canonical)
        self.check()

    def check(self) -> None:
        """Raise `GraphError` when the fields contradict each other; overridden where they can."""

    def attributes(self) -> dict[str, Any]:
        """Field name to value, in order of definition."""
        return {name: getattr(self, name) for name in field_types(type(self))}


def build(cls: type, values: dict[str, Any], what: str) -> Any:
    """An instance of the attribute dataclass `cls` from parsed values, unknown names refused."""
    known = field_types(cls)
    for name in values:
        if name not in known:
            expected = ", ".join(known) or "none"
            raise FormatError(f"{what} has no attribute {name!r}; it has: {expected}")
    try:
        return cls(**values)
    except TypeError as error:
        raise FormatError(f"{what}: {error}") from None
