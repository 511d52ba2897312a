"""Pooling over any number of spatial axes.

Window h of one axis reads x[h s - p .. h s - p + k - 1]. The number of windows is

    floor((H + p + p' - k) / s) + 1            plain
    floor((H + p + p' - k + s - 1) / s) + 1    cover_all: windows that overhang the end are kept

Cells outside x are -inf for the maximum and 0 for the average.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import DimLike, is_positive
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node
from branchgraph.ir.op import Cotangents, Op, Wanted, require, require_float
from branchgraph.ir.types import DType, TensorType


@dataclass(frozen=True)
class _Pool(Op):
    """Geometry of pooling; `pad` lists leading pads, then trailing ones."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    cover_all: bool = False

    def check(self) -> None:
        n = len(self.kernel)
        if n == 0:
            raise GraphError("pooling needs at least one spatial axis")
        if len(self.stride) != n or len(self.pad) != 2 * n:
            raise GraphError(f"pooling over {n} axes needs {n} strides and {2 * n} pads")
        if min(*self.kernel, *self.stride) < 1 or min(self.pad) < 0:
            raise GraphError("kernel and stride are at least 1, pad is not negative")

    def out_size(self, size: tuple[DimLike, ...]) -> tuple[DimLike, ...]:
        n = len(self.kernel)
        result = []
        for a, h in enumerate(size):
            slack = self.stride[a] - 1 if self.cover_all else 0
            span = h + self.pad[a] + self.pad[n + a] - self.kernel[a] + slack
            require(is_positive(span + 1), f"window {self.kernel[a]} exceeds spatial axis {a}")
            result.append(span // self.stride[a] + 1)
        return tuple(result)

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        require_float(x)
        n = len(self.kernel)
        require(x.rank == n + 2, f"{n} spatial axes need rank {n + 2}, got {x}")
        return (TensorType((*x.shape[:2], *self.out_size(x.shape[2:])), x.dtype),)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return True

    def padded(self, x: np.ndarray, fill: float) -> np.ndarray:
        """x with every window inside."""
        n = len(self.kernel)
        widths = [(0, 0), (0, 0)]
        for a, (h, o) in enumerate(zip(x.shape[2:], self.out_size(x.shape[2:]))):
            assert isinstance(o, int)
            reach = (o - 1) * self.stride[a] + self.kernel[a]
            widths.append((self.pad[a], max(reach - h - self.pad[a], 0)))
        assert n == len(widths) - 2
        if not any(b or e for b, e in widths):
            return x
        return np.pad(x, widths, constant_values=fill)

    def taps(
        self, padded: np.ndarray, out: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """For each position in the window: the position, and that cell of every window (a view)."""
        for tap in np.ndindex(*self.kernel):
            where = (slice(i, i + (o - 1) * s + 1, s) for i, o, s in zip(tap, out, self.stride))
            index = (slice(None), slice(None), *where)
            yield tap, padded[index]

    def windows(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Number of windows along each spatial axis of a concrete size."""
        return tuple(int(o) for o in self.out_size(size) if isinstance(o, int))


@dataclass(frozen=True)
class MaxPool(_Pool, opcode="max_pool", operands=("x",)):
    """Largest element of every window; the first one in row-major order has the gradient."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        out = self.windows(x.shape[2:])
        best = np.full((*x.shape[:2], *out), -np.inf, x.dtype)
        for _, cells in self.taps(self.padded(x, -np.inf), out):
            np.maximum(best, cells, out=best)
        return (best,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        (x,) = node.inputs
        index = dy.graph.emit(MaxPoolIndex(self.kernel, self.stride, self.pad, self.cover_all), x)
        return (dy.graph.emit(ScatterPooled(size=x.shape[2:]), dy, index),)


@dataclass(frozen=True)
class MaxPoolIndex(_Pool, opcode="max_pool_index", operands=("x",)):
    """Position of every window's maximum, flat over the spatial axes of x; -1 if all is padding."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (y,) = super().infer(*inputs)
        return (TensorType(y.shape, DType.I64),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        size = x.shape[2:]
        out = self.windows(size)
        best = np.full((*x.shape[:2], *out), -np.inf, x.dtype)
        index = np.full(best.shape, -1, np.int64)
        for tap, cells in self.taps(self.padded(x, -np.inf), out):
            inside, position = self._positions(tap, size, out)
            better = (~(cells <= best) & (best == best)) | (index < 0)
            better &= inside
            np.copyto(best, cells, where=better)
            np.copyto(index, position, where=better)
        return (index,)

    def _positions(
        self, tap: tuple[int, ...], size: tuple[int, ...], out: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whether the tap of each window lies in x, and its flat position there."""
        inside = np.ones(out, bool)
        position = np.zeros(out, np.int64)
        for a, (i, h, o) in enumerate(zip(tap, size, out)):
            shape = [1] * len(out)
            shape[a] = o
            along = (np.arange(o) * self.stride[a] + i - self.pad[a]).reshape(shape)
            inside &= (along >= 0) & (along < h)
            position = position * h + along
        return inside, position

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return (None,)


@dataclass(frozen=True)
class ScatterPooled(Op, opcode="scatter_pooled", operands=("dy", "index")):
    """dx of spatial `size`: each dy added at the flat spatial position `index` (-1: dropped)."""

    size: tuple[DimLike, ...]

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        dy, index = inputs
        require(dy.shape == index.shape, f"dy and index must have one shape, got {dy} and {index}")
        require(index.dtype is DType.I64, f"index must be i64, got {index.dtype}")
        return (TensorType((*dy.shape[:2], *self.size), dy.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        dy, index = inputs
        planes = int(np.prod(dy.shape[:2]))
        size = tuple(int(d) for d in self.size if isinstance(d, int))
        area = int(np.prod(size))
        flat = index.reshape(planes, int(np.prod(index.shape[2:])))
        target = flat + np.arange(planes)[:, None] * area
        kept = flat >= 0
        weights = dy.reshape(flat.shape)[kept]
        summed = np.bincount(target[kept], weights=weights, minlength=planes * area)
        return (summed.astype(dy.dtype).reshape(*dy.shape[:2], *size),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (ct,) = cotangents
        assert ct is not None
        return (ct.graph.emit(GatherPooled(), ct, node.inputs[1]), None)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows)


@dataclass(frozen=True)
class GatherPooled(Op, opcode="gather_pooled", operands=("x", "index")):
    """y = x at the flat spatial position `index` of each plane; 0 where the index is -1."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, index = inputs
        require(x.shape[:2] == index.shape[:2], f"planes differ: {x} and {index}")
        require(index.dtype is DType.I64, f"index must be i64, got {index.dtype}")
        return (TensorType(index.shape, x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, index = inputs
        flat = index.reshape(*index.shape[:2], int(np.prod(index.shape[2:])))
        cells = x.reshape(*x.shape[:2], int(np.prod(x.shape[2:])))
        y = np.take_along_axis(cells, np.maximum(flat, 0), axis=2)
        return (np.where(flat >= 0, y, x.dtype.type(0)).reshape(index.shape),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        x, index = node.inputs
        return (dy.graph.emit(ScatterPooled(size=x.shape[2:]), dy, index), None)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows)


#: What a window's sum is divided by.
_DIVISORS = ("kernel", "padded", "inside", "one")


@dataclass(frozen=True)
class _Average(_Pool):
    divisor: str = "kernel"

    def check(self) -> None:
        super().check()
        if self.divisor not in _DIVISORS:
            raise GraphError(f"pooling: divisor {self.divisor!r} is none of {list(_DIVISORS)}")

    def divided(self, total: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        """Every window's entry of `total` divided by what its window counts."""
        if self.divisor == "one":
            return total
        if self.divisor == "kernel":
            return np.asarray(total / np.asarray(np.prod(self.kernel), total.dtype))
        counts = np.ones((), np.int64)
        for a, o in enumerate(total.shape[2:]):
            counts = counts[..., None] * self._counted(a, size[a], o)
        return np.asarray(total / np.maximum(counts, 1).astype(total.dtype))

    def _counted(self, axis: int, size: int, out: int) -> np.ndarray:
        """Cells of every window along one axis, in x or in x and its pads."""
        start = np.arange(out) * self.stride[axis] - self.pad[axis]
        end = start + self.kernel[axis]
        if self.divisor == "inside":
            low, high = 0, size
        else:
            low, high = -self.pad[axis], size + self.pad[len(self.kernel) + axis]
        return np.asarray(np.maximum(np.minimum(end, high) - np.maximum(start, low), 0))


@dataclass(frozen=True)
class AveragePool(_Average, opcode="average_pool", operands=("x",)):
    """Sum of every window over a divisor: its average, or the sum itself.

    divisor: `kernel`, all cells of the window; `padded`, its cells in x and the pads, not those
    that overhang the end (MXNet's average with count_include_pad); `inside`, its cells in x;
    `one`, which makes it sum pooling. A window without such cells is 0.
    """

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        out = self.windows(x.shape[2:])
        total = np.zeros((*x.shape[:2], *out), x.dtype)
        for _, cells in self.taps(self.padded(x, 0.0), out):
            total += cells
        return (self.divided(total, x.shape[2:]),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        back = AveragePoolGradient(
            self.kernel, self.stride, self.pad, self.cover_all, self.divisor,
            size=node.inputs[0].shape[2:],
        )  # fmt: skip
        return (dy.graph.emit(back, dy),)


@dataclass(frozen=True)
class AveragePoolGradient(_Average, opcode="average_pool_gradient", operands=("dy",)):
    """The transpose of `AveragePool` onto spatial `size`."""

    size: tuple[DimLike, ...] = ()

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (dy,) = inputs
        out = self.out_size(self.size)
        require(dy.shape[2:] == out, f"size {self.size} gives {out}, dy has {dy.shape[2:]}")
        return (TensorType((*dy.shape[:2], *self.size), dy.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (dy,) = inputs
        size = tuple(int(d) for d in self.size if isinstance(d, int))
        out = dy.shape[2:]
        share = self.divided(dy, size)
        padded = self.padded(np.zeros((*dy.shape[:2], *size), dy.dtype), 0.0)
        for _, cells in self.taps(padded, out):
            cells += share
        inner = (slice(p, p + h) for p, h in zip(self.pad, size))
        index = (slice(None), slice(None), *inner)
        return (padded[index],)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dx,) = cotangents
        assert dx is not None
        forward = AveragePool(self.kernel, self.stride, self.pad, self.cover_all, self.divisor)
        return (dx.graph.emit(forward, dx),)
