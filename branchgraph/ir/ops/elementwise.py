"""Element-wise arithmetic with NumPy broadcasting, comparisons, selection by a mask, casts.

A broadcast operand's cotangent is summed back to its shape:  dx = sum over broadcast axes of dy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import (
    Cotangents,
    Op,
    Wanted,
    broadcast_shapes,
    require,
    require_float,
    rows_broadcast,
)  # fmt: skip
from branchgraph.ir.ops.reduce import unbroadcast
from branchgraph.ir.types import DType, TensorType


class _Elementwise(Op):
    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return rows_broadcast(inputs, rows)


class Binary(_Elementwise):
    """Base of arithmetic on two broadcast operands of one dtype."""

    function: ClassVar[Callable[..., np.ndarray]]

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        a, b = inputs
        require(a.dtype == b.dtype, f"operands must share one dtype, got {a.dtype} and {b.dtype}")
        return (TensorType(broadcast_shapes(a.shape, b.shape), a.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.asarray(type(self).function(*inputs)),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        partial = self.partials(node, dy)
        return tuple(
            unbroadcast(partial[i](), v.shape) if wanted[i] else None
            for i, v in enumerate(node.inputs)
        )

    def partials(self, node: Node, dy: Value) -> tuple[Callable[[], Value], Callable[[], Value]]:
        """dy times the derivative by each operand, before summing back."""
        raise NotImplementedError


@dataclass(frozen=True)
class Add(Binary, opcode="add", operands=("a", "b")):
    """y = a + b."""

    function = np.add

    def partials(self, node: Node, dy: Value) -> tuple[Callable[[], Value], Callable[[], Value]]:
        return lambda: dy, lambda: dy


@dataclass(frozen=True)
class Subtract(Binary, opcode="subtract", operands=("a", "b")):
    """y = a - b."""

    function = np.subtract

    def partials(self, node: Node, dy: Value) -> tuple[Callable[[], Value], Callable[[], Value]]:
        return lambda: dy, lambda: -dy


@dataclass(frozen=True)
class Multiply(Binary, opcode="multiply", operands=("a", "b")):
    """y = a b."""

    function = np.multiply

    def partials(self, node: Node, dy: Value) -> tuple[Callable[[], Value], Callable[[], Value]]:
        a, b = node.inputs
        return lambda: dy * b, lambda: dy * a


@dataclass(frozen=True)
class Divide(Binary, opcode="divide", operands=("a", "b")):
    """y = a / b, for floating dtypes; da = dy/b, db = -dy y/b."""

    function = np.divide

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(*inputs)
        return super().infer(*inputs)

    def partials(self, node: Node, dy: Value) -> tuple[Callable[[], Value], Callable[[], Value]]:
        b = node.inputs[1]
        return lambda: dy / b, lambda: -(dy * node.output / b)


class Unary(_Elementwise):
    """Base of functions of one floating value."""

    function: ClassVar[Callable[..., np.ndarray]]

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(inputs[0])
        return inputs

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.asarray(type(self).function(inputs[0])),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        return (self.pull_back(node.inputs[0], node.output, dy),)

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        """dy times the derivative."""
        raise NotImplementedError


@dataclass(frozen=True)
class Negate(Unary, opcode="negate", operands=("x",)):
    """y = -x."""

    function = np.negative

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return -dy


@dataclass(frozen=True)
class Exp(Unary, opcode="exp", operands=("x",)):
    """y = e^x."""

    function = np.exp

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy * y


@dataclass(frozen=True)
class Log(Unary, opcode="log", operands=("x",)):
    """y = ln x."""

    function = np.log

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy / x


@dataclass(frozen=True)
class Sqrt(Unary, opcode="sqrt", operands=("x",)):
    """y = x^(1/2); dx = dy / (2 y)."""

    function = np.sqrt

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy / (y * 2.0)


@dataclass(frozen=True)
class Absolute(Unary, opcode="absolute", operands=("x",)):
    """y = |x|, with derivative 0 at 0."""

    function = np.abs

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        zero = x.graph.constant(0.0, x.dtype)
        below = where(compare("less", x, zero), -dy, zero)
        return where(compare("greater", x, zero), dy, below)


@dataclass(frozen=True)
class Clip(Unary, opcode="clip", operands=("x",)):
    """y = min(max(x, low), high); dx = dy where low <= x <= high, bounds included, else 0.

    A bound may be infinite. NaN stays NaN and receives no gradient.
    """

    low: float
    high: float

    def check(self) -> None:
        if not self.low <= self.high:
            raise GraphError(f"clip: low must not exceed high, got {self.low} and {self.high}")

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        low, high = x.dtype.type(self.low), x.dtype.type(self.high)
        return (np.asarray(np.minimum(np.maximum(x, low), high)),)

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        # What is clipped, or NaN, differs from what comes out.
        return where(compare("equal", x, y), dy, x.graph.constant(0.0, dy.dtype))


_RELATIONS: dict[str, Callable[..., np.ndarray]] = {
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "equal": np.equal,
    "not_equal": np.not_equal,
}


@dataclass(frozen=True)
class Compare(_Elementwise, opcode="compare", operands=("a", "b")):
    """y = (a relation b) as bool; operands broadcast and share one dtype."""

    relation: str

    def check(self) -> None:
        if self.relation not in _RELATIONS:
            raise GraphError(f"compare: relation {self.relation!r} is none of {list(_RELATIONS)}")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        a, b = inputs
        require(a.dtype == b.dtype, f"operands must share one dtype, got {a.dtype} and {b.dtype}")
        return (TensorType(broadcast_shapes(a.shape, b.shape), DType.BOOL),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.asarray(_RELATIONS[self.relation](*inputs)),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return (None, None)


@dataclass(frozen=True)
class LogicalNot(_Elementwise, opcode="logical_not", operands=("a",)):
    """y = not a."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require(inputs[0].dtype is DType.BOOL, f"needs bool, got {inputs[0].dtype}")
        return inputs

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.asarray(np.logical_not(inputs[0])),)


@dataclass(frozen=True)
class LogicalAnd(_Elementwise, opcode="logical_and", operands=("a", "b")):
    """y = a and b, broadcast."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        a, b = inputs
        require(a.dtype is b.dtype is DType.BOOL, f"needs bool, got {a.dtype} and {b.dtype}")
        return (TensorType(broadcast_shapes(a.shape, b.shape), DType.BOOL),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.asarray(np.logical_and(*inputs)),)


@dataclass(frozen=True)
class Where(_Elementwise, opcode="where", operands=("condition", "a", "b")):
    """y = a where the condition holds, else b; all three broadcast."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        condition, a, b = inputs
        require(condition.dtype is DType.BOOL, f"condition must be bool, got {condition.dtype}")
        require(a.dtype == b.dtype, f"operands must share one dtype, got {a.dtype} and {b.dtype}")
        return (TensorType(broadcast_shapes(condition.shape, a.shape, b.shape), a.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.where(*inputs),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        condition, a, b = node.inputs
        zero = dy.graph.constant(0.0, dy.dtype)
        da = unbroadcast(where(condition, dy, zero), a.shape) if wanted[1] else None
        db = unbroadcast(where(condition, zero, dy), b.shape) if wanted[2] else None
        return (None, da, db)


@dataclass(frozen=True)
class Cast(_Elementwise, opcode="cast", operands=("x",)):
    """x in another dtype; the cotangent is cast back, and stops at integers and bools."""

    dtype: DType

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (TensorType(inputs[0].shape, self.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (inputs[0].astype(self.dtype.numpy),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        source = node.inputs[0].dtype
        if dy is None or not source.is_float or not self.dtype.is_float:
            return (None,)
        return (cast(dy, source),)


def compare(relation: str, a: Value, b: Value) -> Value:
    """`a relation b` as bool."""
    return a.graph.emit(Compare(relation=relation), a, b)


def where(condition: Value, a: Value, b: Value) -> Value:
    """`a` where `condition`, else `b`."""
    return a.graph.emit(Where(), condition, a, b)


def cast(x: Value, dtype: DType) -> Value:
    """`x` in `dtype`; x itself when it is that already."""
    return x if x.dtype == dtype else x.graph.emit(Cast(dtype=dtype), x)
