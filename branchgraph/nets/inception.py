"""Inception-v3 (Szegedy et al., "Rethinking the Inception architecture", arXiv 1512.00567).

Mixed blocks concatenate branches of convolution units; batch norm has eps 1e-3. Average pools in
the blocks divide by the whole window, which makes them convolutions with constant kernels. An
auxiliary classifier stands behind the last block of 17x17 maps; its loss is commonly weighted by
0.3 or 0.4, and nobody needs it after training.
"""

from __future__ import annotations

from dataclasses import replace

from branchgraph.ir.builder import (
    Size,
    average_pool,
    concat,
    dropout,
    global_average_pool,
    max_pool,
)
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.ir.initialisers import Initialiser, Normal
from branchgraph.nets.catalogue import family
from branchgraph.nets.units import PYTORCH, zeros

#: Filters and kernel of one unit.
Layer = tuple[int, Size]

_ROW, _COLUMN = (1, 7), (7, 1)


def _normal(fan_in: int, fan_out: int) -> Initialiser:
    return Normal(0.1)


INCEPTION = replace(
    PYTORCH, eps=1e-3, conv_init=_normal, dense_init=_normal, dense_bias_init=zeros
)  # fmt: skip


def _chain(x: Value, *layers: Layer, halve: bool = False) -> Value:
    """Units in a row that keep the size; with `halve` the last one has stride 2 and no padding."""
    for k, (filters, kernel) in enumerate(layers, start=1):
        end = halve and k == len(layers)
        stride, pad = (2, 0) if end else (1, None)
        x = INCEPTION.unit(x, filters, kernel, stride=stride, pad=pad, name=f"conv{k}")
    return x


def _mixed(x: Value, chains: dict[str, tuple[Layer, ...]], pooled: int) -> list[Value]:
    """Chains by branch name, and the branch `pool`: 3x3 averages and `pooled` 1x1 filters."""
    values = []
    for name, layers in chains.items():
        with branch(name):
            values.append(_chain(x, *layers))
    with branch("pool"):
        average = average_pool(x, 3, stride=1, pad=1)
        values.append(INCEPTION.unit(average, pooled, 1, name="conv1"))
    return values


def _reduction(x: Value, chains: dict[str, tuple[Layer, ...]]) -> list[Value]:
    """Chains that halve the size, and the branch `pool`: 3x3 maxima."""
    values = []
    for name, layers in chains.items():
        with branch(name):
            values.append(_chain(x, *layers, halve=True))
    with branch("pool"):
        values.append(max_pool(x, 3, stride=2))
    return values


def _at_35(x: Value, pooled: int) -> list[Value]:
    """Figure 5 of the paper, with a 5x5 convolution kept."""
    chains: dict[str, tuple[Layer, ...]] = {
        "point": ((64, 1),),
        "five": ((48, 1), (64, 5)),
        "double": ((64, 1), (96, 3), (96, 3)),
    }
    return _mixed(x, chains, pooled)


def _at_17(x: Value, inner: int) -> list[Value]:
    """Figure 6 of the paper: 7x7 convolutions as 1x7 and 7x1."""
    double = ((inner, _COLUMN), (inner, _ROW), (inner, _COLUMN), (192, _ROW))
    chains: dict[str, tuple[Layer, ...]] = {
        "point": ((192, 1),),
        "seven": ((inner, 1), (inner, _ROW), (192, _COLUMN)),
        "double": ((inner, 1), *double),
    }
    return _mixed(x, chains, 192)


def _at_8(x: Value) -> list[Value]:
    """Figure 7 of the paper: chains that end in a 1x3 and a 3x1 convolution side by side."""
    chains: dict[str, tuple[Layer, ...]] = {
        "three": ((384, 1),),
        "double": ((448, 1), (384, 3)),
    }
    point, *rest = _mixed(x, {"point": ((320, 1),), **chains}, 192)
    values = [point]
    for name, h in zip(chains, rest):
        with branch(name):
            values.append(INCEPTION.unit(h, 384, (1, 3), name="row"))
            values.append(INCEPTION.unit(h, 384, (3, 1), name="column"))
    return [*values, rest[-1]]


def _stem(x: Value) -> Value:
    """From 299x299 to 35x35."""
    h = INCEPTION.unit(x, 32, 3, stride=2, pad=0, name="conv1")
    h = INCEPTION.unit(h, 32, 3, pad=0, name="conv2")
    h = INCEPTION.unit(h, 64, 3, name="conv3")
    h = INCEPTION.unit(max_pool(h, 3, stride=2), 80, 1, name="conv4")
    h = INCEPTION.unit(h, 192, 3, pad=0, name="conv5")
    return max_pool(h, 3, stride=2)


def _trunk_to_17(h: Value) -> Value:
    for k, pooled in enumerate((32, 64, 64), start=1):
        with scope(f"mixed5/{k}"):
            h = concat(*_at_35(h, pooled))
    with scope("mixed6/0"):
        h = concat(*_reduction(h, {"three": ((384, 3),), "double": ((64, 1), (96, 3), (96, 3))}))
    for k, inner in enumerate((128, 160, 160, 192), start=1):
        with scope(f"mixed6/{k}"):
            h = concat(*_at_17(h, inner))
    return h


def _trunk_to_8(h: Value) -> Value:
    seven = ((192, 1), (192, _ROW), (192, _COLUMN), (192, 3))
    with scope("mixed7/0"):
        h = concat(*_reduction(h, {"three": ((192, 1), (320, 3)), "seven": seven}))
    for k in (1, 2):
        with scope(f"mixed7/{k}"):
            h = concat(*_at_8(h))
    return h


def _auxiliary(h: Value, classes: int) -> Value:
    h = INCEPTION.unit(average_pool(h, 5, stride=3), 128, 1, name="conv1")
    h = INCEPTION.unit(h, 768, 5, pad=0, name="conv2")
    return INCEPTION.head(h, classes)


def inception_v3(
    auxiliary: bool = True, classes: int = 1000, size: int = 299, ratio: float = 0.5
) -> Graph:
    """Inception-v3: outputs `auxiliary` (if wanted) and `logits`, both [N, classes].

    27 161 264 parameters with the auxiliary classifier, 23 834 568 without; `ratio` is of the
    dropout before the last layer.
    """
    smallest = 299 if auxiliary else 75
    if size < smallest:
        raise GraphError(
            f"inception_v3: images of {size}x{size} vanish on the way; size is >= {smallest}"
            f"{', or 75 without the auxiliary classifier' if auxiliary else ''}"
        )
    graph = Graph("inception_v3")
    h = _trunk_to_17(_stem(graph.input("x", ("N", 3, size, size))))
    if auxiliary:
        with branch("auxiliary"):
            graph.output("auxiliary", _auxiliary(h, classes))
    pooled = dropout(global_average_pool(_trunk_to_8(h)), ratio, name="dropout")
    graph.output("logits", INCEPTION.dense(pooled, classes, name="fc"))
    return graph


NETWORKS = family("Inception", inception_v3)
