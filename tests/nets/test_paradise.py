"""ParaDise's networks: published parameters and MACs, features, branch subsets, names, options."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import pytest

from branchgraph.compiler import compile
from branchgraph.ir.cost import SampleCost, cost, node_macs, parameter_count
from branchgraph.ir.errors import FormatError, GraphError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.ir.verify import verify
from branchgraph.nets.catalogue import Catalogue
from branchgraph.nets.imagenet_resnet import resnet
from branchgraph.nets.paradise import NETWORKS, exchange_name
from branchgraph.nets.paradise_blocks import BRANCHES, pd_a
from branchgraph.nets.units import PYTORCH
from branchgraph.passes.specialise import specialise
from branchgraph.training.loss import joint_loss

CATALOGUE = Catalogue(NETWORKS)
DEPTHS = (18, 34, 50, 101, 152)


def exchange_names(graph: Graph) -> dict[State, str]:
    return {s: exchange_name(s) for s in graph.states}


@cache
def network(spec: str) -> Graph:
    return CATALOGUE.network(spec)


def fused(depth: int) -> Graph:
    """PD-A deployed: a biased convolution without batch norm in place of every PD block."""

    def unit(x: Value, filters: int, stride: int, name: str) -> Value:
        return PYTORCH.conv(x, filters, 3, stride=stride, bias=True, name=name)

    return resnet("fused", depth, 1000, 224, 64, False, unit)


def paradise_cost(graph: Graph) -> SampleCost:
    return cost(graph, "paradise").per_sample()


def cost_of(node) -> int:  # type: ignore[no-untyped-def]
    size = node_macs(node, "paradise")
    return size if isinstance(size, int) else int(size.substitute({"N": 1}))


# -- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "parameters", "macs"),
    [
        (18, 11_685_672, 1_820_671_488),
        (34, None, 3_672_868_352),
        (50, 25_553_256, 4_120_544_256),
    ],
)
def test_a_deployed_network_costs_what_is_published(
    depth: int, parameters: int | None, macs: int
) -> None:
    counted = paradise_cost(fused(depth))
    assert counted.macs == macs
    assert parameters is None or counted.parameters == parameters


@pytest.mark.parametrize(
    ("depth", "parameters"),
    list(zip(DEPTHS, (11_684_712, 21_789_160, 25_530_472, 44_496_488, 60_117_096))),
)
def test_without_batch_norm_the_published_parameters_are_left(depth: int, parameters: int) -> None:
    graph = network(f"imagenet_resnet{depth}")
    scales = sum(n.inputs[1].type.size for n in graph.nodes if n.op.opcode == "batch_norm")
    assert parameter_count(graph) - scales == parameters


#: Depth to the 3x3 convolutions, their weights and GMACs, gate parameters at reductions 16 and 4.
SQUARE = {
    18: (16, 10_985_472, 1.676, 72_036, 287_952),
    34: (32, 21_086_208, 3.526, 143_404, 573_232),
    50: (16, 11_317_248, 1.850, 79_836, 319_152),
    101: (33, 21_344_256, 3.815, 150_896, 603_188),
    152: (50, 29_601_792, 5.780, 209_508, 837_432),
}


@pytest.mark.parametrize("depth", DEPTHS)
def test_square_convolutions_and_gates_are_as_many_as_published(depth: int) -> None:
    count, weights, gmacs, by_16, by_4 = SQUARE[depth]
    plain = network(f"imagenet_resnet{depth}")
    square = [n for n in plain.nodes if isinstance(n.op, Conv) and n.inputs[1].shape[2:] == (3, 3)]
    assert len(square) == count
    assert sum(n.inputs[1].type.size for n in square) == weights
    assert round(sum(cost_of(n) for n in square) / 1e9, 3) == gmacs
    ungated = parameter_count(network(f"pd_a_resnet{depth}"))
    assert parameter_count(network(f"pd_b_resnet{depth}")) - ungated == by_16
    assert parameter_count(network(f"pd_b_resnet{depth}:reduction=4")) - ungated == by_4


@pytest.mark.parametrize(
    ("depth", "dense", "sparse"),
    [(18, 43.9, 28.2), (34, 84.3, 54.2), (50, 45.3, 29.1), (101, 85.4, 54.9), (152, 118.4, 76.1)],
)
def test_mixing_the_kernels_of_pd_b_costs_what_is_published(
    depth: int, dense: float, sparse: float
) -> None:
    """Millions of MACs an image: four dense kernels, or only the taps that branches have."""
    weights = SQUARE[depth][1]
    convs = [n for n in network(f"pd_b_resnet{depth}").nodes if isinstance(n.op, Conv)]
    inside = [n for n in convs if any(f"/{b}/" in n.path for b in BRANCHES)]
    taps = sum(n.inputs[1].type.size for n in inside)
    # The two kernels of the skeleton share their centre and their weight.
    assert round((taps - weights / 9) / 1e6, 1) == sparse
    assert round(len(BRANCHES) * weights / 1e6, 1) == dense


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_761_548), (50, 25_636_868)])
def test_published_pd_b_counts_are_a_plain_network_and_its_gates(
    depth: int, parameters: int
) -> None:
    assert parameter_count(network(f"imagenet_resnet{depth}")) + SQUARE[depth][3] == parameters


@pytest.mark.parametrize(
    ("channels", "filters", "group"),
    [(64, 64, (1, 1)), (64, 128, (2, 1)), (128, 128, (2, 2)), (512, 512, (8, 8))],
)
def test_weights_of_a_block_are_as_many_as_published(
    channels: int, filters: int, group: tuple[int, int]
) -> None:
    graph = Graph("block")
    graph.output("y", pd_a(graph.input("x", ("N", channels, 8, 8)), filters, name="block"))
    of_group = graph.find("block/group/conv").inputs[1].shape
    assert of_group == (filters, channels // 64, 3, 3)
    assert (filters // 64, channels // 64) == group
    weights = filters * channels * (9 + 9 + 6) + filters * channels * 9 // 64
    assert parameter_count(graph) == weights + 5 * 2 * filters


# -- branch subsets --------------------------------------------------------------------------------

#: Parameters that a branch adds to ResNet-18: kernels beside 10 985 472 weights, gamma and beta.
BRANCH_PARAMETERS = {
    "standard1": 0,
    "standard2": 10_985_472 + 7_680,
    "group": 10_985_472 // 64 + 7_680,
    "skeleton": 10_985_472 * 6 // 9 + 2 * 7_680,
}

#: The rows of the ablation.
SUBSETS = (
    "standard1",
    "standard1+standard2",
    "standard1+group",
    "standard1+skeleton",
    "standard1+group+skeleton",
    "standard1+standard2+group+skeleton",
)


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_subset_of_branches_has_just_their_parameters(subset: str) -> None:
    graph = network(f"pd_a_resnet18:branches={subset}")
    added = sum(BRANCH_PARAMETERS[b] for b in subset.split("+"))
    assert parameter_count(graph) == 11_689_512 + added
    gated = network(f"pd_b_resnet18:branches={subset}")
    ways = gated.find("layer1/0/body/conv1/gate/softmax").output.shape[1]
    assert ways == len(subset.split("+"))


def test_an_ac_network_is_pd_a_with_one_square_branch_and_the_skeleton() -> None:
    subset = network("pd_a_resnet18:branches=standard1+skeleton")
    assert structural_hash(network("ac_resnet18")) == structural_hash(subset)


# -- structure -------------------------------------------------------------------------------------

RESNETS = [n for n in CATALOGUE if n.endswith("resnet")]

#: Small networks, one of each kind.
SMALL = {
    "imagenet_resnet50": "size=32,width=8,classes=5",
    "pd_a_resnet18": "size=32,width=8,groups=8,classes=5",
    "pd_b_resnet18": "size=32,width=8,groups=4,reduction=4,classes=5",
    "pd_b_resnet50": "size=32,width=8,groups=4,reduction=4,classes=5",
    "se_resnet18": "size=32,width=16,classes=5",
    "ge_resnet18": "size=64,width=16,extent=4,mlp=true,classes=5",
    "ge_resnet50": "size=64,width=8,extent=2,parameters=false,classes=5",
    "cbam_resnet18": "size=32,width=16,classes=5",
    "pd_perceptron": "form=pd_b,size=8,classes=5",
}


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize(("depth", "expansion"), [(18, 1), (50, 4)])
def test_features_of_detectors_have_strides_4_to_32(name: str, depth: int, expansion: int) -> None:
    outputs = network(f"{name}{depth}:features=true").outputs
    assert {k: str(v.type) for k, v in outputs.items()} == {
        f"c{stage}": f"f32[N, {64 * expansion * 2**k}, {size}, {size}]"
        for k, (stage, size) in enumerate([(2, 56), (3, 28), (4, 14), (5, 7)])
    }


@pytest.mark.parametrize(
    "spec",
    [
        *CATALOGUE,
        "pd_a_resnet50",
        "ge_resnet50:features=true",
        "imagenet_resnet152",
        "pd_b_resnet50",
    ]
    + [f"{k}:{v}" for k, v in SMALL.items()],
)
def test_every_network_verifies_and_its_text_parses_back(spec: str) -> None:
    graph = network(spec)
    verify(graph)
    parsed = parse_graph(format_graph(graph))
    assert structural_hash(parsed) == structural_hash(graph)
    assert parameter_count(parsed) == parameter_count(graph)
    assert all(n.summary for n in CATALOGUE.values())


def test_the_deepest_network_is_declared_in_about_a_second() -> None:
    start = time.process_time()
    CATALOGUE.network("pd_b_resnet152")
    assert time.process_time() - start < 3


def test_a_residual_block_has_two_declared_branches() -> None:
    branches = network("pd_a_resnet18").branches()
    assert {"layer2/0/body", "layer2/0/shortcut"} <= set(branches)
    assert "layer2/1/shortcut" not in branches
    assert "layer2/0/body/conv2/skeleton/vertical" in branches


def test_convolutions_start_by_fan_out_of_all_groups() -> None:
    states = {s.name: s for s in network("pd_b_resnet18").states}
    assert (
        str(states["layer1/0/body/conv1/group/conv.weight"].init) == "HeNormal(fan=576, scale=1.0)"
    )
    bias = states["layer1/0/body/conv1/gate/fc1.bias"].init
    assert str(bias) == "Uniform(low=-0.125, high=0.125)"


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_run_and_train(name: str) -> None:
    graph = CATALOGUE.network(f"{name}:{SMALL[name]}")
    rng = np.random.default_rng(0)
    shape = tuple(d if isinstance(d, int) else 3 for d in graph.inputs["x"].shape)
    x = rng.normal(size=shape).astype(np.float32)
    store = Store.initialised(graph.states)
    logits = compile(graph, store=store)(x=x)["logits"]
    exact = interpret(specialise(graph, training=False), {"x": x}, store, DType.F64)
    bound = 5e-5 * max(1.0, float(np.abs(logits).max()))
    assert logits.shape == (3, 5)
    assert np.abs(logits - exact.outputs["logits"]).max() <= bound
    step = differentiate(joint_loss(specialise(graph, training=True)))
    gradients = compile(step, store=store).gradients({"x": x, "labels": np.arange(3)})
    trained = {s for s in graph.states if s.role is Role.PARAMETER}
    skipped = {s for s in trained if not graph.read(s).users}
    assert set(gradients) == trained - skipped
    assert all(np.isfinite(g).all() for g in gradients.values())


# -- names of the reference ------------------------------------------------------------------------


def test_states_have_the_names_of_the_reference() -> None:
    norm = ("weight", "bias", "running_mean", "running_var")
    convs = ("ori_conv", "new_conv", "group_conv", "ac_convbn.ver_conv", "ac_convbn.hor_conv")
    block = [f"{c}.weight" for c in convs]
    block += [f"{c.replace('conv', 'bn').replace('ac_bnbn', 'ac_convbn')}.{k}"
              for c in convs for k in norm]  # fmt: skip
    gate = [f"fc.{k}.{part}" for k in (0, 2) for part in ("weight", "bias")]
    expected = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{k}" for k in norm)}
    for layer in (1, 2, 3, 4):
        for k in (0, 1):
            at = f"layer{layer}.{k}"
            expected |= {f"{at}.conv{c}.{key}" for c in (1, 2) for key in (*block, *gate)}
        if layer > 1:
            keys = ("0.weight", *(f"1.{k}" for k in norm))
            expected |= {f"layer{layer}.0.downsample.{key}" for key in keys}
    names = exchange_names(network("pd_b_resnet18"))
    assert set(names.values()) == expected
    assert len(names) == len(expected)


@pytest.mark.parametrize("spec", [*(f"{n}50" for n in RESNETS), *SMALL])
def test_no_two_states_have_one_name(spec: str) -> None:
    names = exchange_names(network(spec))
    assert len(set(names.values())) == len(names)
    assert not [n for n in names.values() if "/" in n]


def test_bottlenecks_and_gates_have_the_names_of_the_reference() -> None:
    assert {
        "layer1.0.conv1.weight", "layer1.0.bn1.running_var", "layer1.0.conv2.fc.2.bias",
        "layer1.0.conv3.weight", "layer1.0.bn3.bias", "layer1.0.downsample.1.weight",
    } <= set(exchange_names(network("pd_b_resnet50")).values())  # fmt: skip
    assert "layer1.0.se.fc.0.weight" in exchange_names(network("se_resnet18")).values()
    assert "layer1.0.bn2.weight" in exchange_names(network("se_resnet18")).values()


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("pd_a_resnet20", GraphError, "depth is one of 18, 34, 50, 101, 152, got 20"),
        ("pd_a_resnet18:branches=standard3", GraphError, "standard1, standard2, skeleton, group"),
        ("pd_a_resnet18:width=32", GraphError, "conv1/group/conv|32 filters in 64 groups"),
        ("pd_b_resnet18:reduction=128", GraphError, "64 channels reduced 128 times leave none"),
        ("ge_resnet18:extent=3", GraphError, "extent is 0"),
        ("imagenet_resnet18:classes=0", GraphError, "at least 1"),
        ("pd_perceptron:form=pd_c", GraphError, "form is one of plain, pd_a, pd_b, got 'pd_c'"),
        ("se_resnet18:branches=group", FormatError, "no option 'branches'; it has: depth"),
        ("pd_a_resnet18:depth=34", FormatError, "the depth is given twice"),
    ],
)
def test_options_that_make_no_network_are_refused(
    spec: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CATALOGUE.network(spec)
