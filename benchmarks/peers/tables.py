"""The tables of `suite.py`: inference and training, from what `compare.py` wrote.

    ratio         branchgraph over PyTorch eager: the median of the runs (lowest to highest)
    reached       against the target: `yes`, `within 5 %`, or `no`
    closest peer  the peer that branchgraph is least ahead of, or most behind, and branchgraph's
                  time over its: the median of the runs that have both; below 1 all are slower
    / bound       multiple of the time that the MACs take at the rate of a large matrix product
    MB            peak resident memory beyond the imports, branchgraph / PyTorch
    first step s  from the declared network to the end of the first step, branchgraph /
                  torch.compile, both with empty caches

A second table has each system's milliseconds. Cells that a peer fails in are named below.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peers.report import BASE, markdown

OURS = "branchgraph"
COMPILED = "torch.compile"
TOLERANCE = 1.05
MODES = {"infer": "inference", "train": "training step"}
NOTHING = "-"

HEAD = ("batch", "ms", "ratio to PyTorch", "target", "reached", "closest peer", "/ bound", "MB",
        "first step s")  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One measured cell: what it is called, its target, and the content of its file."""

    title: str
    mode: str
    batch: int
    target: float | None
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.title}, {MODES[self.mode]}, batch {self.batch}"

    def row(self, system: str) -> Mapping[str, Any]:
        """The row of a system; empty where it is not measured or failed."""
        rows = (r for r in self.content["rows"] if r["system"] == system and "error" not in r)
        return next(rows, {})

    @property
    def systems(self) -> list[str]:
        return [r["system"] for r in self.content["rows"]]


def tables(found: Sequence[Found]) -> str:
    """All tables, what they were measured on, and what failed, as Markdown."""
    parts = [_about(found)] if found else []
    for mode, name in MODES.items():
        of_mode = [f for f in found if f.mode == mode]
        if of_mode:
            parts.append(_summaries(name, of_mode))
            parts.append(_milliseconds(name, of_mode))
    parts.extend(_failures(found))
    return "\n\n".join(parts) + "\n"


def _summaries(mode: str, found: Iterable[Found]) -> str:
    head = (mode, *HEAD)
    return markdown([head, ["---"] * len(head), *(summary(f) for f in found)])


def summary(found: Found) -> list[str]:
    """The line of a cell."""
    ours, torch, compiled = (found.row(s) for s in (OURS, BASE, COMPILED))
    return [
        found.title,
        str(found.batch),
        _text(ours.get("median_ms"), ".3g"),
        _ratio(ours),
        NOTHING if found.target is None else f"≤ {found.target:.2f}",
        reached(ours.get("ratio"), found.target),
        _closest(found),
        _text(ours.get("bound_multiple"), ".2f"),
        _pair(ours.get("peak_mb"), torch.get("peak_mb"), ".0f"),
        _pair(ours.get("compile_s"), compiled.get("compile_s"), ".1f"),
    ]


def _ratio(row: Mapping[str, Any]) -> str:
    if "ratio" not in row:
        return NOTHING
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


def reached(ratio: float | None, target: float | None) -> str:
    """Whether the ratio is at most the target."""
    if ratio is None or target is None:
        return NOTHING
    if ratio <= target:
        return "yes"
    return "within 5 %" if ratio <= TOLERANCE * target else "no"


def _closest(found: Found) -> str:
    ratios = [(r, s) for s in found.systems if s != OURS and (r := ratio_to(found, s)) is not None]
    if not ratios:
        return NOTHING
    ratio, system = max(ratios)
    return f"{system} {ratio:.2f}"


def ratio_to(found: Found, system: str) -> float | None:
    """Our time over a peer's: the median over the runs that have both."""
    pairs = zip(found.row(OURS).get("runs", ()), found.row(system).get("runs", ()))
    ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    return statistics.median(ratios) if ratios else None


def _milliseconds(mode: str, found: Sequence[Found]) -> str:
    systems = list(dict.fromkeys(s for f in found for s in f.systems if f.row(s)))
    head = (f"{mode}, ms", "batch", *systems)
    times = ([_text(f.row(s).get("median_ms"), ".3g") for s in systems] for f in found)
    lines = [[f.title, str(f.batch), *ms] for f, ms in zip(found, times)]
    return markdown([head, ["---"] * len(head), *lines])


def _about(found: Sequence[Found]) -> str:
    """Dates, machines and versions of all cells; more than one of a kind is shown."""
    contents = [f.content for f in found if "date" in f.content]
    dates = sorted({c["date"] for c in contents})
    machines = sorted({f"{c['machine']}, {c['threads']} threads" for c in contents})
    versions = sorted({f"{k} {v}" for c in contents for k, v in c["versions"].items()})
    runs = sorted({len(f.row(OURS).get("runs", ())) for f in found})
    counted = f"runs of a cell: {' or '.join(map(str, runs))}"
    return "; ".join((" and ".join(dates), *machines, counted, ", ".join(versions))) + "."


def _failures(found: Sequence[Found]) -> list[str]:
    """A list of what a peer, or the whole cell, failed in; inference engines do not train."""
    lines = [f"- {f.name}: {f.content['failure']}" for f in found if "failure" in f.content]
    for f in found:
        errors: dict[str, list[str]] = {}
        for row in f.content["rows"]:
            if "error" in row and not row["error"].endswith("does not train"):
                errors.setdefault(_first_words(row["error"]), []).append(row["system"])
        lines.extend(f"- {f.name}: {', '.join(who)}: {why}" for why, who in errors.items())
    return ["\n".join(lines)] if lines else []


def _first_words(error: str, length: int = 100) -> str:
    return error if len(error) <= length else error[:length].rsplit(" ", 1)[0] + " ..."


def _pair(ours: float | None, theirs: float | None, form: str) -> str:
    return f"{_text(ours, form)} / {_text(theirs, form)}"


def _text(number: float | None, form: str) -> str:
    return NOTHING if number is None else format(number, form)
