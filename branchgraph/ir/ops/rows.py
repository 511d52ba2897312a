"""Rows: the only ops whose output size depends on data.

    compact(mask, v_1 ... v_k)      the rows n of every v_i with mask[n], in order
    scatter(mask, rows)             rows put back where mask[n], zeros elsewhere
    scatter(mask, rows, base)       rows put back where mask[n], base elsewhere

They are each other's transposes, so both have gradients. The number of kept rows is a symbol that
the op introduces, at most the number of rows of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import Dim, DimLike
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import Cotangents, Op, Wanted, make, require
from branchgraph.ir.types import DType, TensorType


def _check_mask(mask: TensorType, *values: TensorType) -> None:
    require(mask.dtype is DType.BOOL and mask.rank == 1, f"mask must be bool[N], got {mask}")
    for v in values:
        require(v.shape[:1] == mask.shape, f"{v} must have the {mask.shape[0]} rows of the mask")


@dataclass(frozen=True)
class Compact(Op, opcode="compact", operands=("mask", "*values")):
    """The rows of `values` where the mask holds; `count` names their number."""

    count: DimLike

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        mask, *values = inputs
        _check_mask(mask, *values)
        require(len(values) > 0, "needs at least one value")
        return tuple(TensorType((self.count, *v.shape[1:]), v.dtype) for v in values)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        kept = np.flatnonzero(inputs[0])
        return tuple(v[kept] for v in inputs[1:])

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        mask = node.inputs[0]
        back: list[Value | None] = [None]
        for dy, w in zip(cotangents, wanted[1:]):
            back.append(node.graph.emit(Scatter(), mask, dy) if w and dy is not None else None)
        return tuple(back)

    @property
    def introduces(self) -> tuple[str, ...]:
        return self.count.symbols if isinstance(self.count, Dim) else ()


@dataclass(frozen=True)
class Scatter(Op, opcode="scatter", operands=("mask", "rows", "base?")):
    """Rows put back in their places; the other rows are those of `base`, or zeros."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        mask, rows, *base = inputs
        _check_mask(mask, *base)
        require(rows.rank >= 1, f"rows need a row axis, got {rows}")
        result = TensorType((mask.shape[0], *rows.shape[1:]), rows.dtype)
        require(all(b == result for b in base), f"base must be {result}")
        return (result,)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        mask, rows, *base = inputs
        kept = np.flatnonzero(mask)
        if len(kept) != len(rows):
            raise ShapeError(f"scatter: the mask keeps {len(kept)} rows, got {len(rows)}")
        result = base[0].copy() if base else np.zeros((len(mask), *rows.shape[1:]), rows.dtype)
        result[kept] = rows
        return (result,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        mask, rows, *base = node.inputs
        graph = node.graph
        count = rows.shape[0]
        drows = graph.emit(Compact(count=count), mask, dy) if wanted[1] else None
        if not base:
            return (None, drows)
        zeros = make("full", value=0.0, shape=rows.shape, dtype=rows.dtype)
        dbase = graph.emit(Scatter(), mask, graph.emit(zeros), dy) if wanted[2] else None
        return (None, drows, dbase)
