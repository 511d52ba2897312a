"""The main job in one go: declare, insert exits, train jointly, sweep thresholds, draw.

The default data are scikit-learn's 8x8 handwritten digits, with a LeNet of fitting size, so that no
network connection is needed; `mnist` runs the published network on MNIST.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from branchgraph.analysis.plots import plot_sweep, plot_training
from branchgraph.analysis.sweep import sweep, table, write_csv
from branchgraph.data import load
from branchgraph.ir.errors import FormatError
from branchgraph.ir.file import save
from branchgraph.ir.graph import Graph
from branchgraph.ir.optimisers import Adam
from branchgraph.nets import network
from branchgraph.passes.base import Pass
from branchgraph.show.render import DrawingWarning, render
from branchgraph.training import Training, train
from branchgraph.training.progress import progress_bar, summary


@dataclass(frozen=True)
class Setting:
    """What the demo runs on one data set."""

    network: str
    epochs: int
    batch: int
    sweep_rows: int
    words: str


SETTINGS = {
    "digits": Setting(
        "lenet:size=8,kernel=3,widths=16+32+64", 40, 64, 360, "a LeNet fitted to 8x8 digits"
    ),
    "mnist": Setting("lenet", 2, 512, 2000, "LeNet for 28x28 digits"),
}
INSERT = "insert_exits:after=conv1,criterion=entropy"
TITLE = "Early exits of B-LeNet, batches of 64"
THRESHOLDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5)


def run(data: str, epochs: int | None, seed: int, output: Path, say: Callable[[str], None]) -> None:
    """Run the demo on a data set and write everything to the folder `output`."""
    if data not in SETTINGS:
        raise FormatError(f"the demo knows no data set {data!r}; it knows: {', '.join(SETTINGS)}")
    start = time.perf_counter()
    setting = SETTINGS[data]
    epochs = epochs or setting.epochs
    dataset = load(data)
    _folder(output)
    say(
        f"data: {dataset.name}, {len(dataset.train_images)} training and "
        f"{len(dataset.test_images)} test images"
    )

    plain = network(setting.network)
    say(f"network: {setting.words} ({setting.network})")
    result = Pass.from_spec(INSERT).run(plain)
    say(f"pass: {result.report}")
    files = [
        _draw(plain, output / "before.svg", say),
        _draw(result.graph, output / "after.svg", say),
    ]

    say(f"training trunk and exits jointly, {epochs} epoch(s) of Adam")
    training = Training.of(result.graph, Adam(), seed=seed)
    x, labels = dataset.train_images, dataset.train_labels
    with progress_bar(len(x), setting.batch, epochs) as (on_step, on_epoch):
        history = train(
            training, x, labels, epochs=epochs, batch=setting.batch, seed=seed, on_step=on_step,
            on_epoch=on_epoch,
        )  # fmt: skip
    say(f"  {summary(history)}")
    save(output / "network.bg", result.graph, training.store)

    x, labels = dataset.test_images[: setting.sweep_rows], dataset.test_labels[: setting.sweep_rows]
    for batch in (1, 64):
        say(
            f"\nearly exits on {len(x)} test images, batch {batch}, "
            "wall clock with everything in it:"
        )
        measured = sweep(result.graph, training.store, x, labels, THRESHOLDS, batch=batch)
        say(table(measured, "LeNet"))
    write_csv(measured, "LeNet", output / "sweep.csv")
    plot_sweep(measured.points, output / "sweep.svg", baseline=measured.baseline, title=TITLE)
    plot_training({name: history.series(name) for name in history.names}, output / "training.svg")
    names = ("sweep.svg", "training.svg", "sweep.csv", "network.bg")
    say(f"\ndone in {time.perf_counter() - start:.0f} s; written:")
    for path in (*files, *(output / name for name in names)):
        say(f"  {path}")


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{path}: cannot make this folder: {error.strerror}") from None


def _draw(graph: Graph, path: Path, say: Callable[[str], None]) -> Path:
    """Draw a graph and pass on what the renderer has to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DrawingWarning)  # the note says it
        drawing = render(graph, path)
    if drawing.note:
        say(drawing.note)
    return drawing.path
