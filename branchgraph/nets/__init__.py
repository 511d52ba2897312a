"""The networks of the field, declared with the native builder and reached by specification string.

network("b_lenet")            network("lenet:size=8,kernel=3,widths=16+32+64")

A network returns its declared graph, mode not yet chosen; one module a family.
"""

from __future__ import annotations

from branchgraph.ir.graph import Graph
from branchgraph.nets import (
    branchynet,
    connectivity,
    deepfusion,
    inception,
    paradise,
    reparameterised,
    vbranch,
)
from branchgraph.nets.branchynet import b_lenet, lenet
from branchgraph.nets.catalogue import Catalogue, Network

_FAMILIES = (
    branchynet, vbranch, paradise, deepfusion, connectivity, reparameterised, inception,
)  # fmt: skip
NETWORKS = Catalogue(*(module.NETWORKS for module in _FAMILIES))


def network(spec: str) -> Graph:
    """The network a specification string names, freshly declared.

    Raises `FormatError` for an unknown network or option, listing what there is.
    """
    return NETWORKS.network(spec)


__all__ = ["NETWORKS", "Network", "b_lenet", "lenet", "network"]
