"""Networks of the Deep Fusion family become each other; averaging maps fuse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from builders import EXACT, image_input, images, merge_and_run_with_exits, randomised
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.compiler import compile
from branchgraph.ir.builder import (
    batch_norm,
    conv,
    dense,
    global_average_pool,
    max_pool,
    merge_and_run,
    merge_mean,
    merge_sum,
    relu,
)
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.initialisers import HeNormal, Ones, Zeros
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.merge import Mean
from branchgraph.ir.text import format_graph
from branchgraph.ir.types import DType
from branchgraph.nets import NETWORKS, network
from branchgraph.nets.units import MXNET
from branchgraph.passes.base import Pass
from branchgraph.passes.fuse_means import FuseMeans
from branchgraph.passes.insert_exits import InsertExits
from branchgraph.passes.merge_and_run import FORMS, MergeAndRun
from branchgraph.passes.pipeline import Pipeline

# -- the family ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(FORMS, 2)))
def test_every_form_becomes_every_other_as_declared(old: str, new: str) -> None:
    result = MergeAndRun(to=new).run(network(f"{old}:depth=14"))
    assert result.report.matches == [old]
    assert structural_hash(result.graph) == structural_hash(network(f"{new}:depth=14"))
    again = MergeAndRun(to=new).run(result.graph).report
    assert not again.matches
    assert again.refusals == [(old, f"it has the form {new} already")]


@pytest.mark.parametrize(
    ("old", "new"), [("half", "cross"), ("plain", "cross"), ("cross", "fuse6")]
)
def test_depth_and_width_make_no_difference(old: str, new: str) -> None:
    result = MergeAndRun(to=new).apply(network(f"{old}:depth=62,widen=2,classes=7"))
    assert structural_hash(result) == structural_hash(network(f"{new}:depth=62,widen=2,classes=7"))


@pytest.mark.parametrize(
    ("old", "new", "kept", "fresh", "dropped"),
    [
        ("half", "cross", 346_650, 2_752, 0),
        ("side", "half", 343_898, 2_752, 0),
        ("side", "cross", 343_898, 5_504, 0),
        ("cross", "side", 343_898, 0, 5_504),
        ("cross", "half", 346_650, 0, 2_752),
        ("plain", "resnet", 366_938, 2_752, 0),
        ("resnet", "plain", 366_938, 0, 2_752),
        ("fuse3", "fuse6", 392_506, 0, 0),
        ("resnet", "half", 323_418, 23_232, 46_272),
    ],
)
def test_states_go_along(old: str, new: str, kept: int, fresh: int, dropped: int) -> None:
    report = MergeAndRun(to=new).run(network(f"{old}:depth=26")).report
    assert f"{kept:,} parameters kept, {fresh:,} new, {dropped:,} dropped" in report.notes
    assert report.parameters == (kept + dropped, kept + fresh)


def test_shared_pieces_are_the_same_objects_and_new_ones_are_initialised_by_the_rule() -> None:
    old = network("half:depth=14")
    new = MergeAndRun(to="cross").apply(old)
    assert set(old.states) <= set(new.states)
    added = {s.name: s.init for s in new.states if s not in set(old.states)}
    assert added == {
        f"g{g}/b1/l2/line/{name}": init
        for g, channels in ((2, 16), (3, 32))
        for name, init in {
            "conv.weight": HeNormal(channels),
            "bn.gamma": Ones(),
            "bn.beta": Zeros(),
            "bn.running_mean": Zeros(),
            "bn.running_var": Ones(),
        }.items()
    }


def test_there_and_back_is_the_same_network_with_the_same_states() -> None:
    old = network("half:depth=26")
    back = MergeAndRun(to="half").apply(MergeAndRun(to="cross").apply(old))
    assert back.states == old.states
    assert structural_hash(back) == structural_hash(old)
    x, store = images(2, size=32), randomised(old)
    runs = [compile(g, store=store)(x=x)["logits"] for g in (old, back)]
    np.testing.assert_array_equal(*runs)


def test_locations_are_those_of_the_family() -> None:
    made, declared = (
        MergeAndRun(to="cross").apply(network("side:depth=14")),
        network("cross:depth=14"),
    )
    assert {n.path for n in made.nodes} == {n.path for n in declared.nodes}
    assert set(made.branches()) == set(declared.branches())


def test_other_residual_networks_of_two_3x3_units_can_be_crossed() -> None:
    result = MergeAndRun(to="cross").run(network("imagenet_resnet"))
    assert result.report.matches == ["imagenet_resnet18"]
    assert sum(isinstance(n.op, Mean) for n in result.graph.nodes) == 4
    assert MergeAndRun(to="resnet").run(result.graph).report.matches


def blocks(*stages: int, between: bool = False, streams: bool = False) -> Graph:
    """A plain network of the family with so many units in each stage."""
    h = MXNET.unit(image_input(Graph("units")), 4, 3, name="g0")
    for i, count in enumerate(stages):
        for k in range(count):
            stride = 2 if i and not k else 1
            h = MXNET.unit(h, 4 * 2**i, 3, stride=stride, name=f"s{i}u{k}")
            h = max_pool(h, 3, stride=1, pad=1) if between else h
    h.graph.output("logits", MXNET.head(h, 3))
    return h.graph


def read_elsewhere() -> Graph:
    graph = network("half:depth=14")
    graph.output("features", graph.find("g2/b1/relu").output)
    return graph


def two_shortcuts() -> Graph:
    h = relu(conv(image_input(Graph("two")), 4, 3, pad=1))
    body = batch_norm(conv(relu(batch_norm(conv(h, 4, 3, pad=1))), 4, 3, pad=1))
    h = relu(merge_sum(h, body, h), name="relu")
    h.graph.output("logits", dense(global_average_pool(h), 3))
    return h.graph


REFUSED = {
    "lenet": "relu does not end a unit behind the stem",
    "pd_perceptron": "no blocks of the Deep Fusion family",
    "resnet_a": "the parts that stage2/block1/shortcut belongs to start from no one value",
    "se_resnet": "the parts that pool1 belongs to start from no one value",
    "resnext": "module1/spatial/conv is no square convolution in one group",
    "repvgg": "a body of the block relu has convolutions that are not 3x3",
    "cross_imagenet": "a body of the block g2/b2/relul has convolutions that are not 3x3",
    "resnet_imagenet": "a body of the block g1/b2/relu has convolutions that are not 3x3",
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_of_other_families_are_refused(name: str) -> None:
    report = MergeAndRun(to="cross").run(network(name)).report
    assert not report.matches
    assert report.refusals[0][1].startswith(REFUSED[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_of_all_networks_those_of_two_3x3_units_are_crossed(name: str) -> None:
    graph = network(name)
    matches = MergeAndRun(to="half" if name == "cross" else "cross").run(graph).report.matches
    assert len(matches) == (name in FORMS or name == "imagenet_resnet")
    assert len(FuseMeans().run(graph).report.matches) == (name == "cross")


@pytest.mark.parametrize(
    ("graph", "to", "reason"),
    [
        (
            blocks(2, 3),
            "resnet",
            "8 channels has 3 units, which do not make blocks of 2",
        ),
        (blocks(4, 3), "fuse6", "the stage of 8 channels has 3 units, which do not make 2 equal"),
        (blocks(2, between=True), "resnet", "does not end a unit behind the stem"),
        (read_elsewhere(), "cross", "g2/b1/relu is read outside its blocks"),
        (two_shortcuts(), "cross", "the block relu has 2 shortcuts"),
    ],
)
def test_what_does_not_fit_is_refused(graph: Graph, to: str, reason: str) -> None:
    result = MergeAndRun(to=to).run(graph)
    assert not result.report.matches
    assert reason in result.report.refusals[0][1]
    assert format_graph(result.graph) == format_graph(graph)


def test_exits_between_blocks_are_refused() -> None:
    graph = InsertExits(after=("g1/b1/relu",), head="pool").apply(network("half:depth=14"))
    report = MergeAndRun().run(graph).report
    assert report.refusals == [("half", "g1/b1/relu is read outside its blocks")]


def test_forms_are_named() -> None:
    with pytest.raises(GraphError, match="unknown form 'round'; known: plain, resnet, side"):
        Pass.from_spec("merge_and_run:to=round")
    assert Pass.from_spec("merge_and_run:to=half") == MergeAndRun(to="half")


# -- means -----------------------------------------------------------------------------------------


def inputs(graph: Graph, *names: str) -> list[Value]:
    return [graph.input(name, ("N", 3)) for name in names]


def test_text_before_and_after() -> None:
    graph = Graph("mr")
    a, b, c, d = inputs(graph, "a", "b", "c", "d")
    graph.output("y", merge_mean(*merge_and_run((a, b), (c, d))))
    step = FuseMeans()
    fused = Pipeline((step,), verify=True).apply(graph)
    assert format_graph(fused).split("input d : f32[N, 3]\n")[1] == (
        "  %0 = mean(a, b) : f32[N, 3]\n"
        "  %1 = mean(c, d) : f32[N, 3]\n"
        "  %2 = sum(%0, %1) : f32[N, 3]\n"
        "  output y = %2\n"
        "}\n"
    )
    assert not step.run(fused).report.matches


@pytest.mark.parametrize("streams", [2, 3, 5])
def test_the_averaging_map_is_idempotent(streams: int) -> None:
    graph = Graph("m")
    values = inputs(graph, *"abcde"[:streams])
    for _ in range(3):
        values = [merge_mean(*values) for _ in values]
    graph.output("y", values[0])
    fused = Pipeline((FuseMeans(),), verify=True).apply(graph)
    means = [n for n in fused.nodes if isinstance(n.op, Mean)]
    assert len([n for n in means if n.output is fused.outputs["y"]]) == 1
    assert fused.outputs["y"].producer.inputs == tuple(fused.inputs.values())  # type: ignore[union-attr]
    matrix = np.kron(np.full((streams, streams), 1 / streams), np.eye(3))
    np.testing.assert_allclose(matrix @ matrix, matrix, **EXACT)


def test_means_of_means_are_flattened_where_weights_are_equal() -> None:
    graph = Graph("nested")
    a, b, c, d, e = inputs(graph, *"abcde")
    graph.output("even", merge_mean(merge_mean(a, b), merge_mean(c, d)))
    graph.output("odd", merge_mean(merge_mean(a, b), merge_mean(c, d, e)))
    result = FuseMeans().run(graph)
    assert len(result.report.matches) == 1
    assert not FuseMeans().run(result.graph).report.matches
    assert len(result.graph.outputs["even"].producer.inputs) == 4  # type: ignore[union-attr]
    assert len(result.graph.outputs["odd"].producer.inputs) == 2  # type: ignore[union-attr]
    Pipeline((FuseMeans(),), verify=True).apply(graph)


def test_a_chain_of_merge_and_run_blocks_has_one_identity_path() -> None:
    graph = merge_and_run_with_exits()
    step = FuseMeans()
    fused = Pipeline((step,), verify=True).apply(graph)
    assert len(step.run(graph).report.matches) == 2
    assert not step.run(fused).report.matches


def test_means_behind_an_activation_stay() -> None:
    assert not FuseMeans().run(network("cross:depth=20")).report.matches[1:]


@st.composite
def linear_graphs(draw: st.DrawFn) -> Graph:
    """Sums and means of a few inputs."""
    graph = Graph("linear")
    values = inputs(graph, "a", "b", "c", "d")
    for _ in range(draw(st.integers(1, 10))):
        operands = draw(st.lists(st.sampled_from(values), min_size=1, max_size=4))
        merge = draw(st.sampled_from([merge_mean, merge_mean, merge_sum]))
        values.append(merge(*operands))
    graph.output("y", values[-1])
    graph.output("z", values[-2])
    return graph


@given(linear_graphs())
@settings(max_examples=150, deadline=None)
def test_any_sums_and_means_keep_their_values(graph: Graph) -> None:
    fused = Pipeline((FuseMeans(),), verify=True).apply(graph)
    assert not FuseMeans().run(fused).report.matches
    feeds = {k: np.random.default_rng(i).normal(size=(2, 3)) for i, k in enumerate("abcd")}
    old, new = (interpret(g, feeds, {}, DType.F64).outputs for g in (graph, fused))  # type: ignore[arg-type]
    for name in ("y", "z"):
        np.testing.assert_allclose(new[name], old[name], **EXACT)
