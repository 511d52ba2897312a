"""DOT source of a graph, for Graphviz.

Data flows from top to bottom. A declared branch is a tinted cluster with its name, a plain scope a
pale one or, around a single box, a prefix of the name in it. The steps of a layer (convolution,
batch norm, ReLU, pooling) share a box, a row each; merges, gates, exits, losses, inputs and outputs
have shapes of their own (`show.style`). Equal blocks in a row and equal branches are drawn once, in
a cluster with a thick line that says how often (`show.repeats`). The same graph always gives the
same text.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Iterator

import graphviz

from branchgraph.ir.graph import Graph, Location, Node, Value, shared_scope
from branchgraph.ir.text import Labels, format_node
from branchgraph.show import describe
from branchgraph.show.picture import Picture
from branchgraph.show.style import (
    BRANCH_FILL,
    BRANCH_LINE,
    LOOKS,
    REPEAT_LINE,
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
#: Ranks across clusters, so that branches of one fork start side by side. With more edges than
#: `FEW` that takes seconds, and soon minutes.
FEW = 150
_SMALL = {"newrank": "true"}
#: Shapes whose outline leaves room enough: the label needs no margin of its own.
_ROOMY = frozenset({"diamond", "invtrapezium", "hexagon", "octagon", "doubleoctagon"})
#: Graphviz's shapes in words, where its own are none.
_SHAPES = {"invtrapezium": "trapezium", "doubleoctagon": "double octagon"}
#: Kinds in a row of the legend, which stands beside the input and is to be low.
_ACROSS = 4
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
    collapse: bool = True,
) -> str:
    """DOT source of `graph`.

    `shapes` writes shapes at the edges (unless there are hundreds of boxes); `states` draws states,
    0-d inputs and parameter expressions, which are otherwise folded into labels; `updates` draws
    gradients, updates and what leads to nothing else; `stack` draws the steps of a layer in one
    box; `legend` explains the kinds of nodes; `collapse` draws equal blocks and branches once
    (never together with `updates`, which read inside them).
    """
    picture = Picture(graph, states=states, updates=updates, collapse=collapse)
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
        few = sum(len(picture.operands(s[0])) for s in self.stacks) <= FEW
        self.shapes = shapes and not large
        self.crowds = Counter(p for s in self.stacks for p in _within(picture.location(s[0])))
        self.labels = Labels(picture.graph)
        self.ids: dict[Node | Value, str] = {}
        self.clusters = 0
        self.dot = graphviz.Digraph(
            graphviz.escape(describe.clean(picture.graph.name)),
            graph_attr={
                **_GRAPH,
                **(_LARGE if large else _SMALL if few else {}),
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
        self._cluster(self.dot, (), self._placed())
        self._outputs()
        self._edges()
        if self.legend and self.stacks:
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

    def _placed(self) -> dict[Location, list[Location | list[Node]]]:
        """What stands at each location: inner locations and boxes, in order of first use."""
        placed: dict[Location, list[Location | list[Node]]] = {(): []}
        for stack in self.stacks:
            scope = self._place(stack)
            for depth in range(len(scope)):
                if scope[: depth + 1] not in placed:
                    placed[scope[: depth + 1]] = []
                    placed[scope[:depth]].append(scope[: depth + 1])
            placed[scope].append(stack)
        return placed

    def _place(self, stack: list[Node]) -> Location:
        """The innermost cluster around a box. A plain scope of one box needs none."""
        place = self.picture.location(stack[0])
        while place and self.crowds[place] == 1:
            if place[-1].branch or self.picture.repeated(place):
                break
            place = place[:-1]
        return place

    def _name(self, stack: list[Node]) -> str:
        """The name of a box, after the scopes around it that have no cluster: `stem/conv`."""
        alone = self.picture.location(stack[0])[len(self._place(stack)) :]
        return describe.clean("/".join([*(s.name for s in alone), describe.title(stack[0])]))

    def _cluster(
        self,
        into: graphviz.Digraph,
        at: Location,
        placed: dict[Location, list[Location | list[Node]]],
    ) -> None:
        for box in (b for b in placed[at] if isinstance(b, list)):
            self._box(into, box)
        for location in (b for b in placed[at] if isinstance(b, tuple)):
            self.clusters += 1
            with into.subgraph(name=f"cluster_{self.clusters}") as cluster:
                cluster.attr(**(_branch_look() if location[-1].branch else _scope_look()))
                if self.picture.repeated(location):
                    cluster.attr(penwidth="2.2", color=REPEAT_LINE, style="filled,rounded")
                cluster.attr(label=f"<<B>{escape(self.picture.label(location))}</B>>")
                self._cluster(cluster, location, placed)

    # -- nodes ---------------------------------------------------------------------------------

    def _leaf(self, id: str, value: Value) -> None:
        self.ids[value] = id
        look = Kind.STATE if value.state else Kind.INPUT
        second = value.state.role.value if value.state else ""
        if value.default is not None:
            second = f"= {describe.number(value.default)}"
        self._shape(self.dot, id, look, _lines(describe.clean(value.name), second), value.label)

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
            name = self._name(stack) if node is stack[0] else describe.title(node)
            cell, length = self._cell(node, name)
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

    def _cell(self, node: Node, name: str) -> tuple[str, int]:
        """The cells of one step, and how many characters it takes."""
        words = [name, self.picture.subtitle(node)]
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
        title = ", ".join([self._name(stack), *map(describe.title, then)])
        about = self.picture.subtitle(node)
        if kind(node) is Kind.GATE:  # a diamond is as wide as its label twice
            return _lines(title, *filter(None, about.partition(" by ")[::2]))
        return _lines(title, ", ".join(filter(None, [about, self.picture.parameters(node)])))

    def _shape(self, into: graphviz.Digraph, id: str, of: Kind, label: str, tooltip: str) -> None:
        into.node(id, label, tooltip=_quoted(tooltip), **_attributes(of))

    def _outputs(self) -> None:
        for i, (name, value) in enumerate(self.picture.outputs):
            self._sink(f"o{i}", Kind.OUTPUT, _lines(describe.clean(name), ""), value)
        for i, (word, state, value) in enumerate(self.picture.commits):
            label = _lines(describe.clean(state.name), word)
            self._sink(f"u{i}", Kind.UPDATE, label, value)

    def _sink(self, id: str, of: Kind, label: str, value: Value) -> None:
        self._shape(self.dot, id, of, label, value.label)
        if self.picture.draws(value):
            self._edge(value, id)

    # -- edges ---------------------------------------------------------------------------------

    def _edges(self) -> None:
        for stack in self.stacks:
            inside = self.picture.location(stack[0])
            for value in self.picture.operands(stack[0]):
                producer = value.producer
                before = self.picture.location(producer) if producer else ()
                self._edge(value, self.ids[stack[0]], _enters(inside, before))

    def _edge(self, value: Value, head: str, forks: bool = False) -> None:
        """An edge; those that enter a branch are kept short and straight."""
        tail = self.ids[value.producer or value]
        label = f" {describe.shape(value.type)} " if self.shapes else ""
        self.dot.edge(tail, head, _quoted(label), **({"weight": "3"} if forks else {}))

    # -- legend --------------------------------------------------------------------------------

    def _legend(self) -> None:
        """The kinds that occur, in one table, so that the ranks of the data do not pull at it."""
        swatches = [_swatch(k) for k in self.picture.kinds()]
        some = range(0, len(swatches), _ACROSS)
        rows = "".join(f"<TR>{''.join(swatches[i : i + _ACROSS])}</TR>" for i in some)
        self.dot.node(
            "legend",
            f'<<TABLE BORDER="1" COLOR="#C4C4C4" STYLE="rounded" CELLBORDER="1" CELLSPACING="3" '
            f'CELLPADDING="3">{rows}</TABLE>>',
            shape="plain",
            fontsize="8",
        )


def _swatch(of: Kind) -> str:
    """A cell of the legend: the words of a kind in its colours, and the shape that is not a box."""
    look = LOOKS[of]
    shape = "" if look.shape == "box" else f" ({_SHAPES.get(look.shape, look.shape)})"
    return (
        f'<TD BGCOLOR="{look.fill}" COLOR="{look.line}"><FONT COLOR="{look.ink}">'
        f"{escape(look.words + shape)}</FONT></TD>"
    )


def _enters(inside: Location, before: Location) -> bool:
    """Whether data that comes from `before` enters a branch on its way to `inside`."""
    return any(s.branch for s in inside[len(shared_scope(inside, before)) :])


def _table(rows: str) -> str:
    """Rows of a table without borders, spacing or padding."""
    return f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0">{rows}</TABLE>'


def _quoted(text: str) -> str:
    """`text` as an ordinary DOT string; Graphviz would read entities in it."""
    quoted: str = graphviz.escape(describe.printable(text).replace("&", "&amp;"))
    return quoted


def _lines(first: str, *then: str) -> str:
    small = (f'<BR/><FONT POINT-SIZE="9">{escape(line)}</FONT>' for line in then if line)
    return f"<<B>{escape(first)}</B>{''.join(small)}>"


def _within(place: Location) -> Iterator[Location]:
    """`place` and all that it is inside of."""
    return (place[:depth] for depth in range(1, len(place) + 1))


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
        "fontcolor": "#2F5688", "fontsize": "10", "labeljust": "l", "penwidth": "1",
        "class": "branch",
    }  # fmt: skip


def _scope_look() -> dict[str, str]:
    return {
        "style": "filled,rounded,dashed", "fillcolor": SCOPE_FILL, "color": SCOPE_LINE,
        "fontcolor": "#6A6A6A", "fontsize": "9", "labeljust": "l", "penwidth": "1",
        "class": "scope",
    }  # fmt: skip
