"""Small networks of vbranch, and how its tests run them."""

from __future__ import annotations

import numpy as np

from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret
from branchgraph.ir.state import Role, Store
from branchgraph.ir.types import DType
from branchgraph.nets.vbranch import cnn, densenet, densenet_bc, fcn, vbranch_resnet
from branchgraph.passes.specialise import specialise
from tests.builders import randomised

#: Network to a small form of it and the shape of its input.
SMALL = {
    "fcn": (fcn, {"sizes": (7, 5), "features": 6, "outputs": 4}, (6,)),
    "cnn": (cnn, {"stages": (6, 9), "size": (8,), "stem": True, "outputs": 4}, (1, 8, 8)),
    "vbranch_resnet": (vbranch_resnet, {"depth": 18, "channels": 1, "size": (5,)}, (1, 5, 5)),
    "densenet_bc": (densenet_bc, {"depth": 16, "growth": 5, "size": (8,)}, (3, 8, 8)),
    "densenet": (densenet, {"size": (32,), "outputs": 6}, (3, 32, 32)),
}


def small(name: str, **options: object) -> Graph:
    """A small network."""
    build, own, _ = SMALL[name]
    return build(**{**own, **options})


def batch(name: str, n: int = 3, seed: int = 0) -> np.ndarray:
    """Input of a small network."""
    return np.random.default_rng(seed).normal(size=(n, *SMALL[name][2])).astype(np.float32)


def scattered(graph: Graph, seed: int = 0) -> Store:
    """Random states, weights by their fan-in, so that activations stay of order one."""
    store = randomised(graph, seed)
    for state in graph.states:
        if state.role is Role.PARAMETER and len(state.shape) > 1:
            store[state] = store[state] * (8 / np.prod(state.shape[1:])) ** 0.5
    return store


def outputs(
    graph: Graph, store: Store, training: bool = False, **fed: np.ndarray
) -> dict[str, np.ndarray]:
    """Outputs in float64."""
    mode = specialise(graph, training=training)
    return interpret(mode, fed, store, DType.F64).outputs
