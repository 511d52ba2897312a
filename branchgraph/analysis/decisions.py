"""What every setting of the thresholds would decide, from one pass over the data.

An exit's score does not depend on any threshold. With the scores s_k and the predictions of all
exits k = 1..K for every sample, the program with thresholds T_1 ... T_{K-1} sends a sample to

    min { k : s_k relation T_k },   K where there is none

with the relation of the criterion (`ir.ops.exit`): `<` for entropies, `>` for confidence and
margin, `>=` for patience, in float64. The scores are the values that the executed program compares.
A sample whose score equals a threshold is thus decided alike; where a later exit sees fewer rows
than here, sums may round otherwise, and a score within rounding of a threshold may too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from branchgraph.analysis.sweep import check_samples, early_exits
from branchgraph.compiler import compile
from branchgraph.ir.graph import Graph
from branchgraph.ir.ops.exit import RELATIONS, Exit, leaves
from branchgraph.ir.rebuild import clone
from branchgraph.ir.state import Store
from branchgraph.passes.lower_exits import exits_of
from branchgraph.passes.specialise import specialise

_COMPARISONS = {
    "less": np.less,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
}
#: Relation to a threshold at which nobody leaves, and one at which everybody does.
_NOBODY = {"less": 0.0, "greater": 1.0, "greater_equal": float("inf")}
_EVERYBODY = {"less": float("inf"), "greater": -1.0, "greater_equal": 0.0}


def nobody(criterion: str) -> float:
    """A threshold that switches an exit off."""
    return _NOBODY[RELATIONS[criterion]]


def everybody(criterion: str) -> float:
    """A threshold at which every sample leaves."""
    return _EVERYBODY[RELATIONS[criterion]]


def leave(criterion: str, scores: np.ndarray, threshold: float) -> np.ndarray:
    """bool[N]: which samples leave at an exit."""
    found: np.ndarray = _COMPARISONS[RELATIONS[criterion]](scores, threshold)
    return found


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of the early exits, and the classes that all exits predict, for every sample."""

    exits: tuple[str, ...]
    criteria: tuple[str, ...]
    scores: tuple[np.ndarray, ...]
    predictions: tuple[np.ndarray, ...]

    def taken(self, setting: Sequence[float]) -> np.ndarray:
        """The exit of every sample, counted from 0."""
        taken = np.full(len(self.predictions[0]), len(self.scores), dtype=np.int64)
        for k in reversed(range(len(self.scores))):
            taken[leave(self.criteria[k], self.scores[k], setting[k])] = k
        return taken

    def predicted(self, taken: np.ndarray) -> np.ndarray:
        """The class that each sample is given at its exit."""
        found: np.ndarray = np.stack(self.predictions)[taken, np.arange(len(taken))]
        return found

    def largest(self, taken: np.ndarray) -> float:
        """The largest score among samples that left at the first exit, as `Point` has it."""
        gone = self.scores[0][taken == 0]
        return float(gone.max()) if len(gone) and self.criteria[0] != "patience" else 0.0


def scores(
    graph: Graph,
    store: Store,
    x: np.ndarray,
    *,
    batch: int = 256,
    backend: str = "numpy",
    training: bool = False,
) -> Scores:
    """Run every exit on every sample of a declared network, once.

    `training` takes the training form (batch statistics, dropout); `store` stays as it is.
    """
    early = early_exits(graph)
    check_samples(x)
    form = specialise(_scoring(graph), training=training, exits="all")
    run = compile(form, backend, store=store.copy() if training else store)
    parts = [run.run({"x": x[i : i + batch]}) for i in range(0, len(x), batch)]
    whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    count = len(early)
    return Scores(
        exits=tuple(n.op.name for n in exits_of(graph) if isinstance(n.op, Exit)),
        criteria=tuple(n.op.criterion for n in early if isinstance(n.op, Exit)),
        scores=tuple(whole[f"score.{k}"] for k in range(count)),
        predictions=tuple(whole[f"logits.{k}"].argmax(axis=1) for k in range(count + 1)),
    )


def _scoring(graph: Graph) -> Graph:
    """A declared graph whose outputs are the logits of all exits and the scores of the early ones.

    The score is what the comparison that `leaves` emits reads, so it cannot differ from it.
    """
    copy = clone(graph)
    copy.keep(output=lambda name: False)
    for k, node in enumerate(exits_of(copy)):
        logits, *rest = node.inputs
        copy.output(f"logits.{k}", logits)
        if rest:
            assert isinstance(node.op, Exit)
            left = leaves(node.op.criterion, logits, rest[0], tuple(rest[1:]))
            assert left.producer is not None
            copy.output(f"score.{k}", left.producer.inputs[0])
    return copy
