"""A spike of the lazy Chainer recorder (DESIGN, step 6), kept because it may still bend the core.

A hundred lines record user programs op by op, compile the pending part when a value is asked for,
and meet the demands that could break the core: two compilations in a hundred iterations, no second
forward when the loss is read before `backward`, fed arrays copied, handed-out arrays shared,
statistics that move though nobody asks. Findings are in `docs/architecture.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from builders import CLOSE

from branchgraph.compiler import Executable, compile
from branchgraph.ir.builder import cross_entropy
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.op import Op
from branchgraph.ir.ops.activation import Relu
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.loss import CrossEntropy
from branchgraph.ir.ops.norm import BatchNorm
from branchgraph.ir.ops.reduce import ReduceMean
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.optimisers import SGD
from branchgraph.ir.rebuild import Rebuild
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType, TensorType
from branchgraph.passes.specialise import specialise

# -- the recorder ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Var:
    """A recorded value: known once its program ran."""

    type: TensorType
    array: np.ndarray | None = None


@dataclass(eq=False)
class Param(Var):
    state: State = field(kw_only=True)


@dataclass
class Recorder:
    """What happened since the last run; `done` is what ran but may be differentiated yet."""

    store: Store = field(default_factory=Store)
    calls: list[tuple[Op, tuple[Var, ...], Var]] = field(default_factory=list)
    done: list[tuple[Op, tuple[Var, ...], Var]] = field(default_factory=list)
    backward_of: Var | None = None
    rate: float | None = None
    programs: dict[object, Executable] = field(default_factory=dict)
    inputs: dict[object, set[str]] = field(default_factory=dict)
    types: dict[tuple[Op, tuple[TensorType, ...]], TensorType] = field(default_factory=dict)

    def feed(self, array: np.ndarray) -> Var:
        return Var(TensorType(array.shape, DType.of(array.dtype)), array.copy())

    def call(self, op: Op, *inputs: Var) -> Var:
        key = (op, tuple(v.type for v in inputs))
        type = self.types.get(key)
        if type is None:
            type = self.types[key] = op.infer(*key[1])[0]
        out = Var(type)
        self.calls.append((op, inputs, out))
        return out

    def value(self, var: Var) -> np.ndarray:
        if var.array is None:
            self.flush()
        assert var.array is not None
        return var.array

    def flush(self) -> None:
        """Run what is pending: forward calls, the backward pass, the update."""
        if not self.calls and self.backward_of is None:
            return
        leaves, key = self._key()
        if key not in self.programs:
            graph = self._graph(leaves)
            self.programs[key] = compile(graph, store=self.store)
            self.inputs[key] = set(graph.inputs)
        run = self.programs[key]
        fed = {f"v{i}": v.array for i, v in enumerate(leaves) if not isinstance(v, Param)}
        outputs = run.run({n: a for n, a in fed.items() if n in self.inputs[key]})
        for (_, _, out), array in zip(self.calls, outputs.values()):
            out.array = array
        self.done = [] if self.backward_of is not None else [*self.done, *self.calls]
        self.calls, self.backward_of, self.rate = [], None, None

    def _key(self) -> tuple[list[Var], object]:
        """Leaves in order of use, and the structure of what is pending."""
        numbers: dict[Var, int] = {}
        leaves: list[Var] = []
        trace = []
        for op, inputs, out in (*self.done, *self.calls):
            for v in inputs:
                if v not in numbers:
                    numbers[v] = len(numbers)
                    leaves.append(v)
            trace.append((op, tuple((numbers[v], v.type) for v in inputs)))
            numbers[out] = len(numbers)
            if out.array is not None:
                leaves.append(out)
        ran = len(self.done)
        target = numbers.get(self.backward_of) if self.backward_of is not None else None
        return leaves, (tuple(trace), ran, target, self.rate)

    def _graph(self, leaves: list[Var]) -> Graph:
        graph = Graph("pending")
        values: dict[Var, Value] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Param):
                values[leaf] = graph.read(leaf.state)
            else:
                values[leaf] = graph.input(f"v{i}", leaf.type.shape, leaf.type.dtype)
        known = {v: value.name for v, value in values.items() if value.is_input}
        for op, inputs, out in (*self.done, *self.calls):
            values[out] = graph.emit(op, *(values[v] for v in inputs))
        for k, (_, _, out) in enumerate(self.calls):
            graph.output(f"o{k}", values[out])
        for _, _, out in self.done:
            graph.output(f"known {known[out]}", values[out])
        if self.backward_of is not None:
            graph.output("loss", values[self.backward_of])
        return _Cut(self._with_update(specialise(graph, training=True))).run()

    def _with_update(self, lowered: Graph) -> Graph:
        """The gradients and the update that `step` asked for."""
        if self.backward_of is None:
            return lowered
        states = [s for s in lowered.reads if s.role.trainable]
        found = vjp(lowered, {lowered.outputs["loss"]: None}, [lowered.read(s) for s in states])
        for value, cotangent in found.items():
            assert value.state is not None
            lowered.set_gradient(value.state, cotangent)
        lowered.keep(output=lambda name: name != "loss")
        return SGD(learning_rate=self.rate or 0.0).attach(lowered)


class _Cut(Rebuild):
    """Values that were computed before become inputs, so that nothing runs twice."""

    def begin(self) -> None:
        named = {n: v for n, v in self.old.outputs.items() if n.startswith("known ")}
        self.known = {v: n.partition(" ")[2] for n, v in named.items()}
        self.old.keep(output=lambda name: name not in named)

    def visit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        if len(node.outputs) == 1 and node.output in self.known:
            return (self.new.inputs[self.known[node.output]],)
        return super().visit(node, inputs)


# -- user programs ---------------------------------------------------------------------------------


class Net:
    """conv, batch norm, relu, dense: a Chain in miniature."""

    def __init__(self, recorder: Recorder) -> None:
        rng = np.random.default_rng(0)
        self.recorder = recorder
        self.params = {
            "conv": self._param("conv", rng.normal(size=(4, 1, 3, 3)) * 0.3),
            "gamma": self._param("gamma", np.ones(4)),
            "beta": self._param("beta", np.zeros(4)),
            "mean": self._param("mean", np.zeros(4), Role.STATISTIC),
            "var": self._param("var", np.ones(4), Role.STATISTIC),
            "fc": self._param("fc", rng.normal(size=(3, 64)) * 0.1),
        }

    def _param(self, name: str, value: np.ndarray, role: Role = Role.PARAMETER) -> Param:
        state = State(name, value.shape, role=role)
        self.recorder.store[state] = value
        return Param(state.type, state=state)

    def array(self, name: str) -> np.ndarray:
        self.recorder.flush()
        return self.recorder.store[self.params[name].state]

    def logits(self, x: np.ndarray, normed: bool = False) -> Var:
        r, p = self.recorder, self.params
        h = r.call(Conv((1, 1), (1, 1, 1, 1), (1, 1)), r.feed(x), p["conv"])
        if normed:
            statistics = (p[k] for k in ("gamma", "beta", "mean", "var"))
            h = r.call(BatchNorm(), h, *statistics)
        h = r.call(Relu(), h)
        flat = r.call(Reshape((x.shape[0], 64)), h)
        return r.call(Dense(), flat, p["fc"])

    def loss(self, x: np.ndarray, labels: np.ndarray, normed: bool = False) -> Var:
        r = self.recorder
        each = r.call(CrossEntropy(), self.logits(x, normed), r.feed(labels))
        return r.call(ReduceMean((0,)), each)

    def step(self, loss: Var, rate: float) -> None:
        self.recorder.backward_of = loss
        self.recorder.rate = rate
        self.recorder.flush()


RNG = np.random.default_rng(1)
X = RNG.normal(size=(100, 6, 1, 4, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, size=(100, 6))


def eager_losses(steps: int, rate: float) -> list[float]:
    """The same training with a graph declared once."""
    net = Net(Recorder())
    graph = Graph("declared")
    x, t = graph.input("x", (6, 1, 4, 4)), graph.input("t", (6,), "i64")
    states = {n: p.state for n, p in net.params.items()}
    conv = Conv((1, 1), (1, 1, 1, 1), (1, 1))
    h = graph.emit(Relu(), graph.emit(conv, x, graph.read(states["conv"])))
    flat = graph.emit(Reshape((6, 64)), h)
    loss = cross_entropy(graph.emit(Dense(), flat, graph.read(states["fc"])), t)
    graph.output("loss", loss)
    for s, g in zip(("conv", "fc"), vjp(graph, {loss: None},
                    [graph.read(states["conv"]), graph.read(states["fc"])]).values()):  # fmt: skip
        graph.set_gradient(states[s], g)
    step = compile(SGD(learning_rate=rate).attach(graph), store=net.recorder.store)
    return [float(step(x=X[i], t=LABELS[i])["loss"]) for i in range(steps)]


def test_a_hundred_iterations_compile_once_and_give_the_declared_numbers() -> None:
    net = Net(Recorder())
    losses = []
    for i in range(100):
        loss = net.loss(X[i], LABELS[i])
        net.step(loss, rate=0.1)
        losses.append(float(net.recorder.value(loss)))
    assert len(net.recorder.programs) == 1
    np.testing.assert_allclose(losses, eager_losses(100, 0.1), **CLOSE)


def test_reading_the_loss_first_compiles_twice_and_runs_forward_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forwards: list[int] = []
    original = Conv.evaluate
    monkeypatch.setattr(Conv, "evaluate", lambda s, *a: forwards.append(1) or original(s, *a))
    net = Net(Recorder())
    losses = []
    for i in range(20):
        loss = net.loss(X[i], LABELS[i])
        losses.append(float(net.recorder.value(loss)))
        net.step(loss, rate=0.1)
    assert len(net.recorder.programs) == 2
    assert len(forwards) == 20
    np.testing.assert_allclose(losses, eager_losses(20, 0.1), **CLOSE)


def test_a_buffer_the_user_reuses_was_copied_when_it_was_recorded() -> None:
    net = Net(Recorder())
    buffer = X[0].copy()
    logits = net.logits(buffer)
    buffer[...] = 0.0
    expected = Net(Recorder())
    np.testing.assert_array_equal(
        net.recorder.value(logits), expected.recorder.value(expected.logits(X[0]))
    )


def test_an_array_that_was_handed_out_is_seen_and_goes_on_being_updated() -> None:
    net = Net(Recorder())
    held = net.array("fc")
    held[...] = 0.0
    assert not net.recorder.value(net.logits(X[0])).any()
    net.step(net.loss(X[0], LABELS[0]), rate=0.1)
    assert held.any(), "the update wrote into the array the user holds"


def test_statistics_move_though_nobody_asked_for_a_value() -> None:
    net = Net(Recorder())
    net.logits(X[0], normed=True)
    assert net.array("mean").any()
