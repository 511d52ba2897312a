"""Losses: functions of values, element by element or sample by sample, then reduced.

`reduce` is `mean`, `sum` or `none`; `mean` divides by the number of terms, which each function
states. Labels are integers. What is not differentiable by its operand (labels, targets) says so.

    regression   squared, absolute, Huber
    margins      hinge, contrastive, triplet, batch-hard triplet
    likelihoods  sigmoid and soft-label cross-entropy, nll, Gaussian and Bernoulli
    penalties    l2, hard-concrete (L0), Kullback-Leibler to the standard normal
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from branchgraph.ir.dims import DimLike
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.functions.elementary import absolute, exp, maximum, softplus, square
from branchgraph.ir.functions.layout import expand_dims, reshaped
from branchgraph.ir.functions.reduction import (
    norm,
    reduce_max,
    reduce_mean,
    reduce_min,
    reduce_sum,
)
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.activation import LogSoftmax, Relu, Sigmoid
from branchgraph.ir.ops.constant import Extent, Full
from branchgraph.ir.ops.deep import SoftCrossEntropy
from branchgraph.ir.ops.elementwise import LogicalNot, cast, compare, where
from branchgraph.ir.ops.loss import OneHot
from branchgraph.ir.ops.math import RunningSum
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.ops.reduce import ReduceSum

REDUCTIONS = ("mean", "sum", "none")


def reduced(loss: Value, reduce: str, *, count: Value | None = None) -> Value:
    """`loss` averaged, summed or left alone; `count` is the number of terms that take part."""
    if reduce not in REDUCTIONS:
        raise GraphError(f"reduce is one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    if reduce == "none":
        return loss
    if reduce == "mean" and count is None:
        return reduce_mean(loss)
    total = reduce_sum(loss)
    if reduce == "sum" or count is None:
        return total
    return total / maximum(count, count.graph.constant(1.0, count.dtype))


def _alike(what: str, *values: Value) -> None:
    first = values[0].type
    if any(v.type != first for v in values):
        raise ShapeError(f"{what}: operands have one type, got {_listed(values)}")
    if not first.dtype.is_float:
        raise ShapeError(f"{what}: needs a floating dtype, got {first}")


def _listed(values: Iterable[Value]) -> str:
    return ", ".join(str(v.type) for v in values)


def _rows(what: str, *values: Value) -> None:
    _alike(what, *values)
    if len(values[0].shape) != 2:
        raise ShapeError(f"{what}: operands are [N, D], got {_listed(values)}")


def _relu(x: Value) -> Value:
    return x.graph.emit(Relu(), x)


def _extent(dim: DimLike, like: Value) -> Value:
    return like.graph.emit(Extent(dim=dim, dtype=like.dtype))


# -- regression ----------------------------------------------------------------------------------


def squared_error(x: Value, t: Value, *, reduce: str = "mean") -> Value:
    """(x - t)^2 for every element; x and t of one type."""
    _alike("squared_error", x, t)
    return reduced(square(x - t), reduce)


def mean_squared_error(x: Value, t: Value) -> Value:
    """The mean of (x - t)^2 over all elements, 0-d."""
    return squared_error(x, t)


def absolute_error(x: Value, t: Value, *, reduce: str = "mean") -> Value:
    """|x - t| for every element, with derivative 0 where they are equal."""
    _alike("absolute_error", x, t)
    return reduced(absolute(x - t), reduce)


def huber(x: Value, t: Value, delta: float = 1.0, *, reduce: str = "mean") -> Value:
    """e^2 / 2 where |e| < delta, else delta (|e| - delta / 2), with e = x - t  (Huber, 1964)."""
    _alike("huber", x, t)
    if not delta > 0:
        raise GraphError(f"huber: delta must be positive, got {delta}")
    e = x - t
    size = absolute(e)
    near = compare("less", size, x.graph.constant(delta, x.dtype))
    return reduced(where(near, square(e) * 0.5, (size - delta / 2) * delta), reduce)


# -- margins -------------------------------------------------------------------------------------


def hinge(x: Value, labels: Value, norm: str = "L1", *, reduce: str = "mean") -> Value:
    """One against the rest: max(0, 1 - s x) with s = 1 for the class labels[n], else -1.

    x: [N, C], labels: [N]. norm `L2` squares every term. `none` is [N, C]; `mean` is the sum of all
    terms over N.
    """
    if norm not in ("L1", "L2"):
        raise GraphError(f"hinge: norm is L1 or L2, got {norm!r}")
    if len(x.shape) != 2 or labels.shape != x.shape[:1]:
        raise ShapeError(f"hinge: x is [N, C] and labels [N], got {_listed((x, labels))}")
    sign = _one_hot(x, labels, "hinge") * 2.0 - 1.0
    terms = _relu(1.0 - sign * x)
    terms = square(terms) if norm == "L2" else terms
    return reduced(terms, reduce, count=_extent(x.shape[0], x) if reduce == "mean" else None)


def contrastive(
    x0: Value, x1: Value, similar: Value, margin: float = 1.0, *, reduce: str = "mean"
) -> Value:
    """(y D^2 + (1 - y) max(margin - D, 0)^2) / 2 with D the distance of x0[n] and x1[n].

    x0, x1: [N, D], similar: [N], 1 or 0; `none` is [N]. Where D is 0 its gradient is 0.
    (Hadsell, Chopra & LeCun, CVPR 2006.)
    """
    _rows("contrastive", x0, x1)
    if similar.shape != x0.shape[:1]:
        raise ShapeError(f"contrastive: similar is [N], got {similar.type} for {x0.type}")
    y = cast(similar, x0.dtype)
    distance = norm(x0 - x1, 1)
    far = square(_relu(margin - distance))
    terms = (y * square(distance) + (1.0 - y) * far) * 0.5
    return reduced(terms, reduce)


def triplet(
    anchor: Value, positive: Value, negative: Value, margin: float = 0.2, *, reduce: str = "mean"
) -> Value:
    """max(|a - p|^2 - |a - n|^2 + margin, 0) for every row of three values [N, D]; `none` is [N].

    (Schroff et al., "FaceNet", arXiv 1503.03832.)
    """
    _rows("triplet", anchor, positive, negative)
    near = reduce_sum(square(anchor - positive), 1)
    far = reduce_sum(square(anchor - negative), 1)
    return reduced(_relu(near - far + margin), reduce)


def batch_hard_triplet(
    embeddings: Value,
    identities: int,
    samples: int,
    margin: float = 0.2,
    *,
    soft: bool = False,
    p: int = 1,
    reduce: str = "sum",
) -> Value:
    """Each sample against its farthest relative hp and its nearest stranger hn.

    embeddings: [identities samples, D], the samples of an identity in a row. The terms, one a
    sample, are max(margin + hp - hn, 0), or ln(1 + e^(hp - hn)) if `soft`; `none` is [B]. Distances
    are p-norms, p 1 or 2; of several samples at the extreme distance each has the whole gradient.
    (Hermans, Beyer & Leibe, arXiv 1703.07737; V-Branch sums over the anchors and has p = 1.)
    """
    one = expand_dims(embeddings, 0)
    terms = _batch_hard(one, 1, identities, samples, margin, soft, p, "batch_hard_triplet")
    return reduced(reshaped(terms, terms.shape[1:]), reduce)


def alphabet_triplet(
    embeddings: Value,
    alphabets: int,
    identities: int,
    samples: int,
    margin: float = 0.2,
    *,
    soft: bool = False,
    p: int = 1,
    reduce: str = "mean",
) -> Value:
    """`batch_hard_triplet` within each of several alphabets, whose strangers are its own.

    embeddings: [alphabets identities samples, D]. The terms are the sums over the anchors of an
    alphabet, so `mean` is over the alphabets and `none` is [alphabets].
    """
    what = "alphabet_triplet"
    if alphabets < 1:
        raise GraphError(f"{what}: needs at least one alphabet, got {alphabets}")
    group, rest = identities * samples, embeddings.shape[1:]
    if embeddings.shape[:1] == (alphabets * group,):
        embeddings = reshaped(embeddings, (alphabets, group, *rest))
    terms = _batch_hard(embeddings, alphabets, identities, samples, margin, soft, p, what)
    return reduced(reduce_sum(terms, 1), reduce)


def _batch_hard(
    embeddings: Value, groups: int, identities: int, samples: int, margin: float, soft: bool,
    p: int, what: str,
) -> Value:  # fmt: skip
    """The terms [groups, B] of embeddings [groups, B, D]."""
    batch = identities * samples
    if identities < 2 or samples < 1:
        raise GraphError(
            f"{what}: needs two identities and a sample of each, got {identities} and {samples}"
        )
    if p not in (1, 2):
        raise GraphError(f"{what}: p is 1 or 2, got {p}")
    if len(embeddings.shape) != 3 or embeddings.shape[:2] != (groups, batch):
        raise ShapeError(f"{what}: embeddings are [{groups * batch}, D], got {embeddings.type}")
    apart = expand_dims(embeddings, 2) - expand_dims(embeddings, 1)
    distance = norm(apart, 3, p)
    same = _relatives(embeddings, identities, samples)
    unlike = embeddings.graph.emit(LogicalNot(), same)
    never = embeddings.graph.constant(math.inf, embeddings.dtype)
    farthest = reduce_max(where(same, distance, -never), 2)
    nearest = reduce_min(where(unlike, distance, never), 2)
    return softplus(farthest - nearest) if soft else _relu(farthest - nearest + margin)


def _relatives(like: Value, identities: int, samples: int) -> Value:
    """bool [1, B, B]: whether two samples of the batch have one identity."""
    graph, batch = like.graph, identities * samples
    ones = graph.emit(Full(value=1.0, shape=(identities, 1), dtype=like.dtype))
    number = graph.emit(RunningSum(axis=0), ones)
    blank = graph.emit(Full(value=0.0, shape=(identities, samples), dtype=like.dtype))
    identity = number + blank
    down, across = reshaped(identity, (1, batch, 1)), reshaped(identity, (1, 1, batch))
    return compare("equal", down, across)


# -- likelihoods ---------------------------------------------------------------------------------


def _one_hot(x: Value, labels: Value, what: str) -> Value:
    classes = x.shape[1]
    if not isinstance(classes, int):
        raise ShapeError(f"{what}: needs a known number of classes, got {x.type}")
    return x.graph.emit(OneHot(classes=classes, dtype=x.dtype), labels)


def sigmoid_cross_entropy(
    x: Value, t: Value, *, ignore_label: int | None = -1, reduce: str = "mean"
) -> Value:
    """-t ln sigmoid(x) - (1 - t) ln(1 - sigmoid(x)) for every element, as ln(1 + e^x) - t x.

    t has the shape of x: integers 0 and 1, of which `ignore_label` takes no part, or probabilities
    of x's dtype. `mean` is over the elements that take part, and 0 where none does.
    """
    if t.shape != x.shape:
        raise ShapeError(f"sigmoid_cross_entropy: t has the shape of {x.type}, got {t.type}")
    loss = softplus(x) - cast(t, x.dtype) * x
    if t.dtype.is_float or ignore_label is None:
        return reduced(loss, reduce)
    kept = compare("not_equal", t, x.graph.constant(ignore_label, t.dtype))
    loss = where(kept, loss, x.graph.constant(0.0, x.dtype))
    return reduced(loss, reduce, count=_count(kept, x) if reduce == "mean" else None)


def _count(kept: Value, like: Value) -> Value:
    return reduce_sum(cast(kept, like.dtype))


def nll(
    log_p: Value, labels: Value, *, ignore_label: int | None = None, reduce: str = "mean"
) -> Value:
    """-log_p[n, labels[n, ...], ...]: log-probabilities [N, C, ...], labels [N, ...].

    `mean` is over the labels other than `ignore_label`. A label outside 0 .. C - 1 has
    loss 0.
    """
    if labels.shape != (log_p.shape[0], *log_p.shape[2:]):
        raise ShapeError(f"nll: labels of {log_p.type} are [N, ...], got {labels.type}")
    zero = log_p.graph.constant(0.0, log_p.dtype)
    if ignore_label is None:
        kept = None
    else:
        kept = compare("not_equal", labels, log_p.graph.constant(ignore_label, labels.dtype))
    chosen = compare("greater", _one_hot(log_p, labels, "nll"), zero)
    loss = -log_p.graph.emit(ReduceSum(axes=(1,)), where(chosen, log_p, zero))
    if kept is None:
        return reduced(loss, reduce)
    loss = where(kept, loss, zero)
    return reduced(loss, reduce, count=_count(kept, log_p) if reduce == "mean" else None)


def smoothed_labels(labels: Value, classes: int, smoothing: float, like: Value) -> Value:
    """Targets [N, classes, ...]: 1 - smoothing for the label, the rest shared by the others.

    labels: [N, ...]; the dtype is that of `like`. (Szegedy et al., arXiv 1512.00567, there shared
    by all classes: smoothing (C - 1) / C gives that.)
    """
    if not 0 <= smoothing <= 1 or classes < 2:
        raise GraphError(
            f"smoothed_labels: needs smoothing in 0..1 and two classes, got {smoothing}, {classes}"
        )
    rest = smoothing / (classes - 1)
    one_hot = labels.graph.emit(OneHot(classes=classes, dtype=like.dtype), labels)
    return one_hot * (1.0 - smoothing - rest) + rest


def soft_cross_entropy(
    logits: Value,
    targets: Value,
    *,
    smoothing: float = 0.0,
    reduce: str = "mean",
) -> Value:
    """-sum_c t_c ln softmax(logits)_c, the classes on axis 1; `none` is [N, ...].

    targets: the shape and dtype of the logits, for each position a distribution; or integer labels
    [N, ...], smoothed by `smoothed_labels`. No gradient reaches the targets.
    """
    if not targets.dtype.is_float:
        if targets.shape != (logits.shape[0], *logits.shape[2:]):
            raise ShapeError(
                f"soft_cross_entropy: labels of {logits.type} are [N, ...], got {targets.type}"
            )
        classes = logits.shape[1]
        if not isinstance(classes, int):
            raise ShapeError(f"soft_cross_entropy: needs known classes, got {logits.type}")
        targets = smoothed_labels(targets, classes, smoothing, logits)
    elif smoothing:
        raise GraphError("soft_cross_entropy: only labels are smoothed, not distributions")
    return reduced(logits.graph.emit(SoftCrossEntropy(), logits, targets), reduce)


def distillation(
    student: Value, teacher: Value, temperature: float = 1.0, *, reduce: str = "mean"
) -> Value:
    """T^2 sum_c q_c (ln q_c - ln p_c), p and q the softmax of student and teacher logits over T.

    Both: [N, C, ...]; `none` is [N, ...]. (Hinton, Vinyals & Dean, arXiv 1503.02531.)
    """
    _alike("distillation", student, teacher)
    if not temperature > 0:
        raise GraphError(f"distillation: temperature must be positive, got {temperature}")
    graph = student.graph
    log_p, log_q = (
        graph.emit(LogSoftmax(axis=1), v * (1.0 / temperature)) for v in (student, teacher)
    )
    terms = exp(log_q) * (log_q - log_p)
    return reduced(reduce_sum(terms, 1) * temperature**2, reduce)


def gaussian_nll(x: Value, mean: Value, ln_var: Value, *, reduce: str = "sum") -> Value:
    """(ln_var + ln 2 pi + (x - mean)^2 e^-ln_var) / 2 for every element."""
    _alike("gaussian_nll", x, mean, ln_var)
    deviation = square(x - mean) * exp(-ln_var)
    return reduced((ln_var + math.log(2.0 * math.pi) + deviation) * 0.5, reduce)


def bernoulli_nll(x: Value, logits: Value, *, reduce: str = "sum") -> Value:
    """-x ln sigmoid(logits) - (1 - x) ln(1 - sigmoid(logits)) for every element."""
    _alike("bernoulli_nll", x, logits)
    return reduced(softplus(logits) - x * logits, reduce)


# -- penalties -----------------------------------------------------------------------------------


def gaussian_kl(mean: Value, ln_var: Value, *, reduce: str = "sum") -> Value:
    """(mean^2 + e^ln_var - ln_var - 1) / 2: N(mean, e^ln_var) from N(0, 1), for every element.

    (Kingma & Welling, arXiv 1312.6114.)
    """
    _alike("gaussian_kl", mean, ln_var)
    return reduced((square(mean) + exp(ln_var) - ln_var - 1.0) * 0.5, reduce)


def l2_penalty(values: Iterable[Value], rate: float = 1.0) -> Value:
    """rate sum_v |v|^2 / 2 over all values, 0-d; its gradient is the decay rate v.

    Read states with `graph.read`.
    """
    squares = [reduce_sum(square(v)) for v in values]
    if not squares:
        raise GraphError("l2_penalty: needs at least one value")
    return squares[0].graph.emit(Sum(), *squares) * (rate / 2)


def hard_concrete_penalty(
    score: Value, *, beta: float = 2.0 / 3.0, gamma: float = -0.1, zeta: float = 1.1
) -> Value:
    """The expected number of open `gates.hard_concrete`: sum sigmoid(score - beta ln(-gamma/zeta)).

    (Louizos, Welling & Kingma, arXiv 1712.01312, equation 12.)
    """
    if not (gamma < 0 < 1 < zeta and beta > 0):
        raise GraphError(
            "hard_concrete_penalty: needs gamma < 0, zeta > 1 and beta > 0, "
            f"got {gamma}, {zeta} and {beta}"
        )
    shifted = score - beta * math.log(-gamma / zeta)
    return reduce_sum(score.graph.emit(Sigmoid(), shifted))
