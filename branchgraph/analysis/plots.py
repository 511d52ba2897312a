"""Figures of measurements: threshold sweeps and training curves.

`plot_sweep` draws what BranchyNet (arXiv 1709.01686) reports of a sweep: accuracy against the
wall-clock time per sample, and the shares of the exits against the threshold. `plot_exits` draws
accuracy and largest score against the share that leaves first, `plot_scores` the sorted scores of
each exit, `plot_training` the losses and accuracies of all exits over the epochs. Figures are drawn
off screen and leave matplotlib's global state alone.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from branchgraph.ir.atomic import replacing
from branchgraph.ir.errors import FormatError, GraphError, MissingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

SUFFIXES = (".svg", ".png", ".pdf")

#: The palette of Okabe and Ito (2008), for readers with colour deficiencies.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C7A00", "#555555")
_LINE, _BASELINE, _QUIET = "#0072B2", "#D55E00", "#555555"

#: Where the label of a point may stand: offset in points, horizontal and vertical alignment.
_OFFSETS = (
    ((4, 3), "left", "bottom"),
    ((4, -3), "left", "top"),
    ((-4, 3), "right", "bottom"),
    ((-4, -3), "right", "top"),
)
#: Most thresholds written under an axis.
_MOST_TICKS = 24


class SweepRow(Protocol):
    """What is drawn of one setting of the thresholds. A row may also have a `gain`."""

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """One threshold for all early exits, or one an exit."""

    @property
    def accuracy(self) -> float:
        """Correct samples, 0..1."""

    @property
    def exit_shares(self) -> tuple[float, ...]:
        """Samples that leave at each exit, 0..1, the last exit included."""

    @property
    def seconds_per_sample(self) -> float:
        """Wall-clock time."""


class ScoredRow(SweepRow, Protocol):
    """A row that also knows its leavers' scores."""

    @property
    def largest_score(self) -> float:
        """The largest score among samples that left at the first exit."""


class Measured(Protocol):
    """What is drawn of a baseline."""

    @property
    def accuracy(self) -> float:
        """Correct samples, 0..1."""

    @property
    def seconds_per_sample(self) -> float:
        """Wall-clock time."""


def plot_sweep(
    rows: Sequence[SweepRow],
    path: str | os.PathLike[str],
    baseline: Measured | None = None,
    title: str = "",
    front: Sequence[SweepRow] = (),
    chosen: SweepRow | None = None,
) -> Path:
    """Draw a threshold sweep into `path` (.svg, .png or .pdf) and return it.

    On the left accuracy against time per sample, with the baseline as a diamond; on the right the
    shares of the exits (areas) and the accuracy (line) against the threshold. With a `front` its
    points are joined and labelled, the others are dots, and the panel on the right shows the front
    when there are too many rows for one place each. `chosen` is marked with a star.
    """
    if not rows:
        raise GraphError("there is nothing to plot: the sweep has no rows")
    target = _target(path)
    figure = _figure(10.5, 4.2)
    left, right = figure.subplots(1, 2)
    _trade_off(left, rows, baseline, front, chosen)
    _shares(right, front if front and len(rows) > _MOST_TICKS else rows)
    if title:
        figure.suptitle(title)
    _label_points(figure, left, front or rows)
    return _save(figure, target)


def plot_exits(rows: Sequence[ScoredRow], path: str | os.PathLike[str], title: str = "") -> Path:
    """Draw accuracy and the largest score of the leavers against the share leaving at exit 1.

    Rows are joined where each share comes once, as in a sweep of the first exit.
    """
    if not rows:
        raise GraphError("there is nothing to plot: the sweep has no rows")
    target = _target(path)
    figure = _figure(6.0, 4.2)
    axes = figure.subplots()
    ordered = sorted(rows, key=lambda r: r.exit_shares[0])
    shares = [100 * r.exit_shares[0] for r in ordered]
    joined = "-" if len({r.exit_shares[1:] for r in ordered}) == len(set(shares)) else ""
    axes.plot(shares, [100 * r.accuracy for r in ordered], f"o{joined}", color=_LINE, markersize=4)
    _decorate(axes, "samples leaving at exit 1 (%)", "accuracy (%), dots")
    axes.yaxis.label.set_color(_LINE)
    beside = axes.twinx()
    scores = [r.largest_score for r in ordered]
    beside.plot(shares, scores, f"s{joined}", color=_BASELINE, markersize=4)
    beside.set_ylabel("largest score of the leavers, squares", color=_BASELINE)
    beside.spines["top"].set_visible(False)
    if title:
        figure.suptitle(title)
    return _save(figure, target)


def plot_scores(
    scores: Sequence[ArrayLike],
    path: str | os.PathLike[str],
    thresholds: Sequence[float] = (),
    title: str = "",
) -> Path:
    """Draw the sorted scores of each exit, and dashed its threshold, over the share of samples.

    The axis is logarithmic where the middle nine tenths of the scores span more than two decades;
    scores below its range, down to 0, are cut off.
    """
    if not scores or not all(np.size(s) for s in scores):
        raise GraphError("there is nothing to plot: there are no scores")
    target = _target(path)
    figure = _figure(6.0, 4.2)
    axes = figure.subplots()
    ordered = [np.sort(np.asarray(s, dtype=np.float64)) for s in scores]
    for k, (values, colour) in enumerate(zip(ordered, itertools.cycle(_COLOURS))):
        places = 100 * (np.arange(len(values)) + 0.5) / len(values)
        axes.plot(places, values, color=colour, label=f"exit {k + 1}")
        if k < len(thresholds) and math.isfinite(thresholds[k]):
            text = f"threshold {thresholds[k]:.4g}"
            axes.axhline(thresholds[k], color=colour, linestyle="--", linewidth=1, label=text)
    _decorate(axes, "samples, sorted by score (%)", "score")
    axes.set_xlim(0, 100)
    positive = np.concatenate(ordered)
    positive = positive[positive > 0]
    if len(positive):
        low, high = np.quantile(positive, [0.05, 0.95])
        if high > 100 * low:
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(float(low) / 10, 1e-9))
    axes.legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title)
    return _save(figure, target)


def plot_training(
    history: Mapping[str, Sequence[float]], path: str | os.PathLike[str], title: str = ""
) -> Path:
    """Draw training curves into `path` (.svg, .png or .pdf) and return it.

    `history` maps names to one value an epoch: names that hold `loss` go to the left panel, those
    that hold `acc` to the right one, others (learning rates, times) are left out. What remains of
    the name is the label, so `exit1.loss` and `exit1.accuracy` share a colour; curves of a test or
    validation set are dashed.
    """
    panels = {measure: [n for n in history if measure in n.lower()] for measure in ("loss", "acc")}
    drawn = {measure: names for measure, names in panels.items() if names}
    if not drawn:
        raise FormatError(
            "there is nothing to plot: expected names such as 'exit1.loss' and 'exit1.accuracy', "
            f"got: {', '.join(history) or 'none'}"
        )
    target = _target(path)
    figure = _figure(5.25 * len(drawn), 4.0)
    curves = [_curve(n) for names in drawn.values() for n in names]
    colours = _colours([curve for curve, _ in curves])
    for axes, (measure, names) in zip(
        figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items()
    ):
        for name in names:
            values = history[name]
            scale = 100.0 if measure == "acc" else 1.0
            curve, held_out = _curve(name)
            axes.plot(
                range(1, len(values) + 1), [scale * v for v in values], color=colours[curve],
                linestyle="--" if held_out else "-", label=_shown(curve, held_out),
                marker="o" if len(values) < 3 else "",
            )  # fmt: skip
        _decorate(axes, "epoch", "loss" if measure == "loss" else "accuracy (%)")
        if measure == "loss" and _decades([v for n in names for v in history[n]]) > 1.5:
            axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(1, max(2, *(len(history[n]) for n in names)))
        axes.legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title)
    return _save(figure, target)


# -- sweep -----------------------------------------------------------------------------------------


def _trade_off(
    axes: Axes, rows: Sequence[SweepRow], baseline: Measured | None,
    front: Sequence[SweepRow], chosen: SweepRow | None,
) -> None:  # fmt: skip
    if front:
        for is_measured, label in ((False, "modelled time"), (True, "measured, off the front")):
            found = [r for r in rows if r not in front and _is_measured(r) == is_measured]
            if found:
                face = _QUIET if is_measured else "none"
                axes.scatter(*_places(found), s=10, facecolors=face, edgecolors=_QUIET,
                             linewidths=0.6, alpha=0.6, label=label)  # fmt: skip
    line = sorted(front or rows, key=lambda r: (r.seconds_per_sample, r.accuracy))
    label = "front" if front else "with early exits"
    axes.plot(*_places(line), "-o", color=_LINE, markersize=4, label=label)
    if chosen is not None:
        axes.plot(*_places([chosen]), "*", color="#E69F00", markeredgecolor="black",
                  markeredgewidth=0.6, markersize=13, label="chosen")  # fmt: skip
    if baseline is not None:
        x, y = 1e3 * baseline.seconds_per_sample, 100 * baseline.accuracy
        axes.plot([x], [y], "D", color=_BASELINE, markersize=8, label="baseline")
    if baseline is not None or front or chosen is not None:
        axes.legend(fontsize=8, frameon=False)
    axes.margins(0.1)
    _decorate(axes, "time per sample (ms)", "accuracy (%)")


def _places(rows: Sequence[SweepRow]) -> tuple[list[float], list[float]]:
    return [1e3 * r.seconds_per_sample for r in rows], [100 * r.accuracy for r in rows]


def _is_measured(row: SweepRow) -> bool:
    return bool(getattr(row, "measured", True))


def _label_points(figure: Figure, axes: Axes, rows: Sequence[SweepRow]) -> None:
    """Write its threshold at each point, where there is room for it; the best points first."""
    figure.draw_without_rendering()
    legend = axes.get_legend()
    taken: list[Any] = [legend.get_window_extent()] if legend else []
    for row in sorted(rows, key=lambda r: (-r.accuracy, r.seconds_per_sample)):
        point = (1e3 * row.seconds_per_sample, 100 * row.accuracy)
        for (dx, dy), across, up in _OFFSETS:
            text = axes.annotate(
                _point(row), point, xytext=(dx, dy), textcoords="offset points", fontsize=6.5,
                color=_QUIET, ha=across, va=up,
            )  # fmt: skip
            box = text.get_window_extent()
            inside = axes.bbox.fully_containsx(box.x0) and axes.bbox.fully_containsx(box.x1)
            if inside and box.count_overlaps(taken) == 0:
                taken.append(box)
                break
            text.remove()


def _point(row: SweepRow) -> str:
    """`0.05 (3.1×)`: threshold and, where there is one, gain."""
    gain = getattr(row, "gain", None)
    return _threshold(row.threshold) + ("" if gain is None else f" ({gain:.2g}×)")


def _threshold(threshold: float | tuple[float, ...]) -> str:
    return ", ".join(f"{t:g}" for t in _thresholds(threshold))


def _thresholds(threshold: float | tuple[float, ...]) -> tuple[float, ...]:
    return tuple(threshold) if isinstance(threshold, (tuple, list)) else (threshold,)


def _shares(axes: Axes, rows: Sequence[SweepRow]) -> None:
    """Shares of the exits: areas over one threshold, bars where there are several or one row."""
    numbers = [_thresholds(r.threshold) for r in rows]
    plain = all(len(set(t)) == 1 and math.isfinite(t[0]) and t[0] >= 0 for t in numbers)
    distinct = len({t[0] for t in numbers}) == len(rows) > 1
    draw = _areas if plain and distinct else _bars
    ordered, places = draw(axes, rows)
    axes.set_ylim(0, 100)
    beside = axes.twinx()
    accuracies = [100 * r.accuracy for r in ordered]
    beside.plot(places, accuracies, "-o", color="black", markersize=3, linewidth=1.2)
    beside.set_ylabel("accuracy (%), line")
    beside.margins(y=0.15)
    _decorate(axes, "threshold", "samples leaving (%)")
    axes.grid(False)
    axes.legend(
        fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False,
        ncol=min(len(ordered[0].exit_shares), 6),
    )  # fmt: skip


def _areas(axes: Axes, rows: Sequence[SweepRow]) -> tuple[list[SweepRow], list[float]]:
    ordered = sorted(rows, key=lambda r: _thresholds(r.threshold)[0])
    places = [_thresholds(r.threshold)[0] for r in ordered]
    names, shares = _named_shares(ordered)
    axes.stackplot(places, shares, labels=names, colors=_tints(len(names)))
    positive = min(p for p in places if p > 0)
    # A threshold of 0 (nobody leaves) has no place on a logarithmic axis; near 0 it is linear.
    if places[0] > 0:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=positive)
    axes.set_xlim(places[0], places[-1])
    return ordered, places


def _bars(axes: Axes, rows: Sequence[SweepRow]) -> tuple[list[SweepRow], list[float]]:
    ordered = sorted(rows, key=lambda r: -r.seconds_per_sample)
    places = [float(i) for i in range(len(ordered))]
    names, shares = _named_shares(ordered)
    bottom = [0.0] * len(ordered)
    for name, share, colour in zip(names, shares, _tints(len(names))):
        axes.bar(places, share, 0.85, bottom=bottom, label=name, color=colour)
        bottom = [b + s for b, s in zip(bottom, share)]
    every = math.ceil(len(ordered) / _MOST_TICKS)
    texts = [_threshold(r.threshold) for r in ordered]
    axes.set_xticks(places[::every], texts[::every], rotation=45, ha="right", fontsize=7)
    return ordered, places


def _named_shares(rows: Sequence[SweepRow]) -> tuple[list[str], list[list[float]]]:
    exits = len(rows[0].exit_shares)
    if any(len(r.exit_shares) != exits for r in rows):
        raise GraphError("the rows of a sweep must have the same number of exits")
    names = [f"exit {k + 1}" for k in range(exits)]
    return names, [[100 * r.exit_shares[k] for r in rows] for k in range(exits)]


def _tints(count: int) -> list[str]:
    """Pale colours, so that a line drawn over them stays visible; the last exit is the palest."""
    from matplotlib.colors import to_hex, to_rgb

    def pale(colour: str) -> str:
        red, green, blue = (0.45 * c + 0.55 for c in to_rgb(colour))
        return to_hex((red, green, blue))

    return [pale(_COLOURS[k % len(_COLOURS)]) for k in range(count)]


# -- training --------------------------------------------------------------------------------------


def _curve(name: str) -> tuple[str, bool]:
    """(`exit1`, True) from `exit1.test_accuracy`: whose curve it is, and whether held out."""
    parts = [p for p in name.replace("/", ".").replace("_", ".").split(".") if p]
    held_out = [p for p in parts if p.lower() in ("test", "validation", "val", "valid")]
    whose = [p for p in parts if p not in held_out and not _is_measure(p) and p != "train"]
    return ".".join(whose) or "network", bool(held_out)


def _is_measure(part: str) -> bool:
    return "loss" in part.lower() or "acc" in part.lower()


def _shown(curve: str, held_out: bool) -> str:
    return f"{curve} (held out)" if held_out else curve


def _colours(names: Sequence[str]) -> dict[str, str]:
    return {n: _COLOURS[i % len(_COLOURS)] for i, n in enumerate(dict.fromkeys(names))}


def _decades(values: Sequence[float]) -> float:
    """Powers of ten that positive values span; 0 when one of them is not positive."""
    if not values or min(values) <= 0 or not all(map(math.isfinite, values)):
        return 0.0
    return math.log10(max(values) / min(values))


# -- figures ---------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingError(
            "plots need matplotlib; run: python -m pip install 'branchgraph[plot]'"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _decorate(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        listed = ", ".join(SUFFIXES)
        raise FormatError(f"{target.name}: cannot plot {target.suffix!r}; use one of {listed}")
    return target


def _save(figure: Any, target: Path) -> Path:
    """Write a whole figure or nothing."""
    with replacing(target) as temporary, temporary.open("wb") as stream:
        figure.savefig(stream, format=target.suffix[1:].lower(), dpi=150)
    return target
