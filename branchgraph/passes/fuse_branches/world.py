"""The graph that is rewritten, what may be done to it, and what is known of its values.

    fixed       depends on states and constants, so it is the same for every input
    constant    depends on constants, so it is the same for every store
    unfed       depends on no input, but perhaps on the size of the batch; a dense layer whose
                weight is the constant 0 makes its bias of whatever it reads

A value that is unfed is the same for all samples if its rows are alike. `row` gives such a row:

    full, broadcast_to   a row of them
    reshape              of one row, where samples stay apart
    dense, weight 0      its bias
    an op by rows        of one row of what carries the batch

so weights of branches that are written for a whole batch are found to be one number a branch
(ParaDise, 3.3 (v): A2 = 0, or a constant mixture).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from branchgraph.ir.dims import DimLike
from branchgraph.ir.extract import extract
from branchgraph.ir.functions import broadcast_to
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.reduce import BroadcastTo
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.state import Store
from branchgraph.passes.fuse_branches.layer import Layer, Lazy, once, reshaped

#: Operands that a property of a node's values follows from; None where it does not hold.
_Needs = Callable[[Node], Iterable[Value] | None]


class _Property:
    """A property of values that holds for leaves or not, and else follows from operands."""

    def __init__(self, leaf: Callable[[Value], bool], needs: _Needs) -> None:
        self._leaf = leaf
        self._needs = needs
        self._known: dict[Value, bool] = {}

    def holds(self, value: Value) -> bool:
        pending = [] if value in self._known else [value]
        while pending:
            v = pending[-1]
            needs = self._needs(v.producer) if v.producer is not None else None
            if v.producer is None:
                self._known[v] = self._leaf(v)
            elif needs is None:
                self._known[v] = False
            else:
                listed = list(needs)
                left = [i for i in listed if i not in self._known]
                if left:
                    pending += left
                    continue
                self._known[v] = all(self._known[i] for i in listed)
            pending.pop()
        return self._known[value]


def _plain(node: Node) -> Iterable[Value] | None:
    op = node.op
    return None if op.declared or op.introduces or op.symbolic else node.inputs


def _without_zeros(node: Node) -> Iterable[Value] | None:
    if node.op.declared or node.op.introduces:
        return None
    return node.inputs[2:] if _ignores_x(node) else node.inputs


def _is_state(value: Value) -> bool:
    return value.state is not None


@dataclass(frozen=True, eq=False)
class World:
    """A graph under rewriting and the options of the pass."""

    graph: Graph
    enabled: frozenset[str]
    bias_maps: bool
    grow: bool
    #: Whether a shift before padding may stay, if no scale is 0 under `values`.
    pad_values: bool = False
    values: Store | None = None
    _fixed: _Property = field(default_factory=lambda: _Property(_is_state, _plain))
    _constant: _Property = field(default_factory=lambda: _Property(lambda v: False, _plain))
    _unfed: _Property = field(default_factory=lambda: _Property(_is_state, _without_zeros))

    def fixed(self, value: Value) -> bool:
        """Whether a value depends on states and constants only."""
        return self._fixed.holds(value)

    def constant(self, value: Value) -> bool:
        """Whether a value depends on constants only."""
        return self._constant.holds(value)

    def row(self, value: Value) -> Lazy | None:
        """A fixed row [1, ...] that all rows of `value` equal, if there is one."""
        if not value.shape or not self._unfed.holds(value):
            return None
        return self._row(value, value.shape[0])

    def _row(self, value: Value, batch: DimLike) -> Lazy | None:
        node = value.producer
        if node is None or not value.shape or value.shape[0] != batch or len(node.outputs) > 1:
            return None
        shape = (1, *value.shape[1:])
        emit = value.graph.emit
        if isinstance(node.op, Full):
            full = Full(value=node.op.value, shape=shape, dtype=value.dtype)
            return once(lambda: emit(full))
        if _ignores_x(node):
            bias = node.inputs[2:]
            nothing = Full(value=0.0, shape=shape, dtype=value.dtype)
            return once(lambda: reshaped(bias[0], shape) if bias else emit(nothing))
        if isinstance(node.op, (BroadcastTo, Reshape)):
            return self._reshaped_row(node, batch, shape)
        return self._row_of_operands(node, batch)

    def _reshaped_row(self, node: Node, batch: DimLike, shape: tuple[DimLike, ...]) -> Lazy | None:
        (x,) = node.inputs
        if isinstance(node.op, Reshape):
            inner = self._row(x, batch)
            return once(lambda: reshaped(inner(), shape)) if inner else None
        repeated = len(x.shape) < len(shape) or x.shape[0] == 1
        source = (lambda: x) if repeated and self.fixed(x) else self._row(x, batch)
        return once(lambda: broadcast_to(source(), shape)) if source else None

    def _row_of_operands(self, node: Node, batch: DimLike) -> Lazy | None:
        """An op by rows, of one row of the operands that have rows, the others as they are."""
        parts = [self._row(v, batch) for v in node.inputs]
        rows = tuple(part is not None for part in parts)
        whole = all(part or self.fixed(v) for v, part in zip(node.inputs, parts))
        types = tuple(v.type for v in node.inputs)
        if not whole or not any(rows) or node.op.symbolic or not node.op.row_wise(types, rows):
            return None
        emit = node.graph.emit
        return once(
            lambda: emit(node.op, *(part() if part else v for v, part in zip(node.inputs, parts)))
        )

    def has_zero(self, value: Value) -> bool:
        """Whether an element of a fixed value is 0 under the values of the states."""
        assert self.values is not None
        found = interpret(extract([value], ()), store=self.values).outputs["y0"]
        return bool((found == 0).any())

    def private(self, value: Value, reader: Node) -> bool:
        """Whether nobody but `reader` reads the value."""
        return value.users == [reader] and value not in self.graph.roots

    def allows(self, layer: Layer) -> bool:
        """Whether all rules that led to the layer may be used."""
        return layer.rules <= self.enabled


def _ignores_x(node: Node) -> bool:
    """Whether a dense layer has the constant weight 0, or nothing to weigh."""
    if not isinstance(node.op, Dense):
        return False
    weight = node.inputs[1]
    return _zero(weight) or weight.type.size == 0


def _zero(value: Value) -> bool:
    """Whether a value is the constant 0, perhaps under another shape."""
    node = value.producer
    while node is not None and isinstance(node.op, (Reshape, BroadcastTo)):
        node = node.inputs[0].producer
    return node is not None and isinstance(node.op, Full) and node.op.value == 0
