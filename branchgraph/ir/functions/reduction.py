"""Reductions, norms and normalisation over chosen axes.

    l2_normalise   x / (sum x^2 + eps)^(1/2)
    instance_norm  gamma (x - mu) / (var + eps)^(1/2) + beta, over space (Ulyanov, 1607.08022)
    group_norm     the same over space and the channels of a group       (Wu & He, 1803.08494)
    layer_norm     the same over the last axes                           (Ba et al., 1607.06450)

Variances are biased: means of squared deviations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from branchgraph.ir.dims import DimLike, product
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.functions.elementary import absolute, sqrt, square
from branchgraph.ir.functions.layout import axes_of, reshaped, transpose
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.deep import FlooredSqrt
from branchgraph.ir.ops.math import RunningProduct
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.ops.reduce import ReduceMax, ReduceMean, ReduceSum
from branchgraph.ir.ops.reshape import Slice

Axes = Iterable[int] | int | None


def reduce_sum(x: Value, axes: Axes = None, *, keepdims: bool = False) -> Value:
    """The sum over axes, over all by default."""
    return x.graph.emit(ReduceSum(axes_of(axes, len(x.shape), "reduce_sum"), keepdims), x)


def reduce_mean(x: Value, axes: Axes = None, *, keepdims: bool = False) -> Value:
    """The mean over axes, over all by default."""
    return x.graph.emit(ReduceMean(axes_of(axes, len(x.shape), "reduce_mean"), keepdims), x)


def reduce_max(x: Value, axes: Axes = None, *, keepdims: bool = False) -> Value:
    """The largest element over axes; every element that attains it receives the gradient."""
    return x.graph.emit(ReduceMax(axes_of(axes, len(x.shape), "reduce_max"), keepdims), x)


def reduce_min(x: Value, axes: Axes = None, *, keepdims: bool = False) -> Value:
    """The smallest element over axes; every element that attains it receives the gradient."""
    return -reduce_max(-x, axes, keepdims=keepdims)


def reduce_prod(x: Value, axes: Axes = None, *, keepdims: bool = False) -> Value:
    """The product over axes of known size; zeros do no harm to its gradient."""
    chosen = axes_of(axes, len(x.shape), "reduce_prod")
    kept = [a for a in range(len(x.shape)) if a not in chosen]
    shape = tuple(x.shape[a] for a in kept)
    count = product(x.shape[a] for a in chosen)
    if not isinstance(count, int):
        raise ShapeError(f"reduce_prod: axes {chosen} of {x.type} have no known size")
    if keepdims:
        unit: tuple[DimLike, ...] = tuple(1 if a in chosen else d for a, d in enumerate(x.shape))
    else:
        unit = shape
    if count == 0:
        return x.graph.emit(Full(value=1.0, shape=unit, dtype=x.dtype))
    order = (*kept, *chosen)
    last = x if order == tuple(range(len(order))) else transpose(x, order)
    running = x.graph.emit(RunningProduct(axis=len(kept)), reshaped(last, (*shape, count)))
    cut = Slice(axis=len(kept), start=count - 1, size=1)
    return reshaped(x.graph.emit(cut, running), unit)


def norm(x: Value, axes: Axes = None, order: float = 2, *, keepdims: bool = False) -> Value:
    """The norm of x over axes: sum |x| for order 1, (sum x^2)^(1/2) for 2, max |x| for infinity.

    The gradient of the 2-norm of zeros is 0.
    """
    if order == 1:
        return reduce_sum(absolute(x), axes, keepdims=keepdims)
    if order == 2:
        return _root(reduce_sum(square(x), axes, keepdims=keepdims))
    if order == math.inf:
        return reduce_max(absolute(x), axes, keepdims=keepdims)
    raise GraphError(f"norm: order is 1, 2 or infinity, got {order}")


def global_norm(values: Iterable[Value]) -> Value:
    """The 2-norm of all elements of all values together, 0-d: (sum_v sum v^2)^(1/2)."""
    squares = [reduce_sum(square(v)) for v in values]
    if not squares:
        raise GraphError("global_norm: needs at least one value")
    return _root(squares[0].graph.emit(Sum(), *squares))


def _root(x: Value) -> Value:
    return x.graph.emit(FlooredSqrt(), x)


def l2_normalise(x: Value, axes: Axes = None, eps: float = 1e-10) -> Value:
    """x over its 2-norm along axes, with eps inside the root, as MXNet has it.

    Over all axes but the batch by default; axis 1 for each position, (2, 3) for each channel.
    """
    chosen = tuple(range(1, len(x.shape))) if axes is None else axes
    return x / sqrt(reduce_sum(square(x), chosen, keepdims=True) + eps)


def _standardised(x: Value, axes: tuple[int, ...], eps: float, what: str) -> Value:
    if not eps > 0:
        raise GraphError(f"{what}: eps must be positive, got {eps}")
    centred = x - reduce_mean(x, axes, keepdims=True)
    variance = reduce_mean(square(centred), axes, keepdims=True)
    return centred / sqrt(variance + eps)


def _by_channel(x: Value, gamma: Value, beta: Value, what: str) -> Value:
    """gamma x + beta, with vectors over axis 1."""
    shape = (1, x.shape[1], *(1,) * (len(x.shape) - 2))
    for vector in (gamma, beta):
        if vector.shape != x.shape[1:2]:
            raise ShapeError(f"{what}: gamma and beta have shape [{x.shape[1]}], got {vector.type}")
    return x * reshaped(gamma, shape) + reshaped(beta, shape)


def instance_norm(x: Value, gamma: Value, beta: Value, eps: float = 1e-3) -> Value:
    """x [N, C, *size] standardised over space for each sample and channel; gamma, beta: [C]."""
    if len(x.shape) < 3:
        raise ShapeError(f"instance_norm: needs [N, C, spatial...], got {x.type}")
    spatial = tuple(range(2, len(x.shape)))
    return _by_channel(
        _standardised(x, spatial, eps, "instance_norm"), gamma, beta, "instance_norm"
    )


def group_norm(x: Value, groups: int, gamma: Value, beta: Value, eps: float = 1e-5) -> Value:
    """x [N, C, ...] standardised over the C / groups channels of every group, and space.

    gamma and beta are [C]. One group for each channel is `instance_norm`.
    """
    channels = x.shape[1] if len(x.shape) > 1 else None
    if groups < 1 or not isinstance(channels, int) or channels % groups:
        raise ShapeError(f"group_norm: the channels of {x.type} do not make {groups} groups")
    shape = (x.shape[0], groups, channels // groups, *x.shape[2:])
    grouped = reshaped(x, shape)
    axes = tuple(range(2, len(shape)))
    standard = reshaped(_standardised(grouped, axes, eps, "group_norm"), x.shape)
    return _by_channel(standard, gamma, beta, "group_norm")


def layer_norm(x: Value, gamma: Value, beta: Value, eps: float = 1e-5) -> Value:
    """x standardised over its last axes, which are those of gamma and beta ([C] for [N, C])."""
    start = len(x.shape) - len(gamma.shape)
    if start < 0 or gamma.shape != x.shape[start:] or beta.shape != gamma.shape or not gamma.shape:
        raise ShapeError(
            f"layer_norm: gamma and beta have the shape of the last axes of {x.type}, "
            f"got {gamma.type} and {beta.type}"
        )
    axes = tuple(range(start, len(x.shape)))
    return _standardised(x, axes, eps, "layer_norm") * gamma + beta
