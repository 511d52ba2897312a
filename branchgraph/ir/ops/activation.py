"""Activations, and the softmax family.

relu        max(x, 0), derivative 0 at 0
leaky_relu  x if x > 0 else slope x
elu         x if x > 0 else alpha (e^x - 1)            (Clevert et al. 2016)
sigmoid     1 / (1 + e^-x), computed as tanh(x/2)/2 + 1/2
softmax     p_c = e^(x_c - m) / sum_c' e^(x_c' - m),  m = max_c x_c
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import Cotangents, Op, Wanted, require, require_float
from branchgraph.ir.ops.elementwise import Unary, compare, where
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.types import TensorType


@dataclass(frozen=True)
class Relu(Unary, opcode="relu", operands=("x",)):
    """y = max(x, 0)."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        return (np.maximum(x, x.dtype.type(0)),)

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy.graph.emit(ReluGradient(), y, dy)


@dataclass(frozen=True)
class ReluGradient(Op, opcode="relu_gradient", operands=("y", "dy")):
    """dx = dy where y > 0, else 0 (y is relu's output)."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        y, dy = inputs
        require(y == dy, f"y and dy must have one type, got {y} and {dy}")
        return (dy,)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        y, dy = inputs
        return (np.where(y > 0, dy, dy.dtype.type(0)),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (ct,) = cotangents
        assert ct is not None
        return (None, ct.graph.emit(ReluGradient(), node.inputs[0], ct))

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows)


@dataclass(frozen=True)
class LeakyRelu(Unary, opcode="leaky_relu", operands=("x",)):
    """y = x where x > 0, else slope x."""

    slope: float = 0.2

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        return (np.where(x > 0, x, x.dtype.type(self.slope) * x),)

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        zero = x.graph.constant(0.0, x.dtype)
        return where(compare("greater", x, zero), dy, dy * self.slope)


@dataclass(frozen=True)
class Elu(Unary, opcode="elu", operands=("x",)):
    """y = x where x > 0, else alpha (e^x - 1); dx = dy (y + alpha) on the curved side."""

    alpha: float = 1.0

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        curved = x.dtype.type(self.alpha) * np.expm1(np.minimum(x, x.dtype.type(0)))
        return (np.where(x > 0, x, curved),)

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        zero = x.graph.constant(0.0, x.dtype)
        return where(compare("greater", x, zero), dy, dy * (y + self.alpha))


@dataclass(frozen=True)
class Sigmoid(Unary, opcode="sigmoid", operands=("x",)):
    """y = 1 / (1 + e^-x); dx = dy y (1 - y)."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        half = inputs[0].dtype.type(0.5)
        return (np.asarray(np.tanh(inputs[0] * half) * half + half),)

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy * y * (1.0 - y)


@dataclass(frozen=True)
class Tanh(Unary, opcode="tanh", operands=("x",)):
    """y = tanh x; dx = dy (1 - y^2)."""

    function = np.tanh

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy * (1.0 - y * y)


@dataclass(frozen=True)
class _AlongAxis(Op):
    axis: int = 1

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        require_float(x)
        require(0 <= self.axis < x.rank, f"axis {self.axis} exceeds rank {x.rank}")
        return (x,)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return self.axis != 0

    def total(self, x: Value) -> Value:
        """Sum along the axis, kept as a unit axis."""
        return x.graph.emit(ReduceSum(axes=(self.axis,), keepdims=True), x)


@dataclass(frozen=True)
class Softmax(_AlongAxis, opcode="softmax", operands=("x",)):
    """p = softmax(x) along `axis`; dx = p (dy - sum p dy)."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        e = np.exp(x - x.max(axis=self.axis, keepdims=True))
        return (e / e.sum(axis=self.axis, keepdims=True),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        p = node.output
        return (p * (dy - self.total(p * dy)),)


@dataclass(frozen=True)
class LogSoftmax(_AlongAxis, opcode="log_softmax", operands=("x",)):
    """y = ln softmax(x) along `axis`; dx = dy - e^y sum dy."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        shifted = x - x.max(axis=self.axis, keepdims=True)
        return (shifted - np.log(np.exp(shifted).sum(axis=self.axis, keepdims=True)),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        p = dy.graph.emit(Softmax(axis=self.axis), node.inputs[0])
        return (dy - p * self.total(dy),)
