"""Where time and memory of an executable go: by kernel, by node, by scope, and as a trace.

Times are wall clock of each kernel by itself, the median over several runs; what lies between
kernels (Python, copies of inputs and results) is the difference to the time of whole runs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from branchgraph.compiler.backend import Footprint, Work
from branchgraph.ir.dims import Dim, bind_shape
from branchgraph.ir.graph import Location
from branchgraph.ir.types import TensorType

if TYPE_CHECKING:
    from branchgraph.compiler.executable import Executable


@dataclass(frozen=True)
class Row:
    """One kernel: what carries it out, the nodes it stands for, and its cost.

    `milliseconds` is the median over the runs, `start` when it began in the last one. `macs` and
    `bytes` (read and written by its nodes) are None where they depend on data.
    """

    kernel: str
    ops: tuple[str, ...]
    node: str
    scope: str
    milliseconds: float
    start: float
    macs: int | None
    bytes: int | None


@dataclass(frozen=True)
class Report:
    """Kernels in the order they ran; `milliseconds` is the median of whole unwatched runs."""

    rows: tuple[Row, ...]
    milliseconds: float
    footprint: Footprint | None

    def by(self, key: str) -> dict[str, float]:
        """Milliseconds summed by `kernel`, `node` or `scope`, largest first."""
        sums: dict[str, float] = defaultdict(float)
        for row in self.rows:
            sums[getattr(row, key)] += row.milliseconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def text(self, most: int = 40) -> str:
        """A table for people: the `most` expensive kernels, sums by scope, memory."""
        inside = sum(r.milliseconds for r in self.rows)
        lines = [
            f"{self.milliseconds:.3f} ms a run, {inside:.3f} ms of it in {len(self.rows)} kernels",
            f"{'ms':>9}  {'GMAC/s':>7}  {'kernel':<36} {'ops':<32} node",
        ]
        for row in sorted(self.rows, key=lambda r: -r.milliseconds)[:most]:
            rate = f"{row.macs / row.milliseconds / 1e6:7.1f}" if row.macs else " " * 7
            ops = _listed(row.ops)
            lines.append(f"{row.milliseconds:9.4f}  {rate}  {row.kernel:<36} {ops:<32} {row.node}")
        lines.append(f"{'ms':>9}  scope")
        lines += [f"{ms:9.4f}  {name or '(top)'}" for name, ms in self.by("scope").items()]
        if self.footprint is not None:
            f = self.footprint
            lines.append(
                f"memory: arena {f.arena:,} bytes (no arena is smaller than {f.lower_bound:,}),"
                f" packed weights and constants {f.kept:,}, host kernels {f.host}"
            )
        return "\n".join(lines)

    def write_trace(self, path: str | Path) -> None:
        """The last run as a Chrome trace (chrome://tracing, Perfetto): JSON, times in µs."""
        events: list[dict[str, Any]] = [
            {
                "name": row.node or _listed(row.ops),
                "cat": row.scope or "top",
                "ph": "X",
                "ts": row.start * 1e3,
                "dur": row.milliseconds * 1e3,
                "pid": 0,
                "tid": 0,
                "args": {
                    "kernel": row.kernel, "ops": list(row.ops), "macs": row.macs,
                    "bytes": row.bytes,
                },
            }
            for row in self.rows
        ]  # fmt: skip
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def report(
    executable: Executable, inputs: Mapping[str, np.ndarray | float], repeats: int = 10
) -> Report:
    """Run `executable` `2 repeats + 1` times, half of them watched. Updates are committed."""
    executable.run(inputs)
    whole = []
    for _ in range(repeats):
        began = time.perf_counter()
        executable.run(inputs)
        whole.append(time.perf_counter() - began)
    seen: list[list[tuple[Work, float, float]]] = []
    for _ in range(repeats):
        seen.append(_watched(executable, inputs))
    sizes = _sizes(executable, inputs)
    types = executable.program.types
    rows = []
    for runs in zip(*seen):
        work, _, start = runs[-1]
        rows.append(
            Row(
                work.kernel,
                tuple(i.op.opcode for i in work.instructions),
                _node(work),
                _scope(work.instructions[-1].scope),
                statistics.median(r[1] for r in runs) * 1e3,
                start * 1e3,
                _cost(work, types, sizes, "macs"),
                _cost(work, types, sizes, "bytes"),
            )
        )
    return Report(tuple(rows), statistics.median(whole) * 1e3, executable.footprint())


def _watched(
    executable: Executable, inputs: Mapping[str, np.ndarray | float]
) -> list[tuple[Work, float, float]]:
    """One run: each kernel, its seconds, and when it began."""
    events: list[tuple[Work, float, float]] = []
    began = time.perf_counter()

    def observe(work: Work, seconds: float) -> None:
        events.append((work, seconds, time.perf_counter() - began - seconds))

    executable.run(inputs, observe)
    return events


def _sizes(executable: Executable, inputs: Mapping[str, np.ndarray | float]) -> dict[str, int]:
    found: dict[str, int] = {}
    for argument in executable.program.arguments:
        if argument.name in inputs:
            shape = np.shape(inputs[argument.name])
            bind_shape(argument.type.shape, shape, found, f"input {argument.name!r}")
    return found


def _cost(
    work: Work, types: tuple[TensorType, ...], sizes: Mapping[str, int], what: str
) -> int | None:
    """MACs or bytes of the instructions of a kernel."""
    total = 0
    for instruction in work.instructions:
        cost = instruction.op.cost(tuple(types[b] for b in instruction.reads), instruction.types)
        parts = [cost.macs] if what == "macs" else [cost.bytes_read, cost.bytes_written]
        for part in parts:
            value = part.substitute(sizes) if isinstance(part, Dim) else part
            if isinstance(value, Dim):
                return None
            total += int(value)
    return total


def _listed(ops: tuple[str, ...], most: int = 8) -> str:
    """Ops in order, and how many more there are."""
    more = [f"{len(ops) - most} more"] if len(ops) > most else []
    return "+".join((*ops[:most], *more))


def _node(work: Work) -> str:
    """The path of the first named node."""
    for instruction in work.instructions:
        if instruction.name:
            return "/".join(filter(None, (_scope(instruction.scope), instruction.name)))
    return _scope(work.instructions[-1].scope)


def _scope(location: Location) -> str:
    return "/".join(part.name for part in location)
