"""What of a graph is drawn, and what is folded into the labels of its neighbours.

A picture shows the way of the data. Folded unless asked for:

    states               the parameters of a layer become a count in its label
    parameter expressions  nodes that read nothing but parameters and constants count likewise
    gate expressions     nodes that make gates from scores, without data, become words at the gate
    forms of gates       slices and reshapes between the maker of a gate and the gate
    0-d inputs           thresholds and rates are named in the label of what reads them
    gradients, updates   nodes that lead to no output; the title says how many there are
    repeats              equal blocks in a row and equal branches, drawn once (`show.repeats`)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import prod

from branchgraph.ir.cost import cost
from branchgraph.ir.graph import Graph, Location, Node, Value
from branchgraph.ir.ops.exit import Exit
from branchgraph.ir.state import Role, State
from branchgraph.show import describe, gates
from branchgraph.show.forms import Forms
from branchgraph.show.places import Places
from branchgraph.show.repeats import Repeat, Repeats
from branchgraph.show.style import STEPS, Kind, kind
from branchgraph.show.weighing import forming, gate_of

#: Leaves that a parameter expression may have.
_FOLDED_ROLES = frozenset({Role.PARAMETER, Role.STATISTIC, Role.CONSTANT})
#: States that labels name one by one, because they steer the network and are few.
_NAMED_ROLES = frozenset({Role.GATE, Role.SLOT, Role.LOSS_SCALE})
#: Steps that may come before the convolution of a layer.
_PRE = frozenset({Kind.NORMALISATION, Kind.ACTIVATION, Kind.RANDOM})


class Picture:
    """The drawn part of a graph. `nodes` are in topological order, without repeated parts."""

    def __init__(
        self, graph: Graph, *, states: bool = False, updates: bool = False, collapse: bool = True
    ) -> None:
        self.graph = graph
        self.states = states
        self.updates = updates
        forward = _forward(graph)
        shown = graph.nodes if updates else forward
        self._forward = set(forward)
        self.undrawn = len(graph.nodes) - len(shown)
        self._roots = set(graph.outputs.values()) | {v for _, _, v in self.commits}
        #: Nodes that compute with parameters and gates, not with data.
        self.expressions = _expressions(graph, shown)
        computing = [n for n in shown if n not in self.expressions]
        self._forming = frozenset() if states else forming(computing, self._roots)
        self.folded = frozenset() if states else self.expressions | self._forming
        whole = [n for n in shown if n not in self.folded]
        self._drawn = set(whole)
        self._parameters = {n: self._states_of(n, Role.PARAMETER) for n in whole}
        self._owner: dict[State, Node] = {}
        for node, read in self._parameters.items():
            for state in read:
                self._owner.setdefault(state, node)
        self._stacks = self._layers(whole)
        parts = self._stacks if collapse and not updates else []
        self._repeated = Repeats(Forms(graph, whole, self.folded), parts, self._roots)
        self._places = Places(self._repeated.found, self._scope)
        self.nodes = [n for n in whole if n not in self._repeated.hidden]

    @property
    def forward(self) -> list[Node]:
        """All nodes but those that only gradients and updates need, drawn or not."""
        return [n for n in self.graph.nodes if n in self._forward]

    @property
    def repeats(self) -> list[Repeat]:
        """Parts that are drawn once for several."""
        shown = set(self.nodes)
        return [r for r in self._repeated.found if not shown.isdisjoint(r.first)]

    def location(self, node: Node) -> Location:
        """Where `node` is drawn: its scopes, and clusters around repeated layers."""
        return self._places(node)

    def label(self, location: Location) -> str:
        """What is written at a cluster: its name, and how often it repeats."""
        return self._places.label(location)

    def repeated(self, location: Location) -> bool:
        """Whether the cluster at `location` stands for several."""
        return self._places.repeated(location)

    def _scope(self, node: Node) -> Location:
        """The scopes of `node`. What only gradients and updates need stands outside all of them.

        A cluster must hold neighbours: with the way back inside, layouts lose their edges.
        """
        return node.scope if node in self._forward else ()

    # -- leaves and roots ----------------------------------------------------------------------

    def draws(self, value: Value) -> bool:
        """Whether `value` has a place in the picture, so that edges may start there."""
        return self._has_place(value) and value.producer not in self._repeated.hidden

    def _has_place(self, value: Value) -> bool:
        """Whether `value` is drawn where nothing is drawn once for several."""
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
        named = self.graph.outputs.items()
        return [(k, self.shown(v)) for k, v in named if not _is_exit(k, v)]

    @property
    def commits(self) -> list[tuple[str, State, Value]]:
        """(`update` or `gradient`, state, value) for everything the run leaves in states."""
        if not self.updates:
            return []
        both = (("gradient", self.graph.gradients), ("update", self.graph.updates))
        return [(word, s, v) for word, roots in both for s, v in roots.items()]

    # -- labels --------------------------------------------------------------------------------

    def operands(self, node: Node) -> list[Value]:
        """Operands of `node` that are drawn, one for equal parts that are drawn once."""
        found: list[Value] = []
        for value in node.inputs:
            shown = self.shown(value)
            if self.draws(shown) and (shown is value or shown not in found):
                found.append(shown)
        return found

    def shown(self, value: Value) -> Value:
        """`value`, or what stands for it where equal parts are drawn once."""
        return self._repeated.shown(self._formed_from(value))

    def _formed_from(self, value: Value) -> Value:
        """`value`, or what a gate was formed from."""
        while value.producer in self._forming:
            value = value.producer.inputs[0]
        return value

    def parameters(self, node: Node) -> str:
        """`2,410 params`; those that an earlier layer owns are `shared`, or `partly shared`."""
        read = self._parameters[node]
        if not read:
            return ""
        others = sum(self._owner[s] is not node for s in read)
        shared = "" if not others else " shared" if others == len(read) else " partly shared"
        total = sum(prod(s.shape) for s in read)
        return describe.count(total, "param") + shared

    def subtitle(self, node: Node) -> str:
        """The key attributes, and the folded operands that are worth naming."""
        arithmetic = "" if kind(node) is Kind.GATE else self._arithmetic(node)
        named = arithmetic or ("" if kind(node) is Kind.EXIT else self._steered_by(node))
        return " ".join(filter(None, (describe.subtitle(node), named)))

    def _steered_by(self, node: Node) -> str:
        """`2 of 8 by gate.score`: what steers a node and is not drawn."""
        gate = gate_of(node)
        if gate:
            return gates.words(gate, node.scope)
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
        return gates.steering(value) or "…" if filled is None else describe.number(filled)

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
        pending = deque(node.inputs)
        seen = set(pending)
        while pending:
            value = pending.popleft()
            if value.state and value.state.role is role:
                found[value.state] = None
            if value.producer in self.folded:
                pending += (v for v in value.producer.inputs if v not in seen)
                seen.update(value.producer.inputs)
        return list(found)

    # -- stacks --------------------------------------------------------------------------------

    def stacks(self) -> list[list[Node]]:
        """The nodes grouped into layers: conv, batch norm, ReLU and pooling in a row are one."""
        return [s for s in self._stacks if s[0] not in self._repeated.hidden]

    def _layers(self, nodes: list[Node]) -> list[list[Node]]:
        stacks: list[list[Node]] = []
        home: dict[Node, list[Node]] = {}
        for node in nodes:
            operands = [v for v in map(self._formed_from, node.inputs) if self._has_place(v)]
            before = operands[0].producer if len(operands) == 1 else None
            stack = home[before] if before else []
            if stack and stack[-1] is before and self._continues(stack, node):
                stack.append(node)
            else:
                stack = [node]
                stacks.append(stack)
            home[node] = stack
        return stacks

    def _continues(self, stack: list[Node], node: Node) -> bool:
        before = stack[-1]
        users = [n for v in before.outputs for n in v.users]
        alone = [n for n in users if n in self._drawn or n in self._forming] == [
            node
        ] and self._roots.isdisjoint(before.outputs)
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
    """Nodes that are no outputs, and read parameters, statistics and constants, or make gates."""
    outputs = set(graph.outputs.values())
    found: set[Node] = set()
    for node in shown:
        leaves = all(
            v.producer in found if v.producer else v.state and v.state.role in _FOLDED_ROLES
            for v in node.inputs
        )
        if leaves and kind(node) is not Kind.RANDOM and outputs.isdisjoint(node.outputs):
            found.add(node)
    return frozenset(found | gates.expressions(graph, shown, found))
