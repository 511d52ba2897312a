"""The networks of vbranch: parameter counts, shapes, names, options (sections 2.9 and 3)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import pytest

from branchgraph.ir.cost import parameter_count
from branchgraph.ir.errors import FormatError, GraphError, ShapeError
from branchgraph.ir.graph import Graph
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.state import Role, Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.verify import verify
from branchgraph.nets.catalogue import Catalogue
from branchgraph.nets.vbranch import (
    NETWORKS,
    SharingWarning,
    cnn,
    densenet,
    densenet_bc,
    fcn,
    vbranch_resnet,
)
from tests.builders import EXACT
from tests.nets.vbranch_nets import SMALL, batch, outputs, scattered, small

CATALOGUE = Catalogue(NETWORKS)

OMNIGLOT = {"depth": 18, "channels": 1, "size": (105,)}

#: Network and options; parameters of the plain network; (shared, of each branch) at S = .25, .5,
#: .75 and 1, in the legacy layout.
COUNTS: list[tuple[Callable[..., Graph], dict, int, list[tuple[int, int]]]] = [  # type: ignore[type-arg]
    (fcn, {}, 408_074,
     [(100_994, 307_090), (202_757, 205_327), (304_903, 103_181), (408_074, 0)]),
    (fcn, {"version": "v2"}, 537_354,
     [(109_250, 428_370), (235_269, 302_351), (377_863, 159_757), (537_354, 0)]),
    (fcn, {"version": "v3"}, 671_754,
     [(117_762, 554_514), (269_061, 403_215), (453_511, 218_765), (671_754, 0)]),
    (fcn, {"version": "v4"}, 935_434,
     [(134_530, 801_938), (335_365, 601_103), (602_119, 334_349), (935_434, 0)]),
    (cnn, {}, 18_010,
     [(1_222, 16_910), (4_637, 13_495), (10_219, 7_913), (18_010, 0)]),
    (cnn, {"version": "cifar"}, 305_962,
     [(19_594, 286_922), (77_141, 229_375), (172_543, 133_973), (305_962, 0)]),
    (cnn, {"version": "large"}, 1_283_392,
     [(81_232, 1_203_504), (322_208, 962_528), (722_928, 561_808), (1_283_392, 0)]),
    (vbranch_resnet, OMNIGLOT, 11_300_416,
     [(707_184, 10_598_160), (2_820_832, 8_484_512), (6_340_944, 4_964_400), (11_267_520, 32_896)]),
    (vbranch_resnet, {}, 25_766_016,
     [(1_619_456, 24_174_080), (6_431_744, 19_361_792), (14_436_864, 11_356_672),
      (25_634_816, 131_200)]),
    (densenet, {}, 7_085_056,
     [(452_064, 6_632_992), (1_761_728, 5_323_328), (3_928_992, 3_156_064), (6_953_856, 131_200)]),
    (densenet_bc, {}, 769_162,
     [(52_499, 716_673), (198_452, 570_720), (436_725, 332_447), (769_162, 0)]),
]  # fmt: skip


def split_count(graph: Graph, branches: int = 2) -> tuple[int, ...]:
    """Parameters outside the branches, then of each branch."""
    counts = dict.fromkeys(["", *(f"branch{i + 1}" for i in range(branches))], 0)
    for state in graph.states:
        if state.role is Role.PARAMETER:
            first = state.name.partition("/")[0]
            counts[first if first in counts else ""] += prod(state.shape)
    assert sum(counts.values()) == parameter_count(graph)
    return tuple(counts.values())


@pytest.mark.parametrize(
    ("build", "options", "plain", "split"), COUNTS, ids=lambda v: getattr(v, "__name__", "")
)
def test_parameters_are_those_of_the_reference(build, options, plain, split) -> None:  # type: ignore[no-untyped-def]
    assert parameter_count(build(**options)) == plain
    assert split_count(build(branches=2, **options)) == (0, plain, plain)
    for fraction, (shared, own) in zip((0.25, 0.5, 0.75, 1.0), split):
        graph = build(branches=2, shared=(fraction,), legacy_layout=True, **options)
        assert split_count(graph) == (shared, own, own)


@pytest.mark.parametrize(
    ("depth", "published"),
    [(121, 7_978_856), (161, 28_681_000), (169, 14_149_480), (201, 20_013_928)],
)
def test_densenets_have_the_parameters_of_the_imagenet_models(depth: int, published: int) -> None:
    assert parameter_count(densenet(depth, outputs=1000)) == published


def test_the_embedding_of_2018_has_a_hidden_layer_and_may_have_three_blocks() -> None:
    plain = densenet(outputs=128)
    head = 1024 * 1024 + 3 * 1024
    assert parameter_count(densenet(outputs=128, hidden=1024)) == parameter_count(plain) + head
    three = densenet(outputs=128, blocks=3)
    assert shape_of(three, "conv4_block24_concat") == (1024, 8, 4)
    names = {s.name for s in three.states}
    assert not [n for n in names if n.startswith(("conv5", "pool4"))]


def test_parameters_of_three_branches_are_the_shared_and_three_times_the_own() -> None:
    graph = fcn(branches=3, shared=(0.25,), legacy_layout=True)
    assert split_count(graph, 3) == (100_994, 307_090, 307_090, 307_090)


def test_parameters_with_sharing_per_block_and_layer() -> None:
    with pytest.warns(SharingWarning, match=r"shares channels, but none"):
        graph = fcn(branches=2, shared=(0.0, 0.5), legacy_layout=True)
    assert split_count(graph) == (0, 408_074, 408_074)
    blocks = densenet(branches=2, shared=(0.0, 1.0, 1.0, 1.0), legacy_layout=True)
    assert parameter_count(blocks) == 7_597_440
    totals = [
        parameter_count(fcn("v3", branches=2, shared=(s, 1.0, 1.0), legacy_layout=True))
        for s in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert totals == [1_074_698, 973_962, 873_226, 772_490, 671_754]


def test_one_bias_a_half_is_the_default_and_a_bias_a_block_the_legacy_layout() -> None:
    options = {"sizes": (4,), "features": 3, "outputs": 2, "branches": 2, "shared": (0.5,)}
    biases = [
        sorted(s.name for s in fcn(legacy_layout=legacy, **options).states if "fc.bias" in s.name)
        for legacy in (False, True)
    ]
    assert biases[0] == ["branch1/fc.bias_u", "branch2/fc.bias_u", "fc.bias_s"]
    own = [f"branch{i}/fc.bias_{half}" for i in (1, 2) for half in ("su", "us", "uu")]
    assert biases[1] == [*own, "fc.bias_ss"]


# -- shapes and names ------------------------------------------------------------------------------


def shape_of(graph: Graph, name: str) -> tuple[int, ...]:
    return graph.find(name).outputs[0].shape[1:]  # type: ignore[return-value]


def test_images_shrink_as_in_tensorflow() -> None:
    resnet = vbranch_resnet(**OMNIGLOT)
    sizes = [shape_of(resnet, f"res{k}b") for k in (2, 3, 4, 5)]
    assert sizes == [(64, 105, 105), (128, 53, 53), (256, 27, 27), (512, 14, 14)]
    assert shape_of(vbranch_resnet(), "pool1") == (64, 32, 16)
    assert shape_of(cnn("large"), "pool1") == (32, 53, 53)
    assert [shape_of(densenet(), f"pool{k}_pool") for k in (2, 3, 4)] == [
        (128, 16, 8), (256, 8, 4), (512, 4, 2)]  # fmt: skip
    assert shape_of(densenet_bc(), "conv4_block16_concat") == (342, 8, 8)


KERAS_NAMES = {
    "vbranch_resnet50": ["conv1.bias", "bn_conv1.beta", "res2a_branch1.weight",
                         "bn5c_branch2c.gamma", "res4f_branch2b.weight"],
    "vbranch_resnet101": ["res4a_branch1.weight", "res4b22_branch2a.weight",
                          "res3b3_branch2c.bias", "res5c_branch2a.weight"],
    "densenet121": ["conv1/conv.weight", "conv1/bn.gamma", "conv2_block1_0_bn.beta",
                    "conv5_block16_2_conv.weight", "pool4_conv.weight", "bn.gamma"],
}  # fmt: skip


@pytest.mark.parametrize("name", KERAS_NAMES)
def test_states_are_named_as_in_keras(name: str) -> None:
    states = CATALOGUE.network(name).states
    known = {s.name for s in states}
    assert known.issuperset(KERAS_NAMES[name])
    assert len(known) == len(states)


def test_one_branch_has_nothing_of_branching_whatever_is_shared() -> None:
    plain, one = small("fcn"), small("fcn", branches=1, shared=(0.5,), legacy_layout=True)
    assert structural_hash(plain) == structural_hash(one)
    assert list(plain.outputs) == ["logits"]
    assert {n.op.opcode for n in plain.nodes} == {"dense", "batch_norm", "relu"}
    assert not plain.branches()


def test_blocks_are_drawn_with_the_fans_of_the_whole_layer() -> None:
    def inits(**options: object) -> list[str]:
        graph = small("cnn", branches=2, shared=(0.5,), **options)
        states = {s.name: s for s in graph.states}
        layer = ("conv_2_1.weight_ss", "branch1/conv_2_1.weight_us", "branch2/conv_2_1.weight_uu")
        return [str(states[name].init) for name in layer]

    assert inits() == ["HeNormal(fan=54, scale=1.0)"] * 3
    glorot = "GlorotUniform(fan_in=54, fan_out=81, scale=1.0)"
    assert inits(init="glorot_uniform") == [glorot] * 3


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("branches", [1, 2])
def test_every_network_verifies_and_its_text_parses_back(name: str, branches: int) -> None:
    graph = small(name, branches=branches, shared=(0.5,))
    verify(graph)
    assert structural_hash(parse_graph(format_graph(graph))) == structural_hash(graph)
    assert CATALOGUE[name].summary
    assert CATALOGUE[name].family == "vbranch"


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("fcn:version=v2,branches=3,shared=0.25",
         lambda: fcn("v2", branches=3, shared=(0.25,))),
        ("fcn:sizes=64+32,shared=1+0.5+0,branches=2,inputs=each",
         lambda: fcn(sizes=(64, 32), shared=(1, 0.5, 0), branches=2, inputs="each")),
        ("cnn:stages=8+16,stem=true,size=16+12,channels=3,outputs=5,merge=mean,branches=2",
         lambda: cnn(stages=(8, 16), stem=True, size=(16, 12), channels=3, outputs=5, merge="mean",
                     branches=2)),
        ("vbranch_resnet34:size=32,shared=0.5,shared_head=0.25,branches=2",
         lambda: vbranch_resnet(34, size=(32,), shared=(0.5,), shared_head=0.25, branches=2)),
        ("densenet169:size=32,batch_stats=true",
         lambda: densenet(169, size=(32,), batch_stats=True)),
        ("densenet161:size=32,hidden=16,blocks=3,shared=1+0.5+1,branches=2",
         lambda: densenet(161, size=(32,), hidden=16, blocks=3, shared=(1, 0.5, 1), branches=2)),
        ("densenet_bc:depth=22,growth=4,shared=1+0.5+1,branches=2,legacy_layout=true",
         lambda: densenet_bc(22, 4, shared=(1, 0.5, 1), branches=2, legacy_layout=True)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_specification_strings_reach_every_option(spec: str, same) -> None:  # type: ignore[no-untyped-def]
    assert structural_hash(CATALOGUE.network(spec)) == structural_hash(same())


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("fcn:version=v5", GraphError, "fcn: version 'v5' is none of v1, v2, v3, v4"),
        ("fcn:branches=0", GraphError, "branches: expected at least 1, got 0"),
        ("fcn:shared=1.5", GraphError, "a share of 1.5 of"),
        (
            "fcn:shared=0.5+0.5+0.5",
            GraphError,
            "one number for all or 2 .one a dense layer., got 3",
        ),
        ("fcn:inputs=none", GraphError, "inputs 'none' is none of one, each"),
        ("fcn:merge=max", GraphError, "merge 'max' is none of none, sum, mean, concat"),
        ("fcn:init=zeros", GraphError, "init 'zeros' is none of he_normal, glorot_uniform"),
        ("fcn:features=0", GraphError, "number of channels"),
        ("fcn:sizes=0", GraphError, "at least one channel, got 0"),
        ("fcn:depth=3", FormatError, "no option 'depth'; it has: version, sizes"),
        ("cnn:version=tiny", GraphError, "cnn: version 'tiny' is none of small, cifar, large"),
        ("cnn:layers=0", GraphError, "layers is at least 1"),
        ("cnn:size=1+2+3", GraphError, "SIDE or HEIGHT.WIDTH"),
        ("vbranch_resnet:depth=20", GraphError, "depth 20 is none of 18, 34, 50, 101, 152"),
        ("densenet100", GraphError, "depth 100 is none of 121, 161, 169, 201"),
        ("densenet:size=8", ShapeError, "pool3_pool: window 2 exceeds"),
        ("densenet:shared=0.5+0.5", GraphError, "or 4 .one a dense block., got 2"),
        ("densenet:blocks=5", GraphError, "1 to 4 blocks and hidden units from 0, got 5 and 0"),
        ("densenet:hidden=-1", GraphError, "got 4 and -1"),
        ("densenet_bc:depth=9", GraphError, "depth >= 10"),
    ],
)
def test_options_that_cannot_be_built_say_what_can(spec, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        CATALOGUE.network(spec)


# -- inputs, outputs, modes ------------------------------------------------------------------------


def test_branches_read_one_input_or_one_each() -> None:
    one, each = (small("fcn", branches=3, inputs=i) for i in ("one", "each"))
    assert (list(one.inputs), list(each.inputs)) == (["x"], ["x1", "x2", "x3"])
    assert list(one.outputs) == list(each.outputs) == ["branch1", "branch2", "branch3"]
    assert list(one.branches()) == ["branch1", "branch2", "branch3"]


@pytest.mark.parametrize(
    ("merge", "merged"),
    [("sum", lambda b: sum(b)), ("mean", lambda b: sum(b) / 3), ("concat", np.hstack)],
)
def test_a_merge_joins_the_branches(merge: str, merged) -> None:  # type: ignore[no-untyped-def]
    apart, joined = (small("fcn", branches=3, shared=(0.5,), merge=m) for m in ("none", merge))
    store = scattered(apart)
    branches = list(outputs(apart, store, x=batch("fcn")).values())
    moved = by_name(joined, {s.name: store[s] for s in apart.states})
    got = outputs(joined, moved, x=batch("fcn"))
    assert list(got) == ["logits"]
    np.testing.assert_allclose(got["logits"], merged(branches), **EXACT)


def by_name(graph: Graph, values: dict[str, np.ndarray]) -> Store:
    return Store({s: values[s.name] for s in graph.states})


def test_batch_statistics_serve_inference_too() -> None:
    graph = small("cnn", branches=2, shared=(0.5,), batch_stats=True)
    store, x = scattered(graph), batch("cnn")
    assert not [s for s in graph.states if s.role is Role.STATISTIC]
    training = outputs(graph, store, training=True, x=x)
    for name, value in outputs(graph, store, x=x).items():
        np.testing.assert_array_equal(value, training[name])


def test_every_branch_has_its_own_running_statistics() -> None:
    graph = small("fcn", branches=2, shared=(1.0,))
    own = [s for s in graph.states if s.role is Role.STATISTIC]
    assert sorted(s.name for s in own) == sorted(
        f"branch{i}/bn_fc{k}.running_{what}"
        for i in (1, 2) for k in (1, 2) for what in ("mean", "var")
    )  # fmt: skip
