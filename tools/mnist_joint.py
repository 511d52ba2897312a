"""Joint training of B-LeNet on MNIST over several seeds: the recipe behind the figures we quote.

    python tools/mnist_joint.py --seeds 0 1 2 3 4 --epochs 10 --json runs.json

Adam 1e-3, batches of 512, one shared last head, loss weights 1. Prints for every seed the accuracy
of both exits after the last epoch, what leaves at exit 1 for T = 0.5 and how accurate that is, the
seconds of an epoch and the peak memory of the process. Needs MNIST (see `branchgraph data`).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
from pathlib import Path

import numpy as np

from branchgraph.compiler import Executable, compile
from branchgraph.data import load
from branchgraph.ir.optimisers import Adam
from branchgraph.nets import network
from branchgraph.training import Training, train

THRESHOLD = 0.5


def in_batches(run: Executable, x: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """Outputs for all of `x`, 500 images at a time."""
    parts = [
        run.run({"x": x[i : i + 500], "exit1.threshold": threshold}) for i in range(0, len(x), 500)
    ]
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def accuracies(run: Executable, x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy of each exit alone, and with early exits at `THRESHOLD`."""
    found = {}
    for name, threshold in (("exit1", 1e9), ("exit2", 0.0), ("early exits", THRESHOLD)):
        outputs = in_batches(run, x, threshold)
        right = outputs["logits"].argmax(axis=1) == labels
        found[name] = float(right.mean())
    left = outputs["exit"] == 0
    found["share at exit 1"] = float(left.mean())
    found["leavers"] = float(right[left].mean())
    return found


def one_seed(seed: int, epochs: int, batch: int) -> dict[str, float]:
    """Train from `seed` and measure on the test set."""
    data = load("mnist")
    net = network("b_lenet")
    training = Training.of(net, Adam(), seed=seed)
    history = train(
        training, data.train_images, data.train_labels, epochs=epochs, batch=batch, seed=seed
    )
    run = compile(net, store=training.store)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = accuracies(run, data.test_images, data.test_labels)
    seconds = statistics.median(history.seconds)
    return {"seed": seed, **figures, "seconds an epoch": seconds, "peak MiB": peak}


def main() -> None:
    """Run all seeds and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        results.append(one_seed(seed, options.epochs, options.batch))
        print("  ".join(f"{k} {v:.4g}" for k, v in results[-1].items()), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
