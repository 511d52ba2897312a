"""Rules and the driver that applies them until none fits.

A rule is a pattern, a check that refuses with a reason, and a rewrite that emits what takes the
place of the pattern's results:

    @pattern
    def twice(p, x):
        return p.relu(p.relu(x))

    Rule(twice, rewrite=lambda m: relu(m["x"]))

The driver looks at every node once and again where something around it changed, so its work grows
with the number of nodes and rewrites. Values inside a match that others read keep the match from
being rewritten, unless the rule names their nodes in `keeps`. Where a node matches in several ways
(operands in another order), the first way that no check refuses is taken. What was refused is
reported at the end, if it still stands. Nodes that a rewrite leaves without readers go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Node, Value, at, shared_scope
from branchgraph.ir.match import Match, Pattern
from branchgraph.passes.base import Pass, Report

#: Rewrites for each node of the graph after which rules are taken to go round in circles.
MOST_REWRITES = 20
#: Ways to match one node that are tried.
MOST_WAYS = 64
#: Readers of a value that are looked at again when it only gained or lost another one.
_NEAR = 32


@dataclass(frozen=True)
class Rule:
    """One rewrite. `rewrite` returns a value for every result of the pattern, in their order.

    It runs in the scope that the nodes of all results share. `check` returns why the match must be
    left alone, or nothing. `keeps` names matched nodes that stay, because others may read them.
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
        self.depth = 1
        for rule in rules:
            self.depth = max(self.depth, rule.pattern.depth)
            for opcode in rule.pattern.opcodes:
                self.by_opcode.setdefault(opcode, []).append(rule)
        self.queue: deque[Node] = deque(graph.nodes)
        self.waiting = set(self.queue)
        self.refusals: dict[tuple[str, Node], str] = {}
        self.roots = set(graph.roots)
        #: Nodes whose match waits for a value to lose its other readers.
        self.blocked: dict[Value, dict[Node, None]] = {}

    def run(self) -> None:
        left = MOST_REWRITES * (len(self.queue) + 1)
        while self.queue:
            node = self.queue.popleft()
            self.waiting.discard(node)
            rule = self._rewritten(node) if node in self.graph else None
            left -= rule is not None
            if rule is not None and left < 0:
                raise GraphError(
                    f"{self.report.name}: the rules do not come to an end; the last one was "
                    f"{rule.title} at {node}"
                )
        for (_, node), reason in self.refusals.items():
            if node in self.graph:
                self.report.refused(node, reason)
        self.graph.touch()

    def _rewritten(self, node: Node) -> Rule | None:
        """The rule that was applied at `node`, if one was."""
        for rule in self.by_opcode.get(node.op.opcode, ()):
            self.refusals.pop((rule.title, node), None)
            for match in islice(rule.pattern.matches(node), MOST_WAYS):
                reason = self._shared(rule, match) or tangled(match) or rule.check(match)
                if not reason:
                    self._apply(rule, match)
                    return rule
                self.refusals.setdefault((rule.title, node), reason)
        return None

    def _shared(self, rule: Rule, match: Match) -> str:
        """Why a value inside the match cannot go, or nothing."""
        inside = set(match.inside)
        gone = inside - set(match.roots) - set(_named(match, rule.keeps))
        for node in match.inside:
            for value in node.outputs if node in gone else ():
                if value in self.roots or any(user not in inside for user in value.users):
                    self.blocked.setdefault(value, {})[match.roots[0]] = None
                    return f"{value.label} is read elsewhere too"
        return ""

    def _apply(self, rule: Rule, match: Match) -> None:
        size = self.graph.size
        with at(reduce(shared_scope, (node.scope for node in match.roots))):
            made = rule.rewrite(match)
        new = (made,) if isinstance(made, Value) else tuple(made)
        fresh = self.graph.latest(self.graph.size - size)
        _check_results(rule, match.outputs, new, fresh)
        self.report.matched(match.roots[0], before=match.outputs, after=new)
        self._replace(match, new, fresh)

    def _replace(self, match: Match, new: Sequence[Value], fresh: Sequence[Node]) -> None:
        """Put `new` in place of what the match returns, and look again at what that changed."""
        old = match.outputs
        changed = [*fresh, *(user for value in old for user in value.users)]
        for was, now in zip(old, new):
            self.graph.replace(was, now)
        if self.roots & set(old):
            self.roots = set(self.graph.roots)
        lost = self._remove(match.inside)
        near = dict.fromkeys([*new, *(v for n in fresh for v in n.inputs), *lost])
        for value in near:
            changed += islice(value.users, _NEAR)
            changed += self.blocked.pop(value, ())
            changed += [value.producer] if value.producer is not None else []
        self._look_again(changed)

    def _remove(self, nodes: Iterable[Node]) -> list[Value]:
        """Take out those of `nodes` that nobody reads any more, and what only they needed.

        Returns the values that lost a reader.
        """
        lost: list[Value] = []
        pending = list(dict.fromkeys(nodes))
        while pending:
            node = pending.pop()
            if node in self.graph and not any(v.users or v in self.roots for v in node.outputs):
                self.graph.remove(node)
                lost += node.inputs
                pending += (v.producer for v in node.inputs if v.producer is not None)
        return lost

    def _look_again(self, nodes: Iterable[Node]) -> None:
        """Queue `nodes` and what reads them, as far up as a pattern can reach."""
        front = list(dict.fromkeys(nodes))
        for level in range(self.depth):
            for node in front:
                if node in self.graph and node not in self.waiting:
                    self.waiting.add(node)
                    self.queue.append(node)
            if level + 1 < self.depth:
                readers = (u for n in front for v in n.outputs for u in islice(v.users, _NEAR))
                front = list(dict.fromkeys(readers))


def _named(match: Match, names: Iterable[str]) -> Iterator[Node]:
    """Nodes of the match, and of its parts, that carry one of `names`."""
    yield from (match.nodes[name] for name in names if name in match.nodes)
    for parts in match.parts.values():
        for part in parts:
            yield from _named(part, names)


def _check_results(
    rule: Rule, old: Sequence[Value], new: Sequence[Value], fresh: Iterable[Node]
) -> None:
    """Raise `GraphError` for the wrong number of results, or ones that read what they replace."""
    if len(new) != len(old):
        raise GraphError(f"rule {rule.title}: expected {len(old)} values, got {len(new)}")
    gone = {was for was, now in zip(old, new) if was is not now}
    for node in fresh:
        read = next((v for v in node.inputs if v in gone), None)
        if read is not None:
            raise GraphError(
                f"rule {rule.title}: {node} reads {read.label}, which is to be replaced; build on "
                "the operands of the match instead"
            )


def tangled(match: Match) -> str:
    """Why results that are to be made together cannot be: one of them is computed from another.

    A value that every result reads cannot be computed from any of them, so what is shared costs
    no search.
    """
    roots, inside = set(match.roots), set(match.inside)
    if len(roots) < 2:
        return ""
    reads = [set(_reads_of(root, inside)) for root in match.roots]
    shared = set.intersection(*reads)
    seen: set[Node] = set()
    pending = [v for found in reads for v in found - shared]
    while pending:
        producer = pending.pop().producer
        if producer is None or producer in seen:
            continue
        if producer in roots:
            return f"one of its results is computed from another, {producer.path or producer}"
        seen.add(producer)
        pending += [v for v in producer.inputs if v not in shared]
    return ""


def _reads_of(root: Node, inside: set[Node]) -> Iterator[Value]:
    """Values that come into the match below `root`."""
    pending, seen = [root], {root}
    while pending:
        for value in pending.pop().inputs:
            producer = value.producer
            if producer is None or producer not in inside:
                yield value
            elif producer not in seen:
                seen.add(producer)
                pending.append(producer)
