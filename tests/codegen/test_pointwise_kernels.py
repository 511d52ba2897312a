"""Generated element-wise kernels against NumPy in float32, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.codegen import engine
from branchgraph.codegen.pointwise import (
    BOOLS,
    FLOAT,
    FLOATS,
    Expression,
    Row,
    Step,
    call,
    cut,
)

if engine.missing():
    pytest.skip(engine.missing(), allow_module_level=True)

LANES = engine.lanes()
SIZES = (0, 1, LANES - 1, LANES, LANES + 1, 1000)
SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3.4e38, 1 / 3, -2.5], np.float32
)
BINARY: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide,
    "maximum": np.maximum, "minimum": np.minimum,
}  # fmt: skip
UNARY: dict[str, Callable[..., np.ndarray]] = {
    "negate": np.negative, "absolute": np.abs, "sqrt": np.sqrt,
}  # fmt: skip
RELATIONS: dict[str, Callable[..., np.ndarray]] = {
    "less": np.less, "less_equal": np.less_equal, "greater": np.greater,
    "greater_equal": np.greater_equal, "equal": np.equal, "not_equal": np.not_equal,
}  # fmt: skip
FUNCTIONS = {**BINARY, **UNARY, **RELATIONS, "where": np.where}


def numbers(rng: np.random.Generator, size: int) -> np.ndarray:
    """Normal numbers of many magnitudes, and every third one special."""
    found = (rng.standard_normal(size) * 10.0 ** rng.integers(-6, 7, size)).astype(np.float32)
    return np.where(rng.integers(0, 3, size) == 0, rng.choice(SPECIAL, size), found)


def operands(expression: Expression, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    made = {
        FLOATS: lambda: numbers(rng, size),
        FLOAT: lambda: numbers(rng, 1),
        BOOLS: lambda: rng.integers(0, 2, size).astype(bool),
    }
    return [made[kind]() for kind in expression.inputs]


def results(expression: Expression, size: int) -> list[np.ndarray]:
    kinds = (bool if expression.gives_bools(v) else np.float32 for v in expression.outputs)
    return [np.zeros(size, kind) for kind in kinds]


def row(size: int, arrays: Sequence[np.ndarray]) -> Row:
    return Row(size, tuple(a.ctypes.data for a in arrays))


def expected(expression: Expression, given: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """The same in NumPy, step by step."""
    values = list(given)
    with np.errstate(all="ignore"):
        for step in expression.steps:
            if step.name == "constant":
                values.append(np.array([float.fromhex(step.digits)]).astype(np.float32))
            else:
                values.append(FUNCTIONS[step.name](*(values[o] for o in step.operands)))
    return [np.broadcast_to(values[v], size) for v in expression.outputs]


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal bits; one NaN is as good as another."""
    if found.dtype == bool:
        np.testing.assert_array_equal(found, wanted)
        return
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), nan)
    bits = np.ascontiguousarray(wanted).view(np.uint32)
    np.testing.assert_array_equal(found.view(np.uint32)[~nan], bits[~nan])


def check(expression: Expression, sizes: Sequence[int], seed: int = 0, threads: int = 1) -> None:
    """A table of one row a size."""
    rng = np.random.default_rng(seed)
    tables = [(n, operands(expression, n, rng), results(expression, n)) for n in sizes]
    rows = [row(n, [*inputs, *outputs]) for n, inputs, outputs in tables]
    function, arguments, _kept = call(expression, rows, threads)
    function(*arguments)
    for size, inputs, outputs in tables:
        for found, wanted in zip(outputs, expected(expression, inputs, size)):
            assert_same(found, wanted)


@st.composite
def expressions(draw: st.DrawFn) -> Expression:
    """Up to eight steps on up to four inputs; everything is stored."""
    kinds = st.sampled_from([FLOATS, FLOAT, BOOLS])
    inputs = (FLOATS, *draw(st.lists(kinds, max_size=3)))
    floats = [k for k, kind in enumerate(inputs) if kind != BOOLS]
    bools = [k for k, kind in enumerate(inputs) if kind == BOOLS]
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, 8))):
        known = ["constant", *BINARY, *UNARY, *RELATIONS, *(["where"] if bools else [])]
        name = draw(st.sampled_from(known))
        count = 1 if name in UNARY else 2
        chosen = tuple(draw(st.sampled_from(floats)) for _ in range(count))
        if name == "where":
            chosen = (draw(st.sampled_from(bools)), *chosen)
        (bools if name in RELATIONS else floats).append(len(inputs) + len(steps))
        constant = name == "constant"
        steps.append(Step.constant(draw(st.floats(width=32))) if constant else Step(name, chosen))
    stored = tuple(range(len(inputs), len(inputs) + len(steps)))
    return Expression(inputs, tuple(steps), stored)


@settings(max_examples=25, deadline=None)
@given(expressions(), st.integers(0, 2**16), st.sampled_from([1, 2]))
def test_random_expressions_give_the_bits_of_numpy(
    expression: Expression, seed: int, threads: int
) -> None:
    check(expression, SIZES, seed, threads)


@pytest.mark.parametrize("name", [*BINARY, *RELATIONS])
def test_every_pair_of_special_numbers(name: str) -> None:
    a, b = (np.ascontiguousarray(m.ravel()) for m in np.meshgrid(SPECIAL, SPECIAL))
    expression = Expression((FLOATS, FLOATS), (Step(name, (0, 1)),), (2,))
    (found,) = results(expression, a.size)
    function, arguments, _kept = call(expression, [row(a.size, [a, b, found])], 1)
    function(*arguments)
    with np.errstate(all="ignore"):
        assert_same(found, FUNCTIONS[name](a, b))


def test_products_are_rounded_before_they_are_added() -> None:
    """1 + u, squared, loses its u^2 to the product's rounding; a fused multiply-add keeps it."""
    a = np.full(LANES, 1 + 2.0**-12, np.float32)
    b = np.full(LANES, -(1 + 2.0**-11), np.float32)
    found = np.ones(LANES, np.float32)
    expression = Expression((FLOATS, FLOATS), (Step("multiply", (0, 0)), Step("add", (2, 1))), (3,))
    function, arguments, _kept = call(expression, [row(LANES, [a, b, found])], 1)
    function(*arguments)
    np.testing.assert_array_equal(found, np.zeros(LANES, np.float32))


MOMENTUM = Expression(
    (FLOATS, FLOAT, FLOATS, FLOAT, FLOATS),
    (
        Step("multiply", (0, 1)), Step("multiply", (2, 3)), Step("subtract", (5, 6)),
        Step("add", (4, 7)),
    ),
    (7, 8),
)  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_a_table_of_updates_in_place(threads: int) -> None:
    """Results lie where operands did; large rows are cut between the threads."""
    rng = np.random.default_rng(0)
    factor, rate = np.array([0.9], np.float32), np.array([0.1], np.float32)
    tables = [[numbers(rng, n) for _ in range(3)] for n in (5, 100_001, 0, 70_000, 16, 1)]
    with np.errstate(all="ignore"):
        wanted = [(v * factor - g * rate, p + (v * factor - g * rate)) for v, g, p in tables]
    rows = [row(v.size, [v, factor, g, rate, p, v, p]) for v, g, p in tables]
    function, arguments, _kept = call(MOMENTUM, rows, threads)
    function(*arguments)
    for (v, _, p), (new_v, new_p) in zip(tables, wanted):
        assert_same(v, new_v)
        assert_same(p, new_p)


@given(st.lists(st.integers(0, 400), max_size=6), st.integers(1, 5))
def test_cutting_keeps_every_element_once_and_in_order(sizes: list[int], parts: int) -> None:
    """Addresses move with the elements, those of single numbers do not."""
    rows = [Row(n, tuple(10**6 * (k + 1) + j for j in range(7))) for k, n in enumerate(sizes)]
    pieces = cut(MOMENTUM, rows, parts)
    assert len(pieces) == parts
    found = [r for part in pieces for r in part]
    expanded = [
        tuple(a + e * w for a, w in zip(r.addresses, MOMENTUM.widths))
        for r in found
        for e in range(r.size)
    ]
    assert expanded == [
        tuple(a + e * w for a, w in zip(r.addresses, MOMENTUM.widths))
        for r in rows
        for e in range(r.size)
    ]
    share = -(-sum(sizes) // parts)
    assert all(sum(r.size for r in part) <= share + 128 for part in pieces)
