"""The command `bench`: how long a network takes here, and where the time goes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from branchgraph.cli.sources import check_target, read, rewritten
from branchgraph.ir.errors import FormatError

if TYPE_CHECKING:
    from branchgraph.compiler import Executable
    from branchgraph.ir.graph import Graph
    from branchgraph.ir.state import Store


@click.command()
@click.argument("source", metavar="NET_OR_FILE")
@click.option("--mode", type=click.Choice(["infer", "train"]), default="infer", show_default=True)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--repeats", default=30, show_default=True, type=click.IntRange(1))
@click.option("--backend", default="auto", show_default=True)
@click.option("--pass", "passes", multiple=True, metavar="SPEC", help="Apply a pass first.")
@click.option("--profile", is_flag=True, help="Print time and memory by kernel and scope.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write a Chrome trace (.json).")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def bench(
    source: str, mode: str, batch: int, repeats: int, backend: str, passes: tuple[str, ...],
    profile: bool, trace: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Time a network on random inputs: the whole call, copies of inputs and results included.

    \b
    branchgraph bench lenet --batch 64
    branchgraph bench resnet:depth=20 --mode train --batch 8 --profile
    branchgraph bench b_lenet.bg --batch 256 --backend numpy --trace trace.json
    """
    if trace is not None:
        check_target(trace, ".json")
    graph, store = read(source)
    graph = rewritten(graph, passes, store)
    began = time.perf_counter()
    executable = _compiled(graph, store, mode, backend)
    fed = _inputs(graph, executable, batch)
    executable.run(fed)
    ready = time.perf_counter() - began
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        executable.run(fed)
        times.append((time.perf_counter() - began) * 1e3)
    facts = {
        "network": graph.name, "mode": mode, "batch": batch, "backend": executable.backend,
        "median_ms": float(np.median(times)), "min_ms": min(times), "ready_s": ready,
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(facts))
    else:
        click.echo(
            f"{graph.name}, {mode}, batch {batch}, {executable.backend}: median"
            f" {facts['median_ms']:.3f} ms, min {facts['min_ms']:.3f} ms of {repeats};"
            f" ready after {ready:.2f} s"
        )
    if profile or trace is not None:
        report = executable.report(fed)
        if profile:
            click.echo(report.text(), err=as_json)
        if trace is not None:
            report.write_trace(trace)


def _compiled(graph: Graph, store: Store | None, mode: str, backend: str) -> Executable:
    from branchgraph.compiler import compile
    from branchgraph.ir.optimisers import MomentumSGD
    from branchgraph.training import Training

    if mode == "infer":
        return compile(graph, backend, store=store)
    return Training.of(graph, MomentumSGD(), backend=backend, store=store).step


def _inputs(graph: Graph, executable: Executable, batch: int) -> dict[str, np.ndarray]:
    """Random arrays for every input without a default: normal, or class numbers."""
    from branchgraph.ir.dims import Dim

    rng = np.random.default_rng(0)
    classes = min((v.shape[1] for v in graph.outputs.values() if len(v.shape) == 2), default=2)
    fed = {}
    for name, argument in executable.inputs.items():
        if argument.default is not None:
            continue
        symbols = {s for d in argument.type.shape if isinstance(d, Dim) for s in d.symbols}
        if len(symbols) > 1:
            raise FormatError(f"input {name}: bench binds one symbol, {argument.type} has several")
        sizes = dict.fromkeys(symbols, batch)
        shape = tuple(
            int(d.substitute(sizes)) if isinstance(d, Dim) else d for d in argument.type.shape
        )
        if argument.type.dtype.is_float:
            fed[name] = rng.standard_normal(shape).astype(argument.type.dtype.numpy)
        else:
            fed[name] = rng.integers(0, int(classes), shape).astype(argument.type.dtype.numpy)
    return fed
