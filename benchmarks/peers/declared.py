"""The graph that peers take, and the values that all systems share.

Inference: `specialise(training=False)` of the network, batch norm still to be folded (a peer that
folds does it by itself), with what depends on parameters alone evaluated once. Training: the
forward pass and the joint loss, where batch norm and dropout stay declared, since peers have layers
for them; peers differentiate and update by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.compiler.pipeline import CLEANING
from branchgraph.ir.cost import cost
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.lowering import Lowering
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import Cast, Multiply
from branchgraph.ir.ops.mode import Noise
from branchgraph.ir.ops.norm import BatchNorm
from branchgraph.ir.ops.random import Dropout
from branchgraph.ir.rebuild import Rebuild, bind
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType
from branchgraph.nets import network
from branchgraph.passes.clean import DeadCode
from branchgraph.passes.materialise import evaluate_origin, materialise
from branchgraph.passes.specialise import specialise
from branchgraph.training import joint_loss

#: Declared ops that peers have layers for, and noise, which they draw by themselves.
_KEPT = (BatchNorm, Dropout, Noise)


class _Train(Rebuild):
    """Training form, but for the ops that peers have layers for; updates are the peers' own."""

    def __init__(self, old: Graph) -> None:
        super().__init__(old)
        self.lowering = Lowering(self.new, training=True, statistics="none", randomness="counter")

    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        if not node.op.declared or isinstance(node.op, _KEPT):
            return super().visit(node, inputs)
        return node.op.lower(inputs, self.lowering)


class _Numbers(Rebuild):
    """Thresholds and loss weights at their defaults; a weight of 1 is no multiplication."""

    def visit_input(self, value: Value) -> Value:
        if value.default is None:
            return super().visit_input(value)
        return self.new.constant(value.default, value.dtype)

    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        numbers = [_number(v) for v in inputs]
        if isinstance(node.op, Cast) and numbers[0] is not None:
            return (self.new.constant(numbers[0], node.op.dtype),)
        if isinstance(node.op, Multiply) and numbers[1] == 1.0:
            return inputs[:1]
        return super().visit(node, inputs)


def _number(value: Value) -> float | None:
    """What a 0-d constant is."""
    op = value.producer.op if value.producer else None
    return float(op.value) if isinstance(op, Full) and op.shape == () else None


@dataclass(frozen=True)
class Cell:
    """One network in one mode at one batch size, with values and inputs."""

    spec: str
    mode: str
    batch: int
    declared: Graph
    #: What peers write in their own words.
    graph: Graph
    store: Store
    inputs: dict[str, np.ndarray]
    macs: int

    @property
    def params(self) -> list[State]:
        """The states that the peers' graph reads, in the order of their arrays."""
        used = {v.state for node in self.graph.nodes for v in node.inputs}
        return [s for s in self.graph.states if s in used]

    @property
    def draws(self) -> bool:
        """Whether random numbers keep the systems from computing the same."""
        return any(n.op.opcode in ("dropout", "noise") for n in self.graph.nodes)


def network_of(spec: str) -> tuple[str, tuple[str, ...]]:
    """`NET@pass@pass` as the network and the passes that branchgraph alone applies."""
    net, *passes = spec.split("@")
    return net, tuple(passes)


def make_cell(spec: str, mode: str, batch: int, seed: int = 0) -> Cell:
    """Declare, initialise and draw everything one comparison needs."""
    declared = network(network_of(spec)[0])
    store = Store.initialised(declared.states, seed)
    _move_statistics(declared, store, np.random.default_rng(seed))
    clean = CLEANING.apply(declared)
    if mode == "train":
        graph = joint_loss(_Train(clean).run())
        graph.keep(output=lambda name: name == "loss")
        whole = differentiate(joint_loss(specialise(clean, training=True)))
    else:
        graph, origin = materialise(specialise(clean, training=False))
        store.initialise(origin.states, seed)
        evaluate_origin(origin, store)
        whole = specialise(clean, training=False, exits="all")
    graph = _Numbers(bind(DeadCode().apply(graph), N=batch)).run()
    graph = CLEANING.apply(graph)
    inputs = _inputs(declared, mode, batch, np.random.default_rng(seed + 1))
    macs = cost(bind(whole, N=batch)).macs
    assert isinstance(macs, int)
    return Cell(spec, mode, batch, declared, graph, store, inputs, macs)


def _move_statistics(graph: Graph, store: Store, rng: np.random.Generator) -> None:
    """Running statistics away from 0 and 1, where a mistake in batch norm would not show."""
    for state in graph.states:
        if state.role is Role.STATISTIC:
            start = store[state]
            around = start + 0.1 * rng.standard_normal(state.shape)
            store[state] = np.abs(around).astype(start.dtype) if (start > 0).all() else around


def _inputs(graph: Graph, mode: str, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    drawn = {}
    for name, value in graph.inputs.items():
        if value.default is None:
            shape = (batch, *(d for d in value.shape[1:] if isinstance(d, int)))
            drawn[name] = rng.standard_normal(shape).astype(value.dtype.numpy)
    if mode == "train":
        classes = next(iter(graph.outputs.values())).shape[1]
        assert isinstance(classes, int)
        drawn["labels"] = rng.integers(0, classes, batch).astype(DType.I64.numpy)
    return drawn
