"""Batch normalisation in MXNet's convention, instance, response and L2 normalisation.

BatchNorm moves m <- momentum m + (1 - momentum) batch with the biased variance, and does so when
the backward pass visits it: specialise with `statistics="backward"`. Under `fix_gamma` gamma counts
as 1, has gradient 0, and its array is overwritten with 1. The visible statistics under
`output_mean_var` are the mean and 1 / sqrt(var + eps); no gradient flows through them.

LRN               x (knorm + alpha / nsize * sum of squares over the window)^-beta
L2Normalization   x / sqrt(sum of squares + eps)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from branchgraph.ir import builder, functions
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.functions.layout import axis_of, reshaped
from branchgraph.ir.graph import Value
from branchgraph.ir.op import make
from branchgraph.ir.ops import norm
from branchgraph.mx.operators.base import (
    Operator,
    Shapes,
    blocked,
    per_channel,
)


@dataclass(frozen=True)
class BatchNorm(Operator, spelling="BatchNorm", aliases=("CuDNNBatchNorm",)):
    """Batch normalisation with moving statistics."""

    eps: float = 1e-3
    momentum: float = 0.9
    fix_gamma: bool = True
    use_global_stats: bool = False
    output_mean_var: bool = False
    axis: int = 1
    cudnn_off: bool = False
    min_calib_range: float | None = None
    max_calib_range: float | None = None

    auxiliary: ClassVar[tuple[str, ...]] = ("moving_mean", "moving_var")
    initial: ClassVar[dict[str, str]] = {
        "moving_mean": '["zero", {}]',
        "moving_var": '["one", {}]',
    }

    def arguments(self) -> tuple[str, ...]:
        return ("data", "gamma", "beta")

    def outputs(self) -> tuple[str, ...]:
        return ("output", "mean", "var") if self.output_mean_var else ("output",)

    def overwrites(self) -> dict[str, float]:
        return {"gamma": 1.0} if self.fix_gamma else {}

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        return per_channel(shapes[0], shapes, self.axis)

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        data, gamma, beta, mean, var = inputs
        graph = data.graph
        if self.fix_gamma:
            gamma = graph.emit(make("full", value=1.0, shape=gamma.shape, dtype=gamma.dtype))
        order = self._channels_second(len(data.shape))
        moved = order != tuple(range(len(order)))
        x = functions.transpose(data, order) if moved else data
        if self.use_global_stats:
            y = graph.emit(norm.BatchNormInference(self.eps), x, gamma, beta, mean, var)
        else:
            op = norm.BatchNorm(self.eps, self.momentum, unbiased=False)
            y = graph.emit(op, x, gamma, beta, mean, var)
        if moved:
            y = functions.transpose(y, [order.index(a) for a in range(len(order))])
        return (y, *self._statistics(x, mean, var)) if self.output_mean_var else (y,)

    def _channels_second(self, rank: int) -> tuple[int, ...]:
        """The order of axes that takes the channels to axis 1."""
        channels = axis_of(self.axis, rank, self.spelling)
        rest = [a for a in range(rank) if a != channels]
        return (rest[0], channels, *rest[1:]) if rest else (channels,)

    def _statistics(self, x: Value, mean: Value, var: Value) -> tuple[Value, Value]:
        if not self.use_global_stats:
            axes = (0, *range(2, len(x.shape)))
            reduce = make("reduce_mean", axes=axes)
            batch_mean = x.graph.emit(reduce, x)
            column = (1, x.shape[1], *(1,) * (len(x.shape) - 2))
            centred = x - reshaped(batch_mean, column)
            batch_var = x.graph.emit(reduce, centred * centred)
            mean = builder.by_mode(batch_mean, mean)
            var = builder.by_mode(batch_var, var)
        inverse = 1.0 / x.graph.emit(make("sqrt"), var + self.eps)
        return blocked(mean), blocked(inverse)


@dataclass(frozen=True)
class BatchNormV1(BatchNorm, spelling="BatchNorm_v1"):
    """Batch normalisation under its older name."""


@dataclass(frozen=True)
class InstanceNorm(Operator, spelling="InstanceNorm"):
    """Normalisation of every channel of every sample over its positions."""

    eps: float = 1e-3

    def arguments(self) -> tuple[str, ...]:
        return ("data", "gamma", "beta")

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        return per_channel(shapes[0], shapes)

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        data, gamma, beta = inputs
        return (functions.instance_norm(data, gamma, beta, self.eps),)


@dataclass(frozen=True)
class LRN(Operator, spelling="LRN"):
    """Local response normalisation across channels."""

    nsize: int
    alpha: float = 1e-4
    beta: float = 0.75
    knorm: float = 2.0

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        if self.nsize < 1 or self.nsize % 2 == 0:
            raise ShapeError(f"LRN: nsize is odd and positive, got {self.nsize}")
        alpha = self.alpha / self.nsize
        return (builder.lrn(inputs[0], self.nsize, alpha=alpha, beta=self.beta, k=self.knorm),)


@dataclass(frozen=True)
class L2Normalization(Operator, spelling="L2Normalization"):
    """Division by the Euclidean norm of a sample, of a position, or of a channel."""

    eps: float = 1e-10
    mode: Literal["instance", "channel", "spatial"] = "instance"

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        rank = len(x.shape)
        axes = {"instance": range(1, rank), "channel": (1,), "spatial": range(2, rank)}[self.mode]
        return (functions.l2_normalise(x, axes=tuple(axes), eps=self.eps),)
