"""The branches of `share_weights` whose weights are assembled from blocks (see `ir.sharing`).

Two lowerings compute the same. `assembled` multiplies by the whole matrix of a branch. `stacked`
applies what is shared once, to the shared halves p_i of all branches, one after another in the
batch, or to the value that all of them read:

    c = [p_1; ...; p_B] W_ss + b_s                     y_i = [c_i + q_i W_us_i | x_i W_u_i + b_u_i]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from branchgraph.ir.builder import concat, merge_sum
from branchgraph.ir.graph import Graph, Node, Scope, Value, at
from branchgraph.ir.initialisers import Zeros
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.sharing import Block, Cut, Halves, SharedReads, channel_state, concatenate
from branchgraph.ir.state import State
from branchgraph.passes.share_weights.branch_copies import BranchCopy, Origin, Positions
from branchgraph.passes.share_weights.channel_halves import (
    LAYERS,
    NORMS,
    Channels,
    Followed,
    taken,
)

#: The positions of a block of a state.
_At = Callable[[str], Positions]
#: Blocks whose bias of the legacy layout starts at 0 where another block of the half has it all.
_SECOND = ("us", "uu")


@dataclass
class Blocks:
    """The blocks that all branches share, by the state they are cut from."""

    reads: SharedReads
    origin: Origin
    states: dict[tuple[State, str], State] = field(default_factory=dict)

    def read(self, old: State, part: str, shape: tuple[int, ...], positions: Positions) -> Value:
        """A shared block; a state that is whole and in order goes on serving."""
        if (old, part) not in self.states:
            name = f"{old.name}_{part}" if part else old.name
            self.states[old, part] = new = (
                old if _keeps(old, positions) else _state(old, name, shape)
            )
            if new is not old:
                self.origin.cut(new, old, positions)
        return self._named(self.states[old, part])

    def _named(self, state: State) -> Value:
        """The state as it is read; the node that scales its gradient has its name."""
        *scopes, last = state.name.split("/")
        with at(tuple(map(Scope, scopes))):
            value = self.reads.read(state)
        if value.producer is not None:
            value.producer.name = last
        return value


class QuadrantBranch(BranchCopy):
    """One branch whose layers have shared and unique channels."""

    def __init__(
        self, graph: Graph, number: int, origin: Origin, mapped: dict[Value, Value], streams: int,
        followed: Followed, blocks: Blocks, legacy_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__(graph, number, origin, mapped, streams)
        self.followed = followed
        self.blocks = blocks
        self.legacy_bias = legacy_bias
        #: The shared part of layers, in the stacked lowering.
        self.stacked: dict[Node, Value] = {}
        self._assembled: dict[State, Value] = {}
        self._own_blocks: dict[tuple[State, str], Value] = {}

    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        if isinstance(node.op, LAYERS):
            return self._layer(node, inputs[0])
        if isinstance(node.op, NORMS):
            return self._norm(node, inputs[0])
        if isinstance(node.op, Concat) and node.op.axis == 1:
            return self._concat(node, inputs)
        return super().visit(node, inputs)

    def _layer(self, node: Node, x: Value) -> tuple[Value, ...]:
        layer = self.followed.layers[node]
        if node in self.stacked:
            return (self._beside(node, layer.cut, x, self.stacked[node]),)
        weight, *bias = (_state_of(v) for v in node.inputs[1:])
        operands = [x]
        if weight not in self._assembled:
            made = layer.cut.weight(self._weight_block(node), weight.shape[2:])
            self._assembled[weight] = self._named(made, node, 1)
        operands.append(self._assembled[weight])
        for b in bias:
            if b not in self._assembled:
                made = layer.cut.bias(self._bias_block(node), per_block=self.legacy_bias)
                self._assembled[b] = self._named(made, node, 2)
            operands.append(self._assembled[b])
        return self.applied(node, *operands)

    def _weight_block(self, node: Node) -> Block:
        """The blocks of the weight of a layer."""
        layer = self.followed.layers[node]
        cut, columns = layer.cut, layer.reads.order
        rows = tuple(range(cut.s + cut.u))

        def weight_at(part: str) -> Positions:
            return ((0, _half(rows, part[-1:], cut.s)), (1, _half(columns, part[:1], cut.a)))

        return self._block(_state_of(node.inputs[1]), weight_at)

    def _bias_block(self, node: Node) -> Block:
        """The blocks of its bias."""
        cut = self.followed.layers[node].cut
        rows = tuple(range(cut.s + cut.u))

        def bias_at(part: str) -> Positions:
            return ((0, _half(rows, part[-1:], cut.s)),)

        second = _SECOND if self.legacy_bias and cut.a else ()
        return self._block(_state_of(node.inputs[2]), bias_at, second)

    # -- the stacked lowering ----------------------------------------------------------------------

    def shares(self, node: Node) -> bool:
        """Whether a layer has a block that is shared."""
        layer = self.followed.layers.get(node)
        return layer is not None and layer.cut.s > 0 and (layer.cut.uncut or layer.cut.a > 0)

    def shared_half(self, node: Node) -> Value:
        """What the shared block of a layer reads: the shared half, or all of a whole layer."""
        cut, x = self.followed.layers[node].cut, self.mapped.get(node.inputs[0], node.inputs[0])
        return x if cut.uncut or not cut.v else taken(x, 1, range(cut.a))

    def apply_shared(self, node: Node, p: Value) -> Value:
        """The shared block and the shared bias, applied to rows of any branches."""
        cut, kernel = self.followed.layers[node].cut, _state_of(node.inputs[1]).shape[2:]
        if cut.uncut:
            operands = [cut.weight(self._weight_block(node), kernel)]
            operands += [cut.bias(self._bias_block(node)) for _ in node.inputs[2:]]
        else:
            operands = [self._weight_block(node)("ss", (cut.s, cut.a, *kernel), True)]
            part = "ss" if self.legacy_bias else "s"
            operands += [self._bias_block(node)(part, (cut.s,), True) for _ in node.inputs[2:]]
        return self.graph.emit(node.op, p, *operands, name=node.name)

    def _beside(self, node: Node, cut: Cut, x: Value, shared: Value) -> Value:
        """The output of a layer of which the branches share the part `shared`."""
        if cut.uncut:
            return shared
        kernel = _state_of(node.inputs[1]).shape[2:]
        weight, biased = self._weight_block(node), len(node.inputs) > 2
        bias = self._bias_block(node) if biased else None
        halves = [shared]
        if cut.v:
            operands = [weight("us", (cut.s, cut.v, *kernel), False)]
            operands += [bias("us", (cut.s,), False)] if bias and self.legacy_bias else []
            q = taken(x, 1, range(cut.a, cut.a + cut.v))
            halves = [merge_sum(shared, self.graph.emit(node.op, q, *operands))]
        if cut.u:
            parts = [("su", cut.a), ("uu", cut.v)]
            blocks = [weight(k, (cut.u, n, *kernel), False) for k, n in parts if n]
            operands = [blocks[0] if len(blocks) == 1 else concat(*blocks, axis=1)]
            if bias and self.legacy_bias:
                terms = [bias(k, (cut.u,), False) for k, n in parts if n]
                operands.append(terms[0] if len(terms) == 1 else merge_sum(*terms))
            elif bias:
                operands.append(bias("u", (cut.u,), False))
            halves.append(self.graph.emit(node.op, x, *operands))
        return halves[0] if len(halves) == 1 else concat(*halves, name=node.name)

    def _norm(self, node: Node, x: Value) -> tuple[Value, ...]:
        """Scale and shift are shared in the shared half, statistics are those of the branch."""
        c = self._channels(node.inputs[0])
        halves = Halves(x, c.shared)
        scale_and_shift = []
        for k, state in enumerate(map(_state_of, node.inputs[1:3]), start=1):
            if state not in self._assembled:

                def at_half(part: str) -> Positions:
                    return ((0, _half(c.order, part, c.sizes[0])),)

                made = channel_state(halves, self._block(state, at_half))
                self._assembled[state] = self._named(made, node, k)
            scale_and_shift.append(self._assembled[state])
        statistics = [self.own(_state_of(v), c.order) for v in node.inputs[3:]]
        return self.applied(node, x, *scale_and_shift, *statistics)

    def _concat(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        channels = [self._channels(v) for v in node.inputs]
        if all(c.shared is None for c in channels):
            return super().visit(node, inputs)
        parts = (Halves(v, c.sizes[0]) for v, c in zip(inputs, channels))
        return (concatenate(*parts, name=node.name).value,)

    def _channels(self, value: Value) -> Channels:
        found = self.followed.channels[value]
        assert found is not None, value
        return found

    def _named(self, value: Value, node: Node, operand: int) -> Value:
        """An expression is called after the layer and the operand it is for."""
        if value.producer is not None and not value.producer.name:
            kind = node.op.operands[operand].rstrip("?")
            value.producer.name = f"{node.name}.{kind}" if node.name else kind
        return value

    def _block(self, old: State, at_part: _At, second: tuple[str, ...] = ()) -> Block:
        """The blocks of a state: of all branches, or of this one."""

        def block(part: str, shape: tuple[int, ...], shared: bool) -> Value:
            positions = at_part(part)
            if shared:
                return self.blocks.read(old, part, shape, positions)
            if (old, part) in self._own_blocks:
                return self._own_blocks[old, part]
            name = f"{self.name}/{old.name}" + (f"_{part}" if part else "")
            new = _state(old, name, shape, zero=part in second)
            if part in second:
                self.origin.zero(new)
            else:
                self.origin.cut(new, old, positions)
            self.states.append(new)
            self._own_blocks[old, part] = self.graph.read(new)
            return self._own_blocks[old, part]

        return block


def once(node: Node, branches: Sequence[QuadrantBranch]) -> bool:
    """Copy a node without states of its own once, if all branches read the same: a shared prefix.

    Random draws and statistics are those of each branch.
    """
    if isinstance(node.op, (*LAYERS, *NORMS)) or hasattr(node.op, "stream"):
        return False
    first, *others = (tuple(b.mapped.get(v, v) for v in node.inputs) for b in branches)
    if any(inputs != first for inputs in others):
        return False
    types = (v.type for v in node.outputs)
    outputs = node.graph.insert(node.op, first, types, node.name, node.scope)
    for branch in branches:
        branch.mapped.update(zip(node.outputs, outputs))
    return True


def stack(node: Node, branches: Sequence[QuadrantBranch]) -> None:
    """Apply the shared block of `node` once for all branches, outside of them.

    Branches that read one value have one result; else their rows are stacked: [N, ...] of each to
    [B N, ...] and back.
    """
    if not branches[0].shares(node):
        return
    read = []
    for branch in branches:
        with at(branch.place(node.scope)):
            read.append(branch.shared_half(node))
    first, count = branches[0], len(branches)
    with at(node.scope):
        if len(set(read)) == 1:
            results = [first.apply_shared(node, read[0])] * count
        else:
            results = _rows(first.apply_shared(node, _stacked(read)), count, read[0])
    for branch, result in zip(branches, results):
        branch.stacked[node] = result


def _stacked(values: Sequence[Value]) -> Value:
    """[N, ...] of each branch as [B N, ...], by way of [B, N, ...]."""
    graph, (rows, *rest) = values[0].graph, values[0].shape
    apart = [graph.emit(Reshape(shape=(1, rows, *rest)), v) for v in values]
    return graph.emit(Reshape(shape=(rows * len(values), *rest)), concat(*apart, axis=0))


def _rows(stacked: Value, branches: int, like: Value) -> list[Value]:
    """The rows [N, ...] of each branch."""
    shape = (like.shape[0], *stacked.shape[1:])
    apart = stacked.graph.emit(Reshape(shape=(branches, *shape)), stacked)
    return [
        stacked.graph.emit(Reshape(shape=shape), taken(apart, 0, (k,))) for k in range(branches)
    ]


def _half(positions: tuple[int, ...], half: str, shared: int) -> tuple[int, ...]:
    """The first positions for the half `s`, the last for `u`, all without a half."""
    return {"": positions, "s": positions[:shared], "u": positions[shared:]}[half]


def _keeps(old: State, positions: Positions) -> bool:
    """Whether `positions` are all of a state, in order."""
    return all(chosen == tuple(range(old.shape[axis])) for axis, chosen in positions)


def _state(old: State, name: str, shape: tuple[int, ...], zero: bool = False) -> State:
    """A block of `old`, drawn as the whole is: initialisers say the fans of the whole layer."""
    return State(name, shape, old.dtype, old.role, Zeros() if zero else old.init)


def _state_of(value: Value) -> State:
    assert value.state is not None, value
    return value.state
