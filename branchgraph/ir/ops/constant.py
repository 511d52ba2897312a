"""Leaves without memory: filled constants and the value of a dimension."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import DimLike, as_shape
from branchgraph.ir.graph import Node
from branchgraph.ir.op import Cotangents, Op, Wanted, concrete, require
from branchgraph.ir.types import DType, TensorType


@dataclass(frozen=True)
class Full(Op, opcode="full", operands=()):
    """Every element is `value`: y[i...] = value."""

    value: float
    shape: tuple[DimLike, ...] = ()
    dtype: DType = DType.F32

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        integral = float(self.value).is_integer()
        require(self.dtype.is_float or integral, f"value {self.value} does not fit {self.dtype}")
        return (TensorType(as_shape(self.shape), self.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.full(concrete(self.shape, "full"), self.value, self.dtype.numpy),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return ()


@dataclass(frozen=True)
class Extent(Op, opcode="extent", operands=()):
    """A dimension as a 0-d value, so that formulas may use the batch size (`720*N`)."""

    dim: DimLike
    dtype: DType = DType.F64

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        return (TensorType((), self.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.array(concrete((self.dim,), "extent")[0], self.dtype.numpy),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return ()
