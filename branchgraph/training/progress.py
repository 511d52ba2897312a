"""Training with a progress bar on standard error; the bar vanishes when that is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm

from branchgraph.training.history import History, Progress

OnStep = Callable[[dict[str, float]], None]
OnEpoch = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def progress_bar(
    count: int, batch: int, epochs: int, start: Progress | None = None
) -> Iterator[tuple[OnStep, OnEpoch]]:
    """Callbacks for `train` that show steps, and the loss of the last epoch.

    `count` examples in batches of `batch`, up to `epochs` epochs, from where `start` stands.
    """
    a_epoch = -(-count // batch)
    done = start.epoch * a_epoch + start.step if start else 0
    with tqdm(total=epochs * a_epoch, initial=done, unit="step", disable=None, leave=False) as bar:

        def on_step(result: dict[str, float]) -> None:
            bar.update()

        def on_epoch(epoch: int, means: dict[str, float]) -> None:
            bar.set_postfix_str(f"epoch {epoch + 1}/{epochs}, loss {means['loss']:.4f}")

        yield on_step, on_epoch


def summary(history: History) -> str:
    """The last epoch in words."""
    means = ", ".join(f"{k} {v:.4f}" for k, v in history.epochs[-1].items())
    seconds = sum(history.seconds) / len(history.seconds)
    return f"epoch {len(history.epochs)}: {means}; {seconds:.2f} s an epoch"
