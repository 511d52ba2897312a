"""Sweeps as JSON lines: the baseline, then one object a point, units in the names of the keys."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from branchgraph.analysis.sweep import Point, Sweep
from branchgraph.ir.atomic import replacing


def records(
    result: Sweep, name: str, front: Iterable[Point] = (), chosen: Point | None = None
) -> list[dict[str, Any]]:
    """One dict for the baseline and each point. `_fraction` is 0..1; a ratio is without unit.

    The baseline's `exit_seconds_per_sample` is empty where no time model was asked for.
    """
    kept = set(front)
    base = {
        "kind": "baseline",
        "network": name,
        "accuracy_fraction": result.baseline.accuracy,
        "seconds_per_sample": result.baseline.seconds_per_sample,
        "batch_samples": result.batch,
        "times_are": "measured",
        "exits": list(result.exits),
        "exit_seconds_per_sample": list(result.exit_seconds),
    }
    return [base] + [
        {
            "kind": "point",
            "network": f"B-{name}",
            "thresholds": [_finite(t) for t in p.threshold],
            "accuracy_fraction": p.accuracy,
            "exits": list(result.exits),
            "exit_share_fractions": list(p.exit_shares),
            "exit_accuracy_fractions": list(p.exit_accuracies),
            "largest_score_at_first_exit": p.largest_score,
            "seconds_per_sample": p.seconds_per_sample,
            "gain_ratio": p.gain,
            "trunk_only_seconds_per_sample": p.trunk_seconds_per_sample,
            "trunk_only_gain_ratio": p.trunk_gain,
            "batch_samples": result.batch,
            "times_are": "measured" if p.measured else "modelled",
            "on_front": p in kept,
            "chosen": p == chosen,
        }
        for p in result.points
    ]


def write_jsonl(
    result: Sweep,
    name: str,
    path: Path,
    front: Iterable[Point] = (),
    chosen: Point | None = None,
) -> None:
    """The sweep as JSON lines; `BranchgraphError` when the file cannot be written."""
    lines = (json.dumps(r, allow_nan=False) for r in records(result, name, front, chosen))
    with replacing(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _finite(threshold: float) -> float | str:
    """JSON has no infinity; its text is what `float` and `--thresholds` read."""
    return threshold if math.isfinite(threshold) else str(threshold)
