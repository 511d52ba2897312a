"""Horizontal fusion by measurement: what is timed, how decisions are kept, and that numbers stay.

No test looks at the clock: the stopwatch is replaced, or runs a backend that says made-up times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from branchgraph.backends.numpy import BACKEND as NUMPY
from branchgraph.backends.onednn import library
from branchgraph.compiler import compile, horizontal
from branchgraph.compiler.backend import Backend, Observer, Options, Results, Work
from branchgraph.compiler.horizontal import (
    VARIABLE,
    Decisions,
    Times,
    Trial,
    TuningError,
    fuse_horizontally,
    stopwatch,
)
from branchgraph.compiler.program import Program
from branchgraph.ir.builder import (
    batch_norm,
    concat,
    conv,
    dense,
    global_average_pool,
    relu,
    sigmoid,
)
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, branch
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.merge import Concat, Sum
from branchgraph.ir.ops.reshape import Split
from branchgraph.ir.optimisers import MomentumSGD
from branchgraph.ir.state import State, Store
from branchgraph.passes.checking import check_claim, random_feeds, random_store
from branchgraph.passes.specialise import specialise
from branchgraph.training import Training, joint_loss

FUSED, APART = Times(2e-5, 1e-5), Times(1e-5, 1e-5)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # float32, sums of some hundred terms in another order


class Fast:
    """NumPy, as a backend for which graphs are rewritten."""

    name = "fast"
    optimises = True

    def __init__(self, described: str = "fast 1.0, 1 threads") -> None:
        self.described = described

    def missing(self) -> str:
        return ""

    def describe(self) -> str:
        return self.described

    def load(self, program: Program, options: Options) -> object:
        return NUMPY.load(program)


class Recorded:
    """A stopwatch that always shows the same times and counts how often it is asked."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self.trials: list[Trial] = []

    def __call__(self, trial: Trial, backend: Backend) -> Times:
        self.trials.append(trial)
        return self.times


@pytest.fixture(autouse=True)
def measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "measure")


def siblings(outputs: int = 3) -> Graph:
    """Two convolutions of one input with norms and ReLU, joined, and `outputs` classes."""
    graph = Graph("siblings")
    x = graph.input("x", ("N", 3, 6, 6))
    parts = []
    for name, filters in (("left", 4), ("right", 5)):
        with branch(name):
            parts.append(relu(conv(x, filters, 3, pad=1, name="conv")))
    y = batch_norm(conv(concat(*parts), 6, 1, name="joined"))
    graph.output("logits", dense(global_average_pool(relu(y)), outputs))
    return graph


def summed() -> Graph:
    """The sum of two dense layers of one input, and classes."""
    graph = Graph("summed")
    x = graph.input("x", ("N", 12))
    parts = [relu(dense(x, 7, name=name)) for name in ("a", "b")]
    graph.output("logits", dense(graph.emit(Sum(), *parts), 3, name="c"))
    return graph


def stacked() -> Graph:
    """Two convolutions of different values, joined, and classes."""
    graph = Graph("stacked")
    x = graph.input("x", ("N", 4, 6, 6))
    parts = [conv(y, 5, 3, pad=1, name=f"on{k}") for k, y in enumerate((relu(x), sigmoid(x)))]
    graph.output("logits", dense(global_average_pool(concat(*parts)), 3))
    return graph


NETS: list[Callable[[], Graph]] = [siblings, summed, stacked]


def layers(graph: Graph) -> int:
    return sum(isinstance(n.op, (Conv, Dense)) for n in graph.nodes)


def fused(
    graph: Graph, measure: Recorded | None = None, decisions: Decisions | None = None,
    backend: Backend | None = None, **options: object,
) -> Graph:  # fmt: skip
    return fuse_horizontally(
        graph, backend or Fast(), measure=measure or Recorded(FUSED),
        decisions=decisions or Decisions(), **options,
    )  # fmt: skip


def outputs(graph: Graph, store: Store, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return compile(graph, store=store.copy()).run(feeds)


# -- what is decided -------------------------------------------------------------------------------


def test_a_family_is_fused_if_that_was_clearly_faster() -> None:
    graph = specialise(siblings(), training=False)
    assert layers(fused(graph)) == layers(graph) - 1
    for times in (APART, Times(1.04e-5, 1e-5)):
        assert layers(fused(graph, Recorded(times))) == layers(graph)


def test_the_argument_is_not_changed() -> None:
    graph = specialise(siblings(), training=False)
    before = layers(graph)
    fused(graph)
    assert layers(graph) == before


def test_a_backend_that_takes_graphs_as_they_are_gets_them_so() -> None:
    graph = specialise(siblings(), training=False)
    assert fuse_horizontally(graph, NUMPY) is graph


@pytest.mark.parametrize("mode", ["off", "cost"])
def test_without_measuring_nothing_is_timed_or_kept(
    mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, mode)
    measure, decisions = Recorded(FUSED), Decisions(tmp_path / "kept.json")
    graph = specialise(siblings(), training=False)
    after = fused(graph, measure, decisions)
    assert not measure.trials
    assert not any(tmp_path.iterdir())
    assert (after is graph) == (mode == "off")


def test_the_cost_model_decides_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "cost")
    graph = specialise(siblings(), training=False)
    first, second = (layers(fused(graph, batch=1)) for _ in range(2))
    assert first == second == layers(graph) - 1, "what is joined again costs no copies"


def test_the_cost_model_leaves_images_alone_whose_parts_are_read_by_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "cost")
    graph = Graph("apart")
    x = graph.input("x", ("N", 3, 6, 6))
    for k in range(2):
        graph.output(f"y{k}", conv(relu(conv(x, 4, 3, name=f"a{k}")), 2, 1, name=f"b{k}"))
    assert layers(fused(graph, batch=1)) == 4


def test_another_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    with pytest.raises(TuningError, match=r"\$BRANCHGRAPH_TUNING is 'always'; set it to one of"):
        fused(specialise(siblings(), training=False))


# -- how decisions are kept ------------------------------------------------------------------------


def test_a_decision_is_made_once() -> None:
    measure, decisions = Recorded(FUSED), Decisions()
    graph = specialise(siblings(), training=False)
    for _ in range(2):
        fused(graph, measure, decisions)
    assert len(measure.trials) == 1
    fused(specialise(siblings(outputs=9), training=False), measure, decisions)
    assert len(measure.trials) == 1, "what stands elsewhere in the network does not matter"


def test_a_decision_is_for_one_size_one_mode_and_one_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure, decisions = Recorded(APART), Decisions()
    graph = specialise(siblings(), training=False)
    fused(graph, measure, decisions)
    fused(graph, measure, decisions, batch=3)
    fused(graph, measure, decisions, training=True)
    fused(graph, measure, decisions, Fast("fast 1.0, 2 threads"))
    monkeypatch.setattr(horizontal, "processor", lambda: "another")
    fused(graph, measure, decisions)
    assert len(measure.trials) == 5


def test_decisions_are_kept_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "kept.json"
    measure = Recorded(FUSED)
    graph = specialise(siblings(), training=False)
    for _ in range(2):
        assert layers(fused(graph, measure, Decisions(path))) == layers(graph) - 1
    assert len(measure.trials) == 1
    assert [p.name for p in path.parent.iterdir()] == ["kept.json"], "no part of it is left over"


def test_what_another_process_has_written_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    mine, other = Decisions(path), Decisions(path)
    assert mine.get("a") is None
    other.put("b", FUSED)
    mine.put("a", APART)
    assert (Decisions(path).get("a"), Decisions(path).get("b")) == (APART, FUSED)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 1}', '{"format": 0, "seconds": {"k": [1, 2]}}',
     '{"format": 1, "seconds": {"k": [1]}}', '{"format": 1, "seconds": {"k": ["a", "b"]}}',
     '{"format": 1, "seconds": {"k": [0, 1]}}', '{"format": 1, "seconds": []}'],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_ignored_and_written_anew(
    content: str, tmp_path: Path
) -> None:
    path = tmp_path / "kept.json"
    path.write_text(content)
    decisions = Decisions(path)
    assert decisions.get("k") is None
    decisions.put("new", FUSED)
    assert Decisions(path).get("new") == FUSED
    assert list(json.loads(path.read_text())["seconds"]) == ["new"]


def test_bytes_that_are_no_text_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert Decisions(path).get("k") is None


def test_a_file_that_cannot_be_written_is_said_and_memory_keeps_the_decision(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    decisions = Decisions(tmp_path / "file" / "kept.json")
    with pytest.warns(UserWarning, match="measurements are not kept: .*BRANCHGRAPH_TUNING=cost"):
        decisions.put("k", FUSED)
    decisions.put("l", APART)
    assert (decisions.get("k"), decisions.get("l")) == (FUSED, APART)


# -- what is timed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_both_forms_compute_the_same(net: Callable[[], Graph], training: bool) -> None:
    measure = Recorded(APART)
    fused(specialise(net(), training=training), measure, training=training, batch=2)
    assert measure.trials
    for trial in measure.trials:
        check_claim(trial.apart, trial.fused, "exact")
        assert not any(isinstance(d, str) for v in trial.apart.inputs.values() for d in v.shape)
        assert bool(trial.apart.updates) == training
        assert list(trial.apart.updates) == list(trial.fused.updates)


def test_what_reads_a_family_is_timed_with_it() -> None:
    measure = Recorded(APART)
    fused(specialise(siblings(), training=False), measure)
    (trial,) = measure.trials
    opcodes = [n.op.opcode for n in trial.apart.nodes]
    assert opcodes.count("conv") == 3, "two siblings, and the one that reads both"
    assert opcodes.count("relu") == 2


def test_in_training_kernels_are_assembled_in_every_step() -> None:
    measure = Recorded(APART)
    fused(specialise(siblings(), training=True), measure, training=True)
    (trial,) = measure.trials
    joined = [n for n in trial.fused.nodes if isinstance(n.op, Concat)]
    assert any(all(v.state in trial.fused.updates for v in n.inputs) for n in joined)


class Scripted(Fast):
    """Says that every instruction takes a millisecond, and each run more than the one before."""

    def load(self, program: Program, options: Options) -> object:
        return _Script(program)


class _Script:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.runs = 0

    def run(
        self, arguments: Mapping[str, np.ndarray], states: object, version: int = 0,
        observer: Observer | None = None,
    ) -> Results:  # fmt: skip
        assert observer is not None
        assert list(arguments) == [a.name for a in self.program.arguments]
        self.runs += 1
        for instruction in self.program.instructions:
            observer(Work("made up", (instruction,)), 1e-3 * (1 + 0.001 * self.runs))
        return Results([], [], [])


def test_the_stopwatch_adds_up_kernels_and_takes_medians() -> None:
    measure = Recorded(APART)
    fused(specialise(siblings(), training=False), measure)
    (trial,) = measure.trials
    times = stopwatch(trial, Scripted())
    middle = 1.0 + 0.001 * (2 + (horizontal._ROUNDS + 1) // 2)
    # Weights that only states decide are no instructions; the fused form has one conv fewer, and
    # a ReLU fewer since it stands before the split, which is joined again.
    assert times.apart == pytest.approx(7e-3 * middle - 1e-3 * middle)
    assert times.fused == pytest.approx(times.apart - 3e-3 * middle)


# -- splits stand late -----------------------------------------------------------------------------


def test_what_is_done_to_every_part_is_done_before_the_split() -> None:
    graph = specialise(siblings(), training=False)
    after = fused(graph)
    assert not any(isinstance(n.op, Split) for n in after.nodes), "the parts are joined again"
    assert sum(n.op.opcode == "relu" for n in after.nodes) == 2
    check_claim(graph, after, "exact")


def test_a_part_that_is_read_twice_keeps_the_split_where_it_is() -> None:
    graph = Graph("twice")
    x = graph.input("x", ("N", 3, 5, 5))
    a, b = conv(x, 4, 3, name="a"), conv(x, 4, 3, name="b")
    graph.output("y", relu(a) + relu(b))
    graph.output("a", a)
    after = fused(graph)
    split = next(n for n in after.nodes if isinstance(n.op, Split))
    assert isinstance(split.inputs[0].producer.op, Conv)  # type: ignore[union-attr]
    check_claim(graph, after, "exact")


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_a_fused_network_is_the_same_function(net: Callable[[], Graph]) -> None:
    graph = specialise(net(), training=False)
    after = fused(graph)
    assert layers(after) < layers(graph)
    assert set(after.states) == set(graph.states)
    check_claim(graph, after, "exact")


@pytest.mark.parametrize("net", NETS)
def test_training_a_fused_network_is_training_the_network(net: Callable[[], Graph]) -> None:
    declared = net()
    apart = specialise(declared, training=True)
    together = fused(apart, training=True)
    assert layers(together) < layers(apart)
    whole = differentiate(joint_loss(apart))
    store = random_store({*whole.states}, [*whole.states])
    feeds = {**random_feeds(declared, sizes={"N": 4}), "labels": np.array([0, 2, 1, 1])}
    runs = [_trained(graph, store.copy(), feeds) for graph in (apart, together)]
    for found, expected in zip(*runs):
        assert set(found) == set(expected)
        for state, value in expected.items():
            np.testing.assert_allclose(found[state], value, **CLOSE, err_msg=state.name)


def _trained(
    graph: Graph, store: Store, feeds: Mapping[str, np.ndarray]
) -> tuple[dict[State, np.ndarray], dict[State, np.ndarray]]:
    """Gradients of the first step, and all states after five."""
    training = differentiate(joint_loss(graph))
    gradients = compile(training, store=store.copy()).gradients(feeds)
    step = compile(MomentumSGD().attach(training), store=store)
    for _ in range(5):
        step.run({**feeds, "learning_rate": 0.01})
    return gradients, {s: store[s] for s in graph.states}


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Everything proposed for oneDNN is fused, and nothing is kept for the user."""
    if not library.available():
        pytest.skip("oneDNN is not installed")
    measure, decisions = Recorded(FUSED), Decisions()
    monkeypatch.setattr(horizontal, "stopwatch", measure)
    monkeypatch.setattr(horizontal, "_decisions", lambda: decisions)
    return measure


@pytest.mark.parametrize("net", NETS)
def test_compile_fuses_for_a_backend_that_optimises(
    net: Callable[[], Graph], onednn: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = net()
    store = random_store({*graph.states}, [*graph.states])
    feeds = random_feeds(graph, sizes={"N": 4})
    executable = compile(graph, "onednn", store=store)
    assert onednn.trials
    monkeypatch.setenv(VARIABLE, "off")
    apart = compile(graph, "onednn", store=store)
    assert _calls(executable.program) < _calls(apart.program), "programs are remembered by mode"
    expected = compile(graph, store=store).run(feeds)["logits"]
    np.testing.assert_allclose(executable.run(feeds)["logits"], expected, **CLOSE)


def _calls(program: Program) -> int:
    return sum(isinstance(i.op, (Conv, Dense)) for i in program.instructions)


@pytest.mark.parametrize("net", NETS)
def test_training_fuses_for_a_backend_that_optimises(
    net: Callable[[], Graph], onednn: Recorded
) -> None:
    graph = net()
    store = random_store({*graph.states}, [*graph.states])
    feeds = {**random_feeds(graph, sizes={"N": 4}), "labels": np.array([0, 2, 1, 1])}
    runs = [Training.of(graph, MomentumSGD(), backend=b, store=store.copy())
            for b in ("numpy", "onednn")]  # fmt: skip
    assert _calls(runs[1].step.program) < _calls(runs[0].step.program)
    for training in runs:
        for _ in range(5):
            training.step.run({**feeds, "learning_rate": 0.01})
    for state in graph.states:
        np.testing.assert_allclose(runs[1].store[state], runs[0].store[state], **CLOSE)
