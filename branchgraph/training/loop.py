"""Training: one compiled step (forward, backward, optimiser) called over shuffled batches.

A run that goes on from its `Progress` and its states gives bit for bit what it would have given
without the interruption: the order of samples depends on (seed, epoch), dropout on the key and step
that are states themselves.

Where the network was cast to a low type with a loss scale that moves (`cast:dynamic=true`), a step
whose gradients are not finite is left out and lowers the scale; nobody has to ask for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from branchgraph.compiler import Executable, compile
from branchgraph.compiler.backend import backend as find_backend
from branchgraph.compiler.horizontal import fuse_horizontally
from branchgraph.data import batches
from branchgraph.ir.errors import GraphError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph
from branchgraph.ir.optimisers import Optimiser
from branchgraph.ir.state import Role, Store
from branchgraph.passes.cast import SkipOverflow
from branchgraph.passes.specialise import specialise
from branchgraph.training.history import History, Progress
from branchgraph.training.loss import LABELS, joint_loss

Means = dict[str, float]


@dataclass
class Training:
    """A network made ready to train: the step, its store, and the optimiser that owns the slots."""

    step: Executable
    store: Store
    optimiser: Optimiser

    @staticmethod
    def of(
        graph: Graph, optimiser: Optimiser, *, backend: str = "numpy", store: Store | None = None,
        seed: int = 0, threads: int | None = None, fpmath: str = "strict",
    ) -> Training:  # fmt: skip
        """Specialise a declared network for training, differentiate its joint loss, compile.

        `threads` and `fpmath` are those of `compile`.

        With a loss scale among the states, steps that overflow leave parameters and slots as they
        are (`passes.cast.SkipOverflow`).
        """
        store = Store() if store is None else store
        forward = specialise(graph, training=True)
        forward = fuse_horizontally(forward, find_backend(backend), training=True)
        training = differentiate(joint_loss(forward))
        whole = optimiser.attach(training)
        if any(state.role is Role.LOSS_SCALE for state in whole.reads):
            whole = SkipOverflow().apply(whole)
        step = compile(whole, backend, store=store, seed=seed, threads=threads, fpmath=fpmath)
        return Training(step, store, optimiser)


def train(
    training: Training, x: np.ndarray, labels: np.ndarray, *, epochs: int, batch: int,
    seed: int = 0,
    progress: Progress | None = None,
    on_step: Callable[[Means], None] = lambda result: None,
    on_epoch: Callable[[int, Means], None] = lambda epoch, means: None,
    validate: Callable[[], Mapping[str, float]] = dict,
    **inputs: float,
) -> History:  # fmt: skip
    """Train up to `epochs` epochs in all. x: [M, ...], labels: [M]; every epoch is shuffled anew.

    `progress` is where to start and is kept up to date: when `on_step` or `on_epoch` is called (or
    raises), it and the store agree, so that both can be saved together. `validate` is asked after
    each epoch for more quantities to record. `inputs` are fed besides the data (`learning_rate`,
    `exit1.weight`, ...).
    """
    if len(x) != len(labels):
        raise GraphError(f"training needs a label an example, got {len(x)} and {len(labels)}")
    progress = Progress() if progress is None else progress
    while progress.epoch < epochs:
        epoch = progress.epoch
        order = batches(len(x), batch, seed=seed, epoch=epoch)
        last = time.perf_counter()
        for rows in islice(order, progress.step, None):
            fed = {**inputs, "x": x[rows], LABELS: labels[rows]}
            result = {k: float(v) for k, v in training.step.run(fed).items()}
            last, before = time.perf_counter(), last
            progress.add(result, last - before)
            on_step(result)
        means = {**progress.means(), **validate()}
        progress.close(means)
        on_epoch(epoch, means)
    return progress.history
