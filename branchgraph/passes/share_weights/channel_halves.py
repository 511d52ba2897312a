"""Following the halves of channels through a plain network.

In a branch, axis 1 of a value holds the shared channels first. Position k holds the channel
`order[k]` of the plain network; the two orders differ behind a concatenation of halves, where

    plain      c0 | g1 | ...
    branch     c0 shared, g1 shared, ... | c0 unique, g1 unique, ...

A layer with weights (convolution, dense) starts a new order. Ops that work on every channel by
itself keep it; flattening repeats each channel H W times; ops over several values need one order
and one number of shared channels in all of them. A plain value (an input, a sum over channels)
takes the halves of what it is joined with, and counts as shared where nothing else says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn

from branchgraph.ir.builder import concat
from branchgraph.ir.errors import GraphError, RefusalError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import Op
from branchgraph.ir.ops.activation import LogSoftmax, Softmax
from branchgraph.ir.ops.constant import Extent, Full
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.deep import Resize
from branchgraph.ir.ops.elementwise import Binary, Cast, Compare, LogicalAnd, Unary, Where
from branchgraph.ir.ops.exit import Exit
from branchgraph.ir.ops.gate import ScaleGradient, Select, StraightThrough
from branchgraph.ir.ops.index import Flip
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.merge import Concat, Maximum, Mean, Product, Sum
from branchgraph.ir.ops.mode import ByMode, Noise
from branchgraph.ir.ops.norm import (
    BatchNorm,
    BatchNormInference,
    BatchNormTraining,
    LocalResponseNorm,
)
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.random import Dropout
from branchgraph.ir.ops.reduce import BroadcastTo, ReduceMax, ReduceMean, ReduceSum
from branchgraph.ir.ops.reshape import Embed, Pad, Reshape, Slice
from branchgraph.ir.sharing import Cut, shared_channels
from branchgraph.ir.state import State
from branchgraph.ir.static import static_values

#: Layers whose weights are cut into blocks, and norms with one number a channel.
LAYERS = (Conv, Dense)
NORMS = (BatchNorm, BatchNormTraining, BatchNormInference)


@dataclass(frozen=True)
class Channels:
    """What axis 1 of a value in a branch holds; `shared` is None for a plain value."""

    order: tuple[int, ...]
    shared: int | None = None

    @property
    def in_order(self) -> bool:
        """Whether the channels stand as in the plain network."""
        return self.order == tuple(range(len(self.order)))

    @property
    def sizes(self) -> tuple[int, int]:
        """Shared and unique channels; a plain value counts as shared."""
        a = len(self.order) if self.shared is None else self.shared
        return a, len(self.order) - a

    def __str__(self) -> str:
        return "plain" if self.shared is None else f"{self.sizes[0]}+{self.sizes[1]}"


@dataclass(frozen=True)
class Layer:
    """A convolution or dense layer: how it is cut, and what it reads."""

    cut: Cut
    reads: Channels


@dataclass
class Followed:
    """Channels of values, and layers by their nodes."""

    channels: dict[Value, Channels | None] = field(default_factory=dict)
    layers: dict[Node, Layer] = field(default_factory=dict)


def refuse(node: Node, reason: str) -> NoReturn:
    """Decline, naming the node."""
    raise RefusalError(f"{node.path or node.op.opcode}: {reason}")


def plain(value: Value) -> Channels | None:
    """The channels of a value without halves; None if it has no number of channels."""
    size = value.shape[1] if len(value.shape) > 1 else None
    return Channels(tuple(range(size))) if isinstance(size, int) else None


def follow(
    nodes: Sequence[Node], shares: Mapping[Node, float], merged: Collection[Node] = (),
    legacy: bool = False, shared_inputs: bool = False,
) -> Followed:  # fmt: skip
    """Channels of all values of `nodes`; `shares` has the fraction of every layer.

    The halves that `merged` nodes make are merged into plain values. With `legacy`, convolutions
    larger than 1x1 are never one matrix for all. Inputs are plain, or shared whole.

    Raises `RefusalError` where the halves cannot be followed.
    """
    known, inside = Followed(), set(nodes)
    static = static_values(nodes[0].graph) if nodes else set()
    cuts: dict[State, tuple[Node, object]] = {}
    for node in nodes:
        for value in node.inputs:
            if value not in known.channels:
                outside = value.producer is not None and value.producer not in inside
                found = plain(value) if value.is_input or outside else None
                if found is not None and shared_inputs:
                    found = Channels(found.order, len(found.order))
                known.channels[value] = found
        x = known.channels[node.inputs[0]] if node.inputs else None
        if isinstance(node.op, LAYERS):
            layer = _layer(node, x, shares[node], legacy)
            s, u = layer.cut.s, layer.cut.u
            known.layers[node] = layer
            known.channels[node.output] = Channels(tuple(range(s + u)), s)
            _cut_once(node, (layer.cut, layer.reads.order), cuts)
        elif isinstance(node.op, NORMS):
            known.channels[node.outputs[0]] = _norm(node, x)
            _cut_once(node, x, cuts)
        elif node.outputs[0] in static:
            known.channels[node.outputs[0]] = None
        else:
            _reads_no_states(node, static)
            operands = [known.channels[v] for v in node.inputs]
            known.channels[node.outputs[0]] = _rule_of(node)(node, operands)
        if node in merged:
            known.channels[node.outputs[0]] = _merged(node, known.channels[node.outputs[0]])
    return known


def _merged(node: Node, c: Channels | None) -> Channels:
    """The half merge: both halves as one plain value."""
    if c is None or not c.in_order:
        refuse(node, "halves can be merged only where channels stand as in the plain network")
    return Channels(c.order)


def _cut_once(node: Node, cut: object, cuts: dict[State, tuple[Node, object]]) -> None:
    """A state that two layers read must be cut the same way in both."""
    for name, value in zip(node.op.operands[1:], node.inputs[1:]):
        if value.state is None:
            refuse(
                node,
                f"its {name.rstrip('?')} is no state but an expression; materialise it, or share "
                "weights before the pass that wrote it",
            )
        first, before = cuts.setdefault(value.state, (node, cut))
        if before != cut:
            refuse(node, f"it reads {value.label} as {first.path} does, but their halves differ")


def _layer(node: Node, x: Channels | None, share: float, legacy: bool = False) -> Layer:
    n, inner = (d for d in node.inputs[1].shape[:2] if isinstance(d, int))
    if x is None:
        refuse(node, f"it reads {node.inputs[0].label}, which has no number of channels")
    try:
        s = shared_channels(int(share) if share > 1 else share, n)
    except GraphError as error:
        refuse(node, str(error))
    groups = node.op.groups if isinstance(node.op, Conv) else 1
    if groups == 1:
        area = prod(d for d in node.inputs[1].shape[2:] if isinstance(d, int))
        return Layer(Cut(*x.sizes, s, n - s, whole=area == 1 or not legacy), x)
    if not x.in_order or 0 < s < n:
        refuse(
            node,
            f"its {groups} groups would be cut; share all or nothing of it, and do the same with "
            "concatenations before it",
        )
    return Layer(Cut(inner, 0, s, n - s), Channels(tuple(range(inner))))


def _norm(node: Node, x: Channels | None) -> Channels:
    if x is None:
        refuse(node, f"it reads {node.inputs[0].label}, which has no number of channels")
    if any(v.users or v in node.graph.roots for v in node.outputs[1:]):
        refuse(node, "its batch statistics are read; share weights before specialising")
    return x


def _reads_no_states(node: Node, static: Collection[Value]) -> None:
    for value in node.inputs:
        if value in static:
            refuse(node, f"it reads the state {value.label}; only layers and norms can share")


def _rule_of(node: Node) -> _Rule:
    rule = next((_RULES[c] for c in type(node.op).__mro__ if c in _RULES), None)
    if rule is None:
        refuse(node, f"halves cannot be followed through {node.op.opcode}")
    return rule


# -- one rule for each kind of op ------------------------------------------------------------------


def _same(node: Node, found: list[Channels | None]) -> Channels | None:
    return found[0]


def _constant(node: Node, found: list[Channels | None]) -> Channels | None:
    """A constant, or independent draws: alike in every channel."""
    return None


def _elementwise(node: Node, found: list[Channels | None]) -> Channels | None:
    """One order and one split; operands with a single channel are repeated."""
    y = node.outputs[0].shape
    present: list[Channels] = []
    for value, c in zip(node.inputs, found):
        if c is None or (len(c.order) == 1 and y[1:2] != (1,)):
            continue
        if len(value.shape) != len(y):
            refuse(node, f"{value.label} is broadcast along other axes than its own")
        present.append(c)
    if not present:
        return None
    joint = next((c for c in present if c.shared is not None), present[0])
    if any(c.shared not in (None, joint.shared) for c in present):
        refuse(
            node,
            f"halves differ (shared+unique channels: {', '.join(map(str, present))}); share as "
            "much in all layers that it joins",
        )
    if any(c.order != joint.order for c in present):
        refuse(node, "its operands have their channels in different orders")
    return joint


def _reduce(node: Node, found: list[Channels | None]) -> Channels | None:
    axes, keep = _attributes(node)["axes"], _attributes(node)["keepdims"]
    if 0 in axes and not keep:
        refuse(node, "it reduces the batch, which moves the channels to another axis")
    return plain(node.outputs[0]) if 1 in axes else found[0]


def _spatial(node: Node, found: list[Channels | None]) -> Channels | None:
    """An op along one axis, which must not be the channels'."""
    if _attributes(node)["axis"] == 1:
        refuse(node, f"{node.op.opcode} along the channels would mix their halves")
    return found[0]


def _pad(node: Node, found: list[Channels | None]) -> Channels | None:
    """Channels that are added belong to the one half there is."""
    (c,), new = found, plain(node.output)
    if c is None or new is None or len(c.order) == len(new.order):
        return c
    if c.shared not in (None, 0, len(c.order)) or not c.in_order:
        refuse(node, f"it adds channels to halves of {c}; share all or nothing before it")
    return Channels(new.order, c.shared and len(new.order))


def _neighbours(node: Node, found: list[Channels | None]) -> Channels | None:
    if found[0] and not found[0].in_order:
        refuse(node, "it reads neighbouring channels, whose order a concatenation changed")
    return found[0]


def _concat(node: Node, found: list[Channels | None]) -> Channels | None:
    if _attributes(node)["axis"] != 1:
        return _elementwise(node, found)
    parts: list[tuple[int, Channels]] = []
    start = 0
    for value, c in zip(node.inputs, found):
        if c is None:
            refuse(node, f"{value.label} has no number of channels")
        parts.append((start, c))
        start += len(c.order)
    if all(c.shared is None for _, c in parts):
        return Channels(tuple(range(start)))
    shared = [o + k for o, c in parts for k in c.order[: c.sizes[0]]]
    unique = [o + k for o, c in parts for k in c.order[c.sizes[0] :]]
    return Channels((*shared, *unique), len(shared))


def _reshape(node: Node, found: list[Channels | None]) -> Channels | None:
    """[N, C, rest] to [N, C, other] or [N, C rest]; [N, C rest] to [N, C, rest]."""
    (x,), (y,), (c,) = node.inputs, node.outputs, found
    new = y.shape[1] if len(y.shape) > 1 else None
    if c is None or (c.shared is None and x.shape[0] == y.shape[0]):
        return plain(y)
    if x.shape[0] != y.shape[0] or not isinstance(new, int) or not new:
        refuse(node, "it does not keep the batch and the channels on their axes")
    old = len(c.order)
    inner = [d for d in x.shape[2:] if isinstance(d, int)]
    if new == old:
        return c
    if len(inner) == len(x.shape) - 2 and new == old * prod(inner):
        return _repeated(c, prod(inner))
    blocks = _grouped(c, old // new) if old % new == 0 and not inner else None
    if blocks is None:
        refuse(node, f"a reshape to {y.type} cuts across the halves of {c} channels")
    return blocks


def _repeated(c: Channels, times: int) -> Channels:
    """Each channel becomes a block of `times`."""
    order = tuple(k * times + j for k in c.order for j in range(times))
    return Channels(order, None if c.shared is None else c.shared * times)


def _grouped(c: Channels, size: int) -> Channels | None:
    """Blocks of `size` become channels, if none is torn: the inverse of `_repeated`."""
    shared = None if c.shared is None else c.shared // size
    whole = Channels(tuple(k // size for k in c.order[::size]), shared)
    return whole if _repeated(whole, size) == c else None


def _exit(node: Node, found: list[Channels | None]) -> Channels | None:
    refuse(
        node,
        "an exit decides for the whole network; remove_exits first, or insert exits into a branch "
        "that split_ensemble took out",
    )


def _attributes(node: Node) -> dict[str, Any]:
    return node.op.attributes()


_Rule = Callable[[Node, list["Channels | None"]], "Channels | None"]
_RULES: dict[type[Op], _Rule] = {
    **dict.fromkeys((Full, Extent, Noise), _constant),
    **dict.fromkeys((Unary, Cast, Dropout, MaxPool, AveragePool, Resize), _same),
    **dict.fromkeys((Softmax, LogSoftmax, ScaleGradient), _same),
    **dict.fromkeys((Binary, Compare, Where, LogicalAnd, Select, StraightThrough), _elementwise),
    **dict.fromkeys((Sum, Mean, Product, Maximum, ByMode, BroadcastTo), _elementwise),
    **dict.fromkeys((ReduceSum, ReduceMean, ReduceMax), _reduce),
    **dict.fromkeys((Slice, Flip), _spatial),
    **dict.fromkeys((Pad, Embed), _pad),
    LocalResponseNorm: _neighbours,
    Concat: _concat,
    Reshape: _reshape,
    Exit: _exit,
}


# -- positions as slices ---------------------------------------------------------------------------


def runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and size of consecutive positions: 4 5 6 0 1 are (4, 3) and (0, 2)."""
    start = 0
    for k in range(1, len(positions) + 1):
        if k == len(positions) or positions[k] != positions[k - 1] + 1:
            yield positions[start], k - start
            start = k


def taken(value: Value, axis: int, positions: Sequence[int]) -> Value:
    """The elements of `value` at `positions` along `axis`: slices, one after another."""
    cuts = [
        value.graph.emit(Slice(axis=axis, start=start, size=size), value)
        for start, size in runs(positions)
    ]
    return cuts[0] if len(cuts) == 1 else concat(*cuts, axis=axis)
