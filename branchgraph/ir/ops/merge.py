"""Merges: where branches join on purpose. N-ary, operands ordered and of one shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from branchgraph.ir.dims import DimLike
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import Cotangents, Op, Wanted, require
from branchgraph.ir.ops.elementwise import compare, where
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.types import TensorType


class Merge(Op):
    """Base of merges whose operands all have the type of the result."""

    merge = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require(len(inputs) > 0, "a merge needs at least one operand")
        for t in inputs[1:]:
            require(t == inputs[0], f"operands must have one type, got {inputs[0]} and {t}")
        return inputs[:1]

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows) and inputs[0].rank > 0


class _Folded(Merge):
    function: ClassVar[Callable[..., np.ndarray]]

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.asarray(functools.reduce(type(self).function, inputs)),)


@dataclass(frozen=True)
class Sum(_Folded, opcode="sum", operands=("*values",)):
    """y = x_1 + ... + x_n, added from left to right."""

    function = np.add

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return tuple(cotangents[0] if w else None for w in wanted)


@dataclass(frozen=True)
class Mean(_Folded, opcode="mean", operands=("*values",)):
    """y = (x_1 + ... + x_n) / n."""

    function = np.add

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (total,) = super().evaluate(*inputs)
        return (np.asarray(total / total.dtype.type(len(inputs))),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        share = dy / float(len(node.inputs))
        return tuple(share if w else None for w in wanted)


@dataclass(frozen=True)
class Product(_Folded, opcode="product", operands=("*values",)):
    """y = x_1 x_2 ... x_n; the cotangent of x_i is dy times the other factors."""

    function = np.multiply

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        return tuple(
            functools.reduce(Value.__mul__, others(node, i), dy) if w else None
            for i, w in enumerate(wanted)
        )


def others(node: Node, i: int) -> list[Value]:
    """The operands of `node` except the i-th."""
    return [v for j, v in enumerate(node.inputs) if j != i]


@dataclass(frozen=True)
class Maximum(_Folded, opcode="maximum", operands=("*values",)):
    """y = max(x_1, ..., x_n) element by element; on ties the first operand has the gradient."""

    function = np.maximum

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        rest = cotangents[0]
        assert rest is not None
        zero = rest.graph.constant(0.0, rest.dtype)
        shares: list[Value | None] = []
        for x, w in zip(node.inputs, wanted):
            attains = compare("equal", x, node.output)
            shares.append(where(attains, rest, zero) if w else None)
            rest = where(attains, zero, rest)
        return tuple(shares)


@dataclass(frozen=True)
class Concat(Op, opcode="concat", operands=("*values",)):
    """The operands one after another along `axis`; the other axes agree."""

    axis: int = 1
    merge = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require(len(inputs) > 0, "a merge needs at least one operand")
        first = inputs[0]
        require(0 <= self.axis < first.rank, f"axis {self.axis} exceeds rank {first.rank}")
        total: DimLike = 0
        for t in inputs:
            require(t.dtype == first.dtype, f"operands must share one dtype, got {first} and {t}")
            same = t.rank == first.rank and all(
                a == b for i, (a, b) in enumerate(zip(t.shape, first.shape)) if i != self.axis
            )
            require(same, f"operands may differ on axis {self.axis} only, got {first} and {t}")
            total = total + t.shape[self.axis]
        shape = (*first.shape[: self.axis], total, *first.shape[self.axis + 1 :])
        return (TensorType(shape, first.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.concatenate(inputs, axis=self.axis),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        start = 0
        parts: list[Value | None] = []
        for value, w in zip(node.inputs, wanted):
            size = value.shape[self.axis]
            require(isinstance(size, int), f"gradient of a concat along symbolic axis {self.axis}")
            assert isinstance(size, int)
            cut = Slice(axis=self.axis, start=start, size=size)
            parts.append(dy.graph.emit(cut, dy) if w else None)
            start += size
        return tuple(parts)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows) and self.axis != 0
