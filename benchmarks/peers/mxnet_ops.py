"""MXNet's words: a symbol over variables, bound to an executor."""

from __future__ import annotations

from typing import Any

from peers.geometry import Pool, shape_text, symmetric, two_axes
from peers.torch_ops import RELATIONS
from peers.walker import Call, NotExpressible, Table, static_only

PEER = "mxnet"
HEADER = "import mxnet as mx"


def _conv(c: Call) -> str:
    two_axes(c, PEER)
    op: Any = c.op
    pad = symmetric(c)
    x = c.args[0]
    if pad is None:
        top, left, bottom, right = op.pad
        widths = (0, 0, 0, 0, top, bottom, left, right)
        x, pad = f"mx.sym.pad({x}, mode='constant', pad_width={widths})", (0, 0)
    weight = c.step.inputs[1].shape
    options = f"kernel={tuple(weight[2:])}, stride={tuple(op.stride)}, pad={pad}"
    options += f", dilate={tuple(op.dilation)}, num_filter={weight[0]}, num_group={op.groups}"
    bias = c.args[2] if c.has(2) else "no_bias=True"
    return f"mx.sym.Convolution({x}, {c.args[1]}, {bias}, {options})"


def _dense(c: Call) -> str:
    bias = c.args[2] if c.has(2) else "no_bias=True"
    units = c.step.inputs[1].shape[0]
    return f"mx.sym.FullyConnected({c.args[0]}, {c.args[1]}, {bias}, num_hidden={units})"


def _pool(kind: str):  # type: ignore[no-untyped-def]
    def write(c: Call) -> str:
        op: Any = c.op
        pool = Pool.of(c)
        kernels = pool.kernel == tuple(c.shape()[2:]) and pool.stride == pool.kernel
        average = kind == "avg" and not pool.plain and not kernels
        if average or not (pool.plain or pool.ceil or kernels):
            raise NotExpressible(f"not expressible in {PEER}: {c.step.opcode} with such windows")
        if kind == "avg" and any(op.pad) and op.divisor not in ("kernel", "padded"):
            raise NotExpressible(f"not expressible in {PEER}: divisor {op.divisor}")
        convention = "valid" if pool.plain else "full"
        options = f"kernel={pool.kernel}, stride={pool.stride}, pad={pool.begin}"
        options += f", pool_type='{kind}', pooling_convention='{convention}'"
        return f"mx.sym.Pooling({c.args[0]}, {options})"

    return write


def _batch_norm(c: Call) -> str:
    op: Any = c.op
    options = f"eps={op.eps}, momentum={op.decay}, fix_gamma=False"
    return f"mx.sym.BatchNorm({', '.join(c.args)}, {options})"


def _batch_norm_inference(c: Call) -> str:
    op: Any = c.op
    options = f"eps={op.eps}, fix_gamma=False, use_global_stats=True"
    return f"mx.sym.BatchNorm({', '.join(c.args)}, {options})"


def _lrn(c: Call) -> str:
    op: Any = c.op
    # MXNet divides alpha by the size of the window.
    options = f"nsize={op.size}, alpha={op.alpha * op.size:.12g}, beta={op.beta}, knorm={op.k}"
    return f"mx.sym.LRN({c.args[0]}, {options})"


def _reduce(name: str):  # type: ignore[no-untyped-def]
    def write(c: Call) -> str:
        op: Any = c.op
        return f"mx.sym.{name}({c.args[0]}, axis={tuple(op.axes)}, keepdims={op.keepdims})"

    return write


def _slice(c: Call) -> str:
    op: Any = c.op
    if op.step != 1:
        raise NotExpressible(f"not expressible in {PEER}: slice with a step")
    return f"mx.sym.slice_axis({c.args[0]}, axis={op.axis}, begin={op.start}, end={op.stop})"


def _arithmetic(name: str, symbol: str):  # type: ignore[no-untyped-def]
    def write(c: Call) -> str:
        a, b = c.args
        if c.shape(0) == c.shape(1) or c.is_number(0) or c.is_number(1):
            return f"{a} {symbol} {b}"
        return f"mx.sym.broadcast_{name}({a}, {b})"

    return write


def _mean(c: Call) -> str:
    return f"mx.sym.add_n({', '.join(c.args)}) / {len(c.args)}"


def _select(c: Call) -> str:
    value, gate = c.args
    ones = (1,) * (len(c.shape()) - len(c.shape(1)))
    gate = f"mx.sym.reshape({gate}, shape={shape_text((*ones, *c.shape(1)))})" if ones else gate
    return f"mx.sym.broadcast_mul({value}, {gate})"


def _compare(c: Call) -> str:
    op: Any = c.op
    if not (c.shape(0) == c.shape(1) or c.is_number(0) or c.is_number(1)):
        raise NotExpressible(f"not expressible in {PEER}: a comparison that broadcasts")
    return f"{c.args[0]} {RELATIONS[op.relation]} {c.args[1]}"


def _where(c: Call) -> str:
    """All operands in full; numbers are arrays of one number."""
    shape = shape_text(c.out_shape)
    texts = [
        f"mx.sym.full({shape}, {text})" if c.is_number(i)
        else text if c.shape(i) == c.out_shape
        else f"mx.sym.broadcast_to({text}, shape={shape})"
        for i, text in enumerate(c.args)
    ]  # fmt: skip
    return f"mx.sym.where({', '.join(texts)})"


def _straight_through(c: Call) -> str:
    value, surrogate = c.args
    return f"{surrogate} + mx.sym.BlockGrad({value} - {surrogate})"


def _top_k(c: Call) -> str:
    op: Any = c.op
    return f"mx.sym.topk({c.args[0]}, k={op.k}, axis={op.axis}, ret_typ='mask')"


def _cross_entropy(c: Call) -> str:
    logits, labels = c.args
    return f"mx.sym.mean(-mx.sym.pick(mx.sym.log_softmax({logits}, axis=1), {labels}))"


TABLE: Table = {
    "conv": _conv,
    "dense": _dense,
    "relu": lambda c: f"mx.sym.Activation({c.args[0]}, act_type='relu')",
    "sigmoid": lambda c: f"mx.sym.sigmoid({c.args[0]})",
    "tanh": lambda c: f"mx.sym.tanh({c.args[0]})",
    "softmax": lambda c: f"mx.sym.softmax({c.args[0]}, axis={c.op.axis})",  # type: ignore[attr-defined]
    "max_pool": _pool("max"),
    "average_pool": _pool("avg"),
    "batch_norm": _batch_norm,
    "batch_norm_inference": _batch_norm_inference,
    "lrn": _lrn,
    "dropout": lambda c: f"mx.sym.Dropout({c.args[0]}, p={c.op.ratio})",  # type: ignore[attr-defined]
    "reshape": lambda c: f"mx.sym.reshape({c.args[0]}, shape={shape_text(c.out_shape)})",
    "concat": lambda c: f"mx.sym.concat({', '.join(c.args)}, dim={c.op.axis})",  # type: ignore[attr-defined]
    "slice": _slice,
    "sum": lambda c: f"mx.sym.add_n({', '.join(c.args)})",
    "mean": _mean,
    "reduce_mean": _reduce("mean"),
    "reduce_sum": _reduce("sum"),
    "add": _arithmetic("add", "+"),
    "subtract": _arithmetic("sub", "-"),
    "multiply": _arithmetic("mul", "*"),
    "divide": _arithmetic("div", "/"),
    "negate": lambda c: f"-{c.args[0]}",
    "log": lambda c: f"mx.sym.log({c.args[0]})",
    "compare": _compare,
    "where": _where,
    "select": _select,
    "straight_through": _straight_through,
    "top_k": _top_k,
    "exit_score": static_only(PEER),
    "noise": lambda c: f"mx.sym.random.uniform(shape={shape_text(c.out_shape)})",
    "mean_cross_entropy": _cross_entropy,
}
