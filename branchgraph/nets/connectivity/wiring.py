"""Who reads whom: learned, full and random rows over a list of producers.

Learned rows are the state `<module>/mask.score`, one row a consumer, and an edge is a gate, a
single entry of its row: the consumer is `merge_sum` of its gated producers. Fixed rows have no
gates; the consumer adds up what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from branchgraph.ir.builder import gate, merge_sum, state
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Node, Value, scope
from branchgraph.ir.initialisers import Constant
from branchgraph.ir.masks import mask
from branchgraph.ir.ops.reduce import TopK
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.state import Role, Store

#: From the number of a consumer to the merge that it reads.
Reader = Callable[[int], Value]


def chosen(net: str, option: str, value: str, known: tuple[str, ...]) -> str:
    """`value`, if it is one of the known ones."""
    if value not in known:
        raise GraphError(f"{net}: {option} {value!r} is none of {', '.join(known)}")
    return value


def within(net: str, option: str, value: int, low: int, high: int | None = None) -> int:
    """`value`, if it is in low..high."""
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in {low}..{high}"
        raise GraphError(f"{net}: {option} is {bounds}, got {value}")
    return value


@dataclass(frozen=True)
class Wiring:
    """How many producers a consumer reads, and who says which."""

    k: int
    policy: str
    seed: int = 0

    def reader(self, producers: Sequence[Value], module: int, consumers: int) -> Reader:
        """Call in the scope of the module; the reader is called where a consumer stands."""
        if self.policy == "full" or self.k == len(producers):
            merged = merge_sum(*producers, name="merge")
            return lambda j: merged
        if self.policy == "random":
            rows = [drawn(self.seed, module, j, len(producers), self.k) for j in range(consumers)]
            return lambda j: merge_sum(*(producers[k] for k in rows[j]), name="merge")
        learned = mask_rows(producers[0].graph, consumers, len(producers), self.k)
        return lambda j: gated_sum(producers, entry(learned, 0, j))


def drawn(seed: int, module: int, consumer: int, producers: int, k: int) -> list[int]:
    """K distinct producers in ascending order, the same for the same numbers."""
    rng = np.random.default_rng([seed, module, consumer])
    return sorted(int(i) for i in rng.choice(producers, k, replace=False))


def mask_rows(graph: Graph, rows: int, size: int, k: int) -> Value:
    """Learned rows [rows, size] with K ones each; they start uniform."""
    score = state(graph, "mask", "score", (rows, size), Constant(1.0 / size), Role.GATE)
    with scope("mask"):
        return mask(score, k)


def entry(x: Value, axis: int, position: int) -> Value:
    """One position along `axis`, which stays as an axis of size 1."""
    return x.graph.emit(Slice(axis=axis, start=position, size=1), x)


def gated_sum(producers: Sequence[Value], row: Value) -> Value:
    """sum_k row_k y_k, exactly 0 from a producer whose gate is closed; row: [1, producers]."""
    terms = [gate(y, entry(row, 1, k), name=f"from{k}") for k, y in enumerate(producers)]
    return merge_sum(*terms, name="merge")


def connectivity(graph: Graph, store: Store) -> dict[str, list[list[int]]]:
    """What inference reads: scope of a mask to the producers of each of its rows, ascending.

    They are the K largest scores of the row, ties going to the lower index.
    """
    found: dict[str, list[list[int]]] = {}
    for score, value in graph.reads.items():
        k = _fan_in(value) if score.role is Role.GATE else 0
        if k:
            order = np.argsort(-store[score], axis=-1, kind="stable")[..., :k]
            found[score.name.rpartition("/")[0]] = np.sort(order, axis=-1).tolist()
    return found


def _fan_in(score: Value) -> int:
    """K of the nearest `top_k` that reads a score, 0 without one."""
    layer: list[Node] = score.users
    seen: dict[Node, None] = {}
    while layer:
        for node in layer:
            if isinstance(node.op, TopK):
                return node.op.k
        seen.update(dict.fromkeys(layer))
        after = (user for node in layer for out in node.outputs for user in out.users)
        layer = [node for node in dict.fromkeys(after) if node not in seen]
    return 0
