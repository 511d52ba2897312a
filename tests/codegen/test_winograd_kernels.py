"""Generated 3x3 convolutions against sums in float64: forward, both gradients, what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.codegen import engine, winograd
from branchgraph.codegen.winograd import Geometry

if engine.missing():
    pytest.skip(engine.missing(), allow_module_level=True)

#: Of `reach`, the most that a sum could come to: 32 roundings. The largest seen was 14.
ERROR = 2e-6


@dataclass
class Case:
    """A convolution [N, H, W, C] with random operands."""

    geometry: Geometry
    images: int
    threads: int

    def __post_init__(self) -> None:
        g, rng = self.geometry, np.random.default_rng(0)
        self.x = _normal(rng, (self.images, *g.size, g.channels))
        self.weight = _normal(rng, (g.filters, g.channels, 3, 3)) / np.float32(3)
        self.dy = _normal(rng, (self.images, *g.out, g.filters))
        self.bias = _normal(rng, (g.filters,))

    def forward(self, *, bias: bool = False, epilogue: tuple[str, ...] = ()) -> np.ndarray:
        operands = [self.dy for name in epilogue if name != "relu"]
        y = np.full_like(self.dy, np.nan)
        _forward(self, self.geometry, self.x, y, False, bias, epilogue, operands)
        return y

    def data_gradient(self) -> np.ndarray:
        g = self.geometry
        pad = (2 - g.pad[0], 2 - g.pad[1])
        turned = Geometry(g.filters, g.channels, g.out, g.size, pad, g.lanes)
        dx = np.full_like(self.x, np.nan)
        _forward(self, turned, self.dy, dx, True, False, (), [])
        return dx

    def weight_gradient(self, threads: int | None = None) -> np.ndarray:
        g = self.geometry
        work = winograd.work(g, self.images, self.threads)
        sums, scratch = _memory(work.sums(g)), _memory(work.scratch(g))
        out = np.full_like(self.weight, np.nan)
        arrays = [self.x, self.dy, out, sums, scratch]
        text = winograd.weight_gradient(g, work)
        _call(text, [a.ctypes.data for a in arrays] + [self.images], threads or self.threads)
        return out


def _forward(
    case: Case, geometry: Geometry, x: np.ndarray, y: np.ndarray, turned: bool, bias: bool,
    epilogue: tuple[str, ...], operands: list[np.ndarray],
) -> None:  # fmt: skip
    packed = _memory(geometry.packed)
    text = winograd.pack(geometry, turned=turned)
    _call(text, [case.weight.ctypes.data, packed.ctypes.data], case.threads)
    work = winograd.work(geometry, case.images, case.threads)
    scratch = _memory(work.scratch(geometry))
    text = winograd.forward(geometry, work, bias=bias, epilogue=epilogue)
    arrays = [x, packed, y, scratch]
    added = [case.bias] * bias + operands
    addresses = [a.ctypes.data for a in arrays], [a.ctypes.data for a in added]
    _call(text, [*addresses[0], case.images, *addresses[1]], case.threads)


def _call(text: str, arguments: list[int], threads: int) -> None:
    call, prepared, _ = engine.routine(text).call(arguments, threads)
    call(*prepared)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _memory(nbytes: int) -> np.ndarray:
    """Memory that shows if anything is read before it is written."""
    return np.full(nbytes // 4, np.nan, np.float32)


def exact(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The convolution and its gradients, tap by tap in float64."""
    g = case.geometry
    (top, left), (down, across) = g.pad, g.out
    room = [
        (top, max(down + 2 - top - g.size[0], 0)),
        (left, max(across + 2 - left - g.size[1], 0)),
    ]
    x = np.pad(case.x.astype(np.float64), [(0, 0), *room, (0, 0)])
    y, dx, dw = np.zeros(case.dy.shape), np.zeros(x.shape), np.zeros(case.weight.shape)
    for r, s in product(range(3), range(3)):
        tap, window = case.weight[:, :, r, s].astype(np.float64), x[:, r : r + down, s : s + across]
        y += window @ tap.T
        dx[:, r : r + down, s : s + across] += case.dy @ tap
        dw[:, :, r, s] = np.tensordot(case.dy, window, ((0, 1, 2), (0, 1, 2)))
    return y, dx[:, top : top + g.size[0], left : left + g.size[1]], dw


def reach(factor: np.ndarray, summed: np.ndarray) -> float:
    """The largest of one factor times the sum of the other's magnitudes: bounds any result."""
    return float(np.abs(factor).max(initial=0) * np.abs(summed).max(initial=0))


def assert_close(case: Case, *found: np.ndarray, expected: Sequence[np.ndarray] = ()) -> None:
    """Results, gradients in the input, and in the weights, as many as are given."""
    x, weight, dy = case.x, np.abs(case.weight), case.dy
    reaches = (
        reach(x, weight.sum((1, 2, 3))) + reach(dy, np.ones(1)) + reach(case.bias, np.ones(1)),
        reach(dy, weight.sum((0, 2, 3))),
        reach(dy, np.abs(x).sum((0, 1, 2))),
    )
    for one, other, most in zip(found, expected or exact(case), reaches):
        np.testing.assert_allclose(one, other, rtol=0, atol=ERROR * most)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = draw(st.tuples(st.integers(1, 13), st.integers(1, 13)))
    pad = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    end = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    out = tuple(max(s + p + e - 2, 1) for s, p, e in zip(size, pad, end))
    lanes = draw(st.sampled_from([8, engine.lanes()]))
    geometry = Geometry(draw(st.integers(1, 40)), draw(st.integers(1, 70)), size, out, pad, lanes)
    return Case(geometry, draw(st.integers(1, 9)), draw(st.integers(1, 3)))


@settings(max_examples=12, deadline=None)
@given(cases())
def test_any_geometry(case: Case) -> None:
    assert_close(case, case.forward(), case.data_gradient(), case.weight_gradient())


def many(threads: int) -> Case:
    """So many tiles that each thread takes its own."""
    geometry = Geometry(16, 32, (32, 31), (32, 31), (1, 1), engine.lanes())
    return Case(geometry, 17, threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_of_each_thread(threads: int) -> None:
    case = many(threads)
    assert not winograd.work(case.geometry, case.images, threads).together
    assert_close(case, case.forward(), case.data_gradient(), case.weight_gradient())


def test_fewer_threads_than_asked_for() -> None:
    case = many(3)
    assert_close(case, *exact(case)[:2], case.weight_gradient(threads=1))


def test_what_follows() -> None:
    geometry = Geometry(8, 20, (6, 5), (6, 5), (1, 1), engine.lanes())
    case = Case(geometry, 2, 1)
    y, _, _ = exact(case)
    plain = y + case.bias
    followed = {
        (True, ()): plain,
        (True, ("relu",)): np.maximum(plain, 0),
        (True, ("add", "relu")): np.maximum(plain + case.dy, 0),
        (False, ("add", "mask")): np.where(case.dy > 0, y + case.dy, 0),
    }
    for (bias, epilogue), expected in followed.items():
        assert_close(case, case.forward(bias=bias, epilogue=epilogue), expected=[expected])


def test_points_are_of_least_error() -> None:
    """Twice the error of a float32 sum, not six times, as with the points 0, 1, 2."""
    case = Case(Geometry(64, 64, (16, 16), (16, 16), (1, 1), engine.lanes()), 4, 1)
    y, _, _ = exact(case)
    error = np.sqrt(np.mean((case.forward() - y) ** 2) / np.mean(y**2))
    assert error < 1.2e-6


def test_nan_and_infinity_spread_within_tiles() -> None:
    """A convolution would make 9 results NaN; here it is whole tiles of 4x4, and no more."""
    case = Case(Geometry(4, 4, (12, 12), (12, 12), (1, 1), engine.lanes()), 2, 1)
    for bad in (np.nan, np.inf):
        case.x[0, 5, 5, 1] = bad
        y = case.forward()
        assert np.isnan(y[0, 4:8, 4:8]).all()
        assert np.isfinite(y[1]).all()
        assert np.isfinite(y[0, 8:, 8:]).all()


def test_no_images() -> None:
    case = Case(Geometry(4, 4, (8, 8), (8, 8), (1, 1), engine.lanes()), 0, 2)
    assert case.forward().shape == (0, 8, 8, 4)
    np.testing.assert_array_equal(case.weight_gradient(), 0)
