"""Axes, repetition, padding and resizing: functions that move elements, and interpolation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from branchgraph.ir.dims import DimLike
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.deep import Resize
from branchgraph.ir.ops.index import Flip
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.reduce import BroadcastTo
from branchgraph.ir.ops.reshape import Pad, Reshape, Slice, Transpose


def axis_of(axis: int, rank: int, what: str) -> int:
    """`axis` counted from the front, or `ShapeError` naming the function."""
    if not -rank <= axis < rank:
        raise ShapeError(f"{what}: axis {axis} is outside an array of {rank} axes")
    return axis % rank


def axes_of(axes: Iterable[int] | int | None, rank: int, what: str) -> tuple[int, ...]:
    """Distinct axes in ascending order; None is all of them."""
    if axes is None:
        return tuple(range(rank))
    listed = (axes,) if isinstance(axes, int) else tuple(axes)
    found = [axis_of(a, rank, what) for a in listed]
    if len(set(found)) < len(found):
        raise ShapeError(f"{what}: axes {listed} name one axis twice")
    return tuple(sorted(found))


def reshaped(x: Value, shape: tuple[DimLike, ...]) -> Value:
    """x under another shape; x itself where it has it."""
    return x if x.shape == shape else x.graph.emit(Reshape(shape=shape), x)


def broadcast_to(x: Value, shape: tuple[DimLike, ...]) -> Value:
    """x repeated along new or unit axes; x itself where it has the shape."""
    return x if x.shape == shape else x.graph.emit(BroadcastTo(shape=shape), x)


def transpose(x: Value, axes: Iterable[int] | None = None) -> Value:
    """x with its axes in another order; reversed by default."""
    order = range(len(x.shape))[::-1] if axes is None else axes
    chosen = tuple(axis_of(a, len(x.shape), "transpose") for a in order)
    return x.graph.emit(Transpose(axes=chosen), x)


def swap_axes(x: Value, first: int, second: int) -> Value:
    """x with two axes exchanged."""
    order = list(range(len(x.shape)))
    i, j = (axis_of(a, len(order), "swap_axes") for a in (first, second))
    order[i], order[j] = order[j], order[i]
    return transpose(x, order)


def expand_dims(x: Value, axis: int) -> Value:
    """x with a unit axis put at position `axis` of the result."""
    at = axis_of(axis, len(x.shape) + 1, "expand_dims")
    return reshaped(x, (*x.shape[:at], 1, *x.shape[at:]))


def squeeze(x: Value, axes: Iterable[int] | int | None = None) -> Value:
    """x without the given unit axes; without all of them by default."""
    if axes is None:
        return reshaped(x, tuple(d for d in x.shape if d != 1))
    chosen = axes_of(axes, len(x.shape), "squeeze")
    wide = [a for a in chosen if x.shape[a] != 1]
    if wide:
        raise ShapeError(f"squeeze: axis {wide[0]} of {x.type} is no unit axis")
    return reshaped(x, tuple(d for a, d in enumerate(x.shape) if a not in chosen))


def stack(values: Iterable[Value], axis: int = 0) -> Value:
    """Values of one shape side by side along a new axis."""
    listed = [expand_dims(v, axis) for v in values]
    if not listed:
        raise GraphError("stack: needs at least one value")
    at = axis_of(axis, len(listed[0].shape), "stack")
    return listed[0].graph.emit(Concat(axis=at), *listed)


def repeat(x: Value, count: int, axis: int) -> Value:
    """Every element `count` times in a row along `axis`: y[i] = x[i // count]."""
    at = axis_of(axis, len(x.shape), "repeat")
    _check_count(count, "repeat")
    before, size, after = x.shape[:at], x.shape[at], x.shape[at + 1 :]
    spread = broadcast_to(expand_dims(x, at + 1), (*before, size, count, *after))
    return reshaped(spread, (*before, size * count, *after))


def tile(x: Value, counts: Iterable[int]) -> Value:
    """x `counts[a]` times one after another along every axis a: y[i] = x[i mod size]."""
    times = tuple(counts)
    if len(times) != len(x.shape):
        raise ShapeError(f"tile: counts {times} need one number for each axis of {x.type}")
    for count in times:
        _check_count(count, "tile")
    unit = tuple(d for size in x.shape for d in (1, size))
    spread = tuple(d for count, size in zip(times, x.shape) for d in (count, size))
    full = tuple(size * count for count, size in zip(times, x.shape))
    return reshaped(broadcast_to(reshaped(x, unit), spread), full)


def _check_count(count: int, what: str) -> None:
    if count < 1:
        raise GraphError(f"{what}: counts are at least 1, got {count}")


def pad(
    x: Value, begin: Iterable[int], end: Iterable[int], mode: str = "constant", value: float = 0.0
) -> Value:
    """x surrounded by begin[a] elements before and end[a] elements after it along every axis a.

    mode: `constant` fills with `value`; `edge` repeats the outermost element; `reflect` mirrors x
    at its outermost element, without repeating that, and reaches at most size - 1 far.
    """
    before, after = tuple(begin), tuple(end)
    if mode not in ("constant", "edge", "reflect"):
        raise GraphError(f"pad: mode is constant, edge or reflect, got {mode!r}")
    if len(before) != len(x.shape) or len(after) != len(x.shape):
        raise ShapeError(f"pad: begin and end have one number for each axis of {x.type}")
    if min((*before, *after), default=0) < 0:
        raise GraphError(f"pad: begin {before} and end {after} are not negative")
    if mode == "constant":
        return x.graph.emit(Pad(begin=before, end=after, value=value), x)
    border = _edge if mode == "edge" else _mirrored
    for axis, (b, e) in enumerate(zip(before, after)):
        x = _bordered(x, axis, b, e, border)
    return x


def _bordered(
    x: Value, axis: int, begin: int, end: int, border: Callable[[Value, int, int, bool], Value]
) -> Value:
    parts = [x]
    if begin:
        parts.insert(0, border(x, axis, begin, True))
    if end:
        parts.append(border(x, axis, end, False))
    return x if len(parts) == 1 else x.graph.emit(Concat(axis=axis), *parts)


def _edge(x: Value, axis: int, count: int, leading: bool) -> Value:
    """The first or the last element along `axis`, `count` times."""
    size = _known(x, axis, "edge")
    cut = Slice(axis=axis, start=0 if leading else size - 1, size=1)
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    return broadcast_to(x.graph.emit(cut, x), shape)


def _mirrored(x: Value, axis: int, count: int, leading: bool) -> Value:
    """The `count` elements next to the first or the last one, in reverse order."""
    size = _known(x, axis, "reflect")
    if count > size - 1:
        raise ShapeError(f"pad: reflect reaches {count} far along axis {axis} of {x.type}")
    cut = Slice(axis=axis, start=1 if leading else size - 1 - count, size=count)
    return x.graph.emit(Flip(axis=axis), x.graph.emit(cut, x))


def _known(x: Value, axis: int, mode: str) -> int:
    size = x.shape[axis]
    if not isinstance(size, int) or size < 1:
        raise ShapeError(f"pad: mode {mode} needs elements along axis {axis} of {x.type}")
    return size


def resize_nearest(
    x: Value, *, scale: int | None = None, size: tuple[DimLike, DimLike] | None = None
) -> Value:
    """x [N, C, H, W] at `size`, or `scale` times as large: y[i, j] = x[i H // H', j W // W']."""
    return x.graph.emit(Resize(_target(x, scale, size, "resize_nearest"), "nearest"), x)


def resize_bilinear(
    x: Value,
    *,
    scale: int | None = None,
    size: tuple[DimLike, DimLike] | None = None,
    align_corners: bool = False,
) -> Value:
    """x [N, C, H, W] at `size`, or `scale` times as large, by linear interpolation of both axes.

    Row i reads position i (H - 1) / (H' - 1) with aligned corners, so that the outermost pixels
    stay; else (i + 1/2) H / H' - 1/2, cut off at 0, so that the areas of pixels correspond.
    """
    target = _target(x, scale, size, "resize_bilinear")
    return x.graph.emit(Resize(target, "bilinear", align_corners), x)


def _target(
    x: Value, scale: int | None, size: tuple[DimLike, DimLike] | None, what: str
) -> tuple[DimLike, ...]:
    if (scale is None) == (size is None):
        raise GraphError(f"{what}: give either scale or size")
    if len(x.shape) != 4:
        raise ShapeError(f"{what}: needs [N, C, H, W], got {x.type}")
    if size is not None:
        return tuple(size)
    assert scale is not None
    _check_count(scale, what)
    return (x.shape[2] * scale, x.shape[3] * scale)
