"""Training: the joint loss, the loop, and that it learns what there is to learn."""

from __future__ import annotations

import numpy as np
import pytest
from builders import EXACT, images

from branchgraph.compiler import compile
from branchgraph.compiler.pipeline import compilations
from branchgraph.data import load
from branchgraph.ir.builder import dense, dropout
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret
from branchgraph.ir.optimisers import SGD, Adam, MomentumSGD
from branchgraph.ir.state import Role, Store
from branchgraph.ir.types import DType
from branchgraph.nets import network
from branchgraph.passes.cast import MixedPrecision
from branchgraph.passes.insert_exits import InsertExits
from branchgraph.passes.specialise import specialise
from branchgraph.training import Training, joint_loss, train

DIGITS = "lenet:size=8,kernel=3,widths=8+16+32"


def branchy() -> Graph:
    return InsertExits(after=("conv1",)).apply(network(DIGITS))


def test_the_joint_loss_is_the_weighted_sum_of_mean_cross_entropies() -> None:
    graph = joint_loss(specialise(branchy(), training=True))
    heads = [n.output for n in graph.nodes if n.op.opcode == "dense" and n.name == "fc"]
    for name, logits in zip(("exit1", "exit2"), heads):
        graph.output(f"{name} logits", logits)
    store = Store.initialised(graph.states)
    fed = {"x": images(6, channels=1, size=8), "labels": np.arange(6), "exit1.weight": 0.3}
    outputs = interpret(graph, fed, store, DType.F64).outputs
    total = 0.3 * outputs["exit1.loss"] + outputs["exit2.loss"]
    np.testing.assert_allclose(outputs["loss"], total, **EXACT)
    for name in ("exit1", "exit2"):
        z = outputs[f"{name} logits"]
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        expected = -np.log(p[np.arange(6), fed["labels"]]).mean()
        np.testing.assert_allclose(outputs[f"{name}.loss"], expected, rtol=1e-8)
        assert outputs[f"{name}.accuracy"] == (z.argmax(axis=1) == fed["labels"]).mean()


def test_gradients_of_the_trunk_are_the_sum_over_exits() -> None:
    net = branchy()
    training = Training.of(net, SGD(learning_rate=0.0))
    x, labels = images(6, channels=1, size=8), np.arange(6)
    conv1 = next(s for s in net.states if s.name == "conv1.weight")

    def gradient(**weights: float) -> np.ndarray:
        return training.step.gradients({"x": x, "labels": labels, **weights})[conv1]

    both = gradient()
    first = gradient(**{"exit2.weight": 0.0})
    last = gradient(**{"exit1.weight": 0.0})
    np.testing.assert_allclose(both, first + last, rtol=1e-4, atol=1e-6)
    assert np.abs(first).max() > 0
    assert np.abs(last).max() > 0


def test_epochs_do_not_compile_again() -> None:
    training = Training.of(branchy(), Adam())
    before = compilations()
    data = load("digits").subset(train=100)
    train(training, data.train_images, data.train_labels, epochs=2, batch=32)
    assert compilations() == before


def test_training_is_reproducible_from_the_seed_dropout_included() -> None:
    def run(seed: int) -> list[float]:
        graph = Graph("net")
        graph.output("logits", dense(dropout(graph.input("x", ("N", 1, 8, 8)), 0.3), 10))
        data = load("digits").subset(train=200)
        training = Training.of(graph, Adam(), seed=seed)
        history = train(
            training, data.train_images, data.train_labels, epochs=3, batch=64, seed=seed
        )
        return history.series("loss")

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_digits_are_learnt_and_shuffled_labels_are_not() -> None:
    data = load("digits")
    accuracies = {}
    for name, labels in {
        "right": data.train_labels,
        "shuffled": np.random.default_rng(0).permutation(data.train_labels),
    }.items():
        net = branchy()
        training = Training.of(net, Adam(learning_rate=0.003), seed=0)
        train(training, data.train_images, labels, epochs=8, batch=64)
        logits = compile(net, store=training.store)(x=data.test_images, **{"exit1.threshold": 0.0})[
            "logits"
        ]
        accuracies[name] = float((logits.argmax(axis=1) == data.test_labels).mean())
    assert accuracies["right"] > 0.85
    assert accuracies["shuffled"] < 0.3


def test_a_network_without_outputs_has_no_loss() -> None:
    graph = Graph("empty")
    graph.input("x", ("N", 3))
    with pytest.raises(GraphError, match="no outputs"):
        joint_loss(graph)


def test_labels_outside_the_classes_are_named() -> None:
    training = Training.of(branchy(), Adam())
    with pytest.raises(ShapeError, match=r"labels run from 3 to 12, expected 0..9"):
        training.step(x=images(2, channels=1, size=8), labels=np.array([3, 12]))


def test_examples_without_labels_are_refused() -> None:
    training = Training.of(branchy(), Adam())
    with pytest.raises(GraphError, match="a label an example, got 4 and 3"):
        train(training, images(4, channels=1, size=8), np.arange(3), epochs=1, batch=2)


# -- float16 ---------------------------------------------------------------------------------------


def test_a_step_that_overflows_is_left_out_and_lowers_the_loss_scale() -> None:
    low = MixedPrecision(dtype=DType.F16, loss_scale=2.0**30, dynamic=True).apply(branchy())
    training = Training.of(low, MomentumSGD(learning_rate=0.1), seed=3)
    (scale,) = (s for s in training.step.states if s.role is Role.LOSS_SCALE)
    held = [s for s in training.step.states if s.role in (Role.PARAMETER, Role.SLOT)]
    assert {s.name for s in held} >= {"conv1.weight", "conv1.weight.momentum_sgd.v"}
    fed = {"x": images(6, channels=1, size=8), "labels": np.arange(6)}
    first = {s: training.store[s].copy() for s in held}
    with np.errstate(all="ignore"):
        for k in (29, 28):
            training.step.run(fed)
            assert training.store[scale] == 2.0**k
            for state in held:
                np.testing.assert_array_equal(training.store[state], first[state], state.name)
        losses = [float(training.step.run(fed)["loss"]) for _ in range(60)]
    assert training.store[scale] == training.store[scale].clip(1, 2.0**20)
    assert losses[-1] < 0.5 * losses[0], "clean steps are taken"


def test_a_network_without_a_loss_scale_gets_no_states_for_one() -> None:
    low = MixedPrecision(dtype=DType.F16, loss_scale=64.0).apply(branchy())
    training = Training.of(low, SGD())
    assert not any("loss_scale" in s.name for s in training.step.states)
