"""The sequential gradient rule: B updates a step instead of one with the mean gradient.

With the losses L_1 ... L_B of the branches, theta all variables and U one update of the optimiser,

    theta_0 = theta,   theta_i = U(theta_(i-1), grad L_i(theta_(i-1))),   theta <- theta_B

so that branch i sees what the branches before it did to the shared variables (vbranch, section
2.10). Variables that L_i does not depend on, and their slots, stay in update i. The whole is one
graph: the passes over the branches stand one after another, each reading the values that the one
before it leaves.
"""

from __future__ import annotations

from branchgraph.ir.errors import GraphError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.gate import ScaleGradient
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.optimisers import Optimiser
from branchgraph.ir.rebuild import Rebuild, clone
from branchgraph.ir.state import State
from branchgraph.passes.clean import DeadCode, drop_inputs


def sequential_step(graph: Graph, optimiser: Optimiser) -> Graph:
    """A training step with one update a branch, in their order.

    `graph` is specialised for training and has the loss of each branch as its output
    `<branch>.loss` (`training.joint_loss`, `branch_losses`). Outputs are those of the branches, as
    each update found them, and `loss`, the sum of their losses.

    Raises `GraphError` if there are no such losses, or if shared states have the mean gradient.
    """
    names = _branches(graph)
    _refuse_means(graph, names)
    new = Graph(graph.name)
    latest: dict[State, Value] = {}
    for name in names:
        alone = _alone(graph, name, names)
        own = [s for s in alone.reads if s.role.trainable and not _of_others(s, name, names)]
        step = optimiser.attach(differentiate(alone, f"{name}.loss", own))
        latest.update(_Link(step, new, latest).appended())
    for state, value in latest.items():
        new.update(state, value)
    losses = [new.outputs[f"{name}.loss"] for name in names]
    new.output("loss", new.emit(Sum(), *losses, name="loss"))
    return new


def _branches(graph: Graph) -> list[str]:
    """Branches with a loss, in their order."""
    names = [b for b in graph.branches() if f"{b}.loss" in graph.outputs]
    if len(names) < 2:
        raise GraphError(
            f"{graph.name}: expected outputs <branch>.loss of several branches, found "
            f"{', '.join(graph.outputs) or 'none'}; take the losses of the branches first"
        )
    return names


def _refuse_means(graph: Graph, names: list[str]) -> None:
    """A gradient divided by B would be taken B times over."""
    for node in graph.nodes:
        if _is_mean(node, len(names)) and len({n.scope[0].name for n in _inside(node)}) > 1:
            raise GraphError(
                f"{node.inputs[0].label} has the mean gradient over branches; declare the branches "
                "with gradient=sequential"
            )


def _is_mean(node: Node, branches: int) -> bool:
    if not isinstance(node.op, ScaleGradient):
        return False
    scale = node.inputs[1].producer
    return scale is not None and isinstance(scale.op, Full) and scale.op.value == 1.0 / branches


def _inside(node: Node) -> list[Node]:
    """Readers of a node that stand in branches."""
    readers = (n for value in node.outputs for n in value.users)
    return [n for n in readers if n.scope and n.scope[0].branch]


def _alone(graph: Graph, name: str, names: list[str]) -> Graph:
    """What update `name` runs: its branch and the trunk, with the updates of their states."""
    new = clone(graph)
    new.keep(
        output=lambda key: key.startswith(f"{name}."),
        update=lambda state: not _of_others(state, name, names),
    )
    new = DeadCode().apply(new)
    drop_inputs(new, lambda value: not value.users)
    return new


def _of_others(state: State, name: str, names: list[str]) -> bool:
    """Whether a state belongs to another branch."""
    return state.name.startswith(tuple(f"{other}/" for other in names if other != name))


class _Link(Rebuild):
    """A graph behind what `new` holds; it reads the latest values of states."""

    def __init__(self, old: Graph, new: Graph, latest: dict[State, Value]) -> None:
        super().__init__(old)
        self.new = new
        self.latest = latest

    def appended(self) -> dict[State, Value]:
        """The values that states take."""
        self.run()
        return {state: self.mapped[value] for state, value in self.old.updates.items()}

    def visit_input(self, value: Value) -> Value:
        return self.new.inputs.get(value.name) or super().visit_input(value)

    def visit_state(self, state: State) -> Value:
        return self.latest.get(state) or self.new.read(state)

    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        types = (v.type for v in node.outputs)
        return self.new.insert(node.op, inputs, types, node.name, node.scope)

    def finish(self) -> None:
        for name, value in self.old.outputs.items():
            self.new.output(name, self.mapped[value])
