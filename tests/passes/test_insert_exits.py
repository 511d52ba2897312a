"""Exits go in by name, come out again, and change nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from builders import images, randomised

from branchgraph.compiler import compile
from branchgraph.ir.builder import conv, dense, global_average_pool, relu
from branchgraph.ir.errors import FormatError, GraphError, RefusalError
from branchgraph.ir.graph import Graph
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.state import Store
from branchgraph.nets import b_lenet, lenet
from branchgraph.passes.base import Pass
from branchgraph.passes.insert_exits import HEADS, InsertExits, RemoveExits
from branchgraph.passes.lower_exits import exits_of


def three_layers() -> Graph:
    graph = Graph("three")
    h = graph.input("x", ("N", 3, 6, 6))
    for k in (1, 2, 3):
        h = relu(conv(h, 4, 3, pad=1, name=f"conv{k}"), name=f"relu{k}")
    graph.output("logits", dense(global_average_pool(h), 5, name="fc"))
    return graph


def test_inserting_an_exit_into_lenet_gives_the_declared_b_lenet() -> None:
    inserted = Pass.from_spec("insert_exits:after=conv1").apply(lenet())
    assert structural_hash(inserted) == structural_hash(b_lenet())
    assert {s.name for s in inserted.states} == {s.name for s in b_lenet().states}


def test_removing_exits_gives_the_network_back() -> None:
    assert structural_hash(RemoveExits().apply(b_lenet())) == structural_hash(lenet())
    assert list(RemoveExits().apply(b_lenet()).inputs) == ["x"]


@pytest.mark.parametrize("head", HEADS)
def test_exits_stand_in_the_order_of_the_network_whatever_the_order_of_names(head: str) -> None:
    graph = InsertExits(after=("relu2", "relu1"), head=head).apply(three_layers())
    exits = exits_of(graph)
    assert [n.op.name for n in exits] == ["exit1", "exit2", "exit3"]  # type: ignore[attr-defined]
    assert list(graph.outputs) == ["exit1", "exit2", "exit3"]
    assert list(graph.branches()) == ["exit1", "exit2"]
    run = compile(graph, store=randomised(graph))
    assert set(run(x=images(8), **{"exit1.threshold": 10.0})["exit"]) == {0}


def test_trained_parameters_and_initial_values_of_the_trunk_stay() -> None:
    plain = three_layers()
    inserted = InsertExits(after=("conv1",)).apply(plain)
    assert set(plain.states) <= set(inserted.states)
    one, other = Store.initialised(plain.states, 3), Store.initialised(inserted.states, 3)
    for state in plain.states:
        np.testing.assert_array_equal(one[state], other[state])


def test_a_second_application_reports_zero_matches_and_why() -> None:
    step = InsertExits(after=("relu1",))
    again = step.run(step.apply(three_layers()))
    assert not again.report.matches
    assert again.report.refusals == [("relu1", "it has an exit already")]


def test_a_later_pass_may_add_another_exit() -> None:
    graph = InsertExits(after=("relu1",), head="pool").apply(three_layers())
    both = InsertExits(after=("relu2",), head="pool").apply(graph)
    names = [n.op.name for n in exits_of(both)]  # type: ignore[attr-defined]
    assert sorted(names[:-1]) == ["exit1", "exit3"]
    assert len(exits_of(both)[-1].inputs) == 1


def test_patience_reads_the_exits_before() -> None:
    step = InsertExits(after=("relu1", "relu2"), head="pool", criterion="patience", threshold=2.0)
    graph = step.apply(three_layers())
    assert [len(n.inputs) for n in exits_of(graph)] == [2, 3, 1]


def test_the_report_counts_parameters_and_macs() -> None:
    report = Pass.from_spec("insert_exits:after=conv1").run(lenet()).report
    assert report.parameters == (67_824, 74_694)
    assert report.macs == (1_140_070, 1_247_720)
    assert "1 matched, 0 refused" in str(report)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("insert_exits:after=conv9", GraphError, "no node 'conv9'.*conv1, conv2, conv3"),
        ("insert_exits:after=conv1,head=round", GraphError, "unknown head 'round'; known: conv"),
        ("insert_exits:after=conv1,criterion=luck", GraphError, "known: entropy"),
        ("insert_exits", FormatError, "after"),
        ("insert_exits:after=conv1,depth=3", FormatError, "no option 'depth'; it has: after"),
        ("insert_exits:after=conv1,threshold=low", FormatError, "expected float, got 'low'"),
        ("insert_exits:after", FormatError, "expected KEY=VALUE"),
        ("fuse", FormatError, "unknown pass 'fuse'; known: "),
        ("a b", FormatError, "expected NAME"),
    ],
)
def test_specs_that_cannot_be_followed_say_what_can(spec, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        Pass.from_spec(spec).apply(lenet())


@pytest.mark.parametrize("spec", ["insert_exits:after=conv1+conv2,criterion=margin", "dead_code"])
def test_specs_print_back(spec: str) -> None:
    step = Pass.from_spec(spec)
    assert Pass.from_spec(step.name) == step
    assert step.name.startswith(spec.partition(",")[0].partition(":")[0])


def test_outputs_that_are_no_logits_are_refused() -> None:
    graph = Graph("features")
    graph.output("y", relu(conv(graph.input("x", ("N", 3, 6, 6)), 4, 3, name="conv1")))
    with pytest.raises(RefusalError, match="logits must be"):
        InsertExits(after=("conv1",)).apply(graph)
    two = three_layers()
    two.output("more", two.find("fc").output)
    with pytest.raises(RefusalError, match="needs one output"):
        InsertExits(after=("conv1",)).apply(two)
