"""Dimensions are affine integer forms, and say so when they cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchgraph.ir.dims import Dim, as_dim, bind_shape, parse_dim, product
from branchgraph.ir.errors import DimensionError, FormatError, ShapeError

N = Dim.symbol("N")
M = Dim.symbol("M")


@st.composite
def dims(draw: st.DrawFn):  # type: ignore[no-untyped-def]
    n, m, c = (draw(st.integers(-9, 9)) for _ in range(3))
    return n * N + m * M + c


@given(dims())
def test_text_of_a_dimension_parses_back(d) -> None:  # type: ignore[no-untyped-def]
    assert parse_dim(str(d)) == d


@given(dims(), dims(), st.integers(0, 50), st.integers(0, 50))
def test_arithmetic_commutes_with_substitution(a, b, n, m) -> None:  # type: ignore[no-untyped-def]
    def at(d):  # type: ignore[no-untyped-def]
        return d.substitute({"N": n, "M": m}) if isinstance(d, Dim) else d

    assert at(a + b) == at(a) + at(b)
    assert at(a - b) == at(a) - at(b)
    assert at(a * 3) == at(a) * 3


def test_a_dimension_without_symbols_is_a_plain_int() -> None:
    assert N - N == 0
    assert type(N - N) is int
    assert 2 * N // N == 2


def test_division_stays_affine_or_asks_for_a_size() -> None:
    assert (6 * N + 5) // 3 == 2 * N + 1
    with pytest.raises(DimensionError, match="concrete"):
        _ = N // 2


def test_a_product_of_two_symbols_is_refused_in_words() -> None:
    assert product((3, N, 4)) == 12 * N
    with pytest.raises(DimensionError, match="not affine"):
        _ = N * M


def test_binding_solves_symbols_from_actual_sizes() -> None:
    found: dict[str, int] = {}
    bind_shape((2 * N + 1, 3), (9, 3), found, "x")
    assert found == {"N": 4}


@pytest.mark.parametrize("actual", [(8, 3), (9, 4), (9,)])
def test_binding_names_the_axis_that_does_not_fit(actual: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="x: expected shape"):
        bind_shape((2 * N + 1, 3), actual, {}, "x")


def test_a_symbol_bound_twice_must_agree() -> None:
    with pytest.raises(ShapeError, match="N = 4"):
        bind_shape((N, N), (4, 5), {}, "x")


@pytest.mark.parametrize("text", ["", "N N", "2**N", "3.5", "N/2", "-"])
def test_text_that_is_no_dimension_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="no dimension"):
        parse_dim(text)


@pytest.mark.parametrize("value", [-1, True, 2.5, 2**60])
def test_sizes_out_of_range_are_refused(value: object) -> None:
    with pytest.raises(ShapeError):
        as_dim(value)  # type: ignore[arg-type]
