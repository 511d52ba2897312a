"""Optimiser rules: from gradients to updates, as ordinary nodes.

    SGD          p <- p - lr g
    MomentumSGD  v <- mu v - lr g;  p <- p + v
    Adam         m <- m + (1 - b1)(g - m);  v <- v + (1 - b2)(g^2 - v)
                 p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

Adam follows Kingma & Ba (arXiv 1412.6980) in the form that adds eps to the uncorrected root, as
Chainer does. The learning rate is the 0-d input `learning_rate`, so a schedule never recompiles;
scalars are computed in float64 and cast once to the parameter's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, scope
from branchgraph.ir.initialisers import Zeros
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import cast
from branchgraph.ir.rebuild import clone
from branchgraph.ir.state import Role, State
from branchgraph.ir.types import DType

LEARNING_RATE = "learning_rate"


@dataclass
class Optimiser:
    """Base: makes the states a rule needs once, and keeps them for every graph it is applied to."""

    learning_rate: float = 0.01
    slots: dict[tuple[State | None, str], State] = field(default_factory=dict, repr=False)
    spelling: ClassVar[str] = ""

    def attach(self, graph: Graph) -> Graph:
        """A copy of `graph` in which every state with a gradient is updated."""
        if not graph.gradients:
            raise GraphError("the graph has no gradients; call differentiate(graph) first")
        new = clone(graph)
        rate = new.inputs.get(LEARNING_RATE) or new.input(
            LEARNING_RATE, (), DType.F64, default=self.learning_rate
        )
        with scope("optimiser"):
            scalars = self.scalars(new, rate)
            for state, gradient in new.gradients.items():
                p = new.read(state)
                self.rule(new, state, p, gradient, tuple(cast(s, state.dtype) for s in scalars))
        return new

    def scalars(self, graph: Graph, rate: Value) -> tuple[Value, ...]:
        """Float64 scalars that all parameters share."""
        return (rate,)

    def rule(
        self, graph: Graph, state: State, p: Value, gradient: Value, scalars: tuple[Value, ...]
    ) -> None:
        """Emit the update of one parameter."""
        raise NotImplementedError

    def slot(self, graph: Graph, state: State, name: str) -> Value:
        """The optimiser's own state `name` beside a parameter."""
        key = (state, name)
        if key not in self.slots:
            full_name = f"{state.name}.{self.spelling}.{name}"
            self.slots[key] = State(full_name, state.shape, state.dtype, Role.SLOT, Zeros())
        return graph.read(self.slots[key])

    def step(self, graph: Graph) -> Value:
        """The number of this update, counted from 1, as float64."""
        key = (None, "step")
        if key not in self.slots:
            self.slots[key] = State(f"{self.spelling}.step", (), DType.I64, Role.STEP, Zeros())
        state = self.slots[key]
        count = graph.read(state) + 1
        graph.update(state, count)
        return cast(count, DType.F64)


@dataclass
class SGD(Optimiser):
    """Plain stochastic gradient descent."""

    spelling = "sgd"

    def rule(
        self, graph: Graph, state: State, p: Value, gradient: Value, scalars: tuple[Value, ...]
    ) -> None:
        (rate,) = scalars
        graph.update(state, p - gradient * rate)


@dataclass
class MomentumSGD(Optimiser):
    """Gradient descent with heavy-ball momentum."""

    momentum: float = 0.9
    spelling = "momentum_sgd"

    def rule(
        self, graph: Graph, state: State, p: Value, gradient: Value, scalars: tuple[Value, ...]
    ) -> None:
        (rate,) = scalars
        v = self.slot(graph, state, "v")
        moved = v * self.momentum - gradient * rate
        assert v.state is not None
        graph.update(v.state, moved)
        graph.update(state, p + moved)


@dataclass
class Adam(Optimiser):
    """Adaptive moments."""

    learning_rate: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    spelling = "adam"

    def scalars(self, graph: Graph, rate: Value) -> tuple[Value, ...]:
        t = self.step(graph)
        return (rate * _root(1.0 - _power(self.beta2, t)) / (1.0 - _power(self.beta1, t)),)

    def rule(
        self, graph: Graph, state: State, p: Value, gradient: Value, scalars: tuple[Value, ...]
    ) -> None:
        (rate,) = scalars
        m, v = self.slot(graph, state, "m"), self.slot(graph, state, "v")
        new_m = m + (gradient - m) * (1.0 - self.beta1)
        new_v = v + (gradient * gradient - v) * (1.0 - self.beta2)
        assert m.state is not None
        assert v.state is not None
        graph.update(m.state, new_m)
        graph.update(v.state, new_v)
        graph.update(state, p - rate * new_m / (_root(new_v) + self.eps))


def _root(x: Value) -> Value:
    return x.graph.emit(make("sqrt"), x)


def _power(base: float, exponent: Value) -> Value:
    """base^exponent for a positive constant base, as e^(exponent ln base)."""
    return exponent.graph.emit(make("exp"), exponent * math.log(base))


#: Spelling to rule.
OPTIMISERS: dict[str, type[Optimiser]] = {c.spelling: c for c in (SGD, MomentumSGD, Adam)}
