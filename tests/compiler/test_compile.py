"""Compiled programs are the interpreter's numbers, with ownership, caching and timing on top."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from builders import CLOSE, branches_of_every_kind, images, random_graphs, randomised
from hypothesis import given, settings

from branchgraph.compiler import compile
from branchgraph.compiler.backend import _chosen, backend
from branchgraph.compiler.pipeline import compilations
from branchgraph.ir.builder import dense, relu
from branchgraph.ir.errors import GraphError, MissingError, ShapeError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.reshape import Reshape, Transpose
from branchgraph.ir.optimisers import Adam, MomentumSGD
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType
from branchgraph.nets import b_lenet
from branchgraph.passes.specialise import specialise
from branchgraph.training import joint_loss


@settings(max_examples=25, deadline=None)
@given(random_graphs())
def test_a_training_program_gives_the_interpreters_outputs_updates_and_gradients(
    graph: Graph,
) -> None:
    training = Adam().attach(differentiate(joint_loss(specialise(graph, training=True))))
    store = randomised(training)
    fed = {"x": images(), "labels": np.array([0, 1, 2, 3, 4])}
    expected = interpret(training, fed, store)
    step = compile(training, store=store)
    gradients = step.gradients(fed)
    for state, gradient in expected.gradients.items():
        np.testing.assert_allclose(gradients[state], gradient, **CLOSE)
    for state, value in expected.updates.items():
        np.testing.assert_allclose(store[state], value, **CLOSE)


def test_updates_commit_together() -> None:
    graph = Graph("swap")
    a, b = State("a", ()), State("b", ())
    first, second = graph.read(a), graph.read(b)
    graph.update(a, second)
    graph.update(b, first)
    graph.output("sum", first + second)
    store = Store({a: np.array(1.0), b: np.array(2.0)})
    assert compile(graph, store=store)()["sum"] == 3.0
    assert (store[a], store[b]) == (2.0, 1.0)
    store[a][...] = 5.0
    assert store[b] == 1.0, "states do not share memory"


def test_a_run_that_fails_commits_nothing() -> None:
    step, store = counting_step()
    with pytest.raises(ShapeError):
        step(x=np.ones((2, 4), np.float32), labels=np.array([0, 9]))
    assert all(not store[s].any() for s in store if s.role in (Role.SLOT, Role.STEP))


def counting_step() -> tuple:  # type: ignore[type-arg]
    graph = Graph("step")
    graph.output("logits", dense(graph.input("x", ("N", 4)), 3))
    store = Store()
    training = differentiate(joint_loss(specialise(graph, training=True)))
    return compile(MomentumSGD().attach(training), store=store), store


def test_an_array_handed_out_may_be_edited_and_the_next_run_sees_it() -> None:
    graph = Graph("g")
    w = State("w", (3,))
    graph.output("y", graph.read(w) * 2.0)
    store = Store({w: np.ones(3)})
    run = compile(graph, store=store)
    store[w][0] = 7.0
    assert run()["y"].tolist() == [14.0, 2.0, 2.0]


def test_a_state_is_updated_in_the_array_that_was_handed_out() -> None:
    graph = Graph("g")
    w = State("w", (3,))
    graph.update(w, graph.read(w) + 1.0)
    store = Store({w: np.ones(3)})
    held = store[w]
    run = compile(graph, store=store)
    run()
    assert held.tolist() == [2.0] * 3
    held[0] = 10.0
    run()
    assert store[w].tolist() == [11.0, 3.0, 3.0]


def test_outputs_are_arrays_of_their_own() -> None:
    graph = Graph("g")
    x = graph.input("x", (2, 3))
    w = graph.read(State("w", (2, 3)))
    graph.output("same", x)
    graph.output("state", w)
    graph.output("view", graph.emit(Transpose(axes=(1, 0)), x))
    doubled = x * 2.0
    graph.output("twice", doubled)
    graph.output("again", doubled)
    graph.output("flat", graph.emit(Reshape(shape=(6,)), doubled))
    store = Store.initialised(graph.states)
    given = np.ones((2, 3), np.float32)
    outputs = compile(graph, store=store)(x=given)
    for array in outputs.values():
        array += 100.0
    assert given.max() == 1.0
    assert store[graph.states[0]].max() == 0.0
    assert outputs["twice"].max() == outputs["again"].max() == 102.0


def test_graphs_of_one_structure_share_a_program() -> None:
    compile(b_lenet())
    before = compilations()
    renamed = b_lenet()
    renamed.name = "another"
    store = Store()
    compile(renamed, store=store, seed=5)(x=np.zeros((1, 1, 28, 28), np.float32))
    assert compilations() == before
    compile(b_lenet(classes=3))
    assert compilations() == before + 1


def test_a_shared_program_binds_states_by_structure_not_by_order_of_reading() -> None:
    def build(swapped: bool) -> tuple[Graph, State, State]:
        graph = Graph("g")
        a, b = State("a", ()), State("b", ())
        for state in (b, a) if swapped else (a, b):
            graph.read(state)
        graph.output("y", graph.read(a) - graph.read(b))
        return graph, a, b

    for swapped in (False, True):
        graph, a, b = build(swapped)
        store = Store({a: np.array(5.0), b: np.array(2.0)})
        assert compile(graph, store=store)()["y"] == 3.0


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_any_batch_size_runs_the_same_program(rows: int) -> None:
    graph = branches_of_every_kind()
    outputs = compile(graph)(x=images(rows))
    assert outputs["logits"].shape == (rows, 5)
    assert outputs["exit"].shape == (rows,)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, GraphError, "input 'x' f32\\[N, 3\\] is not given"),
        ({"x": np.ones((2, 3)), "y": 1.0}, GraphError, "no input 'y'; the inputs are: x, k"),
        ({"x": np.ones((2, 4))}, ShapeError, "expected shape \\[N, 3\\], got \\[2, 4\\]"),
        (
            {"x": np.ones((2, 3)), "k": 0.5},
            ShapeError,
            "input 'k': expected i64, got an array of f",
        ),
        ({"x": np.array([["a", "b", "c"]])}, ShapeError, "input 'x': expected f32"),
    ],
)
def test_wrong_inputs_are_named_with_what_was_expected(inputs, error, message) -> None:  # type: ignore[no-untyped-def]
    graph = Graph("g")
    x = graph.input("x", ("N", 3))
    k = graph.input("k", (), DType.I64, default=1)
    graph.output("y", relu(x))
    graph.output("k2", k + k)
    with pytest.raises(error, match=message):
        compile(graph).run(inputs)


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(MissingError, match="no backend 'tpu'; this version has: .*numpy, auto"):
        backend("tpu")


def test_auto_is_an_available_backend_and_says_which_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _chosen.cache_clear()
    chosen = backend("auto")
    assert not chosen.missing()
    assert f"backend {chosen.name}: " in capsys.readouterr().err
    backend("auto")
    assert capsys.readouterr().err == ""


def test_an_observer_sees_every_instruction_and_its_scope() -> None:
    run = compile(b_lenet())
    seen: list[tuple[str, bool]] = []
    run.run(
        {"x": np.zeros((2, 1, 28, 28), np.float32)},
        lambda work, seconds: seen.extend((i.op.opcode, i.in_branch) for i in work.instructions),
    )
    assert len(seen) == len(run.program.instructions)
    assert ("exit_score", True) in seen
    assert ("conv", False) in seen


def test_a_report_has_every_kernel_and_writes_a_trace(tmp_path: Path) -> None:
    run = compile(b_lenet())
    report = run.report({"x": np.zeros((2, 1, 28, 28), np.float32)}, repeats=2)
    assert [op for row in report.rows for op in row.ops] == [
        i.op.opcode for i in run.program.instructions
    ]
    first = next(row for row in report.rows if row.ops == ("conv",))
    assert (first.node, first.macs) == ("conv1", 2 * 5 * 25 * 30 * 30)
    assert sum(report.by("scope").values()) == pytest.approx(
        sum(row.milliseconds for row in report.rows)
    )
    assert "conv1" in report.text()
    report.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert next(e["name"] for e in events if e["cat"] == "top") == "conv1"
    starts = [e["ts"] for e in events]
    assert starts == sorted(starts)


def test_buffers_die_after_their_last_use() -> None:
    program = compile(b_lenet()).program
    released = [b for i in program.instructions for b in i.releases]
    assert len(released) == len(set(released))
    written = {b for i in program.instructions for b in i.writes}
    assert written - set(released) == set(program.outputs)


def test_threads_may_share_an_executable() -> None:
    step, store = counting_step()
    x, labels = np.ones((2, 4), np.float32), np.array([0, 1])
    threads = [threading.Thread(target=lambda: [step(x=x, labels=labels) for _ in range(20)])
               for _ in range(3)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone, other = counting_step()
    for _ in range(60):
        alone(x=x, labels=labels)
    for mine, theirs in zip(step.states, alone.states):
        np.testing.assert_array_equal(store[mine], other[theirs])
