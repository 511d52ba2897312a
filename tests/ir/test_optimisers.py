"""Optimiser rules against their formulas, step by step, and as one compiled step."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from goldens import golden

from branchgraph.compiler import compile
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.op import make
from branchgraph.ir.optimisers import OPTIMISERS, SGD, Adam, MomentumSGD, Optimiser
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType

STEPS = 6


def fed_gradient(shape: tuple[int, ...] = (4,), dtype: DType = DType.F64) -> tuple[Graph, State]:
    """A graph whose gradient is an input, so that rules can be followed by hand."""
    graph = Graph("rule")
    state = State("p", shape, dtype)
    graph.read(state)
    graph.set_gradient(state, graph.input("g", shape, dtype))
    return graph, state


def by_hand(optimiser: Optimiser, p: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The rule in plain NumPy."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        if isinstance(optimiser, Adam):
            b1, b2 = optimiser.beta1, optimiser.beta2
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            rate = optimiser.learning_rate * math.sqrt(1 - b2**t) / (1 - b1**t)
            p = p - rate * m / (np.sqrt(v) + optimiser.eps)
        elif isinstance(optimiser, MomentumSGD):
            v = optimiser.momentum * v - optimiser.learning_rate * g
            p = p + v
        else:
            p = p - optimiser.learning_rate * g
    return p


RULES = [
    SGD(),
    SGD(learning_rate=0.3),
    MomentumSGD(),
    MomentumSGD(momentum=0.5),
    Adam(),
    Adam(learning_rate=0.1, beta1=0.5, beta2=0.9, eps=1e-3),
]


@pytest.mark.parametrize("optimiser", RULES, ids=repr)
def test_steps_follow_the_formula(optimiser: Optimiser) -> None:
    graph, state = fed_gradient()
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=4), rng.normal(size=(STEPS, 4))
    store = Store({state: start})
    step = compile(optimiser.attach(graph), store=store)
    for g in gradients:
        step(g=g)
    np.testing.assert_allclose(store[state], by_hand(optimiser, start, gradients), rtol=1e-12)


def test_every_optimiser_is_followed() -> None:
    assert {type(o) for o in RULES} == set(OPTIMISERS.values())


def test_the_learning_rate_is_an_input_with_a_default() -> None:
    graph, state = fed_gradient()
    store = Store({state: np.zeros(4)})
    step = compile(SGD(learning_rate=0.5).attach(graph), store=store)
    step(g=np.ones(4))
    step(g=np.ones(4), learning_rate=2.0)
    assert store[state].tolist() == [-2.5] * 4


def test_scalars_are_computed_in_float64_and_cast_once() -> None:
    graph, state = fed_gradient(dtype=DType.F32)
    store = Store({state: np.zeros(4)})
    step = compile(Adam(learning_rate=1e-3).attach(graph), store=store)
    g = np.full(4, 0.5, np.float32)
    m = v = np.zeros(4, np.float32)
    p = np.zeros(4, np.float32)
    for t in range(1, 4):
        step(g=g)
        m = m + (g - m) * np.float32(1 - 0.9)
        v = v + (g * g - v) * np.float32(1 - 0.999)
        rate = np.float32(1e-3 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t))
        p = p - rate * m / (np.sqrt(v) + np.float32(1e-8))
    np.testing.assert_allclose(store[state], p, rtol=3e-7)


def test_slots_are_kept_across_graphs() -> None:
    graph, state = fed_gradient()
    optimiser = MomentumSGD(learning_rate=1.0)
    store = Store({state: np.zeros(4)})
    for _ in range(2):
        compile(optimiser.attach(graph), store=store)(g=np.ones(4))
    assert store[state].tolist() == [-(1.0 + 1.9)] * 4
    (slot,) = optimiser.slots.values()
    assert slot.role is Role.SLOT


def test_a_graph_without_gradients_is_refused() -> None:
    graph = Graph("g")
    graph.output("y", graph.emit(make("exp"), graph.input("x", ())))
    with pytest.raises(GraphError, match="differentiate"):
        SGD().attach(graph)


#: Recorded Chainer rules, with Chainer's names and defaults of their options.
RECORDED = {
    "optimizers.SGD": (SGD, {"lr": ("learning_rate", 0.01)}),
    "optimizers.MomentumSGD": (
        MomentumSGD, {"lr": ("learning_rate", 0.01), "momentum": ("momentum", 0.9)}),
    "optimizers.Adam": (
        Adam, {"alpha": ("learning_rate", 0.001), "beta1": ("beta1", 0.9),
               "beta2": ("beta2", 0.999), "eps": ("eps", 1e-8)}),
}  # fmt: skip


def recorded_cases() -> list[dict[str, Any]]:
    """Recordings of these rules without hooks, or with weight decay alone."""
    manifest = json.loads(golden("chainer/manifest.json").read_text())
    return [
        c for c in manifest["cases"]
        if c["group"] == "optimizer" and c["target"] in RECORDED
        and all(h["target"] == "hooks.WeightDecay" for h in c["hooks"])
        and set(c.get("kwargs") or {}) <= set(RECORDED[c["target"]][1])
    ]  # fmt: skip


def test_recorded_chainer_steps_are_reproduced() -> None:
    arrays = np.load(golden("chainer/optimizers.npz"))
    cases = recorded_cases()
    assert len(cases) == 6
    for case in cases:
        cls, names = RECORDED[case["target"]]
        given = case.get("kwargs") or {}
        optimiser = cls(**{ours: given.get(k, default) for k, (ours, default) in names.items()})
        for name in ("W", "b"):
            start, gradients = arrays[case["params"][name]], arrays[case["grads"][name]]
            graph, state = fed_gradient(start.shape, DType.F32)
            for hook in case["hooks"]:
                decayed = graph.gradients[state] + graph.read(state) * hook["args"][0]
                graph.set_gradient(state, decayed)
            store = Store({state: start})
            step = compile(optimiser.attach(graph), store=store)
            for t, expected in enumerate(arrays[case["after"][name]]):
                step(g=gradients[t])
                np.testing.assert_allclose(store[state], expected, **case["tol"]["out"])
            optimiser.slots.clear()
