"""Element-wise expressions over many tensors in one call.

An expression is a short program over numbered values: first the inputs, then one value a step. It
is carried out for every row of a table,

    n, address of each input, address of each output

one row a tensor of n elements, so that the same update of a hundred parameters is one call. What a
step gives is what NumPy gives in float32, bit for bit but for the payload of NaN: operations are
rounded one by one and never contracted to a fused multiply-add, and with NumPy's rules

    maximum(a, b) = a if a > b or a is NaN else b
    minimum(a, b) = a if a < b or a is NaN else b

All inputs of a vector are loaded before any output of it is stored, so an output may lie exactly
where an input does. Rows must not read what other rows write.

Tables are cut into parts of equal numbers of elements, one a thread, and parts into rows; a thread
does whole parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from branchgraph.codegen import engine
from branchgraph.codegen.assembly import Function

#: Kinds of inputs: a float of each element, one float for all, a bool of each element.
FLOATS, FLOAT, BOOLS = "floats", "float", "bools"

#: Elements times arrays from which another thread is worth its start.
_WORTH_THREAD = 1 << 17
#: Elements that parts are multiples of: cache lines of float32, and of bool.
_GRAIN = 64

_ARITHMETIC = {"add": "fadd", "subtract": "fsub", "multiply": "fmul", "divide": "fdiv"}
_EXTREMES = {"maximum": "ogt", "minimum": "olt"}
_RELATIONS = {
    "less": "olt", "less_equal": "ole", "greater": "ogt", "greater_equal": "oge",
    "equal": "oeq", "not_equal": "une",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One operation on values by number.

    A `constant` has none, but digits as `float.hex` writes them: 0 and -0 differ, NaN equals NaN.
    """

    name: str
    operands: tuple[int, ...] = ()
    digits: str = ""

    @staticmethod
    def constant(number: float) -> Step:
        """The step that gives `number`, rounded to float32."""
        return Step("constant", (), float(number).hex())


@dataclass(frozen=True)
class Expression:
    """Kinds of the inputs, steps in order, and the numbers of the values that are stored.

    Steps are `constant`, `add`, `subtract`, `multiply`, `divide`, `maximum`, `minimum`, `negate`,
    `absolute`, `sqrt`, the relations of NumPy (`less`, ...), which give bools, and
    `where(bools, a, b)`.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def gives_bools(self, value: int) -> bool:
        """Whether the elements of a value are bools."""
        if value < len(self.inputs):
            return self.inputs[value] == BOOLS
        return self.steps[value - len(self.inputs)].name in _RELATIONS

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes from one element to the next, for each input and output; 0 for one for all."""
        inputs = ({FLOATS: 4, FLOAT: 0, BOOLS: 1}[kind] for kind in self.inputs)
        return (*inputs, *(1 if self.gives_bools(v) else 4 for v in self.outputs))


@dataclass(frozen=True)
class Row:
    """A tensor of `size` elements: addresses of the inputs, then of the outputs."""

    size: int
    addresses: tuple[int, ...]


def call(
    expression: Expression, rows: Sequence[Row], threads: int
) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """A prepared call that carries out `expression` on all `rows`, on one thread if they are few.

    Raises `MissingError` where nothing can be compiled.
    """
    work = sum(row.size for row in rows) * len(expression.widths)
    parts = max(1, min(threads, work // _WORTH_THREAD))
    pieces = cut(expression, rows, parts)
    table = np.array([(r.size, *r.addresses) for part in pieces for r in part], np.int64)
    starts = np.cumsum([0, *(len(part) for part in pieces)], dtype=np.int64)
    arguments = [table.ctypes.data, starts.ctypes.data, parts]
    function, given, packed = _routine(expression).call(arguments, parts)
    return function, given, (packed, table, starts)


def cut(expression: Expression, rows: Sequence[Row], parts: int) -> list[list[Row]]:
    """`rows` as `parts` lists of about equal numbers of elements; large rows are cut."""
    total = sum(row.size for row in rows)
    share = -(-total // (parts * _GRAIN)) * _GRAIN
    pieces: list[list[Row]] = [[] for _ in range(parts)]
    number, room = 0, share
    for row in rows:
        start = 0
        while start < row.size:
            if room <= 0:
                number, room = number + 1, share
            size = min(row.size - start, -(-room // _GRAIN) * _GRAIN)
            pieces[number].append(_piece(expression, row, start, size))
            start, room = start + size, room - size
    return pieces


def _piece(expression: Expression, row: Row, start: int, size: int) -> Row:
    moved = (a + start * w for a, w in zip(row.addresses, expression.widths))
    return Row(size, tuple(moved))


@cache
def _routine(expression: Expression) -> engine.Routine:
    return engine.routine(kernel(expression, engine.lanes()))


def kernel(expression: Expression, lanes: int) -> str:
    """The function that carries out `expression` on the rows of each part."""
    f = Function(["table", "starts", "parts"], lanes=lanes)
    table, starts, parts = f.arguments
    width = 8 * (1 + len(expression.widths))
    with f.loop(f.thread(), parts, f.threads()) as part:
        place = f.add(starts, f.mul(part.index, 8))
        with f.loop(f.load_whole(place), f.load_whole(place, 8)) as row:
            _row(f, expression, f.add(table, f.mul(row.index, width)))
    return f.text()


def _row(f: Function, expression: Expression, row: str) -> None:
    """One tensor: whole vectors, then the rest of it under a mask."""
    size = f.load_whole(row)
    addresses = [f.load_whole(row, 8 * k) for k in range(1, 1 + len(expression.widths))]
    common = {
        number: f.spread(f.load_scalar(addresses[number]))
        for number, kind in enumerate(expression.inputs)
        if kind == FLOAT
    }
    rest = f.rem(size, f.lanes)
    whole = f.sub(size, rest)
    with f.loop(0, whole, f.lanes) as loop:
        _vector(f, expression, addresses, common, loop.index, None)
    with f.when(f.within("0", rest)):
        _vector(f, expression, addresses, common, whole, f.first_lanes(rest))


def _vector(
    f: Function, expression: Expression, addresses: Sequence[str], common: dict[int, str],
    index: str, mask: str | None,
) -> None:  # fmt: skip
    """The elements from `index` on: load, compute, store."""
    places = [f.add(a, f.mul(index, w)) for a, w in zip(addresses, expression.widths)]
    values = []
    for number, kind in enumerate(expression.inputs):
        if kind == FLOAT:
            values.append(common[number])
        elif kind == BOOLS:
            values.append(f.load_mask(places[number], mask))
        elif mask is None:
            values.append(f.load(places[number]))
        else:
            values.append(f.load_lanes(places[number], mask))
    for step in expression.steps:
        values.append(_value(f, step, [values[o] for o in step.operands]))
    for place, number in zip(places[len(expression.inputs) :], expression.outputs):
        if expression.gives_bools(number):
            f.store_mask(values[number], place, mask)
        elif mask is None:
            f.store(values[number], place)
        else:
            f.store_lanes(values[number], place, mask)


def _value(f: Function, step: Step, operands: Sequence[str]) -> str:
    name = step.name
    if name in _ARITHMETIC:
        return f.exact(_ARITHMETIC[name], *operands)
    if name in _RELATIONS:
        return f.compare(_RELATIONS[name], *operands)
    if name in _EXTREMES:
        a, b = operands
        first = f.any_lane(f.compare(_EXTREMES[name], a, b), f.compare("uno", a, a))
        return f.pick(first, a, b)
    if name == "constant":
        return f.constant(float(np.float32(float.fromhex(step.digits))))
    if name == "where":
        return f.pick(*operands)
    if name == "negate":
        return f.negative(*operands)
    return f.function({"absolute": "fabs", "sqrt": "sqrt"}[name], *operands)


__all__ = ["BOOLS", "FLOAT", "FLOATS", "Expression", "Row", "Step", "call", "cut", "kernel"]
