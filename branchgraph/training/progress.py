"""Training with a progress bar on standard error; the bar vanishes when that is no terminal."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from branchgraph.training.loop import History, Training, train


def train_with_progress(
    training: Training, x: np.ndarray, labels: np.ndarray, epochs: int, batch: int, seed: int
) -> History:
    """Train as `train` does, showing steps and the loss of the last epoch."""
    steps = epochs * -(-len(x) // batch)
    with tqdm(total=steps, unit="step", disable=None, leave=False) as bar:

        def on_step(result: dict[str, float]) -> None:
            bar.update()

        def on_epoch(epoch: int, means: dict[str, float]) -> None:
            bar.set_postfix_str(f"epoch {epoch + 1}/{epochs}, loss {means['loss']:.4f}")

        return train(
            training,
            x,
            labels,
            epochs=epochs,
            batch=batch,
            seed=seed,
            on_step=on_step,
            on_epoch=on_epoch,
        )


def summary(history: History) -> str:
    """The last epoch in words."""
    means = ", ".join(f"{k} {v:.4f}" for k, v in history.epochs[-1].items())
    seconds = sum(history.seconds) / len(history.seconds)
    return f"epoch {len(history.epochs)}: {means}; {seconds:.2f} s an epoch"
