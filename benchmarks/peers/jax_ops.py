"""JAX's words: `jax.numpy` and `lax`, one jitted function of the parameters.

Batch norm is written out; its running statistics are returned (`forward` puts the new ones into `s`
at their positions), since JAX's arrays do not change. `key` is new in every step.
"""

from __future__ import annotations

from typing import Any

from peers.geometry import Pool, shape_text
from peers.torch_ops import RELATIONS
from peers.walker import Call, NotExpressible, Statement, Table, static_only

PEER = "jax"
HEADER = """import jax
import jax.numpy as jnp
from jax import lax, nn, random


def batch_norm(x, gamma, beta, mean, var, eps):
    column = (1, -1) + (1,) * (x.ndim - 2)
    scale = gamma * lax.rsqrt(var + eps)
    return x * scale.reshape(column) + (beta - mean * scale).reshape(column)


def batch_norm_training(x, gamma, beta, running_mean, running_var, decay, eps):
    axes = (0,) + tuple(range(2, x.ndim))
    mean, var = jnp.mean(x, axes), jnp.var(x, axes)
    m = x.size // mean.size
    unbiased = var * (m / max(m - 1, 1))
    y = batch_norm(x, gamma, beta, mean, var, eps)
    new_mean = decay * running_mean + (1 - decay) * lax.stop_gradient(mean)
    return y, new_mean, decay * running_var + (1 - decay) * lax.stop_gradient(unbiased)


def lrn(x, size, alpha, beta, k):
    half = size // 2
    window, ones = (1, size, 1, 1), (1, 1, 1, 1)
    total = lax.reduce_window(
        x * x, 0.0, lax.add, window, ones, ((0, 0), (half, half), (0, 0), (0, 0))
    )
    return x * (k + alpha * total) ** -beta


def top_k(x, k, axis):
    order = jnp.argsort(-x, axis=axis, stable=True)
    rank = jnp.argsort(order, axis=axis, stable=True)
    return (rank < k).astype(x.dtype)


def dropout(x, ratio, key):
    kept = random.bernoulli(key, 1 - ratio, x.shape)
    return jnp.where(kept, x / (1 - ratio), 0.0)


def cross_entropy(logits, labels):
    picked = jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], axis=1)
    return -jnp.mean(picked)"""


def _conv(c: Call) -> str:
    op: Any = c.op
    pads = tuple(zip(op.pad[: op.axes], op.pad[op.axes :]))
    text = f"lax.conv_general_dilated({c.args[0]}, {c.args[1]}, {tuple(op.stride)}, {pads}"
    if any(d > 1 for d in op.dilation):
        text += f", rhs_dilation={tuple(op.dilation)}"
    if op.groups > 1:
        text += f", feature_group_count={op.groups}"
    text += ")"
    if c.has(2):
        text += f" + {c.args[2]}.reshape({shape_text((-1, *(1,) * op.axes))})"
    return text


def _dense(c: Call) -> str:
    return f"{c.args[0]} @ {c.args[1]}.T" + (f" + {c.args[2]}" if c.has(2) else "")


def _window(c: Call, start: str, function: str) -> str:
    pool = Pool.of(c)
    pads = ((0, 0), (0, 0), *zip(pool.begin, pool.end))
    window, stride = (1, 1, *pool.kernel), (1, 1, *pool.stride)
    return f"lax.reduce_window({c.args[0]}, {start}, {function}, {window}, {stride}, {pads})"


def _average_pool(c: Call) -> str:
    op: Any = c.op
    pool = Pool.of(c)
    if op.divisor != "kernel" and pool.padded:
        raise NotExpressible(f"not expressible in {PEER}: average_pool with divisor {op.divisor}")
    count = 1
    for k in op.kernel:
        count *= k
    return f"{_window(c, '0.0', 'lax.add')} / {count}"


def _batch_norm(c: Call) -> Statement:
    op: Any = c.op
    mean, var = (f"s[{i}]" for i in c.positions[3:5])
    operands = ", ".join(c.args)
    call = f"batch_norm_training({operands}, {op.decay}, {op.eps})"
    return Statement(f"{c.targets[0]}, {mean}, {var} = {call}")


def _batch_norm_inference(c: Call) -> str:
    op: Any = c.op
    return f"batch_norm({', '.join(c.args)}, {op.eps})"


def _reduce(name: str):  # type: ignore[no-untyped-def]
    def write(c: Call) -> str:
        op: Any = c.op
        return f"jnp.{name}({c.args[0]}, {tuple(op.axes)}, keepdims={op.keepdims})"

    return write


def _lrn(c: Call) -> str:
    op: Any = c.op
    return f"lrn({c.args[0]}, {op.size // 2 * 2 + 1}, {op.alpha}, {op.beta}, {op.k})"


def _slice(c: Call) -> str:
    op: Any = c.op
    step = "" if op.step == 1 else f":{op.step}"
    return f"{c.args[0]}[{':, ' * op.axis}{op.start}:{op.stop}{step}]"


def _compare(c: Call) -> str:
    op: Any = c.op
    return f"{c.args[0]} {RELATIONS[op.relation]} {c.args[1]}"


def _top_k(c: Call) -> str:
    op: Any = c.op
    return f"top_k({c.args[0]}, {op.k}, {op.axis})"


def _key(c: Call) -> str:
    op: Any = c.op
    return f"random.fold_in(key, {op.stream})"


def _dropout(c: Call) -> str:
    op: Any = c.op
    return f"dropout({c.args[0]}, {op.ratio}, {_key(c)})"


def _full(c: Call) -> str:
    op: Any = c.op
    dtype = {"f32": "float32", "f64": "float32", "i64": "int32"}[str(op.dtype)]
    return f"jnp.full({shape_text(op.shape)}, {op.value!r}, jnp.{dtype})"


TABLE: Table = {
    "conv": _conv,
    "dense": _dense,
    "relu": lambda c: f"nn.relu({c.args[0]})",
    "sigmoid": lambda c: f"nn.sigmoid({c.args[0]})",
    "tanh": lambda c: f"jnp.tanh({c.args[0]})",
    "softmax": lambda c: f"nn.softmax({c.args[0]}, {c.op.axis})",  # type: ignore[attr-defined]
    "max_pool": lambda c: _window(c, "-jnp.inf", "lax.max"),
    "average_pool": _average_pool,
    "batch_norm": _batch_norm,
    "batch_norm_inference": _batch_norm_inference,
    "lrn": _lrn,
    "dropout": _dropout,
    "noise": lambda c: f"random.uniform({_key(c)}, {shape_text(c.out_shape)})",
    "reshape": lambda c: f"{c.args[0]}.reshape({shape_text(c.out_shape)})",
    "concat": lambda c: f"jnp.concatenate(({', '.join(c.args)},), {c.op.axis})",  # type: ignore[attr-defined]
    "slice": _slice,
    "sum": lambda c: " + ".join(c.args),
    "mean": lambda c: f"({' + '.join(c.args)}) / {len(c.args)}",
    "reduce_mean": _reduce("mean"),
    "reduce_sum": _reduce("sum"),
    "add": lambda c: " + ".join(c.args),
    "subtract": lambda c: " - ".join(c.args),
    "multiply": lambda c: " * ".join(c.args),
    "divide": lambda c: " / ".join(c.args),
    "negate": lambda c: f"-{c.args[0]}",
    "log": lambda c: f"jnp.log({c.args[0]})",
    "compare": _compare,
    "where": lambda c: f"jnp.where({', '.join(c.args)})",
    "full": _full,
    "select": lambda c: " * ".join(c.args),
    "straight_through": lambda c: f"{c.args[1]} + lax.stop_gradient({c.args[0]} - {c.args[1]})",
    "top_k": _top_k,
    "exit_score": static_only(PEER),
    "mean_cross_entropy": lambda c: f"cross_entropy({c.args[0]}, {c.args[1]})",
}
