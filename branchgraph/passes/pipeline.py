"""Passes one after another, watched by instruments and checked on the way.

Pipeline((fold, fuse), verify=True).apply(graph)
pipeline("fold_batch_norm", "fuse_branches:rules=R1+R3")

The report of a whole pipeline adds up those of its steps. Where steps made new states, its origin
says what these come from, over the states that were there before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce

from branchgraph.ir.errors import ClaimError
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Store
from branchgraph.passes.base import Pass, Report, Result
from branchgraph.passes.checking import check_claim
from branchgraph.passes.materialise import (
    composed,
    evaluate_origin,
    origin_of,
    provenance,
)

#: Called after each pass of a pipeline with the pass, the graph before it and its result.
Instrument = Callable[[Pass, Graph, Result], None]


@dataclass(frozen=True)
class Pipeline:
    """Passes one after another; instruments watch every step.

    With `verify` every step is compared with its claim, each part it rewrote by itself and the
    whole once (`passes.checking`).
    """

    passes: tuple[Pass, ...]
    instruments: tuple[Instrument, ...] = ()
    verify: bool = False

    def apply(self, graph: Graph, values: Store | None = None) -> Graph:
        """The graph after all passes; `ClaimError` names the step that broke its claim.

        `values` of the states are for passes that depend on them. What gives new states their
        values stands in the report of `run`.
        """
        return self._steps(graph, values, count=bool(self.instruments))[0]

    def run(self, graph: Graph, values: Store | None = None) -> Result:
        """The graph after all passes, and one report of them all; raises what `apply` does.

        Regions of the steps are left out, since each step claims something of its own. New states
        that a step makes have values for the steps behind it; `values` itself is not changed.
        """
        after, reports = self._steps(graph, values, count=True)
        return Result(after, _summed(graph, after, reports))

    def _steps(self, graph: Graph, values: Store | None, count: bool) -> tuple[Graph, list[Report]]:
        reports = []
        for step in self.passes:
            record = self.verify and step.claim != "different"
            result = step.run(graph, record=record, values=values, count=count)
            if self.verify:
                self._check(step, graph, result)
            for instrument in self.instruments:
                instrument(step, graph, result)
            values = _with_origin(values, result.report.origin)
            graph = result.graph
            reports.append(result.report)
        return graph, reports

    def _check(self, step: Pass, graph: Graph, result: Result) -> None:
        try:
            check_claim(graph, result.graph, step.claim, report=result.report)
        except ClaimError as error:
            raise ClaimError(f"{step.name}: {error}") from None


def _with_origin(values: Store | None, origin: Graph | None) -> Store | None:
    """`values` with those of the states that `origin` makes from states with values."""
    if values is None or origin is None:
        return values
    more = values.copy()
    known = {s for s, sources in provenance(origin).items() if all(o in values for o in sources)}
    evaluate_origin(origin_of(known, origin), more)
    return more


def _summed(before: Graph, after: Graph, reports: Sequence[Report]) -> Report:
    """One report of all steps."""
    whole = Report(" ".join(r.name for r in reports))
    whole.count(before, after)
    for report in reports:
        whole.matches += report.matches
        whole.refusals += report.refusals
        whole.notes += report.notes
        whole.removed += report.removed
        whole.dropped += report.dropped
        whole.seconds += report.seconds
    origins = [r.origin for r in reports if r.origin is not None]
    if origins:
        whole.origin = origin_of(after.states, reduce(composed, origins))
    return whole


def pipeline(*specs: str, verify: bool = False) -> Pipeline:
    """A pipeline from specification strings."""
    return Pipeline(tuple(Pass.from_spec(spec) for spec in specs), verify=verify)


@dataclass
class Reports:
    """An instrument that keeps the report of every step."""

    reports: list[Report] = field(default_factory=list)

    def __call__(self, step: Pass, graph: Graph, result: Result) -> None:
        self.reports.append(result.report)

    def __str__(self) -> str:
        return "\n".join(f"{report}\n  {report.seconds:.3f} s" for report in self.reports)
