"""Measures of predictions. Nothing is differentiated.

Accuracies are recorded, so that asking for one in every iteration costs no extra program. Summaries
by class depend on the labels' values and are computed at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from branchgraph.chainer.configuration import using_config
from branchgraph.chainer.functions.arithmetic import floating, maximum, where
from branchgraph.chainer.functions.array import cast, reshape
from branchgraph.chainer.functions.record import as_variable, constant, function, record
from branchgraph.chainer.functions.reduction import argmax, average, sum
from branchgraph.chainer.variable import Variable
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.ops.elementwise import Compare

__all__ = [
    "accuracy",
    "binary_accuracy",
    "classification_summary",
    "f1_score",
    "precision",
    "r2_score",
    "recall",
]


def _labels(t: Any, shape: tuple[int, ...]) -> Variable:
    """Integer labels in int32, of the given shape."""
    t = as_variable(t)
    if t.dtype.kind != "i":
        raise ShapeError(f"labels must be signed integers, got {t.dtype}")
    if t.shape != shape:
        raise ShapeError(f"labels must have shape {shape}, got {t.shape}")
    return cast(t, np.int32)


def _same(a: Variable, b: Variable) -> Variable:
    return record(Compare("equal"), a, b)


def _share(matches: Variable, counted: Variable) -> Variable:
    """The share of matches among the counted positions, 0 if there are none."""
    matches = where(counted, matches, constant(0, matches))
    return sum(matches) / maximum(sum(cast(counted, matches.dtype)), constant(1, matches))


@function
def accuracy(y: Any, t: Any, ignore_label: int | None = None) -> Variable:
    """The share of labels t that are the argmax of y over axis 1."""
    with using_config("enable_backprop", False):
        y = floating(y)
        found = argmax(y, 1)
        labels = _labels(t, as_variable(t).shape)
        matches = cast(_same(reshape(found, labels.shape), labels), y.dtype)
        if ignore_label is None:
            return average(matches)
        counted = record(Compare("not_equal"), labels, constant(ignore_label, labels))
        return _share(matches, counted)


@function
def binary_accuracy(y: Any, t: Any) -> Variable:
    """The share of labels t (0 or 1, -1 ignored) that y >= 0 predicts."""
    with using_config("enable_backprop", False):
        y = floating(y)
        labels = _labels(t, y.shape)
        found = cast(record(Compare("greater_equal"), y, constant(0, y)), np.int32)
        counted = record(Compare("not_equal"), labels, constant(-1, labels))
        return _share(cast(_same(found, labels), y.dtype), counted)


# -- by class ------------------------------------------------------------------------------------


def _summary(
    y: Any, t: Any, label_num: int | None, beta: float, ignore_label: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F and support of every class; 0/0 is NaN."""
    scores, labels = np.asarray(floating(y).array), np.asarray(as_variable(t).array)
    if labels.dtype.kind != "i":
        raise ShapeError(f"labels must be signed integers, got {labels.dtype}")
    if scores.ndim < 2 or scores.shape[:1] + scores.shape[2:] != labels.shape:
        raise ShapeError(f"needs y [N, C, ...] and t [N, ...], got {scores.shape}, {labels.shape}")
    found = scores.argmax(axis=1)
    counted = labels != ignore_label
    classes = range(int(labels.max()) + 1 if label_num is None else label_num)
    right = np.array([np.sum((labels == i) & (found == i) & counted) for i in classes], np.int64)
    predicted = np.array([np.sum((found == i) & counted) for i in classes], np.int64)
    support = np.array([np.sum((labels == i) & counted) for i in classes], np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = right / predicted, right / support
        weight = beta * beta
        f = (1 + weight) * precision * recall / (weight * precision + recall)
    return precision, recall, f, support


def _constants(*arrays: np.ndarray) -> tuple[Variable, ...]:
    return tuple(Variable(np.asarray(a), requires_grad=False) for a in arrays)


@function
def classification_summary(
    y: Any, t: Any, label_num: int | None = None, beta: float = 1.0, ignore_label: int = -1
) -> tuple[Variable, ...]:
    """Precision, recall, F-beta and support of every class."""
    return _constants(*_summary(y, t, label_num, beta, ignore_label))


@function
def precision(
    y: Any, t: Any, label_num: int | None = None, ignore_label: int = -1
) -> tuple[Variable, ...]:
    """The share of right predictions among the predictions of a class, and the support."""
    found = _summary(y, t, label_num, 1.0, ignore_label)
    return _constants(found[0], found[3])


@function
def recall(
    y: Any, t: Any, label_num: int | None = None, ignore_label: int = -1
) -> tuple[Variable, ...]:
    """The share of right predictions among the members of a class, and the support."""
    found = _summary(y, t, label_num, 1.0, ignore_label)
    return _constants(found[1], found[3])


@function
def f1_score(
    y: Any, t: Any, label_num: int | None = None, ignore_label: int = -1
) -> tuple[Variable, ...]:
    """The harmonic mean of precision and recall of every class, and the support."""
    found = _summary(y, t, label_num, 1.0, ignore_label)
    return _constants(found[2], found[3])


@function
def r2_score(
    pred: Any, true: Any, sample_weight: Any = None, multioutput: str = "uniform_average"
) -> Variable:
    """1 - sum w (true - pred)^2 / sum w (true - mean)^2 per output; 0 where true is constant."""
    if multioutput not in ("uniform_average", "raw_values"):
        raise ValueError(f"multioutput is uniform_average or raw_values, got {multioutput!r}")
    p, y = np.asarray(floating(pred).array), np.asarray(floating(true).array)
    if p.shape != y.shape:
        raise ShapeError(f"pred and true must have one shape, got {p.shape} and {y.shape}")
    w = np.ones(len(y), y.dtype) if sample_weight is None else np.asarray(sample_weight)
    weight = w.reshape(-1, *(1,) * (y.ndim - 1)).astype(y.dtype)
    mean = (weight * y).sum(axis=0) / weight.sum()
    missed = (weight * (y - p) ** 2).sum(axis=0)
    spread = (weight * (y - mean) ** 2).sum(axis=0)
    safe = np.where(spread != 0, spread, y.dtype.type(1))
    score = np.where(spread != 0, 1 - missed / safe, y.dtype.type(0)).astype(p.dtype)
    return _constants(score.mean(dtype=p.dtype) if multioutput == "uniform_average" else score)[0]
