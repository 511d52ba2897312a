"""Losses: against NumPy, their derivatives, their reductions, ties and extremes, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from branchgraph.ir import gates, losses
from branchgraph.ir.builder import cross_entropy, log_softmax
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.functions import expand_dims
from branchgraph.ir.graph import Graph
from branchgraph.ir.ops.reduce import ReduceMean
from branchgraph.ir.types import DType
from branchgraph.passes.specialise import specialise
from tests.ir.applied import SAME_FORMULA, Build, assert_derivatives, gradients, result

RNG = np.random.default_rng(11)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def labels(classes: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, classes, shape)


def soft_max(x: np.ndarray) -> np.ndarray:
    e = np.exp(x)
    return e / e.sum(axis=1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss, its terms in NumPy, what `mean` divides their sum by, and operands."""

    id: str
    function: Callable[..., Any]
    terms: Callable[..., np.ndarray]
    arrays: tuple[np.ndarray, ...]
    count: int | None = None

    def build(self, reduce: str) -> Build:
        return lambda *values: self.function(*values, reduce=reduce)


def loss(
    id: str, function: Build, terms: Build, *arrays: np.ndarray, count: int | None = None
) -> Loss:
    return Loss(id, function, terms, arrays, count)


def distance(a: np.ndarray, b: np.ndarray, p: int = 2) -> np.ndarray:
    return (abs(a - b) ** p).sum(axis=-1) ** (1 / p)


def contrastive(a: np.ndarray, b: np.ndarray, y: np.ndarray, margin: float = 1.0) -> np.ndarray:
    d = distance(a, b)
    return np.where(y, d**2, np.maximum(margin - d, 0) ** 2) / 2


def triplet(a: np.ndarray, p: np.ndarray, n: np.ndarray, margin: float = 0.2) -> np.ndarray:
    return np.maximum(distance(a, p) ** 2 - distance(a, n) ** 2 + margin, 0)


def batch_hard(
    e: np.ndarray, people: int, shots: int, margin: float | None = 0.2, p: int = 1
) -> np.ndarray:
    """Anchor by anchor; the soft form where there is no margin."""
    terms = []
    for i in range(people * shots):
        person = range(i // shots * shots, i // shots * shots + shots)
        others = [j for j in range(people * shots) if j not in person]
        far = max(distance(e[i], e[j], p) for j in person)
        near = min(distance(e[i], e[j], p) for j in others)
        gap = far - near
        terms.append(math.log(1 + math.exp(gap)) if margin is None else max(margin + gap, 0))
    return np.array(terms)


def alphabets(e: np.ndarray, count: int, people: int, shots: int, **options: Any) -> np.ndarray:
    return np.array([batch_hard(g, people, shots, **options).sum() for g in np.split(e, count)])


def hinge_terms(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    sign = np.where(np.arange(x.shape[1]) == t[:, None], 1, -1)
    return np.maximum(0, 1 - sign * x)


def binary_terms(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    p = sigmoid(x)
    return np.where(t == -1, 0, -t * np.log(p) - (1 - t) * np.log(1 - p))


def picked(log_p: np.ndarray, t: np.ndarray) -> np.ndarray:
    return -np.take_along_axis(log_p, np.maximum(t, 0)[:, None], axis=1)[:, 0]


def soft_terms(x: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -(targets * np.log(soft_max(x))).sum(axis=1)


def smooth(t: np.ndarray, classes: int, a: float) -> np.ndarray:
    return np.where(np.arange(classes) == t[:, None], 1 - a, a / (classes - 1))


SIGNS = np.array([[1, 0, -1, 1], [0, 0, 1, -1], [1, 1, 0, 1]])
IGNORED = np.array([[2, -1], [0, 1], [-1, -1]])
LOSSES = (
    loss("squared", losses.squared_error, lambda x, t: (x - t) ** 2, normal(3, 4), normal(3, 4)),
    loss("absolute", losses.absolute_error, lambda x, t: abs(x - t), normal(3, 4), normal(3, 4)),
    loss(
        "huber",
        lambda x, t, reduce: losses.huber(x, t, 0.7, reduce=reduce),
        lambda x, t: np.where(abs(x - t) < 0.7, (x - t) ** 2 / 2, 0.7 * (abs(x - t) - 0.35)),
        normal(4, 5),
        normal(4, 5),
    ),
    loss("hinge-L1", losses.hinge, hinge_terms, normal(3, 4), labels(4, 3), count=3),
    loss(
        "hinge-L2",
        lambda x, t, reduce: losses.hinge(x, t, "L2", reduce=reduce),
        lambda x, t: hinge_terms(x, t) ** 2,
        normal(5, 3),
        labels(3, 5),
        count=5,
    ),
    loss(
        "contrastive",
        lambda a, b, y, reduce: losses.contrastive(a, b, y, 3.0, reduce=reduce),
        lambda a, b, y: contrastive(a, b, y, 3.0),
        normal(6, 4),
        normal(6, 4),
        np.array([1, 0, 1, 0, 0, 1]),
    ),
    loss("triplet", losses.triplet, triplet, normal(6, 3), normal(6, 3), normal(6, 3)),
    loss(
        "batch-hard",
        lambda e, reduce: losses.batch_hard_triplet(e, 3, 4, 1.5, reduce=reduce),
        lambda e: batch_hard(e, 3, 4, 1.5),
        normal(12, 5),
    ),
    loss(
        "batch-hard-soft",
        lambda e, reduce: losses.batch_hard_triplet(e, 4, 2, soft=True, p=2, reduce=reduce),
        lambda e: batch_hard(e, 4, 2, None, p=2),
        normal(8, 3),
    ),
    loss(
        "batch-hard-single",
        lambda e, reduce: losses.batch_hard_triplet(e, 4, 1, 2.0, reduce=reduce),
        lambda e: batch_hard(e, 4, 1, 2.0),
        normal(4, 3),
    ),
    loss(
        "alphabets",
        lambda e, reduce: losses.alphabet_triplet(e, 2, 3, 2, 0.9, reduce=reduce),
        lambda e: alphabets(e, 2, 3, 2, margin=0.9),
        normal(12, 4),
    ),
    loss(
        "alphabets-soft",
        lambda e, reduce: losses.alphabet_triplet(e, 3, 2, 2, soft=True, reduce=reduce),
        lambda e: alphabets(e, 3, 2, 2, margin=None),
        normal(12, 4),
    ),
    loss(
        "sigmoid",
        losses.sigmoid_cross_entropy,
        binary_terms,
        normal(3, 4),
        SIGNS,
        count=10,
    ),
    loss(
        "sigmoid-probabilities",
        losses.sigmoid_cross_entropy,
        binary_terms,
        normal(3, 4),
        RNG.random((3, 4)),
    ),
    loss("nll", losses.nll, picked, normal(4, 3), labels(3, 4)),
    loss(
        "nll-ignoring",
        lambda x, t, reduce: losses.nll(x, t, ignore_label=-1, reduce=reduce),
        lambda x, t: np.where(t == -1, 0, picked(x, t)),
        normal(3, 4, 2),
        IGNORED,
        count=3,
    ),
    loss(
        "smoothed",
        lambda x, t, reduce: losses.soft_cross_entropy(x, t, smoothing=0.2, reduce=reduce),
        lambda x, t: soft_terms(x, smooth(t, 5, 0.2)),
        normal(3, 5),
        labels(5, 3),
    ),
    loss(
        "distillation",
        lambda s, t, reduce: losses.distillation(s, t, 2.0, reduce=reduce),
        lambda s, t: 4 * (soft_max(t / 2) * np.log(soft_max(t / 2) / soft_max(s / 2))).sum(axis=1),
        normal(3, 4, 2),
        normal(3, 4, 2),
    ),
    loss(
        "gaussian_nll",
        losses.gaussian_nll,
        lambda x, m, v: np.log(2 * np.pi * np.exp(v)) / 2 + (x - m) ** 2 / np.exp(v) / 2,
        normal(3, 4),
        normal(3, 4),
        normal(3, 4),
    ),
    loss("bernoulli_nll", losses.bernoulli_nll, lambda t, x: binary_terms(x, t), *normal(2, 3, 4)),
    loss(
        "gaussian_kl",
        losses.gaussian_kl,
        lambda m, v: (m**2 + np.exp(v) - v - 1) / 2,
        normal(3, 4),
        normal(3, 4),
    ),
)

each_loss = pytest.mark.parametrize("case", LOSSES, ids=[c.id for c in LOSSES])


@each_loss
@pytest.mark.parametrize("reduce", losses.REDUCTIONS)
def test_values_are_those_of_numpy(case: Loss, reduce: str) -> None:
    terms = np.asarray(case.terms(*case.arrays))
    expected = {
        "none": terms,
        "sum": terms.sum(),
        "mean": terms.sum() / (case.count or terms.size),
    }
    y = result(case.build(reduce), *case.arrays)
    np.testing.assert_allclose(y, expected[reduce], **SAME_FORMULA)


@each_loss
@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_gradients_are_those_of_central_differences(case: Loss, reduce: str) -> None:
    assert_derivatives(case.build(reduce), *case.arrays)


@each_loss
def test_single_precision_stays(case: Loss) -> None:
    singles = [x.astype(np.float32) if x.dtype.kind == "f" else x for x in case.arrays]
    y = result(case.build("none"), *singles)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, case.terms(*case.arrays), rtol=1e-4, atol=1e-5)


@each_loss
def test_unknown_reductions_are_refused(case: Loss) -> None:
    with pytest.raises(GraphError, match="reduce is one of mean, sum, none, got 'no'"):
        result(case.build("no"), *case.arrays)


# -- soft targets --------------------------------------------------------------------------------


def test_soft_targets_are_a_distribution_and_take_no_gradient() -> None:
    x, targets = normal(3, 4, 2), soft_max(normal(3, 4, 2))
    y = result(lambda x, t: losses.soft_cross_entropy(x, t, reduce="none"), x, targets)
    np.testing.assert_allclose(y, soft_terms(x, targets), **SAME_FORMULA)
    dx, dt = gradients(losses.soft_cross_entropy, x, targets)
    np.testing.assert_allclose(dx, (soft_max(x) - targets) / 6, **SAME_FORMULA)
    np.testing.assert_array_equal(dt, 0)


def test_without_smoothing_it_is_the_cross_entropy() -> None:
    x, t = normal(5, 4), labels(4, 5)
    expected = result(cross_entropy, x, t)
    for other in (losses.soft_cross_entropy, lambda x, t: losses.nll(log_softmax(x), t)):
        np.testing.assert_allclose(result(other, x, t), expected, **SAME_FORMULA)


def test_smoothed_labels_sum_to_one() -> None:
    t = labels(5, 3, 2)
    y = result(lambda t, x: losses.smoothed_labels(t, 5, 0.3, x), t, np.zeros(1))
    assert y.shape == (3, 5, 2)
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(y.max(axis=1), 0.7, rtol=1e-12)


# -- penalties -----------------------------------------------------------------------------------


def test_the_l2_penalty_has_the_gradient_of_weight_decay() -> None:
    values = (normal(2, 3), normal(4), normal())

    def penalty(*v: Any) -> Any:
        return losses.l2_penalty(v, 0.1)

    expected = 0.05 * sum((v**2).sum() for v in values)
    np.testing.assert_allclose(result(penalty, *values), expected, **SAME_FORMULA)
    for found, v in zip(gradients(penalty, *values), values):
        np.testing.assert_allclose(found, 0.1 * v, **SAME_FORMULA)


def test_the_hard_concrete_penalty_is_the_expected_number_of_open_gates() -> None:
    scores = np.array([-3.0, -0.5, 0.0, 2.0])
    expected = sigmoid(scores - 2 / 3 * math.log(0.1 / 1.1))
    y = result(losses.hard_concrete_penalty, scores)
    np.testing.assert_allclose(y, expected.sum(), **SAME_FORMULA)
    assert_derivatives(losses.hard_concrete_penalty, scores)

    from branchgraph.compiler import compile

    graph = Graph("gates")
    score = graph.input("s", (4000, 4), DType.F64)
    opened = gates.hard_concrete(score)
    graph.output("y", graph.emit(ReduceMean(axes=(0,)), losses.reduced(opened, "none")))
    graph.output("gate", opened)
    run = compile(specialise(graph, training=True), seed=1)
    drawn = run(s=np.tile(scores, (4000, 1)))["gate"]
    np.testing.assert_allclose((drawn > 0).mean(axis=0), expected, atol=0.03)


# -- ties and extremes ---------------------------------------------------------------------------


def test_equal_embeddings_have_finite_gradients() -> None:
    same = np.ones((6, 3))
    for p in (1, 2):
        for soft in (False, True):

            def build(e: Any, p: int = p, soft: bool = soft) -> Any:
                return losses.batch_hard_triplet(e, 3, 2, soft=soft, p=p)

            expected = 6 * (math.log(2) if soft else 0.2)
            np.testing.assert_allclose(result(build, same), expected, rtol=1e-12)
            np.testing.assert_array_equal(gradients(build, same)[0], 0)
    y = np.array([1, 0])
    found = gradients(losses.contrastive, np.ones((2, 3)), np.ones((2, 3)), y)
    np.testing.assert_array_equal(found, 0)


def test_soft_triplets_far_apart_do_not_overflow() -> None:
    far = np.array([[0.0], [1e4], [1.0], [2e4]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        y = result(lambda e: losses.batch_hard_triplet(e, 2, 2, soft=True, reduce="none"), far)
    np.testing.assert_allclose(y, [9999, math.log(2), 19998, 9999 + 1], atol=1.5, rtol=1e-4)


def test_large_logits_do_no_harm() -> None:
    x, t = np.array([[-1e4, 1e4, 1e4, -1e4]], np.float32), np.array([[0, 1, 0, 1]])
    with np.errstate(all="raise", under="ignore"):
        y = result(lambda x, t: losses.sigmoid_cross_entropy(x, t, reduce="none"), x, t)
        np.testing.assert_array_equal(y, [[0, 0, 1e4, 1e4]])
        (dx,) = gradients(lambda x, t: losses.sigmoid_cross_entropy(x, t, reduce="sum"), x, t)
    np.testing.assert_array_equal(dx, [[0, 0, 1, -1]])


def test_an_impossible_class_that_is_not_the_label_costs_nothing() -> None:
    log_p = np.log(np.array([[0.5, 0.5]])) + np.array([[0, -np.inf]])
    y = result(losses.nll, log_p, np.array([0]))
    np.testing.assert_allclose(y, math.log(2), rtol=1e-12)
    assert np.isinf(result(losses.nll, log_p, np.array([1])))


@pytest.mark.parametrize(
    "build",
    [
        losses.sigmoid_cross_entropy,
        lambda x, t: losses.nll(expand_dims(x, 1), t, ignore_label=-1),
    ],
    ids=["sigmoid", "nll"],
)
def test_where_every_label_is_ignored_loss_and_gradient_are_zero(build: Build) -> None:
    x, t = normal(3, 4), np.full((3, 4), -1)
    assert result(build, x, t) == 0
    np.testing.assert_array_equal(gradients(build, x, t)[0], 0)


def test_nan_is_not_hidden() -> None:
    x = np.array([[np.nan, 1.0], [0.0, 1.0]])
    for build in (losses.squared_error, losses.absolute_error, losses.huber):
        assert np.isnan(result(build, x, np.zeros((2, 2))))
    assert np.isnan(result(lambda e: losses.batch_hard_triplet(e, 2, 1), x))


def test_losses_keep_a_symbolic_batch() -> None:
    graph = Graph()
    x, t = graph.input("x", ("N", 4)), graph.input("t", ("N",), "i64")
    for value in (
        losses.hinge(x, t, reduce="none"),
        losses.nll(x, t, reduce="none"),
        losses.soft_cross_entropy(x, t, smoothing=0.1, reduce="none"),
        losses.triplet(x, x, x, reduce="none"),
    ):
        assert value.shape[0] == x.shape[0]
    assert losses.hinge(x, t).shape == ()


# -- refusals ------------------------------------------------------------------------------------

X = normal(4, 3)
T = labels(3, 4)

REFUSALS: list[tuple[Build, tuple[np.ndarray, ...], str]] = [
    (losses.squared_error, (X, normal(3)), "squared_error: operands have one type"),
    (losses.absolute_error, (T, T), "absolute_error: needs a floating dtype"),
    (lambda x: losses.huber(x, x, 0.0), (X,), "delta must be positive"),
    (lambda x, t: losses.hinge(x, t, "L3"), (X, T), "norm is L1 or L2, got 'L3'"),
    (losses.hinge, (X, labels(3, 4, 1)), r"x is \[N, C\] and labels \[N\]"),
    (losses.contrastive, (X, X, labels(2, 3)), r"similar is \[N\]"),
    (losses.triplet, (X, X, normal(4, 2)), "triplet: operands have one type"),
    (losses.triplet, (normal(4),) * 3, r"operands are \[N, D\]"),
    (lambda e: losses.batch_hard_triplet(e, 2, 3), (X,), r"embeddings are \[6, D\]"),
    (lambda e: losses.batch_hard_triplet(e, 1, 4), (X,), "needs two identities"),
    (lambda e: losses.batch_hard_triplet(e, 2, 2, p=3), (X,), "p is 1 or 2, got 3"),
    (lambda e: losses.alphabet_triplet(e, 2, 2, 2), (X,), r"embeddings are \[8, D\]"),
    (lambda e: losses.alphabet_triplet(e, 0, 2, 2), (X,), "at least one alphabet"),
    (losses.sigmoid_cross_entropy, (X, T), "t has the shape of"),
    (losses.nll, (X, labels(3, 3)), r"labels of .* are \[N, ...\]"),
    (losses.soft_cross_entropy, (X, labels(3, 3)), r"labels of .* are \[N, ...\]"),
    (losses.soft_cross_entropy, (X, normal(4, 2)), "targets of"),
    (
        lambda x, t: losses.soft_cross_entropy(x, t, smoothing=0.1),
        (X, X),
        "only labels are smoothed",
    ),
    (
        lambda x, t: losses.soft_cross_entropy(x, t, smoothing=1.5),
        (X, T),
        r"needs smoothing in 0\.\.1",
    ),
    (lambda x: losses.distillation(x, x, 0.0), (X,), "temperature must be positive"),
    (lambda x: losses.l2_penalty([]), (X,), "needs at least one value"),
    (lambda x: losses.hard_concrete_penalty(x, gamma=0.1), (X,), "needs gamma < 0"),
]


@pytest.mark.parametrize(("build", "arrays", "rule"), REFUSALS)
def test_what_does_not_fit_is_refused(
    build: Build, arrays: tuple[np.ndarray, ...], rule: str
) -> None:
    with pytest.raises((GraphError, ShapeError), match=rule):
        result(build, *arrays)
