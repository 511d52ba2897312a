"""Where generated 3x3 convolutions stand in for oneDNN's, and that the numbers stay."""

from __future__ import annotations

import numpy as np
import pytest

from branchgraph.codegen import engine
from branchgraph.compiler import Executable, compile
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.ops.activation import Relu
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.merge import Sum
from tests.backends.against_numpy import check, kernels_of
from tests.backends.libdnnl import require_libdnnl

require_libdnnl()
if engine.missing():
    pytest.skip(engine.missing(), allow_module_level=True)

WINDOW = Conv((1, 1), (1, 1, 1, 1), (1, 1))
LLVM = "llvm winograd"


class Net:
    """A graph with random arrays for its inputs."""

    def __init__(self) -> None:
        self.graph = Graph("winograd")
        self.feeds: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(0)

    def input(self, *shape: int) -> Value:
        name = f"i{len(self.feeds)}"
        self.feeds[name] = self.rng.standard_normal(shape).astype(np.float32)
        return self.graph.input(name, shape)

    def convolved(self, x: Value, channels: int, op: Conv = WINDOW, *, bias: bool = False) -> Value:
        inputs, groups = int(str(x.shape[1])), op.groups
        weight = self.input(channels, inputs // groups, 3, 3)
        return self.graph.emit(op, x, weight, *([self.input(channels)] if bias else []))

    def run(self) -> list[str]:
        """Names of the kernels, after the numbers were compared with NumPy's."""
        check(self.graph, self.feeds)
        executable = compile(self.graph, "onednn")
        executable.run(self.feeds)
        return [k for k in kernels_of(executable) if not k.startswith("pack")]


def test_a_layer_with_its_sum_and_relu_is_one_kernel() -> None:
    net = Net()
    x, other = net.input(4, 16, 12, 11), net.input(4, 32, 12, 11)
    y = net.graph.emit(Sum(), net.convolved(x, 32, bias=True), other)
    net.graph.output("y", net.graph.emit(Relu(), y))
    assert net.run().count(LLVM) == 1


def places(executable: Executable) -> list[tuple[int, int]]:
    """Where in the arena the buffers of the only plan start and end."""
    (plan,) = executable._runner._plans[0].values()  # type: ignore[attr-defined]
    start = plan.arena.ctypes.data
    found = [(m.ctypes.data - start, m.nbytes) for m in plan.memories.values()]
    return [(a, a + n) for a, n in found if 0 <= a < plan.arena.nbytes]


def test_a_result_takes_the_place_of_what_is_added() -> None:
    net = Net()
    x, other = net.input(4, 32, 12, 11), net.input(4, 32, 12, 11)
    net.graph.output("y", net.graph.emit(Sum(), net.convolved(x, 32), other))
    net.run()
    executable = compile(net.graph, "onednn")
    executable.run(net.feeds)
    planes = [p for p in places(executable) if p[1] - p[0] == 4 * 32 * 12 * 11 * 4]
    assert len(planes) - len(set(planes)) == 1


def test_a_result_does_not_take_the_place_of_what_is_convolved() -> None:
    net = Net()
    x = net.input(4, 32, 12, 11)
    net.graph.output("y", net.graph.emit(Sum(), net.convolved(x, 32), x))
    net.run()
    executable = compile(net.graph, "onednn")
    executable.run(net.feeds)
    planes = [p for p in places(executable) if p[1] - p[0] == 4 * 32 * 12 * 11 * 4]
    assert len(planes) == len(set(planes))


def test_gradients_go_through_sums_and_relus_in_one_kernel() -> None:
    """d relu(a) is the gradient of a conv that reads it, plus what comes around that conv."""
    net = Net()
    x = net.input(8, 32, 12, 12)
    a = net.graph.emit(Relu(), net.graph.emit(Sum(), x, net.input(8, 32, 12, 12)))
    b = net.convolved(a, 32)
    y = net.graph.emit(Sum(), a, b)
    weight = b.producer.inputs[1]
    found = vjp(net.graph, {y: net.input(8, 32, 12, 12)}, [x, weight])
    net.graph.output("dx", found[x])
    net.graph.output("dw", found[weight])
    kernels = net.run()
    assert kernels.count(LLVM) == 2
    assert not any("relu" in k or "sum" in k for k in kernels)


@pytest.mark.parametrize(
    "op",
    [
        Conv((2, 2), (1, 1, 1, 1), (1, 1)),
        Conv((1, 1), (2, 2, 2, 2), (2, 2)),
        Conv((1, 1), (1, 1, 1, 1), (1, 1), groups=2),
    ],
    ids=["stride", "dilation", "groups"],
)
def test_other_windows_are_left_to_the_library(op: Conv) -> None:
    net = Net()
    net.graph.output("y", net.convolved(net.input(4, 32, 12, 12), 32, op))
    assert LLVM not in net.run()


def test_few_channels_are_left_to_the_library() -> None:
    net = Net()
    net.graph.output("y", net.convolved(net.input(4, 2, 12, 12), 32))
    assert LLVM not in net.run()


def test_reduced_precision_is_left_to_the_library() -> None:
    net = Net()
    net.graph.output("y", net.convolved(net.input(4, 32, 12, 12), 32))
    executable = compile(net.graph, "onednn", fpmath="bf16")
    executable.run(net.feeds)
    assert LLVM not in kernels_of(executable)


def test_without_a_compiler_the_library_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "missing", lambda: "llvmlite is not installed")
    net = Net()
    net.graph.output("y", net.convolved(net.input(4, 32, 12, 12), 32))
    assert LLVM not in net.run()
