"""A pipeline applies its passes in order, shows each step, and stops at the one that is wrong."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from builders import branches_of_every_kind

from branchgraph.ir.builder import relu, tanh
from branchgraph.ir.errors import ClaimError, FormatError, GraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.text import format_graph
from branchgraph.passes.base import Pass, Report, Result
from branchgraph.passes.clean import Canonical, CommonSubexpressions, DeadCode
from branchgraph.passes.pipeline import Pipeline, Reports, pipeline


def twice_relu() -> Graph:
    graph = Graph("g")
    x = graph.input("x", ("N", 4))
    graph.output("y", relu(x) + relu(x))
    return graph


@dataclass(frozen=True)
class Swapped(Pass, claim="exact"):
    """The first relu becomes tanh, which nobody would claim to be exact."""

    claims: str = "exact"

    @property
    def name(self) -> str:
        return "swapped"

    def rewrite(self, graph: Graph, report: Report) -> None:
        node = next((n for n in graph.nodes if n.op.opcode == "relu"), None)
        if node is not None:
            new = tanh(node.inputs[0])
            report.matched(node, before=node.outputs, after=[new])
            graph.replace(node.output, new)
            graph.remove(node)


@dataclass(frozen=True)
class SwappedOnPurpose(Swapped, claim="different"):
    """The same, said to be another network."""


class Broken(Swapped):
    """A pass that leaves a graph which is none."""

    def rewrite(self, graph: Graph, report: Report) -> None:
        node = graph.nodes[0]
        graph.set_inputs(node, (node.output,))


def test_passes_run_in_order() -> None:
    graph = twice_relu()
    text = format_graph(graph)
    after = Pipeline((CommonSubexpressions(), Canonical())).apply(graph)
    assert [n.op.opcode for n in after.nodes] == ["relu", "sum"]
    assert format_graph(graph) == text, "the argument is not changed"


def test_an_empty_pipeline_gives_the_graph_back() -> None:
    graph = twice_relu()
    assert Pipeline(()).apply(graph) is graph


def test_a_pipeline_from_specification_strings() -> None:
    made = pipeline("dead_code", "common_subexpressions", "canonical", verify=True)
    assert made.passes == (DeadCode(), CommonSubexpressions(), Canonical())
    assert made.verify
    assert [n.op.opcode for n in made.apply(twice_relu()).nodes] == ["relu", "sum"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ded_code", "unknown pass 'ded_code'; known: .*dead_code"),
        ("dead_code:fast=true", "pass dead_code has no option 'fast'"),
        ("dead_code:", "expected KEY=VALUE"),
        ("insert_exits:after", "expected KEY=VALUE"),
    ],
)
def test_a_specification_that_is_wrong_says_how(spec: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        pipeline("dead_code", spec)


def test_a_step_that_breaks_its_claim_is_named() -> None:
    steps = (CommonSubexpressions(), Swapped(), DeadCode())
    with pytest.raises(ClaimError, match=r"^swapped: the part rewritten at relu: claimed exact"):
        Pipeline(steps, verify=True).apply(twice_relu())
    assert Pipeline(steps).apply(twice_relu()).size == 2, "unwatched, nobody notices"


def test_a_step_that_says_it_is_different_may_be() -> None:
    after = Pipeline((SwappedOnPurpose(),), verify=True).apply(twice_relu())
    assert sorted(n.op.opcode for n in after.nodes) == ["add", "relu", "tanh"]


def test_a_step_whose_graph_is_none_is_stopped_with_or_without_verify() -> None:
    for verify in (False, True):
        with pytest.raises(GraphError, match="cycle through"):
            Pipeline((Broken(),), verify=verify).apply(twice_relu())


def test_instruments_see_every_step() -> None:
    seen: list[tuple[str, int, int]] = []

    def watch(step: Pass, before: Graph, result: Result) -> None:
        seen.append((step.name, before.size, result.graph.size))

    Pipeline((CommonSubexpressions(), Canonical()), instruments=(watch, watch)).apply(twice_relu())
    assert seen == [("common_subexpressions", 3, 2)] * 2 + [("canonical", 2, 2)] * 2


def test_instruments_see_only_what_was_checked() -> None:
    seen: list[str] = []
    watch = lambda step, before, result: seen.append(step.name)  # noqa: E731
    steps = (CommonSubexpressions(), Swapped())
    with pytest.raises(ClaimError):
        Pipeline(steps, instruments=(watch,), verify=True).apply(twice_relu())
    assert seen == ["common_subexpressions"]


def test_reports_are_kept_and_printed() -> None:
    reports = Reports()
    Pipeline((CommonSubexpressions(), Canonical()), instruments=(reports,)).apply(twice_relu())
    assert [r.name for r in reports.reports] == ["common_subexpressions", "canonical"]
    assert [len(r.matches) for r in reports.reports] == [1, 1]
    text = str(reports)
    assert "common_subexpressions: 1 matched, 0 refused" in text
    assert text.count(" s") >= 2
    assert all(r.seconds >= 0 for r in reports.reports)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_cleaning_passes_verify_in_any_order(order: tuple[int, ...]) -> None:
    steps = (DeadCode(), CommonSubexpressions(), Canonical())
    graph = branches_of_every_kind()
    Pipeline(tuple(steps[i] for i in order), verify=True).apply(graph)
