"""The B-LeNet that BranchyNet's authors published, in our graph: its 17 rows and its true gain.

    BRANCHGRAPH_GOLDENS=... BRANCHGRAPH_DATA=... python tools/published_lenet.py --batch 1 16 256

Prints, for every batch size, the table of all 17 published thresholds with the wall-clock gain next
to the trunk-only gain, and beside each row the published accuracy and exit share. `-o` saves the
network with its weights as a `.bg` file for `branchgraph sweep` and `branchgraph show`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np

from branchgraph import Graph, Store, network, save
from branchgraph.analysis.sweep import Sweep, sweep
from branchgraph.data import load
from branchgraph.nets.branchynet import exchange_name


def published(folder: Path) -> tuple[Graph, Store]:
    """B-LeNet with the published weights."""
    arrays = np.load(folder / "lenet_mnist_100.npz")
    graph, store = network("b_lenet"), Store()
    for state in graph.states:
        store[state] = arrays[exchange_name(state)]
    return graph, store


def report(result: Sweep, rows: list[dict]) -> None:
    """One line a threshold: ours, the published row, and whether they are equal."""
    base = result.baseline
    print(
        f"batch {result.batch}: without branches {1000 * base.seconds_per_sample:.4f} ms a sample"
    )
    for point, row in zip(result.points, rows):
        accuracy, share = 100 * point.accuracy, 100 * point.exit_shares[0]
        equal = round(accuracy, 2) == row["acc"] and round(share, 2) == row["exit"][0]
        print(
            f"  T {point.threshold[0]:<7g} accuracy {accuracy:.2f} (published {row['acc']:.2f}) "
            f"exit 1 {share:.2f} % (published {row['exit'][0]:.2f}) "
            f"{'equal' if equal else 'DIFFERENT'}  {1000 * point.seconds_per_sample:.4f} ms  "
            f"gain {point.gain:.2f}  trunk-only gain {point.trunk_gain:.2f}",
            flush=True,
        )


def main() -> None:
    """Measure at every batch size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000, help="the first so many test images")
    parser.add_argument("-o", "--output", type=Path, help="save the network here (.bg)")
    options = parser.parse_args()
    folder = Path(os.environ["BRANCHGRAPH_GOLDENS"]) / "branchynet"
    graph, store = published(folder)
    if options.output:
        save(options.output, graph, store)
    data = load("mnist").subset(test=options.images)
    rows = json.loads((folder / "lenet_published_rows.json").read_text())["rows"]
    thresholds = [row["T"][0] for row in rows]
    for batch in options.batch:
        measured = sweep(
            graph, store, data.test_images, data.test_labels, thresholds,
            batch=batch, repeats=options.repeats,
        )  # fmt: skip
        report(measured, rows)


if __name__ == "__main__":
    main()
