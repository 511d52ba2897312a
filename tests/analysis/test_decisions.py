"""What a setting decides, derived from one pass, is what the program at that setting does."""

from __future__ import annotations

import json

import numpy as np
import pytest
from builders import (
    branches_of_every_kind,
    dense_net_with_exits,
    images,
    merge_and_run_with_exits,
    randomised,
)
from criteria import three_exits
from goldens import golden, mnist_test_set

from branchgraph.analysis.decisions import everybody, leave, nobody, scores
from branchgraph.compiler import compile
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.ops.exit import RELATIONS
from branchgraph.ir.state import Store
from branchgraph.nets import b_lenet, lenet
from branchgraph.nets.branchynet import exchange_name


def executed(graph: Graph, store: Store, x: np.ndarray, setting: tuple[float, ...], batch: int):  # type: ignore[no-untyped-def]
    """Exit and class of every sample, from the program that the user runs."""
    run = compile(graph, store=store)
    names = [f"exit{k + 1}.threshold" for k in range(len(setting))]
    parts = [
        run.run({"x": x[i : i + batch], **dict(zip(names, setting))})
        for i in range(0, len(x), batch)
    ]
    taken = np.concatenate([p["exit"] for p in parts])
    return taken, np.concatenate([p["logits"].argmax(axis=1) for p in parts])


def assert_decides_alike(
    graph: Graph, store: Store, x: np.ndarray, settings: list[tuple[float, ...]], batch: int
) -> list[np.ndarray]:
    found = scores(graph, store, x, batch=batch)
    every = []
    for setting in settings:
        taken, predicted = executed(graph, store, x, setting, batch)
        np.testing.assert_array_equal(found.taken(setting), taken)
        np.testing.assert_array_equal(found.predicted(taken), predicted)
        every.append(taken)
    return every


@pytest.mark.parametrize("criterion", RELATIONS)
def test_every_criterion_is_decided_as_executed(criterion: str) -> None:
    graph, x = three_exits(criterion), images(60)
    levels = {"entropy": 1.0, "normalised_entropy": 0.7, "confidence": 0.6, "margin": 0.3}
    level = levels.get(criterion, 2.0)
    off, on = nobody(criterion), everybody(criterion)
    settings = [
        (level,) * 3, (off,) * 3, (on,) * 3, (off, on, off), (off, level, level), (level, off, on),
    ]  # fmt: skip
    taken = assert_decides_alike(graph, randomised(graph, 3), x, settings, 60)
    assert (taken[1] == 3).all()
    assert (taken[2] == 0).all()
    assert (taken[3] == 1).all()


def test_a_score_that_equals_its_threshold_is_decided_as_executed() -> None:
    for criterion in ("entropy", "normalised_entropy", "confidence", "margin"):
        graph, x = three_exits(criterion), images(40)
        store = randomised(graph, 1)
        found = scores(graph, store, x, batch=40)
        off = nobody(criterion)
        ties = [float(found.scores[0][k]) for k in (0, 7, 23)]
        settings = [(t, off, off) for t in ties]
        # Behind an exit that is off all rows are there, so the second exit's scores are the same.
        settings += [(off, float(found.scores[1][k]), off) for k in (0, 7, 23)]
        taken = assert_decides_alike(graph, store, x, settings, 40)
        assert all(t[k] != 0 for t, k in zip(taken[:3], (0, 7, 23))), "strict: a tie stays"


def test_patience_at_its_count_leaves() -> None:
    graph, x = three_exits("patience"), images(40)
    store = randomised(graph, 2)
    settings = [tuple(map(float, (a, b, c))) for a in (1, 2) for b in (1, 2, 3) for c in (2, 3, 4)]
    taken = assert_decides_alike(graph, store, x, settings, 40)
    assert any(len(set(t.tolist())) > 1 for t in taken)


@pytest.mark.parametrize(
    "build", [dense_net_with_exits, merge_and_run_with_exits, branches_of_every_kind]
)
@pytest.mark.parametrize("batch", [1, 7, 50])
def test_branchy_networks_in_batches_are_decided_as_executed(build, batch: int) -> None:  # type: ignore[no-untyped-def]
    graph, x = build(), images(50)
    store = randomised(graph, 4)
    found = scores(graph, store, x)
    # Off any score, so that the rounding of other batches does not decide.
    middle = [float(np.median(s)) + 1e-3 for s in found.scores]
    ends = [(t,) * len(middle) for t in (0.0, 10.0)]
    assert_decides_alike(graph, store, x, [tuple(middle), *ends], batch)


def test_the_relation_decides_ties_and_not_a_number_stays() -> None:
    values = np.array([0.5, 1.0, 1.5, np.nan])
    assert leave("entropy", values, 1.0).tolist() == [True, False, False, False]
    assert leave("confidence", values, 1.0).tolist() == [False, False, True, False]
    assert leave("patience", values, 1.0).tolist() == [False, True, True, False]


def test_the_store_and_the_graph_stay_as_they_are_in_training_form_too() -> None:
    graph = branches_of_every_kind()
    store = randomised(graph)
    before = {s: store[s].copy() for s in store}
    outputs = list(graph.outputs)
    plain = scores(graph, store, images(20), batch=10)
    trained = scores(graph, store, images(20), batch=10, training=True)
    assert list(graph.outputs) == outputs
    assert set(before) == set(store)
    for state, value in before.items():
        np.testing.assert_array_equal(store[state], value)
    assert not np.allclose(plain.scores[0], trained.scores[0]), "batch statistics and dropout"


def test_a_network_without_exits_or_samples_is_refused() -> None:
    graph = lenet()
    with pytest.raises(GraphError, match="no early exits"):
        scores(graph, randomised(graph), np.zeros((1, 1, 28, 28), np.float32))
    graph = dense_net_with_exits()
    with pytest.raises(GraphError, match="no samples"):
        scores(graph, randomised(graph), images(0))


def test_the_published_table_comes_out_of_derived_decisions_exactly() -> None:
    rows = json.loads(golden("branchynet/lenet_published_rows.json").read_text())["rows"]
    x, labels = mnist_test_set()
    graph, store = b_lenet(), Store()
    with np.load(golden("branchynet/lenet_mnist_100.npz")) as arrays:
        for state in graph.states:
            store[state] = arrays[exchange_name(state)]
    found = scores(graph, store, x, batch=500)
    assert len(rows) == 17
    for row in rows:
        taken = found.taken(row["T"])
        accuracy = 100 * float((found.predicted(taken) == labels).mean())
        shares = [100 * float((taken == k).mean()) for k in (0, 1)]
        assert round(accuracy, 2) == row["acc"], row
        assert [round(s, 2) for s in shares] == row["exit"], row
    last = (found.predictions[1] == labels).mean()
    assert round(100 * float(last), 2) == 99.01, "exit 2 only"
