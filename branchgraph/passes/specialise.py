"""Choosing the mode: declared ops become plain ops, updates are attached, exits select rows.

Batch norm takes batch statistics in training (with its running rule as updates) and running ones in
inference; dropout draws or vanishes; exits keep every row in training and select rows in inference.
Nothing else changes, so one declared graph serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.lowering import Lowering, Timing
from branchgraph.ir.ops.exit import Exit
from branchgraph.ir.rebuild import Rebuild
from branchgraph.ir.verify import declared_ops
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.lower_exits import lower_exits

#: What becomes of exits in inference: rows that left go no further, every exit sees every row, or
#: they stay declared.
Exits = Literal["select", "all", "keep"]


class _Specialise(Rebuild):
    def __init__(
        self, old: Graph, training: bool, statistics: Timing, randomness: str, keep_exits: bool
    ) -> None:
        super().__init__(old)
        self.keep_exits = keep_exits
        self.lowering = Lowering(
            self.new, training=training, statistics=statistics, randomness=randomness
        )

    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        if not node.op.declared or (self.keep_exits and isinstance(node.op, Exit)):
            return super().visit(node, inputs)
        outputs = node.op.lower(inputs, self.lowering)
        made = outputs[0].producer
        if made is not None and not made.name and outputs[0] not in inputs:
            made.name = node.name
        return outputs

    def finish(self) -> None:
        super().finish()
        for state, value in self.lowering.finish().items():
            self.new.update(state, value)


def specialise(
    graph: Graph,
    *,
    training: bool,
    statistics: Timing = "forward",
    randomness: Literal["counter", "host"] = "counter",
    exits: Exits = "select",
) -> Graph:
    """A copy of `graph` in training or inference form.

    `statistics` says when running statistics move (see `ir.lowering.Timing`); `randomness="host"`
    turns each random stream into the input `random.<stream>`. In inference `exits="select"` lowers
    exits to outputs `logits` and `exit` with only surviving rows computed further; `exits="all"`
    computes every exit for every row, and `exits="keep"` leaves exits declared for later.
    """
    if not training and exits == "select":
        graph = lower_exits(graph)
    keep = exits == "keep" and not training
    return _Specialise(graph, training, statistics, randomness, keep).run()


@dataclass(frozen=True)
class Specialise(Pass, spelling="specialise", claim="different"):
    """Choose training or inference, as a step before passes that need plain ops.

    In inference exits stay declared (`keep`), so that the network can still leave early; `all`
    and `select` lower them as `specialise` does.
    """

    training: bool = False
    exits: str = "keep"

    def check(self) -> None:
        if self.exits not in get_args(Exits):
            known = ", ".join(get_args(Exits))
            raise GraphError(f"specialise: exits {self.exits!r} is none of {known}")

    def _rewritten(self, graph: Graph, report: Report, record: bool = False) -> Graph:
        kept = Exit if self.exits == "keep" and not self.training else ()
        for node in declared_ops(graph):
            if not isinstance(node.op, kept):
                report.matched(node)
        return specialise(graph, training=self.training, exits=cast(Exits, self.exits))
