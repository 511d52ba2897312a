"""Chainer's words: `chainer.functions` over parameters, modes by `chainer.config.train`."""

from __future__ import annotations

from typing import Any

from peers.geometry import shape_text, short, symmetric, two_axes
from peers.walker import Call, NotExpressible, Table

PEER = "chainer"
HEADER = "import chainer.functions as F"


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
    "select": _select,
    "mean_cross_entropy": lambda c: f"F.softmax_cross_entropy({c.args[0]}, {c.args[1]})",
}
