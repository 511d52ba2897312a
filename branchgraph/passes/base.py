"""Pass: a frozen dataclass whose fields are its options, from a graph to a new graph.

A pass says what it claims: `equal` (equal values, NaN in the same places, the sign of zero free),
`exact` (the same real function; float64 within 1e-9 relative) or `different` (another network on
purpose). It never changes its argument, writes parameter expressions and never weights, and reports
what it matched and what it refused and why.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from branchgraph.ir.attributes import Attributes, field_types
from branchgraph.ir.cost import deployed_cost
from branchgraph.ir.errors import FormatError
from branchgraph.ir.extract import extract, nodes_between
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.rebuild import clone
from branchgraph.ir.spec import arguments_for, format_spec, parse_spec
from branchgraph.ir.state import Store
from branchgraph.ir.verify import verify

Claim = Literal["equal", "exact", "different"]


@dataclass(frozen=True)
class Region:
    """What one match replaced: the part before and after, as graphs over the same inputs."""

    where: str
    before: Graph
    after: Graph


@dataclass
class Report:
    """What a pass did."""

    name: str
    matches: list[str] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    #: For one sample; None where they are unknown, since sizes are products of symbols.
    macs: tuple[int | None, int | None] = (0, 0)
    seconds: float = 0.0
    #: Parts that were rewritten, if `known` was given.
    regions: list[Region] = field(default_factory=list)
    #: What gives new states of the graph their values from old ones (`materialise`), if anything.
    origin: Graph | None = None
    #: Nodes that were there before the pass; recording regions needs them.
    known: frozenset[Node] | None = None
    #: Values of the states, if the caller gave them: some passes depend on them.
    values: Store | None = None
    #: Paths of nodes that are gone, and why.
    removed: list[tuple[str, str]] = field(default_factory=list)
    #: Outputs that were taken away on purpose.
    dropped: list[str] = field(default_factory=list)

    def matched(
        self, node: Node | str, *, before: Sequence[Value] = (), after: Sequence[Value] = ()
    ) -> None:
        """Note that the pass rewrote `node`.

        `before` and `after` are the values that were replaced and those that took their place, in
        one order; give them while the old nodes are still there, so that the part can be compared
        by itself.
        """
        self.matches.append(_describe(node))
        if self.known is not None and before:
            self.regions.append(_region(_describe(node), before, after, self.known))

    def refused(self, node: Node | str, reason: str) -> None:
        """Note that the pass left `node` alone, and why."""
        self.refusals.append((_describe(node), reason))

    def noted(self, text: str) -> None:
        """Add a line that is neither a match nor a refusal."""
        self.notes.append(text)

    def count(self, before: Graph, after: Graph) -> None:
        """Note the parameters and MACs of the graph before and after."""
        old, new = deployed_cost(before), deployed_cost(after)
        self.parameters = old.parameters, new.parameters
        self.macs = old.macs, new.macs

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {len(self.matches)} matched, {len(self.refusals)} refused, "
            f"parameters {self.parameters[0]:,} -> {self.parameters[1]:,}, "
            f"MACs {_number(self.macs[0])} -> {_number(self.macs[1])}"
        ]
        lines += (f"  refused {where}: {why}" for where, why in self.refusals)
        lines += (f"  {note}" for note in self.notes)
        if None in self.macs:
            lines.append("  MACs are unknown where sizes multiply symbols; bind all but the batch")
        return "\n".join(lines)


def _region(
    where: str, before: Sequence[Value], after: Sequence[Value], known: frozenset[Node]
) -> Region:
    """Both parts, cut where the new nodes read what was there before.

    Of two such values one of which is computed from the other, only the other is a cut: fed by
    themselves, they would no longer agree.
    """
    old = [v for v in after if v.producer is None or v.producer in known]
    made = _made(after, known)
    reads = (v for node in made for v in node.inputs if v.state is None)
    read = dict.fromkeys([*old, *(v for v in reads if v.producer not in made)])
    boundary = [v for v in read if len(read) == 1 or not _depends(v, read)]
    return Region(where, extract(before, boundary), extract(after, boundary))


def _depends(value: Value, others: Collection[Value]) -> bool:
    """Whether `value` is computed from another one of `others`."""
    below = nodes_between([value], ())
    return any(v in others for node in below for v in node.inputs if v is not value)


def _made(values: Sequence[Value], known: frozenset[Node]) -> dict[Node, None]:
    """Nodes below `values` that were not there before."""
    found: dict[Node, None] = {}
    pending = [v.producer for v in values]
    while pending:
        node = pending.pop()
        if node is not None and node not in known and node not in found:
            found[node] = None
            pending += [v.producer for v in node.inputs]
    return found


def _number(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"


def _describe(node: Node | str) -> str:
    return node if isinstance(node, str) else node.path or node.op.opcode


@dataclass(frozen=True)
class Result:
    """A rewritten graph and the report of the pass."""

    graph: Graph
    report: Report


@dataclass(frozen=True)
class Pass(Attributes):
    """Base of all passes, named on definition.

    class Prune(Pass, spelling="prune_gates", claim="equal"): ...
    """

    spelling: ClassVar[str] = ""
    claim: ClassVar[Claim] = "equal"
    registry: ClassVar[dict[str, type[Pass]]] = {}

    def __init_subclass__(
        cls, spelling: str = "", claim: Claim | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if spelling or claim:
            cls.claim = claim or "equal"
        if spelling:
            cls.spelling = spelling
            Pass.registry[spelling] = cls

    @property
    def name(self) -> str:
        """The specification string that builds this pass."""
        return format_spec(self.spelling, self.attributes())

    def rewrite(self, graph: Graph, report: Report) -> None:
        """Change `graph`, a copy that the pass owns."""
        raise NotImplementedError(self.spelling)

    def run(
        self, graph: Graph, *, record: bool = False, values: Store | None = None,
        count: bool = True,
    ) -> Result:  # fmt: skip
        """The rewritten graph, verified, with the report; `record` keeps what was rewritten.

        `values` of the states are for passes that depend on them (`harden_gates`). Without `count`
        the report says nothing of parameters and MACs, which takes two walks over the graphs.
        """
        report = Report(self.name, values=values)
        new = self._rewritten(graph, report, record)
        if count:
            report.count(graph, new)
        return Result(new, report)

    def apply(self, graph: Graph, values: Store | None = None) -> Graph:
        """The rewritten graph, verified; nothing is counted.

        Where the pass makes new states, only the report of `run` says what they come from.
        """
        return self._rewritten(graph, Report(self.name, values=values))

    def _rewritten(self, graph: Graph, report: Report, record: bool = False) -> Graph:
        start = time.perf_counter()
        new = clone(graph)
        if record:
            report.known = frozenset(new.nodes)
        self.rewrite(new, report)
        verify(new)
        report.seconds = time.perf_counter() - start
        return new

    @staticmethod
    def from_spec(text: str) -> Pass:
        """The pass written as `text`, for example `insert_exits:after=conv1`."""
        name, raw = parse_spec(text)
        cls = Pass.registry.get(name)
        if cls is None:
            raise FormatError(f"unknown pass {name!r}; known: {', '.join(sorted(Pass.registry))}")
        try:
            return cls(**arguments_for(raw, field_types(cls), f"pass {name}"))
        except TypeError as error:
            raise FormatError(f"pass {name}: {error}") from None
