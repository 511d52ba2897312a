"""A graph written as a function in a peer's own words.

A peer's table maps opcodes to functions that take a `Call` and return an expression of the peer's
library over the texts of the operands. `write` strings the statements together as a person would:
one a line, a name used again once its value is dead, so that the peer frees memory as it does for
code written by hand. Parameters are `p[i]`, inputs arguments, 0-d constants Python numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from branchgraph.ir.dims import Shape
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.op import Op
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.loss import CrossEntropy
from branchgraph.ir.ops.reduce import ReduceMean
from branchgraph.ir.state import State


class NotExpressible(Exception):
    """A peer has no words for something; says the op and the peer."""


@dataclass(frozen=True)
class Step:
    """One call to write: usually a node, sometimes a pair that libraries have one function for."""

    opcode: str
    op: Op
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass
class Call:
    """What a table's function is given: the step and the texts of its operands."""

    step: Step
    args: list[str]
    #: Position in `p` of each operand that is a state, else -1.
    positions: list[int]
    #: Names for the outputs, for a function that writes its statement by itself.
    targets: list[str] = field(default_factory=list)

    @property
    def op(self) -> Op:
        return self.step.op

    def shape(self, operand: int = 0) -> Shape:
        return self.step.inputs[operand].shape

    @property
    def out_shape(self) -> Shape:
        return self.step.outputs[0].shape

    def has(self, operand: int) -> bool:
        return len(self.args) > operand

    def is_number(self, operand: int) -> bool:
        """Whether the operand is a 0-d constant."""
        try:
            float(self.args[operand])
        except ValueError:
            return False
        return True

    def arg(self, operand: int, otherwise: str = "None") -> str:
        """The text of an operand that may be missing."""
        return self.args[operand] if self.has(operand) else otherwise


#: Opcode to the function that writes it.
Table = Mapping[str, Callable[[Call], "str | Statement"]]


@dataclass(frozen=True)
class Statement:
    """A whole line, from a function that assigns more than the outputs."""

    text: str


def steps(graph: Graph) -> list[Step]:
    """The calls of a graph in order; the mean of a cross-entropy is one of them."""
    found = []
    merged = set()
    for node in graph.nodes:
        if node in merged or _number(node) is not None:
            continue
        mean = _mean_of(node)
        if mean is None:
            found.append(Step(node.op.opcode, node.op, node.inputs, node.outputs))
        else:
            merged.add(mean)
            found.append(Step("mean_cross_entropy", node.op, node.inputs, mean.outputs))
    return found


def _mean_of(node: Node) -> Node | None:
    """The mean that is the only reader of a cross-entropy [N]."""
    plain = isinstance(node.op, CrossEntropy) and node.op.ignore_label is None
    users = node.output.users if plain else []
    if len(users) == 1 and isinstance(users[0].op, ReduceMean) and users[0].op.axes == (0,):
        return users[0]
    return None


def _number(node: Node) -> str | None:
    """The Python number a 0-d constant is written as."""
    if isinstance(node.op, Full) and node.op.shape == ():
        return repr(float(node.op.value))
    return None


def numbers(graph: Graph) -> dict[Value, str]:
    """0-d constants as Python numbers."""
    return {n.output: t for n in graph.nodes if (t := _number(n)) is not None}


def function_of(table: Table, step: Step, peer: str) -> Callable[[Call], str | Statement]:
    """The table's entry, or `NotExpressible` naming op and peer."""
    if step.opcode not in table:
        raise NotExpressible(f"not expressible in {peer}: its table has no op {step.opcode!r}")
    return table[step.opcode]


def static_only(peer: str) -> Callable[[Call], str]:
    """The entry for a score of an exit in a peer whose compiled functions have static shapes."""

    def refuse(c: Call) -> str:
        raise NotExpressible(
            f"not expressible in {peer}: rows behind an exit, whose number is data"
        )

    return refuse


class _Names:
    """Names of living values; those of dead ones are handed out again."""

    def __init__(self, living: Mapping[Value, str]) -> None:
        self.texts = dict(living)
        self.free: list[str] = []
        self.made = 0

    def release(self, values: Iterable[Value]) -> None:
        for value in values:
            self.free.append(self.texts.pop(value))

    def give(self, value: Value) -> str:
        if not self.free:
            self.made += 1
            self.free.append(f"h{self.made}")
        self.texts[value] = self.free.pop()
        return self.texts[value]


def write(
    graph: Graph,
    table: Table,
    peer: str,
    *,
    states: Sequence[State],
    header: str,
    arguments: str = "p",
    result: Callable[[list[str]], str] = ", ".join,
) -> str:
    """Source of a module with `forward(arguments, inputs...)`, which returns the outputs.

    `states` orders `p`. Raises `NotExpressible` for an op that the table lacks.
    """
    position = {state: i for i, state in enumerate(states)}
    fed = list(graph.inputs.values())
    known = {**numbers(graph), **{v: v.name for v in fed}}
    known |= {v: f"p[{position[s]}]" for s, v in graph.reads.items() if s in position}
    listed = steps(graph)
    last = _last_uses(graph, listed)
    names = _Names(known)
    lines = []
    for i, step in enumerate(listed):
        args = [names.texts[v] for v in step.inputs]
        positions = [-1 if v.state is None else position[v.state] for v in step.inputs]
        names.release(v for v in last[i] if v not in known)
        targets = [names.give(v) for v in step.outputs]
        text = function_of(table, step, peer)(Call(step, args, positions, targets))
        lines.extend(_assigned(targets, text))
        dead = [v for v in step.outputs if not _is_read(v, graph)]
        names.release(dead)
        lines.extend(f"del {name}" for name in names.free)
        names.free.clear()
    lines.append(f"return {result([names.texts[v] for v in graph.outputs.values()])}")
    signature = ", ".join([arguments, *(v.name for v in fed)])
    body = "\n".join(f"    {line}" for line in lines)
    return f"{header}\n\n\ndef forward({signature}):\n{body}\n"


def _assigned(targets: list[str], text: str | Statement) -> list[str]:
    if isinstance(text, Statement):
        return [text.text]
    left = ", ".join(targets)
    return [] if left == text else [f"{left} = {text}"]


def _is_read(value: Value, graph: Graph) -> bool:
    return bool(value.users) or value in graph.roots


def _last_uses(graph: Graph, listed: Sequence[Step]) -> list[list[Value]]:
    """For each step, the values that nothing reads after it."""
    last: dict[Value, int] = {}
    for i, step in enumerate(listed):
        last |= dict.fromkeys(step.inputs, i)
    for value in graph.roots:
        last.pop(value, None)
    found: list[list[Value]] = [[] for _ in listed]
    for value, i in last.items():
        found[i].append(value)
    return found
