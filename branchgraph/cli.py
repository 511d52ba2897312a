"""The command line: demo | train | sweep | show | nets | passes.

Mistakes of the user end in one line on standard error and exit code 2; `--debug` shows the
traceback. Progress bars go to standard error and vanish when it is not a terminal.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from branchgraph.ir.cost import cost
from branchgraph.ir.errors import BranchgraphError, FormatError
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Store
from branchgraph.nets import NETWORKS, network
from branchgraph.passes.base import Pass, Report

#: The thresholds of BranchyNet's LeNet experiment.
THRESHOLDS = "0.0001,0.0005,0.001,0.005,0.01,0.025,0.05,0.075,0.1,0.25,0.5,0.75,1,2,3,5,10"


class _Commands(click.Group):
    """Turns the package's errors into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BranchgraphError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"branchgraph: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("branchgraph: interrupted", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks of user errors too.")
@click.version_option(package_name="branchgraph")
def main(debug: bool) -> None:
    """Branchgraph: the symbolic graph compiler for multi-branch neural networks."""


# -- reading networks ------------------------------------------------------------------------------


def _read(source: str) -> tuple[Graph, Store | None]:
    """A network from a specification string, a text file or a .bg file."""
    path = Path(source)
    if path.suffix == ".bg":
        from branchgraph.ir.file import load

        return load(path)
    if path.suffix == ".txt":
        return _parse_text(path), None
    return network(source), None


def _parse_text(path: Path) -> Graph:
    from branchgraph.ir.text import parse_graph

    try:
        return parse_graph(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as a graph's text: {error}") from None


def _rewritten(graph: Graph, specs: tuple[str, ...]) -> Graph:
    """The graph after passes, each reported."""
    for spec in specs:
        result = Pass.from_spec(spec).run(graph)
        _report(result.report)
        graph = result.graph
    return graph


def _report(report: Report) -> None:
    click.echo(str(report), err=True)


# -- commands --------------------------------------------------------------------------------------


@main.command()
@click.argument("source", metavar="NET_OR_FILE")
@click.option("--pass", "passes", multiple=True, metavar="SPEC", help="Apply a pass first.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help=".svg .png .pdf .dot .txt")
def show(source: str, passes: tuple[str, ...], output: Path | None) -> None:
    """Draw a network, by specification string or file.

    \b
    branchgraph show lenet
    branchgraph show lenet --pass insert_exits:after=conv1 -o b_lenet.svg
    """
    from branchgraph.show.render import DrawingWarning, render
    from branchgraph.show.text import to_text

    graph = _rewritten(_read(source)[0], passes)
    if output is None:
        click.echo(to_text(graph))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DrawingWarning)  # the note below says it
        drawing = render(graph, output)
    if drawing.note:
        click.echo(drawing.note, err=True)
    click.echo(str(drawing.path))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def nets(as_json: bool) -> None:
    """List the networks with their options, parameters and multiply-accumulates."""
    listed = []
    for net in NETWORKS.values():
        per_sample = cost(net.build()).per_sample()
        listed.append(
            {
                "name": net.name,
                "summary": net.summary,
                "options": net.options,
                "parameters": per_sample.parameters,
                "macs": per_sample.macs,
            }
        )
    if as_json:
        click.echo(json.dumps(listed, indent=1))
        return
    for entry in listed:
        click.echo(f"{entry['name']}: {entry['summary']}")
        click.echo(f"    {entry['parameters']:,} parameters, {entry['macs']:,} MACs a sample")
        click.echo("    options: " + _options(entry["options"]))


@main.command()
def passes() -> None:
    """List the passes with their options and what they claim."""
    for name, cls in sorted(Pass.registry.items()):
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        click.echo(f"{name} ({cls.claim}): {summary}")
        options = _pass_options(cls)
        if options:
            click.echo("    options: " + options)


def _pass_options(cls: type[Pass]) -> str:
    import dataclasses

    found = {}
    for f in dataclasses.fields(cls):
        found[f.name] = "required" if f.default is dataclasses.MISSING else f.default
    return _options(found)


def _options(options: dict[str, Any]) -> str:
    from branchgraph.ir.spec import format_value

    return ", ".join(f"{k}={format_value(v)}" for k, v in options.items())


@main.command()
@click.argument("net", metavar="NET")
@click.option("--data", default="digits", show_default=True, help="Data set: digits or mnist.")
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(1))
@click.option("--batch", default=512, show_default=True, type=click.IntRange(1))
@click.option("--optimiser", default="adam", show_default=True)
@click.option("--learning-rate", type=float, help="Default: the optimiser's own.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--pass", "passes", multiple=True, metavar="SPEC", help="Apply a pass first.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A .bg file.")
def train(
    net: str, data: str, epochs: int, batch: int, optimiser: str, learning_rate: float | None,
    seed: int, passes: tuple[str, ...], output: Path,
) -> None:  # fmt: skip
    """Train a network and its exits jointly, and save it.

    \b
    branchgraph train b_lenet --data mnist --epochs 10 -o b_lenet.bg
    branchgraph train lenet:size=8,kernel=3 --pass insert_exits:after=conv1 -o digits.bg
    """
    from branchgraph.data import load
    from branchgraph.ir.file import save
    from branchgraph.training import Training
    from branchgraph.training.progress import summary, train_with_progress

    graph = _rewritten(_read(net)[0], passes)
    _check_target(output, ".bg")
    dataset = load(data)
    made = _optimiser(optimiser, learning_rate)
    training = Training.of(graph, made, seed=seed)
    history = train_with_progress(
        training, dataset.train_images, dataset.train_labels, epochs, batch, seed
    )
    click.echo(summary(history))
    save(output, graph, training.store)
    click.echo(str(output))


def _check_target(path: Path, suffix: str) -> None:
    """Refuse a file that could not be written, before the work that it is to hold."""
    if path.suffix != suffix:
        raise FormatError(f"{path}: the name must end in {suffix}")
    if not path.parent.is_dir():
        raise FormatError(f"{path}: there is no folder {path.parent}; create it first")


def _optimiser(name: str, learning_rate: float | None) -> Any:
    from branchgraph.ir.optimisers import OPTIMISERS

    if name not in OPTIMISERS:
        raise FormatError(f"unknown optimiser {name!r}; known: {', '.join(OPTIMISERS)}")
    cls = OPTIMISERS[name]
    return cls() if learning_rate is None else cls(learning_rate=learning_rate)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--data", default="digits", show_default=True, help="Data set: digits or mnist.")
@click.option("--thresholds", default=THRESHOLDS, show_default=True, help="Comma-separated.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the table here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the sweep here.")
def sweep(
    file: Path, data: str, thresholds: str, batch: int, repeats: int, csv_path: Path | None,
    plot: Path | None,
) -> None:  # fmt: skip
    """Measure a trained network at a list of exit thresholds.

    Several early exits take one threshold each, joined by +: 0.01+0.05,0.1+0.5.

    \b
    branchgraph sweep b_lenet.bg --data mnist --batch 256 --csv sweep.csv --plot sweep.svg
    """
    from branchgraph.analysis import sweep as analysis
    from branchgraph.data import load
    from branchgraph.ir.file import load as load_file

    settings = [_threshold(t) for t in thresholds.split(",")]
    graph, store = load_file(file)
    dataset = load(data)
    result = analysis.sweep(
        graph,
        store,
        dataset.test_images,
        dataset.test_labels,
        settings,
        batch=batch,
        repeats=repeats,
    )
    click.echo(analysis.table(result, graph.name))
    if csv_path is not None:
        analysis.write_csv(result, graph.name, csv_path)
        click.echo(str(csv_path))
    if plot is not None:
        from branchgraph.analysis.plots import plot_sweep

        plot_sweep(result.points, plot, baseline=result.baseline, title=graph.name)
        click.echo(str(plot))


def _threshold(text: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(t) for t in text.split("+"))
    except ValueError:
        raise FormatError(f"threshold {text!r} is no number; write for example 0.01,0.1") from None
    return numbers[0] if len(numbers) == 1 else numbers


@main.command()
@click.option("--data", default="digits", show_default=True, help="Data set: digits or mnist.")
@click.option("--epochs", type=click.IntRange(1), help="Default: 30 on digits, 2 on MNIST.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option(
    "-o", "--output", default="branchgraph-demo", show_default=True,
    type=click.Path(path_type=Path, file_okay=False), help="Folder for pictures and the network.",
)  # fmt: skip
def demo(data: str, epochs: int | None, seed: int, output: Path) -> None:
    """Run the main job: declare LeNet, insert an exit, train, sweep, draw.

    \b
    branchgraph demo                    about a minute, on 8x8 handwritten digits
    branchgraph demo --data mnist       some minutes, on MNIST
    """
    from branchgraph.demo import run

    run(data, epochs, seed, output, say=click.echo)


if __name__ == "__main__":
    main()
