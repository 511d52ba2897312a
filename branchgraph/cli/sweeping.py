"""The command `sweep`: what exit thresholds trade."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from branchgraph.cli.sources import check_target
from branchgraph.ir.errors import FormatError, GraphError

if TYPE_CHECKING:
    import numpy as np

    from branchgraph.analysis.sweep import Point, Sweep
    from branchgraph.data import Dataset
    from branchgraph.ir.graph import Graph
    from branchgraph.ir.state import Store

#: The thresholds of BranchyNet's LeNet experiment.
THRESHOLDS = "0.0001,0.0005,0.001,0.005,0.01,0.025,0.05,0.075,0.1,0.25,0.5,0.75,1,2,3,5,10"
#: Settings up to which every one is run and timed when `--time` does not say.
MOST_MEASURED = 32
#: Rows up to which the printed table holds modelled settings too.
MOST_SHOWN = 64

_PICTURES = (".svg", ".png", ".pdf")
_PATH = click.Path(path_type=Path, dir_okay=False)

#: One threshold for all early exits, or one each.
Numbers = float | tuple[float, ...]


@dataclass(frozen=True)
class Request:
    """What the user asked for, checked before any work is done."""

    thresholds: str | None
    screen: bool
    base: str | None
    first_only: bool
    keep: str | None
    training_form: bool
    accuracy: float | None
    tolerance: float
    time: str | None
    batch: int
    repeats: int
    backend: str

    def check(self) -> None:
        """Refuse options that do not go together and numbers that mean nothing."""
        for bad, message in (
            (
                self.screen and self.thresholds,
                "--screen makes its own list: --base, no --thresholds",
            ),
            (self.base and not self.screen, "--base is the base list of --screen; add --screen"),
            (self.first_only and not self.screen, "--first-only belongs to --screen; add --screen"),
            (self.training_form and not self.keep, "--training-form belongs to --keep; add --keep"),
            (self.keep and self.screen, "--keep and --screen both choose thresholds; use one"),
            (self.keep and self.accuracy is not None, "--keep and --accuracy both choose; use one"),
            (self.keep and self.time == "model", "--keep measures its setting; leave out --time"),
            (not math.isfinite(self.tolerance), "--tolerance must be a number such as -0.0005"),
        ):
            if bad:
                raise FormatError(message)
        if self.accuracy is not None and not 0.0 <= self.accuracy <= 1.0:
            raise FormatError(
                f"--accuracy is a fraction in 0..1, got {self.accuracy:g}; write 0.985 for 98.5 %"
            )

    def listed(self) -> list[Numbers]:
        """The settings that were written out; none where --keep or --screen finds them."""
        return _list(self.thresholds or ("" if self.keep or self.screen else THRESHOLDS))

    def base_list(self) -> list[float]:
        """The base list of the grid, empty where none was given."""
        found = _list(self.base or "")
        for number in found:
            if isinstance(number, tuple):
                raise FormatError("--base takes one number each, such as 0.01,0.1; no +")
        return [n for n in found if not isinstance(n, tuple)]

    def shares(self) -> Numbers | None:
        """The share or shares to keep."""
        return _joined(self.keep, "share") if self.keep else None

    def models(self, settings: int) -> bool:
        """Whether times come from the model: by --time, else for large grids."""
        return self.time == "model" if self.time else self.screen and settings > MOST_MEASURED


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--data", default="digits", show_default=True, help="Data set, such as mnist.")
@click.option("--rows", type=click.IntRange(1), help="Only the first N test images.")
@click.option(
    "--thresholds", metavar="LIST", help=f"Settings, comma-separated. Default: {THRESHOLDS}"
)
@click.option("--screen", is_flag=True, help="Every combination of a base list over all exits.")
@click.option("--base", metavar="LIST", help="Base list of --screen. Default: by the criterion.")
@click.option("--first-only", is_flag=True, help="--screen exit 1 only, other early exits off.")
@click.option(
    "--keep", metavar="F[+F..]",
    help="Thresholds at which the share F of the training images stays, at each early exit.",
)  # fmt: skip
@click.option(
    "--training-form", is_flag=True,
    help="--keep with batch statistics and dropout, as the original; default: as in inference.",
)  # fmt: skip
@click.option("--accuracy", type=float, help="Choose the fastest with at least this, 0..1.")
@click.option(
    "--tolerance", default=-0.0005, show_default=True, type=float,
    help="The front goes on at accuracy > last + this: below 0 allows losses, above asks gains.",
)  # fmt: skip
@click.option(
    "--time", type=click.Choice(["measured", "model"]),
    help=f"Default: measured; for --screen beyond {MOST_MEASURED} settings model.",
)  # fmt: skip
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--backend", default="auto", show_default=True, help="onednn, numpy or auto.")
@click.option("--csv", type=_PATH, help="Write the table here (.csv).")
@click.option("--reference-csv", type=_PATH, help="The same in the form of BranchyNet's programs.")
@click.option("--jsonl", type=_PATH, help="Write one JSON object a point here (.jsonl).")
@click.option("--plot", type=_PATH, help="Draw the sweep here (.svg, .png or .pdf).")
@click.option("--plot-exits", type=_PATH, help="Draw accuracy and scores against share of exit 1.")
@click.option("--plot-scores", type=_PATH, help="Draw the sorted scores of each exit.")
def sweep(
    file: Path, data: str, rows: int | None, csv: Path | None, reference_csv: Path | None,
    jsonl: Path | None, plot: Path | None, plot_exits: Path | None, plot_scores: Path | None,
    **options: Any,
) -> None:  # fmt: skip
    """Measure a trained network at settings of its exit thresholds.

    One number sets all early exits; several, joined by +, one each: 0.01+0.05,0.1+0.5. Accuracies
    are of the test images, on which settings are compared, as in the literature.

    \b
    branchgraph sweep b_lenet.bg --data mnist --batch 256 --csv sweep.csv --plot sweep.svg
    branchgraph sweep net.bg --screen --base 0.001,0.01,0.1,1 --jsonl sweep.jsonl
    branchgraph sweep net.bg --screen --first-only --accuracy 0.985
    branchgraph sweep net.bg --keep 0.1+0.5

    With --time model one pass gives the decisions of all settings, and the time of a setting is the
    time of each exit, measured, weighted with its share; the front is then run and timed for real.
    Without --accuracy and --keep the fastest setting with the baseline's accuracy is chosen, or the
    most accurate one where none has it.
    """
    request = Request(**options)
    request.check()
    request.listed(), request.base_list(), request.shares()  # mistakes before the work
    files = Files(csv, reference_csv, jsonl, plot, plot_exits, plot_scores)
    files.check()
    _run(request, files, file, data, rows)


def _run(request: Request, files: Files, file: Path, data: str, rows: int | None) -> None:
    from branchgraph.analysis import screen
    from branchgraph.data import load
    from branchgraph.ir.file import load as load_file

    graph, store = load_file(file)
    dataset = load(data).subset(test=rows)
    settings = _settings(request, graph, store, dataset)
    result = _measure(request, graph, store, dataset, settings)
    measured = [p for p in result.points if p.measured]
    front = screen.front(measured, request.tolerance)
    chosen, why, missed = _choice(request, result, measured)
    click.echo(_table(result, graph.name, front, chosen))
    click.echo(_about(request, result, len(dataset.test_labels)))
    files.write(result, graph.name, front, chosen)
    files.write_scores(functools.partial(_scores, request, graph, store, dataset), chosen)
    if missed is not None:
        raise missed
    assert chosen is not None
    click.echo(
        f"chosen: {why}: accuracy {100 * chosen.accuracy:.2f} %, "
        f"{1000 * chosen.seconds_per_sample:.4f} ms, gain {chosen.gain:.2f}"
    )
    click.echo(f"--thresholds {screen.spelled(chosen.threshold)}")


# -- settings and measurements ---------------------------------------------------------------------


def _settings(request: Request, graph: Graph, store: Store, dataset: Dataset) -> list[Numbers]:
    """The settings to look at; that of --keep is the last one."""
    from branchgraph.analysis import screen
    from branchgraph.analysis.quantiles import quantile_thresholds
    from branchgraph.analysis.sweep import early_exits

    if request.screen:
        criteria = [n.op.criterion for n in early_exits(graph)]  # type: ignore[attr-defined]
        base = request.base_list() or screen.base_list(criteria[0])
        if request.first_only:
            return list(screen.first_exit_only(base, criteria))
        return list(screen.grid(base, len(criteria)))
    settings = request.listed()
    shares = request.shares()
    if shares is not None:
        found = quantile_thresholds(
            graph, store, dataset.train_images, shares,
            training=request.training_form, backend=request.backend,
        )  # fmt: skip
        stay = ", ".join(f"{100 * s:.2f} %" for s in found.stay)
        form = "training" if request.training_form else "inference"
        click.echo(
            f"keep {request.keep}: thresholds {screen.spelled(found.thresholds)} from "
            f"{len(dataset.train_labels)} training images in {form} form, where {stay} stay"
        )
        settings.append(found.thresholds)
    return settings


def _measure(
    request: Request, graph: Graph, store: Store, dataset: Dataset, settings: list[Numbers]
) -> Sweep:
    from branchgraph.analysis import screen
    from branchgraph.analysis import sweep as analysis

    measure: Callable[..., Sweep]
    if request.models(len(settings)):
        measure = functools.partial(screen.screen, tolerance=request.tolerance)
    else:
        measure = analysis.sweep
    return measure(
        graph, store, dataset.test_images, dataset.test_labels, settings,
        batch=request.batch, repeats=request.repeats, backend=request.backend,
    )  # fmt: skip


def _scores(
    request: Request, graph: Graph, store: Store, dataset: Dataset
) -> tuple[np.ndarray, ...]:
    from branchgraph.analysis.decisions import scores

    return scores(graph, store, dataset.test_images, backend=request.backend).scores


def _choice(
    request: Request, result: Sweep, measured: Sequence[Point]
) -> tuple[Point | None, str, GraphError | None]:
    """The chosen point and why; without one, the error that says the best there is."""
    from branchgraph.analysis import screen

    if request.keep:
        return measured[-1], f"keep {request.keep}", None
    if request.accuracy is not None:
        try:
            found = screen.cheapest(measured, request.accuracy)
        except GraphError as error:
            return None, "", error
        return found, f"the fastest with accuracy {request.accuracy:g} or more", None
    if any(p.accuracy >= result.baseline.accuracy for p in measured):
        found = screen.cheapest(measured, result.baseline.accuracy)
        return found, "the fastest with the baseline's accuracy or more", None
    return screen.most_accurate(measured), "the most accurate, none reaches the baseline", None


# -- what is written -------------------------------------------------------------------------------


def _table(result: Sweep, name: str, front: Sequence[Point], chosen: Point | None) -> str:
    """The table with its marks; of a long one only the points that were run."""
    from branchgraph.analysis import sweep as analysis

    measured = tuple(p for p in result.points if p.measured)
    shown = result.points if len(result.points) <= MOST_SHOWN else measured
    kept = set(front)
    marks = [
        " ".join(word for word, on in (("front", p in kept), ("chosen", p == chosen)) if on)
        for p in shown
    ]
    text = analysis.table(replace(result, points=shown), name, marks)
    hidden = len(result.points) - len(shown)
    return text + (f"\n{hidden} modelled settings more: --csv, --jsonl" if hidden else "")


def _about(request: Request, result: Sweep, samples: int) -> str:
    """What the times are."""
    timed = sum(p.measured for p in result.points)
    text = (
        f"measured times: wall clock with everything in it, {samples} samples in batches of "
        f"{result.batch}, median of {request.repeats}"
    )
    if timed < len(result.points):
        exits = zip(result.exits, result.exit_seconds)
        text += (
            f"\nmodelled times: of {len(result.points)} settings, decided in one pass, {timed} on "
            "the front were run; the others have the time of each exit weighted with its share: "
            + ", ".join(f"{name} {1000 * seconds:.4f} ms" for name, seconds in exits)
        )
    return text


@dataclass(frozen=True)
class Files:
    """The files asked for."""

    csv: Path | None
    reference_csv: Path | None
    jsonl: Path | None
    plot: Path | None
    exits: Path | None
    scores: Path | None

    def check(self) -> None:
        """Refuse targets that cannot be written, before the work."""
        for target, suffixes in (
            (self.csv, (".csv",)),
            (self.reference_csv, (".csv",)),
            (self.jsonl, (".jsonl",)),
            (self.plot, _PICTURES),
            (self.exits, _PICTURES),
            (self.scores, _PICTURES),
        ):
            if target is not None:
                check_target(target, *suffixes)

    def write(self, result: Sweep, name: str, front: Sequence[Point], chosen: Point | None) -> None:
        """Logs and plots of the points; each path is printed."""
        from branchgraph.analysis import logs, plots
        from branchgraph.analysis import sweep as analysis

        if self.csv is not None:
            analysis.write_csv(result, name, self.csv)
            click.echo(str(self.csv))
        if self.reference_csv is not None:
            analysis.write_reference_csv(result, name, self.reference_csv)
            click.echo(str(self.reference_csv))
        if self.jsonl is not None:
            logs.write_jsonl(result, name, self.jsonl, front, chosen)
            click.echo(str(self.jsonl))
        if self.plot is not None:
            drawn = plots.plot_sweep(
                result.points, self.plot, baseline=result.baseline, title=name,
                front=front, chosen=chosen,
            )  # fmt: skip
            click.echo(str(drawn))
        if self.exits is not None:
            click.echo(str(plots.plot_exits(result.points, self.exits, title=name)))

    def write_scores(self, found: Callable[[], Sequence[np.ndarray]], chosen: Point | None) -> None:
        """The plot of the scores, which are only computed where it is asked for."""
        from branchgraph.analysis.plots import plot_scores

        if self.scores is not None:
            thresholds = chosen.threshold if chosen else ()
            click.echo(str(plot_scores(found(), self.scores, thresholds)))


# -- numbers on the command line -------------------------------------------------------------------


def _list(text: str) -> list[Numbers]:
    return [_joined(t, "threshold") for t in text.split(",")] if text else []


def _joined(text: str, what: str) -> Numbers:
    """`0.01` as a number, `0.01+0.05` as one number an exit."""
    try:
        numbers = tuple(float(t) for t in text.split("+"))
    except ValueError:
        numbers = (math.nan,)
    if any(math.isnan(n) for n in numbers):
        raise FormatError(f"{what} {text!r} is no number; write for example 0.01 or 0.01+0.05")
    return numbers[0] if len(numbers) == 1 else numbers
