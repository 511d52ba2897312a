"""Normalisation by batch, group, layer, neighbouring channels and norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from branchgraph.chainer.configuration import using_config
from branchgraph.chainer.functions.activation import TRAIN
from branchgraph.chainer.functions.compose import (
    aligned,
    along,
    beside,
    cast_to,
    divided,
    expect,
    floating,
    number,
    permuted,
    product,
    scaled,
    shaped,
    shifted,
    square,
    sum_of,
    total,
)
from branchgraph.chainer.functions.record import check_removed, function, record, record_all
from branchgraph.chainer.recorder import Holder, recorder
from branchgraph.chainer.variable import Variable
from branchgraph.ir.op import Op
from branchgraph.ir.ops.deep import FlooredSqrt
from branchgraph.ir.ops.norm import BatchNormInference, BatchNormTraining, LocalResponseNorm
from branchgraph.ir.ops.reduce import BroadcastTo

__all__ = [
    "batch_normalization",
    "fixed_batch_normalization",
    "group_normalization",
    "layer_normalization",
    "local_response_normalization",
    "normalize",
]

REMOVED = {**TRAIN, "test": TRAIN["train"], "use_cudnn": "use chainer.using_config('use_cudnn')"}


def _reduced_axes(x: Variable, gamma: Variable, axis: Any) -> tuple[int, ...]:
    """The axes that are averaged over; by default the batch and those behind gamma's."""
    if axis is None:
        return (0, *range(gamma.ndim + 1, x.ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(sorted(along(a, x.ndim) for a in axes))


def _normalised(
    x: Variable, reduced: tuple[int, ...], op: Op, vectors: Iterable[Variable]
) -> tuple[Variable, ...]:
    """The outputs of a batch norm whose channels are all kept axes together, y in x's shape."""
    kept = tuple(a for a in range(x.ndim) if a not in reduced)
    shape = tuple(x.shape[a] for a in kept)
    flat = []
    for v in vectors:
        expect(v.shape == shape, f"parameters of {x.shape} have shape {shape}, got {v.shape}")
        flat.append(shaped(v, -1))
    if kept == (1,):
        return record_all(op, x, *flat)
    order = (*reduced, *kept)
    moved = permuted(x, order)
    y, *statistics = record_all(op, shaped(moved, -1, flat[0].size), *flat)
    return permuted(shaped(y, *moved.shape), np.argsort(order).tolist()), *statistics


@function
def batch_normalization(
    x: Any, gamma: Any, beta: Any, *, eps: float = 2e-5,
    running_mean: np.ndarray | Holder | None = None,
    running_var: np.ndarray | Holder | None = None,
    decay: float = 0.9, axis: int | tuple[int, ...] | None = None, **removed: Any,
) -> Variable:  # fmt: skip
    """gamma (x - mean) / sqrt(var + eps) + beta by the statistics of the batch.

    Running statistics that are given move towards those of the batch, in place: an array at once, a
    `Holder` when the program runs. The variance that they take is the unbiased one.
    """
    check_removed("batch_normalization", removed, REMOVED)
    x = floating(x)
    gamma, beta = beside(gamma, x), beside(beta, x)
    reduced = _reduced_axes(x, gamma, axis)
    y, mean, var = _normalised(x, reduced, BatchNormTraining(float(eps)), (gamma, beta))
    count = x.size // max(gamma.size, 1)
    _track(running_mean, mean, decay, 1.0)
    _track(running_var, var, decay, count / max(count - 1.0, 1.0))
    return y


def _track(
    running: np.ndarray | Holder | None, batch: Variable, decay: float, correction: float
) -> None:
    """running <- decay running + (1 - decay) correction batch."""
    if running is None:
        return
    holder = running if isinstance(running, Holder) else Holder(running)
    with using_config("enable_backprop", False):
        old = Variable._of(holder.tensor())
        new = cast_to(shaped(batch, *old.shape), old.dtype)
        moved = sum_of(scaled(old, decay), scaled(new, (1.0 - decay) * correction))
    recorder().assign(holder, moved._operand())
    if holder is not running:
        recorder().flush()


@function
def fixed_batch_normalization(
    x: Any, gamma: Any, beta: Any, mean: Any, var: Any, eps: float = 2e-5,
    axis: int | tuple[int, ...] | None = None, **removed: Any,
) -> Variable:  # fmt: skip
    """gamma (x - mean) / sqrt(var + eps) + beta by given statistics, arrays or `Holder`s."""
    check_removed("fixed_batch_normalization", removed, REMOVED)
    x = floating(x)
    gamma, beta, mean, var = (beside(_held(v), x) for v in (gamma, beta, mean, var))
    reduced = _reduced_axes(x, gamma, axis)
    return _normalised(x, reduced, BatchNormInference(float(eps)), (gamma, beta, mean, var))[0]


def _held(value: Any) -> Any:
    return Variable._of(value.tensor()) if isinstance(value, Holder) else value


@function
def group_normalization(
    x: Any, groups: int, gamma: Any, beta: Any, eps: float = 1e-5
) -> Variable:  # fmt: skip
    """Normalised within every group of channels of every sample (Wu & He 2018)."""
    x = floating(x)
    if x.ndim < 2:
        raise ValueError(f"x needs a batch and a channel axis, got {x.shape}")
    if not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels do not divide into {groups} groups")
    gamma, beta = beside(gamma, x), beside(beta, x)
    expect(gamma.shape == beta.shape == x.shape[1:2], f"parameters have shape ({x.shape[1]},)")
    channels = x.shape[0] * groups
    one, zero = (record(BroadcastTo((channels,)), number(v, x)) for v in (1.0, 0.0))
    each = shaped(x, 1, channels, x.size // max(channels, 1))
    y = shaped(record_all(BatchNormTraining(float(eps)), each, one, zero)[0], *x.shape)
    return sum_of(product(y, aligned(gamma, x)), aligned(beta, x))


@function
def layer_normalization(x: Any, gamma: Any, beta: Any, eps: float = 1e-5) -> Variable:
    """Every row of x: [N, C] normalised (Ba et al. 2016)."""
    x = floating(x)
    expect(x.ndim == 2, f"x must have 2 axes, got {x.shape}")
    return group_normalization(x, 1, gamma, beta, eps)


@function
def local_response_normalization(
    x: Any, n: int = 5, k: float = 2, alpha: float = 1e-4, beta: float = 0.75
) -> Variable:
    """x / (k + alpha sum of squares over n neighbouring channels)^beta."""
    return record(LocalResponseNorm(n, float(alpha), float(beta), float(k)), floating(x))


@function
def normalize(x: Any, eps: float = 1e-5, axis: int | tuple[int, ...] = 1) -> Variable:
    """x / (norm + eps), with the Euclidean norm over one or two axes."""
    x = floating(x)
    axes = axis if isinstance(axis, tuple) else (axis,)
    norm = record(FlooredSqrt(1e-20), total(square(x), axes, keepdims=True))
    return divided(x, shifted(norm, eps))
