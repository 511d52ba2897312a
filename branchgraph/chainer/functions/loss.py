"""Losses. `reduce` says how the terms become the result; labels are signed integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from branchgraph.chainer.functions.compose import (
    alike,
    average_of,
    cast_to,
    chosen,
    compared,
    difference,
    divided,
    expect,
    floating,
    labels,
    number,
    product,
    reduced,
    scaled,
    selected,
    shifted,
    square,
    sum_of,
    total,
)
from branchgraph.chainer.functions.record import as_variable, check_removed, function, record
from branchgraph.chainer.variable import Variable
from branchgraph.ir.ops.activation import Relu
from branchgraph.ir.ops.deep import FlooredSqrt, SoftCrossEntropy, Softplus
from branchgraph.ir.ops.elementwise import Absolute, Exp, Negate
from branchgraph.ir.ops.linear import MatMul
from branchgraph.ir.ops.loss import CrossEntropy, OneHot
from branchgraph.ir.ops.merge import Maximum
from branchgraph.ir.types import DType

__all__ = [
    "absolute_error",
    "bernoulli_nll",
    "contrastive",
    "cross_covariance",
    "decov",
    "gaussian_kl_divergence",
    "gaussian_nll",
    "hinge",
    "huber_loss",
    "mean_absolute_error",
    "mean_squared_error",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_difference",
    "squared_error",
    "triplet",
]

REMOVED = {"use_cudnn": "use chainer.using_config('use_cudnn', ...)"}

# -- classification ------------------------------------------------------------------------------


@function
def softmax_cross_entropy(
    x: Any, t: Any, normalize: bool = True, cache_score: bool = True, class_weight: Any = None,
    ignore_label: int = -1, reduce: str = "mean", enable_double_backprop: bool = False,
    soft_target_loss: str = "cross-entropy", **removed: Any,
) -> Variable:  # fmt: skip
    """-ln softmax(x)[t] of every position, weighted by class; ignored positions count 0.

    The mean divides by the number of positions that are not ignored, or by the batch size without
    `normalize`. Floating t of the shape of x are soft targets, averaged over all positions.
    """
    check_removed("softmax_cross_entropy", removed, REMOVED)
    chosen(reduce, "mean", "no")
    x, t = floating(x), as_variable(t)
    expect(x.ndim >= 2, f"x needs a class axis, got {x.shape}")
    weight = _class_weight(class_weight, x)
    if t.dtype.kind == "f" and t.shape == x.shape:
        each = _soft(x, cast_to(t, x.dtype), weight, soft_target_loss)
        return each if reduce == "no" else average_of(each)
    t = labels(t, (x.shape[0], *x.shape[2:]))
    each = record(CrossEntropy(ignore_label), x, t)
    if weight is not None:
        target = record(OneHot(x.shape[1], DType.of(x.dtype)), t)
        each = product(each, total(product(target, weight), (1,)))
    if reduce == "no":
        return each
    return _per_label(each, t, ignore_label, normalize)


def _class_weight(weight: Any, x: Variable) -> Variable | None:
    """The weights along the class axis of x."""
    if weight is None:
        return None
    if not isinstance(weight, np.ndarray):
        raise ValueError(f"class_weight must be an array, got {type(weight).__name__}")
    if weight.ndim != 1 or weight.dtype.kind != "f":
        raise ValueError(f"class_weight must be one floating number a class, got {weight!r}")
    expect(len(weight) == x.shape[1], f"x has {x.shape[1]} classes, {len(weight)} weights")
    column = weight.astype(x.dtype).reshape(1, -1, *(1,) * (x.ndim - 2))
    return as_variable(column)


def _soft(x: Variable, t: Variable, weight: Variable | None, kind: str) -> Variable:
    """Cross-entropy with target distributions; the kl variant adds sum t ln(t + 1e-7)."""
    if kind not in ("cross-entropy", "kl-divergence"):
        raise ValueError(f"soft_target_loss {kind!r} is neither cross-entropy nor kl-divergence")
    each = record(SoftCrossEntropy(), x, t if weight is None else product(t, weight))
    if kind == "cross-entropy":
        return each
    targets = t.array
    entropy = (targets * np.log(targets + x.dtype.type(1e-7))).sum(axis=1, dtype=x.dtype)
    return sum_of(each, as_variable(entropy))


def _per_label(each: Variable, t: Variable, ignore_label: int, normalize: bool) -> Variable:
    """The sum over the number of labels that count, at least 1; or over the batch size."""
    if not normalize:
        return divided(total(each), float(max(each.shape[0], 1)))
    # Counted in single precision at least: float16 does not count beyond 2048.
    precise = np.result_type(each.dtype, np.float32)
    count = total(cast_to(compared(t, "not_equal", ignore_label), precise))
    one = number(1.0, count)
    share = divided(one, record(Maximum(), count, one))
    return product(total(each), cast_to(share, each.dtype))


@function
def sigmoid_cross_entropy(
    x: Any, t: Any, normalize: bool = True, reduce: str = "mean", **removed: Any
) -> Variable:
    """-ln p(t) of every element, p(1) = sigmoid(x); elements of label -1 are ignored."""
    check_removed("sigmoid_cross_entropy", removed, REMOVED)
    chosen(reduce, "mean", "no")
    x = floating(x)
    t = labels(t, x.shape)
    loss = difference(record(Softplus(), x), product(x, cast_to(t, x.dtype)))
    each = selected(compared(t, "equal", -1), number(0.0, x), loss)
    return each if reduce == "no" else _per_label(each, t, -1, normalize)


@function
def hinge(x: Any, t: Any, norm: str = "L1", reduce: str = "mean") -> Variable:
    """max(0, 1 + x) of the wrong classes and max(0, 1 - x) of the true one, squared for L2."""
    chosen(reduce, "mean", "no")
    if norm not in ("L1", "L2"):
        raise NotImplementedError(f"norm must be 'L1' or 'L2', got {norm!r}")
    x = floating(x)
    expect(x.ndim == 2, f"x must have 2 axes, got {x.shape}")
    t = labels(t, x.shape[:1])
    target = record(OneHot(x.shape[1], DType.of(x.dtype)), t)
    sign = shifted(scaled(target, -2.0), 1.0)
    each = record(Relu(), shifted(product(sign, x), 1.0))
    each = square(each) if norm == "L2" else each
    return each if reduce == "no" else divided(total(each), float(x.shape[0]))


# -- metric learning -----------------------------------------------------------------------------


@function
def contrastive(x0: Any, x1: Any, y: Any, margin: float = 1, reduce: str = "mean") -> Variable:
    """(y D^2 + (1 - y) max(margin - D, 0)^2) / 2, y = 1 for similar rows (Hadsell et al. 2006)."""
    chosen(reduce, "mean", "no")
    if margin <= 0:
        raise ValueError(f"margin must be positive, got {margin}")
    x0, x1 = alike(x0, x1)
    expect(x0.ndim == 2, f"x0 must have 2 axes, got {x0.shape}")
    similar = cast_to(labels(y, x0.shape[:1]), x0.dtype)
    squared = total(square(difference(x0, x1)), (1,))
    distance = record(FlooredSqrt(1e-7), squared)
    short = record(Relu(), shifted(record(Negate(), distance), margin))
    apart = product(shifted(record(Negate(), similar), 1.0), square(short))
    each = scaled(sum_of(product(similar, squared), apart), 0.5)
    return reduced(each, reduce)


@function
def triplet(
    anchor: Any, positive: Any, negative: Any, margin: float = 0.2, reduce: str = "mean"
) -> Variable:
    """max(|a - p|^2 - |a - n|^2 + margin, 0) of every row (Schroff et al. 2015)."""
    chosen(reduce, "mean", "no")
    if margin <= 0:
        raise ValueError(f"margin must be positive, got {margin}")
    anchor, positive, negative = alike(anchor, positive, negative)
    expect(anchor.ndim == 2, f"anchor must have 2 axes, got {anchor.shape}")
    near, far = square(difference(anchor, positive)), square(difference(anchor, negative))
    each = record(Relu(), shifted(total(difference(near, far), (1,)), margin))
    return reduced(each, reduce)


# -- regression ----------------------------------------------------------------------------------


@function
def squared_error(x0: Any, x1: Any) -> Variable:
    """(x0 - x1)^2 of every element."""
    return square(difference(*alike(x0, x1)))


@function
def squared_difference(x1: Any, x2: Any) -> Variable:
    """(x1 - x2)^2 of every element."""
    return square(difference(*alike(x1, x2)))


@function
def absolute_error(x0: Any, x1: Any) -> Variable:
    """|x0 - x1| of every element."""
    return record(Absolute(), difference(*alike(x0, x1)))


@function
def mean_squared_error(x0: Any, x1: Any) -> Variable:
    """The mean of (x0 - x1)^2 over all elements."""
    return average_of(square(difference(*alike(x0, x1))))


@function
def mean_absolute_error(x0: Any, x1: Any) -> Variable:
    """The mean of |x0 - x1| over all elements."""
    return average_of(record(Absolute(), difference(*alike(x0, x1))))


@function
def huber_loss(
    x: Any, t: Any, delta: float, reduce: str = "sum_along_second_axis"
) -> Variable:  # fmt: skip
    """e^2 / 2 up to |e| = delta, delta (|e| - delta / 2) beyond, with e = x - t."""
    chosen(reduce, "sum_along_second_axis", "no")
    error = difference(*alike(x, t))
    size = record(Absolute(), error)
    curved = scaled(square(error), 0.5)
    straight = scaled(shifted(size, -0.5 * delta), delta)
    each = selected(compared(size, "less", delta), curved, straight)
    return each if reduce == "no" else total(each, (1,))


# -- decorrelation -------------------------------------------------------------------------------


def _covariance(y: Variable, z: Variable) -> Variable:
    """Products of centred columns, averaged over the rows: [columns of y, columns of z]."""
    expect(y.ndim == z.ndim == 2, f"both need 2 axes, got {y.shape} and {z.shape}")
    expect(y.shape[0] == z.shape[0], f"both need as many rows, got {y.shape} and {z.shape}")
    centred = (difference(v, average_of(v, (0,), keepdims=True)) for v in (y, z))
    return divided(record(MatMul(transpose_a=True), *centred), float(y.shape[0]))


def _half_squared(c: Variable, reduce: str) -> Variable:
    chosen(reduce, "half_squared_sum", "no")
    return c if reduce == "no" else scaled(total(square(c)), 0.5)


@function
def cross_covariance(y: Any, z: Any, reduce: str = "half_squared_sum") -> Variable:
    """Half the squared covariances of y with z, summed; or the covariances."""
    return _half_squared(_covariance(floating(y), floating(z)), reduce)


@function
def decov(h: Any, reduce: str = "half_squared_sum") -> Variable:
    """Half the squared covariances between different columns, summed (Cogswell et al. 2016)."""
    h = floating(h)
    c = _covariance(h, h)
    between = as_variable(1 - np.eye(c.shape[0], dtype=h.dtype))
    return _half_squared(product(c, between), reduce)


# -- distributions -------------------------------------------------------------------------------


@function
def gaussian_kl_divergence(mean: Any, ln_var: Any, reduce: str = "sum") -> Variable:
    """(mean^2 + e^ln_var - ln_var - 1) / 2: divergence from the standard normal distribution."""
    mean, ln_var = alike(mean, ln_var)
    spread = difference(record(Exp(), ln_var), ln_var)
    return reduced(scaled(shifted(sum_of(square(mean), spread), -1.0), 0.5), reduce)


@function
def bernoulli_nll(x: Any, y: Any, reduce: str = "sum") -> Variable:
    """-ln p(x) where p(1) = sigmoid(y)."""
    x, y = alike(x, y)
    return reduced(difference(record(Softplus(), y), product(x, y)), reduce)


@function
def gaussian_nll(x: Any, mean: Any, ln_var: Any, reduce: str = "sum") -> Variable:
    """(ln_var + ln 2 pi + (x - mean)^2 e^-ln_var) / 2."""
    x, mean, ln_var = alike(x, mean, ln_var)
    precision = record(Exp(), record(Negate(), ln_var))
    square_term = product(square(difference(x, mean)), precision)
    each = scaled(shifted(sum_of(ln_var, square_term), float(np.log(2 * np.pi))), 0.5)
    return reduced(each, reduce)
