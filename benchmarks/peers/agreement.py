"""Whether two systems computed the same, and how far they are apart.

Inference: max |a - b| / max |b| of each output, at most 2e-4 (float32 sums in another order through
up to 110 layers); exits that samples left by must be equal. Training: the losses of the steps,
relative, at most 1e-3, and what the steps added to the trained arrays, per array

    ||(a - start) - (b - start)|| / max(||b - start||, ||all b - start|| / 100)

at most 2e-1: in DFN-MR-56 and ResNet-110 at the start float32 gradients are 1 to 5 % from
those of float64, and the second step adds to it. A wrong formula is off by far more. Arrays whose
true gradient is 0 (a bias in front of batch norm) hold rounding alone, hence the second term.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OUTPUTS = 2e-4
LOSSES = 1e-3
STEPS = 2e-1

Arrays = Sequence[np.ndarray]


def outputs_difference(ours: Arrays, theirs: Arrays) -> float:
    """The largest relative difference of any output; of integers the share that differs."""
    return max((_difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return float("inf")
    if b.dtype.kind in "iu":
        return float(np.mean(a != b))
    worst = np.max(np.abs(a.astype(np.float64) - b), initial=0.0)
    return _finite(worst / max(np.max(np.abs(b), initial=0.0), 1e-30))


def losses_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of the losses."""
    return max(_finite(abs(a - b) / max(abs(b), 1e-30)) for a, b in zip(ours, theirs, strict=True))


def steps_difference(start: Arrays, ours: Arrays, theirs: Arrays) -> float:
    """The largest difference of what training added to any array."""
    moved = [b.astype(np.float64) - s for s, b in zip(start, theirs, strict=True)]
    whole = np.sqrt(sum(float(np.sum(m * m)) for m in moved))
    found = [
        np.linalg.norm(a.astype(np.float64) - s - m) / max(np.linalg.norm(m), whole / 100, 1e-30)
        for s, a, m in zip(start, ours, moved, strict=True)
    ]
    return _finite(max(found, default=0.0))


def _finite(number: float) -> float:
    """NaN is no agreement."""
    return float(number) if np.isfinite(number) else float("inf")
