"""Halves and the layers of one branch (vbranch, sections 2.1 to 2.6)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from branchgraph.ir.builder import average_pool, relu
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, branch
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.state import Store
from branchgraph.ir.types import DType
from branchgraph.nets.vbranch import (
    Halves,
    Layers,
    SharedStates,
    SharingWarning,
    add,
    concatenate,
    fcn,
    merge_branches,
    shared_channels,
)
from branchgraph.nets.vbranch.halves import same_pads
from branchgraph.passes.materialise import evaluate_origin, materialise
from branchgraph.passes.specialise import specialise
from tests.builders import EXACT
from tests.nets.vbranch_nets import batch, outputs, scattered, small


@pytest.mark.parametrize(
    ("share", "channels", "expected"),
    [(0.29, 100, 28), (0.5, 5, 2), (1.0, 7, 7), (1, 7, 1), (0.0, 7, 0), (7, 7, 7), (0.999, 10, 9)],
)
def test_fractions_are_truncated_and_integers_are_channels(share, channels, expected) -> None:  # type: ignore[no-untyped-def]
    assert shared_channels(share, channels) == expected


@pytest.mark.parametrize("share", [True, "0.5", None, np.float64(0.5), -0.1, 1.01, 8, -1])
def test_other_shares_are_refused(share: object) -> None:
    with pytest.raises(GraphError, match="share"):
        shared_channels(share, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"),
    [
        ((28, 28), (3, 3), 1, (1, 1, 1, 1)),
        ((28, 27), (3, 3), 2, (0, 1, 1, 1)),
        ((105, 105), (3, 3), 2, (1, 1, 1, 1)),
        ((8, 8), (1, 1), 2, (0, 0, 0, 0)),
        ((8, 8), (2, 2), 1, (0, 0, 1, 1)),
    ],
)
def test_same_padding_puts_the_odd_one_last(size, kernel, stride, pads) -> None:  # type: ignore[no-untyped-def]
    assert same_pads(size, kernel, stride) == pads


# -- layers against their definition, half by half -------------------------------------------------


class ByHand:
    """Dense layers of one branch, computed from (shared half, unique half) as section 2.3 says."""

    def __init__(self, graph: Graph, store: Store, number: int) -> None:
        names = {s.name: store[s].astype(np.float64) for s in graph.states}
        own = f"branch{number}/"
        self.states = {k.removeprefix(own): v for k, v in names.items() if "/" not in k or own in k}

    def dense(self, layer: str, *halves: np.ndarray | None) -> list[np.ndarray]:
        """The two halves of the output."""
        return [sum(self._terms(layer, out, halves)) for out in "su"]  # type: ignore[misc]

    def _terms(
        self, layer: str, out: str, halves: tuple[np.ndarray | None, ...]
    ) -> Iterator[np.ndarray]:
        for into, half in zip("su", halves):
            if half is not None:
                yield half @ self.states[f"{layer}.weight_{into}{out}"].T
        for bias in (f"bias_{out}", f"bias_s{out}", f"bias_u{out}"):
            if f"{layer}.{bias}" in self.states:
                yield self.states[f"{layer}.{bias}"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_layer_of_halves_is_the_sum_of_its_blocks(legacy: bool, share: float) -> None:
    graph = Graph("two")
    x = graph.input("x", ("N", 5))
    shared = SharedStates(graph, 2)
    layers = Layers(shared, legacy_layout=legacy)
    for i in (1, 2):
        with branch(f"branch{i}"):
            h = layers.dense(Halves(x), 6, 0.5, name="first")
            graph.output(f"branch{i}", layers.dense(h, 4, share, name="second").value)
    store, fed = scattered(graph), np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    got = outputs(graph, store, x=fed)
    for i in (1, 2):
        hand = ByHand(graph, store, i)
        p, q = hand.dense("first", fed.astype(np.float64), None)
        expected = np.hstack(hand.dense("second", p, q))
        np.testing.assert_allclose(got[f"branch{i}"], expected, **EXACT)
    assert np.abs(got["branch1"] - got["branch2"]).min() > 0


def test_a_convolution_has_the_blocks_of_a_dense_layer() -> None:
    """At every position a 1x1 convolution is the dense layer with the same blocks."""

    def net(conv: bool) -> Graph:
        graph = Graph("net")
        h = Halves(graph.input("x", ("N", 4, 2, 3) if conv else ("N", 4)))
        layers = Layers(SharedStates(graph, 1))
        for name, filters in (("first", 5), ("second", 6)):
            h = (
                layers.conv(h, filters, 1, 0.5, name=name)
                if conv
                else layers.dense(h, filters, 0.5, name=name)
            )
        graph.output("y", h.value)
        return graph

    images, rows = net(True), net(False)
    store = scattered(rows)
    values = {s.name: store[s] for s in rows.states}
    moved = Store({s: values[s.name].reshape(s.shape) for s in images.states})
    x = np.random.default_rng(0).normal(size=(3, 4, 2, 3)).astype(np.float32)
    got = outputs(images, moved, x=x)["y"]
    flat = outputs(rows, store, x=x.transpose(0, 2, 3, 1).reshape(-1, 4))["y"]
    np.testing.assert_allclose(got.transpose(0, 2, 3, 1).reshape(-1, 6), flat, **EXACT)


def blocks(legacy: bool, *shares: float | int, kernel: int = 3) -> list[str]:
    """Weights of the last of several convolutions."""
    graph = Graph("net")
    h = Halves(graph.input("x", ("N", 4, 5, 5)))
    layers = Layers(SharedStates(graph, 2), legacy_layout=legacy)
    for k, share in enumerate(shares):
        with branch("branch1"):
            h = layers.conv(h, 4, kernel, share, bias=False, name=f"conv{k}")
    return sorted(s.name for s in graph.states if s.name.rpartition("/")[2].startswith(f"conv{k}"))


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.5, 1.0), ["conv1.weight"]),
        ((0.5, 0.0), ["branch1/conv1.weight"]),
        ((0.0, 1.0), ["conv1.weight"]),
        ((1.0, 0.5), ["branch1/conv1.weight_su", "conv1.weight_ss"]),
        ((0.5,), ["branch1/conv0.weight_su", "conv0.weight_ss"]),
        ((0.5, 2), ["branch1/conv1.weight_su", "branch1/conv1.weight_us",
                    "branch1/conv1.weight_uu", "conv1.weight_ss"]),
    ],
)  # fmt: skip
def test_empty_blocks_do_not_exist(shares, expected) -> None:  # type: ignore[no-untyped-def]
    assert blocks(False, *shares) == expected


def test_the_legacy_layout_shares_whole_convolutions_of_1x1_only() -> None:
    assert blocks(True, 0.5, 1.0) == ["branch1/conv1.weight_us", "conv1.weight_ss"]
    assert blocks(True, 1.0, 1.0) == ["conv1.weight_ss"]
    assert blocks(True, 0.5, 1.0, kernel=1) == ["conv1.weight"]


def test_a_layer_that_shares_behind_one_that_does_not_is_warned_about_once() -> None:
    with pytest.warns(SharingWarning) as said:
        fcn(sizes=(4,), features=3, shared=(0.0, 0.5), branches=3)
    assert [str(w.message)[:18] for w in said] == ["fc shares channels"]


def test_batch_norm_of_a_plain_tensor_shares_nothing() -> None:
    graph = Graph("net")
    layers = Layers(SharedStates(graph, 2))
    with branch("branch1"):
        h = layers.norm(Halves(graph.input("x", ("N", 4))), name="first")
        h = layers.norm(layers.dense(h, 4, 0.25, name="fc"), name="second")
        layers.norm(layers.dense(h, 4, 1.0, name="all"), name="third")
    names = {s.name for s in graph.states if "gamma" in s.name}
    assert names == {
        "branch1/first.gamma", "second.gamma_s", "branch1/second.gamma_u", "third.gamma",
    }  # fmt: skip


# -- the algebra of empty halves -------------------------------------------------------------------


@pytest.fixture
def graph() -> Graph:
    return Graph("net")


def halves(graph: Graph, shared: int | None, channels: int = 4) -> Halves:
    """An input taken for the output of a layer."""
    return Halves(graph.input(f"x{len(graph.inputs)}", ("N", channels)), shared)


def evaluated(graph: Graph, h: Halves) -> np.ndarray:
    """Inputs hold 10 times their number plus the channel."""
    graph.output("y", h.value)
    fed = {
        name: 10.0 * k + np.arange(v.shape[1], dtype=float)[None]  # type: ignore[arg-type]
        for k, (name, v) in enumerate(graph.inputs.items())
    }
    return interpret(graph, fed, precision=DType.F64).outputs["y"][0]


@pytest.mark.parametrize(
    ("shares", "shared", "order"),
    [
        ((1, 2), 3, [0, 10, 11, 1, 2, 3, 12, 13]),
        ((0, 4), 4, [10, 11, 12, 13, 0, 1, 2, 3]),
        ((4, 0), 4, [0, 1, 2, 3, 10, 11, 12, 13]),
        ((0, 0), 0, [0, 1, 2, 3, 10, 11, 12, 13]),
        ((4, 4), 8, [0, 1, 2, 3, 10, 11, 12, 13]),
        ((None, None), None, [0, 1, 2, 3, 10, 11, 12, 13]),
        ((0, 1), 1, [10, 0, 1, 2, 3, 11, 12, 13]),
    ],
)
def test_concatenation_keeps_the_halves_apart(graph: Graph, shares, shared, order) -> None:  # type: ignore[no-untyped-def]
    h = concatenate(*(halves(graph, s) for s in shares))
    assert h.shared == shared
    assert evaluated(graph, h).tolist() == order


def test_concatenation_of_whole_halves_slices_nothing(graph: Graph) -> None:
    concatenate(halves(graph, 0), halves(graph, 4), halves(graph, 0))
    assert not [n for n in graph.nodes if isinstance(n.op, Slice)]


@pytest.mark.parametrize(
    ("terms", "shared", "expected"),
    [
        (((1, 4), (1, 4)), 1, [10, 12, 14, 16]),
        (((0, 4), (0, 4)), 0, [10, 12, 14, 16]),
        (((None, 4), (None, 4)), None, [10, 12, 14, 16]),
        (((0, 2), (1, 3)), 1, [10, 11, 13]),
        (((2, 2), (2, 3)), 2, [10, 12, 12]),
        (((2, 2), (0, 2)), 2, [0, 1, 10, 11]),
    ],
)
def test_addition_ignores_empty_halves(graph: Graph, terms, shared, expected) -> None:  # type: ignore[no-untyped-def]
    h = add(*(halves(graph, s, n) for s, n in terms))
    assert h.shared == shared
    assert evaluated(graph, h).tolist() == expected


@pytest.mark.parametrize(
    ("join", "shares", "message"),
    [
        (add, (1, 2), r"halves differ \(shared\+unique channels: 1\+3, 2\+2\)"),
        (add, (1, None), "some values have halves and some are plain"),
        (concatenate, (None, 0), "some values have halves and some are plain"),
    ],
)
def test_halves_that_do_not_fit_are_refused(graph: Graph, join, shares, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(GraphError, match=message):
        join(*(halves(graph, s) for s in shares))


def test_layers_without_weights_keep_the_halves(graph: Graph) -> None:
    h = Halves(graph.input("x", ("N", 4, 6, 6)), 3)
    assert h.map(relu).map(average_pool, 2).shared == 3
    assert h.merged().shared is None
    assert h.merged().value is h.value


@pytest.mark.parametrize("shared", [0, 1, 4])
def test_batch_norm_takes_every_split(graph: Graph, shared: int) -> None:
    y = Layers(SharedStates(graph, 2)).norm(halves(graph, shared), name="bn")
    assert y.shared == shared
    assert y.value.shape == y.value.producer.inputs[0].shape  # type: ignore[union-attr]


def test_branches_merge_into_one_plain_tensor(graph: Graph) -> None:
    joined = merge_branches("concat", halves(graph, 1), halves(graph, 3, 2))
    assert joined.shared is None
    assert evaluated(graph, joined).tolist() == [0, 1, 2, 3, 10, 11]


# -- states ----------------------------------------------------------------------------------------


def test_a_name_serves_one_layer_of_a_branch(graph: Graph) -> None:
    layers, h = Layers(SharedStates(graph, 2)), halves(graph, 2)
    layers.dense(h, 4, 0.5, name="fc")
    with pytest.raises(GraphError, match=r"two layers of a branch share fc\.weight_ss"):
        layers.dense(h, 4, 0.5, name="fc")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ((4, 8, 0.5), r"fc: another branch has 2\+2 -> 2\+2, not 2\+2 -> 4\+4"),
        ((4, 8, 2), r"not 2\+2 -> 2\+6"),
        ((3, 4, 0.5), r"not 2\+1 -> 2\+2"),
    ],
)
def test_branches_share_layers_of_one_size(graph: Graph, second, message) -> None:  # type: ignore[no-untyped-def]
    layers = Layers(SharedStates(graph, 2))
    channels, features, share = second
    with branch("branch1"):
        layers.dense(halves(graph, 2), 4, 0.5, name="fc")
    with branch("branch2"), pytest.raises(GraphError, match=message):
        layers.dense(halves(graph, 2, channels), features, share, name="fc")


def test_batch_norm_takes_halves_or_plain_tensors_in_all_branches(graph: Graph) -> None:
    layers = Layers(SharedStates(graph, 2))
    with branch("branch1"):
        layers.norm(halves(graph, 2), name="bn")
    with (
        branch("branch2"),
        pytest.raises(GraphError, match=r"bn: another branch has 2\+2, not 4 plain"),
    ):
        layers.norm(halves(graph, None), name="bn")


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_half_merge_makes_the_next_layer_one_of_a_plain_tensor(
    graph: Graph, share: float
) -> None:
    layers = Layers(SharedStates(graph, 2))
    with branch("branch1"):
        h = layers.dense(halves(graph, 1), 4, 0.5, name="fc1").merged()
        layers.dense(h, 4, share, name="fc2")
    names = {s.name for s in graph.states if "fc2.weight" in s.name}
    cut = {"fc2.weight_ss", "branch1/fc2.weight_su"}
    assert names == (cut if share < 1 else {"fc2.weight"})


def test_layers_without_a_name_get_the_same_one_in_every_branch(graph: Graph) -> None:
    layers, x = Layers(SharedStates(graph, 2)), halves(graph, 2)
    for i in (1, 2):
        with branch(f"branch{i}"):
            layers.norm(layers.dense(layers.dense(x, 4, 1.0), 4, 1.0))
    assert {s.name for s in graph.states if s.role.trainable} == {
        "fc.weight", "fc.bias", "fc_1.weight", "fc_1.bias", "bn.gamma", "bn.beta",
    }  # fmt: skip


def test_states_have_the_dtype_of_the_input(graph: Graph) -> None:
    layers = Layers(SharedStates(graph, 2))
    h = layers.dense(Halves(graph.input("x", ("N", 3), DType.F64)), 4, 0.5, name="fc")
    assert layers.norm(h, name="bn").value.dtype is DType.F64
    assert {s.dtype for s in graph.states} == {DType.F64}


def test_same_padding_needs_concrete_sizes(graph: Graph) -> None:
    x = Halves(graph.input("x", ("N", 1, "H", "W")))
    with pytest.raises(GraphError, match="padding `same` needs concrete sizes"):
        Layers().conv(x, 4, 3, name="conv")
    assert Layers().conv(x, 4, 3, pad=1, name="conv").channels == 4


def test_dense_layers_take_no_images(graph: Graph) -> None:
    with pytest.raises(GraphError, match=r"expected \[N, C\]"):
        Layers().dense(Halves(graph.input("x", ("N", 4, 2, 2))), 3, name="fc")


def test_blocks_become_one_matrix_a_layer_and_branch_for_inference() -> None:
    declared = small("densenet_bc", branches=2, shared=(0.5,))
    inference = specialise(declared, training=False)
    store = scattered(declared)
    before = interpret(inference, {"x": batch("densenet_bc")}, store, DType.F64).outputs
    whole, origin = materialise(inference)
    evaluate_origin(origin, store)
    assert all(weight.state is not None for weight in weights(whole))
    after = interpret(whole, {"x": batch("densenet_bc")}, store, DType.F64).outputs
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-5)


def weights(graph: Graph) -> Iterator:  # type: ignore[type-arg]
    return (n.inputs[1] for n in graph.nodes if isinstance(n.op, Conv | Dense))
