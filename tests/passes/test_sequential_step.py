"""One update a branch and step (vbranch, section 2.10), and how shared gradients are declared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from branchgraph.compiler import compile
from branchgraph.ir.builder import dense
from branchgraph.ir.errors import GraphError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret
from branchgraph.ir.optimisers import SGD, Adam, MomentumSGD, Optimiser
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph
from branchgraph.ir.types import DType
from branchgraph.ir.verify import verify
from branchgraph.passes.share_weights import ShareWeights, branch_losses, sequential_step
from branchgraph.passes.specialise import specialise
from branchgraph.training.loop import Training, train
from branchgraph.training.loss import joint_loss
from tests.builders import EXACT
from tests.nets.vbranch_nets import batch, scattered, small

BRANCHES = 3
LABELS = np.array([0, 3, 1])
SEQUENTIAL = ShareWeights(BRANCHES, (0.5,), inputs="each", gradient="sequential")
RATE = 0.1


def losses(graph: Graph) -> Graph:
    return joint_loss(specialise(graph, training=True))


def fed(name: str) -> dict[str, np.ndarray]:
    batches = {f"x{i}": batch(name, seed=i) for i in range(1, BRANCHES + 1)}
    return {**batches, "labels": LABELS}


def after(step: Graph, store: Store, inputs: dict[str, np.ndarray]) -> dict[State, np.ndarray]:
    """What states take, in float64 (as outputs: updates are in the type of their state)."""
    for k, value in enumerate(step.updates.values()):
        step.output(f"update{k}", value)
    run = interpret(step, inputs, store, DType.F64).outputs
    return {state: run[f"update{k}"] for k, state in enumerate(step.updates)}


class Exact(Store):
    """A store of float64 numbers over another one."""

    def __init__(self, base: Store) -> None:
        super().__init__()
        self.base = base
        self.exact: dict[State, np.ndarray] = {}

    def __getitem__(self, state: State) -> np.ndarray:
        return self.exact[state] if state in self.exact else self.base[state].astype(np.float64)


def gradients_in_turn(training: Graph, store: Exact, inputs: dict[str, np.ndarray]):  # type: ignore[no-untyped-def]
    """The gradient of each branch's loss, where the ones before it have left the variables."""
    for i in range(1, BRANCHES + 1):
        alone = differentiate(training, f"branch{i}.loss")
        others = tuple(f"branch{k}/" for k in range(1, BRANCHES + 1) if k != i)
        alone.keep(gradient=lambda s, others=others: not s.name.startswith(others))
        yield interpret(alone, inputs, store, DType.F64).gradients


# -- the formula -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fcn", "cnn"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lowering", ["assembled", "stacked"])
def test_update_i_takes_the_gradient_of_loss_i_behind_update_i_minus_1(
    name: str, share: float, lowering: str
) -> None:
    step_of = replace(SEQUENTIAL, shared=(share,), lowering=lowering)
    graph = step_of.apply(small(name, outputs=4))
    training = losses(graph)
    step = sequential_step(training, SGD(learning_rate=RATE))
    verify(step)
    store = scattered(training)
    theta = Exact(store)
    for gradients in gradients_in_turn(training, theta, fed(name)):
        theta.exact.update({s: theta[s] - RATE * g for s, g in gradients.items()})
    found = after(step, store, fed(name))
    trained = {s for s in found if s.role is Role.PARAMETER}
    assert trained == set(theta.exact)
    for state in trained:
        np.testing.assert_allclose(found[state], theta.exact[state], **EXACT)


@pytest.mark.parametrize("lowering", ["assembled", "stacked"])
def test_slots_change_where_the_loss_of_the_update_depends_on_the_state(lowering: str) -> None:
    """Momentum of a shared state moves in every update, that of a unique one in its own."""
    training = losses(replace(SEQUENTIAL, lowering=lowering).apply(small("fcn", outputs=4)))
    optimiser = MomentumSGD(learning_rate=RATE)
    step = sequential_step(training, optimiser)
    store = scattered(step)
    theta = Exact(store)
    v = {state: Exact(store)[slot] for (state, _), slot in optimiser.slots.items()}
    for gradients in gradients_in_turn(training, theta, fed("fcn")):
        for state, g in gradients.items():
            v[state] = 0.9 * v[state] - RATE * g
            theta.exact[state] = theta[state] + v[state]
    found = after(step, store, fed("fcn"))
    for state, value in theta.exact.items():
        np.testing.assert_allclose(found[state], value, **EXACT)
        np.testing.assert_allclose(found[optimiser.slots[state, "v"]], v[state], **EXACT)


def test_one_step_counts_as_many_updates_as_there_are_branches() -> None:
    training = losses(SEQUENTIAL.apply(small("fcn", outputs=4)))
    optimiser = Adam(learning_rate=0.01)
    step = sequential_step(training, optimiser)
    store = Store.initialised(step.states)
    theta, slots = Exact(store), {}
    for t, gradients in enumerate(gradients_in_turn(training, theta, fed("fcn")), start=1):
        for state, g in gradients.items():
            m, v = slots.get(state, (0.0, 0.0))
            m, v = m + 0.1 * (g - m), v + 0.001 * (g * g - v)
            rate = 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            slots[state] = m, v
            theta.exact[state] = theta[state] - rate * m / (np.sqrt(v) + 1e-8)
    found = after(step, store, fed("fcn"))
    for state, value in theta.exact.items():
        np.testing.assert_allclose(found[state], value, rtol=1e-7, atol=1e-10)
    (count,) = (v for s, v in found.items() if s.role is Role.STEP and "adam" in s.name)
    assert count == BRANCHES


def test_branches_that_share_all_are_the_plain_network_on_one_batch_after_another() -> None:
    plain = small("cnn", outputs=4)
    store = scattered(plain)
    graph = replace(SEQUENTIAL, shared=(1.0,)).apply(plain)
    found = after(sequential_step(losses(graph), SGD(learning_rate=RATE)), _of(store, graph),
                  fed("cnn"))  # fmt: skip
    alone, theta = differentiate(losses(plain)), Exact(store)
    for i in range(1, BRANCHES + 1):
        inputs = {"x": batch("cnn", seed=i), "labels": LABELS}
        run = interpret(alone, inputs, theta, DType.F64)
        theta.exact.update({s: theta[s] - RATE * g for s, g in run.gradients.items()})
    for state, value in theta.exact.items():
        np.testing.assert_allclose(found[state], value, **EXACT)


def _of(store: Store, graph: Graph) -> Store:
    """`store` with the statistics of all branches as they start."""
    store.initialise(graph.states)
    return store


def test_without_sharing_both_rules_are_one() -> None:
    plain = small("cnn", outputs=4)
    none = replace(SEQUENTIAL, shared=(0.0,)).apply(plain)
    training = losses(none)
    store = scattered(training)
    found = after(sequential_step(training, SGD(learning_rate=RATE)), store, fed("cnn"))
    together = after(SGD(learning_rate=RATE).attach(differentiate(training)), store, fed("cnn"))
    assert found.keys() == together.keys()
    for state, value in together.items():
        np.testing.assert_array_equal(found[state], value)


def test_losses_are_those_that_each_update_found() -> None:
    training = losses(SEQUENTIAL.apply(small("fcn", outputs=4)))
    store, inputs = scattered(training), fed("fcn")
    step = sequential_step(training, SGD(learning_rate=RATE))
    run = interpret(step, inputs, store, DType.F64).outputs
    before = interpret(training, inputs, store, DType.F64).outputs
    assert run["branch1.loss"] == before["branch1.loss"]
    assert run["branch2.loss"] != before["branch2.loss"]
    each = [run[f"branch{i}.loss"] for i in range(1, BRANCHES + 1)]
    np.testing.assert_allclose(run["loss"], sum(each), **EXACT)
    assert set(step.outputs) == set(training.outputs)


# -- structure -------------------------------------------------------------------------------------


def test_the_text_of_two_updates() -> None:
    plain = Graph("one")
    plain.output("y", dense(plain.input("x", ("N", 2)), 2, bias=False, name="fc"))
    graph = ShareWeights(2, (1.0,), gradient="sequential").apply(plain)
    step = sequential_step(losses(graph), SGD(learning_rate=RATE))
    lines = [line.split("  #")[0].strip() for line in format_graph(step).splitlines()]
    updates = [line for line in lines if "= subtract(" in line and "[2, 2]" in line]
    first, second = (line.split(" = ")[0] for line in updates)
    assert [line.split(" = ")[1].split(", ")[0] for line in updates] == [
        "subtract(fc.weight", f"subtract({first}"]  # fmt: skip
    layers = [line.split(" = ")[1] for line in lines if "= dense(x, " in line]
    assert layers == [f"dense(x, {w}) : f32[N, 2]" for w in ("fc.weight", first)]
    assert [line for line in lines if line.startswith("update")] == [f"update fc.weight = {second}"]


def test_statistics_of_a_branch_change_once_and_those_of_a_trunk_in_every_update() -> None:
    step_of = replace(SEQUENTIAL, inputs="one", after="avg_pool")
    training = losses(step_of.apply(small("cnn", outputs=4)))
    store, inputs = scattered(training), {"x": batch("cnn"), "labels": LABELS}
    found = after(sequential_step(training, SGD(learning_rate=0.0)), store, inputs)
    once = after(training, store, inputs)
    assert {s for s in found if s.role is Role.STATISTIC} == set(once)
    for state, new in once.items():
        old = store[state].astype(np.float64)
        times = 1 if state.name.startswith("branch") else BRANCHES
        mean = (new - 0.99 * old) / 0.01
        np.testing.assert_allclose(found[state], mean + 0.99**times * (old - mean), rtol=1e-6)


def test_trunks_and_masks_train_in_sequence_too() -> None:
    for step_of in (
        ShareWeights(2, (0.5,), after="pool_2", gradient="sequential"),
        ShareWeights(2, layout="masks", overlap=0.3, gradient="sequential"),
    ):
        training = losses(step_of.apply(small("cnn", outputs=4)))
        store = scattered(training)
        step = compile(sequential_step(training, SGD(learning_rate=0.02)), store=store)
        inputs = {"x": batch("cnn"), "labels": LABELS}
        seen = [float(step(**inputs)["loss"]) for _ in range(20)]
        assert seen[-1] < 0.8 * seen[0]


@pytest.mark.parametrize("optimiser", [Adam(learning_rate=0.01), MomentumSGD(learning_rate=0.02)])
def test_the_training_loop_runs_sequential_steps(optimiser: Optimiser) -> None:
    graph = replace(SEQUENTIAL, inputs="one").apply(small("fcn", outputs=4))
    store = Store.initialised(graph.states)
    step = compile(sequential_step(losses(graph), optimiser), store=store)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 6)).astype(np.float32)
    labels = (x @ rng.normal(size=(6, 4))).argmax(axis=1)
    history = train(Training(step, store, optimiser), x, labels, epochs=6, batch=8)
    seen = [epoch["loss"] for epoch in history.epochs]
    assert seen[-1] < 0.8 * seen[0]


# -- declarations and refusals ---------------------------------------------------------------------


def test_declared_networks_have_the_same_rules() -> None:
    for gradient, scaled in (("mean", True), ("sum", False), ("sequential", False)):
        for graph in (
            small("fcn", branches=2, shared=(0.5,), gradient=gradient),
            ShareWeights(2, (0.5,), gradient=gradient).apply(small("fcn")),
        ):
            found = [n for n in graph.nodes if n.op.opcode == "scale_gradient"]
            assert bool(found) is scaled


def test_a_mean_gradient_is_refused() -> None:
    for graph in (
        small("fcn", branches=2, shared=(1.0,), outputs=4),
        ShareWeights(2, (0.5,), after="pool_2").apply(small("cnn", outputs=4)),
    ):
        with pytest.raises(GraphError, match="declare the branches with gradient=sequential"):
            sequential_step(losses(graph), SGD())


def test_losses_of_branches_are_needed() -> None:
    with pytest.raises(GraphError, match="expected outputs <branch>.loss of several branches"):
        sequential_step(losses(small("fcn")), SGD())
    with pytest.raises(GraphError, match="no outputs of branches to take losses of"):
        branch_losses(specialise(small("fcn"), training=True), lambda v: v)


def test_a_merge_leaves_no_losses_to_take_in_turn() -> None:
    with pytest.raises(GraphError, match="a merge leaves one"):
        ShareWeights(2, merge="mean", gradient="sequential")
    with pytest.raises(GraphError, match="a merge leaves one"):
        small("fcn", branches=2, merge="mean", gradient="sequential")
    with pytest.raises(GraphError, match="gradient 'max' is none of mean, sum, sequential"):
        ShareWeights(2, gradient="max")
    with pytest.raises(GraphError, match="gradient 'max' is none of mean, sum, sequential"):
        small("fcn", branches=2, gradient="max")
