"""The command `info`: what is known of a network or file, or of this installation."""

from __future__ import annotations

import importlib
import json
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from branchgraph.cli.sources import read
from branchgraph.ir.cost import cost
from branchgraph.ir.graph import Graph
from branchgraph.ir.ops.exit import Exit
from branchgraph.ir.state import Store

#: Packages that make optional parts work, and the command that brings them.
_OPTIONAL = {
    "matplotlib": "python -m pip install 'branchgraph[plot]'",
    "sklearn": "python -m pip install 'branchgraph[demo]'",
    "pygraphviz": "python -m pip install 'pygraphviz>=2'",
}


@click.command()
@click.argument("source", metavar="[NET_OR_FILE]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def info(source: str | None, as_json: bool) -> None:
    """Say what a network or file holds; without one, what this installation has.

    \b
    branchgraph info
    branchgraph info b_lenet.bg
    branchgraph info lenet:size=32 --json
    """
    facts = _installation() if source is None else _network(source)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        click.echo(f"{name}: {_words(value)}")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


# -- a network -------------------------------------------------------------------------------------


def _network(source: str) -> dict[str, Any]:
    graph, store = read(source)
    per_sample = cost(graph).per_sample()
    merges = Counter(n.op.opcode for n in graph.nodes if n.op.merge)
    facts: dict[str, Any] = {
        "network": graph.name,
        "inputs": {name: str(v.type) for name, v in graph.inputs.items()},
        "outputs": {name: str(v.type) for name, v in graph.outputs.items()},
        "nodes": len(graph.nodes),
        "branches": len(graph.branches()),
        "merges": dict(merges),
        "gates": sum(n.op.opcode == "select" for n in graph.nodes),
        "exits": _exits(graph),
        "parameters": per_sample.parameters,
        "MACs a sample": per_sample.macs,
        "states": dict(Counter(s.role.value for s in graph.states)),
    }
    if store is not None:
        facts |= _file(Path(source), graph, store)
    return facts


def _exits(graph: Graph) -> dict[str, str]:
    found = {}
    for node in graph.nodes:
        if isinstance(node.op, Exit):
            early = len(node.inputs) > 1
            found[node.op.name] = node.op.criterion if early else "the rest"
    return found


def _file(path: Path, graph: Graph, store: Store) -> dict[str, Any]:
    from branchgraph.training.checkpoint import read_training

    facts: dict[str, Any] = {
        "file": f"{path}, {path.stat().st_size:,} bytes",
        "values": f"{len(store)} of {len(graph.states)} states",
    }
    training = read_training(path)
    if training is not None:
        progress, recipe = training
        facts["training"] = (
            f"{progress.epoch} of {recipe.epochs} epochs on {recipe.data} with {recipe.optimiser}, "
            f"batch {recipe.batch}, seed {recipe.seed}"
        )
        if progress.step:
            facts["under way"] = f"{progress.step} steps of epoch {progress.epoch + 1}"
        if progress.history.epochs:
            facts["last epoch"] = progress.history.epochs[-1]
    return facts


# -- the installation ------------------------------------------------------------------------------


def _installation() -> dict[str, Any]:
    from branchgraph.compiler.backend import backend, backends
    from branchgraph.data.folder import data_folder

    return {
        "branchgraph": metadata.version("branchgraph"),
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "numpy": importlib.import_module("numpy").__version__,
        "backends": {n: backend(n).missing() or backend(n).describe() for n in backends()},
        **{
            f"{n} kernels (other ops in NumPy)": list(backend(n).primitives())
            for n in backends()
            if backend(n).primitives()
        },
        "data folder": str(data_folder("")),
        **{name: _version(name, remedy) for name, remedy in _OPTIONAL.items()},
    }


def _version(name: str, remedy: str) -> str:
    try:
        return str(importlib.import_module(name).__version__)
    except ImportError:
        return f"not installed; {remedy}"
