"""ResNeXt whose blocks choose K of the C blocks before (1709.09582, section 3).

    y_j = F(x_j) + S(x_j) / K',   x_j = relu( sum_k m_jk y_k )

K' is the fan-in of the module that reads y_j (C for the head), so that the identity path has gain
1 for every K, and with K = C this is ResNeXt: of the batch norm after the last 1x1, which must come
before the sum here, each block has gamma, sigma, mu / C and beta / C. `identity="sum"` leaves
1 / K' out. Blocks of the first module read the stem, the head reads all blocks of the last. S is
the identity, or 1x1 with weights that a module's blocks share and a batch norm of each one's own.
"""

from __future__ import annotations

from branchgraph.ir.builder import merge_sum, relu, state
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.nets.connectivity.resnext import Module, inside, plan
from branchgraph.nets.connectivity.wiring import Reader, Wiring, chosen, within
from branchgraph.nets.units import TORCH

_NET = "masked_resnext"


def masked_resnext(
    depth: int = 20, width: int = 4, cardinality: int = 8, k: int | None = None,
    classes: int = 10, policy: str = "learned", identity: str = "mean", preact: bool = False,
    size: int | None = None, channels: int = 3, layout: str = "auto", seed: int = 0,
) -> Graph:  # fmt: skip
    """ResNeXt in which each block reads K blocks: `learned`, `full` or `random`.

    K is half of the cardinality unless given; K = cardinality is `full`, which takes no K. `seed`
    draws the random rows. `preact` puts batch norm and ReLU before each convolution and the merged
    input as it is on the identity path. {20,4,8} has 266 714 parameters, {29,8,8} 841 434.
    """
    chosen(_NET, "policy", policy, ("learned", "full", "random"))
    chosen(_NET, "identity", identity, ("mean", "sum"))
    shapes = plan(_NET, depth, width, cardinality, layout)
    wiring = Wiring(_fan_in(k, cardinality, policy), policy, within(_NET, "seed", seed, 0))
    graph = Graph(_NET)
    stem = shapes.stem(graph, size, channels, activate=not preact)
    blocks: list[Value] = []
    block = _preactivated if preact else _block
    for module in shapes.modules:
        readers = cardinality if module is shapes.modules[-1] else wiring.k
        with scope(f"module{module.number}"):
            read = _reader(stem, blocks, module, wiring, cardinality, preact)
            weight = _projection(blocks[0] if blocks else stem, module)
            made = []
            for j in range(cardinality):
                with branch(f"block{j}"):
                    body, shortcut = block(read(j), module, weight)
                    made.append(_joined(body, shortcut, readers if identity == "mean" else 1))
            blocks = made
    graph.output("logits", _head(blocks, preact, within(_NET, "classes", classes, 1)))
    return graph


def _reader(
    stem: Value, blocks: list[Value], module: Module, wiring: Wiring, cardinality: int, preact: bool
) -> Reader:
    """From the number of a block to its x; the first module's is the stem, activated already."""
    if not blocks:
        return lambda j: stem
    merged = wiring.reader(blocks, module.number, cardinality)
    return merged if preact else lambda j: relu(merged(j), name="relu")


def _fan_in(k: int | None, cardinality: int, policy: str) -> int:
    if policy == "full":
        if k not in (None, cardinality):
            raise GraphError(f"{_NET}: policy full reads all {cardinality} blocks, got k={k}")
        return cardinality
    return within(_NET, "k", max(cardinality // 2, 1) if k is None else k, 1, cardinality)


def _projection(x: Value, module: Module) -> Value | None:
    """The weight of the shortcut, which the blocks of a module share."""
    if not module.reshapes(x):
        return None
    fan_in = x.shape[1]
    assert isinstance(fan_in, int)
    shape, init = (module.out, fan_in, 1, 1), TORCH.conv_init(fan_in, module.out)
    return state(x.graph, "shortcut", "weight", shape, init)


def _block(x: Value, module: Module, weight: Value | None) -> tuple[Value, Value]:
    """F(x) and S(x)."""
    h = inside(x, module.inner, module.stride)
    body = TORCH.unit(h, module.out, 1, activate=False, name="expand")
    if weight is None:
        return body, x
    with scope("shortcut"):
        s = TORCH.conv(x, module.out, 1, stride=module.stride, weight=weight)
        return body, TORCH.norm(s)


def _preactivated(x: Value, module: Module, weight: Value | None) -> tuple[Value, Value]:
    """F(x) and S(x) with batch norm and ReLU first; a projection reads the activated input."""
    with scope("reduce"):
        a = relu(TORCH.norm(x), name="relu")
        h = TORCH.conv(a, module.inner, 1)
    with scope("spatial"):
        h = TORCH.conv(relu(TORCH.norm(h)), module.inner, 3, stride=module.stride)
    with scope("expand"):
        body = TORCH.conv(relu(TORCH.norm(h)), module.out, 1)
    if weight is None:
        return body, x
    with scope("shortcut"):
        return body, TORCH.conv(a, module.out, 1, stride=module.stride, weight=weight)


def _joined(body: Value, shortcut: Value, readers: int) -> Value:
    """F + S / K'."""
    return merge_sum(body, shortcut * (1.0 / readers) if readers > 1 else shortcut, name="sum")


def _head(blocks: list[Value], preact: bool, classes: int) -> Value:
    with scope("head"):
        h = merge_sum(*blocks, name="merge")
        h = relu(TORCH.norm(h) if preact else h, name="relu")
    return TORCH.head(h, classes)
