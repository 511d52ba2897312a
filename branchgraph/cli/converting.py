"""The command `convert`: weights of other programs, in and out."""

from __future__ import annotations

from pathlib import Path

import click

from branchgraph.cli.sources import check_target
from branchgraph.ir.errors import FormatError
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Role, State
from branchgraph.ir.text import Labels
from branchgraph.nets import NETWORKS

#: Files of weights that are written.
_WEIGHTS = (".npz", ".safetensors", ".params")
#: Roles of states that weights of other programs cover.
_EXCHANGED = (Role.PARAMETER, Role.STATISTIC, Role.GATE)


@click.command()
@click.argument("source", metavar="NET_OR_FILE")
@click.argument("weights", required=False, type=click.Path(path_type=Path))
@click.option("--partial", is_flag=True, help="Take what fits, leave the rest at its start.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def convert(source: str, weights: Path | None, partial: bool, seed: int, output: Path) -> None:
    """Put weights into a network (.bg), or write those of a .bg file.

    Weights are .npz, safetensors or MXNet's .params files. Their names are those of the network's
    original (`branchgraph nets` lists the networks); without one they are our own.

    \b
    branchgraph convert b_lenet lenet_mnist_100.npz -o b_lenet.bg
    branchgraph convert cross:depth=110 cross_d110w1-0400.params -o cross.bg
    branchgraph convert pd_a_resnet18 pd_a_resnet18.safetensors -o pd_a.bg
    branchgraph convert b_lenet.bg -o weights.npz
    """
    if weights is None:
        _write(Path(source), output)
    else:
        _read(source, weights, partial, seed, output)
    click.echo(str(output))


def _read(source: str, weights: Path, partial: bool, seed: int, output: Path) -> None:
    from branchgraph.interop.weights import assign, read_arrays
    from branchgraph.ir.file import save
    from branchgraph.ir.state import Store

    check_target(output, ".bg")
    found, raw = NETWORKS.find(source)
    graph = found.declare(raw)
    store = Store.initialised(graph.states, seed)
    arrays = read_arrays(weights)
    names = {s: found.exchange(s) for s in graph.states if s.role in _EXCHANGED}
    if not set(names.values()) & arrays.keys():
        names = _own(graph)
    assign(store, arrays, names, partial=partial, what=str(weights))
    save(output, graph, store)


def _write(source: Path, output: Path) -> None:
    from branchgraph.interop.weights import collect, write_arrays
    from branchgraph.ir.file import load

    check_target(output, *_WEIGHTS)
    if source.suffix != ".bg":
        raise FormatError(f"{source}: expected a .bg file, or name the weights to put into it")
    graph, store = load(source)
    write_arrays(output, collect(store, _own(graph)))


def _own(graph: Graph) -> dict[State, str]:
    """Our names of the states that are exchanged."""
    return {s: label for s, label in Labels(graph).states.items() if s.role in _EXCHANGED}
