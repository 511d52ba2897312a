"""Threshold sweeps: accuracy, exit shares and honest time for every setting.

Time is wall clock around the whole inference call: trunk, heads, softmax, criterion, gathering of
rows and putting results back. The original's figure, the trunk's time alone, is a second column,
taken in a run of its own. Gain = time of the network without branches / time with exits.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from branchgraph.compiler import Executable, compile
from branchgraph.compiler.backend import Work
from branchgraph.ir.atomic import replacing
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Node
from branchgraph.ir.ops.exit import Exit, ExitScore
from branchgraph.ir.state import Store
from branchgraph.passes.insert_exits import RemoveExits
from branchgraph.passes.lower_exits import GATHER, exits_of


@dataclass(frozen=True)
class Point:
    """One setting of a sweep. Accuracies and shares are fractions, times seconds a sample.

    Times are wall clock when `measured`, else expected from the model of `analysis.screen`.
    """

    threshold: tuple[float, ...]
    accuracy: float
    exit_shares: tuple[float, ...]
    exit_accuracies: tuple[float, ...]
    largest_score: float
    seconds_per_sample: float
    trunk_seconds_per_sample: float
    gain: float
    trunk_gain: float
    measured: bool = True


@dataclass(frozen=True)
class Baseline:
    """The network without branches."""

    accuracy: float
    seconds_per_sample: float


@dataclass(frozen=True)
class Sweep:
    """The baseline and all settings of a sweep.

    `exit_seconds` are of a sample that leaves at each exit, where the time model measured them.
    """

    baseline: Baseline
    points: tuple[Point, ...]
    exits: tuple[str, ...]
    batch: int
    exit_seconds: tuple[float, ...] = ()


class _Measured:
    """One executable over one data set in batches."""

    def __init__(self, executable: Executable, x: np.ndarray, batch: int) -> None:
        self.executable = executable
        self.x = x
        self.batch = batch
        self.run({}, slice(0, batch))

    def run(self, fed: Mapping[str, float], rows: slice) -> dict[str, np.ndarray]:
        return self.executable.run({**fed, "x": self.x[rows]})

    def outputs(self, fed: Mapping[str, float]) -> tuple[dict[str, np.ndarray], float]:
        """All outputs, and wall-clock seconds."""
        parts = []
        start = time.perf_counter()
        for i in range(0, len(self.x), self.batch):
            parts.append(self.run(fed, slice(i, i + self.batch)))
        seconds = time.perf_counter() - start
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, seconds

    def trunk_seconds(self, fed: Mapping[str, float]) -> float:
        """Seconds in instructions of the trunk: no head, criterion or gathering."""
        total = 0.0

        def observe(work: Work, seconds: float) -> None:
            nonlocal total
            instruction = work.instructions[0]
            if not instruction.in_branch and instruction.scope[:1] != (GATHER,):
                total += seconds

        for i in range(0, len(self.x), self.batch):
            self.executable.run({**fed, "x": self.x[i : i + self.batch]}, observe)
        return total


def sweep(
    graph: Graph,
    store: Store,
    x: np.ndarray,
    labels: np.ndarray,
    thresholds: Iterable[float | Sequence[float]],
    *,
    batch: int = 1,
    repeats: int = 3,
    backend: str = "numpy",
) -> Sweep:
    """Measure a declared network with exits at every setting of its thresholds.

    A number sets all early exits, a sequence one each. Times are medians of `repeats` passes over
    the data in batches of `batch`, the baseline's passes interleaved with those of the settings.
    """
    exits = exits_of(graph)
    early = early_exits(graph)
    check_samples(x)
    settings = [setting_of(t, len(early)) for t in thresholds]
    names = [n.inputs[1].name for n in early]
    branchy = _Measured(compile(graph, backend, store=store), x, batch)
    plain = _Measured(compile(RemoveExits().apply(graph), backend, store=store), x, batch)
    times: list[list[float]] = [[] for _ in settings]
    base_times: list[float] = []
    results = []
    for repeat in range(repeats):
        base_outputs, seconds = plain.outputs({})
        base_times.append(seconds)
        for k, setting in enumerate(settings):
            outputs, seconds = branchy.outputs(dict(zip(names, setting)))
            times[k].append(seconds)
            if repeat == 0:
                results.append(outputs)
    base = statistics.median(base_times) / len(x)
    accuracy = float(np.mean(base_outputs["logits"].argmax(axis=1) == labels))
    points = tuple(
        _point(
            exits, setting, outputs, labels, statistics.median(spent) / len(x),
            branchy.trunk_seconds(dict(zip(names, setting))) / len(x), base,
        )
        for setting, outputs, spent in zip(settings, results, times)
    )  # fmt: skip
    exit_names = tuple(n.op.name for n in exits if isinstance(n.op, Exit))
    return Sweep(Baseline(accuracy, base), points, exit_names, batch)


def early_exits(graph: Graph) -> list[Node]:
    """The exits that have a threshold, in order; `GraphError` when there is none."""
    early = [n for n in exits_of(graph) if len(n.inputs) > 1]
    if not early:
        raise GraphError(f"{graph.name} has no early exits to sweep; insert some (insert_exits)")
    return early


def check_samples(x: np.ndarray) -> None:
    """Refuse an empty data set, whose means are undefined."""
    if not len(x):
        raise GraphError("there are no samples to sweep over")


def setting_of(threshold: float | Sequence[float], count: int) -> tuple[float, ...]:
    """One threshold for each of `count` early exits, from one for all or one each."""
    if isinstance(threshold, (int, float)):
        return (float(threshold),) * count
    if len(threshold) != count:
        raise GraphError(f"{count} early exits need {count} thresholds, got {tuple(threshold)}")
    return tuple(float(t) for t in threshold)


def _point(
    exits: list[Node], setting: tuple[float, ...], outputs: Mapping[str, np.ndarray],
    labels: np.ndarray, seconds: float, trunk: float, base: float,
) -> Point:  # fmt: skip
    criterion = exits[0].op.criterion  # type: ignore[attr-defined]
    first = outputs["logits"][outputs["exit"] == 0]
    return point_of(
        setting,
        outputs["exit"],
        outputs["logits"].argmax(axis=1) == labels,
        len(exits),
        _largest_score(criterion, first),
        (seconds, trunk, base),
    )


def point_of(
    setting: tuple[float, ...], taken: np.ndarray, right: np.ndarray, exits: int,
    largest_score: float, times: tuple[float, float, float], measured: bool = True,
) -> Point:  # fmt: skip
    """The point of a setting at which sample i leaves at exit `taken[i]`, with `right[i]` answer.

    `times` are seconds a sample: in all, in the trunk alone, and of the network without branches.
    """
    at_exit = [taken == k for k in range(exits)]
    seconds, trunk, base = times
    return Point(
        threshold=setting,
        accuracy=float(right.mean()),
        exit_shares=tuple(float(m.mean()) for m in at_exit),
        exit_accuracies=tuple(float(right[m].mean()) if m.any() else 0.0 for m in at_exit),
        largest_score=largest_score,
        seconds_per_sample=seconds,
        trunk_seconds_per_sample=trunk,
        gain=base / seconds,
        trunk_gain=base / trunk,
        measured=measured,
    )


def _largest_score(criterion: str, logits: np.ndarray) -> float:
    """The largest criterion score among samples that left at the first exit (0 if none did)."""
    if criterion == "patience" or not len(logits):
        return 0.0
    return float(ExitScore(criterion=criterion).evaluate(logits)[0].max())


#: Header of the table and the CSV file, as the reference prints it, with honest time first.
COLUMNS = (
    "network", "accuracy (%)", "time (ms)", "gain", "threshold", "exit (%)",
    "trunk-only time (ms)", "trunk-only gain", "times are",
)  # fmt: skip


def rows(result: Sweep, name: str) -> list[tuple[str, ...]]:
    """The sweep as text cells under `COLUMNS`, the baseline first."""
    base = result.baseline
    cells: list[tuple[str, ...]]
    cells = [(name, f"{100 * base.accuracy:.2f}", _ms(base.seconds_per_sample), "1.00", "-", "-",
              _ms(base.seconds_per_sample), "1.00", "measured")]  # fmt: skip
    for p in result.points:
        cells.append(
            (
                f"B-{name}", f"{100 * p.accuracy:.2f}", _ms(p.seconds_per_sample), f"{p.gain:.2f}",
                ", ".join(f"{t:g}" for t in p.threshold),
                ", ".join(f"{100 * s:.2f}" for s in p.exit_shares),
                _ms(p.trunk_seconds_per_sample), f"{p.trunk_gain:.2f}",
                "measured" if p.measured else "modelled",
            )
        )  # fmt: skip
    return cells


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4f}"


def write_csv(result: Sweep, name: str, path: Path) -> None:
    """The sweep as CSV; `BranchgraphError` when the file cannot be written."""
    _write_csv(path, [COLUMNS, *rows(result, name)])


def _write_csv(path: Path, cells: Iterable[Sequence[str]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(cells)


#: Header of the reference's CSV files.
REFERENCE_COLUMNS = ("Network", "Acc.(%)", "Time(ms)", "Gain", "Thrshld.T", "Exit(%)")


def reference_rows(result: Sweep, name: str) -> list[tuple[str, ...]]:
    """Cells under `REFERENCE_COLUMNS` as BranchyNet's programs write and read them.

    Numbers are unrounded, exit shares have two decimals, lists stand in braces. The time is wall
    clock; points whose time was not measured are left out, because no cell could say so.
    """
    base = result.baseline
    cells = [(name, 100 * base.accuracy, 1000 * base.seconds_per_sample, 1.0, "-", "-")]
    cells += [
        (f"B-{name}", 100 * p.accuracy, 1000 * p.seconds_per_sample, p.gain,
         _braces(p.threshold), _braces(round(100 * s, 2) for s in p.exit_shares))
        for p in result.points if p.measured
    ]  # fmt: skip
    return [tuple(map(str, row)) for row in cells]


def _braces(numbers: Iterable[float]) -> str:
    return "{" + ", ".join(map(str, numbers)) + "}"


def write_reference_csv(result: Sweep, name: str, path: Path) -> None:
    """The measured points as CSV in the reference's form."""
    _write_csv(path, [REFERENCE_COLUMNS, *reference_rows(result, name)])


def table(result: Sweep, name: str, marks: Sequence[str] = ()) -> str:
    """The sweep as a table for a terminal; `marks` holds a word to write beside each point."""
    cells = [COLUMNS, *rows(result, name)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in cells]
    beside = ["", "", *marks, *[""] * (len(result.points) - len(marks))]
    marked = [f"{line}  {mark}".rstrip() for line, mark in zip(lines, beside)]
    return "\n".join([marked[0], "  ".join("-" * w for w in widths), *marked[1:]])
