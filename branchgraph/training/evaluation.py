"""How good a network is on data: every exit by itself, and all of them with early exits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from branchgraph.compiler import compile
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Store
from branchgraph.passes.specialise import specialise
from branchgraph.training.loss import LABELS, joint_loss


class Evaluator:
    """A network compiled to be measured again and again, over a store that may be trained on."""

    def __init__(self, graph: Graph, store: Store, *, backend: str = "numpy") -> None:
        losses = joint_loss(specialise(graph, training=False, exits="all"))
        self._losses = compile(losses, backend, store=store)

    def __call__(self, x: np.ndarray, labels: np.ndarray, *, batch: int = 256) -> dict[str, float]:
        """`loss`, and `<exit>.loss` and `<exit>.accuracy` of every exit, means over all samples.

        x: [M, ...], labels: [M]. Every exit sees every sample; batch norm uses running statistics.
        """
        totals: dict[str, float] = {}
        for rows in _batches(len(x), batch):
            results = self._losses.run({"x": x[rows], LABELS: labels[rows]})
            for name, value in results.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(labels[rows])
        return {name: total / len(x) for name, total in totals.items()}


@dataclass(frozen=True)
class EarlyExits:
    """What early exits gave: fractions, exits in their order."""

    accuracy: float
    shares: tuple[float, ...]
    accuracies: tuple[float, ...]


def early_exits(
    graph: Graph, store: Store, x: np.ndarray, labels: np.ndarray, *,
    thresholds: Mapping[str, float], batch: int = 256, backend: str = "numpy",
) -> EarlyExits:  # fmt: skip
    """Run a network with its early exits; `thresholds` by exit replace the declared defaults."""
    run = compile(graph, backend, store=store)
    count = sum(n.op.opcode == "exit" for n in graph.nodes)
    if not count:
        raise GraphError(f"{graph.name} has no exits; insert some (insert_exits)")
    fed = {f"{name}.threshold": value for name, value in thresholds.items()}
    right, taken = [], []
    for rows in _batches(len(x), batch):
        outputs = run.run({**fed, "x": x[rows]})
        right.append(outputs["logits"].argmax(axis=1) == labels[rows])
        taken.append(outputs["exit"])
    hit, exits = np.concatenate(right), np.concatenate(taken)
    masks = [exits == k for k in range(count)]
    return EarlyExits(
        accuracy=float(hit.mean()),
        shares=tuple(float(m.mean()) for m in masks),
        accuracies=tuple(float(hit[m].mean()) if m.any() else float("nan") for m in masks),
    )


def _batches(count: int, size: int) -> Iterator[slice]:
    if not count:
        raise GraphError("there are no samples to evaluate on")
    return (slice(i, i + size) for i in range(0, count, size))
