"""A part of a graph cut out computes what it computed inside."""

from __future__ import annotations

import numpy as np
from builders import branches_of_every_kind, images, randomised

from branchgraph.ir.builder import conv, dense, relu, sigmoid, tanh
from branchgraph.ir.extract import extract, nodes_between
from branchgraph.ir.graph import Graph, scope
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import make
from branchgraph.ir.ops.reshape import Split
from branchgraph.ir.state import State
from branchgraph.ir.verify import verify
from branchgraph.passes.specialise import specialise


def test_a_part_between_two_values() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 4))
    h = relu(x)
    with scope("s"):
        y = sigmoid(tanh(h), name="last")
    part = extract([y], [h])
    verify(part)
    assert [n.op.opcode for n in part.nodes] == ["tanh", "sigmoid"]
    assert part.nodes[-1].path == "s/last"
    assert list(part.inputs) == ["x0"]
    assert part.inputs["x0"].type == h.type
    assert list(part.outputs) == ["y0"]
    assert graph.size == 3, "the graph is left alone"


def test_without_a_cut_the_part_ends_at_inputs_and_states() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 4))
    rate = graph.input("rate", (), default=0.5)
    scale = graph.read(State("scale", ()))
    part = extract([x * (scale * rate)], [])
    assert set(part.inputs) == {"x", "rate"}
    assert part.inputs["rate"].default == 0.5
    assert part.states == [scale.state]


def test_an_input_of_the_graph_is_not_taken_for_a_cut_of_the_same_name() -> None:
    graph = Graph("g")
    a, b = graph.input("x0", (2,)), graph.input("b", (2,))
    h = relu(b)
    part = extract([h - a], [h])
    assert list(part.inputs) == ["x0_", "x0"]
    fed = {"x0_": np.array([3.0, 4.0]), "x0": np.array([1.0, 1.0])}
    np.testing.assert_array_equal(interpret(part, fed).outputs["y0"], [2.0, 3.0])


def test_values_that_are_their_own_cut_are_passed_through() -> None:
    graph = Graph("g")
    x = graph.input("x", (2,))
    state = graph.read(State("s", (2,)))
    h = relu(x)
    part = extract([h, state, x, h], [h])
    assert part.size == 0
    assert part.outputs["y0"] is part.outputs["y3"] is part.inputs["x0"]
    assert part.outputs["y1"].state is state.state
    assert part.outputs["y2"] is part.inputs["x"]


def test_one_result_of_several_may_be_a_cut() -> None:
    graph = Graph("g")
    x = graph.input("x", (2, 3))
    left, right = graph.apply(Split(axis=1, sizes=(1, 2)), x)
    y = graph.emit(make("concat", axis=1), left, right)
    part = extract([y], [left])
    fed = {"x0": np.zeros((2, 1)), "x": np.ones((2, 3))}
    np.testing.assert_array_equal(interpret(part, fed).outputs["y0"], [[0, 1, 1]] * 2)


def test_nodes_between_come_producers_first() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 4))
    a = relu(x)
    b = dense(a, 4, name="d")
    y = b + a
    assert [n.op.opcode for n in nodes_between([y], {x})] == ["relu", "dense", "add"]
    assert [n.op.opcode for n in nodes_between([y], {a})] == ["dense", "add"]
    assert nodes_between([a], {a}) == []
    assert nodes_between([x], ()) == []


def test_a_long_chain_is_walked_without_recursion() -> None:
    graph = Graph("g")
    h = x = graph.input("x", (2,))
    for _ in range(5000):
        h = relu(h)
    assert len(nodes_between([h], {x})) == 5000


def test_all_outputs_cut_out_are_the_network() -> None:
    graph = specialise(branches_of_every_kind(), training=False, exits="all")
    part = extract(graph.outputs.values(), [])
    store = randomised(graph)
    fed = {"x": images()}
    whole = interpret(graph, fed, store).outputs
    for value, expected in zip(interpret(part, fed, store).outputs.values(), whole.values()):
        np.testing.assert_array_equal(value, expected)


def test_a_cut_in_the_middle_composes_to_the_whole() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 3, 6, 6))
    h = relu(conv(x, 4, 3, name="a"))
    y = graph.output("y", conv(h, 2, 3, name="b"))
    store = randomised(graph)
    fed = {"x": images()}
    first = interpret(extract([h], [x]), {"x0": fed["x"]}, store).outputs["y0"]
    second = interpret(extract([y], [h]), {"x0": first}, store).outputs["y0"]
    np.testing.assert_array_equal(second, interpret(graph, fed, store).outputs["y"])
