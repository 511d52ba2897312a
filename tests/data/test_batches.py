"""Batches cover an epoch once, in an order that depends on seed and epoch alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchgraph.data import batches
from branchgraph.ir.errors import GraphError


@given(
    count=st.integers(0, 60), size=st.integers(1, 20), seed=st.integers(0, 2**64), shuffle=...
)  # fmt: skip
def test_every_example_comes_once_and_the_last_batch_may_be_short(
    count: int, size: int, seed: int, shuffle: bool
) -> None:
    found = list(batches(count, size, seed=seed, epoch=3, shuffle=shuffle))
    assert sorted(np.concatenate([[], *found])) == list(range(count))
    assert [len(b) for b in found] == [min(size, count - i) for i in range(0, count, size)]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, size: int = 7) -> list[int]:
        return np.concatenate(list(batches(50, size, seed=seed, epoch=epoch))).tolist()

    assert order(1, 2) == order(1, 2) == order(1, 2, size=50)
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9


def test_the_order_is_the_recorded_one() -> None:
    (rows,) = batches(8, 8, seed=0, epoch=1)
    assert rows.tolist() == [1, 3, 7, 6, 0, 4, 2, 5]


def test_without_shuffling_examples_come_in_their_order() -> None:
    assert [b.tolist() for b in batches(5, 2, seed=9, epoch=9, shuffle=False)] == [
        [0, 1], [2, 3], [4],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "size", "seed", "epoch", "message"),
    [
        (5, 0, 0, 0, "a size of at least 1, got 0"),
        (-1, 2, 0, 0, "count of at least 0, got -1"),
        (5, 2, -1, 0, "seed of at least 0, got -1"),
        (5, 2, 0, -1, "epoch of at least 0, got -1"),
    ],
)
def test_senseless_numbers_are_refused_at_once(
    count: int, size: int, seed: int, epoch: int, message: str
) -> None:
    with pytest.raises(GraphError, match=message):
        batches(count, size, seed=seed, epoch=epoch)
