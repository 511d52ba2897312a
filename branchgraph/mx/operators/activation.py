"""Activations, the softmax family, dropout.

softrelu  ln(1 + e^x);   softsign  x / (1 + |x|)
leaky, prelu  x > 0 ? x : a x;   elu  x > 0 ? x : slope (e^x - 1)
rrelu  x > 0 ? x : a x with a drawn from [lower_bound, upper_bound) in training, their mean else
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from branchgraph.ir import builder, functions
from branchgraph.ir.dims import product
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.functions.layout import axis_of, reshaped
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.deep import Softplus
from branchgraph.ir.ops.elementwise import cast, compare, where
from branchgraph.ir.ops.random import Dropout as NativeDropout
from branchgraph.ir.types import DType
from branchgraph.mx.attributes import DTypeName
from branchgraph.mx.attributes import Shape as Sizes
from branchgraph.mx.dtypes import NAMES
from branchgraph.mx.operators.base import Operator, Shapes, blocked, per_channel

_ACTIVATIONS: dict[str, Callable[[Value], Value]] = {
    "relu": builder.relu,
    "sigmoid": builder.sigmoid,
    "tanh": builder.tanh,
    "softrelu": lambda x: x.graph.emit(Softplus(), x),
    "softsign": functions.softsign,
}


@dataclass(frozen=True)
class Activation(Operator, spelling="Activation"):
    """One of the classic activations."""

    act_type: Literal["relu", "sigmoid", "tanh", "softrelu", "softsign"]

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (_ACTIVATIONS[self.act_type](inputs[0]),)


#: The constants of selu (Klambauer et al., "Self-normalizing neural networks", 1706.02515).
_SCALE, _ALPHA = 1.0507009873554805, 1.6732632423543772


@dataclass(frozen=True)
class LeakyReLU(Operator, spelling="LeakyReLU"):
    """Activations that do not vanish below zero."""

    act_type: Literal["leaky", "prelu", "elu", "selu", "gelu", "rrelu"] = "leaky"
    slope: float = 0.25
    lower_bound: float = 0.125
    upper_bound: float = 0.334

    initial: ClassVar[dict[str, str]] = {"gamma": '["Constant", {"value": 0.25}]'}

    def arguments(self) -> tuple[str, ...]:
        return ("data", "gamma") if self.act_type == "prelu" else ("data",)

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        return per_channel(shapes[0], shapes)

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (_LEAKY[self.act_type](self, *inputs),)


def _bent(x: Value, slope: Value) -> Value:
    """x where it is positive, slope x elsewhere, at 0 too."""
    return where(compare("greater", x, x.graph.constant(0.0, x.dtype)), x, x * slope)


def _prelu(op: LeakyReLU, x: Value, gamma: Value) -> Value:
    return _bent(x, reshaped(gamma, (1, product(gamma.shape), *(1,) * (len(x.shape) - 2))))


def _rrelu(op: LeakyReLU, x: Value) -> Value:
    return _bent(x, builder.noise(x) * (op.upper_bound - op.lower_bound) + op.lower_bound)


def _selu(op: LeakyReLU, x: Value) -> Value:
    """Selu with the gradient of MXNet 1.9.1: below zero, scale (y + alpha) dy with y the output.

    The derivative is (y + scale alpha); the recordings show that the operator forgets the factor.
    """
    y = functions.selu(x, _ALPHA, _SCALE)
    one = x.graph.constant(_SCALE, x.dtype)
    positive = compare("greater", x, x.graph.constant(0.0, x.dtype))
    slope = where(positive, one, (y + _ALPHA) * _SCALE)
    return builder.straight_through(y, x * blocked(slope))


_LEAKY: dict[str, Callable[..., Value]] = {
    "leaky": lambda op, x: builder.leaky_relu(x, op.slope),
    "prelu": _prelu,
    "elu": lambda op, x: builder.elu(x, op.slope),
    "selu": _selu,
    "gelu": lambda op, x: functions.gelu(x),
    "rrelu": _rrelu,
}


@dataclass(frozen=True)
class _Softmax(Operator):
    axis: int = -1
    temperature: float | None = None
    dtype: DTypeName | None = None
    use_length: bool = False

    function: ClassVar[Callable[..., Value]] = builder.softmax

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        if self.use_length:
            raise ShapeError(f"{self.spelling}: use_length is not supported; mask the data instead")
        (x,) = inputs
        x = x if self.dtype is None else cast(x, DType.of(NAMES[self.dtype]))
        scaled = x / self.temperature if self.temperature else x
        return (type(self).function(scaled, axis=axis_of(self.axis, len(x.shape), self.spelling)),)


@dataclass(frozen=True)
class Softmax(_Softmax, spelling="softmax"):
    """Softmax along an axis, with its real gradient."""


@dataclass(frozen=True)
class LogSoftmax(_Softmax, spelling="log_softmax"):
    """Logarithm of the softmax."""

    function: ClassVar[Callable[..., Value]] = builder.log_softmax


@dataclass(frozen=True)
class SoftmaxActivation(Operator, spelling="SoftmaxActivation"):
    """Softmax over the last axis (`instance`) or over the channels."""

    mode: Literal["instance", "channel"] = "instance"

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        return (builder.softmax(x, axis=1 if self.mode == "channel" else len(x.shape) - 1),)


@dataclass(frozen=True)
class Dropout(Operator, spelling="Dropout"):
    """Inverted dropout; elements along `axes` share one draw, `always` draws in inference too."""

    p: float = 0.5
    mode: Literal["training", "always"] = "training"
    axes: Sizes = ()
    cudnn_off: bool | None = False

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        shared = tuple(sorted({axis_of(a, len(x.shape), self.spelling) for a in self.axes}))
        stream = builder.unused_stream(x.graph)
        op = NativeDropout(self.p, stream, axes=shared, always=self.mode == "always")
        return (x.graph.emit(op, x),)
