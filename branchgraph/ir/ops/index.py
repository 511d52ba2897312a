"""Reading and adding by position: gather, scatter_add, flip.

`Gather` and `ScatterAdd` are each other's transposes. With a the axis and j the index array,

    gather:        y[..., j's axes, ...] = x[..., index[j], ...]
    scatter_add:   y[..., i, ...] = sum over j with index[j] = i of updates[..., j, ...]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import DimLike
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node
from branchgraph.ir.op import Cotangents, Op, Wanted, carries_first, concrete, require
from branchgraph.ir.types import TensorType


def _check_index(index: TensorType) -> None:
    require(index.dtype.is_integer, f"index must be of integers, got {index.dtype}")


@dataclass(frozen=True)
class Gather(Op, opcode="gather", operands=("x", "index")):
    """The elements of x at positions `index` along `axis`; the axes of `index` take its place.

    Positions lie in 0 .. size - 1.
    """

    axis: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, index = inputs
        _check_index(index)
        require(0 <= self.axis < x.rank, f"axis {self.axis} exceeds rank {x.rank}")
        shape = (*x.shape[: self.axis], *index.shape, *x.shape[self.axis + 1 :])
        return (TensorType(shape, x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, index = inputs
        return (np.asarray(np.take(x, index, axis=self.axis)),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        x, index = node.inputs
        back = ScatterAdd(axis=self.axis, size=x.shape[self.axis])
        return (dy.graph.emit(back, dy, index) if wanted[0] else None, None)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return self.axis != 0 and carries_first(inputs, rows)


@dataclass(frozen=True)
class ScatterAdd(Op, opcode="scatter_add", operands=("updates", "index")):
    """Zeros with `size` positions along `axis`, to which `updates` are added at `index`."""

    axis: int
    size: DimLike

    def check(self) -> None:
        if isinstance(self.size, int) and self.size < 0:
            raise GraphError("scatter_add: size is not negative")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        updates, index = inputs
        _check_index(index)
        end = self.axis + index.rank
        require(self.axis >= 0 and end <= updates.rank, f"{index} does not fit into {updates}")
        fits = updates.shape[self.axis : end] == index.shape
        require(fits, f"axes {self.axis} to {end - 1} of {updates} must be those of {index}")
        shape = (*updates.shape[: self.axis], self.size, *updates.shape[end:])
        return (TensorType(shape, updates.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        updates, index = inputs
        before, after = updates.shape[: self.axis], updates.shape[self.axis + index.ndim :]
        (size,) = concrete((self.size,), "scatter_add")
        y = np.zeros((*before, size, *after), updates.dtype)
        np.add.at(np.moveaxis(y, self.axis, 0), index, self._first(updates, index.ndim))
        return (y,)

    def _first(self, updates: np.ndarray, count: int) -> np.ndarray:
        """`updates` with the axes of the index before all others."""
        return np.moveaxis(updates, range(self.axis, self.axis + count), range(count))

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        index = node.inputs[1]
        return (dy.graph.emit(Gather(axis=self.axis), dy, index) if wanted[0] else None, None)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return self.axis != 0 and carries_first(inputs, rows)


@dataclass(frozen=True)
class Flip(Op, opcode="flip", operands=("x",)):
    """x with the order of its elements reversed along `axis`: y[i] = x[size - 1 - i]."""

    axis: int

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        require(0 <= self.axis < x.rank, f"axis {self.axis} exceeds rank {x.rank}")
        return inputs

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.flip(inputs[0], self.axis),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        return (dy.graph.emit(Flip(axis=self.axis), dy),)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return self.axis != 0
