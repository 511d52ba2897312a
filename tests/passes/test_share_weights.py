"""One network as branches that share a part of every layer (vbranch, sections 2, 2.9, 2.11)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.compiler import compile
from branchgraph.ir.builder import (
    average_pool,
    batch_norm,
    concat,
    conv,
    dense,
    dropout,
    exit,
    flatten,
    gate,
    global_average_pool,
    lrn,
    max_pool,
    merge_sum,
    relu,
    reshape,
    softmax,
)
from branchgraph.ir.cost import parameter_count
from branchgraph.ir.errors import FormatError, GraphError, RefusalError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value, branch
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import make
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.optimisers import Adam, MomentumSGD
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.passes.base import Pass
from branchgraph.passes.materialise import carry_slots, evaluate_origin, materialise
from branchgraph.passes.share_weights import ShareWeights
from branchgraph.passes.share_weights.mask_branches import owners
from branchgraph.passes.specialise import specialise
from branchgraph.training.loop import Training
from branchgraph.training.loss import joint_loss
from tests.builders import (
    CLOSE,
    EXACT,
    branches_of_every_kind,
    images,
    one_norm_applied_twice,
    random_graphs,
    randomised,
)
from tests.nets.test_vbranch import COUNTS, split_count
from tests.nets.vbranch_nets import SMALL, batch, outputs, scattered, small

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def shared(graph: Graph, store: Store, step: ShareWeights) -> Graph:
    """The branched graph; `store` gets the values of its states, cut from those of the plain."""
    result = step.run(graph)
    assert result.report.origin is not None
    evaluate_origin(result.report.origin, store)
    return result.graph


def mixed_net() -> Graph:
    """Concats of plain and halved values, a residual sum, LRN, flattening, a pooled scale."""
    graph = Graph("mixed")
    x = graph.input("x", ("N", 3, 6, 6))
    a = lrn(relu(batch_norm(conv(x, 4, 3, pad=1, name="a"), name="bn_a")))
    b = conv(concat(x, a), 4, 1, name="b")
    h = merge_sum(a, b, name="sum") * 0.5 + 0.25
    h = concat(h, conv(h, 3, 3, pad=1, groups=1, name="c"), a, name="joined")
    h = batch_norm(average_pool(h, 2), name="bn")
    squeezed = reshape(dense(global_average_pool(h), 11, name="squeeze"), ("N", 11, 1, 1))
    h = max_pool(conv(h, 11, 1, name="d") * softmax(squeezed), 2, stride=1)
    h = flatten(concat(h, h))
    h = dense(reshape(h, ("N", 22, 2, 2)), 6, name="e")
    graph.output("y", dense(relu(h), 4, name="f"))
    return graph


# -- published parameter counts and declared networks ----------------------------------------------


def share_all(name: str, fraction: float, branches: int = 2) -> ShareWeights:
    """The published setting: heads of residual networks and DenseNet-121 share nothing."""
    if name in ("vbranch_resnet", "densenet"):
        return ShareWeights.of(branches, {"fc": 0.0}, rest=fraction)
    return ShareWeights.of(branches, fraction)


@pytest.mark.parametrize(
    ("build", "options", "plain", "split"), COUNTS, ids=lambda v: getattr(v, "__name__", "")
)
def test_parameters_are_those_of_the_reference(build, options, plain, split) -> None:  # type: ignore[no-untyped-def]
    graph = build(**options)
    for fraction, (common, own) in zip((0.25, 0.5, 0.75, 1.0), split):
        step = dataclasses.replace(share_all(build.__name__, fraction), legacy_bias=True)
        assert split_count(step.apply(graph)) == (common, own, own)


def test_parameters_with_sharing_per_layer_and_of_more_branches() -> None:
    fcn, densenet = COUNTS[2][0], COUNTS[9][0]
    totals = [
        parameter_count(ShareWeights(2, (s, 1.0, 1.0), legacy_bias=True).apply(fcn("v3")))
        for s in SHARES
    ]
    assert totals == [1_074_698, 973_962, 873_226, 772_490, 671_754]
    three = ShareWeights(3, (0.25,), legacy_bias=True).apply(fcn())
    assert split_count(three, 3) == (100_994, 307_090, 307_090, 307_090)
    plain = densenet()
    first = {
        n.path: 0.0
        for n in plain.nodes
        if n.op.opcode in ("conv", "dense") and n.path.startswith(("conv1/", "conv2_", "pool2"))
    }
    step = dataclasses.replace(ShareWeights.of(2, {**first, "fc": 0.0}, rest=1.0), legacy_bias=True)
    assert parameter_count(step.apply(plain)) == 7_597_440


@pytest.mark.parametrize(
    ("name", "fraction"),
    [*((n, f) for n in SMALL for f in (0.0, 0.5, 1.0) if n != "densenet"), ("densenet", 0.5)],
)
def test_a_plain_network_becomes_the_declared_branched_one(name: str, fraction: float) -> None:
    step = share_all(name, fraction)
    made = step.apply(small(name))
    declared = small(name, branches=2, shared=(fraction,))
    assert structural_hash(made) == structural_hash(declared)
    assert {(s.name, s.shape, s.role) for s in made.states} == {
        (s.name, s.shape, s.role) for s in declared.states
    }
    store = scattered(declared)
    values = {s.name: store[s] for s in declared.states}
    moved = Store({s: values[s.name] for s in made.states})
    expected = outputs(declared, store, x=batch(name))
    for key, value in outputs(made, moved, x=batch(name)).items():
        np.testing.assert_array_equal(value, expected[key])


@pytest.mark.parametrize("merge", ["none", "sum", "mean", "concat"])
@pytest.mark.parametrize("inputs", ["one", "each"])
@pytest.mark.parametrize("legacy", [False, True])
def test_options_are_those_of_the_declared_networks(merge: str, inputs: str, legacy: bool) -> None:
    made = ShareWeights(2, (0.5,), legacy_bias=legacy, merge=merge, inputs=inputs)
    declared = small(
        "fcn", branches=2, shared=(0.5,), legacy_layout=legacy, merge=merge, inputs=inputs
    )
    graph = made.apply(small("fcn"))
    assert structural_hash(graph) == structural_hash(declared)
    assert (list(graph.inputs), list(graph.outputs)) == (
        list(declared.inputs), list(declared.outputs))  # fmt: skip


# -- starting from trained weights -----------------------------------------------------------------


STARTS = [(0.0, False), (0.3, False), (0.5, True), (1.0, False)]


@pytest.mark.parametrize(
    ("name", "fraction", "legacy"),
    [
        *((n, *s) for n in (*SMALL, "mixed") for s in STARTS if n != "densenet"),
        ("densenet", 0.3, False),
    ],
)
def test_all_branches_start_as_the_plain_network(name: str, fraction: float, legacy: bool) -> None:
    plain = mixed_net() if name == "mixed" else small(name)
    x = images(3) if name == "mixed" else batch(name)
    store = scattered(plain)
    graph = shared(plain, store, ShareWeights(2, (fraction,), legacy_bias=legacy))
    for training in (False, True):
        (expected,) = outputs(plain, store, training, x=x).values()
        got = outputs(graph, store, training, x=x)
        assert list(got) == ["branch1", "branch2"]
        for value in got.values():
            np.testing.assert_allclose(value, expected, **EXACT)


def test_an_output_behind_a_concatenation_has_its_channels_in_order() -> None:
    plain = Graph("features")
    x = plain.input("x", ("N", 3, 6, 6))
    a, b = conv(x, 4, 1, name="a"), conv(x, 4, 1, name="b")
    plain.output("y", concat(a, b))
    store = scattered(plain)
    graph = shared(plain, store, ShareWeights(2, (0.5,)))
    expected = outputs(plain, store, x=images(2))["y"]
    for value in outputs(graph, store, x=images(2)).values():
        np.testing.assert_allclose(value, expected, **EXACT)


def test_layers_that_are_whole_and_shared_keep_their_states() -> None:
    plain = small("fcn")
    graph = ShareWeights(2, (1.0,)).apply(plain)
    kept = {s for s in plain.states if s.role is Role.PARAMETER}
    assert kept == {s for s in graph.states if s.role is Role.PARAMETER}


def test_optimiser_slots_follow_the_slices() -> None:
    plain = small("fcn", outputs=4)
    optimiser, store = Adam(learning_rate=0.01), scattered(plain)
    step = optimiser.attach(differentiate(joint_loss(specialise(plain, training=True))))
    store.initialise(step.states)
    run = interpret(step, {"x": batch("fcn"), "labels": np.array([0, 3, 1])}, store)
    for state, value in run.updates.items():
        store[state] = value
    result = ShareWeights(2, (0.5,)).run(plain)
    assert result.report.origin is not None
    evaluate_origin(result.report.origin, store)
    carried = carry_slots(result.report.origin, optimiser.slots, store)
    assert not carried.reset
    names = {s.name: s for s in (*plain.states, *result.graph.states)}
    old, new = names["fc2.weight"], names["branch2/fc2.weight_su"]
    assert new.shape == (3, 3)
    for slot in ("m", "v"):
        moved = store[carried.slots[new, slot]]
        assert moved.any()
        np.testing.assert_array_equal(moved, store[optimiser.slots[old, slot]][2:, :3])


def test_the_second_bias_of_a_half_starts_at_zero_and_so_do_its_slots() -> None:
    plain = small("fcn")
    store = scattered(plain)
    result = ShareWeights(2, (0.5,), legacy_bias=True).run(plain)
    assert result.report.origin is not None
    evaluate_origin(result.report.origin, store)
    second = [s for s in result.graph.states if s.name.endswith(("bias_us", "bias_uu"))]
    assert len(second) == 8
    assert not any(store[s].any() for s in second)
    slots = {(s, "m"): State(f"{s.name}.m", s.shape, role=Role.SLOT) for s in plain.states}
    store.initialise(slots.values())
    assert set(carry_slots(result.report.origin, slots, store).reset) == set(second)


@pytest.mark.parametrize("fraction", SHARES)
def test_assembled_weights_materialise_into_whole_ones(fraction: float) -> None:
    graph = ShareWeights(2, (fraction,)).apply(small("cnn"))
    store = scattered(graph)
    whole, origin = materialise(specialise(graph, training=False))
    evaluate_origin(origin, store)
    assert not [n for n in whole.nodes if isinstance(n.op, Slice) or n.op.opcode == "concat"]
    expected = outputs(graph, store, x=batch("cnn"))
    got = interpret(whole, {"x": batch("cnn")}, store, DType.F64).outputs
    for key, value in got.items():
        # The blocks are float32 and only moved.
        np.testing.assert_allclose(value, expected[key], **EXACT)


# -- what is shared --------------------------------------------------------------------------------


def two_layers() -> Graph:
    graph = Graph("two")
    h = relu(dense(graph.input("x", ("N", 3)), 4, name="first"))
    graph.output("logits", dense(h, 2, bias=False, name="second"))
    return graph


def test_the_text_of_two_layers() -> None:
    text = format_graph(ShareWeights(2, (0.5,)).apply(two_layers()))
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    assert [line for line in lines if line] == EXPECTED.strip().splitlines()


EXPECTED = """
graph two {
state first.weight_ss : f32[2, 3] param init=lecun_normal(fan_in=3, scale=1.0)
state branch1/first.weight_su : f32[2, 3] param init=lecun_normal(fan_in=3, scale=1.0)
state first.bias_s : f32[2] param init=zeros()
state branch1/first.bias_u : f32[2] param init=zeros()
state second.weight_ss : f32[1, 2] param init=lecun_normal(fan_in=4, scale=1.0)
state branch1/second.weight_us : f32[1, 2] param init=lecun_normal(fan_in=4, scale=1.0)
state branch1/second.weight_su : f32[1, 2] param init=lecun_normal(fan_in=4, scale=1.0)
state branch1/second.weight_uu : f32[1, 2] param init=lecun_normal(fan_in=4, scale=1.0)
state branch2/first.weight_su : f32[2, 3] param init=lecun_normal(fan_in=3, scale=1.0)
state branch2/first.bias_u : f32[2] param init=zeros()
state branch2/second.weight_us : f32[1, 2] param init=lecun_normal(fan_in=4, scale=1.0)
state branch2/second.weight_su : f32[1, 2] param init=lecun_normal(fan_in=4, scale=1.0)
state branch2/second.weight_uu : f32[1, 2] param init=lecun_normal(fan_in=4, scale=1.0)
input x : f32[N, 3]
%0 = full() {value=0.5, shape=[], dtype=f32} : f32[]
%1 = scale_gradient(first.weight_ss, %0) : f32[2, 3]
branch branch1 {
%2 = concat(%1, branch1/first.weight_su) {axis=0} : f32[4, 3]
}
%3 = scale_gradient(first.bias_s, %0) : f32[2]
branch branch1 {
%4 = concat(%3, branch1/first.bias_u) {axis=0} : f32[4]
%5 = dense(x, %2, %4) : f32[N, 4]
%6 = relu(%5) : f32[N, 4]
}
%7 = scale_gradient(second.weight_ss, %0) : f32[1, 2]
branch branch1 {
%8 = concat(%7, branch1/second.weight_us) {axis=1} : f32[1, 4]
%9 = concat(branch1/second.weight_su, branch1/second.weight_uu) {axis=1} : f32[1, 4]
%10 = concat(%8, %9) {axis=0} : f32[2, 4]
%11 = dense(%6, %10) : f32[N, 2]
}
branch branch2 {
%12 = concat(%1, branch2/first.weight_su) {axis=0} : f32[4, 3]
%13 = concat(%3, branch2/first.bias_u) {axis=0} : f32[4]
%14 = dense(x, %12, %13) : f32[N, 4]
%15 = relu(%14) : f32[N, 4]
%16 = concat(%7, branch2/second.weight_us) {axis=1} : f32[1, 4]
%17 = concat(branch2/second.weight_su, branch2/second.weight_uu) {axis=1} : f32[1, 4]
%18 = concat(%16, %17) {axis=0} : f32[2, 4]
%19 = dense(%15, %18) : f32[N, 2]
}
output branch1 = %11
output branch2 = %19
}
"""


@pytest.mark.parametrize(
    ("step", "blocks"),
    [
        (ShareWeights(2, (0.5,)), ["2x3", "2x3u", "1x2", "1x2u", "1x2u", "1x2u"]),
        (ShareWeights(2, (3.0, 0.0)), ["3x3", "1x3u", "2x4u"]),
        (ShareWeights(2, (0.5, 1.0)), ["2x3", "2x3u", "2x4"]),
        (ShareWeights(2, (1.0,), layers=("second",)), ["4x3u", "2x4"]),
        (ShareWeights.of(2, {"first": 1.0}, rest=0.5), ["4x3", "1x4", "1x4u"]),
        (ShareWeights.of(2, [1, 0]), ["4x3", "2x4u"]),
        (ShareWeights.of(2, 2), ["2x3", "2x3u", "2x4"]),
    ],
)
def test_shares_are_fractions_or_channels_for_all_layers_or_some(step, blocks) -> None:  # type: ignore[no-untyped-def]
    states = [
        s
        for s in step.apply(two_layers()).states
        if len(s.shape) == 2 and not s.name.startswith("branch2")
    ]
    found = ["x".join(map(str, s.shape)) + "u" * s.name.startswith("branch1") for s in states]
    assert sorted(found) == sorted(blocks)


def test_scopes_name_all_layers_in_them() -> None:
    graph = small("densenet")
    step = ShareWeights(2, (0.5,), layers=("conv1",))
    assert [s.name for s in step.apply(graph).states if s.name.endswith("_ss")] == [
        "conv1/conv.weight_ss"
    ]


def test_the_report_counts_layers_and_what_is_trained_and_warns() -> None:
    report = ShareWeights(2, (0.0, 0.5, 0.5)).run(small("fcn")).report
    assert report.matches == ["fc1", "fc2", "fc"]
    assert report.notes[0] == "trained: 10 shared and 127 of each of 2 branches"
    assert report.notes[1].startswith("fc2 shares channels, but none that it reads is shared")


def test_every_branch_draws_its_own_dropout() -> None:
    plain = Graph("dropped")
    plain.output("y", dropout(dropout(dense(plain.input("x", ("N", 9)), 9, name="fc"))))
    graph = ShareWeights(3, (1.0,)).apply(plain)
    streams = [n.op.stream for n in graph.nodes if n.op.opcode == "dropout"]  # type: ignore[attr-defined]
    assert streams == [0, 1, 2, 3, 4, 5]
    training = specialise(graph, training=True)
    run = interpret(training, {"x": np.ones((5, 9))}, Store.initialised(training.states)).outputs
    assert (run["branch1"] != run["branch2"]).any()


def test_branches_of_the_plain_network_stay_inside_the_new_ones() -> None:
    plain = Graph("inner")
    x = plain.input("x", ("N", 4))
    with branch("left"):
        a = dense(x, 4, name="fc")
    with branch("right"):
        b = dense(x, 4, name="fc")
    plain.output("y", merge_sum(a, b))
    graph = ShareWeights(2).apply(plain)
    assert list(graph.branches()) == [
        "branch1", "branch1/left", "branch1/right", "branch2", "branch2/left", "branch2/right",
    ]  # fmt: skip
    assert "left/fc.weight_s" not in {s.name for s in graph.states}
    assert {"left/fc.weight_ss", "branch2/right/fc.weight_su"} <= {s.name for s in graph.states}


def test_branches_of_the_plain_network_may_have_the_names_of_the_new_ones() -> None:
    plain = Graph("named")
    x = plain.input("x", ("N", 4))
    values = []
    for k in (1, 2):
        with branch(f"branch{k}"):
            values.append(dense(x, 4, name="fc"))
    plain.output("y", dense(concat(*values), 3, name="head"))
    store = scattered(plain)
    graph = shared(plain, store, ShareWeights(2))
    assert "branch2/branch1/fc.weight_su" in {s.name for s in graph.states}
    x_values = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    expected = outputs(plain, store, x=x_values)["y"]
    np.testing.assert_allclose(outputs(graph, store, x=x_values)["branch2"], expected, **EXACT)


def test_a_layer_applied_twice_is_cut_once() -> None:
    plain = one_norm_applied_twice()
    store = scattered(plain)
    graph = shared(plain, store, ShareWeights(2))
    own = [s.name for s in graph.states if s.role is Role.PARAMETER]
    assert sorted(own) == [f"branch{i}/bn.{k}" for i in (1, 2) for k in ("beta", "gamma")]
    expected = outputs(plain, store, x=images())["y"]
    np.testing.assert_allclose(outputs(graph, store, x=images())["branch2"], expected, **EXACT)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_channels_may_be_added_to_what_is_shared_whole_or_not_at_all(share: float) -> None:
    plain = Graph("padded")
    h = conv(plain.input("x", ("N", 3, 6, 6)), 4, 1, name="a")
    wider = h.graph.emit(make("pad", begin=(0, 1, 0, 0), end=(0, 1, 0, 0)), h)
    plain.output("y", merge_sum(wider, conv(h, 6, 1, name="b")))
    store = scattered(plain)
    graph = shared(plain, store, ShareWeights(2, (share,)))
    expected = outputs(plain, store, x=images(2))["y"]
    np.testing.assert_allclose(outputs(graph, store, x=images(2))["branch2"], expected, **EXACT)


@settings(max_examples=40)
@given(random_graphs(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_random_networks_start_as_they_were_or_are_refused(plain: Graph, share: float) -> None:
    store = randomised(plain)
    try:
        graph = shared(plain, store, ShareWeights(2, (share,)))
    except RefusalError:
        kinds = {n.op.opcode for n in plain.nodes}
        assert "select" in kinds or any(getattr(n.op, "groups", 1) > 1 for n in plain.nodes)
        return
    (expected,) = outputs(plain, store, x=images(2)).values()
    for value in outputs(graph, store, x=images(2)).values():
        np.testing.assert_allclose(value, expected, **EXACT)


@pytest.mark.parametrize(
    "step",
    [
        ShareWeights(2, (0.5,)),
        ShareWeights(2, layout="masks", overlap=0.5),
        ShareWeights(2, (0.5,), after="avg_pool", merge="mean"),
    ],
    ids=lambda s: s.name,
)
def test_branched_networks_compile_and_train(step: ShareWeights) -> None:
    graph = step.apply(small("cnn", outputs=4))
    training = Training.of(graph, Adam(learning_rate=0.01))
    fed = {"x": batch("cnn"), "labels": np.array([0, 3, 1])}
    losses = [float(training.step(**fed)["loss"]) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]
    run = compile(graph, store=training.store)
    expected = outputs(graph, training.store, x=fed["x"])
    for name, value in run(x=fed["x"]).items():
        np.testing.assert_allclose(value, expected[name], **CLOSE)


def test_a_grouped_convolution_is_shared_whole_or_not_at_all() -> None:
    plain = Graph("grouped")
    h = conv(plain.input("x", ("N", 3, 6, 6)), 4, 1, name="a")
    plain.output("y", conv(h, 4, 3, groups=2, name="b"))
    store = scattered(plain)
    expected = outputs(plain, store, x=images(2))["y"]
    for share in (0.0, 1.0):
        graph = shared(plain, store, ShareWeights(2, (0.5, share)))
        for value in outputs(graph, store, x=images(2)).values():
            np.testing.assert_allclose(value, expected, **EXACT)
    with pytest.raises(RefusalError, match="b: its 2 groups would be cut"):
        ShareWeights(2, (0.5,)).apply(plain)


def test_a_common_trunk_is_computed_once_and_gets_the_mean_gradient() -> None:
    plain = small("cnn", outputs=4)
    store = scattered(plain)
    step = ShareWeights(3, (0.5,), after="avg_pool")
    graph = shared(plain, store, step)
    convolutions = [n for n in graph.nodes if n.op.opcode == "conv"]
    assert len(convolutions) == len([n for n in plain.nodes if n.op.opcode == "conv"])
    assert not any(n.scope and n.scope[0].branch for n in convolutions)
    fed = {"x": batch("cnn"), "labels": np.array([0, 3, 1])}
    got = interpret(training_graph(graph), fed, store, DType.F64).gradients
    alone = interpret(training_graph(plain), fed, store, DType.F64).gradients
    state = next(s for s in plain.states if s.name == "conv_1_1.weight")
    np.testing.assert_allclose(got[state], alone[state], **EXACT)


# -- merges ----------------------------------------------------------------------------------------


def test_outputs_merge_before_or_after_the_softmax() -> None:
    plain = small("fcn")
    apart = ShareWeights(3, (0.5,)).apply(plain)
    store = scattered(apart)
    z = np.stack(list(outputs(apart, store, x=batch("fcn")).values()))
    e = np.exp(z)
    expected = {
        "mean": z.mean(axis=0),
        "sum": z.sum(axis=0),
        "concat": np.hstack(z),
        "after_mean": (e / e.sum(axis=2, keepdims=True)).mean(axis=0),
    }
    for merge, value in expected.items():
        graph = ShareWeights(3, (0.5,), merge=merge).apply(plain)
        moved = by_name(graph, {s.name: store[s] for s in apart.states})
        ((name, got),) = outputs(graph, moved, x=batch("fcn")).items()
        assert name == ("probabilities" if merge == "after_mean" else "logits")
        np.testing.assert_allclose(got, value, **EXACT)


def by_name(graph: Graph, values: dict[str, np.ndarray]) -> Store:
    return Store({s: values[s.name] for s in graph.states})


def test_several_outputs_are_named_by_branch() -> None:
    plain = two_layers()
    plain.output("features", plain.find("first").output)
    graph = ShareWeights(2).apply(plain)
    assert list(graph.outputs) == [
        "branch1.logits", "branch2.logits", "branch1.features", "branch2.features",
    ]  # fmt: skip
    assert list(ShareWeights(2, merge="mean").apply(plain).outputs) == ["logits", "features"]


# -- gradients (sections 2.8 and 2.10) -------------------------------------------------------------

BRANCHES = 3
LABELS = np.array([0, 3, 1])


def training_graph(graph: Graph) -> Graph:
    return differentiate(joint_loss(specialise(graph, training=True)))


def batches(name: str) -> dict[str, np.ndarray]:
    return {f"x{i}": batch(name, seed=i) for i in range(1, BRANCHES + 1)}


class Moved(Store):
    """A store read at `base + t * steps`, in float64."""

    def __init__(self, base: Store, steps: dict[State, np.ndarray], t: float) -> None:
        super().__init__()
        self.base, self.steps, self.t = base, steps, t

    def __getitem__(self, state: State) -> np.ndarray:
        value = self.base[state].astype(np.float64)
        return value + self.t * self.steps[state] if state in self.steps else value


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("name", ["fcn", "cnn"])
def test_shared_states_get_the_mean_and_unique_ones_their_own_gradient(
    name: str, mean: bool
) -> None:
    step = ShareWeights(BRANCHES, (0.5,), inputs="each", gradient="mean" if mean else "sum")
    training = training_graph(step.apply(small(name, outputs=4)))
    store, fed = scattered(training), {**batches(name), "labels": LABELS}
    run = interpret(training, fed, store, DType.F64)
    rng = np.random.default_rng(0)
    for common in (True, False):
        chosen = [s for s in run.gradients if s.name.startswith("branch") is not common]
        steps = {s: rng.normal(size=s.shape) / np.sqrt(np.prod(s.shape)) for s in chosen}
        analytic = sum(float((run.gradients[s] * d).sum()) for s, d in steps.items())

        def loss_at(t: float, steps: dict[State, np.ndarray] = steps) -> float:
            moved = Moved(store, steps, t)
            return float(interpret(training, fed, moved, DType.F64).outputs["loss"])

        numeric = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
        # The loss is the sum over branches: its slope is B times the mean.
        expected = numeric / (BRANCHES if common and mean else 1)
        assert analytic == pytest.approx(expected, rel=1e-5)


def named(values: dict[State, np.ndarray]) -> dict[str, np.ndarray]:
    return {s.name: v for s, v in values.items()}


def test_branches_that_share_nothing_train_as_separate_networks() -> None:
    plain, optimiser = small("cnn", outputs=4), MomentumSGD(learning_rate=0.1)
    store = scattered(plain)
    graph = shared(plain, store, ShareWeights(BRANCHES, (0.0,), inputs="each"))
    whole, alone = (optimiser.attach(training_graph(g)) for g in (graph, plain))
    store.initialise([*whole.states, *alone.states])
    fed = {**batches("cnn"), "labels": LABELS}
    updates = named(interpret(whole, fed, store, DType.F64).updates)
    for i, x in enumerate(batches("cnn").values(), start=1):
        run = interpret(alone, {"x": x, "labels": LABELS}, store, DType.F64)
        for name, value in named(run.updates).items():
            own = name if name == "step" else f"branch{i}/{name}"
            np.testing.assert_array_equal(updates[own], value)


def test_branches_that_share_all_are_one_network_with_the_mean_gradient() -> None:
    plain = small("cnn", outputs=4)
    store = scattered(plain)
    graph = shared(plain, store, ShareWeights(BRANCHES, (1.0,), inputs="each"))
    run = interpret(training_graph(graph), {**batches("cnn"), "labels": LABELS}, store, DType.F64)
    alone = training_graph(plain)
    each = [
        interpret(alone, {"x": x, "labels": LABELS}, store, DType.F64).gradients
        for x in batches("cnn").values()
    ]
    assert set(run.gradients) == set(each[0])
    for state, gradient in run.gradients.items():
        mean = sum(e[state] for e in each) / BRANCHES
        np.testing.assert_allclose(gradient, mean, **EXACT)


# -- masks (section 2.11) --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "branches", "overlap", "expected"),
    [
        (6, 2, 0.0, [0, 0, 0, 1, 1, 1]),
        (7, 3, 0.0, [0, 0, 1, 1, 2, 2, 2]),
        (8, 3, 0.0, [0, 0, 0, 1, 1, 1, 2, 2]),
        (9, 2, 0.5, [-1, -1, -1, 0, 0, 0, 1, 1, 1]),
        (8, 2, 0.5, [-1, -1, -1, 0, 0, 0, 1, 1]),
        (10, 2, 0.25, [-1, 0, 0, 0, 0, 1, 1, 1, 1, 1]),
        (9, 2, 0.0, [0, 0, 0, 0, 0, 1, 1, 1, 1]),
        (4, 2, 1.0, [-1] * 4),
    ],
)
def test_who_keeps_a_channel(channels, branches, overlap, expected) -> None:  # type: ignore[no-untyped-def]
    assert list(owners(channels, branches, overlap)) == expected


def test_masked_branches_have_common_layers_and_heads_of_their_own() -> None:
    plain = small("cnn", outputs=4)
    step = ShareWeights(2, layout="masks", overlap=0.5, after="pool_2")
    graph = step.apply(plain)
    common = {s for s in plain.states if s.role is Role.PARAMETER and not s.name.startswith("fc.")}
    assert common <= set(graph.states)
    own = {s.name for s in set(graph.states) - set(plain.states) if s.role is Role.PARAMETER}
    assert own == {f"branch{i}/fc.{k}" for i in (1, 2) for k in ("weight", "bias")}
    assert structural_hash(parse_graph(format_graph(graph))) == structural_hash(graph)


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_a_masked_branch_is_the_network_of_the_channels_it_keeps(overlap: float) -> None:
    plain = Graph("mlp")
    h = plain.input("x", ("N", 5))
    for name in ("a", "b"):
        h = (relu(batch_norm(dense(h, 9, name=name), name=f"bn_{name}"))) + 1.0
    plain.output("logits", dense(h, 4, name="fc"))
    store = scattered(plain)
    graph = shared(plain, store, ShareWeights(3, layout="masks", overlap=overlap))
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    got = outputs(graph, store, x=x)
    w = {s.name: store[s].astype(np.float64) for s in plain.states}
    for b in range(3):
        kept = [o in (-1, b) for o in owners(9, 3, overlap)]
        h, read = x.astype(np.float64), [True] * 5
        for name in ("a", "b"):
            z = h @ w[f"{name}.weight"][kept][:, read].T + w[f"{name}.bias"][kept]
            at = {k: w[f"bn_{name}.{k}"][kept] for k in ("gamma", "beta")}
            mean, var = (w[f"bn_{name}.running_{k}"][kept] for k in ("mean", "var"))
            z = (z - mean) / np.sqrt(var + 2e-5) * at["gamma"] + at["beta"]
            h, read = np.maximum(z, 0) + 1.0, kept
        expected = h @ w["fc.weight"][:, kept].T + w["fc.bias"]
        np.testing.assert_allclose(got[f"branch{b + 1}"], expected, **EXACT)


def test_masks_follow_concatenations_and_flattening() -> None:
    plain = Graph("cat")
    x = conv(plain.input("x", ("N", 3, 6, 6)), 4, 3, pad=1, name="stem")
    y = conv(x, 6, 3, pad=1, name="a")
    h = dense(max_pool(concat(x, y), 2), 4, name="b")
    plain.output("y", dense(h, 2, name="fc"))
    graph = ShareWeights(2, layout="masks", after="stem").apply(plain)
    store = scattered(graph)
    states = {s.name: s for s in graph.states}
    before = outputs(graph, store, x=images(2))
    # Branch 1 keeps channels 0, 1 of the stem and 0, 1, 2 of `a`; channel 2 of the stem, 3 of `a`
    # (2 + 9 pixels each, and flattened) are seen by branch 2 alone.
    store[states["a.weight"]][3] += 1.0
    store[states["b.weight"]][:2, 2 * 9 : 4 * 9] += 1.0
    after = outputs(graph, store, x=images(2))
    np.testing.assert_array_equal(before["branch1"], after["branch1"])
    assert (before["branch2"] != after["branch2"]).any()
    assert all(len(n.inputs) == 2 for n in graph.nodes if isinstance(n.op, Select))


# -- refusals --------------------------------------------------------------------------------------


def net_of(last: Callable[[Value], Value], channels: int = 4) -> Graph:
    """A convolution, then what may be refused."""
    graph = Graph("net")
    graph.output("y", last(conv(graph.input("x", ("N", 3, 6, 6)), channels, 1, name="a")))
    return graph


def with_halves_that_differ(h: Value) -> Value:
    return merge_sum(h, conv(h, 4, 1, name="b"), name="add")


def behind_a_concat(last: Callable[[Value], Value]) -> Callable[[Value], Value]:
    return lambda h: last(concat(h, conv(h, 4, 1, name="b")))


def tied(h: Value) -> Value:
    weight = h.graph.read(State("tied", (4, 4, 1, 1)))
    return conv(conv(h, 4, 1, weight=weight, bias=False, name="b"), 4, 1, weight=weight, name="c")


def of_expression(h: Value) -> Value:
    return conv(h, 4, 1, weight=h.graph.read(State("w", (4, 4, 1, 1))) * 2.0, name="b")


@pytest.mark.parametrize(
    ("last", "shares", "message"),
    [
        (lambda h: h.graph.emit(make("transpose", axes=(0, 2, 1, 3)), h), (0.5,),
         "transpose: halves cannot be followed through transpose"),
        (lambda h: gate(h, h.graph.read(State("g", (4, 1, 1), role=Role.GATE)), name="g"), (0.5,),
         "g: it reads the state g; only layers and norms can share"),
        (lambda h: h.graph.emit(Slice(axis=1, start=0, size=2), h), (0.5,),
         "slice: slice along the channels would mix their halves"),
        (lambda h: h.graph.emit(make("pad", begin=(0, 1, 0, 0), end=(0, 0, 0, 0)), h), (0.5,),
         r"pad: it adds channels to halves of 2\+2; share all or nothing before it"),
        (lambda h: reshape(h, ("N", 12, 12)), (0.5,), "reshape: a reshape to .* cuts across"),
        (lambda h: reshape(h, (make_rows(h), 6, 6)), (0.5,), "does not keep the batch"),
        (lambda h: h.graph.emit(make("reduce_mean", axes=(0,)), h), (0.5,), "reduces the batch"),
        (with_halves_that_differ, (0.5, 0.25),
         r"add: halves differ \(shared\+unique channels: 2\+2, 1\+3\); share as much"),
        (behind_a_concat(lrn), (0.5,), "lrn: it reads neighbouring channels"),
        (behind_a_concat(lambda h: merge_sum(h, conv(h, 8, 1, name="c"), name="d")), (0.5,),
         "d: its operands have their channels in different orders"),
        (tied, (1.0, 0.5, 0.5), "c: it reads tied as b does, but their halves differ"),
        (of_expression, (0.5,), "b: its weight is no state but an expression"),
        (lambda h: exit(dense(h, 5, name="fc"), "exit1", last=True), (0.5,),
         "exit1: an exit decides for the whole network"),
        (lambda h: h, (5.0,), "a: a share of 5 of 4 channels"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_with_a_reason(last, shares, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RefusalError, match=message):
        ShareWeights(2, shares).apply(net_of(last))


def make_rows(h: Value) -> object:
    return h.shape[0] * 4  # type: ignore[operator]


@pytest.mark.parametrize(
    ("last", "overlap", "message"),
    [
        (lambda h: conv(conv(h, 4, 3, groups=2, name="b"), 4, 1), 0.5, "would cut groups"),
        (lambda h: conv(h.graph.emit(make("reduce_mean", axes=(1,), keepdims=True), h), 4, 1), 0.0,
         "mixes channels that different branches keep"),
        (lambda h: conv(conv(h, 3, 1) + h.graph.inputs["x"], 4, 1), 0.0, "different masks"),
    ],
)  # fmt: skip
def test_what_cannot_be_masked_is_refused_with_a_reason(last, overlap, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RefusalError, match=message):
        ShareWeights(2, layout="masks", overlap=overlap).apply(net_of(last, channels=4))


def test_layers_too_narrow_for_masks_are_refused() -> None:
    with pytest.raises(RefusalError, match="2 channels are too few for 5 branches"):
        owners(2, 5, 0.0)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("share_weights:branches=1", GraphError, "branches: expected at least 2, got 1"),
        ("share_weights:shared=1.5", GraphError, "0 to 1 or a number of channels, got 1.5"),
        ("share_weights:shared=-0.5", GraphError, "expected 0 to 1"),
        ("share_weights:shared=0.5+0.5", GraphError, r"each of 3 layers \(fc1, fc2, fc\), got 2"),
        ("share_weights:layers=fc9", GraphError, "no layer 'fc9'; there are: fc1, fc2, fc"),
        ("share_weights:layers=fc,shared=1+1+1", GraphError, "each of 1 layers, and perhaps one"),
        ("share_weights:after=fc9", GraphError, "no node 'fc9'"),
        ("share_weights:after=fc", RefusalError, "no output depends on what would be branched"),
        ("share_weights:layout=halves", GraphError, "layout 'halves' is none of quadrants, masks"),
        ("share_weights:merge=max", GraphError, "merge 'max' is none of none, sum, mean, concat"),
        ("share_weights:inputs=two", GraphError, "inputs 'two' is none of one, each"),
        ("share_weights:overlap=0.5", GraphError, "overlap is for layout=masks"),
        ("share_weights:layout=masks,overlap=2", GraphError, "overlap: expected 0 to 1"),
        ("share_weights:layout=masks,layers=fc", GraphError, "layers are for layout=quadrants"),
        ("share_weights:depth=3", FormatError, "no option 'depth'; it has: branches, shared"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_followed_say_what_can(spec, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        Pass.from_spec(spec).apply(small("fcn"))


@pytest.mark.parametrize(
    "spec",
    [
        "share_weights:branches=4,shared=0.5",
        "share_weights:shared=0.25+0+1.0,layers=fc1+fc,legacy_bias=true",
        "share_weights:layout=masks,overlap=0.25,after=fc1,merge=after_mean",
        "share_weights:inputs=each,gradient=sum",
    ],
)
def test_specs_print_back(spec: str) -> None:
    step = Pass.from_spec(spec)
    assert Pass.from_spec(step.name) == step


@pytest.mark.parametrize(
    "step",
    [
        ShareWeights(2),
        ShareWeights(3, layout="masks"),
        ShareWeights(2, (0.0,), merge="mean"),
        ShareWeights(2, (1.0,), merge="after_mean", inputs="each"),
        ShareWeights(2, after="relu_fc1"),
    ],
    ids=lambda s: s.name,
)
def test_a_second_application_is_refused(step: ShareWeights) -> None:
    once = step.apply(small("fcn"))
    again = step.run(once)
    assert again.report.refusals == [("branch1", "the network is branched already")]
    assert not again.report.matches
    assert structural_hash(again.graph) == structural_hash(once)


def test_networks_with_exits_or_updates_are_refused() -> None:
    with pytest.raises(RefusalError, match="it reads the state block/gate"):
        ShareWeights(2).apply(branches_of_every_kind())
    with pytest.raises(RefusalError, match="share weights before specialising"):
        ShareWeights(2).apply(specialise(small("fcn"), training=True))


def test_the_plain_network_is_left_alone() -> None:
    plain = small("cnn")
    before = format_graph(plain)
    ShareWeights(3, (0.5,), inputs="each").apply(plain)
    assert format_graph(plain) == before
