"""Functions of deep networks: conventions at the edges, refusals, statistics, draws."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import branchgraph.chainer as chainer
import branchgraph.chainer.functions as F
from branchgraph.chainer import Variable
from branchgraph.chainer.recorder import Holder, recorder
from branchgraph.chainer.type_check import InvalidType

#: float32 against the same formula in another order: a few roundings of 6e-8.
SINGLE = 1e-5


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def derivative(function: Callable[..., Variable], *values: Any) -> list[np.ndarray | None]:
    """Gradients of the sum of `function` by its floating arguments."""
    variables = [Variable(np.asarray(v, np.float32)) for v in values]
    y = function(*variables)
    y.grad = np.ones(y.shape, y.dtype)
    y.backward()
    return [v.grad for v in variables]


# -- activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "x", "slope"),
    [
        (F.relu, 0.0, 0.0),
        (F.leaky_relu, 0.0, 0.2),
        (F.relu6, 0.0, 0.0),
        (F.relu6, 6.0, 0.0),
        (functools.partial(F.clipped_relu, z=1.5), 1.5, 0.0),
        (F.hard_sigmoid, 2.5, 0.0),
        (F.hard_sigmoid, 2.4, 0.2),
        (F.softplus, 0.0, 0.5),
    ],
)
def test_derivative_at_the_bounds(
    function: Callable[..., Variable], x: float, slope: float
) -> None:
    (dx,) = derivative(function, [x])
    np.testing.assert_allclose(dx, [slope], rtol=SINGLE)


def test_softmax_takes_channels_by_default() -> None:
    x = normal(2, 3, 4)
    np.testing.assert_allclose(F.softmax(x).array.sum(axis=1), np.ones((2, 4)), rtol=SINGLE)
    last = F.softmax(x, axis=-1).array
    np.testing.assert_allclose(last.sum(axis=2), np.ones((2, 3)), rtol=SINGLE)


def test_softplus_keeps_small_and_large_values() -> None:
    x = np.array([-30.0, 1000.0], np.float32)
    np.testing.assert_allclose(F.softplus(x).array, [np.exp(-30.0), 1000.0], rtol=SINGLE)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_results_keep_the_dtype(dtype: type) -> None:
    x = normal(2, 4).astype(dtype)
    t = np.array([0, 3], np.int32)
    results = [
        F.selu(x),
        F.hard_sigmoid(x),
        F.rrelu(x),
        F.dropout(x),
        F.normalize(x),
        F.softmax_cross_entropy(x, t),
        F.hinge(x, t),
        F.layer_normalization(x, np.ones(4, dtype), np.zeros(4, dtype)),
        F.max_pooling_1d(x[None], 2),
    ]
    assert {y.dtype for y in results} == {np.dtype(dtype)}


# -- connections and pooling ---------------------------------------------------------------------


def test_convolution_may_cover_all() -> None:
    x, W = normal(1, 1, 8, 8), np.ones((1, 1, 3, 3), np.float32)
    assert F.convolution_2d(x, W, stride=2).shape == (1, 1, 3, 3)
    y = F.convolution_2d(x, W, stride=2, cover_all=True)
    assert y.shape == (1, 1, 4, 4)
    np.testing.assert_allclose(y.array[0, 0, 3, 3], x[0, 0, 6:, 6:].sum(), rtol=SINGLE)


def test_a_weight_of_another_float_dtype_is_cast() -> None:
    x = normal(2, 3).astype(np.float16)
    assert F.linear(x, normal(4, 3)).dtype == np.float16


def test_repeated_ids_add_up_and_ignored_ones_have_no_gradient() -> None:
    W = Variable(normal(3, 2))
    y = F.embed_id(np.array([[1, 1], [-1, 0]], np.int32), W, ignore_label=-1)
    np.testing.assert_array_equal(y.array[1, 0], [0, 0])
    y.grad = np.ones(y.shape, np.float32)
    y.backward()
    np.testing.assert_array_equal(W.grad, [[1, 1], [2, 2], [0, 0]])


def test_upsampling_puts_maxima_back() -> None:
    x = normal(2, 3, 6, 5)
    y, indices = F.max_pooling_2d(x, 2, return_indices=True)
    assert isinstance(indices, np.ndarray)
    assert indices.dtype == np.int64
    assert indices.min() == 0
    assert indices.max() == 3
    back = F.upsampling_2d(y, indices, 2, outsize=(6, 5)).array
    np.testing.assert_array_equal(back[back != 0], x[back != 0])
    assert (back != 0).sum() == y.size


def test_pooling_covers_and_averaging_does_not() -> None:
    x = normal(1, 1, 8, 8)
    assert F.max_pooling_2d(x, 3, 2).shape == (1, 1, 4, 4)
    assert F.average_pooling_2d(x, 3, 2).shape == (1, 1, 3, 3)


def test_averages_of_padded_windows() -> None:
    x = np.ones((1, 1, 2), np.float32)
    counted = F.average_pooling_nd(x, 2, 1, 1).array
    np.testing.assert_array_equal(counted, [[[0.5, 1, 0.5]]])
    inside = F.average_pooling_nd(x, 2, 1, 1, pad_value=None).array
    np.testing.assert_array_equal(inside, [[[1, 1, 1]]])


def test_nearest_resizing_repeats_pixels() -> None:
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    y = F.resize_images(x, (4, 2), mode="nearest").array
    np.testing.assert_array_equal(y[0, 0], [[0, 1], [0, 1], [2, 3], [2, 3]])


def test_the_identity_transform_samples_the_image() -> None:
    x = normal(1, 2, 4, 5)
    theta = np.array([[[1, 0, 0], [0, 1, 0]]], np.float32)
    y = F.spatial_transformer_sampler(x, F.spatial_transformer_grid(theta, (4, 5)))
    np.testing.assert_allclose(y.array, x, rtol=SINGLE, atol=SINGLE)


# -- normalisation -------------------------------------------------------------------------------


def _running() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(3, np.float32), np.ones(3, np.float32)


def _expected(x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Statistics after one batch, decay 0.9."""
    batch = x.var(axis=0) * len(x) / (len(x) - 1)
    return mean * 0.9 + x.mean(axis=0) * 0.1, var * 0.9 + batch * 0.1


def test_running_arrays_are_updated_in_place() -> None:
    x, (mean, var) = normal(6, 3), _running()
    gamma, beta = np.ones(3, np.float32), np.zeros(3, np.float32)
    expected = _expected(x, mean, var)
    F.batch_normalization(x, gamma, beta, running_mean=mean, running_var=var)
    np.testing.assert_allclose(mean, expected[0], rtol=SINGLE)
    np.testing.assert_allclose(var, expected[1], rtol=SINGLE)


def test_held_statistics_are_recorded_and_read_in_order() -> None:
    x = Variable(normal(6, 3))
    gamma, beta = np.ones(3, np.float32), np.zeros(3, np.float32)
    mean, var = (Holder(v) for v in _running())
    before = len(recorder().pending)
    for _ in range(2):
        F.batch_normalization(x, gamma, beta, running_mean=mean, running_var=var)
    y = F.fixed_batch_normalization(x, gamma, beta, mean, var)
    assert len(recorder().pending) > before
    expected = _running()
    for _ in range(2):
        expected = _expected(x.array, *expected)
    np.testing.assert_allclose(mean.array, expected[0], rtol=SINGLE)
    normalised = (x.array - expected[0]) / np.sqrt(expected[1] + 2e-5)
    np.testing.assert_allclose(y.array, normalised, rtol=SINGLE, atol=SINGLE)


@pytest.mark.parametrize("lazy", [True, False])
def test_batch_statistics_that_nobody_holds_still_serve_the_gradient(lazy: bool) -> None:
    with chainer.using_config("lazy", lazy):
        found = derivative(F.batch_normalization, normal(5, 3), [1, 2, 3], [0, 0, 0])
    np.testing.assert_allclose(found[0], np.zeros((5, 3)), atol=SINGLE)
    np.testing.assert_allclose(found[2], [5, 5, 5], rtol=SINGLE)


def test_a_zero_vector_normalises_to_zero() -> None:
    x = Variable(np.zeros((1, 3), np.float32))
    y = F.normalize(x, eps=0.5)
    y.grad = np.array([[1, 2, 3]], np.float32)
    y.backward()
    np.testing.assert_array_equal(y.array, [[0, 0, 0]])
    np.testing.assert_array_equal(x.grad, [[2, 4, 6]])


# -- noise ---------------------------------------------------------------------------------------


def test_dropout_takes_the_global_draws_when_it_is_called() -> None:
    x = np.ones((3, 4), np.float32)
    np.random.seed(3)
    kept = np.random.rand(3, 4) >= 0.25
    np.random.seed(3)
    y, mask = F.dropout(x, 0.25, return_mask=True)
    np.random.rand(7)
    np.testing.assert_allclose(y.array, kept / 0.75, rtol=SINGLE)
    np.testing.assert_array_equal(mask, y.array)


def test_noise_is_absent_in_test_mode() -> None:
    x, h = Variable(normal(2, 3)), Variable(normal(2, 3, seed=1))
    with chainer.using_config("train", False):
        assert F.dropout(x) is x
        assert F.zoneout(h, x) is x
        slope = F.rrelu(np.full((1, 1), -1.0, np.float32)).array
    np.testing.assert_allclose(slope, [[-(1 / 8 + 1 / 3) / 2]], rtol=SINGLE)


# -- losses --------------------------------------------------------------------------------------


def test_the_mean_of_cross_entropy_divides_by_what_counts() -> None:
    x = np.zeros((2, 4, 3), np.float32)
    t = np.array([[0, 1, -1], [-1, 2, -1]], np.int32)
    each = np.log(4.0)
    np.testing.assert_allclose(F.softmax_cross_entropy(x, t).array, each, rtol=SINGLE)
    batch = F.softmax_cross_entropy(x, t, normalize=False).array
    np.testing.assert_allclose(batch, each * 3 / 2, rtol=SINGLE)
    ignored = F.softmax_cross_entropy(x, np.full((2, 3), -1, np.int32)).array
    np.testing.assert_array_equal(ignored, 0)


def test_soft_targets_pull_towards_themselves() -> None:
    x, t = normal(2, 3), np.array([[0.5, 0.5, 0.5], [1, 0, 0]], np.float32)
    variable = Variable(x)
    F.softmax_cross_entropy(variable, t).backward()
    p = F.softmax(x).array
    np.testing.assert_allclose(variable.grad, (p - t) / 2, rtol=SINGLE, atol=SINGLE)
    plain = F.softmax_cross_entropy(x, t).array
    kl = F.softmax_cross_entropy(x, t, soft_target_loss="kl-divergence").array
    entropy = (t * np.log(t + 1e-7)).sum() / 2
    np.testing.assert_allclose(kl, plain + entropy, rtol=SINGLE)


def test_equal_rows_have_no_contrastive_gradient() -> None:
    y = np.array([0, 1], np.int32)
    dx0, dx1 = derivative(lambda a, b: F.contrastive(a, b, y), normal(2, 3), normal(2, 3))
    np.testing.assert_array_equal(dx0, np.zeros((2, 3)))
    np.testing.assert_array_equal(dx1, np.zeros((2, 3)))


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda x, t: F.relu(t),
        lambda x, t: F.linear(x, normal(4, 5)),
        lambda x, t: F.convolution_2d(x, normal(4, 3, 3, 3)),
        lambda x, t: F.max_pooling_2d(x, 2),
        lambda x, t: F.softmax_cross_entropy(x, t.astype(np.uint8)),
        lambda x, t: F.softmax_cross_entropy(x, t[:1]),
        lambda x, t: F.embed_id(x, normal(3, 3)),
        lambda x, t: F.mean_squared_error(x, x[:1]),
        lambda x, t: F.mean_squared_error(x, x.astype(np.float64)),
        lambda x, t: F.maxout(x, 2),
        lambda x, t: F.prelu(x, normal(2)),
        lambda x, t: F.batch_normalization(x, normal(2), normal(2)),
        lambda x, t: F.resize_images(x.reshape(1, 1, 2, 3).astype(np.float64), (2, 2)),
    ],
)
def test_operands_that_do_not_fit_are_refused(call: Callable[..., Any]) -> None:
    with pytest.raises(InvalidType, match=r"Invalid operation is performed in: \w+ \(Forward\)"):
        call(normal(2, 3), np.array([0, 1], np.int32))


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda x: F.dropout(x, train=False), "using_config"),
        (lambda x: F.zoneout(x, x, train=False), "using_config"),
        (lambda x: F.convolution_2d(x, x, use_cudnn=False), "using_config"),
        (lambda x: F.max_pooling_2d(x, 2, use_cudnn=False), "using_config"),
        (lambda x: F.dropout(x, 1.0), "ratio"),
        (lambda x: F.softmax_cross_entropy(x, x, reduce="sum"), "reduce"),
        (lambda x: F.spatial_pyramid_pooling_2d(x, 2), "pooling"),
    ],
)
def test_removed_and_wrong_arguments_are_refused(call: Callable[..., Any], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        call(normal(2, 3))


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        F.dropout(normal(2, 3), rate=0.5)


def test_many_positions_are_counted_in_half_precision() -> None:
    x, t = np.zeros((1, 2, 5000), np.float16), np.zeros((1, 5000), np.int32)
    loss = F.softmax_cross_entropy(x, t).array
    assert loss.dtype == np.float16
    # float16 keeps 11 bits of the sum and of its share.
    np.testing.assert_allclose(loss, np.log(2.0), rtol=1e-2)


def test_shifted_channels_move_and_the_rest_stay() -> None:
    x = np.arange(36, dtype=np.float32).reshape(1, 4, 3, 3)
    y = F.shift(x, ksize=(3, 1)).array
    np.testing.assert_array_equal(y[0, 0, :2], x[0, 0, 1:])
    np.testing.assert_array_equal(y[0, 1, 1:], x[0, 1, :2])
    np.testing.assert_array_equal(y[0, 2:], x[0, 2:])
