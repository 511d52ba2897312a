"""The text of parameter values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from branchgraph.ir.errors import FormatError
from branchgraph.mx.attributes import DTypeName, Shape, kind_of, parse, read_parameters

ACCEPTED: list[tuple[Any, str, Any]] = [
    *((bool, text, True) for text in ("True", "true", "1")),
    *((bool, text, False) for text in ("False", "false", "0")),
    (int, "3", 3),
    (int, "-1", -1),
    (int, "+2", 2),
    (int, "7L", 7),
    (float, "2e-05", 2e-5),
    (float, "1", 1.0),
    (float, "0.5f", 0.5),
    (float, "-.5", -0.5),
    (float, "inf", math.inf),
    (str, "relu", "relu"),
    (str | None, "None", None),
    (int | None, "4", 4),
    (Shape, "(3, 3)", (3, 3)),
    (Shape, "[3,3]", (3, 3)),
    (Shape, "(3L, 3L)", (3, 3)),
    (Shape, "(3,)", (3,)),
    (Shape, "()", ()),
    (Shape, "[]", ()),
    (Shape, "3", (3,)),
    (Shape | None, "None", None),
    (tuple[int | None, ...], "(None, -2)", (None, -2)),
    (Literal["max", "avg"], "avg", "avg"),
    (DTypeName, "float16", "float16"),
]

REFUSED: list[tuple[Any, str]] = [
    (bool, "yes"), (bool, "2"), (bool, ""), (int, "2.0"), (int, "two"), (int, ""), (int, "1e3"),
    (int, "0x10"), (int, "9" * 19), (int, "1_000"), (float, "one"), (float, "1e99999"),
    (float, "1_0"), (float, "()"), (Shape, "(3, 3"), (Shape, "3, 3)"), (Shape, "(3, a)"),
    (Shape, "((3, 3), 3)"), (Shape, "(3,,3)"), (Shape, "[3)"), (Shape, "("), (Shape, "None"),
    (Literal["max", "avg"], "Max"), (DTypeName, "float31"), (Shape, "__import__('os')"),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "text", "value"), ACCEPTED)
def test_texts_are_read(annotation: Any, text: str, value: Any) -> None:
    found = parse(kind_of(annotation), f" {text} ", "it")
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(("annotation", "text"), REFUSED)
def test_other_texts_are_refused(annotation: Any, text: str) -> None:
    with pytest.raises(FormatError, match="it: .* is not "):
        parse(kind_of(annotation), text, "it")


def test_a_long_text_is_refused_unread() -> None:
    with pytest.raises(FormatError, match="5000 characters, at most 4096"):
        parse(kind_of(Shape), "(" + "1," * 2499 + ")", "it")


@dataclass(frozen=True)
class Example:
    kernel: Shape
    mode: Literal["max", "avg"] = "max"
    count: int | None = None


def test_parameters_are_the_fields_and_hidden_keys_are_not() -> None:
    texts = {"kernel": "(2, 2)", "__lr_mult__": "x", "count": "None"}
    assert read_parameters(Example, texts, "Pool 'p'") == Example((2, 2))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "Pool 'p': kernel is missing; it is a tuple such as (2, 2), each an integer"),
        ({"kernal": "2"}, "Pool 'p': no parameter 'kernal'; it has: kernel, mode, count"),
        ({"kernel": "2", "mode": "min"}, "Pool 'p': mode: 'min' is not one of max, avg"),
        ({"kernel": "2", "count": "2.0"}, "Pool 'p': count: '2.0' is not an integer, or None"),
    ],
)
def test_errors_name_operator_parameter_text_and_what_is_accepted(
    texts: dict[str, str], message: str
) -> None:
    with pytest.raises(FormatError) as refusal:
        read_parameters(Example, texts, "Pool 'p'")
    assert str(refusal.value) == message
