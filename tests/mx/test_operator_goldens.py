"""Every recorded operator of MXNet 1.9.1, from its symbol to outputs, gradients and states.

Nothing of an operator is computed here: a recorded symbol is read, translated, compiled, run, and
what comes out is compared with what MXNet gave.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from branchgraph.compiler import compile
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.state import Store
from branchgraph.ir.types import DType
from branchgraph.mx.symbol_file import read_symbol
from branchgraph.mx.translate import Translation, translate
from branchgraph.passes.specialise import specialise
from tests.goldens import golden

#: float32 on both sides, sums in another order: a few roundings of the largest element.
OUTPUT = 1e-5
#: Gradients are longer chains of the same; relative to the largest element of each.
GRADIENT = 1e-4


@functools.cache
def manifest() -> dict[str, Mapping[str, Any]]:
    cases = json.loads(golden("mxnet/ops/ops.json").read_text())["cases"]
    return {case["id"]: case for case in cases}


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(golden("mxnet/ops/ops.npz")) as stored:
        return dict(stored)


def ids() -> list[str]:
    """Ids of all cases; one that skips where there are no recordings."""
    try:
        return list(manifest())
    except (pytest.skip.Exception, pytest.fail.Exception):
        return ["recordings"]


@dataclass
class Recorded:
    """One case: its manifest entry and its arrays by kind."""

    id: str

    @property
    def case(self) -> Mapping[str, Any]:
        return manifest()[self.id]

    def of(self, kind: str) -> dict[str, np.ndarray]:
        start = f"{self.id}/{kind}/"
        return {k[len(start) :]: v for k, v in arrays().items() if k.startswith(start)}


@dataclass
class Run:
    """What one run gave, by the names of the symbol."""

    outputs: list[np.ndarray]
    gradients: dict[str, np.ndarray]
    states: dict[str, np.ndarray]


class Bound:
    """The symbol of a case bound to its arrays."""

    def __init__(self, recorded: Recorded) -> None:
        self.inputs = recorded.of("in")
        self.heads = list(recorded.of("head").values())
        symbol = read_symbol(json.dumps(recorded.case["symbol"]), recorded.id)
        self.translation: Translation = translate(
            symbol,
            {"data": self.inputs["data"].shape} if "data" in self.inputs else {},
            shapes={k: v.shape for k, v in self.inputs.items()},
            dtypes={k: DType.of(v.dtype) for k, v in self.inputs.items()},
        )
        self.values = {**self.inputs, **recorded.of("aux")}

    def run(self, training: bool, backward: bool = False) -> Run:
        graph = specialise(
            self.translation.graph,
            training=training,
            statistics="backward" if backward else "none",
        )
        names = self.differentiate(graph) if backward else []
        named = {s.name: s for s in self.translation.states()}
        store = Store({s: self.values[n] for n, s in named.items()})
        feeds: dict[str, Any] = {n: self.values[n] for n in self.translation.graph.inputs}
        if backward:
            feeds |= {f"head{i}": h for i, h in enumerate(self.heads)}
        found = compile(graph, store=store).run(feeds)
        return Run(
            [found[h] for h in self.translation.heads],
            {n: found[f"grad/{n}"] for n in names},
            {n: store[s] for n, s in named.items()},
        )

    def differentiate(self, graph: Graph) -> list[str]:
        """Add the gradients of all arguments to the outputs; names of those something flows to."""
        outputs = [graph.outputs[h] for h in self.translation.heads]
        seeds: dict[Value, Value | None] = {}
        for i, y in enumerate(outputs):
            if self.heads and y.dtype.is_float:
                seeds[y] = graph.input(f"head{i}", y.shape, y.dtype)
            elif y.dtype.is_float:
                seeds[y] = None
            if i < len(self.heads) and f"head{i}" not in graph.inputs:
                graph.input(f"head{i}", self.heads[i].shape, DType.of(self.heads[i].dtype))
        leaves = {
            n: graph.inputs[n] if v.state is None else graph.read(v.state)
            for n, v in self.translation.arguments
        }
        found = vjp(graph, seeds, leaves.values())
        reached = {n: found[v] for n, v in leaves.items() if v in found}
        for name, value in reached.items():
            graph.output(f"grad/{name}", value)
        return list(reached)


def assert_near(actual: np.ndarray, expected: np.ndarray, absolute: float, relative: float) -> None:
    """Within `absolute` plus `relative` of the largest expected element, type and shape equal."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    scale = np.abs(expected.astype(np.float64)).max(initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=absolute + relative * scale)


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> Recorded:
    golden("mxnet/ops/ops.json")
    return Recorded(request.param)


def known(random: bool) -> list[str]:
    """Ids of the cases that draw random numbers, or of the others."""
    return [i for i in ids() if i == "recordings" or manifest()[i]["random"] is random]


every = pytest.mark.parametrize("recorded", ids(), indirect=True)
determined = pytest.mark.parametrize("recorded", known(random=False), indirect=True)


@determined
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_outputs_are_those_of_mxnet(recorded: Recorded, mode: str) -> None:
    run = Bound(recorded).run(training=mode == "train")
    expected = recorded.of(f"out_{mode}")
    assert len(run.outputs) == len(expected)
    for y, reference in zip(run.outputs, expected.values()):
        assert_near(y, reference, OUTPUT, OUTPUT)


@determined
def test_gradients_and_states_are_those_of_mxnet(recorded: Recorded) -> None:
    run = Bound(recorded).run(training=True, backward=True)
    for name, expected in recorded.of("grad").items():
        found = run.gradients.get(name, np.zeros_like(expected))
        assert_near(found, expected, 1e-7, GRADIENT)
    for name, expected in recorded.of("aux_new").items():
        assert_near(run.states[name], expected, OUTPUT, OUTPUT)


@every
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_arrays_are_overwritten_as_by_mxnet(recorded: Recorded, training: bool) -> None:
    bound = Bound(recorded)
    run = bound.run(training)
    written = recorded.of("in_after")
    assert set(written) == set(recorded.case["rewritten_inputs"])
    for name, after in run.states.items():
        if name in recorded.of("aux"):
            expected = recorded.of("aux")[name]
        else:
            expected = written.get(name, bound.values[name])
        np.testing.assert_array_equal(after, expected, err_msg=name)


@every
def test_shapes_of_parameters_follow_from_the_data(recorded: Recorded) -> None:
    inputs = recorded.of("in")
    fed = {k: v.shape for k, v in inputs.items() if not k.startswith("op_")}
    symbol = read_symbol(json.dumps(recorded.case["symbol"]))
    translation = translate(symbol, fed)
    for name, value in (*translation.arguments, *translation.auxiliary):
        expected = (recorded.of("aux") | inputs)[name].shape
        if name != "op_label":  # a label may come in several shapes
            assert value.shape == expected, name


@pytest.mark.parametrize("recorded", known(random=True), indirect=True)
def test_random_outputs_keep_the_relations_of_the_recorded_ones(recorded: Recorded) -> None:
    bound = Bound(recorded)
    (head,) = bound.heads
    run = bound.run(training=True, backward=True)
    ours = [(run.outputs[0], run.gradients["data"])]
    theirs = [(recorded.of("out_train")["0"], recorded.of("grad")["data"])]
    x = bound.inputs["data"]
    scale = 1 / (1 - recorded.case["attrs"].get("p", 0.5))
    for y, dx in ours + theirs:
        mask = y != 0
        assert 0 < mask.mean() < 1
        assert_near(y, np.where(mask, x * np.float32(scale), 0), OUTPUT, OUTPUT)
        assert_near(dx, np.where(mask, head * np.float32(scale), 0), 1e-7, GRADIENT)
    drawn = bound.run(training=False).outputs[0]
    always = recorded.case["attrs"].get("mode") == "always"
    assert ((drawn == 0).any(), (drawn == x).all()) == (always, not always)
