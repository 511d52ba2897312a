"""Virtual branching: networks whose branches share a fraction of every layer.

(The system that followed arXiv 1803.05872. The mechanics are in `halves`, what all networks have in
`branching`, the weights of a plain network for a branched one in `slicing`.)
"""

from __future__ import annotations

from branchgraph.ir.sharing import Halves, add, concatenate, shared_channels
from branchgraph.nets.vbranch.branching import Branching, branched, merge_branches
from branchgraph.nets.vbranch.halves import Layers, SharedStates, SharingWarning
from branchgraph.nets.vbranch.networks import (
    NETWORKS,
    cnn,
    densenet,
    densenet_bc,
    fcn,
    vbranch_resnet,
)
from branchgraph.nets.vbranch.slicing import slice_into

__all__ = [
    "NETWORKS",
    "Branching",
    "Halves",
    "Layers",
    "SharedStates",
    "SharingWarning",
    "add",
    "branched",
    "cnn",
    "concatenate",
    "densenet",
    "densenet_bc",
    "fcn",
    "merge_branches",
    "shared_channels",
    "slice_into",
    "vbranch_resnet",
]
