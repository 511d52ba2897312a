"""What a picture holds, in numbers: for tests, reports and for those who compare networks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from branchgraph.ir.graph import Graph
from branchgraph.show.picture import Picture
from branchgraph.show.style import Kind, kind


@dataclass(frozen=True)
class Counts:
    """How many things a graph has, and how many of them its picture draws.

    `nodes`, `branches` (declared ones), `merges`, `gates` and `exits` count the whole network, but
    not what only gradients and updates need, nor merges of parameters; `boxes` are layers, merges,
    gates and exits as drawn, without inputs, outputs and states; `repeats` are the clusters that
    stand for several.
    """

    nodes: int
    branches: int
    merges: int
    gates: int
    exits: int
    boxes: int
    repeats: int


def counts(graph: Graph, *, states: bool = False, collapse: bool = True) -> Counts:
    """The numbers of `graph` and of its picture with these options."""
    picture = Picture(graph, states=states, collapse=collapse)
    forward = picture.forward
    of = Counter(kind(n) for n in forward if n not in picture.expressions)
    places = {n.scope[: d + 1] for n in forward for d in range(len(n.scope))}
    return Counts(
        nodes=len(forward),
        branches=sum(place[-1].branch for place in places),
        merges=of[Kind.MERGE],
        gates=of[Kind.GATE],
        exits=of[Kind.EXIT],
        boxes=len(picture.stacks()),
        repeats=len(picture.repeats),
    )
