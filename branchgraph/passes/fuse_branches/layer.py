"""A linear layer as a pass sees it: a kernel, where it stands over its input, and what it adds.

    y[n, o, h] = b[o] + B[o, h] + sum_{c < C/G, i < k} W[o, c, i] x[n, q(o) C/G + c, h s + i d - p]
    q(o)       = floor(o / (O/G))

written for one spatial axis h; a dense layer has none. b is a bias, B a bias map: a bias for every
position, which only a known size allows. Weights are parameter expressions, emitted when they are
asked for and once, so that a layer that is looked at and refused leaves nothing behind.

    R4   G -> g groups, g | G:   W'[o, (Q mod r) C/G + c, i] = W[o, c, i], else 0
         with r = G/g and Q = floor(o / (O/G)) the old group of o
    R3   tap i goes to position start + step i of a larger kernel, else 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from branchgraph.ir.dims import Dim, DimLike
from branchgraph.ir.functions import reduce_sum, transpose
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import make
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.linear import Dense, MatMul
from branchgraph.ir.ops.reshape import Embed, Reshape
from branchgraph.ir.ops.sample_conv import SampleConv

#: Emits an expression, the first time it is called.
Lazy = Callable[[], Value]

#: What an unknown size is taken to be when multiply-accumulates are compared.
_LARGE = 32


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear layer from `x`; `nodes` compute it now, outermost first."""

    x: Value
    weight: Lazy
    #: [O, C/groups, *kernel]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    #: The spatial size of the result.
    size: tuple[DimLike, ...]
    bias: Lazy | None = None
    #: [1, O, *size]
    map: Lazy | None = None
    nodes: tuple[Node, ...] = ()
    rules: frozenset[str] = frozenset()
    #: Whether the kernel is one tap of 1 for every channel, and zeros around it.
    ones: bool = False
    #: Where that tap is; the first one if it is not said.
    tap: tuple[int, ...] = ()
    #: Whether a bias map was made on the way.
    for_size: bool = False

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.stride)

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def filters(self) -> int:
        return self.shape[0]

    @property
    def channels(self) -> int:
        return self.shape[1] * self.groups

    @property
    def depthwise(self) -> bool:
        """Whether every channel has one filter."""
        return self.groups == self.filters == self.channels

    @property
    def pointwise(self) -> bool:
        """Whether the kernel has one tap."""
        return all(k == 1 for k in self.kernel)

    @property
    def position(self) -> tuple[int, ...]:
        """Where the tap of a kernel of one tap is."""
        return self.tap or (0,) * self.axes

    @property
    def diagonal(self) -> bool:
        """Whether channels are scaled and shifted, and nothing else."""
        return self.depthwise and self.pointwise and not self.moves

    @property
    def adjusts(self) -> bool:
        """Whether it is a batch norm, a scale or a shift, and no convolution."""
        return self.diagonal and bool(self.rules & {"R1", "R13"})

    @property
    def moves(self) -> bool:
        """Whether positions of the result are not those of the input."""
        return any(s > 1 for s in self.stride) or any(self.begin) or any(self.end)

    @property
    def spent(self) -> int:
        """Multiply-accumulates a sample that its nodes cost now."""
        return spent_by([self])

    @property
    def macs(self) -> int:
        """Multiply-accumulates a sample of the layer as one convolution or product."""
        return prod(self.shape) * positions(self.size)

    def named(self, *rules: str) -> Layer:
        """The layer with the names of rules added that led to it."""
        return replace(self, rules=self.rules | set(rules))


def spent_by(layers: Iterable[Layer]) -> int:
    """Multiply-accumulates a sample of the nodes of several layers, each node once."""
    return sum(positions((*_kernel(n), *n.output.shape[2:])) for n in _priced(layers))


def held_by(layers: Iterable[Layer]) -> int:
    """Elements of the weights of the nodes of several layers."""
    return sum(positions(_kernel(n)) for n in _priced(layers))


def _priced(layers: Iterable[Layer]) -> list[Node]:
    """The nodes of layers, each once, that cost multiply-accumulates."""
    nodes = dict.fromkeys(n for layer in layers for n in layer.nodes)
    return [n for n in nodes if isinstance(n.op, (Conv, Dense, SampleConv))]


def _kernel(node: Node) -> tuple[DimLike, ...]:
    """The shape of the kernel of one sample."""
    shape = node.inputs[1].shape
    return shape[1:] if isinstance(node.op, SampleConv) else shape


def positions(size: Iterable[DimLike]) -> int:
    """How many positions there are; unknown sizes are taken to be large."""
    return prod(_number(d) for d in size)


def _number(d: DimLike) -> int:
    if isinstance(d, Dim):
        d = d.substitute(dict.fromkeys(d.symbols, _LARGE))
    assert isinstance(d, int)
    return d


def once(make: Lazy) -> Lazy:
    """`make`, called at most once."""
    return cache(make)


def reshaped(x: Value, shape: tuple[DimLike, ...]) -> Value:
    """x under another shape; what is a reshaping already is reshaped from its origin."""
    while x.producer is not None and isinstance(x.producer.op, Reshape) and x.shape != shape:
        x = x.producer.inputs[0]
    return x if x.shape == shape else x.graph.emit(Reshape(shape=shape), x)


# -- weights ---------------------------------------------------------------------------------------


def regrouped(layer: Layer, groups: int) -> Value:
    """The weight in fewer groups (R4): blocks of the old groups on the diagonal of the new ones."""
    weight = layer.weight()
    parts = layer.groups // groups
    if parts == 1:
        return weight
    filters, channels, taps = layer.filters // layer.groups, layer.shape[1], layer.kernel
    inner = prod(taps) * channels
    blocks = reshaped(weight, (groups, parts, filters, inner))
    if filters > 1:
        blocks = transpose(blocks, (0, 2, 1, 3))
    else:
        blocks = reshaped(blocks, (groups, filters, parts, inner))
    # Entry (l, l) of a parts x parts matrix in row-major order is l (parts + 1).
    spread = Embed(axis=2, start=0, size=parts * parts, step=parts + 1)
    placed = blocks.graph.emit(spread, blocks)
    square = reshaped(placed, (groups, filters, parts, parts, inner))
    ordered = transpose(square, (0, 2, 1, 3, 4)) if filters > 1 else square
    return reshaped(ordered, (layer.filters, parts * channels, *taps))


def placed(
    weight: Value, starts: tuple[int, ...], steps: tuple[int, ...], kernel: tuple[int, ...]
) -> Value:
    """The taps of `weight` put into a larger kernel, zeros between and around them."""
    for a, (start, step, size) in enumerate(zip(starts, steps, kernel)):
        if weight.shape[2 + a] != size:
            embed = Embed(axis=2 + a, start=start, size=size, step=step)
            weight = weight.graph.emit(embed, weight)
    return weight


def column(vector: Value, rank: int) -> Value:
    """[O] as [O, 1, ...], to scale filters."""
    return reshaped(vector, (vector.shape[0], *(1,) * (rank - 1)))


def product_weight(
    second: Layer, first: Layer, dilation: tuple[int, ...], size: tuple[int, ...], groups: int
) -> Value:
    """The weight of `second` after `first`: tap t gathers all u, i with u s1 d2 + i d1 = t.

    W'[o, c, t] = sum_{m, u, i} W2[o, m, u] W1[m, c, i]: a transposed convolution of one kernel with
    the other. `dilation` is the spacing of the taps of the result, `size` their number.
    """
    outer = _spacing(
        second.kernel, [s * d for s, d in zip(first.stride, second.dilation)], dilation
    )
    inner = _spacing(first.kernel, first.dilation, dilation)
    if first.ones:
        starts = tuple(t * s for t, s in zip(first.position, inner))
        return placed(second.weight(), starts, outer, size)
    if second.ones:
        starts = tuple(t * s for t, s in zip(second.position, outer))
        return placed(first.weight(), starts, inner, size)
    if second.depthwise:
        return _after_depthwise(second, first, outer, inner, size)
    if first.depthwise and first.pointwise and second.groups == 1:
        scale = reshaped(first.weight(), (1, first.filters, *(1,) * second.axes))
        return placed(second.weight() * scale, (0,) * second.axes, outer, size)
    return _product_in_groups(second, first, outer, inner, size, groups)


def _spacing(
    kernel: Iterable[int], spacing: Iterable[int], unit: tuple[int, ...]
) -> tuple[int, ...]:
    """Steps between taps, in units; 1 where there is one tap."""
    return tuple(s // u if k > 1 else 1 for k, s, u in zip(kernel, spacing, unit))


def _after_depthwise(
    second: Layer, first: Layer, outer: tuple[int, ...], inner: tuple[int, ...],
    size: tuple[int, ...],
) -> Value:  # fmt: skip
    """W'[o, c, t] = sum_{u, i} W2[o, u] W1[o, c, i], in the groups of `first`."""
    w1, w2 = first.weight(), second.weight()
    if second.pointwise:
        return w1 * w2
    if first.pointwise:
        return placed(w2 * w1, (0,) * first.axes, outer, size)
    axes = tuple(range(2, 2 + first.axes))
    spread = make(
        "conv_transpose", stride=inner, pad=(0,) * 2 * first.axes, dilation=outer,
        groups=first.filters, size=size,
    )  # fmt: skip
    return transpose(w1.graph.emit(spread, transpose(w1, (1, 0, *axes)), w2), (1, 0, *axes))


def _product_in_groups(
    second: Layer, first: Layer, outer: tuple[int, ...], inner: tuple[int, ...],
    size: tuple[int, ...], groups: int,
) -> Value:  # fmt: skip
    """The product where both layers have `groups` groups, or the second has none."""
    w2 = regrouped(second, groups)
    if not second.axes:
        return w2.graph.emit(MatMul(), w2, first.weight())
    w1 = first.weight() if groups == 1 else regrouped(first, groups)
    rows, taps = second.filters // groups, w2.shape[2:]
    if groups > 1:
        split = reshaped(w2, (groups, rows, first.filters // groups, *taps))
        w2 = transpose(split, (1, 0, *range(2, 3 + second.axes)))
        w2 = reshaped(w2, (rows, first.filters, *taps))
    spread = make(
        "conv_transpose", stride=outer, pad=(0,) * 2 * second.axes, dilation=inner,
        groups=first.groups if groups == 1 else groups, size=size,
    )  # fmt: skip
    made = w2.graph.emit(spread, w2, w1)
    if groups == 1:
        return made
    split = reshaped(made, (rows, groups, first.channels // groups, *size))
    ordered = transpose(split, (1, 0, *range(2, 3 + second.axes)))
    return reshaped(ordered, (second.filters, first.channels // groups, *size))


def applied_to(second: Layer, bias: Value) -> Value:
    """What `second` makes of bias[m] at every position: sum_{m, u} W2[o, m, u] bias[m]."""
    if second.ones:
        return bias
    weight = second.weight()
    taps = tuple(range(2, 2 + second.axes))
    summed = weight
    if second.pointwise:
        summed = reshaped(weight, second.shape[:2])
    elif taps:
        summed = reduce_sum(weight, taps)
    if second.depthwise:
        return reshaped(summed, (second.filters,)) * bias
    groups, inner = second.groups, second.shape[1]
    rows = reshaped(summed, (groups, second.filters // groups, inner))
    columns = reshaped(bias, (groups, inner, 1))
    return reshaped(rows.graph.emit(MatMul(), rows, columns), (second.filters,))


# -- layers in the graph ---------------------------------------------------------------------------


def operator(layer: Layer) -> Conv | Dense:
    """The op that computes the layer."""
    if not layer.axes:
        return Dense()
    return Conv(
        stride=layer.stride,
        pad=(*layer.begin, *layer.end),
        dilation=layer.dilation,
        groups=layer.groups,
    )


def emit_layer(layer: Layer, name: str) -> Value:
    """The value of the layer; its weight and bias are called after it."""
    graph = layer.x.graph
    name = name or graph.unused_name("fused")
    weight = call(layer.weight(), f"{name}.weight")
    operands = [layer.x, weight]
    if layer.bias is not None:
        operands.append(call(layer.bias(), f"{name}.bias"))
    y = graph.emit(operator(layer), *operands, name=name)
    if layer.map is None:
        return y
    return graph.emit(make("add"), y, call(layer.map(), f"{name}.bias_map"), name=f"{name}.biased")


def call(value: Value, name: str) -> Value:
    """`value`, its node called `name` if it has no name yet."""
    if value.producer is not None and not value.producer.name:
        value.producer.name = name
    return value


def total(values: Iterable[Value]) -> Value:
    """The sum of values of one type."""
    listed = list(values)
    return listed[0] if len(listed) == 1 else listed[0].graph.emit(make("sum"), *listed)
