"""Element-wise ops as generated kernels: what is put together, and that numbers stay the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.backends.onednn import elementwise, kernels, plan
from branchgraph.backends.onednn.clusters import clusters
from branchgraph.backends.onednn.kernels import fused
from branchgraph.codegen import engine
from branchgraph.compiler import compile
from branchgraph.compiler.donation import donate
from branchgraph.compiler.program import Program, schedule
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.hash import canonical_states
from branchgraph.ir.initialisers import Normal
from branchgraph.ir.ops.activation import LeakyRelu, Relu, ReluGradient
from branchgraph.ir.ops.elementwise import Absolute, Clip, Sqrt, compare, where
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.loss import CrossEntropy
from branchgraph.ir.ops.merge import Maximum, Mean, Product, Sum
from branchgraph.ir.ops.reduce import ReduceMean
from branchgraph.ir.ops.reshape import Transpose
from branchgraph.ir.optimisers import (
    SMORMS3,
    Adam,
    MomentumSGD,
    NesterovAG,
    Optimiser,
)
from branchgraph.ir.state import State, Store
from branchgraph.nets import network
from branchgraph.passes.specialise import specialise
from branchgraph.training import joint_loss
from tests.backends.against_numpy import assert_agree, check, kernels_of, states_of
from tests.backends.libdnnl import require_libdnnl

require_libdnnl()
if engine.missing():
    pytest.skip(engine.missing(), allow_module_level=True)

RULES = {
    "momentum": MomentumSGD(learning_rate=0.01),
    "nesterov": NesterovAG(learning_rate=0.01),
    "adam": Adam(weight_decay_rate=0.01),
    "amsgrad": Adam(amsgrad=True, adabound=True),
    "smorms3": SMORMS3(),
}


def training(spec: str, rule: Optimiser) -> Graph:
    return rule.attach(differentiate(joint_loss(specialise(network(spec), training=True))))


def feeds(graph: Graph, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    _, *size = graph.inputs["x"].shape
    x = rng.standard_normal((batch, *map(int, map(str, size)))).astype(np.float32)
    return {"x": x, "labels": rng.integers(0, 3, batch)}


def without(patch: pytest.MonkeyPatch) -> None:
    """No generated element-wise kernels, as before there were any."""
    makers = {
        kind: tuple(m for m in found if m not in (fused.body, fused.table))
        for kind, found in kernels.MAKERS.items()
    }
    patch.setattr(plan, "grouped", lambda found, program: list(found))
    patch.setattr(kernels, "MAKERS", makers)


def is_elementwise(kernel: str) -> bool:
    return kernel.startswith("llvm") and " of " in kernel


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("threads", [1, 2])
def test_twenty_steps_leave_the_states_they_left_before(rule: str, threads: int) -> None:
    graph = training("resnet:depth=8,classes=3", RULES[rule])
    store = Store.initialised(graph.states)
    fed = feeds(graph, 4)
    found = compile(graph, "onednn", store=store.copy(), threads=threads)
    with pytest.MonkeyPatch.context() as patch:
        without(patch)
        before = compile(graph, "onednn", store=store.copy(), threads=threads)
        before.run(fed)
        assert not any(map(is_elementwise, kernels_of(before)))
    found.run(fed)
    assert any(map(is_elementwise, kernels_of(found)))
    for _ in range(19):
        before.run(fed)
        found.run(fed)
    old = states_of(before.store, list(graph.updates))
    assert_agree(states_of(found.store, list(graph.updates)), old, 20, "state")


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_twenty_steps_of_two_layers_are_those_of_numpy(rule: str) -> None:
    """A loss without kinks, so that NumPy's and oneDNN's roundings stay apart by roundings."""
    graph = Graph("layers")
    x = graph.input("x", ("N", 7))
    first, second = State("w1", (5, 7), init=Normal(0.3)), State("w2", (3, 5), init=Normal(0.3))
    hidden = graph.emit(Dense(), x, graph.read(first))
    y = graph.emit(Dense(), hidden, graph.read(second))
    loss = graph.emit(ReduceMean((0, 1)), y * y)
    graph.output("loss", loss)
    trained = RULES[rule].attach(differentiate(graph))
    fed = {"x": np.random.default_rng(1).standard_normal((6, 7)).astype(np.float32)}
    check(trained, fed, runs=20)


@pytest.mark.parametrize("rule", [MomentumSGD(), Adam()], ids=["momentum", "adam"])
def test_the_updates_of_a_network_are_a_few_kernels(rule: Optimiser) -> None:
    graph = training("resnet:depth=20", rule)
    fed = {"x": np.zeros((2, 3, 32, 32), np.float32), "labels": np.zeros(2, np.int64)}
    found = compile(graph, "onednn")
    found.run(fed)
    with pytest.MonkeyPatch.context() as patch:
        without(patch)
        before = compile(graph, "onednn")
        before.run(fed)
    assert len(kernels_of(found)) < len(kernels_of(before)) - 250
    # parameters, running statistics, the loss
    assert sum(map(is_elementwise, kernels_of(found))) < 8
    old, new = before.footprint(), found.footprint()
    assert old is not None
    assert new is not None
    assert new.arena <= old.arena


def test_without_a_compiler_all_runs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "missing", lambda: "llvmlite is not installed")
    graph = training("lenet:classes=3", MomentumSGD())
    found = compile(graph, "onednn")
    found.run(feeds(graph, 4))
    assert not any(map(is_elementwise, kernels_of(found)))
    assert any(name.startswith("numpy multiply") for name in kernels_of(found))


# -- ops ---------------------------------------------------------------------------------------

N, C, H = 3, 5, 7
Ops = Callable[[Graph, Value, Value, Value], Value]

OPS: dict[str, Ops] = {
    "arithmetic": lambda g, a, b, s: (a + b * s) / (b - a) - s,
    "functions": lambda g, a, b, s: -g.emit(Sqrt(), g.emit(Absolute(), a)) * b,
    "clip": lambda g, a, b, s: g.emit(Clip(-0.5, 0.7), a) + g.emit(Clip(0.1, float("inf")), b),
    "relu": lambda g, a, b, s: g.emit(ReluGradient(), g.emit(Relu(), a), b),
    "leaky": lambda g, a, b, s: g.emit(LeakyRelu(0.3), a) * s,
    "merges": lambda g, a, b, s: g.emit(Mean(), g.emit(Maximum(), a, b, a), g.emit(Sum(), b, a, b)),
    "product": lambda g, a, b, s: g.emit(Product(), a, b, a) - a,
    "gate": lambda g, a, b, s: g.emit(Select(), a, g.emit(Relu(), b)) + g.emit(Select(), b, s),
    "choice": lambda g, a, b, s: where(
        compare("less", a, b), a * s, where(compare("equal", a, a), b, a)
    ),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [("N", C), ("N", C, H, H), ()], ids=str)
def test_a_body_of_ops_is_one_kernel(name: str, shape: tuple[int | str, ...]) -> None:
    graph = Graph("body")
    rng = np.random.default_rng(2)
    a, b, s = graph.input("a", shape), graph.input("b", shape), graph.input("s", ())
    graph.output("y", OPS[name](graph, a, b, s))
    size = tuple(N if d == "N" else int(d) for d in shape)
    x, z = (rng.standard_normal(size).astype(np.float32) for _ in range(2))
    fed = {"a": x, "b": z, "s": np.float32(1.3)}
    check(graph, fed)
    found = compile(graph, "onednn")
    found.run(fed)
    names = kernels_of(found)
    assert [is_elementwise(n) for n in names] == [True], names


def test_bools_from_and_for_outside() -> None:
    """A mask that is an output too is stored, and one that comes from an input is loaded."""
    graph = Graph("masks")
    a, mask = graph.input("a", ("N", C)), graph.input("mask", ("N", C), "bool")
    below = compare("less", a, graph.constant(0.0))
    graph.output("below", below)
    graph.output("y", where(mask, where(below, -a, a), a * 2.0))
    rng = np.random.default_rng(3)
    fed = {
        "a": rng.standard_normal((N, C)).astype(np.float32),
        "mask": rng.integers(0, 2, (N, C)).astype(bool),
    }
    check(graph, fed)
    found = compile(graph, "onednn")
    found.run(fed)
    assert len(kernels_of(found)) == 1


def test_operands_that_lie_otherwise_are_left_to_other_kernels() -> None:
    graph = Graph("turned")
    a, b = graph.input("a", (C, C)), graph.input("b", (C, C))
    turned = graph.emit(Transpose((1, 0)), b)
    graph.output("y", (a + turned) * a)
    rng = np.random.default_rng(4)
    fed = {k: rng.standard_normal((C, C)).astype(np.float32) for k in "ab"}
    check(graph, fed)


def test_a_label_that_names_no_class_is_refused_every_time() -> None:
    graph = Graph("loss")
    x, labels = graph.input("x", ("N", C)), graph.input("labels", ("N",), "i64")
    graph.output("y", graph.emit(CrossEntropy(), x, labels))
    found = compile(graph, "onednn")
    logits = np.random.default_rng(6).standard_normal((N, C)).astype(np.float32)
    for wrong in (C, -1, 2**40):
        with pytest.raises(ShapeError, match="labels run from"):
            found.run({"x": logits, "labels": np.array([0, wrong, 1])})
        found.run({"x": logits, "labels": np.array([0, C - 1, 1])})
    assert kernels_of(found) == ["llvm cross_entropy"]


# -- what may not wait -------------------------------------------------------------------------


def program_of(graph: Graph) -> Program:
    return donate(schedule(graph, {s: i for i, s in enumerate(canonical_states(graph))}))


def kinds_of(graph: Graph) -> list[str]:
    program = program_of(graph)
    found = clusters(program.instructions, program, kernels.epilogue)
    return [c.kind for c in elementwise.grouped(found, program)]


def states(*names: str, shape: tuple[int, ...] = (C, C)) -> list[State]:
    return [State(n, shape, init=Normal(1.0)) for n in names]


def test_independent_updates_of_one_expression_are_a_table() -> None:
    graph = Graph("table")
    for state in (*states("a", "b"), *states("c", shape=(2,)), *states("d", shape=(1,))):
        graph.update(state, graph.read(state) * 2.0 + 1.0)
    assert kinds_of(graph)[-1] == "table"
    assert kinds_of(graph).count("table") == 1
    check(graph, {}, runs=2)


def test_an_update_that_another_one_reads_is_not_in_its_table() -> None:
    graph = Graph("chain")
    a, b, c = states("a", "b", "c")
    new = graph.read(a) * 2.0 + 1.0
    graph.update(a, new)
    graph.update(b, graph.read(b) * 2.0 + 1.0)
    graph.update(c, graph.read(c) * new + 1.0)
    check(graph, {}, runs=3)


def test_a_row_in_the_middle_of_a_table_may_be_the_one_that_cannot_wait() -> None:
    graph = Graph("middle")
    (b,), (a, c, d) = states("b", shape=(1, 1)), states("a", "c", "d")
    graph.update(a, graph.read(a) * 2.0 + 1.0)
    new = graph.read(b) * 2.0 + 1.0
    graph.update(b, new)
    graph.update(c, graph.read(c) * new - new)
    graph.update(d, graph.read(d) * 2.0 + 1.0)
    check(graph, {}, runs=3)


def test_a_view_of_an_old_value_is_read_before_it_changes() -> None:
    """b and d would be one table behind the update of a, whose old value b reads turned."""
    graph = Graph("views")
    a, b, c, d = states("a", "b", "c", "d")
    x, y, z, w = (graph.read(s) for s in (a, b, c, d))
    turned = graph.emit(Transpose((1, 0)), x)
    graph.update(b, (y + turned) * 0.5)
    graph.update(a, x * x)
    graph.update(d, (w + z) * 0.5)
    check(graph, {}, runs=3)


def test_states_that_swap_with_arithmetic() -> None:
    """b must be read before it is written, and by a row of another expression later too."""
    graph = Graph("swap")
    a, b, c = states("a", "b", "c")
    x, y, z = graph.read(a), graph.read(b), graph.read(c)
    graph.update(a, (y * 2.0 + 1.0) * 0.5)
    graph.update(b, (x * 2.0 + 1.0) * 0.5)
    graph.update(c, (x * 2.0 + z) * 0.5)
    check(graph, {}, runs=4)


def test_a_transposed_state_is_not_updated_while_it_is_read() -> None:
    """Where the view and the update are of one shape an element is read after it was written."""
    graph = Graph("turned")
    a, b = states("a", "b")
    x, y = graph.read(a), graph.read(b)
    turned = graph.emit(Transpose((1, 0)), x)
    graph.update(a, (x + turned) * 0.5)
    graph.update(b, (y + turned) * 0.5)
    check(graph, {}, runs=3)


def test_a_number_that_is_updated_too() -> None:
    """A one-element state is an operand of one row and the result of another."""
    graph = Graph("number")
    (a,), (s,) = states("a"), states("s", shape=(1,))
    x, y = graph.read(a), graph.read(s)
    graph.update(s, y * y + 0.5)
    graph.update(a, x * y + 0.5)
    check(graph, {}, runs=4)
    check(other_order(), {}, runs=4)


def other_order() -> Graph:
    graph = Graph("number")
    (a,), (s,) = states("a"), states("s", shape=(1,))
    x, y = graph.read(a), graph.read(s)
    graph.update(a, x * y + 0.5)
    graph.update(s, y * y + 0.5)
    return graph


def an_operand(draw: st.DrawFn, graph: Graph, pool: list[Value], shape: tuple[int, ...]) -> Value:
    """A value of `shape`, sometimes turned, or one of a single element."""
    fitting = [v for v in pool if v.shape == shape]
    choice = draw(st.sampled_from(["any", "any", "turned", "number"]))
    if choice == "number":
        return draw(st.sampled_from([v for v in pool if v.shape == (1, 1)]))
    found = draw(st.sampled_from(fitting))
    if choice == "turned" and shape[0] == shape[1]:
        return graph.emit(Transpose((1, 0)), found)
    return found


@st.composite
def steps_of_states(draw: st.DrawFn) -> Graph:
    """States that are updated from each other's old and new values, in any order."""
    graph = Graph("steps")
    shapes = [(1, 1), *draw(st.lists(st.sampled_from([(1, 1), (3, 3), (2, 9)]), max_size=6))]
    made = [State(f"s{k}", shape, init=Normal(1.0)) for k, shape in enumerate(shapes)]
    pool = [graph.read(state) for state in made]
    for state in draw(st.permutations(made)):
        value = an_operand(draw, graph, pool, state.shape)
        for _ in range(draw(st.integers(1, 3))):
            other = an_operand(draw, graph, pool, state.shape)
            value = (value + other) * 0.5 if draw(st.booleans()) else value * other
            pool.append(value)
        if value.shape == state.shape:
            graph.update(state, value)
    return graph


@settings(max_examples=60, deadline=None)
@given(steps_of_states())
def test_random_updates_read_what_they_should(graph: Graph) -> None:
    if graph.updates:
        check(graph, {}, runs=2)


def test_nothing_is_moved_past_layers() -> None:
    """What a chain reads would live as long as the layer between, beside its own results."""
    graph = Graph("kept")
    a, b = graph.input("a", ("N", C)), graph.input("b", ("N", C))
    early = (a + b) * a
    made = graph.emit(Dense(), a, graph.read(*states("w")))
    graph.output("y", early - graph.emit(Sqrt(), graph.emit(Absolute(), made)))
    kinds = kinds_of(graph)
    assert kinds[:2] == ["elementwise", "layer"] or kinds[0] == "merge"
    rng = np.random.default_rng(5)
    check(graph, {k: rng.standard_normal((N, C)).astype(np.float32) for k in "ab"})
