"""Channels that carry nothing go, with what makes and reads them, and the function stays."""

from __future__ import annotations

import numpy as np
import pytest
from builders import EXACT, image_input, images, randomised
from gated_nets import closed, fixed, gated_graphs, norm_of_two
from hypothesis import given, settings

from branchgraph.ir.builder import (
    average_pool,
    batch_norm,
    concat,
    conv,
    dense,
    flatten,
    gate,
    global_average_pool,
    max_pool,
    merge_sum,
    relu,
    sigmoid,
)
from branchgraph.ir.cost import deployed_cost
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph
from branchgraph.ir.types import DType
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.checking import check_claim
from branchgraph.passes.constant_arrays import write
from branchgraph.passes.materialise import carry_slots, evaluate_origin, materialise
from branchgraph.passes.prune_channels import PruneChannels
from branchgraph.passes.prune_gates import PruneGates
from branchgraph.passes.specialise import specialise


def prune(graph: Graph, bias_maps: bool = False) -> tuple[Graph, Report]:
    """The graph in inference form without idle channels, its claim checked, and the report."""
    inference, step = specialise(graph, training=False), PruneChannels(bias_maps)
    result = step.run(inference, record=True)
    check_claim(inference, result.graph, "exact", report=result.report)
    assert not step.run(result.graph).report.matches
    return result.graph, result.report


def layers(graph: Graph) -> dict[str, tuple[int, int]]:
    """Filters and channels read of every layer, by name."""
    nodes = materialise(graph)[0].nodes
    weights = {n.name: n.inputs[1].shape for n in nodes if n.op.opcode in ("conv", "dense")}
    return {name: (int(str(s[0])), int(str(s[1]))) for name, s in weights.items()}


def ops(graph: Graph) -> list[str]:
    return [n.op.opcode for n in materialise(graph)[0].nodes]


# -- concat ----------------------------------------------------------------------------------------

BEFORE = """\
graph small {
  state conv.weight : f32[2, 3, 1, 1] param init=lecun_normal(fan_in=3, scale=1.0)
  input x : f32[N, 1, 3, 3]
  input z : f32[N, 2, 3, 3]
  %0 = full() {value=0.0, shape=[1, 1, 1], dtype=f32} : f32[1, 1, 1]
  %1 = select(x, %0) : f32[N, 1, 3, 3]
  %2 = concat(%1, z) {axis=1} : f32[N, 3, 3, 3]
  %3 = conv(%2, conv.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 3, 3]  # conv
  output y = %3
}
"""  # noqa: E501
AFTER = """\
graph small {
  state conv.weight : f32[2, 3, 1, 1] param init=lecun_normal(fan_in=3, scale=1.0)
  input x : f32[N, 1, 3, 3]
  input z : f32[N, 2, 3, 3]
  %0 = slice(conv.weight) {axis=1, start=1, size=2, step=1} : f32[2, 2, 1, 1]
  %1 = conv(z, %0) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 3, 3]  # conv
  output y = %1
}
"""  # noqa: E501


def test_the_rewrite_as_text() -> None:
    graph = Graph("small")
    x, z = graph.input("x", ("N", 1, 3, 3)), graph.input("z", ("N", 2, 3, 3))
    graph.output("y", conv(concat(closed(x), z), 2, 1, bias=False, name="conv"))
    assert format_graph(graph) == BEFORE
    assert format_graph(prune(graph)[0]) == AFTER


def beside(silent, kernel: int = 3, pad: int = 1, bias: bool = True) -> Graph:  # type: ignore[no-untyped-def]
    """A concat of a branch of 3 channels and `silent` of 2, read by a convolution."""
    graph = Graph("beside")
    x = image_input(graph)
    other = silent(conv(x, 2, 1, name="silent"))
    both = concat(conv(x, 3, 1, name="loud"), other)
    graph.output("y", conv(both, 4, kernel, pad=pad, bias=bias, name="mixer"))
    return graph


def half(x: Value) -> Value:
    """1/2 in every channel: a closed gate before a sigmoid."""
    return sigmoid(closed(x))


def normed(x: Value) -> Value:
    """relu(beta - gamma mu / sigma): batch norm of a closed gate."""
    return relu(batch_norm(closed(x)))


@pytest.mark.parametrize("pad", [0, 1])
def test_zero_channels_of_a_concat_leave_every_reader(pad: int) -> None:
    pruned, report = prune(beside(closed, pad=pad))
    assert layers(pruned) == {"loud": (3, 3), "mixer": (4, 3)}
    assert report.parameters[1] < report.parameters[0]
    assert report.macs[1] < report.macs[0]
    assert ops(pruned) == ["conv", "conv"]


@pytest.mark.parametrize("silent", [half, normed])
@pytest.mark.parametrize(("kernel", "bias"), [(1, True), (1, False), (3, True)])
def test_constant_channels_go_into_the_bias_where_nothing_is_padded(  # type: ignore[no-untyped-def]
    silent, kernel: int, bias: bool
) -> None:
    pruned, _ = prune(beside(silent, kernel, 0, bias))
    assert layers(pruned) == {"loud": (3, 3), "mixer": (4, 3)}
    assert ops(pruned) == ["conv", "conv"]


@pytest.mark.parametrize("silent", [half, normed])
def test_constant_channels_stay_where_a_border_would_differ(silent) -> None:  # type: ignore[no-untyped-def]
    pruned, report = prune(beside(silent, 3, 1))
    assert layers(pruned)["mixer"] == (4, 5)
    reason = (
        "constant channels stay: its padding is 0, not constant; bias_maps=true repairs it with a "
        "bias for each position"
    )
    assert ("mixer", reason) in report.refusals


# -- bias maps -------------------------------------------------------------------------------------


def framed(rows: int | str = "N", size: int | str = 4) -> Graph:
    """Two channels and one of the number 2, read by a 3x3 convolution with a border of zeros."""
    graph = Graph("framed")
    z, x = graph.input("z", (rows, 2, 4, size)), graph.input("x", (rows, 1, 4, size))
    number = closed(x) + 2.0
    graph.output("y", conv(concat(z, number), 1, 3, pad=1, bias=False, name="conv"))
    return graph


AFTER_FRAMED = """\
graph framed {
  state conv.weight : f32[1, 3, 3, 3] param init=lecun_normal(fan_in=27, scale=1.0)
  input z : f32[N, 2, 4, 4]
  input x : f32[N, 1, 4, 4]
  %0 = full() {value=0.0, shape=[2], dtype=f32} : f32[2]
  %1 = full() {value=0.0, shape=[1], dtype=f32} : f32[1]
  %2 = full() {value=2.0, shape=[], dtype=f32} : f32[]
  %3 = add(%1, %2) : f32[1]
  %4 = concat(%0, %3) {axis=0} : f32[3]
  %5 = slice(conv.weight) {axis=1, start=2, size=1, step=1} : f32[1, 1, 3, 3]
  %6 = slice(%4) {axis=0, start=2, size=1, step=1} : f32[1]
  %7 = slice(conv.weight) {axis=1, start=0, size=2, step=1} : f32[1, 2, 3, 3]
  %8 = conv(z, %7) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 1, 4, 4]  # conv
  %9 = reshape(%6) {shape=[1, 1, 1, 1]} : f32[1, 1, 1, 1]
  %10 = broadcast_to(%9) {shape=[1, 1, 4, 4]} : f32[1, 1, 4, 4]
  %11 = conv(%10, %5) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[1, 1, 4, 4]  # conv.bias_map
  %12 = add(%8, %11) : f32[N, 1, 4, 4]  # conv.biased
  output y = %12
}
"""  # noqa: E501


def test_the_rewrite_with_a_bias_map_as_text() -> None:
    assert format_graph(prune(framed(), bias_maps=True)[0]) == AFTER_FRAMED


def test_a_bias_map_holds_what_the_windows_see_of_a_constant() -> None:
    """Ones over the constant 2: 4 taps at corners, 6 at edges, 9 inside."""
    pruned, report = prune(framed(), bias_maps=True)
    leaves, origin = materialise(pruned)
    store = Store.initialised(pruned.states)
    (weight,) = pruned.states
    store[weight] = np.ones(weight.shape)
    evaluate_origin(origin, store)
    (bias,) = (s for s in leaves.states if s.shape == (1, 1, 4, 4))
    expected = [[8, 12, 12, 8], [12, 18, 18, 12], [12, 18, 18, 12], [8, 12, 12, 8]]
    np.testing.assert_array_equal(store[bias][0, 0], expected)
    assert "1 bias map" in report.notes[0]
    assert report.macs == (4 * 4 * 27, 4 * 4 * 18)


@pytest.mark.parametrize("silent", [half, normed])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "geometry",
    [
        {"pad": 1},
        {"pad": (2, 0, 1, 1)},
        {"pad": 2, "dilation": 2},
        {"pad": 1, "stride": 2},
        {"pad": (0, 0, 1, 0), "stride": (1, 2)},
    ],
    ids=["same", "uneven", "dilated", "strided", "one end"],
)
def test_bias_maps_hold_constants_under_every_geometry(  # type: ignore[no-untyped-def]
    silent, bias: bool, geometry: dict
) -> None:
    graph = Graph("beside")
    x = image_input(graph)
    both = concat(conv(x, 3, 1, name="loud"), silent(conv(x, 2, 1, name="silent")))
    graph.output("y", relu(conv(both, 4, 3, bias=bias, name="mixer", **geometry)))
    pruned, report = prune(graph, bias_maps=True)
    assert layers(pruned) == {"loud": (3, 3), "mixer": (4, 3)}
    assert ops(pruned) == ["conv", "conv", "add", "relu"]
    assert report.macs[1] < report.macs[0]


def test_without_padding_there_is_no_bias_map() -> None:
    pruned, report = prune(beside(half, 3, 0), bias_maps=True)
    assert ops(pruned) == ["conv", "conv"]
    assert "bias map" not in report.notes[0]


def test_a_bias_map_beside_one_row_is_an_operand_like_any_other() -> None:
    assert ops(prune(framed(rows=1), bias_maps=True)[0]) == ["conv", "add"]


def test_a_bias_map_needs_the_size() -> None:
    for bias_maps in (False, True):
        report = PruneChannels(bias_maps).run(framed(3, "W")).report
        reason = (
            "constant channels stay: its padding is 0, and the size is not known for a bias map; "
            "bind it"
        )
        assert report.refusals == [("conv", reason)]


def test_what_stands_behind_a_bias_map_is_slimmed_with_it() -> None:
    """Filters behind the map are found idle when the next layer is; gates go into layer and map."""
    graph = Graph("behind")
    x = image_input(graph)
    both = concat(conv(x, 3, 1, name="loud"), half(conv(x, 2, 1)))
    h = gate(relu(conv(both, 6, 3, pad=1, name="mixer")), fixed(graph, 0, 0.5, 0, 2, 1, 0))
    graph.output("y", conv(h, 2, 1, name="read"))
    pruned, report = prune(graph, bias_maps=True)
    assert layers(pruned) == {"loud": (3, 3), "mixer": (3, 3), "read": (2, 3)}
    assert ops(pruned) == ["conv", "conv", "add", "relu", "conv"]
    assert "1 constant gate" in report.notes[0]


def test_a_map_that_is_there_already_is_cut_with_the_filters() -> None:
    graph = Graph("map")
    h = conv(image_input(graph), 6, 3, pad=1, name="made")
    bias = graph.read(State("bias_map", (1, 6, 6, 6)))
    h = gate(bias + h, fixed(graph, *MIXED))
    graph.output("y", conv(relu(h), 4, 1, name="read"))
    pruned, report = prune(graph)
    assert layers(pruned) == {"made": (3, 3), "read": (4, 3)}
    assert report.parameters[1] == (3 * 27 + 3) + 3 * 36 + (4 * 3 + 4)


def test_the_specification_string() -> None:
    step = Pass.from_spec("prune_channels:bias_maps=true")
    assert step == PruneChannels(bias_maps=True)
    assert PruneChannels().name == "prune_channels:bias_maps=false"


def test_readers_that_need_all_channels_keep_them() -> None:
    graph = beside(closed)
    both = next(n for n in graph.nodes if n.op.opcode == "concat").output
    graph.output("seen", both)
    assert layers(prune(graph)[0])["mixer"] == (4, 5)


def test_weights_that_are_read_elsewhere_stay_whole() -> None:
    graph = beside(closed)
    mixer = graph.find("mixer")
    again = conv(image_input2(graph), 4, 3, weight=mixer.inputs[1], bias=False)
    graph.output("again", again)
    pruned, report = prune(graph)
    assert layers(pruned)["mixer"] == (4, 5)
    assert ("mixer", "its weight is read elsewhere too") in report.refusals


def image_input2(graph: Graph) -> Value:
    return graph.input("x2", ("N", 5, 6, 6))


# -- filters and groups ----------------------------------------------------------------------------

MIXED = (0.0, 1.0, 0.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h,
        relu,
        lambda h: max_pool(h, 2),
        lambda h: average_pool(h, 3, pad=1, stride=1),
        lambda h: merge_sum(h, relu(h) * 0.5),
        lambda h: concat(h, relu(h)),
    ],
    ids=["direct", "relu", "max", "mean", "sum", "concat"],
)
def test_a_channel_gate_takes_the_filters_before_and_the_slices_after_it(between) -> None:  # type: ignore[no-untyped-def]
    graph = Graph("filters")
    h = batch_norm(conv(image_input(graph), 6, 3, pad=1, name="made"))
    graph.output("y", conv(between(gate(h, fixed(graph, *MIXED))), 4, 3, pad=1, name="read"))
    pruned, report = prune(graph)
    assert layers(pruned)["made"] == (3, 3)
    assert layers(pruned)["read"][1] in (3, 6)
    assert "select" not in ops(pruned)
    assert report.parameters[1] < report.parameters[0]


def test_flattened_channels_leave_the_dense_layer() -> None:
    graph = Graph("flat")
    h = gate(conv(image_input(graph), 6, 3, name="made"), fixed(graph, *MIXED))
    graph.output("y", dense(flatten(h), 5, name="dense"))
    graph.output("z", dense(global_average_pool(relu(h)), 5, name="pooled"))
    found = layers(prune(graph)[0])
    assert found == {"made": (3, 3), "dense": (5, 48), "pooled": (5, 3)}


def test_grouped_convolutions_lose_whole_groups_only() -> None:
    graph = Graph("groups")
    h = conv(image_input(graph), 6, 1, name="first")
    h = relu(conv(h, 6, 3, groups=3, name="grouped"))
    h = gate(h, fixed(graph, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0))
    graph.output("y", conv(h, 2, 1, name="last"))
    pruned, _ = prune(graph)
    assert layers(pruned) == {"first": (4, 3), "grouped": (4, 2), "last": (2, 3)}
    assert pruned.find("grouped").op.groups == 2


def test_depthwise_convolutions_slim_with_their_neighbours() -> None:
    graph = Graph("depthwise")
    h = relu(conv(image_input(graph), 6, 1, name="first"))
    h = conv(h, 6, 3, groups=6, pad=1, name="depthwise")
    graph.output("y", conv(gate(relu(h), fixed(graph, *MIXED)), 2, 1, name="last"))
    pruned, _ = prune(graph)
    assert layers(pruned) == {"first": (3, 3), "depthwise": (3, 1), "last": (2, 3)}


def test_batch_norm_without_fixed_statistics_stays_whole() -> None:
    graph = Graph("declared")
    h = gate(
        batch_norm(conv(image_input(graph), 6, 1, name="made"), name="bn"), fixed(graph, *MIXED)
    )
    graph.output("y", conv(h, 2, 1, name="read"))
    report = PruneChannels().run(graph).report
    assert ("bn", "its statistics are not fixed; specialise(training=False)") in report.refusals


# -- constant gates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: conv(x, 4, 3, bias=False),
        lambda x: conv(x, 4, 3),
        lambda x: relu(conv(x, 4, 3)),
        lambda x: batch_norm(conv(x, 4, 3)),
    ],
    ids=["bare", "bias", "relu", "norm"],
)
@pytest.mark.parametrize("factors", [(0.5,), (0.5, 2.0, 1.0, 3.0)])
def test_constant_gates_go_into_the_layer_before(layer, factors) -> None:  # type: ignore[no-untyped-def]
    graph = Graph("scaled")
    graph.output("y", gate(layer(image_input(graph)), fixed(graph, *factors)))
    pruned, report = prune(graph)
    assert "select" not in ops(pruned)
    assert "1 constant gate" in report.notes[0]


@pytest.mark.parametrize(
    ("value", "factor"),
    [
        (lambda x: relu(conv(x, 4, 3)), -0.5),
        (lambda x: sigmoid(conv(x, 4, 3)), 0.5),
        (lambda x: max_pool(x, 2), 0.5),
    ],
    ids=["negative", "sigmoid", "pool"],
)
def test_constant_gates_that_no_layer_takes_up_stay(value, factor: float) -> None:  # type: ignore[no-untyped-def]
    graph = Graph("stays")
    graph.output("y", gate(value(image_input(graph)), fixed(graph, factor), name="gate"))
    pruned, report = prune(graph)
    assert "select" in ops(pruned)
    assert report.refusals == [("gate", "no layer takes up its gate")]


# -- parameters ------------------------------------------------------------------------------------


def test_old_parameters_and_slots_follow_their_slices() -> None:
    graph = Graph("slots")
    h = gate(conv(image_input(graph), 6, 3, name="made"), fixed(graph, *MIXED))
    graph.output("y", conv(relu(h), 4, 1, name="read"))
    store = randomised(graph)
    pruned, _ = prune(graph)
    leaves, origin = materialise(pruned)
    slots = {(s, "v"): State(f"{s.name}.v", s.shape, s.dtype, Role.SLOT) for s in graph.states}
    for (state, _), slot in slots.items():
        store[slot] = store[state] * 2
    carried = carry_slots(origin, slots, store)
    evaluate_origin(origin, store)
    assert not carried.reset
    for state in leaves.states:
        if state in origin.updates:
            np.testing.assert_array_equal(store[carried.slots[state, "v"]], store[state] * 2)
    results = [
        interpret(g, {"x": images()}, store, DType.F64).outputs["y"] for g in (graph, leaves)
    ]
    np.testing.assert_allclose(results[1], results[0], **EXACT)
    assert sum(int(np.prod(s.shape)) for s in leaves.states) == deployed_cost(pruned).parameters


@settings(max_examples=40, deadline=None)
@given(gated_graphs())
def test_random_gated_graphs_stay_the_same_function_with_bias_maps(graph: Graph) -> None:
    _, report = prune(graph, bias_maps=True)
    assert not any("bias_maps=true" in why for _, why in report.refusals)
    assert report.macs[1] <= prune(graph)[1].macs[1] <= report.macs[0]


@settings(max_examples=40, deadline=None)
@given(gated_graphs())
def test_random_gated_graphs_stay_the_same_function(graph: Graph) -> None:
    pruned, report = prune(graph)
    assert report.parameters[1] <= report.parameters[0]
    assert report.macs[1] <= report.macs[0]
    check_claim(graph, PruneChannels().apply(graph), "exact")
    both = PruneChannels().run(PruneGates().apply(specialise(graph, training=False)))
    assert (both.report.parameters[1], both.report.macs[1]) == (
        report.parameters[1],
        report.macs[1],
    )
    assert len(both.graph.nodes) == len(pruned.nodes)


def test_constant_channels_behind_a_closed_gate_are_zero() -> None:
    """relu of a bias is constant; what the gate closes of it is not."""
    graph = Graph("net")
    x = graph.input("x", ("N", 4, 5, 5))
    zero = graph.constant(0.0)
    h = relu(conv(gate(x, zero), 4, 1, name="conv"))
    mask = write(graph, np.array([0.0, 0.0, 1.0, 2.0]).reshape(4, 1, 1), x.dtype)
    graph.output("y", dense(global_average_pool(gate(h, mask)), 3, name="fc"))
    result = PruneChannels().run(graph, record=True)
    assert result.report.matches
    check_claim(graph, result.graph, "exact", report=result.report)


def test_an_application_of_a_batch_norm_that_nobody_reads_stays_whole() -> None:
    """In training it moves all the running statistics that the other application moves."""
    graph = Graph("unread norm")
    x = image_input(graph, 4)
    y, _ = norm_of_two(graph, conv(x, 4, 1, name="one"), conv(x, 4, 1, name="two"))
    graph.output("y", conv(gate(y, fixed(graph, 0.0, 1.0, 0.0, 1.0)), 4, 1, name="reader"))
    result = PruneChannels().run(graph, record=True)
    check_claim(graph, result.graph, "exact", report=result.report)
    assert layers(result.graph) == {"one": (4, 4), "two": (4, 4), "reader": (4, 2)}
    before, after = (specialise(g, training=True) for g in (graph, result.graph))
    store = randomised(before)
    fed = {"x": np.random.default_rng(0).normal(size=(5, 4, *x.shape[2:])).astype(np.float32)}
    moved = [interpret(g, fed, store, DType.F64).updates for g in (before, after)]
    assert moved[0].keys() == moved[1].keys()
    for state, value in moved[0].items():
        np.testing.assert_allclose(moved[1][state], value, **EXACT)
