"""BranchyNet's networks, and networks by specification string."""

from __future__ import annotations

import pytest

from branchgraph.ir.errors import FormatError, GraphError
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.verify import verify
from branchgraph.nets import NETWORKS, lenet, network


def shapes(graph) -> list[str]:  # type: ignore[no-untyped-def]
    kinds = ("conv", "max_pool", "dense")
    return [str(n.output.type) for n in graph.nodes if n.op.opcode in kinds]


def test_lenet_has_the_published_shapes() -> None:
    assert shapes(lenet()) == [
        "f32[N, 5, 30, 30]", "f32[N, 5, 15, 15]", "f32[N, 10, 17, 17]", "f32[N, 10, 9, 9]",
        "f32[N, 20, 11, 11]", "f32[N, 20, 6, 6]", "f32[N, 84]", "f32[N, 10]",
    ]  # fmt: skip


def test_the_branch_of_b_lenet_has_the_published_shapes() -> None:
    (nodes,) = network("b_lenet").branches().values()
    kinds = ("conv", "max_pool", "reshape")
    assert [str(n.output.type) for n in nodes if n.op.opcode in kinds] == [
        "f32[N, 5, 15, 15]", "f32[N, 10, 15, 15]", "f32[N, 10, 8, 8]", "f32[N, 640]",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_verifies_and_its_text_parses_back(name: str) -> None:
    graph = network(name)
    verify(graph)
    assert structural_hash(parse_graph(format_graph(graph))) == structural_hash(graph)
    assert NETWORKS[name].summary


def test_options_are_read_by_their_types() -> None:
    graph = network("lenet:size=8,kernel=3,widths=4+8+16,classes=3")
    assert shapes(graph)[0] == "f32[N, 4, 8, 8]"
    assert shapes(graph)[-1] == "f32[N, 3]"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("resnet", FormatError, "unknown network 'resnet'; known: b_lenet, lenet"),
        ("lenet:depth=3", FormatError, "no option 'depth'; it has: size, channels"),
        ("lenet:size=big", FormatError, "lenet:size: expected int, got 'big'"),
        ("lenet:size=8,size=9", FormatError, "size is given twice"),
        ("lenet:size=4", GraphError, "size is >= 8"),
        ("lenet:widths=3+4", GraphError, "three channel counts"),
        ("b_lenet:criterion=luck", GraphError, "criterion 'luck' is none of entropy"),
        ("lenet;rm", FormatError, "expected NAME"),
    ],
)
def test_specs_that_cannot_be_built_say_what_can(spec, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        network(spec)
