"""Updates in place: they come last, and only where nothing reads the old value afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from branchgraph.compiler.donation import donate
from branchgraph.compiler.program import Program, schedule
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph
from branchgraph.ir.hash import canonical_states
from branchgraph.ir.op import make
from branchgraph.ir.optimisers import Adam, MomentumSGD, NesterovAG, Optimiser
from branchgraph.ir.state import State
from branchgraph.nets import network
from branchgraph.passes.specialise import specialise
from branchgraph.training import joint_loss


def program_of(graph: Graph) -> Program:
    return schedule(graph, {s: i for i, s in enumerate(canonical_states(graph))})


def training(rule: Optimiser, spec: str = "resnet:depth=8,classes=3") -> Graph:
    return rule.attach(differentiate(joint_loss(specialise(network(spec), training=True))))


@pytest.mark.parametrize("rule", [MomentumSGD(), NesterovAG(), Adam()], ids=repr)
def test_all_updates_of_a_rule_are_donated_and_come_last(rule: Optimiser) -> None:
    graph = training(rule)
    program = donate(program_of(graph))
    counted = [s for s in graph.updates if s.shape]
    assert len(program.donated) >= len(counted)
    made = {b: n for n, i in enumerate(program.instructions) for b in i.writes}
    first = min(made[b] for _, b in program.donated)
    tail = {b for i in program.instructions[first:] for b in i.writes}
    results = {*program.outputs, *(b for _, b in program.gradients)}
    assert not tail & results
    old = dict(program.states)
    for state, buffer in program.donated:
        later = program.instructions[made[buffer] + 1 :]
        assert all(old[state] not in i.reads for i in later)


def test_the_same_instructions_run_and_buffers_die_once() -> None:
    program = program_of(training(MomentumSGD()))
    moved = donate(program)
    assert sorted(i.writes for i in moved.instructions) == sorted(
        i.writes for i in program.instructions
    )
    seen: set[int] = {a.buffer for a in program.arguments} | {b for _, b in program.states}
    for instruction in moved.instructions:
        assert set(instruction.reads) <= seen
        seen.update(instruction.writes)
    released = [b for i in moved.instructions for b in i.releases]
    assert len(released) == len(set(released))
    assert set(released) == {b for i in program.instructions for b in i.releases}


def pair() -> tuple[Graph, State, State]:
    graph = Graph("pair")
    return graph, State("a", (3,)), State("b", (3,))


def test_states_that_swap_are_not_both_donated() -> None:
    graph, a, b = pair()
    x, y = graph.read(a), graph.read(b)
    graph.update(a, y * 2.0)
    graph.update(b, x * 2.0)
    program = donate(program_of(graph))
    assert len(program.donated) == 1  # the second one, when all that reads it has run


def test_what_an_output_shows_is_not_overwritten() -> None:
    graph, a, _ = pair()
    x = graph.read(a)
    graph.update(a, x + 1.0)
    graph.output("before", x)
    assert donate(program_of(graph)).donated == ()


def test_a_view_of_the_old_value_keeps_it() -> None:
    graph, a, b = pair()
    x, y = graph.read(a), graph.read(b)
    turned = graph.emit(make("reshape", shape=(3,)), x)
    graph.update(a, x + 1.0)
    graph.update(b, y + turned)
    program = donate(program_of(graph))
    numbers = {n for n, _ in program.donated}
    states = canonical_states(graph)
    assert [states[n].name for n in numbers] == ["b"]


def test_a_result_that_serves_two_states_is_copied() -> None:
    graph, a, b = pair()
    moved = graph.read(a) + graph.read(b)
    graph.update(a, moved)
    graph.update(b, moved)
    assert donate(program_of(graph)).donated == ()


def test_nothing_to_donate_leaves_the_program_alone() -> None:
    graph = Graph("plain")
    graph.output("y", graph.input("x", ("N", 3)) + 1.0)
    program = program_of(graph)
    assert donate(program) is program
    assert np.array_equal(program.outputs, donate(program).outputs)
