"""Poolings over windows beyond the maximum and the average: sums, Lp norms, adaptive averages."""

from __future__ import annotations

from collections.abc import Iterable

from branchgraph.ir.builder import Size, average_pool
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.functions.elementary import absolute, square
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.deep import FlooredSqrt
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.pool import AveragePool
from branchgraph.ir.ops.reduce import ReduceMean
from branchgraph.ir.ops.reshape import Slice


def sum_pool(
    x: Value, kernel: Size, *, stride: Size | None = None, pad: Size = 0, cover_all: bool = False
) -> Value:
    """The sum of every window of x [N, C, *size]; the stride defaults to the kernel."""
    return average_pool(x, kernel, stride=stride, pad=pad, cover_all=cover_all, divisor="one")


def lp_pool(
    x: Value, kernel: Size, p: int = 2, *, stride: Size | None = None, pad: Size = 0,
    cover_all: bool = False,
) -> Value:  # fmt: skip
    """(sum |x|^p)^(1/p) of every window, p 1 or 2; the gradient of a window of zeros is 0."""
    if p not in (1, 2):
        raise GraphError(f"lp_pool: p is 1 or 2, got {p}")
    power = absolute(x) if p == 1 else square(x)
    total = sum_pool(power, kernel, stride=stride, pad=pad, cover_all=cover_all)
    return total if p == 1 else x.graph.emit(FlooredSqrt(), total)


def adaptive_average_pool(x: Value, size: int | Iterable[int]) -> Value:
    """x [N, C, *spatial] averaged to spatial `size`, whatever its own.

    Window i of H elements for out of them reads floor(i H / out) .. ceil((i + 1) H / out) - 1.
    Axes that divide evenly are pooled; the windows of others may overlap, and are averaged one by
    one. A symbolic axis can be reduced to size 1 only.
    """
    axes = len(x.shape) - 2
    target = (size,) * axes if isinstance(size, int) else tuple(size)
    if axes < 1 or len(target) != axes or min(target) < 1:
        raise ShapeError(f"adaptive_average_pool: size {target} does not fit {x.type}")
    kernel = [1] * axes
    for a, out in enumerate(target):
        extent = x.shape[a + 2]
        if isinstance(extent, int) and extent % out == 0 and extent:
            kernel[a] = extent // out
        else:
            x = _averaged(x, a + 2, out)
    steps = tuple(kernel)
    if set(steps) == {1}:
        return x
    return x.graph.emit(AveragePool(steps, steps, (0,) * 2 * axes), x)


def _averaged(x: Value, axis: int, out: int) -> Value:
    """The windows along one axis that do not divide evenly."""
    extent = x.shape[axis]
    mean = ReduceMean(axes=(axis,), keepdims=True)
    if out == 1:
        return x.graph.emit(mean, x)
    if not isinstance(extent, int) or extent < 1:
        raise ShapeError(f"adaptive_average_pool: axis {axis} of {x.type} has no known size")
    parts = []
    for i in range(out):
        start, stop = i * extent // out, -(-(i + 1) * extent // out)
        cut = Slice(axis=axis, start=start, size=stop - start)
        parts.append(x.graph.emit(mean, x.graph.emit(cut, x)))
    return x.graph.emit(Concat(axis=axis), *parts)
