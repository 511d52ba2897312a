"""`chainer.utils.type_check`: the error of operands that do not fit."""

from __future__ import annotations

from branchgraph.ir.errors import ShapeError


class InvalidType(Exception):
    """Operands of a function have the wrong dtype, rank or shape."""

    def __init__(self, expect: str, actual: str, msg: str | None = None) -> None:
        text = "" if msg is None else msg
        super().__init__(f"{text}\n\nExpect: {expect}\nActual: {actual}".strip())
        self.expect = expect
        self.actual = actual


def expect(*conditions: bool) -> None:
    """Raise `InvalidType` unless all conditions hold; for `check_type_forward` of users."""
    for position, condition in enumerate(conditions):
        if not condition:
            raise InvalidType(f"condition {position} of the function", "it does not hold")


def invalid(name: str, error: ShapeError) -> InvalidType:
    """Chainer's error for a broken rule of an op."""
    return InvalidType(
        str(error), "the operands above",
        f"\nInvalid operation is performed in: {name} (Forward)",
    )  # fmt: skip
