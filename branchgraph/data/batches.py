"""Batches of an epoch: a permutation that depends on the seed and the epoch alone.

Training that resumes at epoch e sees the batches it would have seen without the interruption, on
every machine, whatever was drawn before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from branchgraph.ir.errors import GraphError


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` examples in `epoch` (from 0), int64 [count]."""
    for what, value in (("count", count), ("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise GraphError(f"batches: expected {what} of at least 0, got {value}")
    return np.random.default_rng([seed, epoch]).permutation(count)


def batches(
    count: int, size: int, *, seed: int, epoch: int, shuffle: bool = True
) -> Iterator[np.ndarray]:
    """Index arrays that cover `count` examples once, `size` at a time; the last may be shorter.

    >>> [len(b) for b in batches(10, 4, seed=0, epoch=0)]
    [4, 4, 2]
    """
    if size < 1:
        raise GraphError(f"batches: expected a size of at least 1, got {size}")
    order = permutation(count, seed, epoch) if shuffle else np.arange(count)
    return (order[start : start + size] for start in range(0, count, size))
