"""Every recorded case of re-parameterisation is fused by the pass from its unfused graph.

`CASES` says of each whether it must match, under which options, and into what; `REFUSED` lists the
conventions that no convolution equals. Recordings: ParaDise, `reparam_cases.npz` and its blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pytest
from goldens import golden

from branchgraph.ir.builder import (
    average_pool,
    concat,
    conv,
    dense,
    merge_sum,
    relu,
    reshape,
    softmax,
    weighted_sum,
)
from branchgraph.ir.functions import scale_channels
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.norm import BatchNormInference
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType
from branchgraph.nets.paradise import exchange_name, pd_perceptron
from branchgraph.nets.paradise_blocks import ac, pd_a, pd_b
from branchgraph.passes.base import Result
from branchgraph.passes.checking import check_claim
from branchgraph.passes.fuse_branches import FuseBranches
from branchgraph.passes.materialise import evaluate_origin, materialise
from branchgraph.passes.specialise import specialise

Arrays = Mapping[str, np.ndarray]
#: float64, sums of up to a few hundred terms in another order.
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


@cache
def recorded(name: str) -> Arrays:
    with np.load(golden(f"paradise/{name}.npz")) as arrays:
        return dict(arrays)


def case_arrays(case: str) -> Arrays:
    arrays = recorded("reparam_cases")
    return {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith(f"{case}/")}


class Net:
    """A float64 graph whose states hold the arrays of a case."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self.graph = Graph("case")
        self.store = Store()
        self.x = self.input("input")

    def input(self, name: str) -> Value:
        return self.graph.input(name, ("N", *self.arrays[name].shape[1:]), DType.F64)

    def read(self, name: str, role: Role = Role.PARAMETER) -> Value:
        array = self.arrays[name]
        state = State(name, array.shape, DType.F64, role)
        self.store[state] = array
        return self.graph.read(state)

    def conv(self, x: Value, weight: str, bias: str = "", **geometry: object) -> Value:
        w = self.read(weight)
        b = self.read(bias) if bias in self.arrays and bias else False
        return conv(x, w.shape[0], w.shape[2:], weight=w, bias=b, **geometry)  # type: ignore[arg-type]

    def dense(self, x: Value, weight: str, bias: str) -> Value:
        w = self.read(weight)
        return dense(x, w.shape[0], weight=w, bias=self.read(bias))  # type: ignore[arg-type]

    def norm(self, x: Value, name: str) -> Value:
        roles = {"weight": Role.PARAMETER, "bias": Role.PARAMETER}
        parts = ("weight", "bias", "running_mean", "running_var")
        states = [self.read(f"{name}.{p}", roles.get(p, Role.STATISTIC)) for p in parts]
        eps = float(recorded("reparam_cases")["bn_eps"])
        return self.graph.emit(BatchNormInference(eps=eps), x, *states)


# -- the unfused graphs ----------------------------------------------------------------------------


def conv_norm(net: Net) -> Value:
    groups, dilation = int(net.arrays["groups"]), int(net.arrays["dilation"])
    geometry = {"groups": groups, "dilation": dilation, "pad": dilation}
    return net.norm(net.conv(net.x, "weight", "bias", **geometry), "bn")


def parallel(net: Net) -> Value:
    branches = []
    for name in ("k5", "k3", "k1", "k1x3", "k3x1", "k1x5", "g3"):
        kernel = net.arrays[f"branch.{name}.weight"].shape[2:]
        h = net.conv(
            net.x,
            f"branch.{name}.weight",
            stride=int(net.arrays["stride"]),
            pad=tuple(k // 2 for k in kernel),
            groups=3 if name == "g3" else 1,
        )
        branches.append(net.norm(h, f"branch.{name}.bn"))
    if "branch.identity.bn.weight" in net.arrays:
        branches.append(net.norm(net.x, "branch.identity.bn"))
    return merge_sum(*branches)


def misaligned(net: Net) -> Value:
    return merge_sum(
        net.conv(net.x, "weight_a", pad=(2, 1, 0, 1)), net.conv(net.x, "weight_b", pad=1)
    )


def sequence(net: Net, first: Mapping[str, object], second: Mapping[str, object]) -> Value:
    return net.conv(net.conv(net.x, "w1", "b1", **first), "w2", "b2", **second)


def depthwise_pointwise(net: Net) -> Value:
    h = net.conv(net.x, "dw_weight", "dw_bias", pad=1, groups=6)
    return net.conv(h, "pw_weight", "pw_bias")


def averaged(net: Net, divisor: str) -> Value:
    """A pooling by itself stays one; before a convolution it is a kernel."""
    eye = net.graph.read(State("eye", (6, 6, 1, 1), DType.F64))
    net.store[eye.state] = np.eye(6).reshape(6, 6, 1, 1)  # type: ignore[index]
    pooled = average_pool(net.x, 3, stride=1, pad=1, divisor=divisor)
    return conv(pooled, 6, 1, weight=eye, bias=False)


def point_average(net: Net) -> Value:
    h = net.norm(net.conv(net.x, "weight", pad=1), "bn1")
    return net.norm(average_pool(h, 3, stride=1), "bn2")


def outputs_concat(net: Net) -> Value:
    return concat(
        net.conv(net.x, "weight_a", "bias_a", pad=1), net.conv(net.x, "weight_b", "bias_b")
    )


def two_inputs(net: Net) -> Value:
    return merge_sum(
        net.conv(net.x, "weight_a", "bias_a", pad=1), net.conv(net.input("input_b"), "weight_b")
    )


def norm_conv(net: Net, pad: int) -> Value:
    return net.conv(net.norm(net.x, "bn"), "weight", "bias", pad=pad)


def dilated(net: Net) -> Value:
    return merge_sum(
        net.conv(net.x, "weight_dilated", dilation=2, pad=2),
        net.conv(net.x, "weight_plain", pad=1),
    )


def three(net: Net) -> list[Value]:
    weights, biases = net.read("weights"), net.read("biases")
    emit = net.graph.emit
    return [
        conv(
            net.x,
            4,
            3,
            pad=1,
            weight=reshape(emit(Slice(axis=0, start=k, size=1), weights), (4, 6, 3, 3)),
            bias=reshape(emit(Slice(axis=0, start=k, size=1), biases), (4,)),
        )
        for k in range(3)
    ]


def constant_gates(net: Net) -> Value:
    alpha = net.read("alpha")
    gates = [net.graph.emit(Slice(axis=0, start=k, size=1), alpha) for k in range(3)]
    return weighted_sum(three(net), gates)


def sample_gates(net: Net) -> Value:
    gate = reshape(net.input("gate"), (net.x.shape[0], 3, 1, 1))
    gates = [net.graph.emit(Slice(axis=1, start=k, size=1), gate) for k in range(3)]
    return weighted_sum(three(net), gates)


def excited(net: Net) -> Value:
    return scale_channels(three(net)[0], net.input("se_scale"))


def linear_chain(net: Net) -> Value:
    both = merge_sum(net.dense(net.x, "w1", "b1"), net.dense(net.x, "w2", "b2"))
    return net.norm(net.dense(both, "w3", "b3"), "bn")


def residual(net: Net) -> Value:
    return merge_sum(net.x, net.conv(net.x, "weight", "bias", pad=1))


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What must come out: one layer with the recorded weight and bias, and these pads."""

    build: Callable[[Net], Value]
    rules: str
    options: str = ""
    output: str = "output"
    pad: tuple[int, ...] = (1, 1, 1, 1)
    dense: bool = False


#: Case and convention to what must match; several conventions of one case have a suffix.
CASES = {
    "conv_bn": Case(conv_norm, "R1"),
    "conv_bias_bn": Case(conv_norm, "R1"),
    "group_conv_bn": Case(conv_norm, "R1"),
    "depthwise_bn": Case(conv_norm, "R1"),
    "dilated_bn": Case(conv_norm, "R1", pad=(2, 2, 2, 2)),
    "parallel_sum_s1": Case(parallel, "R1+R3+R4+R5", pad=(2, 2, 2, 2)),
    "parallel_sum_s2": Case(parallel, "R1+R3+R4", pad=(2, 2, 2, 2)),
    "parallel_misaligned": Case(misaligned, "R3", pad=(2, 1, 1, 1)),
    "seq_1x1_3x3:pad_first": Case(
        partial(sequence, first={"pad": 1}, second={}), "R6", output="output_pad_first"
    ),
    "seq_3x3_1x1_s2": Case(partial(sequence, first={"pad": 1, "stride": 2}, second={}), "R7"),
    "depthwise_pointwise": Case(depthwise_pointwise, "R7", "grow=true"),
    "seq_3x3s2_2x2": Case(partial(sequence, first={"pad": 1, "stride": 2}, second={}), "R8"),
    "avg3_s1_p1:counted": Case(partial(averaged, divisor="kernel"), "R7+R9", "grow=true"),
    "avg3_s1_p1:padded": Case(partial(averaged, divisor="padded"), "R7+R9", "grow=true"),
    "conv1x1_bnpad_avg_bn": Case(point_average, "R1+R6+R9", "grow=true"),
    "concat_outputs": Case(outputs_concat, "R10", "grow=true"),
    "sum_of_two_inputs": Case(two_inputs, "R11", "concats=true,grow=true"),
    "bn_before_conv:pad0": Case(
        partial(norm_conv, pad=0), "R2", output="output_pad0", pad=(0, 0, 0, 0)
    ),
    "dilated_plus_plain": Case(dilated, "R3+R12", "grow=true", pad=(2, 2, 2, 2)),
    "gates:alpha": Case(constant_gates, "R3+R13", output="output_alpha"),
    "linear_chain": Case(linear_chain, "R1+R3+R14", dense=True),
    "residual_linear": Case(residual, "R3+R5"),
}


def net_of(name: str, build: Callable[[Net], Value]) -> Net:
    net = Net(case_arrays(name.partition(":")[0]))
    net.graph.output("y", build(net))
    return net


def fused(net: Net, options: str) -> Result:
    """The rewritten graph; each part and the whole are compared, and nothing is left to match."""
    step = FuseBranches.from_spec(f"fuse_branches:{options}" if options else "fuse_branches")
    result = step.run(net.graph, record=True)
    check_claim(net.graph, result.graph, "exact", report=result.report)
    assert not step.run(result.graph).report.matches
    return result


def outputs(graph: Graph, net: Net) -> dict[str, np.ndarray]:
    feeds = {k: net.arrays[k] for k in graph.inputs}
    return interpret(graph, feeds, net.store, DType.F64).outputs


def deployed(result: Result, net: Net) -> Graph:
    """The graph with states in place of expressions, their values in the store of `net`."""
    graph, origin = materialise(result.graph)
    evaluate_origin(origin, net.store)
    return graph


def rules_of(result: Result) -> str:
    """All rules that matches name, joined by +; every match is exact."""
    matches = result.report.matches
    assert all(", exact, " in m for m in matches)
    found = {r for m in matches for r in m.rpartition(": ")[2].partition(",")[0].split("+")}
    return "+".join(sorted(found, key=lambda r: int(r[1:])))


@pytest.mark.parametrize("name", CASES)
def test_the_case_becomes_the_recorded_layer(name: str) -> None:
    case = CASES[name]
    net = net_of(name, case.build)
    np.testing.assert_allclose(outputs(net.graph, net)["y"], net.arrays[case.output], **TIGHT)
    result = fused(net, case.options)
    assert rules_of(result) == case.rules
    graph = deployed(result, net)
    *before, layer = graph.nodes
    assert [n.op.opcode for n in before] == (["concat"] if "two_inputs" in name else [])
    assert layer.op.opcode == ("dense" if case.dense else "conv")
    assert case.dense or layer.op.attributes()["pad"] == case.pad
    np.testing.assert_allclose(outputs(graph, net)["y"], net.arrays[case.output], **TIGHT)
    for value, key in zip(layer.inputs[1:], ("fused_weight", "fused_bias")):
        assert value.state is not None
        np.testing.assert_allclose(net.store[value.state], net.arrays[key], **TIGHT)


#: Conventions that no convolution equals: the case, its graph, the truth, what the reason says,
#: and, where a bias map repairs it, the recorded map.
REFUSED = {
    "seq_1x1_3x3:midpad_zero": (
        partial(sequence, first={}, second={"pad": 1}), "output_midpad_zero",
        "R6: a bias meets zero padding; bias_maps=true", "bias_map",
    ),
    "bn_before_conv:pad1": (
        partial(norm_conv, pad=1), "output_pad1",
        "R2: a bias meets zero padding; bias_maps=true", "bias_map_pad1",
    ),
    "avg3_s1_p1:excluded": (
        partial(averaged, divisor="inside"), "output_exclude_pad",
        "R9: .*the divisor leaves the padding out", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_inexact_is_refused_with_the_reason(name: str) -> None:
    build, truth, reason, _ = REFUSED[name]
    net = net_of(name, build)
    np.testing.assert_allclose(outputs(net.graph, net)["y"], net.arrays[truth], **TIGHT)
    report = fused(net, "grow=true").report
    assert not report.matches
    assert any(re.match(reason, why) for _, why in report.refusals), report.refusals


@pytest.mark.parametrize("name", [n for n, (*_, repair) in REFUSED.items() if repair])
def test_a_bias_map_repairs_it_where_the_size_is_known(name: str) -> None:
    build, truth, _, repair = REFUSED[name]
    net = net_of(name, build)
    result = fused(net, "bias_maps=true")
    assert "exact for this size" in result.report.matches[0]
    graph = deployed(result, net)
    layer, add = graph.nodes
    assert (layer.op.opcode, add.op.opcode) == ("conv", "add")
    np.testing.assert_allclose(outputs(graph, net)["y"], net.arrays[truth], **TIGHT)
    weight, bias = (value_of(net, v) for v in layer.inputs[1:])
    np.testing.assert_allclose(weight, net.arrays["fused_weight"], **TIGHT)
    whole = value_of(net, add.inputs[1]) + bias.reshape(1, -1, 1, 1)
    np.testing.assert_allclose(whole, net.arrays[str(repair)], **TIGHT)


def value_of(net: Net, value: Value) -> np.ndarray:
    assert value.state is not None
    return net.store[value.state]


def test_every_recorded_case_is_in_a_table() -> None:
    names = {k.partition("/")[0] for k in recorded("reparam_cases") if "/" in k}
    listed = {n.partition(":")[0] for n in (*CASES, *REFUSED)}
    assert names == listed


# -- kernels for each sample -----------------------------------------------------------------------


def sample_layer(graph: Graph) -> Node:
    (node,) = (n for n in graph.nodes if n.op.opcode == "sample_conv")
    return node


def test_gates_for_each_sample_mix_the_recorded_kernels() -> None:
    net = net_of("gates", sample_gates)
    result = fused(net, "")
    assert ": R13, exact, " in result.report.matches[-1]
    graph = deployed(result, net)
    for key, value in zip(("weight", "bias"), sample_layer(graph).inputs[1:]):
        graph.output(key, value)
    found = outputs(graph, net)
    np.testing.assert_allclose(found["y"], net.arrays["output_gate"], **TIGHT)
    np.testing.assert_allclose(found["weight"], net.arrays["sample_weight"], **TIGHT)
    np.testing.assert_allclose(found["bias"], net.arrays["sample_bias"], **TIGHT)


def test_an_excited_convolution_is_scaled_afterwards_unless_kernels_are_asked_for() -> None:
    net = net_of("gates", excited)
    report = fused(net, "").report
    assert not report.matches
    assert "R13: it would raise MACs" in report.refusals[0][1]
    graph = deployed(fused(net, "grow=true"), net)
    assert graph.nodes[-1].op.opcode == "sample_conv"
    np.testing.assert_allclose(outputs(graph, net)["y"], net.arrays["output_se"], **TIGHT)


# -- blocks ----------------------------------------------------------------------------------------


def block_net(name: str, block: Callable[[Value], Value]) -> tuple[Graph, Store]:
    arrays = recorded(name)
    graph = Graph("block")
    graph.output("y", block(graph.input("input", ("N", *arrays["input"].shape[1:]))))
    graph = specialise(graph, training=False)
    return graph, Store({s: arrays[exchange_name(s).partition(".")[2]] for s in graph.states})


PD_A = {
    "pd_a_c64_c64_s1": partial(pd_a, filters=64, name="block"),
    "pd_a_c64_c128_s2": partial(pd_a, filters=128, stride=2, name="block"),
    "pd_a_c128_c128_s1": partial(pd_a, filters=128, name="block"),
}
PD_B = {
    "pd_b_c64_c64_s1": partial(pd_b, filters=64, name="block"),
    "pd_b_c64_c128_s2": partial(pd_b, filters=128, stride=2, name="block"),
}


@pytest.mark.parametrize("name", PD_A)
def test_pd_a_is_one_convolution_with_the_recorded_weight(name: str) -> None:
    arrays = recorded(name)
    graph, store = block_net(name, PD_A[name])
    result = FuseBranches().run(graph)
    assert not result.report.refusals
    expressions = interpret(result.graph, {"input": arrays["input"]}, store, DType.F64)
    np.testing.assert_allclose(expressions.outputs["y"], arrays["output_f64"], **TIGHT)
    plain, origin = materialise(result.graph)
    evaluate_origin(origin, store)
    (layer,) = plain.nodes
    assert layer.op.attributes()["groups"] == 1
    for value, key in zip(layer.inputs[1:], ("fused.weight", "fused.bias")):
        assert value.state is not None
        assert value.state.name == f"block.{key.partition('.')[2]}"
        np.testing.assert_allclose(store[value.state], arrays[key], rtol=1e-6, atol=1e-6)
    run = interpret(plain, {"input": arrays["input"]}, store)
    bound = 2e-6 * max(1.0, float(np.abs(arrays["output"]).max()))
    assert np.abs(run.outputs["y"] - arrays["output"]).max() <= bound


@pytest.mark.parametrize("name", PD_B)
def test_pd_b_mixes_the_recorded_kernels_for_each_sample(name: str) -> None:
    arrays = recorded(name)
    graph, store = block_net(name, PD_B[name])
    result = FuseBranches().run(graph)
    assert ": R3+R4+R13, exact, " in result.report.matches[-1]
    plain, origin = materialise(result.graph)
    evaluate_origin(origin, store)
    node = sample_layer(plain)
    for key, value in zip(("weight", "bias"), node.inputs[1:]):
        plain.output(key, value)
    found = interpret(plain, {"input": arrays["input"]}, store, DType.F64).outputs
    np.testing.assert_allclose(found["bias"], arrays["sample_kernel.bias"], rtol=1e-6, atol=1e-6)
    if "sample_kernel.weight" in arrays:
        expected = arrays["sample_kernel.weight"]
        np.testing.assert_allclose(found["weight"], expected, rtol=1e-6, atol=1e-6)
    expected = arrays.get("output_f64", arrays["output"])
    bound = 2e-6 * max(1.0, float(np.abs(expected).max()))
    assert np.abs(found["y"] - expected).max() <= bound


#: Case of the skeleton to its block; alone it grows from 6 taps to 9 or more.
AC = {
    "ac_s1": partial(ac, filters=24, name="block"),
    "ac_s2": partial(ac, filters=24, stride=2, name="block"),
    "ac_k5_pad2": partial(ac, filters=8, kernel=5, pad=2, name="block"),
    "ac_k3_pad2": partial(ac, filters=8, kernel=3, pad=2, name="block"),
}


@pytest.mark.parametrize("name", AC)
def test_the_skeleton_becomes_one_convolution(name: str) -> None:
    arrays = {
        k.partition(".")[2]: v
        for k, v in recorded("baseline_blocks").items()
        if k.startswith(f"{name}.")
    }
    x = arrays["input"]
    filters = arrays["output"].shape[1]
    graph = Graph("block")
    y = AC[name](graph.input("x", ("N", *x.shape[1:])), filters=filters)
    graph.output("y", y)
    graph = specialise(graph, training=False)
    store = Store({s: arrays[exchange_name(s).partition(".")[2]] for s in graph.states})
    result = FuseBranches(grow=True).run(graph)
    assert sum(n.op.opcode == "conv" for n in materialise(result.graph)[0].nodes) == 1
    found = interpret(result.graph, {"x": x}, store, DType.F64).outputs["y"]
    bound = 2e-6 * max(1.0, float(np.abs(arrays["output"]).max()))
    assert np.abs(found - arrays["output"]).max() <= bound


def test_the_doubled_perceptron_is_the_plain_one() -> None:
    arrays = recorded("mnist_pd")
    graph = specialise(pd_perceptron("pd_a"), training=False)
    store = Store({s: arrays[f"pda.{exchange_name(s)}"] for s in graph.states})
    result = FuseBranches().run(graph)
    plain, origin = materialise(result.graph)
    evaluate_origin(origin, store)
    opcodes = [n.op.opcode for n in plain.nodes]
    assert opcodes == ["reshape", "dense", "relu", "dense"]
    x = arrays["pda.input"]
    before, after = (
        interpret(g, {"x": x}, store, DType.F64).outputs["logits"] for g in (graph, result.graph)
    )
    np.testing.assert_allclose(after, before, **TIGHT)


def test_pd_b_with_other_branches_beside_it_keeps_them() -> None:
    graph = Graph("beside")
    x = graph.input("x", ("N", 64, 9, 9))
    graph.output("y", relu(merge_sum(pd_b(x, 64, name="block"), relu(x), softmax(x))))
    graph = specialise(graph, training=False)
    result = FuseBranches().run(graph, record=True)
    check_claim(graph, result.graph, "exact", report=result.report)
    opcodes = [n.op.opcode for n in materialise(result.graph)[0].nodes]
    assert opcodes.count("sample_conv") == 1
    assert opcodes.count("conv") == 0
