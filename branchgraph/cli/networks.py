"""Commands that look at networks: show, nets, passes."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import click

from branchgraph.cli.sources import read, rewritten
from branchgraph.ir.cost import cost
from branchgraph.ir.errors import FormatError
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Store
from branchgraph.nets import NETWORKS, Network
from branchgraph.passes.base import Pass
from branchgraph.passes.materialise import materialise, provenance
from branchgraph.passes.pipeline import Pipeline, Reports


@click.command()
@click.argument("source", metavar="NET_OR_FILE")
@click.option("--pass", "passes", multiple=True, metavar="SPEC", help="Apply a pass first.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help=".svg .png .pdf .dot .txt")
@click.option(
    "--collapse/--no-collapse", default=True, show_default=True, help="Draw repeated parts once."
)
@click.option("--states", is_flag=True, help="Draw parameters and statistics too.")
@click.option(
    "--steps", type=click.Path(path_type=Path), help="Folder for text and picture of every step."
)
def show(
    source: str, passes: tuple[str, ...], output: Path | None, collapse: bool, states: bool,
    steps: Path | None,
) -> None:  # fmt: skip
    """Draw a network, by specification string or file.

    \b
    branchgraph show lenet
    branchgraph show lenet --pass insert_exits:after=conv1 -o b_lenet.svg
    branchgraph show b_resnet:blocks=18 --no-collapse -o b_resnet.pdf
    """
    from branchgraph.show.render import DrawingWarning, render
    from branchgraph.show.text import to_text

    graph, store = read(source)
    if steps is not None:
        from branchgraph.show.snapshots import Snapshots

        watched = Pipeline(tuple(map(Pass.from_spec, passes)), (Snapshots(steps),))
        watched.apply(graph, store)
    graph = rewritten(graph, passes, store)
    if output is None:
        click.echo(to_text(graph, states=states, collapse=collapse))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DrawingWarning)  # the note below says it
        drawing = render(graph, output, states=states, collapse=collapse)
    if drawing.note:
        click.echo(drawing.note, err=True)
    click.echo(str(drawing.path))


@click.command()
@click.argument("family", required=False)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def nets(family: str | None, as_json: bool) -> None:
    """List the families of networks with options, parameters and multiply-accumulates.

    \b
    branchgraph nets
    branchgraph nets "Deep Fusion"
    branchgraph nets --json
    """
    families = dict.fromkeys(net.family for net in NETWORKS.values())
    if family is not None and family not in families:
        raise FormatError(f"no family {family!r}; there are: {', '.join(families)}")
    wanted = [net for net in NETWORKS.values() if family in (None, net.family)]
    if as_json:
        click.echo(json.dumps([_facts(net) for net in wanted], indent=1))
        return
    last = None
    for facts in map(_facts, wanted):
        if facts["family"] != last:
            click.echo(facts["family"])
            last = facts["family"]
        click.echo(f"  {facts['name']}: {facts['summary']}")
        click.echo(f"      {facts['parameters']:,} parameters, {facts['macs']:,} MACs a sample")
        click.echo("      options: " + _options(facts["options"]))


def _facts(net: Network) -> dict[str, Any]:
    per_sample = cost(net.build()).per_sample()
    return {
        "family": net.family,
        "name": net.name,
        "summary": net.summary,
        "options": net.options,
        "parameters": per_sample.parameters,
        "macs": per_sample.macs,
    }


@click.command()
@click.argument("specs", nargs=-1, metavar="[SPEC]...")
@click.option(
    "--explain", metavar="NET_OR_FILE", help="Apply the passes to it and say what they do."
)
@click.option("--verify", is_flag=True, help="Check every claim with numbers, too.")
def passes(specs: tuple[str, ...], explain: str | None, verify: bool) -> None:
    """List the passes with their options and claims, or explain what some do to a network.

    A pass claims to be `equal` (the same values), `exact` (the same real function) or `different`
    (another network, on purpose).

    \b
    branchgraph passes
    branchgraph passes specialise fold_batch_norm --explain resnet_a --verify
    branchgraph show lenet --pass insert_exits:after=conv1
    """
    if explain is not None:
        _explain(*read(explain), specs, verify)
        return
    if specs or verify:
        raise FormatError("name the network that the passes are to be explained on: --explain NET")
    for name, cls in sorted(Pass.registry.items()):
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        click.echo(f"{name} ({cls.claim}): {summary}")
        options = _pass_options(cls)
        if options:
            click.echo("    options: " + options)


def _explain(graph: Graph, store: Store | None, specs: tuple[str, ...], verify: bool) -> None:
    """Every step's report with its matches, then where each new parameter comes from."""
    reports = Reports()
    steps = tuple(Pass.from_spec(spec) for spec in specs)
    result = Pipeline(steps, (reports,), verify).run(graph, store)
    for report in reports.reports:
        click.echo(str(report))
        for match in report.matches:
            click.echo(f"  matched {match}")
    _, leaves = materialise(result.graph)
    origins = [leaves] if result.report.origin is None else [leaves, result.report.origin]
    for state, sources in (item for origin in origins for item in provenance(origin).items()):
        names = ", ".join(s.name for s in sources)
        click.echo(f"{state.name} {state.type} from {names or 'a constant'}")
    if verify:
        click.echo("all claims hold")


def _pass_options(cls: type[Pass]) -> str:
    found = {}
    for f in dataclasses.fields(cls):
        found[f.name] = "required" if f.default is dataclasses.MISSING else f.default
    return _options(found)


def _options(options: dict[str, Any]) -> str:
    from branchgraph.ir.spec import format_value

    return ", ".join(f"{k}={format_value(v)}" for k, v in options.items())
