"""Convolution over any number of spatial axes, and the two maps that are its transposes.

With kernel size k, stride s, dilation d, leading pad p, groups G and x zero outside its support
(written for one spatial axis h; the others alike):

    y[n, o, h] = b[o] + sum_{c < C/G, i < k} W[o, c, i] x[n, q(o) C/G + c, h s + i d - p]
    q(o)       = floor(o / (O/G))
    H_out      = floor((H + p + p' - d (k - 1) - 1) / s) + 1

It is cross-correlation (no flip). `ConvTranspose` is its transpose in x and `ConvWeightGradient`
the one in W, so the three are closed under differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from branchgraph.ir.dims import DimLike, is_positive, product
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import Cotangents, Op, Wanted, carries_first, require, require_float
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.types import TensorType

_ALL = slice(None)


@dataclass(frozen=True)
class _Window(Op):
    """Geometry shared by the three maps; `pad` lists leading pads, then trailing ones."""

    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def check(self) -> None:
        n = len(self.stride)
        if n == 0:
            raise GraphError("convolution needs at least one spatial axis")
        if len(self.pad) != 2 * n or len(self.dilation) != n:
            raise GraphError(f"convolution over {n} axes needs {2 * n} pads and {n} dilations")
        if min(*self.stride, *self.dilation, self.groups) < 1 or min(self.pad) < 0:
            raise GraphError("stride, dilation and groups are at least 1, pad is not negative")

    @property
    def axes(self) -> int:
        return len(self.stride)

    @property
    def begin(self) -> tuple[int, ...]:
        return self.pad[: self.axes]

    @property
    def end(self) -> tuple[int, ...]:
        return self.pad[self.axes :]

    def out_size(
        self, size: tuple[DimLike, ...], kernel: tuple[DimLike, ...]
    ) -> tuple[DimLike, ...]:
        result = []
        for a, (h, k) in enumerate(zip(size, kernel)):
            reach = h + self.begin[a] + self.end[a] - (k - 1) * self.dilation[a] - 1
            require(is_positive(reach + 1), f"kernel {k} exceeds padded size on spatial axis {a}")
            result.append(reach // self.stride[a] + 1)
        return tuple(result)

    def require_rank(self, *types: TensorType) -> None:
        rank = self.axes + 2
        for t in types:
            require(t.rank == rank, f"{self.axes} spatial axes need rank {rank}, got {t}")

    def require_channels(self, x_channels: DimLike, weight: TensorType) -> None:
        g = self.groups
        require(
            x_channels == weight.shape[1] * g,
            f"x has {x_channels} channels, weight reads {weight.shape[1] * g}"
            + (f" ({weight.shape[1]} in each of {g} groups)" if g > 1 else ""),
        )
        require(weight.shape[0] % g == 0, f"{weight.shape[0]} filters in {g} groups")

    def geometry(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("stride", "pad", "dilation", "groups")}

    # -- columns -------------------------------------------------------------------------------

    def columns(self, x: np.ndarray, kernel: tuple[int, ...]) -> np.ndarray:
        """Patches of x as [N, G, C/G * prod(kernel), prod(out)]."""
        padded = np.pad(x, [(0, 0), (0, 0), *zip(self.begin, self.end)]) if any(self.pad) else x
        reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, self.dilation))
        spatial = tuple(range(2, 2 + self.axes))
        windows = sliding_window_view(padded, reach, axis=spatial)
        steps = (slice(None, None, s) for s in self.stride)
        taps = (slice(None, None, d) for d in self.dilation)
        index = (_ALL, _ALL, *steps, *taps)
        windows = windows[index]
        n, c = x.shape[:2]
        out = windows.shape[2 : 2 + self.axes]
        order = (0, 1, *range(2 + self.axes, 2 + 2 * self.axes), *spatial)
        patches = c // self.groups * int(np.prod(kernel))
        columns: np.ndarray = windows.transpose(order)
        return columns.reshape(n, self.groups, patches, int(np.prod(out)))

    def uncolumns(
        self, columns: np.ndarray, size: tuple[int, ...], kernel: tuple[int, ...],
        out: tuple[int, ...],
    ) -> np.ndarray:  # fmt: skip
        """The transpose of `columns`: patches added back into an array of `size`."""
        n = columns.shape[0]
        c = columns.shape[1] * columns.shape[2] // int(np.prod(kernel))
        patches = columns.reshape(n, c, *kernel, *out)
        padded = np.zeros(
            (n, c, *(b + h + e for b, h, e in zip(self.begin, size, self.end))), columns.dtype
        )
        for tap in np.ndindex(*kernel):
            starts = [i * d for i, d in zip(tap, self.dilation)]
            where = tuple(
                slice(i, i + (o - 1) * s + 1, s) for i, o, s in zip(starts, out, self.stride)
            )
            target, source = (_ALL, _ALL, *where), (_ALL, _ALL, *tap)
            padded[target] += patches[source]
        inner = (slice(b, b + h) for b, h in zip(self.begin, size))
        index = (_ALL, _ALL, *inner)
        return padded[index]


@dataclass(frozen=True)
class Conv(_Window, opcode="conv", operands=("x", "weight", "bias?")):
    """Convolution. x: [N, C, *size], weight: [O, C/groups, *kernel], bias: [O]."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(*inputs)
        x, weight, *bias = inputs
        self.require_rank(x, weight)
        self.require_channels(x.shape[1], weight)
        filters = weight.shape[0]
        require(all(b.shape == (filters,) for b in bias), f"bias must have shape [{filters}]")
        out = self.out_size(x.shape[2:], weight.shape[2:])
        return (TensorType((x.shape[0], filters, *out), x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, weight, *bias = inputs
        kernel = weight.shape[2:]
        out = self.out_size(x.shape[2:], kernel)
        filters = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        y = np.matmul(filters, self.columns(x, kernel)).astype(x.dtype, copy=False)
        y = y.reshape(x.shape[0], weight.shape[0], *out)
        return (y + bias[0].reshape(-1, *(1,) * self.axes) if bias else y,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        x, weight, *bias = node.inputs
        graph, geometry = dy.graph, self.geometry()
        dx = dweight = dbias = None
        if wanted[0]:
            dx = graph.emit(ConvTranspose(**geometry, size=x.shape[2:]), dy, weight)
        if wanted[1]:
            dweight = graph.emit(
                ConvWeightGradient(**geometry, kernel=_sizes(weight)),
                x,
                dy,
            )
        if not bias:
            return (dx, dweight)
        if wanted[2]:
            dbias = graph.emit(ReduceSum(axes=(0, *range(2, 2 + self.axes))), dy)
        return (dx, dweight, dbias)

    def macs(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> DimLike:
        return product(inputs[1].shape[1:]) * outputs[0].size

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return carries_first(inputs, rows)


def _sizes(weight: Value) -> tuple[DimLike, ...]:
    return weight.shape[2:]


@dataclass(frozen=True)
class ConvTranspose(_Window, opcode="conv_transpose", operands=("dy", "weight")):
    """The transpose of `Conv` in x: dx of spatial `size` from dy [N, O, *out], weight [O, C/g, *k].

    It is also the transposed convolution ("deconvolution") layer, with the weight in that layout.
    """

    size: tuple[DimLike, ...] = ()

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(*inputs)
        dy, weight = inputs
        self.require_rank(dy, weight)
        require(
            dy.shape[1] == weight.shape[0],
            f"dy has {dy.shape[1]} channels, weight {weight.shape[0]}",
        )
        require(
            weight.shape[0] % self.groups == 0,
            f"{weight.shape[0]} filters in {self.groups} groups",
        )
        out = self.out_size(self.size, weight.shape[2:])
        require(out == dy.shape[2:], f"size {self.size} gives {out}, dy has {dy.shape[2:]}")
        return (TensorType((dy.shape[0], weight.shape[1] * self.groups, *self.size), dy.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        dy, weight = inputs
        n, g = dy.shape[0], self.groups
        out, kernel = dy.shape[2:], weight.shape[2:]
        filters = weight.reshape(g, weight.shape[0] // g, -1).transpose(0, 2, 1)
        by_group = dy.reshape(n, g, weight.shape[0] // g, int(np.prod(out)))
        columns = np.matmul(filters, by_group).astype(dy.dtype, copy=False)
        size = tuple(int(d) for d in self.size if isinstance(d, int))
        return (self.uncolumns(columns, size, kernel, out),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dx,) = cotangents
        assert dx is not None
        dy, weight = node.inputs
        geometry = self.geometry()
        d_dy = dx.graph.emit(Conv(**geometry), dx, weight) if wanted[0] else None
        transposed = ConvWeightGradient(**geometry, kernel=_sizes(weight))
        return (d_dy, dx.graph.emit(transposed, dx, dy) if wanted[1] else None)

    def macs(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> DimLike:
        return product(inputs[1].shape[1:]) * inputs[0].size

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return carries_first(inputs, rows)


@dataclass(frozen=True)
class ConvWeightGradient(_Window, opcode="conv_weight_gradient", operands=("x", "dy")):
    """The transpose of `Conv` in the weight.

    dW[o, c, i] = sum_{n, h} dy[n, o, h] x[n, c, h s + i d - p]
    """

    kernel: tuple[DimLike, ...] = ()

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(*inputs)
        x, dy = inputs
        self.require_rank(x, dy)
        require(x.shape[0] == dy.shape[0], f"batches differ: {x} and {dy}")
        require(x.shape[1] % self.groups == 0, f"{x.shape[1]} channels in {self.groups} groups")
        require(dy.shape[1] % self.groups == 0, f"{dy.shape[1]} filters in {self.groups} groups")
        out = self.out_size(x.shape[2:], self.kernel)
        require(out == dy.shape[2:], f"x gives spatial size {out}, dy has {dy.shape[2:]}")
        channels = x.shape[1] // self.groups
        return (TensorType((dy.shape[1], channels, *self.kernel), x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, dy = inputs
        n, g = x.shape[0], self.groups
        kernel = tuple(int(k) for k in self.kernel if isinstance(k, int))
        columns = self.columns(x, kernel)
        by_group = dy.reshape(n, g, dy.shape[1] // g, int(np.prod(dy.shape[2:])))
        dweight = np.matmul(by_group, columns.swapaxes(-1, -2)).sum(axis=0)
        dweight = dweight.reshape(dy.shape[1], x.shape[1] // g, *kernel)
        return (dweight.astype(x.dtype, copy=False),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dw,) = cotangents
        assert dw is not None
        x, dy = node.inputs
        geometry = self.geometry()
        back = ConvTranspose(**geometry, size=x.shape[2:])
        dx = dw.graph.emit(back, dy, dw) if wanted[0] else None
        return (dx, dw.graph.emit(Conv(**geometry), x, dw) if wanted[1] else None)

    def macs(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> DimLike:
        return product(outputs[0].shape[1:]) * inputs[1].size
