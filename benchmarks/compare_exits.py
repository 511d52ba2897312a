"""What early exits gain in wall-clock time: a trained B-LeNet with exits against itself without.

    branchgraph train b_lenet --data mnist --epochs 10 -o b_lenet.bg
    python benchmarks/compare_exits.py b_lenet.bg --batch 1,256 --threshold 0.025

Both run here, on MNIST's test images from the data folder ($BRANCHGRAPH_DATA), batch after batch;
heads, softmax, criterion, gathering and scattering are included. LeNet is the same network with
`remove_exits`. The *predicted* gain comes from two parts that are timed by themselves: what every
sample runs (trunk up to the exit, head, criterion) and what is behind the exit, fed with as many
rows as stay in each batch:

    gain       t(lenet) / t(b_lenet)
    predicted  t(lenet) / (t(before the cut) + t(behind the cut))

so what the ratio of both lacks to 1 is the cost of moving rows. The last column is the limit by
MACs alone. Each round times all four; printed are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from branchgraph.compiler import Executable, compile
from branchgraph.compiler.pipeline import CLEANING
from branchgraph.data import load
from branchgraph.ir.cost import cost
from branchgraph.ir.errors import GraphError
from branchgraph.ir.extract import extract
from branchgraph.ir.file import load as load_network
from branchgraph.ir.graph import Graph, Node
from branchgraph.ir.ops.exit import Exit
from branchgraph.ir.ops.rows import Compact
from branchgraph.ir.rebuild import bind
from branchgraph.ir.state import Store
from branchgraph.passes.insert_exits import RemoveExits
from branchgraph.passes.specialise import specialise


@dataclass(frozen=True)
class Gain:
    """What one batch size gave; times are milliseconds for a pass over all images."""

    batch: int
    lenet_accuracy: float
    accuracy: float
    leaving: float
    lenet_ms: float
    b_lenet_ms: float
    before_ms: float
    behind_ms: float
    by_macs: float

    @property
    def gain(self) -> float:
        return self.lenet_ms / self.b_lenet_ms

    @property
    def predicted(self) -> float:
        return self.lenet_ms / (self.before_ms + self.behind_ms)


@dataclass(frozen=True)
class Parts:
    """A network with one early exit, lowered, and the two parts that its exit cuts it into."""

    lowered: Graph
    before: Graph
    behind: Graph

    @staticmethod
    def of(graph: Graph) -> Parts:
        """Cut at the compaction; `GraphError` unless there is exactly one early exit."""
        lowered = specialise(CLEANING.apply(graph), training=False)
        cuts = [n for n in lowered.nodes if isinstance(n.op, Compact)]
        if len(cuts) != 1:
            raise GraphError(f"{graph.name}: expected one early exit, it has {len(cuts)}")
        (cut,) = cuts
        put_back = lowered.outputs["logits"].producer
        assert put_back is not None
        before = extract(cut.inputs, (), "before")
        return Parts(lowered, before, extract([put_back.inputs[1]], cut.outputs, "behind"))


def measure(
    graph: Graph, store: Store, images: np.ndarray, labels: np.ndarray, *,
    batch: int, threshold: float, backend: str, rounds: int,
) -> Gain:  # fmt: skip
    """Time all four on the same images in interleaved rounds."""
    name = _early(graph)
    plain = RemoveExits().apply(graph)
    parts = Parts.of(graph)
    lenet, b_lenet, before, behind = (
        compile(g, backend, store=store) for g in (plain, graph, parts.before, parts.behind)
    )
    limit = {f"{name}.threshold": threshold}
    batches = [{"x": images[i : i + batch]} for i in range(0, len(images), batch)]
    exiting = [{**fed, **limit} for fed in batches]
    results = [b_lenet.run(fed) for fed in exiting]
    plain_logits = np.concatenate([_only(lenet.run(fed)) for fed in batches])
    staying = [_rows(before.run(fed)) for fed in exiting]
    behind_fed = [fed for fed in staying if len(next(iter(fed.values())))]
    passes: list[Callable[[], None]] = [
        lambda: _all(lenet, batches), lambda: _all(b_lenet, exiting),
        lambda: _all(before, exiting), lambda: _all(behind, behind_fed),
    ]  # fmt: skip
    times = [[_milliseconds(run) for run in passes] for _ in range(rounds)]
    logits = np.concatenate([r["logits"] for r in results])
    leaving = np.mean(np.concatenate([r["exit"] for r in results]) == 0)
    macs = [_macs(g) for g in (plain, parts.before, parts.behind)]
    return Gain(
        batch, _accuracy(plain_logits, labels), _accuracy(logits, labels), float(leaving),
        *(statistics.median(column) for column in zip(*times)),
        by_macs=macs[0] / (macs[1] + (1 - float(leaving)) * macs[2]),
    )  # fmt: skip


def _early(graph: Graph) -> str:
    """The name of the only exit with a threshold."""
    found: list[Node] = [n for n in graph.nodes if isinstance(n.op, Exit) and len(n.inputs) > 1]
    if len(found) != 1:
        raise GraphError(f"{graph.name}: expected one early exit, it has {len(found)}")
    op = found[0].op
    assert isinstance(op, Exit)
    return op.name


def _only(outputs: dict[str, np.ndarray]) -> np.ndarray:
    (array,) = outputs.values()
    return array


def _rows(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The live values of the samples that stay, as the part behind the cut takes them."""
    mask, *values = outputs.values()
    return {f"x{i}": value[mask] for i, value in enumerate(values)}


def _all(run: Executable, batches: Sequence[dict[str, np.ndarray | float]]) -> None:
    for fed in batches:
        run.run(fed)


def _milliseconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(logits.argmax(axis=1) == labels))


def _macs(graph: Graph) -> int:
    """Of one sample."""
    symbols = {s for v in graph.inputs.values() for d in v.shape for s in getattr(d, "symbols", ())}
    macs = cost(bind(graph, **dict.fromkeys(symbols, 1))).macs
    assert isinstance(macs, int)
    return macs


def table(gains: Sequence[Gain]) -> str:
    """A Markdown table, a line a batch size."""
    head = (
        "batch", "LeNet accuracy", "accuracy", "leave early", "LeNet ms", "B-LeNet ms",
        "before ms", "behind ms", "gain", "predicted", "gain / predicted", "by MACs",
    )  # fmt: skip
    lines = [head, tuple("---" for _ in head)]
    lines.extend(
        (
            str(g.batch), f"{g.lenet_accuracy:.2%}", f"{g.accuracy:.2%}", f"{g.leaving:.2%}",
            f"{g.lenet_ms:.1f}", f"{g.b_lenet_ms:.1f}", f"{g.before_ms:.1f}", f"{g.behind_ms:.1f}",
            f"{g.gain:.2f}", f"{g.predicted:.2f}", f"{g.gain / g.predicted:.2f}",
            f"{g.by_macs:.2f}",
        )
        for g in gains
    )  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table of all batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("network", type=Path, help="a trained network with one early exit (.bg)")
    parser.add_argument("--batch", default="1,256")
    parser.add_argument("--threshold", type=float, default=0.025)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, help="how many test images; all where not given")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    graph, store = load_network(chosen.network)
    data = load("mnist").subset(test=chosen.samples)
    gains = [
        measure(
            graph, store, data.test_images, data.test_labels, batch=int(size),
            threshold=chosen.threshold, backend=chosen.backend, rounds=chosen.rounds,
        )
        for size in chosen.batch.split(",")
    ]  # fmt: skip
    print(table(gains))
    if chosen.json:
        cell = {"net": graph.name, "mode": "exits", "system": "branchgraph"}
        derived = [{**cell, **asdict(g), "gain": g.gain, "predicted": g.predicted} for g in gains]
        chosen.json.write_text(json.dumps({"rows": derived}, indent=1) + "\n")


if __name__ == "__main__":
    main()
