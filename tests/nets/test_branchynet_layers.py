"""B-AlexNet and B-ResNet layer by layer against a second transcription in Chainer's functions.

Those functions are pinned by recordings of Chainer itself (`tests/chainer/test_goldens.py`).
"""

from __future__ import annotations

import numpy as np
import pytest
from builders import images, randomised

import branchgraph.chainer as chainer
from branchgraph.compiler import compile
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Store
from branchgraph.nets import network
from branchgraph.passes.specialise import specialise
from tests.nets.branchynet_in_chainer import NETWORKS

#: float32 on both sides, sums of up to 1600 terms in another order.
TOLERANCE = 2e-5


def layers(graph: Graph, store: Store, x: np.ndarray) -> dict[str, np.ndarray]:
    """The value of every named node."""
    probe = specialise(graph, training=False, exits="all")
    probe.keep(output=lambda name: False)
    for node in probe.nodes:
        if node.name and node.path not in probe.outputs:
            probe.output(node.path, node.output)
    return compile(probe, store=store)(x=x)


def arrays_of(graph: Graph, store: Store) -> dict[str, np.ndarray]:
    return {s.name: store[s] for s in graph.states}


@pytest.mark.parametrize("spec", NETWORKS)
def test_every_layer_gives_what_chainer_gives(spec: str) -> None:
    graph = network(spec)
    store = randomised(graph, seed=4)
    for state in graph.states:  # keep activations of the order of 1
        if state.name.endswith("weight"):
            store[state] = store[state] / np.sqrt(np.prod(state.shape[1:]) / 4)
    x = images(3, channels=3, size=32)
    ours = layers(graph, store, x)
    with chainer.using_config("train", False):
        theirs = NETWORKS[spec](chainer, arrays_of(graph, store), chainer.Variable(x))
    convolutions = {n.path for n in graph.nodes if n.op.opcode in ("conv", "dense", "batch_norm")}
    assert convolutions <= set(theirs)
    for name, expected in theirs.items():
        scale = max(1.0, float(np.abs(expected).max()))
        assert np.abs(ours[name] - expected).max() <= TOLERANCE * scale, name
