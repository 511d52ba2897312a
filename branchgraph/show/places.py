"""Where nodes are drawn, and what is written at the clusters around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from branchgraph.ir.graph import Location, Node, Scope
from branchgraph.show import describe
from branchgraph.show.repeats import Repeat


class Places:
    """Where nodes are drawn: their scopes, with a cluster more around parts without a scope."""

    def __init__(self, found: Sequence[Repeat], scope: Callable[[Node], Location]) -> None:
        self._scope = scope
        self._labels: dict[Scope, str] = {}
        self._badges: dict[Location, str] = {}
        self._around: dict[Node, list[tuple[int, Scope]]] = {}
        for i, repeat in enumerate(sorted(found, key=lambda r: -len(r.first))):
            if repeat.own_scope:
                self._badges.setdefault(repeat.place, repeat.label)
                continue
            cluster = Scope(f"\0{i}", branch=repeat.parallel)
            self._labels[cluster] = repeat.label
            for node in repeat.first:
                self._around.setdefault(node, []).append((len(repeat.place), cluster))

    def __call__(self, node: Node) -> Location:
        place = self._scope(node)
        around = self._around.get(node, ())
        for depth, cluster in sorted(around, key=lambda a: a[0]):
            inserted = sum(s in self._labels for s in place)
            place = (*place[: depth + inserted], cluster, *place[depth + inserted :])
        return place

    def label(self, place: Location) -> str:
        """What is written at the cluster `place`."""
        if place[-1] in self._labels:
            return self._labels[place[-1]]
        real = tuple(s for s in place if s not in self._labels)
        return self._badges.get(real) or describe.clean(place[-1].name)

    def repeated(self, place: Location) -> bool:
        """Whether the cluster `place` stands for several."""
        real = tuple(s for s in place if s not in self._labels)
        return place[-1] in self._labels or real in self._badges
