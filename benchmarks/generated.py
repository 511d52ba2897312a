"""What generated kernels save: the same layers and networks with them and without, interleaved.

    python benchmarks/generated.py                       convolutions, forward and backward
    python benchmarks/generated.py --batch 1,8 --threads 2
    python benchmarks/generated.py --net lenet,resnet:depth=20 --batch 1,64
    python benchmarks/generated.py --net resnet:depth=20 --mode train --batch 8,64

Both forms are the onednn backend in one process, one planned with BRANCHGRAPH_GENERATED=0.
For layers the times are those of the kernels of one op, with the packing of weights, for networks
those of whole runs. Printed are medians of the fastest of `--rounds` rounds. What a machine shows
that has other work means nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from branchgraph.codegen import engine
from branchgraph.compiler import Executable, compile
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.optimisers import MomentumSGD
from branchgraph.ir.state import Store
from branchgraph.nets import network
from branchgraph.training import Training

#: (channels, filters, size, kernel, pad) of convolutions of stride 1.
LAYERS = (
    (1, 5, 28, 5, 2), (5, 10, 14, 5, 2), (10, 20, 7, 5, 2),
    (3, 16, 32, 3, 1), (16, 16, 32, 3, 1), (32, 32, 16, 3, 1), (64, 64, 8, 3, 1),
    (64, 64, 56, 3, 1), (128, 128, 28, 3, 1), (256, 256, 14, 3, 1), (512, 512, 7, 3, 1),
)  # fmt: skip
OPS = ("conv", "conv_transpose", "conv_weight_gradient")

#: Times by name, in milliseconds, of one round.
Measure = Callable[[], dict[str, float]]


@contextmanager
def generated(allowed: bool) -> Iterator[None]:
    """Plans that are made meanwhile have generated kernels, or none."""
    before = os.environ.get(engine.VARIABLE)
    os.environ[engine.VARIABLE] = "1" if allowed else "0"
    yield
    if before is None:
        del os.environ[engine.VARIABLE]
    else:
        os.environ[engine.VARIABLE] = before


def layer(batch: int, shape: tuple[int, ...], threads: int, repeats: int) -> Measure:
    """A convolution with both gradients; its weights change from run to run."""
    channels, filters, size, kernel, pad = shape
    graph = Graph("layer")
    x = graph.input("x", (batch, channels, size, size))
    weight = graph.input("weight", (filters, channels, kernel, kernel))
    y = graph.emit(Conv((1, 1), (pad,) * 4, (1, 1)), x, weight)
    dy = graph.input("dy", (batch, filters, size, size))
    found = vjp(graph, {y: dy}, [x, weight])
    graph.output("y", y)
    graph.output("dx", found[x])
    graph.output("dweight", found[weight])
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal([int(str(d)) for d in value.shape]).astype(np.float32)
        for name, value in graph.inputs.items()
    }
    executable = compile(graph, "onednn", threads=threads)
    executable.run(feeds)

    def measure() -> dict[str, float]:
        rows = executable.report(feeds, repeats=repeats).rows
        wanted = [r for r in rows if r.ops[0] in OPS and "reorder" not in r.kernel]
        return {op: sum(r.milliseconds for r in wanted if r.ops[0] == op) for op in OPS}

    return measure


def whole(spec: str, mode: str, batch: int, threads: int, repeats: int) -> Measure:
    """A network's inference or training step."""
    graph, store = network(spec), Store()
    store.initialise(graph.states, 0)
    sizes = [d if isinstance(d, int) else batch for d in graph.inputs["x"].shape]
    feeds = {"x": np.random.default_rng(0).standard_normal(sizes).astype(np.float32)}
    executable: Executable
    if mode == "train":
        executable = Training.of(
            graph, MomentumSGD(1e-5), backend="onednn", store=store, threads=threads
        ).step
        feeds["labels"] = np.arange(batch) % 10
    else:
        executable = compile(graph, "onednn", store=store, threads=threads)
    executable.run(feeds)

    def measure() -> dict[str, float]:
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            executable.run(feeds)
            times.append(time.perf_counter() - began)
        return {mode: 1e3 * statistics.median(times)}

    return measure


def compared(make: Callable[[], Measure], rounds: int) -> dict[str, tuple[float, float]]:
    """(without, with) generated kernels by name."""
    forms = []
    for allowed in (False, True):
        with generated(allowed):
            forms.append(make())
    best: list[dict[str, float]] = [{}, {}]
    for _ in range(rounds):
        for form, kept in zip(forms, best):
            for name, ms in form().items():
                kept[name] = min(ms, kept.get(name, ms))
    return {name: (best[0][name], best[1][name]) for name in best[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--net", help="networks instead of layers, joined by commas")
    parser.add_argument("--mode", choices=("infer", "train"), default="infer")
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10, help="runs in a round")
    chosen = parser.parse_args()
    reason = engine.missing()
    if reason:
        raise SystemExit(f"there is nothing to compare: {reason}")
    print("| what | batch | op | without ms | with ms | ratio |\n|---|---|---|---|---|---|")
    for batch in map(int, chosen.batch.split(",")):
        for name, make in _measures(chosen, batch):
            for op, (without, found) in compared(make, chosen.rounds).items():
                ratio = f"{found / without:.2f}"
                print(
                    f"| {name} | {batch} | {op} | {without:.4g} | {found:.4g} | {ratio} |",
                    flush=True,
                )


def _measures(
    chosen: argparse.Namespace, batch: int
) -> Iterator[tuple[str, Callable[[], Measure]]]:
    if chosen.net:
        for spec in chosen.net.split(","):
            yield spec, lambda s=spec: whole(s, chosen.mode, batch, chosen.threads, chosen.repeats)
        return
    for shape in LAYERS:
        channels, filters, size, kernel, _ = shape
        title = f"{channels} to {filters}, {kernel}x{kernel}, {size}x{size}"
        yield title, lambda s=shape: layer(batch, s, chosen.threads, chosen.repeats)


if __name__ == "__main__":
    main()
