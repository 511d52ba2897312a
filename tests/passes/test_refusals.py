"""Refusals that the tests of the passes themselves do not meet: each says why, and what to do.

A pass that refuses a place leaves the network as it is; one that cannot work at all raises.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from builders import image_input, images, randomised
from gated_nets import fixed

from branchgraph.ir.builder import (
    batch_norm,
    concat,
    conv,
    dense,
    exit,
    gate,
    global_average_pool,
    max_pool,
    merge_mean,
    merge_sum,
    relu,
)
from branchgraph.ir.errors import BranchgraphError, FormatError, GraphError, RefusalError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value, branch
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import make
from branchgraph.ir.ops.reshape import Reshape, Slice
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph
from branchgraph.nets import network
from branchgraph.passes.base import Pass
from branchgraph.passes.materialise import carry_slots
from branchgraph.passes.specialise import specialise
from branchgraph.training import joint_loss


def headed(h: Value) -> Graph:
    """The graph of h with a classifier behind it."""
    h.graph.output("logits", dense(global_average_pool(h), 5, name="fc"))
    return h.graph


def unit(x: Value, relus: int = 1) -> Value:
    """Convolutions with batch norm, ReLU between them: `relus` more than there are ReLUs."""
    h = batch_norm(conv(x, 4, 3, pad=1, bias=False))
    for _ in range(relus):
        h = batch_norm(conv(relu(h), 4, 3, pad=1, bias=False))
    return h


def stem() -> Value:
    return relu(unit(image_input(Graph("net")), 0), name="stem")


# -- merge_and_run ---------------------------------------------------------------------------------


def streams_that_are_not_joined() -> Graph:
    h = stem()
    mean = merge_mean(h, h, name="mean")
    return headed(concat(*(relu(merge_sum(unit(h), mean)) for _ in range(2))))


def more_bodies_than_lines() -> Graph:
    h = stem()
    mean = merge_mean(h, unit(h, 0), name="mean")
    return headed(merge_sum(*(relu(merge_sum(unit(h), mean)) for _ in range(3))))


def block_without_parameters() -> Graph:
    h = stem()
    return headed(relu(merge_sum(h, h), name="block"))


def pooled_between_blocks() -> Graph:
    h = stem()
    h = max_pool(relu(merge_sum(unit(h), h), name="first"), 3, stride=1, pad=1)
    return headed(relu(merge_sum(unit(h), h), name="second"))


def line_of_two_convolutions() -> Graph:
    h = stem()
    mean = merge_mean(batch_norm(conv(relu(unit(h, 0)), 4, 3, pad=1), name="line"), h)
    return headed(merge_sum(*(relu(merge_sum(unit(h), mean)) for _ in range(2))))


def body_without_norm() -> Graph:
    h = stem()
    body = conv(relu(unit(h, 0)), 4, 3, pad=1, name="bare")
    return headed(relu(merge_sum(body, h)))


# -- exits -----------------------------------------------------------------------------------------


def with_exits(*last: bool, rows: int | str = "N") -> Graph:
    graph = Graph("exits")
    h = graph.input("x", (rows, 3, 6, 6))
    for k, final in enumerate(last, 1):
        h = relu(conv(h, 4, 3, pad=1, name=f"conv{k}"), name=f"relu{k}")
        with branch(f"exit{k}"):
            logits = dense(global_average_pool(h), 5)
            exit(logits, f"exit{k}", threshold=None if final else 0.5, last=final)
    return graph


def three_layers() -> Graph:
    h = image_input(Graph("three"))
    for k in (1, 2, 3):
        h = relu(conv(h, 4, 3, pad=1, name=f"conv{k}"), name=f"relu{k}")
    return headed(h)


def halves() -> Graph:
    h = conv(image_input(Graph("halves")), 4, 3, pad=1)
    return headed(concat(*h.graph.apply(make("split", axis=1, sizes=(2, 2)), h, name="halves")))


def channels_as_rows() -> Graph:
    h = conv(image_input(Graph("turned")), 4, 3, pad=1)
    turned = h.graph.emit(Reshape(shape=(h.shape[0] * 4, 1, 6, 6)), h, name="turned")
    return headed(h.graph.emit(Reshape(shape=h.shape), turned))


# -- siblings --------------------------------------------------------------------------------------


def two_dilations() -> Graph:
    graph = Graph("dilations")
    left, right = (graph.input(name, ("N", 4, 6, 6)) for name in ("left", "right"))
    return headed(merge_sum(conv(left, 4, 3, pad=1), conv(right, 4, 3, pad=2, dilation=2)))


# -- gates -----------------------------------------------------------------------------------------


def gated(kind: str) -> Graph:
    """A gate that is still open to change, decided by something of a kind."""
    graph = Graph("gated")
    h = conv(image_input(graph), 4, 3, pad=1)
    gates = {
        "score": lambda: graph.read(State("score", (), role=Role.GATE)),
        "state": lambda: graph.read(State("switch", ())),
        "input": lambda: graph.input("opening", ("N", 1, 1, 1)),
        "mode": lambda: graph.emit(make("by_mode"), fixed(graph, 1.0), fixed(graph, 0.0)),
    }
    return headed(gate(h, gates[kind](), name="gate"))


#: What decides about a gate, and the refusal.
DECIDED = {
    "score": ("score", "it is still learned; harden_gates first"),
    "state": ("gate", "its gate depends on the state switch"),
    "input": ("gate", "its gate depends on the input opening"),
    "mode": ("gate", "the value of its gate is not known before the mode is chosen"),
}


@pytest.mark.parametrize("spec", ["prune_gates", "prune_channels"])
@pytest.mark.parametrize("kind", DECIDED)
def test_gates_that_may_open_yet_stay(kind: str, spec: str) -> None:
    graph = gated(kind)
    result = Pass.from_spec(spec).run(graph)
    assert result.report.refusals == [DECIDED[kind]]
    assert format_graph(result.graph) == format_graph(graph)


def spatial_gate() -> Graph:
    graph = Graph("spatial")
    h = conv(image_input(graph), 4, 3, pad=1)
    mask = np.where(np.arange(36) % 2, 0.5, 1.0)
    return headed(gate(h, fixed(graph, *mask, shape=(1, 6, 6)), name="gate"))


def closed_exit() -> Graph:
    graph = Graph("closed")
    h = conv(image_input(graph), 4, 3)
    with branch("exit1"):
        logits = gate(dense(h, 5), fixed(graph, 0.0, shape=(1, 1)))
        exit(logits, "exit1", threshold=0.5)
    exit(dense(h, 5), "exit2", last=True)
    return graph


def differentiated() -> Graph:
    return differentiate(joint_loss(specialise(network("lenet:size=8,kernel=3"), training=True)))


# -- widen and deepen ------------------------------------------------------------------------------


def wide(behind: Callable[[Value, Value], Value]) -> Graph:
    x = image_input(Graph("wide"), channels=4)
    return headed(behind(conv(x, 4, 3, pad=1, name="wide"), x))


def multiplies_another(h: Value, x: Value) -> Value:
    return h.graph.emit(make("matmul"), conv(x, 4, 1), h, name="product")


def beside_a_vector(h: Value, x: Value) -> Value:
    return h.graph.emit(make("add"), h, h.graph.input("t", (4, 1, 1)), name="plus")


def below_another(h: Value, x: Value) -> Value:
    return concat(h, conv(x, 4, 1), axis=2, name="rows")


def beside_channels_that_vary(h: Value, x: Value) -> Value:
    joined = concat(h, h.graph.input("t", ("N", "C", 6, 6)), name="joined")
    return conv(h.graph.emit(make("reduce_mean", axes=(1,), keepdims=True), joined), 4, 1)


def one_axis() -> Graph:
    x = image_input(Graph("flat"))
    x.graph.output("y", x.graph.emit(Reshape(shape=(x.shape[0] * 108,)), x, name="flat"))
    return x.graph


def computed_weight() -> Graph:
    x = image_input(Graph("expression"))
    weight = relu(x.graph.read(State("w", (4, 3, 1, 1))), name="weight")
    return headed(conv(x, 4, 1, weight=weight, bias=False, name="conv"))


REFUSED = {
    "streams": (
        streams_that_are_not_joined, "merge_and_run:to=cross",
        ("net", "its last block does not join the streams"),
    ),
    "bodies": (
        more_bodies_than_lines, "merge_and_run:to=cross",
        ("net", "mean averages 2 lines for 3 bodies"),
    ),
    "no parts": (
        block_without_parameters, "merge_and_run:to=cross",
        ("net", "the block block has no two parts with parameters"),
    ),
    "between": (
        pooled_between_blocks, "merge_and_run:to=cross",
        ("net", "something stands between the block of second and the one before"),
    ),
    "line": (
        line_of_two_convolutions, "merge_and_run:to=cross",
        ("net", "the line line has 2 convolutions"),
    ),
    "norm": (
        body_without_norm, "merge_and_run:to=cross",
        (
            "net",
            "bare is no chain of convolutions, declared batch norms and, between them, ReLU",
        ),
    ),
    "results": (halves, "insert_exits:after=halves,head=pool", ("halves", "it has 2 results")),
    "no rows": (
        channels_as_rows, "insert_exits:after=turned,head=pool",
        ("turned", "it has no row for every sample: f32[4*N, 1, 6, 6]"),
    ),
    "attributes": (
        two_dilations, "fuse_siblings",
        (
            "conv",
            "it differs in attributes: "
            "Conv(stride=(1, 1), pad=(1, 1, 1, 1), dilation=(1, 1), groups=1), "
            "beside Conv(stride=(1, 1), pad=(2, 2, 2, 2), dilation=(2, 2), groups=1)",
        ),
    ),
    "kept": (
        three_layers, "cast:keep=conv1+relu1+conv2+relu2+conv3+relu3+fc",
        ("conv2", "it stands in a scope that is kept in f32"),
    ),
    "spatial gate": (
        spatial_gate, "prune_channels", ("gate", "its gate is not one number a channel"),
    ),
    "gradients": (
        differentiated, "prune_channels",
        ("lenet", "it has gradients; prune before differentiating"),
    ),
    "parameter": (
        lambda: wide(multiplies_another), "widen:layer=wide,to=6",
        ("wide", "matmul product reads its channels as a parameter"),
    ),
    "ranks": (
        lambda: wide(beside_a_vector), "widen:layer=wide,to=6",
        ("wide", "add plus lines up operands of different ranks"),
    ),
    "rows": (
        lambda: wide(below_another), "widen:layer=wide,to=6",
        ("wide", "operands of concat rows cannot be widened alike"),
    ),
    "symbolic": (
        lambda: wide(beside_channels_that_vary), "widen:layer=wide,to=6",
        ("wide", "t has no concrete number of channels: f32[N, C, 6, 6]"),
    ),
    "narrow": (
        three_layers, "widen:layer=conv2,to=4",
        ("conv2", "it has 4 channels, which is not less than 4"),
    ),
    "expression": (
        computed_weight, "deepen:after=weight",
        ("weight", "it makes no single value of samples"),
    ),
    "one axis": (
        one_axis, "deepen:after=flat", ("flat", "a layer needs [N, C, ...], got f32[108*N]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_place_that_is_refused_stays_and_the_reason_is_said(kind: str) -> None:
    build, spec, refusal = REFUSED[kind]
    graph = build()
    text = format_graph(graph)
    result = Pass.from_spec(spec).run(graph)
    assert refusal in result.report.refusals
    assert refusal[1] in str(result.report)
    assert not result.report.matches
    assert format_graph(graph) == text
    assert format_graph(result.graph) == text


def test_a_closed_exit_stays_an_exit_of_zeros() -> None:
    result = Pass.from_spec("prune_gates").run(closed_exit())
    reason = "its gate is closed, but it takes samples still; prune_gates:exits=true removes it"
    assert result.report.refusals == [("exit1/exit1", reason)]
    assert list(result.graph.outputs) == ["exit1", "exit2"]


def test_a_place_that_is_meant_twice_gets_one_exit() -> None:
    result = Pass.from_spec("insert_exits:after=relu2,at=0.9,head=pool").run(three_layers())
    assert result.report.refusals == [("relu2", "at=0.9 is a place that is meant already")]
    assert result.report.matches == ["relu2"]
    store = randomised(result.graph)
    plain = specialise(result.graph, training=False, exits="all")
    assert len(interpret(plain, {"x": images()}, store).outputs) == 2


def lowered(graph: Graph) -> Graph:
    return specialise(graph, training=False)


RAISED: dict[str, tuple[Callable[[], object], type[BranchgraphError], str]] = {
    "no places": (
        lambda: Pass.from_spec("insert_exits:head=pool"), FormatError,
        "needs places: after=NAMES or at=SHARES of the MACs",
    ),
    "criterion": (
        lambda: Pass.from_spec("insert_exits:after=relu1,criterion=luck"), GraphError,
        "unknown criterion 'luck'; known: entropy",
    ),
    "two last exits": (
        lambda: Pass.from_spec("remove_exits").run(with_exits(False, True, True)), RefusalError,
        "there must be one last exit, there are 2",
    ),
    "no last exit": (
        lambda: Pass.from_spec("remove_exits").run(with_exits(False, False)), RefusalError,
        "there must be one last exit, there are 0",
    ),
    "rows": (
        lambda: lowered(with_exits(False, True, rows=4)), RefusalError,
        "must be a symbol such as N, got 4",
    ),
    "exits": (
        lambda: Pass.from_spec("specialise:exits=some"), GraphError,
        "specialise: exits 'some' is none of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RAISED)
def test_what_cannot_be_done_at_all_raises_with_the_remedy(kind: str) -> None:
    act, error, message = RAISED[kind]
    with pytest.raises(error, match=message):
        act()


def test_slots_follow_an_origin_only_where_all_it_reads_has_one() -> None:
    """An origin that gives something besides states reads more than its new states need."""
    moved, other, new = State("moved", (4,)), State("other", (4,)), State("new", (2,))
    origin = Graph("net.origin")
    origin.update(new, origin.emit(Slice(axis=0, start=0, size=2), origin.read(moved)))
    origin.output("other", origin.read(other))
    slots = {(moved, "v"): State("moved.v", (4,), role=Role.SLOT)}
    with pytest.raises(GraphError, match="other has no slot to read"):
        carry_slots(origin, slots, Store.initialised([moved, other, *slots.values()]))
