"""Inserting, moving and removing early exits.

`insert_exits` puts a head (a small classifier, `heads`) behind chosen values and marks its logits
as a way out; the network's own output becomes the last exit. Places are names or paths, patterns of
them (`stage*/block2/relu`), or shares of the trunk's multiply-accumulates: of the values that every
sample passes (`trunk`) and the head can read, the last whose share is not larger.

`move_exit` hangs a head with its parameters behind another value; `remove_exits` takes early exits
out again: without names all of them, which leaves the network without branches. All claim
`different`: another network on purpose.

Loss weights are inputs: `weights=0.3+1` declares `exit1.weight` and `exit2.weight` with these
defaults, which the joint loss multiplies by.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from math import prod

from branchgraph.ir.builder import exit
from branchgraph.ir.dims import product
from branchgraph.ir.errors import FormatError, GraphError, RefusalError, ShapeError
from branchgraph.ir.graph import Graph, Location, Node, Scope, Value, at, branch
from branchgraph.ir.op import Op
from branchgraph.ir.ops.exit import RELATIONS, Exit
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.state import Role
from branchgraph.ir.types import DType, TensorType
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.clean import keep_only, needed, nodes_below
from branchgraph.passes.insert_exits.heads import HEADS
from branchgraph.passes.insert_exits.trunk import Trunk, is_pattern, node_cost


@dataclass(frozen=True)
class InsertExits(Pass, spelling="insert_exits", claim="different"):
    """Put early exits behind the nodes named in `after` and at the shares of the MACs in `at`.

    `convs` and `width` are options of the head. `weights` has one loss weight for each exit that
    goes in, in the order of the network, and may have one more for the last.
    """

    after: tuple[str, ...] = ()
    at: tuple[float, ...] = ()
    head: str = "conv"
    convs: int | None = None
    width: int | None = None
    criterion: str = "entropy"
    threshold: float = 0.5
    weights: tuple[float, ...] = ()

    def check(self) -> None:
        if not self.after and not self.at:
            raise FormatError("insert_exits needs places: after=NAMES or at=SHARES of the MACs")
        if self.head not in HEADS:
            raise GraphError(f"unknown head {self.head!r}; known: {', '.join(HEADS)}")
        if self.criterion not in RELATIONS:
            raise GraphError(f"unknown criterion {self.criterion!r}; known: {', '.join(RELATIONS)}")
        if any(not 0 < share < 1 for share in self.at):
            raise GraphError(f"shares of the MACs lie between 0 and 1, got {list(self.at)}")
        self._check_head()

    def _check_head(self) -> None:
        head = HEADS[self.head]
        if self.convs is not None and (head.convs is None or self.convs < 0):
            least = "has no convolutions" if head.convs is None else "needs at least 0"
            raise GraphError(f"the head {self.head} {least}; convs={self.convs}")
        if self.width is not None and (head.width is None or self.width < 1):
            least = "chooses no width" if head.width is None else "needs at least 1 channel"
            raise GraphError(f"the head {self.head} {least}; width={self.width}")

    def rewrite(self, graph: Graph, report: Report) -> None:
        name, logits = _way_out(graph)
        trunk = Trunk(graph, logits)
        classes = _classes(logits)
        taps = [n for n in self._places(graph, trunk, report) if self._fits(n, trunk, report)]
        if not taps:
            return
        if self.weights and len(self.weights) not in (len(taps), len(taps) + 1):
            raise RefusalError(
                f"{len(self.weights)} loss weights for {len(taps)} exits before the last one"
            )
        graph.keep(output=lambda n: n != name)
        shares = {node: trunk.share(node) for node in taps}
        names = []
        for node in sorted(taps, key=graph.nodes.index):
            report.matched(node)
            names.append(self._insert(graph, node, classes, shares[node], report))
        last = self._close(graph, name, logits)
        for exit_name, weight in zip([*names, last], self.weights):
            graph.input(f"{exit_name}.weight", (), DType.F64, weight)
            report.noted(f"{exit_name}.weight is {weight:g}")

    # -- places --------------------------------------------------------------------------------

    def _places(self, graph: Graph, trunk: Trunk, report: Report) -> list[Node]:
        """The nodes that are meant, each once."""
        found: list[Node] = []
        for name in self.after:
            found += trunk.matching(name) if is_pattern(name) else [graph.find(name)]
        for share in self.at:
            node = trunk.at(share, lambda v: not HEADS[self.head].misfit(v.type, trunk.batch))
            report.noted(
                f"at={share:g}: behind {node.output.label}, the last value every sample passes "
                f"with at most {share * trunk.macs:,.0f} of {trunk.macs:,} MACs"
            )
            if node in found:
                report.refused(node, f"at={share:g} is a place that is meant already")
            found.append(node)
        return list(dict.fromkeys(found))

    def _fits(self, node: Node, trunk: Trunk, report: Report) -> bool:
        """Whether an exit can stand behind `node`; a refusal says why not."""
        reason = (
            "it has an exit already"
            if _has_exit(node)
            else f"it has {len(node.outputs)} results"
            if len(node.outputs) != 1
            else "it stands behind the last result"
            if node not in trunk.nodes or isinstance(node.op, Exit)
            else HEADS[self.head].misfit(node.output.type, trunk.batch)
        )
        if reason:
            report.refused(node, reason)
        return not reason

    # -- emission ------------------------------------------------------------------------------

    def _insert(self, graph: Graph, node: Node, classes: int, share: float, report: Report) -> str:
        before, states = set(graph.nodes), set(graph.states)
        name = _unused_exit(graph)
        with at(node.scope), branch(name):
            logits = HEADS[self.head].build(node.output, classes, self.convs, self.width)
            previous = _earlier(graph, node) if self.criterion == "patience" else []
            exit(
                logits, name, criterion=self.criterion, threshold=self.threshold, previous=previous
            )
        made = [n for n in graph.nodes if n not in before]
        graph.place_after(node, made)
        trained = [s for s in graph.states if s not in states and s.role is Role.PARAMETER]
        report.noted(
            f"{name} behind {node.output.label}, at {share:.1%} of the trunk: head {self.head}, "
            f"{sum(prod(s.shape) for s in trained):,} parameters, "
            f"{sum(map(node_cost, made)):,} MACs"
        )
        return name

    def _close(self, graph: Graph, name: str, logits: Value) -> str:
        """Mark the network's own output as the last exit, unless it is marked; list it last."""
        if logits.producer is not None and isinstance(logits.producer.op, Exit):
            graph.output(name, logits)
            return logits.producer.op.name
        last = _unused_exit(graph)
        exit(logits, last, criterion=self.criterion, last=True)
        return last


def _unused_exit(graph: Graph) -> str:
    """The first of `exit1`, `exit2`, ... that is no exit and no output."""
    taken = {n.op.name for n in graph.nodes if isinstance(n.op, Exit)} | set(graph.outputs)
    return next(n for k in count(1) if (n := f"exit{k}") not in taken)


def _exits(graph: Graph) -> list[tuple[Node, Exit]]:
    """The exits in the order of the network."""
    return [(n, n.op) for n in graph.nodes if isinstance(n.op, Exit)]


def _earlier(graph: Graph, node: Node) -> list[Value]:
    """Logits of the early exits before `node`, which patience counts."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    return [n.inputs[0] for n, _ in _exits(graph) if len(n.inputs) > 1 and order[n] < order[node]]


def _has_exit(node: Node) -> bool:
    """Whether a branch that ends in an exit reads the node."""
    exits = (n.scope for n, _ in _exits(node.graph) if n.scope)
    branches = {s for s in exits if s[-1].branch}
    return any(u.scope[: len(b)] == b for v in node.outputs for u in v.users for b in branches)


def _way_out(graph: Graph) -> tuple[str, Value]:
    """Name and value of the output that takes what no early exit takes."""
    last = {n.output for n, _ in _exits(graph) if len(n.inputs) == 1}
    found = [(k, v) for k, v in graph.outputs.items() if v in last or not last]
    if len(found) != 1:
        raise RefusalError(
            "insert_exits needs one output, the logits; there are: " + ", ".join(graph.outputs)
        )
    return found[0]


def _classes(logits: Value) -> int:
    if len(logits.shape) != 2 or not isinstance(logits.shape[1], int):
        raise RefusalError(f"logits must be [N, classes], got {logits.type}")
    return logits.shape[1]


def _unmark(graph: Graph, exits: Iterable[Node]) -> None:
    """Let what reads an exit read its logits."""
    for node in exits:
        graph.replace(node.output, node.inputs[0])


def _drop_inputs(graph: Graph, exits: Iterable[str]) -> None:
    """Take out thresholds and loss weights that nothing reads any more."""
    names = {f"{name}.{kind}" for name in exits for kind in ("threshold", "weight")}
    graph.keep(input=lambda name: name not in names or bool(graph.inputs[name].users))


@dataclass(frozen=True)
class RemoveExits(Pass, spelling="remove_exits", claim="different"):
    """Take early exits out, those of `names` or all; after the last of them only `logits` is left.

    What is left computes `logits` as the last exit did.
    """

    names: tuple[str, ...] = ()

    def rewrite(self, graph: Graph, report: Report) -> None:
        exits = _exits(graph)
        if not exits:
            return
        last = [n for n, _ in exits if len(n.inputs) == 1]
        if len(last) != 1:
            raise RefusalError(f"there must be one last exit, there are {len(last)}")
        early = {op.name: n for n, op in exits if len(n.inputs) > 1}
        for name in self.names:
            if name not in early:
                report.refused(name, f"no early exit; there are: {', '.join(early) or 'none'}")
        gone = {k: n for k, n in early.items() if k in self.names or not self.names}
        if self.names and (len(gone) < len(early) or not gone):
            self._some(graph, gone, report)
        else:
            self._all(graph, [n for n, _ in exits], last[0], report)

    def _all(self, graph: Graph, exits: list[Node], last: Node, report: Report) -> None:
        for node in exits:
            report.matched(node)
        out = {n.output for n in exits}
        kept = {k for k, v in graph.outputs.items() if v not in out}
        names = [op.name for _, op in _exits(graph)]
        graph.keep(output=kept.__contains__)
        _unmark(graph, exits)
        graph.output("logits", last.inputs[0])
        keep_only(graph, needed(graph.roots))
        _drop_inputs(graph, names)

    def _some(self, graph: Graph, gone: dict[str, Node], report: Report) -> None:
        out = {n.output for n in gone.values()}
        logits = {n.inputs[0] for n in gone.values()}
        for node in gone.values():
            report.matched(node)
        graph.keep(output={k for k, v in graph.outputs.items() if v not in out}.__contains__)
        _unmark(graph, gone.values())
        for node, _ in _exits(graph):
            kept = tuple(v for i, v in enumerate(node.inputs) if i < 2 or v not in logits)
            if len(kept) < len(node.inputs):
                graph.set_inputs(node, kept)
        keep_only(graph, needed(graph.roots))
        _drop_inputs(graph, gone)


# -- moving ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoveExit(Pass, spelling="move_exit", claim="different"):
    """Hang the head of the early exit `exit` behind the node `to`, with the same states.

    The exit keeps its name, threshold and loss weight.
    """

    exit: str
    to: str

    def rewrite(self, graph: Graph, report: Report) -> None:
        found = [n for n, op in _exits(graph) if op.name == self.exit]
        if len(found) != 1:
            known = ", ".join(op.name for _, op in _exits(graph)) or "none"
            raise GraphError(f"no exit {self.exit!r} in {graph.name}; there are: {known}")
        way_out, target = found[0], graph.find(self.to)
        if len(way_out.inputs) == 1:
            report.refused(way_out, "it is the last exit, which takes the rest")
            return
        head = _head(way_out)
        taps = dict.fromkeys(v for n in head for v in n.inputs if v.producer not in head)
        taps = {v: None for v in taps if v.state is None and v not in way_out.inputs[1:]}
        reason = self._reason(graph, way_out, head, list(taps), target)
        if not reason:
            reason = self._move(graph, way_out, head, next(iter(taps)), target)
        if reason:
            report.refused(way_out, reason)
        else:
            report.matched(self.exit)
            report.noted(f"{self.exit} stands behind {target.output.label}")

    def _reason(
        self, graph: Graph, way_out: Node, head: list[Node], taps: list[Value], target: Node
    ) -> str:
        """Why the exit cannot move, or nothing."""
        trunk = Trunk(graph, _way_out(graph)[1])
        if len(taps) != 1:
            return f"its head reads {len(taps)} values: {', '.join(v.label for v in taps)}"
        if target is taps[0].producer:
            return f"it stands behind {self.to} already"
        if target in head or target is way_out:
            return f"{self.to} belongs to its own head"
        on_the_way = target in trunk.nodes and len(target.outputs) == 1
        if not on_the_way or (isinstance(target.op, Exit) and len(target.inputs) == 1):
            return f"{self.to} is no value on the way to the last exit"
        if _has_exit(target):
            return f"{self.to} has an exit already"
        return ""

    def _move(self, graph: Graph, way_out: Node, head: list[Node], tap: Value, target: Node) -> str:
        """Emit the head behind `target` and take the old one out; why that is impossible, if so."""
        planned = _planned(head, tap, target.output.type, way_out.inputs[0])
        if isinstance(planned, str):
            return planned
        _forget(graph)
        assert isinstance(way_out.op, Exit)
        name, size = way_out.op.name, graph.size
        mapped = {tap: target.output}
        for node, op in (*planned, (way_out, way_out.op)):
            with at(_moved_scope(node.scope, name, target.scope)):
                inputs = (mapped.get(v, v) for v in node.inputs)
                mapped.update(zip(node.outputs, graph.apply(op, *inputs, name=node.name)))
        made = graph.latest(graph.size - size)
        graph.replace(way_out.output, mapped[way_out.output])
        for node in (way_out, *reversed(head)):
            graph.remove(node)
        graph.place_after(target, made)
        _count_again(graph)
        return ""


def _head(way_out: Node) -> list[Node]:
    """The nodes that serve this exit alone, producers first."""
    logits = way_out.inputs[0].producer
    below = nodes_below([logits] if logits else [])
    head: dict[Node, None] = {}
    roots = set(way_out.graph.roots)
    for node in reversed([n for n in way_out.graph.nodes if n in below]):
        users = [u for v in node.outputs for u in v.users]
        mine = all(u in head or isinstance(u.op, Exit) for u in users)
        if users and mine and not any(v in roots for v in node.outputs):
            head[node] = None
    return list(head)[::-1]


def _planned(
    head: list[Node], tap: Value, type: TensorType, logits: Value
) -> list[tuple[Node, Op]] | str:
    """The ops of the head on a tap of `type`, or why they do not make such `logits` of it."""
    types = {tap: type}
    plan: list[tuple[Node, Op]] = []
    for node in head:
        seen = tuple(types.get(v, v.type) for v in node.inputs)
        op: Op = node.op
        if isinstance(op, Reshape) and _flattens(op, node.inputs[0].type):
            op = Reshape(shape=(seen[0].shape[0], product(seen[0].shape[1:])))
        try:
            made = op.infer(*seen)
        except ShapeError as error:
            return f"its head does not fit {type}: {op.opcode} {node.path}: {error}"
        types.update(zip(node.outputs, made))
        plan.append((node, op))
    if types[logits] != logits.type:
        return f"its head does not fit {type}: it makes {types[logits]}, not {logits.type}"
    return plan


def _flattens(op: Reshape, x: TensorType) -> bool:
    """Whether `op` makes [N, ...] a matrix."""
    return len(x.shape) > 1 and op.shape == (x.shape[0], product(x.shape[1:]))


def _moved_scope(old: Location, name: str, place: Location) -> Location:
    """The location of a part of the branch `name` when the branch hangs at `place`."""
    label = Scope(name, branch=True)
    return (*place, *old[old.index(label) :]) if label in old else old


def _forget(graph: Graph) -> None:
    """Let no exit read the logits of others, so that moving one moves nothing else."""
    for node, _ in _exits(graph):
        graph.set_inputs(node, node.inputs[:2])


def _count_again(graph: Graph) -> None:
    """Let exits by patience read the logits of those that now stand before them."""
    before: list[Value] = []
    for node, op in _exits(graph):
        if len(node.inputs) == 1:
            continue
        if op.criterion == "patience":
            graph.set_inputs(node, (*node.inputs[:2], *before))
        before.append(node.inputs[0])
