"""Training that goes on after a pass."""

from __future__ import annotations

import numpy as np
from builders import images

from branchgraph.compiler import compile
from branchgraph.ir.builder import batch_norm, concat, conv, dense, global_average_pool, relu
from branchgraph.ir.graph import Graph
from branchgraph.ir.hooks import WeightDecay
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.optimisers import Adam
from branchgraph.ir.state import Role
from branchgraph.ir.types import DType
from branchgraph.passes.cast import MixedPrecision
from branchgraph.passes.fold_batch_norm import FoldBatchNorm
from branchgraph.passes.materialise import composed, materialise, origin_of, provenance
from branchgraph.passes.pipeline import pipeline
from branchgraph.passes.share_weights import ShareWeights
from branchgraph.passes.specialise import specialise
from branchgraph.training import Training, train
from branchgraph.training.rewriting import continued


def network() -> Graph:
    graph = Graph("net")
    h = relu(batch_norm(conv(graph.input("x", ("N", 3, 6, 6)), 4, 3, pad=1, name="conv")))
    graph.output("logits", dense(global_average_pool(h), 5, name="fc"))
    return graph


def trained() -> tuple[Graph, Training]:
    graph = network()
    training = Training.of(graph, Adam(hooks=(WeightDecay(1e-3),)), seed=1)
    x, labels = images(40), np.arange(40) % 5
    train(training, x, labels, epochs=3, batch=8)
    return graph, training


def test_a_folded_network_trains_on_from_where_it_was() -> None:
    graph, training = trained()
    folded = FoldBatchNorm().apply(specialise(graph, training=False))
    x = images(7)
    before = compile(graph, store=training.store)(x=x)["logits"]
    found = continued(training, folded)
    after = compile(found.graph, store=found.training.store)(x=x)["logits"]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    assert {s.name for s in found.reset} == {"conv.weight", "conv.bias"}
    assert "optimiser slots reset for conv.weight" in str(found)
    sources = {s.name: {o.name for o in below} for s, below in provenance(found.origin).items()}
    assert "batch_norm.gamma" in sources["conv.weight"]
    labels = np.arange(7) % 5
    losses = [float(found.training.step(x=x, labels=labels)["loss"]) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_slots_move_with_parameters_that_only_move() -> None:
    graph = Graph("net")
    x = graph.input("x", ("N", 3, 6, 6))
    h = conv(x, 4, 3, pad=1, name="conv")
    graph.output("logits", dense(global_average_pool(relu(h)), 5, name="fc"))
    training = Training.of(graph, Adam(), seed=1)
    train(training, images(40), np.arange(40) % 5, epochs=2, batch=8)
    weight = next(s for s in graph.states if s.name == "conv.weight")
    swapped = Graph("swapped")
    w = swapped.read(weight)
    halves = [swapped.emit(Slice(axis=0, start=k, size=2), w) for k in (2, 0)]
    h = conv(swapped.input("x", ("N", 3, 6, 6)), 4, 3, pad=1, weight=concat(*halves, axis=0))
    swapped.output("logits", dense(global_average_pool(relu(h)), 5, name="fc"))
    found = continued(training, swapped)
    assert not found.reset
    assert str(found) == "all optimiser slots carried"
    (new,) = (s for s in found.graph.states if s.shape == (4, 3, 3, 3))
    old_slot = training.optimiser.slots[weight, "m"]
    new_slot = found.training.optimiser.slots[new, "m"]
    assert new_slot.role is Role.SLOT
    value = training.store[old_slot]
    assert np.abs(value).max() > 0
    np.testing.assert_array_equal(
        found.training.store[new_slot], np.concatenate([value[2:], value[:2]])
    )


def test_branches_that_share_weights_train_on_from_the_plain_network() -> None:
    graph, training = trained()
    result = ShareWeights(branches=2, shared=(0.5,)).run(graph)
    found = continued(training, result.graph, origin=result.report.origin)
    assert not found.reset
    x = images(7)
    plain = compile(graph, store=training.store)(x=x)["logits"]
    branches = compile(found.graph, store=found.training.store)(x=x)
    for value in branches.values():
        np.testing.assert_allclose(value, plain, rtol=1e-4, atol=1e-5)
    labels = np.arange(7) % 5
    losses = [float(found.training.step(x=x, labels=labels)["loss"]) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_a_pipeline_of_passes_that_make_states_carries_values_and_slots() -> None:
    graph, training = trained()
    steps = ("share_weights:branches=2,shared=0", "split_ensemble:branch=branch2")
    result = pipeline(*steps, "share_weights:branches=2,shared=0.5").run(graph)
    origin = result.report.origin
    assert origin is not None
    # The states between the two steps are gone; everything comes from the trained network.
    assert {s for found in provenance(origin).values() for s in found} <= set(graph.states)
    found = continued(training, result.graph, origin=origin)
    assert not found.reset
    moved = [s for (s, name) in found.training.optimiser.slots if s in origin.updates]
    assert any(training.store[found.training.optimiser.slots[s, "m"]].any() for s in moved)
    x = images(7)
    plain = compile(graph, store=training.store)(x=x)["logits"]
    for value in compile(found.graph, store=found.training.store)(x=x).values():
        np.testing.assert_allclose(value, plain, rtol=1e-4, atol=1e-5)


def test_leaves_of_a_pipeline_train_on() -> None:
    graph, training = trained()
    steps = ("share_weights:branches=2,shared=0.5", "specialise", "fold_batch_norm")
    result = pipeline(*steps).run(graph)
    leaves, own = materialise(result.graph)
    assert result.report.origin is not None
    whole = origin_of(leaves.states, composed(result.report.origin, own))
    assert set(whole.updates) == set(leaves.states)
    found = continued(training, leaves, origin=whole)
    x = images(7)
    plain = compile(graph, store=training.store)(x=x)["logits"]
    for value in compile(found.graph, store=found.training.store)(x=x).values():
        np.testing.assert_allclose(value, plain, rtol=1e-4, atol=1e-5)
    labels = np.arange(7) % 5
    losses = [float(found.training.step(x=x, labels=labels)["loss"]) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_a_moving_loss_scale_is_no_parameter_of_a_continued_network() -> None:
    low = MixedPrecision(dtype=DType.F16, loss_scale=2.0**30, dynamic=True).apply(network())
    training = Training.of(low, Adam(), seed=1)
    found = continued(training, low)
    scales = [s for s in found.training.step.states if s.role is Role.LOSS_SCALE]
    assert [s.name for s in scales] == ["loss_scale"]
    assert not found.origin.updates
    x, labels = images(7), np.arange(7) % 5
    with np.errstate(all="ignore"):
        losses = [float(found.training.step(x=x, labels=labels)["loss"]) for _ in range(60)]
    assert found.training.store[scales[0]] < 2.0**30
    assert losses[-1] < losses[0]
