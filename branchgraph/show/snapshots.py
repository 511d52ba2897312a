"""An instrument of pipelines that keeps what every step made: its text, its report, its picture.

    Pipeline(passes, instruments=(Snapshots("steps"),)).apply(graph)

writes `steps/1-fold_batch_norm.txt` (the graph), `.report.txt` and `.svg` for each pass, and
`steps/0.txt` and `.svg` for the graph before the first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from branchgraph.ir.atomic import replacing
from branchgraph.ir.errors import BranchgraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.text import format_graph
from branchgraph.show.render import render


class Snapshots:
    """Writes into a folder, which is made if it is not there."""

    def __init__(self, folder: str | os.PathLike[str], picture: str = ".svg") -> None:
        self.folder = Path(folder)
        self.picture = picture
        self.steps = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BranchgraphError(
                f"{self.folder}: cannot make this folder: {error.strerror}; name another"
            ) from None

    def __call__(self, step: Any, graph: Graph, result: Any) -> None:
        if not self.steps:
            self._write("0", graph)
        self.steps += 1
        name = f"{self.steps}-{step.spelling}"
        self._write(name, result.graph)
        self._text(f"{name}.report.txt", str(result.report))

    def _write(self, name: str, graph: Graph) -> None:
        self._text(f"{name}.txt", format_graph(graph))
        render(graph, self.folder / f"{name}{self.picture}")

    def _text(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
