"""PyTorch's words: functions of `torch.nn.functional`, parameters passed as tensors.

Functions, not modules, so that eager mode pays for no `Module.__call__`. Rows that leave at an exit
are selected by a mask (dynamic shapes, which eager mode has).
"""

from __future__ import annotations

from typing import Any

from peers.geometry import Pool, shape_text, short, symmetric, two_axes
from peers.walker import Call, NotExpressible, Table

PEER = "torch"
HEADER = "import torch\nimport torch.nn.functional as F"


def _conv(c: Call) -> str:
    two_axes(c, PEER)
    op: Any = c.op
    x, pad = c.args[0], symmetric(c)
    if pad is None:
        top, left, bottom, right = op.pad
        x, pad = f"F.pad({x}, ({left}, {right}, {top}, {bottom}))", (0, 0)
    text = f"F.conv2d({x}, {c.args[1]}, {c.arg(2)}, {short(op.stride)}, {short(pad)}"
    if op.groups > 1 or op.dilation != (1, 1):
        text += f", {short(op.dilation)}, {op.groups}"
    return text + ")"


def _pads(pool: Pool, x: str, value: str = "0.0") -> str:
    (top, left), (bottom, right) = pool.begin, pool.end
    return f"F.pad({x}, ({left}, {right}, {top}, {bottom}), value={value})"


def _max_pool(c: Call) -> str:
    two_axes(c, PEER)
    pool = Pool.of(c)
    window = f"{short(pool.kernel)}, {short(pool.stride)}"
    if pool.plain or pool.ceil:
        ceil = "" if pool.plain else ", ceil_mode=True"
        return f"F.max_pool2d({c.args[0]}, {window}, {short(pool.begin)}{ceil})"
    return f"F.max_pool2d({_pads(pool, c.args[0], '-torch.inf')}, {window})"


def _average_pool(c: Call) -> str:
    two_axes(c, PEER)
    op: Any = c.op
    pool = Pool.of(c)
    window = f"{short(pool.kernel)}, {short(pool.stride)}"
    if op.divisor == "kernel" or not pool.padded:
        x = _pads(pool, c.args[0]) if pool.padded and not pool.plain else c.args[0]
        pad = short(pool.begin) if pool.plain else "0"
        return f"F.avg_pool2d({x}, {window}, {pad})"
    if op.divisor == "inside" and (pool.plain or pool.ceil):
        options = f"ceil_mode={not pool.plain}, count_include_pad=False"
        return f"F.avg_pool2d({c.args[0]}, {window}, {short(pool.begin)}, {options})"
    raise NotExpressible(f"not expressible in {PEER}: average_pool with divisor {op.divisor}")


def _batch_norm(c: Call) -> str:
    op: Any = c.op
    x, gamma, beta, mean, var = c.args
    return f"F.batch_norm({x}, {mean}, {var}, {gamma}, {beta}, True, {1 - op.decay:.12g}, {op.eps})"


def _batch_norm_inference(c: Call) -> str:
    op: Any = c.op
    x, gamma, beta, mean, var = c.args
    return f"F.batch_norm({x}, {mean}, {var}, {gamma}, {beta}, False, 0.0, {op.eps})"


def _reduce(name: str):  # type: ignore[no-untyped-def]
    def write(c: Call) -> str:
        op: Any = c.op
        kept = ", keepdim=True" if op.keepdims else ""
        return f"{c.args[0]}.{name}({tuple(op.axes)}{kept})"

    return write


def _lrn(c: Call) -> str:
    op: Any = c.op
    if op.size % 2 == 0:
        raise NotExpressible(f"not expressible in {PEER}: lrn over an even number of channels")
    alpha = op.alpha * op.size
    return f"F.local_response_norm({c.args[0]}, {op.size}, {alpha:.12g}, {op.beta}, {op.k})"


def _exit_score(c: Call) -> str:
    op: Any = c.op
    p = f"F.softmax({c.args[0]}, 1)"
    if op.criterion == "entropy":
        return f"torch.special.entr({p}).sum(1)"
    if op.criterion == "confidence":
        return f"{p}.amax(1)"
    raise NotExpressible(f"not expressible in {PEER}: exit criterion {op.criterion}")


def _compact(c: Call) -> str:
    mask, *values = c.args
    return ", ".join(f"{v}[{mask}]" for v in values)


def tail(c: Call, operand: int) -> str:
    """The sizes behind the rows."""
    return "(-1,)" if len(c.shape(operand)) > 1 else "()"


def _scatter(c: Call) -> str:
    mask, rows = c.args[:2]
    if c.has(2):
        known = isinstance(c.shape(2)[0], int)
        base = c.args[2] if known else f"{c.args[2]}.expand({mask}.shape[0], *{tail(c, 2)})"
        return f"{base}.index_put(({mask},), {rows})"
    zeros = f"torch.zeros({shape_text(c.out_shape)}, dtype={rows}.dtype)"
    return f"{zeros}.index_put_(({mask},), {rows})"


def _full(c: Call) -> str:
    op: Any = c.op
    dtype = {"f32": "float32", "f64": "float64", "i64": "int64"}[str(op.dtype)]
    # A constant with as many rows as data leaves is one row, which broadcasts.
    rows = tuple(d if isinstance(d, int) else 1 for d in op.shape)
    return f"torch.full({shape_text(rows)}, {op.value!r}, dtype=torch.{dtype})"


def _cast(c: Call) -> str:
    op: Any = c.op
    names = {"f32": "float32", "f64": "float64", "i64": "int64", "bool": "bool"}
    return f"{c.args[0]}.to(torch.{names[str(op.dtype)]})"


def _slice(c: Call) -> str:
    op: Any = c.op
    step = "" if op.step == 1 else f":{op.step}"
    return f"{c.args[0]}[{':, ' * op.axis}{op.start}:{op.stop}{step}]"


def _top_k(c: Call) -> str:
    op: Any = c.op
    x = c.args[0]
    largest = f"{x}.topk({op.k}, {op.axis}).indices"
    return f"torch.zeros_like({x}).scatter_({op.axis}, {largest}, 1.0)"


RELATIONS = {
    "less": "<", "less_equal": "<=", "greater": ">",
    "greater_equal": ">=", "equal": "==", "not_equal": "!=",
}  # fmt: skip


def _compare(c: Call) -> str:
    op: Any = c.op
    return f"{c.args[0]} {RELATIONS[op.relation]} {c.args[1]}"


def _mean(c: Call) -> str:
    return f"({' + '.join(c.args)}) / {len(c.args)}"


TABLE: Table = {
    "conv": _conv,
    "dense": lambda c: f"F.linear({c.args[0]}, {c.args[1]}, {c.arg(2)})",
    "relu": lambda c: f"F.relu({c.args[0]})",
    "sigmoid": lambda c: f"torch.sigmoid({c.args[0]})",
    "tanh": lambda c: f"torch.tanh({c.args[0]})",
    "softmax": lambda c: f"F.softmax({c.args[0]}, {c.op.axis})",  # type: ignore[attr-defined]
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "batch_norm": _batch_norm,
    "batch_norm_inference": _batch_norm_inference,
    "lrn": _lrn,
    "dropout": lambda c: f"F.dropout({c.args[0]}, {c.op.ratio})",  # type: ignore[attr-defined]
    "reshape": lambda c: f"{c.args[0]}.reshape({shape_text(c.out_shape)})",
    "concat": lambda c: f"torch.cat(({', '.join(c.args)},), {c.op.axis})",  # type: ignore[attr-defined]
    "slice": _slice,
    "sum": lambda c: " + ".join(c.args),
    "mean": _mean,
    "reduce_mean": _reduce("mean"),
    "reduce_sum": _reduce("sum"),
    "add": lambda c: " + ".join(c.args),
    "subtract": lambda c: " - ".join(c.args),
    "multiply": lambda c: " * ".join(c.args),
    "divide": lambda c: " / ".join(c.args),
    "negate": lambda c: f"-{c.args[0]}",
    "log": lambda c: f"torch.log({c.args[0]})",
    "compare": _compare,
    "where": lambda c: f"torch.where({', '.join(c.args)})",
    "logical_not": lambda c: f"~{c.args[0]}",
    "full": _full,
    "cast": _cast,
    # A gate of 0 selects 0; for finite numbers that is the product.
    "select": lambda c: " * ".join(c.args),
    "straight_through": lambda c: f"{c.args[1]} + ({c.args[0]} - {c.args[1]}).detach()",
    "top_k": _top_k,
    "noise": lambda c: f"torch.rand({shape_text(c.out_shape)})",
    "mean_cross_entropy": lambda c: f"F.cross_entropy({c.args[0]}, {c.args[1]})",
    "exit_score": _exit_score,
    "compact": _compact,
    "scatter": _scatter,
}
