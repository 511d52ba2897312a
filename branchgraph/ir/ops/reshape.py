"""Data movement: reshape, transpose, slice and embed, split, pad.

`Slice` and `Embed` are each other's transposes: Embed places its operand into zeros at the
positions that Slice would read,  embed(x)[start + step i] = x[i].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import DimLike, Shape, product
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node
from branchgraph.ir.op import Cotangents, Op, Wanted, concrete, make, require
from branchgraph.ir.types import TensorType


@dataclass(frozen=True)
class Reshape(Op, opcode="reshape", operands=("x",)):
    """The same elements in row-major order under another shape."""

    shape: tuple[DimLike, ...]

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        old, new = x.size, product(self.shape)
        require(old == new, f"{old} elements do not fit shape {list(map(str, self.shape))} ({new})")
        return (TensorType(self.shape, x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (inputs[0].reshape(concrete(self.shape, "reshape")),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        return (dy.graph.emit(Reshape(shape=node.inputs[0].shape), dy),)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return bool(self.shape) and inputs[0].rank > 0 and self.shape[0] == inputs[0].shape[0]


@dataclass(frozen=True)
class Transpose(Op, opcode="transpose", operands=("x",)):
    """y[i_axes[0], i_axes[1], ...] = x[i_0, i_1, ...]: NumPy's `transpose`."""

    axes: tuple[int, ...]

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        require(
            sorted(self.axes) == list(range(x.rank)),
            f"axes {list(self.axes)} are no permutation of the {x.rank} axes",
        )
        return (TensorType(tuple(x.shape[a] for a in self.axes), x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (inputs[0].transpose(self.axes),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        inverse = tuple(int(i) for i in np.argsort(self.axes))
        return (dy.graph.emit(Transpose(axes=inverse), dy),)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return self.axes[0] == 0


def _check_axis(axis: int, x: TensorType) -> None:
    require(0 <= axis < x.rank, f"axis {axis} exceeds rank {x.rank}")


def _with_axis(shape: Shape, axis: int, size: DimLike) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _along(axis: int, index: slice) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, index)


@dataclass(frozen=True)
class Slice(Op, opcode="slice", operands=("x",)):
    """y[..., i, ...] = x[..., start + step i, ...] along `axis`, `size` elements."""

    axis: int
    start: int
    size: int
    step: int = 1

    def check(self) -> None:
        if self.step < 1 or self.start < 0 or self.size < 0:
            raise GraphError("slice: start and size are not negative, step is at least 1")

    @property
    def stop(self) -> int:
        """One past the last position read."""
        return self.start + max(self.size - 1, 0) * self.step + (self.size > 0)

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        _check_axis(self.axis, x)
        extent = x.shape[self.axis]
        require(isinstance(extent, int), f"axis {self.axis} has symbolic size {extent}")
        inside = isinstance(extent, int) and self.stop <= extent
        require(inside, f"positions up to {self.stop - 1} exceed size {extent}")
        return (TensorType(_with_axis(x.shape, self.axis, self.size), x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (inputs[0][_along(self.axis, slice(self.start, self.stop, self.step))],)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        extent = node.inputs[0].shape[self.axis]
        assert isinstance(extent, int)
        embed = Embed(axis=self.axis, start=self.start, size=extent, step=self.step)
        return (dy.graph.emit(embed, dy),)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return self.axis != 0


@dataclass(frozen=True)
class Embed(Op, opcode="embed", operands=("x",)):
    """x placed into zeros: y has `size` positions along `axis`, y[start + step i] = x[i]."""

    axis: int
    start: int
    size: int
    step: int = 1

    def check(self) -> None:
        if self.step < 1 or self.start < 0 or self.size < 0:
            raise GraphError("embed: start and size are not negative, step is at least 1")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        _check_axis(self.axis, x)
        count = x.shape[self.axis]
        require(isinstance(count, int), f"axis {self.axis} has symbolic size {count}")
        assert isinstance(count, int)
        last = self.start + (count - 1) * self.step
        require(count == 0 or last < self.size, f"position {last} exceeds size {self.size}")
        return (TensorType(_with_axis(x.shape, self.axis, self.size), x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        y = np.zeros((*x.shape[: self.axis], self.size, *x.shape[self.axis + 1 :]), x.dtype)
        stop = self.start + x.shape[self.axis] * self.step
        y[_along(self.axis, slice(self.start, stop, self.step))] = x
        return (y,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        count = node.inputs[0].shape[self.axis]
        assert isinstance(count, int)
        cut = Slice(axis=self.axis, start=self.start, size=count, step=self.step)
        return (dy.graph.emit(cut, dy),)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return self.axis != 0


@dataclass(frozen=True)
class Split(Op, opcode="split", operands=("x",)):
    """x cut along `axis` into consecutive parts of the given sizes."""

    axis: int
    sizes: tuple[int, ...]

    def check(self) -> None:
        if not self.sizes or min(self.sizes) < 0:
            raise GraphError(f"split: needs at least one size, none negative, got {self.sizes}")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        _check_axis(self.axis, x)
        total = sum(self.sizes)
        require(total == x.shape[self.axis], f"sizes sum to {total}, axis has {x.shape[self.axis]}")
        return tuple(TensorType(_with_axis(x.shape, self.axis, s), x.dtype) for s in self.sizes)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        borders = [int(b) for b in np.cumsum(self.sizes)[:-1]]
        return tuple(np.split(inputs[0], borders, axis=self.axis))

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        graph = node.graph
        concat = make("concat", axis=self.axis)
        parts = [
            graph.emit(make("full", value=0.0, shape=v.shape, dtype=v.dtype)) if d is None else d
            for d, v in zip(cotangents, node.outputs)
        ]
        return (graph.emit(concat, *parts),)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return self.axis != 0


@dataclass(frozen=True)
class Pad(Op, opcode="pad", operands=("x",)):
    """x surrounded by `value`: `begin[a]` elements before and `end[a]` after it along axis a."""

    begin: tuple[int, ...]
    end: tuple[int, ...]
    value: float = 0.0

    def check(self) -> None:
        if len(self.begin) != len(self.end) or any(p < 0 for p in (*self.begin, *self.end)):
            raise GraphError("pad: begin and end have one entry an axis, none negative")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        require(len(self.begin) == x.rank, f"pads {len(self.begin)} axes, x has {x.rank}")
        shape = tuple(b + d + e for b, d, e in zip(self.begin, x.shape, self.end))
        return (TensorType(shape, x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        widths = list(zip(self.begin, self.end))
        return (np.pad(inputs[0], widths, constant_values=self.value),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        for axis, (begin, end) in enumerate(zip(self.begin, self.end)):
            size = node.inputs[0].shape[axis]
            if begin or end:
                require(isinstance(size, int), f"gradient of padding a symbolic axis {axis}")
                assert isinstance(size, int)
                dy = dy.graph.emit(Slice(axis=axis, start=begin, size=size), dy)
        return (dy,)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return not self.begin[0] and not self.end[0]
