"""Rules and the driver that applies them until none fits.

A rule is a pattern, a check that refuses with a reason, and a rewrite that emits what takes the
place of the pattern's results:

    @pattern
    def twice(p, x):
        return p.relu(p.relu(x))

    Rule(twice, rewrite=lambda m: relu(m["x"]))

The driver looks at every node once and again where something around it changed, so its work grows
with the number of nodes and rewrites. Values inside a match that others read keep the match from
being rewritten, unless the rule names their nodes in `keeps`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.match import Match, Pattern
from branchgraph.passes.base import Pass, Report

#: Rewrites for each node of the graph after which rules are taken to go round in circles.
MOST_REWRITES = 20


@dataclass(frozen=True)
class Rule:
    """One rewrite. `rewrite` returns a value for every result of the pattern, in their order.

    It runs in the scope of the node that makes the first result. `check` returns why the match must
    be left alone, or nothing. `keeps` names matched nodes that stay, because others may read them.
    """

    pattern: Pattern
    rewrite: Callable[[Match], Value | Sequence[Value]]
    check: Callable[[Match], str] = lambda match: ""
    keeps: frozenset[str] = frozenset()
    name: str = ""

    @property
    def title(self) -> str:
        """What reports call the rule."""
        return self.name or self.pattern.name


@dataclass(frozen=True)
class RulePass(Pass):
    """A pass that is a set of rules; define `rules`."""

    def rules(self) -> Iterable[Rule]:
        """The rules, the first that fits first."""
        raise NotImplementedError(self.spelling)

    def rewrite(self, graph: Graph, report: Report) -> None:
        apply_rules(graph, self.rules(), report)


def apply_rules(graph: Graph, rules: Iterable[Rule], report: Report) -> None:
    """Rewrite `graph` in place until no rule fits anywhere."""
    _Driver(graph, rules, report).run()


class _Driver:
    def __init__(self, graph: Graph, rules: Iterable[Rule], report: Report) -> None:
        self.graph = graph
        self.report = report
        self.by_opcode: dict[str, list[Rule]] = {}
        for rule in rules:
            for opcode in rule.pattern.opcodes:
                self.by_opcode.setdefault(opcode, []).append(rule)
        self.queue: deque[Node] = deque(graph.nodes)
        self.waiting = set(self.queue)
        self.refused: set[tuple[str, Node]] = set()
        self.roots = set(graph.roots)

    def run(self) -> None:
        left = MOST_REWRITES * (len(self.queue) + 1)
        while self.queue:
            node = self.queue.popleft()
            self.waiting.discard(node)
            if node in self.graph and self._rewritten(node):
                left -= 1
                if left < 0:
                    raise GraphError(
                        f"{self.report.name}: the rules do not come to an end; the last rewrite "
                        f"was at {node}"
                    )
        self.graph.touch()

    def _rewritten(self, node: Node) -> bool:
        for rule in self.by_opcode.get(node.op.opcode, ()):
            match = rule.pattern.match(node)
            if match is None:
                continue
            reason = self._shared(rule, match) or rule.check(match)
            if not reason:
                self._apply(rule, match, node)
                return True
            if (rule.title, node) not in self.refused:
                self.refused.add((rule.title, node))
                self.report.refused(node, reason)
        return False

    def _shared(self, rule: Rule, match: Match) -> str:
        """Why a value inside the match cannot go, or nothing."""
        inside = set(match.inside)
        kept = {match.nodes[name] for name in rule.keeps if name in match.nodes}
        for node in inside - set(match.roots) - kept:
            for value in node.outputs:
                if value in self.roots or any(user not in inside for user in value.users):
                    return f"{value.label} is read elsewhere too"
        return ""

    def _apply(self, rule: Rule, match: Match, node: Node) -> None:
        before = self.graph.size
        with at(node.scope):
            made = rule.rewrite(match)
        new = (made,) if isinstance(made, Value) else tuple(made)
        old = match.outputs
        if len(new) != len(old):
            raise GraphError(f"rule {rule.title}: expected {len(old)} values, got {len(new)}")
        self.report.matched(node, before=old, after=new)
        fresh = self.graph.latest(self.graph.size - before)
        for was, now in zip(old, new):
            self.graph.replace(was, now)
        self.roots = set(self.graph.roots) if self.roots & set(old) else self.roots
        touched = [v for dead in match.inside for v in dead.inputs]
        self._remove(match.inside)
        self._look_again(fresh)
        for value in (*new, *(v for n in fresh for v in n.inputs), *touched):
            self._look_again(value.users)
            if value.producer is not None:
                self._look_again([value.producer])

    def _remove(self, nodes: Iterable[Node]) -> None:
        """Take out those of `nodes` that nobody reads any more, readers first."""
        left = list(dict.fromkeys(nodes))
        while left:
            dead = [n for n in left if not any(v.users or v in self.roots for v in n.outputs)]
            if not dead:
                return
            for node in dead:
                self.graph.remove(node)
            left = [n for n in left if n in self.graph]

    def _look_again(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node in self.graph and node not in self.waiting:
                self.waiting.add(node)
                self.queue.append(node)
