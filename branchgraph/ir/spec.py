"""Specification strings: one grammar for passes and networks, safe in a shell.

    insert_exits:after=conv1,criterion=entropy      cross:depth=110,widen=1      b_lenet

A name, then `:` and `key=value` pairs separated by commas. Lists are joined by `+` (`R1+R3`). A
value is read by the annotation of the parameter it is for. Values may hold the wildcards `*` and
`?`, which options that take names read as patterns; a shell leaves them alone when the string is
quoted (and, but for zsh, where no file happens to have such a name).
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from branchgraph.ir.errors import FormatError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_VALUE = re.compile(r"[A-Za-z0-9_.+/*?\-]*\Z")


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """Name and raw arguments of a specification string."""
    name, colon, rest = text.partition(":")
    if not _NAME.match(name):
        raise FormatError(f"{text!r}: expected NAME or NAME:KEY=VALUE,..., got the name {name!r}")
    if colon and not rest:
        raise FormatError(f"{text!r}: expected KEY=VALUE after the colon")
    arguments: dict[str, str] = {}
    for pair in rest.split(",") if rest else ():
        key, equals, value = pair.partition("=")
        if not equals or not _NAME.match(key) or not _VALUE.match(value):
            raise FormatError(f"{text!r}: expected KEY=VALUE, got {pair!r}")
        if key in arguments:
            raise FormatError(f"{text!r}: {key} is given twice")
        arguments[key] = value
    return name, arguments


def coerce(text: str, annotation: Any, what: str) -> Any:
    """`text` as a value of `annotation` (int, float, bool, str, X | None, tuple[X, ...])."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        if text == "none":
            return None
        annotation = next(a for a in get_args(annotation) if a is not type(None))
        return coerce(text, annotation, what)
    if origin is tuple:
        element = get_args(annotation)[0]
        return tuple(coerce(t, element, what) for t in text.split("+")) if text else ()
    if annotation is bool:
        if text in ("true", "false"):
            return text == "true"
        raise FormatError(f"{what}: expected true or false, got {text!r}")
    try:
        return annotation(text)
    except ValueError:
        raise FormatError(f"{what}: expected {annotation.__name__}, got {text!r}") from None


def arguments_for(
    raw: Mapping[str, str], annotations: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """Raw arguments coerced by their annotations; unknown names are refused with the known ones."""
    for key in raw:
        if key not in annotations:
            known = ", ".join(annotations) or "none"
            raise FormatError(f"{what} has no option {key!r}; it has: {known}")
    return {k: coerce(v, annotations[k], f"{what}:{k}") for k, v in raw.items()}


def format_value(value: Any) -> str:
    """One value as it is written in a specification string."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "+".join(format_value(v) for v in value)
    return "none" if value is None else str(value)


def format_spec(name: str, arguments: Mapping[str, Any]) -> str:
    """The specification string, the inverse of `parse_spec` and `arguments_for`."""
    pairs = ",".join(f"{k}={format_value(v)}" for k, v in arguments.items())
    return f"{name}:{pairs}" if pairs else name
