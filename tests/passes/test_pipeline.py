"""A pipeline applies its passes in order, shows each step, and stops at the one that is wrong."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from builders import EXACT, branches_of_every_kind, images
from click.testing import CliRunner

from branchgraph.cli import main
from branchgraph.ir.builder import conv, relu, tanh
from branchgraph.ir.errors import ClaimError, FormatError, GraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret
from branchgraph.ir.rebuild import bind
from branchgraph.ir.state import Store
from branchgraph.ir.text import format_graph
from branchgraph.ir.types import DType
from branchgraph.nets import network
from branchgraph.passes.base import Pass, Report, Result
from branchgraph.passes.clean import Canonical, CommonSubexpressions, DeadCode
from branchgraph.passes.materialise import evaluate_origin, provenance
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


def test_the_report_of_a_pipeline_adds_up_its_steps() -> None:
    graph = twice_relu()
    result = Pipeline((CommonSubexpressions(), Canonical()), verify=True).run(graph)
    report = result.report
    assert report.name == "common_subexpressions canonical"
    assert (len(report.matches), report.origin) == (2, None)
    assert [n.op.opcode for n in result.graph.nodes] == ["relu", "sum"]
    nothing = Pipeline(()).run(graph)
    assert nothing.graph is graph
    assert not nothing.report.matches


SHARED_TWICE = (
    "share_weights:branches=2,shared=1", "split_ensemble:branch=branch1",
    "share_weights:branches=2,shared=0.5",
)  # fmt: skip


def test_the_origin_of_a_pipeline_reaches_back_to_its_first_graph() -> None:
    graph = network("lenet:size=8,kernel=3,widths=8+16+32")
    result = pipeline(*SHARED_TWICE, "dead_code").run(graph)
    origin = result.report.origin
    assert origin is not None
    assert set(origin.updates) == set(result.graph.states)
    for state, sources in provenance(origin).items():
        (source,) = sources
        assert source in graph.states
        assert source.name.split("/")[-1] in state.name
    store = Store.initialised(graph.states)
    before = interpret(graph, {"x": (x := images(3, channels=1, size=8))}, store, DType.F64)
    evaluate_origin(origin, store)
    after = interpret(result.graph, {"x": x}, store, DType.F64)
    for value in after.outputs.values():
        np.testing.assert_allclose(value, before.outputs["logits"], **EXACT)


def test_steps_know_the_values_of_states_that_earlier_ones_made() -> None:
    graph = network("lenet:size=8,kernel=3,widths=8+16+32")
    seen: list[set[str]] = []

    class Watching(DeadCode):
        """A pass that looks at the values it is given."""

        def rewrite(self, graph: Graph, report: Report) -> None:
            assert report.values is not None
            seen.append({s.name for s in graph.states if s not in report.values})

    first = Pass.from_spec("share_weights:branches=2,shared=0.5")
    store = Store.initialised(graph.states)
    Pipeline((Watching(), first, Watching())).apply(graph, store)
    assert seen == [set(), set()]
    assert len(store) == len(graph.states), "the store that was given is not changed"
    some = Store({s: store[s] for s in graph.states if s.name != "fc.weight"})
    Pipeline((Watching(), first, Watching())).apply(graph, some)
    assert seen[2] == {"fc.weight"}
    assert seen[3]
    assert all("fc.weight" in name for name in seen[3])


def test_the_command_explains_where_states_of_a_whole_pipeline_come_from() -> None:
    ran = CliRunner().invoke(main, ["passes", *SHARED_TWICE, "--explain", "lenet"])
    assert ran.exit_code == 0, ran.output
    text = ran.output
    assert (
        "\nbranch1/conv1.weight f32[5, 1, 5, 5] from conv1.weight_ss, branch1/conv1.weight_" in text
    )
    assert "\nconv1.weight_ss f32[2, 1, 5, 5] from conv1.weight\n" in text


def test_macs_that_multiply_symbols_are_unknown_and_the_report_says_so() -> None:
    graph = Graph("tall")
    h = conv(graph.input("x", ("N", 3, "H", 4)), 5, 1)
    graph.output("y", relu(h) + relu(h))
    report = CommonSubexpressions().run(graph).report
    assert len(report.matches) == 1
    assert report.macs == (None, None)
    assert report.parameters == (20, 20)
    assert "MACs unknown -> unknown" in str(report)
    assert "unknown where sizes multiply symbols; bind all but the batch" in str(report)
    known = CommonSubexpressions().run(bind(graph, H=2)).report
    assert known.macs == (3 * 5 * 2 * 4, 3 * 5 * 2 * 4)
    assert "unknown" not in str(known)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_cleaning_passes_verify_in_any_order(order: tuple[int, ...]) -> None:
    steps = (DeadCode(), CommonSubexpressions(), Canonical())
    graph = branches_of_every_kind()
    Pipeline(tuple(steps[i] for i in order), verify=True).apply(graph)
