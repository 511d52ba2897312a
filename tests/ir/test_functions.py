"""Functions of values: against NumPy, their derivatives, ties and extremes, refusals."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from branchgraph.compiler import compile
from branchgraph.ir import functions as f
from branchgraph.ir.cost import cost
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.roi import RoiMaxPool
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.passes.specialise import specialise
from tests.goldens import folder, golden
from tests.ir.applied import SAME_FORMULA, Build, assert_derivatives, gradients, result

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def apart(*shape: int) -> np.ndarray:
    """Both signs, any two elements at least 0.1 apart, none nearer to 0 than 0.05."""
    return (RNG.permutation(math.prod(shape)).reshape(shape) - math.prod(shape) // 2 + 0.5) * 0.1


@dataclass(frozen=True, eq=False)
class Case:
    id: str
    build: Build
    reference: Callable[..., np.ndarray]
    arrays: tuple[np.ndarray, ...]


def case(id: str, build: Build, reference: Callable[..., Any], *arrays: np.ndarray) -> Case:
    return Case(id, build, reference, arrays)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def convolved(x: np.ndarray, w: np.ndarray, stride: int = 1, pad: int = 0) -> np.ndarray:
    """One image [C, H, W] with kernels [O, C, k, l], cell by cell."""
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad)])
    high, wide = ((d - k) // stride + 1 for d, k in zip(x.shape[1:], w.shape[2:]))
    y = np.zeros((len(w), high, wide))
    for i, j in np.ndindex(high, wide):
        patch = x[:, i * stride : i * stride + w.shape[2], j * stride : j * stride + w.shape[3]]
        y[:, i, j] = (w * patch).sum(axis=(1, 2, 3))
    return y


def each(x: np.ndarray, w: np.ndarray, **geometry: int) -> np.ndarray:
    """A batch with one kernel."""
    return np.stack([convolved(image, w, **geometry) for image in x])


def windows(x: np.ndarray, k: int, s: int, p: int) -> np.ndarray:
    """[N, C, H', W', k k]: the cells of every window of the zero-padded x."""
    x = np.pad(x, [(0, 0), (0, 0), (p, p), (p, p)])
    high, wide = ((d - k) // s + 1 for d in x.shape[2:])
    return np.stack(
        [
            x[:, :, i : i + s * (high - 1) + 1 : s, j : j + s * (wide - 1) + 1 : s]
            for i, j in itertools.product(range(k), repeat=2)
        ],
        axis=-1,
    )


def standard(x: np.ndarray, axes: tuple[int, ...], eps: float) -> np.ndarray:
    mean = x.mean(axis=axes, keepdims=True)
    return (x - mean) / np.sqrt(x.var(axis=axes, keepdims=True) + eps)


def column(v: np.ndarray, rank: int) -> np.ndarray:
    return v.reshape(1, -1, *(1,) * (rank - 2))


def adaptive(x: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    y = np.zeros((*x.shape[:2], *size))
    for at in np.ndindex(*size):
        cut = tuple(
            slice(math.floor(i * h / o), math.ceil((i + 1) * h / o))
            for i, h, o in zip(at, x.shape[2:], size)
        )
        y[(..., *at)] = x[(slice(None), slice(None), *cut)].mean(axis=tuple(range(2, x.ndim)))
    return y


def resized(x: np.ndarray, size: tuple[int, int], aligned: bool) -> np.ndarray:
    y = np.zeros((*x.shape[:2], *size))
    for at in np.ndindex(*size):
        weights = []
        for i, h, o in zip(at, x.shape[2:], size):
            v = i * (h - 1) / (o - 1) if aligned else max((i + 0.5) * h / o - 0.5, 0)
            tent = np.maximum(1 - np.abs(np.minimum(v, h - 1) - np.arange(h)), 0)
            weights.append(tent)
        y[(..., *at)] = np.einsum("nchw,h,w->nc", x, *weights)
    return y


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


ELEMENTARY = (
    case("clip", lambda x: f.clip(x, -0.7, 0.8), lambda x: np.clip(x, -0.7, 0.8), apart(3, 8)),
    case("gelu", f.gelu, lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2, normal(3, 4)),
    case(
        "selu",
        f.selu,
        lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * (np.exp(x) - 1)),
        apart(3, 5),
    ),
    case("softsign", f.softsign, lambda x: x / (1 + abs(x)), apart(3, 4)),
    case("softplus", lambda x: f.softplus(x, 2.0), lambda x: np.log1p(np.exp(2 * x)) / 2, apart(9)),
    case(
        "prelu",
        f.prelu,
        lambda x, a: np.where(x >= 0, x, column(a, 3) * x),
        apart(2, 3, 4),
        normal(3),
    ),
    case("prelu-0d", f.prelu, lambda x, a: np.where(x >= 0, x, a * x), apart(2, 3), normal()),
    case("silu", f.silu, lambda x: x * sigmoid(x), normal(3, 4)),
    case("swish", lambda x: f.swish(x, 1.5), lambda x: x * sigmoid(1.5 * x), normal(3, 4)),
    case(
        "swish-value",
        f.swish,
        lambda x, b: x * sigmoid(column(b, 3) * x),
        normal(2, 3, 4),
        normal(3),
    ),
    case("hard_sigmoid", f.hard_sigmoid, lambda x: np.clip(0.2 * x + 0.5, 0, 1), apart(9, 8)),
    case(
        "hard_sigmoid-slope",
        lambda x: f.hard_sigmoid(x, 0.5, 0.4),
        lambda x: np.clip(0.5 * x + 0.4, 0, 1),
        apart(4, 8),
    ),
    case("relu6", f.relu6, lambda x: np.clip(x * 5, 0, 30) / 5, apart(20, 8)),
    case(
        "maxout",
        lambda x: f.maxout(x, 3),
        lambda x: x.reshape(2, 2, 3, 4).max(axis=2),
        apart(2, 6, 4),
    ),
    case(
        "maxout-last",
        lambda x: f.maxout(x, 2, axis=-1),
        lambda x: x.reshape(2, 3, 2, 2).max(axis=3),
        apart(2, 3, 4),
    ),
    case("maximum", f.maximum, np.maximum, apart(3, 4) + 0.03, apart(4)),
    case("minimum", f.minimum, np.minimum, apart(3, 1) + 0.03, apart(2, 1, 4)),
    case("square", f.square, np.square, normal(3, 4)),
    case("exp", f.exp, np.exp, normal(3)),
    case("log", f.log, np.log, abs(normal(3)) + 0.5),
    case("sqrt", f.sqrt, np.sqrt, abs(normal(3)) + 0.5),
    case("absolute", f.absolute, np.abs, apart(5)),
)

LAYOUT = (
    case(
        "broadcast_to",
        lambda x: f.broadcast_to(x, (2, 3, 4)),
        lambda x: np.broadcast_to(x, (2, 3, 4)),
        normal(3, 1),
    ),
    case("expand_dims", lambda x: f.expand_dims(x, -1), lambda x: x[..., None], normal(2, 3)),
    case("squeeze", f.squeeze, np.squeeze, normal(1, 3, 1, 2)),
    case("squeeze-one", lambda x: f.squeeze(x, -2), lambda x: x[:, :, 0], normal(1, 3, 1, 2)),
    case("stack", lambda *x: f.stack(x, 1), lambda *x: np.stack(x, 1), normal(2, 3), normal(2, 3)),
    case("stack-last", lambda *x: f.stack(x, -1), lambda *x: np.stack(x, -1), *normal(3, 2, 2)),
    case("swap_axes", lambda x: f.swap_axes(x, 0, -1), lambda x: x.swapaxes(0, 2), normal(2, 3, 4)),
    case("transpose", f.transpose, np.transpose, normal(2, 3, 4)),
    case("repeat", lambda x: f.repeat(x, 3, 1), lambda x: x.repeat(3, 1), normal(2, 3, 2)),
    case("tile", lambda x: f.tile(x, (2, 1, 3)), lambda x: np.tile(x, (2, 1, 3)), normal(2, 3, 2)),
    *(
        case(
            f"pad-{mode}",
            lambda x, mode=mode: f.pad(x, (0, 2, 1), (1, 0, 3), mode),
            lambda x, mode=mode: np.pad(x, [(0, 1), (2, 0), (1, 3)], mode=mode),
            normal(2, 3, 4),
        )
        for mode in ("constant", "edge", "reflect")
    ),
    case(
        "pad-value",
        lambda x: f.pad(x, (1,), (2,), value=1.5),
        lambda x: np.pad(x, [(1, 2)], constant_values=1.5),
        normal(3),
    ),
    case("pad-nothing", lambda x: f.pad(x, (0,), (0,), "edge"), lambda x: x, normal(3)),
    case(
        "nearest-scale",
        lambda x: f.resize_nearest(x, scale=3),
        lambda x: x.repeat(3, 2).repeat(3, 3),
        normal(2, 1, 2, 3),
    ),
    case(
        "nearest-size",
        lambda x: f.resize_nearest(x, size=(5, 2)),
        lambda x: x[:, :, [0, 0, 1, 1, 2]][..., [0, 2]],
        normal(2, 1, 3, 4),
    ),
    *(
        case(
            f"bilinear-{size}-{aligned}",
            lambda x, size=size, a=aligned: f.resize_bilinear(x, size=size, align_corners=a),
            lambda x, size=size, a=aligned: resized(x, size, a),
            normal(2, 1, 3, 4),
        )
        for size in ((6, 8), (5, 2))
        for aligned in (True, False)
    ),
)

REDUCTION = (
    case("min", lambda x: f.reduce_min(x, 1), lambda x: x.min(1), apart(2, 3, 4)),
    case("max", lambda x: f.reduce_max(x, (0, -1)), lambda x: x.max((0, 2)), apart(2, 3, 4)),
    case(
        "sum", lambda x: f.reduce_sum(x, keepdims=True), lambda x: x.sum(keepdims=True), normal(4)
    ),
    case("mean", lambda x: f.reduce_mean(x, ()), lambda x: x, normal(4)),
    case("prod", f.reduce_prod, np.prod, normal(2, 3)),
    case("prod-axis", lambda x: f.reduce_prod(x, 0), lambda x: x.prod(0), normal(3, 2)),
    case(
        "prod-axes",
        lambda x: f.reduce_prod(x, (0, 2), keepdims=True),
        lambda x: x.prod((0, 2), keepdims=True),
        normal(2, 3, 2),
    ),
    case("norm-1", lambda x: f.norm(x, 1, 1), lambda x: abs(x).sum(1), apart(2, 3)),
    case("norm-2", f.norm, lambda x: np.sqrt((x**2).sum()), normal(2, 3)),
    case(
        "norm-max", lambda x: f.norm(x, -1, math.inf), lambda x: abs(x).max(1), apart(3, 4) + 0.02
    ),
    case(
        "global_norm",
        lambda *x: f.global_norm(x),
        lambda *x: np.linalg.norm(np.concatenate([v.ravel() for v in x])),
        normal(2, 3),
        normal(4),
        normal(),
    ),
    case(
        "l2_normalise",
        lambda x: f.l2_normalise(x, eps=0.1),
        lambda x: x / np.sqrt((x**2).sum(axis=(1, 2), keepdims=True) + 0.1),
        normal(2, 3, 2),
    ),
    case(
        "l2_normalise-channels",
        lambda x: f.l2_normalise(x, 1),
        lambda x: x / np.sqrt((x**2).sum(axis=1, keepdims=True) + 1e-10),
        normal(2, 3, 2),
    ),
    case(
        "instance_norm",
        f.instance_norm,
        lambda x, g, b: column(g, 4) * standard(x, (2, 3), 1e-3) + column(b, 4),
        normal(2, 3, 2, 3),
        normal(3),
        normal(3),
    ),
    case(
        "group_norm",
        lambda x, g, b: f.group_norm(x, 2, g, b, eps=0.01),
        lambda x, g, b: (
            column(g, 3) * standard(x.reshape(2, 2, 2, 3), (2, 3), 0.01).reshape(x.shape)
            + column(b, 3)
        ),
        normal(2, 4, 3),
        normal(4),
        normal(4),
    ),
    case(
        "layer_norm",
        f.layer_norm,
        lambda x, g, b: g * standard(x, (1, 2), 1e-5) + b,
        normal(2, 3, 4),
        normal(3, 4),
        normal(3, 4),
    ),
)

WINDOWS = (
    case(
        "sum_pool",
        lambda x: f.sum_pool(x, 3, stride=2, pad=1),
        lambda x: windows(x, 3, 2, 1).sum(-1),
        normal(2, 2, 5, 4),
    ),
    case(
        "lp_pool-1",
        lambda x: f.lp_pool(x, 2, 1, stride=1),
        lambda x: abs(windows(x, 2, 1, 0)).sum(-1),
        apart(2, 2, 3, 4),
    ),
    case(
        "lp_pool-2",
        lambda x: f.lp_pool(x, 3, stride=2, pad=1),
        lambda x: np.sqrt((windows(x, 3, 2, 1) ** 2).sum(-1)),
        normal(2, 2, 5, 5),
    ),
    *(
        case(
            f"adaptive-{size}",
            lambda x, size=size: f.adaptive_average_pool(x, size),
            lambda x, size=size: adaptive(x, size),
            normal(2, 2, 6, 5),
        )
        for size in ((3, 5), (4, 3), (1, 1), (2, 2), (6, 5), (7, 8))
    ),
)

CONVOLUTION = (
    case(
        "convolve",
        lambda x, w, b: f.convolve(x, w, b, stride=2, pad=1),
        lambda x, w, b: each(x, w, stride=2, pad=1) + column(b, 4),
        normal(2, 3, 5, 4),
        normal(4, 3, 3, 2),
        normal(4),
    ),
    case(
        "depthwise_conv",
        lambda x, w: f.depthwise_conv(x, w, pad=1),
        lambda x, w: np.concatenate(
            [each(x[:, [c]], w[2 * c : 2 * c + 2], pad=1) for c in range(3)], axis=1
        ),
        normal(2, 3, 3, 4),
        normal(6, 1, 3, 3),
    ),
    case(
        "separable_conv",
        f.separable_conv,
        lambda x, d, p, b: (
            each(np.concatenate([each(x[:, [c]], d[[c]]) for c in range(2)], axis=1), p)
            + column(b, 4)
        ),
        normal(2, 2, 3, 4),
        normal(2, 1, 2, 2),
        normal(3, 2, 1, 1),
        normal(3),
    ),
    case(
        "scale_channels",
        f.scale_channels,
        lambda x, s: x * column(s, 3),
        normal(2, 3, 2),
        normal(3),
    ),
    case(
        "scale_channels-samples",
        f.scale_channels,
        lambda x, s: x * s[:, :, None],
        normal(3, 2, 2),
        normal(3, 2),
    ),
    case(
        "channel_scaled_conv",
        lambda x, w, s, b: f.channel_scaled_conv(x, w, s, b, pad=1),
        lambda x, w, s, b: s[:, :, None, None] * (each(x, w, pad=1) + column(b, 4)),
        normal(2, 3, 3, 3),
        normal(4, 3, 3, 3),
        normal(2, 4),
        normal(4),
    ),
    case(
        "sample_conv",
        lambda x, w, b: f.sample_conv(x, w, b, stride=2),
        lambda x, w, b: (
            np.stack([convolved(i, k, stride=2) for i, k in zip(x, w)]) + b[:, :, None, None]
        ),
        normal(2, 3, 4, 5),
        normal(2, 2, 3, 2, 3),
        normal(2, 2),
    ),
    case(
        "mixed_conv",
        lambda x, w, m, b: f.mixed_conv(x, w, m, b, pad=1),
        lambda x, w, m, b: sum(
            m[:, k, None, None, None] * (each(x, w[k], pad=1) + column(b[k], 4)) for k in range(3)
        ),
        normal(2, 2, 3, 4),
        normal(3, 4, 2, 3, 3),
        normal(2, 3),
        normal(3, 4),
    ),
)

CASES = (*ELEMENTARY, *LAYOUT, *REDUCTION, *WINDOWS, *CONVOLUTION)


@pytest.mark.parametrize("case", CASES, ids=[c.id for c in CASES])
def test_values_are_those_of_numpy(case: Case) -> None:
    np.testing.assert_allclose(
        result(case.build, *case.arrays), case.reference(*case.arrays), **SAME_FORMULA
    )


@pytest.mark.parametrize("case", CASES, ids=[c.id for c in CASES])
def test_gradients_are_those_of_central_differences(case: Case) -> None:
    assert_derivatives(case.build, *case.arrays)


def test_every_function_has_a_case_or_is_random() -> None:
    tried = set()
    for build in (c.build for c in CASES):
        named = build.__name__ != "<lambda>"
        tried |= {build.__name__} if named else set(build.__code__.co_names)
    assert set(f.__all__) - tried == {"bernoulli", "gumbel", "normal", "rrelu", "uniform"}


@pytest.mark.parametrize("case", CASES, ids=[c.id for c in CASES])
def test_single_precision_stays(case: Case) -> None:
    singles = [x.astype(np.float32) for x in case.arrays]
    y = result(case.build, *singles)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, case.reference(*case.arrays), rtol=2e-5, atol=2e-5)


# -- ties, infinities, NaN -----------------------------------------------------------------------


def test_at_ties_the_gradient_of_the_larger_goes_to_the_left() -> None:
    a, b = np.array([1.0, 2.0, 0.0]), np.array([1.0, 3.0, -1.0])
    for function, left in ((f.maximum, [1, 0, 1]), (f.minimum, [1, 1, 0])):
        da, db = gradients(function, a, b)
        np.testing.assert_array_equal(da, left)
        np.testing.assert_array_equal(db, 1 - np.array(left))


def test_the_larger_of_nan_is_nan() -> None:
    a, b = np.array([np.nan, 1.0]), np.array([1.0, np.nan])
    assert np.isnan(result(f.maximum, a, b)).all()
    assert np.isnan(result(f.minimum, a, b)).all()


def test_clipping_keeps_the_gradient_at_its_bounds() -> None:
    (dx,) = gradients(lambda x: f.clip(x, -1, 1), np.array([-1.0, 1.0, 1.5, np.nan, -np.inf]))
    np.testing.assert_array_equal(dx, [1, 1, 0, 0, 0])


def test_kinks_have_the_gradient_of_their_origin() -> None:
    zero = np.zeros((1, 1))
    assert gradients(f.prelu, zero, np.array([0.25]))[0] == 1
    assert gradients(f.relu6, np.array([0.0, 6.0])) == [pytest.approx([0, 0])]
    assert gradients(f.absolute, zero)[0] == 0


def test_a_norm_of_zeros_has_gradient_zero() -> None:
    zeros = np.zeros((2, 3))
    assert result(f.norm, zeros) == 0
    for function in (f.norm, lambda x: f.global_norm([x]), f.l2_normalise):
        np.testing.assert_array_equal(np.isfinite(gradients(function, zeros)[0]), True)
    np.testing.assert_array_equal(gradients(f.norm, zeros)[0], zeros)
    (dx,) = gradients(lambda x: f.lp_pool(x, 2), np.zeros((1, 1, 2, 2)))
    np.testing.assert_array_equal(dx, 0)


def test_products_with_zeros_differentiate() -> None:
    (dx,) = gradients(f.reduce_prod, np.array([2.0, 0.0, 3.0]))
    np.testing.assert_array_equal(dx, [0, 6, 0])
    (dx,) = gradients(f.reduce_prod, np.array([0.0, 0.0, 3.0]))
    np.testing.assert_array_equal(dx, 0)


def test_products_of_nothing_are_one() -> None:
    y = result(lambda x: f.reduce_prod(x, 1), np.zeros((2, 0)))
    np.testing.assert_array_equal(y, [1, 1])


def test_equal_extremes_all_receive_the_gradient() -> None:
    (dx,) = gradients(f.reduce_min, np.array([1.0, 3.0, 1.0]))
    np.testing.assert_array_equal(dx, [1, 0, 1])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (f.gelu, [0, 1e4]),
        (f.silu, [0, 1e4]),
        (f.softplus, [0, 1e4]),
        (f.softsign, [-1e4 / (1 + 1e4), 1e4 / (1 + 1e4)]),
        (f.hard_sigmoid, [0, 1]),
        (f.selu, [-1.7580993, 1.0507010e4]),
    ],
)
def test_large_numbers_do_no_harm(function: Build, expected: list[float]) -> None:
    x = np.array([-1e4, 1e4], np.float32)
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(result(function, x), expected, rtol=1e-6, atol=1e-30)
        assert np.isfinite(gradients(function, x)[0]).all()


# -- shapes, rows, costs -------------------------------------------------------------------------


def test_functions_keep_a_symbolic_batch() -> None:
    graph = Graph()
    x = graph.input("x", ("N", 4, 6, 5))
    vector = graph.input("v", (4,))
    weights, mixture = graph.input("w", (3, 8, 4, 3, 3)), graph.input("m", ("N", 3))
    shapes = {
        (4, 6, 5): [
            f.gelu(x),
            f.prelu(x, vector),
            f.group_norm(x, 2, vector, vector),
            f.instance_norm(x, vector, vector),
            f.l2_normalise(x),
            f.scale_channels(x, vector),
        ],
        (2, 6, 5): [f.maxout(x, 2)],
        (4, 2, 3): [f.adaptive_average_pool(x, (2, 3))],
        (4, 8, 7): [f.pad(x, (0, 0, 1, 1), (0, 0, 1, 1), "reflect")],
        (8, 4, 3): [f.mixed_conv(x, weights, mixture)],
        (4, 12, 10): [f.resize_nearest(x, scale=2), f.tile(x, (1, 1, 2, 2))],
        (): [f.norm(x, (1, 2, 3))],
    }
    for shape, values in shapes.items():
        for value in values:
            assert value.shape == (x.shape[0], *shape)


def test_a_symbolic_axis_is_averaged_to_one() -> None:
    graph = Graph()
    x = graph.input("x", (1, 2, "H", 4))
    assert f.adaptive_average_pool(x, 1).shape == (1, 2, 1, 1)
    with pytest.raises(ShapeError, match="axis 2 of .* has no known size"):
        f.adaptive_average_pool(x, 2)


def test_mixing_kernels_costs_one_convolution_and_the_mixing() -> None:
    graph = Graph()
    x, w = graph.input("x", (2, 4, 6, 6)), graph.input("w", (3, 8, 4, 3, 3))
    graph.output("y", f.mixed_conv(x, w, graph.input("m", (2, 3)), pad=1))
    kernel = 8 * 4 * 3 * 3
    assert cost(graph).macs == 2 * (3 * kernel + kernel * 6 * 6)


def test_rows_of_sample_convolutions_are_independent() -> None:
    x, w = normal(3, 2, 4, 4), normal(3, 2, 2, 3, 3)
    whole = result(f.sample_conv, x, w)
    for n in range(3):
        alone = result(f.sample_conv, x[n : n + 1], w[n : n + 1])
        np.testing.assert_allclose(whole[n : n + 1], alone, **SAME_FORMULA)


# -- refusals ------------------------------------------------------------------------------------

X3 = normal(2, 3, 4)
IMAGE = normal(1, 3, 4, 4)

REFUSALS: list[tuple[Build, tuple[np.ndarray, ...], str]] = [
    (lambda x: f.clip(x, 1, 0), (X3,), "low must not exceed high"),
    (lambda x: f.maxout(x, 2), (X3,), "does not divide by pool 2"),
    (lambda x: f.maxout(x, 2, 5), (X3,), "maxout: axis 5 is outside an array of 3 axes"),
    (f.prelu, (X3, normal(4)), "prelu: slope of .* has the shape of its axes from 1 on"),
    (f.maximum, (X3, normal(2)), "do not broadcast"),
    (lambda x: f.squeeze(x, 1), (X3,), "squeeze: axis 1 of .* is no unit axis"),
    (lambda x: f.squeeze(x, (0, -3)), (X3,), "name one axis twice"),
    (lambda x: f.stack([]), (X3,), "stack: needs at least one value"),
    (lambda x: f.repeat(x, 0, 1), (X3,), "repeat: counts are at least 1, got 0"),
    (lambda x: f.tile(x, (1, 2)), (X3,), "need one number for each axis"),
    (lambda x: f.pad(x, (1,), (1,)), (X3,), "pad: begin and end have one number for each axis"),
    (lambda x: f.pad(x, (-1, 0, 0), (0, 0, 0)), (X3,), "are not negative"),
    (lambda x: f.pad(x, (0, 0, 0), (0, 0, 0), "wrap"), (X3,), "mode is constant, edge or reflect"),
    (lambda x: f.pad(x, (0, 0, 4), (0, 0, 0), "reflect"), (X3,), "reflect reaches 4 far"),
    (lambda x: f.pad(x, (1,), (0,), "edge"), (np.zeros(0),), "needs elements along axis 0"),
    (lambda x: f.resize_nearest(x), (IMAGE,), "give either scale or size"),
    (lambda x: f.resize_bilinear(x, scale=2, size=(2, 2)), (IMAGE,), "give either scale or size"),
    (lambda x: f.resize_nearest(x, scale=2), (X3,), r"needs \[N, C, H, W\]"),
    (lambda x: f.norm(x, order=3), (X3,), "order is 1, 2 or infinity, got 3"),
    (lambda x: f.global_norm([]), (X3,), "global_norm: needs at least one value"),
    (f.instance_norm, (normal(2, 3), normal(3), normal(3)), "needs \\[N, C, spatial"),
    (f.instance_norm, (X3, normal(4), normal(3)), r"gamma and beta have shape \[3\]"),
    (lambda x, g: f.group_norm(x, 2, g, g), (X3, normal(3)), "do not make 2 groups"),
    (lambda x, g: f.layer_norm(x, g, g), (X3, normal(3)), "the shape of the last axes"),
    (lambda x, g: f.layer_norm(x, g, g, 0.0), (X3, normal(4)), "eps must be positive"),
    (lambda x: f.lp_pool(x, 2, 3), (IMAGE,), "p is 1 or 2, got 3"),
    (lambda x: f.adaptive_average_pool(x, 0), (IMAGE,), r"size \(0, 0\) does not fit"),
    (f.scale_channels, (X3, normal(4)), r"scale of .* is \[C\] or \[N, C\]"),
    (f.depthwise_conv, (normal(2, 3), normal(3, 1, 1)), "needs a known number of channels"),
    (f.mixed_conv, (IMAGE, normal(2, 3, 3, 1, 1), normal(1, 3)), r"of 2 kernels is \[N, 2\]"),
    (
        f.mixed_conv,
        (IMAGE, normal(2, 3, 3, 1, 1), normal(1, 2), normal(3)),
        r"biases of .* are \[K, O\]",
    ),
    (lambda x: f.uniform(x, 2, 1), (X3,), "low must not exceed high"),
    (lambda x: f.normal(x, 0, -1), (X3,), "std must not be negative"),
]


@pytest.mark.parametrize(("build", "arrays", "rule"), REFUSALS)
def test_what_does_not_fit_is_refused(
    build: Build, arrays: tuple[np.ndarray, ...], rule: str
) -> None:
    with pytest.raises((GraphError, ShapeError), match=rule):
        result(build, *arrays)


# -- random values -------------------------------------------------------------------------------


def drawn(build: Build, seed: int = 3, steps: int = 1, training: bool = True) -> np.ndarray:
    """What `build` draws beside 4000 numbers, in each of some steps."""
    graph = Graph("drawn")
    x = graph.input("x", (50, 80), DType.F64)
    graph.output("y", build(x))
    step = compile(specialise(graph, training=training), seed=seed)
    return np.stack([step(x=np.full((50, 80), 0.3))["y"] for _ in range(steps)])


GUMBEL_MEAN = 0.5772156649015329
DRAWS: dict[str, tuple[Build, float, float, float]] = {
    "uniform": (lambda x: f.uniform(x, -1, 3), 1, 4 / math.sqrt(12), 1),
    "normal": (lambda x: f.normal(x, 0.5, 2), 0.5, 2, 0.5),
    "bernoulli": (f.bernoulli, 0.3, math.sqrt(0.21), 0),
    "gumbel": (f.gumbel, GUMBEL_MEAN, math.pi / math.sqrt(6), -math.log(math.log(2))),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_have_the_stated_moments_and_inference_value(kind: str) -> None:
    build, mean, std, rest = DRAWS[kind]
    values = drawn(build, steps=5)
    assert np.isfinite(values).all()
    # Five standard errors of 20000 draws; the spread of these distributions errs about alike.
    assert abs(values.mean() - mean) < 5 * std / math.sqrt(values.size)
    assert abs(values.std() - std) < 10 * std / math.sqrt(values.size)
    np.testing.assert_allclose(drawn(build, training=False), rest, rtol=1e-7)


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_repeat_with_the_seed_and_differ_between_steps(kind: str) -> None:
    build = DRAWS[kind][0]
    first, second = drawn(build, steps=2)
    np.testing.assert_array_equal(drawn(build)[0], first)
    assert (first != second).mean() > 0.3
    assert (drawn(build, seed=4)[0] != first).mean() > 0.3


def test_normal_draws_have_the_tails_of_a_normal() -> None:
    values = np.sort(drawn(f.normal, steps=5).ravel())
    cumulative = (1 + _erf(values / math.sqrt(2))) / 2
    # Kolmogorov's distance at a level of about 1e-6.
    assert np.abs(cumulative - (np.arange(values.size) + 0.5) / values.size).max() < 0.02


def test_draws_take_a_shape_and_streams_of_their_own() -> None:
    graph = Graph()
    like = graph.input("x", (), DType.F32)
    a, b = f.normal(like, shape=("N", 3)), f.uniform(like, shape=(2,))
    assert [str(d) for d in a.shape] == ["N", "3"]
    assert (b.shape, b.dtype) == ((2,), DType.F32)
    streams = [n.op.stream for n in graph.nodes if n.op.opcode == "noise"]  # type: ignore[attr-defined]
    assert sorted(streams) == [0, 1, 2]


def test_random_slopes_lie_between_their_bounds_and_settle_at_the_mean() -> None:
    below = drawn(lambda x: f.rrelu(-x, 0.2, 0.4))
    assert (below <= -0.3 * 0.2).all()
    assert (below > -0.3 * 0.4).all()
    assert below.std() > 0.01
    np.testing.assert_allclose(drawn(lambda x: f.rrelu(-x), training=False), -0.3 * 11 / 48)
    np.testing.assert_array_equal(drawn(f.rrelu), 0.3)


def test_a_bernoulli_gate_is_hard_in_inference_and_takes_no_gradient() -> None:
    graph = Graph()
    p = graph.input("p", (3,), DType.F64)
    y = graph.output("y", f.bernoulli(p))
    assert vjp(graph, {y: None}, [p]) == {}
    plain = specialise(graph, training=False)
    found = interpret(plain, {"p": np.array([0.2, 0.5, 0.7])}).outputs["y"]
    np.testing.assert_array_equal(found, [0, 0, 1])


def test_text_holds_everything() -> None:
    graph = Graph()
    x, w = graph.input("x", ("N", 4, 6, 6)), graph.input("w", ("N", 2, 4, 3, 3))
    y = f.sum_pool(f.clip(f.sample_conv(x, w, pad=1), -math.inf, 0.9), 2)
    regions = graph.input("regions", ("R", 5))
    graph.output("y", y)
    graph.output("z", graph.emit(RoiMaxPool((2, 3), 0.5), x, regions))
    text = format_graph(graph)
    assert format_graph(parse_graph(text)) == text


# -- recordings ----------------------------------------------------------------------------------


def _leaky(x: Value, act_type: str = "leaky", slope: float = 0.25) -> Value:
    from branchgraph.ir.builder import elu, leaky_relu

    if act_type == "selu":
        return f.selu(x)
    return elu(x, slope) if act_type == "elu" else leaky_relu(x, slope)


def _pad(x: Value, mode: str, pad_width: list[int], constant_value: float = 0.0) -> Value:
    return f.pad(x, pad_width[::2], pad_width[1::2], mode, constant_value)


def _pooling(
    x: Value, kernel: list[int], pool_type: str, stride: list[int], pad: tuple[int, ...] = (),
    global_pool: bool = False, pooling_convention: str = "valid",
) -> Value:  # fmt: skip
    from branchgraph.ir.builder import average_pool, max_pool

    if global_pool:
        return f.adaptive_average_pool(x, 1)
    geometry: dict[str, Any] = {"stride": tuple(stride), "pad": tuple(pad) or 0}
    if pool_type == "max":
        return max_pool(x, tuple(kernel), **geometry)
    return average_pool(x, tuple(kernel), divisor="padded", **geometry)


MXNET: dict[str, Callable[..., Value]] = {
    "clip": lambda x, a_min, a_max: f.clip(x, a_min, a_max),
    "LeakyReLU": _leaky,
    "L2Normalization": lambda x, mode: f.l2_normalise(x, 1 if mode == "channel" else None),
    "InstanceNorm": f.instance_norm,
    "Pad": _pad,
    "Pooling": _pooling,
    "UpSampling": lambda x, scale, sample_type: f.resize_nearest(x, scale=scale),
    "broadcast_maximum": f.maximum,
    "broadcast_minimum": f.minimum,
    "square": f.square,
    "SwapAxis": lambda x, dim1, dim2: f.swap_axes(x, dim1, dim2),
    "expand_dims": lambda x, axis: f.expand_dims(x, axis),
    "squeeze": lambda x, axis=None: f.squeeze(x, axis),
}


#: MXNet takes scale (alpha + y) for selu's slope below 0, where alpha scale + y is right.
NO_DERIVATIVE = {"LeakyReLU.4"}


@pytest.mark.parametrize("op", MXNET)
def test_recorded_operators_of_mxnet_agree(op: str) -> None:
    root = folder("mxnet") / "ops"
    listed = json.loads((root / "ops.json").read_text())
    cases = [c for c in (listed if isinstance(listed, list) else listed["cases"]) if c["op"] == op]
    assert cases
    with np.load(root / "ops.npz") as arrays:
        for c in cases:
            inputs = [arrays[f"{c['id']}/in/{name}"] for name in c["inputs"]]

            def build(*values: Value, attrs: Any = c["attrs"]) -> Value:
                return MXNET[op](*values, **attrs)

            close = {"rtol": 1e-5, "atol": 1e-5}
            y = arrays[f"{c['id']}/out_infer/0"]
            np.testing.assert_allclose(result(build, *inputs), y, **close, err_msg=c["id"])
            found = gradients(build, *inputs, dy=arrays[f"{c['id']}/head/0"])
            for name, dx in zip(c["inputs"], found):
                if c["id"] in NO_DERIVATIVE:
                    continue
                expected = arrays[f"{c['id']}/grad/{name}"]
                np.testing.assert_allclose(dx, expected, **close, err_msg=f"{c['id']} {name}")


def test_recorded_gates_of_paradise_agree() -> None:
    with np.load(golden("paradise/reparam_cases.npz")) as arrays:
        x, w, b, gate, scale = (
            arrays[f"gates/{n}"] for n in ("input", "weights", "biases", "gate", "se_scale")
        )
        expected, scaled = arrays["gates/output_gate"], arrays["gates/output_se"]
    y = result(lambda *v: f.mixed_conv(*v, pad=1), x, w, gate, b)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    y = result(lambda *v: f.channel_scaled_conv(*v, pad=1), x, w[0], scale, b[0])
    np.testing.assert_allclose(y, scaled, rtol=1e-12, atol=1e-12)
