"""Where a training run stands: finished epochs, and how far the one under way has come."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from branchgraph.ir.atomic import replacing
from branchgraph.ir.errors import FormatError

#: File types that `write_log` knows.
LOG_SUFFIXES = (".csv", ".jsonl")


@dataclass
class History:
    """What each epoch gave: unweighted means over batches, and its seconds."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def series(self, name: str) -> list[float]:
        """One quantity over the epochs."""
        return [epoch[name] for epoch in self.epochs]

    @property
    def names(self) -> list[str]:
        """Quantities that are recorded."""
        return list(self.epochs[0]) if self.epochs else []


@dataclass
class Progress:
    """The state of a run between two steps: with it and the values of the states, a run goes on.

    `epoch` epochs are finished, and `step` steps of the next one, which gave `sums` in `seconds`.
    """

    history: History = field(default_factory=History)
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return len(self.history.epochs)

    def add(self, result: Mapping[str, float], seconds: float) -> None:
        """Take in one step."""
        self.step += 1
        self.seconds += seconds
        for name, value in result.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Means over the steps of the epoch under way."""
        return {name: total / self.step for name, total in self.sums.items()}

    def close(self, means: dict[str, float]) -> None:
        """Finish the epoch with what it gave."""
        self.history.epochs.append(means)
        self.history.seconds.append(self.seconds)
        self.step, self.sums, self.seconds = 0, {}, 0.0


# -- logs ------------------------------------------------------------------------------------------


def check_log(path: str | os.PathLike[str]) -> Path:
    """`path`, if `write_log` knows its type; else `FormatError`."""
    target = Path(path)
    if target.suffix.lower() not in LOG_SUFFIXES:
        raise FormatError(f"{target}: the name of a log must end in {' or '.join(LOG_SUFFIXES)}")
    return target


def write_log(history: History, path: str | os.PathLike[str]) -> None:
    """One row (.csv) or JSON object (.jsonl) an epoch: `epoch` from 1, `seconds`, every mean.

    The file is written whole or not at all, so a run that resumes leaves no epoch twice. What is
    not finite is `nan` or `inf` in CSV and `null` in JSON, which knows no such numbers.
    """
    target = check_log(path)
    rows = [
        {"epoch": k, "seconds": seconds, **means}
        for k, (means, seconds) in enumerate(zip(history.epochs, history.seconds), start=1)
    ]
    write = _csv if target.suffix.lower() == ".csv" else _json_lines
    with replacing(target) as temporary:
        write(rows, temporary)


def _csv(rows: list[dict[str, float]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["epoch", "seconds"]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _json_lines(rows: list[dict[str, float]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
            stream.write(json.dumps(finite, allow_nan=False) + "\n")
