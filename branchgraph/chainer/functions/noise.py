"""Random functions. Draws come from NumPy's global generator, when the function is called."""

from __future__ import annotations

from typing import Any

import numpy as np

from branchgraph.chainer.configuration import config
from branchgraph.chainer.functions.activation import TRAIN, softmax
from branchgraph.chainer.functions.compose import (
    aligned,
    alike,
    beside,
    divided,
    expect,
    floating,
    matrix,
    product,
    scaled,
    selected,
    shaped,
    sum_of,
)
from branchgraph.chainer.functions.connection import linear
from branchgraph.chainer.functions.record import as_variable, check_removed, function, record
from branchgraph.chainer.variable import Variable
from branchgraph.ir.ops.elementwise import Exp
from branchgraph.ir.ops.linear import MatMul
from branchgraph.ir.ops.random import Dropout

__all__ = ["dropout", "gaussian", "gumbel_softmax", "simplified_dropconnect", "zoneout"]


def _array(value: Any) -> np.ndarray:
    """The array of a given mask."""
    return value.array if isinstance(value, Variable) else value


def _check_ratio(ratio: float) -> None:
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")


@function
def dropout(
    x: Any, ratio: float = 0.5, *, mask: Any = None, return_mask: bool = False, **removed: Any
) -> Any:
    """x mask, where mask is 0 with probability `ratio`, else 1/(1 - ratio); x itself in test mode.

    A given mask is used as it is, so it holds the scale already.
    """
    check_removed("dropout", removed, TRAIN)
    _check_ratio(ratio)
    if config.tracing:
        declared = record(Dropout(ratio=float(ratio), stream=0), as_variable(x))
        return (declared, None) if return_mask else declared
    if not config.train:
        return (as_variable(x), None) if return_mask else as_variable(x)
    x = floating(x)
    if mask is None:
        flag = np.random.rand(*x.shape) >= ratio
        mask = x.dtype.type(1.0 / (1.0 - ratio)) * flag
    mask = np.asarray(_array(mask))
    fits = mask.shape == x.shape and mask.dtype == x.dtype
    expect(fits, f"mask must be {x.dtype} of {x.shape}, got {mask.dtype} of {mask.shape}")
    y = product(x, mask)
    return (y, mask) if return_mask else y


@function
def gaussian(
    mean: Any, ln_var: Any, *, eps: np.ndarray | None = None, return_eps: bool = False
) -> Any:
    """mean + e^(ln_var / 2) eps with eps from the standard normal distribution."""
    mean, ln_var = alike(mean, ln_var)
    if eps is None:
        eps = np.random.standard_normal(ln_var.shape).astype(mean.dtype)
    expect(eps.shape == mean.shape, f"eps must have shape {mean.shape}, got {eps.shape}")
    y = sum_of(mean, product(record(Exp(), scaled(ln_var, 0.5)), eps))
    return (y, eps) if return_eps else y


@function
def zoneout(h: Any, x: Any, ratio: float = 0.5, **removed: Any) -> Variable:
    """An element of h with probability `ratio`, else of x; x itself in test mode."""
    check_removed("zoneout", removed, TRAIN)
    _check_ratio(ratio)
    if not config.train:
        return as_variable(x)
    h, x = alike(h, x)
    return selected(as_variable(np.random.rand(*x.shape) >= ratio), x, h)


@function
def simplified_dropconnect(
    x: Any, W: Any, b: Any = None, ratio: float = 0.5, train: bool = True, mask: Any = None,
    use_batchwise_mask: bool = True,
) -> Variable:  # fmt: skip
    """A dense layer whose weights are dropped with probability `ratio`, and scaled up.

    The mask tells which weights are kept, of every sample or of the whole batch.
    """
    _check_ratio(ratio)
    if not train:
        return linear(x, W, b)
    x = matrix(floating(x))
    W = beside(W, x)
    expect(W.ndim == 2 and W.shape[1] == x.shape[1], f"W is [out, {x.shape[1]}], got {W.shape}")
    shape = (x.shape[0], *W.shape) if use_batchwise_mask else W.shape
    kept = np.random.rand(*shape) >= ratio if mask is None else np.asarray(_array(mask))
    expect(kept.shape in ((x.shape[0], *W.shape), W.shape), f"mask must have shape {shape}")
    kept = kept.astype(x.dtype) * x.dtype.type(1.0 / (1.0 - ratio))
    weights = product(W, kept)
    if weights.ndim == 2:
        return linear(x, weights, b)
    y = record(MatMul(transpose_b=True), shaped(x, x.shape[0], 1, x.shape[1]), weights)
    y = shaped(y, x.shape[0], W.shape[0])
    return y if b is None else sum_of(y, aligned(beside(b, x), y))


@function
def gumbel_softmax(log_pi: Any, tau: float = 0.1, axis: int = 1) -> Variable:
    """softmax((log_pi + g) / tau) with g from the Gumbel distribution (Jang et al. 2017)."""
    log_pi = floating(log_pi)
    if log_pi.ndim < 1:
        raise ValueError("gumbel_softmax needs at least one axis")
    g = np.random.gumbel(size=log_pi.shape).astype(log_pi.dtype)
    return softmax(divided(sum_of(log_pi, as_variable(g)), tau), axis=axis)
