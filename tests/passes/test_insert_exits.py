"""Exits go in by name, come out again, and change nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from builders import images, random_graphs, randomised
from gated_nets import norm_of_two
from hypothesis import given, settings

from branchgraph.compiler import compile
from branchgraph.ir.builder import conv, dense, exit, global_average_pool, relu
from branchgraph.ir.errors import FormatError, GraphError, RefusalError
from branchgraph.ir.graph import Graph
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.state import Store
from branchgraph.ir.text import format_graph
from branchgraph.nets import NETWORKS, b_lenet, lenet, network
from branchgraph.passes.base import Pass
from branchgraph.passes.insert_exits import HEADS, InsertExits, RemoveExits
from branchgraph.passes.insert_exits.trunk import Trunk
from branchgraph.passes.lower_exits import exits_of
from branchgraph.passes.specialise import specialise
from branchgraph.training.loss import joint_loss


def three_layers() -> Graph:
    graph = Graph("three")
    h = graph.input("x", ("N", 3, 6, 6))
    for k in (1, 2, 3):
        h = relu(conv(h, 4, 3, pad=1, name=f"conv{k}"), name=f"relu{k}")
    graph.output("logits", dense(global_average_pool(h), 5, name="fc"))
    return graph


def test_inserting_an_exit_into_lenet_gives_the_declared_b_lenet() -> None:
    inserted = Pass.from_spec("insert_exits:after=conv1").apply(lenet())
    assert structural_hash(inserted) == structural_hash(b_lenet())
    assert {s.name for s in inserted.states} == {s.name for s in b_lenet().states}


def test_removing_exits_gives_the_network_back() -> None:
    assert structural_hash(RemoveExits().apply(b_lenet())) == structural_hash(lenet())
    assert list(RemoveExits().apply(b_lenet()).inputs) == ["x"]


@pytest.mark.parametrize("head", HEADS)
def test_exits_stand_in_the_order_of_the_network_whatever_the_order_of_names(head: str) -> None:
    graph = InsertExits(after=("relu2", "relu1"), head=head).apply(three_layers())
    exits = exits_of(graph)
    assert [n.op.name for n in exits] == ["exit1", "exit2", "exit3"]  # type: ignore[attr-defined]
    assert list(graph.outputs) == ["exit1", "exit2", "exit3"]
    assert list(graph.branches()) == ["exit1", "exit2"]
    run = compile(graph, store=randomised(graph))
    assert set(run(x=images(8), **{"exit1.threshold": 10.0})["exit"]) == {0}


def test_trained_parameters_and_initial_values_of_the_trunk_stay() -> None:
    plain = three_layers()
    inserted = InsertExits(after=("conv1",)).apply(plain)
    assert set(plain.states) <= set(inserted.states)
    one, other = Store.initialised(plain.states, 3), Store.initialised(inserted.states, 3)
    for state in plain.states:
        np.testing.assert_array_equal(one[state], other[state])


def test_a_second_application_reports_zero_matches_and_why() -> None:
    step = InsertExits(after=("relu1",))
    again = step.run(step.apply(three_layers()))
    assert not again.report.matches
    assert again.report.refusals == [("relu1", "it has an exit already")]


def test_a_later_pass_may_add_another_exit() -> None:
    graph = InsertExits(after=("relu1",), head="pool").apply(three_layers())
    both = InsertExits(after=("relu2",), head="pool").apply(graph)
    names = [n.op.name for n in exits_of(both)]  # type: ignore[attr-defined]
    assert sorted(names[:-1]) == ["exit1", "exit3"]
    assert len(exits_of(both)[-1].inputs) == 1


def test_patience_reads_the_exits_before() -> None:
    step = InsertExits(after=("relu1", "relu2"), head="pool", criterion="patience", threshold=2.0)
    graph = step.apply(three_layers())
    assert [len(n.inputs) for n in exits_of(graph)] == [2, 3, 1]


def test_the_report_counts_parameters_and_macs() -> None:
    report = Pass.from_spec("insert_exits:after=conv1").run(lenet()).report
    assert report.parameters == (67_824, 74_694)
    assert report.macs == (1_140_070, 1_247_720)
    assert "1 matched, 0 refused" in str(report)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("insert_exits:after=conv9", GraphError, "no node 'conv9'.*conv1, conv2, conv3"),
        ("insert_exits:after=conv1,head=round", GraphError, "unknown head 'round'; known: conv"),
        ("insert_exits:after=conv1,criterion=luck", GraphError, "known: entropy"),
        ("insert_exits", FormatError, "after"),
        ("insert_exits:after=conv1,convs=-1", GraphError, "head conv needs at least 0; convs=-1"),
        ("insert_exits:after=conv1,head=pool,convs=1", GraphError, "has no convolutions"),
        ("insert_exits:after=conv1,head=resnet,width=8", GraphError, "chooses no width"),
        ("insert_exits:after=conv1,width=0", GraphError, "at least 1 channel"),
        ("insert_exits:at=1.5", GraphError, "between 0 and 1"),
        ("insert_exits:at=0.01", GraphError, "the first is conv1, at 0.0987"),
        ("insert_exits:after=con?9", GraphError, "no node matches 'con\\?9'; there are: conv1"),
        ("insert_exits:after=conv1,weights=1+1+1", RefusalError, "3 loss weights for 1 exits"),
        ("insert_exits:after=[a]", FormatError, "expected KEY=VALUE"),
        ("insert_exits:after=conv1,depth=3", FormatError, "no option 'depth'; it has: after"),
        ("insert_exits:after=conv1,threshold=low", FormatError, "expected float, got 'low'"),
        ("insert_exits:after", FormatError, "expected KEY=VALUE"),
        ("fuse", FormatError, "unknown pass 'fuse'; known: "),
        ("a b", FormatError, "expected NAME"),
    ],
)
def test_specs_that_cannot_be_followed_say_what_can(spec, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        Pass.from_spec(spec).apply(lenet())


@pytest.mark.parametrize(
    "spec",
    [
        "insert_exits:after=conv1+conv2,criterion=margin",
        "insert_exits:after=stage*/block?/relu,head=alexnet,convs=3,width=16",
        "insert_exits:at=0.25+0.5,weights=0.5+1.0",
        "remove_exits:names=exit1",
        "move_exit:exit=exit1,to=conv2",
        "dead_code",
    ],
)
def test_specs_print_back(spec: str) -> None:
    step = Pass.from_spec(spec)
    assert Pass.from_spec(step.name) == step
    assert step.name.startswith(spec.partition(",")[0].partition(":")[0])


def test_outputs_that_are_no_logits_are_refused() -> None:
    graph = Graph("features")
    graph.output("y", relu(conv(graph.input("x", ("N", 3, 6, 6)), 4, 3, name="conv1")))
    with pytest.raises(RefusalError, match="logits must be"):
        InsertExits(after=("conv1",)).apply(graph)
    two = three_layers()
    two.output("more", two.find("fc").output)
    with pytest.raises(RefusalError, match="needs one output"):
        InsertExits(after=("conv1",)).apply(two)


# -- places ----------------------------------------------------------------------------------------


def test_patterns_match_paths_part_by_part_and_names() -> None:
    step = Pass.from_spec("insert_exits:after=stage*/block2/relu,head=pool")
    result = step.run(network("resnet_a"))
    assert result.report.matches == [f"stage{k}/block2/relu" for k in (1, 2, 3)]
    assert list(result.graph.outputs) == ["exit1", "exit2", "exit3", "exit4"]
    assert Pass.from_spec("insert_exits:after=relu?,head=pool").run(three_layers()).report.matches
    assert not step.run(result.graph).report.matches


@pytest.mark.parametrize(
    ("share", "place"), [(0.2, "relu"), (0.45, "relu"), (0.95, "relu"), (0.9999, "fc1")]
)
def test_a_share_of_the_macs_is_the_last_value_every_sample_passes(
    share: float, place: str
) -> None:
    graph = lenet()
    trunk = Trunk(graph, graph.outputs["logits"])
    node = trunk.at(share, lambda v: len(v.shape) == 4 or place == "fc1")
    assert node.output.label == place
    assert trunk.share(node) <= share
    head = "dense" if place == "fc1" else "conv"
    report = InsertExits(at=(share,), head=head).run(graph).report
    assert report.matches == [place]
    assert f"at={share:g}: behind {place}, the last value every sample passes" in str(report)


def test_no_exit_by_share_stands_inside_a_branch() -> None:
    graph = network("resnet_a")
    trunk = Trunk(graph, graph.outputs["logits"])
    places = {p.node.path for p in trunk.passages()}
    assert "stage1/block1/relu" in places
    assert not any("body" in p or "shortcut" in p for p in places)
    result = InsertExits(at=(0.25, 0.5, 0.75), head="pool").run(graph)
    assert result.report.matches == [
        "stage1/block2/relu", "stage2/block1/relu", "stage2/block3/relu",
    ]  # fmt: skip
    assert not InsertExits(at=(0.25, 0.5, 0.75), head="pool").run(result.graph).report.matches


#: How many exits go in at 30 % and 60 % of the MACs, in networks of every family.
SHARED = {
    "lenet": 2, "b_lenet": 2, "alexnet": 2, "b_alexnet": 2, "resnet_a": 2, "b_resnet": 2, "cnn": 2,
    "vbranch_resnet": 2, "densenet": 2, "densenet_bc": 2, "imagenet_resnet": 2, "pd_a_resnet": 2,
    "pd_b_resnet": 2, "ac_resnet": 2, "se_resnet": 2, "ge_resnet": 2, "cbam_resnet": 2, "plain": 2,
    "resnet": 2, "half": 2, "side": 2, "cross": 1, "fuse3": 2, "fuse6": 2, "cross_imagenet": 1,
    "resnet_imagenet": 2, "resnext": 2, "masked_resnext": 1, "masked_resnet": 1,
    "branch_connect": 1, "repvgg": 2, "dbb_resnet": 2,
}  # fmt: skip
NOWHERE = {
    "fcn": "there is none",
    "pd_perceptron": "there is none",
    "ensemble": "needs one output, the logits",
    "inception_v3": "needs one output, the logits; there are: auxiliary, logits",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_family_take_exits_by_share(name: str) -> None:
    step = InsertExits(at=(0.3, 0.6), head="pool")
    if name in NOWHERE:
        with pytest.raises(GraphError, match=NOWHERE[name]):
            step.apply(network(name))
        return
    result = step.run(network(name))
    assert len(result.report.matches) == SHARED[name]
    assert not step.run(result.graph).report.matches


@given(random_graphs())
@settings(max_examples=40, deadline=None)
def test_passages_are_the_values_without_which_no_input_reaches_the_output(graph: Graph) -> None:
    way_out = graph.outputs["logits"]
    trunk = Trunk(graph, way_out)
    expected = set()
    for node in trunk.nodes[:-1]:
        if trunk.carries(node.output) and not _reaches(graph, way_out, without=node):
            expected.add(node)
    assert {p.node for p in trunk.passages()} == expected


def _reaches(graph: Graph, value, without) -> bool:  # type: ignore[no-untyped-def]
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current is graph.inputs["x"]:
            return True
        if current.producer not in (None, without) and current not in seen:
            seen.add(current)
            pending += current.producer.inputs
    return False


@pytest.mark.parametrize(
    ("after", "head", "reason"),
    [
        ("fc1", "conv", "the head needs [N, C, spatial...], got f32[N, 84]"),
        ("fc1", "pool", "the head needs [N, C, spatial...]"),
    ],
)
def test_taps_that_a_head_cannot_read_are_refused(after: str, head: str, reason: str) -> None:
    report = InsertExits(after=(after,), head=head).run(lenet()).report
    assert not report.matches
    assert report.refusals[0][0] == after
    assert report.refusals[0][1].startswith(reason)


def test_what_is_not_on_the_way_is_refused() -> None:
    graph = three_layers()
    graph.emit(graph.find("relu1").op, graph.find("relu1").output, name="aside")
    report = InsertExits(after=("aside",), head="pool").run(graph).report
    assert report.refusals == [("aside", "it stands behind the last result")]


# -- heads -----------------------------------------------------------------------------------------


def test_heads_make_the_published_networks() -> None:
    two = Pass.from_spec("insert_exits:after=conv2,head=alexnet,threshold=0.05")
    one = Pass.from_spec("insert_exits:after=conv3,head=alexnet,convs=1,threshold=0.05")
    alexnet = one.apply(two.apply(network("alexnet")))
    assert structural_hash(alexnet) == structural_hash(network("b_alexnet"))
    block = Pass.from_spec("insert_exits:after=stage1/block3/relu,head=resnet,threshold=0.3")
    plain = Pass.from_spec("insert_exits:after=stage2/block3/relu,head=convs,threshold=0.3")
    resnet = plain.apply(block.apply(network("resnet_a")))
    assert structural_hash(resnet) == structural_hash(network("b_resnet"))


@pytest.mark.parametrize("convs", [0, 1, 3, 4])
def test_the_branch_of_alexnet_has_any_depth(convs: int) -> None:
    step = InsertExits(after=("conv2",), head="alexnet", convs=convs)
    before, after = step.run(network("alexnet")).report.parameters
    assert after - before == {0: 10_250, 1: 23_594, 3: 42_090, 4: 51_338}[convs]


@pytest.mark.parametrize(
    ("net", "spec", "cost"),
    [
        ("lenet", "after=conv1", "6,870 parameters, 107,650 MACs"),
        ("alexnet", "after=conv2,head=alexnet", "32,842 parameters, 1,774,592 MACs"),
        ("alexnet", "after=conv3,head=alexnet,convs=1", "28,970 parameters, 443,648 MACs"),
        ("resnet_a", "after=stage1/block3/relu,head=resnet", "168,554 parameters, 4,882,432 MACs"),
        ("resnet_a", "after=stage2/block3/relu,head=convs", "91,178 parameters, 2,441,216 MACs"),
    ],
)
def test_the_report_says_what_a_head_costs(net: str, spec: str, cost: str) -> None:
    assert cost in str(Pass.from_spec(f"insert_exits:{spec}").run(network(net)).report)


def test_the_width_of_a_head_is_an_option() -> None:
    graph = InsertExits(after=("relu1",), width=7, convs=2).apply(three_layers())
    assert graph.find("exit1/conv").inputs[1].shape == (7, 4, 3, 3)
    assert graph.find("exit1/conv_1").inputs[1].shape == (7, 7, 3, 3)


# -- loss weights ----------------------------------------------------------------------------------


def test_loss_weights_are_defaults_of_inputs_that_the_joint_loss_reads() -> None:
    step = InsertExits(after=("relu1", "relu2"), head="pool", weights=(0.25, 0.5, 2.0))
    graph = step.apply(three_layers())
    loss = joint_loss(specialise(graph, training=True, exits="all"))
    assert {k: v.default for k, v in loss.inputs.items() if k.endswith("weight")} == {
        "exit1.weight": 0.25, "exit2.weight": 0.5, "exit3.weight": 2.0,
    }  # fmt: skip
    labels = np.arange(8) % 5
    run = compile(loss, store=randomised(loss))(x=images(8), labels=labels)
    weighted = sum(w * run[f"exit{k}.loss"] for k, w in ((1, 0.25), (2, 0.5), (3, 2.0)))
    np.testing.assert_allclose(run["loss"], weighted, rtol=1e-6)


def test_the_last_exit_may_be_left_without_a_weight_and_no_weight_stays_behind() -> None:
    graph = InsertExits(after=("relu1",), head="pool", weights=(0.25,)).apply(three_layers())
    assert "exit2.weight" not in graph.inputs
    assert set(compile(graph, store=randomised(graph))(x=images(4))) == {"logits", "exit"}
    assert list(RemoveExits().apply(graph).inputs) == ["x"]


def test_a_weight_that_is_no_number_is_refused() -> None:
    graph = three_layers()
    graph.input("logits.weight", ("N", 5))
    with pytest.raises(GraphError, match="weight must be one number"):
        joint_loss(graph)


# -- removing some ---------------------------------------------------------------------------------


def test_exits_are_removed_by_name() -> None:
    step = InsertExits(after=("relu1", "relu2"), head="pool", criterion="patience")
    graph = step.apply(three_layers())
    left = RemoveExits(names=("exit1",)).run(graph)
    assert left.report.matches == ["exit1/exit1"]
    assert list(left.graph.outputs) == ["exit2", "exit3"]
    assert list(left.graph.inputs) == ["x", "exit2.threshold"]
    assert [len(n.inputs) for n in exits_of(left.graph)] == [2, 1]
    again = RemoveExits(names=("exit1",)).run(left.graph)
    assert not again.report.matches
    assert again.report.refusals == [("exit1", "no early exit; there are: exit2")]
    none = RemoveExits(names=("exit1", "exit2")).apply(graph)
    assert structural_hash(none) == structural_hash(three_layers())


def test_text_before_and_after() -> None:
    graph = Graph("tiny")
    h = relu(graph.input("x", ("N", 3, 2, 2)), name="relu1")
    graph.output("logits", dense(global_average_pool(h), 2, name="fc"))
    text = format_graph(InsertExits(after=("relu1",), head="pool").apply(graph))
    assert text == TINY
    assert format_graph(RemoveExits().apply(InsertExits(after=("relu1",)).apply(graph))) == (
        format_graph(graph)
    )


TINY = """\
graph tiny {
  state exit1/fc.weight : f32[2, 3] param init=lecun_normal(fan_in=3, scale=1.0)
  state exit1/fc.bias : f32[2] param init=zeros()
  state fc.weight : f32[2, 3] param init=lecun_normal(fan_in=3, scale=1.0)
  state fc.bias : f32[2] param init=zeros()
  input x : f32[N, 3, 2, 2]
  input exit1.threshold : f64[] = 0.5
  %0 = relu(x) : f32[N, 3, 2, 2]  # relu1
  branch exit1 {
    %1 = reduce_mean(%0) {axes=[2, 3], keepdims=false} : f32[N, 3]
    %2 = dense(%1, exit1/fc.weight, exit1/fc.bias) : f32[N, 2]  # fc
    %3 = exit(%2, exit1.threshold) {name="exit1", criterion="entropy"} : f32[N, 2]  # exit1
  }
  %4 = reduce_mean(%0) {axes=[2, 3], keepdims=false} : f32[N, 3]
  %5 = dense(%4, fc.weight, fc.bias) : f32[N, 2]  # fc
  %6 = exit(%5) {name="exit2", criterion="entropy"} : f32[N, 2]  # exit2
  output exit1 = %3
  output exit2 = %6
}
"""


# -- found by random pipelines ---------------------------------------------------------------------


def test_an_exit_that_something_reads_is_removed_and_its_logits_are_read() -> None:
    graph = InsertExits(after=("relu1",), head="pool").apply(three_layers())
    graph.output("read", relu(graph.outputs["exit1"]))
    for step in (RemoveExits(("exit1",)), RemoveExits()):
        removed = step.apply(graph)
        assert not [n for n in removed.nodes if n.op.opcode == "exit" and len(n.inputs) > 1]
        assert "read" in removed.outputs
        assert not step.run(removed).report.matches


def test_naming_an_exit_that_is_not_there_leaves_the_last_one() -> None:
    graph = RemoveExits(("exit1",)).apply(InsertExits(after=("relu1",)).apply(three_layers()))
    result = RemoveExits(("exit9",)).run(graph)
    assert not result.report.matches
    assert format_graph(result.graph) == format_graph(graph)


def test_no_exit_stands_behind_the_last_one() -> None:
    graph = InsertExits(after=("relu1",), head="pool").apply(three_layers())
    report = InsertExits(after=("exit2",), head="dense").run(graph).report
    assert report.refusals == [("exit2", "it stands behind the last result")]


def test_a_head_goes_although_it_moves_statistics_of_the_trunk() -> None:
    graph = Graph("shared norm")
    x = graph.input("x", ("N", 4))
    y, again = norm_of_two(graph, x, relu(x))
    exit(dense(again, 3, name="early"), "exit1")
    exit(dense(y, 3, name="late"), "exit2", last=True)
    removed = RemoveExits().apply(graph)
    assert [n.op.opcode for n in removed.nodes] == ["batch_norm", "dense"]
