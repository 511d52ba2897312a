"""Exits as row selection: after each exit only the rows that stay are computed further.

Node v belongs to segment k when exit k is the first exit that needs it. For exits e_1 ... e_K in
topological order, with rows R_1 = all and R_{k+1} = the rows of R_k that stay at exit k:

    logits_k  computed on R_k
    stay_k    = not leaves(logits_k, T_k)                               bool over R_k
    L_k       = values of segments <= k that segments > k read          the live set of the cut
    compact(stay_k, L_k)                                                the live set on R_{k+1}
    result_K  = logits_K,   result_k = scatter(stay_k, result_{k+1}, base=logits_k)

so results come back in the order of the input. Everything after the first cut must be row-wise.
When a concat and its operands are both live, the concat is compacted and the operands are sliced
from it, which moves fewer bytes.

Only a compaction gives R_{k+1} its size. Where L_k is empty, because what is behind exit k does not
depend on the input (a gate hid all of it), the constants there that have a row for every sample are
made before the cut, and so are its live set.
"""

from __future__ import annotations

from branchgraph.ir.dims import Dim, DimLike
from branchgraph.ir.errors import RefusalError
from branchgraph.ir.graph import Graph, Node, Scope, Value, at, scope
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import LogicalNot
from branchgraph.ir.ops.exit import Exit, leaves
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.ops.rows import Compact, Scatter
from branchgraph.ir.rebuild import clone
from branchgraph.ir.types import DType
from branchgraph.passes.clean import nodes_below

#: Where results are put back in the order of the input.
GATHER = Scope("gather")


def exits_of(graph: Graph) -> list[Node]:
    """The exits of a declared graph in order; the one without a threshold comes last."""
    found = [n for n in graph.nodes if isinstance(n.op, Exit)]
    return sorted(found, key=lambda n: len(n.inputs) == 1)


def lower_exits(graph: Graph) -> Graph:
    """A graph with outputs `logits` [N, classes] and `exit` [N] (i64, counted from 0).

    A graph without early exits comes back with its exits' values as they are. Raises `RefusalError`
    when exits are not in one line with the last one at its end, other outputs are asked for, or an
    op after a cut mixes rows.
    """
    found = exits_of(graph)
    if not any(len(n.inputs) > 1 for n in found):
        return clone(graph)
    return _Lower(graph, found).run()


class _Lower:
    def __init__(self, old: Graph, exits: list[Node]) -> None:
        self.old = old
        self.exits = exits
        self.new = Graph(old.name)
        self.batch: DimLike = exits[0].output.shape[0]
        self._check()
        self.segment = self._segments()
        self._fill_empty_cuts()
        self.current: dict[Value, Value] = {}
        self.rows: DimLike = self.batch

    # -- conditions ----------------------------------------------------------------------------

    def _check(self) -> None:
        if not isinstance(self.batch, Dim) or len(self.batch.terms) != 1:
            raise RefusalError(
                f"exits select rows, so the batch of {self.exits[0].path} must be a symbol "
                f"such as N, got {self.batch}"
            )
        marked = {n.output for n in self.exits}
        for name, value in self.old.outputs.items():
            if value not in marked:
                raise RefusalError(
                    f"output {name!r} needs every row, which early exits do not compute; drop it "
                    "or use specialise(..., exits='all')"
                )
        last = [n for n in self.exits if len(n.inputs) == 1]
        if last != self.exits[-1:]:
            raise RefusalError(
                "exactly the last exit has no threshold, got these without one: "
                + (", ".join(n.path for n in last) or "none")
            )
        for node in self.exits[:-1]:
            if self.exits[-1] in nodes_below([node]):
                raise RefusalError(
                    f"{node.path} stands behind the last exit, which leaves no samples to it; "
                    "move_exit or remove_exits first"
                )

    def _segments(self) -> dict[Node, int]:
        """The first exit that needs each node; nodes no exit needs are left out."""
        segment: dict[Node, int] = {}
        for k, way_out in enumerate(self.exits):
            pending = [way_out]
            while pending:
                node = pending.pop()
                if node not in segment:
                    segment[node] = k
                    pending += (v.producer for v in node.inputs if v.producer)
        return segment

    def _fill_empty_cuts(self) -> None:
        """Move constants with rows before a cut that nothing else with rows crosses."""
        for k in range(len(self.exits) - 1):
            later = [n for n in self.old.nodes if self.segment.get(n, -1) > k]
            read = [v for n in later for v in n.inputs if self._carries(v)]
            if any(v.producer is None or self.segment[v.producer] <= k for v in read):
                continue
            for node in later:
                if not any(map(self._carries, node.inputs)):
                    self._move_before(k, [v for v in node.outputs if self._carries(v)])

    def _move_before(self, k: int, values: list[Value]) -> None:
        """Let segment k make `values`, with all that they are computed from."""
        for node in nodes_below(v.producer for v in values if v.producer):
            self.segment[node] = min(self.segment[node], k)

    def _carries(self, value: Value) -> bool:
        """Whether `value` has a row for every sample."""
        return bool(value.shape) and value.shape[0] == self.batch

    # -- emission ------------------------------------------------------------------------------

    def run(self) -> Graph:
        for value in self.old.inputs.values():
            self.current[value] = self.new.input(
                value.name, value.shape, value.dtype, value.default
            )
        for state, value in self.old.reads.items():
            self.current[value] = self.new.read(state)
        cuts: list[tuple[Value, Value]] = []
        for k, way_out in enumerate(self.exits):
            for node in self.old.nodes:
                if self.segment.get(node) == k and node is not way_out:
                    self._emit(node, k)
            logits = self.current[way_out.inputs[0]]
            self.current[way_out.output] = logits
            if k < len(self.exits) - 1:
                cuts.append((logits, self._cut(way_out, k)))
        self._gather(cuts, self.current[self.exits[-1].output])
        return self.new

    def _emit(self, node: Node, k: int) -> None:
        if k > 0:
            self._check_row_wise(node)
        inputs = tuple(self.current[v] for v in node.inputs)
        op = node.op.bind(self._renaming()) if k > 0 else node.op
        with at(node.scope):
            outputs = self.new.apply(op, *inputs, name=node.name)
        self.current.update(zip(node.outputs, outputs))

    def _renaming(self) -> dict[str, DimLike]:
        assert isinstance(self.batch, Dim)
        return {self.batch.terms[0][0]: self.rows}

    def _check_row_wise(self, node: Node) -> None:
        carries = tuple(self._carries(v) for v in node.inputs)
        if not any(carries):
            return
        if not node.op.row_wise(tuple(v.type for v in node.inputs), carries):
            raise RefusalError(
                f"{node} mixes rows of the batch after an exit, where some have left"
            )

    def _cut(self, way_out: Node, k: int) -> Value:
        """Compact the live set after exit k and return the mask of the rows that stay."""
        assert isinstance(way_out.op, Exit)
        logits, threshold, *previous = (self.current[v] for v in way_out.inputs)
        with at(way_out.scope), scope(way_out.op.name):
            left = leaves(way_out.op.criterion, logits, threshold, tuple(previous))
            stay = self.new.emit(LogicalNot(), left, name="stay")
            live = self._live(k)
            self.rows = Dim.symbol(self._fresh(f"rows_{k + 1}"))
            whole = [v for v in live if v not in _sliced(live)]
            kept = self.new.apply(
                Compact(count=self.rows), stay, *(self.current[v] for v in whole), name="compact"
            )
            self.current.update(zip(whole, kept))
            for value, (concat, start) in _sliced(live).items():
                self._slice(value, concat, start)
        return stay

    def _slice(self, value: Value, concat: Node, start: int) -> None:
        """A live operand of a live concat, read from the compacted concat."""
        assert isinstance(concat.op, Concat)
        size = value.shape[concat.op.axis]
        assert isinstance(size, int)
        cut = Slice(axis=concat.op.axis, start=start, size=size)
        self.current[value] = self.new.emit(cut, self.current[concat.output])

    def _live(self, k: int) -> list[Value]:
        """Row-carrying values known by now that later segments read."""
        return [
            v
            for v in self.current
            if self._carries(v) and any(self.segment.get(user, -1) > k for user in v.users)
        ]

    def _fresh(self, wanted: str) -> str:
        taken = {
            s
            for v in self.old.inputs.values()
            for d in v.shape
            if isinstance(d, Dim)
            for s in d.symbols
        }
        while wanted in taken:
            wanted += "_"
        return wanted

    def _gather(self, cuts: list[tuple[Value, Value]], logits: Value) -> None:
        """Results of all exits in the order of the input."""
        taken = self._exit_number(logits, len(cuts))
        with at((GATHER,)):
            for k, (base, stay) in reversed(list(enumerate(cuts))):
                logits = self.new.emit(Scatter(), stay, logits, base)
                taken = self.new.emit(Scatter(), stay, taken, self._exit_number(base, k))
        self.new.output("logits", logits)
        self.new.output("exit", taken)

    def _exit_number(self, like: Value, k: int) -> Value:
        return self.new.emit(Full(value=float(k), shape=like.shape[:1], dtype=DType.I64))


def _sliced(live: list[Value]) -> dict[Value, tuple[Node, int]]:
    """Live values that are operands of a live concat: the concat and their offset in it."""
    found: dict[Value, tuple[Node, int]] = {}
    for value in live:
        node = value.producer
        if node is None or not isinstance(node.op, Concat):
            continue
        start = 0
        for operand in node.inputs:
            size = operand.shape[node.op.axis]
            if not isinstance(size, int):
                break
            if operand in live and operand not in found and operand is not value:
                found[operand] = (node, start)
            start += size
    return found
