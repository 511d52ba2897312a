"""Deep Fusion networks (Zhao et al., "On the connection of deep fusion to ensembling", later "Deep
convolutional neural networks with merge-and-run mappings", arXiv 1611.07718, IJCAI 2018).

A block fuses what runs side by side in it by addition, between batch norm and ReLU. With one(x) a
3x3 unit, two(x) two of them, and zero(x) the identity or, where channels change, a 1x1 projection:

    plain           relu(one(x))
    resnet          relu(zero(x) + two(x))
    half            relu(zero(x) + two_1(x) + two_2(x))                       (DFN-IL, DILNet)
    side            relu(two_1(x) + two_2(x))
    fuse3, fuse6    relu(line(x) + one(... one(x)))             3 or 6 blocks in all, as long as fit
    cross           y_i = relu(m + two_i(x_i)), m = (zero_1(x_1) + zero_2(x_2)) / 2
                                                                              (DFN-MR, DMRNet)

`depth` is that of the plain network of equally many convolutions: DFN-MR of depth 56 is
`cross:depth=110`. `ensemble` is fuse3 unrolled into the eight networks that share its weights.

States carry the names of the original with its separators: see `exchange_name`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from branchgraph.ir.builder import (
    average_pool,
    concat,
    dense,
    max_pool,
    merge_and_run,
    merge_mean,
    merge_sum,
    relu,
    state,
)
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, at, branch, scope
from branchgraph.ir.initialisers import Initialiser, Ones, Zeros
from branchgraph.ir.state import State
from branchgraph.nets.catalogue import family
from branchgraph.nets.units import MXNET, Convention

#: What runs side by side in a network.
Streams = tuple[Value, ...]
#: One branch of a block, from: x, channels.
Part = Callable[[Value, int], Value]

_KINDS = {"running_mean": "moving_mean", "running_var": "moving_var"}


def exchange_name(state: State) -> str:
    """The name of a state in the original's files, for example `g2_b1_l1_line_conv_weight`.

    Running statistics of the sub-networks of `ensemble` are `uncouple01g0_conv_bn_moving_mean`.
    """
    layer, kind = state.name.rsplit(".", 1)
    layer = re.sub(r"^n(\d)/", r"uncouple0\1", layer).replace("/", "_")
    return f"{layer}_{_KINDS.get(kind, kind)}"


# -- parts -----------------------------------------------------------------------------------------


def _stride(x: Value, width: int) -> int:
    """Where the number of channels changes, the image shrinks."""
    return 1 if x.shape[1] == width else 2


def one(x: Value, width: int, name: str, activate: bool = True) -> Value:
    """A 3x3 unit."""
    return MXNET.unit(x, width, 3, stride=_stride(x, width), activate=activate, name=name)


def two(x: Value, width: int) -> Value:
    """Two 3x3 units, the second without ReLU."""
    return one(one(x, width, "two1"), width, "two2", activate=False)


def zero(x: Value, width: int) -> Value:
    """x, or its 1x1 projection where the number of channels changes."""
    return x if x.shape[1] == width else _projection(x, width, 2, MXNET)


def _projection(x: Value, width: int, stride: int, layers: Convention) -> Value:
    return layers.unit(x, width, 1, stride=stride, activate=False, name="line")


def _chain(length: int) -> Part:
    """3x3 units in a row, the last without ReLU."""

    def chain(x: Value, width: int) -> Value:
        for k in range(length):
            x = one(x, width, str(k), activate=k < length - 1)
        return x

    return chain


# -- blocks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a block stands: stage and block count from 1; `last` is the last of the network."""

    stage: int
    block: int
    last: bool

    @property
    def first(self) -> bool:
        """Whether it is the first block of the network."""
        return self.stage == self.block == 1


#: Makes the next streams, from: streams, channels, place.
Block = Callable[[Streams, int, Place], Streams]


def _branch(name: str, part: Part, x: Value, width: int) -> Value:
    with branch(name):
        return part(x, width)


def fusion(parts: Mapping[str, Part]) -> Block:
    """A block that adds its parts, each a branch of that name: relu(sum_i part_i(x))."""

    def block(streams: Streams, width: int, place: Place) -> Streams:
        bodies = [_branch(name, part, streams[0], width) for name, part in parts.items()]
        return (relu(merge_sum(*bodies, name="sum"), name="relu"),)

    return block


def _plain(streams: Streams, width: int, place: Place) -> Streams:
    return (one(streams[0], width, "p1"),)


def _fuse(length: int) -> Block:
    """A chain beside a line: a 3x3 unit in the first block and where channels change, else x."""

    def block(streams: Streams, width: int, place: Place) -> Streams:
        def line(x: Value, width: int) -> Value:
            changes = place.first or x.shape[1] != width
            return one(x, width, "line", activate=False) if changes else x

        return fusion({"p0": line, "p2": _chain(length)})(streams, width, place)

    return block


def _cross(streams: Streams, width: int, place: Place) -> Streams:
    """Merge-and-run. The last block joins its streams: relu(m + two_1(x_1) + two_2(x_2))."""
    streams = streams if len(streams) == 2 else streams * 2
    lines = [_branch(f"l{i}", zero, x, width) for i, x in enumerate(streams, start=1)]
    bodies = [_branch(f"d{i}", two, x, width) for i, x in enumerate(streams, start=1)]
    if place.last:
        return (relu(merge_sum(merge_mean(*lines), *bodies, name="sum"), name="relu1"),)
    sums = merge_and_run(lines, bodies)
    return tuple(relu(y, name=f"relu{i}") for i, y in enumerate(sums, start=1))


# -- networks of 32x32 images ----------------------------------------------------------------------


def stage_blocks(name: str, depth: int, block_depth: int) -> tuple[int, ...]:
    """Blocks in each of the three stages of a network of `depth` layers, stem and head included.

    n_i = (depth - e_i) // (block_depth (3 - i)), e_0 = 2, e_i+1 = e_i + n_i block_depth: what does
    not fit is dropped, and a stage may be empty.
    """
    if depth < 2:
        full = 2 + 3 * block_depth
        raise GraphError(
            f"{name}: depth is at least 2, and at least {full} for a block in every stage, "
            f"got {depth}"
        )
    counts, used = [], 2
    for left in (3, 2, 1):
        counts.append((depth - used) // (block_depth * left))
        used += counts[-1] * block_depth
    return tuple(counts)


def _chain_length(name: str, depth: int, blocks: int) -> int:
    """Units in each of so many equally long chains."""
    _at_least(name, depth=(depth, 2 + blocks))
    return (depth - 2) // blocks


def _at_least(name: str, **options: tuple[int, int]) -> None:
    """Check options, given as value and least value."""
    for option, (value, least) in options.items():
        if value < least:
            raise GraphError(f"{name}: {option} is at least {least}, got {value}")


def fusion_network(
    name: str, depth: int, widen: int, classes: int, size: int, block_depth: int, block: Block
) -> Graph:
    """A 3x3 stem, three stages of blocks with 16, 32 and 64 times `widen` channels, and a head.

    `block_depth` is how many layers of `depth` a block stands for. Output `logits` [N, classes].
    """
    _at_least(name, widen=(widen, 1), classes=(classes, 1), size=(size, 1))
    counts = stage_blocks(name, depth, block_depth)
    x = Graph(name).input("x", ("N", 3, size, size))
    streams: Streams = (MXNET.unit(x, 16 * widen, 3, name="g0"),)
    for stage, count in enumerate(counts, start=1):
        for k in range(1, count + 1):
            place = Place(stage, k, last=(stage, k) == (3, count))
            with scope(f"g{stage}/b{k}"):
                streams = block(streams, 8 * widen * 2**stage, place)
    with scope("cls"):
        x.graph.output("logits", MXNET.head(streams[0], classes))
    return x.graph


def plain(depth: int = 62, widen: int = 1, classes: int = 10, size: int = 32) -> Graph:
    """A chain of 3x3 units; with depth 110 it has 1 727 962 parameters."""
    return fusion_network("plain", depth, widen, classes, size, 1, _plain)


def resnet(depth: int = 62, widen: int = 1, classes: int = 10, size: int = 32) -> Graph:
    """ResNet whose changing shortcuts are 1x1 projections; with depth 110, 1 730 714 parameters."""
    block = fusion({"p0": zero, "p2": two})
    return fusion_network("resnet", depth, widen, classes, size, 2, block)


def half(depth: int = 62, widen: int = 1, classes: int = 10, size: int = 32) -> Graph:
    """DFN-IL, inception-like: a shortcut and two branches; with depth 110, 1 707 674 parameters."""
    block = fusion({"p0": zero, "p1": two, "p2": two})
    return fusion_network("half", depth, widen, classes, size, 4, block)


def side(depth: int = 62, widen: int = 1, classes: int = 10, size: int = 32) -> Graph:
    """DFN-IL without shortcuts: two branches; with depth 110, 1 704 922 parameters."""
    block = fusion({"p1": two, "p2": two})
    return fusion_network("side", depth, widen, classes, size, 4, block)


def cross(depth: int = 62, widen: int = 1, classes: int = 10, size: int = 32) -> Graph:
    """DFN-MR, merge-and-run: two streams that each add the mean of both.

    DFN-MR1 is depth 110 (1 710 426 parameters), DFN-MR2 depth 62 and widen 4 (14 851 402), DFN-MR3
    depth 98 and widen 4 (24 151 882).
    """
    return fusion_network("cross", depth, widen, classes, size, 4, _cross)


def fuse3(depth: int = 62, widen: int = 1, classes: int = 10, size: int = 32) -> Graph:
    """Three blocks of one deep and one shallow branch; with depth 110, 1 753 530 parameters."""
    length = _chain_length("fuse3", depth, 3)
    return fusion_network("fuse3", depth, widen, classes, size, length, _fuse(length))


def fuse6(depth: int = 62, widen: int = 1, classes: int = 10, size: int = 32) -> Graph:
    """Six blocks of one deep and one shallow branch; with depth 110, 1 753 530 parameters."""
    length = _chain_length("fuse6", depth, 6)
    return fusion_network("fuse6", depth, widen, classes, size, length, _fuse(length))


# -- the ensemble ----------------------------------------------------------------------------------

#: Of the first release; the other networks have 0.9 since.
_SLOW = replace(MXNET, decay=0.99)


@dataclass
class _Shared:
    """Parameters that sub-networks share, made where they are needed first, at the root."""

    graph: Graph
    values: dict[str, Value] = field(default_factory=dict)

    def state(self, layer: str, kind: str, shape: tuple[int, ...], init: Initialiser) -> Value:
        name = f"{layer}.{kind}"
        if name not in self.values:
            with at(()):
                self.values[name] = state(self.graph, layer, kind, shape, init)
        return self.values[name]

    def unit(self, x: Value, width: int, stride: int, layer: str, name: str) -> Value:
        """A 3x3 unit with the parameters of `layer` and running statistics of its own."""
        channels = int(str(x.shape[1]))
        init = _SLOW.conv_init(9 * channels, 9 * width)
        weight = self.state(layer, "weight", (width, channels, 3, 3), init)
        gamma = self.state(f"{layer}/bn", "gamma", (width,), Ones())
        beta = self.state(f"{layer}/bn", "beta", (width,), Zeros())
        with scope(name):
            h = _SLOW.conv(x, width, 3, stride=stride, weight=weight)
            return relu(_SLOW.norm(h, gamma=gamma, beta=beta), name="relu")

    def head(self, x: Value, classes: int) -> Value:
        """8x8 pooling and a dense layer."""
        features = x.shape[1] * (int(str(x.shape[2])) - 7) ** 2
        init = _SLOW.dense_init(int(str(features)), classes)
        weight = self.state("fc", "weight", (classes, int(str(features))), init)
        bias = self.state("fc", "bias", (classes,), Zeros())
        pooled = average_pool(x, 8, stride=1, name="global_pool")
        return dense(pooled, classes, weight=weight, bias=bias, name="fc_score")


def ensemble(depth: int = 62, widen: int = 1, classes: int = 10, size: int = 32) -> Graph:
    """The eight networks in a three-block fusion, all weights shared: `logits1` to `logits8`.

    Each stage is one 3x3 unit (left) or a third of the depth (right), and a bit of t - 1 says which
    way network t goes. Running statistics are each network's own. The stem has 16 channels at
    every width. With depth 110 it has 1 753 530 parameters.
    """
    first = _chain_length("ensemble", depth, 3)
    _at_least("ensemble", widen=(widen, 1), classes=(classes, 1), size=(size, 29))
    second = (depth - 2 - first) // 2
    lengths = (first, second, depth - 2 - first - second)
    x = Graph("ensemble").input("x", ("N", 3, size, size))
    shared = _Shared(x.graph)
    for t in range(8):
        with branch(f"n{t + 1}"):
            h = shared.unit(x, 16, 1, "g0", "g0/conv")
            for stage, length in enumerate(lengths, start=1):
                right = t >> (stage - 1) & 1
                h = _way(shared, h, 8 * widen * 2**stage, stage, length if right else 0)
            x.graph.output(f"logits{t + 1}", shared.head(h, classes))
    return x.graph


def _way(shared: _Shared, x: Value, width: int, stage: int, length: int) -> Value:
    """One stage: so many units on the right, or the one on the left."""
    g, stride = f"g{stage}", 1 if stage == 1 else 2
    if not length:
        return shared.unit(x, width, stride, f"{g}/left", f"{g}/skip_line")
    for k in range(1, length + 1):
        x = shared.unit(x, width, stride, f"{g}/b{k}/right2", f"{g}/b{k}/conv3")
        stride = 1
    return x


# -- networks of ImageNet --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """What differs between a release for ImageNet and another."""

    #: Blocks in each stage by the number of streams: ResNet has one, merge-and-run has two.
    blocks: Mapping[int, tuple[int, ...]]
    layers: Convention
    #: Whether the first block of a stage has shortcuts, 1x1 projections; the streams are then
    #: added in the last block, and the stem ends in batch norm, ReLU and pooling without pad.
    projected: bool


_FORMS = {
    "final": _Form(
        {1: (2, 4, 22, 4), 2: (1, 2, 11, 2)}, replace(MXNET, var_init=Zeros()), projected=False
    ),
    "first": _Form(
        {1: (3, 4, 23, 3), 2: (2, 2, 8, 2)}, replace(_SLOW, var_init=Zeros()), projected=True
    ),
}


def _imagenet_stem(x: Value, form: _Form) -> Value:
    if form.projected:
        return max_pool(form.layers.unit(x, 64, 7, stride=2, name="g0"), 3, stride=2)
    return max_pool(form.layers.conv(x, 64, 7, stride=2, name="g0"), 3, stride=2, pad=1)


def _bottleneck(x: Value, width: int, stride: int, layers: Convention) -> Value:
    """1x1, 3x3 and 1x1, a quarter of the channels in between; no ReLU at the end."""
    shapes = ((width // 4, 1, 1), (width // 4, 3, stride), (width, 1, 1))
    for k, (filters, kernel, step) in enumerate(shapes, start=1):
        h = layers.conv(x, filters, kernel, stride=step, name=f"conv{k}")
        x = layers.norm(h, name=f"bn{k}")
        x = relu(x, name=f"relu{k}") if k < 3 else x
    return x


def _imagenet_block(streams: Streams, width: int, stride: int, form: _Form, last: bool) -> Streams:
    """Bottlenecks side by side, each adding the mean of all shortcuts, where there are any."""
    names = ("",) if len(streams) == 1 else ("l", "r")
    changes = any(x.shape[1] != width for x in streams)
    bodies: list[Value] = []
    lines: list[Value] = []
    for name, x in zip(names, streams):
        with branch(f"deep1{name}"):
            bodies.append(_bottleneck(x, width, stride, form.layers))
        with branch(f"line1{name}"):
            projected = changes and form.projected
            lines.append(_projection(x, width, stride, form.layers) if projected else x)
    if changes and not form.projected:
        joined = tuple(bodies)
    elif len(streams) == 1:
        joined = (merge_sum(*bodies, *lines, name="sum"),)
    else:
        joined = merge_and_run(lines, bodies)
    if last and form.projected and len(joined) > 1:
        joined = (merge_sum(*joined, name="sum"),)
    return tuple(relu(y, name=f"relu{name}") for y, name in zip(joined, names))


def _imagenet(name: str, streams: int, classes: int, size: int, form: str) -> Graph:
    if form not in _FORMS:
        raise GraphError(f"{name}: form {form!r} is none of {', '.join(_FORMS)}")
    chosen = _FORMS[form]
    _at_least(name, classes=(classes, 1), size=(size, 197 if chosen.projected else 193))
    counts = chosen.blocks[streams]
    graph = Graph(name)
    stem = _imagenet_stem(graph.input("x", ("N", 3, size, size)), chosen)
    running: Streams = (stem,) * streams
    for stage, count in enumerate(counts, start=1):
        for k in range(1, count + 1):
            with scope(f"g{stage}/b{k}"):
                stride = 2 if stage > 1 and k == 1 else 1
                last = (stage, k) == (4, count)
                running = _imagenet_block(running, 128 * 2**stage, stride, chosen, last)
    h = running[0] if len(running) == 1 else concat(*running)
    pooled = average_pool(h, 7, stride=1, name="global_pool")
    graph.output("logits", chosen.layers.dense(pooled, classes, name="fc_score"))
    return graph


def cross_imagenet(classes: int = 1000, size: int = 224, form: str = "final") -> Graph:
    """DFN-MR of bottlenecks, depth 50; with the defaults it has 46 395 048 parameters.

    Streams are concatenated before the head, and the first block of a stage merges nothing. The
    form of the `first` release (depth 44, 43 338 024 parameters) merges there, too, and adds.
    """
    return _imagenet("cross_imagenet", 2, classes, size, form)


def resnet_imagenet(classes: int = 1000, size: int = 224, form: str = "final") -> Graph:
    """ResNet of bottlenecks, depth 98; with the defaults it has 45 047 464 parameters.

    The first block of a stage has no shortcut. The form of the `first` release is ResNet-101.
    """
    return _imagenet("resnet_imagenet", 1, classes, size, form)


NETWORKS = family(
    "Deep Fusion",
    plain, resnet, half, side, cross, fuse3, fuse6, ensemble, cross_imagenet, resnet_imagenet,
    exchange=exchange_name,
)  # fmt: skip
