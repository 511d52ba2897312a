"""Kinds of gates: builders of the sub-graph that makes a gate from learned scores.

Each returns a gate value for `builder.gate` (`select`). With r the scores, u ~ U(0, 1) and
g = -ln(-ln u) Gumbel noise, drawn in training only:

    hard           1[r > t], straight through to r                      (BinaryConnect, 1511.00363)
    top_k          K-hot: the K largest of ln r + g in training (K draws without replacement
                   in proportion to r), of r in inference; straight through to r
                                                                          (MaskConnect, 1807.11473)
    sigmoid        1 / (1 + e^-r)
    softmax        e^r_i / sum_j e^r_j along an axis
    hard_concrete  clip(s (zeta - gamma) + gamma, 0, 1),  s = sigmoid((ln u - ln(1-u) + r) / beta)
                   in training, s = sigmoid(r) in inference               (L0 norm, 1712.01312)
    gumbel         softmax((r + g) / temperature) in training, one-hot of the largest r in
                   inference; `hard` makes the training form one-hot, straight through
                                                                          (1611.01144, 1611.00712)
"""

from __future__ import annotations

from branchgraph.ir import builder
from branchgraph.ir.builder import by_mode, noise, straight_through
from branchgraph.ir.functions import draws
from branchgraph.ir.functions.elementary import clip, log
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.elementwise import cast, compare
from branchgraph.ir.ops.reduce import TopK


def hard(score: Value, threshold: float = 0.5) -> Value:
    """1 where the score exceeds the threshold, else 0; the gradient goes to the score."""
    level = score.graph.constant(threshold, score.dtype)
    return straight_through(cast(compare("greater", score, level), score.dtype), score)


def top_k(score: Value, k: int, axis: int = -1) -> Value:
    """K ones along `axis`: drawn in proportion to the positive scores, or the K largest."""
    op = TopK(k=k, axis=axis % max(len(score.shape), 1))
    drawn = score.graph.emit(op, log(score) + draws.gumbel(score))
    return straight_through(by_mode(drawn, score.graph.emit(op, score)), score)


def sigmoid(score: Value) -> Value:
    """A soft gate in (0, 1)."""
    return builder.sigmoid(score)


def softmax(score: Value, axis: int = -1) -> Value:
    """Soft gates along `axis` that sum to 1."""
    return builder.softmax(score, axis % max(len(score.shape), 1))


def hard_concrete(
    score: Value, *, beta: float = 2.0 / 3.0, gamma: float = -0.1, zeta: float = 1.1
) -> Value:
    """A stretched and clipped concrete gate: exactly 0 or 1 with positive probability."""
    u = draws.inside(noise(score))
    drawn = builder.sigmoid((log(u) - log(1.0 - u) + score) / beta)
    stretched = by_mode(drawn, builder.sigmoid(score)) * (zeta - gamma) + gamma
    return clip(stretched, 0.0, 1.0)


def gumbel(score: Value, temperature: Value, axis: int = -1, *, hard: bool = False) -> Value:
    """A choice along `axis`; `temperature` is a 0-d value, so that it may be annealed."""
    position = axis % max(len(score.shape), 1)
    one_hot = TopK(k=1, axis=position)
    soft = builder.softmax((score + draws.gumbel(score)) / temperature, position)
    chosen = straight_through(score.graph.emit(one_hot, soft), soft) if hard else soft
    return by_mode(chosen, score.graph.emit(one_hot, score))
