"""The joint loss of a network with exits.

    loss = sum_i w_i mean_n CE(logits_i[n], labels[n])          (BranchyNet, section 3.2)

The weights w_i are 0-d inputs `<exit>.weight` with default 1, so that a schedule of weights needs
no second compilation; a graph that declares such an input (`insert_exits:weights=...`) keeps its
default. Gradients of the trunk are the sum over exits.
"""

from __future__ import annotations

from branchgraph.ir.builder import cross_entropy
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, scope
from branchgraph.ir.ops.elementwise import cast, compare
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.ops.reduce import ArgMax, ReduceMean
from branchgraph.ir.rebuild import clone
from branchgraph.ir.types import DType

LABELS = "labels"


def joint_loss(graph: Graph) -> Graph:
    """A copy of a training graph whose outputs are `loss` and, for each exit, loss and accuracy.

    Every output of `graph` must be logits [N, classes]; they become `<name>.loss` and
    `<name>.accuracy`, both single numbers, and the input `labels` (i64[N]) is added.
    """
    new = clone(graph)
    logits = dict(new.outputs)
    if not logits:
        raise GraphError(f"{graph.name} has no outputs to take a loss of")
    new.keep(output=lambda name: False)
    batch = next(iter(logits.values())).shape[:1]
    labels = new.input(LABELS, batch, DType.I64)
    terms: list[Value] = []
    for name, value in logits.items():
        with scope("loss"):
            loss = cross_entropy(value, labels, name=f"{name}.loss")
            weight = _weight(new, name)
            terms.append(loss * cast(weight, loss.dtype))
            new.output(f"{name}.loss", loss)
            new.output(f"{name}.accuracy", _accuracy(value, labels))
    with scope("loss"):
        total = terms[0] if len(terms) == 1 else new.emit(Sum(), *terms, name="total")
    new.output("loss", total)
    return new


def _weight(graph: Graph, name: str) -> Value:
    """The weight of an exit: the input the graph declares, or a new one."""
    declared = graph.inputs.get(f"{name}.weight")
    if declared is None:
        return graph.input(f"{name}.weight", (), DType.F64, default=1.0)
    if declared.shape or not declared.dtype.is_float:
        raise GraphError(f"the input {name}.weight must be one number, it is {declared.type}")
    return declared


def _accuracy(logits: Value, labels: Value) -> Value:
    """Mean of arg max equality."""
    graph = logits.graph
    right = compare("equal", graph.emit(ArgMax(axis=1), logits), labels)
    return graph.emit(ReduceMean(axes=(0,)), cast(right, DType.F64))
