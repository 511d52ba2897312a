"""The commands `data fetch` and `data check`: bring data sets, and say how it stands with them."""

from __future__ import annotations

import sys

import click


@click.group()
def data() -> None:
    """Bring data sets and check those that are there.

    They lie in $BRANCHGRAPH_DATA, else in the user's cache folder.

    \b
    branchgraph data check
    branchgraph data fetch mnist
    """


@data.command()
@click.argument("name", metavar="NAME")
def fetch(name: str) -> None:
    """Download a data set from its official place: cifar10, cifar100 or mnist.

    What was interrupted goes on where it stopped; what is there already is left alone.

    \b
    branchgraph data fetch mnist
    """
    from tqdm import tqdm

    from branchgraph.data.fetch import fetch as bring
    from branchgraph.data.fetch import source_of

    size = sum(remote.size for remote in source_of(name).files)
    with tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None, leave=False) as bar:
        paths = bring(name, progress=bar)
    for path in paths:
        click.echo(str(path))


@data.command()
@click.argument("name", metavar="[NAME]", required=False)
def check(name: str | None) -> None:
    """Say for each data set what is there and whether it can be used.

    Exit code 0: usable; 1: missing; 2: broken; the worst of them without NAME.

    \b
    branchgraph data check
    branchgraph data check cifar10
    """
    from branchgraph.data import datasets
    from branchgraph.data.fetch import check as look

    worst = 0
    for each in [name] if name else datasets():
        condition = look(each)
        worst = max(worst, condition.code)
        click.echo(f"{condition.name}: {condition.word}")
        for line in condition.lines:
            click.echo(f"    {line}")
    sys.exit(worst)
