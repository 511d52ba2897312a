"""The weights of a plain network, sliced for a branched one (vbranch, section 3).

All branches start as the plain network. A shared half takes the first channels of a state and a
unique half the last, counted in the channel order of the branched network. That order differs from
the plain one behind a concatenation, where it is

    plain      c0 | g1 | g2 | ...
    branched   c0 shared, g1 shared, ... | c0 unique, g1 unique, ...

so it is followed through the graph and the input channels of what reads it are permuted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Node, Scope, Value, path
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.sharing import Halves
from branchgraph.ir.state import State, Store

#: The plain position of each channel of a value.
Order = np.ndarray


@dataclass(frozen=True)
class Layer:
    """What slicing a layer takes: the order in which channels reach it, and how many leave it."""

    order: Order
    outputs: int


_KIND = re.compile(r"(?P<kind>weight|bias|gamma|beta)_(?P<halves>[su]{1,2})")

#: Biases of the legacy layout that come beside one from the shared input half.
_SECOND = ("us", "uu")


def slice_into(plain: Graph, weights: Store, branched: Graph) -> Store:
    """A store for `branched` in which every branch computes what `plain` does with `weights`.

    Both graphs are the same network, declared with one branch and with several. Where the legacy
    layout has two biases a half, the first takes the bias and the second is 0.
    """
    values = {s.name: weights[s] for s in plain.states}
    outside = _outside_names(branched)
    biases = {name for name in outside.values() if ".bias_" in name}
    layers = _layers(plain, branched)
    store = Store()
    for state, name in outside.items():
        layer, kind, halves = _parsed(name)
        if f"{layer}.{kind}" not in values:
            raise GraphError(f"{plain.name} has no state {layer}.{kind} for {state.name}")
        value = values[f"{layer}.{kind}"]
        if kind == "bias" and halves in _SECOND and f"{layer}.bias_s{halves[1]}" in biases:
            value = np.zeros_like(value)
        store[state] = _sliced(value, kind, halves, layers.get(layer), state)
    return store


def _parsed(name: str) -> tuple[str, str, str]:
    """Layer, kind and halves of a state: `conv1.weight_us` is conv1, weight, us."""
    layer, kind = name.rsplit(".", 1)
    match = _KIND.fullmatch(kind)
    return (layer, match["kind"], match["halves"]) if match else (layer, kind, "")


def _sliced(
    value: np.ndarray, kind: str, halves: str, layer: Layer | None, state: State
) -> np.ndarray:
    """The rows of the output half and the columns of the input half, in the order of the input."""
    if layer is None:
        raise GraphError(f"{state.name}: cannot tell in which order the channels reach its layer")
    columns, rows = (len(layer.order),), (layer.outputs,)
    shapes = {"weight": (*rows, *columns, *state.shape[2:]), "bias": rows}
    whole = shapes.get(kind, columns)
    if value.shape != whole:
        raise GraphError(
            f"{state.name}: the plain state is {list(value.shape)}, expected {list(whole)}"
        )
    if kind in shapes:
        value = value[_half(np.arange(layer.outputs), halves[-1:], state.shape[0])]
    if kind == "bias":
        return value
    axis = 1 if kind == "weight" else 0
    return np.take(value, _half(layer.order, halves[:1], state.shape[axis]), axis)


def _half(channels: Order, half: str, size: int) -> Order:
    """The first channels for the half `s`, the last for `u`, all without a half."""
    if not half:
        return channels
    return channels[:size] if half == "s" else channels[len(channels) - size :]


def _outside_names(branched: Graph) -> dict[State, str]:
    """States by their names without the branch."""
    branches = tuple(branched.branches())
    names = {}
    for state in branched.states:
        first, _, rest = state.name.partition("/")
        names[state] = rest if first in branches else state.name
    return names


def _outside_path(node: Node) -> str:
    """The path of a node without its branches."""
    return path(tuple(p for p in (*node.scope, Scope(node.name)) if not p.branch))


def _layers(plain: Graph, branched: Graph) -> dict[str, Layer]:
    """Layers by path; they are the same in all branches."""
    concats = {_outside_path(n): n for n in plain.nodes if isinstance(n.op, Concat) and n.name}
    orders: dict[Value, Order] = {
        x: np.arange(Halves(x).channels) for x in branched.inputs.values() if len(x.shape) > 1
    }
    layers: dict[str, Layer] = {}
    for node in branched.nodes:
        if not node.inputs or node.inputs[0] not in orders:
            continue
        where, y = _outside_path(node), node.outputs[0]
        order = _order(node, orders, concats.get(where))
        if order is not None and len(order) == y.shape[1]:
            orders[y] = order
            layers[where] = Layer(orders[node.inputs[0]], len(order))
    return layers


def _order(node: Node, orders: dict[Value, Order], plain: Node | None) -> Order | None:
    """Channel order of a node's output; None where it cannot be told."""
    order = orders[node.inputs[0]]
    if isinstance(node.op, Conv | Dense):
        return np.arange(Halves(node.output).channels)
    if isinstance(node.op, Slice) and node.op.axis == 1:
        return order[node.op.start : node.op.stop]
    if isinstance(node.op, Concat):
        return _concat_order(node, orders, plain) if plain else None
    return order


def _concat_order(node: Node, orders: dict[Value, Order], plain: Node) -> Order:
    """Each half follows the operand of the plain concatenation that it is a half of."""
    sizes = [Halves(v).channels for v in plain.inputs]
    offsets = dict(zip(map(_source, plain.inputs), accumulate(sizes, initial=0)))
    return np.concatenate([orders[v] + offsets[_source(v)] for v in node.inputs])


def _source(value: Value) -> str:
    """The path of the layer that a value, or the value it is sliced from, comes from."""
    producer = value.producer
    if producer is not None and isinstance(producer.op, Slice):
        value, producer = producer.inputs[0], producer.inputs[0].producer
    return value.name if producer is None else _outside_path(producer)
