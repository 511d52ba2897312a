"""The command `demo`: the main job in one go."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--data", default="digits", show_default=True, help="Data set: digits or mnist.")
@click.option("--epochs", type=click.IntRange(1), help="Default: 40 on digits, 2 on MNIST.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option(
    "-o", "--output", default="branchgraph-demo", show_default=True,
    type=click.Path(path_type=Path, file_okay=False), help="Folder for pictures and the network.",
)  # fmt: skip
def demo(data: str, epochs: int | None, seed: int, output: Path) -> None:
    """Run the main job: declare LeNet, insert an exit, train, sweep, draw.

    \b
    branchgraph demo                    about a minute, on 8x8 handwritten digits
    branchgraph demo --data mnist       some minutes, on MNIST
    """
    from branchgraph.demo import run

    run(data, epochs, seed, output, say=click.echo)
