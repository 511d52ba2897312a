"""Reverse-mode differentiation as a rewrite: backward nodes are ordinary nodes.

`vjp` computes vector-Jacobian products: for seeds y_i with cotangents v_i it adds nodes for

    dx_j = sum_i v_i^T dy_i/dx_j        for every wanted x_j

A cotangent may be any value (a seed other than 1 is how `y.grad` and weighted losses enter), and
`rules` overrides the rule of an op (guided back-propagation replaces relu's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from branchgraph.ir.errors import GradientError
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.op import Cotangents, Op, Wanted
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.rebuild import clone
from branchgraph.ir.state import State

Rule = Callable[[Node, Cotangents, Wanted], Cotangents]


def vjp(
    graph: Graph,
    seeds: Mapping[Value, Value | None],
    wrt: Iterable[Value],
    rules: Mapping[type[Op], Rule] | None = None,
) -> dict[Value, Value]:
    """Cotangents of `wrt`, added to `graph` as nodes; values nothing flows to are left out.

    A seed of None is a cotangent of ones. Raises `GradientError` when an op on the way defines no
    gradient, or is declared and has not been specialised.
    """
    return _Backward(graph, list(wrt), dict(rules or {})).run(seeds)


class _Backward:
    def __init__(self, graph: Graph, wrt: list[Value], rules: dict[type[Op], Rule]) -> None:
        self.graph = graph
        self.wrt = wrt
        self.rules = rules
        self.parts: dict[Value, list[Value]] = {}
        self.sums: dict[Value, Value] = {}

    def run(self, seeds: Mapping[Value, Value | None]) -> dict[Value, Value]:
        nodes = self.graph.nodes
        reached = self._reached_from_wrt(nodes)
        for value, seed in seeds.items():
            self.parts.setdefault(value, []).append(self._seed(value, seed))
        for node in reversed(nodes):
            if any(v in reached for v in node.outputs) and any(
                v in self.parts for v in node.outputs
            ):
                with at(node.scope):
                    self._visit(node, reached)
        return {v: self._cotangent(v) for v in self.wrt if v in self.parts}

    def _seed(self, value: Value, seed: Value | None) -> Value:
        if not value.dtype.is_float:
            raise GradientError(f"{value.label} is {value.dtype}; only floats have gradients")
        if seed is None:
            return self.graph.emit(Full(value=1.0, shape=value.shape, dtype=value.dtype))
        if seed.type != value.type:
            raise GradientError(
                f"the cotangent of {value.label} must be {value.type}, got {seed.type}"
            )
        return seed

    def _reached_from_wrt(self, nodes: list[Node]) -> set[Value]:
        """Floating values that depend on `wrt`: only they need cotangents."""
        reached = set(self.wrt)
        for node in nodes:
            if any(v in reached for v in node.inputs):
                reached.update(v for v in node.outputs if v.dtype.is_float)
        return reached

    def _visit(self, node: Node, reached: set[Value]) -> None:
        if node.op.declared:
            raise GradientError(
                f"{node} is declared for either mode; call specialise(graph, training=...) first"
            )
        cotangents = tuple(self._cotangent(v) if v in self.parts else None for v in node.outputs)
        wanted = tuple(v in reached for v in node.inputs)
        rule = self.rules.get(type(node.op))
        try:
            found = (rule or node.op.gradient)(node, cotangents, wanted)
        except GradientError as error:
            raise GradientError(f"{node}: {error}") from None
        for value, part, w in zip(node.inputs, found, wanted):
            if part is not None and w:
                self.parts.setdefault(value, []).append(part)

    def _cotangent(self, value: Value) -> Value:
        """The sum of everything that flowed to `value`."""
        if value not in self.sums:
            parts = self.parts[value]
            self.sums[value] = parts[0] if len(parts) == 1 else self.graph.emit(Sum(), *parts)
        return self.sums[value]


def differentiate(graph: Graph, loss: str = "loss", wrt: Iterable[State] | None = None) -> Graph:
    """A copy of `graph` whose `gradients` hold d loss / d state.

    `loss` names a 0-d output. `wrt` defaults to all parameters and gate scores that are read;
    states the loss does not depend on get no entry.
    """
    new = clone(graph)
    if loss not in new.outputs:
        raise GradientError(f"no output {loss!r}; there are: {', '.join(new.outputs)}")
    value = new.outputs[loss]
    if value.shape != ():
        raise GradientError(f"loss {loss!r} must be a single number, got {value.type}")
    states = [s for s in new.reads if s.role.trainable] if wrt is None else list(wrt)
    leaves = [new.read(s) for s in states]
    found = vjp(new, {value: None}, leaves)
    for state, leaf in zip(states, leaves):
        if leaf in found:
            new.set_gradient(state, found[leaf])
    return new
