"""BranchyNet's networks, and networks by specification string."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import images

from branchgraph.ir.cost import node_macs
from branchgraph.ir.errors import FormatError, GraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.optimisers import SGD
from branchgraph.ir.state import Role, State
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.verify import verify
from branchgraph.nets import NETWORKS, lenet, network
from branchgraph.passes.insert_exits import RemoveExits
from branchgraph.training import Training


def shapes(graph) -> list[str]:  # type: ignore[no-untyped-def]
    kinds = ("conv", "max_pool", "dense")
    return [str(n.output.type) for n in graph.nodes if n.op.opcode in kinds]


def test_lenet_has_the_published_shapes() -> None:
    assert shapes(lenet()) == [
        "f32[N, 5, 30, 30]", "f32[N, 5, 15, 15]", "f32[N, 10, 17, 17]", "f32[N, 10, 9, 9]",
        "f32[N, 20, 11, 11]", "f32[N, 20, 6, 6]", "f32[N, 84]", "f32[N, 10]",
    ]  # fmt: skip


def test_the_branch_of_b_lenet_has_the_published_shapes() -> None:
    (nodes,) = network("b_lenet").branches().values()
    kinds = ("conv", "max_pool", "reshape")
    assert [str(n.output.type) for n in nodes if n.op.opcode in kinds] == [
        "f32[N, 5, 15, 15]", "f32[N, 10, 15, 15]", "f32[N, 10, 8, 8]", "f32[N, 640]",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_verifies_and_its_text_parses_back(name: str) -> None:
    graph = network(name)
    verify(graph)
    assert structural_hash(parse_graph(format_graph(graph))) == structural_hash(graph)
    assert NETWORKS[name].summary


#: Parameters and MACs a sample of trunk segment 1, head 1, segment 2, ... and the last head
#: (branchynet specification, section 2.6).
SEGMENTS = {
    "b_lenet": [
        (130, 112_500), (6_870, 107_650), (66_844, 1_026_730), (850, 840),
    ],
    "b_alexnet": [
        (53_696, 15_564_800), (32_842, 1_774_592), (55_392, 3_538_944), (28_970, 443_648),
        (433_696, 9_142_272), (1_290, 1_280),
    ],
    "b_resnet": [
        (14_592, 14_598_144), (168_554, 4_882_432), (51_264, 12_976_128), (91_178, 2_441_216),
        (203_904, 12_976_128), (5_770, 5_760),
    ],
    "b_resnet:blocks=18": [
        (85_152, 85_377_024), (168_554, 4_882_432), (330_624, 83_755_008), (91_178, 2_441_216),
        (1_315_584, 83_755_008), (5_770, 5_760),
    ],
    "b_resnet:blocks=18,form=original": [
        (480, 388_800), (341_386, 48_211_200), (84_672, 74_649_600), (148_714, 4_291_200),
        (1_646_208, 157_367_808), (5_770, 5_760),
    ],
}  # fmt: skip


def segments(graph: Graph) -> list[tuple[int, int]]:
    """Parameters and MACs of trunk segments and heads, in their order."""
    found: list[list[int]] = []
    places: list[str] = []
    counted: set[State] = set()
    for node in graph.nodes:
        inside = next((s.name for s in node.scope if s.branch and s.name.startswith("exit")), "")
        place = "last head" if node.name == "fc" and not inside else inside
        if not places or places[-1] != place:
            places.append(place)
            found.append([0, 0])
        states = {v.state for v in node.inputs if v.state and v.state.role is Role.PARAMETER}
        found[-1][0] += sum(math.prod(s.shape) for s in states - counted)
        counted |= states
        macs = node_macs(node)
        found[-1][1] += macs if isinstance(macs, int) else macs.substitute({"N": 1})
    return [(p, m) for p, m in found if p]


@pytest.mark.parametrize("spec", SEGMENTS)
def test_segments_have_the_published_parameters_and_macs(spec: str) -> None:
    assert segments(network(spec)) == SEGMENTS[spec]


@pytest.mark.parametrize(
    ("convs", "parameters"), [(0, 10_250), (1, 23_594), (2, 32_842), (3, 42_090), (4, 51_338)]
)
def test_branch_depth_variants_have_the_published_parameters(convs: int, parameters: int) -> None:
    assert segments(network(f"b_alexnet:branch_convs={convs}"))[1][0] == parameters


def test_the_main_network_is_what_remains_without_exits() -> None:
    for branchy, plain in (
        ("b_lenet", "lenet"),
        ("b_alexnet", "alexnet"),
        ("b_resnet", "resnet_a"),
    ):
        left = RemoveExits().apply(network(branchy))
        assert structural_hash(left) == structural_hash(network(plain))


def test_the_port_stops_gradients_at_changing_shortcuts_and_the_original_does_not() -> None:
    def reaches(detach: bool) -> float:
        graph = network(f"resnet_a:blocks=1,detach_shortcut={str(detach).lower()}")
        body = graph.find("stage2/block1/body/unit2/bn").inputs[1].state
        training = Training.of(graph, SGD(learning_rate=0.0))
        training.store[body] = np.zeros(body.shape)  # nothing comes back through the body
        stem = next(s for s in graph.states if s.name == "stem/conv.weight")
        x = images(2, channels=3, size=32)
        feeds = {"x": x, "labels": np.array([1, 2])}
        return float(np.abs(training.step.gradients(feeds)[stem]).max())

    assert reaches(detach=False) > 0
    assert reaches(detach=True) == 0


def test_options_are_read_by_their_types() -> None:
    graph = network("lenet:size=8,kernel=3,widths=4+8+16,classes=3")
    assert shapes(graph)[0] == "f32[N, 4, 8, 8]"
    assert shapes(graph)[-1] == "f32[N, 3]"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("anything", FormatError, "unknown network 'anything'; known: .*b_lenet.* lenet"),
        ("b_lenet7", FormatError, "unknown network 'b_lenet7'"),
        ("b_resnet:form=third", GraphError, "form 'third' is none of port, original"),
        ("resnet_a:blocks=0", GraphError, "blocks is at least 1"),
        ("b_alexnet:branch_convs=-1", GraphError, "branch_convs is at least 0"),
        ("alexnet:size=8", GraphError, "size is >= 16"),
        ("lenet:depth=3", FormatError, "no option 'depth'; it has: size, channels"),
        ("lenet:size=big", FormatError, "lenet:size: expected int, got 'big'"),
        ("lenet:size=8,size=9", FormatError, "size is given twice"),
        ("lenet:size=4", GraphError, "size is >= 8"),
        ("lenet:widths=3+4", GraphError, "three channel counts"),
        ("b_lenet:criterion=luck", GraphError, "criterion 'luck' is none of entropy"),
        ("lenet;rm", FormatError, "expected NAME"),
    ],
)
def test_specs_that_cannot_be_built_say_what_can(spec, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        network(spec)
