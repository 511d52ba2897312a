"""BranchyNet's networks (Teerapittayanon et al., ICPR 2016, arXiv 1709.01686).

LeNet for 28x28 digits, and B-LeNet: the same trunk with an exit behind its first convolution.
Max pooling keeps overhanging windows (`cover_all`), and there is no activation between the last two
dense layers, as in both reference repositories.
"""

from __future__ import annotations

from branchgraph.ir.builder import conv, dense, exit, max_pool, relu
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, branch
from branchgraph.ir.state import State


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
