"""Kin of ParaDise: units of parallel linear branches that inference folds into one convolution.

With T_k a k x k convolution with its own batch norm, B batch norm alone, A_k a k x k average and
C input channels:

    RepVGG  y = T_3(x) + T_1(x) + B(x), the last where shapes agree                  (2101.03697)
    ACNet   y = T_k(x) + T_3x1(x) + T_1x3(x)                                         (1908.03930)
    DBB     y = T_k(x) + T_1(x) + T_k(T_1(x)) + B(A_k(T_1(x)))                       (2103.13425)

Inside DBB, T_1 reads an x that is padded by k // 2, and what follows is not padded: at the border
stands the value that batch norm gives to 0, which is what makes the fold exact. (The authors pad
after that batch norm with the same value; in training its statistics here see the border too.)
"""

from __future__ import annotations

from branchgraph.ir.builder import average_pool, merge_sum, relu
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.nets.catalogue import family
from branchgraph.nets.imagenet_resnet import resnet
from branchgraph.nets.paradise_blocks import ac
from branchgraph.nets.units import PYTORCH

# -- units -----------------------------------------------------------------------------------------


def repvgg_unit(
    x: Value, filters: int, *, stride: int = 1, groups: int = 1, name: str = ""
) -> Value:
    """3x3, 1x1 and, where shapes agree, identity branches, each with batch norm, summed."""
    name = name or x.graph.unused_name("repvgg_unit")
    values = []
    with scope(name):
        for part, kernel in (("square", 3), ("point", 1)):
            with branch(part):
                h = PYTORCH.conv(x, filters, kernel, stride=stride, groups=groups)
                values.append(PYTORCH.norm(h))
        if stride == 1 and x.shape[1] == filters:
            with branch("identity"):
                values.append(PYTORCH.norm(x))
    return merge_sum(*values, name=name)


def acnet(
    x: Value, filters: int, *, kernel: int = 3, stride: int = 1, pad: int | None = None,
    name: str = "",
) -> Value:  # fmt: skip
    """A square convolution and the skeleton of its window; `pad` keeps the size if not given."""
    name = name or x.graph.unused_name("acnet")
    pad = kernel // 2 if pad is None else pad
    with scope(name):
        with branch("square"):
            square = PYTORCH.norm(PYTORCH.conv(x, filters, kernel, stride=stride, pad=pad))
        skeleton = ac(x, filters, kernel=kernel, pad=pad, stride=stride, name="skeleton")
    return merge_sum(square, skeleton, name=name)


def dbb(
    x: Value, filters: int, *, kernel: int = 3, stride: int = 1, groups: int = 1, name: str = ""
) -> Value:
    """The diverse branch block in place of a `kernel` x `kernel` convolution that keeps the size.

    The 1x1 convolution before the square one has as many channels as x. A depthwise block (as many
    groups as filters) has twice as many there, no 1x1 branch, and averages x itself.
    """
    name = name or x.graph.unused_name("dbb")
    channels = x.shape[1]
    if kernel < 3 or kernel % 2 == 0 or not isinstance(channels, int):
        raise GraphError(f"{name}: the kernel is odd and at least 3, got {kernel} on {x.type}")
    half, depthwise = kernel // 2, groups == filters > 1
    values = []
    with scope(name):
        with branch("square"):
            values.append(_normed(x, filters, kernel, groups, stride=stride))
        if not depthwise:
            with branch("point"):
                values.append(_normed(x, filters, 1, groups, stride=stride))
        with branch("sequence"):
            inner = 2 * channels if depthwise else channels
            with scope("first"):
                h = _normed(x, inner, 1, groups, pad=half)
            values.append(_normed(h, filters, kernel, groups, stride=stride, pad=0))
        with branch("average"):
            h = x
            if not depthwise:
                with scope("first"):
                    h = _normed(x, filters, 1, groups, pad=half)
            pooled = average_pool(h, kernel, stride=stride, pad=half if depthwise else 0)
            values.append(PYTORCH.norm(pooled))
    return merge_sum(*values, name=name)


def _normed(
    x: Value, filters: int, kernel: int, groups: int, *, stride: int = 1, pad: int | None = None
) -> Value:
    return PYTORCH.norm(PYTORCH.conv(x, filters, kernel, stride=stride, groups=groups, pad=pad))


# -- networks --------------------------------------------------------------------------------------

_A, _B = (2, 4, 14, 1), (4, 6, 16, 1)

#: Variant to the blocks of stages 1 to 4, the multipliers a and b of the widths, and the groups of
#: every second block.
REPVGG = {
    "a0": (_A, 0.75, 2.5, 1),
    "a1": (_A, 1.0, 2.5, 1),
    "a2": (_A, 1.5, 2.75, 1),
    "b0": (_B, 1.0, 2.5, 1),
    "b1": (_B, 2.0, 4.0, 1),
    "b1g2": (_B, 2.0, 4.0, 2),
    "b1g4": (_B, 2.0, 4.0, 4),
    "b2": (_B, 2.5, 5.0, 1),
    "b2g4": (_B, 2.5, 5.0, 4),
    "b3": (_B, 3.0, 5.0, 1),
    "b3g4": (_B, 3.0, 5.0, 4),
}


def repvgg(variant: str = "a0", classes: int = 1000, size: int = 224) -> Graph:
    """RepVGG: a stack of 3x3, 1x1 and identity sums without shortcuts; output `logits`.

    Widths are min(64, 64 a), 64 a, 128 a, 256 a and 512 b; every stage begins with stride 2.
    """
    if variant not in REPVGG:
        raise GraphError(f"repvgg: variant is one of {', '.join(REPVGG)}, got {variant!r}")
    counts, a, b, groups = REPVGG[variant]
    widths = (int(64 * a), int(128 * a), int(256 * a), int(512 * b))
    graph = Graph(f"repvgg_{variant}")
    x = graph.input("x", ("N", 3, size, size))
    h = relu(repvgg_unit(x, min(64, widths[0]), stride=2, name="stage0"))
    layer = 0
    for stage, (count, width) in enumerate(zip(counts, widths), start=1):
        for k in range(count):
            layer += 1
            with scope(f"stage{stage}"):
                h = repvgg_unit(
                    h, width, stride=1 if k else 2, groups=1 if layer % 2 else groups, name=str(k)
                )
                h = relu(h)
    graph.output("logits", PYTORCH.head(h, classes))
    return graph


def dbb_resnet(
    depth: int = 18, classes: int = 1000, size: int = 224, width: int = 64, features: bool = False
) -> Graph:
    """ResNet whose 3x3 convolutions are diverse branch blocks; options of `imagenet_resnet`."""

    def unit(x: Value, filters: int, stride: int, name: str) -> Value:
        return dbb(x, filters, stride=stride, name=name)

    return resnet("dbb_resnet", depth, classes, size, width, features, unit)


NETWORKS = family("Re-parameterised", repvgg, dbb_resnet)
