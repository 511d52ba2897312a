"""Thresholds for a wanted share of samples that stay, from the scores of training data.

With the n scores of an exit over all samples (no sample has left before), sorted ascending,

    T = score[int(n - keep n)]            0-based; keep = the share that stays, 0 < keep <= 1

so that, without ties, int(n - keep n) samples score below T and leave: BranchyNet's rule. Where a
larger score is the more confident one (confidence, margin), scores are sorted descending: the same
rule mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from branchgraph.analysis.decisions import leave, scores
from branchgraph.analysis.sweep import setting_of
from branchgraph.ir.errors import GraphError, RefusalError
from branchgraph.ir.graph import Graph
from branchgraph.ir.ops.exit import RELATIONS
from branchgraph.ir.state import Store


@dataclass(frozen=True, eq=False)
class Quantiles:
    """One threshold an early exit, the share that it makes stay, and the ascending scores."""

    thresholds: tuple[float, ...]
    stay: tuple[float, ...]
    scores: tuple[np.ndarray, ...]


def quantile_thresholds(
    graph: Graph,
    store: Store,
    images: np.ndarray,
    keep: float | Sequence[float],
    *,
    batch: int = 256,
    training: bool = False,
    backend: str = "numpy",
) -> Quantiles:
    """Thresholds at which the share `keep` of `images` stays, for all early exits or one each.

    The network runs in inference form, in which its thresholds will be used. `training=True` takes
    the training form, as BranchyNet does: batch statistics of batches of `batch`, and dropout.
    """
    found = scores(graph, store, images, batch=batch, training=training, backend=backend)
    shares = setting_of(keep, len(found.criteria))
    thresholds = tuple(map(_quantile, found.criteria, found.scores, shares))
    left = [leave(c, s, t).mean() for c, s, t in zip(found.criteria, found.scores, thresholds)]
    return Quantiles(
        thresholds, tuple(1.0 - float(m) for m in left), tuple(np.sort(s) for s in found.scores)
    )


def _quantile(criterion: str, found: np.ndarray, keep: float) -> float:
    if criterion == "patience":
        raise RefusalError(
            "patience counts exits, so its scores divide no share of samples; "
            "give thresholds 1, 2, ... instead"
        )
    if not 0.0 < keep <= 1.0:
        raise GraphError(f"the share that stays must be above 0 and at most 1, got {keep:g}")
    ordered = np.sort(found)
    if RELATIONS[criterion] != "less":
        ordered = ordered[::-1]
    total = len(ordered)
    return float(ordered[min(int(total - keep * total), total - 1)])
