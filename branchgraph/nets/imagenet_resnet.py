"""Residual networks for ImageNet whose 3x3 convolutions and gates are given.

He et al., "Deep residual learning", arXiv 1512.03385, with the stride in the 3x3 convolution of a
bottleneck, as is usual in PyTorch:

    basic        relu(shortcut(x) + gate(U(p)(relu(U(p, stride)(x)))))
    bottleneck   relu(shortcut(x) + gate(1x1(4p)(relu(U(p, stride)(relu(1x1(p)(x)))))))

A unit U is a 3x3 convolution with its batch norm, or whatever takes its place: several branches,
or a fused form. The shortcut is a 1x1 convolution with batch norm where shapes differ. Stem, 1x1
convolutions and shortcuts are plain.
"""

from __future__ import annotations

from collections.abc import Callable

from branchgraph.ir.builder import max_pool, relu
from branchgraph.ir.errors import GraphError
from branchgraph.ir.functions import adaptive_average_pool
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.nets.units import PYTORCH, residual

#: Makes what takes the place of a 3x3 convolution, from: x, filters, stride, name.
Unit = Callable[[Value, int, int, str], Value]
#: What the residual branch passes before it is added.
Gate = Callable[[Value], Value]

#: Depth to whether blocks are bottlenecks, and their number in each stage.
STAGES = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}


def plain(x: Value, filters: int, stride: int, name: str) -> Value:
    """A 3x3 convolution with batch norm."""
    return PYTORCH.unit(x, filters, 3, stride=stride, activate=False, name=name)


def ungated(x: Value) -> Value:
    """No gate."""
    return x


def basic_block(
    x: Value, planes: int, stride: int = 1, unit: Unit = plain, gate: Gate = ungated
) -> Value:
    """Two units beside a shortcut; `planes` channels."""
    with branch("body"):
        h = relu(unit(x, planes, stride, "conv1"), name="relu1")
        h = gate(unit(h, planes, 1, "conv2"))
    return residual(h, shortcut(x, planes, stride))


def bottleneck_block(
    x: Value, planes: int, stride: int = 1, unit: Unit = plain, gate: Gate = ungated
) -> Value:
    """A unit between 1x1 convolutions, beside a shortcut; 4 `planes` channels."""
    with branch("body"):
        h = PYTORCH.unit(x, planes, 1, name="conv1")
        h = relu(unit(h, planes, stride, "conv2"), name="relu2")
        h = gate(PYTORCH.unit(h, 4 * planes, 1, activate=False, name="conv3"))
    return residual(h, shortcut(x, 4 * planes, stride))


def shortcut(x: Value, filters: int, stride: int) -> Value:
    """x, or its projection where the stride or the number of channels asks for one."""
    if stride == 1 and x.shape[1] == filters:
        return x
    with branch("shortcut"):
        return PYTORCH.norm(PYTORCH.conv(x, filters, 1, stride=stride))


def resnet(
    name: str, depth: int, classes: int, size: int, width: int, features: bool,
    unit: Unit = plain, gate: Gate = ungated,
) -> Graph:  # fmt: skip
    """The network: output `logits` [N, classes].

    With `features` it is a backbone instead, without the head: outputs `c2`, `c3`, `c4`, `c5`, the
    stages at strides 4, 8, 16 and 32.
    """
    if depth not in STAGES:
        raise GraphError(f"{name}: depth is one of {', '.join(map(str, STAGES))}, got {depth}")
    if min(classes, size, width) < 1:
        raise GraphError(f"{name}: classes, size and width are at least 1")
    bottleneck, counts = STAGES[depth]
    block = bottleneck_block if bottleneck else basic_block
    graph = Graph(f"{name}{depth}")
    h = PYTORCH.unit(graph.input("x", ("N", 3, size, size)), width, 7, stride=2, name="conv1")
    h = max_pool(h, 3, stride=2, pad=1, name="pool1")
    for stage, count in enumerate(counts, start=1):
        for k in range(count):
            with scope(f"layer{stage}/{k}"):
                stride = 2 if stage > 1 and k == 0 else 1
                h = block(h, width * 2 ** (stage - 1), stride, unit, gate)
        if features:
            graph.output(f"c{stage + 1}", h)
    if not features:
        pooled = adaptive_average_pool(h, 1)
        graph.output("logits", PYTORCH.dense(pooled, classes, name="fc"))
    return graph
