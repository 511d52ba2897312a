"""Branches that keep their own part of the channels of common layers (arXiv 1803.05872).

A layer keeps its d channels and its weights exist once. With the overlap r, B branches have

    x = round(d / (1 + B (1/r - 1)))  channels in common,      x = 0 where r = 0
    m = round(x (1/r - 1))            of each branch alone,    m = round(d / B) where r = 0

Branch b keeps channels 0 to x - 1 and x + b m to x + (b + 1) m - 1, the last branch all that are
left; where a channel is not kept, `select(y, mask_b)` is 0 behind every layer, every batch norm and
every op that does not keep zeros. A concatenation has the masks of its parts. The last layers, the
heads, exist once a branch and keep all their outputs; so do running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import prod

from branchgraph.ir.builder import concat, gate
from branchgraph.ir.errors import RefusalError
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.ops.activation import Elu, LeakyRelu, Relu, Tanh
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import Multiply
from branchgraph.ir.ops.gate import ScaleGradient, Select
from branchgraph.ir.ops.merge import Concat, Maximum, Mean, Product, Sum
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.random import Dropout
from branchgraph.ir.ops.reduce import ReduceMax, ReduceMean, ReduceSum
from branchgraph.ir.ops.reshape import Pad, Reshape
from branchgraph.passes.clean import nodes_below
from branchgraph.passes.share_weights.branch_copies import BranchCopy, Origin
from branchgraph.passes.share_weights.channel_halves import LAYERS, NORMS, refuse

#: Who keeps a channel: the number of a branch from 0, or ALL.
Owners = tuple[int, ...]
ALL = -1

#: Ops that give 0 in a channel in which all their operands are 0.
_KEEP_ZEROS = (
    Relu, LeakyRelu, Elu, Tanh, Multiply, Select, ScaleGradient, Sum, Mean, Product, Maximum,
    MaxPool, AveragePool, Dropout, ReduceSum, ReduceMean, ReduceMax, Reshape, Pad, Concat,
)  # fmt: skip


def owners(channels: int, branches: int, overlap: float) -> Owners:
    """Who keeps each channel of a layer."""
    if overlap == 0:
        common, own = 0, round(channels / branches)
    else:
        common = round(channels / (1 + branches * (1 / overlap - 1)))
        own = round(common * (1 / overlap - 1))
    if own == 0:
        if common < channels:
            raise RefusalError(
                f"{channels} channels are too few for {branches} branches that overlap {overlap}"
            )
        return (ALL,) * channels
    rest = (min(k // own, branches - 1) for k in range(channels - common))
    found = (*(ALL,) * common, *rest)
    if not common and len(set(found)) < branches:
        raise RefusalError(f"{channels} channels are too few for {branches} branches")
    return found


def heads(nodes: Sequence[Node]) -> set[Node]:
    """Layers that no other layer depends on."""
    layers = [n for n in nodes if isinstance(n.op, LAYERS)]
    inner = {n for layer in layers for n in nodes_below([layer]) if n is not layer}
    return set(layers) - inner


class Masks:
    """Who keeps the channels of every value, the same in all branches."""

    def __init__(self, nodes: Sequence[Node], branches: int, overlap: float) -> None:
        self.branches = branches
        self.overlap = overlap
        self.heads = heads(nodes)
        self.owners: dict[Value, Owners | None] = {}
        inside = set(nodes)
        for node in nodes:
            for value in node.inputs:
                if value.producer is not None and value.producer not in inside:
                    self.owners[value] = self._of_trunk(value)
            self.owners[node.outputs[0]] = self._of_node(node)

    def _of_trunk(self, value: Value) -> Owners | None:
        size = value.shape[1] if len(value.shape) > 1 else None
        return owners(size, self.branches, self.overlap) if isinstance(size, int) else None

    def _of_node(self, node: Node) -> Owners | None:
        x = self.owners.get(node.inputs[0]) if node.inputs else None
        if isinstance(node.op, LAYERS):
            if node.op.attributes().get("groups", 1) != 1:
                refuse(node, "masks of a grouped convolution would cut groups")
            n = node.output.shape[1]
            return None if node in self.heads else owners(int(n), self.branches, self.overlap)  # type: ignore[arg-type]
        if isinstance(node.op, NORMS):
            return x
        if isinstance(node.op, Concat) and node.op.axis == 1:
            return self._joined(node)
        if isinstance(node.op, Reshape):
            return self._reshaped(node, x)
        return self._common(node)

    def _joined(self, node: Node) -> Owners | None:
        parts = [(v, self.owners.get(v)) for v in node.inputs]
        if all(p is None for _, p in parts):
            return None
        every = (p or (ALL,) * int(v.shape[1]) for v, p in parts)  # type: ignore[arg-type]
        return tuple(o for part in every for o in part)

    def _reshaped(self, node: Node, x: Owners | None) -> Owners | None:
        old, new = node.inputs[0].shape, node.output.shape
        if x is None:
            return None
        inner = prod(d for d in old[2:] if isinstance(d, int))
        if old[0] == new[0] and new[1] == len(x):
            return x
        if old[0] == new[0] and new[1] == len(x) * inner:
            return tuple(o for o in x for _ in range(inner))
        return refuse(node, "a reshape other than flattening cannot be masked")

    def _common(self, node: Node) -> Owners | None:
        """Operands with as many channels as the result agree on who keeps them."""
        y = node.outputs[0].shape
        masked = [(v, o) for v in node.inputs if (o := self.owners.get(v)) is not None]
        if not masked:
            return None
        if any(len(v.shape) < 2 or y[1:2] != (len(o),) for v, o in masked):
            refuse(node, "it mixes channels that different branches keep")
        beside = [v for v in node.inputs if self.owners.get(v) is None and v.shape[1:2] == y[1:2]]
        if len({o for _, o in masked}) > 1 or beside:
            refuse(node, "its operands have different masks")
        return masked[0][1]


class MaskedBranch(BranchCopy):
    """One branch of common layers."""

    def __init__(
        self, graph: Graph, number: int, origin: Origin, mapped: dict[Value, Value], streams: int,
        masks: Masks,
    ) -> None:  # fmt: skip
        super().__init__(graph, number, origin, mapped, streams)
        self.masks = masks

    def trunk(self, value: Value) -> None:
        """Let the branch read its part of a value of the trunk."""
        self.mapped[value] = self._masked(value, self.masks.owners[value])

    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        operands = list(inputs)
        if node in self.masks.heads:
            operands[1:] = [self._own_whole(v) for v in inputs[1:]]
        elif isinstance(node.op, NORMS):
            operands[3:] = [self._own_whole(v) for v in inputs[3:]]
        first, *rest = super().visit(node, tuple(operands))
        if not isinstance(node.op, _KEEP_ZEROS):
            first = self._masked(first, self.masks.owners[node.outputs[0]])
        return (first, *rest)

    def _own_whole(self, value: Value) -> Value:
        assert value.state is not None
        return self.own(value.state, range(value.state.shape[0]))

    def _masked(self, value: Value, kept: Owners | None) -> Value:
        if kept is None or all(o in (ALL, self.number - 1) for o in kept):
            return value
        tail = (1,) * (len(value.shape) - 2)
        parts = [
            self.graph.emit(Full(float(is_open), (len(list(run)), *tail), value.dtype))
            for is_open, run in groupby(o in (ALL, self.number - 1) for o in kept)
        ]
        mask = concat(*parts, axis=0) if len(parts) > 1 else parts[0]
        name = value.producer.name if value.producer else ""
        return gate(value, mask, name=f"{name}.mask" if name else "mask")
