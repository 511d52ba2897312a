"""Every kind of gate against its definition, in both modes."""

from __future__ import annotations

import numpy as np
import pytest
from builders import EXACT

from branchgraph.compiler import compile
from branchgraph.ir import gates
from branchgraph.ir.builder import gate, merge_and_run, relu, weighted_sum
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.passes.specialise import specialise

SCORES = np.array([0.4, 0.25, 0.2, 0.1, 0.05])


def gated(build, scores: np.ndarray = SCORES) -> tuple[Graph, Store, State]:  # type: ignore[no-untyped-def]
    """y = x gated by `build(scores)`, one gate an entry; the loss is the sum of y."""
    graph = Graph("gated")
    x = graph.input("x", ("N", len(scores)), DType.F64)
    state = State("score", scores.shape, DType.F64, Role.GATE)
    made = build(graph.read(state))
    graph.output("gate", made)
    y = gate(x, made)
    graph.output("loss", graph.emit(ReduceSum(axes=(0, 1)), y))
    return graph, Store({state: scores}), state


def draws(build, count: int, scores: np.ndarray = SCORES) -> np.ndarray:  # type: ignore[no-untyped-def]
    """The training gates of `count` steps."""
    graph, store, _ = gated(build, scores)
    step = compile(specialise(graph, training=True), store=store, seed=3)
    x = np.ones((1, len(scores)))
    return np.stack([step(x=x)["gate"] for _ in range(count)])


def inference(build, scores: np.ndarray = SCORES) -> np.ndarray:  # type: ignore[no-untyped-def]
    graph, store, _ = gated(build, scores)
    return compile(graph, store=store)(x=np.ones((1, len(scores))))["gate"]


KINDS = {
    "hard": gates.hard,
    "top_k": lambda s: gates.top_k(s, 2),
    "sigmoid": gates.sigmoid,
    "softmax": gates.softmax,
    "hard_concrete": gates.hard_concrete,
    "gumbel": lambda s: gates.gumbel(s, temperature(s)),
}


def temperature(like: Value, default: float = 1.0) -> Value:
    return like.graph.input("temperature", (), DType.F64, default)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_declared_for_both_modes_and_round_trips(kind: str) -> None:
    graph, store, state = gated(KINDS[kind])
    assert format_graph(parse_graph(format_graph(graph))) == format_graph(graph)
    assert not specialise(graph, training=False).updates
    training = differentiate(specialise(graph, training=True))
    store.initialise(training.states)
    gradient = interpret(training, {"x": np.ones((3, 5))}, store).gradients[state]
    assert np.isfinite(gradient).all()
    if kind != "softmax":  # the soft-max of ones sums to a constant
        assert gradient.any()


def test_hard_gates_open_above_the_threshold_and_learn_when_closed() -> None:
    graph, store, state = gated(lambda s: gates.hard(s, 0.2))
    run = interpret(differentiate(specialise(graph, training=True)), {"x": np.ones((2, 5))}, store)
    assert run.outputs["gate"].tolist() == [1, 1, 0, 0, 0]
    assert run.gradients[state].tolist() == [2.0] * 5


def test_top_k_opens_k_gates_and_follows_the_published_inclusion_probabilities() -> None:
    found = draws(KINDS["top_k"], 4000)
    assert set(found.sum(axis=1)) == {2.0}
    # Two draws without replacement from (.4, .25, .2, .1, .05); 4000 steps: 5 standard
    # deviations are 0.04.
    expected = [0.699, 0.520, 0.433, 0.230, 0.118]
    np.testing.assert_allclose(found.mean(axis=0), expected, atol=0.04)
    assert inference(KINDS["top_k"]).tolist() == [1, 1, 0, 0, 0]


def test_ties_go_to_the_lower_index() -> None:
    assert inference(KINDS["top_k"], np.full(5, 0.2)).tolist() == [1, 1, 0, 0, 0]


def test_soft_gates_are_their_functions() -> None:
    np.testing.assert_allclose(inference(gates.sigmoid), 1 / (1 + np.exp(-SCORES)), **EXACT)
    e = np.exp(SCORES)
    np.testing.assert_allclose(inference(gates.softmax), e / e.sum(), **EXACT)


def test_hard_concrete_gates_are_closed_with_the_published_probability() -> None:
    scores = np.array([-2.0, 0.0, 2.0])
    found = draws(gates.hard_concrete, 3000, scores)
    beta, gamma, zeta = 2 / 3, -0.1, 1.1
    # P(gate > 0) = sigmoid(score - beta ln(-gamma / zeta)); 5 standard deviations are 0.05.
    expected = 1 / (1 + np.exp(-(scores - beta * np.log(-gamma / zeta))))
    np.testing.assert_allclose((found > 0).mean(axis=0), expected, atol=0.05)
    assert found.min() == 0.0
    assert found.max() == 1.0
    s = 1 / (1 + np.exp(-scores))
    np.testing.assert_allclose(
        inference(gates.hard_concrete, scores), np.clip(s * 1.2 - 0.1, 0, 1), **EXACT
    )


def test_gumbel_choices_follow_the_softmax_and_harden() -> None:
    scores = np.log(np.array([0.6, 0.3, 0.1]))
    found = draws(lambda s: gates.gumbel(s, temperature(s), hard=True), 4000, scores)
    assert set(found.sum(axis=1)) == {1.0}
    np.testing.assert_allclose(found.mean(axis=0), [0.6, 0.3, 0.1], atol=0.04)
    soft = draws(lambda s: gates.gumbel(s, temperature(s, 0.1)), 50, scores)
    np.testing.assert_allclose(soft.sum(axis=1), 1.0, **EXACT)
    assert inference(KINDS["gumbel"], scores).tolist() == [1, 0, 0]


def test_weighted_sums_and_merge_and_run_are_merges() -> None:
    graph = Graph("merges")
    a, b = graph.input("a", ("N", 3), DType.F64), graph.input("b", ("N", 3), DType.F64)
    pi = graph.input("pi", ("N", 1), DType.F64)
    graph.output("weighted", weighted_sum((a, b), (pi, 1.0 - pi)))
    left, right = merge_and_run((a, b), (relu(a), -b))
    graph.output("left", left)
    graph.output("right", right)
    fed = {"a": np.array([[1.0, -2.0, 3.0]]), "b": np.array([[3.0, 4.0, 5.0]]), "pi": [[0.25]]}
    outputs = interpret(graph, fed).outputs
    assert outputs["weighted"].tolist() == [[2.5, 2.5, 4.5]]
    assert outputs["left"].tolist() == [[3.0, 1.0, 7.0]]
    assert outputs["right"].tolist() == [[-1.0, -3.0, -1.0]]
