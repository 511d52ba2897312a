"""Normalisation: batch norm in its declared, training and inference forms, and LRN.

Batch norm (Ioffe & Szegedy 2015), channels on axis 1, m elements a channel:

    mu = mean x,  var = mean (x - mu)^2                        over the batch and spatial axes
    xhat = (x - mu) / sqrt(var + eps),   y = gamma xhat + beta
    running_mean <- decay running_mean + (1 - decay) mu
    running_var  <- decay running_var  + (1 - decay) var m / max(m - 1, 1)      if unbiased
    dx = gamma / sqrt(var + eps) (dy - (sum dy + xhat sum dy xhat) / m)

The running rule is no part of any op: `specialise` writes it as ordinary nodes and updates.

Local response normalisation across channels (Krizhevsky et al. 2012), half = size // 2:

    y[c] = x[c] / (k + alpha sum_{|j - c| <= half} x[j]^2)^beta
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import DimLike, Shape, product
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.lowering import Lowering
from branchgraph.ir.op import Cotangents, Op, Wanted, make, require, require_float
from branchgraph.ir.ops.constant import Extent
from branchgraph.ir.ops.reduce import BroadcastTo, ReduceSum
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.types import TensorType


def _check_channels(inputs: tuple[TensorType, ...]) -> None:
    require_float(*inputs)
    x, *vectors = inputs
    require(x.rank >= 2, f"x needs a batch and a channel axis, got {x}")
    for t in vectors:
        require(t.shape == x.shape[1:2], f"statistics of {x} have shape [{x.shape[1]}], got {t}")


def _column(vector: np.ndarray, rank: int) -> np.ndarray:
    """A per-channel vector that broadcasts against an array of `rank` axes."""
    return vector.reshape(-1, *(1,) * (rank - 2))


def _reduced_axes(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank))


@dataclass(frozen=True)
class _Normalise(Op):
    eps: float = 2e-5

    def check(self) -> None:
        if not self.eps > 0:
            raise GraphError(f"eps must be positive, got {self.eps}")


@dataclass(frozen=True)
class BatchNorm(
    _Normalise, opcode="batch_norm", operands=("x", "gamma", "beta", "running_mean", "running_var")
):
    """Declared batch norm: `specialise` chooses batch or running statistics.

    `decay` is the weight of the old running value (0.9 in Chainer and MXNet, 0.9 = 1 - momentum in
    PyTorch); `unbiased` says whether the running variance takes the unbiased batch variance
    (Chainer and PyTorch do, MXNet does not).
    """

    decay: float = 0.9
    unbiased: bool = True
    declared = True

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        _check_channels(inputs)
        return inputs[:1]

    def lower(self, inputs: tuple[Value, ...], lowering: Lowering) -> tuple[Value, ...]:
        x, gamma, beta, running_mean, running_var = inputs
        graph = x.graph
        if not lowering.training:
            mean, var = (lowering.latest(v) for v in (running_mean, running_var))
            return graph.apply(BatchNormInference(eps=self.eps), x, gamma, beta, mean, var)
        y, mean, var = graph.apply(BatchNormTraining(eps=self.eps), x, gamma, beta)
        lowering.on_statistics(lambda: self._update(lowering, x, (running_mean, mean), None))
        count = product(x.shape[a] for a in _reduced_axes(len(x.shape)))
        lowering.on_statistics(lambda: self._update(lowering, x, (running_var, var), count))
        return (y,)

    def _update(
        self, lowering: Lowering, x: Value, pair: tuple[Value, Value], count: DimLike | None
    ) -> None:
        """running <- decay running + (1 - decay) batch, the batch variance made unbiased."""
        running, batch = pair
        graph = x.graph
        if count is not None and self.unbiased:
            m = graph.emit(Extent(dim=count, dtype=batch.dtype))
            one = graph.constant(1.0, batch.dtype)
            others = graph.emit(make("maximum"), m - 1.0, one)
            batch = batch * (m / others)
        old = lowering.latest(running)
        lowering.set(running, old * self.decay + batch * (1.0 - self.decay))

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return rows[0]


@dataclass(frozen=True)
class BatchNormTraining(_Normalise, opcode="batch_norm_training", operands=("x", "gamma", "beta")):
    """Batch norm by the statistics of the batch: (y, mean, biased variance)."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        _check_channels(inputs)
        return (inputs[0], inputs[1], inputs[1])

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, gamma, beta = inputs
        axes = _reduced_axes(x.ndim)
        mean = x.mean(axis=axes, dtype=x.dtype)
        centred = x - _column(mean, x.ndim)
        var = np.mean(centred * centred, axis=axes, dtype=x.dtype)
        scale = gamma / np.sqrt(var + x.dtype.type(self.eps))
        return (centred * _column(scale, x.ndim) + _column(beta, x.ndim), mean, var)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        dy, dmean, dvar = cotangents
        x, gamma, _ = node.inputs
        _, mean, var = node.outputs
        graph = node.graph
        dx: Value | None = None
        dgamma: Value | None = None
        dbeta: Value | None = None
        if dy is not None:
            back = BatchNormGradient(eps=self.eps)
            dx, dgamma, dbeta = graph.apply(back, x, gamma, mean, var, dy)
        for term in self._statistics_terms(x, mean, dmean, dvar):
            dx = term if dx is None else dx + term
        return (dx, dgamma, dbeta)

    def _statistics_terms(
        self, x: Value, mean: Value, dmean: Value | None, dvar: Value | None
    ) -> list[Value]:
        """dmean/m and 2 dvar (x - mean)/m, when something depends on the statistics."""
        m = product(x.shape[a] for a in _reduced_axes(len(x.shape)))
        terms = []
        if dmean is not None:
            terms.append(_spread(dmean / _extent(dmean, m), x.shape))
        if dvar is not None:
            centred = x - _spread(mean, x.shape)
            terms.append(centred * _spread(dvar * 2.0 / _extent(dvar, m), x.shape))
        return terms


def _extent(like: Value, count: DimLike) -> Value:
    return like.graph.emit(Extent(dim=count, dtype=like.dtype))


def _spread(vector: Value, shape: Shape) -> Value:
    """A per-channel vector in the shape of the activations."""
    graph = vector.graph
    column: Shape = (1, shape[1], *(1,) * (len(shape) - 2))
    return graph.emit(BroadcastTo(shape=shape), graph.emit(Reshape(shape=column), vector))


@dataclass(frozen=True)
class BatchNormGradient(
    _Normalise, opcode="batch_norm_gradient", operands=("x", "gamma", "mean", "var", "dy")
):
    """(dx, dgamma, dbeta) of `BatchNormTraining`, from its saved statistics."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, gamma, mean, var, dy = inputs
        _check_channels((x, gamma, mean, var))
        require(dy == x, f"dy must have the type of x, got {dy} and {x}")
        return (x, gamma, gamma)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, gamma, mean, var, dy = inputs
        axes, rank = _reduced_axes(x.ndim), x.ndim
        m = x.dtype.type(x.size // max(gamma.size, 1))
        deviation = np.sqrt(var + x.dtype.type(self.eps))
        xhat = (x - _column(mean, rank)) / _column(deviation, rank)
        dbeta = dy.sum(axis=axes, dtype=x.dtype)
        dgamma = (dy * xhat).sum(axis=axes, dtype=x.dtype)
        inner = dy - (_column(dbeta, rank) + xhat * _column(dgamma, rank)) / m
        return (inner * _column(gamma / deviation, rank), dgamma, dbeta)


@dataclass(frozen=True)
class BatchNormInference(
    _Normalise, opcode="batch_norm_inference", operands=("x", "gamma", "beta", "mean", "var")
):
    """Batch norm by given statistics: y = gamma (x - mean) / sqrt(var + eps) + beta."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        _check_channels(inputs)
        return inputs[:1]

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, gamma, beta, mean, var = inputs
        scale = gamma / np.sqrt(var + x.dtype.type(self.eps))
        shift = beta - mean * scale
        return (x * _column(scale, x.ndim) + _column(shift, x.ndim),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        x, gamma, _, mean, var = node.inputs
        graph = dy.graph
        inverse = 1.0 / graph.emit(make("sqrt"), var + self.eps)
        axes = ReduceSum(axes=_reduced_axes(len(x.shape)))
        dx = dy * _spread(gamma * inverse, x.shape) if wanted[0] else None
        dbeta = graph.emit(axes, dy)
        centred = x - _spread(mean, x.shape)
        dgamma = graph.emit(axes, dy * centred) * inverse
        dmean = -(dbeta * gamma * inverse)
        dvar = dgamma * gamma * -0.5 * inverse * inverse
        return (dx, dgamma, dbeta, dmean, dvar)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return rows[0] and not any(rows[1:])


@dataclass(frozen=True)
class _ResponseNorm(Op):
    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 2.0

    def check(self) -> None:
        if self.size < 1:
            raise GraphError(f"lrn: size is at least 1, got {self.size}")

    def window_sum(self, x: np.ndarray) -> np.ndarray:
        """Sum over the channel window around each channel, clipped at the borders."""
        total: np.ndarray = x.copy()
        for shift in range(1, self.size // 2 + 1):
            if shift >= x.shape[1]:
                break
            total[:, shift:] += x[:, :-shift]
            total[:, :-shift] += x[:, shift:]
        return total

    def denominator(self, x: np.ndarray) -> np.ndarray:
        """s = k + alpha sum x^2."""
        t = x.dtype.type
        result: np.ndarray = t(self.k) + t(self.alpha) * self.window_sum(x * x)
        return result

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows)


@dataclass(frozen=True)
class LocalResponseNorm(_ResponseNorm, opcode="lrn", operands=("x",)):
    """y = x / (k + alpha sum of squares over the channel window)^beta; alpha is not divided."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        require_float(inputs[0])
        require(inputs[0].rank >= 2, f"x needs a channel axis, got {inputs[0]}")
        return inputs

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        return (x * self.denominator(x) ** x.dtype.type(-self.beta),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        back = LocalResponseNormGradient(self.size, self.alpha, self.beta, self.k)
        return (dy.graph.emit(back, node.inputs[0], dy),)


@dataclass(frozen=True)
class LocalResponseNormGradient(_ResponseNorm, opcode="lrn_gradient", operands=("x", "dy")):
    """The gradient of LRN in x, with s the denominator before the power.

    dx[c] = dy[c] s[c]^-beta - 2 alpha beta x[c] sum_{|j - c| <= half} dy[j] x[j] s[j]^(-beta-1)
    """

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, dy = inputs
        require(x == dy, f"x and dy must have one type, got {x} and {dy}")
        return (x,)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, dy = inputs
        t = x.dtype.type
        s = self.denominator(x)
        power = s ** t(-self.beta)
        neighbours = self.window_sum(dy * x * power / s)
        return (dy * power - t(2 * self.alpha * self.beta) * x * neighbours,)
