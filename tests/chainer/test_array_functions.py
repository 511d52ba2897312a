"""Array functions, reductions and mathematics: NumPy's values, and derivatives by differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import branchgraph.chainer.functions as F
from branchgraph.chainer.recorder import recorder
from branchgraph.chainer.type_check import InvalidType
from branchgraph.chainer.variable import Variable

#: Central differences of step 1e-6 in float64 err by far less.
DERIVATIVE = 1e-6
STEP = 1e-6

RNG = np.random.default_rng(0)
X = RNG.uniform(0.3, 0.9, (2, 3, 4))
Y = RNG.uniform(1.1, 1.9, (2, 3, 4))
ROWS = np.array([1, 0, 1])
MASK = np.array([[True, False, True], [False, False, True]])

Function = Callable[..., Any]


def agree_with_differences(f: Function, *arrays: np.ndarray) -> None:
    """Gradients of sum(f(...) c), c random, agree with central differences."""
    xs = [Variable(a) for a in arrays]
    y = f(*xs)
    c = np.random.default_rng(1).standard_normal(y.shape)
    y.grad = c
    y.backward()
    for i, x in enumerate(xs):
        slope = np.zeros(x.shape)
        for at in np.ndindex(x.shape):
            sides = []
            for step in (STEP, -STEP):
                moved = [a.copy() for a in arrays]
                moved[i][at] += step
                sides.append(float((f(*map(Variable, moved)).array * c).sum()))
            slope[at] = (sides[0] - sides[1]) / (2 * STEP)
        np.testing.assert_allclose(x.grad, slope, rtol=DERIVATIVE, atol=DERIVATIVE)


#: Functions of one [2, 3, 4] operand: ours and NumPy's.
ONE = {
    "cumsum-axis": (lambda x: F.cumsum(x, -1), lambda x: np.cumsum(x, -1)),
    "cumprod": (F.cumprod, np.cumprod),
    "cumprod-axis": (lambda x: F.cumprod(x, 0), lambda x: np.cumprod(x, 0)),
    "prod": (F.prod, np.prod),
    "prod-axes": (lambda x: F.prod(x, (0, 2)), lambda x: np.prod(x, (0, 2))),
    "prod-kept": (lambda x: F.prod(x, 1, True), lambda x: np.prod(x, 1, keepdims=True)),
    "sum-to": (lambda x: F.sum_to(x, (1, 4)), lambda x: x.sum((0, 1))[None]),
    "min-axes": (lambda x: F.min(x, (0, -1)), lambda x: x.min((0, 2))),
    "logsumexp": (F.logsumexp, lambda x: np.log(np.exp(x).sum())),
    "norm": (F.batch_l2_norm_squared, lambda x: (x * x).sum((1, 2))),
    "arcsin": (F.arcsin, np.arcsin),
    "arccos": (F.arccos, np.arccos),
    "arctanh": (F.arctanh, np.arctanh),
    "erf": (F.erf, np.vectorize(math.erf)),
    "log2": (F.log2, np.log2),
    "rsqrt": (F.rsqrt, lambda x: 1 / np.sqrt(x)),
    "square-operator": (lambda x: x**2, lambda x: x**2),
    "power": (lambda x: x**0.5, lambda x: x**0.5),
    "exponent": (lambda x: 3**x, lambda x: 3**x),
    "clip-below": (lambda x: F.clip(x, None, 0.6), lambda x: np.clip(x, None, 0.6)),
    "clip-above": (lambda x: F.clip(x, 0.6), lambda x: np.clip(x, 0.6, None)),
    "flip": (lambda x: F.flip(x, -1), lambda x: np.flip(x, -1)),
    "tile": (lambda x: F.tile(x, (2, 1, 1, 3)), lambda x: np.tile(x, (2, 1, 1, 3))),
    "tile-short": (lambda x: F.tile(x, 2), lambda x: np.tile(x, 2)),
    "repeat": (lambda x: F.repeat(x, 2), lambda x: np.repeat(x, 2)),
    "repeat-each": (lambda x: F.repeat(x, (2, 0, 1), 1), lambda x: np.repeat(x, (2, 0, 1), 1)),
    "diagonal": (F.diagonal, lambda x: np.diagonal(x)),
    "rollaxis": (lambda x: F.rollaxis(x, 2), lambda x: np.rollaxis(x, 2)),
    "rollaxis-end": (lambda x: F.rollaxis(x, 0, -1), lambda x: np.rollaxis(x, 0, -1)),
    "moveaxis": (lambda x: F.moveaxis(x, 0, -1), lambda x: np.moveaxis(x, 0, -1)),
    "swapaxes": (lambda x: F.swapaxes(x, 0, -1), lambda x: np.swapaxes(x, 0, -1)),
    "pad-values": (
        lambda x: F.pad(x, 1, "constant", constant_values=(2, 3)),
        lambda x: np.pad(x, 1, "constant", constant_values=(2, 3)),
    ),
    "permutate": (lambda x: F.permutate(x, np.array([2, 0, 1]), 1), lambda x: x[:, [2, 0, 1]]),
    "permutate-back": (
        lambda x: F.permutate(F.permutate(x, np.array([2, 0, 1]), 1), np.array([2, 0, 1]), 1, True),
        lambda x: x,
    ),
    "space-depth": (lambda x: F.depth2space(F.reshape(x, (1, 24, 1, 1)), 2), None),
    "einsum-trace": (
        lambda x: F.einsum("abb->a", x[:, :, :3]),
        lambda x: np.einsum("abb->a", x[:, :, :3]),
    ),
    "einsum-implicit": (lambda x: F.einsum("cab", x), lambda x: np.einsum("cab", x)),
    "average-weighted": (
        lambda x: F.average(x, 1, weights=np.array([1.0, 2.0, 3.0])),
        lambda x: np.average(x, 1, weights=np.array([1.0, 2.0, 3.0])),
    ),
}

#: Functions of two [2, 3, 4] operands.
TWO = {
    "fmod": (lambda x, y: F.fmod(y, x), lambda x, y: np.fmod(y, x)),
    "arctan2": (F.arctan2, np.arctan2),
    "power": (lambda x, y: x**y, lambda x, y: x**y),
    "minimum": (F.minimum, np.minimum),
    "maximum-broadcast": (lambda x, y: F.maximum(x, y[0]), lambda x, y: np.maximum(x, y[0])),
    "where": (
        lambda x, y: F.where(MASK[:, :, None], x, y),
        lambda x, y: np.where(MASK[:, :, None], x, y),
    ),
    "tensordot-pairs": (
        lambda x, y: F.tensordot(x, y, ((0, 2), (0, 2))),
        lambda x, y: np.tensordot(x, y, ((0, 2), (0, 2))),
    ),
    "tensordot-one": (
        lambda x, y: F.tensordot(x, F.transpose(y), 1),
        lambda x, y: np.tensordot(x, y.T, 1),
    ),
    "einsum-batched": (
        lambda x, y: F.einsum("nij,nkj->nik", x, y),
        lambda x, y: np.einsum("nij,nkj->nik", x, y),
    ),
    "einsum-three": (
        lambda x, y: F.einsum("nij,nkj,ni->k", x, y, x[:, :, 0]),
        lambda x, y: np.einsum("nij,nkj,ni->k", x, y, x[:, :, 0]),
    ),
    "einsum-ellipsis": (
        lambda x, y: F.einsum("...ij,kj->...ki", x, y[0]),
        lambda x, y: np.einsum("...ij,kj->...ki", x, y[0]),
    ),
    "matmul-broadcast": (
        lambda x, y: F.matmul(x, y[0], transb=True),
        lambda x, y: x @ y[0].T,
    ),
    "matmul-vector": (lambda x, y: F.matmul(x, y[0, 0]), lambda x, y: x @ y[0, 0]),
    "matmul-transposed": (
        lambda x, y: F.matmul(x, y, transa=True),
        lambda x, y: x.swapaxes(1, 2) @ y,
    ),
    "scatter-add": (
        lambda x, y: F.scatter_add(x, (slice(None), ROWS), y),
        lambda x, y: np.stack([x[:, 0] + y[:, 1], x[:, 1] + y[:, 0] + y[:, 2], x[:, 2]], 1),
    ),
    "dstack": (
        lambda x, y: F.dstack([x[0, 0], y[0, 0]]),
        lambda x, y: np.dstack([x[0, 0], y[0, 0]]),
    ),
    "stack-last": (lambda x, y: F.stack([x, y], -1), lambda x, y: np.stack([x, y], -1)),
    "interpolate": (lambda x, y: F.linear_interpolate(x, x, y), lambda x, y: x * x + (1 - x) * y),
}


@pytest.mark.parametrize("name", ONE)
def test_functions_of_one_operand(name: str) -> None:
    ours, expected = ONE[name]
    if expected is not None:
        np.testing.assert_allclose(ours(Variable(X)).array, expected(X), rtol=1e-12)
    agree_with_differences(ours, X)


@pytest.mark.parametrize("name", TWO)
def test_functions_of_two_operands(name: str) -> None:
    ours, expected = TWO[name]
    np.testing.assert_allclose(ours(Variable(X), Variable(Y)).array, expected(X, Y), rtol=1e-12)
    agree_with_differences(ours, X, Y)


@pytest.mark.parametrize(
    "index",
    [
        1,
        -1,
        (0, -2, 3),
        slice(None, None, -1),
        (slice(None), slice(2, 0, -1)),
        (Ellipsis, slice(3, None, -2), None),
        (None, 1, Ellipsis, None),
        (slice(5, 9),),
        ROWS,
        (slice(None), ROWS),
        (slice(None), np.array([[0, -1], [1, 1]]), slice(1, 3)),
        (np.array([0, 1, 1]), ROWS, np.array([3, 0, -1])),
        (0, ROWS),
        [1, 0],
        [slice(1), 2],
        MASK,
        (slice(None), np.array([True, False, True])),
        X > 0.6,
    ],
    ids=str,
)
def test_index(index: Any) -> None:
    picked = ROWS % 2 if index is ROWS else index
    plain = tuple(picked) if isinstance(picked, list) and not isinstance(picked[0], int) else picked
    np.testing.assert_array_equal(Variable(X)[picked].array, X[plain])
    agree_with_differences(lambda x: F.get_item(x, picked), X)


def test_products_with_zeros_have_derivatives() -> None:
    x = np.array([[2.0, 0.0, 3.0], [0.0, 5.0, 0.0]])
    agree_with_differences(lambda x: F.prod(x, 1), x)
    agree_with_differences(lambda x: F.cumprod(x, 1), x)


def test_clip_passes_the_gradient_at_its_bounds() -> None:
    x = Variable(np.array([-1.0, 0.0, 0.5, 1.0, 2.0]))
    y = F.clip(x, 0.0, 1.0)
    y.grad = np.ones(5)
    y.backward()
    np.testing.assert_array_equal(x.grad, [0, 1, 1, 1, 0])


def test_every_tied_minimum_has_the_whole_gradient() -> None:
    x = Variable(np.array([1.0, 0.0, 0.0]))
    F.min(x).backward()
    np.testing.assert_array_equal(x.grad, [0, 1, 1])


@pytest.mark.parametrize("f", [F.floor, F.ceil, F.fix, F.sign, F.argmax, F.argmin])
def test_steps_have_no_history(f: Function) -> None:
    assert f(Variable(X)).creator is None


def test_pixels_move_to_channels_and_back() -> None:
    x = np.arange(96.0).reshape(2, 12, 2, 2)
    y = F.depth2space(x, 2)
    assert y.array[0, 1, 0, 1] == x[0, 4, 0, 0]
    np.testing.assert_array_equal(F.space2depth(y, 2).array, x)


def test_columns_are_the_windows() -> None:
    x = RNG.normal(size=(2, 3, 5, 4))
    columns = F.im2col(x, (3, 2), stride=(2, 1), pad=(1, 0))
    w = RNG.normal(size=(4, 3, 3, 2))
    y = F.convolution_2d(x, w, stride=(2, 1), pad=(1, 0)).array
    sums = np.einsum("nkhw,ok->nohw", columns.array, w.reshape(4, -1))
    np.testing.assert_allclose(sums, y, rtol=1e-10, atol=1e-12)
    agree_with_differences(lambda x: F.im2col(x, 2, 2, 1, True, 2), x[:1, :1])


def test_unequal_sections_and_wrong_borders_are_refused() -> None:
    x = Variable(X)
    assert [p.shape[2] for p in F.split_axis(x, [1, 3], 2)] == [1, 2, 1]
    assert isinstance(F.split_axis(x, 1, 0, force_tuple=False), Variable)
    with pytest.raises(InvalidType, match="no 3 equal sections"):
        F.split_axis(x, 3, 2)


@pytest.mark.parametrize("mode", ["edge", "reflect", "symmetric", "wrap", "mean", "linear_ramp"])
def test_padding_by_elements_of_x_passes_back_only_what_lies_over_x(mode: str) -> None:
    x = Variable(X)
    y = F.pad(x, (1, 2), mode)
    np.testing.assert_array_equal(y.array, np.pad(X, (1, 2), mode))
    y.grad = dy = RNG.normal(size=y.shape)
    y.backward()
    np.testing.assert_array_equal(x.grad, dy[1:3, 1:4, 1:5])


def test_sequences_are_padded_to_the_longest() -> None:
    xs = [np.ones((2, 2)), np.ones((3, 2))]
    y = F.pad_sequence(xs, padding=-1)
    np.testing.assert_array_equal(y.array[0], [[1, 1], [1, 1], [-1, -1]])
    with pytest.raises(InvalidType, match="shorter"):
        F.pad_sequence(xs, length=2)


@pytest.mark.parametrize("f", [F.sum, F.mean, F.max, F.min, F.logsumexp, F.prod])
def test_axis_lists_are_refused(f: Function) -> None:
    with pytest.raises(TypeError, match="tuple of ints"):
        f(Variable(X), axis=[0, 1])


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.concat([X, X.astype(np.float32)]),
        lambda: F.concat([X, X], axis=3),
        lambda: F.maximum(X, X.astype(np.float32)),
        lambda: F.where(np.array([1, 0]), np.zeros(2), np.zeros(2)),
        lambda: F.sum(np.arange(3)),
        lambda: F.matmul(X, X),
        lambda: F.broadcast_to(X, (5, 4)),
        lambda: F.reshape(X, (5, -1)),
        lambda: F.squeeze(X, 1),
        lambda: F.select_item(X[0], np.array([0.0, 1.0, 1.0])),
        lambda: F.bias(X, np.zeros(4)),
        lambda: Variable(X)[0, 0, 0, 0],
    ],
)
def test_operands_that_do_not_fit_are_invalid(call: Callable[[], Any]) -> None:
    with pytest.raises(InvalidType, match="Invalid operation is performed in"):
        call()


def test_picking_other_elements_compiles_nothing_new() -> None:
    def pick(order: np.ndarray) -> None:
        _ = F.permutate(Variable(X), order, 1).array

    pick(np.array([0, 2, 1]))
    before = recorder().compilations
    pick(np.array([2, 1, 0]))
    assert recorder().compilations == before


def test_reductions_keep_the_dtype() -> None:
    x = Variable(X.astype(np.float16))
    for y in (F.mean(x), F.logsumexp(x), F.log2(x), x**2, 2**x, F.average(x, 1, x[0, :, 0])):
        assert y.dtype == np.float16


def test_numbers_take_the_dtype_of_an_integer_variable() -> None:
    x = Variable(np.array([1, 2, 3]))
    for y, expected in ((x + 1.5, [2, 3, 4]), (x / 2, [0, 0, 0]), (x // 2, [0, 1, 1])):
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y.array, expected)
    np.testing.assert_array_equal((-x).array, [-1, -2, -3])
    np.testing.assert_array_equal((x**2).array, [1, 4, 9])


# -- evaluation ----------------------------------------------------------------------------------


def test_accuracy_ignores_a_label_and_is_zero_when_none_is_left() -> None:
    y = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    assert F.accuracy(y, np.array([0, 0, 0])).array == np.float32(2 / 3)
    assert F.accuracy(y, np.array([0, 1, -1]), ignore_label=-1).array == 1
    none = F.accuracy(y, np.array([-1, -1, -1]), ignore_label=-1)
    assert none.array == 0
    assert none.dtype == np.float32
    assert none.creator is None


def test_accuracy_waits_with_the_rest_of_the_iteration() -> None:
    pending = len(recorder().pending)
    share = F.accuracy(Variable(np.eye(3)), np.arange(3))
    assert len(recorder().pending) > pending
    assert share.array == 1


def test_binary_accuracy_counts_what_is_labelled() -> None:
    assert F.binary_accuracy(np.array([0.0, -1.0, 3.0]), np.array([1, 1, -1])).array == 0.5


def test_constant_truth_scores_zero() -> None:
    pred = np.array([[1.0, 0.0], [2.0, 1.0]])
    true = np.array([[1.0, 5.0], [2.0, 5.0]])
    np.testing.assert_array_equal(F.r2_score(pred, true, multioutput="raw_values").array, [1, 0])
    assert F.r2_score(pred, true).array == 0.5
