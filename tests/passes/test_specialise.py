"""Choosing the mode: batch norm in every framework's timing, dropout, randomness."""

from __future__ import annotations

import numpy as np
import pytest
from builders import EXACT, branches_of_every_kind, images, one_norm_applied_twice, randomised

from branchgraph.compiler import compile
from branchgraph.ir.builder import batch_norm, dropout
from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.norm import BatchNorm
from branchgraph.ir.state import State, Store
from branchgraph.ir.types import DType
from branchgraph.ir.verify import declared_ops, verify
from branchgraph.passes.specialise import Specialise, specialise

DECAY = 0.9


def norm(eps: float = 2e-5, unbiased: bool = True) -> Graph:
    graph = Graph("norm")
    x = graph.input("x", ("N", 3, 4, 4))
    graph.output("y", batch_norm(x, eps=eps, decay=DECAY, unbiased=unbiased))
    return graph


def statistics(graph: Graph) -> tuple[State, State]:
    by_name = {s.name.rsplit(".", 1)[1]: s for s in graph.states}
    return by_name["running_mean"], by_name["running_var"]


def channels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))


@pytest.mark.parametrize("unbiased", [True, False], ids=["chainer and pytorch", "mxnet"])
def test_the_running_rule_of_each_convention(unbiased: bool) -> None:
    graph = specialise(norm(unbiased=unbiased), training=True)
    store = randomised(graph)
    x = np.random.default_rng(0).normal(size=(5, 3, 4, 4))
    run = interpret(graph, {"x": x}, store, precision=DType.F64)
    mean, var = channels(x)
    running_mean, running_var = statistics(graph)
    factor = 80 / 79 if unbiased else 1.0
    for state, batch in ((running_mean, mean), (running_var, var * factor)):
        old = store[state].astype(np.float64)
        # The update is rounded to the float32 of the state.
        expected = DECAY * old + (1 - DECAY) * batch
        np.testing.assert_allclose(run.updates[state], expected, rtol=1e-6)


def test_a_batch_of_one_element_a_channel_does_not_divide_by_zero() -> None:
    graph = Graph("norm")
    graph.output("y", batch_norm(graph.input("x", ("N", 3))))
    training = specialise(graph, training=True)
    run = interpret(training, {"x": np.ones((1, 3))}, randomised(training))
    assert all(np.isfinite(v).all() for v in run.updates.values())


@pytest.mark.parametrize("timing", ["forward", "backward", "none"])
def test_one_norm_applied_twice_moves_its_statistics_in_the_order_of_the_timing(timing) -> None:  # type: ignore[no-untyped-def]
    declared = one_norm_applied_twice()
    graph = specialise(declared, training=True, statistics=timing)
    verify(graph)
    store = randomised(graph)
    running_mean, _ = statistics(graph)
    x = images()
    updates = interpret(graph, {"x": x}, store, precision=DType.F64).updates
    if timing == "none":
        assert not updates
        return
    first = channels(x)[0]
    second = channels(_second_input(declared, store, x))[0]
    order = (first, second) if timing == "forward" else (second, first)
    expected = store[running_mean].astype(np.float64)
    for batch in order:
        expected = DECAY * expected + (1 - DECAY) * batch
    np.testing.assert_allclose(updates[running_mean], expected, rtol=1e-6)
    assert not np.allclose(order[0], order[1])


def _second_input(declared: Graph, store: Store, x: np.ndarray) -> np.ndarray:
    """What the second application sees in training: relu of the first's output."""
    graph = specialise(declared, training=True)
    relu_node = next(n for n in graph.nodes if n.op.opcode == "relu")
    graph.output("second", relu_node.output)
    return interpret(graph, {"x": x}, store, precision=DType.F64).outputs["second"]


def test_inference_uses_running_statistics_and_updates_nothing() -> None:
    graph = specialise(norm(), training=False)
    store = randomised(graph)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    y = interpret(graph, {"x": x}, store, precision=DType.F64).outputs["y"]
    gamma, beta, mean, var = (store[s].astype(np.float64)[:, None, None] for s in graph.states)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 2e-5) * gamma + beta, **EXACT)
    assert not graph.updates


def test_one_declared_graph_serves_both_modes_and_stays_declared() -> None:
    graph = branches_of_every_kind()
    before = [type(n.op) for n in graph.nodes]
    for training in (True, False):
        lowered = specialise(graph, training=training)
        verify(lowered)
        assert not declared_ops(lowered)
    assert [type(n.op) for n in graph.nodes] == before
    assert BatchNorm in before


def dropped(ratio: float = 0.4) -> Graph:
    graph = Graph("dropout")
    graph.output("y", dropout(graph.input("x", ("N", 50)), ratio))
    return graph


def test_dropout_keeps_the_mean_and_vanishes_in_inference() -> None:
    x = np.ones((400, 50), np.float32)
    step = compile(specialise(dropped(), training=True), seed=3)
    y = step(x=x)["y"]
    kept = y != 0
    # 20 000 draws of probability 0.6: the share is within 5 standard deviations (0.017).
    assert kept.mean() == pytest.approx(0.6, abs=0.018)
    np.testing.assert_allclose(y[kept], 1 / 0.6, rtol=1e-6)
    assert (compile(dropped())(x=x)["y"] == x).all()


def test_masks_follow_key_step_and_row_and_nothing_else() -> None:
    graph = specialise(dropped(), training=True)

    def masks(seed: int, rows: int, steps: int) -> list[np.ndarray]:
        step = compile(graph, store=Store(), seed=seed)
        return [step(x=np.ones((rows, 50), np.float32))["y"] != 0 for _ in range(steps)]

    one, again, larger, other = masks(1, 8, 3), masks(1, 8, 3), masks(1, 16, 3), masks(2, 8, 3)
    for a, b, c in zip(one, again, larger):
        assert (a == b).all()
        assert (a == c[:8]).all()
    assert (one[0] != one[1]).any()
    assert (one[0] != other[0]).any()


def test_two_layers_draw_from_streams_of_their_own() -> None:
    graph = Graph("two")
    x = graph.input("x", ("N", 50))
    graph.output("a", dropout(x, 0.5))
    graph.output("b", dropout(x, 0.5))
    run = compile(specialise(graph, training=True))(x=np.ones((4, 50), np.float32))
    assert (run["a"] != run["b"]).any()


def test_streams_fed_by_the_host_are_inputs() -> None:
    graph = specialise(dropped(0.5), training=True, randomness="host")
    draws = np.random.default_rng(0).random((6, 50))
    y = interpret(graph, {"x": np.ones((6, 50)), "random.0": draws}).outputs["y"]
    np.testing.assert_array_equal(y, 2.0 * (draws >= 0.5))
    assert not graph.updates


def test_exits_that_stay_declared_are_no_matches() -> None:
    graph = branches_of_every_kind()
    first = Specialise().run(graph)
    assert not any("exit" in where for where in first.report.matches)
    assert not Specialise().run(first.graph).report.matches
    assert len(Specialise(exits="all").run(first.graph).report.matches) == 2
