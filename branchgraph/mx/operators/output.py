"""Loss layers: their gradient is their own, and what flows into them is ignored (`ir.ops.output`).

A label of SoftmaxOutput has one number for each row, or the shape of the data (probabilities).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from branchgraph.ir.dims import product
from branchgraph.ir.graph import Value
from branchgraph.ir.ops import output
from branchgraph.mx.operators.base import Operator, Shapes, all_equal, known


@dataclass(frozen=True)
class SoftmaxOutput(Operator, spelling="SoftmaxOutput", aliases=("Softmax",)):
    """Softmax with the gradient of the cross-entropy."""

    grad_scale: float = 1.0
    ignore_label: float = -1.0
    multi_output: bool = False
    use_ignore: bool = False
    preserve_shape: bool = False
    normalization: Literal["null", "batch", "valid"] = "null"
    out_grad: bool = False
    smooth_alpha: float = 0.0

    labels: ClassVar[tuple[str, ...]] = ("label",)

    def arguments(self) -> tuple[str, ...]:
        return ("data", "label")

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        data, label = shapes
        if data is None:
            return shapes
        if self.multi_output:
            return (data, known(label, (data[0], product(data[2:]))))
        return (data, known(label, data[:-1] if self.preserve_shape else data[:1]))

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        op = output.SoftmaxOutput(
            grad_scale=self.grad_scale,
            ignore_label=self.ignore_label,
            use_ignore=self.use_ignore,
            multi_output=self.multi_output,
            preserve_shape=self.preserve_shape,
            normalization=self.normalization,
            out_grad=self.out_grad,
            smooth_alpha=self.smooth_alpha,
        )
        return (inputs[0].graph.emit(op, *inputs),)


@dataclass(frozen=True)
class _Regression(Operator):
    grad_scale: float = 1.0

    kind: ClassVar[str] = ""
    labels: ClassVar[tuple[str, ...]] = ("label",)

    def arguments(self) -> tuple[str, ...]:
        return ("data", "label")

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        data, label = shapes
        if data is not None and len(data) == 2 and data[1] == 1:
            return (data, known(label, data[:1]))
        return all_equal(shapes)

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        op = output.RegressionOutput(self.kind, self.grad_scale)
        return (inputs[0].graph.emit(op, *inputs),)


@dataclass(frozen=True)
class LinearRegressionOutput(_Regression, spelling="LinearRegressionOutput"):
    """The data, with the gradient of half the squared error."""

    kind: ClassVar[str] = "linear"


@dataclass(frozen=True)
class LogisticRegressionOutput(_Regression, spelling="LogisticRegressionOutput"):
    """The sigmoid, with the gradient of the binary cross-entropy."""

    kind: ClassVar[str] = "logistic"


@dataclass(frozen=True)
class MAERegressionOutput(_Regression, spelling="MAERegressionOutput"):
    """The data, with the gradient of the absolute error."""

    kind: ClassVar[str] = "mae"


@dataclass(frozen=True)
class MakeLoss(Operator, spelling="MakeLoss"):
    """The data as a loss."""

    grad_scale: float = 1.0
    valid_thresh: float = 0.0
    normalization: Literal["null", "batch", "valid"] = "null"

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        op = output.MakeLoss(self.grad_scale, self.valid_thresh, self.normalization)
        return (inputs[0].graph.emit(op, *inputs),)


@dataclass(frozen=True)
class PlainMakeLoss(Operator, spelling="make_loss"):
    """The data as a loss with a gradient of ones."""

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (inputs[0].graph.emit(output.MakeLoss(), *inputs),)
