"""Where gates are made, and which multiplications are gates.

A gate is a `select`, or a multiplication by what a sigmoid or softmax makes, handed on in whatever
form: squeeze and excitation, attention, mixtures of branches. Swish, x sigmoid(x), is none.
"""

from __future__ import annotations

from collections.abc import Iterable

from branchgraph.ir.graph import Node, Value
from branchgraph.ir.ops.gate import Select

#: Ops that give a gate another form: their first operand.
FORMING = frozenset(
    {"reshape", "broadcast_to", "slice", "split", "cast", "transpose", "identity"}
)  # fmt: skip
#: Ops that hand a gate on, changed in gradient or by a decision: the operand they take it from.
_HANDED_ON = {**dict.fromkeys(FORMING, 0), "straight_through": 0, "scale_gradient": 0, "exit": 0}
_MAKERS = frozenset({"sigmoid", "softmax"})


def source(value: Value) -> Value:
    """Where a gate is made, behind slices and changes of shape."""
    while value.producer is not None and value.producer.op.opcode in _HANDED_ON:
        value = value.producer.inputs[_HANDED_ON[value.producer.op.opcode]]
    return value


def gate_of(node: Node) -> Value | None:
    """The operand by which `node` gates the other one, if it is a gate."""
    if isinstance(node.op, Select):
        return node.inputs[1]
    if node.op.opcode != "multiply":
        return None
    for value, other in (node.inputs[::-1], node.inputs):
        maker = source(value).producer
        if maker and maker.op.opcode in _MAKERS and maker.inputs[0] is not other:
            return value
    return None


def forming(nodes: Iterable[Node], roots: set[Value]) -> set[Node]:
    """Of `nodes` in topological order, those that only give gates another form."""
    found: set[Node] = set()
    ordered = list(nodes)
    known = set(ordered)
    for node in reversed(ordered):
        if node.op.opcode not in FORMING or not roots.isdisjoint(node.outputs):
            continue
        readers = [(v, n) for v in node.outputs for n in v.users if n in known]
        if readers and all(n in found or gate_of(n) is v for v, n in readers):
            found.add(node)
    return found
