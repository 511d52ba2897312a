"""Learned gates become fixed ones: what inference reads is written into the graph.

A value is *learned* when it depends on gate scores (states of the role `gate`) and constants alone,
in the form that inference has:

    by_mode(training, inference) -> inference       hard, top_k, masks, gumbel: no drawing any more
    straight_through(value, surrogate) -> value     nothing is left to learn
    softmax(r) -> top_k(softmax(r), 1)              with `one_hot`: the choice of DARTS, 1806.09055
    g -> 1[g > threshold]                           with `threshold`: soft gates become hard

Where anything else reads a learned value, its elements under the trained scores take its place as
constants, so that `prune_gates` knows them for every store. Scores live in stores and not in
graphs: the caller gives them,

    HardenGates().apply(graph, values=store)        harden(graph, store)
    branchgraph show net.bg --pass harden_gates --pass prune_gates

Inference computes the same numbers (without `one_hot` and `threshold`); training another function,
since gates are no longer drawn. A gate that depends on the input as well goes on doing so, over
constants in place of its scores, unless `unsafe_profile` takes what it did on recorded data for
what it always does (`gate_profiles`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from branchgraph.ir.errors import RefusalError
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.activation import Softmax
from branchgraph.ir.ops.gate import StraightThrough
from branchgraph.ir.ops.mode import ByMode
from branchgraph.ir.ops.reduce import TopK
from branchgraph.ir.rebuild import clone_with_map
from branchgraph.ir.state import Role, State, Store
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.clean import DeadCode, living, nodes_below
from branchgraph.passes.constant_arrays import write
from branchgraph.passes.gate_profiles import harden_by_profile
from branchgraph.passes.specialise import specialise


@dataclass(frozen=True)
class HardenGates(Pass, spelling="harden_gates", claim="different"):
    """Fix learned gates at what inference reads under the trained scores.

    `unsafe_profile` fixes gates that depend on the input, too, where all recorded rows agreed.
    """

    threshold: float | None = None
    one_hot: bool = False
    unsafe_profile: bool = False

    def rewrite(self, graph: Graph, report: Report) -> None:
        trained = [s for s in (*graph.updates, *graph.gradients) if s.role is Role.GATE]
        if trained:
            report.refused(trained[0].name, "the graph trains it; harden the declared graph")
            return
        self._to_inference(graph)
        frontier = _frontier(graph, _learned(graph))
        arrays = self._evaluated(graph, frontier, report.values) if frontier else {}
        for value, array in arrays.items():
            node = value.producer
            with at(node.scope if node else ()):
                constant = write(graph, array, value.dtype, node.name if node else "")
            graph.replace(value, constant)
        graph.touch()
        self._report(arrays, report)
        if self.unsafe_profile:
            harden_by_profile(graph, report)
        _remove_dead(graph)

    def _to_inference(self, graph: Graph) -> None:
        """Gates in inference form, what only drawing needed removed."""
        learned = _learned(graph)
        for node in graph.nodes:
            if not any(v in learned for v in node.outputs):
                continue
            if isinstance(node.op, (ByMode, StraightThrough)):
                graph.replace(node.output, _read_in_inference(node)[0])
                graph.remove(node)
            elif self.one_hot and isinstance(node.op, Softmax):
                with at(node.scope):
                    largest = graph.emit(TopK(k=1, axis=node.op.axis), node.output)
                graph.replace(node.output, largest)
                assert largest.producer is not None
                graph.set_inputs(largest.producer, (node.output,))
        _remove_dead(graph)

    def _evaluated(
        self, graph: Graph, values: list[Value], store: Store | None
    ) -> dict[Value, np.ndarray]:
        """The elements of learned values under the scores in `store`."""
        if store is None:
            raise RefusalError(
                "harden_gates needs the values of the scores, which a graph does not hold; give a "
                ".bg file, or call harden(graph, store)"
            )
        probe, mapped = clone_with_map(graph)
        probe.keep(output=lambda n: False, update=lambda s: False, gradient=lambda s: False)
        for i, value in enumerate(values):
            probe.output(str(i), mapped[value])
        probe = DeadCode().apply(probe)
        probe.keep(input=lambda n: False)
        with np.errstate(all="ignore"):
            found = interpret(specialise(probe, training=False), {}, store).outputs
        arrays = {value: found[str(i)] for i, value in enumerate(values)}
        for value, array in arrays.items():
            if not np.isfinite(array).all():
                raise RefusalError(f"gate {value.label} is not finite under the given scores")
        if self.threshold is None:
            return arrays
        return {v: (a > self.threshold).astype(a.dtype) for v, a in arrays.items()}

    def _report(self, arrays: dict[Value, np.ndarray], report: Report) -> None:
        scores = dict.fromkeys(s for v in arrays for s in _scores(v))
        for state in scores:
            report.matched(state.name)
        if arrays:
            # Gates of several low types have no type in common but this.
            flat = np.concatenate([a.reshape(-1).astype(np.float64) for a in arrays.values()])
            closed, opened = int((flat == 0).sum()), int((flat == 1).sum())
            report.noted(
                f"{flat.size} gates: {closed} closed, {opened} open, "
                f"{flat.size - closed - opened} in between"
            )


def harden(
    graph: Graph, store: Store, *, threshold: float | None = None, one_hot: bool = False
) -> Graph:
    """`graph` with every learned gate fixed at what inference reads under `store`."""
    return HardenGates(threshold, one_hot).apply(graph, values=store)


def _read_in_inference(node: Node) -> tuple[Value, ...]:
    if isinstance(node.op, ByMode):
        return node.inputs[1:]
    if isinstance(node.op, StraightThrough):
        return node.inputs[:1]
    return node.inputs


def _learned(graph: Graph) -> set[Value]:
    """Values that depend on gate scores and constants alone, and on a score."""
    learned = {v for s, v in graph.reads.items() if s.role is Role.GATE}
    fixed = set(learned)
    for node in graph.nodes:
        if node.op.symbolic or node.op.introduces:
            continue
        if all(v in fixed for v in _read_in_inference(node)):
            fixed.update(node.outputs)
            if any(v in learned for v in node.inputs):
                learned.update(node.outputs)
    return learned


def _frontier(graph: Graph, learned: set[Value]) -> list[Value]:
    """Learned values that something else reads."""
    roots = set(graph.roots)
    values = [*graph.reads.values(), *(v for n in graph.nodes for v in n.outputs)]
    return [
        v for v in values
        if v in learned
        and (v in roots or any(o not in learned for user in v.users for o in user.outputs))
    ]  # fmt: skip


def _scores(value: Value) -> list[State]:
    """The scores that `value` depends on."""
    below = nodes_below([value.producer] if value.producer else [])
    read = (value, *(v for node in below for v in node.inputs))
    return [v.state for v in read if v.state is not None and v.state.role is Role.GATE]


def _remove_dead(graph: Graph) -> None:
    """Remove what no root needs, and the scores that nothing reads then."""
    graph.keep(node=living(graph).__contains__)
    roots = set(graph.roots)
    reads = graph.reads
    graph.keep(read=lambda s: s.role is not Role.GATE or bool(reads[s].users) or reads[s] in roots)
