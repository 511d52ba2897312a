"""BranchConnect (Ahmed & Torresani, 1704.06010): every class chooses K of M branches.

    logit_c = w_c^T sum_b g_cb f_b(E(x)) + b_c,   g_c a row of M with K ones

E is a stem that all branches share. As the graph has it: logits = sum_b G[:, b] (W f_b) + bias.
"""

from __future__ import annotations

from branchgraph.ir.builder import (
    dense,
    gate,
    global_average_pool,
    max_pool,
    merge_sum,
    state,
)
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.ir.initialisers import Zeros
from branchgraph.ir.ops.reshape import Transpose
from branchgraph.nets.connectivity.wiring import chosen, entry, mask_rows, within
from branchgraph.nets.units import TORCH

_NET = "branch_connect"


def branch_connect(
    branches: int = 4, k: int | None = None, classes: int = 10, policy: str = "learned",
    stem: tuple[int, ...] = (16, 32), widths: tuple[int, ...] = (64,), size: int = 32,
    channels: int = 3,
) -> Graph:  # fmt: skip
    """A stem, parallel branches, and for each class K branches, `learned` or `full`.

    `stem` and `widths` are the filters of the convolutions in the stem and in a branch, each 3x3
    with batch norm, ReLU and max pooling; a branch ends in global average pooling. K is half of
    the branches unless given.
    """
    chosen(_NET, "policy", policy, ("learned", "full"))
    within(_NET, "branches", branches, 1)
    within(_NET, "classes", classes, 1)
    within(_NET, "size", size, 2 ** (len(stem) + len(widths)))
    if not stem or not widths or min(*stem, *widths) < 1:
        raise GraphError(f"{_NET}: stem and widths are filters of layers, got {stem} and {widths}")
    graph = Graph(_NET)
    x = graph.input("x", ("N", channels, size, size))
    with scope("stem"):
        shared = _layers(x, stem)
    features = []
    for b in range(branches):
        with branch(f"branch{b}"):
            features.append(global_average_pool(_layers(shared, widths), name="features"))
    fan_in = within(_NET, "k", max(branches // 2, 1) if k is None else k, 1, branches)
    with scope("head"):
        logits = _head(features, classes, fan_in if policy == "learned" else branches)
    graph.output("logits", logits)
    return graph


def _layers(x: Value, widths: tuple[int, ...]) -> Value:
    for number, width in enumerate(widths, start=1):
        x = max_pool(TORCH.unit(x, width, 3, name=f"layer{number}"), 2)
    return x


def _head(features: list[Value], classes: int, k: int) -> Value:
    """sum_b G[:, b] (W f_b) + bias."""
    graph, size = features[0].graph, features[0].shape[1]
    assert isinstance(size, int)
    weight = state(graph, "fc", "weight", (classes, size), TORCH.dense_init(size, classes))
    bias = state(graph, "fc", "bias", (classes,), Zeros())
    votes = [dense(f, classes, weight=weight, bias=False, name="fc") for f in features]
    if k < len(features):
        mask = mask_rows(graph, classes, len(features), k)
        columns = graph.emit(Transpose(axes=(1, 0)), mask)
        votes = [gate(v, entry(columns, 0, b), name=f"from{b}") for b, v in enumerate(votes)]
    return merge_sum(*votes, name="merge") + bias
