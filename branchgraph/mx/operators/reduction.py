"""Reductions. A full reduction has the shape (1,); every tied maximum receives the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from branchgraph.ir import functions
from branchgraph.ir.dims import product
from branchgraph.ir.functions.layout import axis_of, reshaped
from branchgraph.ir.graph import Value
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import cast
from branchgraph.mx.attributes import Shape as Sizes
from branchgraph.mx.operators.base import Operator, declare


@dataclass(frozen=True)
class _Reduction(Operator):
    """A reduction over `axis`, or with `exclude` over all other axes."""

    axis: Sizes | None = None
    keepdims: bool = False
    exclude: bool = False

    function: ClassVar[Callable[..., Value]]

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        rank = len(x.shape)
        axes = {axis_of(a, rank, self.spelling) for a in self.axis or range(rank)}
        if self.exclude and self.axis:
            axes = set(range(rank)) - axes
        y = type(self).function(x, axes=tuple(sorted(axes)), keepdims=self.keepdims)
        return (y if y.shape else reshaped(y, (1,)),)


def _native(opcode: str) -> Callable[..., Value]:
    return lambda x, **fields: x.graph.emit(make(opcode, **fields), x)


_REDUCTIONS: dict[str, tuple[tuple[str, ...], Callable[..., Value]]] = {
    "sum": (("sum_axis",), _native("reduce_sum")),
    "mean": ((), _native("reduce_mean")),
    "max": (("max_axis",), _native("reduce_max")),
    "min": (("min_axis",), functions.reduce_min),
    "prod": ((), functions.reduce_prod),
}
for _name, (_aliases, _function) in _REDUCTIONS.items():
    declare(_Reduction, _name, _function, _aliases)


@dataclass(frozen=True)
class ArgMax(Operator, spelling="argmax"):
    """Where the largest element stands, the first one at ties, as a number of the data's type."""

    axis: int | None = None
    keepdims: bool = False

    sign: ClassVar[int] = 1

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        signed = x if self.sign > 0 else -x
        if self.axis is None:
            flat = reshaped(signed, (product(x.shape),))
            found = reshaped(cast(x.graph.emit(make("arg_max", axis=0), flat), x.dtype), (1,))
            return (reshaped(found, (1,) * len(x.shape)) if self.keepdims else found,)
        axis = axis_of(self.axis, len(x.shape), self.spelling)
        found = cast(x.graph.emit(make("arg_max", axis=axis), signed), x.dtype)
        kept = (*x.shape[:axis], 1, *x.shape[axis + 1 :]) if self.keepdims else found.shape
        return (reshaped(found, kept or (1,)),)


@dataclass(frozen=True)
class ArgMin(ArgMax, spelling="argmin"):
    """Where the smallest element stands, the first one at ties."""

    sign: ClassVar[int] = -1
