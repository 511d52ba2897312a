"""The branches of `share_weights` whose weights are assembled from blocks (see `ir.sharing`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from branchgraph.ir.graph import Graph, Node, Scope, Value, at
from branchgraph.ir.initialisers import Zeros
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.sharing import Block, Halves, SharedReads, channel_state, concatenate
from branchgraph.ir.state import State
from branchgraph.passes.share_weights.branch_copies import BranchCopy, Origin, Positions
from branchgraph.passes.share_weights.channel_halves import LAYERS, NORMS, Channels, Followed

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
        self._assembled: dict[State, Value] = {}

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
        cut, (weight, *bias) = layer.cut, (_state_of(v) for v in node.inputs[1:])
        rows, columns = tuple(range(cut.s + cut.u)), layer.reads.order

        def weight_at(part: str) -> Positions:
            return ((0, _half(rows, part[-1:], cut.s)), (1, _half(columns, part[:1], cut.a)))

        def bias_at(part: str) -> Positions:
            return ((0, _half(rows, part[-1:], cut.s)),)

        operands = [x]
        if weight not in self._assembled:
            made = cut.weight(self._block(weight, weight_at), weight.shape[2:])
            self._assembled[weight] = self._named(made, node, 1)
        operands.append(self._assembled[weight])
        for b in bias:
            if b not in self._assembled:
                second = _SECOND if self.legacy_bias and cut.a else ()
                made = cut.bias(self._block(b, bias_at, second), per_block=self.legacy_bias)
                self._assembled[b] = self._named(made, node, 2)
            operands.append(self._assembled[b])
        return self.applied(node, *operands)

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

    def _block(self, old: State, at_part: _At, second: tuple[str, ...] = ()) -> Block:
        """The blocks of a state: of all branches, or of this one."""

        def block(part: str, shape: tuple[int, ...], shared: bool) -> Value:
            positions = at_part(part)
            if shared:
                return self.blocks.read(old, part, shape, positions)
            name = f"{self.name}/{old.name}" + (f"_{part}" if part else "")
            new = _state(old, name, shape, zero=part in second)
            if part in second:
                self.origin.zero(new)
            else:
                self.origin.cut(new, old, positions)
            self.states.append(new)
            return self.graph.read(new)

        return block

    def _named(self, value: Value, node: Node, operand: int) -> Value:
        """An expression is called after the layer and the operand it is for."""
        if value.producer is not None and not value.producer.name:
            kind = node.op.operands[operand].rstrip("?")
            value.producer.name = f"{node.name}.{kind}" if node.name else kind
        return value


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
