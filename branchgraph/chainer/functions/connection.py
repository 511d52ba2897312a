"""Linear maps: dense layers and convolutions."""

from __future__ import annotations

from typing import Any

from branchgraph.chainer.functions.array import reshape
from branchgraph.chainer.functions.record import as_variable, function, pair, record
from branchgraph.chainer.variable import Variable
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.linear import Dense

__all__ = ["convolution_2d", "linear"]


@function
def linear(x: Any, W: Any, b: Any = None, n_batch_axes: int = 1) -> Variable:
    """y = x W^T + b; x is flattened behind its batch axes. W: [out, in], b: [out]."""
    x = as_variable(x)
    batch = x.shape[:n_batch_axes]
    rows = 1
    for size in batch:
        rows *= size
    flat = reshape(x, (rows, x.size // max(rows, 1)))
    operands = (flat, as_variable(W)) if b is None else (flat, as_variable(W), as_variable(b))
    y = record(Dense(), *operands)
    return y if n_batch_axes == 1 else reshape(y, (*batch, y.shape[1]))


@function
def convolution_2d(
    x: Any, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0, cover_all: bool = False, *,
    dilate: Any = 1, groups: int = 1,
) -> Variable:  # fmt: skip
    """Cross-correlation. x: [N, C, H, W], W: [O, C/groups, kh, kw], b: [O]."""
    if cover_all:
        raise NotImplementedError("convolution_2d with cover_all=True is not available yet")
    op = Conv(pair(stride), pair(pad) * 2, pair(dilate), groups)
    operands = (x, W) if b is None else (x, W, b)
    return record(op, *(as_variable(v) for v in operands))
