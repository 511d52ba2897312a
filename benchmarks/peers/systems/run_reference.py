"""What every other system is judged against: the graph's interpreter, in float64; no passes.

Float64, since in deep networks gradients in float32 are some percent off, whoever computes them.
"""

from __future__ import annotations

from branchgraph.compiler.pipeline import CLEANING
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.interpret import interpret
from branchgraph.ir.optimisers import MomentumSGD
from branchgraph.ir.types import DType
from branchgraph.passes.specialise import specialise
from branchgraph.training import joint_loss
from peers.systems.run_branchgraph import declared


def prepare(meta):  # type: ignore[no-untyped-def]
    """There is no library."""


def load(bundle):  # type: ignore[no-untyped-def]
    bundle.meta["passes"] = []
    return Training(bundle) if bundle.training else Inference(bundle)


class Inference:
    def __init__(self, bundle):  # type: ignore[no-untyped-def]
        graph, _, self.store = declared(bundle)
        self.graph = specialise(CLEANING.apply(graph), training=False)
        self.inputs = dict(zip(bundle.meta["inputs"], bundle.inputs()))
        self.names = bundle.meta["outputs"]
        self.result = None

    def step(self) -> None:
        run = interpret(self.graph, self.inputs, self.store, precision=DType.F64)
        self.result = run.outputs

    def outputs(self):  # type: ignore[no-untyped-def]
        return [self.result[name] for name in self.names]


class Training:
    """States are rounded to their own types between steps."""

    def __init__(self, bundle):  # type: ignore[no-untyped-def]
        graph, states, self.store = declared(bundle)
        optimiser = MomentumSGD(bundle.meta["learning_rate"], momentum=bundle.meta["momentum"])
        forward = specialise(CLEANING.apply(graph), training=True)
        self.graph = optimiser.attach(differentiate(joint_loss(forward)))
        self.store.initialise(self.graph.states)
        self.inputs = dict(zip(bundle.meta["inputs"], bundle.inputs()))
        self.states = [states[i] for i in bundle.meta["positions"]]
        self.result = None

    def step(self) -> None:
        run = interpret(self.graph, self.inputs, self.store, precision=DType.F64)
        self.result = run.outputs
        for state, value in run.updates.items():
            self.store[state] = value

    def loss(self) -> float:
        return float(self.result["loss"])

    def trained(self):  # type: ignore[no-untyped-def]
        return [self.store[s] for s in self.states]
