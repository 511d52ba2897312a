"""DOT source of a graph, for Graphviz.

Data flows from top to bottom. A declared branch is a tinted cluster with its name, a plain scope a
pale one. The steps of a layer (convolution, batch norm, ReLU, pooling) share a box, a row each;
merges, gates, exits, losses, inputs and outputs have shapes of their own (`show.style`). The same
graph always gives the same text.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

import graphviz

from branchgraph.ir.graph import Graph, Location, Node, Value
from branchgraph.ir.text import Labels, format_node
from branchgraph.show import describe
from branchgraph.show.picture import Picture
from branchgraph.show.style import (
    BRANCH_FILL,
    BRANCH_LINE,
    LOOKS,
    SCOPE_FILL,
    SCOPE_LINE,
    STEPS,
    Kind,
    Look,
    kind,
)

_FONT = "Helvetica,Arial,DejaVu Sans,sans-serif"
_GRAPH = {
    "rankdir": "TB", "nodesep": "0.22", "ranksep": "0.14", "fontname": _FONT, "fontsize": "12",
    "labelloc": "t", "bgcolor": "white", "pad": "0.15",
}  # fmt: skip
_NODE = {"fontname": _FONT, "fontsize": "10", "width": "0", "height": "0", "margin": "0.08,0.04"}
_EDGE = {
    "fontname": _FONT, "fontsize": "8", "fontcolor": "#5A5A5A", "color": "#5A5A5A",
    "arrowsize": "0.55",
}  # fmt: skip
#: Drawings of more boxes than that go without shapes and are laid out with less care, to be done
#: within a minute.
MANY = 400
_LARGE = {"nslimit": "3", "nslimit1": "3", "mclimit": "0.3", "splines": "polyline"}
#: Shapes whose outline leaves room enough: the label needs no margin of its own.
_ROOMY = frozenset({"diamond", "invtrapezium", "hexagon", "octagon", "doubleoctagon"})
#: Steps of a layer share a row up to so many characters.
_ROW = 38


def to_dot(
    graph: Graph,
    *,
    shapes: bool = True,
    states: bool = False,
    updates: bool = False,
    stack: bool = True,
    legend: bool = True,
) -> str:
    """DOT source of `graph`.

    `shapes` writes shapes at the edges (unless there are hundreds of boxes); `states` draws states,
    0-d inputs and parameter expressions, which are otherwise folded into labels; `updates` draws
    gradients, updates and what leads to nothing else; `stack` draws the steps of a layer in one
    box; `legend` explains the kinds of nodes.
    """
    picture = Picture(graph, states=states, updates=updates)
    return str(_Drawer(picture, shapes=shapes, stack=stack, legend=legend).run().source)


def escape(text: str) -> str:
    """Clean text for a Graphviz HTML-like label, where a backslash still starts an escape."""
    return html.escape(text).replace("\\", "\\\\")


class _Drawer:
    def __init__(self, picture: Picture, *, shapes: bool, stack: bool, legend: bool) -> None:
        self.picture = picture
        self.legend = legend
        self.stacks = picture.stacks() if stack else [[n] for n in picture.nodes]
        large = len(self.stacks) > MANY
        self.shapes = shapes and not large
        self.labels = Labels(picture.graph)
        self.ids: dict[Node | Value, str] = {}
        self.dot = graphviz.Digraph(
            graphviz.escape(describe.clean(picture.graph.name)),
            graph_attr={
                **_GRAPH,
                **(_LARGE if large else {}),
                "label": self._title(),
            },
            node_attr=_NODE,
            edge_attr=_EDGE,
        )

    def run(self) -> graphviz.Digraph:
        for i, stack in enumerate(self.stacks):
            self.ids.update(dict.fromkeys(stack, f"n{i}"))
        for i, value in enumerate(self.picture.inputs):
            self._leaf(f"i{i}", value)
        placed: dict[Location, list[list[Node]]] = {loc: [] for loc in self._locations()}
        for stack in self.stacks:
            placed[self.picture.location(stack[0])].append(stack)
        self._cluster(self.dot, (), placed)
        self._outputs()
        self._edges()
        if self.legend:
            self._legend()
        return self.dot

    def _title(self) -> str:
        name = escape(describe.clean(self.picture.graph.name))
        totals = escape(" · ".join(self.picture.totals()))
        return (
            f'<<TABLE BORDER="0" CELLSPACING="0" CELLPADDING="1"><TR><TD><B>{name}</B></TD></TR>'
            f'<TR><TD><FONT POINT-SIZE="9">{totals}</FONT></TD></TR></TABLE>>'
        )

    # -- clusters ------------------------------------------------------------------------------

    def _locations(self) -> list[Location]:
        """All locations that hold nodes, and those around them, in order of first use."""
        found: dict[Location, None] = {(): None}
        for stack in self.stacks:
            scope = self.picture.location(stack[0])
            found.update((scope[:depth], None) for depth in range(1, len(scope) + 1))
        return list(found)

    def _cluster(
        self, into: graphviz.Digraph, at: Location, placed: dict[Location, list[list[Node]]]
    ) -> None:
        for stack in placed[at]:
            self._box(into, stack)
        inner = [loc for loc in placed if len(loc) == len(at) + 1 and loc[: len(at)] == at]
        for location in inner:
            scope = location[-1]
            order = list(placed).index(location)
            with into.subgraph(name=f"cluster_{order}") as cluster:
                cluster.attr(**(_branch_look() if scope.branch else _scope_look()))
                cluster.attr(label=f"<<B>{escape(describe.clean(scope.name))}</B>>")
                self._cluster(cluster, location, placed)

    # -- nodes ---------------------------------------------------------------------------------

    def _leaf(self, id: str, value: Value) -> None:
        self.ids[value] = id
        look = Kind.STATE if value.state else Kind.INPUT
        second = value.state.role.value if value.state else ""
        if value.default is not None:
            second = f"= {describe.number(value.default)}"
        self._shape(self.dot, id, look, _two_lines(describe.clean(value.name), second), value.label)

    def _box(self, into: graphviz.Digraph, stack: list[Node]) -> None:
        id = self.ids[stack[0]]
        tooltip = ";  ".join(format_node(n, self.labels) for n in stack)
        first = kind(stack[0])
        if first in STEPS:
            self._rows(into, id, stack, tooltip)
        else:
            self._shape(into, id, first, self._node_label(stack), tooltip)

    def _rows(self, into: graphviz.Digraph, id: str, stack: list[Node], tooltip: str) -> None:
        """The steps of one layer: a table of coloured cells, convolutions in rows of their own."""
        rows: list[list[str]] = []
        room = 0
        for node in stack:
            cell, length = self._cell(node)
            wide = kind(node) is Kind.TRAINABLE
            if wide or length > room:
                rows.append([])
                room = _ROW
            rows[-1].append(cell)
            room = 0 if wide else room - length
        table = _table(
            "".join(f"<TR><TD>{_table('<TR>' + ''.join(r) + '</TR>')}</TD></TR>" for r in rows)
        )
        kinds = [kind(n) for n in stack]
        look = LOOKS[kinds[0]]
        into.node(
            id, f"<{table}>", shape=look.shape, margin="0", color=look.line, fillcolor=look.fill,
            style=look.style if len(stack) == 1 else "filled", tooltip=_quoted(tooltip),
            **{"class": _classes(kinds)},
        )  # fmt: skip

    def _cell(self, node: Node) -> tuple[str, int]:
        """The cells of one step, and how many characters it takes."""
        words = [describe.title(node), self.picture.subtitle(node)]
        parameters = self.picture.parameters(node)
        left = " ".join(filter(None, (f"<B>{escape(words[0])}</B>", escape(words[1]))))
        look = f'CELLPADDING="3" BGCOLOR="{LOOKS[kind(node)].fill}"'
        cell = f'<TD ALIGN="LEFT" {look}>{left}</TD>'
        if parameters:
            small = f'<FONT POINT-SIZE="8" COLOR="#5A5A5A">{parameters}</FONT>'
            cell += f'<TD ALIGN="RIGHT" {look}>{small}</TD>'
        return cell, sum(map(len, (*words, parameters)))

    def _node_label(self, stack: list[Node]) -> str:
        node, *then = stack
        title = ", ".join([describe.title(node), *map(describe.title, then)])
        lines = [self.picture.subtitle(node), self.picture.parameters(node)]
        return _two_lines(title, ", ".join(filter(None, lines)))

    def _shape(self, into: graphviz.Digraph, id: str, of: Kind, label: str, tooltip: str) -> None:
        into.node(id, label, tooltip=_quoted(tooltip), **_attributes(of))

    def _outputs(self) -> None:
        for i, (name, value) in enumerate(self.picture.outputs):
            self._sink(f"o{i}", Kind.OUTPUT, _two_lines(describe.clean(name), ""), value)
        for i, (word, state, value) in enumerate(self.picture.commits):
            label = _two_lines(describe.clean(state.name), word)
            self._sink(f"u{i}", Kind.UPDATE, label, value)

    def _sink(self, id: str, of: Kind, label: str, value: Value) -> None:
        self._shape(self.dot, id, of, label, value.label)
        if self.picture.draws(value):
            self._edge(value, id)

    # -- edges ---------------------------------------------------------------------------------

    def _edges(self) -> None:
        for stack in self.stacks:
            for value in self.picture.operands(stack[0]):
                self._edge(value, self.ids[stack[0]])

    def _edge(self, value: Value, head: str) -> None:
        tail = self.ids[value.producer or value]
        label = f" {describe.shape(value.type)} " if self.shapes else ""
        self.dot.edge(tail, head, _quoted(label))

    # -- legend --------------------------------------------------------------------------------

    def _legend(self) -> None:
        """One node a kind, in rows of two, off the way of the data."""
        ids = {k: f"legend_{k.value}" for k in self.picture.kinds()}
        kinds = list(ids)
        with self.dot.subgraph(name="cluster_legend") as cluster:
            cluster.attr(label="<<B>legend</B>>", fontsize="9", color="#C4C4C4", style="rounded")
            for k in kinds:
                looks = {**_attributes(k), "fontsize": "8", "class": f"legend {k.value}"}
                cluster.node(ids[k], LOOKS[k].words, **looks)
            for left, right in zip(kinds[::2], kinds[1::2]):
                with cluster.subgraph() as row:
                    row.attr(rank="same")
                    row.edge(ids[left], ids[right], style="invis")
        for above, below in zip(kinds[::2], kinds[2::2]):
            self.dot.edge(ids[above], ids[below], style="invis")


def _table(rows: str) -> str:
    """Rows of a table without borders, spacing or padding."""
    return f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0">{rows}</TABLE>'


def _quoted(text: str) -> str:
    """`text` as an ordinary DOT string; Graphviz would read entities in it."""
    quoted: str = graphviz.escape(describe.printable(text).replace("&", "&amp;"))
    return quoted


def _two_lines(first: str, second: str) -> str:
    small = f'<BR/><FONT POINT-SIZE="9">{escape(second)}</FONT>' if second else ""
    return f"<<B>{escape(first)}</B>{small}>"


def _classes(kinds: Iterable[Kind]) -> str:
    return " ".join(dict.fromkeys(k.value for k in kinds))


def _attributes(of: Kind) -> dict[str, str]:
    look: Look = LOOKS[of]
    room = {"margin": "0.02,0.01"} if look.shape in _ROOMY else {}
    room |= {"width": "0.45", "margin": "0.02,0"} if look.shape == "ellipse" else {}
    return {
        "shape": look.shape, "fillcolor": look.fill, "color": look.line, "fontcolor": look.ink,
        "style": look.style, "class": of.value, **room,
    }  # fmt: skip


def _branch_look() -> dict[str, str]:
    return {
        "style": "filled,rounded", "fillcolor": BRANCH_FILL, "color": BRANCH_LINE,
        "fontcolor": "#2F5688", "fontsize": "10", "labeljust": "l", "class": "branch",
    }  # fmt: skip


def _scope_look() -> dict[str, str]:
    return {
        "style": "filled,rounded,dashed", "fillcolor": SCOPE_FILL, "color": SCOPE_LINE,
        "fontcolor": "#6A6A6A", "fontsize": "9", "labeljust": "l", "class": "scope",
    }  # fmt: skip
