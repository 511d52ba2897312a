"""Gates and the two estimator primitives.

select            y = value * gate where gate != 0, exactly 0 where gate == 0 (also for NaN, inf)
                  dvalue = select(dy, gate),  dgate = sum over broadcast axes of dy * value
straight_through  y = value; the cotangent goes to the surrogate (Bengio et al. 2013)
scale_gradient    y = x; dx = s dy
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.graph import Node
from branchgraph.ir.op import Cotangents, Op, Wanted, broadcast_shapes, require, rows_broadcast
from branchgraph.ir.ops.reduce import unbroadcast
from branchgraph.ir.types import TensorType


@dataclass(frozen=True)
class Select(Op, opcode="select", operands=("value", "gate")):
    """A gated value. The gate broadcasts to the value: per scalar, channel, sample or position.

    A closed gate selects zero instead of multiplying by it, so what lies behind it cannot leak.
    The gate's cotangent is dy * value for closed gates too: that is how closed gates learn.
    """

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        value, gate = inputs
        require(
            value.dtype == gate.dtype, f"value is {value.dtype}, gate is {gate.dtype}; cast one"
        )
        fits = broadcast_shapes(value.shape, gate.shape) == value.shape
        require(fits, f"gate {gate} does not broadcast to value {value}")
        return (value,)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        value, gate = inputs
        with np.errstate(invalid="ignore"):
            return (np.where(gate == 0, value.dtype.type(0), value * gate),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        value, gate = node.inputs
        dvalue = dy.graph.emit(Select(), dy, gate) if wanted[0] else None
        dgate = unbroadcast(dy * value, gate.shape) if wanted[1] else None
        return (dvalue, dgate)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return rows_broadcast(inputs, rows)


@dataclass(frozen=True)
class StraightThrough(Op, opcode="straight_through", operands=("value", "surrogate")):
    """Forward the value, backward through the surrogate."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        value, surrogate = inputs
        require(value == surrogate, f"operands must have one type, got {value} and {surrogate}")
        return (value,)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (inputs[0],)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return (None, cotangents[0])

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return rows_broadcast(inputs, rows)


@dataclass(frozen=True)
class ScaleGradient(Op, opcode="scale_gradient", operands=("x", "scale")):
    """x, whose cotangent is multiplied by a 0-d `scale` (0 stops it, negative reverses it)."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, scale = inputs
        require(scale == TensorType((), x.dtype), f"scale must be {x.dtype}[], got {scale}")
        return (x,)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (inputs[0],)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        return (dy.graph.emit(Select(), dy, node.inputs[1]), None)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return rows_broadcast(inputs, rows)
