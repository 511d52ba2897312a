"""Gradients of branched networks (vbranch, section 2.10 and acceptance checks 3 and 4)."""

from __future__ import annotations

import numpy as np
import pytest

from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret
from branchgraph.ir.optimisers import MomentumSGD
from branchgraph.ir.state import State, Store
from branchgraph.ir.types import DType
from branchgraph.nets.vbranch import slice_into
from branchgraph.passes.specialise import specialise
from branchgraph.training.loss import joint_loss
from tests.builders import EXACT
from tests.nets.vbranch_nets import batch, scattered, small

BRANCHES = 4
LABELS = np.array([0, 3, 1])


def training_graph(graph: Graph) -> Graph:
    return differentiate(joint_loss(specialise(graph, training=True)))


def batches(name: str) -> dict[str, np.ndarray]:
    return {f"x{i}": batch(name, seed=i) for i in range(1, BRANCHES + 1)}


def is_shared(state: State) -> bool:
    return not state.name.startswith("branch")


class Moved(Store):
    """A store read at `base + t * steps`, in float64."""

    def __init__(self, base: Store, steps: dict[State, np.ndarray], t: float) -> None:
        super().__init__()
        self.base, self.steps, self.t = base, steps, t

    def __getitem__(self, state: State) -> np.ndarray:
        moved = self.steps.get(state)
        value = self.base[state].astype(np.float64)
        return value if moved is None else value + self.t * moved


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["fcn", "cnn", "densenet_bc"])
def test_shared_states_get_the_mean_and_unique_ones_their_own_gradient(
    name: str, legacy: bool
) -> None:
    graph = small(
        name, branches=BRANCHES, shared=(0.5,), inputs="each", legacy_layout=legacy, outputs=4
    )
    training = training_graph(graph)
    store = scattered(training)
    fed = {**batches(name), "labels": LABELS}
    run = interpret(training, fed, store, DType.F64)
    rng = np.random.default_rng(0)
    for shared in (True, False):
        steps = {s: rng.normal(size=s.shape) for s in run.gradients if is_shared(s) is shared}
        steps = {s: d / np.sqrt(d.size) for s, d in steps.items()}
        analytic = sum(float((run.gradients[s] * d).sum()) for s, d in steps.items())

        def loss_at(t: float, steps: dict[State, np.ndarray] = steps) -> float:
            return float(
                interpret(training, fed, Moved(store, steps, t), DType.F64).outputs["loss"]
            )

        eps = 1e-6
        numeric = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
        # The loss is the sum over branches: its slope is B times the mean.
        assert analytic == pytest.approx(numeric / (BRANCHES if shared else 1), rel=1e-5)


def test_with_a_merge_there_is_one_loss_and_shared_states_get_its_gradient() -> None:
    graph = small("fcn", branches=2, shared=(1.0,), merge="mean")
    plain = small("fcn")
    weights, fed = scattered(plain), {"x": batch("fcn"), "labels": LABELS}
    store = slice_into(plain, weights, graph)
    merged = interpret(training_graph(graph), fed, store, DType.F64)
    alone = interpret(training_graph(plain), fed, weights, DType.F64)
    for state, gradient in named(merged.gradients).items():
        np.testing.assert_allclose(gradient, named(alone.gradients)[state], **EXACT)


def named(values: dict[State, np.ndarray]) -> dict[str, np.ndarray]:
    return {s.name: v for s, v in values.items()}


def plain_runs(name: str, weights: Store, plain: Graph, optimiser: MomentumSGD) -> list:  # type: ignore[type-arg]
    """One training step of the plain network on each branch's batch."""
    step = optimiser.attach(training_graph(plain))
    weights.initialise(step.states)
    return [
        interpret(step, {"x": x, "labels": LABELS}, weights, DType.F64)
        for x in batches(name).values()
    ]


@pytest.mark.parametrize("name", ["fcn", "cnn", "densenet_bc"])
def test_branches_that_share_nothing_train_as_separate_networks(name: str) -> None:
    plain = small(name, outputs=4)
    weights, optimiser = scattered(plain), MomentumSGD(learning_rate=0.1)
    branched = small(name, branches=BRANCHES, inputs="each", outputs=4)
    store = slice_into(plain, weights, branched)
    step = optimiser.attach(training_graph(branched))
    store.initialise(step.states)
    updates = named(interpret(step, {**batches(name), "labels": LABELS}, store, DType.F64).updates)
    for i, run in enumerate(plain_runs(name, weights, plain, optimiser), start=1):
        for state, value in named(run.updates).items():
            own = state if state == "step" else f"branch{i}/{state}"
            np.testing.assert_array_equal(updates[own], value)


@pytest.mark.parametrize("name", ["fcn", "cnn", "densenet_bc"])
def test_branches_that_share_all_take_the_step_of_the_mean_gradient(name: str) -> None:
    plain = small(name, outputs=4)
    weights = scattered(plain)
    branched = small(name, branches=BRANCHES, shared=(1.0,), inputs="each", outputs=4)
    store = slice_into(plain, weights, branched)
    run = interpret(training_graph(branched), {**batches(name), "labels": LABELS}, store, DType.F64)
    each = [
        named(r.gradients) for r in plain_runs(name, weights, plain, MomentumSGD(learning_rate=0.1))
    ]
    for state, gradient in named(run.gradients).items():
        mean = sum(e[state] for e in each) / BRANCHES
        np.testing.assert_allclose(gradient, mean, **EXACT)


def test_branches_that_share_all_and_read_the_same_are_one_network() -> None:
    plain, branched = small("cnn"), small("cnn", branches=BRANCHES, shared=(1.0,))
    weights, fed = scattered(plain), {"x": batch("cnn"), "labels": LABELS}
    store = slice_into(plain, weights, branched)
    run = interpret(training_graph(branched), fed, store, DType.F64)
    alone = interpret(training_graph(plain), fed, weights, DType.F64)
    losses = [run.outputs[f"branch{i}.loss"] for i in range(1, BRANCHES + 1)]
    assert losses == [losses[0]] * BRANCHES
    for state, gradient in named(run.gradients).items():
        np.testing.assert_allclose(gradient, named(alone.gradients)[state], **EXACT)
