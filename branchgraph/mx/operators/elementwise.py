"""Arithmetic element by element: two operands, an operand and a number, functions of one operand.

`elemwise_*` and `_maximum`, `_minimum`, `_power` need equal shapes; `broadcast_*` follow NumPy. At
ties the gradient of maximum and minimum goes to the left operand; against a number it passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from branchgraph.ir import builder, functions
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.graph import Value
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import cast, compare, where
from branchgraph.ir.types import DType
from branchgraph.mx.attributes import DTypeName
from branchgraph.mx.dtypes import NAMES
from branchgraph.mx.operators.base import Operator, Shapes, all_equal, blocked, counted, declare


def _power(a: Value, b: Value) -> Value:
    return a.graph.emit(make("power"), a, b)


# -- two operands --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair(Operator):
    """A function of two operands, which broadcast."""

    function: ClassVar[Callable[[Value, Value], Value]]

    def arguments(self) -> tuple[str, ...]:
        return ("lhs", "rhs")

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (type(self).function(*inputs),)


@dataclass(frozen=True)
class _EqualPair(_Pair):
    """A function of two operands of one shape."""

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        return all_equal(shapes)

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        a, b = inputs
        if a.shape != b.shape:
            raise ShapeError(
                f"{self.spelling} needs operands of one shape, got {a.type} and {b.type}; "
                "the broadcast_ operators repeat unit axes"
            )
        return super().build(a, b)


_ARITHMETIC: dict[str, Callable[[Value, Value], Value]] = {
    "add": Value.__add__,
    "sub": Value.__sub__,
    "mul": Value.__mul__,
    "div": Value.__truediv__,
}
_OTHER: dict[str, Callable[[Value, Value], Value]] = {
    "maximum": functions.maximum,
    "minimum": functions.minimum,
    "power": _power,
}
#: Older names, and the ones that Python's operators make.
_OLDER = {
    "add": ("_Plus", "_plus", "_add"),
    "sub": ("_Minus", "_minus", "_sub"),
    "mul": ("_Mul", "_mul"),
    "div": ("_Div", "_div"),
    "maximum": ("_Maximum",),
    "minimum": ("_Minimum",),
    "power": ("_Power",),
}
_BROADCAST_OLDER = {"add": ("broadcast_plus",), "sub": ("broadcast_minus",)}


for _name, _function in (_ARITHMETIC | _OTHER).items():
    _prefix = "elemwise_" if _name in _ARITHMETIC else "_"
    declare(_EqualPair, f"{_prefix}{_name}", _function, _OLDER[_name])
    declare(_Pair, f"broadcast_{_name}", _function, _BROADCAST_OLDER.get(_name, ()))


# -- an operand and a number ---------------------------------------------------------------------


@dataclass(frozen=True)
class _WithNumber(Operator):
    """A function of one operand and a number."""

    scalar: float
    is_int: bool = True

    function: ClassVar[Callable[[Value, float], Value]]

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (type(self).function(inputs[0], self.scalar),)


def _number(x: Value, c: float) -> Value:
    return x.graph.constant(c, x.dtype)


def _at_least(x: Value, c: float) -> Value:
    return where(compare("less", x, _number(x, c)), _number(x, c), x)


def _at_most(x: Value, c: float) -> Value:
    return where(compare("greater", x, _number(x, c)), _number(x, c), x)


_WITH_NUMBER: dict[str, tuple[str, Callable[[Value, float], Value]]] = {
    "_plus_scalar": ("_PlusScalar", lambda x, c: x + c),
    "_minus_scalar": ("_MinusScalar", lambda x, c: x - c),
    "_rminus_scalar": ("_RMinusScalar", lambda x, c: c - x),
    "_mul_scalar": ("_MulScalar", lambda x, c: x * c),
    "_div_scalar": ("_DivScalar", lambda x, c: x / c),
    "_rdiv_scalar": ("_RDivScalar", lambda x, c: c / x),
    "_power_scalar": ("_PowerScalar", lambda x, c: _power(x, _number(x, c))),
    "_rpower_scalar": ("_RPowerScalar", lambda x, c: _power(_number(x, c), x)),
    "_maximum_scalar": ("_MaximumScalar", _at_least),
    "_minimum_scalar": ("_MinimumScalar", _at_most),
}
for _name, (_alias, _with_number) in _WITH_NUMBER.items():
    declare(_WithNumber, _name, _with_number, (_alias,))


@dataclass(frozen=True)
class Clip(Operator, spelling="clip"):
    """The data between two bounds; the gradient passes on the bounds too."""

    a_min: float
    a_max: float

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (functions.clip(inputs[0], self.a_min, self.a_max),)


# -- one operand, or any number ------------------------------------------------------------------


@dataclass(frozen=True)
class _Function(Operator):
    """A function of one operand."""

    function: ClassVar[Callable[[Value], Value]]

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (type(self).function(inputs[0]),)


def _native(opcode: str) -> Callable[[Value], Value]:
    return lambda x: x.graph.emit(make(opcode), x)


_FUNCTIONS: dict[str, tuple[tuple[str, ...], Callable[[Value], Value]]] = {
    "sqrt": ((), _native("sqrt")),
    "square": ((), lambda x: x * x),
    "exp": ((), _native("exp")),
    "log": ((), _native("log")),
    "abs": ((), _native("absolute")),
    "negative": ((), Value.__neg__),
    "relu": ((), builder.relu),
    "sigmoid": ((), builder.sigmoid),
    "tanh": ((), builder.tanh),
    "_copy": (("identity",), lambda x: x),
    "BlockGrad": (("stop_gradient",), blocked),
}
for _name, (_aliases, _of_one) in _FUNCTIONS.items():
    declare(_Function, _name, _of_one, _aliases)


@dataclass(frozen=True)
class Cast(Operator, spelling="Cast", aliases=("cast",)):
    """The data in another element type; floats are cut towards 0."""

    dtype: DTypeName

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (cast(inputs[0], DType.of(NAMES[self.dtype])),)


@dataclass(frozen=True)
class AddN(Operator, spelling="add_n", aliases=("ElementWiseSum",)):
    """The sum of any number of operands of one shape."""

    num_args: int

    def arguments(self) -> tuple[str, ...]:
        return counted(self.num_args)

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        return all_equal(shapes)

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (builder.merge_sum(*inputs),)
