"""Random networks on oneDNN give what they give on NumPy: forward, backward, after 20 steps.

The networks are those over which passes are tested (`tests/passes/random_nets.py`) and the random
graphs of `tests/builders.py`, in their inference and training forms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.ir.builder import dropout
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph
from branchgraph.ir.losses import mean_squared_error
from branchgraph.ir.ops.elementwise import cast
from branchgraph.ir.optimisers import MomentumSGD
from branchgraph.ir.rebuild import bind, clone
from branchgraph.ir.state import Store
from branchgraph.ir.types import DType
from branchgraph.ir.verify import declared_ops
from branchgraph.passes.checking import random_feeds, random_store
from branchgraph.passes.specialise import specialise
from branchgraph.training import Training
from tests.backends.against_numpy import assert_agree, check, pair, roundings
from tests.backends.libdnnl import require_libdnnl
from tests.builders import (
    branches_of_every_kind,
    dense_net_with_exits,
    images,
    merge_and_run_with_exits,
    random_graphs,
)

require_libdnnl()

sys.path.append(str(Path(__file__).parents[1] / "passes"))  # its helpers import each other by name
from random_flaws import net  # noqa: E402

STEPS, BATCH = 20, 4


def bound(graph: Graph, batch: int) -> Graph:
    """The graph for a batch, or as it is where its sizes are numbers."""
    symbols = {s for v in graph.inputs.values() for d in v.shape for s in getattr(d, "symbols", ())}
    return bind(graph, **dict.fromkeys(symbols, batch)) if symbols else graph


def learning(graph: Graph) -> Graph:
    """The training form of a network; mean squares of the outputs are its loss if it has none."""
    whole = specialise(graph, training=True) if declared_ops(graph) else clone(graph)
    if "loss" in whole.outputs:
        return whole
    floating = [cast(y, DType.F32) for y in whole.outputs.values() if y.dtype.is_float]
    terms = [mean_squared_error(y, y * 0.0) for y in floating]
    loss = terms[0]
    for term in terms[1:]:
        loss = loss + term
    whole.output("loss", loss)
    return differentiate(whole)


# -- inference -------------------------------------------------------------------------------------


def check_inference(graph: Graph, seed: int) -> None:
    """All exits computed, for batches of 1 and of `BATCH` samples."""
    if declared_ops(graph):
        graph = specialise(graph, training=False, exits="all")
    store = random_store({*graph.states}, list(graph.states), seed)
    for batch in (1, BATCH):
        form = bound(graph, batch)
        feeds = random_feeds(form, seed)
        check(form, feeds, store)


def check_backward(graph: Graph, seed: int) -> None:
    """Loss, gradients and updates of one training step."""
    form = bound(learning(graph), BATCH)
    check(form, random_feeds(form, seed), random_store({*form.states}, list(form.states), seed))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(random_graphs(), st.integers(0, 3))
def test_random_graphs_infer(graph: Graph, seed: int) -> None:
    check_inference(graph, seed)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(random_graphs(), st.integers(0, 3))
def test_random_graphs_train(graph: Graph, seed: int) -> None:
    check_backward(graph, seed)


#: Neighbouring seeds have different themes; those behind the first run with `--slow`.
SEEDS = [*range(30), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(30, 90))]


@pytest.mark.parametrize("seed", SEEDS)
def test_networks_of_passes_infer(seed: int) -> None:
    check_inference(net(seed).graph, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_networks_of_passes_train(seed: int) -> None:
    check_backward(net(seed).graph, seed)


# -- twenty steps ----------------------------------------------------------------------------------

#: Small ReLU networks, trained gently: an error of one step grows by less over the others.
GROWTH = 8


def trained(graph: Graph, backend: str, seed: int) -> Training:
    """`STEPS` steps with momentum, over batches that are the same on every backend."""
    store = Store.initialised(specialise(graph, training=True).states, seed)
    rule = MomentumSGD(learning_rate=0.01)
    training = Training.of(graph, rule, backend=backend, store=store, seed=seed)
    for k in range(STEPS):
        labels = np.random.default_rng([seed, k]).integers(0, 5, 6)
        training.step.run({"x": images(6, seed=seed * STEPS + k), "labels": labels})
    return training


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "make",
    [branches_of_every_kind, dense_net_with_exits, merge_and_run_with_exits],
    ids=["every kind", "dense net", "merge and run"],
)
def test_twenty_steps_of_training(make: Callable[[], Graph], seed: int) -> None:
    """Parameters, slots and running statistics; keys and steps of dropout are equal."""
    graph = make()
    expected, found = (trained(graph, backend, seed) for backend in ("numpy", "onednn"))
    old, new = (
        {k: t.store.peek(s).copy() for k, s in enumerate(t.step.states)} for t in (expected, found)
    )
    count = 2 * roundings(specialise(graph, training=True), N=6) * STEPS * GROWTH
    assert_agree(new, old, count, make.__name__)


@pytest.mark.parametrize("step", range(3))
def test_dropout_draws_the_masks_of_numpy(step: int) -> None:
    graph = Graph("dropped")
    graph.output("y", dropout(graph.input("x", ("N", 3, 6, 6)), 0.25))
    expected, found = pair(specialise(graph, training=True))
    for k in range(step + 1):
        x = np.ones((5, 3, 6, 6), np.float32)
        np.testing.assert_array_equal(found(x=x)["y"], expected(x=x)["y"], err_msg=f"step {k}")
