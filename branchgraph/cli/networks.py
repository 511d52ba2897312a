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
from branchgraph.nets import NETWORKS, Network
from branchgraph.passes.base import Pass


@click.command()
@click.argument("source", metavar="NET_OR_FILE")
@click.option("--pass", "passes", multiple=True, metavar="SPEC", help="Apply a pass first.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help=".svg .png .pdf .dot .txt")
@click.option(
    "--collapse/--no-collapse", default=True, show_default=True, help="Draw repeated parts once."
)
@click.option("--states", is_flag=True, help="Draw parameters and statistics too.")
def show(
    source: str, passes: tuple[str, ...], output: Path | None, collapse: bool, states: bool
) -> None:
    """Draw a network, by specification string or file.

    \b
    branchgraph show lenet
    branchgraph show lenet --pass insert_exits:after=conv1 -o b_lenet.svg
    branchgraph show b_resnet:blocks=18 --no-collapse -o b_resnet.pdf
    """
    from branchgraph.show.render import DrawingWarning, render
    from branchgraph.show.text import to_text

    graph = rewritten(read(source)[0], passes)
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
def passes() -> None:
    """List the passes with their options and what they claim.

    \b
    branchgraph passes
    branchgraph show lenet --pass insert_exits:after=conv1

    A pass claims to be `equal` (the same values), `exact` (the same real function) or `different`
    (another network, on purpose).
    """
    for name, cls in sorted(Pass.registry.items()):
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        click.echo(f"{name} ({cls.claim}): {summary}")
        options = _pass_options(cls)
        if options:
            click.echo("    options: " + options)


def _pass_options(cls: type[Pass]) -> str:
    found = {}
    for f in dataclasses.fields(cls):
        found[f.name] = "required" if f.default is dataclasses.MISSING else f.default
    return _options(found)


def _options(options: dict[str, Any]) -> str:
    from branchgraph.ir.spec import format_value

    return ", ".join(f"{k}={format_value(v)}" for k, v in options.items())
