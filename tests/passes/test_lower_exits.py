"""Early exits as row selection give what running every exit and choosing afterwards gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
from builders import (
    CLOSE,
    branches_of_every_kind,
    dense_net_with_exits,
    image_input,
    images,
    merge_and_run_with_exits,
    randomised,
)
from goldens import golden, mnist_test_set
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.compiler import compile
from branchgraph.ir.builder import conv, dense, exit, global_average_pool, relu
from branchgraph.ir.errors import RefusalError
from branchgraph.ir.graph import Graph, branch
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.exit import RELATIONS, Exit, ExitScore
from branchgraph.ir.ops.norm import BatchNormTraining
from branchgraph.ir.ops.rows import Compact
from branchgraph.ir.rebuild import bind
from branchgraph.ir.state import Store
from branchgraph.ir.verify import verify
from branchgraph.nets.branchynet import b_lenet, exchange_name
from branchgraph.passes.clean import DeadCode
from branchgraph.passes.lower_exits import lower_exits
from branchgraph.passes.specialise import specialise

NETWORKS = {
    "every kind": branches_of_every_kind,
    "dense net": dense_net_with_exits,
    "merge and run": merge_and_run_with_exits,
}


def leaves(criterion: str, logits: np.ndarray, threshold: float, agreed: np.ndarray) -> np.ndarray:
    """Which rows leave, by the definition of each criterion, in plain NumPy."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)
    top = np.sort(p, axis=1)
    return {
        "entropy": entropy < threshold,
        "normalised_entropy": entropy / np.log(p.shape[1]) < threshold,
        "confidence": p.max(axis=1) > threshold,
        "margin": top[:, -1] - top[:, -2] > threshold,
        "patience": agreed >= threshold,
    }[criterion]


def chosen(outputs: dict[str, np.ndarray], criterion: str, thresholds: list[float]):  # type: ignore[no-untyped-def]
    """Logits and exit number of every row, from the logits of all exits."""
    every = list(outputs.values())
    n = len(every[0])
    taken = np.full(n, len(every) - 1)
    done = np.zeros(n, bool)
    predictions = np.stack([z.argmax(axis=1) for z in every])
    for k, threshold in enumerate(thresholds):
        agreed = np.array([run_length(predictions[: k + 1, r]) for r in range(n)])
        left = leaves(criterion, every[k].astype(np.float64), threshold, agreed) & ~done
        taken[left] = k
        done |= left
    return np.stack([every[k][r] for r, k in enumerate(taken)]) if n else every[0], taken


def run_length(predictions: np.ndarray) -> int:
    """How many of the last predictions equal the last one, in a row."""
    k = 0
    while k < len(predictions) and predictions[-1 - k] == predictions[-1]:
        k += 1
    return k


def thresholds_of(graph: Graph) -> list[str]:
    return [name for name in graph.inputs if name.endswith(".threshold")]


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_selected_rows_get_the_logits_of_their_exit_in_input_order(name: str, data) -> None:  # type: ignore[no-untyped-def]
    graph = NETWORKS[name]()
    store = randomised(graph, data.draw(st.integers(0, 5)))
    count = data.draw(st.sampled_from([0, 1, 2, 17]))
    x = images(count, seed=data.draw(st.integers(0, 9)))
    everything = compile(specialise(graph, training=False, exits="all"), store=store)
    outputs = everything(x=x)
    names = thresholds_of(graph)
    scores = np.concatenate(
        [ExitScore("entropy").evaluate(z)[0] for z in list(outputs.values())[:-1]] or [np.zeros(0)]
    )
    # Off any score, so that rounding does not decide.
    middle = float(np.median(scores)) + 1e-3 if len(scores) else 1.0
    levels = [data.draw(st.sampled_from([0.0, middle, 10.0])) for _ in names]
    found = compile(graph, store=store).run({"x": x, **dict(zip(names, levels))})
    logits, taken = chosen(outputs, "entropy", levels)
    np.testing.assert_array_equal(found["exit"], taken)
    np.testing.assert_allclose(found["logits"], logits, **CLOSE)


@pytest.mark.parametrize("criterion", RELATIONS)
def test_every_criterion_follows_its_definition(criterion: str) -> None:
    graph = Graph("criteria")
    h = relu(conv(image_input(graph), 4, 3, pad=1))
    previous = []
    for k in (1, 2, 3):
        with branch(f"exit{k}"):
            logits = dense(global_average_pool(h), 4)
            exit(logits, f"exit{k}", criterion=criterion, threshold=0.0,
                 previous=previous if criterion == "patience" else ())  # fmt: skip
            previous.append(logits)
        h = relu(conv(h, 4, 3, pad=1))
    exit(dense(global_average_pool(h), 4), "exit4", last=True)
    x = images(40)
    level = {"entropy": 1.0, "normalised_entropy": 0.7, "confidence": 0.6, "margin": 0.3,
             "patience": 2.0}[criterion]  # fmt: skip
    fed = {"x": x, **dict.fromkeys(thresholds_of(graph), level)}
    separated = 0
    for seed in range(4):
        store = randomised(graph, seed)
        outputs = compile(specialise(graph, training=False, exits="all"), store=store)(x=x)
        found = compile(graph, store=store).run(fed)
        logits, taken = chosen(outputs, criterion, [level] * 3)
        separated += len(set(taken.tolist())) > 1
        np.testing.assert_array_equal(found["exit"], taken)
        np.testing.assert_allclose(found["logits"], logits, **CLOSE)
    assert separated, "in some network the level lets some samples leave and keeps others"


def test_rows_that_left_are_not_computed_further(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = dense_net_with_exits()
    run = compile(graph, store=randomised(graph))
    rows: list[int] = []
    original = Conv.evaluate
    monkeypatch.setattr(
        Conv, "evaluate", lambda self, *a: rows.append(len(a[0])) or original(self, *a)
    )
    run.run({"x": images(6), "exit1.threshold": 0.0, "exit2.threshold": 0.0})
    assert rows == [6, 6, 6, 6]
    rows.clear()
    run.run({"x": images(6), "exit1.threshold": 10.0})
    assert rows == [6, 6], "zero survivors skip the rest"


def test_a_concat_and_its_operands_cross_the_cut_once() -> None:
    lowered = lower_exits(dense_net_with_exits())
    verify(lowered)
    cuts = [n for n in lowered.nodes if isinstance(n.op, Compact)]
    first = [v.label for v in cuts[0].inputs[1:]]
    assert first == ["both"], "conv0 and conv1 are sliced from the compacted concat"


def test_what_head_and_trunk_share_is_computed_once_before_the_cut() -> None:
    graph = b_lenet()
    run = compile(graph)
    pools = [i for i in run.program.instructions if i.op.opcode == "max_pool"]
    shared = [i for i in pools if not i.in_branch]
    assert len(pools) == 4
    assert len(shared) == 3
    compact = next(i for i in run.program.instructions if i.op.opcode == "compact")
    assert str(compact.types[0]) == "f32[rows_1, 5, 15, 15]"


def closed_tails(early: int) -> Graph:
    """A network of `early` exits with heads of their own; its last logits are constant.

    Of three early exits, the one in the middle is constant, too.
    """
    graph = Graph("closed_tails")
    h = dense(graph.input("x", ("N", 4)), 4, name="stem")
    for k in range(early):
        with branch(f"exit{k + 1}"):
            logits = dense(relu(h), 3)
            if (early, k) == (3, 1):
                logits = graph.emit(Full(value=0.25, shape=logits.shape))
            exit(logits, f"exit{k + 1}", threshold=0.0)
        h = dense(h, 4, name=f"stage{k + 1}")
    shape = (h.shape[0], 3)
    constant = graph.emit(Full(value=2.0, shape=shape)) * 3.0
    exit(constant, "last", last=True)
    return DeadCode().apply(graph)


@pytest.mark.parametrize("early", [1, 2, 3])
def test_rows_that_stay_get_the_logits_that_no_input_reaches(early: int) -> None:
    graph = closed_tails(early)
    lowered = lower_exits(graph)
    verify(lowered)
    verify(DeadCode().apply(lowered))
    store = randomised(graph)
    x = np.random.default_rng(0).normal(size=(17, 4)).astype(np.float32)
    outputs = compile(specialise(graph, training=False, exits="all"), store=store)(x=x)
    level = float(np.median(ExitScore("entropy").evaluate(outputs["exit1"])[0])) + 1e-3
    for levels in ([level] * early, [0.0] * early, [10.0] * early):
        run = compile(specialise(graph, training=False), store=store)
        found = run.run({"x": x, **dict(zip(thresholds_of(graph), levels))})
        logits, taken = chosen(outputs, "entropy", levels)
        np.testing.assert_array_equal(found["exit"], taken)
        np.testing.assert_allclose(found["logits"], logits, **CLOSE)
    assert len(set(chosen(outputs, "entropy", [level] * early)[1].tolist())) > 1


# -- refusals --------------------------------------------------------------------------------------


def test_an_op_that_mixes_rows_after_an_exit_is_refused() -> None:
    graph = dense_net_with_exits()
    node = graph.find("conv2")
    x = node.output
    vectors = [graph.read(s) for s in graph.states if s.shape == (4,)][:2]
    mixed = graph.apply(BatchNormTraining(), x, *vectors, name="mixing")[0]
    for user in x.users:
        if user is not mixed.producer:
            graph.set_inputs(user, tuple(mixed if v is x else v for v in user.inputs))
    with pytest.raises(RefusalError, match="mixing.*mixes rows"):
        lower_exits(graph)


def test_another_output_is_refused_with_the_way_out() -> None:
    graph = dense_net_with_exits()
    graph.output("features", graph.find("both").output)
    with pytest.raises(RefusalError, match="output 'features' needs every row.*exits='all'"):
        lower_exits(graph)
    everything = specialise(graph, training=False, exits="all")
    assert list(everything.outputs) == ["exit1", "exit2", "exit3", "features"]


def test_a_batch_of_fixed_size_is_refused() -> None:
    with pytest.raises(RefusalError, match="symbol such as N"):
        lower_exits(bind(dense_net_with_exits(), N=4))


def test_an_exit_behind_the_last_one_is_refused() -> None:
    graph = Graph("behind")
    logits = exit(dense(graph.input("x", ("N", 4)), 4, name="fc"), "last", last=True)
    exit(dense(relu(logits), 4, name="fc"), "late", threshold=0.5)
    with pytest.raises(RefusalError, match="late stands behind the last exit.*remove_exits first"):
        lower_exits(graph)
    assert list(specialise(graph, training=False, exits="all").outputs) == ["last", "late"]


def test_a_network_without_a_last_exit_is_refused() -> None:
    graph = dense_net_with_exits()
    last = next(n for n in graph.nodes if isinstance(n.op, Exit) and len(n.inputs) == 1)
    graph.keep(output=lambda name: name != "exit3")
    graph.remove(last)
    with pytest.raises(RefusalError, match="the last exit"):
        lower_exits(graph)


# -- the published network -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> tuple[Graph, Store]:
    """B-LeNet with the weights its authors trained."""
    with np.load(golden("branchynet/lenet_mnist_100.npz")) as stored:
        arrays = dict(stored)
    graph, store = b_lenet(), Store()
    for state in graph.states:
        store[state] = arrays[exchange_name(state)]
    return graph, store


#: On real images the recorded entropies are within 2e-6. On the noise images, whose logits reach
#: 88, the recording's own float32 rounding is 3.5e-6 from exact arithmetic, and another order of
#: the same sums may be as far off on the other side.
ENTROPY = {"mnist": 2e-6, "random": 7e-6}


@pytest.mark.parametrize("source", ENTROPY)
def test_logits_and_entropies_of_the_published_network(published, source: str) -> None:  # type: ignore[no-untyped-def]
    graph, store = published
    with np.load(golden("branchynet/lenet_reference_io.npz")) as stored:
        recorded = dict(stored)
    run = compile(specialise(graph, training=False, exits="all"), store=store)
    outputs = run(x=recorded[f"{source}.x"])
    for name in ("exit1", "exit2"):
        np.testing.assert_allclose(
            outputs[name], recorded[f"{source}.logits_{name}"], rtol=0, atol=1e-4
        )
        expected = recorded[f"{source}.entropy_{name}"]
        (entropy,) = ExitScore("entropy").evaluate(outputs[name])
        np.testing.assert_allclose(entropy, expected, rtol=0, atol=ENTROPY[source])
        (of_recorded,) = ExitScore("entropy").evaluate(recorded[f"{source}.logits_{name}"])
        np.testing.assert_allclose(of_recorded, expected, rtol=0, atol=2e-6)


def test_all_seventeen_published_rows_are_reproduced_exactly(published) -> None:  # type: ignore[no-untyped-def]
    graph, store = published
    x, labels = mnist_test_set()
    rows = json.loads(golden("branchynet/lenet_published_rows.json").read_text())["rows"]
    assert len(rows) == 17
    run = compile(graph, store=store)
    for row in rows:
        parts = [
            run.run({"x": x[i : i + 500], "exit1.threshold": row["T"][0]})
            for i in range(0, len(x), 500)
        ]
        logits, taken = (np.concatenate([p[k] for p in parts]) for k in ("logits", "exit"))
        accuracy = 100 * float((logits.argmax(axis=1) == labels).mean())
        shares = [100 * float((taken == k).mean()) for k in (0, 1)]
        assert round(accuracy, 2) == row["acc"], row
        assert [round(s, 2) for s in shares] == row["exit"], row
