"""A head moves with its parameters, or the report says why it stays."""

from __future__ import annotations

import numpy as np
import pytest
from builders import images, randomised

from branchgraph.compiler import compile
from branchgraph.ir.builder import conv, dense, exit, global_average_pool, merge_sum, relu
from branchgraph.ir.errors import FormatError, GraphError
from branchgraph.ir.graph import Graph, branch
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.ops.reduce import ReduceMean
from branchgraph.ir.text import format_graph
from branchgraph.nets import NETWORKS, network
from branchgraph.passes.base import Pass
from branchgraph.passes.clean import CommonSubexpressions
from branchgraph.passes.insert_exits import InsertExits, MoveExit
from branchgraph.passes.lower_exits import exits_of


def three_layers() -> Graph:
    graph = Graph("three")
    h = graph.input("x", ("N", 3, 6, 6))
    for k in (1, 2, 3):
        h = relu(conv(h, 4, 3, pad=1, name=f"conv{k}"), name=f"relu{k}")
    graph.output("logits", dense(global_average_pool(h), 5, name="fc"))
    return graph


def with_exits(*after: str, **options: object) -> Graph:
    return InsertExits(after=after, head="pool", **options).apply(three_layers())  # type: ignore[arg-type]


def names(graph: Graph) -> list[str]:
    return [n.op.name for n in exits_of(graph)]  # type: ignore[attr-defined]


def test_a_moved_exit_is_one_that_was_inserted_there() -> None:
    graph = with_exits("relu1")
    moved = MoveExit(exit="exit1", to="relu2").run(graph)
    assert moved.report.matches == ["exit1"]
    assert structural_hash(moved.graph) == structural_hash(with_exits("relu2"))
    assert set(moved.graph.states) == set(graph.states)
    assert moved.graph.inputs.keys() == graph.inputs.keys()
    back = MoveExit(exit="exit1", to="relu1").apply(moved.graph)
    assert format_graph(back) == format_graph(graph)


def test_the_text_moves_and_stays_a_branch() -> None:
    text = format_graph(MoveExit(exit="exit1", to="relu3").apply(with_exits("relu1")))
    lines = text[text.index("%5 =") : text.index("output")].splitlines()
    assert [line.strip().partition(" {")[0].partition(" : ")[0] for line in lines[:5]] == [
        "%5 = relu(%4)",
        "branch exit1",
        "%6 = reduce_mean(%5)",
        "%7 = dense(%6, exit1/fc.weight, exit1/fc.bias)",
        "%8 = exit(%7, exit1.threshold)",
    ]


def test_a_second_application_matches_nothing() -> None:
    step = MoveExit(exit="exit1", to="relu2")
    again = step.run(step.apply(with_exits("relu1")))
    assert not again.report.matches
    assert again.report.refusals == [("exit1/exit1", "it stands behind relu2 already")]


def test_exits_keep_their_names_when_one_passes_another() -> None:
    graph = with_exits("relu1", "relu2")
    moved = MoveExit(exit="exit1", to="relu3").apply(graph)
    assert names(moved) == ["exit2", "exit1", "exit3"]
    run = compile(moved, store=randomised(moved))
    taken = run(x=images(8), **{"exit2.threshold": 10.0, "exit1.threshold": 0.0})["exit"]
    assert set(taken) == {0}


def test_patience_counts_those_that_stand_before_now() -> None:
    graph = with_exits("relu1", "relu2", criterion="patience", threshold=2.0)
    moved = MoveExit(exit="exit1", to="relu3").apply(graph)
    assert names(moved) == ["exit2", "exit1", "exit3"]
    assert [len(n.inputs) for n in exits_of(moved)] == [2, 3, 1]
    assert exits_of(moved)[1].inputs[2] is exits_of(moved)[0].inputs[0]
    compile(moved, store=randomised(moved))(x=images(8))


def test_loss_weights_and_thresholds_stay() -> None:
    graph = with_exits("relu1", weights=(0.25, 1.0))
    moved = MoveExit(exit="exit1", to="relu2").apply(graph)
    assert {k: v.default for k, v in moved.inputs.items()} == {
        "x": None, "exit1.threshold": 0.5, "exit1.weight": 0.25, "exit2.weight": 1.0,
    }  # fmt: skip


def test_the_moved_head_computes_what_it_did_on_its_new_tap() -> None:
    graph = with_exits("relu1")
    moved = MoveExit(exit="exit1", to="relu2").apply(graph)
    store, x = randomised(graph), images(4)
    outputs = compile(moved, store=store)(x=x, **{"exit1.threshold": 10.0})["logits"]
    fresh = with_exits("relu2")
    for state, other in zip(moved.states, fresh.states, strict=True):
        store[other] = store[state]
    wanted = compile(fresh, store=store)(x=x, **{"exit1.threshold": 10.0})["logits"]
    np.testing.assert_array_equal(outputs, wanted)


def test_flattening_follows_the_shape_where_the_classifier_fits() -> None:
    graph = InsertExits(after=("relu1",), head="dense").apply(three_layers())
    assert MoveExit(exit="exit1", to="relu2").run(graph).report.matches == ["exit1"]


def two_taps() -> Graph:
    graph = Graph("two")
    a = relu(graph.input("x", ("N", 4)), name="a")
    b = relu(dense(a, 4, name="d"), name="b")
    with branch("exit1"):
        exit(dense(merge_sum(a, b), 3, name="fc"), "exit1")
    exit(dense(relu(b, name="c"), 3, name="fc"), "exit2", last=True)
    return graph


@pytest.mark.parametrize(
    ("graph", "to", "reason"),
    [
        (network("b_lenet"), "conv2", "its head does not fit f32[N, 10, 17, 17]: conv exit1/conv"),
        (network("b_lenet"), "fc1", "its head does not fit f32[N, 84]: max_pool exit1"),
        (network("b_lenet"), "exit1/conv", "exit1/conv belongs to its own head"),
        (with_exits("relu1", "relu2"), "exit2/fc", "exit2/fc is no value on the way"),
        (with_exits("relu1", "relu2"), "relu2", "relu2 has an exit already"),
        (two_taps(), "c", "its head reads 2 values: a, b"),
    ],
)
def test_what_cannot_move_stays_and_says_why(graph: Graph, to: str, reason: str) -> None:
    result = MoveExit(exit="exit1", to=to).run(graph)
    assert not result.report.matches
    assert result.report.refusals[0][0] == "exit1/exit1"
    assert result.report.refusals[0][1].startswith(reason)
    assert format_graph(result.graph) == format_graph(graph)


def test_the_last_exit_stays_and_unknown_names_are_errors() -> None:
    report = MoveExit(exit="exit2", to="conv1").run(network("b_lenet")).report
    assert report.refusals == [("exit2", "it is the last exit, which takes the rest")]
    with pytest.raises(GraphError, match="no exit 'exit9'.*there are: exit1, exit2"):
        MoveExit(exit="exit9", to="conv1").apply(network("b_lenet"))
    with pytest.raises(GraphError, match="no node 'conv9'"):
        MoveExit(exit="exit1", to="conv9").apply(network("b_lenet"))
    with pytest.raises(FormatError, match="to"):
        Pass.from_spec("move_exit:exit=exit1")


def test_what_a_head_shares_with_the_trunk_stays_with_the_trunk() -> None:
    shared = CommonSubexpressions().apply(network("b_lenet"))
    report = MoveExit(exit="exit1", to="conv2").run(shared).report
    assert "its head does not fit" in report.refusals[0][1]


#: To how many nodes of the trunk the first exit of a network can move.
TARGETS = {"b_lenet": 0, "b_alexnet": 0, "b_resnet": 23}


@pytest.mark.parametrize("name", TARGETS)
def test_first_exits_of_networks_move_to_where_shapes_fit(name: str) -> None:
    assert {k for k in NETWORKS if k.startswith("b_")} == set(TARGETS)
    graph = network(name)
    paths = [n.path for n in graph.nodes]
    places = [p for p in paths if paths.count(p) == 1 and "exit" not in p]
    moved = [p for p in places if MoveExit(exit="exit1", to=p).run(graph).report.matches]
    assert len(moved) == TARGETS[name], moved


def test_no_exit_moves_behind_the_last_one() -> None:
    """It takes all that are left, so there would be nobody to decide about."""
    graph = Graph("dense exits")
    h = relu(dense(graph.input("x", ("N", 4)), 4, name="stem"))
    with branch("exit1"):
        exit(dense(h, 4, name="fc"), "exit1")
    exit(dense(h, 4, name="fc"), "last", last=True)
    result = MoveExit(exit="exit1", to="last").run(graph)
    assert result.report.refusals == [
        ("exit1/exit1", "last is no value on the way to the last exit")
    ]
    assert format_graph(result.graph) == format_graph(graph)


def test_a_head_stays_where_samples_have_rows() -> None:
    graph = Graph("averaged")
    h = relu(dense(graph.input("x", ("N", 4)), 4, name="stem"))
    with branch("exit1"):
        exit(dense(h, 3, name="fc"), "exit1")
    average = graph.emit(ReduceMean(axes=(0,), keepdims=True), h, name="average")
    exit(dense(h * average, 3, name="fc"), "last", last=True)
    result = MoveExit(exit="exit1", to="average").run(graph)
    reason = "its head does not fit f32[1, 4]: it makes f32[1, 3], not f32[N, 3]"
    assert result.report.refusals == [("exit1/exit1", reason)]
    assert format_graph(result.graph) == format_graph(graph)
