"""What gates by sample did on recorded data, and taking that for what they always do: unsafe.

A gate that depends on the input may open for the next sample, so no pass closes it by itself. A
profile says what it did on data that were run through the network: for every entry e beside the
batch, over all rows n of all runs,

    least[e] = min_n g[n, e]        most[e] = max_n g[n, e]

`profile_gates(graph)` adds both to a graph as running statistics; whoever runs the graph over data
records them in the store. Where least = most, `harden_gates:unsafe_profile=true` writes that number
into the graph in place of the gate, which `prune_gates` relies on then. On the recorded data the
network computes what it did; on other data it may not, which is why the option has this name (rule
P10 of gated pruning; gates by sample: SkipNet, arXiv 1711.09485).

A gate that is not finite once, or has no batch on axis 0, is never taken for constant.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from branchgraph.ir.errors import RefusalError
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.initialisers import Constant, Zeros
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import cast
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.rebuild import clone
from branchgraph.ir.state import Role, State
from branchgraph.ir.types import DType
from branchgraph.passes.base import Report
from branchgraph.passes.clean import living, nodes_below
from branchgraph.passes.constant_arrays import write

_LEAST, _MOST, _RUNS = ".profile.least", ".profile.most", "gates.profile.runs"
#: No gate in float32 is further from 0.
_FAR = float(np.finfo(np.float32).max)


def profile_gates(graph: Graph) -> Graph:
    """`graph` with statistics of every gate [N, ...] that depends on an input, updated by runs.

    Gates without a name are given one, since that is what their statistics are called after.
    """
    new = clone(graph)
    gates = list(_by_sample(new))
    for node in gates:
        with at(node.scope):
            node.name = node.name or new.unused_name("gate")
            _record(new, node)
    if gates:
        runs = State(_RUNS, (), DType.F32, Role.STATISTIC, Zeros())
        new.update(runs, new.read(runs) + 1.0)
    new.touch()
    return new


def _by_sample(graph: Graph) -> Iterator[Node]:
    """Gates that depend on an input and have a number (or several) for each row of the batch."""
    for node in graph.nodes:
        if not isinstance(node.op, Select):
            continue
        x, gate = node.inputs
        aligned = len(gate.shape) == len(x.shape) and gate.shape[:1] == x.shape[:1] != (1,)
        if aligned and all(isinstance(d, int) for d in gate.shape[1:]) and _fed(gate):
            yield node


def _fed(value: Value) -> bool:
    """Whether a value depends on an input."""
    below = nodes_below([value.producer] if value.producer else [])
    return any(v.is_input for v in (value, *(v for node in below for v in node.inputs)))


def _record(graph: Graph, node: Node) -> None:
    gate = cast(node.inputs[1], DType.F32)
    shape = tuple(int(str(d)) for d in gate.shape[1:])
    for suffix, sign in ((_MOST, 1.0), (_LEAST, -1.0)):
        state = State(
            f"{node.path}{suffix}", shape, DType.F32, Role.STATISTIC, Constant(-sign * _FAR)
        )
        largest = graph.emit(make("reduce_max", axes=(0,)), gate * sign)
        old = graph.read(state) * sign
        graph.update(state, graph.emit(make("maximum"), old, largest) * sign)


def harden_by_profile(graph: Graph, report: Report) -> None:
    """Write gates that had one number in every recorded run into `graph`; drop the profile."""
    states = {s.name: s for s in graph.states if s.name == _RUNS or ".profile." in s.name}
    if _RUNS not in states:
        report.refused(graph.name, "no gate of it has a profile; profile_gates(graph) first")
        return
    if report.values is None:
        raise RefusalError(
            "unsafe_profile needs the recorded profile, which a graph does not hold; give a .bg "
            "file, or call HardenGates(unsafe_profile=True).apply(graph, values=store)"
        )
    runs = int(report.values[states[_RUNS]])
    for node in graph.nodes:
        if f"{node.path}{_MOST}" in states and isinstance(node.op, Select):
            _harden(graph, node, states, runs, report)
    profile = set(states.values())
    graph.keep(update=lambda s: s not in profile)
    graph.keep(node=living(graph).__contains__)
    graph.keep(read=lambda s: s not in profile)
    graph.touch()


def _harden(graph: Graph, node: Node, states: dict[str, State], runs: int, report: Report) -> None:
    if not runs:
        report.refused(node, "its profile has no runs; run the profiled network over data first")
        return
    assert report.values is not None
    least, most = (report.values[states[f"{node.path}{end}"]] for end in (_LEAST, _MOST))
    if not (least == most).all():
        report.refused(node, f"its gate was not the same for all rows of {runs} recorded runs")
        return
    x, gate = node.inputs
    with at(node.scope):
        constant = write(graph, most[None], gate.dtype)
    graph.set_inputs(node, (x, constant))
    report.matched(node)
    report.noted(f"unsafe: {node.path} is taken to be what it was in {runs} recorded runs")
