"""Hooks of the native optimisers against their formulas, and against Chainer's recordings."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from goldens import golden

from branchgraph.compiler import compile
from branchgraph.ir.graph import Graph
from branchgraph.ir.hooks import (
    GradientClipping,
    GradientHardClipping,
    GradientLARS,
    GradientNoise,
    Hook,
    Lasso,
    WeightDecay,
)
from branchgraph.ir.optimisers import SGD
from branchgraph.ir.state import State, Store
from branchgraph.ir.types import DType

RNG = np.random.default_rng(0)
P = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=4) * 1e-3}
G = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=4)}


def stepped(hooks: tuple[Hook, ...], steps: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """What is subtracted from the parameters by SGD of rate 1: the changed gradients, summed."""
    graph, store = Graph("hooks"), Store()
    for name in P:
        state = State(name, P[name].shape, DType.F64)
        store[state] = P[name]
        graph.read(state)
        graph.set_gradient(state, graph.input(f"g{name}", P[name].shape, DType.F64))
    step = compile(SGD(learning_rate=1.0, hooks=hooks).attach(graph), store=store, seed=seed)
    for _ in range(steps):
        step(ga=G["a"], gb=G["b"])
    return {s.name: P[s.name] - store[s] for s in store if s.name in P}


def norm(x: np.ndarray) -> float:
    return float(np.sqrt((x * x).sum()))


def lars(p: np.ndarray, g: np.ndarray) -> np.ndarray:
    rate = norm(p) / (1e-9 + norm(g) + 0.1 * norm(p)) if norm(p) > 1e-2 else 1.0
    return (g + 0.1 * p) * rate


TOTAL = float(np.sqrt(sum((g * g).sum() for g in G.values())))
FORMULAS: list[tuple[Hook, Any]] = [
    (WeightDecay(0.05), lambda p, g: g + 0.05 * p),
    (Lasso(0.02), lambda p, g: g + 0.02 * np.sign(p)),
    (GradientHardClipping(-0.3, 0.4), lambda p, g: np.clip(g, -0.3, 0.4)),
    (GradientClipping(1.0), lambda p, g: g / TOTAL),
    (GradientClipping(100.0), lambda p, g: g),
    (GradientLARS(weight_decay=0.1), lars),
]


@pytest.mark.parametrize(("hook", "formula"), FORMULAS, ids=lambda v: repr(v)[:40])
def test_a_hook_follows_its_formula(hook: Hook, formula: Any) -> None:
    found = stepped((hook,))
    for name in P:
        np.testing.assert_allclose(found[name], formula(P[name], G[name]), rtol=1e-10, atol=1e-13)


def test_hooks_are_applied_in_order() -> None:
    found = stepped((WeightDecay(0.5), GradientHardClipping(-0.3, 0.4)))
    np.testing.assert_allclose(found["a"], np.clip(G["a"] + 0.5 * P["a"], -0.3, 0.4), rtol=1e-10)


def test_noise_has_the_published_variance_fades_and_follows_the_seed() -> None:
    graph, store = Graph("noise"), Store()
    state = State("p", (20_000,), DType.F64)
    graph.read(state)
    graph.set_gradient(state, graph.input("g", state.shape, DType.F64))
    step = compile(SGD(1.0, hooks=(GradientNoise(0.3),)).attach(graph), store=store, seed=4)
    for t in range(3):
        before = store[state].copy()
        step(g=np.zeros(20_000))
        drawn = before - store[state]
        # 20 000 draws: the deviation is within 2.5 %, the mean within 4 of its own deviations.
        assert drawn.std() == pytest.approx(np.sqrt(0.3 / (1 + t) ** 0.55), rel=0.025)
        assert abs(drawn.mean()) < 4 * drawn.std() / np.sqrt(20_000)
    noise = (GradientNoise(0.3),)
    one, same, other = (stepped(noise, seed=s)["a"] for s in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


NATIVE = {
    "hooks.WeightDecay": WeightDecay,
    "hooks.Lasso": Lasso,
    "hooks.GradientClipping": GradientClipping,
    "hooks.GradientHardClipping": GradientHardClipping,
    "hooks.GradientLARS": GradientLARS,
}


def test_recorded_chainer_hooks_are_reproduced_on_sgd() -> None:
    manifest = json.loads(golden("chainer/manifest.json").read_text())
    arrays = np.load(golden("chainer/optimizers.npz"))
    cases = [
        c for c in manifest["cases"]
        if c["group"] == "optimizer" and c["target"] == "optimizers.SGD"
        and c["hooks"] and all(h["target"] in NATIVE for h in c["hooks"])
    ]  # fmt: skip
    assert len(cases) >= 5
    for case in cases:
        hooks = tuple(NATIVE[h["target"]](*h["args"], **h["kwargs"]) for h in case["hooks"])
        rate = (case.get("kwargs") or {}).get("lr", 0.01)
        graph, store, states = Graph("case"), Store(), {}
        for name in ("W", "b"):
            start = arrays[case["params"][name]]
            state = states[name] = State(name, start.shape)
            store[state] = start
            graph.read(state)
            graph.set_gradient(state, graph.input(f"g{name}", start.shape))
        step = compile(SGD(learning_rate=rate, hooks=hooks).attach(graph), store=store)
        for t in range(case["steps"]):
            step(**{f"g{n}": arrays[case["grads"][n]][t] for n in states})
            for name, state in states.items():
                expected = arrays[case["after"][name]][t]
                np.testing.assert_allclose(store[state], expected, **case["tol"]["out"])
