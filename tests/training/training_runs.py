"""How each family is trained in `test_families.py`: networks, data, rules, steps and bounds.

    BRANCHGRAPH_DATA=... python tests/training/training_runs.py --seeds 0 1 2 [--long] [--only NAME]

prints the figures from which the bounds were taken. A run goes through its images once, so every
batch is new to the network and its training loss is one on unseen images: labels that are shuffled
cannot be memorised, and the loss stays at ln 10 = 2.303 or above. What is judged is the mean loss
of the last quarter of the steps, of each exit or branch by itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np

from branchgraph.data import Dataset, load
from branchgraph.data.transforms import CHANNELS, Normalise, transformed
from branchgraph.ir.builder import relu
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.optimisers import optimiser
from branchgraph.nets import network
from branchgraph.nets.catalogue import Catalogue, family
from branchgraph.nets.paradise_blocks import pd_a, pd_b
from branchgraph.nets.reparameterised import dbb, repvgg_unit
from branchgraph.nets.units import PYTORCH
from branchgraph.training import Training, train
from branchgraph.training.evaluation import Evaluator

# -- networks around one block ---------------------------------------------------------------------

_BLOCKS: dict[str, Callable[[Value, int], Value]] = {
    "pd_a": pd_a, "pd_b": pd_b, "repvgg": repvgg_unit, "dbb": dbb,
}  # fmt: skip


def one_block(block: str = "pd_a", width: int = 64, stride: int = 4) -> Graph:
    """A strided stem, one block that keeps shape and width, a head: MNIST."""
    graph = Graph(f"one_{block}")
    h = PYTORCH.unit(graph.input("x", ("N", 1, 28, 28)), width, 7, stride=stride, name="stem")
    graph.output("logits", PYTORCH.head(relu(_BLOCKS[block](h, width)), 10))
    return graph


_OWN = Catalogue(family("one block", one_block))


def declared(spec: str) -> Graph:
    """The network of a specification, of this module or of the package."""
    return (_OWN.network if spec.partition(":")[0] in _OWN else network)(spec)


# -- runs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training, and what its loss must be below, and above when labels are shuffled."""

    network: str
    data: str
    rule: str
    batch: int
    steps: int
    below: float
    above: float = 2.25


_MNIST, _CIFAR = "mnist:train=2048,test=0", "cifar10:train=2048,test=0"
_ADAM, _FAST, _FASTER = (f"adam:learning_rate={rate}" for rate in (0.003, 0.01, 0.02))
_GATES = f"{_FAST},gates=mask_sgd"

_SMALL_RESNEXT = "masked_resnext:depth=11,width=2,cardinality=4,channels=1,size=7"

#: Seconds each. Bounds: the worst of the seeds 0 to 4, and a fifth of the way from there to ln 10.
SHORT = (
    Run("lenet", _MNIST, _ADAM, 32, 50, 0.9),
    Run("b_lenet", _MNIST, _ADAM, 32, 50, 1.05),
    Run("b_alexnet:size=16", _CIFAR, "adam:learning_rate=0.0015", 16, 128, 2.2),
    Run("fcn:branches=2,shared=0.5", _MNIST, _ADAM, 32, 60, 0.85),
    Run("cnn:version=cifar,branches=2,shared=0.5,size=8", _CIFAR, _ADAM, 32, 40, 2.1),
    Run("pd_perceptron", _MNIST, _FAST, 32, 60, 0.9),
    Run("pd_perceptron:form=pd_a", _MNIST, _FAST, 32, 60, 0.9),
    Run("pd_perceptron:form=pd_b", _MNIST, _FAST, 32, 60, 0.9),
    Run("one_block:block=pd_a", _MNIST, _FASTER, 16, 50, 1.8),
    Run("one_block:block=pd_b", _MNIST, _FASTER, 16, 50, 1.9),
    Run("one_block:block=repvgg,width=16", _MNIST, _FASTER, 16, 100, 1.75),
    Run("one_block:block=dbb,width=16", _MNIST, _FASTER, 16, 100, 1.6),
    Run("plain:depth=5,size=8", _CIFAR, _FAST, 32, 60, 2.0),
    Run("resnet:depth=8,size=8", _CIFAR, _FAST, 32, 60, 2.05),
    Run("half:depth=14,size=8", _CIFAR, _FAST, 32, 60, 2.05),
    Run("side:depth=14,size=8", _CIFAR, _FAST, 32, 60, 2.05),
    Run("cross:depth=14,size=8", _CIFAR, _FAST, 32, 60, 2.0),
    Run("fuse3:depth=5,size=8", _CIFAR, _FAST, 32, 60, 2.0),
    Run("fuse6:depth=8,size=8", _CIFAR, _FAST, 32, 60, 2.05),
    Run(_SMALL_RESNEXT, _MNIST, _GATES, 32, 50, 1.25),
    Run("masked_resnet:depth=8,k=1,channels=1,size=14", _MNIST, _GATES, 16, 60, 1.4),
)

_MORE_MNIST, _MORE_CIFAR = "mnist:train=20000,test=500", "cifar10:train=10000,test=500"
#: For networks whose inference is not settled after so few steps: running statistics of decay 0.99
#: (vbranch, the ensemble) are half initial values, and the gates of {20,4,8} are still undecided.
_TRAINING_ONLY = "cifar10:train=10000,test=0"

#: Up to minutes each. Bounds as above, from the seeds in docs/performance.md.
LONG = (
    Run("lenet", _MORE_MNIST, _ADAM, 64, 300, 0.6),
    Run("b_lenet", _MORE_MNIST, _ADAM, 64, 300, 0.6),
    Run("fcn:branches=2,shared=0.5", _MORE_MNIST, _ADAM, 64, 300, 0.65),
    Run("pd_perceptron", _MORE_MNIST, _ADAM, 64, 300, 0.7),
    Run("pd_perceptron:form=pd_a", _MORE_MNIST, _ADAM, 64, 300, 0.7),
    Run("pd_perceptron:form=pd_b", _MORE_MNIST, _ADAM, 64, 300, 0.7),
    Run("one_block:block=pd_a", _MORE_MNIST, _FAST, 32, 300, 0.75),
    Run("one_block:block=pd_b", _MORE_MNIST, _FAST, 32, 300, 0.9),
    Run("one_block:block=repvgg,width=16", _MORE_MNIST, _FAST, 32, 500, 1.0),
    Run("one_block:block=dbb,width=16", _MORE_MNIST, _FAST, 32, 500, 1.0),
    Run("b_alexnet", _MORE_CIFAR, "adam", 32, 200, 2.05),
    Run("cnn:version=cifar,branches=2,shared=0.5", _TRAINING_ONLY, _ADAM, 32, 60, 2.05),
    Run("resnet:depth=8", _MORE_CIFAR, _FAST, 32, 150, 2.0),
    Run("cross:depth=14", _MORE_CIFAR, _FAST, 32, 100, 2.05),
    Run("fuse3:depth=5", _MORE_CIFAR, _FAST, 32, 150, 2.05),
    Run("ensemble:depth=5", _TRAINING_ONLY, _FAST, 32, 60, 2.05),
    Run("masked_resnet:depth=8,k=1", _MORE_CIFAR, _GATES, 32, 250, 1.95),
    Run(_SMALL_RESNEXT, _MORE_MNIST, _GATES, 32, 400, 0.8),
    Run(
        "masked_resnext:depth=20,width=1,cardinality=8,size=16", _TRAINING_ONLY,
        "adam:learning_rate=0.005,gates=mask_sgd", 32, 310, 2.1,
    ),
)  # fmt: skip

# -- figures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What a run gave, by the names of its exits or branches."""

    #: Loss of the first step, and the mean of the last quarter of the steps.
    first: dict[str, float]
    last: dict[str, float]
    #: Loss and accuracy of inference on images for test; nothing where the data have none.
    test: dict[str, float]
    accuracy: dict[str, float]
    seconds_a_step: float


def fit(run: Run, seed: int = 0, shuffled: bool = False) -> Figures:
    """Train once through the images of `run`, and measure."""
    graph, data = declared(run.network), _data(run.data)
    shape = tuple(int(str(d)) for d in graph.inputs["x"].shape[1:])
    images, labels = (a[: run.batch * run.steps] for a in (data.train_images, data.train_labels))
    if shuffled:
        labels = np.random.default_rng(seed).permutation(labels)
    training = Training.of(graph, optimiser(run.rule), seed=seed)
    results: list[dict[str, float]] = []
    history = train(
        training, as_input(images, shape), labels, epochs=1, batch=run.batch, seed=seed,
        on_step=results.append,
    )  # fmt: skip
    if len(results) != run.steps:
        raise ValueError(f"{run.network}: {run.data} is one pass of {len(results)} steps")
    tail = [_of_heads(r, "loss") for r in results[-(run.steps // 4) :]]
    test: dict[str, float] = {}
    if len(data.test_labels):
        measured = Evaluator(graph, training.store)
        test = measured(as_input(data.test_images, shape), data.test_labels)
    return Figures(
        first=_of_heads(results[0], "loss"),
        last={head: float(np.mean([r[head] for r in tail])) for head in tail[0]},
        test=_of_heads(test, "loss"),
        accuracy=_of_heads(test, "accuracy"),
        seconds_a_step=history.seconds[0] / run.steps,
    )


def _of_heads(results: Mapping[str, float], what: str) -> dict[str, float]:
    """One quantity of each exit or branch: `exit1.loss` is that of `exit1`."""
    suffix = f".{what}"
    return {k.removesuffix(suffix): v for k, v in results.items() if k.endswith(suffix)}


def as_input(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Images as a network takes them: in rows, or smaller by averaging squares."""
    if len(shape) == 1:
        return images.reshape(len(images), *shape)
    n, channels, height, width = images.shape
    rows, columns = shape[1:]
    squares = images.reshape(n, channels, rows, height // rows, columns, width // columns)
    return np.ascontiguousarray(squares.mean((3, 5), dtype=np.float32))


@lru_cache(maxsize=2)
def _data(spec: str) -> Dataset:
    data = load(spec)
    return transformed(data, Normalise.of(data.name)) if data.name in CHANNELS else data


# -- command ---------------------------------------------------------------------------------------


def main() -> None:
    """Train the chosen rows on right and on shuffled labels, one line a seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--long", action="store_true", help="the runs of minutes")
    parser.add_argument("--only", default="", help="runs whose network has this in it")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    rows = [r for r in (LONG if options.long else SHORT) if options.only in r.network]
    found = []
    for run, seed, shuffled in product(rows, options.seeds, (False, True)):
        figures = fit(run, seed, shuffled)
        labels = "shuffled" if shuffled else "right"
        found.append({"network": run.network, "seed": seed, "labels": labels, **asdict(figures)})
        last = "  ".join(f"{head} {loss:.3f}" for head, loss in figures.last.items())
        print(f"{run.network}  seed {seed}  {labels}  {last}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
