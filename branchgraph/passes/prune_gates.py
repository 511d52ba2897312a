"""Closed gates and what only they kept alive, removed to the fixpoint.

For gates that the graph knows (constants, as `harden_gates` writes them):

    select(x, 0)                  -> 0                      closed gate; x may hold NaN
    select(x, 1)                  -> x                      open gate
    f(0) = 0                      -> 0                      zero value (`channel_facts`)
    x + 0 + y                     -> x + y                  zero edge, the order of the rest kept
    0 + 0                         -> 0
    sum(x), concat(x), ...        -> x                      single operand
    exit(select(z, 0))            -> nothing                gated-off exit, with `exits`
    a node that no root needs     -> nothing                dead code

Roots are outputs, and updates of states that go on being used: an update goes when all it observes
in the network (the batch norm behind running statistics, say) is gone. One sweep in topological
order and one reverse reachability are the fixpoint: whether a gate is closed depends on no other
gate. A branch whose readers are dead goes with them; what is no constant (1/K of a mean) stays.

Values are equal for all finite states, NaN and infinities of removed branches were invisible
before. Gradients of what stays are equal, of what goes they were zero.

Refused: gates with scores (a closed one still learns from what lies behind it), gates that depend
on the input (another row may open them), closed ones on rows that an exit left (their number is
known only there), and graphs with gradients (prune, then differentiate). A closed gate also stays
where it hides one of several applications of a declared batch norm: in training each of them moves
the running statistics, hidden or not. With the mode chosen, updates say so themselves.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from branchgraph.ir.dims import Dim
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import Add
from branchgraph.ir.ops.exit import Exit
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.ops.merge import Concat, Maximum, Mean, Product, Sum
from branchgraph.ir.ops.norm import BatchNorm
from branchgraph.ir.state import Role, State
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.channel_facts import Knowledge
from branchgraph.passes.clean import living, needed, nodes_below


@dataclass(frozen=True)
class PruneGates(Pass, spelling="prune_gates", claim="equal"):
    """Remove what closed gates hide; fold open gates; `exits` removes gated-off exits too."""

    exits: bool = False

    def rewrite(self, graph: Graph, report: Report) -> None:
        if graph.gradients:
            report.refused(graph.name, "it has gradients; prune before differentiating")
            return
        pruning = Pruning(graph, report)
        pruning.keep_observers()
        pruning.fold(self.exits)
        pruning.finish()


class Pruning:
    """One run of the rules over a graph, with the accounts for its report."""

    def __init__(self, graph: Graph, report: Report) -> None:
        self.graph = graph
        self.report = report
        self.counts: Counter[str] = Counter()
        self._said: set[tuple[Node | str, str]] = set()
        self.nodes = {node: node.path or node.op.opcode for node in graph.nodes}
        self.why: dict[Node, str] = {}
        #: Gates that are left alone although they are known, and why.
        self.kept: dict[Node, str] = {}
        self.branches = set(graph.branches())
        #: Sizes that ops of the graph bring about: constants of such sizes may not outlive them.
        self.counted = {name for node in graph.nodes for name in node.op.introduces}
        self.read = {s for s, v in graph.reads.items() if v.users}
        self.observable = needed(graph.outputs.values()) & _depending(graph)

    # -- declared batch norms ------------------------------------------------------------------

    def keep_observers(self) -> None:
        """Leave gates alone that hide some, but not all, applications of a declared batch norm."""
        shared = [nodes for nodes in _applications(self.graph).values() if len(nodes) > 1]
        found = bool(shared)
        while found:
            knowledge = Knowledge()
            for node in self.graph.nodes:
                self._learn(node, knowledge)
            found = False
            left = _left(self.graph, knowledge)
            for nodes in shared:
                alive = [n for n in nodes if n in left]
                for node in nodes if alive else ():
                    if node not in left:
                        found |= self._keep_gates_of(node, alive[0], knowledge)

    def _keep_gates_of(self, hidden: Node, alive: Node, knowledge: Knowledge) -> bool:
        """Leave every gate alone that can hide `hidden`; whether there was a new one."""
        reason = (
            f"its gate is closed, but {_name(hidden)} behind it moves the running statistics of "
            f"{_name(alive)} in training; specialise first"
        )
        before = len(self.kept)
        for node in _above(hidden):
            gate = knowledge.arrays.get(node.inputs[1]) if isinstance(node.op, Select) else None
            if gate is not None and (gate == 0).any():
                self.kept.setdefault(node, reason)
        return len(self.kept) > before

    def _learn(self, node: Node, knowledge: Knowledge) -> None:
        """Let `knowledge` see `node`, but not through a gate that is left alone."""
        knowledge.visit(node)
        if node in self.kept:
            knowledge.facts.pop(node.output, None)

    # -- rules ---------------------------------------------------------------------------------

    def fold(self, exits: bool = False) -> None:
        """Apply every rule where it fits."""
        knowledge = Knowledge()
        for node in self.graph.nodes:
            self._learn(node, knowledge)
            if isinstance(node.op, Exit) and knowledge.is_zero(node.inputs[0]):
                self._exit(node, exits)
            simpler = self._simpler(node, knowledge)
            if simpler is None:
                continue
            rule, value = simpler
            # That a value is zero may follow from far back; its readers find a constant there.
            self.replaced(rule, node, value, compare=rule not in ("closed gate", "zero value"))
            if value.producer is not None and value.producer not in self.nodes:
                knowledge.visit(value.producer)
        self.graph.touch()
        self._refuse(knowledge)

    def replaced(self, rule: str, node: Node, value: Value, *, compare: bool = True) -> None:
        """Put `value` where the only result of `node` was.

        `compare` says that both can be compared by themselves, without what lies before them.
        """
        if compare:
            self.report.matched(node, before=[node.output], after=[value])
        else:
            self.report.matched(node)
        self.counts[rule] += 1
        self.why[node] = rule
        self.graph.replace(node.output, value)
        self.graph.remove(node)

    def _simpler(self, node: Node, knowledge: Knowledge) -> tuple[str, Value] | None:
        """The rule that fits `node` and the value it gives, if any does."""
        if len(node.outputs) != 1 or isinstance(node.op, (Full, Exit)):
            return None
        if knowledge.arrays.get(node.output) is not None:
            return None
        if knowledge.is_zero(node.output):
            if self._of_rows_left(node.output):
                return None
            rule = "closed gate" if isinstance(node.op, Select) else "zero value"
            return rule, self._zeros(node)
        if isinstance(node.op, Select):
            gate = knowledge.arrays.get(node.inputs[1])
            return ("open gate", node.inputs[0]) if gate is not None and (gate == 1).all() else None
        if isinstance(node.op, (Sum, Add)):
            return self._shorter_sum(node, knowledge)
        if isinstance(node.op, (Mean, Product, Maximum, Concat)) and len(node.inputs) == 1:
            return "single operand", node.inputs[0]
        return None

    def _shorter_sum(self, node: Node, knowledge: Knowledge) -> tuple[str, Value] | None:
        left = [v for v in node.inputs if not knowledge.is_zero(v)]
        if any(v.type != node.output.type for v in left):
            return None
        if len(left) == 1:
            return "single operand" if len(node.inputs) == 1 else "zero edge", left[0]
        if len(left) == len(node.inputs):
            return None
        with at(node.scope):
            return "zero edge", self.graph.emit(Sum(), *left, name=node.name)

    def _of_rows_left(self, value: Value) -> bool:
        """Whether the size of `value` is known only when some rows have left."""
        sizes = (d for d in value.shape if isinstance(d, Dim))
        return any(name in self.counted for d in sizes for name in d.symbols)

    def _zeros(self, node: Node) -> Value:
        value = node.output
        with at(node.scope):
            return self.graph.emit(Full(value=0.0, shape=value.shape, dtype=value.dtype))

    def _exit(self, node: Node, remove: bool) -> None:
        """An exit whose logits are a closed gate."""
        reason = _exit_stays(node, remove)
        if reason:
            self.refused(node, f"its gate is closed, but {reason}")
            return
        self.report.matched(node)
        self.counts["gated-off exit"] += 1
        self.why[node] = "gated-off exit"
        graph, threshold = self.graph, node.inputs[1]
        names = [name for name, value in graph.outputs.items() if value is node.output]
        self.report.dropped += names
        for later in node.output.users:
            graph.set_inputs(later, tuple(v for v in later.inputs if v is not node.output))
        graph.keep(output=lambda name: name not in names, node=lambda n: n is not node)
        if threshold.is_input and not threshold.users:
            graph.keep(input=lambda name: graph.inputs[name] is not threshold)

    # -- refusals ------------------------------------------------------------------------------

    def _refuse(self, knowledge: Knowledge) -> None:
        """Name what decides about the gates that stay, once each."""
        for node in self.graph.nodes:
            if not isinstance(node.op, Select):
                continue
            if node in self.kept:
                self.refused(node, self.kept[node])
            elif knowledge.arrays.get(node.inputs[1]) is None:
                self.refused(*_decided_by(node))
            elif knowledge.is_zero(node.output) and self._of_rows_left(node.output):
                self.refused(node, "it has the rows that an exit left; prune before lowering exits")

    def refused(self, where: Node | str, reason: str) -> None:
        """Report a refusal, unless it was reported before."""
        if (where, reason) not in self._said:
            self._said.add((where, reason))
            self.report.refused(where, reason)

    # -- dead code -----------------------------------------------------------------------------

    def finish(self) -> None:
        """Remove what is dead and write the accounts."""
        self._drop_updates()
        self.graph.keep(node=living(self.graph).__contains__)
        roots, reads = set(self.graph.roots), self.graph.reads
        gone = {s for s in self.read if not reads[s].users and reads[s] not in roots}
        self.graph.keep(read=lambda s: s not in gone)
        self._account(gone)

    def _drop_updates(self) -> None:
        """Updates that observe nothing but removed nodes go, unless their state is read still."""
        alive = needed(self.graph.outputs.values())
        dead = self.observable - alive
        gone: set[State] = set()
        for state, value in self.graph.updates.items():
            seen = _observed(value, self.observable)
            if not seen & dead:
                continue
            if seen <= dead and not self._read_by(state, alive):
                gone.add(state)
            else:
                self.report.refused(state.name, "its update observes parts that stay, too")
        self.counts["update"] += len(gone)
        self.graph.keep(update=lambda s: s not in gone)

    def _read_by(self, state: State, nodes: set[Node]) -> bool:
        value = self.graph.reads.get(state)
        return value is not None and any(user in nodes for user in value.users)

    def _account(self, gone: set[State]) -> None:
        for node, path in self.nodes.items():
            if node not in self.graph:
                self.report.removed.append((path, self.why.get(node, "dead code")))
        dead = sum(reason == "dead code" for _, reason in self.report.removed)
        if any(self.counts.values()):
            self.counts["dead code"] = dead
            listed = ", ".join(f"{count} {rule}" for rule, count in self.counts.items() if count)
            self.report.noted(f"by rule: {listed}")
        left = set(self.graph.branches())
        blocks = [
            b for b in sorted(self.branches - left) if b.rpartition("/")[0] not in self.branches
        ]
        if blocks:
            total = sum(b.rpartition("/")[0] not in self.branches for b in self.branches)
            self.report.noted(f"{len(blocks)} of {total} branches removed: {', '.join(blocks)}")
        if gone:
            trained = sum(s.role is Role.PARAMETER for s in gone)
            self.report.noted(f"{len(gone)} states unread now, {trained} of them parameters")


def _applications(graph: Graph) -> dict[State, list[Node]]:
    """Running statistics, and the declared batch norms that move each in training."""
    found: dict[State, list[Node]] = {}
    for node in graph.nodes:
        if isinstance(node.op, BatchNorm):
            for state in dict.fromkeys(v.state for v in node.inputs[3:]):
                if state is not None:
                    found.setdefault(state, []).append(node)
    return found


def _left(graph: Graph, knowledge: Knowledge) -> set[Node]:
    """Nodes that roots still depend on when every value that is known to be zero is a constant."""
    found: set[Node] = set()
    pending = [v for v in graph.roots if not knowledge.is_zero(v)]
    while pending:
        node = pending.pop().producer
        if node is not None and node not in found:
            found.add(node)
            pending += [v for v in node.inputs if not knowledge.is_zero(v)]
    return found


def _above(node: Node) -> list[Node]:
    """The nodes that are computed from `node`."""
    found: dict[Node, None] = {}
    pending = [node]
    while pending:
        new = [u for v in pending.pop().outputs for u in v.users if u not in found]
        found.update(dict.fromkeys(new))
        pending += new
    return list(found)


def _name(node: Node) -> str:
    return node.path or node.op.opcode


def _depending(graph: Graph) -> set[Node]:
    """Nodes whose value depends on an input."""
    found = set(graph.inputs.values())
    nodes: set[Node] = set()
    for node in graph.nodes:
        if any(v in found for v in node.inputs):
            nodes.add(node)
            found.update(node.outputs)
    return nodes


def _observed(value: Value, network: set[Node]) -> set[Node]:
    """The first nodes of the network met on the ways back from an update."""
    seen: set[Node] = set()
    found: set[Node] = set()
    pending = [value.producer]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in network:
            found.add(node)
        else:
            pending += [v.producer for v in node.inputs]
    return found


def _exit_stays(node: Node, remove: bool) -> str:
    """Why an exit behind a closed gate is not removed, or nothing."""
    if len(node.inputs) == 1:
        return "it is the last exit"
    if not remove:
        return "it takes samples still; prune_gates:exits=true removes it"
    for user in node.output.users:
        # Later exits may count it for their patience.
        if not isinstance(user.op, Exit) or node.output in user.inputs[:2]:
            return f"{user.path or user.op.opcode} reads it"
    return ""


def _decided_by(node: Node) -> tuple[str, str]:
    """What decides whether the gate of `node` is open, and why that keeps it."""
    gate = node.inputs[1]
    below = nodes_below([gate.producer] if gate.producer else [])
    leaves = [v for v in (gate, *(v for n in below for v in n.inputs)) if v.producer is None]
    scores = [v.name for v in leaves if v.state is not None and v.state.role is Role.GATE]
    if scores:
        return scores[0], "it is still learned; harden_gates first"
    where = node.path or node.op.opcode
    inputs = sorted({v.name for v in leaves if v.is_input})
    if inputs:
        return where, f"its gate depends on the input {', '.join(inputs)}"
    if leaves:
        names = sorted({v.name for v in leaves})
        return where, f"its gate depends on the state {', '.join(names)}"
    return where, "the value of its gate is not known before the mode is chosen"
