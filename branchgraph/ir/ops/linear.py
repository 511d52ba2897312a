"""Products: the dense layer and the matrix product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import DimLike, product
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import Cotangents, Op, Wanted, carries_first, require, require_float
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.types import TensorType


@dataclass(frozen=True)
class MatMul(Op, opcode="matmul", operands=("a", "b")):
    """y = op(a) op(b) over the last two axes, where op transposes if asked; leading axes agree."""

    transpose_a: bool = False
    transpose_b: bool = False

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        a, b = inputs
        require_float(a, b)
        require(a.rank == b.rank >= 2, f"needs two operands of one rank >= 2, got {a} and {b}")
        require(a.shape[:-2] == b.shape[:-2], f"leading axes differ: {a} and {b}")
        m, inner_a = reversed(a.shape[-2:]) if self.transpose_a else a.shape[-2:]
        inner_b, n = reversed(b.shape[-2:]) if self.transpose_b else b.shape[-2:]
        require(inner_a == inner_b, f"inner sizes differ: {inner_a} and {inner_b}")
        return (TensorType((*a.shape[:-2], m, n), a.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        a, b = inputs
        left = a.swapaxes(-1, -2) if self.transpose_a else a
        right = b.swapaxes(-1, -2) if self.transpose_b else b
        return ((left @ right).astype(a.dtype, copy=False),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        a, b = node.inputs
        ta, tb = self.transpose_a, self.transpose_b
        da = _product(b, dy, tb, True) if ta else _product(dy, b, False, not tb)
        db = _product(dy, a, True, ta) if tb else _product(a, dy, not ta, False)
        return (da if wanted[0] else None, db if wanted[1] else None)

    def macs(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> DimLike:
        inner = inputs[0].shape[-2 if self.transpose_a else -1]
        return inner * outputs[0].size

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        batched = inputs[0].rank > 2
        return all(rows) if batched else carries_first(inputs, rows) and not self.transpose_a


def _product(a: Value, b: Value, transpose_a: bool, transpose_b: bool) -> Value:
    return a.graph.emit(MatMul(transpose_a=transpose_a, transpose_b=transpose_b), a, b)


@dataclass(frozen=True)
class Dense(Op, opcode="dense", operands=("x", "weight", "bias?")):
    """Fully connected layer: y[n, o] = b[o] + sum_c weight[o, c] x[n, c].

    x: [N, in], weight: [out, in], bias: [out].
    """

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(*inputs)
        x, weight, *bias = inputs
        require(x.rank == 2 and weight.rank == 2, "x is [N, in] and weight [out, in]; reshape x")
        require(
            x.shape[1] == weight.shape[1],
            f"x has {x.shape[1]} features, weight reads {weight.shape[1]}",
        )
        out = weight.shape[0]
        require(all(b.shape == (out,) for b in bias), f"bias must have shape [{out}]")
        return (TensorType((x.shape[0], out), x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, weight, *bias = inputs
        y = (x @ weight.T).astype(x.dtype, copy=False)
        return (y + bias[0] if bias else y,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        x, weight, *bias = node.inputs
        dx = _product(dy, weight, False, False) if wanted[0] else None
        dweight = _product(dy, x, True, False) if wanted[1] else None
        if not bias:
            return (dx, dweight)
        dbias = dy.graph.emit(ReduceSum(axes=(0,)), dy) if wanted[2] else None
        return (dx, dweight, dbias)

    def macs(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> DimLike:
        return product(inputs[1].shape) * outputs[0].shape[0]

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return carries_first(inputs, rows)
