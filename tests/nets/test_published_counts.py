"""Every total of the specifications: parameters, and multiply-accumulates where they are given.

How totals split into segments, stages, shared and own parts is tested beside each family.
"""

from __future__ import annotations

import pytest

from branchgraph.ir.cost import cost, node_macs
from branchgraph.ir.graph import Graph
from branchgraph.nets import NETWORKS, network

#: Specification to parameters, and MACs a sample or None where no figure is given.
PLAIN: dict[str, tuple[int, int | None]] = {
    # BranchyNet, section 2.6: the main networks; B- forms are the sums of their segments
    "lenet": (67_824, 1_140_070),
    "b_lenet": (130 + 6_870 + 66_844 + 850, 112_500 + 107_650 + 1_026_730 + 840),
    "alexnet": (544_074, 28_247_296),
    "b_alexnet": (
        53_696 + 32_842 + 55_392 + 28_970 + 433_696 + 1_290,
        15_564_800 + 1_774_592 + 3_538_944 + 443_648 + 9_142_272 + 1_280,
    ),
    "resnet_a": (275_530, 40_556_160),
    "resnet_a:blocks=18": (1_737_130, 252_892_800),
    "resnet_a:blocks=18,form=original": (1_737_130, 232_411_968),
    # vbranch, section 2.9: plain, and shared + B own of the legacy layout
    "fcn": (408_074, None),
    "fcn:version=v2": (537_354, None),
    "fcn:version=v3": (671_754, None),
    "fcn:version=v4": (935_434, None),
    "cnn": (18_010, None),
    "cnn:version=cifar": (305_962, None),
    "cnn:version=large": (1_283_392, None),
    "vbranch_resnet18:channels=1,size=105": (11_300_416, None),
    "vbranch_resnet50": (25_766_016, None),
    "densenet121": (7_085_056, None),
    "densenet_bc": (769_162, None),
    "fcn:branches=4,shared=0.25,legacy_layout=true": (100_994 + 4 * 307_090, None),
    "cnn:version=cifar,branches=2,shared=0.5,legacy_layout=true": (77_141 + 2 * 229_375, None),
    "densenet121:branches=2,shared=0.75,legacy_layout=true": (3_928_992 + 2 * 3_156_064, None),
    # Deep Fusion, section 2.6
    "cross:depth=110": (1_710_426, None),
    "cross:depth=62,widen=4": (14_851_402, None),
    "cross:depth=98,widen=4": (24_151_882, None),
    "cross:depth=110,classes=100": (1_716_276, None),
    "cross:depth=62,widen=4,classes=100": (14_874_532, None),
    "cross:depth=98,widen=4,classes=100": (24_175_012, None),
    "cross:depth=56": (886_234, None),
    **{
        f"{name}:depth={depth}": (parameters, None)
        for name, *both in (
            ("plain", 366_938, 1_727_962),
            ("resnet", 369_690, 1_730_714),
            ("cross", 349_402, 1_710_426),
            ("half", 346_650, 1_707_674),
            ("side", 343_898, 1_704_922),
            ("fuse3", 392_506, 1_753_530),
            ("fuse6", 392_506, 1_753_530),
            ("ensemble", 392_506, 1_753_530),
        )
        for depth, parameters in zip((26, 110), both)
    },
    **{
        f"cross:depth={2 * layers + 2}": (parameters, None)
        for layers, parameters in (
            (12, 349_402), (18, 543_834), (24, 738_266), (30, 932_698), (36, 1_127_130),
            (48, 1_515_994), (54, 1_710_426), (96, 3_071_450),
        )
    },
    "cross_imagenet": (46_395_048, None),
    "resnet_imagenet": (45_047_464, None),
    "cross_imagenet:form=first": (43_338_024, None),
    "resnet_imagenet:form=first": (44_549_160, None),
    # Connectivity learning, section 2.2
    "masked_resnext:depth=20,width=4,cardinality=8": (266_714, None),
    "masked_resnext:depth=20,width=4,cardinality=8,classes=100": (289_844, None),
    "masked_resnext:depth=20,width=4,cardinality=8,k=1": (266_714, None),
    "masked_resnext:depth=20,width=4,cardinality=8,policy=full": (266_714, None),
    "masked_resnext:depth=20,width=4,cardinality=8,policy=random": (266_714, None),
    "masked_resnext:depth=29,width=8,cardinality=8": (841_434, None),
    "masked_resnext:depth=29,width=8,cardinality=8,classes=100": (864_564, None),
    "masked_resnext:depth=29,width=64,cardinality=8": (34_527_050, None),
    "masked_resnext:depth=29,width=64,cardinality=8,classes=100": (34_619_300, None),
    "resnext:depth=29,width=64,cardinality=8": (34_426_698, None),
    "resnext:depth=29,width=64,cardinality=8,form=branches": (34_426_698, None),
    "resnext:depth=50,width=4,cardinality=32,classes=1000": (25_028_904, None),
    "resnext101:width=4,cardinality=32,classes=1000": (44_177_704, None),
    "resnext101:width=4,cardinality=64,classes=1000": (83_455_272, None),
    # ResNets with parameter-free shortcuts
    "masked_resnet20": (269_722, None),
    "masked_resnet38": (561_370, None),
    "masked_resnet110": (1_727_962, None),
    "masked_resnet110:policy=previous": (1_727_962, None),
    # Stem 3x16 and 16x32, branches 32x64, 3x3 with batch norm; one fc of 64x10
    "branch_connect": (432 + 32 + 4608 + 64 + 4 * (18432 + 128) + 650, None),
    # Inception-v3
    "inception_v3": (27_161_264, None),
    "inception_v3:auxiliary=false": (23_834_568, None),
}  # fmt: skip

#: The same for ParaDise, section 4: MACs of a 224x224 image as its counter counts them.
PARADISE: dict[str, tuple[int, int | None]] = {
    "imagenet_resnet18": (11_689_512, 1_822_176_768),
    "imagenet_resnet34": (21_797_672, 3_675_628_032),
    "imagenet_resnet50": (25_557_032, 4_121_924_096),
    "imagenet_resnet101": (44_549_160, None),
    "imagenet_resnet152": (60_192_808, None),
    "se_resnet18": (11_778_592, 1_823_016_568),
    "se_resnet50": (28_088_024, 4_129_959_344),
    "ge_resnet18": (11_752_872, 1_824_974_464),
    "ge_resnet50": (26_055_464, 4_142_511_872),
    "cbam_resnet18": (11_779_392, 1_824_689_368),
    "cbam_resnet50": (28_089_624, 4_139_381_292),
    "ac_resnet18": (19_028_520, None),
    "ac_resnet50": (33_116_968, None),
    "pd_a_resnet18": (30_201_000, 4_654_210_560),
    "pd_a_resnet34": (57_331_240, 9_629_411_840),
    "pd_a_resnet50": (44_626_152, 7_244_677_632),
    "pd_a_resnet101": (80_521_448, None),
    "pd_a_resnet152": (110_087_400, None),
    "pd_b_resnet18": (30_273_036, 4_654_282_532),
    "pd_b_resnet50": (44_705_988, 7_244_757_404),
    "pd_perceptron": (50_890, None),
    "pd_perceptron:form=pd_a": (101_780, None),
    "pd_perceptron:form=pd_b": (156_440, None),
}


@pytest.mark.parametrize(
    ("spec", "mode"), [*((s, "plain") for s in PLAIN), *((s, "paradise") for s in PARADISE)]
)
def test_totals_are_exact(spec: str, mode: str) -> None:
    graph = network(spec)
    parameters, macs = (PLAIN if mode == "plain" else PARADISE)[spec]
    found = cost(graph, mode).per_sample()
    assert found.parameters == parameters
    assert macs is None or found.macs - uncounted(graph, mode) == macs


def uncounted(graph: Graph, mode: str) -> int:
    """ReLUs between GE's down blocks: function calls, which ParaDise's counter does not see."""
    inside = (n for n in graph.nodes if "/gather/" in n.path and n.op.opcode == "relu")
    sizes = (node_macs(n, mode) for n in inside)
    return sum(s if isinstance(s, int) else int(s.substitute({"N": 1})) for s in sizes)


def test_every_network_has_a_figure_or_is_counted_beside_its_family() -> None:
    named = {NETWORKS.find(spec)[0].name for spec in (*PLAIN, *PARADISE)}
    assert set(NETWORKS) - named == {"b_resnet", "repvgg", "dbb_resnet"}
