"""Optimiser rules against their formulas, step by step, and as one compiled step."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from goldens import golden

from branchgraph.compiler import compile
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.op import make
from branchgraph.ir.optimisers import (
    OPTIMISERS,
    SGD,
    SMORMS3,
    AdaDelta,
    AdaGrad,
    Adam,
    CorrectedMomentumSGD,
    MaskSGD,
    MomentumSGD,
    NesterovAG,
    Optimiser,
    RMSprop,
    RMSpropGraves,
)
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


Step = Callable[[Any, int, np.ndarray, np.ndarray, dict[str, np.ndarray]], np.ndarray]


def sgd(o: SGD, t: int, p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]) -> np.ndarray:
    return p - o.learning_rate * g


def momentum(
    o: MomentumSGD, t: int, p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]
) -> np.ndarray:
    s["v"] = o.momentum * s["v"] - o.learning_rate * g
    return p + s["v"]


def corrected(
    o: CorrectedMomentumSGD, t: int, p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]
) -> np.ndarray:
    s["v"] = o.momentum * s["v"] - g
    return p + o.learning_rate * s["v"]


def nesterov(
    o: NesterovAG, t: int, p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]
) -> np.ndarray:
    s["v"] = o.momentum * s["v"] - o.learning_rate * g
    return p + o.momentum**2 * s["v"] - (1 + o.momentum) * o.learning_rate * g


def adam(o: Adam, t: int, p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]) -> np.ndarray:
    s["m"] = o.beta1 * s["m"] + (1 - o.beta1) * g
    s["v"] = o.beta2 * s["v"] + (1 - o.beta2) * g * g
    second = s["v"]
    if o.amsgrad:
        second = s["vhat"] = np.maximum(s["vhat"], s["v"])
    rate = o.learning_rate * math.sqrt(1 - o.beta2**t) / (1 - o.beta1**t)
    step = rate / (np.sqrt(second) + o.eps)
    if o.adabound:
        lower = o.final_lr * (1 - 1 / (o.gamma * t + 1))
        upper = o.final_lr * (1 + 1 / (o.gamma * t))
        step = np.clip(step, lower, upper)
    return p - o.eta * (step * s["m"] + o.weight_decay_rate * p)


def rmsprop(
    o: RMSprop, t: int, p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]
) -> np.ndarray:
    s["ms"] = o.alpha * s["ms"] + (1 - o.alpha) * g * g
    if o.eps_inside_sqrt:
        return p - o.learning_rate * g / np.sqrt(s["ms"] + o.eps)
    return p - o.learning_rate * g / (np.sqrt(s["ms"]) + o.eps)


def graves(
    o: RMSpropGraves, t: int, p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]
) -> np.ndarray:
    s["n"] = o.alpha * s["n"] + (1 - o.alpha) * g * g
    s["g"] = o.alpha * s["g"] + (1 - o.alpha) * g
    deviation = np.sqrt(s["n"] - s["g"] ** 2 + o.eps)
    s["delta"] = o.momentum * s["delta"] - o.learning_rate * g / deviation
    return p + s["delta"]


def adagrad(
    o: AdaGrad, t: int, p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]
) -> np.ndarray:
    s["h"] = s["h"] + g * g
    return p - o.learning_rate * g / (np.sqrt(s["h"]) + o.eps)


def adadelta(
    o: AdaDelta, t: int, p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]
) -> np.ndarray:
    s["msg"] = o.rho * s["msg"] + (1 - o.rho) * g * g
    delta = np.sqrt((s["msdx"] + o.eps) / (s["msg"] + o.eps)) * g
    s["msdx"] = o.rho * s["msdx"] + (1 - o.rho) * delta * delta
    return p - o.learning_rate * delta


def smorms3(
    o: SMORMS3, t: int, p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]
) -> np.ndarray:
    if t == 1:
        s["mem"] = np.ones_like(p)
    r = 1 / (s["mem"] + 1)
    s["g"] = (1 - r) * s["g"] + r * g
    s["g2"] = (1 - r) * s["g2"] + r * g * g
    x = s["g"] ** 2 / (s["g2"] + o.eps)
    s["mem"] = 1 + s["mem"] * (1 - x)
    return p - g * np.minimum(x, o.learning_rate) / (np.sqrt(s["g2"]) + o.eps)


def mask_sgd(
    o: MaskSGD, t: int, p: np.ndarray, g: np.ndarray, s: dict[str, np.ndarray]
) -> np.ndarray:
    return np.clip(p / p.sum() - o.learning_rate * g, 0, 1)


#: The rules in plain NumPy; slots are filled in place and start at 0.
BY_HAND: dict[type[Optimiser], Step] = {
    SGD: sgd, MomentumSGD: momentum, CorrectedMomentumSGD: corrected, NesterovAG: nesterov,
    Adam: adam, RMSprop: rmsprop, RMSpropGraves: graves, AdaGrad: adagrad, AdaDelta: adadelta,
    SMORMS3: smorms3, MaskSGD: mask_sgd,
}  # fmt: skip


def by_hand(
    optimiser: Optimiser, p: np.ndarray, gradients: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The parameter and the slots after all steps."""
    slots: dict[str, np.ndarray] = defaultdict(lambda: np.zeros_like(p))
    for t, g in enumerate(gradients, start=1):
        p = BY_HAND[type(optimiser)](optimiser, t, p, g, slots)
    return p, slots


RULES = [
    SGD(),
    SGD(learning_rate=0.3),
    MomentumSGD(),
    MomentumSGD(momentum=0.5),
    CorrectedMomentumSGD(),
    CorrectedMomentumSGD(learning_rate=0.2, momentum=0.5),
    NesterovAG(),
    NesterovAG(learning_rate=0.2, momentum=0.5),
    Adam(),
    Adam(learning_rate=0.1, beta1=0.5, beta2=0.9, eps=1e-3),
    Adam(beta1=0.0),
    Adam(eta=0.5, weight_decay_rate=0.1),
    Adam(amsgrad=True, beta2=0.3),
    Adam(adabound=True),
    Adam(adabound=True, amsgrad=True, final_lr=0.01, gamma=0.5, eta=0.7, weight_decay_rate=0.01),
    RMSprop(),
    RMSprop(learning_rate=0.1, alpha=0.5, eps=1e-2, eps_inside_sqrt=True),
    RMSpropGraves(),
    RMSpropGraves(learning_rate=0.1, alpha=0.5, momentum=0.3, eps=1e-2),
    AdaGrad(),
    AdaGrad(learning_rate=0.1, eps=1e-2),
    AdaDelta(),
    AdaDelta(learning_rate=0.5, rho=0.5, eps=1e-2),
    SMORMS3(),
    SMORMS3(learning_rate=0.5, eps=1e-2),
    MaskSGD(),
    MaskSGD(learning_rate=0.05),
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
    expected, slots = by_hand(optimiser, start, gradients)
    np.testing.assert_allclose(store[state], expected, rtol=1e-12)
    for (of, name), slot in optimiser.slots.items():
        if of is state:
            np.testing.assert_allclose(store[slot], slots[name], rtol=1e-10)


def test_every_optimiser_is_followed() -> None:
    assert {type(o) for o in RULES} == set(BY_HAND) == set(OPTIMISERS.values())


@pytest.mark.parametrize("optimiser", RULES, ids=repr)
def test_numbers_are_the_same_as_nodes_and_as_plain_floats(optimiser: Optimiser) -> None:
    graph = Graph("scalars")
    rate = graph.input("rate", (), DType.F64)
    for name, value in optimiser.scalars(rate, graph.input("t", (), DType.F64)).items():
        made = value if isinstance(value, Value) else graph.constant(value, DType.F64)
        graph.output(name, made)
    computed = compile(graph)(rate=0.3, t=4.0)
    plain = optimiser.scalars(0.3, 4.0)
    assert set(plain) == set(computed)
    for name, value in plain.items():
        np.testing.assert_allclose(computed[name], value, rtol=1e-13)


def test_the_bounds_of_adabound_follow_the_learning_rate() -> None:
    rule = Adam(learning_rate=0.1, adabound=True, final_lr=0.2, gamma=1.0)
    bounds = rule.scalars(0.05, 1.0)
    assert bounds["lower"] == pytest.approx(0.05)
    assert bounds["upper"] == pytest.approx(0.2)


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


#: Recorded Chainer optimizers: rules, Chainer's names where they differ, and options it fixes.
#: CorrectedMomentumSGD was recorded with other hooks only; the Chainer front end runs those.
RECORDED: dict[str, tuple[type[Optimiser], dict[str, str], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": "learning_rate"}, {}),
    "MomentumSGD": (MomentumSGD, {"lr": "learning_rate"}, {}),
    "NesterovAG": (NesterovAG, {"lr": "learning_rate"}, {}),
    "Adam": (Adam, {"alpha": "learning_rate"}, {}),
    "AdamW": (Adam, {"alpha": "learning_rate"}, {}),
    "AMSGrad": (Adam, {"alpha": "learning_rate"}, {"amsgrad": True}),
    "AdaBound": (Adam, {"alpha": "learning_rate"}, {"adabound": True}),
    "AMSBound": (Adam, {"alpha": "learning_rate"}, {"amsgrad": True, "adabound": True}),
    "RMSprop": (RMSprop, {"lr": "learning_rate"}, {}),
    "RMSpropGraves": (RMSpropGraves, {"lr": "learning_rate"}, {}),
    "AdaGrad": (AdaGrad, {"lr": "learning_rate"}, {}),
    "AdaDelta": (AdaDelta, {}, {}),
    "SMORMS3": (SMORMS3, {"lr": "learning_rate"}, {}),
}


def recorded_cases() -> list[dict[str, Any]]:
    """Recordings of these rules without hooks, or with weight decay alone."""
    manifest = json.loads(golden("chainer/manifest.json").read_text())
    return [
        c for c in manifest["cases"]
        if c["group"] == "optimizer" and c["target"].split(".")[1] in RECORDED
        and all(h["target"] == "hooks.WeightDecay" for h in c["hooks"])
    ]  # fmt: skip


def test_recorded_chainer_steps_are_reproduced() -> None:
    arrays = np.load(golden("chainer/optimizers.npz"))
    cases = recorded_cases()
    assert len(cases) == 22
    assert {c["target"].split(".")[1] for c in cases} == set(RECORDED)
    for case in cases:
        cls, names, fixed = RECORDED[case["target"].split(".")[1]]
        given = case.get("kwargs") or {}
        optimiser = cls(**{names.get(k, k): v for k, v in given.items()}, **fixed)
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
            for slot_name, key in case["states"].get(name, {}).items():
                slot = optimiser.slots[state, slot_name]
                np.testing.assert_allclose(store[slot], arrays[key], **case["tol"]["out"])
            optimiser.slots.clear()
