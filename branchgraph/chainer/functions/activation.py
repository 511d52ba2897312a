"""Activations.

Derivatives at a kink follow Chainer: relu, leaky_relu and elu take the lower side at 0, prelu and
rrelu the upper one; clipped activations have derivative 0 on their bounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from branchgraph.chainer.configuration import config
from branchgraph.chainer.functions.compose import (
    aligned,
    along,
    compared,
    expect,
    floating,
    number,
    product,
    recorded,
    scaled,
    selected,
    shaped,
    shifted,
)
from branchgraph.chainer.functions.record import as_variable, check_removed, function, record
from branchgraph.chainer.variable import Variable
from branchgraph.ir.ops.activation import Elu, LeakyRelu, LogSoftmax, Relu, Sigmoid, Softmax, Tanh
from branchgraph.ir.ops.deep import ClippedRelu, Softplus
from branchgraph.ir.ops.elementwise import Negate
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.reduce import ReduceMax

__all__ = [
    "clipped_relu",
    "crelu",
    "elu",
    "hard_sigmoid",
    "leaky_relu",
    "log_softmax",
    "maxout",
    "prelu",
    "relu",
    "relu6",
    "rrelu",
    "selu",
    "sigmoid",
    "softmax",
    "softplus",
    "swish",
    "tanh",
]

TRAIN = {"train": "use chainer.using_config('train', ...)"}


_RELU = Relu()


@function
def relu(x: Any) -> Variable:
    """max(x, 0), derivative 0 at 0."""
    return record(_RELU, as_variable(x))


@function
def leaky_relu(x: Any, slope: float = 0.2) -> Variable:
    """x where positive, else slope x."""
    return recorded(LeakyRelu(float(slope)), x)


@function
def elu(x: Any, alpha: float = 1.0) -> Variable:
    """x where positive, else alpha (e^x - 1)."""
    return recorded(Elu(float(alpha)), x)


@function
def selu(
    x: Any, alpha: float = 1.6732632423543772848, scale: float = 1.0507009873554804935
) -> Variable:
    """scale elu(x): self-normalising (Klambauer et al. 2017)."""
    return scaled(elu(x, alpha), scale)


@function
def clipped_relu(x: Any, z: float = 20.0) -> Variable:
    """min(max(x, 0), z)."""
    return recorded(ClippedRelu(float(z)), x)


@function
def relu6(x: Any) -> Variable:
    """min(max(x, 0), 6)."""
    return clipped_relu(x, 6.0)


@function
def crelu(x: Any, axis: int = 1) -> Variable:
    """relu(x) and relu(-x), one after the other along `axis`."""
    x = floating(x)
    sides = record(Relu(), x), record(Relu(), record(Negate(), x))
    return record(Concat(along(axis, x.ndim)), *sides)


@function
def sigmoid(x: Any) -> Variable:
    """1 / (1 + e^-x)."""
    return recorded(Sigmoid(), x)


@function
def hard_sigmoid(x: Any) -> Variable:
    """0.2 x + 0.5 between 0 and 1."""
    return clipped_relu(shifted(scaled(floating(x), 0.2), 0.5), 1.0)


@function
def tanh(x: Any) -> Variable:
    """The hyperbolic tangent."""
    return recorded(Tanh(), x)


@function
def softplus(x: Any, beta: float = 1.0) -> Variable:
    """ln(1 + e^(beta x)) / beta."""
    return recorded(Softplus(float(beta)), x)


@function
def softmax(x: Any, axis: int = 1) -> Variable:
    """e^x over its sum along `axis`, channels by default."""
    x = floating(x)
    return record(Softmax(along(axis, x.ndim)), x)


@function
def log_softmax(x: Any, axis: int = 1) -> Variable:
    """The logarithm of softmax."""
    x = floating(x)
    return record(LogSoftmax(along(axis, x.ndim)), x)


@function
def maxout(x: Any, pool_size: int, axis: int = 1) -> Variable:
    """The largest of every `pool_size` consecutive elements along `axis`."""
    x = floating(x)
    if pool_size <= 0:
        raise ValueError(f"pool_size must be positive, got {pool_size}")
    at = along(axis, x.ndim)
    size = x.shape[at]
    expect(size % pool_size == 0, f"axis {at} of size {size} must divide by pool_size {pool_size}")
    groups = shaped(x, *x.shape[:at], size // pool_size, pool_size, *x.shape[at + 1 :])
    return record(ReduceMax((at + 1,)), groups)


@function
def prelu(x: Any, W: Any) -> Variable:
    """x where not negative, else W x, W along the axes behind the batch (He et al. 2015)."""
    x, W = floating(x), floating(W, "W")
    expect(x.dtype == W.dtype, f"W must have the dtype of x, got {W.dtype} and {x.dtype}")
    return selected(compared(x, "greater_equal", 0.0), x, product(x, aligned(W, x)))


@function
def rrelu(
    x: Any, l: float = 1.0 / 8, u: float = 1.0 / 3, *, r: np.ndarray | None = None,  # noqa: E741
    return_r: bool = False, **removed: Any,
) -> Any:  # fmt: skip
    """x where not negative, else r x; r is uniform in [l, u) in training, else its mean."""
    check_removed("rrelu", removed, TRAIN)
    x = floating(x)
    slope: Any = number((l + u) / 2, x)
    if config.train:
        slope = np.random.uniform(l, u, x.shape).astype(x.dtype) if r is None else r
        expect(slope.shape == x.shape, f"r must have shape {x.shape}, got {slope.shape}")
    y = selected(compared(x, "greater_equal", 0.0), x, product(x, slope))
    if not return_r:
        return y
    return y, slope if config.train else x.dtype.type((l + u) / 2)


@function
def swish(x: Any, beta: Any) -> Variable:
    """x sigmoid(beta x), beta along the axes behind the batch (Ramachandran et al. 2017)."""
    x, beta = floating(x), floating(beta, "beta")
    expect(x.dtype == beta.dtype, f"beta must have the dtype of x, got {beta.dtype} and {x.dtype}")
    return product(x, record(Sigmoid(), product(aligned(beta, x), x)))
