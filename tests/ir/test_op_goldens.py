"""Recorded calls of Chainer's functions, replayed with the ops that they are made of.

`FUNCTIONS` gives every covered function in Chainer's own signature. A recorded call is built as a
graph, specialised for training with Chainer's NumPy draws as inputs, and evaluated in float32;
outputs and input gradients must agree within the tolerance that the recording states.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchgraph.ir import functions, losses
from branchgraph.ir.dims import Dim
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import Op
from branchgraph.ir.ops.activation import Elu, LeakyRelu, LogSoftmax, Relu, Sigmoid, Softmax, Tanh
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.conv import Conv, ConvTranspose
from branchgraph.ir.ops.elementwise import Absolute, Exp, Log, Sqrt, cast, compare, where
from branchgraph.ir.ops.linear import Dense, MatMul
from branchgraph.ir.ops.loss import CrossEntropy, OneHot
from branchgraph.ir.ops.merge import Concat, Maximum, Sum
from branchgraph.ir.ops.norm import BatchNormInference, BatchNormTraining, LocalResponseNorm
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.random import Dropout
from branchgraph.ir.ops.reduce import (
    ArgMax,
    BroadcastTo,
    ReduceMax,
    ReduceMean,
    ReduceSum,
    unbroadcast,
)
from branchgraph.ir.ops.reshape import Pad, Reshape, Slice, Split, Transpose
from branchgraph.ir.ops.roi import RoiMaxPool
from branchgraph.ir.ops.rows import Compact
from branchgraph.ir.types import DType
from branchgraph.passes.specialise import specialise
from tests.goldens import VARIABLE, Recording, assert_within, chainer_functions, folder

#: At least so many recorded calls are replayed; a table or a recording that shrank is noticed.
FEWEST_REPLAYED = 140

#: Covered functions' calls that the ops do not express, by the reason.
NOT_EXPRESSED = {
    "F.pad/3": "mode reflect",
    "F.softmax_cross_entropy/11": "soft targets, whose recorded gradient is no derivative",
}

Axes = int | tuple[int, ...] | None
Sizes = int | tuple[int, ...]


# -- signatures ----------------------------------------------------------------------------------


def _emit(op: Op, *values: Value) -> Value:
    return values[0].graph.emit(op, *values)


def _rank(x: Value) -> int:
    return len(x.shape)


def _ints(shape: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(str(d)) for d in shape)


def _size(x: Value) -> int:
    return math.prod(_ints(x.shape))


def _each_axis(size: Sizes, count: int) -> tuple[int, ...]:
    return (size,) * count if isinstance(size, int) else tuple(size)


def _axes(axis: Axes, rank: int) -> tuple[int, ...]:
    """Chainer's `axis` argument as ascending axes; None means all."""
    if axis is None:
        return tuple(range(rank))
    return tuple(sorted(a % rank for a in _each_axis(axis, 1)))


def _reshape(x: Value, shape: Iterable[int]) -> Value:
    sizes = tuple(shape)
    known = math.prod(d for d in sizes if d != -1)
    return _emit(Reshape(tuple(_size(x) // known if d == -1 else d for d in sizes)), x)


def _transpose(x: Value, axes: Iterable[int] | None = None) -> Value:
    order = range(_rank(x))[::-1] if axes is None else axes
    return _emit(Transpose(tuple(a % _rank(x) for a in order)), x)


def _aligned(y: Value, x: Value, axis: int) -> Value:
    """`y` with unit axes, so that its axes meet those of `x` from `axis` on."""
    return _reshape(y, (*(1,) * axis, *_ints(y.shape), *(1,) * (_rank(x) - axis - _rank(y))))


def _elementwise(op: Op) -> Callable[[Value], Value]:
    return lambda x: _emit(op, x)


# -- array functions -----------------------------------------------------------------------------


def _stack(xs: Iterable[Value], axis: int = 0) -> Value:
    values = list(xs)
    at = axis % (_rank(values[0]) + 1)
    return _emit(Concat(axis=at), *(_expand_dims(x, at) for x in values))


def _expand_dims(x: Value, axis: int) -> Value:
    shape = list(_ints(x.shape))
    shape.insert(axis % (len(shape) + 1), 1)
    return _reshape(x, shape)


def _squeeze(x: Value, axis: Axes = None) -> Value:
    chosen = _axes(axis, _rank(x))
    return _reshape(x, (d for a, d in enumerate(_ints(x.shape)) if a not in chosen or d != 1))


def _swapaxes(x: Value, axis1: int, axis2: int) -> Value:
    order = list(range(_rank(x)))
    order[axis1], order[axis2] = order[axis2], order[axis1]
    return _transpose(x, order)


def _moveaxis(x: Value, source: Sizes, destination: Sizes) -> Value:
    moving = dict(zip(_each_axis(destination, 1), _each_axis(source, 1)))
    rest = iter(a for a in range(_rank(x)) if a not in moving.values())
    return _transpose(x, [moving[a] if a in moving else next(rest) for a in range(_rank(x))])


def _split_axis(x: Value, sections: Any, axis: int, force_tuple: bool = True) -> tuple[Value, ...]:
    extent = _ints(x.shape)[axis]
    if isinstance(sections, int):
        sizes = [extent // sections] * sections
    else:
        borders = [0, *sections, extent]
        sizes = [b - a for a, b in itertools.pairwise(borders)]
    return x.graph.apply(Split(axis, tuple(sizes)), x)


def _separate(x: Value, axis: int = 0) -> tuple[Value, ...]:
    at = axis % _rank(x)
    parts = _split_axis(x, _ints(x.shape)[at], at)
    return tuple(_reshape(p, (d for a, d in enumerate(_ints(p.shape)) if a != at)) for p in parts)


def _get_item(x: Value, index: Any) -> Value:
    """Slices, integers, None and an Ellipsis, or one mask of rows."""
    if isinstance(index, Value):
        return _emit(Compact(Dim.symbol("kept")), index, x)
    parts = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(p is not None and p is not Ellipsis for p in parts)
    rest = [slice(None)] * (_rank(x) - consumed)
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts[at : at + 1] = rest
    shape: list[int] = []
    axis = 0
    for part in parts:
        if part is None:
            shape.append(1)
            continue
        extent = _ints(x.shape)[axis]
        single = slice(part, part + 1) if isinstance(part, int) else part
        taken = range(extent)[single]
        x = _emit(Slice(axis, taken.start, len(taken), taken.step), x)
        shape += [] if isinstance(part, int) else [len(taken)]
        axis += 1
    return _reshape(x, shape)


def _pad(x: Value, pad_width: Any, mode: str, constant_values: float = 0.0) -> Value:
    begin, end = np.broadcast_to(np.asarray(pad_width), (_rank(x), 2)).T.tolist()
    return _emit(Pad(tuple(begin), tuple(end), constant_values), x)


def _broadcast(*xs: Value) -> tuple[Value, ...]:
    shape = np.broadcast_shapes(*(_ints(x.shape) for x in xs))
    return tuple(x if _ints(x.shape) == shape else _emit(BroadcastTo(shape), x) for x in xs)


def _select_item(x: Value, t: Value) -> Value:
    chosen = _emit(OneHot(_ints(x.shape)[1], x.dtype), t)
    return _emit(ReduceSum((1,)), x * chosen)


# -- arithmetic and reductions -------------------------------------------------------------------


def _reduction(make: Callable[..., Op]) -> Callable[..., Value]:
    def reduced(x: Value, axis: Axes = None, keepdims: bool = False) -> Value:
        return _emit(make(_axes(axis, _rank(x)), keepdims), x)

    return reduced


_sum, _mean, _max = (_reduction(op) for op in (ReduceSum, ReduceMean, ReduceMax))


def _min(x: Value, axis: Axes = None, keepdims: bool = False) -> Value:
    return -_max(-x, axis, keepdims)


def _average(
    x: Value, axis: Axes = None, weights: Value | None = None, keepdims: bool = False
) -> Value:
    if weights is None:
        return _mean(x, axis, keepdims)
    (along,) = _axes(axis, _rank(x))
    total = _sum(x * _aligned(weights, x, along), along, keepdims)
    return total / _sum(weights)


def _maximum(x1: Value, x2: Value) -> Value:
    return _emit(Maximum(), *_broadcast(x1, x2))


def _minimum(x1: Value, x2: Value) -> Value:
    return -_maximum(-x1, -x2)


def _arg_max(x: Value, axis: int | None = None) -> Value:
    flat = _reshape(x, (-1,)) if axis is None else x
    return cast(_emit(ArgMax(axis or 0), flat), DType.I32)


def _matmul(a: Value, b: Value, transa: bool = False, transb: bool = False) -> Value:
    """NumPy's rules: a vector on the left is a row, one on the right a column."""
    left = _expand_dims(a, 0) if _rank(a) == 1 else a
    right = _expand_dims(b, 1) if _rank(b) == 1 else b
    ta, tb = transa and _rank(a) > 1, transb and _rank(b) > 1
    y = _emit(MatMul(transpose_a=ta, transpose_b=tb), left, right)
    shape = list(_ints(y.shape))
    if _rank(b) == 1:
        del shape[-1]
    if _rank(a) == 1:
        del shape[-2 if _rank(b) > 1 else -1]
    return _reshape(y, shape)


def _squared_error(x0: Value, x1: Value) -> Value:
    difference = x0 - x1
    return difference * difference


def _absolute_error(x0: Value, x1: Value) -> Value:
    return _emit(Absolute(), x0 - x1)


def _batch_l2_norm_squared(x: Value) -> Value:
    return _sum(x * x, tuple(range(1, _rank(x))))


# -- connections ---------------------------------------------------------------------------------


def _window(axes: int, stride: Sizes, pad: Sizes, dilate: Sizes, groups: int) -> dict[str, Any]:
    return {
        "stride": _each_axis(stride, axes),
        "pad": _each_axis(pad, axes) * 2,
        "dilation": _each_axis(dilate, axes),
        "groups": groups,
    }


def _convolution(
    x: Value, W: Value, b: Value | None = None, stride: Sizes = 1, pad: Sizes = 0,
    cover_all: bool = False, *, dilate: Sizes = 1, groups: int = 1,
) -> Value:  # fmt: skip
    op = Conv(**_window(_rank(x) - 2, stride, pad, dilate, groups))
    return _emit(op, x, W, *([] if b is None else [b]))


def _dilated_convolution_2d(
    x: Value, W: Value, b: Value | None = None, stride: Sizes = 1, pad: Sizes = 0,
    dilate: Sizes = 1, cover_all: bool = False,
) -> Value:  # fmt: skip
    return _convolution(x, W, b, stride, pad, dilate=dilate)


def _depthwise_convolution_2d(
    x: Value, W: Value, b: Value | None = None, stride: Sizes = 1, pad: Sizes = 0
) -> Value:
    multiplier, channels, *kernel = _ints(W.shape)
    filters = _reshape(_transpose(W, (1, 0, 2, 3)), (channels * multiplier, 1, *kernel))
    return _convolution(x, filters, b, stride, pad, groups=channels)


def _deconvolution(
    x: Value, W: Value, b: Value | None = None, stride: Sizes = 1, pad: Sizes = 0,
    outsize: tuple[int, ...] | None = None, *, dilate: Sizes = 1, groups: int = 1,
) -> Value:  # fmt: skip
    window = _window(_rank(x) - 2, stride, pad, dilate, groups)
    geometry = (window[name] for name in ("stride", "dilation", "pad"))
    extents = zip(_ints(x.shape)[2:], _ints(W.shape)[2:], *geometry)
    size = outsize or tuple(s * (h - 1) + (k - 1) * d + 1 - 2 * p for h, k, s, d, p in extents)
    y = _emit(ConvTranspose(**window, size=tuple(size)), x, W)
    return y if b is None else y + _aligned(b, y, 1)


def _linear(x: Value, W: Value, b: Value | None = None, n_batch_axes: int = 1) -> Value:
    batch = _ints(x.shape)[:n_batch_axes]
    rows = _reshape(x, (math.prod(batch), -1))
    y = _emit(Dense(), rows, W, *([] if b is None else [b]))
    return _reshape(y, (*batch, _ints(W.shape)[0]))


def _embed_id(x: Value, W: Value, ignore_label: int | None = None) -> Value:
    """Ids outside the table, such as the ignored one, select nothing."""
    ids = _reshape(x, (-1,))
    rows = _emit(MatMul(), _emit(OneHot(_ints(W.shape)[0], W.dtype), ids), W)
    return _reshape(rows, (*_ints(x.shape), _ints(W.shape)[1]))


def _dropout(x: Value, ratio: float = 0.5, *, mask: Value | None = None) -> Value:
    return _emit(Dropout(ratio, stream=0), x) if mask is None else x * mask


def _prelu(x: Value, W: Value) -> Value:
    zero = x.graph.constant(0.0, x.dtype)
    return where(compare("greater_equal", x, zero), x, x * _aligned(W, x, 1))


# -- pooling and normalisation -------------------------------------------------------------------


def _pool(x: Value, ksize: Sizes, stride: Sizes | None, pad: Sizes) -> dict[str, Any]:
    axes = _rank(x) - 2
    kernel = _each_axis(ksize, axes)
    steps = kernel if stride is None else _each_axis(stride, axes)
    return {"kernel": kernel, "stride": steps, "pad": _each_axis(pad, axes) * 2}


def _max_pooling(
    x: Value, ksize: Sizes, stride: Sizes | None = None, pad: Sizes = 0, cover_all: bool = True
) -> Value:
    return _emit(MaxPool(**_pool(x, ksize, stride, pad), cover_all=cover_all), x)


def _average_pooling(
    x: Value, ksize: Sizes, stride: Sizes | None = None, pad: Sizes = 0, pad_value: int | None = 0
) -> Value:
    counted = pad_value is not None
    divisor = "kernel" if counted else "inside"
    return _emit(AveragePool(**_pool(x, ksize, stride, pad), divisor=divisor), x)


def _normalised(x: Value, reduced: tuple[int, ...], op: Op, *vectors: Value) -> Value:
    """Batch norm over any axes: the kept ones become the channels of a matrix."""
    kept = tuple(a for a in range(_rank(x)) if a not in reduced)
    flat = [_reshape(v, (-1,)) for v in vectors]
    if kept == (1,):
        return x.graph.apply(op, x, *flat)[0]
    order = (*reduced, *kept)
    moved = _transpose(x, order)
    y = x.graph.apply(op, _reshape(moved, (-1, _size(vectors[0]))), *flat)[0]
    return _transpose(_reshape(y, _ints(moved.shape)), np.argsort(order).tolist())


def _norm_axes(x: Value, gamma: Value, axis: Axes) -> tuple[int, ...]:
    if axis is None:
        return (0, *range(_rank(gamma) + 1, _rank(x)))
    return _axes(axis, _rank(x))


def _batch_normalization(
    x: Value, gamma: Value, beta: Value, *, eps: float = 2e-5, axis: Axes = None
) -> Value:
    return _normalised(x, _norm_axes(x, gamma, axis), BatchNormTraining(eps), gamma, beta)


def _fixed_batch_normalization(
    x: Value, gamma: Value, beta: Value, mean: Value, var: Value, eps: float = 2e-5,
    axis: Axes = None,
) -> Value:  # fmt: skip
    axes = _norm_axes(x, gamma, axis)
    return _normalised(x, axes, BatchNormInference(eps), gamma, beta, mean, var)


def _group_normalization(
    x: Value, groups: int, gamma: Value, beta: Value, eps: float = 1e-5
) -> Value:
    """Batch norm in which every group of every sample is a channel."""
    channels = _ints(x.shape)[0] * groups
    one, zero = (x.graph.emit(Full(v, (channels,), x.dtype)) for v in (1.0, 0.0))
    by_group = _reshape(x, (1, channels, -1))
    y = x.graph.apply(BatchNormTraining(eps), by_group, one, zero)[0]
    return _reshape(y, _ints(x.shape)) * _aligned(gamma, x, 1) + _aligned(beta, x, 1)


def _local_response_normalization(
    x: Value, n: int = 5, k: float = 2, alpha: float = 1e-4, beta: float = 0.75
) -> Value:
    return _emit(LocalResponseNorm(n, alpha, beta, k), x)


# -- losses and evaluation -----------------------------------------------------------------------


def _softmax_cross_entropy(
    x: Value, t: Value, normalize: bool = True, class_weight: Value | None = None,
    ignore_label: int = -1, reduce: str = "mean",
) -> Value:  # fmt: skip
    losses = _emit(CrossEntropy(ignore_label), x, t)
    if class_weight is not None:
        chosen = _emit(OneHot(_ints(x.shape)[1], x.dtype), t)
        losses = losses * _sum(chosen * _aligned(class_weight, x, 1), 1)
    if reduce == "no":
        return losses
    if not normalize:
        return _sum(losses) / float(_ints(x.shape)[0])
    return _sum(losses) / _at_least_one(_kept(t, ignore_label, x.dtype))


def _kept(t: Value, ignore_label: int, dtype: DType) -> Value:
    """How many labels are not ignored."""
    ignored = t.graph.constant(ignore_label, t.dtype)
    return _sum(cast(compare("not_equal", t, ignored), dtype))


def _at_least_one(count: Value) -> Value:
    return _emit(Maximum(), count, count.graph.constant(1.0, count.dtype))


def _accuracy(y: Value, t: Value, ignore_label: int | None = None) -> Value:
    answer = cast(_emit(ArgMax(1), y), t.dtype)
    right = cast(compare("equal", answer, t), y.dtype)
    if ignore_label is None:
        return _mean(right)
    ignored = t.graph.constant(ignore_label, t.dtype)
    counted = right * cast(compare("not_equal", t, ignored), y.dtype)
    return _sum(counted) / _at_least_one(_kept(t, ignore_label, y.dtype))


# -- the table -----------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[..., Value | tuple[Value, ...]]] = {
    "F.relu": _elementwise(Relu()),
    "F.leaky_relu": lambda x, slope=0.2: _emit(LeakyRelu(slope), x),
    "F.elu": lambda x, alpha=1.0: _emit(Elu(alpha), x),
    "F.sigmoid": _elementwise(Sigmoid()),
    "F.tanh": _elementwise(Tanh()),
    "F.softmax": lambda x, axis=1: _emit(Softmax(axis), x),
    "F.log_softmax": lambda x, axis=1: _emit(LogSoftmax(axis), x),
    "F.crelu": lambda x, axis=1: _emit(Concat(axis), _emit(Relu(), x), _emit(Relu(), -x)),
    "F.prelu": _prelu,
    "F.broadcast": _broadcast,
    "F.broadcast_to": lambda x, shape: _emit(BroadcastTo(shape), x),
    "F.cast": lambda x, dtype: cast(x, DType.of(dtype)),
    "F.concat": lambda xs, axis=1: _emit(Concat(axis), *xs),
    "F.stack": _stack,
    "F.expand_dims": _expand_dims,
    "F.squeeze": _squeeze,
    "F.flatten": lambda x: _reshape(x, (-1,)),
    "F.reshape": _reshape,
    "op.reshape": _reshape,
    "F.transpose": _transpose,
    "op.transpose": lambda x, *axes: _transpose(x, axes),
    "op.T": _transpose,
    "F.swapaxes": _swapaxes,
    "F.moveaxis": _moveaxis,
    "F.split_axis": _split_axis,
    "F.separate": _separate,
    "F.get_item": _get_item,
    "op.getitem": _get_item,
    "F.pad": _pad,
    "F.where": where,
    "F.select_item": _select_item,
    "F.identity": lambda *xs: xs,
    "F.linear": _linear,
    "F.convolution_2d": _convolution,
    "F.convolution_nd": _convolution,
    "F.dilated_convolution_2d": _dilated_convolution_2d,
    "F.depthwise_convolution_2d": _depthwise_convolution_2d,
    "F.deconvolution_2d": _deconvolution,
    "F.deconvolution_nd": _deconvolution,
    "F.embed_id": _embed_id,
    "F.dropout": _dropout,
    "F.max_pooling_1d": _max_pooling,
    "F.max_pooling_2d": _max_pooling,
    "F.max_pooling_nd": _max_pooling,
    "F.average_pooling_2d": _average_pooling,
    "F.average_pooling_nd": _average_pooling,
    "F.batch_normalization": _batch_normalization,
    "F.fixed_batch_normalization": _fixed_batch_normalization,
    "F.group_normalization": _group_normalization,
    "F.layer_normalization": lambda x, gamma, beta, eps=1e-5: _group_normalization(
        x, 1, gamma, beta, eps
    ),
    "F.local_response_normalization": _local_response_normalization,
    "F.softmax_cross_entropy": _softmax_cross_entropy,
    "F.accuracy": _accuracy,
    "F.squared_error": _squared_error,
    "F.squared_difference": _squared_error,
    "F.absolute_error": _absolute_error,
    "F.mean_squared_error": lambda x0, x1: _mean(_squared_error(x0, x1)),
    "F.mean_absolute_error": lambda x0, x1: _mean(_absolute_error(x0, x1)),
    "F.add": lambda *xs: functools.reduce(operator.add, xs),
    "op.add": operator.add,
    "op.sub": operator.sub,
    "op.mul": operator.mul,
    "op.truediv": operator.truediv,
    "op.neg": operator.neg,
    "op.abs": _elementwise(Absolute()),
    "op.mean": _mean,
    "F.absolute": _elementwise(Absolute()),
    "F.exp": _elementwise(Exp()),
    "F.log": _elementwise(Log()),
    "F.sqrt": _elementwise(Sqrt()),
    "F.rsqrt": lambda x: 1.0 / _emit(Sqrt(), x),
    "F.square": lambda x: x * x,
    "F.sum": _sum,
    "F.mean": _mean,
    "F.average": _average,
    "F.sum_to": unbroadcast,
    "F.max": _max,
    "F.min": _min,
    "F.argmax": _arg_max,
    "F.maximum": _maximum,
    "F.minimum": _minimum,
    "F.matmul": _matmul,
    "op.matmul": _matmul,
    "F.bias": lambda x, y, axis=1: x + _aligned(y, x, axis),
    "F.scale": lambda x, y, axis=1: x * _aligned(y, x, axis),
    "F.batch_l2_norm_squared": _batch_l2_norm_squared,
    "F.linear_interpolate": lambda p, x, y: _emit(Sum(), p * x, (1.0 - p) * y),
}

#: Names of reductions in Chainer and here.
_REDUCE = {"no": "none", "mean": "mean", "sum": "sum"}


def _with_reduce(loss: Callable[..., Value], default: str = "mean") -> Callable[..., Value]:
    """A loss with Chainer's spelling of `reduce`."""

    def recorded(*values: Value, reduce: str = default, **options: Any) -> Value:
        return loss(*values, reduce=_REDUCE[reduce], **options)

    return recorded


def _huber(x: Value, t: Value, delta: float) -> Value:
    return _emit(ReduceSum(axes=(1,)), losses.huber(x, t, delta, reduce="none"))


def _tile(x: Value, reps: tuple[int, ...]) -> Value:
    rank = max(len(reps), _rank(x))
    wide = _reshape(x, (*(1,) * (rank - _rank(x)), *x.shape))
    return functions.tile(wide, (*(1,) * (rank - len(reps)), *reps))


FUNCTIONS |= {
    "F.triplet": _with_reduce(losses.triplet),
    "F.contrastive": _with_reduce(losses.contrastive),
    "F.hinge": _with_reduce(losses.hinge),
    "F.huber_loss": _huber,
    "F.sigmoid_cross_entropy": _with_reduce(losses.sigmoid_cross_entropy),
    "F.gaussian_kl_divergence": _with_reduce(losses.gaussian_kl, "sum"),
    "F.bernoulli_nll": _with_reduce(losses.bernoulli_nll, "sum"),
    "F.gaussian_nll": _with_reduce(losses.gaussian_nll, "sum"),
    "F.selu": functions.selu,
    "F.maxout": lambda x, pool_size, axis=1: functions.maxout(x, pool_size, axis),
    "F.prelu": functions.prelu,
    "F.swish": functions.swish,
    "F.hard_sigmoid": functions.hard_sigmoid,
    "F.relu6": functions.relu6,
    "F.clip": lambda x, x_min, x_max: functions.clip(x, x_min, x_max),
    "F.softplus": functions.softplus,
    "F.prod": lambda x, axis=None: functions.reduce_prod(x, axis),
    "F.tile": _tile,
    "F.repeat": lambda x, repeats, axis: functions.repeat(x, repeats, axis),
    "F.resize_images": lambda x, output_shape, align_corners=True: functions.resize_bilinear(
        x, size=output_shape, align_corners=align_corners
    ),
    "F.roi_pooling_2d": lambda x, rois, outh, outw, spatial_scale: _emit(
        RoiMaxPool((outh, outw), spatial_scale), x, rois
    ),
}


# -- replaying -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording() -> Recording:
    return chainer_functions()


class Replay:
    """One recorded call as a graph."""

    def __init__(self, case: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        self.case = case
        self.arrays = arrays
        self.graph = Graph(case["id"])
        args = [self._decoded(a) for a in case["args"]]
        kwargs = {k: self._decoded(a) for k, a in case["kwargs"].items()}
        result = FUNCTIONS[case["target"]](*args, **kwargs)
        results = result if isinstance(result, tuple) else (result,)
        assert len(results) == len(case["outputs"])
        for said, value in zip(case["outputs"], results):
            self.graph.output(said["key"], value)

    def _decoded(self, value: Any) -> Any:
        """An argument of the manifest; arrays become inputs of the graph."""
        if isinstance(value, list):
            return [self._decoded(v) for v in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind in ("$var", "$arr"):
            array = self.arrays[content]
            known = self.graph.inputs.get(content)
            return known or self.graph.input(content, array.shape, DType.of(array.dtype))
        decoders: dict[str, Callable[[Any], Any]] = {
            "$tuple": lambda v: tuple(self._decoded(v)),
            "$slice": lambda v: slice(*v),
            "$ellipsis": lambda v: Ellipsis,
            "$dtype": np.dtype,
        }
        return decoders[kind](content)

    def run(self) -> dict[str, np.ndarray]:
        """Outputs and input gradients by their keys, for a pass in training mode."""
        graph = specialise(self.graph, training=True, randomness="host")
        feeds = {name: self._fed(name, value) for name, value in graph.inputs.items()}
        said = [o for o in self.case["outputs"] if o.get("gy")]
        seeds: dict[Value, Value | None] = {}
        for output in said:
            y = graph.outputs[output["key"]]
            seeds[y] = graph.input(output["gy"], y.shape, y.dtype)
            feeds[output["gy"]] = self.arrays[output["gy"]]
        wanted = [graph.inputs[key] for key in self.case["grads"]]
        for value, gradient in vjp(graph, seeds, wanted).items():
            graph.output(self.case["grads"][value.name], gradient)
        return interpret(graph, feeds).outputs

    def _fed(self, name: str, value: Value) -> np.ndarray:
        """A recorded array, or what NumPy's generator drew at this place."""
        if name in self.arrays:
            return self.arrays[name]
        return np.random.RandomState(self.case["seed"]).rand(*_ints(value.shape))

    def check(self) -> None:
        """Every recorded result, within its tolerance."""
        found, tolerance = self.run(), self.case["tol"]
        exact = tolerance == "exact"
        kinds = {o["key"]: "out" for o in self.case["outputs"]}
        kinds |= dict.fromkeys(self.case["grads"].values(), "grad")
        nothing = set(self.case.get("null_keys", ()))
        assert set(found) == set(kinds) - nothing
        for key, result in found.items():
            assert_within(result, self.arrays[key], None if exact else tolerance[kinds[key]], key)


def _expressed(recording: Recording, target: str) -> list[Mapping[str, Any]]:
    return [c for c in recording.of(target) if c["id"] not in NOT_EXPRESSED]


@pytest.mark.parametrize("target", FUNCTIONS)
def test_recorded_calls_agree(recording: Recording, target: str) -> None:
    cases = _expressed(recording, target)
    assert cases, f"no recorded call of {target}"
    for case in cases:
        Replay(case, recording.arrays).check()


def test_enough_calls_are_replayed(recording: Recording) -> None:
    replayed = sum(len(_expressed(recording, target)) for target in FUNCTIONS)
    print(f"replayed {replayed} of {len(recording.cases)} recorded function calls")
    assert replayed >= FEWEST_REPLAYED


def test_missing_recordings_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=rf"set \${VARIABLE} to the folder"):
        folder("chainer")


def test_missing_recordings_fail_in_continuous_integration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no recordings of chainer"):
        folder("chainer")
