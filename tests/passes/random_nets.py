"""Random multi-branch networks from a seed, made of motifs, so that every pass finds work in them.

A motif takes a value [N, 4, S, S] and returns another value. A network is a stem, a few motifs of
its theme and a classifier; a motif whose result has the shape of its operand goes on, others become
outputs. With a network come the passes that its motifs are meant for (see `random_flaws` for those
that are meant to be refused).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from branchgraph.ir import gates
from branchgraph.ir.builder import (
    average_pool,
    batch_norm,
    by_mode,
    concat,
    conv,
    dense,
    dropout,
    flatten,
    gate,
    global_average_pool,
    max_pool,
    merge_maximum,
    merge_mean,
    merge_product,
    merge_sum,
    relu,
    reshape,
    sigmoid,
    tanh,
    weighted_sum,
)
from branchgraph.ir.functions import clip, pad, sample_conv, scale_channels
from branchgraph.ir.graph import Graph, Value, branch
from branchgraph.ir.ops.elementwise import cast
from branchgraph.ir.state import Role, State
from branchgraph.ir.types import DType
from branchgraph.nets.reparameterised import acnet, dbb, repvgg_unit
from branchgraph.passes.base import Pass
from branchgraph.passes.constant_arrays import write

T = TypeVar("T")
CHANNELS = 4
CLASSES = 3


class Dice:
    """Random choices."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = np.random.default_rng([seed, 2026])

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self.rng.integers(len(choices)))]

    def some(self, choices: Sequence[T], least: int, most: int) -> list[T]:
        return [self.pick(choices) for _ in range(int(self.rng.integers(least, most + 1)))]

    def shuffled(self, *items: T) -> list[T]:
        return [items[i] for i in self.rng.permutation(len(items))]

    def number(self, least: int, most: int) -> int:
        return int(self.rng.integers(least, most + 1))

    def chance(self, p: float = 0.5) -> bool:
        return bool(self.rng.random() < p)

    def stratum(self, step: float) -> float:
        """A number in [0, 1) that neighbouring seeds spread evenly."""
        return (self.seed * step) % 1.0

    def turn(self, choices: Sequence[T], step: float) -> T:
        """A choice that takes turns over the seeds."""
        return choices[int(self.stratum(step) * len(choices))]


@dataclass
class Net:
    """A network, and passes that its motifs are meant for, with their options."""

    graph: Graph
    meant: list[Pass] = field(default_factory=list)
    #: Spellings of passes that suit the theme.
    suited: tuple[str, ...] = ()
    #: Whether all gates are finite, whatever the scores; `exact` speaks of no others.
    finite: bool = True


Motif = Callable[[Dice, Value], Value]


def image(d: Dice, name: str, batch: int | str = "N") -> Value:
    size = d.pick((5, 6, 7))
    return Graph(name).input("x", (batch, CHANNELS, size, size))


def learned(h: Value, shape: tuple[int, ...], role: Role = Role.PARAMETER) -> Value:
    name = h.graph.unused_name("extra")
    known = {s.name for s in h.graph.states}
    while name in known:
        name += "_"
    return h.graph.read(State(name, shape, role=role))


def known(h: Value, *numbers: float, shape: tuple[int, ...] | None = None) -> Value:
    """A constant: one number, or one a channel."""
    array = np.array(numbers, np.float32)
    if shape is None:
        shape = () if len(numbers) == 1 else (len(numbers), *(1,) * (len(h.shape) - 2))
    return write(h.graph, array.reshape(shape), h.dtype)


def column(vector: Value) -> Value:
    return reshape(vector, (*vector.shape, 1, 1))


# -- linear branches -------------------------------------------------------------------------------


def normed(d: Dice, h: Value) -> Value:
    k = d.pick((1, 3))
    y = conv(h, CHANNELS, k, pad=k // 2, groups=d.pick((1, 1, 2, 4)), bias=d.chance())
    return batch_norm(y)


def folding(d: Dice, h: Value) -> Value:
    """Convolutions with batch norm in a row."""
    for _ in range(d.number(1, 3)):
        h = relu(normed(d, h))
    if d.chance(0.25):
        y = conv(h, CHANNELS, 1)
        h = merge_product(relu(batch_norm(y)), tanh(y))
    return h


def norm_before(d: Dice, h: Value) -> Value:
    return conv(batch_norm(h), CHANNELS, 3, pad=d.pick((0, 1)))


def one_branch(d: Dice, h: Value) -> Value:
    """A linear branch that keeps the shape."""
    table: list[Callable[[], Value]] = [
        lambda: conv(h, CHANNELS, 3, pad=1, bias=d.chance()),
        lambda: conv(h, CHANNELS, 1),
        lambda: conv(h, CHANNELS, (1, 3), pad=(0, 1)),
        lambda: conv(h, CHANNELS, (3, 1), pad=(1, 0)),
        lambda: conv(h, CHANNELS, 3, pad=2, dilation=2),
        lambda: conv(h, CHANNELS, 3, pad=1, groups=d.pick((2, 4))),
        lambda: average_pool(h, 3, stride=1, pad=1),
        lambda: batch_norm(h),
        lambda: h,
        lambda: batch_norm(conv(h, CHANNELS, 3, pad=1, bias=False)),
        lambda: conv(h, CHANNELS, 3, pad=1) * d.pick((0.5, 2.0)),
        lambda: gate(conv(h, CHANNELS, 3, pad=1), learned(h, ())),
    ]
    return d.pick(table)()


def parallel(d: Dice, h: Value) -> Value:
    made = []
    for k in range(d.number(2, 4)):
        with branch(h.graph.unused_name(f"p{k}")):
            made.append(one_branch(d, h))
    merge = d.pick((merge_sum, merge_sum, merge_mean))
    return merge(*made) if d.chance(0.8) else made[0] + made[1]


def published(d: Dice, h: Value) -> Value:
    return d.pick((repvgg_unit, repvgg_unit, acnet, dbb))(h, CHANNELS)


def one_then_square(d: Dice, h: Value) -> Value:
    first = conv(h, d.pick((3, 6)), 1, bias=d.chance(0.7))
    return conv(first, CHANNELS, 3, pad=d.pick((0, 1, 1, 1)))


def square_then_one(d: Dice, h: Value) -> Value:
    groups = d.pick((1, CHANNELS))
    return conv(conv(h, 8, 3, pad=1, groups=groups), CHANNELS, 1)


def square_twice(d: Dice, h: Value) -> Value:
    first = conv(h, d.pick((4, 12)), 3, pad=1, bias=d.chance())
    return conv(first, d.pick((2, CHANNELS)), d.pick((2, 3)), pad=d.pick((0, 1)))


def padded_twice(d: Dice, h: Value) -> Value:
    """Beyond the border that the second pads, the first is not zero."""
    kernel, border = d.pick(((3, 1), ((1, 3), (0, 1)), ((3, 1), (1, 0))))
    return conv(conv(h, d.pick((2, CHANNELS)), kernel, pad=border), CHANNELS, kernel, pad=border)


def adjusted(d: Dice, h: Value) -> Value:
    y = conv(h, CHANNELS, 3, pad=1) * d.pick((2.0, -1.0))
    y = y + learned(h, (CHANNELS, 1, 1)) if d.chance() else -y
    return y / learned(h, (1, CHANNELS, 1, 1)) if d.chance(0.3) else y


def gated_by_sample(d: Dice, h: Value) -> Value:
    means = global_average_pool(h)
    terms = []
    for _ in range(d.number(1, 3)):
        width = d.pick((1, CHANNELS))
        g = column(sigmoid(dense(means, width)))
        y = conv(h, CHANNELS, 3, pad=1)
        terms.append(y * g if width == 1 or d.chance() else scale_channels(y, sigmoid(means)))
    return merge_sum(*terms, conv(h, CHANNELS, 3, pad=1)) if d.chance(0.7) else terms[0]


def gated_dense(d: Dice, h: Value) -> Value:
    means = global_average_pool(h)
    weights = [sigmoid(dense(means, 1)) for _ in range(2)]
    return weighted_sum([dense(means, 5) for _ in range(2)], weights)


def computed_kernels(d: Dice, h: Value) -> Value:
    """Kernels that are computed for each sample, and a batch norm behind them."""
    kernels = dense(global_average_pool(h), CHANNELS * CHANNELS)
    shape = (h.shape[0], CHANNELS, CHANNELS, 1, 1)
    return batch_norm(sample_conv(h, reshape(kernels, shape)))


def side_by_side(d: Dice, h: Value) -> Value:
    parts = [conv(h, d.pick((2, 3)), k, pad=k // 2) for k in d.some((1, 3, 3), 2, 3)]
    return concat(*parts, normed(d, h)) if d.chance() else concat(*parts)


def joined(d: Dice, h: Value) -> Value:
    k = d.pick((1, 3))
    return merge_sum(conv(relu(h), CHANNELS, 3, pad=1), conv(sigmoid(h), CHANNELS, k, pad=k // 2))


def pooled(d: Dice, h: Value) -> Value:
    if d.chance(0.45):
        return conv(average_pool(h, 3, stride=1, pad=1, divisor="inside"), CHANNELS, 1)
    if d.chance(0.9):
        divisor = "padded"
        return conv(average_pool(h, 2, stride=2, cover_all=True, divisor=divisor), CHANNELS, 1)
    return average_pool(conv(h, CHANNELS, d.pick((1, 3)), pad=1), 2, stride=2)


def thinned(d: Dice, h: Value) -> Value:
    """Pooling behind a padded 1x1 convolution: as many MACs, more weights."""
    return average_pool(conv(h, CHANNELS, 1, pad=(1, 1, 0, 0)), 2, stride=2)


def two_strides(d: Dice, h: Value) -> Value:
    size = int(str(h.shape[2]))
    out = (size - 1) // 2 + 1
    return merge_sum(conv(h, 4, 3, stride=2, pad=1), conv(h, 4, size - out + 1))


def not_linear(d: Dice, h: Value) -> Value:
    first = conv(h, CHANNELS, 3, pad=1)
    if d.chance():
        return merge_sum(first, relu(conv(h, CHANNELS, 3, pad=1)))
    return merge_sum(first, max_pool(h, 3, stride=1, pad=1))


def read_twice(d: Dice, h: Value) -> Value:
    y = conv(h, CHANNELS, 3, pad=1)
    other = conv(h, CHANNELS, 1)
    z = batch_norm(y) if d.chance(0.75) else merge_sum(y, other)
    return concat(z, relu(y)) if d.chance() else merge_product(z, tanh(y))


def norm_behind_others(d: Dice, h: Value) -> Value:
    return batch_norm(d.pick((relu, lambda v: max_pool(v, 3, stride=1, pad=1)))(normed(d, h)))


def vector_head(d: Dice, h: Value) -> Value:
    if d.chance(0.4):
        return dense(flatten(conv(h, d.pick((2, 20)), 3)), 3)
    v = dense(global_average_pool(h), 5)
    return dense(relu(v) if d.chance(0.3) else v, CHANNELS)


def open_size(d: Dice, h: Value) -> Value:
    """A part whose size is not known."""
    z = h.graph.inputs.get("z")
    z = h.graph.input("z", (2, 2, "H", 4)) if z is None else z
    return conv(conv(z, 3, 1), 2, 3, pad=1)


def padded_apart(d: Dice, h: Value) -> Value:
    return conv(pad(h, (0, 0, 1, 1), (0, 0, 1, 1)), CHANNELS, 3)


def residual_block(d: Dice, h: Value) -> Value:
    y = relu(batch_norm(conv(h, CHANNELS, 3, pad=1)))
    return relu(merge_sum(h, batch_norm(conv(y, CHANNELS, 3, pad=1))))


def means(d: Dice, h: Value) -> Value:
    """Merge-and-run pairs, means of means, sums of means."""
    a, b = tanh(h), sigmoid(h)
    left, right = conv(a, CHANNELS, 1), conv(b, CHANNELS, 1)
    for _ in range(d.number(1, 3)):
        m = merge_mean(a, b)
        a, b = merge_sum(left, m), merge_sum(right, m)
    return d.pick(
        (
            lambda: merge_mean(a, b),
            lambda: merge_mean(merge_mean(left, a), merge_mean(right, b)),
            lambda: merge_mean(a, merge_sum(b, left)),
            lambda: merge_mean(merge_mean(a, b), merge_mean(a, b)),
        )
    )()


# -- layers side by side ---------------------------------------------------------------------------


def siblings(d: Dice, h: Value) -> Value:
    """Convolutions of one input: alike, or different in one thing."""
    table: list[Callable[[], list[Value]]] = [
        lambda: [conv(h, 2, 3, pad=1), conv(h, 3, 3, pad=1)],
        lambda: [conv(h, 2, 3, pad=1), conv(h, 3, 1), conv(h, 2, (1, 3), pad=(0, 1))],
        lambda: [conv(h, 2, 3, pad=1), conv(h, 2, 3, pad=1, stride=2)],
        lambda: [conv(h, 2, 3, pad=1), conv(h, 2, 3, pad=2, dilation=2)],
        lambda: [conv(h, 4, 3, pad=1), conv(h, 4, 3, pad=1, groups=2)],
        lambda: [conv(h, 2, 3, pad=1), conv(h, 2, 3)],
        lambda: [conv(h, 2, 3, dilation=2, pad=1), conv(h, 2, (2, 2), dilation=2)],
    ]
    parts = [relu(v) for v in d.pick(table)()]
    if len({v.shape[2:] for v in parts}) == 1:
        return concat(*parts)
    return concat(*map(global_average_pool, parts))


def wide_siblings(d: Dice, h: Value) -> Value:
    """Kernels that would become mostly zeros."""
    return merge_product(conv(h, 4, 1), conv(h, 4, 5, pad=2))


def vector_siblings(d: Dice, h: Value) -> Value:
    v = global_average_pool(h)
    if d.chance():
        return concat(tanh(dense(v, 2)), relu(dense(v, 3)))
    return concat(dense(tanh(v), 3), dense(relu(v), 3))


def uneven_siblings(d: Dice, h: Value) -> Value:
    """Layers of one shape on different inputs that differ otherwise."""
    graph = h.graph
    if "g" not in graph.inputs:
        graph.input("g", ("N", 4))
        graph.input("g64", ("N", 4), DType.F64)
        graph.input("rows", ("M", 4))
        graph.input("w", (3, 4))
    g, g64, rows, w = (graph.inputs[k] for k in ("g", "g64", "rows", "w"))
    kind = d.pick(("dtype", "dtype", *("rows",) * 4, "attributes", "attributes", "depth", "depth"))
    if kind == "dtype":
        return concat(dense(g, 3), cast(dense(g64, 3), DType.F32))
    if kind == "rows":
        graph.output(f"of_rows{len(graph.outputs)}", dense(rows, 3))
        return dense(g, 3)
    if kind == "depth":
        return concat(dense(g, 3), dense(g, 3, weight=tanh(w)))
    a, b = relu(h), tanh(h)
    other = conv(b, 4, 3, pad=2, dilation=2) if d.chance() else conv(b, 4, 3, pad=(0, 2, 2, 0))
    return concat(conv(a, 4, 3, pad=1), other)


# -- gates -----------------------------------------------------------------------------------------

_FIXED = ((0.0,), (0.0,), (1.0,), (0.5,), (0.0, 1.0, 0.0, 1.0), (0.0, 0.0, 1.0, 2.0), (1.0,) * 4)


def fixed_gate(d: Dice, h: Value) -> Value:
    y = d.pick((conv(h, CHANNELS, 3, pad=1), h, relu(conv(h, CHANNELS, 1))))
    y = gate(y, known(h, *d.pick(_FIXED)), name=h.graph.unused_name("gate"))
    return merge_sum(h, y) if d.chance(0.6) else y


def closed_branches(d: Dice, h: Value) -> Value:
    made = []
    for _ in range(3):
        with branch(h.graph.unused_name("side")):
            made.append(gate(normed(d, h), known(h, d.pick((0.0, 1.0)))))
    return d.pick((merge_sum, merge_mean, merge_maximum))(h, *made)


def slim(d: Dice, h: Value) -> Value:
    """Channels that carry nothing into a layer."""
    y = gate(conv(h, CHANNELS, 3, pad=1), known(h, *d.pick(_FIXED[4:])))
    if d.chance(0.4):
        y = conv(gate(h, known(h, 0.0)), CHANNELS, 3, pad=1)
    y = concat(relu(y), h)
    k = d.pick((1, 3))
    return conv(y, CHANNELS, k, pad=k // 2, bias=d.chance())


def constant_padded(d: Dice, h: Value) -> Value:
    """Constant channels meet zero padding."""
    constant = conv(gate(h, known(h, 0.0)), 2, 1)
    return conv(concat(constant, h), CHANNELS, 3, pad=1)


def tied_slim(d: Dice, h: Value) -> Value:
    w = learned(h, (CHANNELS, CHANNELS, 1, 1))
    closed = gate(h, known(h, 0.0, 1.0, 0.0, 1.0))
    return merge_sum(conv(closed, CHANNELS, 1, weight=w), conv(h, CHANNELS, 1, weight=w))


def spatial_gate(d: Dice, h: Value) -> Value:
    size = int(str(h.shape[2]))
    halves = [0.5] * (size * size - 1) + [2.0]
    return gate(conv(h, CHANNELS, 1), known(h, *halves, shape=(1, size, size)))


def lonely_gate(d: Dice, h: Value) -> Value:
    return gate(d.pick((sigmoid, tanh))(h), known(h, d.pick((0.5, -2.0))))


def gated_norm(d: Dice, h: Value) -> Value:
    y = gate(batch_norm(conv(h, CHANNELS, 1)), known(h, 0.0, 1.0, 1.0, 0.0))
    return conv(y, CHANNELS, 1)


def open_gate(d: Dice, h: Value) -> Value:
    """A gate that something else decides."""
    table: list[Callable[[], Value]] = [
        lambda: sigmoid(column(dense(global_average_pool(h), 1))),
        lambda: learned(h, (), Role.CONSTANT),
    ]
    return merge_sum(h, gate(conv(h, CHANNELS, 1), d.pick(table)()))


def undecided_gate(d: Dice, h: Value) -> Value:
    """A gate that the mode decides."""
    decided = by_mode(known(h, d.pick((0.5, 1.0))), known(h, 0.0))
    return merge_sum(h, gate(conv(h, CHANNELS, 1), decided))


def score_gate(d: Dice, h: Value) -> Value:
    score = learned(h, (CHANNELS, 1, 1), Role.GATE)
    kinds: tuple[Callable[[Value], Value], ...] = (
        gates.hard, gates.sigmoid, gates.hard_concrete, lambda s: gates.softmax(s, 0), lambda s: s,
    )  # fmt: skip
    y = gate(conv(h, CHANNELS, 3, pad=1), d.pick(kinds)(score))
    return merge_sum(h, y)


#: What gates are called that are not finite.
ENDLESS = "endless"


def endless_gate(d: Dice, h: Value) -> Value:
    """A gate that is not finite under any score."""
    score = learned(h, (CHANNELS, 1, 1), Role.GATE)
    zero, name = known(h, 0.0), h.graph.unused_name(ENDLESS)
    return merge_sum(h, gate(conv(h, CHANNELS, 1), score / (score * zero), name=name))


def norm_used_twice(d: Dice, h: Value) -> Value:
    """One batch norm for two values, one of them hidden: its update observes both."""
    y = batch_norm(h)
    node = y.producer
    assert node is not None
    again = h.graph.emit(node.op, relu(y), *node.inputs[1:])
    return merge_sum(y, gate(again, known(h, 0.0)))


# -- loose code ------------------------------------------------------------------------------------


def duplicated(d: Dice, h: Value) -> Value:
    a, b = relu(h), relu(h)
    return merge_sum(tanh(a), tanh(b)) if d.chance() else a + b


def constants(d: Dice, h: Value) -> Value:
    c = h.graph.constant(d.pick((0.5, 2.0))) * 3.0
    return h * (c + 1.0) if d.chance() else h + c


def single_merges(d: Dice, h: Value) -> Value:
    y = d.pick((merge_sum, merge_mean, merge_maximum, concat))(h)
    return cast(y, DType.F32) if d.chance() else (y + h) + relu(h)


def dead(d: Dice, h: Value) -> Value:
    relu(conv(h, 2, 1))
    return h + tanh(h)


def dropped(d: Dice, h: Value) -> Value:
    return dropout(h, 0.25)


def clipped(d: Dice, h: Value) -> Value:
    return clip(h, -1.0, d.pick((0.5, 2.0)))


# -- themes ----------------------------------------------------------------------------------------

LOOSE: tuple[Motif, ...] = (duplicated, constants, single_merges, dead, dropped, clipped)
LINEAR: tuple[Motif, ...] = (
    normed, *(norm_before,) * 5, *(parallel,) * 2, published, *(one_then_square,) * 4,
    *(computed_kernels,) * 9, square_then_one, *(square_twice,) * 2, *(padded_twice,) * 3,
    adjusted, gated_by_sample, *(gated_dense,) * 6, side_by_side, *(joined,) * 7, *(pooled,) * 12,
    *(thinned,) * 7, *(two_strides,) * 5, not_linear, *(read_twice,) * 6,
    *(norm_behind_others,) * 6, vector_head, *(open_size,) * 4, padded_apart, residual_block,
)  # fmt: skip
MEANS: tuple[Motif, ...] = (means, means, residual_block)
SIBLINGS: tuple[Motif, ...] = (
    *(siblings,) * 6, wide_siblings, *(vector_siblings,) * 3, *(uneven_siblings,) * 5,
)  # fmt: skip
GATES: tuple[Motif, ...] = (
    *(fixed_gate,) * 2, closed_branches, *(slim,) * 2, *(constant_padded,) * 2, *(tied_slim,) * 2,
    spatial_gate, *(lonely_gate,) * 2, *(gated_norm,) * 3, *(open_gate,) * 6, undecided_gate,
)  # fmt: skip
SCORES: tuple[Motif, ...] = (score_gate, score_gate, score_gate, fixed_gate, endless_gate)


def trunk(
    d: Dice, x: Value, motifs: Sequence[Motif], least: int, most: int, *first: Motif
) -> Value:
    """Motifs one after another; those that change the shape become outputs."""
    h = relu(conv(x, CHANNELS, 3, pad=1, name="stem"), name="stem_relu")
    for motif in first:
        h = motif(d, h)
    for k in range(d.number(least, most)):
        y = (d.pick(motifs) if d.chance(0.8) else d.pick(LOOSE))(d, h)
        if y.type == h.type and d.chance(0.8):
            h = y
            if d.chance(0.15):
                x.graph.output(f"inner{k}", h)
        else:
            x.graph.output(f"y{k}", y)
    return constants(d, h) if d.chance(0.5) else h


def headed(h: Value) -> Graph:
    h.graph.output("logits", dense(global_average_pool(h), CLASSES, name="fc"))
    return h.graph
