"""Outputs with a gradient of their own: the formula of every field, and deafness to cotangents."""

from __future__ import annotations

import numpy as np
import pytest

from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import Op
from branchgraph.ir.ops.output import MakeLoss, RegressionOutput, SoftmaxOutput

#: float64 against float64 by another order of summation.
SAME_FORMULA = 1e-12

RNG = np.random.default_rng(5)
X = RNG.standard_normal((4, 5))
LABELS = np.array([1.0, 0.0, 4.0, 2.0])
PLANES = RNG.standard_normal((2, 3, 2, 2))
PLANE_LABELS = np.array([[0.0, 2.0, 2.0, 1.0], [1.0, 0.0, 2.0, 0.0]])


def gradient(op: Op, *arrays: np.ndarray, cotangent: float = 1.0) -> np.ndarray:
    """dx by `vjp`, with the batch as a symbol."""
    graph = Graph()
    values = [graph.input(f"x{i}", ("N", *a.shape[1:]), "f64") for i, a in enumerate(arrays)]
    y = graph.emit(op, *values)
    seed = graph.input("seed", y.shape, "f64")
    graph.output("dx", vjp(graph, {y: seed}, values)[values[0]])
    feeds = {f"x{i}": a for i, a in enumerate(arrays)}
    return interpret(graph, {**feeds, "seed": np.full(arrays[0].shape, cotangent)}).outputs["dx"]


def softmax(x: np.ndarray, axis: int = 1) -> np.ndarray:
    e = np.exp(x)
    return e / e.sum(axis=axis, keepdims=True)


def one_hot(labels: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[labels]


def agree(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=SAME_FORMULA, atol=SAME_FORMULA)


ERROR = softmax(X) - one_hot([1, 0, 4, 2], 5)


def test_softmax_output_gives_probabilities_minus_targets() -> None:
    agree(gradient(SoftmaxOutput(), X, LABELS), ERROR)


@pytest.mark.parametrize("op", [SoftmaxOutput(), SoftmaxOutput(normalization="valid")], ids=str)
def test_what_flows_in_is_ignored(op: Op) -> None:
    agree(gradient(op, X, LABELS, cotangent=7.0), gradient(op, X, LABELS))
    agree(gradient(MakeLoss(), X, cotangent=0.0), np.ones_like(X))
    agree(gradient(RegressionOutput("linear"), X, X - 1, cotangent=0.0), np.full(X.shape, 1 / 5))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (SoftmaxOutput(grad_scale=3.0), 3 * ERROR),
        (SoftmaxOutput(normalization="batch"), ERROR / 4),
        (SoftmaxOutput(normalization="valid"), ERROR / 4),
        (SoftmaxOutput(normalization="valid", ignore_label=4.0), ERROR / 3),
        (SoftmaxOutput(use_ignore=True), ERROR),
        (SoftmaxOutput(use_ignore=True, ignore_label=4.0), ERROR * [[1], [1], [0], [1]]),
        (SoftmaxOutput(out_grad=True), ERROR * softmax(X)),
    ],
    ids=str,
)
def test_fields_of_softmax_output_scale_its_gradient(op: Op, expected: np.ndarray) -> None:
    agree(gradient(op, X, LABELS), expected)


def test_no_valid_label_counts_as_one() -> None:
    op = SoftmaxOutput(normalization="valid", ignore_label=1.0)
    agree(gradient(op, X, np.ones(4)), softmax(X) - one_hot([1] * 4, 5))


def test_smoothing_takes_from_the_class_and_gives_to_the_others() -> None:
    target = np.where(one_hot([1, 0, 4, 2], 5) == 1, 0.8, 0.05)
    agree(gradient(SoftmaxOutput(smooth_alpha=0.2), X, LABELS), softmax(X) - target)


def test_labels_are_truncated_and_clipped() -> None:
    wild = np.array([-1.0, 9.0, 2.9, -0.5])
    agree(gradient(SoftmaxOutput(), X, wild), softmax(X) - one_hot([0, 4, 2, 0], 5))


def test_labels_of_the_shape_of_x_are_probabilities() -> None:
    target = softmax(RNG.standard_normal((4, 5)))
    op = SoftmaxOutput(grad_scale=2.0, normalization="batch", smooth_alpha=0.3)
    agree(gradient(op, X, target), 2 * (softmax(X) - target))


def plane_error() -> np.ndarray:
    target = one_hot(PLANE_LABELS.astype(int).reshape(-1).tolist(), 3).reshape(2, 2, 2, 3)
    return softmax(PLANES) - np.moveaxis(target, -1, 1)


@pytest.mark.parametrize(("normalization", "divisor"), [("null", 4), ("batch", 8), ("valid", 5)])
def test_multi_output_has_a_label_for_every_position(normalization: str, divisor: int) -> None:
    op = SoftmaxOutput(multi_output=True, normalization=normalization, ignore_label=2.0)
    for shape in ((2, 4), (2, 2, 2), (2, 1, 2, 2)):
        found = gradient(op, PLANES, PLANE_LABELS.reshape(shape))
        agree(found, plane_error() / divisor)


def test_preserve_shape_takes_the_last_axis_and_the_default_all_but_the_first() -> None:
    x = RNG.standard_normal((2, 3, 4))
    labels = np.array([[0, 3, 1], [2, 2, 0]])
    target = one_hot(labels.reshape(-1).tolist(), 4).reshape(2, 3, 4)
    last = SoftmaxOutput(preserve_shape=True)
    agree(gradient(last, x, labels.astype(float)), softmax(x, axis=2) - target)
    agree(
        gradient(SoftmaxOutput(), x, np.array([7.0, 11.0])),
        (softmax(x.reshape(2, 12)) - one_hot([7, 11], 12)).reshape(2, 3, 4),
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", X - 0.5),
        ("logistic", 1 / (1 + np.exp(-X)) - 0.5),
        ("mae", np.where(X > 0.5, 1.0, -1.0)),
    ],
)
def test_regression_divides_by_the_labels_of_a_sample(kind: str, expected: np.ndarray) -> None:
    op = RegressionOutput(kind, grad_scale=2.0)
    agree(gradient(op, X, np.full(X.shape, 0.5)), expected * 2 / 5)


def test_an_exact_hit_counts_as_below() -> None:
    agree(gradient(RegressionOutput("mae"), np.ones((3, 1)), np.ones(3)), -np.ones((3, 1)))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (MakeLoss(3.0), 3.0),
        (MakeLoss(3.0, normalization="batch"), 3.0 / 4),
        (MakeLoss(3.0, 0.25, "valid"), 3.0 / np.count_nonzero(X > 0.25)),
        (MakeLoss(3.0, 100.0, "valid"), 3.0),
    ],
    ids=str,
)
def test_make_loss_scales(op: Op, expected: float) -> None:
    agree(gradient(op, X), np.full(X.shape, expected))


def test_unknown_choices_and_misfits_are_refused() -> None:
    with pytest.raises(GraphError, match="normalization 'all' is none of null, batch, valid"):
        SoftmaxOutput(normalization="all")
    with pytest.raises(GraphError, match="normalization 'all' is none of"):
        MakeLoss(normalization="all")
    with pytest.raises(GraphError, match="ignore_label nan is no class number"):
        SoftmaxOutput(ignore_label=float("nan"))
    with pytest.raises(GraphError, match="kind 'huber' is none of linear, logistic, mae"):
        RegressionOutput("huber")
    graph = Graph()
    x, labels = graph.input("x", (4, 5)), graph.input("labels", (3,))
    with pytest.raises(ShapeError, match="one number for each of its 4 rows"):
        graph.emit(SoftmaxOutput(), x, labels)
    with pytest.raises(ShapeError, match="as many elements as x"):
        graph.emit(RegressionOutput("mae"), x, labels)
