"""Pooling over one to three spatial axes, and UpSampling.

    valid  H_out = floor((H + 2p - k) / s) + 1
    full   H_out = ceil((H + 2p - k) / s) + 1
    same   H_out = ceil((H + 2p) / s)                     one spatial axis only

Window i reads [i s - p, min(i s - p + k, H + p)). An average divides by that length (padding
counted, overhang not) or, without `count_include_pad`, by the elements inside the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from branchgraph.ir import builder, functions
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.conv import ConvTranspose
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.mx.attributes import Shape as Sizes
from branchgraph.mx.operators.base import Operator, Shapes, counted, known, size_of


@dataclass(frozen=True)
class Pooling(Operator, spelling="Pooling"):
    """Maximum, average, sum or p-norm of windows, or of all positions."""

    kernel: Sizes = ()
    pool_type: Literal["max", "avg", "sum", "lp"] = "max"
    global_pool: bool = False
    cudnn_off: bool = False
    pooling_convention: Literal["valid", "full", "same"] = "valid"
    stride: Sizes = ()
    pad: Sizes = ()
    p_value: int | None = None
    count_include_pad: bool | None = None
    layout: str | None = None

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        axes = len(x.shape) - 2
        if not 1 <= axes <= 3:
            raise ShapeError(f"Pooling: the data is [N, C, spatial...], got {x.type}")
        if self.global_pool:
            size = tuple(size_of(d, "global pooling") for d in x.shape[2:])
            return (self._pooled(x, size, (1,) * axes, (0,) * (2 * axes), False),)
        if len(self.kernel) != axes:
            raise ShapeError(f"Pooling: kernel {self.kernel} does not fit {axes} spatial axes")
        stride, pad = self.stride or (1,) * axes, self.pad or (0,) * axes
        if self.pooling_convention != "same":
            cover = self.pooling_convention == "full"
            return (self._pooled(x, self.kernel, stride, pad * 2, cover),)
        if axes != 1:
            raise ShapeError("Pooling: the convention same is for one spatial axis")
        overhang = (pad[0], pad[0] + self.kernel[0] - 1)
        return (self._pooled(x, self.kernel, stride, overhang, False),)

    def _pooled(self, x: Value, kernel: Sizes, stride: Sizes, pad: Sizes, cover: bool) -> Value:
        if self.pool_type == "max":
            return x.graph.emit(MaxPool(kernel, stride, pad, cover), x)
        if self.pool_type == "lp":
            p = self.p_value
            if p not in (1, 2):
                raise ShapeError(f"Pooling: p_value is 1 or 2, got {p}")
            return functions.lp_pool(x, kernel, p, stride=stride, pad=pad, cover_all=cover)
        if self.pool_type == "sum":
            return functions.sum_pool(x, kernel, stride=stride, pad=pad, cover_all=cover)
        inside = self.count_include_pad is False
        if self.pooling_convention == "same" and not self.global_pool and not inside:
            # The overhang is written as padding and must not count: make the real padding cells.
            x = functions.pad(x, (0, 0, pad[0]), (0, 0, pad[0]))
            pad, inside = (0, kernel[0] - 1), True
        divisor = "inside" if inside else "padded"
        return x.graph.emit(AveragePool(kernel, stride, pad, cover, divisor), x)


@dataclass(frozen=True)
class PoolingV1(Pooling, spelling="Pooling_v1"):
    """Pooling under its older name."""


@dataclass(frozen=True)
class UpSampling(Operator, spelling="UpSampling"):
    """Images enlarged by a whole number, by repetition or by a learnable bilinear filter.

    Bilinear is a transposed convolution of every channel by itself with kernel 2 scale - scale mod
    2, stride `scale` and padding ceil((scale - 1) / 2). Several images are brought to the size of
    the first one enlarged and joined by `multi_input_mode`.
    """

    scale: int
    sample_type: Literal["nearest", "bilinear"]
    num_args: int = 1
    num_filter: int = 0
    multi_input_mode: Literal["concat", "sum"] = "concat"
    workspace: int = 512

    def arguments(self) -> tuple[str, ...]:
        if self.sample_type == "bilinear":
            return ("data", "weight")
        return ("data",) if self.num_args == 1 else counted(self.num_args)

    @property
    def _window(self) -> int:
        return 2 * self.scale - self.scale % 2

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        if self.sample_type == "nearest" or shapes[0] is None:
            return shapes
        return (shapes[0], known(shapes[1], (shapes[0][1], 1, self._window, self._window)))

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        first = inputs[0]
        if len(first.shape) != 4 or self.scale < 1:
            raise ShapeError(f"UpSampling: [N, C, H, W] by a scale of 1 or more, got {first.type}")
        size = tuple(size_of(d, "UpSampling") * self.scale for d in first.shape[2:])
        if self.sample_type == "bilinear":
            pad = (self.scale // 2,) * 4
            stride, groups = (self.scale,) * 2, size_of(first.shape[1], "the number of channels")
            op = ConvTranspose(stride, pad, (1, 1), groups, size=size)
            return (first.graph.emit(op, *inputs),)
        large = [self._repeated(x, size) for x in inputs]
        if len(large) == 1:
            return (large[0],)
        join = builder.concat if self.multi_input_mode == "concat" else builder.merge_sum
        return (join(*large),)

    def _repeated(self, x: Value, size: Sizes) -> Value:
        """x with its pixels repeated until it has `size`."""
        own = [size_of(d, "UpSampling") for d in x.shape[2:]]
        if any(s % d for s, d in zip(size, own)):
            raise ShapeError(f"UpSampling: {own} does not divide {size}")
        return functions.resize_nearest(x, size=(size[0], size[1]))
