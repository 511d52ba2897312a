"""Gates select: closed gates leak nothing forward and still learn backward."""

from __future__ import annotations

import numpy as np
import pytest
from builders import EXACT

from branchgraph.ir.builder import conv, gate, merge_sum, scale_gradient, straight_through
from branchgraph.ir.gradient import differentiate, vjp
from branchgraph.ir.graph import Graph, Value, branch
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.elementwise import cast, compare
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.ops.reshape import Reshape, Slice
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType

RNG = np.random.default_rng(0)
F64 = DType.F64


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_lies_behind_a_closed_gate_does_not_leak(poison: float) -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 3), F64)
    graph.output("y", gate(x, graph.input("g", (3,), F64)))
    y = interpret(graph, {"x": np.array([[1.0, poison, 2.0]]), "g": np.array([1.0, 0.0, 0.5])})
    assert y.outputs["y"].tolist() == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    "shape", [(), (4, 1, 1), ("N", 1, 1, 1), ("N", 4, 1, 1), (1, 1, 5, 5)],
    ids=["scalar", "channel", "sample", "channel of a sample", "position"],
)  # fmt: skip
def test_closed_gates_of_every_extent_receive_the_gradient_of_their_value(shape) -> None:  # type: ignore[no-untyped-def]
    graph = Graph("g")
    x, g = graph.input("x", ("N", 4, 5, 5), F64), graph.input("g", shape, F64)
    seed = graph.input("seed", ("N", 4, 5, 5), F64)
    found = vjp(graph, {gate(x, g): seed}, [x, g])
    graph.output("dx", found[x])
    graph.output("dg", found[g])
    concrete = tuple(3 if d == "N" else d for d in shape)
    a, s = RNG.normal(size=(2, 3, 4, 5, 5))
    run = interpret(graph, {"x": a, "g": np.zeros(concrete), "seed": s}).outputs
    assert (run["dx"] == 0).all()
    full = np.broadcast_to(np.zeros(concrete), a.shape)
    axes = tuple(i for i in range(4) if len(concrete) < 4 - i or concrete[i - 4] != full.shape[i])
    np.testing.assert_allclose(run["dg"], (a * s).sum(axis=axes).reshape(concrete), **EXACT)


def k_hot_module() -> tuple[Graph, State, State]:
    """One MaskConnect module: two consumers, each reads the open ones of three producers.

    The real mask learns through a straight-through estimator from the binary one.
    """
    graph = Graph("mask_connect")
    x = graph.input("x", ("N", 3, 4, 4), F64)
    real = graph.read(State("mask", (2, 3), F64, Role.GATE))
    open_at = graph.input("open_at", (2, 3), F64)
    binary = straight_through(open_at, real)
    producers = []
    for j in range(3):
        with branch(f"producer{j}"):
            producers.append(conv(x, 3, 1, name=f"conv{j}"))
    weight = producers[2].producer.inputs[1].state  # type: ignore[union-attr]
    assert weight is not None
    consumers = [merge_sum(*(gate(y, entry(binary, i, k)) for k, y in enumerate(producers)))
                 for i in range(2)]  # fmt: skip
    total = merge_sum(*(c * c for c in consumers))
    graph.output("loss", graph.emit(ReduceSum(axes=(0, 1, 2, 3)), total))
    graph.output("producers", merge_sum(*producers))
    for k, y in enumerate(producers):
        graph.output(f"y{k}", y)
    return graph, real.state, weight  # type: ignore[return-value]


def entry(mask: Value, i: int, k: int) -> Value:
    """One entry of a K-of-N row as a 0-d gate."""
    row = mask.graph.emit(Slice(axis=0, start=i, size=1), mask)
    cell = mask.graph.emit(Slice(axis=1, start=k, size=1), row)
    return mask.graph.emit(Reshape(shape=()), cell)


def test_a_binary_mask_teaches_the_real_one_inactive_entries_included() -> None:
    graph, real, unread = k_hot_module()
    training = differentiate(graph)
    store = Store.initialised(training.states)
    mask = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    run = interpret(training, {"x": RNG.normal(size=(2, 3, 4, 4)), "open_at": mask}, store)
    y = [run.outputs[f"y{k}"] for k in range(3)]
    for i in range(2):
        delta = 2 * sum(m * v for m, v in zip(mask[i], y))
        expected = [float((delta * v).sum()) for v in y]
        np.testing.assert_allclose(run.gradients[real][i], expected, **EXACT)
    assert (run.gradients[real][:, 2] != 0).all(), "closed entries learn"
    assert (run.gradients[unread] == 0).all(), "a branch nobody reads has no weight gradient"


def test_a_hard_gate_from_a_score_passes_the_score_its_gradient() -> None:
    graph = Graph("hard")
    x = graph.input("x", ("N", 3), F64)
    score = graph.read(State("score", (3,), F64, Role.GATE))
    hard = cast(compare("greater", score, graph.constant(0.5, F64)), F64)
    y = gate(x, straight_through(hard, score))
    graph.output("y", y)
    graph.output("loss", graph.emit(ReduceSum(axes=(0, 1)), y))
    training = differentiate(graph)
    store = Store({score.state: np.array([0.9, 0.1, 0.6])})  # type: ignore[dict-item]
    a = RNG.normal(size=(4, 3))
    run = interpret(training, {"x": a}, store)
    np.testing.assert_array_equal(run.outputs["y"], a * [1, 0, 1])
    np.testing.assert_allclose(run.gradients[score.state], a.sum(axis=0), **EXACT)  # type: ignore[index]


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.25])
def test_scale_gradient_scales_the_cotangent_only(factor: float) -> None:
    graph = Graph("g")
    x, s = graph.input("x", ("N",), F64), graph.input("s", (), F64)
    y = scale_gradient(x, s)
    graph.output("y", y)
    graph.output("dx", vjp(graph, {y: None}, [x])[x])
    run = interpret(graph, {"x": np.array([1.0, 2.0]), "s": factor}).outputs
    assert run["y"].tolist() == [1.0, 2.0]
    assert run["dx"].tolist() == [factor, factor]
