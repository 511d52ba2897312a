"""Every primitive against the meaning of the matching op (`evaluate`) or plain NumPy."""

from __future__ import annotations

import gc
import itertools
import weakref

import ml_dtypes
import numpy as np
import pytest

from branchgraph.backends.onednn import library, primitives
from branchgraph.backends.onednn.bindings import OneDNNError
from branchgraph.backends.onednn.primitives import (
    Arg,
    Attributes,
    Binary,
    Desc,
    Eltwise,
    Memory,
    Normalization,
    Pooling,
    Primitive,
    Reduction,
    ReferenceImplementation,
    Resampling,
    Softmax,
    Stream,
    multiple_source,
    post_op_operand,
)
from branchgraph.compiler.memory import ALIGNMENT
from branchgraph.ir.errors import ShapeError, UnsupportedError
from branchgraph.ir.ops.conv import Conv, ConvTranspose, ConvWeightGradient
from branchgraph.ir.ops.norm import (
    BatchNormGradient,
    BatchNormInference,
    BatchNormTraining,
    LocalResponseNorm,
    LocalResponseNormGradient,
)
from branchgraph.ir.ops.pool import (
    AveragePool,
    AveragePoolGradient,
    MaxPool,
    MaxPoolIndex,
    ScatterPooled,
)
from branchgraph.ir.types import DType
from tests.backends.libdnnl import execute, require_libdnnl

require_libdnnl()

#: float32 sums of some hundred terms of size 1, in another order than NumPy's.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
#: Single float32 operations, and polynomials for exp and tanh.
TIGHT = {"rtol": 3e-6, "atol": 1e-6}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def nhwc(x: np.ndarray) -> Desc:
    return Desc.channels_last(x.shape, x.dtype)


def plain(x: np.ndarray) -> Desc:
    return Desc.strided(x.shape, x.dtype)


# -- convolution -------------------------------------------------------------------------------

#: x, weight, groups, stride, pad (begin, then end), dilation
CONVOLUTIONS = {
    "2d": ((2, 16, 9, 7), (16, 16, 3, 3), 1, (1, 1), (1, 1, 1, 1), (1, 1)),
    "odd channels": ((3, 5, 9, 7), (10, 5, 3, 3), 1, (1, 1), (1, 1, 1, 1), (1, 1)),
    "one channel": ((2, 1, 12, 12), (5, 1, 5, 5), 1, (1, 1), (2, 2, 2, 2), (1, 1)),
    "asymmetric": ((2, 3, 7, 9), (5, 3, 3, 2), 1, (2, 1), (1, 0, 0, 2), (1, 1)),
    "dilated": ((2, 4, 11, 9), (6, 4, 3, 3), 1, (1, 2), (2, 1, 2, 3), (2, 3)),
    "floor": ((2, 8, 8, 8), (8, 8, 3, 3), 1, (2, 2), (0, 0, 0, 0), (1, 1)),
    "grouped": ((2, 12, 6, 6), (18, 4, 3, 3), 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "depthwise": ((2, 7, 6, 6), (7, 1, 3, 3), 7, (2, 2), (1, 1, 1, 1), (1, 1)),
    "pointwise": ((2, 20, 5, 5), (10, 20, 1, 1), 1, (2, 2), (0, 0, 0, 0), (1, 1)),
    "1d": ((2, 5, 13), (7, 5, 3), 1, (2,), (1, 0), (1,)),
    "3d": ((2, 3, 4, 5, 6), (4, 3, 2, 3, 2), 1, (1, 2, 1), (0, 1, 1, 1, 1, 0), (1, 1, 1)),
}


class Convolution:
    """The three primitives of one row of the table."""

    def __init__(self, row: str) -> None:
        x, weight, groups, stride, pad, dilation = CONVOLUTIONS[row]
        self.op = Conv(stride, pad, dilation, groups)
        self.x, self.weight = normal(*x), normal(*weight, seed=1)
        self.bias = normal(weight[0], seed=2)
        (self.y,) = self.op.evaluate(self.x, self.weight, self.bias)
        self.dy = normal(*self.y.shape, seed=3)
        self.split = (groups, weight[0] // groups, *weight[1:]) if groups > 1 else weight
        n = len(stride)
        self.window = {
            "strides": stride,
            "dilates": tuple(d - 1 for d in dilation),
            "pad_l": pad[:n],
            "pad_r": pad[n:],
        }

    def forward(self, **options: object) -> Primitive:
        return primitives.convolution_forward(
            nhwc(self.x), Desc.any(self.split, "f32"), plain(self.bias), nhwc(self.y),
            **self.window, **options,
        )  # fmt: skip


@pytest.fixture(params=list(CONVOLUTIONS))
def convolution(request: pytest.FixtureRequest) -> Convolution:
    return Convolution(request.param)


def test_convolution_forward(convolution: Convolution) -> None:
    inputs = {
        Arg.SRC: convolution.x,
        Arg.WEIGHTS: convolution.weight.reshape(convolution.split),
        Arg.BIAS: convolution.bias,
    }
    (y,) = execute(convolution.forward(), inputs, Arg.DST)
    np.testing.assert_allclose(y, convolution.y, **CLOSE)


def test_convolution_backward_data(convolution: Convolution) -> None:
    c = convolution
    back = primitives.convolution_backward_data(
        nhwc(c.x), Desc.any(c.split, "f32"), nhwc(c.dy), **c.window, hint=c.forward(training=True)
    )
    inputs = {Arg.DIFF_DST: c.dy, Arg.WEIGHTS: c.weight.reshape(c.split)}
    (dx,) = execute(back, inputs, Arg.DIFF_SRC)
    transpose = ConvTranspose(**c.op.geometry(), size=c.x.shape[2:])
    np.testing.assert_allclose(dx, transpose.evaluate(c.dy, c.weight)[0], **CLOSE)


def test_convolution_backward_weights(convolution: Convolution) -> None:
    c = convolution
    back = primitives.convolution_backward_weights(
        nhwc(c.x), Desc.any(c.split, "f32"), plain(c.bias), nhwc(c.dy), **c.window,
        hint=c.forward(training=True),
    )  # fmt: skip
    inputs = {Arg.SRC: c.x, Arg.DIFF_DST: c.dy}
    dw, db = execute(back, inputs, Arg.DIFF_WEIGHTS, Arg.DIFF_BIAS)
    gradient = ConvWeightGradient(**c.op.geometry(), kernel=c.weight.shape[2:])
    expected = gradient.evaluate(c.x, c.dy)[0]
    np.testing.assert_allclose(dw.reshape(expected.shape), expected, rtol=2e-5, atol=1e-4)
    axes = (0, *range(2, c.dy.ndim))
    np.testing.assert_allclose(db, c.dy.sum(axis=axes), rtol=2e-5, atol=1e-4)


def test_convolution_in_bfloat16() -> None:
    c = Convolution("2d")
    half = ml_dtypes.bfloat16
    x, weight = c.x.astype(half), c.weight.astype(half)
    primitive = primitives.convolution_forward(
        nhwc(x), Desc.any(weight.shape, half), plain(c.bias), Desc.channels_last(c.y.shape, "f32"),
        **c.window,
    )  # fmt: skip
    inputs = {Arg.SRC: x, Arg.WEIGHTS: weight, Arg.BIAS: c.bias}
    (y,) = execute(primitive, inputs, Arg.DST)
    expected = c.op.evaluate(x.astype(np.float32), weight.astype(np.float32), c.bias)[0]
    np.testing.assert_allclose(y, expected, **CLOSE)


def test_post_ops_apply_in_order() -> None:
    c = Convolution("odd channels")
    other, column = normal(*c.y.shape, seed=4), normal(1, c.y.shape[1], 1, 1, seed=5)
    attributes = (
        Attributes()
        .sum(0.5)
        .binary(Binary.MUL, plain(column))
        .binary(Binary.ADD, nhwc(other))
        .eltwise(Eltwise.RELU)
    )
    primitive = c.forward(attributes=attributes)
    before = normal(*c.y.shape, seed=6)
    inputs = {
        Arg.SRC: c.x,
        Arg.WEIGHTS: c.weight,
        Arg.BIAS: c.bias,
        Arg.DST: before,
        post_op_operand(1): column,
        post_op_operand(2): other,
    }
    (y,) = execute(primitive, inputs, Arg.DST)
    expected = np.maximum((c.y + 0.5 * before) * column + other, 0)
    np.testing.assert_allclose(y, expected, **CLOSE)


# -- products ----------------------------------------------------------------------------------


def test_inner_product_and_its_gradients() -> None:
    x, weight, bias = normal(3, 5, 4, 2), normal(7, 5, 4, 2, seed=1), normal(7, seed=2)
    dy = normal(3, 7, seed=3)
    any_weight = Desc.any(weight.shape, "f32")
    forward = primitives.inner_product_forward(
        nhwc(x), any_weight, plain(bias), plain(dy), training=True
    )
    (y,) = execute(forward, {Arg.SRC: x, Arg.WEIGHTS: weight, Arg.BIAS: bias}, Arg.DST)
    flat, flat_weight = x.reshape(3, -1), weight.reshape(7, -1)
    np.testing.assert_allclose(y, flat @ flat_weight.T + bias, **CLOSE)

    data = primitives.inner_product_backward_data(nhwc(x), any_weight, plain(dy), hint=forward)
    (dx,) = execute(data, {Arg.DIFF_DST: dy, Arg.WEIGHTS: weight}, Arg.DIFF_SRC)
    np.testing.assert_allclose(dx.reshape(3, -1), dy @ flat_weight, **CLOSE)

    weights = primitives.inner_product_backward_weights(
        nhwc(x), any_weight, plain(bias), plain(dy), hint=forward
    )
    dw, db = execute(weights, {Arg.SRC: x, Arg.DIFF_DST: dy}, Arg.DIFF_WEIGHTS, Arg.DIFF_BIAS)
    np.testing.assert_allclose(dw.reshape(7, -1), dy.T @ flat, **CLOSE)
    np.testing.assert_allclose(db, dy.sum(axis=0), **CLOSE)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_matmul(transposed: bool, batch: tuple[int, ...]) -> None:
    a, b, bias = normal(*batch, 5, 7), normal(*batch, 7, 3, seed=1), normal(*batch, 1, 3, seed=2)
    bias = bias[:1] if batch else bias
    weights = plain(b)
    if transposed:
        strides = (21, 1, 7) if batch else (1, 7)
        weights = Desc.strided(b.shape, "f32", strides)
    dst = Desc.strided((*batch, 5, 3), "f32")
    primitive = primitives.matmul(plain(a), weights, plain(bias), dst)
    (y,) = execute(primitive, {Arg.SRC: a, Arg.WEIGHTS: b, Arg.BIAS: bias}, Arg.DST)
    np.testing.assert_allclose(y, a @ b + bias, **CLOSE)


# -- normalisation -----------------------------------------------------------------------------

AFFINE = Normalization.USE_SCALE | Normalization.USE_SHIFT


@pytest.mark.parametrize("channels", [1, 5, 16])
@pytest.mark.parametrize("relu", [False, True])
def test_batch_normalization_in_training(channels: int, relu: bool) -> None:
    x, dy = normal(4, channels, 5, 3), normal(4, channels, 5, 3, seed=1)
    gamma, beta = normal(channels, seed=2), normal(channels, seed=3)
    flags = AFFINE | (Normalization.FUSE_NORM_RELU if relu else Normalization.NONE)
    forward = primitives.batch_normalization_forward(nhwc(x), nhwc(x), 1e-3, flags, training=True)
    inputs = {Arg.SRC: x, Arg.SCALE: gamma, Arg.SHIFT: beta}
    outputs = [Arg.DST, Arg.MEAN, Arg.VARIANCE] + [Arg.WORKSPACE] * relu
    y, mean, var, *workspace = execute(forward, inputs, *outputs)
    normalised, expected_mean, expected_var = BatchNormTraining(1e-3).evaluate(x, gamma, beta)
    expected = np.maximum(normalised, 0) if relu else normalised
    np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_allclose(mean, expected_mean, **CLOSE)
    np.testing.assert_allclose(var, expected_var, **CLOSE)

    backward = primitives.batch_normalization_backward(
        nhwc(x), nhwc(dy), nhwc(x), 1e-3, flags, hint=forward
    )
    inputs = {
        Arg.SRC: x,
        Arg.MEAN: expected_mean,
        Arg.VARIANCE: expected_var,
        Arg.SCALE: gamma,
        Arg.DIFF_DST: dy,
    }
    if relu:
        inputs[Arg.WORKSPACE] = workspace[0]
        dy = np.where(normalised > 0, dy, 0)
    found = execute(backward, inputs, Arg.DIFF_SRC, Arg.DIFF_SCALE, Arg.DIFF_SHIFT)
    wanted = BatchNormGradient(1e-3).evaluate(x, gamma, expected_mean, expected_var, dy)
    for gradient, expected in zip(found, wanted):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_batch_normalization_by_given_statistics() -> None:
    x, gamma, beta, mean = (
        normal(2, 5, 3, 3),
        normal(5, seed=1),
        normal(5, seed=2),
        normal(5, seed=3),
    )
    var = normal(5, seed=4) ** 2
    flags = AFFINE | Normalization.USE_GLOBAL_STATS
    primitive = primitives.batch_normalization_forward(nhwc(x), nhwc(x), 1e-3, flags)
    inputs = {Arg.SRC: x, Arg.SCALE: gamma, Arg.SHIFT: beta, Arg.MEAN: mean, Arg.VARIANCE: var}
    (y,) = execute(primitive, inputs, Arg.DST)
    (expected,) = BatchNormInference(1e-3).evaluate(x, gamma, beta, mean, var)
    np.testing.assert_allclose(y, expected, **CLOSE)


@pytest.mark.parametrize("channels", [16, 32])
def test_local_response_normalization(channels: int) -> None:
    x, dy = normal(2, channels, 4, 3), normal(2, channels, 4, 3, seed=1)
    settings = {"size": 5, "alpha": 5 * 0.1, "beta": 0.75, "k": 2.0}
    op = LocalResponseNorm(5, 0.1, 0.75, 2.0)
    forward = primitives.lrn_forward(
        nhwc(x), nhwc(x), **settings, training=True, allow_reference=True
    )
    workspace = [Arg.WORKSPACE] if forward.workspace is not None else []
    y, *saved = execute(forward, {Arg.SRC: x}, Arg.DST, *workspace)
    np.testing.assert_allclose(y, op.evaluate(x)[0], **CLOSE)
    backward = primitives.lrn_backward(
        nhwc(x), nhwc(dy), nhwc(x), **settings, hint=forward, allow_reference=True
    )
    inputs = {Arg.SRC: x, Arg.DIFF_DST: dy} | dict(zip(workspace, saved))
    (dx,) = execute(backward, inputs, Arg.DIFF_SRC)
    expected = LocalResponseNormGradient(5, 0.1, 0.75, 2.0).evaluate(x, dy)[0]
    np.testing.assert_allclose(dx, expected, **CLOSE)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("algorithm", list(Softmax), ids=lambda a: a.name.lower())
def test_softmax_and_its_gradient(axis: int, algorithm: Softmax) -> None:
    x, dy = normal(5, 7), normal(5, 7, seed=1)
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    p = e / e.sum(axis=axis, keepdims=True)
    logarithm = algorithm is Softmax.LOG
    y = np.log(p) if logarithm else p
    layout = plain(x)
    reference = axis == 0  # softmax over any axis but the innermost has no fast implementation
    forward = primitives.softmax_forward(
        layout, layout, axis, algorithm, training=True, allow_reference=reference
    )
    np.testing.assert_allclose(execute(forward, {Arg.SRC: x}, Arg.DST)[0], y, **CLOSE)
    backward = primitives.softmax_backward(
        layout, layout, layout, axis, algorithm, hint=forward, allow_reference=reference
    )
    (dx,) = execute(backward, {Arg.DST: y, Arg.DIFF_DST: dy}, Arg.DIFF_SRC)
    total = (dy if logarithm else dy * p).sum(axis=axis, keepdims=True)
    expected = dy - p * total if logarithm else p * (dy - total)
    np.testing.assert_allclose(dx, expected, **CLOSE)


# -- pooling -----------------------------------------------------------------------------------

#: x, kernel, stride, pad (begin, then end), cover_all
WINDOWS = {
    "halving": ((2, 16, 8, 8), (2, 2), (2, 2), (0, 0, 0, 0), False),
    "floor": ((2, 5, 7, 9), (2, 2), (2, 2), (0, 0, 0, 0), False),
    "cover all": ((2, 5, 7, 8), (2, 3), (2, 2), (0, 0, 0, 0), True),
    "padded": ((2, 10, 6, 7), (3, 3), (2, 1), (1, 0, 0, 1), False),
    "one channel": ((3, 1, 6, 6), (3, 2), (1, 1), (1, 1, 1, 0), False),
    "1d": ((2, 3, 9), (3,), (2,), (1, 0), True),
    "3d": ((2, 3, 4, 5, 6), (2, 2, 3), (2, 1, 2), (0, 1, 1, 0, 0, 1), False),
}


def right_pads(op: MaxPool | AveragePool, size: tuple[int, ...], out: tuple[int, ...]) -> list[int]:
    """What oneDNN's exact formula needs: negative where floor drops cells."""
    return [
        (o - 1) * s + k - h - p for o, s, k, h, p in zip(out, op.stride, op.kernel, size, op.pad)
    ]


def pooling(
    algorithm: Pooling, op: MaxPool | AveragePool, x: np.ndarray, y: np.ndarray
) -> tuple[Primitive, Primitive]:
    n = len(op.kernel)
    window = {
        "strides": op.stride,
        "kernel": op.kernel,
        "dilates": (0,) * n,
        "pad_l": op.pad[:n],
        "pad_r": right_pads(op, x.shape[2:], y.shape[2:]),
    }
    forward = primitives.pooling_forward(algorithm, nhwc(x), nhwc(y), training=True, **window)
    return forward, primitives.pooling_backward(algorithm, nhwc(x), nhwc(y), hint=forward, **window)


@pytest.mark.parametrize("row", list(WINDOWS))
def test_max_pooling(row: str) -> None:
    shape, *geometry = WINDOWS[row]
    op = MaxPool(*geometry)
    # Few different values, so that most windows have ties: the first maximum has the gradient.
    x = np.floor(normal(*shape) * 1.5)
    (y,) = op.evaluate(x)
    forward, backward = pooling(Pooling.MAX, op, x, y)
    found, workspace = execute(forward, {Arg.SRC: x}, Arg.DST, Arg.WORKSPACE)
    np.testing.assert_array_equal(found, y)
    dy = np.rint(8 * normal(*y.shape, seed=1))
    inputs = {Arg.DIFF_DST: dy, Arg.WORKSPACE: workspace}
    (dx,) = execute(backward, inputs, Arg.DIFF_SRC)
    (index,) = MaxPoolIndex(*geometry).evaluate(x)
    (expected,) = ScatterPooled(size=shape[2:]).evaluate(dy, index)
    np.testing.assert_array_equal(dx, expected)


@pytest.mark.parametrize("row", list(WINDOWS))
@pytest.mark.parametrize("divisor", ["kernel", "inside"])
def test_average_pooling(row: str, divisor: str) -> None:
    shape, *geometry = WINDOWS[row]
    op = AveragePool(*geometry, divisor)
    x = normal(*shape)
    (y,) = op.evaluate(x)
    algorithm = {
        "kernel": Pooling.AVERAGE_INCLUDE_PADDING,
        "inside": Pooling.AVERAGE_EXCLUDE_PADDING,
    }[divisor]
    forward, backward = pooling(algorithm, op, x, y)
    np.testing.assert_allclose(execute(forward, {Arg.SRC: x}, Arg.DST)[0], y, **TIGHT)
    dy = normal(*y.shape, seed=1)
    (dx,) = execute(backward, {Arg.DIFF_DST: dy}, Arg.DIFF_SRC)
    expected = AveragePoolGradient(*geometry, divisor, size=shape[2:]).evaluate(dy)[0]
    np.testing.assert_allclose(dx, expected, **TIGHT)


# -- element-wise ------------------------------------------------------------------------------


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


#: Algorithm, alpha, beta, its formula, and its derivative where it is wanted in training.
ELTWISE = {
    Eltwise.RELU: (
        0.1,
        0.0,
        lambda x: np.where(x > 0, x, 0.1 * x),
        lambda x: np.where(x > 0, 1, 0.1),
    ),
    Eltwise.TANH: (0.0, 0.0, np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    Eltwise.ELU: (
        0.5,
        0.0,
        lambda x: np.where(x > 0, x, 0.5 * np.expm1(x)),
        lambda x: np.where(x > 0, 1, 0.5 * np.exp(x)),
    ),
    Eltwise.SQUARE: (0.0, 0.0, np.square, lambda x: 2 * x),
    Eltwise.ABS: (0.0, 0.0, np.abs, np.sign),
    Eltwise.LINEAR: (2.0, -3.0, lambda x: 2 * x - 3, lambda x: np.full_like(x, 2)),
    Eltwise.SOFT_RELU: (1.0, 0.0, lambda x: np.logaddexp(0, x), _sigmoid),
    Eltwise.HARDSIGMOID: (0.2, 0.5, lambda x: np.clip(0.2 * x + 0.5, 0, 1), None),
    Eltwise.LOGISTIC: (0.0, 0.0, _sigmoid, lambda x: _sigmoid(x) * (1 - _sigmoid(x))),
    Eltwise.EXP: (0.0, 0.0, np.exp, np.exp),
    Eltwise.GELU_TANH: (0.0, 0.0, _gelu_tanh, None),
    Eltwise.SWISH: (1.0, 0.0, lambda x: x * _sigmoid(x), None),
    Eltwise.CLIP: (-0.5, 1.0, lambda x: np.clip(x, -0.5, 1), lambda x: (x > -0.5) & (x <= 1)),
    Eltwise.CLIP_V2: (-0.5, 1.0, lambda x: np.clip(x, -0.5, 1), lambda x: (x > -0.5) & (x < 1)),
    Eltwise.ROUND: (0.0, 0.0, np.rint, None),
    Eltwise.MISH: (0.0, 0.0, lambda x: x * np.tanh(np.logaddexp(0, x)), None),
    Eltwise.HARDSWISH: (1 / 6, 0.5, lambda x: x * np.clip(x / 6 + 0.5, 0, 1), None),
}
#: Those of positive numbers.
ELTWISE_POSITIVE = {
    Eltwise.SQRT: (0.0, 0.0, np.sqrt, lambda x: 0.5 / np.sqrt(x)),
    Eltwise.LOG: (0.0, 0.0, np.log, lambda x: 1 / x),
    Eltwise.POW: (2.0, -0.75, lambda x: 2 * x**-0.75, None),
}


@pytest.mark.parametrize("algorithm", [*ELTWISE, *ELTWISE_POSITIVE], ids=lambda a: a.name.lower())
def test_eltwise(algorithm: Eltwise) -> None:
    x = normal(3, 5, 7) * 2
    if algorithm in ELTWISE_POSITIVE:
        x = np.abs(x) + 0.1
    alpha, beta, formula, derivative = (ELTWISE | ELTWISE_POSITIVE)[algorithm]
    layout = plain(x)
    forward = primitives.eltwise_forward(
        algorithm, layout, layout, alpha, beta, training=derivative is not None
    )
    (y,) = execute(forward, {Arg.SRC: x}, Arg.DST)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, formula(wide), rtol=1e-5, atol=1e-5)
    if derivative is None:
        return
    dy = normal(*x.shape, seed=1)
    backward = primitives.eltwise_backward(
        algorithm, layout, layout, layout, alpha, beta, hint=forward
    )
    (dx,) = execute(backward, {Arg.SRC: x, Arg.DIFF_DST: dy}, Arg.DIFF_SRC)
    np.testing.assert_allclose(dx, dy * derivative(wide), rtol=1e-5, atol=1e-5)


#: The gradient from the result y, and its formula in y.
FROM_RESULT = {
    Eltwise.RELU_FROM_RESULT: (Eltwise.RELU, lambda y: y > 0),
    Eltwise.TANH_FROM_RESULT: (Eltwise.TANH, lambda y: 1 - y**2),
    Eltwise.LOGISTIC_FROM_RESULT: (Eltwise.LOGISTIC, lambda y: y * (1 - y)),
    Eltwise.EXP_FROM_RESULT: (Eltwise.EXP, lambda y: y),
    Eltwise.SQRT_FROM_RESULT: (Eltwise.SQRT, lambda y: 0.5 / y),
}


@pytest.mark.parametrize("algorithm", list(FROM_RESULT), ids=lambda a: a.name.lower())
def test_eltwise_gradient_from_the_result(algorithm: Eltwise) -> None:
    y, dy = np.abs(normal(4, 9)) * 0.3 + 0.01, normal(4, 9, seed=1)
    forward_algorithm, derivative = FROM_RESULT[algorithm]
    layout = plain(y)
    forward = primitives.eltwise_forward(forward_algorithm, layout, layout, training=True)
    backward = primitives.eltwise_backward(algorithm, layout, layout, layout, hint=forward)
    (dx,) = execute(backward, {Arg.DST: y, Arg.DIFF_DST: dy}, Arg.DIFF_SRC)
    np.testing.assert_allclose(dx, dy * derivative(y), **TIGHT)


def test_post_ops_that_would_be_ignored_are_refused() -> None:
    x, y = Desc.channels_last((2, 5, 4, 4), "f32"), Desc.channels_last((2, 5, 2, 2), "f32")
    attributes = Attributes().sum()
    with pytest.raises(UnsupportedError, match="post-op sum of eltwise; use binary instead"):
        primitives.eltwise_forward(Eltwise.LINEAR, x, x, attributes=attributes)
    window = {"strides": (2, 2), "kernel": (2, 2), "dilates": (0, 0), "pad_l": (0, 0)}
    with pytest.raises(UnsupportedError, match="post-op sum of pooling; use binary instead"):
        primitives.pooling_forward(Pooling.MAX, x, y, **window, pad_r=(0, 0), attributes=attributes)


BINARY = {
    Binary.ADD: np.add,
    Binary.MUL: np.multiply,
    Binary.MAX: np.maximum,
    Binary.MIN: np.minimum,
    Binary.DIV: np.divide,
    Binary.SUB: np.subtract,
    Binary.GE: np.greater_equal,
    Binary.GT: np.greater,
    Binary.LE: np.less_equal,
    Binary.LT: np.less,
    Binary.EQ: np.equal,
    Binary.NE: np.not_equal,
}


@pytest.mark.parametrize(
    "shape", [(2, 5, 4, 3), (1, 5, 1, 1), (2, 1, 1, 1), (2, 1, 4, 3), (1,) * 4]
)
@pytest.mark.parametrize("algorithm", list(BINARY), ids=lambda a: a.name.lower())
def test_binary_broadcasts(algorithm: Binary, shape: tuple[int, ...]) -> None:
    x, other = np.rint(2 * normal(2, 5, 4, 3)), np.rint(2 * normal(*shape, seed=1))
    if algorithm is Binary.DIV:
        other += 0.5
    per_row = shape == (2, 1, 1, 1)  # has no fast implementation
    primitive = primitives.binary(algorithm, nhwc(x), nhwc(other), nhwc(x), allow_reference=per_row)
    (y,) = execute(primitive, {Arg.SRC: x, Arg.SRC_1: other}, Arg.DST)
    np.testing.assert_allclose(y, BINARY[algorithm](x, other).astype(np.float32), **TIGHT)


def test_binary_with_sum_is_a_step_of_gradient_descent() -> None:
    parameter, gradient = normal(37), normal(37, seed=1)
    rate = np.array([-0.1], np.float32)
    primitive = primitives.binary(
        Binary.MUL, plain(gradient), plain(rate), plain(parameter), attributes=Attributes().sum()
    )
    inputs = {Arg.SRC: gradient, Arg.SRC_1: rate, Arg.DST: parameter}
    (updated,) = execute(primitive, inputs, Arg.DST)
    np.testing.assert_allclose(updated, parameter - np.float32(0.1) * gradient, **TIGHT)


# -- many and one ------------------------------------------------------------------------------

REDUCTION = {
    Reduction.MAX: np.max,
    Reduction.MIN: np.min,
    Reduction.SUM: np.sum,
    Reduction.MUL: np.prod,
    Reduction.MEAN: np.mean,
}


@pytest.mark.parametrize("axes", [(2, 3), (0, 2, 3), (1,), (0,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("algorithm", list(REDUCTION), ids=lambda a: a.name.lower())
def test_reduction(algorithm: Reduction, axes: tuple[int, ...]) -> None:
    x = normal(3, 5, 4, 2)
    expected = REDUCTION[algorithm](x, axis=axes, keepdims=True)
    primitive = primitives.reduction(algorithm, nhwc(x), plain(expected), allow_reference=True)
    np.testing.assert_allclose(execute(primitive, {Arg.SRC: x}, Arg.DST)[0], expected, **CLOSE)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_concat(axis: int) -> None:
    shapes = [[2, 5, 4, 3] for _ in range(3)]
    for i, shape in enumerate(shapes):
        shape[axis] += i
    parts = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected = np.concatenate(parts, axis)
    primitive = primitives.concat([nhwc(p) for p in parts], axis, nhwc(expected))
    inputs = {multiple_source(i): p for i, p in enumerate(parts)}
    np.testing.assert_array_equal(execute(primitive, inputs, Arg.DST)[0], expected)


def test_sum_of_many() -> None:
    parts, scales = [normal(2, 5, 4, 3, seed=i) for i in range(4)], [1.0, 0.5, -2.0, 0.25]
    primitive = primitives.sum_of([nhwc(p) for p in parts], scales, nhwc(parts[0]))
    inputs = {multiple_source(i): p for i, p in enumerate(parts)}
    (y,) = execute(primitive, inputs, Arg.DST)
    np.testing.assert_allclose(y, sum(s * p for s, p in zip(scales, parts)), **TIGHT)


def test_reorder_changes_layout_and_type() -> None:
    x = normal(2, 5, 3, 4)
    half = np.empty((2, 3, 4, 5), ml_dtypes.bfloat16)
    target = Desc.channels_last(x.shape, DType.BF16)
    primitive = primitives.reorder(plain(x), target)
    primitive.run({Arg.SRC: Memory(plain(x), x), Arg.DST: Memory(target, half)})
    np.testing.assert_array_equal(half, np.moveaxis(x, 1, -1).astype(ml_dtypes.bfloat16))


def test_resampling() -> None:
    x = normal(2, 5, 3, 4)
    dst = Desc.channels_last((2, 5, 6, 8), "f32")
    nearest = primitives.resampling_forward(
        Resampling.NEAREST, nhwc(x), dst, training=True, allow_reference=True
    )
    expected = x.repeat(2, axis=2).repeat(2, axis=3)
    np.testing.assert_array_equal(execute(nearest, {Arg.SRC: x}, Arg.DST)[0], expected)
    back = primitives.resampling_backward(
        Resampling.NEAREST, nhwc(x), dst, hint=nearest, allow_reference=True
    )
    dy = normal(2, 5, 6, 8, seed=1)
    (dx,) = execute(back, {Arg.DIFF_DST: dy}, Arg.DIFF_SRC)
    np.testing.assert_allclose(dx, dy.reshape(2, 5, 3, 2, 4, 2).sum(axis=(3, 5)), **TIGHT)
    linear = primitives.resampling_forward(Resampling.LINEAR, nhwc(x), dst, allow_reference=True)
    (y,) = execute(linear, {Arg.SRC: x}, Arg.DST)
    rows = [0, 0.25, 0.75, 1.25, 1.75, 2]
    columns = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    for (i, r), (j, c) in itertools.product(enumerate(rows), enumerate(columns)):
        down, across = r - int(r), c - int(c)
        corner = x[:, :, int(r) : int(r) + 2, int(c) : int(c) + 2]
        weights = np.outer([1 - down, down], [1 - across, across])
        weights = weights[: corner.shape[2], : corner.shape[3]]
        np.testing.assert_allclose(y[:, :, i, j], (corner * weights).sum(axis=(2, 3)), **CLOSE)


# -- values that are not numbers ---------------------------------------------------------------


@pytest.mark.parametrize("channels", [5, 16])
def test_a_maximum_of_nan_is_not_nan(channels: int) -> None:
    """What the backend must know: here oneDNN differs from the meaning of the ops."""
    x = np.full((1, channels, 2, 2), np.nan, np.float32)
    layout = nhwc(x)
    relu = primitives.eltwise_forward(Eltwise.RELU, layout, layout)
    assert not execute(relu, {Arg.SRC: x}, Arg.DST)[0].any()
    dst = Desc.channels_last((1, channels, 1, 1), "f32")
    window = {"strides": (2, 2), "kernel": (2, 2), "dilates": (0, 0), "pad_l": (0, 0)}
    pool = primitives.pooling_forward(Pooling.MAX, layout, dst, **window, pad_r=(0, 0))
    lowest = np.finfo(np.float32).min
    assert (execute(pool, {Arg.SRC: x}, Arg.DST)[0] == lowest).all()


# -- descriptors, memories, steps --------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5), (2, 3, 5, 7), (2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i32", "i8", "u8"])
def test_descriptors_say_what_they_hold(shape: tuple[int, ...], dtype: str) -> None:
    desc = Desc.strided(shape, dtype)
    array = np.empty(shape, DType.of(dtype).numpy)
    assert (desc.dims, desc.dtype, desc.nbytes) == (shape, DType.of(dtype), array.nbytes)
    assert desc.strides == tuple(s // array.itemsize for s in array.strides)
    assert desc == Desc.strided(shape, array.dtype)
    assert desc != Desc.strided((*shape[:-1], 9), dtype)


def test_channels_last_and_strides() -> None:
    desc = Desc.channels_last((2, 3, 5, 7), "f32")
    assert desc.strides == (105, 1, 21, 3)
    assert desc == Desc.strided((2, 3, 5, 7), "f32", (105, 1, 21, 3))
    assert Desc.any((2, 3), "f32").strides is None
    with pytest.raises(ShapeError, match="need as many strides"):
        Desc.strided((2, 3), "f32", (1,))
    with pytest.raises(UnsupportedError, match="no element type i64"):
        Desc.strided((2, 3), "i64")


def test_reorder_fills_a_slice_of_channels() -> None:
    """How a concat is written in place: other primitives write dense tensors only."""
    x, joined = normal(2, 3, 4, 4), np.zeros((2, 4, 4, 8), np.float32)
    slot = Desc.strided(x.shape, "f32", (128, 1, 32, 8))
    source = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    copy = primitives.reorder(nhwc(x), slot)
    copy.run({Arg.SRC: Memory(nhwc(x), source), Arg.DST: Memory(slot, joined[..., 2:5])})
    np.testing.assert_array_equal(joined[..., 2:5], source)
    assert not joined[..., :2].any()
    assert not joined[..., 5:].any()
    with pytest.raises(ReferenceImplementation, match="eltwise_forward"):
        primitives.eltwise_forward(Eltwise.RELU, slot, slot)


def test_memory_must_be_large_enough() -> None:
    desc = Desc.strided((4, 4), "f32")
    with pytest.raises(ShapeError, match="takes 64 bytes, the array spans 60"):
        Memory(desc, np.empty(15, np.float32))
    with pytest.raises(ShapeError, match="negative strides"):
        Memory(desc, np.empty((4, 4), np.float32)[::-1])


def test_own_memory_is_aligned() -> None:
    memory = Memory.empty(Desc.strided((3, 5), "f32"))
    assert isinstance(memory.data, np.ndarray)
    assert memory.data.ctypes.data % ALIGNMENT == 0


def test_a_step_runs_again_and_follows_its_memory() -> None:
    desc = Desc.strided((5,), "f32")
    relu = primitives.eltwise_forward(Eltwise.RELU, desc, desc)
    x, y, z = normal(5), np.zeros(5, np.float32), np.zeros(5, np.float32)
    target = Memory(desc, y)
    call, arguments, _ = step = relu.step({Arg.SRC: Memory(desc, x), Arg.DST: target}, Stream())
    gc.collect()
    assert call(*arguments) == 0
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    target.point(z)
    x[:] = -x
    assert step.call(*step.arguments) == 0
    np.testing.assert_array_equal(z, np.maximum(x, 0))


def test_a_step_wants_the_layouts_of_its_primitive() -> None:
    x = Desc.channels_last((2, 3, 4, 4), "f32")
    relu = primitives.eltwise_forward(Eltwise.RELU, x, x)
    other = Memory.empty(Desc.strided((2, 3, 4, 4), "f32"))
    with pytest.raises(ShapeError, match="eltwise_forward reads DST as .*; reorder it first"):
        relu.step({Arg.SRC: Memory.empty(x), Arg.DST: other})


def test_a_step_wants_its_workspace() -> None:
    x, y = normal(1, 3, 4, 4), normal(1, 3, 2, 2)
    forward, _ = pooling(Pooling.MAX, MaxPool((2, 2), (2, 2), (0,) * 4), x, y)
    with pytest.raises(ShapeError, match="needs a WORKSPACE of 12 bytes"):
        forward.step({Arg.SRC: Memory.empty(nhwc(x)), Arg.DST: Memory.empty(nhwc(y))})


def test_reference_implementations_are_refused() -> None:
    def build(**options: bool) -> Primitive:
        return primitives.convolution_forward(
            Desc.strided((2, 1, 9, 9), "f32"), Desc.any((5, 1, 3, 3), "f32"), None,
            Desc.channels_last((2, 5, 7, 7), "f32"), strides=(1, 1), dilates=(0, 0), pad_l=(0, 0),
            pad_r=(0, 0), **options,
        )  # fmt: skip

    with pytest.raises(ReferenceImplementation, match=r"convolution_forward of f32\[2, 1, 9, 9\]"):
        build()
    assert build(allow_reference=True).implementation.startswith("ref")


def test_errors_name_primitive_and_status() -> None:
    x = Desc.strided((2, 3), "f32")
    with pytest.raises(OneDNNError, match=r"matmul of .*: oneDNN says invalid arguments") as error:
        primitives.matmul(x, x, None, x)
    assert error.value.status == "invalid arguments"
    with pytest.raises(
        OneDNNError, match="dnnl_memory_desc_create_with_strides: invalid arguments"
    ):
        Desc.strided((-2, 3), "f32")
    with pytest.raises(UnsupportedError, match="unknown fpmath mode 'f8'"):
        primitives.binary(Binary.ADD, x, x, x, attributes=Attributes(fpmath="f8"))
    with pytest.raises(UnsupportedError, match="binary has no weights 0"):
        primitives.binary(Binary.ADD, x, x, x).desc("weights")


def test_objects_are_freed() -> None:
    desc = Desc.strided((5,), "f32")
    relu = primitives.eltwise_forward(Eltwise.RELU, desc, desc)
    step = relu.step({Arg.SRC: Memory.empty(desc), Arg.DST: Memory.empty(desc)})
    gone = weakref.ref(relu)
    del relu
    assert gone() is not None
    del step
    gc.collect()
    assert gone() is None


def test_primitives_obey_the_thread_count() -> None:
    before = library.threads()
    try:
        for count in (1, 2):
            library.set_threads(count)
            c = Convolution("2d")
            inputs = {Arg.SRC: c.x, Arg.WEIGHTS: c.weight, Arg.BIAS: c.bias}
            (y,) = execute(c.forward(), inputs, Arg.DST)
            np.testing.assert_allclose(y, c.y, **CLOSE)
    finally:
        library.set_threads(before)
