"""Sweeps: the table, honest time and the trunk-only column."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np
import pytest
from builders import dense_net_with_exits, images, randomised

from branchgraph.analysis.sweep import COLUMNS, Sweep, rows, sweep, table, write_csv
from branchgraph.compiler import compile
from branchgraph.ir.errors import GraphError, MissingError
from branchgraph.ir.ops.exit import ExitScore
from branchgraph.nets import lenet
from branchgraph.passes.insert_exits import RemoveExits
from branchgraph.passes.specialise import specialise

THRESHOLDS = (0.0, (1.0, 0.5), 10.0)


@pytest.fixture(scope="module")
def measured() -> Sweep:
    graph = dense_net_with_exits()
    labels = np.arange(24) % 5
    return sweep(graph, randomised(graph), images(24), labels, THRESHOLDS, batch=7, repeats=2)


def test_settings_are_one_threshold_for_all_exits_or_one_each(measured: Sweep) -> None:
    assert [p.threshold for p in measured.points] == [(0.0, 0.0), (1.0, 0.5), (10.0, 10.0)]
    assert measured.exits == ("exit1", "exit2", "exit3")


def test_shares_and_accuracies_fit_together(measured: Sweep) -> None:
    for point in measured.points:
        assert sum(point.exit_shares) == pytest.approx(1.0)
        weighted = sum(a * s for a, s in zip(point.exit_accuracies, point.exit_shares))
        assert point.accuracy == pytest.approx(weighted)
    assert measured.points[0].exit_shares == (0.0, 0.0, 1.0)
    assert measured.points[-1].exit_shares == (1.0, 0.0, 0.0)
    assert measured.points[0].accuracy == measured.baseline.accuracy


def test_the_largest_score_at_exit_1_is_that_of_its_leavers(measured: Sweep) -> None:
    graph = dense_net_with_exits()
    every = compile(specialise(graph, training=False, exits="all"), store=randomised(graph))
    (scores,) = ExitScore("entropy").evaluate(every(x=images(24))["exit1"])
    assert measured.points[0].largest_score == 0.0
    assert measured.points[-1].largest_score == pytest.approx(scores.max(), rel=1e-5)


def test_gain_is_the_time_without_branches_over_the_time_with_exits(measured: Sweep) -> None:
    for point in measured.points:
        base = measured.baseline.seconds_per_sample
        assert point.gain == pytest.approx(base / point.seconds_per_sample)
        assert point.trunk_gain == pytest.approx(base / point.trunk_seconds_per_sample)


def test_wall_clock_includes_heads_and_the_trunk_column_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = ExitScore.evaluate

    def slow(self: ExitScore, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        time.sleep(0.05)
        return original(self, *arrays)

    monkeypatch.setattr(ExitScore, "evaluate", slow)
    graph = dense_net_with_exits()
    found = sweep(graph, randomised(graph), images(6), np.zeros(6), [10.0], batch=3, repeats=1)
    (point,) = found.points
    # Two batches, one score each: at least 0.1 s over 6 samples, none of it in the trunk.
    assert point.seconds_per_sample >= 0.1 / 6
    assert point.trunk_seconds_per_sample < 0.05 / 6


def test_the_table_has_a_line_for_the_baseline_and_each_setting(measured: Sweep) -> None:
    lines = table(measured, "Net").splitlines()
    assert len(lines) == 2 + 1 + len(THRESHOLDS)
    assert "trunk-only time (ms)" in lines[0]
    assert lines[2].split()[0] == "Net"
    assert "1, 0.5" in lines[4]
    cells = rows(measured, "Net")
    assert all(len(row) == len(COLUMNS) for row in cells)


def test_the_csv_file_holds_the_same_cells(measured: Sweep, tmp_path: Path) -> None:
    write_csv(measured, "Net", tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(newline="") as stream:
        found = [tuple(row) for row in csv.reader(stream)]
    assert found == [COLUMNS, *rows(measured, "Net")]
    with pytest.raises(MissingError, match="no folder"):
        write_csv(measured, "Net", tmp_path / "nowhere" / "sweep.csv")


@pytest.mark.parametrize("batch", [1, 5])
def test_the_baseline_is_the_network_without_branches(batch: int) -> None:
    graph = dense_net_with_exits()
    store = randomised(graph)
    labels = np.arange(10) % 5
    found = sweep(graph, store, images(10), labels, [0.0], batch=batch, repeats=1)
    logits = compile(RemoveExits().apply(graph), store=store)(x=images(10))["logits"]
    assert found.baseline.accuracy == (logits.argmax(axis=1) == labels).mean()


def test_a_network_without_exits_cannot_be_swept() -> None:
    graph = lenet()
    with pytest.raises(GraphError, match="no early exits to sweep"):
        sweep(graph, randomised(graph), np.zeros((1, 1, 28, 28)), np.zeros(1), [0.5])


def test_a_setting_with_too_few_thresholds_is_refused() -> None:
    graph = dense_net_with_exits()
    with pytest.raises(GraphError, match="2 early exits need 2 thresholds"):
        sweep(graph, randomised(graph), images(2), np.zeros(2), [(0.5,)])


def test_an_empty_data_set_is_refused() -> None:
    graph = dense_net_with_exits()
    with pytest.raises(GraphError, match="no samples"):
        sweep(graph, randomised(graph), images(0), np.zeros(0), [0.5])
