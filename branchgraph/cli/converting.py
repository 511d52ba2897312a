"""The command `convert`: weights in and out, and trained networks rewritten by passes."""

from __future__ import annotations

from pathlib import Path

import click

from branchgraph.cli.sources import check_target, read, rewritten
from branchgraph.interop.weights import assign, collect, read_arrays, write_arrays
from branchgraph.ir.errors import FormatError
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import Labels
from branchgraph.nets import NETWORKS
from branchgraph.passes.materialise import evaluate_origin, materialise

#: Files of weights that are written.
_WEIGHTS = (".npz", ".safetensors", ".params")
#: Roles of states that weights of other programs cover.
_EXCHANGED = (Role.PARAMETER, Role.STATISTIC, Role.GATE)


@click.command()
@click.argument("source", metavar="NET_OR_FILE")
@click.argument("weights", required=False, type=click.Path(path_type=Path))
@click.option(
    "--pass", "passes", multiple=True, metavar="SPEC", help="Rewrite it; its weights follow."
)
@click.option("--partial", is_flag=True, help="Take what fits, leave the rest at its start.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def convert(
    source: str, weights: Path | None, passes: tuple[str, ...], partial: bool, seed: int,
    output: Path,
) -> None:  # fmt: skip
    """Put weights into a network, rewrite it, write it (.bg) or its weights.

    Weights are .npz, safetensors or MXNet's .params files. Their names are those of the network's
    original (`branchgraph nets` lists the networks); without one they are our own. What passes
    write over weights is evaluated in float64.

    \b
    branchgraph convert b_lenet lenet_mnist_100.npz --partial -o b_lenet.bg
    branchgraph convert cross:depth=110 cross_d110w1-0400.params -o cross.bg
    branchgraph convert pd_a_resnet18 pd_a.safetensors --pass specialise --pass fuse_branches \\
        -o fused.bg
    branchgraph convert masked.bg --pass harden_gates --pass prune_gates -o pruned.bg
    branchgraph convert b_lenet.bg -o weights.npz
    """
    from branchgraph.ir.file import save

    check_target(output, ".bg", *_WEIGHTS)
    graph, store = _with_values(source, weights, partial, seed)
    graph = _leaves(rewritten(graph, passes, store), store) if passes else graph
    store.initialise(graph.states, seed)
    if output.suffix == ".bg":
        save(output, graph, store)
    else:
        write_arrays(output, collect(store, _own(graph)))
    click.echo(str(output))


def _with_values(
    source: str, weights: Path | None, partial: bool, seed: int
) -> tuple[Graph, Store]:
    """A network and its values: a .bg file, or a network and the weights to put into it."""
    if weights is None:
        graph, store = read(source)
        if store is None:
            raise FormatError(f"{source}: expected a .bg file, or name the weights to put into it")
        return graph, store
    found, raw = NETWORKS.find(source)
    graph = found.declare(raw)
    store = Store.initialised(graph.states, seed)
    arrays = read_arrays(weights)
    names = {s: found.exchange(s) for s in graph.states if s.role in _EXCHANGED}
    if not set(names.values()) & arrays.keys():
        names = _own(graph)
    assign(store, arrays, names, partial=partial, what=str(weights))
    return graph, store


def _leaves(graph: Graph, store: Store) -> Graph:
    """The graph with expressions over weights evaluated."""
    new, origin = materialise(graph)
    store.initialise(origin.states)
    evaluate_origin(origin, store)
    return new


def _own(graph: Graph) -> dict[State, str]:
    """Our names of the states that are exchanged."""
    return {s: label for s, label in Labels(graph).states.items() if s.role in _EXCHANGED}
