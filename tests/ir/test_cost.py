"""The cost model against published figures and rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from builders import image_input

from branchgraph.ir.builder import (
    average_pool,
    batch_norm,
    conv,
    dense,
    global_average_pool,
    max_pool,
    relu,
    sigmoid,
)
from branchgraph.ir.cost import branch_macs, cost, deployed_cost, node_macs, parameter_count
from branchgraph.ir.dims import Dim
from branchgraph.ir.errors import FormatError
from branchgraph.ir.functions import sample_conv
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.ops.linear import Dense
from branchgraph.nets import b_lenet, lenet
from branchgraph.passes.specialise import specialise

#: specs' table of B-LeNet: trunk segment 1, head 1, segment 2 + head 2 (parameters, MACs).
SEGMENT_1, HEAD_1, REST = (130, 112_500), (6_870, 107_650), (66_844 + 850, 1_026_730 + 840)


def test_lenet_has_the_published_parameters_and_macs() -> None:
    plain = cost(lenet()).per_sample()
    assert (plain.parameters, plain.macs) == (67_824, 1_140_070)
    branchy = cost(b_lenet()).per_sample()
    assert branchy.parameters == SEGMENT_1[0] + HEAD_1[0] + REST[0]
    assert branchy.macs == SEGMENT_1[1] + HEAD_1[1] + REST[1]
    assert branch_macs(b_lenet()) == {"": SEGMENT_1[1] + REST[1], "exit1": HEAD_1[1]}


def test_macs_of_a_symbolic_batch_are_affine_in_it() -> None:
    assert cost(lenet()).macs == 1_140_070 * Dim.symbol("N")


def test_a_parameter_that_is_read_twice_counts_once_and_statistics_not() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 4))
    first = dense(x, 4, name="fc")
    assert first.producer is not None
    again = graph.emit(Dense(), first, *first.producer.inputs[1:])
    graph.output("y", batch_norm(again))
    assert parameter_count(graph) == 4 * 4 + 4 + 2 * 4


def kernels(x: Value) -> Value:
    """A 3x3 kernel of 5 filters for every sample."""
    return x.graph.input("kernels", (x.shape[0], 5, 3, 3, 3))


def paradise_layers() -> dict[str, tuple[Graph, int]]:
    """One layer a graph, and its MACs for one image by the ParaDise repository's rules."""
    pixels = 6 * 6
    layers = {
        "conv": (lambda x: conv(x, 5, 3, pad=1, bias=False), 9 * 3 * 5 * pixels),
        "conv with bias": (lambda x: conv(x, 5, 3, pad=1), (9 * 3 * 5 + 5) * pixels),
        "grouped conv": (lambda x: conv(x, 6, 3, pad=1, groups=3, bias=False), 9 * 6 * pixels),
        "kernel a sample": (lambda x: sample_conv(x, kernels(x), pad=1), 9 * 3 * 5 * pixels),
        "dense": (lambda x: dense(x, 7), 3 * pixels * 7),
        "batch norm": (batch_norm, 2 * 3 * pixels),
        "relu": (relu, 3 * pixels),
        "max pool": (lambda x: max_pool(x, 2), 3 * pixels),
        "average pool": (lambda x: average_pool(x, 3, stride=1), 3 * pixels),
        "mean": (global_average_pool, 0),
        "sigmoid": (sigmoid, 0),
        "addition": (lambda x: x + x, 0),
    }
    graphs = {}
    for name, (layer, macs) in layers.items():
        graph = Graph(name)
        graph.output("y", layer(image_input(graph)))
        graphs[name] = (graph, macs)
    return graphs


@pytest.mark.parametrize("name", paradise_layers())
@pytest.mark.parametrize("declared", [True, False])
def test_the_paradise_mode_counts_by_its_rules(name: str, declared: bool) -> None:
    graph, macs = paradise_layers()[name]
    graph = graph if declared else specialise(graph, training=False)
    assert cost(graph, "paradise").per_sample().macs == macs


def test_activation_bytes_are_those_of_all_node_outputs() -> None:
    graph = Graph("g")
    graph.output("y", relu(relu(image_input(graph))))
    assert cost(graph).per_sample().activation_bytes == 2 * 3 * 6 * 6 * 4


def two_symbols(layer: Callable[[Value], Value]) -> Graph:
    """A layer over images of any height."""
    graph = Graph("tall")
    graph.output("y", layer(graph.input("x", ("N", 3, "H", 4))))
    return graph


def test_a_deployed_network_has_macs_wherever_they_are_affine() -> None:
    assert deployed_cost(two_symbols(relu)).macs == 0, "its size is N H, its work is none"
    found = deployed_cost(two_symbols(lambda x: conv(x, 5, 1)))
    assert (found.macs, found.parameters) == (None, 5 * 3 + 5)


def test_an_unknown_counting_mode_lists_the_known_ones() -> None:
    with pytest.raises(FormatError, match="known: plain, paradise"):
        node_macs(lenet().nodes[0], "guess")
