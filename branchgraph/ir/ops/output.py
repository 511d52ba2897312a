"""Outputs that bring a gradient of their own: the loss layers of MXNet.

Such an op computes a prediction and, backward, the gradient of a loss that is never formed. What
flows in is ignored: only whether something flows matters. With x the data, t the target and y the
output (MXNet 1.x, `softmax_output-inl.h`, `regression_output-inl.h`, `make_loss-inl.h`):

softmax_output     y = softmax(x),              dx = s (y - t)
regression_output  y = x,  x,  sigmoid(x),      dx = s (y - t),  s sgn(y - t),  s (y - t)
make_loss          y = x,                       dx = s

where s is the scale of the gradient divided as each op says, and sgn(0) = -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import DimLike, product
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import Cotangents, Op, Wanted, concrete, require, require_float
from branchgraph.ir.ops.activation import Sigmoid, Softmax
from branchgraph.ir.ops.constant import Extent, Full
from branchgraph.ir.ops.elementwise import cast, compare, where
from branchgraph.ir.ops.loss import OneHot
from branchgraph.ir.ops.reduce import BroadcastTo, ReduceSum
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.types import DType, TensorType

_NORMALISATIONS = ("null", "batch", "valid")


def _check_normalization(op: Op, normalization: str) -> None:
    if normalization not in _NORMALISATIONS:
        known = ", ".join(_NORMALISATIONS)
        raise GraphError(f"{op.opcode}: normalization {normalization!r} is none of {known}")


def _reshaped(x: Value, shape: tuple[DimLike, ...]) -> Value:
    return x if x.shape == shape else x.graph.emit(Reshape(shape=shape), x)


def _at_least_one(count: Value) -> Value:
    one = count.graph.constant(1.0, count.dtype)
    return where(compare("less", count, one), one, count)


def _count(mask: Value, dtype: DType) -> Value:
    """How many elements of `mask` are true, as a 0-d value."""
    return mask.graph.emit(ReduceSum(axes=tuple(range(len(mask.shape)))), cast(mask, dtype))


@dataclass(frozen=True)
class SoftmaxOutput(Op, opcode="softmax_output", operands=("x", "labels")):
    """Softmax whose gradient is that of the cross-entropy with `labels`.

    x is seen as [n, C, m] with the softmax over C: [N, product of the rest, 1] by default,
    [product of all but the last, last, 1] with `preserve_shape`, [N, second, product of the rest]
    with `multi_output`. Labels of the shape of x are probabilities:

        dx = grad_scale (y - labels)

    Otherwise there is one class number k a row and position, truncated to an integer and clipped to
    0 .. C - 1, with smooth_alpha = a:

        dx = s (y - t),   t_c = 1 - a if c = k else a / (C - 1)

    and rows whose number is `ignore_label` have dx = 0 if `use_ignore`. The scale s is grad_scale
    divided by 1 (`null`), by the n rows (`batch`), or by the number of labels other than
    `ignore_label`, at least 1 (`valid`, whether ignored or not); with `multi_output`, `null` and
    `batch` divide by the m positions too. `out_grad` multiplies dx by y, as MXNet 1.9.1 does where
    it means the incoming gradient.
    """

    grad_scale: float = 1.0
    ignore_label: float = -1.0
    use_ignore: bool = False
    multi_output: bool = False
    preserve_shape: bool = False
    normalization: str = "null"
    out_grad: bool = False
    smooth_alpha: float = 0.0

    def check(self) -> None:
        _check_normalization(self, self.normalization)
        if not abs(self.ignore_label) < 2**31:
            raise GraphError(f"softmax_output: ignore_label {self.ignore_label} is no class number")

    def view(self, shape: tuple[DimLike, ...]) -> tuple[DimLike, DimLike, DimLike]:
        """[n, C, m], the three axes that x is seen to have."""
        if self.multi_output:
            return (shape[0], shape[1], product(shape[2:]))
        if self.preserve_shape:
            return (product(shape[:-1]), shape[-1], 1)
        return (shape[0], product(shape[1:]), 1)

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, labels = inputs
        require_float(x)
        require(x.rank >= 2, f"x needs a batch and a class axis, got {x}")
        if labels.shape != x.shape:
            rows, _, positions = self.view(x.shape)
            expected = rows * positions
            require(
                labels.size == expected,
                f"labels of {x} are one number for each of its {expected} rows, or have its "
                f"shape; got {labels}",
            )
        return (x,)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x = inputs[0]
        (y,) = Softmax(axis=1).evaluate(x.reshape(concrete(self.view(x.shape), self.opcode)))
        return (y.reshape(x.shape),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        x, labels = node.inputs
        if labels.shape == x.shape:
            return ((node.output - cast(labels, x.dtype)) * self.grad_scale, None)
        rows, classes, positions = self.view(x.shape)
        require(isinstance(classes, int), "softmax_output needs a concrete number of classes")
        assert isinstance(classes, int)
        y = _reshaped(node.output, (rows, classes, positions))
        number = _reshaped(cast(labels, DType.I64), (rows, positions))
        ignored = compare("equal", number, x.graph.constant(int(self.ignore_label), DType.I64))
        error = y - self._target(number, classes, x.dtype)
        if self.use_ignore:
            by_class = _reshaped(ignored, (rows, 1, positions))
            error = where(by_class, x.graph.constant(0.0, x.dtype), error)
        error = error * (self.grad_scale / self._divisor(ignored, x.dtype))
        return (_reshaped(error * y if self.out_grad else error, x.shape), None)

    def _target(self, number: Value, classes: int, dtype: DType) -> Value:
        graph = number.graph
        zero, last = (graph.constant(k, DType.I64) for k in (0, classes - 1))
        number = where(compare("less", number, zero), zero, number)
        number = where(compare("greater", number, last), last, number)
        target = graph.emit(OneHot(classes=classes, dtype=dtype), number)
        if self.smooth_alpha:
            other = self.smooth_alpha / (classes - 1) if classes > 1 else 0.0
            target = target * (1.0 - self.smooth_alpha - other) + other
        return target

    def _divisor(self, ignored: Value, dtype: DType) -> Value:
        graph = ignored.graph
        rows, positions = ignored.shape
        if self.normalization == "valid":
            ignored_count = _count(ignored, dtype)
            total = graph.emit(Extent(dim=rows * positions, dtype=dtype))
            return _at_least_one(total - ignored_count)
        divisor = positions if self.multi_output else 1
        if self.normalization == "batch":
            divisor = divisor * rows
        return graph.emit(Extent(dim=divisor, dtype=dtype))

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows)


_KINDS = ("linear", "logistic", "mae")


@dataclass(frozen=True)
class RegressionOutput(Op, opcode="regression_output", operands=("x", "labels")):
    """Prediction whose gradient is that of a regression loss against `labels`.

        linear    y = x            dx = s (y - labels)
        logistic  y = sigmoid(x)   dx = s (y - labels)
        mae       y = x            dx = s sgn(y - labels),  sgn(0) = -1

    with s = grad_scale / (labels of one sample). Labels have as many elements as x.
    """

    kind: str
    grad_scale: float = 1.0

    def check(self) -> None:
        if self.kind not in _KINDS:
            known = ", ".join(_KINDS)
            raise GraphError(f"regression_output: kind {self.kind!r} is none of {known}")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, labels = inputs
        require_float(x, labels)
        require(x.rank >= 1, "x needs a batch axis")
        require(labels.size == x.size, f"labels have as many elements as x, got {x} and {labels}")
        return (x,)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x = inputs[0]
        return Sigmoid().evaluate(x) if self.kind == "logistic" else (x.copy(),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        x, labels = node.inputs
        graph = x.graph
        error = node.output - _reshaped(labels, x.shape)
        if self.kind == "mae":
            zero, one, minus_one = (graph.constant(v, x.dtype) for v in (0.0, 1.0, -1.0))
            error = where(compare("greater", error, zero), one, minus_one)
        each = graph.emit(Extent(dim=product(x.shape[1:]), dtype=x.dtype))
        return (error * (self.grad_scale / each), None)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows)


@dataclass(frozen=True)
class MakeLoss(Op, opcode="make_loss", operands=("x",)):
    """x as a loss of its own: y = x, and dx = s everywhere.

    s is grad_scale divided by 1 (`null`), by the batch size (`batch`), or by the number of elements
    above `valid_thresh`, at least 1 (`valid`).
    """

    grad_scale: float = 1.0
    valid_thresh: float = 0.0
    normalization: str = "null"

    def check(self) -> None:
        _check_normalization(self, self.normalization)

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(inputs[0])
        batched = self.normalization != "batch" or inputs[0].rank > 0
        require(batched, "normalization by the batch needs a batch axis")
        return inputs

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return (inputs[0].copy(),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (x,) = node.inputs
        graph = x.graph
        if self.normalization == "null":
            return (graph.emit(Full(value=self.grad_scale, shape=x.shape, dtype=x.dtype)),)
        if self.normalization == "batch":
            divisor = graph.emit(Extent(dim=x.shape[0], dtype=x.dtype))
        else:
            above = compare("greater", x, graph.constant(self.valid_thresh, x.dtype))
            divisor = _at_least_one(_count(above, x.dtype))
        return (graph.emit(BroadcastTo(shape=x.shape), self.grad_scale / divisor),)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return True
