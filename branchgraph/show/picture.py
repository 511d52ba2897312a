"""What of a graph is drawn, and what is folded into the labels of its neighbours.

A picture shows the way of the data. Folded unless asked for:

    states               the parameters of a layer become a count in its label
    parameter expressions  nodes that read nothing but parameters and constants count likewise
    0-d inputs           thresholds and rates are named in the label of what reads them
    gradients, updates   nodes that lead to no output; the title says how many there are
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from branchgraph.ir.cost import cost
from branchgraph.ir.graph import Graph, Location, Node, Value
from branchgraph.ir.ops.exit import Exit
from branchgraph.ir.state import Role, State
from branchgraph.show import describe
from branchgraph.show.style import STEPS, Kind, kind

#: Leaves that a folded expression may have; gates, keys and step counts make it worth seeing.
_FOLDED_ROLES = frozenset({Role.PARAMETER, Role.STATISTIC, Role.CONSTANT})
#: States that labels name one by one, because they steer the network and are few.
_NAMED_ROLES = frozenset({Role.GATE, Role.SLOT, Role.LOSS_SCALE})
#: Steps that may come before the convolution of a layer.
_PRE = frozenset({Kind.NORMALISATION, Kind.ACTIVATION, Kind.RANDOM})


class Picture:
    """The drawn part of a graph. `nodes` are in topological order."""

    def __init__(self, graph: Graph, *, states: bool = False, updates: bool = False) -> None:
        self.graph = graph
        self.states = states
        self.updates = updates
        forward = _forward(graph)
        shown = graph.nodes if updates else forward
        self._forward = set(forward)
        self.undrawn = len(graph.nodes) - len(shown)
        self.folded = frozenset() if states else _expressions(graph, shown)
        self.nodes = [n for n in shown if n not in self.folded]
        self._drawn = set(self.nodes)
        self._parameters = {n: self._states_of(n, Role.PARAMETER) for n in self.nodes}
        self._owner: dict[State, Node] = {}
        for node, read in self._parameters.items():
            for state in read:
                self._owner.setdefault(state, node)

    def location(self, node: Node) -> Location:
        """Where `node` is drawn. What only gradients and updates need stands outside all scopes.

        A cluster must hold neighbours: with the way back inside, layouts lose their edges.
        """
        return node.scope if node in self._forward else ()

    # -- leaves and roots ----------------------------------------------------------------------

    def draws(self, value: Value) -> bool:
        """Whether `value` has a place in the picture, so that edges may start there."""
        if value.producer is not None:
            return value.producer in self._drawn
        return self.states or (value.is_input and value.shape != ())

    @property
    def inputs(self) -> list[Value]:
        """Inputs and states to draw."""
        states = self.graph.reads.values() if self.states else ()
        read = {v for n in self.nodes for v in n.inputs} | set(self.graph.outputs.values())
        drawn = [v for v in self.graph.inputs.values() if self.draws(v)]
        return drawn + [v for v in states if v in read]

    @property
    def outputs(self) -> list[tuple[str, Value]]:
        """Named outputs to draw; an exit stands for the output of its own name."""
        return [(k, v) for k, v in self.graph.outputs.items() if not _is_exit(k, v)]

    @property
    def commits(self) -> list[tuple[str, State, Value]]:
        """(`update` or `gradient`, state, value) for everything the run leaves in states."""
        if not self.updates:
            return []
        both = (("gradient", self.graph.gradients), ("update", self.graph.updates))
        return [(word, s, v) for word, roots in both for s, v in roots.items()]

    # -- labels --------------------------------------------------------------------------------

    def operands(self, node: Node) -> list[Value]:
        """Operands of `node` that are drawn."""
        return [v for v in node.inputs if self.draws(v)]

    def parameters(self, node: Node) -> str:
        """`2,410 params`; parameters that an earlier layer owns are `shared`."""
        read = self._parameters[node]
        if not read:
            return ""
        shared = any(self._owner[s] is not node for s in read)
        total = sum(prod(s.shape) for s in read)
        return describe.count(total, "param") + (" shared" if shared else "")

    def subtitle(self, node: Node) -> str:
        """The key attributes, and the folded operands that are worth naming."""
        arithmetic = self._arithmetic(node)
        named = arithmetic or ("" if kind(node) is Kind.EXIT else self._steered_by(node))
        return " ".join(filter(None, (describe.subtitle(node), named)))

    def _steered_by(self, node: Node) -> str:
        """`by gate.score`: states that steer a node and are not drawn."""
        named = (v.state for v in node.inputs if v.state and v.state.role in _NAMED_ROLES)
        names = (describe.relative(s.name, node.scope) for s in dict.fromkeys(named))
        listed = "" if self.states else ", ".join(names)
        return f"by {listed}" if listed else ""

    def _arithmetic(self, node: Node) -> str:
        """`· < exit1.threshold (0.5)`: two operands, of which one is a folded scalar."""
        relation = getattr(node.op, "relation", node.op.opcode)
        sign = describe.INFIX.get(relation)
        if sign is None or len(node.inputs) != 2:
            return ""
        if all(self.draws(v) for v in node.inputs):
            return sign if node.op.opcode == "compare" else ""
        left, right = map(self._operand, node.inputs)
        return f"{left} {sign} {right}"

    def _operand(self, value: Value) -> str:
        if self.draws(value):
            return "·"
        if value.producer is None:
            default = "" if value.default is None else f" ({describe.number(value.default)})"
            return describe.clean(value.name) + default
        filled = describe.constant(value)
        return "…" if filled is None else describe.number(filled)

    def totals(self) -> list[str]:
        """Parameters and MACs of the whole graph, and what is not drawn."""
        total = cost(self.graph).per_sample()
        parts = [
            describe.count(total.parameters, "parameter"),
            f"{total.macs:,} MACs per sample",
        ]
        if self.undrawn:
            hidden = describe.count(self.undrawn, "node")
            parts.append(f"{hidden} of gradients and updates not drawn")
        return parts

    def kinds(self) -> list[Kind]:
        """Kinds in the picture, in the order of the legend."""
        found = {kind(n) for n in self.nodes}
        found |= {Kind.STATE if v.state else Kind.INPUT for v in self.inputs}
        found |= {Kind.OUTPUT for _ in self.outputs} | {Kind.UPDATE for _ in self.commits}
        return [k for k in Kind if k in found]

    def _states_of(self, node: Node, role: Role) -> list[State]:
        """States of `role` that `node` reads, through folded expressions too."""
        found: dict[State, None] = {}
        pending = list(node.inputs)
        while pending:
            value = pending.pop(0)
            if value.state and value.state.role is role:
                found[value.state] = None
            if value.producer in self.folded:
                pending += value.producer.inputs
        return list(found)

    # -- stacks --------------------------------------------------------------------------------

    def stacks(self) -> list[list[Node]]:
        """The nodes grouped into layers: conv, batch norm, ReLU and pooling in a row are one."""
        stacks: list[list[Node]] = []
        home: dict[Node, list[Node]] = {}
        outputs = set(self.graph.outputs.values())
        for node in self.nodes:
            operands = self.operands(node)
            before = operands[0].producer if len(operands) == 1 else None
            stack = home[before] if before else []
            if stack and stack[-1] is before and self._continues(stack, node, outputs):
                stack.append(node)
            else:
                stack = [node]
                stacks.append(stack)
            home[node] = stack
        return stacks

    def _continues(self, stack: list[Node], node: Node, outputs: set[Value]) -> bool:
        before = stack[-1]
        drawn_users = [n for v in before.outputs for n in v.users if n in self._drawn]
        roots = outputs | {v for _, _, v in self.commits}
        alone = drawn_users == [node] and roots.isdisjoint(before.outputs)
        if not alone or before.scope != node.scope:
            return False
        same_way = (before in self._forward) == (node in self._forward)
        return same_way and _joins([kind(n) for n in stack], kind(node))


def _joins(steps: list[Kind], step: Kind) -> bool:
    """Whether a step of kind `step` belongs to the layer that `steps` began.

    A merge takes the activation behind it. A convolution opens a layer, unless a batch norm did
    (pre-activation), and everything but merges, gates, exits and the like follows.
    """
    if steps == [Kind.MERGE]:
        return step is Kind.ACTIVATION
    if not {steps[0], step} <= STEPS:
        return False
    return step is not Kind.TRAINABLE or (steps[0] is Kind.NORMALISATION and set(steps) <= _PRE)


def _is_exit(name: str, value: Value) -> bool:
    op = value.producer.op if value.producer else None
    return isinstance(op, Exit) and op.name == name


def _forward(graph: Graph) -> list[Node]:
    """All nodes but those that only gradients and updates need."""
    committed = ancestors([*graph.updates.values(), *graph.gradients.values()])
    if not graph.outputs or not committed:
        return graph.nodes
    wanted = ancestors(graph.outputs.values())
    return [n for n in graph.nodes if n in wanted or n not in committed]


def ancestors(values: Iterable[Value]) -> set[Node]:
    """Nodes that `values` depend on."""
    found: set[Node] = set()
    pending = [v.producer for v in values]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found.add(node)
            pending += (v.producer for v in node.inputs)
    return found


def _expressions(graph: Graph, shown: list[Node]) -> frozenset[Node]:
    """Nodes whose leaves are parameters, statistics and constants, and that are no output."""
    outputs = set(graph.outputs.values())
    found: set[Node] = set()
    for node in shown:
        leaves = all(
            v.producer in found if v.producer else v.state and v.state.role in _FOLDED_ROLES
            for v in node.inputs
        )
        if leaves and kind(node) is not Kind.RANDOM and outputs.isdisjoint(node.outputs):
            found.add(node)
    return frozenset(found)
