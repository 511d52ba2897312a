"""The text form is stable, complete, and parses back to an equal graph."""

from __future__ import annotations

import pytest
from builders import (
    branches_of_every_kind,
    dense_net_with_exits,
    merge_and_run_with_exits,
    one_norm_applied_twice,
    random_graphs,
)
from hypothesis import given, settings

from branchgraph.ir.attributes import format_value
from branchgraph.ir.builder import conv, cross_entropy, dense
from branchgraph.ir.errors import FormatError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, branch
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.optimisers import Adam
from branchgraph.ir.state import Role, State
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.verify import verify
from branchgraph.passes.specialise import specialise
from branchgraph.training import joint_loss

NETWORKS = (
    branches_of_every_kind,
    dense_net_with_exits,
    merge_and_run_with_exits,
    one_norm_applied_twice,
)


def assert_round_trip(graph: Graph) -> Graph:
    text = format_graph(graph)
    parsed = parse_graph(text)
    verify(parsed)
    assert format_graph(parsed) == text
    assert structural_hash(parsed) == structural_hash(graph)
    return parsed


@pytest.mark.parametrize("build", NETWORKS)
def test_declared_networks_round_trip(build) -> None:  # type: ignore[no-untyped-def]
    assert_round_trip(build())


@pytest.mark.parametrize("build", NETWORKS)
def test_inference_forms_round_trip(build) -> None:  # type: ignore[no-untyped-def]
    assert_round_trip(specialise(build(), training=False))


def test_a_training_step_with_updates_and_gradients_round_trips() -> None:
    step = Adam().attach(
        differentiate(joint_loss(specialise(branches_of_every_kind(), training=True)))
    )
    parsed = assert_round_trip(step)
    assert len(parsed.updates) == len(step.updates) > len(step.gradients) > 0


@settings(max_examples=60, deadline=None)
@given(random_graphs())
def test_random_graphs_round_trip(graph: Graph) -> None:
    assert_round_trip(graph)


def test_states_and_nodes_that_share_a_name_stay_apart() -> None:
    graph = Graph("duplicates")
    x = graph.input("x", ("N", 4))
    first = graph.read(State("w", (4,)))
    second = graph.read(State("w", (4,), role=Role.STATISTIC))
    third = graph.read(State("x", (4,)))
    y = conv_like = (x * first) + second + third
    graph.output("y", dense(y, 2, name="layer") + dense(conv_like, 2, name="layer"))
    text = format_graph(graph)
    assert "state w~2 : f32[4] statistic" in text
    parsed = assert_round_trip(graph)
    assert [s.name for s in parsed.states].count("w") == 2
    assert [s.name for s in parsed.states].count("layer.weight") == 2


def test_one_norm_applied_twice_keeps_one_set_of_states() -> None:
    parsed = assert_round_trip(one_norm_applied_twice())
    assert len(parsed.states) == 4
    trained = assert_round_trip(specialise(one_norm_applied_twice(), training=True))
    assert len(trained.updates) == 2


def test_odd_names_are_quoted() -> None:
    graph = Graph('a "graph"\n')
    x = graph.input("x y", ("N", 3, 4, 4))
    with branch("left/right"), branch("scope"):
        graph.output("state", conv(x, 2, 3, name="1#}"))
    parsed = assert_round_trip(graph)
    assert parsed.name == 'a "graph"\n'
    assert list(parsed.branches()) == ["left/right", "left/right/scope"]


@pytest.mark.parametrize("value", [2.0, 1e-300, float("inf"), -0.5, 0.1 + 0.2])
def test_floats_are_written_exactly(value: float) -> None:
    graph = Graph("constant")
    graph.output("y", graph.constant(value, "f64"))
    assert format_value(value) in format_graph(graph)
    assert_round_trip(graph)


BROKEN = {
    "graph g {\n  output y = %0\n}\n": "line 2: expected a value defined above",
    "graph g {\n  input x : f32[N]\n  %0 = relu(%1) : f32[N]\n}\n": "graphs are acyclic",
    "graph g {\n  input x : f32[N]\n  %0 = nothing(x) : f32[N]\n}\n": "unknown op 'nothing'",
    "graph g {\n  input x : f32[N]\n  %0 = relu(x) : f32[M]\n}\n": "as inferred",
    "graph g {\n  input x : f32[N]\n  input x : f32[N]\n}\n": "exists already",
    "graph g {\n  input x : f32[N]\n  %0 = relu(x) {slope=2} : f32[N]\n}\n": "no attribute 'slope'",
    "graph g {\n  input x : f33[N]\n}\n": "unknown dtype 'f33'",
    "graph g {\n  input x : f32[N]\n  %0 = relu(x, x) : f32[N]\n}\n": "takes (x), got 2",
    "graph g {\n  state s : f32[N] param init=zeros()\n}\n": "a concrete shape",
    "graph g {\n  state s : f32[2] param init=ones(3)\n}\n": "an attribute name",
    "graph g {\n  state s : f32[2] weight init=ones()\n}\n": "one of the roles",
    "graph g {\n": "expected '}'",
    "graph g {\n}\nmore\n": "the end of the text",
    "graph g {\n  %0 = full() {value=1, shape=[], dtype=f32} : f32[]\n"
    "  %0 = full() {value=1, shape=[], dtype=f32} : f32[]\n}\n": "defined twice",
    "graph g {\n  branch a {\n}\n": "expected '}'",
    "": "expected 'graph'",
    "graph g {\n  input x : f32[N] = 3\n}\n": "only a 0-d input",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda t: BROKEN[t])
def test_broken_text_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_graph(text)
    assert BROKEN[text] in str(caught.value)


def test_attributes_keep_their_types() -> None:
    text = "graph g {\n  %0 = full() {value=2, shape=[], dtype=f32} : f32[]\n  output y = %0\n}\n"
    assert "value=2.0" in format_graph(parse_graph(text))
    wrong = text.replace("value=2,", "value=true,")
    with pytest.raises(FormatError, match="expected float"):
        parse_graph(wrong)


def test_cross_entropy_with_an_absent_attribute_round_trips() -> None:
    graph = Graph("loss")
    logits, labels = graph.input("z", ("N", 3)), graph.input("t", ("N",), "i64")
    graph.output("a", cross_entropy(logits, labels))
    graph.output("b", cross_entropy(logits, labels, ignore_label=-1))
    assert "ignore_label=none" in format_graph(graph)
    assert_round_trip(graph)
