"""Generated criteria and moves of rows against the ops that define them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.codegen import engine, exits
from branchgraph.ir.ops.elementwise import Compare
from branchgraph.ir.ops.exit import ExitScore
from branchgraph.ir.ops.rows import Compact, Scatter

if engine.missing():
    pytest.skip(engine.missing(), allow_module_level=True)

#: Scores are sums of at most 1000 float64 terms, whatever the order.
ERROR = 1e-13
CLASSES = [1, 2, 3, 7, 8, 9, 10, 16, 17, 63, 64, 65, 72, 73, 100, 1000]
ROWS = [0, 1, 2, 7, 33]


def run(text: str, arrays: Sequence[np.ndarray]) -> None:
    call, arguments, keep = engine.routine(text).call([a.ctypes.data for a in arrays], 1)
    call(*arguments)
    del keep


def logits(rows: int, classes: int, scale: float = 3.0) -> np.ndarray:
    x = np.random.default_rng(rows + classes).normal(size=(rows, classes)) * scale
    return x.astype(np.float32)


def scores(criterion: str, z: np.ndarray) -> np.ndarray:
    found = np.full(len(z), -7.0)
    text = exits.score(criterion, z.shape[1], engine.lanes())
    run(text, [z, np.array([len(z)]), found])
    return found


def defined(criterion: str, z: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return ExitScore(criterion).evaluate(z)[0] if len(z) else np.zeros(0)


# -- elementary functions --------------------------------------------------------------------------


def units_off(
    text: str, lanes: int, x: np.ndarray, exact: Callable[[np.ndarray], np.ndarray]
) -> float:
    """The largest error, in units in the last place."""
    a, y = np.zeros(lanes), np.zeros(lanes)
    call, arguments, keep = engine.routine(text).call([a.ctypes.data, y.ctypes.data], 1)
    found = []
    for part in x.reshape(-1, lanes):
        a[:] = part
        call(*arguments)
        found.append(y.copy())
    del keep
    expected = exact(x.astype(np.longdouble))
    off = np.abs(np.concatenate(found) - expected) / np.spacing(expected.astype(np.float64))
    return float(off.max())


def test_exponentials_are_within_two_units() -> None:
    lanes = engine.lanes() // 2
    rng = np.random.default_rng(0)
    x = -np.concatenate([10 ** rng.uniform(-9, 2.85, 4000), rng.uniform(0, 708, 4000)])
    assert units_off(exits.exponential(engine.lanes()), lanes, x, np.exp) <= 2


def test_logarithms_are_within_two_units() -> None:
    rng = np.random.default_rng(0)
    near = 1 + 10 ** rng.uniform(-15, 0, 4000)
    x = np.concatenate([near, 10 ** rng.uniform(0, 6, 4000), np.sqrt(2.0) * 2.0 ** np.arange(9)])
    assert units_off(exits.logarithm(), 1, x, np.log) <= 2


def test_elementary_functions_at_their_ends() -> None:
    lanes = engine.lanes() // 2
    ends = np.array([0.0, -0.0, -np.inf, np.nan, -708.5, -1e300, -1e-300, -1.0])
    expected = np.array([1, 1, 0, np.nan, 0, 0, 1, np.exp(-1.0)])
    for start in range(0, 8, lanes):
        x, y = ends[start : start + lanes].copy(), np.zeros(lanes)
        run(exits.exponential(engine.lanes()), [x, y])
        np.testing.assert_allclose(y, expected[start : start + lanes], rtol=1e-15, atol=0)
    for given_, wanted in ((1.0, 0.0), (np.inf, np.inf), (np.nan, np.nan)):
        y = np.zeros(1)
        run(exits.logarithm(), [np.array([given_]), y])
        np.testing.assert_array_equal(y, [wanted])


# -- criteria --------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", exits.CRITERIA)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 3e3])
def test_scores_are_those_of_the_op(criterion: str, scale: float) -> None:
    for classes, rows in product(CLASSES, ROWS):
        z = logits(rows, classes, scale)
        expected = defined(criterion, z)
        np.testing.assert_allclose(scores(criterion, z), expected, rtol=ERROR, atol=ERROR)


@pytest.mark.parametrize("criterion", exits.CRITERIA)
def test_equal_logits(criterion: str) -> None:
    for classes in CLASSES:
        z = np.full((2, classes), 0.3, np.float32)
        np.testing.assert_allclose(scores(criterion, z), defined(criterion, z), atol=ERROR)


@pytest.mark.parametrize("criterion", exits.CRITERIA)
@pytest.mark.parametrize("classes", CLASSES)
def test_not_a_number_and_infinity_as_in_numpy(criterion: str, classes: int) -> None:
    special = [np.nan, np.inf, -np.inf]
    z = np.concatenate([logits(1, classes).repeat(9, axis=0), np.zeros((3, classes), np.float32)])
    for row, (value, place) in enumerate(product(special, [0, classes // 2, classes - 1])):
        z[row, place] = value
    for row, value in zip((9, 10, 11), special):
        z[row] = value
    found, expected = scores(criterion, z), defined(criterion, z)
    np.testing.assert_allclose(found, expected, rtol=ERROR, atol=ERROR, equal_nan=True)


@pytest.mark.parametrize("criterion", exits.CRITERIA)
@pytest.mark.parametrize("relation", exits.RELATIONS)
def test_decisions_follow_from_scores(criterion: str, relation: str) -> None:
    for classes, rows in product([1, 10, 65], ROWS):
        z = logits(rows, classes)
        z[3:4] = np.nan
        own = scores(criterion, z)
        # at a threshold that is one of the scores strict relations differ from the others
        for limit in (-1.0, 0.4, 10.0, np.nan, *own[:1]):
            threshold, mask, count = np.array(limit), np.full(rows + 1, 9, np.uint8), np.array([-1])
            text = exits.decision(criterion, classes, engine.lanes(), relation)
            run(text, [z, np.array([rows]), threshold, mask, count])
            leave = Compare(relation).evaluate(own, threshold)[0]
            np.testing.assert_array_equal(mask[:rows], ~leave)
            assert mask[rows] == 9, "written behind the last row"
            assert count[0] == np.count_nonzero(~leave)


# -- rows ------------------------------------------------------------------------------------------

masks = st.lists(st.booleans(), max_size=20).map(lambda bits: np.array(bits, np.bool_))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(masks, st.lists(st.integers(1, 300), min_size=1, max_size=3))
def test_rows_are_gathered_and_put_back(mask: np.ndarray, sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 256, (len(mask), size), np.uint8) for size in sizes]
    kept = [np.full((len(mask) + 1, size), 77, np.uint8) for size in sizes]
    rows = np.array([len(mask)])
    pairs = [a for pair in zip(values, kept) for a in pair]
    run(exits.gather(sizes), [mask, rows, *pairs])
    count = int(mask.sum())
    for found, expected in zip(kept, Compact(count).evaluate(mask, *values)):
        np.testing.assert_array_equal(found[:count], expected)
        assert (found[count:] == 77).all(), "written behind the last row that stays"
    for value, size, inner in zip(values, sizes, kept):
        base = np.full_like(value, 5)
        for bases in ([], [base]):
            out = np.full_like(value, 99)
            places = [mask, rows, inner, *(bases or [base]), out]
            run(exits.scatter(size, base=bool(bases)), places)
            expected = Scatter().evaluate(mask, inner[:count], *bases)[0]
            np.testing.assert_array_equal(out, expected)
