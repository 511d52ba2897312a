"""Exits in generated kernels: networks choose as on NumPy, and nothing is done for nobody."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from branchgraph.backends.onednn.chain import chained, native
from branchgraph.backends.onednn.rows import Counts, all_stay, bucket
from branchgraph.codegen import engine
from branchgraph.compiler import compile
from branchgraph.ir.builder import conv, dense, exit, global_average_pool, relu
from branchgraph.ir.dims import Dim
from branchgraph.ir.graph import Graph, branch
from branchgraph.ir.ops.exit import ExitScore
from branchgraph.nets import network
from branchgraph.passes.specialise import specialise
from tests.backends.against_numpy import kernels_of, pair
from tests.backends.test_onednn_runner import check_exits
from tests.builders import randomised

SIZES = [1, 2, 3, 4, 5, 9]


def three_exits() -> Graph:
    """Early exits with live values of several shapes across their cuts."""
    graph = Graph("three exits")
    x = graph.input("x", ("N", 2, 6, 6))
    h = relu(conv(x, 4, 3, pad=1))
    for k in (1, 2, 3):
        with branch(f"exit{k}"):
            exit(dense(global_average_pool(h), 5), f"exit{k}", threshold=0.0)
        h = relu(conv(h, 4 + k, 3, pad=1)) if k != 2 else relu(h + conv(h, 5, 3, pad=1))
    exit(dense(global_average_pool(h), 5), "exit4", last=True)
    return graph


def scores_of(graph: Graph, x: np.ndarray, store) -> list[np.ndarray]:  # type: ignore[no-untyped-def]
    every = compile(specialise(graph, training=False, exits="all"), store=store.copy())(x=x)
    return [ExitScore("entropy").evaluate(z)[0] for z in every.values()]


# -- choices ---------------------------------------------------------------------------------------


def test_three_nested_exits_choose_as_on_numpy() -> None:
    taken = check_exits(three_exits(), "entropy", [0.0, 1.45, 1.5, 1.55, 1.6, 10.0], [0, *SIZES])
    assert {0, 3} <= taken


def test_b_alexnet_chooses_as_on_numpy() -> None:
    taken = check_exits(network("b_alexnet"), "entropy", [0.0, 1.0, 2.0, 2.25, 10.0], [1, 3])
    assert {0, 2} <= taken


def test_every_number_of_survivors() -> None:
    """Thresholds between the scores: from none that leaves to none that stays."""
    graph = three_exits()
    store = randomised(graph, 2)
    x = np.random.default_rng(0).normal(size=(9, 2, 6, 6)).astype(np.float32)
    first = np.sort(scores_of(graph, x, store)[0])
    assert (np.diff(first) > 1e-5).all(), "scores too near to each other to fall between"
    expected, found = pair(graph, store)
    for limit in (0.0, *(first[1:] + first[:-1]) / 2, 10.0):
        feeds = {"x": x, "exit1.threshold": limit, "exit2.threshold": 0.0, "exit3.threshold": 10.0}
        ours, theirs = found.run(feeds), expected.run(feeds)
        np.testing.assert_array_equal(ours["exit"], theirs["exit"])
        np.testing.assert_allclose(ours["logits"], theirs["logits"], rtol=1e-4, atol=1e-5)


def test_logits_that_are_not_numbers_go_on_to_the_last_exit() -> None:
    graph = three_exits()
    expected, found = pair(graph, randomised(graph, 2))
    x = np.random.default_rng(0).normal(size=(4, 2, 6, 6)).astype(np.float32)
    x[1], x[2, 0, 0, 0] = np.nan, np.inf
    feeds = {"x": x, **{f"exit{k}.threshold": 10.0 for k in (1, 2, 3)}}
    ours, theirs = found.run(feeds), expected.run(feeds)
    np.testing.assert_array_equal(ours["exit"], [0, 3, 3, 0])
    np.testing.assert_array_equal(ours["exit"], theirs["exit"])
    np.testing.assert_array_equal(np.isnan(ours["logits"]), np.isnan(theirs["logits"]))


def test_results_belong_to_the_caller() -> None:
    graph = three_exits()
    store = randomised(graph, 2)
    run = compile(graph, "onednn", store=store)
    x = np.random.default_rng(0).normal(size=(3, 2, 6, 6)).astype(np.float32)
    for limit in (0.0, 10.0):
        feeds = {"x": x, **{f"exit{k}.threshold": limit for k in (1, 2, 3)}}
        before = run.run(feeds)
        copies = {k: v.copy() for k, v in before.items()}
        for value in before.values():
            value.fill(0)
        for key, value in run.run(feeds).items():
            np.testing.assert_array_equal(value, copies[key])


def test_exits_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "missing", lambda: "llvmlite is not installed")
    graph = three_exits()
    check_exits(graph, "entropy", [0.0, 1.5, 10.0], [0, 1, 5])
    found = compile(graph, "onednn", store=randomised(graph, 2))
    x = np.random.default_rng(0).normal(size=(3, 2, 6, 6)).astype(np.float32)
    found.run({"x": x, **{f"exit{k}.threshold": 1.5 for k in (1, 2, 3)}})
    assert not [name for name in kernels_of(found) if name.startswith("llvm")]


# -- what is run -----------------------------------------------------------------------------------


@pytest.mark.skipif(bool(engine.missing()), reason=engine.missing())
def test_nothing_is_run_for_samples_that_left() -> None:
    graph = three_exits()
    run = compile(graph, "onednn", store=randomised(graph, 2))
    x = np.random.default_rng(0).normal(size=(4, 2, 6, 6)).astype(np.float32)
    run.run({"x": x, **{f"exit{k}.threshold": 10.0 for k in (1, 2, 3)}})
    first, *others = run._runner._plans  # type: ignore[attr-defined]
    (plan,) = first.values()
    assert [k.name for k in plan.kernels][-1] == "llvm exit"
    assert not [k.name for known in others for p in known.values() for k in p.kernels]


@pytest.mark.skipif(bool(engine.missing()), reason=engine.missing())
def test_no_rows_move_where_all_stay() -> None:
    graph = three_exits()
    run = compile(graph, "onednn", store=randomised(graph, 2))
    x = np.random.default_rng(0).normal(size=(4, 2, 6, 6)).astype(np.float32)
    run.run({"x": x, **{f"exit{k}.threshold": 0.0 for k in (1, 2, 3)}})
    names = kernels_of(run)
    assert names.count("llvm exit") == 3
    assert not {"llvm compact", "llvm scatter"} & set(names)


def test_plans_for_all_rows_serve_no_fewer() -> None:
    for rows in range(1, 300):
        served = {n for n in range(rows + 1) if min(bucket(n), rows) == rows}
        assert all_stay(rows, rows) == (served == {rows})
        assert not all_stay(rows - 1, rows)


def test_counts_lie_where_kernels_find_them() -> None:
    counts = Counts()
    counts["N"] = 7
    cell = counts.cell("N")
    cell.value = 5
    assert counts["N"] == 5
    assert counts.of(Dim.symbol("N") * 2 + 1) == 11
    assert counts.of(3) == 3
    assert dict(counts) == {"N": 5}


# -- chains of calls -------------------------------------------------------------------------------


@pytest.mark.skipif(bool(engine.missing()), reason=engine.missing())
def test_native_calls_are_joined_and_stop_at_a_failure() -> None:
    seen: list[tuple[int, ...]] = []

    def step(status: int):  # type: ignore[no-untyped-def]
        def body(a: int, b: int) -> int:
            seen.append((status, a, b))
            return status

        call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64)(body)
        return call, (ctypes.c_int64(3), -4), body

    def host() -> None:
        seen.append(())

    steps = [step(0), step(0), (host, (), None), step(0), step(5), step(0)]
    calls = chained(steps)
    assert [native(s) for s in calls] == [True, False, True]
    assert [call(*arguments) for call, arguments, _ in calls] == [0, None, 5]
    assert seen == [(0, 3, -4), (0, 3, -4), (), (0, 3, -4), (5, 3, -4)]


@pytest.mark.skipif(bool(engine.missing()), reason=engine.missing())
def test_what_gives_no_status_is_not_asked_for_one() -> None:
    seen: list[int] = []
    call = ctypes.CFUNCTYPE(None, ctypes.c_int64)(seen.append)
    ((walk, arguments, _),) = chained([(call, (k,), None) for k in range(5)])
    assert walk(*arguments) == 0
    assert seen == list(range(5))
