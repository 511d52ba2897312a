"""Calculations traced once on a scratch graph and replayed as calls.

The backward rule of an op, the update of a parameter and a hook are written as nodes over values.
For given types they always emit the same nodes, so they are traced once and then replayed on
tensors, which costs no more than recording the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from branchgraph.chainer.recorder import Call, Tensor, recorder
from branchgraph.compiler.pipeline import CLEANING
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.op import Op
from branchgraph.ir.types import TensorType


@dataclass(frozen=True)
class Template:
    """Steps over numbered values, the operands first, and the numbers of the results."""

    steps: tuple[tuple[Op, tuple[int, ...], tuple[int, ...]], ...]
    results: tuple[int | None, ...]

    @staticmethod
    def of(graph: Graph, results: Sequence[Value | None]) -> Template:
        """The template of a scratch graph whose inputs are the operands."""
        for i, value in enumerate(results):
            if value is not None:
                graph.output(f"r{i}", value)
        cleaned = CLEANING.apply(graph)
        numbers = {v: i for i, v in enumerate(cleaned.inputs.values())}
        steps = []
        for node in cleaned.nodes:
            read = tuple(numbers[v] for v in node.inputs)
            for value in node.outputs:
                numbers[value] = len(numbers)
            steps.append((node.op, read, tuple(numbers[v] for v in node.outputs)))
        found = (
            None if v is None else numbers[cleaned.outputs[f"r{i}"]] for i, v in enumerate(results)
        )
        return Template(tuple(steps), tuple(found))

    def replay(self, operands: Iterable[Tensor | None], traced: bool) -> list[Tensor | None]:
        """Record the steps on tensors; the results. An operand nothing reads may be None."""
        values = dict(enumerate(operands))
        call = recorder().call
        for op, inputs, outputs in self.steps:
            made = call(op, *[values[n] for n in inputs], traced=traced)  # type: ignore[misc]
            values.update(zip(outputs, made))
        return [None if n is None else values[n] for n in self.results]

    def reads(self, numbers: set[int]) -> bool:
        """Whether a step reads one of these operands."""
        return any(n in numbers for _, inputs, _ in self.steps for n in inputs)


def scratch(prefix: str, graph: Graph, types: Iterable[TensorType]) -> tuple[Value, ...]:
    """Inputs of a scratch graph."""
    return tuple(graph.input(f"{prefix}{i}", t.shape, t.dtype) for i, t in enumerate(types))


# -- calculations on tensors -----------------------------------------------------------------------

_CALCULATIONS: dict[tuple[Any, ...], Template] = {}


def replay(
    key: tuple[Any, ...], build: Callable[..., tuple[Value, ...]], *operands: Tensor
) -> tuple[Tensor, ...]:
    """Record what `build` emits for values of the operands' types; it is called once per key."""
    types = tuple([t.type for t in operands])
    template = _CALCULATIONS.get((key, types))
    if template is None:
        graph = Graph("calculation")
        template = Template.of(graph, build(*scratch("x", graph, types)))
        _CALCULATIONS[key, types] = template
    return tuple(template.replay(operands, traced=False))  # type: ignore[arg-type]


# -- gradients of ops ------------------------------------------------------------------------------

_RULES: dict[tuple[Any, ...], Template] = {}


def gradients(
    call: Call, cotangents: Sequence[Tensor | None], wanted: tuple[bool, ...], traced: bool
) -> list[Tensor | None]:
    """Record the backward rule of a call; one cotangent an input, None where nothing flows."""
    assert call.op is not None
    types = tuple([t.type for t in call.inputs])
    given = tuple([c is not None for c in cotangents])
    key = (call.op, types, given, wanted)
    template = _RULES.get(key)
    if template is None:
        template = _RULES[key] = _rule(call.op, types, given, wanted)
    outputs: Sequence[Tensor | None] = [reference() for reference in call.outputs]
    lost = {len(types) + i for i, t in enumerate(outputs) if t is None}
    if lost and template.reads(lost):
        # Nobody held an output that the rule reads, such as a batch statistic: it is computed
        # again, which common subexpressions undo while the call itself is still pending.
        outputs = recorder().call(call.op, *call.inputs, traced=traced)
    flowing = (c for c in cotangents if c is not None)
    return template.replay((*call.inputs, *outputs, *flowing), traced)


def _rule(
    op: Op, types: tuple[TensorType, ...], given: tuple[bool, ...], wanted: tuple[bool, ...]
) -> Template:
    """The rule of an op over its inputs, its outputs, and the cotangents that are given."""
    graph = Graph("rule")
    output_types = op.infer(*types)
    node = Node(graph, op, scratch("x", graph, types), "", ())
    node.outputs = scratch("y", graph, output_types)
    flowing = iter(scratch("dy", graph, (t for t, g in zip(output_types, given) if g)))
    found = op.gradient(node, tuple([next(flowing) if g else None for g in given]), wanted)
    return Template.of(graph, [v if w else None for v, w in zip(found, wanted)])
