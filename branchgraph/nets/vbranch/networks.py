"""The networks of vbranch (section 3): FCN, CNN, ResNet, DenseNet and DenseNet-BC.

Layers carry the names of Keras' applications (`res2a_branch2a`, `bn2a_branch2a`,
`conv2_block1_1_conv`, `pool2_bn`), so that weights map by name. Logits and embeddings have no
activation and no normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import ascii_lowercase
from typing import TypeVar

from branchgraph.ir.builder import average_pool, global_average_pool, max_pool, relu
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, scope
from branchgraph.ir.sharing import Halves, Share, add, concatenate
from branchgraph.nets.catalogue import family
from branchgraph.nets.vbranch.branching import Branching, branched
from branchgraph.nets.vbranch.halves import EPS, Layers

Key = TypeVar("Key")
Setting = TypeVar("Setting")

# -- shared by the networks ------------------------------------------------------------------------


def _choice(table: Mapping[Key, Setting], key: Key, what: str) -> Setting:
    """What a table of versions or depths has under `key`."""
    if key not in table:
        raise GraphError(f"{what} {key!r} is none of {', '.join(map(str, table))}")
    return table[key]


def _image(channels: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """Channels, height and width; one number means a square."""
    if channels < 1:
        raise GraphError(f"channels: expected at least 1, got {channels}")
    if len(size) not in (1, 2) or min(size) < 1:
        raise GraphError(f"size: expected SIDE or HEIGHT+WIDTH, got {size}")
    return (channels, *(size * 2)[:2])


def _dense_unit(net: Layers, h: Halves, features: int, share: Share, name: str = "1") -> Halves:
    """Dense, batch norm, ReLU."""
    h = net.norm(net.dense(h, features, share, name=f"fc{name}"), name=f"bn_fc{name}")
    return h.map(relu, name=f"relu_fc{name}")


def _stem(
    net: Layers, h: Halves, filters: int, stride: int, share: Share, *, bias: bool = True,
    eps: float = EPS, names: tuple[str, str, str] = ("conv1", "bn_conv1", "relu_conv1"),
) -> Halves:  # fmt: skip
    """7x7 convolution padded by 3, batch norm, ReLU."""
    conv, bn, activation = names
    h = net.conv(h, filters, 7, share, stride=stride, pad=3, bias=bias, name=conv)
    return net.norm(h, eps=eps, name=bn).map(relu, name=activation)


def _stem_pool(h: Halves) -> Halves:
    """3x3 max pooling of stride 2, padded by 1 (behind ReLU the same as padding by zeros)."""
    return h.map(max_pool, 3, stride=2, pad=1, name="pool1")


def _pooled(h: Halves) -> Halves:
    return h.map(global_average_pool, name="avg_pool")


# -- fully connected and small convolutional networks ----------------------------------------------

FCN_SIZES = {"v1": (512,), "v2": (512, 256), "v3": (512, 512), "v4": (512, 512, 512)}


@branched
def fcn(
    branching: Branching,
    version: str = "v1",
    sizes: tuple[int, ...] = (),
    features: int = 784,
    outputs: int = 10,
) -> Graph:
    """FCN: dense layers with batch norm and ReLU, and a dense layer; `sizes` replace the version's.

    `shared` may be given for each dense layer, the last one included.
    """
    hidden = sizes or _choice(FCN_SIZES, version, "fcn: version")
    *shares, last = branching.shares(len(hidden) + 1, "one a dense layer")

    def body(net: Layers, h: Halves) -> Halves:
        for k, (size, share) in enumerate(zip(hidden, shares), start=1):
            h = _dense_unit(net, h, size, share, str(k))
        return net.dense(h, outputs, last, name="fc")

    return branching.declare("fcn", (features,), body)


@dataclass(frozen=True)
class Cnn:
    """What a version of the CNN sets: filters of its stages, stem, input and outputs."""

    stages: tuple[int, ...]
    stem: bool
    channels: int
    size: int
    outputs: int


CNNS = {
    "small": Cnn((16, 32), False, 1, 28, 10),
    "cifar": Cnn((32, 64, 128), False, 3, 32, 10),
    "large": Cnn((32, 64, 128, 256), True, 1, 105, 128),
}


@branched
def cnn(
    branching: Branching,
    version: str = "small",
    stages: tuple[int, ...] = (),
    layers: int = 2,
    stem: bool | None = None,
    channels: int | None = None,
    size: tuple[int, ...] = (),
    outputs: int | None = None,
) -> Graph:
    """CNN: stages of 3x3 convolutions, average pooling between them, two dense layers.

    `small` is for MNIST, `cifar` for CIFAR-10, `large` for Omniglot; the other options replace what
    the version sets. `shared` may be given for each stage and the output; the stem has that of the
    first stage, the hidden dense layer that of the last.
    """
    if layers < 1:
        raise GraphError(f"cnn: layers is at least 1 a stage, got {layers}")
    preset = _choice(CNNS, version, "cnn: version")
    filters = stages or preset.stages
    *shares, last = branching.shares(len(filters) + 1, "one a stage and one for the output")
    with_stem = preset.stem if stem is None else stem
    width = preset.outputs if outputs is None else outputs

    def body(net: Layers, h: Halves) -> Halves:
        if with_stem:
            h = _stem_pool(_stem(net, h, 32, 1, shares[0]))
        for k, (f, share) in enumerate(zip(filters, shares), start=1):
            if k > 1:
                h = h.map(average_pool, 2, name=f"pool_{k}")
            for j in range(1, layers + 1):
                h = net.conv(h, f, 3, share, name=f"conv_{k}_{j}")
                h = net.norm(h, name=f"bn_{k}_{j}").map(relu, name=f"relu_{k}_{j}")
        h = _dense_unit(net, _pooled(h), filters[-1], shares[-1])
        return net.dense(h, width, last, name="fc")

    image = _image(preset.channels if channels is None else channels, size or (preset.size,))
    return branching.declare("cnn", image, body)


# -- residual networks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ResNet:
    """Units a stage, kernels of a unit, filters of a unit's convolutions in each stage."""

    units: tuple[int, ...]
    kernels: tuple[int, ...]
    filters: tuple[tuple[int, ...], ...]

    def names(self, stage: int) -> Iterator[str]:
        """`2a`, `2b`, ...; in long stages `4a`, `4b1`, `4b2`, ... as in the original models."""
        long = sum(self.units) > 16 and stage in (3, 4)
        for k in range(self.units[stage - 2]):
            yield f"{stage}b{k}" if long and k else f"{stage}{ascii_lowercase[k]}"


_BASIC = ((3, 3), tuple((f, f) for f in (64, 128, 256, 512)))
_BOTTLENECK = ((1, 3, 1), tuple((f, f, 4 * f) for f in (64, 128, 256, 512)))
RESNETS = {
    18: ResNet((2, 2, 2, 2), *_BASIC),
    34: ResNet((3, 4, 6, 3), *_BASIC),
    50: ResNet((3, 4, 6, 3), *_BOTTLENECK),
    101: ResNet((3, 4, 23, 3), *_BOTTLENECK),
    152: ResNet((3, 8, 36, 3), *_BOTTLENECK),
}


@branched
def vbranch_resnet(
    branching: Branching,
    depth: int = 50,
    stem: bool | None = None,
    channels: int = 3,
    size: tuple[int, ...] = (128, 64),
    outputs: int = 128,
    shared_head: float = 0.0,
) -> Graph:
    """ResNet of depth 18, 34, 50, 101 or 152 with two dense layers; depth 18 has no stem.

    Convolutions have biases and pad as TensorFlow's `same`, the first unit of every stage projects
    its shortcut. `shared` may be given for each stage: the stem has that of the first, the hidden
    dense layer that of the last. The output layer shares `shared_head`.
    """
    net_of = _choice(RESNETS, depth, "vbranch_resnet: depth")
    shares = branching.shares(len(net_of.units), "one a stage")
    with_stem = depth != 18 if stem is None else stem

    def body(net: Layers, h: Halves) -> Halves:
        if with_stem:
            h = _stem_pool(_stem(net, h, 64, 2, shares[0]))
        for k, share in enumerate(shares):
            for j, name in enumerate(net_of.names(k + 2)):
                stride = 2 if k and not j else 1
                filters = net_of.filters[k]
                h = _residual_unit(net, h, net_of.kernels, filters, share, name, stride, not j)
        h = _dense_unit(net, _pooled(h), net_of.filters[-1][-1] // 2, shares[-1])
        return net.dense(h, outputs, float(shared_head), name="fc")

    return branching.declare(f"vbranch_resnet{depth}", _image(channels, size), body)


def _residual_unit(
    net: Layers, x: Halves, kernels: tuple[int, ...], filters: tuple[int, ...], share: Share,
    name: str, stride: int, project: bool,
) -> Halves:  # fmt: skip
    """relu(shortcut + body); every convolution has batch norm, all but the last one ReLU."""

    def conv(h: Halves, f: int, kernel: int, step: int, part: str) -> Halves:
        h = net.conv(h, f, kernel, share, stride=step, name=f"res{name}_{part}")
        return net.norm(h, name=f"bn{name}_{part}")

    h = x
    for k, (kernel, f) in enumerate(zip(kernels, filters)):
        part = f"branch2{ascii_lowercase[k]}"
        h = conv(h, f, kernel, 1 if k else stride, part)
        if k + 1 < len(kernels):
            h = h.map(relu, name=f"relu{name}_{part}")
    shortcut = conv(x, filters[-1], 1, stride, "branch1") if project else x
    return add(shortcut, h, name=f"res{name}").map(relu, name=f"relu{name}")


# -- densely connected networks --------------------------------------------------------------------


@dataclass(frozen=True)
class DenseNet:
    """Units a dense block, channels that a unit adds, channels of the stem."""

    units: tuple[int, ...]
    growth: int = 32
    stem: int = 64


DENSENETS = {
    121: DenseNet((6, 12, 24, 16)),
    161: DenseNet((6, 12, 36, 24), growth=48, stem=96),
    169: DenseNet((6, 12, 32, 32)),
    201: DenseNet((6, 12, 48, 32)),
}
#: Batch norm in all DenseNets.
DENSENET_EPS = 1.001e-5


@branched
def densenet(
    branching: Branching,
    depth: int = 121,
    channels: int = 3,
    size: tuple[int, ...] = (128, 64),
    outputs: int = 128,
    shared_head: float = 0.0,
    hidden: int = 0,
    blocks: int = 4,
) -> Graph:
    """DenseNet-121, 161, 169 or 201.

    `shared` may be given for each dense block: the stem has that of the first, a transition that
    of the block before it. The output layer shares `shared_head`. A dense layer of `hidden` units,
    with the share of the last block, may come before it (the embedding of 2018 has 1024), and only
    the first `blocks` blocks may be there.
    """
    net_of = _choice(DENSENETS, depth, "densenet: depth")
    if not 1 <= blocks <= len(net_of.units) or hidden < 0:
        raise GraphError(
            f"densenet: expected 1 to {len(net_of.units)} blocks and hidden units from 0, got "
            f"{blocks} and {hidden}"
        )
    units = net_of.units[:blocks]
    shares = branching.shares(len(units), "one a dense block")

    def body(net: Layers, h: Halves) -> Halves:
        names = ("conv", "bn", "relu")
        with scope("conv1"):
            h = _stem(net, h, net_of.stem, 2, shares[0], bias=False, eps=DENSENET_EPS, names=names)
        h = _pooled(_dense_blocks(net, _stem_pool(h), units, net_of.growth, shares))
        if hidden:
            h = _dense_unit(net, h, hidden, shares[-1])
        return net.dense(h, outputs, float(shared_head), name="fc")

    return branching.declare(f"densenet{depth}", _image(channels, size), body)


@branched
def densenet_bc(
    branching: Branching,
    depth: int = 100,
    growth: int = 12,
    channels: int = 3,
    size: tuple[int, ...] = (32,),
    outputs: int = 10,
) -> Graph:
    """DenseNet-BC for small images: three blocks of (depth - 4) // 6 units.

    `shared` may be given for each dense block; the output layer has that of the last.
    """
    if depth < 10 or growth < 1:
        raise GraphError(f"densenet_bc: depth >= 10 and growth >= 1, got {depth} and {growth}")
    shares = branching.shares(3, "one a dense block")

    def body(net: Layers, h: Halves) -> Halves:
        h = net.conv(h, 2 * growth, 3, shares[0], pad=1, bias=False, name="conv1")
        h = _pooled(_dense_blocks(net, h, ((depth - 4) // 6,) * 3, growth, shares))
        return net.dense(h, outputs, shares[-1], name="fc")

    return branching.declare("densenet_bc", _image(channels, size), body)


def _dense_blocks(
    net: Layers, h: Halves, blocks: tuple[int, ...], growth: int, shares: tuple[float, ...]
) -> Halves:
    """Dense blocks with transitions between them, batch norm and ReLU behind the last."""
    for k, (units, share) in enumerate(zip(blocks, shares), start=2):
        for j in range(1, units + 1):
            h = _dense_unit_of(net, h, growth, share, f"conv{k}_block{j}")
        if k - 1 < len(blocks):
            h = _norm_relu_conv(net, h, h.channels // 2, 1, share, f"pool{k}")
            h = h.map(average_pool, 2, name=f"pool{k}_pool")
    return net.norm(h, eps=DENSENET_EPS, name="bn").map(relu, name="relu")


def _dense_unit_of(net: Layers, x: Halves, growth: int, share: Share, name: str) -> Halves:
    """[x, new]: a 1x1 convolution to 4 growth channels and a 3x3 one to growth channels."""
    h = _norm_relu_conv(net, x, 4 * growth, 1, share, f"{name}_0", f"{name}_1_conv")
    h = _norm_relu_conv(net, h, growth, 3, share, f"{name}_1", f"{name}_2_conv")
    return concatenate(x, h, name=f"{name}_concat")


def _norm_relu_conv(
    net: Layers, h: Halves, filters: int, kernel: int, share: Share, before: str, conv: str = ""
) -> Halves:
    h = net.norm(h, eps=DENSENET_EPS, name=f"{before}_bn").map(relu, name=f"{before}_relu")
    return net.conv(h, filters, kernel, share, bias=False, name=conv or f"{before}_conv")


NETWORKS = family("vbranch", fcn, cnn, vbranch_resnet, densenet, densenet_bc)
