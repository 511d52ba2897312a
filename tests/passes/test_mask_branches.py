"""Branches that keep channels of common layers: tiling, wide layers, decay (vbranch, 2.11)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod

import numpy as np
import pytest

from branchgraph.ir.builder import batch_norm, concat, conv, dense, flatten, relu
from branchgraph.ir.cost import parameter_count
from branchgraph.ir.errors import GraphError, RefusalError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.interpret import interpret
from branchgraph.ir.losses import batch_hard_triplet
from branchgraph.ir.op import make
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import compare, where
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.optimisers import SGD, Adam
from branchgraph.ir.rebuild import bind, clone
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.nets.vbranch import densenet
from branchgraph.passes.base import Pass
from branchgraph.passes.materialise import carry_slots, evaluate_origin
from branchgraph.passes.share_weights import ShareWeights, branch_losses
from branchgraph.passes.share_weights.mask_branches import owners
from branchgraph.passes.specialise import specialise
from branchgraph.training.loss import joint_loss
from tests.builders import EXACT, images
from tests.nets.vbranch_nets import SMALL, batch, outputs, scattered, small

MASKS = ShareWeights(2, layout="masks")


def shared(graph: Graph, store: Store, step: ShareWeights) -> Graph:
    """The branched graph; `store` gets the values of its states, cut from those of the plain."""
    result = step.run(graph)
    assert result.report.origin is not None
    evaluate_origin(result.report.origin, store)
    return result.graph


def mlp() -> Graph:
    """Two hidden layers of 9 units with batch norm, 4 outputs."""
    graph = Graph("mlp")
    h = graph.input("x", ("N", 5))
    for name in ("a", "b"):
        h = relu(batch_norm(dense(h, 9, name=name), name=f"bn_{name}"), name=f"relu_{name}")
    graph.output("logits", dense(h, 4, name="fc"))
    return graph


def rows(n: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 5)).astype(np.float32)


def lines(graph: Graph) -> list[str]:
    found = [line.split("  #")[0].strip() for line in format_graph(graph).splitlines()]
    return [line for line in found if line]


def values(graph: Graph, store: Store) -> dict[str, np.ndarray]:
    return {s.name: store[s].astype(np.float64) for s in graph.states}


def kept(channels: int, branch: int, step: ShareWeights) -> list[int]:
    found = owners(channels, step.branches, step.overlap)
    return [k for k, o in enumerate(found) if o in (-1, branch)]


# -- text ------------------------------------------------------------------------------------------

BEFORE = """
graph two {
  state first.weight : f32[4, 3] param init=zeros()
  state second.weight : f32[2, 4] param init=zeros()
  input x : f32[N, 3]
  %0 = dense(x, first.weight) : f32[N, 4]  # first
  %1 = dense(%0, second.weight) : f32[N, 2]  # second
  output y = %1
}
"""

TILED = """
graph two {
state first.weight : f32[4, 3] param init=zeros()
state second.weight : f32[4, 4] param init=zeros()
input x : f32[N, 3]
branch branch1 {
%0 = dense(x, first.weight) : f32[N, 4]
%1 = full() {value=1.0, shape=[2], dtype=f32} : f32[2]
%2 = full() {value=0.0, shape=[2], dtype=f32} : f32[2]
%3 = concat(%1, %2) {axis=0} : f32[4]
%4 = select(%0, %3) : f32[N, 4]
%5 = slice(%4) {axis=1, start=0, size=2, step=1} : f32[N, 2]
%6 = slice(%4) {axis=1, start=0, size=2, step=1} : f32[N, 2]
%7 = concat(%5, %6) {axis=1} : f32[N, 4]
%8 = slice(second.weight) {axis=0, start=0, size=2, step=1} : f32[2, 4]
%9 = dense(%7, %8) : f32[N, 2]
}
branch branch2 {
%10 = dense(x, first.weight) : f32[N, 4]
%11 = full() {value=0.0, shape=[2], dtype=f32} : f32[2]
%12 = full() {value=1.0, shape=[2], dtype=f32} : f32[2]
%13 = concat(%11, %12) {axis=0} : f32[4]
%14 = select(%10, %13) : f32[N, 4]
%15 = slice(%14) {axis=1, start=2, size=2, step=1} : f32[N, 2]
%16 = slice(%14) {axis=1, start=2, size=2, step=1} : f32[N, 2]
%17 = concat(%15, %16) {axis=1} : f32[N, 4]
%18 = slice(second.weight) {axis=0, start=2, size=2, step=1} : f32[2, 4]
%19 = dense(%17, %18) : f32[N, 2]
}
output branch1 = %9
output branch2 = %19
}
"""


def test_the_text_of_tiled_layers_and_a_wide_head() -> None:
    graph = replace(MASKS, tile=True, wide="heads").apply(parse_graph(BEFORE))
    assert lines(graph) == TILED.strip().splitlines()


# -- wide layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SMALL if n != "densenet"])
def test_without_overlap_branches_of_wide_layers_start_as_the_plain_network(name: str) -> None:
    plain = small(name)
    store = scattered(plain)
    graph = shared(plain, store, replace(MASKS, branches=3, wide="all"))
    (expected,) = outputs(plain, store, x=batch(name)).values()
    for value in outputs(graph, store, x=batch(name)).values():
        np.testing.assert_allclose(value, expected, **EXACT)


def test_the_last_block_alone_may_be_widened() -> None:
    plain = small("densenet_bc")
    store = scattered(plain)
    step = replace(MASKS, wide="all", after="pool3_pool")
    graph = shared(plain, store, step)
    (expected,) = outputs(plain, store, x=batch("densenet_bc")).values()
    for value in outputs(graph, store, x=batch("densenet_bc")).values():
        np.testing.assert_allclose(value, expected, **EXACT)
    before, after = ({s.name: s for s in g.states} for g in (plain, graph))
    assert after["conv3_block1_1_conv.weight"] is before["conv3_block1_1_conv.weight"]
    name = "conv4_block1_2_conv.weight"
    assert after[name].shape == (10, 40, 3, 3)
    assert before[name].shape == (5, 20, 3, 3)
    np.testing.assert_array_equal(store[after[name]], np.tile(store[before[name]], (2, 2, 1, 1)))


def test_parameters_of_wide_layers_are_those_of_layers_b_times_as_wide() -> None:
    for branches in (2, 3):
        graph = replace(MASKS, branches=branches, wide="all").apply(small("fcn"))
        sizes = (6, 7 * branches, 5 * branches, 4 * branches)
        expected = sum(n * c + n for c, n in pairwise(sizes)) + 2 * sum(sizes[1:3])
        trained = [s for s in graph.states if s.role is Role.PARAMETER]
        assert sum(prod(s.shape) for s in trained) == expected
        assert not [s for s in trained if s.name.startswith("branch")]


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_a_wide_embedding_has_the_units_that_its_branch_keeps(overlap: float) -> None:
    """The published layer has 128 B units; its loss and its test embedding are per branch."""
    plain = Graph("embedding")
    plain.output("embedding", dense(plain.input("x", ("N", 5)), 128, name="fc"))
    store = scattered(plain)
    step = replace(MASKS, branches=3, wide="heads", overlap=overlap)
    graph = shared(plain, store, step)
    weight, bias = (store[s] for s in graph.states)
    assert weight.shape == (384, 5)
    np.testing.assert_array_equal(weight, np.tile(store[plain.states[0]], (3, 1)))
    got = outputs(graph, store, x=rows())
    for b in range(3):
        units = kept(384, b, step)
        expected = rows().astype(np.float64) @ weight[units].T + bias[units]
        np.testing.assert_allclose(got[f"branch{b + 1}"], expected, **EXACT)
    joined = replace(step, merge="concat").apply(plain)
    assert joined.outputs["embedding"].shape[1] == sum(v.shape[1] for v in got.values())
    assert [v.shape[1] for v in got.values()] == ([128] * 3 if overlap == 0 else [192] * 3)


def test_the_network_of_2018_branches_at_its_last_transition() -> None:
    """DenseNet-121, 1024 hidden units, embedding of 128 B: all but the embedding exists once."""
    plain = densenet(hidden=1024, outputs=128)
    graph = replace(MASKS, branches=3, overlap=0.0, wide="heads", after="pool4_pool").apply(plain)
    assert parameter_count(graph) == parameter_count(plain) + 2 * (128 * 1024 + 128)
    kept_states = {s for s in plain.states if s.role is Role.PARAMETER}
    new = {s.name: s.shape for s in set(graph.states) - kept_states if s.role is Role.PARAMETER}
    assert new == {"fc.weight": (384, 1024), "fc.bias": (384,)}
    assert {v.shape[1] for v in graph.outputs.values()} == {128}
    trunk = [n for n in graph.nodes if n.path.startswith(("conv1", "conv2", "conv3", "conv4"))]
    assert not any(n.scope and n.scope[0].branch for n in trunk)
    assert len(graph.branches()) == 3


def test_optimiser_slots_are_tiled_as_their_weights() -> None:
    plain, optimiser = small("fcn", outputs=4), Adam(learning_rate=0.01)
    store = scattered(plain)
    step = optimiser.attach(differentiate(joint_loss(specialise(plain, training=True))))
    store.initialise(step.states)
    run = interpret(step, {"x": batch("fcn"), "labels": np.array([0, 3, 1])}, store)
    for state, value in run.updates.items():
        store[state] = value
    result = replace(MASKS, wide="all").run(plain)
    assert result.report.origin is not None
    carried = carry_slots(result.report.origin, optimiser.slots, store)
    assert not carried.reset
    old = next(s for s in plain.states if s.name == "fc2.weight")
    new = next(s for s in result.graph.states if s.name == "fc2.weight")
    before, after = store[optimiser.slots[old, "m"]], store[carried.slots[new, "m"]]
    assert before.any()
    np.testing.assert_array_equal(after, np.tile(before, (2, 2)))


def test_flattened_channels_are_widened_in_blocks() -> None:
    plain = Graph("flat")
    h = conv(plain.input("x", ("N", 3, 6, 6)), 4, 3, name="a")
    plain.output("y", dense(flatten(h), 5, name="fc"))
    store = scattered(plain)
    graph = shared(plain, store, replace(MASKS, wide="all"))
    expected = outputs(plain, store, x=images(2))["y"]
    for value in outputs(graph, store, x=images(2)).values():
        np.testing.assert_allclose(value, expected, **EXACT)


# -- tiling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.3])
def test_tiled_layers_read_kept_channels_in_place_of_zeros(overlap: float) -> None:
    plain = mlp()
    store = scattered(plain)
    step = replace(MASKS, branches=3, tile=True, overlap=overlap)
    graph = shared(plain, store, step)
    got, w = outputs(graph, store, x=rows()), values(plain, store)
    for b in range(3):
        own = kept(9, b, step)
        h = rows().astype(np.float64)
        for name in ("a", "b"):
            z = h @ w[f"{name}.weight"].T + w[f"{name}.bias"]
            centred = z - w[f"bn_{name}.running_mean"]
            z = centred / np.sqrt(w[f"bn_{name}.running_var"] + 2e-5)
            z = np.maximum(z * w[f"bn_{name}.gamma"] + w[f"bn_{name}.beta"], 0)
            h = np.stack([z[:, own[j % len(own)]] for j in range(9)], axis=1)
        expected = h @ w["fc.weight"].T + w["fc.bias"]
        np.testing.assert_allclose(got[f"branch{b + 1}"], expected, **EXACT)


def test_parts_of_a_concatenation_are_tiled_by_themselves() -> None:
    plain = Graph("cat")
    x = conv(plain.input("x", ("N", 3, 6, 6)), 4, 1, bias=False, name="stem")
    parts = [conv(x, n, 1, bias=False, name=f"part{k}") for k, n in enumerate((6, 4, 4))]
    h = conv(concat(*parts), 6, 1, bias=False, name="b")
    plain.output("y", conv(h, 3, 1, bias=False, name="head"))
    store = scattered(plain)
    graph = shared(plain, store, replace(MASKS, tile=True))
    got, w = outputs(graph, store, x=images(2)), values(plain, store)

    def layer(h: np.ndarray, name: str) -> np.ndarray:
        return np.einsum("nchw,oc->nohw", h, w[f"{name}.weight"][:, :, 0, 0])

    def tiled(h: np.ndarray, b: int) -> np.ndarray:
        n = h.shape[1]
        half = h[:, b * n // 2 : (b + 1) * n // 2]
        return np.concatenate([half, half], axis=1)

    for b in range(2):
        stem = tiled(layer(images(2).astype(np.float64), "stem"), b)
        h = np.concatenate([tiled(layer(stem, f"part{k}"), b) for k in range(3)], axis=1)
        expected = layer(tiled(layer(h, "b"), b), "head")
        np.testing.assert_allclose(got[f"branch{b + 1}"], expected, **EXACT)


def test_alike_parts_are_tiled_at_once() -> None:
    def added(parts: int) -> int:
        plain = Graph("cat")
        x = plain.input("x", ("N", 3, 6, 6))
        h = concat(*(conv(x, 4, 1, name=f"part{k}") for k in range(parts)))
        plain.output("y", conv(h, 3, 1, name="head"))
        return replace(MASKS, tile=True).apply(plain).size - MASKS.apply(plain).size

    assert added(7) == added(3)


# -- statistics and trunks -------------------------------------------------------------------------


def test_statistics_of_channels_that_a_branch_does_not_keep_are_never_used() -> None:
    plain = mlp()
    graph = MASKS.apply(plain)
    store = scattered(graph)
    before = outputs(graph, store, x=rows())
    for state in graph.states:
        if state.role is Role.STATISTIC:
            branch = int(state.name[6]) - 1
            masked = [k for k in range(9) if k not in kept(9, branch, MASKS)]
            store[state][masked] = np.nan
    for name, value in outputs(graph, store, x=rows()).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_trunk_before_the_branches_serves_one_input_or_one_each() -> None:
    plain = small("cnn", outputs=4)
    store = scattered(plain)
    one = shared(plain, store, replace(MASKS, after="pool_2"))
    expected = outputs(one, store, x=batch("cnn"))
    each = shared(plain, store, replace(MASKS, after="pool_2", inputs="each"))
    assert list(each.inputs) == ["x1", "x2"]
    got = outputs(each, store, x1=batch("cnn"), x2=batch("cnn", seed=1))
    np.testing.assert_allclose(got["branch1"], expected["branch1"], **EXACT)
    other = outputs(one, store, x=batch("cnn", seed=1))
    np.testing.assert_allclose(got["branch2"], other["branch2"], **EXACT)
    masked = {n.path for n in each.nodes if isinstance(n.op, Select)}
    assert "branch2/pool_2.mask" in masked
    assert not [p for p in masked if "conv_1" in p]


# -- weight decay and training ---------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.3])
@pytest.mark.parametrize("wide", ["none", "heads", "all"])
def test_weights_decay_where_a_branch_keeps_both_channels(overlap: float, wide: str) -> None:
    plain = mlp()
    step = replace(MASKS, branches=3, overlap=overlap, wide=wide)
    store = scattered(plain)
    graph = shared(plain, store, step)
    training = differentiate(branch_losses(specialise(graph, training=True), _squares))
    hooked = clone(training)
    for state, g in (
        step.connected_decay(plain, 0.25)
        .apply(hooked, hooked.gradients, hooked.constant(1.0, DType.F64))
        .items()
    ):
        hooked.set_gradient(state, g)
    before, after = (
        interpret(g, {"x": rows()}, store, DType.F64).gradients for g in (training, hooked)
    )
    times = 3 if wide == "all" else 1
    for state, g in before.items():
        expected = g + 0.25 * store[state] * _connected(state, step, times)
        np.testing.assert_allclose(after[state], expected, **EXACT)


def _squares(output: Value) -> Value:
    return output.graph.emit(make("reduce_sum", axes=(0, 1)), output * output)


def _connected(state: State, step: ShareWeights, times: int) -> np.ndarray:
    """By sets: some branch keeps output o and input i."""
    if len(state.shape) < 2:
        return np.zeros(state.shape)
    found = np.zeros(state.shape)
    hidden, first = 9 * times, state.name == "a.weight"
    for b in range(step.branches):
        into = range(5) if first else kept(hidden, b, step)
        out = kept(hidden, b, step)
        if state.name.startswith("branch"):
            out = range(4) if state.name[6] == str(b + 1) else []  # type: ignore[assignment]
        elif state.name == "fc.weight":
            out = kept(12, b, step)
        found[np.ix_(list(out), list(into))] = 1
    return found


def test_decay_of_another_network_is_refused() -> None:
    decay = MASKS.connected_decay(mlp(), 0.1)
    other = Graph("other")
    other.output("y", dense(other.input("x", ("N", 5)), 3, name="a"))
    training = differentiate(joint_loss(specialise(other, training=True)))
    with pytest.raises(GraphError, match=r"a.weight: expected 9 output and 5 input channels"):
        SGD(hooks=(decay,)).attach(training)
    with pytest.raises(GraphError, match="connected_decay is for layout=masks"):
        ShareWeights(2).connected_decay(mlp(), 0.1)


def test_the_loss_is_the_sum_of_triplet_losses_of_the_branches() -> None:
    plain = small("cnn", outputs=8)
    graph = replace(MASKS, overlap=0.3, wide="heads", after="pool_2").apply(plain)

    def loss(embedding: Value) -> Value:
        return batch_hard_triplet(embedding, 2, 2)

    training = bind(specialise(graph, training=True), N=4)
    step = SGD(learning_rate=1e-6).attach(differentiate(branch_losses(training, loss)))
    store, fed = scattered(step), {"x": batch("cnn", n=4)}
    run = interpret(step, fed, store, DType.F64)
    for i in (1, 2):
        e = outputs(graph, store, training=True, **fed)[f"branch{i}"]
        far = np.abs(e[:, None] - e[None]).sum(axis=2)
        alike = np.arange(4)[:, None] // 2 == np.arange(4) // 2
        terms = 0.2 + np.where(alike, far, -np.inf).max(1) - np.where(alike, np.inf, far).min(1)
        expected = np.maximum(terms, 0).sum()
        np.testing.assert_allclose(run.outputs[f"branch{i}.loss"], expected, **EXACT)
    total = run.outputs["branch1.loss"] + run.outputs["branch2.loss"]
    np.testing.assert_allclose(run.outputs["loss"], total, **EXACT)
    before = float(run.outputs["loss"])
    for state, value in run.updates.items():
        store[state] = value
    assert float(interpret(step, fed, store, DType.F64).outputs["loss"]) < before


# -- specifications and refusals -------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        replace(MASKS, wide="all", tile=True, overlap=0.25),
        replace(MASKS, wide="heads", after="pool_2", inputs="each", merge="concat"),
    ],
)
def test_specifications_texts_and_second_applications(step: ShareWeights) -> None:
    assert Pass.from_spec(step.name) == step
    once = step.apply(small("cnn"))
    assert structural_hash(parse_graph(format_graph(once))) == structural_hash(once)
    again = step.run(once)
    assert again.report.refusals == [("branch1", "the network is branched already")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("share_weights:wide=heads", "wide and tile are for layout=masks"),
        ("share_weights:tile=true", "wide and tile are for layout=masks"),
        ("share_weights:layout=masks,wide=body", "wide 'body' is none of none, heads, all"),
        ("share_weights:layout=masks,legacy_bias=true", "are for layout=quadrants"),
        ("share_weights:layout=masks,half_merges=fc1", "are for layout=quadrants"),
    ],
)
def test_options_of_the_other_layout_are_refused(spec: str, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        Pass.from_spec(spec)


def test_what_cannot_be_widened_is_refused() -> None:
    plain = Graph("fixed")
    h = conv(plain.input("x", ("N", 3, 6, 6)), 4, 1, name="a")
    h = where(compare("greater", h, h.graph.emit(Full(value=0.5, shape=(4, 1, 1)))), h, h * 2.0)
    plain.output("y", conv(h, 2, 1, name="b"))
    with pytest.raises(RefusalError, match="it cannot be widened: compare"):
        replace(MASKS, wide="all").apply(plain)


@pytest.mark.parametrize("wide", ["heads", "all"])
def test_a_weight_that_two_layers_read_is_widened_in_one_way(wide: str) -> None:
    plain = Graph("tied")
    weight = plain.read(State("tied", (4, 4)))
    h = dense(plain.input("x", ("N", 4)), 4, weight=weight, bias=False, name="a")
    plain.output("y", dense(h, 4, weight=weight, bias=False, name="b"))
    with pytest.raises(RefusalError, match="b: another layer reads tied too, but is widened"):
        replace(MASKS, wide=wide).apply(plain)
