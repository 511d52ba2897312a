"""Screening: grids, the front, the cheapest point, and what is modelled and what is measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import dense_net_with_exits, images, randomised

from branchgraph.analysis import screen as module
from branchgraph.analysis.screen import (
    MOST_SETTINGS,
    TOLERANCE,
    base_list,
    cheapest,
    first_exit_only,
    front,
    grid,
    most_accurate,
    screen,
    spelled,
)
from branchgraph.analysis.sweep import Point, Sweep, sweep
from branchgraph.ir.errors import GraphError
from branchgraph.ir.ops.exit import RELATIONS

TIMES = ("seconds_per_sample", "trunk_seconds_per_sample", "gain", "trunk_gain")
BASE = (0.0, 1.0, 1.4, 10.0)


def point(milliseconds: float, accuracy: float, share: float = 0.5) -> Point:
    seconds = milliseconds / 1e3
    return Point((0.1,), accuracy, (share, 1 - share), (1.0, 1.0), 0.0, seconds, seconds, 1.0, 1.0)


@pytest.fixture(scope="module")
def screened() -> Sweep:
    graph = dense_net_with_exits()
    labels = np.arange(40) % 5
    return screen(
        graph, randomised(graph), images(40), labels, grid(BASE, 2), batch=40, repeats=1
    )  # fmt: skip


# -- grids -----------------------------------------------------------------------------------------


def test_a_grid_has_every_combination_once() -> None:
    assert grid([0.1, 1], 2) == [(0.1, 0.1), (0.1, 1.0), (1.0, 0.1), (1.0, 1.0)]
    assert len(grid(base_list("entropy"), 2)) == 289
    assert grid([1, 1.0, 2], 1) == [(1.0,), (2.0,)]


def test_an_absurd_grid_is_refused_with_its_size_and_what_fits() -> None:
    with pytest.raises(GraphError, match=r"17 .* 4 early exits make 83521 settings.* at most 10,"):
        grid(base_list("entropy"), 4)
    assert len(grid(range(10), 4)) == MOST_SETTINGS
    with pytest.raises(GraphError, match="needs thresholds"):
        grid([], 2)


def test_first_exit_only_switches_the_others_off() -> None:
    assert first_exit_only([0.1, 1], ["entropy"] * 3) == [(0.1, 0.0, 0.0), (1.0, 0.0, 0.0)]
    # A confidence above 0 is what everybody has; above 1 nobody.
    assert first_exit_only([0.9], ["confidence", "margin", "patience"]) == [
        (0.9, 1.0, float("inf"))
    ]


@pytest.mark.parametrize("criterion", RELATIONS)
def test_every_criterion_has_a_base_list(criterion: str) -> None:
    values = base_list(criterion)
    assert list(values) == sorted(set(values))


# -- selection -------------------------------------------------------------------------------------


def test_the_front_keeps_the_fastest_and_what_is_not_worse_by_the_tolerance() -> None:
    points = [
        point(3, 0.9696, 0.3), point(1, 0.95, 0.9), point(2, 0.97, 0.5), point(4, 0.9690, 0.2),
        point(5, 0.98, 0.1),
    ]  # fmt: skip

    def accuracies(tolerance: float) -> list[float]:
        return [p.accuracy for p in front(points, tolerance)]

    assert accuracies(TOLERANCE) == [0.95, 0.97, 0.9696, 0.98]
    assert accuracies(0.0) == [0.95, 0.97, 0.98]
    assert accuracies(0.015) == [0.95, 0.97]
    assert front([], 0.0) == []


def test_the_tolerance_counts_from_the_last_kept_point_and_is_strict() -> None:
    points = [point(1, 0.75, 0.9), point(2, 0.5, 0.5), point(3, 0.25, 0.1)]
    assert front(points, -0.25) == points[:1], "0.50 is not above 0.75 - 0.25"
    assert front(points, -0.26) == points, "each is measured against the one before"


def test_of_points_that_decide_alike_the_fastest_stands_for_all() -> None:
    points = [point(2, 0.9), point(1, 0.9), point(3, 0.9, 0.4)]
    assert front(points) == [points[1], points[2]]


def test_the_cheapest_is_the_fastest_that_is_accurate_enough() -> None:
    points = [point(3, 0.97), point(1, 0.90), point(2, 0.95), point(2, 0.96)]
    assert cheapest(points, 0.95) is points[3]
    assert cheapest(points, 0.97) is points[0]
    assert most_accurate(points) is points[0]
    with pytest.raises(GraphError, match=r"0.99; the best is 0.97 with thresholds 0.1"):
        cheapest(points, 0.99)


@pytest.mark.parametrize("setting", [(0.05, 1.0), (1e-5, 1e20), (0.1 + 0.2,), (float("inf"), 3)])
def test_thresholds_are_spelled_so_that_the_command_line_reads_them(setting) -> None:  # type: ignore[no-untyped-def]
    assert tuple(float(t) for t in spelled(setting).split("+")) == setting
    assert spelled((0.05, 1.0)) == "0.05+1"


# -- screening -------------------------------------------------------------------------------------


def test_derived_points_decide_as_a_sweep_of_the_same_settings(screened: Sweep) -> None:
    graph = dense_net_with_exits()
    labels = np.arange(40) % 5
    real = sweep(graph, randomised(graph), images(40), labels, grid(BASE, 2), batch=40, repeats=1)
    assert screened.exits == real.exits
    assert screened.baseline.accuracy == real.baseline.accuracy
    for derived, run in zip(screened.points, real.points):
        same = dict.fromkeys(TIMES, 0.0) | {"largest_score": 0.0, "measured": True}
        assert replace(derived, **same) == replace(run, **same)
        assert derived.largest_score == pytest.approx(run.largest_score, rel=1e-6)


def test_the_front_is_measured_and_the_rest_modelled(screened: Sweep) -> None:
    measured = [p for p in screened.points if p.measured]
    assert 1 <= len(measured) < len(screened.points) == 16
    # Decided alike with (10, 0): at most one of them was run.
    assert sum(p.measured for p in screened.points if p.threshold[0] == 10.0) <= 1
    best = max(p.accuracy for p in screened.points)
    assert max(p.accuracy for p in measured) == best, "the most accurate one is among them"
    for p in screened.points:
        assert p.gain == pytest.approx(screened.baseline.seconds_per_sample / p.seconds_per_sample)


def test_a_modelled_time_is_that_of_each_exit_weighted_with_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = dense_net_with_exits()
    asked: list[list[tuple[float, ...]]] = []

    def fake(*arguments: object, **options: object) -> Sweep:
        found = sweep(*arguments, **options)  # type: ignore[arg-type]
        asked.append([p.threshold for p in found.points])
        points = [replace(p, seconds_per_sample=float(p.exit_shares @ np.array([1.0, 2.0, 4.0])))
                  for p in found.points]  # fmt: skip
        return replace(found, points=tuple(points))

    monkeypatch.setattr(module, "sweep", fake)
    found = screen(
        graph, randomised(graph), images(30), np.arange(30) % 5, grid(BASE, 2), batch=30, repeats=1
    )  # fmt: skip
    assert asked[0] == [(float("inf"), 0.0), (0.0, float("inf")), (0.0, 0.0)]
    assert found.exit_seconds == (1.0, 2.0, 4.0)
    for p in found.points:
        expected = p.exit_shares[0] + 2 * p.exit_shares[1] + 4 * p.exit_shares[2]
        assert p.seconds_per_sample == pytest.approx(expected)


def test_a_tolerance_that_asks_for_gains_does_not_hide_the_most_accurate_setting() -> None:
    graph = dense_net_with_exits()
    labels = np.arange(40) % 5
    found = screen(
        graph, randomised(graph), images(40), labels, grid(BASE, 2),
        batch=40, repeats=1, tolerance=0.5,
    )  # fmt: skip
    best = most_accurate(found.points)
    assert best.accuracy > min(p.accuracy for p in found.points)
    assert best.accuracy in {p.accuracy for p in found.points if p.measured}


def test_many_settings_take_one_pass_for_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = dense_net_with_exits()
    settings = grid(np.linspace(0.1, 1.6, 40), 2)
    run: list[int] = []

    def counted(*arguments: object, **options: object) -> Sweep:
        found = sweep(*arguments, **options)  # type: ignore[arg-type]
        run.append(len(found.points))
        return found

    monkeypatch.setattr(module, "sweep", counted)
    found = screen(
        graph, randomised(graph), images(20), np.arange(20) % 5, settings, batch=20, repeats=1
    )  # fmt: skip
    assert len(found.points) == 1600
    assert run[0] == 3, "one pass an exit"
    assert sum(run) < 60, "and the front"
