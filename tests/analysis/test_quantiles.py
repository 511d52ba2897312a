"""Thresholds from the share of samples that is to stay."""

from __future__ import annotations

import numpy as np
import pytest
from builders import branches_of_every_kind, dense_net_with_exits, images, randomised
from criteria import three_exits

from branchgraph.analysis.decisions import scores
from branchgraph.analysis.quantiles import quantile_thresholds
from branchgraph.compiler import compile
from branchgraph.ir.errors import GraphError, RefusalError


@pytest.mark.parametrize("keep", [1.0, 0.75, 0.5, 0.33, 0.1, 0.001])
def test_the_threshold_is_the_entropy_at_the_index_of_the_rule(keep: float) -> None:
    graph = dense_net_with_exits()
    store, x = randomised(graph), images(41)
    found = quantile_thresholds(graph, store, x, keep)
    for k, values in enumerate(scores(graph, store, x).scores):
        ascending = sorted(values.tolist())
        index = int(41 - keep * 41)
        assert found.thresholds[k] == ascending[index]
        assert found.scores[k].tolist() == ascending
        assert found.stay[k] == pytest.approx((41 - index) / 41)


def test_each_exit_counts_all_samples_and_can_have_its_own_share() -> None:
    graph = dense_net_with_exits()
    store, x = randomised(graph), images(40)
    found = quantile_thresholds(graph, store, x, (0.25, 0.5), batch=40)
    assert found.stay == (0.25, 0.5)
    first, second = found.thresholds
    # Executed: all 40 reach exit 2 when exit 1 is off, and half of them stay.
    run = compile(graph, store=store)
    taken = run.run({"x": x, "exit1.threshold": 0.0, "exit2.threshold": second})["exit"]
    assert (taken == 1).sum() == 20
    taken = run.run({"x": x, "exit1.threshold": first, "exit2.threshold": 0.0})["exit"]
    assert (taken == 0).sum() == 30


@pytest.mark.parametrize("criterion", ["confidence", "margin"])
def test_where_larger_is_more_confident_the_rule_is_mirrored(criterion: str) -> None:
    graph = three_exits(criterion)
    store, x = randomised(graph), images(40)
    found = quantile_thresholds(graph, store, x, 0.25, batch=40)
    assert found.stay == (0.25, 0.25, 0.25)
    assert found.thresholds[0] == sorted(found.scores[0], reverse=True)[30]
    names = [f"exit{k}.threshold" for k in (1, 2, 3)]
    setting = dict(zip(names, (found.thresholds[0], 1.0, 1.0)))
    assert (compile(graph, store=store).run({"x": x, **setting})["exit"] == 0).sum() == 30


def test_keeping_all_lets_nobody_leave() -> None:
    for graph in (dense_net_with_exits(), three_exits("confidence")):
        found = quantile_thresholds(graph, randomised(graph), images(20), 1.0)
        assert set(found.stay) == {1.0}


def test_the_smallest_share_keeps_one_sample() -> None:
    graph = dense_net_with_exits()
    found = quantile_thresholds(graph, randomised(graph), images(20), 1e-20)
    assert found.thresholds[0] == found.scores[0][-1]
    assert found.stay[0] == pytest.approx(0.05)


def test_the_training_form_is_another_network_and_leaves_the_store_alone() -> None:
    graph = branches_of_every_kind()
    store, x = randomised(graph), images(30)
    before = {s: store[s].copy() for s in store}
    plain = quantile_thresholds(graph, store, x, 0.5)
    trained = quantile_thresholds(graph, store, x, 0.5, training=True)
    assert plain.thresholds != trained.thresholds
    assert all(np.array_equal(store[s], v) for s, v in before.items())


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, float("nan")])
def test_shares_outside_their_range_are_refused(keep: float) -> None:
    graph = dense_net_with_exits()
    with pytest.raises(GraphError, match="above 0 and at most 1"):
        quantile_thresholds(graph, randomised(graph), images(4), keep)


def test_patience_has_no_quantiles_and_says_why() -> None:
    graph = three_exits("patience")
    with pytest.raises(RefusalError, match="patience counts exits.*1, 2"):
        quantile_thresholds(graph, randomised(graph), images(4), 0.5)
    graph = dense_net_with_exits()
    with pytest.raises(GraphError, match="2 early exits need 2"):
        quantile_thresholds(graph, randomised(graph), images(4), (0.5,))
