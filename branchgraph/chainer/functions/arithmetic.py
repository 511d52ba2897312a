"""Operators and elementwise mathematics.

Chainer promotes nothing: a Python number takes the dtype of the variable beside it (an int variable
plus 1.5 adds 1), an array beside a variable is cast to the variable's dtype, and two variables must
have one dtype.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from branchgraph.chainer.configuration import using_config
from branchgraph.chainer.functions.record import as_variable, constant, function, record
from branchgraph.chainer.variable import Variable
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.op import Op
from branchgraph.ir.ops.elementwise import (
    Absolute,
    Add,
    Compare,
    Divide,
    Exp,
    Log,
    Multiply,
    Negate,
    Sqrt,
    Subtract,
    Where,
)
from branchgraph.ir.ops.math import (
    Arccos,
    Arcsin,
    Arctan,
    Arctan2,
    Arctanh,
    Cos,
    Cosh,
    Erf,
    Expm1,
    FloorDivide,
    Log1p,
    Power,
    Remainder,
    Round,
    Sign,
    Sin,
    Sinh,
    Tan,
)
from branchgraph.ir.ops.merge import Maximum
from branchgraph.ir.ops.reduce import BroadcastTo

__all__ = [
    "absolute",
    "add",
    "add_operator",
    "arccos",
    "arcsin",
    "arctan",
    "arctan2",
    "arctanh",
    "ceil",
    "clip",
    "cos",
    "cosh",
    "divide_operator",
    "erf",
    "exp",
    "expm1",
    "fix",
    "floor",
    "floor_divide_operator",
    "fmod",
    "linear_interpolate",
    "log",
    "log1p",
    "log2",
    "log10",
    "maximum",
    "minimum",
    "multiply_operator",
    "neg",
    "power_operator",
    "rsqrt",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "squared_difference",
    "subtract_operator",
    "tan",
    "where",
]


def operands(a: Any, b: Any) -> tuple[Variable, Variable]:
    """Both sides of an operator as variables of one dtype; one of them is a variable already."""
    if isinstance(a, Variable) and isinstance(b, Variable):
        if a.dtype != b.dtype:
            raise ShapeError(f"operands must share one dtype, got {a.dtype} and {b.dtype}")
        return a, b
    if isinstance(a, Variable):
        return a, _beside(b, a)
    return _beside(a, b), b


def _beside(value: Any, like: Variable) -> Variable:
    if isinstance(value, np.ndarray) and value.ndim:
        return as_variable(value.astype(like.dtype))
    return constant(value, like)


def _operator(op: Op, a: Any, b: Any) -> Variable:
    return record(op, *operands(a, b))


def record_constant(op: Op, *inputs: Any) -> Variable:
    """Record an op whose result has no history."""
    with using_config("enable_backprop", False):
        return record(op, *inputs)


def floating(x: Any) -> Variable:
    """A variable of a floating dtype, else `ShapeError`."""
    x = as_variable(x)
    if x.dtype.kind != "f":
        raise ShapeError(f"needs a floating dtype, got {x.dtype}")
    return x


def together(a: Any, b: Any) -> tuple[Variable, Variable]:
    """Two operands of a function: variables, arrays that keep their dtype, or a number."""
    a = as_variable(a) if isinstance(a, np.ndarray) else a
    b = as_variable(b) if isinstance(b, np.ndarray) else b
    return operands(a, b)


# -- operators -----------------------------------------------------------------------------------


@function
def neg(x: Any) -> Variable:
    """-x."""
    x = as_variable(x)
    return record(Negate(), x) if x.dtype.kind == "f" else record(Subtract(), constant(0, x), x)


@function
def absolute(x: Any) -> Variable:
    """|x|, with derivative 0 at 0."""
    return record(Absolute(), as_variable(x))


@function
def add_operator(a: Any, b: Any) -> Variable:
    """a + b with broadcasting."""
    return _operator(Add(), a, b)


@function
def subtract_operator(a: Any, b: Any) -> Variable:
    """a - b with broadcasting."""
    return _operator(Subtract(), a, b)


@function
def multiply_operator(a: Any, b: Any) -> Variable:
    """a b with broadcasting."""
    return _operator(Multiply(), a, b)


@function
def divide_operator(a: Any, b: Any) -> Variable:
    """a / b with broadcasting; integers are multiplied by 1/b in their own dtype, often 0."""
    if isinstance(b, (int, float)) and a.dtype.kind != "f":
        return record(Multiply(), a, constant(1 / b, a))
    return _operator(Divide(), a, b)


@function
def floor_divide_operator(a: Any, b: Any) -> Variable:
    """floor(a / b) with broadcasting; a constant."""
    return record_constant(FloorDivide(), *operands(a, b))


@function
def power_operator(a: Any, b: Any) -> Variable:
    """a to the power b, with broadcasting."""
    if isinstance(b, (int, float)) and b == 2:
        return record(Multiply(), a, a)
    return _operator(Power(), a, b)


@function
def add(*xs: Any) -> Variable:
    """The sum of two or more values."""
    total = xs[0]
    for x in xs[1:]:
        total = record(Add(), *together(total, x))
    return as_variable(total)


@function
def fmod(x: Any, divisor: Any) -> Variable:
    """The remainder of x / divisor that has the sign of x."""
    return record(Remainder(), *together(x, divisor))


@function
def arctan2(x1: Any, x2: Any) -> Variable:
    """The angle of the point with ordinate x1 and abscissa x2."""
    return record(Arctan2(), *together(x1, x2))


@function
def squared_difference(x1: Any, x2: Any) -> Variable:
    """(x1 - x2)^2."""
    return square(record(Subtract(), *together(x1, x2)))


@function
def linear_interpolate(p: Any, x: Any, y: Any) -> Variable:
    """p x + (1 - p) y."""
    p, x, y = (as_variable(v) for v in (p, x, y))
    return p * x + (1 - p) * y


# -- selection -----------------------------------------------------------------------------------


def _one_shape(a: Variable, b: Variable) -> tuple[Variable, Variable]:
    if a.shape == b.shape:
        return a, b
    try:
        shape = np.broadcast_shapes(a.shape, b.shape)
    except ValueError as error:
        raise ShapeError(str(error)) from None
    first, second = (v if v.shape == shape else record(BroadcastTo(shape), v) for v in (a, b))
    return first, second


@function
def maximum(x1: Any, x2: Any) -> Variable:
    """The larger of two; on ties the first has the gradient."""
    return record(Maximum(), *_one_shape(*together(x1, x2)))


@function
def minimum(x1: Any, x2: Any) -> Variable:
    """The smaller of two; on ties the first has the gradient."""
    a, b = _one_shape(*together(x1, x2))
    return -record(Maximum(), -a, -b)


@function
def where(condition: Any, x: Any, y: Any) -> Variable:
    """x where the condition holds, else y; the condition is of bools."""
    return record(Where(), as_variable(condition), *together(x, y))


@function
def clip(x: Any, x_min: float | None = None, x_max: float | None = None) -> Variable:
    """x moved into x_min .. x_max; the gradient flows inside and at the bounds."""
    x = as_variable(x)
    if x_min is None and x_max is None:
        raise ValueError("clip needs x_min or x_max")
    for relation, bound in (("less", x_min), ("greater", x_max)):
        if bound is not None:
            limit = constant(bound, x)
            x = record(Where(), record(Compare(relation), x, limit), limit, x)
    return x


# -- elementary functions ------------------------------------------------------------------------


@function
def exp(x: Any) -> Variable:
    """e to the power x."""
    return record(Exp(), as_variable(x))


@function
def expm1(x: Any) -> Variable:
    """e^x - 1."""
    return record(Expm1(), as_variable(x))


@function
def log(x: Any) -> Variable:
    """The natural logarithm."""
    return record(Log(), as_variable(x))


@function
def log1p(x: Any) -> Variable:
    """ln(1 + x)."""
    return record(Log1p(), as_variable(x))


@function
def log2(x: Any) -> Variable:
    """The logarithm to base 2."""
    return log(x) * (1 / math.log(2))


@function
def log10(x: Any) -> Variable:
    """The logarithm to base 10."""
    return log(x) * (1 / math.log(10))


@function
def sqrt(x: Any) -> Variable:
    """The square root."""
    return record(Sqrt(), as_variable(x))


@function
def rsqrt(x: Any) -> Variable:
    """1 / sqrt(x)."""
    return 1 / sqrt(x)


@function
def square(x: Any) -> Variable:
    """x times x."""
    x = as_variable(x)
    return record(Multiply(), x, x)


@function
def erf(x: Any) -> Variable:
    """The error function."""
    return record(Erf(), as_variable(x))


@function
def sin(x: Any) -> Variable:
    """Sine."""
    return record(Sin(), as_variable(x))


@function
def cos(x: Any) -> Variable:
    """Cosine."""
    return record(Cos(), as_variable(x))


@function
def tan(x: Any) -> Variable:
    """Tangent."""
    return record(Tan(), as_variable(x))


@function
def arcsin(x: Any) -> Variable:
    """The inverse of sine."""
    return record(Arcsin(), as_variable(x))


@function
def arccos(x: Any) -> Variable:
    """The inverse of cosine."""
    return record(Arccos(), as_variable(x))


@function
def arctan(x: Any) -> Variable:
    """The inverse of tangent."""
    return record(Arctan(), as_variable(x))


@function
def sinh(x: Any) -> Variable:
    """Hyperbolic sine."""
    return record(Sinh(), as_variable(x))


@function
def cosh(x: Any) -> Variable:
    """Hyperbolic cosine."""
    return record(Cosh(), as_variable(x))


@function
def arctanh(x: Any) -> Variable:
    """The inverse of the hyperbolic tangent."""
    return record(Arctanh(), as_variable(x))


# -- steps: constants without a creator ----------------------------------------------------------


@function
def floor(x: Any) -> Variable:
    """The largest whole number that is not above x."""
    return record_constant(Round("floor"), as_variable(x))


@function
def ceil(x: Any) -> Variable:
    """The smallest whole number that is not below x."""
    return record_constant(Round("ceil"), as_variable(x))


@function
def fix(x: Any) -> Variable:
    """x rounded towards 0."""
    return record_constant(Round("truncate"), as_variable(x))


@function
def sign(x: Any) -> Variable:
    """-1, 0 or 1."""
    return record_constant(Sign(), as_variable(x))
