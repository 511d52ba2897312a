"""Classification losses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.errors import ShapeError
from branchgraph.ir.graph import Node
from branchgraph.ir.op import Cotangents, Op, Wanted, require, require_float
from branchgraph.ir.ops.activation import Softmax
from branchgraph.ir.ops.elementwise import compare, where
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.types import DType, TensorType


@dataclass(frozen=True)
class OneHot(Op, opcode="one_hot", operands=("labels",)):
    """y[n, c, ...] = 1 if labels[n, ...] == c else 0; classes on axis 1."""

    classes: int
    dtype: DType = DType.F32

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (labels,) = inputs
        require(labels.dtype.is_integer, f"labels must be integers, got {labels.dtype}")
        require(labels.rank >= 1, "labels need a batch axis")
        return (TensorType((labels.shape[0], self.classes, *labels.shape[1:]), self.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        labels = np.expand_dims(inputs[0], 1)
        classes = np.arange(self.classes).reshape(1, -1, *(1,) * (labels.ndim - 2))
        return ((labels == classes).astype(self.dtype.numpy),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return (None,)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return True


@dataclass(frozen=True)
class CrossEntropy(Op, opcode="cross_entropy", operands=("logits", "labels")):
    """Softmax cross-entropy of each element: loss[n, ...] = -ln softmax(logits)[n, labels[n], ...].

    logits: [N, C, ...] float, labels: [N, ...] integers. Where the label is `ignore_label` the loss
    and its gradient are 0; any other label outside 0..C-1 is an error. Not reduced, so that rows
    stay independent: take the mean with `reduce_mean`.
    """

    ignore_label: int | None = None

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        logits, labels = inputs
        require_float(logits)
        require(labels.dtype.is_integer, f"labels must be integers, got {labels.dtype}")
        expected = (logits.shape[0], *logits.shape[2:]) if logits.rank >= 2 else None
        require(labels.shape == expected, f"labels of {logits} must have shape {expected}")
        return (TensorType(labels.shape, logits.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        logits, labels = inputs
        kept = (
            np.ones(labels.shape, bool)
            if self.ignore_label is None
            else labels != self.ignore_label
        )
        chosen = np.where(kept, labels, 0)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= logits.shape[1]):
            raise ShapeError(
                f"cross_entropy: labels run from {chosen.min()} to {chosen.max()}, "
                f"expected 0..{logits.shape[1] - 1}"
            )
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(shifted).sum(axis=1))
        picked = np.take_along_axis(shifted, np.expand_dims(chosen, 1), axis=1)[:, 0]
        return (np.where(kept, log_sum - picked, logits.dtype.type(0)),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dloss,) = cotangents
        assert dloss is not None
        logits, labels = node.inputs
        graph = dloss.graph
        if self.ignore_label is not None:
            ignored = graph.constant(self.ignore_label, labels.dtype)
            zero = graph.constant(0.0, dloss.dtype)
            dloss = where(compare("equal", labels, ignored), zero, dloss)
        classes = logits.shape[1]
        require(isinstance(classes, int), "cross_entropy needs a concrete number of classes")
        assert isinstance(classes, int)
        target = graph.emit(OneHot(classes=classes, dtype=logits.dtype), labels)
        per_class = Reshape(shape=(dloss.shape[0], 1, *dloss.shape[1:]))
        error = graph.emit(Softmax(axis=1), logits) - target
        return (error * graph.emit(per_class, dloss), None)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows)
