"""Graphs keep their contracts while they are built and edited."""

from __future__ import annotations

import numpy as np
import pytest
from builders import branches_of_every_kind, image_input, images

from branchgraph.ir.builder import conv, dense, gate, merge_sum, relu
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.graph import Graph, Node, branch, scope
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import make
from branchgraph.ir.rebuild import bind, clone
from branchgraph.ir.state import State, Store
from branchgraph.ir.verify import verify


def test_values_know_their_users() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 4))
    a, b = relu(x), x * 2.0
    total = merge_sum(a, b, a)
    assert x.users == [a.producer, b.producer]
    assert a.users == [total.producer]


def test_sibling_branches_read_the_same_value() -> None:
    graph = Graph("g")
    h = relu(image_input(graph))
    with branch("left"):
        a = conv(h, 2, 1)
    with branch("right"):
        b = conv(h, 2, 1)
    assert a.producer is not None
    assert b.producer is not None
    assert a.producer.inputs[0] is b.producer.inputs[0] is h
    assert {k: len(v) for k, v in graph.branches().items()} == {"left": 1, "right": 1}


def test_errors_name_the_node_its_place_the_shapes_and_the_remedy() -> None:
    graph = Graph("g")
    x = image_input(graph)
    weight = graph.read(State("w", (4, 5, 3, 3)))
    op = conv(x, 4, 3).producer
    assert op is not None
    with scope("res2/block1"), branch("left"), pytest.raises(ShapeError) as caught:
        graph.emit(op.op, x, weight, name="conv1")
    message = str(caught.value)
    for part in ("conv at res2/block1/left/conv1", "3 channels", "reads 5", "x: f32[N, 3, 6, 6]"):
        assert part in message


def test_a_value_of_another_graph_is_refused() -> None:
    one, other = Graph("one"), Graph("other")
    x, y = one.input("x", (2,)), other.input("y", (2,))
    with pytest.raises(GraphError, match="belongs to graph 'other'"):
        _ = x + y


def test_replacing_a_value_moves_users_and_roots() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 4))
    a = relu(x)
    y = graph.output("y", a * 2.0)
    graph.output("a", a)
    new = graph.emit(make("tanh"), x)
    graph.replace(a, new)
    assert graph.outputs["a"] is new
    assert not a.users
    assert a.producer is not None
    graph.remove(a.producer)
    verify(graph)
    result = interpret(graph, {"x": np.ones((1, 4), np.float32)}).outputs["y"]
    np.testing.assert_allclose(result, 2 * np.tanh(np.ones((1, 4))), rtol=1e-6)
    assert y.producer is not None


def test_nodes_added_late_are_sorted_before_their_readers() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 4))
    early = relu(x)
    graph.output("y", early + 1.0)
    late = graph.emit(make("exp"), x)
    assert early.producer is not None
    graph.set_inputs(early.producer, (late,))
    order = [n.op.opcode for n in graph.nodes]
    assert order.index("exp") < order.index("relu")
    verify(graph)


def test_a_cycle_is_an_error() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 4))
    a = relu(x)
    b = relu(a)
    assert a.producer is not None
    graph.set_inputs(a.producer, (b,))
    with pytest.raises(GraphError, match="cycle"):
        _ = graph.nodes


def test_removing_a_node_that_is_read_is_an_error() -> None:
    graph = Graph("g")
    a = relu(graph.input("x", ("N", 4)))
    relu(a)
    assert isinstance(a.producer, Node)
    with pytest.raises(GraphError, match="reads it"):
        graph.remove(a.producer)


def test_the_verifier_finds_types_that_inference_contradicts() -> None:
    graph = branches_of_every_kind()
    node = graph.nodes[3]
    node.outputs[0].type = graph.nodes[0].inputs[1].type
    with pytest.raises(GraphError, match="inference gives"):
        verify(graph)


def test_a_clone_shares_states_and_nothing_else() -> None:
    graph = branches_of_every_kind()
    copy = clone(graph)
    assert copy.states == graph.states
    assert not set(copy.nodes) & set(graph.nodes)
    copy.keep(output=lambda name: False)
    assert graph.outputs


def test_bind_gives_symbols_a_size() -> None:
    graph = Graph("g")
    x = image_input(graph)
    graph.output("y", dense(x, 2))
    bound = bind(graph, N=5)
    assert bound.outputs["y"].shape == (5, 2)
    store = Store.initialised(graph.states)
    with pytest.raises(ShapeError, match=r"expected shape \[5, 3, 6, 6\]"):
        interpret(bound, {"x": images(4)}, store)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({}, "input 'x' is not given"), ({"x": 1.0, "z": 1.0}, "no input 'z'")],
)
def test_inputs_are_checked_by_name(inputs: dict[str, float], message: str) -> None:
    graph = Graph("g")
    graph.output("y", graph.input("x", ()) + 1.0)
    with pytest.raises(GraphError, match=message):
        interpret(graph, inputs)


def test_no_node_is_found_by_an_empty_name() -> None:
    graph = Graph("g")
    y = graph.emit(make("tanh"), graph.input("x", ("N", 4)), name="y")
    graph.output("y", graph.emit(make("tanh"), y))
    assert graph.find("y") is y.producer
    with pytest.raises(GraphError, match="expected the path or name of a node in g, got an empty"):
        graph.find("")


def test_a_gate_must_broadcast_to_its_value() -> None:
    graph = Graph("g")
    with pytest.raises(ShapeError, match="do not broadcast"):
        gate(graph.input("x", ("N", 4)), graph.input("s", (3,)))


def test_updates_must_have_the_type_of_their_state() -> None:
    graph = Graph("g")
    with pytest.raises(ShapeError, match="expected f32"):
        graph.update(State("s", (3,)), graph.input("x", (4,)))
