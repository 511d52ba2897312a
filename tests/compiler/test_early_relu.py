"""ReLU moves before max pooling behind a layer, and changes no bit."""

from __future__ import annotations

import numpy as np
import pytest

from branchgraph.compiler import compile
from branchgraph.compiler.early_relu import relu_before_pool
from branchgraph.ir.builder import conv, max_pool, relu
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph
from branchgraph.ir.ops.pool import MaxPool
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.state import Store


def net(stride: int = 2, *, pad: int = 0, tapped: bool = False) -> Graph:
    """conv, max pooling, ReLU; `tapped` also returns what is pooled."""
    graph = Graph("net")
    y = conv(graph.input("x", ("N", 3, 9, 9)), 5, 3, pad=1)
    if tapped:
        graph.output("tap", y)
    graph.output("y", relu(max_pool(y, 3, stride=stride, pad=pad)))
    return graph


def order(graph: Graph) -> list[str]:
    return [node.op.opcode for node in graph.nodes]


@pytest.mark.parametrize("pad", [0, 1])
def test_relu_moves_and_numbers_stay(pad: int) -> None:
    graph = net(pad=pad)
    moved = relu_before_pool(graph)
    assert order(graph) == ["conv", "max_pool", "relu"]
    assert order(moved) == ["conv", "relu", "max_pool"]
    assert order(relu_before_pool(moved)) == order(moved)
    store = Store.initialised(graph.states)
    x = np.random.default_rng(0).standard_normal((4, 3, 9, 9)).astype(np.float32)
    before, after = (compile(g, "numpy", store=store).run({"x": x})["y"] for g in (graph, moved))
    np.testing.assert_array_equal(before, after)


def test_relu_stays_where_the_pooled_value_is_read_elsewhere() -> None:
    assert order(relu_before_pool(net(tapped=True))) == ["conv", "max_pool", "relu"]


def test_relu_stays_where_a_window_may_be_padding_only() -> None:
    graph = Graph("outside")
    y = conv(graph.input("x", ("N", 3, 9, 9)), 5, 3, pad=1)
    pooled = graph.emit(MaxPool((2, 2), (3, 3), (0, 0, 0, 0), cover_all=True), y)
    graph.output("y", relu(pooled))
    assert order(relu_before_pool(graph)) == ["conv", "max_pool", "relu"]


def test_graphs_with_gradients_stay_as_they_are() -> None:
    graph = net()
    graph.output("loss", graph.emit(ReduceSum((0, 1, 2, 3)), graph.outputs["y"]))
    trained = differentiate(graph)
    assert order(relu_before_pool(trained)) == order(trained)
