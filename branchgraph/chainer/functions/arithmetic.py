"""Operators and basic arithmetic.

Chainer promotes nothing: a Python number takes the dtype of the variable beside it (an int variable
plus 1.5 adds 1), an array beside a variable is cast to the variable's dtype, and two variables must
have one dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from branchgraph.chainer.functions.record import as_variable, constant, function, record
from branchgraph.chainer.type_check import InvalidType
from branchgraph.chainer.variable import Variable
from branchgraph.ir.op import Op
from branchgraph.ir.ops.elementwise import Absolute, Add, Divide, Multiply, Negate, Subtract


def operands(a: Any, b: Any) -> tuple[Variable, Variable]:
    """Both sides of an operator as variables of one dtype; one of them is a variable already."""
    if isinstance(a, Variable) and isinstance(b, Variable):
        if a.dtype != b.dtype:
            raise InvalidType(f"in_types[0].dtype == {a.dtype}", f"in_types[1].dtype is {b.dtype}")
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


@function
def neg(x: Variable) -> Variable:
    """-x."""
    return record(Negate(), x)


@function
def absolute(x: Variable) -> Variable:
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
    """a / b with broadcasting."""
    return _operator(Divide(), a, b)


@function
def add(*xs: Variable) -> Variable:
    """The sum of two or more values."""
    total = as_variable(xs[0])
    for x in xs[1:]:
        total = add_operator(total, as_variable(x))
    return total
