"""Which kernels carry out ops behind a layer, and that they give what NumPy gives.

Every graph starts with a convolution, so that what follows reads planes that lie channels last.
Sizes are odd: none is a multiple of a vector's length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from branchgraph.backends.onednn import kernels
from branchgraph.backends.onednn.kernels import layers
from branchgraph.backends.onednn.plan import Site
from branchgraph.compiler import compile
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.initialisers import Normal
from branchgraph.ir.ops.activation import Elu, LogSoftmax, ReluGradient, Softmax
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.elementwise import Absolute, Divide, Multiply, Sqrt, Subtract
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.merge import Concat, Mean, Product, Sum
from branchgraph.ir.ops.norm import BatchNormTraining, LocalResponseNorm
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.reduce import BroadcastTo, ReduceMean, ReduceSum
from branchgraph.ir.ops.reshape import Embed, Pad, Reshape, Slice
from branchgraph.ir.ops.sample_conv import SampleConv
from branchgraph.ir.state import Role, State
from branchgraph.ir.types import DType
from tests.backends.against_numpy import check, kernels_of
from tests.backends.libdnnl import require_libdnnl

require_libdnnl()

N, C, H = 3, 5, 7
WINDOW = Conv((1, 1), (1, 1, 1, 1), (1, 1))
Body = Callable[[Graph, Value], Value]


class Net:
    """A graph that grows from a convolution; its inputs get random arrays."""

    def __init__(self, seed: int = 0) -> None:
        self.graph = Graph("kernels")
        self.feeds: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(seed)

    def input(self, *shape: int, positive: bool = False) -> Value:
        """An input with normal numbers, or positive ones away from 0."""
        name = f"i{len(self.feeds)}"
        x = self.rng.standard_normal(shape).astype(np.float32)
        self.feeds[name] = np.abs(x) + np.float32(0.5) if positive else x
        return self.graph.input(name, shape)

    def planes(self, channels: int = C, size: int = H) -> Value:
        """The result of a convolution."""
        x, w = self.input(N, 3, size, size), self.input(channels, 3, 3, 3)
        return self.graph.emit(WINDOW, x, w)

    def emit(self, op: Any, *inputs: Value) -> Value:
        return self.graph.emit(op, *inputs)

    def differentiate(self, y: Value, *wanted: Value) -> None:
        """Outputs: the cotangents of `wanted` for a random cotangent of `y`."""
        found = vjp(self.graph, {y: self.input(*(int(str(d)) for d in y.shape))}, list(wanted))
        for number, value in enumerate(wanted):
            self.graph.output(f"d{number}", found[value])

    def check(self, *, host: tuple[str, ...] = ()) -> list[str]:
        """Agreement with NumPy; only `host` may be computed by NumPy. The names of the kernels."""
        check(self.graph, self.feeds)
        run = compile(self.graph, "onednn")
        run.run(self.feeds)
        names = kernels_of(run)
        assert [n for n in names if n.startswith("numpy")] == [f"numpy {h}" for h in host]
        return names


def test_a_flattened_dense_layer_of_fixed_weights_copies_nothing() -> None:

    net = Net()
    x = net.planes()
    weight = net.graph.read(State("w", (11, C * H * H), DType.F32, Role.PARAMETER, Normal(0.1)))
    flat = net.emit(Reshape((N, C * H * H)), x)
    net.graph.output("y", net.emit(Dense(), flat, weight))
    names = net.check()
    assert len(names) == 3, names  # the convolution with its pack, and the layer


def test_flattening_for_other_readers_is_a_reorder() -> None:
    net = Net()
    flat = net.emit(Reshape((N, C * H * H)), net.planes())
    net.graph.output("y", net.emit(Dense(), flat, net.input(11, C * H * H)))
    net.graph.output("z", flat)
    net.check()


def test_the_gradient_of_a_flattened_dense_layer() -> None:
    net = Net()
    x, weight, bias = net.planes(), net.input(11, C * H * H), net.input(11)
    y = net.emit(Dense(), net.emit(Reshape((N, C * H * H)), x), weight, bias)
    net.differentiate(y, x, weight)
    net.check()


@pytest.mark.parametrize("axes", [(2, 3), (0, 2, 3), (0, 1, 2, 3), (1, 2, 3)])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("kind", [ReduceSum, ReduceMean])
def test_reductions_of_planes(kind: Any, axes: tuple[int, ...], keepdims: bool) -> None:
    net = Net()
    x = net.planes()
    y = net.emit(kind(axes, keepdims), x)
    net.graph.output("y", y)
    net.check()


@pytest.mark.parametrize("axis", [0, 1])
def test_sums_of_matrices(axis: int) -> None:
    net = Net()
    y = net.emit(Dense(), net.input(33, 17), net.input(19, 17))
    net.graph.output("y", net.emit(ReduceSum((axis,)), y))
    net.check()


@pytest.mark.parametrize("shape", [(N, C, 1, 1), (1, C, 1, 1)])
def test_repetition_over_planes(shape: tuple[int, ...]) -> None:
    net = Net()
    net.graph.output("y", net.emit(BroadcastTo((N, C, H, H)), net.input(*shape)))
    net.check()


SHAPES = [(N, C, H, H), (1, C, 1, 1), (N, C, 1, 1), (N, 1, 1, 1), (), (1, 1, H, H), (N, 1, H, H)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [Multiply, Subtract, Divide])
def test_arithmetic_with_a_broadcast_operand(kind: Any, shape: tuple[int, ...]) -> None:
    net = Net()
    x, other = net.planes(), net.input(*shape, positive=True)
    net.graph.output("y", net.emit(kind(), x, other))
    net.check()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subtraction_from_a_broadcast_operand(shape: tuple[int, ...]) -> None:
    net = Net()
    x, other = net.planes(), net.input(*shape)
    net.graph.output("y", net.emit(Subtract(), other, x))
    net.check()


@pytest.mark.parametrize("kind", [Sum, Mean, Product])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_merges_of_many(kind: Any, count: int) -> None:
    net = Net()
    net.graph.output("y", net.emit(kind(), *(net.planes() for _ in range(count))))
    net.check()


def test_a_merge_of_planes_that_lie_otherwise() -> None:
    net = Net()
    net.graph.output("y", net.emit(Sum(), net.planes(), net.input(N, C, H, H), net.planes()))
    net.check()


@pytest.mark.parametrize("op", [Absolute(), Elu(0.7), Sqrt()], ids=lambda op: op.opcode)
def test_functions_of_planes(op: Any) -> None:
    net = Net()
    net.graph.output("y", net.emit(op, net.emit(Absolute(), net.planes())))
    net.check()


GATES = {
    "scalar": ((), 1.0), "closed": ((), 0.0), "channels": ((1, C, 1, 1), None),
    "samples": ((N, 1, 1, 1), None), "both": ((N, C, 1, 1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_closed_gates_select_zero(name: str) -> None:
    """Where a gate is 0 even NaN and infinity become 0."""
    shape, value = GATES[name]
    net = Net()
    x = net.planes()
    gate = net.input(*shape)
    y = net.emit(Select(), x, gate)
    net.graph.output("y", y)
    opening = net.rng.integers(0, 2, shape).astype(np.float32)
    net.feeds[gate.name] = opening if value is None else np.full(shape, value, np.float32)
    net.check(host=("closed gates",))
    spoilt = dict(net.feeds)
    first = next(iter(spoilt))
    spoilt[first] = np.full_like(spoilt[first], np.nan)
    result = compile(net.graph, "onednn").run(spoilt)["y"]
    closed = np.broadcast_to(net.feeds[gate.name] == 0, result.shape)
    assert (result[closed] == 0).all()
    assert np.isnan(result[~closed]).all()


@pytest.mark.parametrize("size", [3, 4, 5])
@pytest.mark.parametrize("channels", [5, 16, 20])
def test_response_norm_and_its_gradient(size: int, channels: int) -> None:
    net = Net()
    x = net.planes(channels)
    y = net.emit(LocalResponseNorm(size, 0.3, 0.75, 2.0), x)
    net.graph.output("y", y)
    net.differentiate(y, x)
    net.check()


@pytest.mark.parametrize("kind", [Softmax, LogSoftmax])
def test_softmax_over_channels(kind: Any) -> None:
    net = Net()
    net.graph.output("y", net.emit(kind(1), net.planes()))
    net.check()


@pytest.mark.parametrize("features", [5, 16, 33])
def test_batch_norm_of_rows(features: int) -> None:
    net = Net()
    x = net.emit(Dense(), net.input(37, 9), net.input(features, 9))
    gamma, beta = net.input(features), net.input(features)
    y, mean, var = net.graph.apply(BatchNormTraining(), x, gamma, beta)
    for name, value in (("y", y), ("mean", mean), ("var", var)):
        net.graph.output(name, value)
    net.differentiate(y, x, gamma, beta)
    net.check()


def test_concatenation_of_channels_and_its_gradient() -> None:
    net = Net()
    parts = [net.planes(c) for c in (3, 5, 8)]
    y = net.emit(Concat(1), *parts)
    net.graph.output("y", y)
    net.graph.output("z", net.emit(WINDOW, y, net.input(4, 16, 3, 3)))
    net.differentiate(y, *parts)
    net.check()


@pytest.mark.parametrize(
    "op", [Slice(1, 2, 8), Embed(1, 3, 20), Pad((0, 0, 1, 2), (0, 3, 0, 1), -2.0)],
    ids=lambda op: op.opcode,
)  # fmt: skip
def test_layers_read_parts_and_paddings(op: Any) -> None:
    net = Net()
    part = net.emit(op, net.planes(16))
    filters = net.input(7, int(str(part.shape[1])), 3, 3)
    y = net.emit(WINDOW, part, filters)
    net.graph.output("y", y)
    net.graph.output("pooled", net.emit(MaxPool((2, 2), (2, 2), (0, 0, 0, 0)), part))
    net.graph.output("mean", net.emit(AveragePool((3, 3), (2, 2), (1, 1, 1, 1)), part))
    net.differentiate(y, part, filters)
    net.check(host=() if isinstance(op, Slice) else ("fill",))


def test_what_a_maker_made_before_it_gave_up_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are dropped, so the next maker must not count on the weights they packed."""

    def gives_up(site: Site) -> bool:
        layers.convolution(site)
        return False

    tried = {kind: (gives_up, *makers) for kind, makers in kernels.MAKERS.items()}
    monkeypatch.setattr(kernels, "MAKERS", tried)
    net = Net()
    net.graph.output("y", net.planes())
    net.check()


def test_gradients_that_share_the_positions_of_maxima() -> None:
    net = Net()
    x = net.planes()
    y = net.emit(MaxPool((3, 3), (2, 2), (1, 1, 1, 1)), x)
    for _ in range(2):
        shape = tuple(int(str(d)) for d in y.shape)
        found = vjp(net.graph, {y: net.input(*shape)}, [x])
        net.graph.output(f"d{len(net.feeds)}", found[x])
    net.graph.output("y", y)
    net.check()


def test_the_gradient_of_relu_takes_rows_in_any_order() -> None:
    net = Net()
    net.graph.output("y", net.emit(ReluGradient(), net.planes(), net.input(N, C, H, H)))
    net.check()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_kernels_of_samples(groups: int, axes: int) -> None:
    net = Net()
    op = SampleConv((1,) * axes, (1,) * 2 * axes, (1,) * axes, groups)
    x, biases = net.input(N, 6, *(5,) * axes), net.input(N, 4)
    weights = net.input(N, 4, 6 // groups, *(3,) * axes)
    y = net.emit(op, x, weights, biases)
    net.graph.output("y", y)
    net.differentiate(y, x, weights, biases)
    names = net.check() if axes > 1 else []
    assert all("ref" not in name for name in names)
