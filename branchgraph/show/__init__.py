"""Pictures of graphs: DOT, SVG, PNG, PDF and a drawing for the terminal.

from branchgraph.show import render, to_text
render(graph, "b_lenet.svg")
print(to_text(graph))
"""

from branchgraph.show.counts import Counts, counts
from branchgraph.show.dot import to_dot
from branchgraph.show.render import Drawing, DrawingWarning, render
from branchgraph.show.text import to_text

__all__ = ["Counts", "Drawing", "DrawingWarning", "counts", "render", "to_dot", "to_text"]
