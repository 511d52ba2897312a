"""NumPy's own calls, which write where the result lies, for ops on a few numbers.

The `evaluate` of these ops takes longer to prepare its calls than they take: a mean of eight losses
is 1 us in `add.reduce` and 25 in all. The cross-entropy of a few rows, a dozen such calls, is a
generated kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import numpy as np

from branchgraph.backends.onednn.kernels.host import follows_channels_last
from branchgraph.backends.onednn.plan import Place, Site, Step
from branchgraph.backends.onednn.tensors import Tensor
from branchgraph.codegen import cross_entropy as losses
from branchgraph.codegen import engine
from branchgraph.ir.op import Op
from branchgraph.ir.ops.elementwise import Cast, Compare
from branchgraph.ir.ops.loss import CrossEntropy, OneHot
from branchgraph.ir.ops.reduce import BroadcastTo, ReduceMean, ReduceSum
from branchgraph.ir.types import DType

#: Logits up to which the cross-entropy is computed one by one; NumPy's exponential takes several.
_FEW = 1 << 14

#: A call that fills the array at its end from those before it.
_Calls = Callable[[Op, list[np.ndarray], np.ndarray], list[Step]]


def direct(site: Site) -> bool:
    """Casts, repetition, comparisons, one-hot rows, sums and means."""
    calls = _CALLS.get(type(site.op))
    if calls is None or not all(_plain(t) for t in site.inputs):
        return False
    buffer = site.first.writes[0]
    if not _plain(site.output(buffer, last=follows_channels_last(site, buffer))):
        return False
    out = site.builder.tensors[buffer]

    def emit(place: Place) -> list[Step]:
        return calls(site.op, [place.array(t) for t in site.inputs], place.array(out))

    reads = [t.buffer for t in site.inputs]
    site.add(f"numpy {site.op.opcode}", reads, [out.buffer], emit)
    return True


def _plain(tensor: Tensor) -> bool:
    """Whether it has elements, of a type that is NumPy's own."""
    return tensor.size > 0 and tensor.dtype is not DType.BF16


def _cast(_: Op, operands: list[np.ndarray], out: np.ndarray) -> list[Step]:
    return [(partial(np.copyto, casting="unsafe"), (out, operands[0]), None)]


def _repeat(_: Op, operands: list[np.ndarray], out: np.ndarray) -> list[Step]:
    return [(np.copyto, (out, operands[0]), None)]


def _compare(op: Op, operands: list[np.ndarray], out: np.ndarray) -> list[Step]:
    assert isinstance(op, Compare)
    return [(partial(getattr(np, op.relation), out=out), tuple(operands), None)]


def _one_hot(op: Op, operands: list[np.ndarray], out: np.ndarray) -> list[Step]:
    assert isinstance(op, OneHot)
    labels = np.expand_dims(operands[0], 1)
    classes = np.arange(op.classes).reshape(1, -1, *(1,) * (labels.ndim - 2))
    equal = partial(np.equal, out=out, casting="unsafe")
    return [(equal, (labels, classes), None)]


def _reduced(op: Op, operands: list[np.ndarray], out: np.ndarray) -> list[Step]:
    assert isinstance(op, (ReduceSum, ReduceMean))
    (x,) = operands
    axes = tuple(op.axes)
    add = partial(np.add.reduce, axis=axes, keepdims=op.keepdims, dtype=x.dtype, out=out)
    steps: list[Step] = [(add, (x,), None)]
    if isinstance(op, ReduceMean):
        count = np.float64(prod(x.shape[a] for a in axes))
        steps.append((partial(np.divide, out=out, casting="unsafe"), (out, count), None))
    return steps


_CALLS: dict[type[Op], _Calls] = {
    BroadcastTo: _repeat,
    Cast: _cast,
    Compare: _compare,
    OneHot: _one_hot,
    ReduceMean: _reduced,
    ReduceSum: _reduced,
}


def cross_entropy(site: Site) -> bool:
    """Softmax cross-entropy of a few rows; rows that data counts may hold any labels."""
    op = site.op
    if not isinstance(op, CrossEntropy) or op.ignore_label is not None or engine.missing():
        return False
    x, labels = site.inputs
    if len(x.shape) != 2 or not 0 < x.size <= _FEW or site.first.rows is not None:
        return False
    known = x.dtype is DType.F32 and labels.dtype is DType.I64
    if not known or not x.row_major or not labels.row_major:
        return False
    out = site.output(site.first.writes[0])

    def emit(place: Place) -> list[Step]:
        flag = np.zeros(1, np.int64)
        rows, classes = x.shape
        addresses = (place.address(x), place.address(labels), place.address(out))
        return [
            losses.call(*addresses, flag.ctypes.data, (rows, classes)),
            (_refuse, (flag, op, place.array(x), place.array(labels)), None),
        ]

    site.add("llvm cross_entropy", [x.buffer, labels.buffer], [out.buffer], emit)
    return True


def _refuse(flag: np.ndarray, op: Op, x: np.ndarray, labels: np.ndarray) -> None:
    """Let the op itself say which labels name no class."""
    if flag[0]:
        flag[0] = 0
        op.evaluate(x, labels)


__all__ = ["cross_entropy", "direct"]
