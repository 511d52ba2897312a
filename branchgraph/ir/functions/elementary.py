"""Activations and arithmetic, element by element.

gelu          x (1 + erf(x / 2^(1/2))) / 2                    (Hendrycks & Gimpel, 1606.08415)
selu          scale x if x > 0 else scale alpha (e^x - 1)     (Klambauer et al., 1706.02515)
softsign      x / (1 + |x|)
prelu         x if x >= 0 else slope x                        (He et al., 1502.01852)
silu, swish   x sigmoid(beta x)                               (Ramachandran et al., 1710.05941)
hard_sigmoid  min(max(slope x + offset, 0), 1)
relu6         min(max(x, 0), 6)
maxout        the largest of consecutive features             (Goodfellow et al., 1302.4389)
"""

from __future__ import annotations

from branchgraph.ir.errors import ShapeError
from branchgraph.ir.functions.layout import axis_of, broadcast_to, reshaped
from branchgraph.ir.graph import Value
from branchgraph.ir.op import broadcast_shapes
from branchgraph.ir.ops.activation import Elu, Sigmoid
from branchgraph.ir.ops.deep import ClippedRelu, Softplus
from branchgraph.ir.ops.elementwise import Absolute, Clip, Exp, Log, Sqrt, compare, where
from branchgraph.ir.ops.math import Erf
from branchgraph.ir.ops.merge import Maximum
from branchgraph.ir.ops.reduce import ReduceMax

_SELU_ALPHA = 1.6732632423543772848
_SELU_SCALE = 1.0507009873554804934


def exp(x: Value) -> Value:
    """e^x."""
    return x.graph.emit(Exp(), x)


def log(x: Value) -> Value:
    """The natural logarithm of x."""
    return x.graph.emit(Log(), x)


def sqrt(x: Value) -> Value:
    """x^(1/2)."""
    return x.graph.emit(Sqrt(), x)


def absolute(x: Value) -> Value:
    """|x|, with derivative 0 at 0."""
    return x.graph.emit(Absolute(), x)


def square(x: Value) -> Value:
    """x^2."""
    return x * x


def clip(x: Value, low: float, high: float) -> Value:
    """x moved into low .. high; the gradient passes where low <= x <= high."""
    return x.graph.emit(Clip(low=float(low), high=float(high)), x)


def softplus(x: Value, beta: float = 1.0) -> Value:
    """ln(1 + e^(beta x)) / beta, without overflow."""
    return x.graph.emit(Softplus(beta=beta), x)


def gelu(x: Value) -> Value:
    """x times the probability that a standard normal number is below x, by the error function."""
    return x * (x.graph.emit(Erf(), x * 0.5**0.5) * 0.5 + 0.5)


def selu(x: Value, alpha: float = _SELU_ALPHA, scale: float = _SELU_SCALE) -> Value:
    """scale elu(x, alpha), with the constants that keep mean 0 and variance 1."""
    return x.graph.emit(Elu(alpha=alpha), x) * scale


def softsign(x: Value) -> Value:
    """x / (1 + |x|)."""
    return x / (absolute(x) + 1.0)


def prelu(x: Value, slope: Value) -> Value:
    """x where x >= 0, else slope x.

    slope: 0-d, or of the shape of x's axes from axis 1 on (commonly [C]).
    """
    steep = _aligned(slope, x, "prelu: slope")
    zero = x.graph.constant(0.0, x.dtype)
    return where(compare("greater_equal", x, zero), x, steep * x)


def swish(x: Value, beta: Value | float = 1.0) -> Value:
    """x sigmoid(beta x); a value beta has the shape of x's axes from axis 1 on, or is 0-d."""
    if isinstance(beta, Value):
        scaled = x * _aligned(beta, x, "swish: beta")
    else:
        scaled = x if beta == 1.0 else x * beta
    return x * x.graph.emit(Sigmoid(), scaled)


def silu(x: Value) -> Value:
    """x sigmoid(x)."""
    return swish(x)


def hard_sigmoid(x: Value, slope: float = 0.2, offset: float = 0.5) -> Value:
    """slope x + offset, clipped to 0 .. 1.

    (slope 1/6 gives the gate of MobileNetV3, 1905.02244; slope 1/2 that of BinaryConnect.)
    """
    return x.graph.emit(ClippedRelu(ceiling=1.0), x * slope + offset)


def relu6(x: Value) -> Value:
    """min(max(x, 0), 6)."""
    return x.graph.emit(ClippedRelu(ceiling=6.0), x)


def maxout(x: Value, pool: int, axis: int = 1) -> Value:
    """The largest of `pool` consecutive elements along `axis`: size C becomes C / pool."""
    position = axis_of(axis, len(x.shape), "maxout")
    size = x.shape[position]
    if pool < 1 or not isinstance(size, int) or size % pool:
        raise ShapeError(f"maxout: axis {position} of {x.type} does not divide by pool {pool}")
    shape = (*x.shape[:position], size // pool, pool, *x.shape[position + 1 :])
    return x.graph.emit(ReduceMax(axes=(position + 1,)), reshaped(x, shape))


def maximum(a: Value, b: Value) -> Value:
    """The larger of two broadcast values; on ties the gradient goes to a; NaN wins."""
    shape = broadcast_shapes(a.shape, b.shape)
    return a.graph.emit(Maximum(), broadcast_to(a, shape), broadcast_to(b, shape))


def minimum(a: Value, b: Value) -> Value:
    """The smaller of two broadcast floating values; on ties the gradient goes to a; NaN wins."""
    return -maximum(-a, -b)


def _aligned(y: Value, x: Value, what: str) -> Value:
    """y with unit axes, so that its axes meet those of x from axis 1 on."""
    end = 1 + len(y.shape)
    if not y.shape:
        return y
    if y.shape != x.shape[1:end]:
        raise ShapeError(f"{what} of {x.type} has the shape of its axes from 1 on, got {y.type}")
    shape = (1, *y.shape, *(1,) * (len(x.shape) - end))
    return reshaped(y, shape)
