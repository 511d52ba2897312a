"""Declared random values from the counter-based streams of `ir.ops.random`.

Each call takes streams of its own, drawn anew in every training step and the same on every backend.
In inference each is a constant, stated with the function. No gradient flows through a draw itself;
it does through what is computed with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from branchgraph.ir.builder import by_mode, noise
from branchgraph.ir.dims import DimLike
from branchgraph.ir.errors import GraphError
from branchgraph.ir.functions.elementary import log, sqrt
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import cast, compare, where
from branchgraph.ir.ops.math import Cos

#: Keeps u away from 0, where ln u is not finite: half of the smallest step of a draw.
_HALF_STEP = 2.0**-25

Shape = Iterable[DimLike | str] | None


def inside(u: Value) -> Value:
    """u of [0, 1) moved off 0, so that its logarithms are finite (in float32 and float64)."""
    return u * (1.0 - 2.0 * _HALF_STEP) + _HALF_STEP


def uniform(like: Value, low: float = 0.0, high: float = 1.0, *, shape: Shape = None) -> Value:
    """U[low, high) in the dtype and shape of `like`, or in `shape`; its mean in inference."""
    if not low <= high:
        raise GraphError(f"uniform: low must not exceed high, got {low} and {high}")
    u = noise(like, shape)
    return u if (low, high) == (0.0, 1.0) else u * (high - low) + low


def normal(like: Value, mean: float = 0.0, std: float = 1.0, *, shape: Shape = None) -> Value:
    """N(mean, std^2) in the dtype and shape of `like`, or in `shape`; the mean in inference.

    By Box and Muller (1958), from two uniform draws u and v:

        mean + std (-2 ln(1 - u))^(1/2) cos(2 pi v)
    """
    if not std >= 0:
        raise GraphError(f"normal: std must not be negative, got {std}")
    radius = sqrt(log(1.0 - noise(like, shape)) * -2.0)
    angle = noise(like, shape) * (2.0 * math.pi)
    drawn = radius * like.graph.emit(Cos(), angle) * std + mean
    rest = like.graph.emit(Full(value=float(mean), shape=drawn.shape, dtype=drawn.dtype))
    return by_mode(drawn, rest)


def bernoulli(p: Value) -> Value:
    """1 with probability p, else 0, in the shape and dtype of p; 1[p > 1/2] in inference.

    No gradient reaches p; `straight_through(bernoulli(p), p)` makes it an estimator
    (Bengio et al., arXiv 1308.3432).
    """
    return cast(compare("less", noise(p), p), p.dtype)


def gumbel(like: Value, *, shape: Shape = None) -> Value:
    """Standard Gumbel noise -ln(-ln u), in the dtype and shape of `like` or in `shape`.

    In inference its median -ln ln 2 everywhere, so that the largest of a and a + g is one.
    """
    return -log(-log(inside(noise(like, shape))))


def rrelu(x: Value, low: float = 1.0 / 8.0, high: float = 1.0 / 3.0) -> Value:
    """x where x >= 0, else a x with a drawn from U[low, high) for every element.

    In inference a is its mean. (Xu et al., arXiv 1505.00853.)
    """
    zero = x.graph.constant(0.0, x.dtype)
    return where(compare("greater_equal", x, zero), x, uniform(x, low, high) * x)
