"""Gradients are nodes: joint losses, seeds, rule overrides, and the golden branchy LeNet."""

from __future__ import annotations

import numpy as np
import pytest
from builders import EXACT, branches_of_every_kind, images, random_graphs, randomised
from goldens import golden
from hypothesis import given, settings

from branchgraph.ir.builder import conv, dense, exit, max_pool, relu
from branchgraph.ir.errors import GradientError
from branchgraph.ir.gradient import differentiate, vjp
from branchgraph.ir.graph import Graph, Value, branch
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import make
from branchgraph.ir.ops.activation import Relu
from branchgraph.ir.ops.loss import CrossEntropy
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.optimisers import MomentumSGD
from branchgraph.ir.state import State, Store
from branchgraph.ir.types import DType
from branchgraph.passes.specialise import specialise

#: Where the golden network keeps the parameters of our layers.
LAYERS = {
    "conv1": "conv1",
    "exit1/conv": "branch/0",
    "exit1/fc": "branch/1",
    "conv2": "conv2",
    "conv3": "conv3",
    "fc4": "fc4",
    "fc5": "fc5",
}
SUFFIXES = {"weight": "W", "bias": "b"}
#: The manifest's tolerances for this network (float32 summation order).
TOLERANCE = {
    "logits": {"rtol": 1e-4, "atol": 4.2e-6},
    "loss": {"rtol": 1e-4, "atol": 2.7e-6},
    "grad": {"rtol": 1e-4, "atol": 4.2e-7},
    "xgrad": {"rtol": 1e-4, "atol": 1e-7},
    "param": {"rtol": 1e-4, "atol": 5.8e-7},
    "entropy": {"rtol": 1e-4, "atol": 2.3e-6},
}


def branchy_lenet() -> Graph:
    """The network of the recording, joint loss 0.3 exit1 + 1.0 exit2 over labels other than -1."""
    graph = Graph("branchy_lenet")
    h = conv(graph.input("x", ("N", 1, 28, 28)), 5, 5, pad=3, name="conv1")
    with branch("exit1"):
        e = conv(relu(max_pool(h, 2, cover_all=True)), 10, 3, pad=1, name="conv")
        first = dense(relu(max_pool(e, 2, cover_all=True)), 10, name="fc")
        exit(first, "exit1", threshold=0.5)
    for name, width in (("conv2", 10), ("conv3", 20)):
        h = conv(relu(max_pool(h, 2, cover_all=True)), width, 5, pad=3, name=name)
    h = dense(relu(max_pool(h, 2, cover_all=True)), 84, name="fc4")
    second = dense(h, 10, name="fc5")
    exit(second, "exit2", last=True)
    labels = graph.input("t", ("N",), DType.I32)
    loss = ignoring(first, labels) * 0.3 + ignoring(second, labels)
    graph.output("loss", loss)
    return graph


def ignoring(logits: Value, labels: Value) -> Value:
    """Cross-entropy averaged over the labels that are not -1 (7 of the 8 recorded ones)."""
    each = logits.graph.emit(CrossEntropy(ignore_label=-1), logits, labels)
    return logits.graph.emit(ReduceSum(axes=(0,)), each) / 7.0


def loaded(graph: Graph, arrays: dict[str, np.ndarray]) -> Store:
    store = Store()
    for state in graph.states:
        layer, suffix = state.name.rsplit(".", 1)
        store[state] = arrays[f"{LAYERS[layer]}/{SUFFIXES[suffix]}"]
    return store


def golden_name(state: State) -> str:
    layer, suffix = state.name.rsplit(".", 1)
    return f"{LAYERS[layer]}/{SUFFIXES[suffix]}"


@pytest.fixture(scope="module")
def recording() -> dict[str, dict[str, np.ndarray]]:
    names = ("data", "init_params", "expected")
    return {n: dict(np.load(golden(f"chainer/networks/branchy_lenet_{n}.npz"))) for n in names}


def test_joint_loss_and_every_gradient_of_the_golden_network(recording) -> None:  # type: ignore[no-untyped-def]
    expected = recording["expected"]
    graph = specialise(branchy_lenet(), training=True)
    leaves = [graph.read(s) for s in graph.states]
    found = vjp(graph, {graph.outputs["loss"]: None}, [graph.inputs["x"], *leaves])
    for value, cotangent in found.items():
        graph.output(f"d {value.label}", cotangent)
    outputs = interpret(graph, recording["data"], loaded(graph, recording["init_params"])).outputs
    np.testing.assert_allclose(outputs["loss"], expected["train/loss"], **TOLERANCE["loss"])
    for k in (0, 1):
        np.testing.assert_allclose(
            outputs[f"exit{k + 1}"], expected[f"train/logits/{k}"], **TOLERANCE["logits"]
        )
    np.testing.assert_allclose(outputs["d x"], expected["train/xgrad"], **TOLERANCE["xgrad"])
    for leaf in leaves:
        assert leaf.state is not None
        key = f"train/grad/{golden_name(leaf.state)}"
        np.testing.assert_allclose(outputs[f"d {leaf.label}"], expected[key], **TOLERANCE["grad"])


def test_one_momentum_step_with_weight_decay_gives_the_golden_parameters(recording) -> None:  # type: ignore[no-untyped-def]
    graph = differentiate(specialise(branchy_lenet(), training=True))
    for state, gradient in list(graph.gradients.items()):
        graph.set_gradient(state, gradient + graph.read(state) * 5e-4)
    step = MomentumSGD(learning_rate=0.05).attach(graph)
    store = loaded(graph, recording["init_params"])
    store.initialise(step.states)
    updates = interpret(step, recording["data"], store).updates
    for state in graph.states:
        key = f"step/param/{golden_name(state)}"
        np.testing.assert_allclose(updates[state], recording["expected"][key], **TOLERANCE["param"])


@settings(max_examples=25, deadline=None)
@given(random_graphs())
def test_gradients_of_random_graphs_agree_with_differences(graph: Graph) -> None:
    training = specialise(graph, training=True)
    # A smooth scalar of the logits, in a random direction.
    direction = training.input("direction", ("N", 5))
    product = training.outputs["logits"] * direction
    training.output("loss", training.emit(ReduceSum(axes=(0, 1)), product))
    with_gradients = differentiate(training)
    store = randomised(with_gradients)
    rng = np.random.default_rng(3)
    fed = {"x": images(), "direction": rng.normal(size=(5, 5))}
    run = interpret(with_gradients, fed, store, precision=DType.F64)
    steps = {s: rng.normal(size=s.shape) for s in with_gradients.gradients}
    analytic = sum(float((run.gradients[s] * d).sum()) for s, d in steps.items())

    def loss_at(t: float) -> float:
        moved = _MovedStore(store, steps, t)
        return float(interpret(training, fed, moved, precision=DType.F64).outputs["loss"])

    eps = 1e-6
    numeric = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
    # Kinks of relu and maximum may lie within eps of a value: allow a loose match then.
    assert analytic == pytest.approx(numeric, rel=2e-3, abs=2e-3 * (1 + abs(analytic)))


class _MovedStore(Store):
    """A store read at `base + t * direction`, in float64."""

    def __init__(self, base: Store, directions: dict[State, np.ndarray], t: float) -> None:
        super().__init__()
        self.base, self.directions, self.t = base, directions, t

    def __getitem__(self, state: State) -> np.ndarray:
        value = self.base[state]
        moved = self.directions.get(state)
        return value if moved is None else value.astype(np.float64) + self.t * moved


def test_a_seed_is_any_cotangent() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 3), DType.F64)
    seed = graph.input("seed", ("N", 3), DType.F64)
    y = graph.emit(make("tanh"), x)
    graph.output("dx", vjp(graph, {y: seed}, [x])[x])
    a, s = np.random.default_rng(0).normal(size=(2, 4, 3))
    found = interpret(graph, {"x": a, "seed": s}).outputs["dx"]
    np.testing.assert_allclose(found, s * (1 - np.tanh(a) ** 2), **EXACT)


def test_a_rule_override_is_guided_back_propagation() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N",), DType.F64)
    seed = graph.input("seed", ("N",), DType.F64)

    def guided(node, cotangents, wanted):  # type: ignore[no-untyped-def]
        (dx,) = node.op.gradient(node, cotangents, wanted)
        return (relu(dx),)

    y = relu(x)
    graph.output("plain", vjp(graph, {y: seed}, [x])[x])
    graph.output("guided", vjp(graph, {y: seed}, [x], rules={Relu: guided})[x])
    fed = {"x": np.array([1.0, 1.0, -1.0]), "seed": np.array([2.0, -2.0, 2.0])}
    outputs = interpret(graph, fed).outputs
    assert outputs["plain"].tolist() == [2.0, -2.0, 0.0]
    assert outputs["guided"].tolist() == [2.0, 0.0, 0.0]


def test_values_that_nothing_flows_to_get_no_cotangent() -> None:
    graph = Graph("g")
    x, z = graph.input("x", ("N",)), graph.input("z", ("N",))
    assert vjp(graph, {relu(x): None}, [x, z]).keys() == {x}


def test_a_declared_op_must_be_specialised_first() -> None:
    graph = branches_of_every_kind()
    with pytest.raises(GradientError, match="specialise"):
        vjp(graph, {graph.outputs["exit2"]: None}, [graph.inputs["x"]])


def test_the_loss_must_be_one_number() -> None:
    graph = specialise(branches_of_every_kind(), training=True)
    with pytest.raises(GradientError, match="single number"):
        differentiate(graph, "exit1")
    with pytest.raises(GradientError, match="no output 'nothing'"):
        differentiate(graph, "nothing")


def test_second_derivatives_through_a_convolution() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 2, 5, 5), DType.F64)
    y = graph.emit(make("tanh"), conv(x, 3, 3, pad=1))
    first = vjp(graph, {y: None}, [x])[x]
    squared = first * first
    second = vjp(graph, {squared: None}, [x])[x]
    graph.output("squared", graph.emit(ReduceSum(axes=(0, 1, 2, 3)), squared))
    graph.output("second", second)
    store = randomised(graph)
    rng = np.random.default_rng(0)
    a, d = rng.normal(size=(2, 2, 2, 5, 5))
    eps = 1e-6
    run = {t: interpret(graph, {"x": a + t * d}, store).outputs for t in (0.0, eps, -eps)}
    numeric = (run[eps]["squared"] - run[-eps]["squared"]) / (2 * eps)
    analytic = float((run[0.0]["second"] * d).sum())
    assert analytic == pytest.approx(float(numeric), rel=1e-6)
