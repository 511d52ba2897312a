"""ParaDise's networks: ResNets of disentangled convolutions, those they are compared with, and the
perceptrons of the over-parameterisation study. Blocks and formulas are in `paradise_blocks`.

PD-A and PD-B take the place of every 3x3 convolution of the residual blocks; SE, GE and CBAM stand
behind the last batch norm of the residual branch. All ResNets have the options `depth`, `classes`,
`size` (of square images), `width` (channels of the first stage) and `features` (outputs `c2` to
`c5` for detectors in place of `logits`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

from branchgraph.ir.builder import flatten, merge_sum, relu, weighted_sum
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.ir.state import State
from branchgraph.nets.catalogue import family
from branchgraph.nets.imagenet_resnet import resnet
from branchgraph.nets.paradise_blocks import BRANCHES, cbam, ge, mixture, pd_a, pd_b, se
from branchgraph.nets.units import PYTORCH

# -- residual networks -----------------------------------------------------------------------------


def imagenet_resnet(
    depth: int = 18, classes: int = 1000, size: int = 224, width: int = 64, features: bool = False
) -> Graph:
    """ResNet for ImageNet: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks) layers."""
    return resnet("imagenet_resnet", depth, classes, size, width, features)


def pd_a_resnet(
    depth: int = 18, classes: int = 1000, size: int = 224, width: int = 64, features: bool = False,
    branches: tuple[str, ...] = BRANCHES, groups: int = 64,
) -> Graph:  # fmt: skip
    """ResNet whose 3x3 convolutions are sums of parallel ones (PD-A)."""

    def unit(x: Value, filters: int, stride: int, name: str) -> Value:
        return pd_a(x, filters, stride=stride, branches=branches, groups=groups, name=name)

    return resnet("pd_a_resnet", depth, classes, size, width, features, unit)


def pd_b_resnet(
    depth: int = 18, classes: int = 1000, size: int = 224, width: int = 64, features: bool = False,
    branches: tuple[str, ...] = BRANCHES, groups: int = 64, reduction: int = 16,
) -> Graph:  # fmt: skip
    """ResNet whose 3x3 convolutions are gated sums of parallel ones (PD-B)."""

    def unit(x: Value, filters: int, stride: int, name: str) -> Value:
        return pd_b(
            x, filters, stride=stride, branches=branches, groups=groups, reduction=reduction,
            name=name,
        )  # fmt: skip

    return resnet("pd_b_resnet", depth, classes, size, width, features, unit)


def ac_resnet(
    depth: int = 18, classes: int = 1000, size: int = 224, width: int = 64, features: bool = False
) -> Graph:
    """ResNet whose 3x3 convolutions have asymmetric ones beside them: PD-A's first and skeleton."""

    def unit(x: Value, filters: int, stride: int, name: str) -> Value:
        return pd_a(x, filters, stride=stride, branches=("standard1", "skeleton"), name=name)

    return resnet("ac_resnet", depth, classes, size, width, features, unit)


def se_resnet(
    depth: int = 18, classes: int = 1000, size: int = 224, width: int = 64, features: bool = False,
    reduction: int = 16,
) -> Graph:  # fmt: skip
    """ResNet with squeeze and excitation."""
    gate = partial(se, reduction=reduction)
    return resnet("se_resnet", depth, classes, size, width, features, gate=gate)


def ge_resnet(
    depth: int = 18, classes: int = 1000, size: int = 224, width: int = 64, features: bool = False,
    extent: int = 8, parameters: bool = True, mlp: bool = False, reduction: int = 16,
) -> Graph:  # fmt: skip
    """ResNet with gather and excite; the published ones have extent 8 and parameters."""
    gate = partial(ge, extent=extent, parameters=parameters, mlp=mlp, reduction=reduction)
    return resnet("ge_resnet", depth, classes, size, width, features, gate=gate)


def cbam_resnet(
    depth: int = 18, classes: int = 1000, size: int = 224, width: int = 64, features: bool = False,
    reduction: int = 16, spatial: bool = True,
) -> Graph:  # fmt: skip
    """ResNet with convolutional block attention."""
    gate = partial(cbam, reduction=reduction, spatial=spatial)
    return resnet("cbam_resnet", depth, classes, size, width, features, gate=gate)


# -- perceptrons -----------------------------------------------------------------------------------


def _plain_linear(x: Value, features: int, name: str) -> Value:
    return PYTORCH.dense(x, features, name=name)


def _summed_linear(x: Value, features: int, name: str) -> Value:
    """Two dense layers and their sum."""
    with scope(name):
        values = _parallel(x, features, ("first", "second"))
    return merge_sum(*values, name=name)


def _gated_linear(x: Value, features: int, name: str) -> Value:
    """Two dense layers, weighted for each sample by a gate with 64 hidden units that sees x."""
    with scope(name):
        values = _parallel(x, features, ("branch1", "branch2"))
        weights = mixture(x, 2, 64, 2)
    return weighted_sum(values, weights, name=name)


def _parallel(x: Value, features: int, names: Iterable[str]) -> list[Value]:
    values = []
    for name in names:
        with branch(name):
            values.append(PYTORCH.dense(x, features, name="linear"))
    return values


_LINEAR = {"plain": _plain_linear, "pd_a": _summed_linear, "pd_b": _gated_linear}


def pd_perceptron(
    form: str = "plain", size: int = 28, channels: int = 1, classes: int = 10, hidden: int = 64
) -> Graph:
    """Two-layer perceptron for MNIST: dense layers plain, doubled (pd_a) or gated (pd_b).

    50 890, 101 780 and 156 440 parameters; the reference's log-softmax belongs to the loss.
    """
    if form not in _LINEAR:
        raise GraphError(f"pd_perceptron: form is one of {', '.join(_LINEAR)}, got {form!r}")
    linear = _LINEAR[form]
    graph = Graph("pd_perceptron")
    x = flatten(graph.input("x", ("N", channels, size, size)))
    h = relu(linear(x, hidden, "fc1"), name="relu")
    graph.output("logits", linear(h, classes, "fc2"))
    return graph


# -- names of the reference ------------------------------------------------------------------------

#: Parts of our names and what the reference calls them; the order matters.
_KEYS = tuple(
    (re.compile(ours), theirs)
    for ours, theirs in (
        (r"\bbody/", ""),
        (r"\bshortcut/conv", "downsample.0"),
        (r"\bshortcut/bn", "downsample.1"),
        (r"\bstandard1/", "ori_"),
        (r"\bstandard2/", "new_"),
        (r"\bgroup/", "group_"),
        (r"\bskeleton/", "ac_convbn."),
        (r"\bvertical/", "ver_"),
        (r"\bhorizontal/", "hor_"),
        (r"\b(gate|se)/fc1", r"\1/fc.0"),
        (r"\b(gate|se)/fc2", r"\1/fc.2"),
        (r"\bgate/", ""),
        (r"\bchannel/fc1", "ChannelGate.mlp.1"),
        (r"\bchannel/fc2", "ChannelGate.mlp.3"),
        (r"\bspatial/", "SpatialGate.spatial."),
        (r"\bgather/(\d+/)?conv", r"downop.\1dwconv"),
        (r"\bgather/(\d+/)?bn", r"downop.\1bn"),
        (r"\bmlp/fc1", "mlp.0"),
        (r"\bmlp/fc2", "mlp.2"),
        (r"\bfc(\d)/first/linear", r"fc\1"),
        (r"\bfc(\d)/second/linear", r"fc\1\1"),
        (r"\b(branch\d)/linear", r"\1"),
        (r"\bconv(\d)/(conv|bn)", r"\2\1"),
        (r"\.gamma$", ".weight"),
        (r"\.beta$", ".bias"),
        (r"/", "."),
    )
)


def exchange_name(state: State) -> str:
    """The reference's PyTorch key of a state, for example `layer1.0.conv1.ori_conv.weight`.

    It serves the networks and, declared alone, the blocks of this family. SE, GE and CBAM ResNets
    are not in the reference: keys of their gates begin with the block's, `layer1.0.se.fc.0.weight`.
    """
    name = state.name
    for ours, theirs in _KEYS:
        name = ours.sub(theirs, name)
    return name


NETWORKS = family(
    "ParaDise", imagenet_resnet, pd_a_resnet, pd_b_resnet, ac_resnet, se_resnet, ge_resnet,
    cbam_resnet, pd_perceptron, exchange=exchange_name,
)  # fmt: skip
