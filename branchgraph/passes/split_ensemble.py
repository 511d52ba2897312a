"""One network for each branch of an ensemble.

    split(graph)                       {"branch1": Graph, "branch2": Graph, ...}
    split_ensemble:branch=branch1      the one branch

A branch's outputs are those named after it (`branch1`, `branch1.features`), or its operands of the
merge that makes an output (sum, mean, concat; of a softmax, what is under it):

    y = mean(f_1(x), ..., f_B(x))      ->      logits = f_i(x)

The network of a branch computes what the branch did. It keeps the states and inputs it reads, the
shared ones too, and updates of these states. What it shared it has alone now, so that the gradient
is no longer divided by B. Nodes stand where they stood inside the branch.
"""

from __future__ import annotations

from dataclasses import dataclass

from branchgraph.ir.errors import GraphError, RefusalError
from branchgraph.ir.graph import Graph, Node, Scope, Value
from branchgraph.ir.ops.activation import Softmax
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.exit import Exit
from branchgraph.ir.ops.gate import ScaleGradient
from branchgraph.ir.ops.merge import Concat, Mean, Sum
from branchgraph.ir.state import State
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.clean import drop_inputs, keep_only, needed, nodes_below

#: Merges that make one output of an ensemble.
_MERGES = (Mean, Sum, Concat)


def branches_of(graph: Graph) -> dict[str, dict[str, Value]]:
    """Branches that make outputs of their own, each with these by name, in their order."""
    found: dict[str, dict[str, Value]] = {
        n.scope[0].name: {} for n in graph.nodes if n.scope and n.scope[0].branch
    }
    for name, value in graph.outputs.items():
        if value.producer is not None and isinstance(value.producer.op, Exit):
            continue
        first, _, rest = name.partition(".")
        if first in found:
            found[first][rest or "logits"] = value
            continue
        for branch, part in _merged(value).items():
            found[branch]["logits" if name == "probabilities" else name] = part
    return {k: v for k, v in found.items() if v}


def _merged(value: Value) -> dict[str, Value]:
    """The operand of each branch, if an output merges branches."""
    merge = value.producer
    if merge is None or not isinstance(merge.op, _MERGES) or len(merge.inputs) < 2:
        return {}
    parts: dict[str, Value] = {}
    for operand in merge.inputs:
        node = operand.producer
        if node is None or not node.scope[:1] or not node.scope[0].branch:
            return {}
        under_softmax = isinstance(node.op, Softmax) and isinstance(merge.op, Mean)
        parts[node.scope[0].name] = node.inputs[0] if under_softmax else operand
    return parts if len(parts) == len(merge.inputs) else {}


def split(graph: Graph) -> dict[str, Graph]:
    """The network of each branch, by its name."""
    return {name: SplitEnsemble(name).apply(graph) for name in _several(graph)}


def _several(graph: Graph) -> dict[str, dict[str, Value]]:
    found = branches_of(graph)
    if len(found) < 2:
        raise RefusalError(
            f"{graph.name} is no ensemble: expected branches with outputs of their own or merged "
            f"into one output, found {', '.join(found) or 'none'}"
        )
    return found


@dataclass(frozen=True)
class SplitEnsemble(Pass, spelling="split_ensemble", claim="different"):
    """Keep the branch named `branch`; its output becomes `logits`."""

    branch: str

    def rewrite(self, graph: Graph, report: Report) -> None:
        if not any(n.scope and n.scope[0].branch for n in graph.nodes):
            report.refused(self.branch, "there are no branches")
            return
        found = _several(graph)
        if self.branch not in found:
            raise GraphError(
                f"no branch {self.branch!r} makes outputs; there are: {', '.join(found)}"
            )
        if graph.gradients:
            raise RefusalError(
                "it has gradients of the whole ensemble; split before differentiating"
            )
        self._reduce(graph, found[self.branch], len(found))
        for node in graph.nodes:
            if node.scope and node.scope[0].branch and node.scope[0].name in found:
                node.scope = node.scope[1:]
        report.matched(self.branch)

    def _reduce(self, graph: Graph, outputs: dict[str, Value], branches: int) -> None:
        """Keep what the outputs need, under their new names."""
        graph.keep(output=lambda name: False)
        for name, value in outputs.items():
            graph.output(name, value)
        self._unscale(graph, branches)
        below = needed(outputs.values())
        graph.keep(update=lambda s: self._is_its_own(s, graph.updates[s], below))
        keep_only(graph, needed(graph.roots))
        used = {v for n in graph.nodes for v in n.inputs} | set(graph.roots)
        drop_inputs(graph, lambda value: value not in used)

    def _is_its_own(self, state: State, value: Value, needed: set[Node]) -> bool:
        """Whether an update is of the branch or its trunk: it reads what the outputs read.

        What needs no data (the step of random streams) is nobody's, wherever it stands.
        """
        below = nodes_below([value.producer] if value.producer else [])
        inside = Scope(self.branch, branch=True)
        fed = any(v.is_input for n in below for v in n.inputs)
        if fed and any(n.scope and n.scope[0].branch and n.scope[0] != inside for n in below):
            return False
        return not needed.isdisjoint(below) or any(
            v.state is state for n in needed for v in n.inputs
        )

    def _unscale(self, graph: Graph, branches: int) -> None:
        """Read shared states, and a common trunk, with the plain gradient."""
        for node in graph.nodes:
            if isinstance(node.op, ScaleGradient) and not (node.scope and node.scope[0].branch):
                scale = node.inputs[1].producer
                if scale and isinstance(scale.op, Full) and scale.op.value == 1.0 / branches:
                    graph.replace(node.output, node.inputs[0])
        graph.touch()
