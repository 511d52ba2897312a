"""What is static is evaluated once a version of the store, in float64, and follows its edits."""

from __future__ import annotations

import numpy as np
import pytest
from builders import randomised

from branchgraph.compiler import Executable, compile
from branchgraph.compiler.derived import Derived, derive
from branchgraph.compiler.pipeline import OPTIMISING
from branchgraph.ir.builder import batch_norm, conv
from branchgraph.ir.cost import cost
from branchgraph.ir.graph import Graph
from branchgraph.ir.hash import canonical_states
from branchgraph.ir.interpret import interpret
from branchgraph.nets import network
from branchgraph.passes.specialise import specialise


def normed() -> Graph:
    graph = Graph("normed")
    x = graph.input("x", ("N", 2, 5, 5))
    graph.output("y", batch_norm(conv(x, 3, 3, name="conv"), name="bn"))
    return specialise(graph, training=False)


def test_a_folded_batch_norm_is_two_derived_states() -> None:
    graph = OPTIMISING.apply(normed())
    numbering = {s: i for i, s in enumerate(canonical_states(graph))}
    known = len(numbering)
    cut, derived = derive(graph, numbering)
    assert [n.op.opcode for n in cut.nodes] == ["conv"]
    assert len(derived.states) == 2
    assert [numbering[s] for s in derived.states] == [known, known + 1]
    store = randomised(graph)
    arrays = [store.peek(s) for s in list(numbering)[:known]]
    for state, value in zip(derived.states, derived.values(arrays)):
        store[state] = value
    x = np.random.default_rng(0).normal(size=(2, 2, 5, 5)).astype(np.float32)
    expected = interpret(graph, {"x": x}, store).outputs["y"]
    np.testing.assert_allclose(
        interpret(cut, {"x": x}, store).outputs["y"], expected, rtol=0, atol=1e-5
    )


def test_without_expressions_nothing_is_derived() -> None:
    graph = Graph("plain")
    graph.output("y", conv(graph.input("x", ("N", 2, 5, 5)), 3, 3))
    numbering = {s: i for i, s in enumerate(canonical_states(graph))}
    _, derived = derive(graph, numbering)
    assert derived.states == ()
    assert derived.values([]) == []


class _Sum:
    """A runner that reads the derived states of a program and nothing else."""

    def run(self, arguments, states, version=0, observer=None):  # type: ignore[no-untyped-def]
        from branchgraph.compiler.backend import Results

        return Results([np.array([sum(float(s.sum()) for s in states)])], [], [])

    def footprint(self) -> None:
        return None


def test_derived_values_are_computed_anew_only_when_the_store_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = OPTIMISING.apply(normed())
    states = canonical_states(graph)
    numbering = {s: i for i, s in enumerate(states)}
    _, derived = derive(graph, numbering)
    plain = compile(graph, "numpy")
    store = randomised(graph)
    run = Executable(plain.program, _Sum(), ("x",), tuple(states), ("y",), store, derived, "numpy")
    calls: list[int] = []
    honest = Derived.values
    monkeypatch.setattr(
        Derived, "values", lambda self, arrays: calls.append(1) or honest(self, arrays)
    )
    fed = {"x": np.zeros((1, 2, 5, 5), np.float32)}
    first = run.run(fed)["y"]
    run.run(fed)
    assert len(calls) == 1
    store[states[0]][...] += 1.0
    assert run.run(fed)["y"] != first
    assert len(calls) == 2


def test_branches_cost_what_the_fused_network_costs() -> None:
    branches = specialise(network("pd_a_resnet:depth=18,size=32,width=8,groups=8"), training=False)
    plain = specialise(network("imagenet_resnet:depth=18,size=32,width=8"), training=False)
    assert cost(OPTIMISING.apply(branches)).per_sample().macs == cost(plain).per_sample().macs
