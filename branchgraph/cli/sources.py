"""What several commands read and check: networks, passes, optimisers, targets."""

from __future__ import annotations

from pathlib import Path

import click

from branchgraph.ir.errors import FormatError
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Store
from branchgraph.nets import network
from branchgraph.passes.base import Pass
from branchgraph.passes.materialise import evaluate_origin


def read(source: str) -> tuple[Graph, Store | None]:
    """A network from a specification string, a text file (.txt) or a .bg file with its values."""
    path = Path(source)
    if path.suffix == ".bg":
        from branchgraph.ir.file import load

        return load(path)
    if path.suffix == ".txt":
        return _parse_text(path), None
    return network(source), None


def _parse_text(path: Path) -> Graph:
    from branchgraph.ir.text import parse_graph

    try:
        return parse_graph(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as a graph's text: {error}") from None


def rewritten(graph: Graph, specs: tuple[str, ...], store: Store | None = None) -> Graph:
    """The graph after passes, each reported on standard error; `store` is for those that ask."""
    for spec in specs:
        result = Pass.from_spec(spec).run(graph, values=store)
        click.echo(str(result.report), err=True)
        graph = result.graph
        if result.report.origin is not None and store is not None:
            evaluate_origin(result.report.origin, store)
    return graph


def pairs(texts: tuple[str, ...], option: str) -> dict[str, float]:
    """`NAME=NUMBER` options as a dictionary."""
    found = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise FormatError(f"{option} {text!r}: expected NAME=NUMBER, such as exit1=0.3")
    return found


def check_target(path: Path, *suffixes: str) -> None:
    """Refuse a file that could not be written, before the work that it is to hold."""
    if path.suffix not in suffixes:
        raise FormatError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise FormatError(f"{path}: there is no folder {path.parent}; create it first")
