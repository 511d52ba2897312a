"""Rows of a run, their summary over several runs, the table that is printed, and the JSON file.

A run measures a cell (network, mode, batch) once, in fresh processes. Over the runs of a cell a
system's time is the median of its runs' medians and the minimum of their minima; its ratio is the
median of the ratios to PyTorch eager of the same run, with the lowest and the highest. So a run in
which the machine was slow moves a time, but a ratio only as far as it hit the systems unevenly.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: What ratios are taken to.
BASE = "torch"


@dataclass
class Row:
    """One system in one cell and one run; what is missing is None, and `error` says why."""

    net: str
    mode: str
    batch: int
    system: str
    times: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    #: Largest relative difference from the reference.
    difference: float | None = None
    #: Seconds from the declared network to the end of the first step.
    compile_s: float | None = None
    error: str = ""

    @property
    def median_ms(self) -> float | None:
        return 1e3 * statistics.median(self.times) if self.times else None

    @property
    def min_ms(self) -> float | None:
        return 1e3 * min(self.times) if self.times else None


@dataclass(frozen=True)
class Run:
    """One measurement of a cell: a row for each system, and the rate of a matrix product in it."""

    rows: Sequence[Row]
    gflops: float | None

    def row(self, system: str) -> Row | None:
        return next((r for r in self.rows if r.system == system), None)

    def median_ms(self, system: str) -> float | None:
        """What the system took in this run; None where it failed or was left out."""
        row = self.row(system)
        return None if row is None or row.error else row.median_ms

    def bound_ms(self, macs: int) -> float | None:
        """How long the MACs take at the rate of the matrix product."""
        return 2e-6 * macs / self.gflops if self.gflops else None


@dataclass(frozen=True)
class Summary:
    """One system in one cell over all runs; all numbers are None where there is an error."""

    net: str
    mode: str
    batch: int
    system: str
    median_ms: float | None = None
    min_ms: float | None = None
    peak_mb: float | None = None
    #: Median time over PyTorch's: the median of the runs, the lowest and the highest.
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    bound_multiple: float | None = None
    compile_s: float | None = None
    difference: float | None = None
    #: The median of each run in milliseconds, None where the system was left out.
    runs: tuple[float | None, ...] = ()
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """The row of the file; times and memory are null where missing, the rest is left out."""
        required = ("net", "mode", "batch", "system", "median_ms", "min_ms", "peak_mb")
        missing = (None, "", ())
        return {k: v for k, v in asdict(self).items() if k in required or v not in missing}


def merge(runs: Sequence[Run], macs: int) -> list[Summary]:
    """A summary for each system of the first run, in its order; later runs may leave systems out.

    An error in any run is the system's.
    """
    return [_summary(row, runs, macs) for row in runs[0].rows]


def _summary(first: Row, runs: Sequence[Run], macs: int) -> Summary:
    system = first.system
    where = (first.net, first.mode, first.batch, system)
    rows = [r for run in runs if (r := run.row(system)) is not None]
    error = next((r.error for r in rows if r.error), "")
    if error:
        return Summary(*where, error=error)
    ratios = _known(_over(run.median_ms(system), run.median_ms(BASE)) for run in runs)
    bounds = _known(_over(run.median_ms(system), run.bound_ms(macs)) for run in runs)
    return Summary(
        *where,
        median_ms=_median(_known(r.median_ms for r in rows)),
        min_ms=min(_known(r.min_ms for r in rows), default=None),
        peak_mb=first.peak_mb,
        ratio=_median(ratios),
        ratio_low=min(ratios, default=None),
        ratio_high=max(ratios, default=None),
        bound_multiple=_median(bounds),
        compile_s=_median(_known(r.compile_s for r in rows)),
        difference=first.difference,
        runs=tuple(run.median_ms(system) for run in runs),
    )


def _known(numbers: Iterable[float | None]) -> list[float]:
    return [n for n in numbers if n is not None]


def _median(numbers: Sequence[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def table(summaries: Sequence[Summary]) -> str:
    """A Markdown table, a line a system; `x bound` is the median over MACs at the GEMM's rate."""
    head = ("net", "mode", "batch", "system", "median ms", "min ms", "/ torch", "low", "high",
            "x bound", "peak MB", "difference", "ready s")  # fmt: skip
    lines = [head, tuple("---" for _ in head)]
    for s in summaries:
        where = (s.net, s.mode, str(s.batch), s.system)
        if s.error:
            lines.append((*where, s.error, *[""] * 8))
            continue
        numbers = (
            (s.median_ms, ".3f"), (s.min_ms, ".3f"),
            (s.ratio, ".3f"), (s.ratio_low, ".3f"), (s.ratio_high, ".3f"),
            (s.bound_multiple, ".2f"), (s.peak_mb, ".0f"), (s.difference, ".1e"),
            (s.compile_s, ".1f"),
        )  # fmt: skip
        lines.append((*where, *(_text(n, form) for n, form in numbers)))
    return markdown(lines)


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """Lines of cells as a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def write_json(path: Path, summaries: Iterable[Summary], about: dict[str, Any]) -> None:
    """`{"rows": [...]}` and what the run was."""
    rows = [s.as_json() for s in summaries]
    path.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")
