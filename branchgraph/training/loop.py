"""Training: one compiled step (forward, backward, optimiser) called over shuffled batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from branchgraph.compiler import Executable, compile
from branchgraph.data import batches
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph
from branchgraph.ir.optimisers import Optimiser
from branchgraph.ir.state import Store
from branchgraph.passes.specialise import specialise
from branchgraph.training.loss import LABELS, joint_loss


@dataclass
class History:
    """What each epoch gave: unweighted means over batches, and its seconds."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def series(self, name: str) -> list[float]:
        """One quantity over the epochs."""
        return [epoch[name] for epoch in self.epochs]

    @property
    def names(self) -> list[str]:
        """Quantities that are recorded."""
        return list(self.epochs[0]) if self.epochs else []


@dataclass
class Training:
    """A network made ready to train: the step, its store, and the optimiser that owns the slots."""

    step: Executable
    store: Store
    optimiser: Optimiser

    @staticmethod
    def of(
        graph: Graph, optimiser: Optimiser, *, backend: str = "numpy", store: Store | None = None,
        seed: int = 0,
    ) -> Training:  # fmt: skip
        """Specialise a declared network for training, differentiate its joint loss, compile."""
        store = Store() if store is None else store
        training = differentiate(joint_loss(specialise(graph, training=True)))
        step = compile(optimiser.attach(training), backend, store=store, seed=seed)
        return Training(step, store, optimiser)

    def epoch(
        self, x: np.ndarray, labels: np.ndarray, order: Iterable[np.ndarray],
        on_step: Callable[[dict[str, float]], None] = lambda result: None, **inputs: float,
    ) -> dict[str, float]:  # fmt: skip
        """One pass over batches, given as row numbers; means over batches of every output.

        `inputs` are fed besides the data (`learning_rate`, `exit1.weight`, ...).
        """
        sums: dict[str, float] = {}
        count = 0
        for rows in order:
            count += 1
            fed = {**inputs, "x": x[rows], LABELS: labels[rows]}
            result = {k: float(v) for k, v in self.step.run(fed).items()}
            on_step(result)
            for name, value in result.items():
                sums[name] = sums.get(name, 0.0) + value
        return {name: total / count for name, total in sums.items()}


def train(
    training: Training, x: np.ndarray, labels: np.ndarray, *, epochs: int, batch: int,
    seed: int = 0,
    on_step: Callable[[dict[str, float]], None] = lambda result: None,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, means: None,
    **inputs: float,
) -> History:  # fmt: skip
    """Train for some epochs. x: [M, ...], labels: [M]; batches are reshuffled every epoch."""
    history = History()
    for epoch in range(epochs):
        start = time.perf_counter()
        order = batches(len(x), batch, seed=seed, epoch=epoch)
        means = training.epoch(x, labels, order, on_step, **inputs)
        history.seconds.append(time.perf_counter() - start)
        history.epochs.append(means)
        on_epoch(epoch, means)
    return history
