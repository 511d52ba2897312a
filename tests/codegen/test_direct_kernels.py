"""Generated convolutions and weight gradients against sums in float64, and what counts promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from branchgraph.codegen import engine
from branchgraph.codegen.direct import Chain, Layer, pack
from branchgraph.codegen.direct_gradient import Gradient
from branchgraph.ir.ops.conv import Conv, ConvWeightGradient
from branchgraph.ir.ops.pool import MaxPool

if engine.missing():
    pytest.skip(engine.missing(), allow_module_level=True)

#: Of the largest sum of magnitudes, what a sum may be wrong by: its roundings, in any order.
UNIT = 2.0**-24

SMALL = Layer(1, 5, (12, 12), (5, 5), begin=(3, 3), end=(3, 3), relu=True, pool=(2, 2), bias=True)
LENET = (
    replace(SMALL, size=(28, 28)),
    replace(SMALL, channels=5, filters=10, size=(15, 15), cover_all=True),
    replace(SMALL, channels=10, filters=20, size=(9, 9), cover_all=True),
)


def meaning(layer: Layer, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A layer in NumPy: [N, C, H, W] to [N, K, H', W']."""
    operands = (x, weight, bias) if layer.bias else (x, weight)
    (y,) = Conv(layer.stride, (*layer.begin, *layer.end), (1, 1)).evaluate(*operands)
    (y,) = MaxPool(layer.pool, layer.pool, (0, 0, 0, 0), layer.cover_all).evaluate(y)
    return np.maximum(y, 0) if layer.relu else y


class Case:
    """A chain with random operands."""

    def __init__(self, chain: Chain, samples: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.chain, self.samples = chain, samples
        self.x = _normal(rng, samples, chain.layers[0].channels, *chain.layers[0].size)
        self.weights = [_normal(rng, y.filters, y.channels, *y.kernel) for y in chain.layers]
        self.biases = [_normal(rng, y.filters) for y in chain.layers]

    def run(self, threads: int = 1) -> np.ndarray:
        """What the kernel gives, in memory that was full of NaN."""
        chain, last = self.chain, self.chain.layers[-1]
        x = np.ascontiguousarray(self.x.transpose(0, 2, 3, 1))
        y = np.full((self.samples, *last.result, last.filters), np.nan, np.float32)
        scratch = np.full(chain.scratch * threads // 4, np.nan, np.float32)
        packs = [np.full(chain.packed(n), np.nan, np.float32) for n in range(len(chain.layers))]
        for packed, weight, tile in zip(packs, self.weights, chain.tiles):
            pack(weight, tile.filters, packed)
        places = [a.ctypes.data for a in (*packs, *self.biases)]
        arguments = [x.ctypes.data, y.ctypes.data, scratch.ctypes.data, self.samples, *places]
        routine = engine.routine(chain.text(), improved=False)
        call, prepared, keep = routine.call(arguments, threads)
        call(*prepared)
        del keep
        return y.transpose(0, 3, 1, 2)

    def expected(self) -> tuple[np.ndarray, float]:
        """The result in float64, and the most it can be wrong by in float32."""
        y, error = self.x.astype(np.float64), 0.0
        for layer, *parameters in zip(self.chain.layers, self.weights, self.biases):
            weight, bias = (p.astype(np.float64) for p in parameters)
            taps = layer.channels * layer.kernel[0] * layer.kernel[1]
            gain = float(np.abs(weight).sum((1, 2, 3)).max())
            reach = gain * float(np.abs(y).max(initial=0.0)) + float(np.abs(bias).max())
            error = gain * error + (taps + 1) * UNIT * reach
            y = meaning(layer, y, weight, bias)
        return y, error

    def check(self, threads: int = 1) -> None:
        expected, error = self.expected()
        np.testing.assert_allclose(self.run(threads), expected, rtol=0, atol=error)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@st.composite
def layers(draw: st.DrawFn, channels: int | None = None, size: int | None = None) -> Layer:
    """Any layer that is in the domain, and whose result has elements."""
    number = st.integers(1, 13)
    pair = st.tuples(number, number) if size is None else st.just((size, size))
    height, width = draw(pair)
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    pads = [draw(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1))) for k in kernel]
    grown = [
        (b + max(k - d - b - e, 0), e)
        for (b, e), k, d in zip(pads, kernel, (height, width))
    ]  # fmt: skip
    layer = Layer(
        draw(st.integers(1, 12)) if channels is None else channels,
        draw(st.integers(1, 40)),
        (height, width),
        kernel,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        (grown[0][0], grown[1][0]),
        (grown[0][1], grown[1][1]),
        bias=draw(st.booleans()),
        relu=draw(st.booleans()),
    )
    pool = tuple(draw(st.integers(1, min(3, d))) for d in layer.convolved)
    return replace(layer, pool=(pool[0], pool[1]), cover_all=draw(st.booleans()))


@given(layers(), st.integers(0, 19), st.sampled_from([1, 2]), st.booleans())
@settings(max_examples=40, deadline=None)
@example(LENET[2], 17, 2, True)
@example(LENET[1], 1, 1, False)
def test_any_layer(layer: Layer, samples: int, threads: int, lanes_are_samples: bool) -> None:
    Case(Chain.of([layer], engine.lanes(), lanes_are_samples), samples).check(threads)


@pytest.mark.parametrize("lanes_are_samples", [False, True])
@pytest.mark.parametrize("samples", [1, 3, 16])
def test_layers_one_after_the_other(samples: int, lanes_are_samples: bool) -> None:
    first = SMALL
    second = Layer(5, 10, (7, 7), (3, 3), (2, 2), (1, 1), (1, 1), bias=False)
    third = replace(SMALL, channels=10, filters=20, size=(4, 4), cover_all=True, pool=(3, 2))
    assert first.result == second.size
    assert second.result == third.size
    chain = Chain.of([first, second, third], engine.lanes(), lanes_are_samples)
    Case(chain, samples).check(threads=2)


@pytest.mark.parametrize("lanes", [8, 16])
def test_vectors_of_either_length(lanes: int) -> None:
    """Processors without AVX-512 have half the lanes; LLVM makes two of a vector there."""
    for lanes_are_samples in (False, True):
        Case(Chain.of([LENET[1]], lanes, lanes_are_samples), lanes + 1).check()


def test_layers_of_a_chain_fit_together() -> None:
    with pytest.raises(ValueError, match=r"layer 1 reads \(15, 15, 5\), layer 0 gives \(7, 7, 5\)"):
        Chain.of([SMALL, LENET[1]], engine.lanes(), True)


def test_a_sample_has_the_same_bits_in_every_batch() -> None:
    """All ways of computing add the products of a sum up in one order: rows, channels, columns."""
    lanes = engine.lanes()
    found = [
        Case(Chain.of(LENET, count, by_sample), 5).run()
        for count, by_sample in ((lanes, False), (lanes, True), (8, True))
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_no_samples_touch_nothing() -> None:
    for lanes_are_samples in (False, True):
        chain = Chain.of([SMALL], engine.lanes(), lanes_are_samples)
        assert Case(chain, 0).run().shape == (0, 5, *SMALL.result)


@pytest.mark.parametrize("lanes_are_samples", [False, True])
def test_nan_and_infinity_go_where_a_sum_takes_them(lanes_are_samples: bool) -> None:
    """They go through pooling and ReLU too, and do not reach outputs whose windows miss them."""
    layer = replace(SMALL, relu=False)
    case = Case(Chain.of([layer], engine.lanes(), lanes_are_samples), 3)
    case.x[0, 0, 0, 0] = np.nan
    case.x[1, 0, 5, 5] = np.inf
    case.x[2, 0, 11, 11] = -np.inf
    for relu in (False, True):
        layer = replace(layer, relu=relu)
        case.chain = Chain.of([layer], engine.lanes(), lanes_are_samples)
        expected = meaning(layer, case.x, case.weights[0], case.biases[0])
        assert np.isnan(expected).any()
        assert np.isfinite(expected[0]).any()
        np.testing.assert_allclose(case.run(), expected, rtol=1e-4, atol=1e-4)


def test_products_with_padding_are_not_counted() -> None:
    """28 cells of a row meet five taps each, but for one at either end, where no output is."""
    assert LENET[0].products == 5 * (28 * 5 - 2) ** 2
    assert [layer.products for layer in LENET] == [95_220, 266_450, 369_800]


def test_what_lanes_are_follows_from_the_number_of_samples() -> None:
    lanes = engine.lanes()
    assert not Chain.best(LENET, lanes, 1, 1).samples
    assert Chain.best(LENET, lanes, 64, 1).samples
    # Half of eight samples on each of two threads is faster than all of them on one.
    assert not Chain.best(LENET, lanes, 8, 2).samples
    # A plane of 64 channels for every lane does not fit into the cache.
    wide = Layer(2, 5, (128, 128), (3, 3), begin=(1, 1), end=(1, 1))
    assert not Chain.best([wide], lanes, 64, 1).samples


def test_counted_cycles_grow_with_the_groups_of_a_thread() -> None:
    chain = Chain.of(LENET, engine.lanes(), True)
    assert chain.cycles(64, 2) == chain.cycles(2 * chain.lanes, 1) * (64 // chain.lanes) / 4


# -- gradients of weights and biases ------------------------------------------------------------


class Back:
    """The gradient of a layer with random operands."""

    def __init__(self, gradient: Gradient, samples: int) -> None:
        rng, layer = np.random.default_rng(0), gradient.layer
        self.gradient, self.samples = gradient, samples
        self.x = _normal(rng, samples, *layer.size, layer.channels)
        self.dy = _normal(rng, samples, *layer.convolved, layer.filters)

    def run(self, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(dW, db); memory was full of NaN."""
        gradient, layer = self.gradient, self.gradient.layer
        weight = np.full((layer.filters, layer.channels, *layer.kernel), np.nan, np.float32)
        bias = np.full(layer.filters, np.nan, np.float32)
        sums = np.full(gradient.sums * threads // 4, np.nan, np.float32)
        scratch = np.full(gradient.scratch * threads // 4, np.nan, np.float32)
        _call(gradient.text(), [self.x, self.dy, sums, scratch], threads, self.samples)
        _call(gradient.finish(threads, bias=True), [sums, weight, bias], threads)
        return weight, bias

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        layer = self.gradient.layer
        x, dy = (a.transpose(0, 3, 1, 2).astype(np.float64) for a in (self.x, self.dy))
        pads = (*layer.begin, *layer.end)
        op = ConvWeightGradient(layer.stride, pads, (1, 1), 1, layer.kernel)
        return op.evaluate(x, dy)[0], dy.sum((0, 2, 3))

    def check(self, threads: int = 1) -> None:
        count = self.samples * self.gradient.layer.convolved[0] * self.gradient.layer.convolved[1]
        largest = float(np.abs(self.x).max(initial=1.0)) * float(np.abs(self.dy).max(initial=1.0))
        for found, expected in zip(self.run(threads), self.expected()):
            np.testing.assert_allclose(found, expected, rtol=0, atol=count * UNIT * largest)


def _call(text: str, arrays: list[np.ndarray], threads: int, *numbers: int) -> None:
    routine = engine.routine(text, improved=False)
    call, prepared, keep = routine.call([*(a.ctypes.data for a in arrays), *numbers], threads)
    call(*prepared)
    del keep


@given(layers(), st.integers(0, 19), st.sampled_from([1, 2]), st.sampled_from([8, 16]))
@settings(max_examples=40, deadline=None)
@example(LENET[2], 17, 2, 16)
def test_the_gradient_of_any_layer(layer: Layer, samples: int, threads: int, lanes: int) -> None:
    Back(Gradient.of(layer, lanes), samples).check(threads)


def test_infinities_in_gradients_meet_only_samples_that_are_there() -> None:
    """Lanes behind the last sample must not turn infinity into NaN."""
    back = Back(Gradient.of(SMALL, engine.lanes()), engine.lanes() + 3)
    back.x[-1, 5, 5, 0] = np.inf
    weight, bias = back.run()
    with np.errstate(invalid="ignore"):
        expected, _ = back.expected()
    np.testing.assert_array_equal(np.isnan(weight), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(weight), np.isinf(expected))
    assert np.isinf(weight).any()
    assert np.isfinite(bias).all()


def test_gradients_that_do_not_stay_in_the_cache_are_not_made_here() -> None:
    wide = Layer(4, 5, (128, 128), (3, 3), begin=(1, 1), end=(1, 1))
    assert Gradient.best(wide, engine.lanes(), 64, 1) is None
    assert Gradient.best(LENET[1], engine.lanes(), 64, 1) is not None
