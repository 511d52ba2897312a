"""What happens to gradients between back-propagation and the update, as ordinary nodes.

    WeightDecay           g <- g + rate p
    Lasso                 g <- g + rate sign(p)
    GradientClipping      g <- g threshold / max(norm, threshold), norm over all gradients together
    GradientHardClipping  g <- clip(g, lower, upper)
    GradientLARS          g <- r (g + wd p), r = |p| / (eps + |g| + wd |p|) where |p| > threshold,
                          else 1 (You, Gitman & Ginsburg, arXiv 1708.03888)
    GradientNoise         g <- g + N(0, eta / (1 + t)^0.55), t updates done before
                          (Neelakantan et al., arXiv 1511.06807)

The functions emit nodes for any front end; the classes are given to an optimiser as `hooks` and are
applied in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.lowering import Lowering
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import cast, compare, where
from branchgraph.ir.ops.random import uniform
from branchgraph.ir.state import State
from branchgraph.ir.types import DType

# -- formulas --------------------------------------------------------------------------------------


def weight_decay(p: Value, g: Value, rate: Value) -> Value:
    """The gradient of half the squared norm, added."""
    return g + p * rate


def lasso(p: Value, g: Value, rate: Value) -> Value:
    """The gradient of the absolute norm, added."""
    zero = p.graph.constant(0.0, p.dtype)
    not_above = where(compare("less", p, zero), -rate, zero)
    return g + where(compare("greater", p, zero), rate, not_above)


def hard_clipping(p: Value, g: Value, lower: Value, upper: Value) -> Value:
    """Each element clipped to the bounds."""
    raised = where(compare("less", g, lower), lower, g)
    return where(compare("greater", raised, upper), upper, raised)


def lars(p: Value, g: Value, threshold: Value, decay: Value, eps: Value) -> Value:
    """The gradient scaled to the norm of its parameter."""
    norm = _root(_sum_of_squares(p))
    rate = norm / (_root(_sum_of_squares(g)) + eps + norm * decay)
    one = p.graph.constant(1.0, p.dtype)
    return (g + p * decay) * where(compare("greater", norm, threshold), rate, one)


def norm_clipping(threshold: Value, gradients: Sequence[Value]) -> tuple[Value, ...]:
    """All gradients scaled so that their common 2-norm is at most `threshold` (f64[])."""
    squares = [cast(_sum_of_squares(g), DType.F64) for g in gradients]
    norm = _root(threshold.graph.emit(make("sum"), *squares))
    # Dividing by the greater of both makes the factor exactly 1 below the threshold.
    rate = threshold / where(compare("greater", norm, threshold), norm, threshold)
    return tuple(g * cast(rate, g.dtype) for g in gradients)


def _sum_of_squares(x: Value) -> Value:
    axes = tuple(range(len(x.shape)))
    return x.graph.emit(make("reduce_sum", axes=axes), x * x)


def _root(x: Value) -> Value:
    return x.graph.emit(make("sqrt"), x)


# -- hooks of the native optimisers ----------------------------------------------------------------

Gradients = Mapping[State, Value]


@dataclass(frozen=True)
class Hook:
    """Base: changes the gradients of a graph; `t` is the number of this update, from 1 (f64[])."""

    #: Whether the hook depends on `t`.
    counted: ClassVar[bool] = False

    def apply(self, graph: Graph, gradients: Gradients, t: Value) -> dict[State, Value]:
        """The new gradients."""
        return {s: self.change(graph.read(s), g, t) for s, g in gradients.items()}

    def change(self, p: Value, g: Value, t: Value) -> Value:
        """The new gradient of one parameter."""
        raise NotImplementedError


def _numbers(like: Value, *numbers: float) -> list[Value]:
    return [like.graph.constant(n, like.dtype) for n in numbers]


@dataclass(frozen=True)
class WeightDecay(Hook):
    """g + rate p, on every parameter, biases included."""

    rate: float

    def change(self, p: Value, g: Value, t: Value) -> Value:
        return weight_decay(p, g, *_numbers(g, self.rate))


@dataclass(frozen=True)
class Lasso(Hook):
    """g + rate sign(p)."""

    rate: float

    def change(self, p: Value, g: Value, t: Value) -> Value:
        return lasso(p, g, *_numbers(g, self.rate))


@dataclass(frozen=True)
class GradientHardClipping(Hook):
    """Each element clipped to [lower, upper]."""

    lower: float
    upper: float

    def change(self, p: Value, g: Value, t: Value) -> Value:
        return hard_clipping(p, g, *_numbers(g, self.lower, self.upper))


@dataclass(frozen=True)
class GradientLARS(Hook):
    """The gradient scaled to the norm of its parameter."""

    threshold: float = 1e-2
    weight_decay: float = 0.0
    eps: float = 1e-9

    def change(self, p: Value, g: Value, t: Value) -> Value:
        return lars(p, g, *_numbers(g, self.threshold, self.weight_decay, self.eps))


@dataclass(frozen=True)
class GradientClipping(Hook):
    """All gradients scaled so that their common 2-norm is at most `threshold`."""

    threshold: float

    def apply(self, graph: Graph, gradients: Gradients, t: Value) -> dict[State, Value]:
        threshold = graph.constant(self.threshold, DType.F64)
        return dict(zip(gradients, norm_clipping(threshold, list(gradients.values()))))


@dataclass(frozen=True)
class GradientNoise(Hook):
    """Normal noise of variance eta / (1 + t)^0.55, t updates done before, from its own streams.

    Drawn by Box and Muller's transform: sqrt(-2 ln u) cos(2 pi v).
    """

    eta: float
    counted = True

    def apply(self, graph: Graph, gradients: Gradients, t: Value) -> dict[State, Value]:
        lowering = Lowering(graph, training=True, statistics="none", randomness="counter")
        deviation = _root(graph.emit(make("exp"), _log(t) * -0.55) * self.eta)
        noisy = {}
        for state, g in gradients.items():
            noisy[state] = g + _normal(lowering, g) * cast(deviation, g.dtype)
        for state, value in lowering.finish().items():
            graph.update(state, value)
        return noisy


def _log(x: Value) -> Value:
    return x.graph.emit(make("log"), x)


def _normal(lowering: Lowering, like: Value) -> Value:
    """N(0, 1) in the shape of `like`."""
    graph = lowering.graph
    stream = 1 + max((getattr(n.op, "stream", -1) for n in graph.nodes), default=-1)
    u, v = (uniform(lowering, stream + k, like.type) for k in (0, 1))
    radius = _root(_log(1.0 - u) * -2.0)
    return radius * graph.emit(make("cos"), v * (2.0 * math.pi))
