"""Half merges, legacy convolutions, trunks and maps of `share_weights` (vbranch, 2.1 to 2.11)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from branchgraph.compiler import compile
from branchgraph.ir.activation_maps import class_activation_map
from branchgraph.ir.builder import batch_norm, concat, conv, dense, global_average_pool, relu
from branchgraph.ir.cost import parameter_count
from branchgraph.ir.errors import GraphError, RefusalError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.interpret import interpret
from branchgraph.ir.losses import squared_error
from branchgraph.ir.optimisers import SGD
from branchgraph.ir.state import Role, Store
from branchgraph.ir.text import format_graph
from branchgraph.ir.types import DType
from branchgraph.passes.base import Pass
from branchgraph.passes.materialise import evaluate_origin
from branchgraph.passes.share_weights import ShareWeights, branch_losses
from branchgraph.passes.specialise import specialise
from branchgraph.passes.split_ensemble import split
from branchgraph.training.loss import joint_loss
from tests.builders import CLOSE, EXACT, images
from tests.nets.test_vbranch import COUNTS
from tests.nets.vbranch_nets import batch, outputs, scattered, small


def shared(graph: Graph, store: Store, step: ShareWeights) -> Graph:
    """The branched graph; `store` gets the values of its states, cut from those of the plain."""
    result = step.run(graph)
    assert result.report.origin is not None
    evaluate_origin(result.report.origin, store)
    return result.graph


def names(graph: Graph, kind: str) -> set[str]:
    """Parameters of branch 1 and of all branches whose names hold `kind`."""
    found = (s.name for s in graph.states if s.role is Role.PARAMETER and kind in s.name)
    return {name for name in found if not name.startswith("branch2")}


def start_as_the_plain(plain: Graph, step: ShareWeights, **fed: np.ndarray) -> Graph:
    """Check that branches start as the plain network; its branched form."""
    store = scattered(plain)
    graph = shared(plain, store, step)
    (expected,) = outputs(plain, store, **fed).values()
    for value in outputs(graph, store, **fed).values():
        np.testing.assert_allclose(value, expected, **EXACT)
    return graph


# -- half merges (section 2.1) ---------------------------------------------------------------------


def test_behind_a_half_merge_a_layer_reads_a_plain_value() -> None:
    plain = small("fcn")
    step = ShareWeights(2, (0.5,), half_merges=("relu_fc1",))
    graph = start_as_the_plain(plain, step, x=batch("fcn"))
    assert names(graph, "fc2.weight") == {"fc2.weight_ss", "branch1/fc2.weight_su"}
    assert {s.name: s.shape for s in graph.states}["fc2.weight_ss"] == (2, 7)
    assert names(graph, "/fc.weight") | names(graph, "fc.weight_ss") == {
        "fc.weight_ss", *(f"branch1/fc.weight_{part}" for part in ("us", "su", "uu")),
    }  # fmt: skip


def test_batch_norm_of_merged_halves_shares_nothing() -> None:
    plain = small("fcn")
    graph = start_as_the_plain(plain, ShareWeights(2, (1.0,), half_merges=("fc1",)), x=batch("fcn"))
    assert names(graph, "bn_fc1.") == {"branch1/bn_fc1.gamma", "branch1/bn_fc1.beta"}
    assert names(graph, "bn_fc2.") == {"bn_fc2.gamma", "bn_fc2.beta"}
    assert names(graph, "fc2.weight") == {"fc2.weight"}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("joined", RefusalError, "joined: halves can be merged only where channels stand as in"),
        ("nowhere", GraphError, "no node 'nowhere'"),
        ("stem", RefusalError, "stem: it is no part of the branches"),
    ],
)
def test_half_merges_that_cannot_be_are_refused(name: str, error, message: str) -> None:  # type: ignore[no-untyped-def]
    plain = Graph("net")
    x = conv(plain.input("x", ("N", 3, 6, 6)), 4, 1, name="stem")
    h = concat(conv(x, 4, 1, name="a"), conv(x, 4, 1, name="b"), name="joined")
    plain.output("y", conv(h, 2, 1, name="c"))
    with pytest.raises(error, match=message):
        ShareWeights(2, (0.5,), half_merges=(name,), after="stem").apply(plain)


# -- the legacy layout (section 7, Q3 and Q5) ------------------------------------------------------


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 1.0, 1.0), (1.0, 0.5, 1.0)])
def test_both_legacy_options_are_the_legacy_layout_of_declared_networks(
    shares: tuple[float, ...],
) -> None:
    plain = small("cnn", stem=False)
    every = [shares[0]] * 2 + [shares[-2] if shares[1:] else shares[0]] * 3 + [shares[-1]]
    step = ShareWeights(2, tuple(every), legacy_bias=True, legacy_convolutions=True)
    declared = small("cnn", stem=False, branches=2, shared=shares, legacy_layout=True)
    assert structural_hash(step.apply(plain)) == structural_hash(declared)
    start_as_the_plain(plain, step, x=batch("cnn"))


def test_a_3x3_convolution_shared_whole_keeps_weights_of_each_branch_in_the_legacy_layout() -> None:
    plain = Graph("net")
    h = conv(plain.input("x", ("N", 3, 6, 6)), 4, 3, bias=False, name="a")
    plain.output("y", conv(h, 4, 3, bias=False, name="b"))
    found = {
        legacy: names(ShareWeights(2, (0.5, 1.0), legacy_convolutions=legacy).apply(plain), "b.w")
        for legacy in (False, True)
    }
    assert found == {False: {"b.weight"}, True: {"b.weight_ss", "branch1/b.weight_us"}}


# -- trunks that are copied ------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_branches_behind_a_trunk_may_have_inputs_of_their_own(share: float) -> None:
    plain = small("cnn", outputs=4)
    step = ShareWeights(2, (share,), after="pool_2")
    store = scattered(plain)
    one = shared(plain, store, step)
    each = shared(plain, store, replace(step, inputs="each"))
    trained = [{s.name for s in g.states if s.role is Role.PARAMETER} for g in (one, each)]
    assert trained[0] == trained[1]
    assert not [n for n in trained[1] if n.startswith("branch") and "_1_" in n]
    x = [batch("cnn", seed=i) for i in (0, 1)]
    got = outputs(each, store, x1=x[0], x2=x[1])
    for i in (0, 1):
        np.testing.assert_allclose(
            got[f"branch{i + 1}"], outputs(one, store, x=x[i])[f"branch{i + 1}"], **EXACT
        )


def test_batch_norm_first_in_a_trunk_is_shared_and_behind_it_of_each_branch() -> None:
    plain = Graph("net")
    h = conv(batch_norm(plain.input("x", ("N", 3, 6, 6)), name="bn0"), 4, 1, name="a")
    h = conv(batch_norm(h, name="bn1"), 4, 1, name="b")
    plain.output("y", h)
    for inputs in ("one", "each"):
        graph = ShareWeights(2, (0.5,), after="a", inputs=inputs).apply(plain)
        assert names(graph, "bn0.gamma") == {"bn0.gamma"}
        assert names(graph, "bn1.gamma") == {"branch1/bn1.gamma"}


def test_separate_heads_on_one_trunk() -> None:
    """The baseline of 2018: B dense heads, each 1024 units, batch norm, ReLU, 128 units."""
    plain = Graph("trinet")
    h = conv(plain.input("x", ("N", 3, 8, 8)), 32, 3, bias=False, name="trunk")
    h = relu(batch_norm(dense(global_average_pool(h, name="pool"), 1024, name="fc1"), name="bn"))
    plain.output("embedding", dense(h, 128, name="fc2"))
    graph = ShareWeights(3, (0.0,), after="pool").apply(plain)
    head = 32 * 1024 + 1024 + 2 * 1024 + 1024 * 128 + 128
    assert parameter_count(graph) == 3 * 32 * 9 + 3 * head


# -- lowerings (section 2.9) -----------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("inputs", ["one", "each"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["fcn", "cnn", "densenet_bc"])
def test_stacked_blocks_compute_what_assembled_ones_do(
    name: str, share: float, inputs: str, legacy: bool
) -> None:
    plain = small(name, outputs=4)
    step = ShareWeights(3, (share,), inputs=inputs, legacy_bias=legacy, legacy_convolutions=legacy)
    assembled, stacked = step.apply(plain), replace(step, lowering="stacked").apply(plain)
    assert {(s.name, s.shape) for s in assembled.states} == {
        (s.name, s.shape) for s in stacked.states
    }
    training = [
        differentiate(joint_loss(specialise(g, training=True))) for g in (assembled, stacked)
    ]
    store = scattered(training[0])
    values = {s.name: store[s] for s in training[0].states}
    moved = Store({s: values[s.name] for s in training[1].states})
    many = inputs == "each"
    fed = {f"x{i}": batch(name, seed=i) for i in (1, 2, 3)} if many else {"x": batch(name)}
    fed["labels"] = np.array([0, 3, 1])
    runs = [interpret(g, fed, s, DType.F64) for g, s in zip(training, (store, moved))]
    for key, value in runs[0].outputs.items():
        np.testing.assert_allclose(runs[1].outputs[key], value, **EXACT)
    gradients = [{s.name: g for s, g in run.gradients.items()} for run in runs]
    for key, value in gradients[0].items():
        np.testing.assert_allclose(gradients[1][key], value, rtol=1e-9, atol=1e-11)


def test_stacked_branches_start_as_the_plain_network_and_run_compiled() -> None:
    plain = small("cnn", outputs=4)
    step = ShareWeights(2, (0.5,), lowering="stacked", inputs="each", after="pool_2")
    store = scattered(plain)
    graph = shared(plain, store, step)
    x = [batch("cnn", seed=i) for i in (0, 1)]
    run = compile(graph, store=store)(x1=x[0], x2=x[1])
    for i in (0, 1):
        expected = outputs(plain, store, x=x[i])["logits"]
        np.testing.assert_allclose(run[f"branch{i + 1}"], expected, **CLOSE)


def test_shared_layers_are_applied_once() -> None:
    """One convolution for all where there were B, and a value that all read is not stacked."""
    plain = Graph("net")
    h = relu(conv(plain.input("x", ("N", 3, 6, 6)), 4, 3, name="a"))
    plain.output("y", conv(h, 4, 3, name="b"))
    macs = {}
    for share in (0.5, 1.0):
        step = ShareWeights(3, (share,), lowering="stacked")
        report = step.run(plain).report
        macs[share] = report.macs[1]
        layers = [n for n in step.apply(plain).nodes if n.op.opcode == "conv"]
        assert [n.path for n in layers if not n.scope] == ["a", "b"]
        assert len(layers) == 2 + (3 + 6 if share < 1 else 0)
    first, second = 4 * 3 * 9 * 16, 4 * 4 * 9 * 4
    assert macs[1.0] == first + second
    assert macs[0.5] == first / 2 + 3 * first / 2 + 3 * second


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_stacked_branches_can_be_taken_out_and_are_not_branched_again(share: float) -> None:
    plain = small("fcn")
    graph = ShareWeights(2, (share,), lowering="stacked").apply(plain)
    again = ShareWeights(2).run(graph)
    assert again.report.refusals == [("branch1", "the network is branched already")]
    store = scattered(graph)
    expected = outputs(graph, store, x=batch("fcn"))
    for name, alone in split(graph).items():
        got = outputs(alone, store, x=batch("fcn"))["logits"]
        np.testing.assert_array_equal(got, expected[name])


def test_branches_without_nodes_of_their_own_are_not_branched_again() -> None:
    plain = Graph("one")
    plain.output("y", dense(plain.input("x", ("N", 3)), 2, name="fc"))
    graph = ShareWeights(2, (1.0,), lowering="stacked").apply(plain)
    assert not graph.branches()
    assert ShareWeights(2).run(graph).report.refusals


def test_the_text_of_stacked_layers() -> None:
    plain = Graph("two")
    h = dense(plain.input("x", ("N", 3)), 2, bias=False, name="first")
    plain.output("y", dense(h, 2, bias=False, name="second"))
    graph = ShareWeights(2, (0.5,), lowering="stacked", gradient="sum").apply(plain)
    lines = [line.split("  #")[0].strip() for line in format_graph(graph).splitlines()]
    found = [line for line in lines if line.startswith("%")]
    assert found == STACKED.strip().splitlines()


STACKED = """
%0 = dense(x, first.weight_ss) : f32[N, 1]
%1 = dense(x, branch1/first.weight_su) : f32[N, 1]
%2 = concat(%0, %1) {axis=1} : f32[N, 2]
%3 = dense(x, branch2/first.weight_su) : f32[N, 1]
%4 = concat(%0, %3) {axis=1} : f32[N, 2]
%5 = slice(%2) {axis=1, start=0, size=1, step=1} : f32[N, 1]
%6 = slice(%4) {axis=1, start=0, size=1, step=1} : f32[N, 1]
%7 = reshape(%5) {shape=[1, N, 1]} : f32[1, N, 1]
%8 = reshape(%6) {shape=[1, N, 1]} : f32[1, N, 1]
%9 = concat(%7, %8) {axis=0} : f32[2, N, 1]
%10 = reshape(%9) {shape=[2*N, 1]} : f32[2*N, 1]
%11 = dense(%10, second.weight_ss) : f32[2*N, 1]
%12 = reshape(%11) {shape=[2, N, 1]} : f32[2, N, 1]
%13 = slice(%12) {axis=0, start=0, size=1, step=1} : f32[1, N, 1]
%14 = reshape(%13) {shape=[N, 1]} : f32[N, 1]
%15 = slice(%12) {axis=0, start=1, size=1, step=1} : f32[1, N, 1]
%16 = reshape(%15) {shape=[N, 1]} : f32[N, 1]
%17 = slice(%2) {axis=1, start=1, size=1, step=1} : f32[N, 1]
%18 = dense(%17, branch1/second.weight_us) : f32[N, 1]
%19 = sum(%14, %18) : f32[N, 1]
%20 = concat(branch1/second.weight_su, branch1/second.weight_uu) {axis=1} : f32[1, 2]
%21 = dense(%2, %20) : f32[N, 1]
%22 = concat(%19, %21) {axis=1} : f32[N, 2]
%23 = slice(%4) {axis=1, start=1, size=1, step=1} : f32[N, 1]
%24 = dense(%23, branch2/second.weight_us) : f32[N, 1]
%25 = sum(%16, %24) : f32[N, 1]
%26 = concat(branch2/second.weight_su, branch2/second.weight_uu) {axis=1} : f32[1, 2]
%27 = dense(%4, %26) : f32[N, 1]
%28 = concat(%25, %27) {axis=1} : f32[N, 2]
"""


# -- counts (section 2.9) --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "options", "plain", "split_"), COUNTS[:7], ids=lambda v: getattr(v, "__name__", "")
)
def test_published_counts_are_near_the_formula(build, options, plain, split_) -> None:  # type: ignore[no-untyped-def]
    """P (S^2 + (1 - S^2) B), up to biases, norms and first layers, which are linear in S."""
    for fraction, (common, own) in zip((0.25, 0.5, 0.75, 1.0), split_):
        for branches in (2, 4):
            formula = plain * (fraction**2 + (1 - fraction**2) * branches)
            linear = plain * (fraction + (1 - fraction) * branches)
            assert linear <= common + own * branches <= 1.01 * formula


# -- class activation maps (section 2.11) ----------------------------------------------------------


def looking(step: ShareWeights) -> tuple[Graph, Graph]:
    plain = small("cnn", outputs=4)
    return plain, replace(step, cam="relu_2_2", cam_size=(6, 3)).apply(plain)


STEPS = [
    ShareWeights(2, (0.0,), after="pool_2"),
    ShareWeights(2, (0.5,)),
    ShareWeights(2, layout="masks", overlap=0.3, after="pool_2"),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.name)
def test_every_branch_has_the_map_of_its_own_activations(step: ShareWeights) -> None:
    _, graph = looking(step)
    assert list(graph.outputs) == ["branch1", "branch2", "branch1.cam", "branch2.cam"]
    store = scattered(graph)
    got = outputs(graph, store, x=batch("cnn"))
    for i in (1, 2):
        alone = specialise(graph, training=False)
        h = alone.find(f"branch{i}/relu_2_2").outputs[0]
        alone.output("h", h)
        values = interpret(alone, {"x": batch("cnn")}, store, DType.F64).outputs["h"]
        by_hand = Graph("hand")
        h = by_hand.input("h", ("N", *values.shape[1:]), DType.F64)
        by_hand.output("cam", class_activation_map(h, (6, 3)))
        expected = interpret(by_hand, {"h": values}).outputs["cam"]
        np.testing.assert_allclose(got[f"branch{i}.cam"], expected, **EXACT)
    assert (got["branch1.cam"] != got["branch2.cam"]).any()


def test_maps_add_their_weighted_loss_to_that_of_the_branch() -> None:
    _, graph = looking(STEPS[0])

    def loss(logits: Value) -> Value:
        return squared_error(logits, logits * 0.0)

    training = branch_losses(specialise(graph, training=True), loss)
    heat = np.random.default_rng(0).random((2, 3, 6, 3)).astype(np.float32)
    fed = {"x": batch("cnn"), "branch1.heat_map": heat[0], "branch2.heat_map": heat[1]}
    store = scattered(training)
    got = outputs(graph, store, training=True, x=fed["x"])
    default, zero = (
        interpret(training, {**fed, **w}, store, DType.F64).outputs
        for w in ({}, {"cam.weight": 0.0})
    )
    for i in (1, 2):
        cam = (heat[i - 1].astype(np.float64) * got[f"branch{i}.cam"]).sum()
        np.testing.assert_allclose(default[f"branch{i}.cam_loss"], cam, **EXACT)
        both = zero[f"branch{i}.loss"] + 0.2 * cam
        np.testing.assert_allclose(default[f"branch{i}.loss"], both, **EXACT)
    each = default["branch1.loss"] + default["branch2.loss"]
    np.testing.assert_allclose(default["loss"], each, **EXACT)


def test_training_moves_branches_off_their_heat_maps() -> None:
    plain = small("cnn", outputs=4, stem=False)
    graph = replace(STEPS[0], cam="relu_2_2", cam_size=(6, 3)).apply(plain)

    def no_loss(logits: Value) -> Value:
        return squared_error(logits, logits)

    training = branch_losses(specialise(graph, training=True), no_loss)
    step = SGD(learning_rate=0.02).attach(differentiate(training))
    store = Store.initialised(step.states)
    run = compile(step, store=store)
    heat = np.zeros((2, 3, 6, 3), np.float32)
    heat[0, :, :3], heat[1, :, 3:] = 1, 1
    fed = {"x": batch("cnn"), "branch1.heat_map": heat[0], "branch2.heat_map": heat[1]}
    seen = [run(**fed) for _ in range(20)]
    for i in (1, 2):
        assert seen[-1][f"branch{i}.cam_loss"] < 0.5 * seen[0][f"branch{i}.cam_loss"]


def test_a_branch_that_is_taken_out_keeps_its_map() -> None:
    _, graph = looking(STEPS[1])
    store = scattered(graph)
    alone = split(graph)["branch2"]
    got = outputs(alone, store, x=batch("cnn"))
    expected = outputs(graph, store, x=batch("cnn"))
    assert list(got) == ["logits", "cam"]
    np.testing.assert_array_equal(got["cam"], expected["branch2.cam"])


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("share_weights:cam=fc", RefusalError, r"fc: a class activation map needs \[N, C, H, W\]"),
        ("share_weights:cam=nowhere", GraphError, "no node 'nowhere'"),
        ("share_weights:cam=conv_1_1,after=pool_2", RefusalError, "no part of the branches"),
        ("share_weights:cam_size=4+4", GraphError, r"cam_size: expected HEIGHT\+WIDTH of the maps"),
        ("share_weights:cam=relu_2_2,cam_size=4", GraphError, "expected HEIGHT"),
    ],
)
def test_maps_that_cannot_be_are_refused(spec: str, error, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        Pass.from_spec(spec).apply(small("cnn"))


def test_losses_need_one_output_a_branch() -> None:
    plain = Graph("two")
    h = conv(plain.input("x", ("N", 3, 6, 6)), 4, 1, name="a")
    plain.output("first", h)
    plain.output("second", conv(h, 2, 1, name="b"))
    graph = specialise(ShareWeights(2).apply(plain), training=True)
    with pytest.raises(GraphError, match="branch1 has the outputs first, second; expected one"):
        branch_losses(graph, lambda y: y)
    assert outputs(graph, scattered(graph), x=images(1)).keys() == set(graph.outputs)
