"""Passes one after another, watched by instruments and checked on the way.

Pipeline((fold, fuse), verify=True).apply(graph)
pipeline("fold_batch_norm", "fuse_branches:rules=R1+R3")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from branchgraph.ir.errors import ClaimError
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Store
from branchgraph.passes.base import Pass, Report, Result
from branchgraph.passes.checking import check_claim

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

        `values` of the states are for passes that depend on them.
        """
        for step in self.passes:
            if not self.instruments and not self.verify:
                graph = step.apply(graph, values)
                continue
            record = self.verify and step.claim != "different"
            result = step.run(graph, record=record, values=values)
            if self.verify:
                self._check(step, graph, result)
            for instrument in self.instruments:
                instrument(step, graph, result)
            graph = result.graph
        return graph

    def _check(self, step: Pass, graph: Graph, result: Result) -> None:
        try:
            check_claim(graph, result.graph, step.claim, report=result.report)
        except ClaimError as error:
            raise ClaimError(f"{step.name}: {error}") from None


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
