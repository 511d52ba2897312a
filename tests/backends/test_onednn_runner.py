"""Running on oneDNN: sizes that come and go, arrays of others, stores, threads, exits, forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.backends.onednn import library
from branchgraph.compiler import Executable, compile
from branchgraph.ir.builder import (
    batch_norm,
    conv,
    dense,
    dropout,
    exit,
    global_average_pool,
    max_pool,
    relu,
)
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, branch
from branchgraph.ir.initialisers import Normal
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.exit import RELATIONS, ExitScore
from branchgraph.ir.optimisers import MomentumSGD
from branchgraph.ir.state import State, Store
from branchgraph.nets import b_lenet
from branchgraph.passes.specialise import specialise
from branchgraph.training import Training
from branchgraph.training.loss import joint_loss
from tests.backends.against_numpy import assert_agree, check, pair, roundings, states_of
from tests.backends.libdnnl import require_libdnnl
from tests.builders import (
    branches_of_every_kind,
    dense_net_with_exits,
    image_input,
    images,
    merge_and_run_with_exits,
    randomised,
)

require_libdnnl()

ROUNDINGS = 500  # of the networks below, at most: three layers of up to 108 terms and a head


def small() -> Graph:
    """A convolution with batch norm, a pooling, a layer."""
    graph = Graph("small")
    h = relu(batch_norm(conv(image_input(graph), 5, 3, pad=1, name="conv"), name="bn"))
    graph.output("y", dense(max_pool(h, 2), 7, name="fc"))
    return graph


def training_step(rate: float = 0.05) -> Graph:
    """The training step of `small`, with dropout."""
    graph = Graph("learning")
    h = relu(batch_norm(conv(image_input(graph), 5, 3, pad=1, name="conv"), name="bn"))
    graph.output("logits", dense(dropout(max_pool(h, 2), 0.25), 3, name="fc"))
    whole = differentiate(joint_loss(specialise(graph, training=True)))
    return MomentumSGD(learning_rate=rate).attach(whole)


def labels(n: int, classes: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, n)


def state(graph: Graph, name: str) -> State:
    return next(s for s in graph.states if s.name == name)


def on_onednn(graph: Graph, store: Store | None = None) -> Executable:
    return compile(graph, "onednn", store=randomised(graph) if store is None else store)


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small, training_step], ids=["inference", "training"])
def test_sizes_come_and_go(make: Callable[[], Graph]) -> None:
    graph = make()
    expected, found = pair(graph, randomised(graph))
    for run, n in enumerate([4, 1, 7, 4, 2, 1, 4]):
        feeds = {"x": images(n, seed=run)}
        if "labels" in graph.inputs:
            feeds["labels"] = labels(n, seed=run)
        count = roundings(graph, N=n) * (run + 1)
        assert_agree(found.run(feeds), expected.run(feeds), count, f"run {run}")


def test_no_samples_give_no_rows() -> None:
    check(small(), {"x": images(0)}, randomised(small()), count=1)


@pytest.mark.parametrize("make", [small, branches_of_every_kind], ids=["plain", "exits"])
def test_no_samples_between_some(make: Callable[[], Graph]) -> None:
    graph = make()
    expected, found = pair(graph, randomised(graph))
    for n in (3, 0, 3, 0, 2):
        feeds = {"x": images(n)}
        assert_agree(found.run(feeds), expected.run(feeds), ROUNDINGS, f"{n} samples")


def test_more_sizes_than_are_remembered() -> None:
    graph = Graph("line")
    graph.output("y", relu(dense(graph.input("x", ("N", 3)), 2)))
    store = randomised(graph)
    run, reference = on_onednn(graph, store), compile(graph, "numpy", store=store)
    x = np.random.default_rng(0).normal(size=(90, 3)).astype(np.float32)
    for n in (*range(90), 1, 89):
        assert_agree(run(x=x[:n]), reference(x=x[:n]), 3 + 8 + 8, f"{n} rows")


# -- inputs and outputs ----------------------------------------------------------------------------


def variants(x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The same numbers, lying in memory in other ways."""
    yield "of Fortran", np.asfortranarray(x)
    yield "channels last", np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    yield "every other row", np.repeat(x, 2, axis=0)[::2]
    yield "backwards", np.ascontiguousarray(x[:, :, ::-1, ::-1])[:, :, ::-1, ::-1]
    memory = np.zeros(x.nbytes + 1, np.uint8)
    unaligned = memory[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    yield "unaligned", unaligned
    frozen = x.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen
    yield "of float64", x.astype(np.float64)
    yield "swapped bytes", x.astype(x.dtype.newbyteorder())


def test_inputs_may_lie_anyhow_and_are_left_alone() -> None:
    run = on_onednn(small())
    x = images(3)
    expected = run(x=x)["y"]
    for name, other in variants(x):
        before = other.copy()
        np.testing.assert_array_equal(run(x=other)["y"], expected, err_msg=name)
        np.testing.assert_array_equal(other, before, err_msg=name)


def test_a_broadcast_input() -> None:
    run = on_onednn(small())
    x = np.broadcast_to(images(1), (4, 3, 6, 6))
    np.testing.assert_array_equal(run(x=x)["y"], run(x=x.copy())["y"])


def test_outputs_are_fresh_and_belong_to_the_caller() -> None:
    graph = small()
    graph.output("again", graph.outputs["y"])
    graph.output("x", graph.inputs["x"])
    run = on_onednn(graph)
    x = images(3)
    first = run(x=x)
    kept = {name: y.copy() for name, y in first.items()}
    assert all(y.flags.writeable and y.flags.c_contiguous for y in first.values())
    assert not np.shares_memory(first["y"], first["again"])
    assert not np.shares_memory(first["x"], x)
    for y in first.values():
        y[...] = np.nan
    for name, y in run(x=x).items():
        np.testing.assert_array_equal(y, kept[name])
        assert not np.shares_memory(y, first[name])
    run(x=images(3, seed=9))
    assert all(np.isnan(y).all() for y in first.values())


def test_a_state_as_an_output_is_a_copy() -> None:
    graph = small()
    weight = state(graph, "fc.weight")
    graph.output("weight", graph.read(weight))
    store = randomised(graph)
    run = on_onednn(graph, store)
    given_out = run(x=images(2))["weight"]
    np.testing.assert_array_equal(given_out, store[weight])
    given_out[...] = 0
    assert np.any(store[weight])


def test_gradients_are_copies() -> None:
    graph = training_step(rate=0.0)
    run = on_onednn(graph)
    feeds = {"x": images(4), "labels": labels(4)}
    first = run.gradients(feeds)
    kept = {s: g.copy() for s, g in first.items()}
    run.run({"x": images(4, seed=5), "labels": labels(4, seed=5)})
    assert_agree(first, kept, 0)


# -- stores ----------------------------------------------------------------------------------------


def test_edits_of_the_holder_of_an_array_are_seen() -> None:
    graph = small()
    store = randomised(graph)
    run = on_onednn(graph, store)
    x = images(3)
    for name in ("conv.weight", "bn.gamma", "bn.running_var", "fc.weight", "fc.bias"):
        held = store[state(graph, name)]
        before = run(x=x)["y"]
        held *= 1.5
        after = run(x=x)["y"]
        assert np.abs(after - before).max() > 1e-3, name
        reference = compile(graph, "numpy", store=store.copy())
        assert_agree({"y": after}, reference(x=x), ROUNDINGS, name)


def test_edits_right_after_a_training_step_are_seen() -> None:
    graph = training_step()
    store = randomised(graph)
    run = on_onednn(graph, store)
    held = store[state(graph, "fc.weight")]
    feeds = {"x": images(4), "labels": labels(4)}
    for k in range(3):
        reference = compile(graph, "numpy", store=store.copy())
        assert_agree(run.run(feeds), reference.run(feeds), ROUNDINGS, f"step {k}")
        held[...] = np.random.default_rng(k).normal(size=held.shape)


def test_replaced_arrays_are_seen() -> None:
    graph = small()
    store = randomised(graph)
    run = on_onednn(graph, store)
    x = images(3)
    run(x=x)
    for seed in (1, 2):
        other = randomised(graph, seed)
        for s in graph.states:
            store[s] = other[s]
        reference = compile(graph, "numpy", store=other)
        assert_agree(run(x=x), reference(x=x), ROUNDINGS, f"values {seed}")


@pytest.mark.parametrize("make", [small, training_step], ids=["inference", "training"])
def test_states_of_fortran_order(make: Callable[[], Graph]) -> None:
    graph = make()
    store = randomised(graph)
    held = Store()
    for s in graph.states:
        held.commit(s, np.array(store[s], order="F"))
    assert not held.peek(state(graph, "conv.weight")).flags.c_contiguous
    expected, found = compile(graph, "numpy", store=store), compile(graph, "onednn", store=held)
    feeds = {"x": images(4)} | ({"labels": labels(4)} if "labels" in graph.inputs else {})
    for k in range(3):
        count = ROUNDINGS * (k + 1)
        assert_agree(found.run(feeds), expected.run(feeds), count, f"run {k}")
        everywhere = list(graph.states)
        assert_agree(states_of(held, everywhere), states_of(store, everywhere), count, "state")
        for s in (state(graph, "conv.weight"), state(graph, "fc.weight")):
            for one in (store, held):
                one.peek(s)[...] *= 1.25
                one[s]  # handed out, so that it counts as edited


def test_two_executables_over_one_store_see_each_other() -> None:
    graph = training_step()
    store = randomised(graph)
    learning, again = on_onednn(graph, store), on_onednn(graph, store)
    other = compile(graph, "numpy", store=store.copy())
    for k in range(6):
        feeds = {"x": images(4, seed=k), "labels": labels(4, seed=k)}
        found = (learning if k % 2 else again).run(feeds)
        assert_agree(found, other.run(feeds), ROUNDINGS * (k + 1), f"step {k}")


def test_inference_follows_training_over_one_store() -> None:
    graph = branches_of_every_kind()
    store = randomised(graph)
    training = Training.of(graph, MomentumSGD(learning_rate=0.05), backend="onednn", store=store)
    infer = compile(specialise(graph, training=False, exits="all"), "onednn", store=store)
    x = images(4)
    seen = []
    for k in range(3):
        training.step.run({"x": x, "labels": labels(4, 5, seed=k)})
        reference = compile(specialise(graph, training=False, exits="all"), store=store.copy())
        found = infer(x=x)
        assert_agree(found, reference(x=x), ROUNDINGS, f"after step {k}")
        seen.append(found["exit2"])
    assert not np.allclose(seen[0], seen[1])
    assert not np.allclose(seen[1], seen[2])


@pytest.mark.parametrize("scaled", ["output", "update"])
def test_an_update_in_place_is_not_taken_for_the_value_before(scaled: str) -> None:
    """Reordered copies of the old value are not the new one's, and old readers stay in front."""
    graph = Graph("twice")
    shape = (8, 8, 3, 3)
    weight, other = (State(name, shape, init=Normal(1.0)) for name in ("weight", "other"))
    old = graph.read(weight)
    y = graph.emit(Conv((1, 1), (1, 1, 1, 1), (1, 1)), graph.input("x", shape), old)
    new = old * 0.5
    graph.update(weight, new)
    graph.update(other, y * new)  # the product is made behind the new weight
    if scaled == "output":
        graph.output("y", y * old)
    store = Store.initialised(graph.states)
    expected, found = (compile(graph, b, store=store.copy()) for b in ("numpy", "onednn"))
    assert found._runner.program.donated, "the weight is not updated in place"  # type: ignore[attr-defined]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert_agree(found.run({"x": x}), expected.run({"x": x}), 72)
    both = [weight, other]
    assert_agree(states_of(found.store, both), states_of(expected.store, both), 72)


# -- threads ---------------------------------------------------------------------------------------


def in_threads(*jobs: Callable[[], None]) -> None:
    """Run jobs side by side; what one raises is raised here."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def repeated(run: Executable, seed: int) -> Callable[[], None]:
    """Runs `run` over batches of changing size; every result must be what one thread gave."""
    batches = [images(n, seed=seed + n) for n in (3, 1, 4)]
    expected = [run(x=x)["y"] for x in batches]

    def job() -> None:
        for _ in range(15):
            for x, y in zip(batches, expected):
                np.testing.assert_array_equal(run(x=x)["y"], y)

    return job


def test_threads_queue_at_one_executable() -> None:
    run = on_onednn(small())
    in_threads(*(repeated(run, seed) for seed in (10, 20, 30)))


def test_threads_with_executables_of_their_own() -> None:
    graph = small()
    store = randomised(graph)
    in_threads(*(repeated(on_onednn(graph, store), seed) for seed in (10, 20)))


def test_an_executable_made_in_a_thread_runs_in_another() -> None:
    made: list[Executable] = []
    x = images(3)
    graph = small()
    in_threads(lambda: made.append(on_onednn(graph)))
    expected = compile(graph, "numpy", store=randomised(graph))(x=x)
    assert_agree(made[0](x=x), expected, ROUNDINGS)


@pytest.mark.parametrize("count", [1, 2])
def test_thread_counts(count: int) -> None:
    before = library.threads()
    library.set_threads(count)
    try:
        for make in (small, training_step):
            graph = make()
            feeds = {"x": images(5)} | ({"labels": labels(5)} if "labels" in graph.inputs else {})
            check(graph, feeds, randomised(graph), runs=2)
    finally:
        library.set_threads(before)


# -- exits -----------------------------------------------------------------------------------------

#: Scores nearer to their threshold than this may fall on either side.
UNDECIDED = 2e-6
NETWORKS = {
    "every kind": branches_of_every_kind,
    "dense net": dense_net_with_exits,
    "merge and run": merge_and_run_with_exits,
}


def criteria(criterion: str) -> Graph:
    """A network of three early exits of one kind."""
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
    return graph


def decided(graph: Graph, store: Store, x: np.ndarray, criterion: str, level: float) -> np.ndarray:
    """Which samples no exit scores within `UNDECIDED` of the level."""
    if criterion == "patience" or not len(x):
        return np.ones(len(x), bool)
    every = compile(specialise(graph, training=False, exits="all"), store=store.copy())(x=x)
    scores = [ExitScore(criterion).evaluate(z)[0] for z in list(every.values())[:-1]]
    return np.all([np.abs(s - level) > UNDECIDED for s in scores], axis=0)


def check_exits(graph: Graph, criterion: str, levels: list[float], sizes: list[int]) -> set[int]:
    """Choices and logits are those of NumPy; the exits that were taken."""
    store = randomised(graph, 2)
    expected, found = pair(graph, store)
    thresholds = [n for n in graph.inputs if n.endswith(".threshold")]
    shape = tuple(int(str(d)) for d in graph.inputs["x"].shape[1:])
    taken: set[int] = set()
    for level in levels:
        for n in sizes:
            x = np.random.default_rng(n).normal(size=(n, *shape)).astype(np.float32)
            feeds = {"x": x, **dict.fromkeys(thresholds, level)}
            ours, theirs = found.run(feeds), expected.run(feeds)
            sure = decided(graph, store, x, criterion, level)
            np.testing.assert_array_equal(ours["exit"][sure], theirs["exit"][sure])
            same = ours["exit"] == theirs["exit"]
            count = roundings(graph, N=max(1, n))
            logits = {"logits": ours["logits"][same]}, {"logits": theirs["logits"][same]}
            assert_agree(*logits, count, f"{n} samples at {level}")
            taken.update(theirs["exit"].tolist())
    return taken


#: Levels by criterion: some samples leave.
SOME = {
    "entropy": 1.0,
    "normalised_entropy": 0.7,
    "confidence": 0.6,
    "margin": 0.3,
    "patience": 2.0,
}


@pytest.mark.parametrize("criterion", RELATIONS)
def test_every_criterion_chooses_as_on_numpy(criterion: str) -> None:
    graph = criteria(criterion)
    levels = [-1.0, SOME[criterion], 10.0]  # one of the outer ones lets all leave, the other none
    taken = check_exits(graph, criterion, levels, list(range(10)))
    assert {0, 3} <= taken, "all samples left at the first exit, or at the last"


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_exits_choose_as_on_numpy(name: str) -> None:
    check_exits(NETWORKS[name](), "entropy", [0.0, 1.2, 1.5, 10.0], [0, 1, 2, 3, 5, 8, 17])


def test_b_lenet_chooses_as_on_numpy() -> None:
    levels = [0.0, 0.5, 1.0, 1.5, 2.0, 10.0]
    taken = check_exits(b_lenet(), "entropy", levels, [1, 2, 3, 5, 8, 9])
    assert taken == {0, 1}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(list(NETWORKS)), st.lists(st.sampled_from([0.0, 1.3, 1.5, 10.0]), max_size=4)
)
def test_survivors_of_one_run_do_not_reach_the_next(name: str, levels: list[float]) -> None:
    graph = NETWORKS[name]()
    store = randomised(graph)
    run = on_onednn(graph, store)
    thresholds = [n for n in graph.inputs if n.endswith(".threshold")]
    for k, level in enumerate(levels):
        feeds = {"x": images(7 - k, seed=k), **dict.fromkeys(thresholds, level)}
        alone = on_onednn(graph, store.copy()).run(feeds)
        for key, value in run.run(feeds).items():
            np.testing.assert_array_equal(value, alone[key])


# -- forks -----------------------------------------------------------------------------------------

FORKING = """
import os
import numpy as np
from branchgraph.compiler import compile
from branchgraph.ir.builder import conv
from branchgraph.ir.graph import Graph

graph = Graph("forked")
graph.output("y", conv(graph.input("x", ("N", 3, 16, 16)), 16, 3, pad=1))
x = np.ones((4, 3, 16, 16), np.float32)
run = compile(graph, "onednn")
run(x=x)
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    try:
        ATTEMPT
        message = "ran"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    os.write(writing, message.encode())
    os._exit(0)
os.close(writing)
print(os.read(reading, 4096).decode())
os.waitpid(child, 0)
run(x=x)
print("the parent goes on")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")
@pytest.mark.parametrize("attempt", ["run(x=x)", "compile(graph, 'onednn')(x=x)"])
def test_a_forked_child_is_refused(attempt: str) -> None:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING.replace("ATTEMPT", attempt)],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    refusal, parent = found.stdout.strip().splitlines()
    assert refusal.startswith("ForkedError: "), refusal
    assert "spawn" in refusal
    assert parent == "the parent goes on"
