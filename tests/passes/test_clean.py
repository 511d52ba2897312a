"""Housekeeping passes leave every value equal and do no more than they say."""

from __future__ import annotations

import numpy as np
import pytest
from builders import (
    EXACT,
    branches_of_every_kind,
    image_input,
    images,
    random_graphs,
    randomised,
)
from gated_nets import norm_of_two
from hypothesis import given, settings

from branchgraph.compiler.pipeline import CLEANING
from branchgraph.ir.builder import batch_norm, concat, merge_mean, merge_sum, relu
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, branch, path
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import make
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import Cast
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.ops.reduce import BroadcastTo
from branchgraph.ir.optimisers import Adam
from branchgraph.ir.state import State
from branchgraph.ir.text import format_graph
from branchgraph.ir.types import DType
from branchgraph.ir.verify import verify
from branchgraph.passes.base import Pass, Result
from branchgraph.passes.checking import check_claim
from branchgraph.passes.clean import Canonical, CommonSubexpressions, Constants, DeadCode
from branchgraph.passes.pipeline import Pipeline
from branchgraph.passes.specialise import specialise
from branchgraph.training import joint_loss

PASSES = (DeadCode(), CommonSubexpressions(), Constants(), Canonical())


def opcodes(graph: Graph) -> list[str]:
    return [n.op.opcode for n in graph.nodes]


@pytest.mark.parametrize("step", PASSES, ids=lambda p: p.spelling)
@settings(max_examples=20, deadline=None)
@given(random_graphs())
def test_values_and_gradients_stay_equal(step: Pass, graph: Graph) -> None:
    training = differentiate(joint_loss(specialise(graph, training=True)))
    text = format_graph(training)
    result = step.run(training)
    assert format_graph(training) == text, "the argument is not changed"
    store = randomised(training)
    fed = {"x": images(), "labels": np.array([0, 1, 2, 3, 4])}
    before = interpret(training, fed, store, DType.F64)
    after = interpret(result.graph, fed, store, DType.F64)
    for kind in ("outputs", "updates", "gradients"):
        old, new = getattr(before, kind), getattr(after, kind)
        assert old.keys() == new.keys()
        for key in old:
            np.testing.assert_allclose(new[key], old[key], **EXACT)


@pytest.mark.parametrize("step", PASSES, ids=lambda p: p.spelling)
def test_a_second_application_matches_nothing(step: Pass) -> None:
    training = Adam().attach(
        differentiate(joint_loss(specialise(branches_of_every_kind(), training=True)))
    )
    once = step.run(training)
    while once.report.matches and step.spelling == "canonical":
        once = step.run(once.graph)
    assert not step.run(once.graph).report.matches


def test_dead_code_keeps_what_updates_and_gradients_need() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 3))
    graph.input("unused", ("N",))
    state = State("s", ())
    relu(x)
    kept = graph.emit(make("exp"), graph.read(state))
    graph.update(state, kept)
    graph.read(State("nobody", ()))
    graph.output("y", x * 2.0)
    cleaned = DeadCode().apply(graph)
    assert opcodes(cleaned) == ["exp", "full", "multiply"]
    assert list(cleaned.inputs) == ["x", "unused"]
    assert [s.name for s in cleaned.states] == ["s"]


def test_dead_code_keeps_every_application_of_a_batch_norm_that_lives() -> None:
    """Each moves the running statistics in training, read or not."""
    graph = Graph("shared norm")
    x = image_input(graph, 4)
    y, _ = norm_of_two(graph, x, relu(x))
    batch_norm(relu(x), name="alone")
    graph.output("y", y)
    result = DeadCode().run(graph, record=True)
    check_claim(graph, result.graph, "equal", report=result.report)
    assert sorted(opcodes(result.graph)) == ["batch_norm", "batch_norm", "relu"]
    assert {s.name.partition(".")[0] for s in result.graph.states} == {"bn"}
    # In inference nothing moves.
    inference = DeadCode().apply(specialise(graph, training=False))
    assert opcodes(inference) == ["batch_norm_inference"]


def test_dead_code_keeps_a_batch_norm_whose_statistics_are_read() -> None:
    graph = Graph("read statistics")
    x = image_input(graph, 4)
    norm = batch_norm(relu(x), name="bn").producer
    assert norm is not None
    graph.output("mean", norm.inputs[3] * 2.0)
    result = DeadCode().run(graph, record=True)
    check_claim(graph, result.graph, "equal", report=result.report)
    assert opcodes(result.graph).count("batch_norm") == 1


def test_common_subexpressions_of_two_branches_belong_to_neither() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 3))
    with branch("left"):
        a = relu(x)
    with branch("right"):
        b = relu(x)
    graph.output("y", merge_sum(a, b * 2.0))
    merged = CommonSubexpressions().apply(graph)
    assert opcodes(merged).count("relu") == 1
    assert path(next(n for n in merged.nodes if n.op.opcode == "relu").scope) == ""


def test_equal_ops_with_other_attributes_stay_apart() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 3))
    graph.output("y", graph.constant(2, "f32") * x)
    graph.output("z", graph.emit(Cast(dtype=DType.I64), x))
    graph.output("w", graph.emit(Cast(dtype=DType.I32), x))
    assert len(CommonSubexpressions().apply(graph).nodes) == len(graph.nodes)


def test_constants_fold_through_arithmetic_and_broadcasting() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 3))
    two = graph.constant(2.0)
    spread = graph.emit(BroadcastTo(shape=x.shape), two * 3.0 + 1.0)
    graph.output("y", x + spread)
    folded = DeadCode().apply(Constants().apply(graph))
    fulls = [n.op for n in folded.nodes if isinstance(n.op, Full)]
    assert [(f.value, f.shape) for f in fulls] == [(7.0, x.shape)]


def test_chains_of_additions_become_one_sum_in_the_same_order() -> None:
    graph = Graph("g")
    x, y, z = (graph.input(name, ("N", 3)) for name in "xyz")
    graph.output("total", ((x + y) + z) + x)
    canonical = Canonical().apply(graph)
    (node,) = canonical.nodes
    assert isinstance(node.op, Sum)
    assert [v.label for v in node.inputs] == ["x", "y", "z", "x"]


def test_an_addition_that_broadcasts_or_is_read_elsewhere_stays() -> None:
    graph = Graph("g")
    x, row = graph.input("x", ("N", 3)), graph.input("row", (3,))
    graph.output("y", x + row)
    inner = x + x
    graph.output("inner", inner)
    graph.output("z", inner + x)
    canonical = Canonical().apply(graph)
    assert opcodes(canonical) == ["add", "sum", "sum"]


def test_merges_of_one_operand_and_idle_casts_vanish() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 3))
    graph.output("y", concat(merge_mean(merge_sum(x))))
    graph.output("z", graph.emit(Cast(dtype=DType.F32), x))
    canonical = Canonical().apply(graph)
    assert not canonical.nodes
    assert list(canonical.outputs.values()) == [canonical.inputs["x"]] * 2


def test_instruments_see_every_step_with_its_report() -> None:
    seen: list[tuple[str, int, int]] = []

    def watch(step: Pass, before: Graph, result: Result) -> None:
        seen.append((step.spelling, len(before.nodes), len(result.graph.nodes)))
        assert result.report.seconds > 0

    graph = specialise(branches_of_every_kind(), training=False)
    watched = Pipeline((DeadCode(), CommonSubexpressions()), (watch,)).apply(graph)
    assert [name for name, _, _ in seen] == ["dead_code", "common_subexpressions"]
    assert seen[0][2] == seen[1][1]
    plain = Pipeline((DeadCode(), CommonSubexpressions())).apply(graph)
    assert format_graph(watched) == format_graph(plain)


def test_the_pipeline_cleans_a_training_step_and_verifies() -> None:
    training = Adam().attach(
        differentiate(joint_loss(specialise(branches_of_every_kind(), training=True)))
    )
    cleaned = CLEANING.apply(training)
    verify(cleaned)
    assert len(cleaned.nodes) < len(training.nodes)
