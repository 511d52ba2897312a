"""Screening: many settings of the thresholds, and those worth having (arXiv 1709.01686).

Decisions of all settings come from one pass over the data (`analysis.decisions`). Their times are
expected from the time t_k of a sample that leaves at exit k, measured by sending everybody there:

    time(setting) = sum_k share_k(setting) t_k                                k = 1..K exits

Settings on the front of these times are then run and their wall clock is taken. The sum is right
for single samples (B-LeNet on one CPU: within 2.1 %); in batches it is too low where a few samples
go on, as a call with few rows costs more for each (batch 64: by up to 21 %).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from branchgraph.analysis.decisions import Scores, everybody, nobody, scores
from branchgraph.analysis.sweep import Baseline, Point, Sweep, point_of, setting_of, sweep
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.ops.exit import RELATIONS
from branchgraph.ir.state import Store

#: Settings that a grid may have: some seconds of decisions.
MOST_SETTINGS = 10_000
#: Added to the last kept accuracy when the front goes on; the library default of BranchyNet.
TOLERANCE = -0.0005

#: Criterion's relation to thresholds that usually cover its range; the 17 of BranchyNet's LeNet.
_BASES = {
    "less": (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75,
             1.0, 2.0, 3.0, 5.0, 10.0),
    "greater": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999,
                0.9995, 0.9999, 1.0),
    "greater_equal": (1.0, 2.0, 3.0, 4.0, 5.0),
}  # fmt: skip


def base_list(criterion: str) -> tuple[float, ...]:
    """Thresholds to try when no others are given."""
    return _BASES[RELATIONS[criterion]]


def grid(base: Iterable[float], early_exits: int) -> list[tuple[float, ...]]:
    """Every combination of the thresholds `base` over the early exits: k ** early_exits settings.

    Raises `GraphError` when there are more than `MOST_SETTINGS`.
    """
    values = _values(base)
    size = len(values) ** early_exits
    if size > MOST_SETTINGS:
        fits = int(MOST_SETTINGS ** (1 / early_exits) + 1e-9)
        raise GraphError(
            f"{len(values)} thresholds over {early_exits} early exits make {size} settings, more "
            f"than {MOST_SETTINGS}; give a base list of at most {fits}, or vary the first exit only"
        )
    return list(itertools.product(values, repeat=early_exits))


def first_exit_only(base: Iterable[float], criteria: Sequence[str]) -> list[tuple[float, ...]]:
    """Settings that vary the first exit and switch the other early exits off."""
    others = tuple(nobody(c) for c in criteria[1:])
    return [(t, *others) for t in _values(base)]


def _values(base: Iterable[float]) -> list[float]:
    values = list(dict.fromkeys(float(t) for t in base))
    if not values:
        raise GraphError("a grid needs thresholds, the base list has none")
    return values


def front(points: Iterable[Point], tolerance: float = TOLERANCE) -> list[Point]:
    """The points worth having, the fastest first.

    The fastest is kept; then, in the order of time, each with accuracy > last kept + `tolerance`. A
    negative tolerance keeps points that lose so much against the last, a positive one asks for so
    much more (the two BranchyNet code bases differ in the sign). Of points that decide alike the
    fastest stands for all.
    """
    kept: list[Point] = []
    seen = set()
    for point in sorted(points, key=lambda p: (p.seconds_per_sample, -p.accuracy)):
        decided = (point.accuracy, point.exit_shares, point.exit_accuracies)
        if decided not in seen and (not kept or point.accuracy > kept[-1].accuracy + tolerance):
            kept.append(point)
            seen.add(decided)
    return kept


def cheapest(points: Iterable[Point], accuracy: float) -> Point:
    """The fastest point with at least `accuracy` (0..1); `GraphError` names the best without."""
    found = list(points)
    enough = [p for p in found if p.accuracy >= accuracy]
    if not enough:
        best = most_accurate(found)
        raise GraphError(
            f"no setting reaches accuracy {accuracy:g}; the best is {best.accuracy:.6g} "
            f"with thresholds {spelled(best.threshold)}"
        )
    return min(enough, key=lambda p: (p.seconds_per_sample, -p.accuracy))


def most_accurate(points: Iterable[Point]) -> Point:
    """The point of the highest accuracy, the fastest of these."""
    return max(points, key=lambda p: (p.accuracy, -p.seconds_per_sample))


def spelled(setting: Sequence[float]) -> str:
    """Thresholds as the command line reads them, every digit kept: `0.05+1`."""
    return "+".join(repr(float(t)).removesuffix(".0").replace("e+", "e") for t in setting)


def screen(
    graph: Graph,
    store: Store,
    x: np.ndarray,
    labels: np.ndarray,
    settings: Iterable[float | Sequence[float]],
    *,
    batch: int = 1,
    repeats: int = 3,
    tolerance: float = TOLERANCE,
    backend: str = "numpy",
) -> Sweep:
    """`sweep` for many settings: all decided in one pass, only the front run and timed.

    Points off the front have `measured=False` and the times of the model. The front that is timed
    is at least as wide as that of tolerance 0, so the fastest point for any accuracy is on it.
    """
    found = scores(graph, store, x, batch=batch, backend=backend)
    wanted = list(dict.fromkeys(setting_of(t, len(found.criteria)) for t in settings))
    measure = partial(sweep, graph, store, x, labels, batch=batch, repeats=repeats, backend=backend)
    forced = measure(_forced(found.criteria))
    points = [_modelled(found, labels, setting, forced) for setting in wanted]
    chosen = [p.threshold for p in front(points, min(tolerance, 0.0))]
    timed = measure(chosen)
    real = {p.threshold: p for p in timed.points}
    return dataclasses.replace(
        timed,
        points=tuple(real.get(p.threshold, _regained(p, timed.baseline)) for p in points),
        exit_seconds=tuple(p.seconds_per_sample for p in forced.points),
    )


def _forced(criteria: Sequence[str]) -> list[tuple[float, ...]]:
    """Settings that send everybody to the first exit, the second, ... and the last."""
    off = tuple(nobody(c) for c in criteria)
    return [(*off[:k], everybody(c), *off[k + 1 :]) for k, c in enumerate(criteria)] + [off]


def _modelled(
    found: Scores, labels: np.ndarray, setting: tuple[float, ...], forced: Sweep
) -> Point:
    taken = found.taken(setting)
    shares = np.bincount(taken, minlength=len(found.exits)) / len(taken)
    seconds = shares @ [p.seconds_per_sample for p in forced.points]
    trunk = shares @ [p.trunk_seconds_per_sample for p in forced.points]
    return point_of(
        setting,
        taken,
        found.predicted(taken) == labels,
        len(found.exits),
        found.largest(taken),
        (float(seconds), float(trunk), forced.baseline.seconds_per_sample),
        measured=False,
    )


def _regained(point: Point, baseline: Baseline) -> Point:
    """The point with its gains against the baseline that was measured last."""
    base = baseline.seconds_per_sample
    return dataclasses.replace(
        point,
        gain=base / point.seconds_per_sample,
        trunk_gain=base / point.trunk_seconds_per_sample,
    )
