"""BranchyNet's networks (Teerapittayanon et al., ICPR 2016, arXiv 1709.01686).

LeNet for 28x28 digits, AlexNet and ResNet for 32x32 colour images, and their B- forms: the same
trunk with early exits. Max pooling keeps overhanging windows (`cover_all`), and there is no
activation between the last two dense layers of LeNet, as in both reference repositories. What
differs between the two (2016, the `original`; its port of 2019, the `port`) is an option.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from branchgraph.ir.builder import (
    average_pool,
    conv,
    dense,
    dropout,
    exit,
    lrn,
    max_pool,
    relu,
    scale_gradient,
)
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.ir.initialisers import LeCunNormal
from branchgraph.ir.ops.reshape import Pad
from branchgraph.ir.state import State
from branchgraph.nets.catalogue import family
from branchgraph.nets.units import CHAINER, Convention, he_fan_in, residual


def _pooled(x: Value) -> Value:
    return relu(max_pool(x, 2, cover_all=True))


def _stem(graph: Graph, size: int, channels: int, widths: tuple[int, ...], kernel: int) -> Value:
    if size < 8:
        raise GraphError(f"lenet: images of {size}x{size} vanish in three poolings; size is >= 8")
    if len(widths) != 3:
        raise GraphError(f"lenet: widths are three channel counts, got {widths}")
    x = graph.input("x", ("N", channels, size, size))
    return conv(x, widths[0], kernel, pad=_pad(kernel), name="conv1")


def _pad(kernel: int) -> int:
    """The reference pads 5x5 convolutions by 3; smaller kernels keep the size."""
    return 3 if kernel == 5 else kernel // 2


def _rest(h: Value, widths: tuple[int, ...], kernel: int, features: int, classes: int) -> Value:
    """From the first convolution's output to the logits."""
    for k, width in enumerate(widths[1:], start=2):
        h = conv(_pooled(h), width, kernel, pad=_pad(kernel), name=f"conv{k}")
    h = dense(_pooled(h), features, name="fc1")
    return dense(h, classes, name="fc")


#: Layers of B-LeNet to the names under which BranchyNet's weights are exchanged as flat arrays:
#: `trunk.<index>.<role>` and `exit<i>.<index in the branch>.<role>`, each with `.W` and `.b`.
EXCHANGE_NAMES = {
    "conv1": "trunk.0.conv1",
    "conv2": "trunk.3.conv2",
    "conv3": "trunk.6.conv3",
    "fc1": "trunk.9.fc1",
    "fc": "exit2.0.fc",
    "exit1/conv": "exit1.2.conv1",
    "exit1/fc": "exit1.5.fc",
}


def exchange_name(state: State) -> str:
    """The exchange name of a state of `b_lenet`, for example `trunk.0.conv1.W`."""
    layer, kind = state.name.rsplit(".", 1)
    return f"{EXCHANGE_NAMES[layer]}.{'W' if kind == 'weight' else 'b'}"


def lenet(
    size: int = 28,
    channels: int = 1,
    classes: int = 10,
    widths: tuple[int, ...] = (5, 10, 20),
    kernel: int = 5,
    features: int = 84,
) -> Graph:
    """LeNet: three convolutions with pooling, two dense layers; output `logits` [N, classes].

    With the defaults 67 824 parameters and 1 140 070 multiply-accumulates a sample.
    """
    graph = Graph("lenet")
    h = _stem(graph, size, channels, widths, kernel)
    graph.output("logits", _rest(h, widths, kernel, features, classes))
    return graph


def b_lenet(
    size: int = 28,
    channels: int = 1,
    classes: int = 10,
    widths: tuple[int, ...] = (5, 10, 20),
    kernel: int = 5,
    features: int = 84,
    threshold: float = 0.5,
    criterion: str = "entropy",
) -> Graph:
    """B-LeNet: LeNet with an exit behind `conv1`; outputs `exit1` and `exit2` [N, classes]."""
    graph = Graph("b_lenet")
    h = _stem(graph, size, channels, widths, kernel)
    with branch("exit1"):
        e = conv(_pooled(h), 2 * widths[0], 3, pad=1, name="conv")
        logits = dense(_pooled(e), classes, name="fc")
        exit(logits, "exit1", criterion=criterion, threshold=threshold)
    logits = _rest(h, widths, kernel, features, classes)
    exit(logits, "exit2", criterion=criterion, last=True)
    return graph


# -- AlexNet ---------------------------------------------------------------------------------------


def _overlapping_pool(x: Value) -> Value:
    return max_pool(x, 3, stride=2, cover_all=True)


def _normalised(x: Value) -> Value:
    """LRN over 3 channels; alpha is not divided by the window, k is 2."""
    return lrn(x, 3, alpha=5e-5, beta=0.75, k=2.0)


def _convs(x: Value, widths: tuple[int, ...]) -> Value:
    """3x3 convolutions that keep the size, each with ReLU."""
    for width in widths:
        x = relu(conv(x, width, 3, pad=1, name=x.graph.unused_name("conv")))
    return x


@dataclass(frozen=True)
class _Heads:
    """The early exits of a network: the place in its trunk and the head that hangs there."""

    heads: Mapping[str, Callable[[Value], Value]]
    classes: int
    criterion: str = "entropy"
    threshold: float = 0.0

    def at(self, place: str, h: Value) -> Value:
        """`h` itself; the early exit of this place, if it has one, hangs on it."""
        if place in self.heads:
            name = f"exit{1 + list(self.heads).index(place)}"
            with branch(name):
                logits = dense(self.heads[place](h), self.classes, name="fc")
                exit(logits, name, criterion=self.criterion, threshold=self.threshold)
        return h

    def close(self, h: Value) -> Graph:
        """The classifier at the end: the last exit, or plain logits where there is no other."""
        logits = dense(h, self.classes, name="fc")
        if self.heads:
            exit(logits, f"exit{1 + len(self.heads)}", criterion=self.criterion, last=True)
        else:
            h.graph.output("logits", logits)
        return h.graph


def _alexnet(name: str, size: int, channels: int, heads: _Heads) -> Graph:
    if size < 16:
        raise GraphError(f"{name}: size is >= 16, got {size}")
    x = Graph(name).input("x", ("N", channels, size, size))
    h = relu(conv(x, 32, 5, pad=2, name="conv1"))
    h = heads.at("conv2", conv(_normalised(_overlapping_pool(h)), 64, 5, pad=2, name="conv2"))
    h = _normalised(_overlapping_pool(relu(h)))
    h = heads.at("conv3", conv(h, 96, 3, pad=1, name="conv3"))
    h = relu(conv(relu(h), 96, 3, pad=1, name="conv4"))
    h = relu(conv(h, 64, 3, pad=1, name="conv5"))
    h = dropout(relu(dense(_overlapping_pool(h), 256, name="fc1")))
    return heads.close(dropout(relu(dense(h, 128, name="fc2"))))


def alexnet(size: int = 32, channels: int = 3, classes: int = 10) -> Graph:
    """AlexNet for small images: five convolutions, LRN, dropout; output `logits` [N, classes].

    With the defaults 544 074 parameters and 28 247 296 multiply-accumulates a sample.
    """
    return _alexnet("alexnet", size, channels, _Heads({}, classes))


def b_alexnet(
    size: int = 32,
    channels: int = 3,
    classes: int = 10,
    branch_convs: int = 2,
    threshold: float = 0.05,
    criterion: str = "entropy",
) -> Graph:
    """B-AlexNet: exits behind the second and third convolution; outputs `exit1` to `exit3`.

    `branch_convs`, 0 to 4 in the experiment on branch depth, are the convolutions of exit 1.
    """
    if branch_convs < 0:
        raise GraphError(f"b_alexnet: branch_convs is at least 0, got {branch_convs}")

    def first(h: Value) -> Value:
        pooled = _normalised(_overlapping_pool(relu(h)))
        return _overlapping_pool(_convs(pooled, (32,) * branch_convs))

    def second(h: Value) -> Value:
        return _overlapping_pool(_convs(_normalised(_overlapping_pool(relu(h))), (32,)))

    heads = _Heads({"conv2": first, "conv3": second}, classes, criterion, threshold)
    return _alexnet("b_alexnet", size, channels, heads)


# -- ResNet ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """What differs between the two repositories."""

    layers: Convention
    stem_pad: int


_FORMS = {
    "port": _Form(replace(CHAINER, conv_init=he_fan_in), stem_pad=1),
    #: wscale = sqrt(2) multiplied the variance of LeCun's rule by its root.
    "original": _Form(
        replace(CHAINER, conv_init=lambda fan_in, fan_out: LeCunNormal(fan_in, 2.0**0.25)),
        stem_pad=0,
    ),
}


def _widened(x: Value, channels: int, stride: int, detach: bool) -> Value:
    """The shortcut without parameters: zero channels in front, every `stride`-th pixel."""
    missing = channels - int(str(x.shape[1]))
    if missing:
        x = x.graph.emit(Pad(begin=(0, missing, 0, 0), end=(0, 0, 0, 0)), x)
    if stride > 1:
        x = average_pool(x, 1, stride=stride)
    if detach:
        x = scale_gradient(x, x.graph.constant(0.0, x.dtype))
    return x


def _block(
    x: Value, channels: int, stride: int, layers: Convention, detach: bool, name: str
) -> Value:
    """Two 3x3 units and a shortcut without parameters, added before the last ReLU."""
    changes = stride > 1 or x.shape[1] != channels
    with scope(name):
        with branch("body"):
            h = layers.unit(x, channels, 3, stride=stride, name="unit1")
            h = layers.unit(h, channels, 3, activate=False, name="unit2")
        with branch("shortcut"):
            shortcut = _widened(x, channels, stride, detach) if changes else x
        return residual(h, shortcut)


def _resnet(name: str, form: str, blocks: int, detach: bool, heads: _Heads) -> Graph:
    """Three stages of residual blocks for 3x32x32 images."""
    if blocks < 1:
        raise GraphError(f"{name}: blocks is at least 1, got {blocks}")
    layers = _form(name, form).layers
    x = Graph(name).input("x", ("N", 3, 32, 32))
    h = heads.at("stem", layers.unit(x, 16, 3, pad=_form(name, form).stem_pad, name="stem"))
    for stage, channels in enumerate((16, 32, 64), start=1):
        for k in range(1, blocks + 1):
            stride = 2 if stage > 1 and k == 1 else 1
            h = _block(h, channels, stride, layers, detach, f"stage{stage}/block{k}")
        h = heads.at(f"stage{stage}", h)
    return heads.close(average_pool(h, 6, stride=1))


def _form(name: str, form: str) -> _Form:
    if form not in _FORMS:
        raise GraphError(f"{name}: form {form!r} is none of {', '.join(_FORMS)}")
    return _FORMS[form]


def resnet_a(
    blocks: int = 3, classes: int = 10, form: str = "port", detach_shortcut: bool = False
) -> Graph:
    """ResNet whose shortcuts have no parameters (zero channels, subsampling): depth 6 blocks + 2.

    `form` is that of the `port` (stem padded) or of the `original` (not padded, 30x30 after it).
    With 3 blocks 275 530 parameters and 40 556 160 multiply-accumulates, with 18 blocks ResNet-110.
    `detach_shortcut` stops the gradient at the shortcuts that change the shape, as the port does.
    """
    return _resnet("resnet_a", form, blocks, detach_shortcut, _Heads({}, classes))


def b_resnet(
    blocks: int = 3,
    classes: int = 10,
    form: str = "port",
    detach_shortcut: bool = False,
    threshold: float = 0.3,
    criterion: str = "entropy",
) -> Graph:
    """B-ResNet: two early exits on `resnet_a`; outputs `exit1` to `exit3`.

    The `port` has them behind stages 1 and 2, the `original` behind the stem and stage 1.
    """
    layers = _form("b_resnet", form).layers

    def one_block(h: Value) -> Value:
        return _block(h, 16, 1, layers, detach_shortcut, "block")

    def one_conv(h: Value) -> Value:
        return _convs(h, (32,))

    def three_convs(h: Value) -> Value:
        return _convs(_normalised(relu(conv(h, 64, 5, pad=2, name="conv"))), (32, 32))

    places: dict[str, Callable[[Value], Value]] = (
        {"stage1": one_block, "stage2": one_conv}
        if form == "port"
        else {"stem": three_convs, "stage1": one_block}
    )
    heads = _Heads(places, classes, criterion, threshold)
    return _resnet("b_resnet", form, blocks, detach_shortcut, heads)


NETWORKS = (
    *family("BranchyNet", lenet),
    *family("BranchyNet", b_lenet, exchange=exchange_name),
    *family("BranchyNet", alexnet, b_alexnet, resnet_a, b_resnet),
)
