"""Sweeps as JSON lines and in the reference's CSV."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from branchgraph.analysis.logs import write_jsonl
from branchgraph.analysis.sweep import Baseline, Point, Sweep, write_reference_csv
from branchgraph.ir.errors import MissingError

FIRST = Point((0.5, math.inf), 0.75, (0.5, 0.25, 0.25), (1.0, 0.5, 0.5), 0.4, 1e-3, 5e-4, 2.0, 4.0)
SECOND = replace(FIRST, threshold=(1.0, 2.0), accuracy=2 / 3, measured=False)
SWEEP = Sweep(Baseline(0.8, 2e-3), (FIRST, SECOND), ("exit1", "exit2", "exit3"), 16)


def test_json_lines_are_the_baseline_and_one_object_a_point(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    write_jsonl(SWEEP, "net", path, front=[FIRST], chosen=FIRST)
    base, first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert base == {
        "kind": "baseline", "network": "net", "accuracy_fraction": 0.8,
        "seconds_per_sample": 2e-3, "batch_samples": 16, "times_are": "measured",
        "exits": ["exit1", "exit2", "exit3"], "exit_seconds_per_sample": [],
    }  # fmt: skip
    assert first["thresholds"] == [0.5, "inf"]
    assert [float(t) for t in first["thresholds"]] == [0.5, math.inf]
    assert (first["on_front"], first["chosen"], first["times_are"]) == (True, True, "measured")
    assert (second["on_front"], second["chosen"], second["times_are"]) == (
        False, False, "modelled",
    )  # fmt: skip
    assert second["accuracy_fraction"] == 2 / 3, "every digit"
    assert first["exit_share_fractions"] == [0.5, 0.25, 0.25]
    assert set(first) == set(second)


def test_the_reference_csv_has_its_header_baseline_and_braces(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    write_reference_csv(SWEEP, "net", path)
    with path.open(newline="") as stream:
        header, base, *points = list(csv.reader(stream))
    assert header == ["Network", "Acc.(%)", "Time(ms)", "Gain", "Thrshld.T", "Exit(%)"]
    assert base == ["net", "80.0", "2.0", "1.0", "-", "-"]
    assert points == [["B-net", "75.0", "1.0", "2.0", "{0.5, inf}", "{50.0, 25.0, 25.0}"]], (
        "a modelled time is not passed off as measured"
    )


def test_a_log_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no folder"):
        write_jsonl(SWEEP, "net", tmp_path / "nowhere" / "sweep.jsonl")
    broken = replace(FIRST, accuracy=math.nan)
    with pytest.raises(ValueError, match="JSON"):
        write_jsonl(replace(SWEEP, points=(broken,)), "net", tmp_path / "sweep.jsonl")
    assert os.listdir(tmp_path) == []
