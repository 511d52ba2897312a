"""A drawing of a graph for the terminal: one line a layer, blocks for scopes and branches.

    b_lenet · 74,694 parameters · 1,247,720 MACs per sample
       ○ x                                     N×1×28×28
    %0 ■ conv1 5x5, 5, pad 3                   N×5×30×30   130 params
       ┏ branch exit1
    %1 ┃ ▽ max pool 2x2/2, cover all           N×5×15×15
       ┗
    %9 ▽ max pool 2x2/2, cover all ← conv1     N×5×15×15

A line reads the line above it unless it names what it reads after `←`. Equal blocks in a row and
equal branches are drawn once: `╭ block2 … block9 ×8`. The numbers are those of the machine
form (`ir.text.format_graph`), of which this is the short version for people.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator

from branchgraph.ir.graph import Graph, Location, Node, Value
from branchgraph.ir.text import Labels
from branchgraph.show import describe
from branchgraph.show.picture import Picture
from branchgraph.show.style import LOOKS, Kind, kind

#: Narrower drawings would cut every label.
_NARROWEST = 48


def to_text(
    graph: Graph,
    width: int = 100,
    *,
    states: bool = False,
    updates: bool = False,
    collapse: bool = True,
) -> str:
    """A drawing of `graph` in lines of at most `width` columns, ending in a newline.

    `states`, `updates` and `collapse` do what they do in `to_dot`.
    """
    picture = Picture(graph, states=states, updates=updates, collapse=collapse)
    return "\n".join([*_Writer(picture, max(width, _NARROWEST)).lines(), ""])


class _Writer:
    def __init__(self, picture: Picture, width: int) -> None:
        self.picture = picture
        self.width = width
        self.labels = Labels(picture.graph).values
        self.last: Value | Node | None = None
        drawn = [v for n in picture.nodes for v in n.outputs]
        ids = [self.labels[v] for v in drawn]
        self.id_width = max(map(len, ids), default=0)
        uses = Counter(v.label for v in drawn)
        self.unique = {v for v in drawn if v.producer and v.producer.name and uses[v.label] == 1}
        shown = [*drawn, *picture.inputs]
        self.shape_width = max((_columns(describe.shape(v.type)) for v in shown), default=0)
        counts = [picture.parameters(n) for n in picture.nodes]
        self.count_width = max(map(len, counts), default=0)

    def lines(self) -> Iterator[str]:
        """Header, leaves, layers, roots and the legend."""
        head = [describe.clean(self.picture.graph.name), *self.picture.totals()]
        yield from _flow(head, " · ", self.width)
        for value in self.picture.inputs:
            yield self._leaf(value)
        self.last = self.picture.inputs[0] if len(self.picture.inputs) == 1 else None
        yield from self._layers()
        yield from self._roots()
        yield ""
        legend = [f"{LOOKS[k].symbol} {LOOKS[k].words}" for k in self.picture.kinds()]
        yield from _flow(legend, "   ", self.width)

    # -- lines ---------------------------------------------------------------------------------

    def _line(self, id: str, bars: str, label: str, shape: str = "", count: str = "") -> str:
        """One line: the label is cut where shape and count need the room."""
        start = f"{id:>{self.id_width}} {bars}"
        right = f"{shape:<{self.shape_width}}" if shape else " " * self.shape_width
        right += f"  {count:>{self.count_width}}" if self.count_width else ""
        room = max(self.width - _columns(start) - _columns(right) - 2, 8)
        label = _cut(label, room)
        return (start + label + " " * (room - _columns(label) + 2) + right).rstrip()

    def _leaf(self, value: Value) -> str:
        look = LOOKS[Kind.STATE if value.state else Kind.INPUT]
        role = f" {value.state.role.value}" if value.state else ""
        default = "" if value.default is None else f" = {describe.number(value.default)}"
        label = f"{look.symbol} {describe.clean(value.name)}{role}{default}"
        return self._line("", "", label, describe.shape(value.type))

    def _layers(self) -> Iterator[str]:
        inside: Location = ()
        for node in self.picture.nodes:
            place = self.picture.location(node)
            shared = _common(inside, place)
            yield from self._close(inside, shared)
            yield from self._open(place, shared)
            inside = place
            yield self._layer(node)
            self.last = node
        yield from self._close(inside, 0)

    def _open(self, scope: Location, depth: int) -> Iterator[str]:
        for at in range(depth, len(scope)):
            place = scope[: at + 1]
            word = "branch " if scope[at].branch else "scope "
            word = "" if self.picture.repeated(place) else word
            corner = "┏" if scope[at].branch else "╭"
            yield self._line("", _bars(scope[:at]), f"{corner} {word}{self.picture.label(place)}")

    def _close(self, scope: Location, depth: int) -> Iterator[str]:
        for at in range(len(scope) - 1, depth - 1, -1):
            corner = "┗" if scope[at].branch else "╰"
            yield self._line("", _bars(scope[:at]), corner)

    def _layer(self, node: Node) -> str:
        about = [describe.title(node), self.picture.subtitle(node), self._reads(node)]
        label = f"{LOOKS[kind(node)].symbol} " + " ".join(filter(None, about))
        shapes = describe.shape(node.outputs[0].type)
        count = self.picture.parameters(node)
        bars = _bars(self.picture.location(node))
        return self._line(self.labels[node.outputs[0]], bars, label, shapes, count)

    def _reads(self, node: Node) -> str:
        """What a node reads, unless that is the line above."""
        operands = self.picture.operands(node)
        above = [v.producer or v for v in operands] == [self.last]
        if not operands or (above and kind(node) is not Kind.MERGE):
            return ""
        return "← " + ", ".join(self._reference(v, node.scope) for v in operands)

    def _reference(self, value: Value, place: Location = ()) -> str:
        if value.producer is None or value in self.unique:
            return describe.relative(value.label, place)
        return self.labels[value]

    def _roots(self) -> Iterator[str]:
        for name, value in self.picture.outputs:
            yield self._root(Kind.OUTPUT, describe.clean(name), value)
        for word, state, value in self.picture.commits:
            yield self._root(Kind.UPDATE, f"{word} of {describe.clean(state.name)}", value)

    def _root(self, of: Kind, label: str, value: Value) -> str:
        source = (
            self._reference(value) if self.picture.draws(value) else describe.clean(value.label)
        )
        text = f"{LOOKS[of].symbol} {label} ← {source}"
        return self._line("", "", text, describe.shape(value.type))


def _bars(scope: Location) -> str:
    return "".join("┃ " if part.branch else "│ " for part in scope)


def _common(a: Location, b: Location) -> int:
    """How many leading scopes two places share."""
    pairs = enumerate(zip(a, b))
    return next((i for i, (p, q) in pairs if p != q), min(len(a), len(b)))


def _columns(text: str) -> int:
    """Width in a terminal: wide East Asian characters take two columns, combining ones none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _flow(parts: list[str], separator: str, width: int) -> Iterator[str]:
    """`parts` in lines of at most `width` columns."""
    line = ""
    for part in parts:
        longer = line + separator + part if line else part
        if line and _columns(longer) > width:
            yield line
            longer = part
        line = _cut(longer, width)
    yield line


def _cut(text: str, room: int) -> str:
    if len(text) <= room and _columns(text) <= room:
        return text
    text = text[: _most_characters(text, room)]
    while text and _columns(text) > room - 1:
        text = text[:-1]
    return text + "…"


def _most_characters(text: str, room: int) -> int:
    """How many characters of `text` could fit `room` columns: combining ones take none."""
    free = sum(unicodedata.combining(c) > 0 for c in text)
    return room + free
