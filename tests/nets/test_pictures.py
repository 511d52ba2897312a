"""Pictures of all networks hold what the publications describe.

Each row: branches, merges, gates and exits, and above it how they follow from the specification. A
branch counts where it has nodes: identities have none.
"""

from __future__ import annotations

import pytest

from branchgraph.ir.cost import parameter_count
from branchgraph.nets import NETWORKS, network
from branchgraph.show import counts
from branchgraph.show.picture import Picture

#: Specification to branches, merges, gates, exits.
EXPECTED: dict[str, tuple[int, int, int, int]] = {
    # -- BranchyNet: an early exit is a branch; merges are residual sums
    "lenet": (0, 0, 0, 0),
    "b_lenet": (1, 0, 0, 2),
    "alexnet": (0, 0, 0, 0),
    "b_alexnet": (2, 0, 0, 3),
    # 3 stages x 3 blocks, a body each, and 2 shortcuts that widen
    "resnet_a": (9 + 2, 9, 0, 0),
    # two exits more; the first holds a block of its own (its body and its sum)
    "b_resnet": (9 + 2 + 2 + 1, 9 + 1, 0, 3),
    "b_resnet:blocks=18,form=original": (54 + 2 + 2 + 1, 54 + 1, 0, 3),
    # -- vbranch: two branches; what shares weights merges no data
    "fcn": (0, 0, 0, 0),
    "fcn:branches=2,shared=0.5": (2, 0, 0, 0),
    "cnn:branches=2,shared=0.5,merge=mean": (2, 1, 0, 0),
    # (2 + 2 + 2 + 2) residual units, in each of two branches
    "vbranch_resnet18:branches=2,shared=0.5": (2, 2 * 8, 0, 0),
    "vbranch_resnet50": (0, 3 + 4 + 6 + 3, 0, 0),
    # a concatenation a unit
    "densenet121": (0, 6 + 12 + 24 + 16, 0, 0),
    "densenet_bc:depth=16,branches=2,shared=0.5": (2, 2 * 3 * 2, 0, 0),
    # -- Deep Fusion: (26 - 2) / b layers in blocks, a third of them in each stage
    "plain:depth=26": (0, 0, 0, 0),
    # 24 / 2 blocks: the branch `two`, one sum; projections in the first block of stages 2 and 3
    "resnet:depth=26": (12 + 2, 12, 0, 0),
    # 24 / 4 blocks: two branches and (in stages 2 and 3 once) a projection
    "half:depth=26": (6 * 2 + 2, 6, 0, 0),
    "side:depth=26": (6 * 2, 6, 0, 0),
    # 24 / 4 blocks of two streams, two projections in the first block of stages 2 and 3; a mean
    # and two sums a block, a mean and one sum in the last
    "cross:depth=26": (6 * 2 + 2 * 2, 5 * 3 + 2, 0, 0),
    # a chain and a line in each of 3 blocks
    "fuse3:depth=26": (3 * 2, 3, 0, 0),
    # 6 chains, and lines in the first block of each stage
    "fuse6:depth=26": (6 + 3, 6, 0, 0),
    "ensemble:depth=26": (8, 0, 0, 0),
    # (1 + 2 + 11 + 2) blocks of two streams; a mean and two sums in all but 4; streams join once
    "cross_imagenet": (16 * 2, 12 * 3 + 1, 0, 0),
    # (2 + 2 + 8 + 2) blocks, two projections in each of 4; the last sum joins the streams
    "cross_imagenet:form=first": (14 * 2 + 4 * 2, 14 * 3 + 1, 0, 0),
    # (2 + 4 + 22 + 4) bodies, of which 4 have no shortcut
    "resnet_imagenet": (32, 32 - 4, 0, 0),
    # -- ParaDise: 18 layers are 8 blocks of two convolutions, 3 projections; 50 are 16 blocks, 4
    "imagenet_resnet18": (8 + 3, 8, 0, 0),
    "imagenet_resnet50": (16 + 4, 16, 0, 0),
    # 16 convolutions of 4 branches, one of which (the skeleton) holds 2; 2 sums each
    "pd_a_resnet18": (8 + 3 + 16 * (4 + 2), 8 + 16 * 2, 0, 0),
    # and a gate a branch
    "pd_b_resnet18": (8 + 3 + 16 * (4 + 2), 8 + 16 * 2, 16 * 4, 0),
    # 16 convolutions of the square one and the skeleton
    "ac_resnet18": (8 + 3 + 16 * (2 + 2), 8 + 16 * 2, 0, 0),
    # a gate a block
    "se_resnet18": (8 + 3, 8, 8, 0),
    "ge_resnet18": (8 + 3, 8, 8, 0),
    # a gate of channels (mean and maximum meet in a sum), and one of positions (in a concatenation)
    "cbam_resnet18": (8 + 3, 8 + 8 * 2, 8 * 2, 0),
    # 2 layers of 2 dense ones
    "pd_perceptron:form=pd_a": (2 * 2, 2, 0, 0),
    "pd_perceptron:form=pd_b": (2 * 2, 2, 2 * 2, 0),
    # -- kin: 22 units of 3x3 and 1x1; the identity where a stage (1 + 2 + 4 + 14 + 1) goes on
    "repvgg": (22 * 2 + (22 - 5), 22, 0, 0),
    # 16 units of 4 branches
    "dbb_resnet18": (8 + 3 + 16 * 4, 8 + 16, 0, 0),
    # -- learned connectivity: 9 modules of 8 paths
    "resnext": (0, 9, 0, 0),
    "resnext:form=branches": (9 * 8, 9 * 2, 0, 0),
    # 6 modules of 8 blocks: each adds its shortcut and, from the second module on, 8 gated blocks;
    # the head adds the last 8
    "masked_resnext:depth=20": (6 * 8, 48 + 5 * 8 + 1, 5 * 8 * 8, 0),
    # the same without rows to learn: one merge a module, which all of its blocks read
    "masked_resnext:depth=20,policy=full": (6 * 8, 48 + 5 + 1, 0, 0),
    # 3 modules, each a sum r + s; module 2 merges both before it (its K is 2), module 3 chooses 2
    # of 3 by gates and merges them
    "masked_resnet:depth=8,k=2": (3, 2 + 3, 3, 0),
    "masked_resnet:depth=8,policy=previous": (3, 3, 0, 0),
    # 4 branches, each behind a gate (a row of its entries a class), one merge
    "branch_connect": (4, 1, 4, 0),
    # -- Inception-v3: 3 blocks of 4 at 35, a reduction of 3, 4 of 4 at 17, a reduction of 3,
    # 2 of 4 at 8; every block concatenates once; the auxiliary classifier is a branch
    "inception_v3": (3 * 4 + 3 + 4 * 4 + 3 + 2 * 4 + 1, 3 + 1 + 4 + 1 + 2, 0, 0),
}  # fmt: skip


def base(spec: str) -> str:
    """The name in the catalogue: `pd_a_resnet` of `pd_a_resnet18`."""
    name = spec.partition(":")[0]
    return name if name in NETWORKS else name.rstrip("0123456789")


def test_every_network_has_a_row() -> None:
    assert {base(spec) for spec in EXPECTED} == set(NETWORKS)


@pytest.mark.parametrize("spec", EXPECTED)
def test_pictures_hold_what_the_publication_describes(spec: str) -> None:
    found = counts(network(spec))
    assert (found.branches, found.merges, found.gates, found.exits) == EXPECTED[spec]


#: Specification to the labels of clusters that stand for several.
REPEATED = {
    "b_resnet:blocks=18": ["block1 … block18 ×18", *["block2 … block18 ×17"] * 2],
    # the first block reads the stem with both streams, the last one joins them: they stand alone
    "cross:depth=50": ["b2 … b4 ×3", "b2 … b4 ×3", "b2, b3 ×2"],
    "half:depth=50": ["b1 … b4 ×4", "b2 … b4 ×3", "b2 … b4 ×3"],
    "imagenet_resnet34": ["0 … 2 ×3", "1 … 3 ×3", "1 … 5 ×5", "1, 2 ×2"],
    "pd_b_resnet34": ["0 … 2 ×3", "1 … 3 ×3", "1 … 5 ×5", "1, 2 ×2"],
    "resnext:depth=20,form=branches,layout=narrow": ["block0 … block7 ×8 branches"] * 6,
}


@pytest.mark.parametrize("spec", REPEATED)
def test_blocks_of_a_stage_are_drawn_once(spec: str) -> None:
    labels = [r.label for r in Picture(network(spec)).repeats]
    assert sorted(labels) == sorted(REPEATED[spec])


def test_blocks_that_choose_are_drawn_once_a_module_and_so_are_their_gates() -> None:
    labels = [r.label for r in Picture(network("masked_resnext:depth=20")).repeats]
    assert sum("branches" in label for label in labels) == 6
    assert labels.count("×8 gates") == 5


def test_the_weights_of_pd_b_lead_from_the_softmax_to_gates() -> None:
    picture = Picture(network("pd_b_resnet18"))
    assert not {"slice", "reshape"} & {n.op.opcode for n in picture.nodes if "/gate" in n.path}


@pytest.mark.parametrize("spec", ["cross:depth=26", "pd_b_resnet18", "masked_resnext:depth=20"])
def test_drawing_changes_nothing(spec: str) -> None:
    graph = network(spec)
    nodes, parameters = len(graph.nodes), parameter_count(graph)
    counts(graph)
    assert (len(graph.nodes), parameter_count(graph)) == (nodes, parameters)
