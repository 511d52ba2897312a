"""Gates by sample are fixed on request only, at what they were on recorded data."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from builders import images, randomised

from branchgraph.compiler import compile
from branchgraph.ir.builder import conv, dense, gate, global_average_pool, merge_sum, relu
from branchgraph.ir.errors import RefusalError
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import cast, compare
from branchgraph.ir.state import Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.passes.base import Pass
from branchgraph.passes.gate_profiles import profile_gates
from branchgraph.passes.harden_gates import HardenGates
from branchgraph.passes.prune_gates import PruneGates

STEP = HardenGates(unsafe_profile=True)


def above(x: Value, threshold: float) -> Value:
    """1 for the samples whose mean over channels and positions is above the threshold."""
    mean = x.graph.emit(make("reduce_mean", axes=(1, 2, 3), keepdims=True), x)
    return cast(compare("greater", mean, x.graph.constant(threshold)), DType.F32)


def skipping() -> Graph:
    """Two blocks that bright samples skip, or dark ones."""
    graph = Graph("skipping")
    x = graph.input("x", ("N", 3, 6, 6))
    h = relu(conv(x, 4, 3, pad=1, name="stem"))
    for name, threshold in (("bright", 5.0), ("mixed", 0.0)):
        block = conv(h, 4, 3, pad=1, name=f"{name}/conv")
        h = relu(merge_sum(h, gate(block, above(x, threshold), name=name)))
    graph.output("logits", dense(global_average_pool(h), 5, name="fc"))
    return graph


def recorded(graph: Graph, batches: Iterable[np.ndarray]) -> tuple[Graph, Store]:
    """The profiled network, and its store after runs."""
    profiled, store = profile_gates(graph), randomised(graph)
    store.initialise(profiled.states)
    run = compile(profiled, store=store)
    for batch in batches:
        run(x=batch)
    return profiled, store


def dark_and_light() -> list[np.ndarray]:
    """Batches whose means are on both sides of 0, and far below 5."""
    return [images(4, seed=k) for k in range(3)]


def named(store: Store, graph: Graph, name: str) -> float:
    (state,) = (s for s in graph.states if s.name == name)
    return float(store[state].reshape(()))


def test_a_profile_holds_the_least_and_the_most_of_all_rows() -> None:
    graph = skipping()
    text = format_graph(graph)
    profiled, store = recorded(graph, dark_and_light())
    assert format_graph(graph) == text
    assert named(store, profiled, "gates.profile.runs") == 3
    for gate_name, least, most in (("bright", 0, 0), ("mixed", 0, 1)):
        assert named(store, profiled, f"{gate_name}.profile.least") == least
        assert named(store, profiled, f"{gate_name}.profile.most") == most
    assert format_graph(parse_graph(format_graph(profiled))) == format_graph(profiled)


def test_a_profile_changes_no_output() -> None:
    graph = skipping()
    profiled, store = recorded(graph, [])
    fed = {"x": images(4)}
    plain, seen = (interpret(g, fed, store).outputs["logits"] for g in (graph, profiled))
    np.testing.assert_array_equal(plain, seen)


def test_gates_that_never_moved_are_fixed_on_request_and_pruned() -> None:
    graph = skipping()
    profiled, store = recorded(graph, dark_and_light())
    assert PruneGates().run(profiled).report.matches == []
    result = STEP.run(profiled, values=store)
    assert result.report.matches == ["bright"]
    reason = "its gate was not the same for all rows of 3 recorded runs"
    assert result.report.refusals == [("mixed", reason)]
    assert "unsafe: bright is taken to be what it was in 3 recorded runs" in str(result.report)
    assert not [s for s in result.graph.states if ".profile." in s.name]
    assert not result.graph.updates
    pruned = PruneGates().run(result.graph)
    assert pruned.report.matches
    assert {n.path for n in pruned.graph.nodes if n.op.opcode == "conv"} == {"stem", "mixed/conv"}


def test_on_recorded_data_nothing_changes_and_on_other_data_it_may() -> None:
    graph = skipping()
    profiled, store = recorded(graph, dark_and_light())
    pruned = PruneGates().apply(STEP.apply(profiled, values=store))
    for x in dark_and_light():
        before, after = (interpret(g, {"x": x}, store).outputs["logits"] for g in (graph, pruned))
        np.testing.assert_array_equal(after, before)
    bright = images(4) + 6
    before, after = (interpret(g, {"x": bright}, store).outputs["logits"] for g in (graph, pruned))
    assert np.abs(after - before).max() > 0.1


def test_without_the_option_a_profile_is_left_alone() -> None:
    profiled, store = recorded(skipping(), dark_and_light())
    assert not HardenGates().run(profiled, values=store).report.matches
    reasons = [why for _, why in PruneGates().run(profiled).report.refusals]
    assert reasons == ["its gate depends on the input x"] * 2


def test_a_gate_that_is_not_finite_is_never_fixed() -> None:
    batch = images(4)
    batch[0, 0, 0, 0] = np.nan
    graph = Graph("nan")
    x = graph.input("x", ("N", 3, 6, 6))
    mean = graph.emit(make("reduce_mean", axes=(1, 2, 3), keepdims=True), x)
    graph.output("y", gate(conv(x, 4, 3), mean * 0.0))
    profiled, store = recorded(graph, [images(4), batch])
    report = STEP.run(profiled, values=store).report
    assert report.refusals == [
        ("gate", "its gate was not the same for all rows of 2 recorded runs")
    ]


def test_what_is_missing_is_said() -> None:
    graph = skipping()
    report = STEP.run(graph).report
    reason = "no gate of it has a profile; profile_gates(graph) first"
    assert report.refusals == [("skipping", reason)]
    with pytest.raises(RefusalError, match="needs the recorded profile.*give a .bg file"):
        STEP.run(profile_gates(graph))
    profiled, store = recorded(graph, [])
    reason = "its profile has no runs; run the profiled network over data first"
    assert STEP.run(profiled, values=store).report.refusals == [
        ("bright", reason),
        ("mixed", reason),
    ]


def test_the_specification_string() -> None:
    assert Pass.from_spec("harden_gates:unsafe_profile=true") == STEP
    assert not HardenGates().unsafe_profile
