"""Data movement."""

from __future__ import annotations

from branchgraph.chainer.functions.record import as_variable, function, record
from branchgraph.chainer.variable import Variable
from branchgraph.ir.ops.reshape import Reshape

__all__ = ["reshape"]


@function
def reshape(x: Variable, shape: tuple[int, ...]) -> Variable:
    """The same elements under another shape; one size may be -1."""
    x = as_variable(x)
    known = 1
    for size in shape:
        known *= size if size >= 0 else 1
    full = tuple(s if s >= 0 else x.size // max(known, 1) for s in shape)
    return x if full == x.shape else record(Reshape(full), x)
