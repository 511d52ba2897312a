"""Gates in words: what opens a gate, read from the part of the graph that makes it.

    = 0, = 1, = 0.5      a constant
    2 of 8               the K largest of N, drawn or not
    > 0.5                1 where a score exceeds a level
    hard concrete, sigmoid, softmax, Gumbel    the kinds of `ir.gates`

followed by the scores or inputs that steer it (`by mask.score`).
"""

from __future__ import annotations

from collections.abc import Callable

from branchgraph.ir.graph import Graph, Location, Node, Value
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.ops.reduce import TopK
from branchgraph.ir.state import Role
from branchgraph.show import describe
from branchgraph.show.weighing import source

#: Names of more states than that would not fit a label.
_MOST_NAMES = 2
_STEERING = frozenset({Role.GATE, Role.CONSTANT, Role.PARAMETER})


def expressions(graph: Graph, shown: list[Node], folded: set[Node]) -> set[Node]:
    """Nodes that make gates without looking at data, and serve nothing else."""
    free: set[Node] = set()
    for node in shown:
        leaves = (v.producer in free if v.producer else not _is_data(v) for v in node.inputs)
        if all(leaves):
            free.add(node)
    outputs = set(graph.outputs.values())
    drawn = set(shown)
    found: set[Node] = set()
    for node in reversed(shown):
        readers = [(v, n) for v in node.outputs for n in v.users if n in drawn]
        inner = all(n in found or n in folded or _weighs(n, v, free) for v, n in readers)
        if node in free and readers and inner and outputs.isdisjoint(node.outputs):
            found.add(node)
    return found


def _is_data(value: Value) -> bool:
    """Whether a leaf is data: an input with axes."""
    return value.is_input and value.shape != ()


def _weighs(node: Node, value: Value, free: set[Node]) -> bool:
    """Whether `node` gates or multiplies data by `value`."""
    if isinstance(node.op, Select):
        return node.inputs[0] is not value and node not in free
    return node.op.opcode == "multiply" and node not in free


def words(gate: Value, place: Location) -> str:
    """What opens a gate, as seen from `place`."""
    level = _constant(gate)
    if level is not None:
        return f"= {describe.number(level)}"
    if gate.is_input:
        default = "" if gate.default is None else f" ({describe.number(gate.default)})"
        return f"by {describe.clean(gate.name)}{default}"
    names = [_seen_from(s, place) for s in _scores(gate)]
    more = ["…"] * (len(names) > _MOST_NAMES)
    steered = "by " + ", ".join([*names[:_MOST_NAMES], *more]) if names else ""
    return " ".join(filter(None, (_kind(gate), steered)))


def _seen_from(name: str, place: Location) -> str:
    """`name` without the scopes that it shares with `place`."""
    shorter = (describe.relative(name, place[:depth]) for depth in range(len(place), 0, -1))
    whole = describe.clean(name)
    return next((s for s in shorter if s != whole), whole)


def steering(value: Value) -> str:
    """The kind of a folded gate that data is multiplied by; empty if it is none."""
    return words(value, ()) if _kind(value) or _scores(value) else ""


def _constant(value: Value) -> float | None:
    return describe.constant(source(value))


def _kind(gate: Value) -> str:
    """The kind of gate, or nothing if it is none that this module knows."""
    node = source(gate).producer
    return _KINDS[node.op.opcode](node) if node and node.op.opcode in _KINDS else ""


def _top_k(node: Node) -> str:
    assert isinstance(node.op, TopK)
    return f"{node.op.k} of {node.inputs[0].shape[node.op.axis]}"


def _by_mode(node: Node) -> str:
    training, inference = map(source, node.inputs)
    drawn = training.producer.op.opcode if training.producer else ""
    one_hot = inference.producer is not None and inference.producer.op.opcode == "top_k"
    if one_hot and (drawn == "softmax" or _of_softmax(training.producer)):
        return "Gumbel"
    return _kind(node.inputs[1])


def _of_softmax(node: Node | None) -> bool:
    above = source(node.inputs[0]).producer if node and node.inputs else None
    return above is not None and above.op.opcode == "softmax"


def _threshold(node: Node) -> str:
    level = describe.constant(node.inputs[1])
    if level is None:
        return ""
    return f"{describe.INFIX[str(node.op.attributes()['relation'])]} {describe.number(level)}"


def _clipped(node: Node) -> str:
    """A clipped value that comes from a sigmoid is a concrete gate."""
    for value in node.inputs:
        above = source(value).producer
        if above is None:
            continue
        if above.op.opcode == "sigmoid" or (above.op.opcode == "by_mode" and _kind(value)):
            return "hard concrete"
        if above.op.opcode in _STRETCHED and _clipped(above):
            return "hard concrete"
    return ""


_STRETCHED = frozenset({"where", "clip", "add", "multiply"})

_KINDS: dict[str, Callable[[Node], str]] = {
    "top_k": _top_k,
    "by_mode": _by_mode,
    "compare": _threshold,
    "where": _clipped,
    "clip": _clipped,
    "sigmoid": lambda node: "sigmoid",
    "softmax": lambda node: "softmax",
}


def _scores(gate: Value) -> list[str]:
    """Names of the states that a gate is made of, scores before parameters; none behind data."""
    found: dict[Role, list[str]] = {role: [] for role in _STEERING}
    pending = [gate]
    seen: set[Value] = set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if _is_data(value):
            return []
        if value.state is not None and value.state.role in found:
            found[value.state.role].append(value.state.name)
        if value.producer is not None:
            pending += reversed(value.producer.inputs)
    return found[Role.GATE] or found[Role.CONSTANT] or found[Role.PARAMETER]
