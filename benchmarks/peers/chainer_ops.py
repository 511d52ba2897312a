"""Chainer's words: `chainer.functions` over parameters, modes by `chainer.config.train`.

Truth values are NumPy arrays, since Chainer's variables do not compare. Rows that leave at an exit
are selected by them.
"""

from __future__ import annotations

from typing import Any

from peers.geometry import shape_text, short, symmetric, two_axes
from peers.torch_ops import RELATIONS
from peers.walker import Call, NotExpressible, Table

PEER = "chainer"
HEADER = """import chainer
import chainer.functions as F
import numpy as np


def spread(x, shape):
    return F.broadcast_to(x if isinstance(x, chainer.Variable) else np.array(x, "f"), shape)


def where(condition, a, b, shape):
    return F.where(np.broadcast_to(condition, shape), spread(a, shape), spread(b, shape))


def top_k(x, k, axis):
    order = np.argsort(-x.array, axis=axis, kind="stable")
    mask = np.zeros_like(x.array)
    np.put_along_axis(mask, np.take(order, range(k), axis), np.float32(1), axis)
    return chainer.Variable(mask)


def noise(shape):
    return chainer.Variable(np.random.random_sample(shape).astype(np.float32))


def exit_score(logits, criterion):
    log = F.log_softmax(logits).array
    score = -(np.exp(log) * log).sum(1) if criterion == "entropy" else np.exp(log).max(1)
    return chainer.Variable(score)


def compact(mask, *values):
    found = tuple(chainer.Variable(v.array[mask]) for v in values)
    return found if len(found) > 1 else found[0]


def scatter(mask, rows, base):
    whole = np.broadcast_to(base.array, (len(mask),) + base.shape[1:]).copy()
    whole[mask] = rows.array
    return chainer.Variable(whole)"""


def _conv(c: Call) -> str:
    two_axes(c, PEER)
    op: Any = c.op
    x, pad = c.args[0], symmetric(c)
    if pad is None:
        top, left, bottom, right = op.pad
        widths = f"((0, 0), (0, 0), ({top}, {bottom}), ({left}, {right}))"
        x, pad = f"F.pad({x}, {widths}, 'constant')", (0, 0)
    text = f"F.convolution_2d({x}, {c.args[1]}, {c.arg(2)}, {short(op.stride)}, {short(pad)}"
    if op.groups > 1 or op.dilation != (1, 1):
        text += f", dilate={short(op.dilation)}, groups={op.groups}"
    return text + ")"


def _pad(c: Call) -> str:
    op: Any = c.op
    n = len(op.kernel)
    if op.pad[:n] != op.pad[n:]:
        raise NotExpressible(f"not expressible in {PEER}: {c.step.opcode} padded unevenly")
    return short(op.pad[:n])


def _max_pool(c: Call) -> str:
    two_axes(c, PEER)
    op: Any = c.op
    window = f"{short(op.kernel)}, {short(op.stride)}, {_pad(c)}"
    return f"F.max_pooling_2d({c.args[0]}, {window}, cover_all={op.cover_all})"


def _average_pool(c: Call) -> str:
    two_axes(c, PEER)
    op: Any = c.op
    if op.cover_all or (op.divisor != "kernel" and any(op.pad)):
        raise NotExpressible(f"not expressible in {PEER}: average_pool with overhanging windows")
    return f"F.average_pooling_2d({c.args[0]}, {short(op.kernel)}, {short(op.stride)}, {_pad(c)})"


def _batch_norm(c: Call) -> str:
    op: Any = c.op
    x, gamma, beta, mean, var = c.args
    states = f"running_mean={mean}.array, running_var={var}.array"
    return f"F.batch_normalization({x}, {gamma}, {beta}, eps={op.eps}, {states}, decay={op.decay})"


def _batch_norm_inference(c: Call) -> str:
    op: Any = c.op
    return f"F.fixed_batch_normalization({', '.join(c.args)}, eps={op.eps})"


def _reduce(name: str):  # type: ignore[no-untyped-def]
    def write(c: Call) -> str:
        op: Any = c.op
        return f"F.{name}({c.args[0]}, {tuple(op.axes)}, keepdims={op.keepdims})"

    return write


def _lrn(c: Call) -> str:
    op: Any = c.op
    options = f"{op.size}, {op.k}, {op.alpha}, {op.beta}"
    return f"F.local_response_normalization({c.args[0]}, {options})"


def _slice(c: Call) -> str:
    op: Any = c.op
    step = "" if op.step == 1 else f":{op.step}"
    return f"{c.args[0]}[{':, ' * op.axis}{op.start}:{op.stop}{step}]"


def _select(c: Call) -> str:
    value, gate = c.args
    return f"{value} * F.broadcast_to({gate}, {shape_text(c.out_shape)})"


def _compare(c: Call) -> str:
    op: Any = c.op
    a, b = (text if c.is_number(i) else f"{text}.array" for i, text in enumerate(c.args))
    return f"{a} {RELATIONS[op.relation]} {b}"


def _exit_score(c: Call) -> str:
    op: Any = c.op
    if op.criterion not in ("entropy", "confidence"):
        raise NotExpressible(f"not expressible in {PEER}: exit criterion {op.criterion}")
    return f"exit_score({c.args[0]}, {op.criterion!r})"


def _scatter(c: Call) -> str:
    if not c.has(2):
        raise NotExpressible(f"not expressible in {PEER}: scatter without a base")
    return f"scatter({', '.join(c.args)})"


def _full(c: Call) -> str:
    op: Any = c.op
    # A constant with as many rows as data leaves is one row, which broadcasts.
    rows = tuple(d if isinstance(d, int) else 1 for d in op.shape)
    return f"chainer.Variable(np.full({rows}, {op.value!r}, np.{op.dtype.numpy.name}))"


def _top_k(c: Call) -> str:
    op: Any = c.op
    return f"top_k({c.args[0]}, {op.k}, {op.axis})"


def _straight_through(c: Call) -> str:
    value, surrogate = c.args
    return f"{surrogate} + ({value} - {surrogate}).array"


def _broadcast(c: Call, symbol: str) -> str:
    """Arithmetic; Chainer's variables of different shapes are broadcast explicitly."""
    texts = []
    for i, text in enumerate(c.args):
        alike = c.is_number(i) or c.shape(i) == c.out_shape
        texts.append(text if alike else f"F.broadcast_to({text}, {shape_text(c.out_shape)})")
    return f" {symbol} ".join(texts)


TABLE: Table = {
    "conv": _conv,
    "dense": lambda c: f"F.linear({c.args[0]}, {c.args[1]}, {c.arg(2)})",
    "relu": lambda c: f"F.relu({c.args[0]})",
    "sigmoid": lambda c: f"F.sigmoid({c.args[0]})",
    "tanh": lambda c: f"F.tanh({c.args[0]})",
    "softmax": lambda c: f"F.softmax({c.args[0]}, {c.op.axis})",  # type: ignore[attr-defined]
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "batch_norm": _batch_norm,
    "batch_norm_inference": _batch_norm_inference,
    "lrn": _lrn,
    "dropout": lambda c: f"F.dropout({c.args[0]}, {c.op.ratio})",  # type: ignore[attr-defined]
    "reshape": lambda c: f"F.reshape({c.args[0]}, {shape_text(c.out_shape)})",
    "concat": lambda c: f"F.concat(({', '.join(c.args)},), {c.op.axis})",  # type: ignore[attr-defined]
    "slice": _slice,
    "sum": lambda c: " + ".join(c.args),
    "mean": lambda c: f"({' + '.join(c.args)}) / {len(c.args)}",
    "reduce_mean": _reduce("mean"),
    "reduce_sum": _reduce("sum"),
    "add": lambda c: _broadcast(c, "+"),
    "subtract": lambda c: _broadcast(c, "-"),
    "multiply": lambda c: _broadcast(c, "*"),
    "divide": lambda c: _broadcast(c, "/"),
    "negate": lambda c: f"-{c.args[0]}",
    "log": lambda c: f"F.log({c.args[0]})",
    "compare": _compare,
    "where": lambda c: f"where({', '.join(c.args)}, {shape_text(c.out_shape)})",
    "select": _select,
    "straight_through": _straight_through,
    "top_k": _top_k,
    "logical_not": lambda c: f"~{c.args[0]}",
    "full": _full,
    "exit_score": _exit_score,
    "compact": lambda c: f"compact({', '.join(c.args)})",
    "scatter": _scatter,
    "noise": lambda c: f"noise({shape_text(c.out_shape)})",
    "mean_cross_entropy": lambda c: f"F.softmax_cross_entropy({c.args[0]}, {c.args[1]})",
}
