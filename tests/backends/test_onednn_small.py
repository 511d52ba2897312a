"""Which convolutions of few channels get a generated kernel, what goes along, and the numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from branchgraph.codegen import engine
from branchgraph.compiler import compile
from branchgraph.ir.builder import conv, max_pool, relu
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.optimisers import MomentumSGD
from branchgraph.ir.state import Store
from branchgraph.nets import network
from branchgraph.training import Training
from tests.backends.against_numpy import all_kernels, check, kernels_of
from tests.backends.libdnnl import require_libdnnl

require_libdnnl()
if engine.missing():
    pytest.skip(engine.missing(), allow_module_level=True)

SIZE = (28, 26)
DIRECT = "llvm direct"


def taken(body: Callable[[Graph, Value], None], samples: int = 3, channels: int = 1) -> list[str]:
    """What each generated kernel of a net on [N, channels, 28, 26] does; NumPy agrees with it."""
    graph = Graph("small")
    body(graph, graph.input("x", ("N", channels, *SIZE)))
    shape = (samples, channels, *SIZE)
    feeds = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    check(graph, feeds)
    run = compile(graph, "onednn")
    run.run(feeds)
    found = (k for k in all_kernels(run) if k.name == DIRECT)
    return ["+".join(m.op.opcode for m in k.cluster.members) for k in found]


def narrow(x: Value, name: str = "narrow", filters: int = 5) -> Value:
    return conv(x, filters, 5, pad=3, name=name)


@pytest.mark.parametrize("samples", [1, 2, 15, 17, 64])
def test_lenet_is_one_kernel_before_its_dense_layer(samples: int) -> None:
    graph = network("lenet")
    feeds = {"x": _images(samples)}
    check(graph, feeds)
    run = compile(graph, "onednn")
    run.run(feeds)
    names = kernels_of(run)
    assert names[0] == DIRECT
    assert len(names) == 2, names


def test_no_samples() -> None:
    graph = network("lenet")
    assert compile(graph, "onednn").run({"x": _images(0)})["logits"].shape == (0, 10)


def test_branches_of_b_lenet_end_a_chain() -> None:
    """The first convolution has two readers."""
    graph = network("b_lenet")
    feeds = {"x": _images(19)} | {n: np.float64(0.5) for n in graph.inputs if n != "x"}
    check(graph, feeds)
    run = compile(graph, "onednn")
    run.run(feeds)
    assert DIRECT in kernels_of(run)


def test_relu_pooling_and_the_next_layer_go_along() -> None:
    def body(graph: Graph, x: Value) -> None:
        h = relu(max_pool(narrow(x), 2, cover_all=True))
        graph.output("y", max_pool(relu(narrow(h, "second", 10)), (3, 2)))

    assert taken(body) == ["conv+relu+max_pool+conv+relu+max_pool"]


def test_what_others_read_ends_a_chain() -> None:
    def body(graph: Graph, x: Value) -> None:
        h = narrow(x)
        graph.output("before", h)
        pooled = max_pool(h, 2)
        graph.output("one", narrow(pooled, "one"))
        graph.output("two", narrow(pooled, "two"))

    assert taken(body) == ["conv", "conv", "conv"]


@pytest.mark.parametrize("options", [{"stride": 1}, {"pad": 1}])
def test_windows_that_overlap_or_are_padded_are_another_kernel(options: dict[str, int]) -> None:
    def body(graph: Graph, x: Value) -> None:
        graph.output("y", max_pool(narrow(x), 2, **options))

    assert taken(body) == ["conv"]


def test_sums_behind_a_layer_are_left_to_others() -> None:
    def body(graph: Graph, x: Value) -> None:
        h = narrow(x)
        graph.output("y", relu(graph.emit(Sum(), narrow(x, "other"), h)))

    assert len(taken(body)) <= 1


@pytest.mark.parametrize("filters", [1, 5, 8, 20])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_single_layers(filters: int, stride: int, bias: bool) -> None:
    def body(graph: Graph, x: Value) -> None:
        graph.output("y", conv(x, filters, 5, stride=stride, pad=2, bias=bias, name="c"))

    assert taken(body, samples=9, channels=3) == ["conv"]


def test_full_vectors_are_left_to_onednn() -> None:
    def body(graph: Graph, x: Value) -> None:
        graph.output("y", conv(x, 128, 5, pad=2, name="c"))

    assert taken(body, channels=32) == []


def test_groups_and_dilation_are_left_to_onednn() -> None:
    def body(graph: Graph, x: Value) -> None:
        graph.output("grouped", conv(x, 4, 3, groups=2, name="grouped"))
        graph.output("dilated", conv(x, 4, 3, dilation=2, name="dilated"))

    assert taken(body, channels=2) == []


@pytest.mark.parametrize("pad", [(0, 0, 0, 0), (2, 2, 2, 2), (4, 1, 0, 3)])
def test_the_gradient_in_the_input(pad: tuple[int, int, int, int]) -> None:
    graph, rng = Graph("gradient"), np.random.default_rng(0)
    x, w = graph.input("x", (64, 5, 15, 13)), graph.input("w", (10, 5, 5, 5))
    y = graph.emit(Conv((1, 1), pad, (1, 1)), x, w)
    dy = graph.input("dy", tuple(int(str(d)) for d in y.shape))
    graph.output("dx", vjp(graph, {y: dy}, [x])[x])
    feeds = {
        name: rng.standard_normal([int(str(d)) for d in value.shape]).astype(np.float32)
        for name, value in graph.inputs.items()
    }
    check(graph, feeds, runs=2)
    run = compile(graph, "onednn")
    run.run(feeds)
    assert DIRECT in kernels_of(run)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_in_weight_and_bias(bias: bool, stride: int) -> None:
    graph, rng = Graph("gradient"), np.random.default_rng(0)
    x, w, b = (
        graph.input("x", (64, 5, 15, 13)),
        graph.input("w", (10, 5, 5, 5)),
        graph.input("b", (10,)),
    )
    operands = (x, w, b) if bias else (x, w)
    y = graph.emit(Conv((stride, stride), (3, 2, 1, 0), (1, 1)), *operands)
    dy = graph.input("dy", tuple(int(str(d)) for d in y.shape))
    found = vjp(graph, {y: dy}, list(operands[1:]))
    for number, value in enumerate(operands[1:]):
        graph.output(f"d{number}", found[value])
    feeds = {
        name: rng.standard_normal([int(str(d)) for d in value.shape]).astype(np.float32)
        for name, value in graph.inputs.items()
    }
    check(graph, feeds, runs=2)
    run = compile(graph, "onednn")
    run.run(feeds)
    names = kernels_of(run)
    assert "llvm direct gradient" in names
    assert not any(n.startswith(("numpy", "jit:avx512_core")) for n in names), names


def test_weights_are_packed_anew_in_every_step() -> None:
    graph = network("lenet")
    feeds = {"x": _images(64), "labels": np.random.default_rng(1).integers(0, 10, 64)}
    losses = {}
    for backend in ("numpy", "onednn"):
        store = Store.initialised(graph.states, 1)
        training = Training.of(graph, MomentumSGD(0.1), backend=backend, store=store)
        losses[backend] = [training.step.run(feeds)["loss"] for _ in range(4)]
        if backend == "onednn":
            assert "pack " + DIRECT in kernels_of(training.step)
    assert losses["numpy"][3] < losses["numpy"][0]
    np.testing.assert_allclose(losses["onednn"], losses["numpy"], rtol=1e-4)


def test_weights_that_changed_between_runs_are_packed_again() -> None:
    graph, feeds = network("lenet"), {"x": _images(2)}
    store = Store.initialised(graph.states, 1)
    run = compile(graph, "onednn", store=store)
    before = run.run(feeds)["logits"]
    for state in graph.states:
        store[state] = 2 * store[state]
    after = run.run(feeds)["logits"]
    expected = compile(graph, "numpy", store=store).run(feeds)["logits"]
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(after, before)


def test_without_the_compiler_onednn_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "missing", lambda: "not here")
    graph, feeds = network("lenet"), {"x": _images(3)}
    check(graph, feeds)
    run = compile(graph, "onednn")
    run.run(feeds)
    assert not any(name.startswith("llvm") for name in kernels_of(run))


def _images(samples: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((samples, 1, 28, 28)).astype(np.float32)
