"""What every op means, written once more as slowly and plainly as possible.

Each reference takes the op and its inputs and returns the outputs, from Python loops over indices
and the formulas of the op's docstring; nothing here calls `Op.evaluate`.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Outputs = tuple[np.ndarray, ...]
Reference = Callable[..., Outputs]

REFERENCES: dict[str, Reference] = {}


def reference(*opcodes: str) -> Callable[[Reference], Reference]:
    """Register a function as the meaning of `opcodes`."""

    def register(function: Reference) -> Reference:
        REFERENCES.update(dict.fromkeys(opcodes, function))
        return function

    return register


def elementwise(opcode: str, function: Callable[..., Any]) -> None:
    """Register an op that applies `function(op, *scalars)` to broadcast operands."""

    def evaluate(op: Any, *inputs: np.ndarray) -> Outputs:
        spread = np.broadcast_arrays(*inputs)
        values = [function(op, *(s.item() for s in at)) for at in zip(*(x.flat for x in spread))]
        return (np.array(values).reshape(spread[0].shape),)

    REFERENCES[opcode] = evaluate


RELATIONS = {
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "equal": operator.eq,
    "not_equal": operator.ne,
}

SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda op, a, b: a + b,
    "subtract": lambda op, a, b: a - b,
    "multiply": lambda op, a, b: a * b,
    "divide": lambda op, a, b: a / b,
    "negate": lambda op, x: -x,
    "exp": lambda op, x: math.exp(x),
    "log": lambda op, x: math.log(x),
    "sqrt": lambda op, x: math.sqrt(x),
    "absolute": lambda op, x: x if x >= 0 else -x,
    "relu": lambda op, x: x if x > 0 else 0.0,
    "relu_gradient": lambda op, y, dy: dy if y > 0 else 0.0,
    "clip": lambda op, x: sorted((op.low, x, op.high))[1],
    "leaky_relu": lambda op, x: x if x > 0 else op.slope * x,
    "elu": lambda op, x: x if x > 0 else op.alpha * (math.exp(x) - 1.0),
    "sigmoid": lambda op, x: 1.0 / (1.0 + math.exp(-x)),
    "tanh": lambda op, x: 1.0 - 2.0 / (math.exp(2.0 * x) + 1.0),
    "compare": lambda op, a, b: RELATIONS[op.relation](a, b),
    "logical_not": lambda op, a: not a,
    "logical_and": lambda op, a, b: a and b,
    "where": lambda op, condition, a, b: a if condition else b,
    "cast": lambda op, x: op.dtype.numpy.type(x),
    "select": lambda op, value, gate: value * gate if gate != 0 else 0.0,
    "straight_through": lambda op, value, surrogate: value,
    "scale_gradient": lambda op, x, scale: x,
    "sum": lambda op, *xs: sum(xs),
    "mean": lambda op, *xs: sum(xs) / len(xs),
    "product": lambda op, *xs: math.prod(xs),
    "maximum": lambda op, *xs: max(xs),
}
ROUNDINGS = {"floor": math.floor, "ceil": math.ceil, "truncate": math.trunc}


def erf(x: float) -> float:
    """The error function by its Taylor series, for small x."""
    terms = ((-1) ** n * x ** (2 * n + 1) / (math.factorial(n) * (2 * n + 1)) for n in range(40))
    return 2 / math.sqrt(math.pi) * math.fsum(terms)


SCALAR_FUNCTIONS |= {
    "power": lambda op, a, b: math.exp(b * math.log(a)),
    "arctan2": lambda op, a, b: math.atan2(a, b),
    "remainder": lambda op, a, b: a - b * math.trunc(a / b),
    "floor_divide": lambda op, a, b: math.floor(a / b),
    "sin": lambda op, x: math.sin(x),
    "cos": lambda op, x: math.cos(x),
    "tan": lambda op, x: math.sin(x) / math.cos(x),
    "arcsin": lambda op, x: math.asin(x),
    "arccos": lambda op, x: math.acos(x),
    "arctan": lambda op, x: math.atan(x),
    "sinh": lambda op, x: (math.exp(x) - math.exp(-x)) / 2,
    "cosh": lambda op, x: (math.exp(x) + math.exp(-x)) / 2,
    "arctanh": lambda op, x: math.log((1 + x) / (1 - x)) / 2,
    "expm1": lambda op, x: math.exp(x) - 1,
    "log1p": lambda op, x: math.log(1 + x),
    "erf": lambda op, x: erf(x),
    "round": lambda op, x: ROUNDINGS[op.mode](x),
    "sign": lambda op, x: (x > 0) - (x < 0),
}
for _opcode, _function in SCALAR_FUNCTIONS.items():
    elementwise(_opcode, _function)


def numbers(shape: Any) -> tuple[int, ...]:
    """A bound shape as ints."""
    return tuple(int(str(d)) for d in shape)


# -- data movement -------------------------------------------------------------------------------


@reference("reshape")
def _reshape(op: Any, x: np.ndarray) -> Outputs:
    y = np.empty(numbers(op.shape), x.dtype)
    for target, value in zip(np.ndindex(y.shape), x.flat):
        y[target] = value
    return (y,)


@reference("transpose")
def _transpose(op: Any, x: np.ndarray) -> Outputs:
    y = np.empty([x.shape[a] for a in op.axes], x.dtype)
    for index in np.ndindex(x.shape):
        y[tuple(index[a] for a in op.axes)] = x[index]
    return (y,)


@reference("slice")
def _slice(op: Any, x: np.ndarray) -> Outputs:
    positions = [op.start + op.step * i for i in range(op.size)]
    return (np.take(x, np.array(positions, int), axis=op.axis),)


@reference("embed")
def _embed(op: Any, x: np.ndarray) -> Outputs:
    zeros = np.zeros_like(np.take(x, [0], axis=op.axis))
    parts = [zeros] * op.size
    for i in range(x.shape[op.axis]):
        parts[op.start + op.step * i] = np.take(x, [i], axis=op.axis)
    return (np.concatenate(parts, axis=op.axis),)


@reference("split")
def _split(op: Any, x: np.ndarray) -> Outputs:
    ends = list(itertools.accumulate(op.sizes))
    return tuple(np.take(x, range(e - s, e), axis=op.axis) for e, s in zip(ends, op.sizes))


@reference("concat")
def _concat(op: Any, *xs: np.ndarray) -> Outputs:
    slices = [s for x in xs for s in np.moveaxis(x, op.axis, 0)]
    return (np.stack(slices, axis=op.axis),)


@reference("pad")
def _pad(op: Any, x: np.ndarray) -> Outputs:
    sizes = [b + d + e for b, d, e in zip(op.begin, x.shape, op.end)]
    y = np.full(sizes, op.value)
    for index in np.ndindex(x.shape):
        y[tuple(i + b for i, b in zip(index, op.begin))] = x[index]
    return (y,)


@reference("broadcast_to")
def _broadcast_to(op: Any, x: np.ndarray) -> Outputs:
    y = np.empty(numbers(op.shape), x.dtype)
    for index in np.ndindex(y.shape):
        own = index[y.ndim - x.ndim :]
        y[index] = x[tuple(i if d > 1 else 0 for i, d in zip(own, x.shape))]
    return (y,)


def _reduction(opcode: str, fold: Callable[[list[float]], float]) -> None:
    def evaluate(op: Any, x: np.ndarray) -> Outputs:
        kept = [1 if a in op.axes else d for a, d in enumerate(x.shape)]
        y = np.empty(kept)
        for index in np.ndindex(y.shape):
            region = tuple(slice(None) if a in op.axes else i for a, i in enumerate(index))
            y[index] = fold([float(v) for v in np.ravel(x[region])])
        shape = [d for a, d in enumerate(kept) if op.keepdims or a not in op.axes]
        return (y.reshape(shape),)

    REFERENCES[opcode] = evaluate


_reduction("reduce_sum", math.fsum)
_reduction("reduce_mean", lambda values: math.fsum(values) / len(values))
_reduction("reduce_max", max)


def along(function: Callable[[list[float]], Any], axis: int, x: np.ndarray) -> np.ndarray:
    """`function` of every line of `x` along `axis`."""
    return np.apply_along_axis(lambda line: np.array(function(line.tolist())), axis, x)


@reference("arg_max")
def _arg_max(op: Any, x: np.ndarray) -> Outputs:
    return (along(lambda line: line.index(max(line)), op.axis, x),)


@reference("top_k")
def _top_k(op: Any, x: np.ndarray) -> Outputs:
    def largest(line: list[float]) -> list[float]:
        chosen = sorted(range(len(line)), key=lambda i: (-line[i], i))[: op.k]
        return [float(i in chosen) for i in range(len(line))]

    return (along(largest, op.axis, x),)


def _running(opcode: str, fold: Callable[[float, float], float]) -> None:
    def evaluate(op: Any, x: np.ndarray) -> Outputs:
        step = -1 if op.reverse else 1
        line = lambda values: list(itertools.accumulate(values[::step], fold))[::step]  # noqa: E731
        return (along(line, op.axis, x),)

    REFERENCES[opcode] = evaluate


_running("running_sum", operator.add)
_running("running_product", operator.mul)


@reference("recurrence")
def _recurrence(op: Any, a: np.ndarray, b: np.ndarray) -> Outputs:
    y = np.zeros(b.shape)
    step = -1 if op.reverse else 1
    for at in sorted(np.ndindex(b.shape), key=lambda at: step * at[op.axis]):
        i = at[op.axis] - step
        before = (*at[: op.axis], i, *at[op.axis + 1 :])
        y[at] = a[at] * (y[before] if 0 <= i < b.shape[op.axis] else 0.0) + b[at]
    return (y,)


@reference("gather")
def _gather(op: Any, x: np.ndarray, index: np.ndarray) -> Outputs:
    n = op.axis
    y = np.empty((*x.shape[:n], *index.shape, *x.shape[n + 1 :]))
    for at in np.ndindex(y.shape):
        position = int(index[at[n : n + index.ndim]])
        y[at] = x[(*at[:n], position, *at[n + index.ndim :])]
    return (y,)


@reference("scatter_add")
def _scatter_add(op: Any, updates: np.ndarray, index: np.ndarray) -> Outputs:
    n = op.axis
    y = np.zeros((*updates.shape[:n], *numbers([op.size]), *updates.shape[n + index.ndim :]))
    for at in np.ndindex(updates.shape):
        position = int(index[at[n : n + index.ndim]])
        y[(*at[:n], position, *at[n + index.ndim :])] += updates[at]
    return (y,)


@reference("flip")
def _flip(op: Any, x: np.ndarray) -> Outputs:
    return (along(lambda line: line[::-1], op.axis, x),)


def softmax(line: list[float]) -> list[float]:
    """e^x / sum e^x in the plain form."""
    e = [math.exp(v) for v in line]
    return [v / math.fsum(e) for v in e]


@reference("softmax")
def _softmax(op: Any, x: np.ndarray) -> Outputs:
    return (along(softmax, op.axis, x),)


@reference("log_softmax")
def _log_softmax(op: Any, x: np.ndarray) -> Outputs:
    return (along(lambda line: [math.log(p) for p in softmax(line)], op.axis, x),)


@reference("full")
def _full(op: Any) -> Outputs:
    return (np.array([op.value] * math.prod(numbers(op.shape))).reshape(numbers(op.shape)),)


@reference("extent")
def _extent(op: Any) -> Outputs:
    return (np.array(int(str(op.dim))),)


# -- convolution and products --------------------------------------------------------------------

Index = tuple[int, ...]


def _taps(op: Any, x: Index, weight: Index, out: Index) -> Iterator[tuple[Index, Index, Index]]:
    """(y index, weight index, x index) of every product that a convolution adds."""
    per_group = weight[0] // op.groups
    for n, o, c in itertools.product(range(x[0]), range(weight[0]), range(weight[1])):
        channel = o // per_group * weight[1] + c
        for h in np.ndindex(*out):
            for i in np.ndindex(*weight[2:]):
                at = tuple(
                    h[a] * op.stride[a] + i[a] * op.dilation[a] - op.pad[a] for a in range(len(h))
                )
                if all(0 <= p < s for p, s in zip(at, x[2:])):
                    yield (n, o, *h), (o, c, *i), (n, channel, *at)


def _out_size(op: Any, size: Index, kernel: Index) -> Index:
    n = len(kernel)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, op.dilation)]
    padded = [s + op.pad[a] + op.pad[n + a] for a, s in enumerate(size)]
    return tuple((p - r) // s + 1 for p, r, s in zip(padded, reach, op.stride))


@reference("conv")
def _conv(op: Any, x: np.ndarray, weight: np.ndarray, *bias: np.ndarray) -> Outputs:
    out = _out_size(op, x.shape[2:], weight.shape[2:])
    y = np.zeros((len(x), len(weight), *out))
    for b in bias:
        y += b.reshape(-1, *(1,) * len(out))
    for target, w, source in _taps(op, x.shape, weight.shape, out):
        y[target] += weight[w] * x[source]
    return (y,)


@reference("conv_transpose")
def _conv_transpose(op: Any, dy: np.ndarray, weight: np.ndarray) -> Outputs:
    dx = np.zeros((len(dy), weight.shape[1] * op.groups, *numbers(op.size)))
    for source, w, target in _taps(op, dx.shape, weight.shape, dy.shape[2:]):
        dx[target] += weight[w] * dy[source]
    return (dx,)


@reference("conv_weight_gradient")
def _conv_weight_gradient(op: Any, x: np.ndarray, dy: np.ndarray) -> Outputs:
    dw = np.zeros((dy.shape[1], x.shape[1] // op.groups, *numbers(op.kernel)))
    for output, w, source in _taps(op, x.shape, dw.shape, dy.shape[2:]):
        dw[w] += dy[output] * x[source]
    return (dw,)


def _by_sample(opcode: str, *operands: str) -> None:
    """`sample_<opcode>`: `opcode` for every sample by itself."""

    def evaluate(op: Any, *inputs: np.ndarray) -> Outputs:
        results = []
        for sample in zip(*inputs):
            alone = (v if name == "kernel" else v[None] for name, v in zip(operands, sample))
            (y,) = REFERENCES[opcode](op, *alone)
            results.append(y if opcode == "conv_weight_gradient" else y[0])
        return (np.stack(results),)

    REFERENCES[f"sample_{opcode}"] = evaluate


_by_sample("conv", "x", "kernel", "kernel")
_by_sample("conv_transpose", "x", "kernel")
_by_sample("conv_weight_gradient", "x", "x")


@reference("matmul")
def _matmul(op: Any, a: np.ndarray, b: np.ndarray) -> Outputs:
    left, right = ("km" if op.transpose_a else "mk"), ("nk" if op.transpose_b else "kn")
    return (np.einsum(f"...{left},...{right}->...mn", a, b),)


@reference("dense")
def _dense(op: Any, x: np.ndarray, weight: np.ndarray, *bias: np.ndarray) -> Outputs:
    return (np.einsum("nc,oc->no", x, weight) + sum(bias),)


# -- pooling -------------------------------------------------------------------------------------


def _windows(op: Any, size: Index) -> dict[Index, list[Index]]:
    """Every window and the positions of x in it, in row-major order."""
    n = len(size)
    counts = []
    for a, (h, k, s) in enumerate(zip(size, op.kernel, op.stride)):
        span = h + op.pad[a] + op.pad[n + a] - k
        counts.append((math.ceil(span / s) if op.cover_all else span // s) + 1)
    return {
        window: [
            at
            for tap in np.ndindex(*op.kernel)
            for at in [tuple(w * s - p + t for w, s, p, t in zip(window, op.stride, op.pad, tap))]
            if all(0 <= i < h for i, h in zip(at, size))
        ]
        for window in np.ndindex(*counts)
    }


def _pooled(op: Any, x: np.ndarray, pick: Callable[[np.ndarray, list[Index]], float]) -> Outputs:
    windows = _windows(op, x.shape[2:])
    counts = [i + 1 for i in max(windows)]
    y = np.empty((*x.shape[:2], *counts))
    for plane in np.ndindex(*x.shape[:2]):
        for window, positions in windows.items():
            y[plane + window] = pick(x[plane], positions)
    return (y,)


def _best(plane: np.ndarray, positions: list[Index]) -> Index:
    return max(positions, key=lambda at: float(plane[at]))


@reference("max_pool")
def _max_pool(op: Any, x: np.ndarray) -> Outputs:
    return _pooled(op, x, lambda plane, positions: plane[_best(plane, positions)])


@reference("max_pool_index")
def _max_pool_index(op: Any, x: np.ndarray) -> Outputs:
    def flat(plane: np.ndarray, positions: list[Index]) -> float:
        return int(np.ravel_multi_index(_best(plane, positions), plane.shape))

    return _pooled(op, x, flat)


def _divisor(op: Any, size: Index, window: Index, positions: list[Index]) -> int:
    """What the sum of a window is divided by."""
    n = len(size)
    first = [w * s - p for w, s, p in zip(window, op.stride, op.pad)]
    padded = math.prod(
        sum(-op.pad[a] <= i < size[a] + op.pad[n + a] for i in range(b, b + op.kernel[a]))
        for a, b in enumerate(first)
    )
    by = {"kernel": math.prod(op.kernel), "padded": padded, "inside": len(positions), "one": 1}
    return max(by[op.divisor], 1)


@reference("average_pool")
def _average_pool(op: Any, x: np.ndarray) -> Outputs:
    (y,) = _pooled(op, x, lambda plane, positions: math.fsum(plane[at] for at in positions))
    for window, positions in _windows(op, x.shape[2:]).items():
        y[(..., *window)] /= _divisor(op, x.shape[2:], window, positions)
    return (y,)


@reference("average_pool_gradient")
def _average_pool_gradient(op: Any, dy: np.ndarray) -> Outputs:
    size = numbers(op.size)
    dx = np.zeros((*dy.shape[:2], *size))
    for window, positions in _windows(op, size).items():
        divisor = _divisor(op, size, window, positions)
        for plane, at in itertools.product(np.ndindex(*dy.shape[:2]), positions):
            dx[plane + at] += dy[plane + window] / divisor
    return (dx,)


@reference("scatter_pooled")
def _scatter_pooled(op: Any, dy: np.ndarray, index: np.ndarray) -> Outputs:
    dx = np.zeros((*dy.shape[:2], *numbers(op.size)))
    for at in np.ndindex(dy.shape):
        if index[at] >= 0:
            dx[at[:2] + tuple(np.unravel_index(index[at], numbers(op.size)))] += dy[at]
    return (dx,)


@reference("gather_pooled")
def _gather_pooled(op: Any, x: np.ndarray, index: np.ndarray) -> Outputs:
    y = np.zeros(index.shape)
    for at in np.ndindex(index.shape):
        if index[at] >= 0:
            y[at] = x[at[:2]].flat[index[at]]
    return (y,)


def _regions(op: Any, x: np.ndarray, regions: np.ndarray) -> Iterator[tuple[Index, list[Index]]]:
    """Every cell of every region and plane, and the places of x in it, in row-major order."""
    for r, (image, x0, y0, x1, y1) in enumerate(regions.tolist()):
        at = []
        for low, high, cells, size in zip((y0, x0), (y1, x1), op.cells, x.shape[2:]):
            u, v = round(low * op.scale), round(high * op.scale)
            extent = max(v - u + 1, 1)
            cut = [
                range(u + i * extent // cells, u + -(-(i + 1) * extent // cells))
                for i in range(cells)
            ]
            at.append([[p for p in c if 0 <= p < size] for c in cut])
        for i, j, c in np.ndindex(*op.cells, x.shape[1]):
            yield (r, c, i, j), [(int(image), c, h, w) for h in at[0][i] for w in at[1][j]]


@reference("roi_max_pool")
def _roi_max_pool(op: Any, x: np.ndarray, regions: np.ndarray) -> Outputs:
    y = np.zeros((len(regions), x.shape[1], *op.cells))
    for target, places in _regions(op, x, regions):
        y[target] = max((x[p] for p in places), default=0.0)
    return (y,)


@reference("roi_max_pool_index")
def _roi_max_pool_index(op: Any, x: np.ndarray, regions: np.ndarray) -> Outputs:
    index = np.full((len(regions), x.shape[1], *op.cells), -1)
    for target, places in _regions(op, x, regions):
        if places:
            index[target] = np.ravel_multi_index(max(places, key=lambda p: x[p]), x.shape)
    return (index,)


# -- normalisation -------------------------------------------------------------------------------


def by_channel(x: np.ndarray) -> list[np.ndarray]:
    """The elements of every channel (axis 1)."""
    return [x[:, c] for c in range(x.shape[1])]


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance of every channel."""
    means = [math.fsum(np.ravel(c)) / c.size for c in by_channel(x)]
    variances = [
        math.fsum((v - m) ** 2 for v in np.ravel(c)) / c.size for c, m in zip(by_channel(x), means)
    ]
    return np.array(means), np.array(variances)


@reference("batch_norm_inference")
def _batch_norm_inference(op: Any, x: np.ndarray, *vectors: np.ndarray) -> Outputs:
    channels = [
        gamma * (c - mean) / math.sqrt(var + op.eps) + beta
        for c, gamma, beta, mean, var in zip(by_channel(x), *vectors)
    ]
    return (np.stack(channels, axis=1),)


@reference("batch_norm_training")
def _batch_norm_training(op: Any, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> Outputs:
    mean, var = statistics(x)
    return (*_batch_norm_inference(op, x, gamma, beta, mean, var), mean, var)


@reference("batch_norm_gradient")
def _batch_norm_gradient(op: Any, x: np.ndarray, *rest: np.ndarray) -> Outputs:
    """The chain rule of Ioffe & Szegedy (2015), section 3, step by step."""
    *vectors, dy = rest
    dx, dgamma, dbeta = [], [], []
    for c, d, gamma, mean, var in zip(by_channel(x), by_channel(dy), *vectors):
        inverse = 1.0 / math.sqrt(var + op.eps)
        dxhat = d * gamma
        dvar = (dxhat * (c - mean)).sum() * -0.5 * inverse**3
        dmean = -dxhat.sum() * inverse - 2.0 * dvar * (c - mean).mean()
        dx.append(dxhat * inverse + dvar * 2.0 * (c - mean) / c.size + dmean / c.size)
        dgamma.append((d * (c - mean) * inverse).sum())
        dbeta.append(d.sum())
    return (np.stack(dx, axis=1), np.array(dgamma), np.array(dbeta))


def _neighbours(op: Any, x: np.ndarray) -> np.ndarray:
    """Sum over the channels within `size // 2` of each channel."""
    half, count = op.size // 2, x.shape[1]
    near = [range(max(c - half, 0), min(c + half + 1, count)) for c in range(count)]
    return np.stack([np.add.reduce([x[:, j] for j in js]) for js in near], axis=1)


@reference("lrn")
def _lrn(op: Any, x: np.ndarray) -> Outputs:
    return (x / (op.k + op.alpha * _neighbours(op, x**2)) ** op.beta,)


@reference("lrn_gradient")
def _lrn_gradient(op: Any, x: np.ndarray, dy: np.ndarray) -> Outputs:
    s = op.k + op.alpha * _neighbours(op, x**2)
    shared = _neighbours(op, dy * x * s ** (-op.beta - 1.0))
    return (dy * s**-op.beta - 2.0 * op.alpha * op.beta * x * shared,)


# -- losses, exits, rows, randomness -------------------------------------------------------------


@reference("one_hot")
def _one_hot(op: Any, labels: np.ndarray) -> Outputs:
    y = np.zeros((len(labels), op.classes, *labels.shape[1:]))
    for at in np.ndindex(labels.shape):
        if 0 <= labels[at] < op.classes:
            y[at[:1] + (int(labels[at]),) + at[1:]] = 1
    return (y,)


@reference("cross_entropy")
def _cross_entropy(op: Any, logits: np.ndarray, labels: np.ndarray) -> Outputs:
    loss = np.zeros(labels.shape)
    for at in np.ndindex(labels.shape):
        if labels[at] != op.ignore_label:
            line = np.moveaxis(logits, 1, -1)[at].tolist()
            loss[at] = -math.log(softmax(line)[labels[at]])
    return (loss,)


def exit_score(criterion: str, logits: np.ndarray) -> np.ndarray:
    """The score of every row, as the docstring of `ir.ops.exit` defines it."""

    def score(line: list[float]) -> float:
        p = sorted(softmax(line), reverse=True)
        entropy = -math.fsum(v * math.log(v) for v in p if v > 0)
        return {
            "entropy": entropy,
            "normalised_entropy": entropy / math.log(len(p)) if len(p) > 1 else 0.0,
            "confidence": p[0],
            "margin": p[0] - p[1] if len(p) > 1 else p[0],
        }[criterion]

    return np.array([score(line) for line in logits.tolist()])


@reference("exit_score")
def _exit_score(op: Any, logits: np.ndarray) -> Outputs:
    return (exit_score(op.criterion, logits),)


@reference("compact")
def _compact(op: Any, mask: np.ndarray, *values: np.ndarray) -> Outputs:
    return tuple(
        np.array([row for row, kept in zip(v, mask) if kept]).reshape(-1, *v.shape[1:])
        for v in values
    )


@reference("scatter")
def _scatter(op: Any, mask: np.ndarray, rows: np.ndarray, *base: np.ndarray) -> Outputs:
    waiting = iter(rows)
    rest = base[0] if base else np.zeros((len(mask), *rows.shape[1:]))
    return (np.stack([next(waiting) if kept else row for kept, row in zip(mask, rest)]),)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in Python integers (Salmon et al., SC 2011)."""
    low, (k0, k1) = 0xFFFFFFFF, key
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32) ^ counter[1] ^ k0, second & low,
            (first >> 32) ^ counter[3] ^ k1, first & low,
        ]  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return counter


@reference("random_uniform")
def _random_uniform(op: Any, key: np.ndarray, step: np.ndarray, *rows: np.ndarray) -> Outputs:
    shape = numbers(op.shape)
    count, elements = shape[0] if shape else 1, math.prod(shape[1:])
    named = rows[0].tolist() if rows else range(count)
    drawn = []
    for row, element in itertools.product(named, range(elements)):
        counter = [element // 4, row, int(step) % 2**32, op.stream]
        word = philox(counter, [int(k) for k in key])[element % 4]
        drawn.append((word >> 8) / 2**24)
    return (np.array(drawn).reshape(shape),)


# -- look-ups, resampling, soft targets ----------------------------------------------------------

elementwise("softplus", lambda op, x: math.log(1.0 + math.exp(op.beta * x)) / op.beta)
elementwise("clipped_relu", lambda op, x: sorted((0.0, x, op.ceiling))[1])
elementwise("floored_sqrt", lambda op, x: math.sqrt(x))


@reference("soft_cross_entropy")
def _soft_cross_entropy(op: Any, logits: np.ndarray, targets: np.ndarray) -> Outputs:
    loss = np.zeros((len(logits), *logits.shape[2:]))
    for at in np.ndindex(loss.shape):
        line, weights = (np.moveaxis(v, 1, -1)[at].tolist() for v in (logits, targets))
        loss[at] = -math.fsum(w * math.log(p) for w, p in zip(weights, softmax(line)))
    return (loss,)


@reference("softmax_output")
def _softmax_output(op: Any, x: np.ndarray, labels: np.ndarray) -> Outputs:
    if op.multi_output:
        lines = np.moveaxis(x, 1, -1)
    elif op.preserve_shape:
        lines = x
    else:
        lines = x.reshape(len(x), -1)
    y = np.zeros(lines.shape)
    for at in np.ndindex(lines.shape[:-1]):
        y[at] = softmax(lines[at].tolist())
    return ((np.moveaxis(y, -1, 1) if op.multi_output else y).reshape(x.shape),)


@reference("regression_output")
def _regression_output(op: Any, x: np.ndarray, labels: np.ndarray) -> Outputs:
    sigmoid = [1 / (1 + math.exp(-v)) for v in x.flat]
    return (np.array(sigmoid).reshape(x.shape) if op.kind == "logistic" else x,)


@reference("make_loss")
def _make_loss(op: Any, x: np.ndarray) -> Outputs:
    return (x,)


@reference("embedding")
def _embedding(op: Any, ids: np.ndarray, weight: np.ndarray) -> Outputs:
    y = np.zeros((*ids.shape, weight.shape[1]))
    for at in np.ndindex(ids.shape):
        if ids[at] != op.ignore_label:
            y[at] = weight[ids[at]]
    return (y,)


@reference("embedding_gradient")
def _embedding_gradient(op: Any, ids: np.ndarray, dy: np.ndarray) -> Outputs:
    dweight = np.zeros((op.rows, dy.shape[-1]))
    for at in np.ndindex(ids.shape):
        if ids[at] != op.ignore_label:
            dweight[ids[at]] += dy[at]
    return (dweight,)


def _resampling(op: Any, source: int, target: int) -> Iterator[tuple[int, int, float]]:
    """Which place of the target reads which place of the source, and how much of it."""
    for i in range(target):
        if op.mode == "nearest":
            yield i, min(i * source // target, source - 1), 1.0
            continue
        centred = max((i + 0.5) * source / target - 0.5, 0.0)
        v = i * (source - 1) / (target - 1) if op.align_corners else centred
        low = math.floor(v + 1e-12)
        yield i, low, 1.0 - (v - low)
        yield i, min(low + 1, source - 1), v - low


@reference("resize")
def _resize(op: Any, x: np.ndarray) -> Outputs:
    y = np.zeros((*x.shape[:2], *numbers(op.size)))
    for i, h, a in _resampling(op, x.shape[2], y.shape[2]):
        for j, w, b in _resampling(op, x.shape[3], y.shape[3]):
            y[:, :, i, j] += a * b * x[:, :, h, w]
    return (y,)


@reference("resize_gradient")
def _resize_gradient(op: Any, dy: np.ndarray) -> Outputs:
    dx = np.zeros((*dy.shape[:2], *numbers(op.size)))
    for i, h, a in _resampling(op, dx.shape[2], dy.shape[2]):
        for j, w, b in _resampling(op, dx.shape[3], dy.shape[3]):
            dx[:, :, h, w] += a * b * dy[:, :, i, j]
    return (dx,)


def _tents(position: float, size: int) -> Iterator[tuple[int, float, float]]:
    """The cells within 1 of a position: their index, weight, and slope of the weight."""
    for cell in range(size):
        distance = position - cell
        if abs(distance) < 1:
            yield cell, 1 - abs(distance), -1.0 if distance >= 0 else 1.0


@reference("grid_sample")
def _grid_sample(op: Any, x: np.ndarray, grid: np.ndarray) -> Outputs:
    height, width = x.shape[2:]
    y = np.zeros((*x.shape[:2], *grid.shape[2:]))
    for n, i, j in np.ndindex(len(x), *grid.shape[2:]):
        u, v = ((g + 1) * (s - 1) / 2 for g, s in zip(grid[n, :, i, j], (width, height)))
        for h, a, _ in _tents(v, height):
            for w, b, _ in _tents(u, width):
                y[n, :, i, j] += a * b * x[n, :, h, w]
    return (y,)


@reference("grid_sample_gradient")
def _grid_sample_gradient(op: Any, x: np.ndarray, grid: np.ndarray, dy: np.ndarray) -> Outputs:
    height, width = x.shape[2:]
    dx, dgrid = np.zeros(x.shape), np.zeros(grid.shape)
    for n, i, j in np.ndindex(len(x), *grid.shape[2:]):
        u, v = ((g + 1) * (s - 1) / 2 for g, s in zip(grid[n, :, i, j], (width, height)))
        for h, a, rise in _tents(v, height):
            for w, b, run in _tents(u, width):
                dx[n, :, h, w] += a * b * dy[n, :, i, j]
                along = float((x[n, :, h, w] * dy[n, :, i, j]).sum())
                dgrid[n, 0, i, j] += along * a * run * (width - 1) / 2
                dgrid[n, 1, i, j] += along * b * rise * (height - 1) / 2
    return (dx, dgrid)


def _cells(op: Any, window: Index) -> list[Index]:
    """The places that a window reads, in row-major order; some may lie outside."""
    starts = [o * s - p for o, s, p in zip(window, op.stride, op.pad)]
    return [
        tuple(b + i for b, i in zip(starts, tap))
        for tap in itertools.product(*map(range, op.kernel))
    ]


@reference("window_to_plane")
def _window_to_plane(op: Any, index: np.ndarray) -> Outputs:
    size = numbers(op.size)
    flat = np.full(index.shape, -1)
    for at in np.ndindex(index.shape):
        place = _cells(op, at[2:])[index[at]]
        if all(0 <= i < d for i, d in zip(place, size)):
            flat[at] = np.ravel_multi_index(place, size)
    return (flat,)


@reference("plane_to_window")
def _plane_to_window(op: Any, index: np.ndarray) -> Outputs:
    local = np.zeros(index.shape, int)
    for at in np.ndindex(index.shape):
        if index[at] >= 0:
            place = tuple(int(i) for i in np.unravel_index(index[at], numbers(op.size)))
            local[at] = _cells(op, at[2:]).index(place)
    return (local,)
