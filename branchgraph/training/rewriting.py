"""Training that goes on after a pass.

A pass writes expressions over the states that were trained. Two ways lead on:

- train the expressions themselves: `Training.of(graph, optimiser, store=store)` with the optimiser
  of before, whose slots belong to states that are still there;
- make new leaves of them (`materialise`) and train these: `continued(training, graph)`. Slots move
  with their parameters where an expression only moves elements, and start again elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from branchgraph.ir.graph import Graph
from branchgraph.ir.state import State
from branchgraph.passes.materialise import carry_slots, evaluate_origin, materialise
from branchgraph.training.loop import Training


@dataclass(frozen=True)
class Continued:
    """A network with leaves of its own, ready to train on."""

    graph: Graph
    training: Training
    #: Where the new states come from: a graph whose updates compute them.
    origin: Graph
    #: New states whose optimiser slots start again.
    reset: tuple[State, ...]

    def __str__(self) -> str:
        names = ", ".join(s.name for s in self.reset)
        return f"optimiser slots reset for {names}" if names else "all optimiser slots carried"


def continued(
    training: Training, graph: Graph, *, origin: Graph | None = None, backend: str = "numpy"
) -> Continued:
    """Training of `graph`, a rewritten form of the network that `training` trains.

    A pass or pipeline that made new states says in `report.origin` of its `run` where they come
    from; with that `origin` the graph is trained as it is. Otherwise its expressions become leaves.
    For both, give the leaves and `composed(report.origin, origin of the leaves)`. The store is
    shared: it keeps the old states and gains the new ones.
    """
    new, source = (graph, origin) if origin is not None else materialise(graph)
    evaluate_origin(source, training.store)
    carried = carry_slots(source, training.optimiser.slots, training.store)
    optimiser = replace(training.optimiser, slots=carried.slots)
    fresh = Training.of(new, optimiser, backend=backend, store=training.store)
    return Continued(new, fresh, source, tuple(dict.fromkeys(carried.reset)))
