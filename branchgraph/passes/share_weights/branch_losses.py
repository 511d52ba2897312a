"""The loss of every branch, and their sum.

    L_i = loss(output_i) + w sum heat_i cam_i             loss = L_1 + ... + L_B

The last term is there for a branch with a class activation map (`share_weights:cam=...`); the heat
map [N, H, W] and the weight w are inputs (arXiv 1803.05872: batch-hard triplets, w = 0.2).
"""

from __future__ import annotations

from collections.abc import Callable

from branchgraph.ir.activation_maps import heat_map_loss
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Scope, Value, at
from branchgraph.ir.ops.elementwise import cast
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.rebuild import clone
from branchgraph.ir.types import DType
from branchgraph.passes.split_ensemble import branches_of

#: The weight of the maps' losses, an input, and what it is when it is not fed.
CAM_WEIGHT, CAM_DEFAULT = "cam.weight", 0.2


def branch_losses(graph: Graph, loss: Callable[[Value], Value]) -> Graph:
    """A copy of a training graph whose outputs are `<branch>.loss` for each branch, and `loss`.

    `loss` takes the output of a branch (logits, an embedding) to one number. A branch with the
    output `<branch>.cam` reads the input `<branch>.heat_map` and has the output `<branch>.cam_loss`
    too. Raises `GraphError` for a graph without outputs of branches.
    """
    new = clone(graph)
    branches = branches_of(new)
    if not branches:
        raise GraphError(f"{graph.name} has no outputs of branches to take losses of")
    new.keep(output=lambda name: False)
    total = []
    for name, outputs in branches.items():
        with at((Scope(name, branch=True), Scope("loss"))):
            if "logits" not in outputs:
                raise GraphError(f"{name} has the outputs {', '.join(outputs)}; expected one")
            term = loss(outputs["logits"])
            if "cam" in outputs:
                term = term + _of_map(new, name, outputs["cam"], term.dtype)
        total.append(new.output(f"{name}.loss", term))
    with at((Scope("loss"),)):
        new.output("loss", new.emit(Sum(), *total, name="total") if total[1:] else total[0])
    return new


def _of_map(graph: Graph, branch: str, cam: Value, dtype: DType) -> Value:
    """w sum heat cam, of one branch."""
    heat = graph.input(f"{branch}.heat_map", cam.shape, cam.dtype)
    weight = graph.inputs.get(CAM_WEIGHT) or graph.input(
        CAM_WEIGHT, (), DType.F64, default=CAM_DEFAULT
    )
    found = graph.output(f"{branch}.cam_loss", heat_map_loss(cam, heat))
    return cast(found, dtype) * cast(weight, dtype)
