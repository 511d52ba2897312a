"""branchgraph: the declared network compiled here; NumPy arrays in, fresh NumPy arrays out."""

from __future__ import annotations

import contextlib
import importlib

from branchgraph.compiler import compile
from branchgraph.compiler.backend import backend
from branchgraph.ir.optimisers import MomentumSGD
from branchgraph.ir.state import Store
from branchgraph.nets import network
from branchgraph.passes.base import Pass
from branchgraph.passes.materialise import evaluate_origin, materialise
from branchgraph.training import Training as Trainer


def prepare(meta):  # type: ignore[no-untyped-def]
    """Libraries that would be loaded when first needed are part of the imports, as in peers."""
    backend(meta["backend"])
    with contextlib.suppress(ImportError):
        importlib.import_module("llvmlite.binding")


def load(bundle):  # type: ignore[no-untyped-def]
    return Training(bundle) if bundle.training else Inference(bundle)


def declared(bundle):  # type: ignore[no-untyped-def]
    """The network with the bundle's values, its states, and rewritten by the passes asked for."""
    graph = network(bundle.meta["net"])
    states = graph.states
    store = Store()
    for state, array in zip(states, bundle.states()):
        store[state] = array
    for spec in bundle.meta["passes"]:
        result = Pass.from_spec(spec).run(graph, values=store)
        graph = result.graph
        if result.report.origin is not None:
            evaluate_origin(result.report.origin, store)
    return graph, states, store


class Inference:
    def __init__(self, bundle):  # type: ignore[no-untyped-def]
        graph, _, store = declared(bundle)
        if bundle.meta["passes"]:
            graph, origin = materialise(graph)
            store.initialise(origin.states)
            evaluate_origin(origin, store)
        self.run = compile(graph, bundle.meta["backend"], store=store).run
        self.inputs = dict(zip(bundle.meta["inputs"], bundle.inputs()))
        self.names = bundle.meta["outputs"]
        self.result = None

    def step(self) -> None:
        self.result = self.run(self.inputs)

    def outputs(self):  # type: ignore[no-untyped-def]
        return [self.result[name] for name in self.names]


class Training:
    def __init__(self, bundle):  # type: ignore[no-untyped-def]
        graph, states, self.store = declared(bundle)
        optimiser = MomentumSGD(bundle.meta["learning_rate"], momentum=bundle.meta["momentum"])
        chosen = bundle.meta["backend"]
        self.run = Trainer.of(graph, optimiser, backend=chosen, store=self.store).step.run
        self.inputs = dict(zip(bundle.meta["inputs"], bundle.inputs()))
        self.states = [states[i] for i in bundle.meta["positions"]]
        self.result = None

    def step(self) -> None:
        self.result = self.run(self.inputs)

    def loss(self) -> float:
        return float(self.result["loss"])

    def trained(self):  # type: ignore[no-untyped-def]
        return [self.store[s] for s in self.states]
