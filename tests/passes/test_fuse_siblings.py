"""Layers side by side become one layer and a split, exactly, where it pays, or say why not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from builders import EXACT, branches_of_every_kind, image_input, images, random_graphs, randomised
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.ir.builder import (
    batch_norm,
    concat,
    conv,
    dense,
    exit,
    global_average_pool,
    merge_sum,
    relu,
    tanh,
)
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import cast
from branchgraph.ir.text import format_graph
from branchgraph.ir.types import DType
from branchgraph.nets import NETWORKS
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.checking import check_claim
from branchgraph.passes.fuse_siblings import FuseSiblings
from branchgraph.passes.materialise import evaluate_origin, materialise
from branchgraph.passes.pipeline import Pipeline
from branchgraph.passes.specialise import specialise
from branchgraph.training import joint_loss

#: Starting a kernel costs so much that everything that can be fused is.
ALWAYS = FuseSiblings(launch=10**12)

Net = Callable[[Value], list[Value]]


def net(build: Net, channels: int = 4, size: int = 6) -> Graph:
    graph = Graph("net")
    for i, value in enumerate(build(image_input(graph, channels, size))):
        graph.output(f"y{i}", value)
    return graph


def fused(graph: Graph, step: FuseSiblings = ALWAYS) -> tuple[Graph, Report]:
    """The graph after the pass, checked part by part and as a whole."""
    result = step.run(graph, record=True)
    check_claim(graph, result.graph, "exact", report=result.report)
    assert len(result.report.regions) == len(result.report.matches)
    assert not step.run(result.graph).report.matches, "a second application matches nothing"
    return result.graph, result.report


def count(graph: Graph, opcode: str) -> int:
    return sum(n.op.opcode == opcode for n in graph.nodes)


def _dense(x: Value) -> list[Value]:
    return [dense(x, k, bias=k > 2) for k in (2, 3, 4)]


KINDS: dict[str, Net] = {
    "one window": lambda x: [conv(x, k, 3, pad=1) for k in (2, 3, 5)],
    "windows of ACNet": lambda x: [
        conv(x, 2, (3, 3), pad=1),
        conv(x, 3, (1, 3), pad=(0, 1)),
        conv(x, 4, (3, 1), pad=(1, 0), bias=False),
        conv(x, 2, 1),
    ],
    "windows that are not centred": lambda x: [
        conv(x, 2, 3, pad=(0, 2, 2, 0)),
        conv(x, 2, 2, pad=(1, 0, 0, 1)),
        conv(x, 2, 5, pad=(4, 1, 0, 3)),
    ],
    "strided, tails of several lengths": lambda x: [
        conv(x, 2, 3, stride=2, pad=1),
        conv(x, 2, 3, stride=2, pad=(1, 1, 0, 0)),
        conv(x, 2, 1, stride=2),
        conv(x, 2, 2, stride=2),
    ],
    "dilated": lambda x: [
        conv(x, 2, 3, dilation=2, pad=2),
        conv(x, 2, 1, dilation=2),
        conv(x, 3, 5, dilation=2, pad=4),
    ],
    "grouped": lambda x: [conv(x, 2 * k, 3, pad=1, groups=2, bias=k > 1) for k in (1, 2, 3)],
    "depthwise": lambda x: [conv(x, 4 * k, 1 + 2 * k, pad=k, groups=4) for k in (1, 2)],
    "dense": lambda x: _dense(global_average_pool(x)),
    "no biases": lambda x: [conv(x, k, 3, bias=False) for k in (2, 3)],
    "several inputs": lambda x: [conv(f(x), 3, 3, name="c", bias=f is relu) for f in (relu, tanh)],
    "several inputs, grouped": lambda x: [conv(f(x), 6, 3, groups=2) for f in (relu, tanh)],
    "dense of several inputs": lambda x: [dense(f(x), 5, bias=f is relu) for f in (relu, tanh)],
}
LEFT = {"several inputs": 1, "several inputs, grouped": 1, "dense of several inputs": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_function_with_one_layer(kind: str) -> None:
    graph = net(KINDS[kind])
    after, report = fused(graph)
    assert len(report.matches) == 1
    assert not report.refusals
    assert count(after, "conv") + count(after, "dense") == LEFT.get(kind, 1)
    assert count(after, "split") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_materialised_it_has_one_kernel_and_gradients_are_the_same(kind: str) -> None:
    graph = net(KINDS[kind])
    after, _ = fused(graph)
    store = randomised(graph)
    plain, origin = materialise(after)
    evaluate_origin(origin, store)
    assert {s.name.split(".")[-1] for s in plain.states} <= {"weight", "bias"}
    assert len(plain.states) <= 2
    fed = {"x": images(channels=4)}
    expected = interpret(graph, fed, store, DType.F64).outputs
    for key, value in interpret(plain, fed, store, DType.F64).outputs.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=1e-5)
    _same_gradients(graph, after)


def _same_gradients(graph: Graph, after: Graph) -> None:
    """Gradients by every parameter agree, so a fused network trains as the other one does."""
    before, now = (differentiate(_with_loss(g)) for g in (graph, after))
    store = randomised(graph)
    fed = {"x": images(channels=4)}
    expected = interpret(before, fed, store, DType.F64).gradients
    found = interpret(now, fed, store, DType.F64).gradients
    assert found.keys() == expected.keys()
    for state, value in expected.items():
        np.testing.assert_allclose(found[state], value, **EXACT)


def _with_loss(graph: Graph) -> Graph:
    new = specialise(graph, training=True)
    terms = [
        new.emit(make("reduce_sum", axes=tuple(range(len(v.shape)))), tanh(v))
        for v in new.outputs.values()
    ]
    new.output("loss", merge_sum(*terms))
    return new


BEFORE = """\
graph net {
  state a.weight : f32[2, 1, 1, 3] param init=lecun_normal(fan_in=3, scale=1.0)
  state a.bias : f32[2] param init=zeros()
  state b.weight : f32[1, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  input x : f32[N, 1, 4, 4]
  %0 = conv(x, a.weight, a.bias) {stride=[1, 1], pad=[0, 1, 0, 1], dilation=[1, 1], groups=1} : f32[N, 2, 4, 4]  # a
  %1 = conv(x, b.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 4, 4]  # b
  output y0 = %0
  output y1 = %1
}
"""  # noqa: E501
AFTER = """\
graph net {
  state b.weight : f32[1, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  state a.weight : f32[2, 1, 1, 3] param init=lecun_normal(fan_in=3, scale=1.0)
  state a.bias : f32[2] param init=zeros()
  input x : f32[N, 1, 4, 4]
  %0 = embed(b.weight) {axis=3, start=1, size=3, step=1} : f32[1, 1, 1, 3]
  %1 = concat(a.weight, %0) {axis=0} : f32[3, 1, 1, 3]  # siblings.weight
  %2 = full() {value=0.0, shape=[1], dtype=f32} : f32[1]
  %3 = concat(a.bias, %2) {axis=0} : f32[3]  # siblings.bias
  %4 = conv(x, %1, %3) {stride=[1, 1], pad=[0, 1, 0, 1], dilation=[1, 1], groups=1} : f32[N, 3, 4, 4]  # siblings
  %5, %6 = split(%4) {axis=1, sizes=[2, 1]} : f32[N, 2, 4, 4], f32[N, 1, 4, 4]
  output y0 = %5
  output y1 = %6
}
"""  # noqa: E501


def test_the_rewrite_as_text() -> None:
    def two(x: Value) -> list[Value]:
        return [conv(x, 2, (1, 3), pad=(0, 1), name="a"), conv(x, 1, 1, name="b", bias=False)]

    graph = net(two, channels=1, size=4)
    assert format_graph(graph) == BEFORE
    assert format_graph(FuseSiblings().apply(graph)) == AFTER


def test_the_wide_layer_stands_in_the_scope_that_all_share() -> None:
    graph = Graph("g")
    x = image_input(graph)
    with scope("block"):
        for name in ("left", "right"):
            with branch(name):
                graph.output(name, conv(x, 2, 3))
    after, report = fused(graph)
    assert report.matches == ["block/left/conv + block/right/conv"]
    assert {n.path for n in after.nodes if n.name} == {
        "block/siblings",
        "block/siblings.weight",
        "block/siblings.bias",
    }


# -- refusals --------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Net, str]] = {
    "stride": (
        lambda x: [conv(x, 2, 1, stride=s) for s in (1, 2)],
        "it differs in stride: [1, 1], beside [2, 2]",
    ),
    "dilation": (
        lambda x: [conv(x, 2, 3, dilation=d, pad=d) for d in (1, 2)],
        "it differs in dilation: [1, 1], beside [2, 2]",
    ),
    "groups": (
        lambda x: [conv(x, 4, 1, groups=g) for g in (1, 2)],
        "it differs in groups: 1, beside 2",
    ),
    "size": (
        lambda x: [conv(x, 4, 3, pad=p) for p in (0, 1)],
        "it differs in size of the output: [4, 4], beside [6, 6]",
    ),
    "pads between the taps": (
        lambda x: [conv(x, 2, 2, dilation=2, pad=p) for p in ((1, 1, 1, 1), (0, 0, 2, 2))],
        "it differs in pads between the taps: [1, 1], beside [0, 0]",
    ),
    "one weight is computed from the other's result": (
        lambda x: [h := conv(x, 4, 6), conv(x, 2, 1, weight=_weight_of(h))],
        "one of them is computed from another",
    ),
    "dtype": (
        lambda x: [conv(cast(f(x), d), 2, 3, bias=False) for f, d in ((relu, DType.F16),
                                                                      (tanh, DType.F64))],
        "it differs in dtype:",
    ),
}  # fmt: skip


def _weight_of(h: Value) -> Value:
    """A kernel [2, 4, 1, 1] computed from an activation [N, 4, 1, 1]."""
    mean = h.graph.emit(make("reduce_mean", axes=(0, 2, 3)), h)
    row = h.graph.emit(make("reshape", shape=(1, 4, 1, 1)), mean)
    return concat(row, row * 2.0, axis=0)


@pytest.mark.parametrize("kind", REFUSED)
def test_siblings_that_do_not_agree_are_refused(kind: str) -> None:
    build, reason = REFUSED[kind]
    graph = net(build)
    step = FuseSiblings(launch=10**12, stack=kind == "dtype")
    after, report = fused(graph, step)
    assert not report.matches
    assert report.refusals
    assert any(reason in why for _, why in report.refusals), report.refusals
    assert format_graph(after) == format_graph(graph)


def test_layers_one_of_which_is_computed_from_the_other_stay_apart() -> None:
    """Same shapes in a row, and a path through another layer: fused, they would read themselves."""

    def row(x: Value) -> list[Value]:
        first = conv(x, 4, 3, pad=1)
        second = conv(relu(first), 4, 3, pad=1)
        return [merge_sum(first, conv(second, 4, 3, pad=1))]

    graph = net(row)
    after, report = fused(graph)
    assert not report.matches
    assert count(after, "conv") == 3


def test_crossing_pairs_do_not_make_a_cycle() -> None:
    """a, b read x; c reads a and d reads b: fusing (a, d) and (b, c) would be a cycle."""

    def crossed(x: Value) -> list[Value]:
        a, b = conv(relu(x), 4, 3, pad=1), conv(tanh(x), 4, 3, pad=1)
        return [conv(a, 4, 3, pad=1), conv(relu(b), 4, 3, pad=1)]

    after, report = fused(net(crossed))
    assert report.matches == ["conv + conv_1"]
    assert count(after, "conv") == 3


def test_layers_between_which_an_exit_stands_stay_apart() -> None:
    """Fused, the second would be computed for the samples that leave before it."""
    graph = Graph("g")
    x = image_input(graph)
    with branch("exit1"):
        exit(dense(global_average_pool(conv(x, 4, 3, pad=1)), 5), "exit1", threshold=0.5)
    exit(dense(global_average_pool(conv(x, 4, 3, pad=1)), 5), "exit2", last=True)
    _, report = fused(graph)
    assert not report.matches
    assert {why for _, why in report.refusals} >= {"an exit stands between them"}


def test_dense_layers_before_an_exit_are_not_stacked() -> None:
    """Exits take rows of axis 0 away, which is where a stack has its layers."""
    graph = Graph("g")
    x = graph.input("x", ("N", 4))
    logits = merge_sum(dense(relu(x), 5), dense(tanh(x), 5))
    exit(logits, "exit1", last=True)
    _, report = fused(graph)
    assert not report.matches
    assert {why for _, why in report.refusals} == {
        "a stack has layers on axis 0, where exits thin out rows"
    }


def test_inputs_of_other_rows_are_not_stacked() -> None:
    graph = Graph("g")
    for name in ("N", "M"):
        x = graph.input(f"x{name}", (name, 4, 6, 6))
        graph.output(f"y{name}", conv(x, 4, 3))
    _, report = fused(graph)
    assert not report.matches
    assert report.refusals[0][1] == "it differs in rows: N, beside M"


def test_early_exits_give_the_same_rows_after_fusing() -> None:
    graph = branches_of_every_kind()
    after, report = fused(graph)
    assert report.matches == ["block/left/conv + block/right/conv"]
    store = randomised(graph)
    results = []
    for g in (graph, after):
        lowered = specialise(g, training=False)
        results.append(interpret(lowered, {"x": images(9)}, store, DType.F64).outputs)
    np.testing.assert_array_equal(results[0]["exit"], results[1]["exit"])
    np.testing.assert_allclose(results[0]["logits"], results[1]["logits"], **EXACT)


# -- cost ------------------------------------------------------------------------------------------


def windows(x: Value) -> list[Value]:
    return [conv(x, 8, 1), conv(x, 8, 5, pad=2), conv(x, 8, 1, name="c")]


def test_a_common_window_must_pay_for_its_zeros() -> None:
    """8 4 24 zeros at 6 6 places, twice: 55,296 multiplications."""
    graph = net(windows)
    after, report = fused(graph, FuseSiblings(launch=55_296))
    assert len(report.matches) == 1
    assert count(after, "conv") == 1
    after, report = fused(graph, FuseSiblings(launch=55_295))
    assert report.matches == ["conv + c"], "those of one window are fused anyhow"
    assert count(after, "conv") == 2
    wide = FuseSiblings(launch=55_296, batch=2)
    assert len(fused(graph, wide)[0].outputs) == 3
    assert count(wide.apply(graph), "conv") == 2


def test_what_does_not_pay_is_refused_with_the_account() -> None:
    def two(x: Value) -> list[Value]:
        return [conv(x, 8, 1), conv(x, 8, 5, pad=2)]

    _, report = fused(net(two), FuseSiblings(launch=1000))
    assert not report.matches
    assert {why for _, why in report.refusals} == {
        "it would not pay: 1 kernel starts saved, 0 elements moved, 27,648 multiplications by zero"
    }


def test_copies_of_several_inputs_must_pay() -> None:
    """Two inputs of 4 6 6 elements: 288 are moved."""
    graph = net(KINDS["several inputs"])
    assert fused(graph, FuseSiblings(launch=289, move=1))[1].matches
    _, report = fused(graph, FuseSiblings(launch=287, move=1))
    assert "288 elements moved" in report.refusals[0][1]
    assert not fused(graph, FuseSiblings(launch=10**12, stack=False))[1].matches


def test_in_training_kernels_are_put_together_every_step() -> None:
    graph = net(KINDS["one window"])
    assert fused(graph, FuseSiblings(launch=1000, move=1))[1].matches
    heavy = FuseSiblings(launch=100, move=1, training=True)
    assert "elements moved" in fused(graph, heavy)[1].refusals[0][1]


def test_the_pass_has_a_specification() -> None:
    made = Pass.from_spec("fuse_siblings:launch=5,stack=false")
    assert made == FuseSiblings(launch=5, stack=False)


# -- random graphs and the networks of the field ---------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(random_graphs(), st.booleans())
def test_random_networks_stay_the_same_function(graph: Graph, stack: bool) -> None:
    Pipeline((FuseSiblings(launch=10**12, stack=stack),), verify=True).apply(graph)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_random_siblings(data: st.DataObject) -> None:
    """Any strides, pads and windows: what is fused is the same, and something is if sizes agree."""
    graph = Graph("g")
    x = image_input(graph, 2, 7)
    stride, dilation = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    pads = st.tuples(*[st.integers(0, 3)] * 4)
    for k in range(data.draw(st.integers(2, 4))):
        kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        y = conv(x, k + 1, kernel, stride=stride, dilation=dilation, pad=data.draw(pads))
        graph.output(f"y{k}", y)
    _, report = fused(graph)
    assert len(report.refusals) <= len(graph.outputs)


@settings(max_examples=10, deadline=None)
@given(random_graphs())
def test_training_graphs_too(graph: Graph) -> None:
    training = joint_loss(specialise(graph, training=True))
    result = ALWAYS.run(training, record=True)
    check_claim(training, result.graph, "exact", report=result.report)
    differentiate(result.graph)


def test_batch_norms_behind_fused_layers_keep_their_statistics() -> None:
    graph = net(lambda x: [batch_norm(conv(x, k, 3)) for k in (2, 3)])
    after, _ = fused(graph)
    training = [specialise(g, training=True) for g in (graph, after)]
    assert training[0].updates.keys() == training[1].updates.keys()
    check_claim(*training, "exact")


#: Matches where it pays by the default account, and wherever it can be done at all.
FOUND = {
    "vbranch_resnet": (4, 4),
    "imagenet_resnet": (0, 3),
    "pd_a_resnet": (16, 16),
    "pd_b_resnet": (16, 16),
    "ac_resnet": (0, 16),
    "se_resnet": (0, 3),
    "ge_resnet": (0, 3),
    "cbam_resnet": (16, 19),
    "resnet": (0, 2),
    "half": (15, 30),
    "side": (15, 30),
    "cross": (1, 34),
    "fuse3": (3, 3),
    "fuse6": (3, 3),
    "ensemble": (3, 85),
    "cross_imagenet": (1, 48),
    "resnext": (1, 1),
    "masked_resnext": (12, 20),
    "branch_connect": (2, 2),
    "repvgg": (0, 22),
    "dbb_resnet": (19, 32),
    "inception_v3": (10, 14),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_matches_in_the_networks_of_the_field(name: str) -> None:
    graph = NETWORKS.network(name)
    found = [len(step.run(graph).report.matches) for step in (FuseSiblings(), ALWAYS)]
    assert tuple(found) == FOUND.get(name, (0, 0))


@pytest.mark.parametrize("spec", ["fuse3", "branch_connect"])
def test_fused_networks_are_the_same_function(spec: str) -> None:
    fused(NETWORKS.network(spec))
