"""Declared choices of mode: a value for training and one for inference, and declared noise."""

from __future__ import annotations

from dataclasses import dataclass, field

from branchgraph.ir.dims import DimLike
from branchgraph.ir.graph import Value
from branchgraph.ir.lowering import Lowering
from branchgraph.ir.op import STREAM, Op, require
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.random import uniform
from branchgraph.ir.types import DType, TensorType


@dataclass(frozen=True)
class ByMode(Op, opcode="by_mode", operands=("training", "inference")):
    """`training` when the graph is specialised for training, else `inference`."""

    declared = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        training, inference = inputs
        same = f"both values must have one type, got {training} and {inference}"
        require(training == inference, same)
        return (training,)

    def lower(self, inputs: tuple[Value, ...], lowering: Lowering) -> tuple[Value, ...]:
        return (inputs[0] if lowering.training else inputs[1],)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return True


@dataclass(frozen=True)
class Noise(Op, opcode="noise", operands=()):
    """Declared U[0, 1) of a shape: drawn in training, its mean 1/2 in inference."""

    stream: int = field(metadata=STREAM)
    shape: tuple[DimLike, ...] = ()
    dtype: DType = DType.F32
    declared = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require(self.dtype.is_float, f"needs a floating dtype, got {self.dtype}")
        return (TensorType(self.shape, self.dtype),)

    def lower(self, inputs: tuple[Value, ...], lowering: Lowering) -> tuple[Value, ...]:
        like = TensorType(self.shape, self.dtype)
        if lowering.training:
            return (uniform(lowering, self.stream, like),)
        return (lowering.graph.emit(Full(value=0.5, shape=self.shape, dtype=self.dtype)),)
