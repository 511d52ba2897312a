"""Convolution with a kernel of its own for every sample, and the two maps that are its transposes.

    y[n, o, h] = b[n, o] + sum_{c < C/G, i < k} W[n, o, c, i] x[n, q(o) C/G + c, h s + i d - p]

with the indices of `ir.ops.conv`: sample n is convolved with W[n]. It is what a mixture of kernels
leaves once the mixture is known (Yang et al., "CondConv", arXiv 1904.04971; Chen et al., "Dynamic
convolution", arXiv 1912.03458; ParaDise's PD-B).

Samples fold into groups: x as [1, N C, ...] and W as [N O, C/G, ...] with N G groups is an ordinary
convolution, and so are the transposes. The three are closed under differentiation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from branchgraph.ir.dims import DimLike, product
from branchgraph.ir.graph import Node
from branchgraph.ir.op import Cotangents, Wanted, require, require_float
from branchgraph.ir.ops.conv import Conv, ConvTranspose, ConvWeightGradient, _Window
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.types import TensorType

_Folded = TypeVar("_Folded", bound=_Window)


@dataclass(frozen=True)
class _SampleWindow(_Window):
    """Geometry of one sample's convolution, and the folding of samples into groups."""

    def check_batch(self, a: TensorType, b: TensorType) -> None:
        require(a.shape[0] == b.shape[0], f"batches differ: {a} and {b}")

    def check_weights(self, weights: TensorType) -> None:
        rank = self.axes + 3
        require(
            weights.rank == rank,
            f"weights are [N, O, C/groups, *kernel], {rank} axes, got {weights}",
        )

    def of_one(self, weights: TensorType) -> TensorType:
        """The type of one sample's kernel."""
        return TensorType(weights.shape[1:], weights.dtype)

    def folded(self, op: _Folded, samples: int) -> _Folded:
        """`op` with as many groups as the samples have together."""
        return dataclasses.replace(op, groups=op.groups * samples)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows)


def _as_channels(x: np.ndarray) -> np.ndarray:
    """[N, C, ...] as [1, N C, ...]."""
    return x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])


def _as_filters(weights: np.ndarray) -> np.ndarray:
    """[N, O, ...] as [N O, ...]."""
    return np.reshape(weights, (weights.shape[0] * weights.shape[1], *weights.shape[2:]))


@dataclass(frozen=True)
class SampleConv(_SampleWindow, opcode="sample_conv", operands=("x", "weights", "biases?")):
    """Sample n of x convolved with its own kernel weights[n].

    x: [N, C, *size], weights: [N, O, C/groups, *kernel], biases: [N, O].
    """

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(*inputs)
        x, weights, *biases = inputs
        self.require_rank(x)
        self.check_weights(weights)
        self.check_batch(x, weights)
        kernel = self.of_one(weights)
        self.require_channels(x.shape[1], kernel)
        filters = weights.shape[1]
        expected = (x.shape[0], filters)
        fits = all(b.shape == expected for b in biases)
        require(fits, f"biases must have shape [{x.shape[0]}, {filters}]")
        out = self.out_size(x.shape[2:], kernel.shape[2:])
        return (TensorType((*expected, *out), x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, weights, *biases = inputs
        n, filters = weights.shape[:2]
        out = self.out_size(x.shape[2:], weights.shape[3:])
        shape = (n, filters, *(int(d) for d in out if isinstance(d, int)))
        if n == 0:
            return (np.zeros(shape, x.dtype),)
        conv = self.folded(Conv(**self.geometry()), n)
        y = conv.evaluate(_as_channels(x), _as_filters(weights))[0].reshape(shape)
        return (y + biases[0].reshape(n, filters, *(1,) * self.axes) if biases else y,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        x, weights, *biases = node.inputs
        graph, geometry = dy.graph, self.geometry()
        dx = dweights = None
        if wanted[0]:
            dx = graph.emit(SampleConvTranspose(**geometry, size=x.shape[2:]), dy, weights)
        if wanted[1]:
            back = SampleConvWeightGradient(**geometry, kernel=weights.shape[3:])
            dweights = graph.emit(back, x, dy)
        if not biases:
            return (dx, dweights)
        spatial = ReduceSum(axes=tuple(range(2, 2 + self.axes)))
        return (dx, dweights, graph.emit(spatial, dy) if wanted[2] else None)

    def macs(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> DimLike:
        return product(inputs[1].shape[2:]) * outputs[0].size


@dataclass(frozen=True)
class SampleConvTranspose(
    _SampleWindow, opcode="sample_conv_transpose", operands=("dy", "weights")
):
    """The transpose of `SampleConv` in x: dx of spatial `size` from dy: [N, O, *out]."""

    size: tuple[DimLike, ...] = ()

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(*inputs)
        dy, weights = inputs
        self.check_weights(weights)
        self.check_batch(dy, weights)
        return ConvTranspose(**self.geometry(), size=self.size).infer(dy, self.of_one(weights))

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        dy, weights = inputs
        n, channels = len(dy), weights.shape[2] * self.groups
        shape = (n, channels, *(int(d) for d in self.size if isinstance(d, int)))
        if n == 0:
            return (np.zeros(shape, dy.dtype),)
        back = self.folded(ConvTranspose(**self.geometry(), size=self.size), n)
        return (back.evaluate(_as_channels(dy), _as_filters(weights))[0].reshape(shape),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dx,) = cotangents
        assert dx is not None
        dy, weights = node.inputs
        graph, geometry = dx.graph, self.geometry()
        d_dy = graph.emit(SampleConv(**geometry), dx, weights) if wanted[0] else None
        back = SampleConvWeightGradient(**geometry, kernel=weights.shape[3:])
        return (d_dy, graph.emit(back, dx, dy) if wanted[1] else None)

    def macs(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> DimLike:
        return product(inputs[1].shape[2:]) * inputs[0].size


@dataclass(frozen=True)
class SampleConvWeightGradient(
    _SampleWindow, opcode="sample_conv_weight_gradient", operands=("x", "dy")
):
    """The transpose of `SampleConv` in the weights: [N, O, C/groups, *kernel], summed over space.

    dW[n, o, c, i] = sum_h dy[n, o, h] x[n, q(o) C/G + c, h s + i d - p]
    """

    kernel: tuple[DimLike, ...] = ()

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, dy = inputs
        (weight,) = ConvWeightGradient(**self.geometry(), kernel=self.kernel).infer(x, dy)
        return (TensorType((x.shape[0], *weight.shape), x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, dy = inputs
        kernel = (int(k) for k in self.kernel if isinstance(k, int))
        shape = (len(x), dy.shape[1], x.shape[1] // self.groups, *kernel)
        if len(x) == 0:
            return (np.zeros(shape, x.dtype),)
        back = self.folded(ConvWeightGradient(**self.geometry(), kernel=self.kernel), len(x))
        return (back.evaluate(_as_channels(x), _as_channels(dy))[0].reshape(shape),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dweights,) = cotangents
        assert dweights is not None
        x, dy = node.inputs
        graph, geometry = dweights.graph, self.geometry()
        back = SampleConvTranspose(**geometry, size=x.shape[2:])
        dx = graph.emit(back, dy, dweights) if wanted[0] else None
        return (dx, graph.emit(SampleConv(**geometry), x, dweights) if wanted[1] else None)

    def macs(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> DimLike:
        return product(outputs[0].shape[2:]) * inputs[1].size
