"""Connectivity learning: who reads whom is trained along with the weights.

Ahmed & Torresani, "Connectivity learning in multi-branch networks" (1709.09582), "MaskConnect"
(1807.11473) and "BranchConnect" (1704.06010). In module i, block j reads K of the C blocks before,

    x_j = relu( sum_k m_jk y_k ),   m_j a row of C with K ones            (`ir.masks`)

and no node joins a module's blocks: each consumer adds up for itself. Rows are learned, full, or
drawn once. The rule of the rows is `optimisers.MaskSGD`:

    NesterovAG(0.1, hooks=(WeightDecay(5e-4),), gates=MaskSGD(0.2))

Modules count from 1 and the stem is module 0, blocks count from 0, so that column k of a row is
block (or module) k.
"""

from __future__ import annotations

from branchgraph.nets.catalogue import family
from branchgraph.nets.connectivity.branch_connect import branch_connect
from branchgraph.nets.connectivity.masked_resnet import masked_resnet
from branchgraph.nets.connectivity.masked_resnext import masked_resnext
from branchgraph.nets.connectivity.resnext import resnext
from branchgraph.nets.connectivity.wiring import connectivity

NETWORKS = family("connectivity learning", resnext, masked_resnext, masked_resnet, branch_connect)

__all__ = [
    "NETWORKS",
    "branch_connect",
    "connectivity",
    "masked_resnet",
    "masked_resnext",
    "resnext",
]
