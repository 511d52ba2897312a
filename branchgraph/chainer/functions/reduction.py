"""Reductions, running sums and products, and matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from branchgraph.chainer.functions.arithmetic import exp, floating, log, record_constant, square
from branchgraph.chainer.functions.array import (
    axis_of,
    broadcast_to,
    cast,
    diagonal,
    expand_dims,
    reshape,
    transpose,
)
from branchgraph.chainer.functions.record import as_variable, function, record
from branchgraph.chainer.variable import Variable
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.ops.elementwise import Cast
from branchgraph.ir.ops.linear import MatMul
from branchgraph.ir.ops.math import RunningProduct, RunningSum
from branchgraph.ir.ops.reduce import ArgMax, ReduceMax, ReduceMean, ReduceSum
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.types import DType

__all__ = [
    "argmax",
    "argmin",
    "average",
    "batch_l2_norm_squared",
    "bias",
    "cumprod",
    "cumsum",
    "einsum",
    "logsumexp",
    "matmul",
    "max",
    "mean",
    "min",
    "prod",
    "scale",
    "sum",
    "sum_to",
    "tensordot",
]

Axis = int | tuple[int, ...] | None


def _axes(axis: Any, rank: int) -> tuple[int, ...]:
    """An `axis` argument as ascending axes; None means all of them."""
    if axis is None:
        return tuple(range(rank))
    if isinstance(axis, (int, np.integer)):
        axis = (int(axis),)
    if not isinstance(axis, tuple) or not all(isinstance(a, (int, np.integer)) for a in axis):
        raise TypeError(f"axis must be None, an int or a tuple of ints, got {axis!r}")
    found = sorted(axis_of(a, rank) for a in axis)
    if len(set(found)) < len(found):
        raise ValueError(f"axis {axis} names an axis twice")
    return tuple(found)


# -- reductions ----------------------------------------------------------------------------------


@function
def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> Variable:
    """The sum over axes."""
    x = floating(x)
    return record(ReduceSum(_axes(axis, x.ndim), keepdims), x)


@function
def average(x: Any, axis: Axis = None, weights: Any = None, keepdims: bool = False) -> Variable:
    """The mean over axes; with weights w along one axis, the sum of w x over the sum of w."""
    x = floating(x)
    axes = _axes(axis, x.ndim)
    if weights is None:
        return record(ReduceMean(axes, keepdims), x)
    w = as_variable(weights)
    if axis is None:
        fits = w.shape == x.shape
    elif len(axes) > 1:
        raise ValueError("average with weights takes one axis")
    else:
        fits = w.shape == (x.shape[axes[0]],)
    if not fits:
        raise ShapeError(f"weights have shape {w.shape}, x has {x.shape} and axis is {axis}")
    spread = w if axis is None else _aligned(w, x, axes[0])
    return sum(x * spread, axis, keepdims) / sum(w)


mean = average


@function
def sum_to(x: Any, shape: tuple[int, ...]) -> Variable:
    """x summed over the axes along which `shape` would be broadcast to it."""
    x = as_variable(x)
    shape = tuple(shape)
    if x.shape == shape:
        return x
    extra = x.ndim - len(shape)
    if extra < 0 or any(s not in (1, d) for s, d in zip(shape, x.shape[extra:])):
        raise ShapeError(f"shape {x.shape} cannot be summed to {shape}")
    unit = tuple(a + extra for a, s in enumerate(shape) if s != x.shape[a + extra])
    return reshape(record(ReduceSum((*range(extra), *unit)), x), shape)


@function
def max(x: Any, axis: Axis = None, keepdims: bool = False) -> Variable:
    """The maximum over axes; every element that attains it has the whole gradient."""
    x = floating(x)
    return record(ReduceMax(_axes(axis, x.ndim), keepdims), x)


@function
def min(x: Any, axis: Axis = None, keepdims: bool = False) -> Variable:
    """The minimum over axes; every element that attains it has the whole gradient."""
    return -max(-floating(x), axis, keepdims)


def _argmax(x: Variable, axis: int | None) -> Variable:
    if axis is None:
        x, axis = reshape(x, (-1,)), 0
    return record_constant(Cast(DType.I32), record_constant(ArgMax(axis_of(axis, x.ndim)), x))


@function
def argmax(x: Any, axis: int | None = None) -> Variable:
    """The index of the largest element, the lowest on ties; int32, without gradient."""
    return _argmax(floating(x), axis)


@function
def argmin(x: Any, axis: int | None = None) -> Variable:
    """The index of the smallest element, the lowest on ties; int32, without gradient."""
    return _argmax(-floating(x), axis)


@function
def logsumexp(x: Any, axis: Axis = None) -> Variable:
    """ln of the sum of e^x over axes, by way of the maximum m: ln sum e^(x - m) + m."""
    x = floating(x)
    axes = _axes(axis, x.ndim)
    m = record_constant(ReduceMax(axes, True), x)
    total = log(sum(exp(x - m), axes))
    return total + reshape(m, total.shape)


@function
def batch_l2_norm_squared(x: Any) -> Variable:
    """The sum of squares of every sample."""
    x = floating(x)
    return sum(square(reshape(x, (len(x), -1))), 1)


@function
def prod(x: Any, axis: Axis = None, keepdims: bool = False) -> Variable:
    """The product over axes: the last running product, whose gradient survives zeros."""
    x = floating(x)
    axes = _axes(axis, x.ndim)
    kept = tuple(a for a in range(x.ndim) if a not in axes)
    shape = tuple(1 if a in axes else d for a, d in enumerate(x.shape))
    shape = shape if keepdims else tuple(x.shape[a] for a in kept)
    count = math.prod(x.shape[a] for a in axes)
    if count == 0:
        return as_variable(np.ones(shape, x.dtype))
    flat = reshape(transpose(x, (*axes, *kept)), (count, math.prod(shape)))
    last = record(Slice(axis=0, start=count - 1, size=1), record(RunningProduct(0), flat))
    return reshape(last, shape)


@function
def cumsum(x: Any, axis: int | None = None) -> Variable:
    """Running sums along an axis, of the flattened values by default."""
    x = floating(x)
    if axis is None:
        x, axis = reshape(x, (-1,)), 0
    return record(RunningSum(axis_of(axis, x.ndim)), x)


@function
def cumprod(x: Any, axis: int | None = None) -> Variable:
    """Running products along an axis, of the flattened values by default."""
    x = floating(x)
    if axis is None:
        x, axis = reshape(x, (-1,)), 0
    return record(RunningProduct(axis_of(axis, x.ndim)), x)


# -- aligned operands ----------------------------------------------------------------------------


def _aligned(y: Variable, x: Variable, axis: int) -> Variable:
    """y with unit axes, so that its axes meet those of x from `axis` on."""
    end = axis + y.ndim
    if x.shape[axis:end] != y.shape:
        raise ShapeError(f"shape {y.shape} must be that of axes {axis} to {end - 1} of {x.shape}")
    return reshape(y, (*(1,) * axis, *y.shape, *(1,) * (x.ndim - end)))


@function
def bias(x: Any, y: Any, axis: int = 1) -> Variable:
    """x + y, the axes of y meeting those of x from `axis` on."""
    x, y = as_variable(x), as_variable(y)
    return x + _aligned(y, x, axis_of(axis, x.ndim + 1))


@function
def scale(x: Any, y: Any, axis: int = 1) -> Variable:
    """x y, the axes of y meeting those of x from `axis` on."""
    x, y = as_variable(x), as_variable(y)
    return x * _aligned(y, x, axis_of(axis, x.ndim + 1))


# -- products ------------------------------------------------------------------------------------


@function
def matmul(a: Any, b: Any, transa: bool = False, transb: bool = False) -> Variable:
    """The matrix product by NumPy's rules: a vector on the left is a row, on the right a column."""
    a, b = as_variable(a), as_variable(b)
    if not a.ndim or not b.ndim:
        raise ShapeError("matmul needs operands with axes")
    dtype = np.result_type(a.dtype, b.dtype)
    left, right = cast(a, dtype), cast(b, dtype)
    if a.ndim == 1:
        left, transa = expand_dims(left, 0), False
    if b.ndim == 1:
        right, transb = expand_dims(right, 1), False
    y = record(MatMul(transa, transb), *_one_batch(left, right))
    *batch, rows, columns = y.shape
    return reshape(y, (*batch, *[rows] * (a.ndim > 1), *[columns] * (b.ndim > 1)))


def _one_batch(a: Variable, b: Variable) -> tuple[Variable, Variable]:
    """Both operands with the leading axes that theirs broadcast to."""
    try:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError as error:
        raise ShapeError(str(error)) from None
    return broadcast_to(a, (*batch, *a.shape[-2:])), broadcast_to(b, (*batch, *b.shape[-2:]))


@function
def tensordot(a: Any, b: Any, axes: Any = 2) -> Variable:
    """The sum of products over pairs of axes: the last of a and first of b, or those listed."""
    a, b = as_variable(a), as_variable(b)
    if isinstance(axes, int):
        of_a: Sequence[int] = range(a.ndim - axes, a.ndim)
        of_b: Sequence[int] = range(axes)
    else:
        of_a, of_b = ((v,) if isinstance(v, int) else v for v in axes)
    of_a = [axis_of(v, a.ndim) for v in of_a]
    of_b = [axis_of(v, b.ndim) for v in of_b]
    if [a.shape[v] for v in of_a] != [b.shape[v] for v in of_b]:
        raise ShapeError(f"axes {of_a} of {a.shape} do not meet axes {of_b} of {b.shape}")
    rest_a = [v for v in range(a.ndim) if v not in of_a]
    rest_b = [v for v in range(b.ndim) if v not in of_b]
    shape_a, shape_b = tuple(a.shape[v] for v in rest_a), tuple(b.shape[v] for v in rest_b)
    inner = math.prod(a.shape[v] for v in of_a)
    left = reshape(transpose(a, (*rest_a, *of_a)), (math.prod(shape_a), inner))
    right = reshape(transpose(b, (*of_b, *rest_b)), (inner, math.prod(shape_b)))
    return reshape(record(MatMul(), left, right), (*shape_a, *shape_b))


class _Labelled:
    """A value whose axes have labels: one factor of an Einstein sum."""

    def __init__(self, value: Variable, labels: Sequence[str]) -> None:
        self.value, self.labels = value, list(labels)

    def without_repeats(self) -> _Labelled:
        """Diagonals taken of labels that occur twice."""
        value, labels = self.value, self.labels
        for label in dict.fromkeys(labels):
            while labels.count(label) > 1:
                first = labels.index(label)
                second = labels.index(label, first + 1)
                value = diagonal(value, 0, first, second)
                labels = [v for i, v in enumerate(labels) if i not in (first, second)] + [label]
        return _Labelled(value, labels)

    def restricted(self, kept: set[str]) -> _Labelled:
        """Summed over the labels that are not in `kept`."""
        dropped = tuple(i for i, v in enumerate(self.labels) if v not in kept)
        if not dropped:
            return self
        return _Labelled(
            record(ReduceSum(dropped), self.value), [v for v in self.labels if v in kept]
        )

    def arranged(self, *groups: Sequence[str]) -> Variable:
        """One axis a group of labels, after the axes of the first group."""
        order = [self.labels.index(v) for group in groups for v in group]
        sizes = [[self.value.shape[self.labels.index(v)] for v in group] for group in groups]
        shape = (*sizes[0], *(math.prod(s) for s in sizes[1:]))
        return reshape(transpose(self.value, tuple(order)), shape)

    def times(self, other: _Labelled, needed: set[str]) -> _Labelled:
        """The product with `other`, summed over the shared labels that nobody needs any more."""
        a = self.restricted(needed | set(other.labels))
        b = other.restricted(needed | set(self.labels))
        shared = [v for v in a.labels if v in b.labels]
        batch = [v for v in shared if v in needed]
        inner = [v for v in shared if v not in needed]
        rows = [v for v in a.labels if v not in shared]
        columns = [v for v in b.labels if v not in shared]
        left, right = a.arranged(batch, rows, inner), b.arranged(batch, inner, columns)
        product = record(MatMul(), left, right)
        sizes = dict(zip(a.labels, a.value.shape)) | dict(zip(b.labels, b.value.shape))
        labels = [*batch, *rows, *columns]
        return _Labelled(reshape(product, tuple(sizes[v] for v in labels)), labels)


@function
def einsum(*operands: Any) -> Variable:
    """The Einstein sum of NumPy's notation: subscripts, then the values."""
    subscripts, *values = operands
    if not isinstance(subscripts, str):
        raise NotImplementedError("einsum takes its subscripts as a string")
    factors, result = _parse_einsum(subscripts, [as_variable(v) for v in values])
    total = factors[0]
    for i, factor in enumerate(factors[1:], 2):
        needed = set(result).union(*(f.labels for f in factors[i:]))
        total = total.times(factor, needed)
    total = total.restricted(set(result))
    return transpose(total.value, tuple(total.labels.index(v) for v in result))


def _parse_einsum(subscripts: str, values: list[Variable]) -> tuple[list[_Labelled], list[str]]:
    """The factors and the labels of the result; an ellipsis stands for numbered labels."""
    given, arrow, wanted = subscripts.replace(" ", "").partition("->")
    terms = given.split(",")
    if len(terms) != len(values):
        raise ValueError(f"einsum: {len(terms)} subscripts for {len(values)} values")
    most = 0
    factors = []
    for term, value in zip(terms, values):
        letters = term.replace("...", "")
        hidden = value.ndim - len(letters)
        if hidden < 0 or (hidden and "..." not in term):
            raise ShapeError(f"einsum: subscripts {term!r} do not fit rank {value.ndim}")
        most = hidden if hidden > most else most
        factors.append(_Labelled(value, _labels(term, hidden)).without_repeats())
    if arrow:
        result = _labels(wanted, most)
    else:
        letters = given.replace("...", "").replace(",", "")
        once = sorted(v for v in set(letters) if letters.count(v) == 1)
        result = [*_labels("..." * (most > 0), most), *once]
    return [_stretched(f, factors) for f in factors], result


def _labels(term: str, hidden: int) -> list[str]:
    """One label an axis; the axes of an ellipsis count from the right."""
    before, dots, after = term.partition("...")
    return [*before, *(f"{i} from the right" for i in range(hidden, 0, -1) if dots), *after]


def _stretched(factor: _Labelled, factors: list[_Labelled]) -> _Labelled:
    """The factor with unit axes broadcast to the size that their label has elsewhere."""
    sizes: dict[str, int] = {}
    for f in factors:
        for label, size in zip(f.labels, f.value.shape):
            if sizes.setdefault(label, size) in (1, size):
                sizes[label] = size
            elif size != 1:
                raise ShapeError(f"einsum: {label!r} has sizes {sizes[label]} and {size}")
    shape = tuple(sizes[v] for v in factor.labels)
    return _Labelled(broadcast_to(factor.value, shape), factor.labels)
