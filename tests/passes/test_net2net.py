"""Wider and deeper networks compute what they did."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from builders import EXACT, image_input, images, random_graphs, randomised
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from branchgraph.compiler import compile
from branchgraph.ir.builder import (
    average_pool,
    batch_norm,
    concat,
    conv,
    dense,
    dropout,
    elu,
    gate,
    global_average_pool,
    lrn,
    max_pool,
    merge_mean,
    merge_sum,
    relu,
    sigmoid,
    softmax,
)
from branchgraph.ir.errors import FormatError, GraphError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.initialisers import IdentityKernel
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.activation import Relu
from branchgraph.ir.ops.elementwise import Clip
from branchgraph.ir.ops.reshape import Pad, Reshape
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.nets import network
from branchgraph.passes.base import Pass, Result
from branchgraph.passes.materialise import evaluate_origin, materialise
from branchgraph.passes.net2net import Deepen, Widen, taken
from branchgraph.passes.pipeline import Pipeline, Reports
from branchgraph.passes.specialise import specialise
from branchgraph.training.loss import joint_loss


def checked(step: Pass, graph: Graph) -> Result:
    """The result of a step whose claim is compared in every region and as a whole."""
    watched = Reports()
    Pipeline((step,), instruments=(watched,), verify=True).apply(graph)
    (report,) = watched.reports
    assert len(report.regions) == len(report.matches)
    assert "does not run by itself" not in str(report)
    return step.run(graph)


def layers_of(graph: Graph) -> list[Node]:
    """Convolutions and dense layers that a path tells apart."""
    paths = Counter(n.path for n in graph.nodes)
    return [n for n in graph.nodes if n.op.opcode in ("conv", "dense") and paths[n.path] == 1]


def headed(h: Value) -> Graph:
    h.graph.output("logits", dense(h, 3, name="fc"))
    return h.graph


# -- widening --------------------------------------------------------------------------------------


def test_text_before_and_after() -> None:
    graph = Graph("tiny")
    h = relu(dense(graph.input("x", ("N", 2)), 2, name="fc1"), name="relu1")
    graph.output("y", dense(h, 1, name="fc2"))
    wide = checked(Widen(layer="fc1", to=3, mapping="cyclic"), graph).graph
    assert format_graph(wide) == WIDE


WIDE = """\
graph tiny {
  state fc1.weight : f32[2, 2] param init=lecun_normal(fan_in=2, scale=1.0)
  state fc1.bias : f32[2] param init=zeros()
  state fc2.weight : f32[1, 2] param init=lecun_normal(fan_in=2, scale=1.0)
  state fc2.bias : f32[1] param init=zeros()
  input x : f32[N, 2]
  %0 = slice(fc1.weight) {axis=0, start=0, size=1, step=1} : f32[1, 2]
  %1 = concat(fc1.weight, %0) {axis=0} : f32[3, 2]  # fc1.weight
  %2 = slice(fc1.bias) {axis=0, start=0, size=1, step=1} : f32[1]
  %3 = concat(fc1.bias, %2) {axis=0} : f32[3]  # fc1.bias
  %4 = dense(x, %1, %3) : f32[N, 3]  # fc1
  %5 = relu(%4) : f32[N, 3]  # relu1
  %6 = full() {value=2.0, shape=[1, 1], dtype=f32} : f32[1, 1]
  %7 = full() {value=1.0, shape=[1, 1], dtype=f32} : f32[1, 1]
  %8 = concat(%6, %7) {axis=1} : f32[1, 2]
  %9 = divide(fc2.weight, %8) : f32[1, 2]
  %10 = slice(%9) {axis=1, start=0, size=1, step=1} : f32[1, 1]
  %11 = concat(%9, %10) {axis=1} : f32[1, 3]  # fc2.weight
  %12 = dense(%5, %11, fc2.bias) : f32[N, 1]  # fc2
  output y = %12
}
"""


@pytest.mark.parametrize("mapping", ["random", "cyclic"])
@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3", "fc1", "exit1/conv"])
def test_layers_of_a_network_with_exits_are_widened(layer: str, mapping: str) -> None:
    graph = network("b_lenet:size=12")
    channels = graph.find(layer).inputs[1].shape[0]
    assert isinstance(channels, int)
    result = checked(Widen(layer=layer, to=2 * channels + 1, mapping=mapping), graph)
    assert result.report.matches == [layer]
    assert result.graph.find(layer).inputs[1].shape[0] == 2 * channels + 1
    again = Widen(layer=layer, to=2 * channels + 1).run(result.graph).report
    assert not again.matches
    assert "which is not less than" in again.refusals[0][1]


def test_wide_weights_are_repeated_and_shared_out() -> None:
    graph = headed(global_average_pool(relu(conv(image_input(Graph("g")), 2, 1, name="c"))))
    wide, origin = materialise(Widen(layer="c", to=5, mapping="cyclic").apply(graph))
    store = randomised(graph)
    evaluate_origin(origin, store)
    old = {s.name: store[s] for s in graph.states}
    new = {s.name: store[s] for s in wide.states}
    np.testing.assert_array_equal(new["c.weight"], old["c.weight"][[0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(new["c.bias"], old["c.bias"][[0, 1, 0, 1, 0]])
    shares = np.array([3, 2, 3, 2, 3], np.float32)
    np.testing.assert_allclose(new["fc.weight"], old["fc.weight"][:, [0, 1, 0, 1, 0]] / shares)
    assert {s.role for s in wide.states} == {Role.PARAMETER}


def test_the_random_mapping_depends_on_the_seed_alone() -> None:
    texts = {
        seed: format_graph(Widen(layer="conv3", to=30, seed=seed).apply(network("lenet")))
        for seed in (0, 1)
    }
    assert texts[0] != texts[1]
    assert texts[0] == format_graph(Widen(layer="conv3", to=30, seed=0).apply(network("lenet")))


def test_many_scattered_channels_are_taken_in_groups() -> None:
    graph = Graph("many")
    value = graph.read(State("v", (2000,)))
    index = tuple(range(0, 2000, 2)) + tuple(range(1, 2000, 2))
    graph.output("y", taken(value, 0, index))
    assert max(len(n.inputs) for n in graph.nodes) <= 512
    store = Store({value.state: np.arange(2000)}) if value.state else Store()
    np.testing.assert_array_equal(interpret(graph, {}, store).outputs["y"], index)


def a_bit_of_everything(h: Value) -> Value:
    """Batch norm, pools, a depthwise convolution that doubles channels, a gate, padding."""
    h = batch_norm(conv(h, 4, 3, pad=1, name="wide"), name="norm")
    h = max_pool(relu(h), 3, stride=1, pad=1)
    h = relu(batch_norm(conv(h, 8, 3, pad=1, groups=4, name="depthwise")))
    h = gate(h, h.graph.read(State("gate", (8, 1, 1), role=Role.GATE)))
    h = h.graph.emit(Pad(begin=(0, 2, 0, 0), end=(0, 1, 1, 0)), h) * 2.0
    return average_pool(dropout(h), 2)


def test_what_treats_channels_alike_passes_them_on() -> None:
    graph = headed(a_bit_of_everything(image_input(Graph("all"))))
    for to in (5, 9):
        result = checked(Widen(layer="wide", to=to), graph)
        assert result.report.matches == ["wide"]
        assert "exact in inference only" in str(result.report)
        assert f"f32[{2 * to}, 1, 3, 3]" in format_graph(result.graph)


def test_channels_that_are_concatenated_keep_their_places() -> None:
    x = image_input(Graph("cat"))
    a, b = conv(x, 4, 1, name="a"), conv(x, 3, 1, name="b")
    graph = headed(relu(concat(a, b, x, a)))
    for layer in ("a", "b"):
        assert checked(Widen(layer=layer, to=6), graph).report.matches == [layer]


def test_layers_that_are_added_are_widened_alike() -> None:
    x = image_input(Graph("residual"))
    a = relu(conv(x, 4, 3, pad=1, name="a"))
    b = batch_norm(conv(a, 4, 3, pad=1, name="b"))
    c = conv(x, 4, 1, name="c")
    graph = headed(global_average_pool(relu(merge_mean(merge_sum(a, b), c))))
    result = checked(Widen(layer="b", to=7), graph)
    assert "tied to it: a, c" in str(result.report)
    assert {result.graph.find(n).inputs[1].shape[0] for n in "abc"} == {7}


def test_gates_computed_from_the_value_are_widened_with_it() -> None:
    result = checked(Widen(layer="layer1/0/body/conv2/conv", to=66), squeezed())
    assert result.report.matches


def squeezed() -> Graph:
    """A squeeze-and-excitation block under the names of `se_resnet`."""
    graph = Graph("se")
    x = image_input(graph)
    h = conv(x, 4, 3, pad=1, name="layer1/0/body/conv2/conv")
    s = sigmoid(dense(relu(dense(global_average_pool(h), 2, name="down")), 4, name="up"))
    s = graph.emit(Reshape(shape=(s.shape[0], 4, 1, 1)), s)
    return headed(global_average_pool(h * s))


def test_batch_norm_stays_exact_in_training_once_its_statistics_are_states() -> None:
    x = image_input(Graph("norm"))
    graph = headed(global_average_pool(relu(batch_norm(conv(x, 4, 3, name="c"), name="bn"))))
    #: Every channel twice: halves have no rounding when they are stored.
    wide, origin = materialise(Widen(layer="c", to=8, mapping="cyclic").apply(graph))
    store = randomised(graph)
    evaluate_origin(origin, store)
    runs = [
        interpret(specialise(g, training=True), {"x": images()}, store, DType.F64)
        for g in (graph, wide)
    ]
    np.testing.assert_allclose(runs[1].outputs["logits"], runs[0].outputs["logits"], **EXACT)
    moved = [{s.name: v for s, v in r.updates.items()} for r in runs]
    assert moved[0].keys() == moved[1].keys() == {"bn.running_mean", "bn.running_var"}
    np.testing.assert_allclose(moved[1]["bn.running_mean"][:4], moved[0]["bn.running_mean"])


def test_a_weight_that_layers_share_stays_as_it_is_elsewhere() -> None:
    graph = Graph("shared")
    x = graph.input("x", ("N", 4))
    w = graph.read(State("w", (4, 4)))
    first = relu(dense(x, 4, weight=w, name="first"))
    graph.output("y", dense(first, 4, weight=w, name="second"))
    assert checked(Widen(layer="first", to=6), graph).report.matches == ["first"]


@given(random_graphs(), st.integers(5, 9), st.sampled_from(["random", "cyclic"]), st.data())
@settings(max_examples=60, deadline=None)
def test_random_networks_compute_the_same_or_say_why_not(
    graph: Graph, to: int, mapping: str, data: st.DataObject
) -> None:
    layers = layers_of(graph)
    assume(layers)
    layer = data.draw(st.sampled_from([n.path for n in layers]))
    step = Widen(layer=layer, to=to, mapping=mapping)
    wide = Pipeline((step,), verify=True).apply(graph)
    report = step.run(graph).report
    assert len(report.matches) + len(report.refusals) == 1
    assert parse_graph(format_graph(wide))


def padded(h: Value) -> Value:
    return h.graph.emit(Pad(begin=(0, 2, 0, 0), end=(0, 0, 0, 0)), h)


@pytest.mark.parametrize(
    ("behind", "reason"),
    [
        (lambda h, x: lrn(h, 3, name="norm"), "lrn norm does not treat channels one by one"),
        (lambda h, x: softmax(h), "softmax does not treat channels one by one"),
        (lambda h, x: conv(h, 4, 1, groups=2, name="g"), "conv g does not treat channels one"),
        (lambda h, x: h.graph.output("z", h), "wide is a result of the network"),
        (lambda h, x: merge_sum(h, x), "x is an input and cannot be widened alike"),
        (
            lambda h, x: merge_sum(h, conv(x, 4, 1, groups=2, name="g")),
            "conv g cannot be widened alike",
        ),
        (
            lambda h, x: merge_sum(h, concat(conv(x, 2, 1), conv(x, 2, 1), name="cat")),
            "operands of sum cannot be widened alike",
        ),
        (
            lambda h, x: h.graph.emit(Reshape(shape=(h.shape[0], 2, 72)), h, name="r"),
            "reshape r mixes channels with other axes",
        ),
        (lambda h, x: taken(h, 1, (0, 1)), "slice does not treat channels one by one"),
        (
            lambda h, x: merge_sum(h, padded(conv(x, 2, 1, name="t"))),
            "conv t, tied to it, has 2 channels",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_widened_is_refused_with_the_reason(behind, reason: str) -> None:  # type: ignore[no-untyped-def]
    x = image_input(Graph("no"), channels=4)
    h = behind(conv(x, 4, 3, pad=1, name="wide"), x)
    graph = headed(h)
    report = checked(Widen(layer="wide", to=6), graph).report
    assert not report.matches
    assert report.refusals[0][0] == "wide"
    assert report.refusals[0][1].startswith(reason)


def test_networks_are_widened_before_they_are_differentiated() -> None:
    graph = joint_loss(specialise(network("lenet:size=12"), training=True))
    trained = differentiate(graph)
    report = Widen(layer="conv2", to=12).run(trained).report
    assert "does not treat channels one by one" in report.refusals[0][1]


def test_layers_that_are_none_are_refused_too() -> None:
    x = image_input(Graph("no"), channels=4)
    graph = headed(relu(conv(x, 4, 1, groups=2, name="grouped"), name="r"))
    for layer in ("grouped", "r"):
        report = Widen(layer=layer, to=8).run(graph).report
        assert report.refusals == [
            (layer, "only convolutions in one group and dense layers are widened")
        ]
    with pytest.raises(GraphError, match="no node 'conv9'"):
        Widen(layer="conv9", to=8).apply(graph)
    with pytest.raises(GraphError, match="known: random, cyclic"):
        Widen(layer="r", to=8, mapping="mirrored")
    with pytest.raises(FormatError, match="expected int"):
        Pass.from_spec("widen:layer=conv1,to=many")


#: How many of the first eight layers can be widened, in networks of every family.
WIDENED = {
    "lenet": 4, "b_lenet": 5, "alexnet": 5, "b_alexnet": 3, "resnet_a": 4, "b_resnet": 4,
    "cnn": 5, "vbranch_resnet": 8, "densenet": 8, "densenet_bc": 8, "imagenet_resnet": 8,
    "pd_a_resnet": 0, "ac_resnet": 8, "se_resnet": 8, "plain": 8, "resnet": 8, "half": 8,
    "side": 8, "cross": 8, "fuse3": 8, "fuse6": 8, "ensemble": 7, "cross_imagenet": 8,
    "resnext": 4, "branch_connect": 6, "repvgg": 8, "dbb_resnet": 8, "inception_v3": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", WIDENED)
def test_layers_of_every_family_are_widened(name: str) -> None:
    graph = network(name)
    matches = 0
    for layer in layers_of(graph)[:8]:
        step = Widen(layer=layer.path, to=int(str(layer.inputs[1].shape[0])) + 2)
        matches += len(step.run(graph).report.matches)
    assert matches == WIDENED[name]


@pytest.mark.parametrize("spec", ["cross:depth=14", "half:depth=14", "resnet_a:blocks=1", "cnn"])
def test_networks_compute_the_same(spec: str) -> None:
    graph = network(spec)
    layers = [n.path for n in layers_of(graph)]
    for layer in layers[1 : len(layers) : max(1, len(layers) // 3)]:
        checked(Widen(layer=layer, to=70), graph)


# -- deepening -------------------------------------------------------------------------------------


def test_identity_kernels_have_a_text() -> None:
    state = State("w", (2, 2, 3, 3), init=IdentityKernel())
    graph = Graph("g")
    graph.output("y", graph.read(state))
    assert "init=identity_kernel()" in format_graph(graph)
    assert parse_graph(format_graph(graph)).states[0].init == IdentityKernel()


def test_a_layer_behind_relu_is_followed_by_relu() -> None:
    graph = Graph("tiny")
    h = relu(dense(graph.input("x", ("N", 2)), 2, name="fc1"), name="relu1")
    graph.output("y", h)
    step = Deepen(after="relu1")
    deep = checked(step, graph)
    assert format_graph(deep.graph) == DEEP
    again = step.run(deep.graph).report
    assert not again.matches
    reason = "the identity layer relu1_identity stands behind it already"
    assert again.refusals == [("relu1", reason)]


DEEP = """\
graph tiny {
  state fc1.weight : f32[2, 2] param init=lecun_normal(fan_in=2, scale=1.0)
  state fc1.bias : f32[2] param init=zeros()
  state relu1_identity.weight : f32[2, 2] param init=identity_kernel()
  state relu1_identity.bias : f32[2] param init=zeros()
  input x : f32[N, 2]
  %0 = dense(x, fc1.weight, fc1.bias) : f32[N, 2]  # fc1
  %1 = relu(%0) : f32[N, 2]  # relu1
  %2 = dense(%1, relu1_identity.weight, relu1_identity.bias) : f32[N, 2]  # relu1_identity
  %3 = relu(%2) : f32[N, 2]  # relu1_again
  output y = %3
}
"""


@pytest.mark.parametrize("after", ["conv1", "conv2", "fc1", "fc", "exit1/fc"])
def test_layers_without_activation_are_followed_by_a_linear_one(after: str) -> None:
    deep = checked(Deepen(after=after), network("b_lenet:size=12"))
    assert deep.report.matches == [after]
    new = deep.graph.find(f"{after}_identity")
    assert not any(isinstance(u.op, Relu) and "again" in u.name for u in new.output.users)


def test_clipping_is_idempotent_too_and_the_initial_network_is_the_old_one() -> None:
    x = image_input(Graph("clip"))
    graph = headed(x.graph.emit(Clip(low=-1.0, high=0.5), conv(x, 4, 3), name="clip"))
    deep = checked(Deepen(after="clip", kernel=1), graph).graph
    old, new = (Store.initialised(g.states, 7) for g in (graph, deep))
    a, b = (compile(g, store=s)(x=images())["logits"] for g, s in ((graph, old), (deep, new)))
    np.testing.assert_array_equal(a, b)


def test_batch_norm_is_the_identity_in_inference_only() -> None:
    graph = network("cnn")
    after = next(n.path for n in graph.nodes if isinstance(n.op, Relu) and n.name)
    result = checked(Deepen(after=after, norm=True), graph)
    assert result.report.matches
    assert "the identity in inference; in training" in str(result.report)


@pytest.mark.parametrize(
    ("behind", "reason"),
    [
        (lambda x: sigmoid(x, name="h"), "sigmoid is not idempotent"),
        (lambda x: elu(x, name="h"), "elu is not idempotent"),
        (lambda x: lrn(x, name="h"), "lrn is not idempotent"),
        (lambda x: x.graph.emit(Reshape(shape=(x.shape[0] * 108,)), x, name="h"), "needs"),
    ],
)
def test_what_cannot_be_deepened_is_refused(behind, reason: str) -> None:  # type: ignore[no-untyped-def]
    graph = Graph("no")
    graph.output("y", behind(image_input(graph)))
    report = Deepen(after="h").run(graph).report
    assert not report.matches
    assert reason in report.refusals[0][1]


def test_even_kernels_have_no_middle() -> None:
    with pytest.raises(GraphError, match="an odd kernel, got 2"):
        Pass.from_spec("deepen:after=relu1,kernel=2")


@given(random_graphs(), st.data())
@settings(max_examples=40, deadline=None)
def test_random_networks_are_deepened_anywhere_or_say_why_not(
    graph: Graph, data: st.DataObject
) -> None:
    paths = Counter(n.path for n in graph.nodes)
    named = [n.path for n in graph.nodes if n.name and paths[n.path] == 1]
    assume(named)
    step = Deepen(after=data.draw(st.sampled_from(named)), norm=data.draw(st.booleans()))
    Pipeline((step,), verify=True).apply(graph)
    report = step.run(graph).report
    assert len(report.matches) + len(report.refusals) == 1


@pytest.mark.parametrize("name", ["lenet", "cross", "resnet_a", "repvgg", "inception_v3"])
def test_every_relu_and_layer_of_a_network_can_be_deepened(name: str) -> None:
    graph = network(name)
    paths = Counter(n.path for n in graph.nodes)
    found = [n for n in graph.nodes if n.name and paths[n.path] == 1]
    found = [n for n in found if n.op.opcode in ("conv", "dense", "relu", "batch_norm", "sum")]
    for node in found[:10]:
        assert Deepen(after=node.path).run(graph).report.matches == [node.path]
