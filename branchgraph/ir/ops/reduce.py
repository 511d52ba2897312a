"""Reductions over axes: sum, mean, maximum, the index of the maximum; and the way back.

Derivatives of ops refer to each other in circles (a sum's is a broadcast, a broadcast's a sum), so
an op whose module comes later is looked up by its opcode.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import DimLike, Shape, product
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import (
    Cotangents,
    Op,
    Wanted,
    broadcast_shapes,
    concrete,
    make,
    require,
    require_float,
)  # fmt: skip
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.types import DType, TensorType


@dataclass(frozen=True)
class _Reduce(Op):
    axes: tuple[int, ...]
    keepdims: bool = False

    def check(self) -> None:
        if list(self.axes) != sorted(set(self.axes)) or any(a < 0 for a in self.axes):
            raise GraphError(f"axes {self.axes} must be distinct, ascending and not negative")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        self.check_axes(x)
        return (TensorType(self.reduced(x.shape, self.keepdims), x.dtype),)

    def check_axes(self, x: TensorType) -> None:
        require(not self.axes or self.axes[-1] < x.rank, f"axes {self.axes} exceed rank {x.rank}")

    def reduced(self, shape: Shape, keepdims: bool) -> Shape:
        kept: list[DimLike] = []
        for i, d in enumerate(shape):
            if i not in self.axes:
                kept.append(d)
            elif keepdims:
                kept.append(1)
        return tuple(kept)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return 0 not in self.axes

    def spread(self, dy: Value, like: Value) -> Value:
        """`dy` repeated along the reduced axes, in the shape of `like`."""
        kept = self.reduced(like.shape, keepdims=True)
        if dy.shape != kept:
            dy = dy.graph.emit(Reshape(shape=kept), dy)
        return dy.graph.emit(BroadcastTo(shape=like.shape), dy)


@dataclass(frozen=True)
class ReduceSum(_Reduce, opcode="reduce_sum", operands=("x",)):
    """y = sum of x over `axes`."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x = inputs[0]
        return (np.asarray(np.sum(x, axis=self.axes, keepdims=self.keepdims, dtype=x.dtype)),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        return (self.spread(dy, node.inputs[0]),)


@dataclass(frozen=True)
class ReduceMean(_Reduce, opcode="reduce_mean", operands=("x",)):
    """y = mean of x over `axes`; over spatial axes this is global average pooling."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(inputs[0])
        return super().infer(*inputs)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x = inputs[0]
        return (np.asarray(np.mean(x, axis=self.axes, keepdims=self.keepdims, dtype=x.dtype)),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        x = node.inputs[0]
        count = product(x.shape[a] for a in self.axes)
        graph = dy.graph
        divisor = graph.emit(make("extent", dim=count, dtype=x.dtype))
        return (self.spread(dy / divisor, x),)


@dataclass(frozen=True)
class ReduceMax(_Reduce, opcode="reduce_max", operands=("x",)):
    """y = maximum of x over `axes`; every element that attains it receives the whole cotangent."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.asarray(np.max(inputs[0], axis=self.axes, keepdims=self.keepdims)),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        x, graph = node.inputs[0], dy.graph
        equal, where = make("compare", relation="equal"), make("where")
        attains = graph.emit(equal, x, self.spread(node.output, x))
        zero = graph.constant(0.0, dy.dtype)
        return (graph.emit(where, attains, self.spread(dy, x), zero),)


def unbroadcast(value: Value, shape: Shape) -> Value:
    """`value` summed over the axes along which `shape` was broadcast to it."""
    if value.shape == shape:
        return value
    extra = len(value.shape) - len(shape)
    stretched = (i + extra for i, d in enumerate(shape) if d != value.shape[i + extra])
    axes = (*range(extra), *stretched)
    summed = value.graph.emit(ReduceSum(axes=axes, keepdims=False), value)
    return summed if summed.shape == shape else value.graph.emit(Reshape(shape=shape), summed)


@dataclass(frozen=True)
class BroadcastTo(Op, opcode="broadcast_to", operands=("x",)):
    """x repeated along new or unit axes, by NumPy's rules."""

    shape: tuple[DimLike, ...]

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        fits = x.rank <= len(self.shape) and broadcast_shapes(x.shape, self.shape) == self.shape
        require(fits, f"{x} does not broadcast to {list(map(str, self.shape))}")
        return (TensorType(self.shape, x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.broadcast_to(inputs[0], concrete(self.shape, "broadcast_to")),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        return (unbroadcast(dy, node.inputs[0].shape),)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return inputs[0].rank == len(self.shape)


@dataclass(frozen=True)
class TopK(Op, opcode="top_k", operands=("x",)):
    """1 at the k largest elements along `axis`, 0 elsewhere; ties go to the lower index."""

    k: int
    axis: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        require_float(x)
        require(0 <= self.axis < x.rank, f"axis {self.axis} exceeds rank {x.rank}")
        size = x.shape[self.axis]
        fits = isinstance(size, int) and 1 <= self.k <= size
        require(fits, f"k is in 1..{size}, got {self.k}")
        return (x,)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        order = np.argsort(-x, axis=self.axis, kind="stable")
        largest = np.take(order, range(self.k), axis=self.axis)
        mask = np.zeros(x.shape, x.dtype)
        np.put_along_axis(mask, largest, x.dtype.type(1), axis=self.axis)
        return (mask,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return (None,)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return self.axis != 0


@dataclass(frozen=True)
class ArgMax(Op, opcode="arg_max", operands=("x",)):
    """Index of the largest element along `axis`, the lowest index on ties; i64."""

    axis: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        require(0 <= self.axis < x.rank, f"axis {self.axis} exceeds rank {x.rank}")
        shape = x.shape[: self.axis] + x.shape[self.axis + 1 :]
        return (TensorType(shape, DType.I64),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.asarray(np.argmax(inputs[0], axis=self.axis), dtype=np.int64),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return (None,)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return self.axis != 0
