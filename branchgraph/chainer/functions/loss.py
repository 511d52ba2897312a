"""Losses."""

from __future__ import annotations

from typing import Any

from branchgraph.chainer.functions.record import as_variable, function, record
from branchgraph.chainer.variable import Variable
from branchgraph.ir.ops.loss import CrossEntropy
from branchgraph.ir.ops.reduce import ReduceMean

__all__ = ["softmax_cross_entropy"]


@function
def softmax_cross_entropy(x: Any, t: Any) -> Variable:
    """Mean softmax cross-entropy."""
    each = record(CrossEntropy(), as_variable(x), as_variable(t))
    return record(ReduceMean(axes=tuple(range(each.ndim))), each)
