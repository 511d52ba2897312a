"""Linear maps: dense layers, convolutions and their transposes, look-ups, bilinear forms.

A weight of another floating dtype than its input is cast to the dtype of the input.
"""

from __future__ import annotations

from typing import Any

from branchgraph.chainer.functions.compose import (
    aligned,
    beside,
    expect,
    floating,
    matrix,
    permuted,
    product,
    shaped,
    sum_of,
)
from branchgraph.chainer.functions.record import (
    as_variable,
    check_removed,
    function,
    made,
    pair,
    record,
    record_all,
)  # fmt: skip
from branchgraph.chainer.variable import Variable
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.ops.conv import Conv, ConvTranspose
from branchgraph.ir.ops.deep import Embedding
from branchgraph.ir.ops.linear import Dense, MatMul
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.reshape import Pad, Slice, Split

__all__ = [
    "bilinear",
    "convolution_1d",
    "convolution_2d",
    "convolution_3d",
    "convolution_nd",
    "deconvolution_1d",
    "deconvolution_2d",
    "deconvolution_3d",
    "deconvolution_nd",
    "depthwise_convolution_2d",
    "dilated_convolution_2d",
    "embed_id",
    "linear",
    "local_convolution_2d",
    "shift",
]

CUDNN = {
    "use_cudnn": "use chainer.using_config('use_cudnn', ...)",
    "deterministic": "use chainer.using_config('cudnn_deterministic', ...)",
}


@function
def linear(x: Any, W: Any, b: Any = None, n_batch_axes: int = 1) -> Variable:
    """y = x W^T + b; x is flattened behind its batch axes. W: [out, in], b: [out]."""
    if n_batch_axes == 1 and _is_matrix(x, W, b):
        return record(_DENSE, x, W) if b is None else record(_DENSE, x, W, b)
    x = floating(x)
    if n_batch_axes < 1:
        raise ValueError(f"n_batch_axes must be at least 1, got {n_batch_axes}")
    expect(x.ndim > n_batch_axes, f"x needs more than {n_batch_axes} axes, got {x.shape}")
    batch = x.shape[:n_batch_axes]
    rows = 1
    for size in batch:
        rows *= size
    flat = shaped(x, rows, x.size // max(rows, 1))
    y = record(Dense(), flat, *_weights(x, W, b))
    return y if n_batch_axes == 1 else shaped(y, *batch, y.shape[1])


_DENSE = Dense()


def _is_matrix(x: Any, W: Any, b: Any) -> bool:
    """Whether x is a matrix and nothing needs a cast: the case that every layer meets."""
    if not (isinstance(x, Variable) and isinstance(W, Variable) and x.ndim == 2):
        return False
    if b is not None and not (isinstance(b, Variable) and b.dtype == x.dtype):
        return False
    return W.dtype == x.dtype


def _weights(x: Variable, W: Any, b: Any) -> tuple[Variable, ...]:
    return (beside(W, x),) if b is None else (beside(W, x), beside(b, x))


# -- convolutions --------------------------------------------------------------------------------


def _convolve(
    x: Any, W: Any, b: Any, stride: Any, pad: Any, cover_all: bool, dilate: Any, groups: int
) -> Variable:
    x = floating(x)
    W = beside(W, x)
    axes = W.ndim - 2
    if axes < 1 or x.ndim != W.ndim:
        raise ShapeError(f"x and W must have one rank, got {x.shape} and {W.shape}")
    steps, begin, dilation = pair(stride, axes), pair(pad, axes), pair(dilate, axes)
    if not len(steps) == len(begin) == len(dilation) == axes:
        raise ShapeError(f"stride {steps}, pad {begin}, dilate {dilation}: {axes} numbers each")
    end = begin
    if cover_all:
        kernel = ((k - 1) * d + 1 for k, d in zip(W.shape[2:], dilation))
        extents = zip(x.shape[2:], kernel, steps, begin)
        end = tuple(_covering_pad(*extent) for extent in extents)
    op = made(Conv, steps, (*begin, *end), dilation, groups)
    return record(op, x, W) if b is None else record(op, x, W, beside(b, x))


def _covering_pad(size: int, kernel: int, stride: int, pad: int) -> int:
    """The trailing pad that lets the last window, rounded up, fit."""
    windows = (size + 2 * pad - kernel + stride - 1) // stride + 1
    return max(pad, (windows - 1) * stride + kernel - size - pad)


@function
def convolution_2d(
    x: Any, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0, cover_all: bool = False, *,
    dilate: Any = 1, groups: int = 1, **removed: Any,
) -> Variable:  # fmt: skip
    """Cross-correlation. x: [N, C, H, W], W: [O, C/groups, kh, kw], b: [O]."""
    check_removed("convolution_2d", removed, CUDNN)
    _require_rank(x, 4)
    return _convolve(x, W, b, stride, pad, cover_all, dilate, groups)


def _require_rank(x: Any, rank: int) -> None:
    if as_variable(x).ndim != rank:
        raise ShapeError(f"x must have {rank} axes, got {as_variable(x).shape}")


@function
def convolution_nd(
    x: Any, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0, cover_all: bool = False,
    dilate: Any = 1, groups: int = 1,
) -> Variable:  # fmt: skip
    """Cross-correlation over the axes that W has behind its two channel axes."""
    return _convolve(x, W, b, stride, pad, cover_all, dilate, groups)


@function
def convolution_1d(
    x: Any, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0, cover_all: bool = False,
    dilate: Any = 1, groups: int = 1,
) -> Variable:  # fmt: skip
    """Cross-correlation over one axis."""
    _require_rank(x, 3)
    return _convolve(x, W, b, stride, pad, cover_all, dilate, groups)


@function
def convolution_3d(
    x: Any, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0, cover_all: bool = False,
    dilate: Any = 1, groups: int = 1,
) -> Variable:  # fmt: skip
    """Cross-correlation over three axes."""
    _require_rank(x, 5)
    return _convolve(x, W, b, stride, pad, cover_all, dilate, groups)


@function
def dilated_convolution_2d(
    x: Any, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0, dilate: Any = 1,
    cover_all: bool = False, **removed: Any,
) -> Variable:  # fmt: skip
    """Cross-correlation that reads every `dilate`-th element."""
    check_removed("dilated_convolution_2d", removed, CUDNN)
    _require_rank(x, 4)
    return _convolve(x, W, b, stride, pad, cover_all, dilate, 1)


@function
def depthwise_convolution_2d(
    x: Any, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0
) -> Variable:
    """Every channel with filters of its own. W: [multiplier, C, kh, kw], b: [multiplier C]."""
    _require_rank(x, 4)
    W = floating(W, "W")
    expect(W.ndim == 4, f"W is [multiplier, C, kh, kw], got {W.shape}")
    multiplier, channels, *kernel = W.shape
    filters = shaped(permuted(W, (1, 0, 2, 3)), channels * multiplier, 1, *kernel)
    return _convolve(x, filters, b, stride, pad, False, 1, channels)


# -- transposed convolutions ---------------------------------------------------------------------


def _deconvolve(
    x: Any, W: Any, b: Any, stride: Any, pad: Any, outsize: Any, dilate: Any, groups: int
) -> Variable:
    x = floating(x)
    W = beside(W, x)
    axes = W.ndim - 2
    expect(axes >= 1 and x.ndim == W.ndim, f"x and W must have one rank, got {x.shape}, {W.shape}")
    steps, pads, dilation = pair(stride, axes), pair(pad, axes), pair(dilate, axes)
    extents = zip(x.shape[2:], W.shape[2:], steps, pads, dilation)
    size = outsize
    if outsize is None:
        size = tuple(s * (h - 1) + (k - 1) * d + 1 - 2 * p for h, k, s, p, d in extents)
    size = pair(size, axes)
    expect(min(size) > 0, f"the output would have size {size}")
    y = record(ConvTranspose(steps, pads * 2, dilation, groups, size), x, W)
    return y if b is None else sum_of(y, aligned(beside(b, x), y))


@function
def deconvolution_2d(
    x: Any, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0, outsize: Any = None, *,
    dilate: Any = 1, groups: int = 1, **removed: Any,
) -> Variable:  # fmt: skip
    """The transpose of convolution_2d. W: [C, O/groups, kh, kw], b: [O]."""
    check_removed("deconvolution_2d", removed, CUDNN)
    _require_rank(x, 4)
    return _deconvolve(x, W, b, stride, pad, outsize, dilate, groups)


@function
def deconvolution_nd(
    x: Any, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0, outsize: Any = None,
    dilate: Any = 1, groups: int = 1,
) -> Variable:  # fmt: skip
    """The transpose of convolution_nd."""
    return _deconvolve(x, W, b, stride, pad, outsize, dilate, groups)


@function
def deconvolution_1d(
    x: Any, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0, outsize: Any = None,
    dilate: Any = 1, groups: int = 1,
) -> Variable:  # fmt: skip
    """The transpose of convolution_1d."""
    _require_rank(x, 3)
    return _deconvolve(x, W, b, stride, pad, outsize, dilate, groups)


@function
def deconvolution_3d(
    x: Any, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0, outsize: Any = None,
    dilate: Any = 1, groups: int = 1,
) -> Variable:  # fmt: skip
    """The transpose of convolution_3d."""
    _require_rank(x, 5)
    return _deconvolve(x, W, b, stride, pad, outsize, dilate, groups)


# -- other maps ----------------------------------------------------------------------------------


@function
def local_convolution_2d(x: Any, W: Any, b: Any = None, stride: Any = 1) -> Variable:
    """Convolution whose filters differ from place to place.

    y[n, o, h, w] = b[o, h, w] + sum_{c, i, j} W[o, h, w, c, i, j] x[n, c, h s + i, w s + j].
    """
    x = floating(x)
    W = beside(W, x)
    expect(x.ndim == 4 and W.ndim == 6, f"x has 4 axes and W 6, got {x.shape} and {W.shape}")
    filters, *out, channels, kh, kw = W.shape
    expect(channels == x.shape[1], f"x has {x.shape[1]} channels, W reads {channels}")
    steps = pair(stride)
    windows = tuple((h - k) // s + 1 for h, k, s in zip(x.shape[2:], (kh, kw), steps))
    expect(tuple(out) == windows, f"x has {windows} windows, W filters for {tuple(out)}")
    taps = [_tap(x, (i, j), windows, steps) for i in range(kh) for j in range(kw)]
    places, reads = windows[0] * windows[1], channels * kh * kw
    columns = shaped(record(Concat(1), *taps), x.shape[0], kh * kw * channels, places)
    weights = shaped(permuted(W, (1, 2, 4, 5, 3, 0)), places, reads, filters)
    y = record(MatMul(), permuted(columns, (2, 0, 1)), weights)
    y = shaped(permuted(y, (1, 2, 0)), x.shape[0], filters, *windows)
    return y if b is None else sum_of(y, aligned(beside(b, x), y))


def _tap(
    x: Variable, start: tuple[int, int], size: tuple[int, ...], step: tuple[int, ...]
) -> Variable:
    """One cell of every window."""
    for axis in (0, 1):
        x = record(Slice(axis + 2, start[axis], size[axis], step[axis]), x)
    return x


@function
def shift(x: Any, ksize: Any = 3, dilate: Any = 1) -> Variable:
    """Groups of channels moved in all directions of a window, zeros coming in (Wu et al. 2018).

    The direction that rests comes last, and takes the channels that the groups leave over.
    """
    x = floating(x)
    expect(x.ndim == 4, f"x must have 4 axes, got {x.shape}")
    kernel, steps = pair(ksize), pair(dilate)
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"ksize must be odd, got {kernel}")
    starts = [(i * steps[0], j * steps[1]) for i in range(kernel[0]) for j in range(kernel[1])]
    starts.reverse()
    middle = len(starts) // 2
    starts[middle], starts[-1] = starts[-1], starts[middle]
    channels = x.shape[1]
    size = channels // len(starts)
    sizes = (*(size,) * (len(starts) - 1), channels - size * (len(starts) - 1))
    reach = tuple(k // 2 * d for k, d in zip(kernel, steps))
    margin = (0, 0, *reach)
    parts = record_all(Split(1, sizes), record(Pad(margin, margin), x))
    moved = [_tap(p, at, x.shape[2:], (1, 1)) for p, at in zip(parts, starts)]
    return record(Concat(1), *moved)


@function
def embed_id(x: Any, W: Any, ignore_label: int | None = None) -> Variable:
    """Row x[i...] of W; zeros without gradient where the id is `ignore_label`."""
    ids = as_variable(x)
    expect(ids.dtype.kind == "i", f"ids must be signed integers, got {ids.dtype}")
    expect(ids.ndim >= 1, "ids need a batch axis")
    return record(Embedding(ignore_label), ids, floating(W, "W"))


@function
def bilinear(
    e1: Any, e2: Any, W: Any, V1: Any = None, V2: Any = None, b: Any = None
) -> Variable:  # fmt: skip
    """y[n, l] = sum_{j, k} e1[n, j] e2[n, k] W[j, k, l] + e1 V1 + e2 V2 + b."""
    if sum(v is None for v in (V1, V2, b)) not in (0, 3):
        raise ValueError("bilinear needs V1, V2 and b all, or none of them")
    e1, e2, W = matrix(floating(e1)), matrix(floating(e2)), floating(W, "W")
    expect(W.ndim == 3, f"W is [in 1, in 2, out], got {W.shape}")
    (n, left), right, out = e1.shape, e2.shape[1], W.shape[2]
    expect(e2.shape[0] == n, f"e1 has {n} rows, e2 {e2.shape[0]}")
    expect(W.shape[:2] == (left, right), f"W of {W.shape} must begin with {(left, right)}")
    pairs = product(shaped(e1, n, left, 1), shaped(e2, n, 1, right))
    y = record(MatMul(), shaped(pairs, n, left * right), shaped(W, left * right, out))
    if b is None:
        return y
    for e, V in ((e1, V1), (e2, V2)):
        y = sum_of(y, record(MatMul(), e, floating(V, "V")))
    return sum_of(y, aligned(floating(b, "b"), y))
