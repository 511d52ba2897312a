"""Convolution, its transpose, the fully connected layer and the product of arrays.

Convolution      H_out = floor((H + 2p - d(k - 1) - 1) / s) + 1,  weight [F, C/g, k...]
Deconvolution    H_out = s(H - 1) + d(k - 1) + 1 - 2p + adj,      weight [C, F/g, k...]
FullyConnected   y = x W^T + b,                                   weight [M, K]

With a `target_shape` T, Deconvolution chooses pad and adj: with t = s(H - 1) + d(k - 1) + 1 - T,
p = (t + 1) div 2 and adj = t mod 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from branchgraph.ir.dims import product
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.functions.layout import reshaped
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.conv import Conv, ConvTranspose
from branchgraph.ir.ops.linear import Dense, MatMul
from branchgraph.mx.attributes import Shape as Sizes
from branchgraph.mx.operators.base import Operator, Shapes, known, size_of


@dataclass(frozen=True)
class _Window(Operator):
    kernel: Sizes
    num_filter: int
    stride: Sizes = ()
    dilate: Sizes = ()
    pad: Sizes = ()
    num_group: int = 1
    workspace: int = 1024
    no_bias: bool = False
    cudnn_tune: str | None = None
    cudnn_off: bool = False
    layout: str | None = None

    def arguments(self) -> tuple[str, ...]:
        return ("data", "weight") if self.no_bias else ("data", "weight", "bias")

    def spread(self, given: Sizes, default: int, what: str) -> Sizes:
        """One number an axis: the given ones, or the default for all."""
        if given and len(given) != len(self.kernel):
            axes = len(self.kernel)
            raise ShapeError(f"{what} {given} does not fit a kernel over {axes} axes")
        return given or (default,) * len(self.kernel)

    def check(self, channels: int) -> None:
        """`num_group` divides the channels and the filters."""
        groups = self.num_group
        if groups < 1 or channels % groups or self.num_filter % groups:
            filters = self.num_filter
            raise ShapeError(f"{channels} channels and {filters} filters in {groups} groups")


@dataclass(frozen=True)
class Convolution(_Window, spelling="Convolution"):
    """Cross-correlation with a bank of filters."""

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        data, weight, *bias = shapes
        if data is not None and len(data) > 1:
            channels = size_of(data[1], "the number of channels")
            self.check(channels)
            weight = known(weight, (self.num_filter, channels // self.num_group, *self.kernel))
        return (data, weight, *(known(b, (self.num_filter,)) for b in bias))

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        op = Conv(
            stride=self.spread(self.stride, 1, "stride"),
            pad=self.spread(self.pad, 0, "pad") * 2,
            dilation=self.spread(self.dilate, 1, "dilate"),
            groups=self.num_group,
        )
        return (inputs[0].graph.emit(op, *inputs),)


@dataclass(frozen=True)
class ConvolutionV1(Convolution, spelling="Convolution_v1"):
    """Convolution under its older name."""


@dataclass(frozen=True)
class Deconvolution(_Window, spelling="Deconvolution"):
    """The transpose of a convolution, as a layer."""

    no_bias: bool = True
    workspace: int = 512
    adj: Sizes = ()
    target_shape: Sizes = ()

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        data, weight, *bias = shapes
        if data is not None and len(data) > 1:
            channels = size_of(data[1], "the number of channels")
            self.check(channels)
            weight = known(weight, (channels, self.num_filter // self.num_group, *self.kernel))
        return (data, weight, *(known(b, (self.num_filter,)) for b in bias))

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        data, weight, *bias = inputs
        stride = self.spread(self.stride, 1, "stride")
        dilation = self.spread(self.dilate, 1, "dilate")
        pad, adjusted = self.spread(self.pad, 0, "pad"), self.spread(self.adj, 0, "adj")
        full = tuple(
            s * (h - 1) + d * (k - 1) + 1
            for s, h, d, k in zip(stride, data.shape[2:], dilation, self.kernel)
        )
        if any(self.target_shape):
            targets = self.spread(self.target_shape, 0, "target_shape")
            excess = [size_of(f, "a spatial axis") - t for f, t in zip(full, targets)]
            if min(excess) < 0:
                raise ShapeError(f"target_shape {targets} exceeds the {full} that can be reached")
            pad, adjusted = tuple((e + 1) // 2 for e in excess), tuple(e % 2 for e in excess)
        size = tuple(f - 2 * p + a for f, p, a in zip(full, pad, adjusted))
        op = ConvTranspose(stride, pad * 2, dilation, self.num_group, size=size)
        y = data.graph.emit(op, data, weight)
        if not bias:
            return (y,)
        return (y + reshaped(bias[0], (1, self.num_filter, *(1,) * len(self.kernel))),)


@dataclass(frozen=True)
class FullyConnected(Operator, spelling="FullyConnected"):
    """A dense layer over everything but the batch, or over the last axis only."""

    num_hidden: int
    no_bias: bool = False
    flatten: bool = True

    def arguments(self) -> tuple[str, ...]:
        return ("data", "weight") if self.no_bias else ("data", "weight", "bias")

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        data, weight, *bias = shapes
        if data is not None:
            features = product(data[1:]) if self.flatten else data[-1]
            weight = known(weight, (self.num_hidden, features))
        return (data, weight, *(known(b, (self.num_hidden,)) for b in bias))

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        data, *weights = inputs
        leading = data.shape[:1] if self.flatten else data.shape[:-1]
        features = product(data.shape[len(leading) :])
        rows = reshaped(data, (product(leading), features))
        y = data.graph.emit(Dense(), rows, *weights)
        return (reshaped(y, (*leading, self.num_hidden)),)


@dataclass(frozen=True)
class Dot(Operator, spelling="dot"):
    """The last axis of the left operand against the first of the right one, or as transposed."""

    transpose_a: bool = False
    transpose_b: bool = False
    forward_stype: Literal["default", "row_sparse", "csr"] | None = None

    def arguments(self) -> tuple[str, ...]:
        return ("lhs", "rhs")

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        a, b = inputs
        left = a.shape[1:] if self.transpose_a else a.shape[:-1]
        right = b.shape[:-1] if self.transpose_b else b.shape[1:]
        inner_a = a.shape[0 if self.transpose_a else -1]
        inner_b = b.shape[-1 if self.transpose_b else 0]
        matrix_a = (inner_a, product(left)) if self.transpose_a else (product(left), inner_a)
        matrix_b = (product(right), inner_b) if self.transpose_b else (inner_b, product(right))
        op = MatMul(transpose_a=self.transpose_a, transpose_b=self.transpose_b)
        y = a.graph.emit(op, reshaped(a, matrix_a), reshaped(b, matrix_b))
        return (reshaped(y, (*left, *right) or (1,)),)
