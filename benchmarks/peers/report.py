"""Rows, the table that is printed, and the JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What ratios are taken to.
BASE = "torch"


@dataclass
class Row:
    """One system in one cell; what is missing is None, and `error` says why."""

    net: str
    mode: str
    batch: int
    system: str
    times: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    #: Largest relative difference from the reference, and whether it is tolerated.
    difference: float | None = None
    agrees: bool | None = None
    load_seconds: float | None = None
    error: str = ""

    @property
    def cell(self) -> tuple[str, str, int]:
        return self.net, self.mode, self.batch

    @property
    def median_ms(self) -> float | None:
        return 1e3 * statistics.median(self.times) if self.times else None

    @property
    def min_ms(self) -> float | None:
        return 1e3 * min(self.times) if self.times else None

    def as_json(self) -> dict[str, Any]:
        """The row of the file; times and memory are null where there is an error."""
        names = ("net", "mode", "batch", "system", "median_ms", "min_ms", "peak_mb")
        more = ("difference", "load_seconds", "error")
        found = {name: getattr(self, name) for name in names}
        extra = {
            name: getattr(self, name) for name in more if getattr(self, name) not in (None, "")
        }
        return {**found, **extra}


def table(rows: Sequence[Row], gflops: float | None, macs: dict[tuple[str, str, int], int]) -> str:
    """A Markdown table, a line a system; `x bound` is the median over MACs at the GEMM's rate."""
    head = ("net", "mode", "batch", "system", "median ms", "min ms", "/ torch", "x bound",
            "peak MB", "difference", "ready s")  # fmt: skip
    lines = [head, tuple("---" for _ in head)]
    base = {r.cell: r.median_ms for r in rows if r.system == BASE}
    for r in rows:
        where = (r.net, r.mode, str(r.batch), r.system)
        if r.error:
            lines.append((*where, r.error, *[""] * 6))
            continue
        bound = 2e-6 * macs[r.cell] / gflops if gflops else None
        numbers = (
            _text(r.median_ms, ".3f"), _text(r.min_ms, ".3f"),
            _text(_over(r.median_ms, base.get(r.cell)), ".3f"),
            _text(_over(r.median_ms, bound), ".2f"), _text(r.peak_mb, ".0f"),
            _text(r.difference, ".1e"), _text(r.load_seconds, ".1f"),
        )  # fmt: skip
        lines.append((*where, *numbers))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _text(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def write_json(path: Path, rows: Iterable[Row], about: dict[str, Any]) -> None:
    """`{"rows": [...]}` and what the run was."""
    path.write_text(json.dumps({"rows": [r.as_json() for r in rows], **about}, indent=1) + "\n")
