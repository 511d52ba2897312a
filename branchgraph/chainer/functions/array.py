"""Data movement.

Whatever picks elements by position (integer arrays, masks, diagonals, patches) is one gather of the
flattened value: the positions are what the same picking gives for 0, 1, 2, ... in place of x.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from branchgraph.chainer.configuration import using_config
from branchgraph.chainer.functions.record import (
    as_variable,
    function,
    made,
    pair,
    record,
    record_all,
)
from branchgraph.chainer.variable import Variable
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.ops.elementwise import Add, Cast, Where
from branchgraph.ir.ops.index import Flip, Gather, ScatterAdd
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.reduce import BroadcastTo
from branchgraph.ir.ops.reshape import Pad, Reshape, Slice, Split, Transpose
from branchgraph.ir.types import DType

__all__ = [
    "broadcast",
    "broadcast_to",
    "cast",
    "concat",
    "copy",
    "depth2space",
    "diagonal",
    "dstack",
    "expand_dims",
    "flatten",
    "flip",
    "fliplr",
    "flipud",
    "get_item",
    "hstack",
    "identity",
    "im2col",
    "moveaxis",
    "pad",
    "pad_sequence",
    "permutate",
    "repeat",
    "reshape",
    "rollaxis",
    "scatter_add",
    "select_item",
    "separate",
    "space2depth",
    "split_axis",
    "squeeze",
    "stack",
    "swapaxes",
    "tile",
    "transpose",
    "vstack",
]


def axis_of(axis: int, rank: int) -> int:
    """An axis that may count from the end, as one that counts from the start."""
    if not -rank <= axis < rank:
        raise ShapeError(f"axis {axis} exceeds rank {rank}")
    return int(axis) % rank


def _positions(x: Variable, pick: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Where in the flattened x the elements lie that `pick` picks."""
    return np.ascontiguousarray(pick(np.arange(x.size).reshape(x.shape)))


def _picked(x: Variable, pick: Callable[[np.ndarray], np.ndarray]) -> Variable:
    return record(Gather(axis=0), reshape(x, (-1,)), _positions(x, pick))


def _array(value: Any) -> np.ndarray:
    """The numbers of a variable or an array."""
    return np.asarray(value.array if isinstance(value, Variable) else value)


# -- shapes --------------------------------------------------------------------------------------


@function
def reshape(x: Any, shape: Iterable[int]) -> Variable:
    """The same elements under another shape; one size may be -1."""
    x = as_variable(x)
    shape = tuple([int(s) for s in shape])
    if min(shape, default=0) >= 0:
        return x if shape == x.shape else record(made(Reshape, shape), x)
    if shape.count(-1) > 1 or any(s < -1 for s in shape):
        raise ShapeError(f"shape {shape} may have one size of -1")
    known = math.prod(s for s in shape if s >= 0)
    full = tuple(s if s >= 0 else x.size // max(known, 1) for s in shape)
    return x if full == x.shape else record(Reshape(full), x)


@function
def flatten(x: Any) -> Variable:
    """All elements on one axis, the batch included."""
    return reshape(x, (-1,))


@function
def expand_dims(x: Any, axis: int) -> Variable:
    """x with a new axis of size 1."""
    x = as_variable(x)
    at = axis_of(axis, x.ndim + 1)
    return reshape(x, (*x.shape[:at], 1, *x.shape[at:]))


@function
def squeeze(x: Any, axis: int | tuple[int, ...] | None = None) -> Variable:
    """x without its axes of size 1, or without those given."""
    x = as_variable(x)
    if axis is None:
        return reshape(x, (d for d in x.shape if d != 1))
    if not isinstance(axis, (int, tuple)):
        raise TypeError(f"axis must be None, an int or a tuple of ints, got {axis!r}")
    gone = [axis_of(a, x.ndim) for a in ((axis,) if isinstance(axis, int) else axis)]
    if any(x.shape[a] != 1 for a in gone):
        raise ShapeError(f"axes {gone} of {x.shape} must have size 1")
    return reshape(x, (d for a, d in enumerate(x.shape) if a not in gone))


@function
def broadcast_to(x: Any, shape: tuple[int, ...]) -> Variable:
    """x repeated along new axes and axes of size 1."""
    x = as_variable(x)
    shape = tuple(shape)
    return x if x.shape == shape else record(BroadcastTo(shape), x)


@function
def broadcast(*args: Any) -> Variable | tuple[Variable, ...]:
    """All values in the shape that theirs broadcast to."""
    xs = [as_variable(x) for x in args]
    try:
        shape = np.broadcast_shapes(*(x.shape for x in xs))
    except ValueError as error:
        raise ShapeError(str(error)) from None
    spread = tuple(broadcast_to(x, shape) for x in xs)
    return spread if len(spread) > 1 else spread[0]


@function
def cast(x: Any, typ: Any) -> Variable:
    """x in another dtype."""
    x = as_variable(x)
    return x if x.dtype == np.dtype(typ) else record(Cast(DType.of(np.dtype(typ))), x)


def _same(x: Any) -> Variable:
    return Variable._of(as_variable(x)._operand())


@function
def identity(*inputs: Any) -> Variable | tuple[Variable, ...]:
    """The values as they are."""
    same = tuple(_same(x) for x in inputs)
    return same if len(same) > 1 else same[0]


@function
def copy(x: Any, dst: Any = None) -> Variable:
    """x on another device: there is one."""
    return _same(x)


# -- the order of axes ---------------------------------------------------------------------------


@function
def transpose(x: Any, axes: Sequence[int] | None = None) -> Variable:
    """x with its axes permuted, reversed by default."""
    x = as_variable(x)
    order = range(x.ndim)[::-1] if axes is None else [axis_of(a, x.ndim) for a in axes]
    return record(Transpose(tuple(order)), x)


@function
def swapaxes(x: Any, axis1: int, axis2: int) -> Variable:
    """Two axes exchanged."""
    x = as_variable(x)
    order = list(range(x.ndim))
    a, b = axis_of(axis1, x.ndim), axis_of(axis2, x.ndim)
    order[a], order[b] = b, a
    return transpose(x, order)


@function
def moveaxis(x: Any, source: Any, destination: Any) -> Variable:
    """Axes moved to new places, the others in their order."""
    x = as_variable(x)
    sources, places = (
        [axis_of(a, x.ndim) for a in ((v,) if isinstance(v, int) else v)]
        for v in (source, destination)
    )
    if len(sources) != len(places):
        raise ShapeError(f"{len(sources)} axes cannot move to {len(places)} places")
    moving = dict(zip(places, sources))
    rest = iter(a for a in range(x.ndim) if a not in sources)
    return transpose(x, [moving[a] if a in moving else next(rest) for a in range(x.ndim)])


@function
def rollaxis(x: Any, axis: int, start: int = 0) -> Variable:
    """One axis moved until it lies before the axis that was at `start`."""
    x = as_variable(x)
    at = axis_of(axis, x.ndim)
    before = axis_of(start if start >= 0 else start + x.ndim, x.ndim + 1)
    order = [a for a in range(x.ndim) if a != at]
    order.insert(before - (at < before), at)
    return transpose(x, order)


@function
def flip(x: Any, axis: int) -> Variable:
    """The order of elements reversed along an axis."""
    x = as_variable(x)
    return record(Flip(axis_of(axis, x.ndim)), x)


@function
def fliplr(a: Any) -> Variable:
    """Reversed along axis 1."""
    return flip(a, 1)


@function
def flipud(a: Any) -> Variable:
    """Reversed along axis 0."""
    return flip(a, 0)


# -- joining and cutting -------------------------------------------------------------------------


@function
def concat(xs: Sequence[Any], axis: int = 1) -> Variable:
    """The values one after another along an axis."""
    values = [as_variable(x) for x in xs]
    return record(Concat(axis_of(axis, values[0].ndim)), *values)


@function
def stack(xs: Sequence[Any], axis: int = 0) -> Variable:
    """The values side by side on a new axis."""
    values = [as_variable(x) for x in xs]
    at = axis_of(axis, values[0].ndim + 1)
    return concat([expand_dims(x, at) for x in values], at)


@function
def hstack(xs: Sequence[Any]) -> Variable:
    """Joined along axis 1; vectors along their only axis."""
    values = [x if x.ndim else reshape(x, (1,)) for x in map(as_variable, xs)]
    return concat(values, 0 if values[0].ndim == 1 else 1)


@function
def vstack(xs: Sequence[Any]) -> Variable:
    """Joined along axis 0; vectors become rows."""
    return concat([x if x.ndim > 1 else reshape(x, (1, -1)) for x in map(as_variable, xs)], 0)


@function
def dstack(xs: Sequence[Any]) -> Variable:
    """Joined along axis 2; vectors become rows, and matrices have a third axis."""
    rows = [x if x.ndim > 1 else reshape(x, (1, -1)) for x in map(as_variable, xs)]
    return concat([x if x.ndim > 2 else reshape(x, (*x.shape, 1)) for x in rows], 2)


@function
def split_axis(
    x: Any, indices_or_sections: Any, axis: int, force_tuple: bool = True
) -> Variable | tuple[Variable, ...]:
    """x cut along an axis into equal sections, or at the given borders."""
    x = as_variable(x)
    at = axis_of(axis, x.ndim)
    extent = x.shape[at]
    if isinstance(indices_or_sections, (int, np.integer)):
        count = int(indices_or_sections)
        if count < 1 or extent % count:
            raise ShapeError(f"axis {axis} of size {extent} has no {count} equal sections")
        sizes = (extent // count,) * count
    else:
        inner = [min(int(b), extent) for b in indices_or_sections]
        sizes = tuple(b - a for a, b in itertools.pairwise([0, *inner, extent]))
        if any(s < 0 for s in sizes):
            raise ShapeError(f"borders {inner} must ascend")
    parts = record_all(Split(at, sizes), x)
    return parts if force_tuple or len(parts) > 1 else parts[0]


@function
def separate(x: Any, axis: int = 0) -> tuple[Variable, ...]:
    """The slices of x along an axis, which goes away."""
    x = as_variable(x)
    at = axis_of(axis, x.ndim)
    if not x.shape[at]:
        return ()
    shape = (*x.shape[:at], *x.shape[at + 1 :])
    return tuple(reshape(p, shape) for p in record_all(Split(at, (1,) * x.shape[at]), x))


@function
def tile(x: Any, reps: int | tuple[int, ...]) -> Variable:
    """x repeated as a whole along its axes, new ones first."""
    x = as_variable(x)
    counts = (reps,) if isinstance(reps, int) else tuple(reps)
    if any(c < 0 for c in counts):
        raise ValueError(f"reps must not be negative, got {reps}")
    rank = max(x.ndim, len(counts))
    sizes = (*(1,) * (rank - x.ndim), *x.shape)
    counts = (*(1,) * (rank - len(counts)), *counts)
    apart = reshape(x, [n for d in sizes for n in (1, d)])
    spread = broadcast_to(apart, tuple(n for c, d in zip(counts, sizes) for n in (c, d)))
    return reshape(spread, [c * d for c, d in zip(counts, sizes)])


@function
def repeat(x: Any, repeats: int | tuple[int, ...], axis: int | None = None) -> Variable:
    """Every element along an axis repeated; of the flattened values by default."""
    x = as_variable(x)
    if axis is None:
        x, axis = reshape(x, (-1,)), 0
    at = axis_of(axis, x.ndim)
    counts = repeats if isinstance(repeats, int) else np.asarray(repeats)
    return record(Gather(axis=at), x, np.repeat(np.arange(x.shape[at]), counts))


# -- padding -------------------------------------------------------------------------------------


@function
def pad(x: Any, pad_width: Any, mode: str, **keywords: Any) -> Variable:
    """x surrounded by other elements, in NumPy's modes.

    As in Chainer, the gradient is the part of dy that lies over x: what the border repeats of x
    passes nothing back, so that only the mode `constant` has its true derivative.
    """
    x = as_variable(x)
    if mode == "constant":
        return _pad_constant(x, pad_width, **keywords)
    with using_config("enable_backprop", False):
        if mode in ("edge", "reflect", "symmetric", "wrap"):
            surrounded = _picked(x, lambda at: np.pad(at, pad_width, mode, **keywords))
        else:
            surrounded = as_variable(np.pad(_array(x), pad_width, mode, **keywords))
    over = np.pad(np.ones(x.shape, bool), pad_width, "constant")
    return record(Where(), over, _pad_constant(x, pad_width), surrounded)


def _pad_constant(x: Variable, pad_width: Any, constant_values: Any = 0) -> Variable:
    widths = np.broadcast_to(np.asarray(pad_width, int), (x.ndim, 2))
    values = np.broadcast_to(np.asarray(constant_values, float), (x.ndim, 2))
    if (values == values.flat[:1]).all():
        value = float(values.flat[0]) if values.size else 0.0
        return record(Pad(tuple(widths[:, 0]), tuple(widths[:, 1]), value), x)
    for axis, side in np.ndindex(x.ndim, 2):
        ends = np.zeros((2, x.ndim), int)
        ends[side, axis] = widths[axis, side]
        x = record(Pad(tuple(ends[0]), tuple(ends[1]), float(values[axis, side])), x)
    return x


@function
def pad_sequence(xs: Sequence[Any], length: int | None = None, padding: float = 0) -> Variable:
    """Values of different length side by side, their ends padded."""
    values = [as_variable(x) for x in xs]
    longest = max(len(x) for x in values)
    length = longest if length is None else length
    if length < longest:
        raise ShapeError(f"length {length} is shorter than a value of length {longest}")
    padded = []
    for x in values:
        none = (0,) * x.ndim
        op = Pad(none, (length - len(x), *none[1:]), float(padding))
        padded.append(x if len(x) == length else record(op, x))
    return stack(padded)


# -- picking -------------------------------------------------------------------------------------


def _is_basic(part: Any) -> bool:
    return (
        part is None
        or part is Ellipsis
        or (isinstance(part, (int, np.integer, slice)) and not isinstance(part, (bool, np.bool_)))
    )


def _index(slices: Any) -> tuple[Any, ...]:
    """The parts of an index; a list of ints is one part, another list stands for a tuple."""
    if isinstance(slices, list) and not all(isinstance(s, (int, np.integer)) for s in slices):
        slices = tuple(slices)
    parts = slices if isinstance(slices, tuple) else (slices,)
    return tuple(p if _is_basic(p) else _array(p) for p in parts)


@function
def get_item(x: Any, slices: Any) -> Variable:
    """x[slices]: ints, slices, None, Ellipsis, integer arrays and masks."""
    x = as_variable(x)
    parts = _index(slices)
    if all(_is_basic(p) for p in parts):
        return _sliced(x, parts)
    return _picked(x, lambda at: at[parts])


def _sliced(x: Variable, parts: tuple[Any, ...]) -> Variable:
    taken = [p for p in parts if p is not None and p is not Ellipsis]
    if len(taken) > x.ndim or parts.count(Ellipsis) > 1:
        raise ShapeError(f"index {parts} does not fit shape {x.shape}")
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    whole = (slice(None),) * (x.ndim - len(taken))
    shape: list[int] = []
    axis = 0
    for part in (*parts[:at], *whole, *parts[at + 1 :]):
        if part is None:
            shape.append(1)
            continue
        if isinstance(part, slice):
            x = _cut(x, axis, range(x.shape[axis])[part])
            shape.append(x.shape[axis])
        else:
            position = range(x.shape[axis])[part : part + 1 or None]
            if not position:
                raise IndexError(f"index {part} exceeds axis {axis} of size {x.shape[axis]}")
            x = _cut(x, axis, position)
        axis += 1
    return reshape(x, shape)


def _cut(x: Variable, axis: int, positions: range) -> Variable:
    """The elements at `positions` along an axis."""
    size = len(positions)
    if size == x.shape[axis] and (positions.step == 1 or size < 2):
        return x
    ascending = positions if positions.step > 0 else positions[::-1]
    start, step = (ascending.start, ascending.step) if size else (0, 1)
    if size < x.shape[axis]:
        x = record(Slice(axis=axis, start=start, size=size, step=step if size > 1 else 1), x)
    return x if positions.step > 0 or size < 2 else record(Flip(axis), x)


@function
def scatter_add(a: Any, slices: Any, b: Any) -> Variable:
    """a with b added at the elements that a[slices] picks."""
    a, b = as_variable(a), as_variable(b)
    at = _positions(a, lambda positions: positions[_index(slices)])
    added = record(ScatterAdd(axis=0, size=a.size), broadcast_to(b, at.shape), at)
    return record(Add(), a, reshape(added, a.shape))


@function
def select_item(x: Any, t: Any) -> Variable:
    """x[i, t[i]] for every row i."""
    x, chosen = as_variable(x), _array(t)
    if x.ndim != 2 or chosen.shape != x.shape[:1] or chosen.dtype.kind != "i":
        raise ShapeError(f"needs x [N, C] and integers t [N], got {x.shape} and {chosen.shape}")
    return _picked(x, lambda at: at[np.arange(len(chosen)), chosen])


@function
def permutate(x: Any, indices: Any, axis: int = 0, inv: bool = False) -> Variable:
    """The elements along an axis in the order of `indices`, or back from it."""
    x, order = as_variable(x), _array(indices)
    at = axis_of(axis, x.ndim)
    if order.shape != (x.shape[at],) or order.dtype.kind not in "iu":
        raise ShapeError(f"indices must be {x.shape[at]} integers, got {order.dtype}{order.shape}")
    order = np.argsort(order) if inv else order % max(len(order), 1)
    return record(Gather(axis=at), x, order)


@function
def diagonal(x: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Variable:
    """The elements whose positions on two axes differ by `offset`, on a new last axis."""
    return _picked(as_variable(x), lambda at: np.diagonal(at, offset, axis1, axis2))


# -- pixels --------------------------------------------------------------------------------------


@function
def depth2space(X: Any, r: int) -> Variable:
    """[N, r r C, H, W] to [N, C, r H, r W]: channel (y r + x) C + c is pixel (y, x) of a block."""
    x = as_variable(X)
    n, channels, height, width = _image(x)
    if channels % (r * r):
        raise ShapeError(f"{channels} channels are no multiple of {r} times {r}")
    blocks = transpose(
        reshape(x, (n, r, r, channels // (r * r), height, width)), (0, 3, 4, 1, 5, 2)
    )
    return reshape(blocks, (n, channels // (r * r), height * r, width * r))


@function
def space2depth(X: Any, r: int) -> Variable:
    """[N, C, r H, r W] to [N, r r C, H, W]: the inverse of depth2space."""
    x = as_variable(X)
    n, channels, height, width = _image(x)
    if height % r or width % r:
        raise ShapeError(f"{height} by {width} pixels are no blocks of {r} by {r}")
    blocks = transpose(reshape(x, (n, channels, height // r, r, width // r, r)), (0, 3, 5, 1, 2, 4))
    return reshape(blocks, (n, channels * r * r, height // r, width // r))


def _image(x: Variable) -> tuple[int, int, int, int]:
    if x.ndim != 4:
        raise ShapeError(f"needs [N, C, H, W], got shape {x.shape}")
    n, channels, height, width = x.shape
    return n, channels, height, width


@function
def im2col(
    x: Any, ksize: Any, stride: Any = 1, pad: Any = 0, cover_all: bool = False, dilate: Any = 1
) -> Variable:
    """The windows of a convolution: [N, C, H, W] to [N, C kh kw, oh, ow]."""
    x = as_variable(x)
    n, channels, *extents = _image(x)
    geometry = zip(extents, pair(ksize), pair(stride), pair(pad), pair(dilate))
    # Along one axis: window positions, elements of a window, and pixels needed after the last one.
    along, after = [], []
    for size, k, s, p, d in geometry:
        span = size + 2 * p - ((k - 1) * d + 1) + (s - 1 if cover_all else 0)
        if span < 0:
            raise ShapeError(f"a window of {k} exceeds size {size} with padding {p}")
        windows = np.arange(span // s + 1) * s
        along.append(np.arange(k)[:, None] * d + windows)
        after.append(p + max(0, int(along[-1].max()) + 1 - size - 2 * p))
    begins, ends = (0, 0, *pair(pad)), (0, 0, *after)
    padded = record(Pad(begins, ends), x) if any((*begins, *ends)) else x
    ys, xs = along
    width = padded.shape[3]
    at = ys[:, None, :, None] * width + xs[None, :, None, :]
    pixels = reshape(padded, (n, channels, padded.shape[2] * width))
    kh, kw, oh, ow = at.shape
    return reshape(record(Gather(axis=2), pixels, at), (n, channels * kh * kw, oh, ow))
