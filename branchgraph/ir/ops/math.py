"""Elementary functions, powers, rounding, and running sums and products along an axis.

Running products have a derivative without division, so that zeros in x do no harm: with p the
products before an element and s what the later results make of it,

    y_i = x_0 x_1 ... x_i
    dx_i = p_i s_i        with p_i = y_(i-1) and s_i = dy_i + x_(i+1) s_(i+1)

The last one is a first-order recurrence run backwards, an op of its own, whose gradient is again
a recurrence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import Cotangents, Op, Wanted, require, require_float
from branchgraph.ir.ops.elementwise import Binary, Exp, Log, Unary
from branchgraph.ir.ops.reshape import Pad, Slice
from branchgraph.ir.types import TensorType

Partials = tuple[Callable[[], Value], Callable[[], Value]]


# -- two operands --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Power(Binary, opcode="power", operands=("a", "b")):
    """y = a^b; da = dy b a^(b-1), db = dy y ln a."""

    function = np.power

    def partials(self, node: Node, dy: Value) -> Partials:
        a, b = node.inputs
        graph = node.graph
        return (
            lambda: dy * (b * graph.emit(Power(), a, b - 1.0)),
            lambda: dy * (node.output * graph.emit(Log(), a)),
        )


@dataclass(frozen=True)
class Arctan2(Binary, opcode="arctan2", operands=("a", "b")):
    """y = the angle of the point (b, a); da = dy b / (a^2 + b^2), db = -dy a / (a^2 + b^2)."""

    function = np.arctan2

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(*inputs)
        return super().infer(*inputs)

    def partials(self, node: Node, dy: Value) -> Partials:
        a, b = node.inputs
        share = dy / (a * a + b * b)
        return lambda: share * b, lambda: -(share * a)


@dataclass(frozen=True)
class Remainder(Binary, opcode="remainder", operands=("a", "b")):
    """y = a - b trunc(a / b), with the sign of a; da = dy, db = -dy trunc(a / b)."""

    function = np.fmod

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(*inputs)
        return super().infer(*inputs)

    def partials(self, node: Node, dy: Value) -> Partials:
        a, b = node.inputs
        return lambda: dy, lambda: -(dy * node.graph.emit(Round("truncate"), a / b))


@dataclass(frozen=True)
class FloorDivide(Binary, opcode="floor_divide", operands=("a", "b")):
    """y = floor(a / b); no gradient flows."""

    function = np.floor_divide

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return (None, None)


# -- one operand ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sin(Unary, opcode="sin", operands=("x",)):
    """y = sin x; dx = dy cos x."""

    function = np.sin

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy * x.graph.emit(Cos(), x)


@dataclass(frozen=True)
class Cos(Unary, opcode="cos", operands=("x",)):
    """y = cos x; dx = -dy sin x."""

    function = np.cos

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return -(dy * x.graph.emit(Sin(), x))


@dataclass(frozen=True)
class Tan(Unary, opcode="tan", operands=("x",)):
    """y = tan x; dx = dy (1 + y^2)."""

    function = np.tan

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy * (y * y + 1.0)


@dataclass(frozen=True)
class Arcsin(Unary, opcode="arcsin", operands=("x",)):
    """y = arcsin x; dx = dy / (1 - x^2)^(1/2)."""

    function = np.arcsin

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy / x.graph.emit(Cos(), y)


@dataclass(frozen=True)
class Arccos(Unary, opcode="arccos", operands=("x",)):
    """y = arccos x; dx = -dy / (1 - x^2)^(1/2)."""

    function = np.arccos

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return -(dy / x.graph.emit(Sin(), y))


@dataclass(frozen=True)
class Arctan(Unary, opcode="arctan", operands=("x",)):
    """y = arctan x; dx = dy / (1 + x^2)."""

    function = np.arctan

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy / (x * x + 1.0)


@dataclass(frozen=True)
class Sinh(Unary, opcode="sinh", operands=("x",)):
    """y = sinh x; dx = dy cosh x."""

    function = np.sinh

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy * x.graph.emit(Cosh(), x)


@dataclass(frozen=True)
class Cosh(Unary, opcode="cosh", operands=("x",)):
    """y = cosh x; dx = dy sinh x."""

    function = np.cosh

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy * x.graph.emit(Sinh(), x)


@dataclass(frozen=True)
class Arctanh(Unary, opcode="arctanh", operands=("x",)):
    """y = artanh x; dx = dy / (1 - x^2)."""

    function = np.arctanh

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy / (1.0 - x * x)


@dataclass(frozen=True)
class Expm1(Unary, opcode="expm1", operands=("x",)):
    """y = e^x - 1, exact near 0; dx = dy (y + 1)."""

    function = np.expm1

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy * (y + 1.0)


@dataclass(frozen=True)
class Log1p(Unary, opcode="log1p", operands=("x",)):
    """y = ln(1 + x), exact near 0; dx = dy / (1 + x)."""

    function = np.log1p

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy / (x + 1.0)


_ERF = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True)
class Erf(Unary, opcode="erf", operands=("x",)):
    """y = 2 pi^(-1/2) times the integral of e^(-t^2) from 0 to x."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        return (np.asarray(_ERF(x), dtype=x.dtype),)

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy * (x.graph.emit(Exp(), -(x * x)) * (2.0 / math.sqrt(math.pi)))


class _Step(Unary):
    """A function that is constant between its jumps: no gradient flows."""

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return (None,)


_ROUNDINGS: dict[str, Callable[..., np.ndarray]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "truncate": np.trunc,
}


@dataclass(frozen=True)
class Round(_Step, opcode="round", operands=("x",)):
    """x rounded to a whole number: down (`floor`), up (`ceil`) or towards 0 (`truncate`)."""

    mode: str

    def check(self) -> None:
        if self.mode not in _ROUNDINGS:
            raise GraphError(f"round: mode {self.mode!r} is none of {list(_ROUNDINGS)}")

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.asarray(_ROUNDINGS[self.mode](inputs[0])),)


@dataclass(frozen=True)
class Sign(_Step, opcode="sign", operands=("x",)):
    """y = -1, 0 or 1 with the sign of x."""

    function = np.sign


# -- along an axis -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Running(Op):
    """Base of running results along `axis`, from its end if `reverse`."""

    axis: int
    reverse: bool = False

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x = inputs[0]
        require(0 <= self.axis < x.rank, f"axis {self.axis} exceeds rank {x.rank}")
        same = all(t == x for t in inputs)
        require(same, f"operands must have one type, got {', '.join(map(str, inputs))}")
        return (x,)

    def ahead(self, x: np.ndarray) -> np.ndarray:
        """A view of x with the running axis first, in the order of running."""
        moved = np.moveaxis(x, self.axis, 0)
        return moved[::-1] if self.reverse else moved

    def earlier(self, x: Value, fill: float) -> Value:
        """x_(i-1) at i, in the order of running; `fill` at the first position."""
        return _shifted(x, self.axis, not self.reverse, fill)

    def later(self, x: Value, fill: float) -> Value:
        """x_(i+1) at i, in the order of running; `fill` at the last position."""
        return _shifted(x, self.axis, self.reverse, fill)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return self.axis != 0 and all(rows)


def _shifted(x: Value, axis: int, right: bool, fill: float) -> Value:
    size = x.shape[axis]
    require(isinstance(size, int), f"gradient of running along the symbolic axis {axis}")
    assert isinstance(size, int)
    if size == 0:
        return x
    kept = x.graph.emit(Slice(axis=axis, start=0 if right else 1, size=size - 1), x)
    here = tuple(int(a == axis) for a in range(len(x.shape)))
    none = (0,) * len(x.shape)
    pad = Pad(begin=here if right else none, end=none if right else here, value=fill)
    return x.graph.emit(pad, kept)


@dataclass(frozen=True)
class RunningSum(_Running, opcode="running_sum", operands=("x",)):
    """y_i = x_0 + ... + x_i along `axis`; x_i + ... + x_last if `reverse`."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        y = np.empty(x.shape, x.dtype)
        self.ahead(y)[...] = np.cumsum(self.ahead(x), axis=0, dtype=x.dtype)
        return (y,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        return (dy.graph.emit(RunningSum(self.axis, not self.reverse), dy),)


@dataclass(frozen=True)
class RunningProduct(_Running, opcode="running_product", operands=("x",)):
    """y_i = x_0 x_1 ... x_i along `axis`; x_i ... x_last if `reverse`."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        y = np.empty(x.shape, x.dtype)
        self.ahead(y)[...] = np.cumprod(self.ahead(x), axis=0, dtype=x.dtype)
        return (y,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        x = node.inputs[0]
        back = Recurrence(self.axis, not self.reverse)
        return (self.earlier(node.output, 1.0) * dy.graph.emit(back, self.later(x, 0.0), dy),)


@dataclass(frozen=True)
class Recurrence(_Running, opcode="recurrence", operands=("a", "b")):
    """y_i = a_i y_(i-1) + b_i along `axis`, from 0; y_i = a_i y_(i+1) + b_i if `reverse`.

    db is the recurrence of dy backwards, with the factor of the next position; da_i = db_i y_(i-1).
    """

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        a, b = map(self.ahead, inputs)
        y = np.empty(inputs[1].shape, inputs[1].dtype)
        running, value = self.ahead(y), np.zeros(b.shape[1:], b.dtype)
        for i in range(len(b)):
            value = a[i] * value + b[i]
            running[i] = value
        return (y,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        back = Recurrence(self.axis, not self.reverse)
        db = dy.graph.emit(back, self.later(node.inputs[0], 0.0), dy)
        da = db * self.earlier(node.output, 0.0) if wanted[0] else None
        return (da, db if wanted[1] else None)
