"""Figures of sweeps and training runs are written whole or not at all."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from branchgraph.analysis.plots import plot_exits, plot_scores, plot_sweep, plot_training
from branchgraph.ir.errors import FormatError, GraphError, MissingError

pytest.importorskip("matplotlib")

MAGIC = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}


@dataclass(frozen=True)
class Row:
    threshold: float | tuple[float, ...]
    accuracy: float
    exit_shares: tuple[float, ...]
    seconds_per_sample: float
    gain: float | None = None
    measured: bool = True
    largest_score: float = 0.5


#: Six rows of the published sweep of B-LeNet (accuracy, share of exit 1, ms per sample).
LENET = [
    Row(t, a / 100, (e / 100, 1 - e / 100), ms / 1e3, 1.935 / ms)
    for t, a, e, ms in (
        (0.5, 98.96, 98.25, 0.252),
        (0.0001, 99.02, 63.75, 0.791),
        (0.005, 99.04, 86.42, 0.439),
        (0.05, 98.98, 94.16, 0.313),
        (1.0, 98.61, 99.88, 0.226),
        (10.0, 98.57, 100.0, 0.224),
    )
]
BASELINE = Row(0.0, 0.9885, (0.0, 1.0), 1.935e-3)


@pytest.mark.parametrize("suffix", MAGIC)
def test_a_sweep_is_drawn(suffix: str, tmp_path: Path) -> None:
    path = plot_sweep(LENET, tmp_path / f"sweep{suffix}", BASELINE, title="B-LeNet")
    content = path.read_bytes()
    assert content.startswith(MAGIC[suffix])
    assert len(content) > 5000
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "rows",
    [
        LENET[:1],
        [Row(0.0, 0.99, (0.0, 1.0), 2e-3), *LENET],
        [
            Row((0.0001, 0.05), 0.77, (0.2, 0.5, 0.3), 2.2e-3),
            Row((5.0, 5.0), 0.75, (1, 0, 0), 9e-4),
        ],
        [Row(math.inf, 0.9, (1.0, 0.0), 1e-3), *LENET],
        [LENET[0], LENET[0]],
        [Row(0.0, 0.9, (0.0, 1.0), 1e-3)],
        [Row((t, t), 0.9, (0.5, 0.5, 0.0), t / 1e3) for t in (0.1 * k for k in range(1, 60))],
    ],
    ids=["one", "zero", "pairs", "infinite", "repeated", "only zero", "many"],
)
def test_sweeps_of_all_kinds_are_drawn(rows: list[Row], tmp_path: Path) -> None:
    assert plot_sweep(rows, tmp_path / "sweep.svg").stat().st_size > 5000


def test_a_front_a_chosen_point_and_modelled_points_are_told_apart(tmp_path: Path) -> None:
    pairs = [
        Row((a, b), 0.9 + a / 100, (a / 10, 0.5 - a / 20, 0.5 - a / 20), 1e-3 + a / 1e4,
            measured=b > 2)
        for a in range(6) for b in range(6)
    ]  # fmt: skip
    front = [p for p in pairs if p.threshold[1] == 5]  # type: ignore[index]
    svg = plot_sweep(
        pairs, tmp_path / "sweep.svg", BASELINE, front=front, chosen=front[2]
    ).read_text()  # fmt: skip
    for text in ("front", "modelled time", "measured, off the front", "chosen", "baseline", "2, 5"):
        assert f"<!-- {text} -->" in svg, text
    assert "<!-- 2, 4 -->" not in svg, "points off the front have no label"
    svg = plot_sweep(LENET, tmp_path / "sweep.svg", BASELINE).read_text()
    assert "<!-- with early exits -->" in svg
    assert "<!-- chosen -->" not in svg


def test_accuracy_and_scores_are_drawn_over_the_share_of_exit_1(tmp_path: Path) -> None:
    svg = plot_exits(LENET, tmp_path / "exits.svg", title="B-LeNet").read_text()
    for text in ("samples leaving at exit 1 (%)", "largest score of the leavers, squares"):
        assert f"<!-- {text} -->" in svg
    repeated = [*LENET, Row((1.0, 2.0), 0.9, (1.0, 0.0), 1e-3)]
    assert plot_exits(repeated, tmp_path / "exits.png").stat().st_size > 5000
    with pytest.raises(GraphError, match="no rows"):
        plot_exits([], tmp_path / "exits.svg")


@pytest.mark.parametrize(
    "scores",
    [
        [[0.5, 0.1, 2.0], [0.3, 0.2]],
        [[10.0**-k for k in range(12)]],
        [[0.0, 0.0]],
        [[1.0]],
    ],
    ids=["plain", "decades", "zero", "one"],
)
def test_sorted_scores_are_drawn_with_their_thresholds(
    scores: list[list[float]], tmp_path: Path
) -> None:
    svg = plot_scores(scores, tmp_path / "scores.svg", (0.25, math.inf)).read_text()
    assert "<!-- exit 1 -->" in svg
    assert "<!-- threshold 0.25 -->" in svg
    assert "<!-- threshold inf -->" not in svg
    with pytest.raises(GraphError, match="no scores"):
        plot_scores([[]], tmp_path / "scores.svg")


def test_figures_leave_the_global_state_of_matplotlib_alone(tmp_path: Path) -> None:
    import matplotlib
    import matplotlib.pyplot

    before = dict(matplotlib.rcParams)
    plot_sweep(LENET, tmp_path / "sweep.png")
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.pyplot.get_fignums() == []


def test_an_empty_or_uneven_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="no rows"):
        plot_sweep([], tmp_path / "sweep.png")
    with pytest.raises(GraphError, match="same number of exits"):
        plot_sweep([*LENET, Row(3.0, 0.9, (1.0,), 1e-3)], tmp_path / "sweep.png")
    assert os.listdir(tmp_path) == []


def test_training_curves_are_drawn(tmp_path: Path) -> None:
    epochs = range(8)
    history = {
        "exit1.loss": [2.0 * math.exp(-e) for e in epochs],
        "exit1.accuracy": [1 - 0.5 * math.exp(-e) for e in epochs],
        "exit1.test_accuracy": [0.9 - 0.5 * math.exp(-e) for e in epochs],
        "loss": [0.0 for e in epochs],
        "learning_rate": [0.1 for e in epochs],
    }
    svg = plot_training(history, tmp_path / "training.svg", title="B-LeNet").read_text()
    for text in ("exit1 (held out)", "network", "accuracy (%)", "epoch"):
        assert f"<!-- {text} -->" in svg
    assert "learning" not in svg
    assert plot_training({"loss": [1.0]}, tmp_path / "one.png").stat().st_size > 5000


def test_a_history_without_losses_is_refused_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"exit1\.loss.*got: lr"):
        plot_training({"lr": [0.1]}, tmp_path / "training.png")


def test_unknown_suffixes_and_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"\.svg, \.png, \.pdf"):
        plot_sweep(LENET, tmp_path / "sweep.xls")
    with pytest.raises(MissingError, match="there is no folder"):
        plot_training({"loss": [1.0]}, tmp_path / "nowhere" / "training.png")


def test_without_matplotlib_the_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingError, match=r"python -m pip install 'branchgraph\[plot\]'"):
        plot_sweep(LENET, tmp_path / "sweep.png")
