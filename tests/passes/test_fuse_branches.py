"""Linear branches fuse exactly, in whole networks too, or the pass says why not."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from builders import EXACT, image_input, random_graphs, randomised
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.ir.builder import (
    average_pool,
    batch_norm,
    concat,
    conv,
    dense,
    flatten,
    gate,
    global_average_pool,
    max_pool,
    merge_mean,
    merge_sum,
    relu,
    reshape,
    sigmoid,
    softmax,
    weighted_sum,
)
from branchgraph.ir.cost import cost, parameter_count
from branchgraph.ir.errors import FormatError, ShapeError
from branchgraph.ir.functions import (
    broadcast_to,
    mixed_conv,
    pad,
    reduce_mean,
    sample_conv,
    scale_channels,
)
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import cast
from branchgraph.ir.ops.linear import MatMul
from branchgraph.ir.ops.reshape import Slice, Split
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType
from branchgraph.nets.paradise import ac_resnet, imagenet_resnet, pd_a_resnet, pd_b_resnet
from branchgraph.nets.reparameterised import acnet, dbb, dbb_resnet, repvgg, repvgg_unit
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.checking import check_claim
from branchgraph.passes.fuse_branches import FuseBranches
from branchgraph.passes.materialise import evaluate_origin, materialise
from branchgraph.passes.pipeline import Pipeline
from branchgraph.passes.specialise import specialise

Layers = Callable[[Value], Value]


def declared(layers: Layers, channels: int = 4, size: int = 7) -> Graph:
    graph = Graph("net")
    graph.output("y", layers(image_input(graph, channels, size)))
    return graph


def fused(
    layers: Layers, channels: int = 4, size: int = 7, **options: object
) -> tuple[Graph, Report]:
    """The fused graph with states for expressions; it is checked, and no second match is found."""
    graph = specialise(declared(layers, channels, size), training=False)
    step = FuseBranches(**options)  # type: ignore[arg-type]
    result = step.run(graph, record=True)
    check_claim(graph, result.graph, "exact", report=result.report)
    plain = materialise(result.graph)[0]
    assert not step.run(result.graph).report.matches
    assert not step.run(plain).report.matches
    assert result.report.macs[1] <= result.report.macs[0] or options.get("grow")
    return plain, result.report


def opcodes(graph: Graph) -> list[str]:
    return [n.op.opcode for n in graph.nodes]


# -- layers that become one ------------------------------------------------------------------------


def normed(x: Value, filters: int = 4, kernel: int = 3, **geometry: object) -> Value:
    return batch_norm(conv(x, filters, kernel, **geometry))  # type: ignore[arg-type]


def learned(x: Value, shape: tuple[int, ...], name: str = "scale") -> Value:
    return x.graph.read(State(name, shape))


def halves(x: Value) -> list[Value]:
    """Every second row and column."""
    rows = x.graph.emit(Slice(axis=2, start=0, size=4, step=2), x)
    return [x.graph.emit(Slice(axis=3, start=0, size=4, step=2), rows)]


def cut(x: Value, start: int, size: int, step: int = 1, axis: int = 1) -> Value:
    return x.graph.emit(Slice(axis=axis, start=start, size=size, step=step), x)


def shifted(x: Value, down: int, axis: int = 2) -> Value:
    """x moved by some rows or columns, zeros where it came from."""
    begin = [0] * 4
    begin[axis] = down
    return cut(pad(x, begin, (0,) * 4), 0, 7, axis=axis)


def for_all(x: Value, scores: Value) -> list[Value]:
    """Weights of branches [N, 1, 1, 1], written for each sample, but the same for all."""
    ways = scores.shape[0]
    gates = softmax(broadcast_to(scores, (x.shape[0], ways)))
    return [cut(_columns(gates), k, 1) for k in range(int(str(ways)))]


def closed(x: Value, weight: Value) -> list[Value]:
    """PD-B's gate, the weight of its last layer given."""
    gates = softmax(dense(relu(dense(global_average_pool(x), 3)), 2, weight=weight))
    return [cut(_columns(gates), k, 1) for k in range(2)]


def pair(x: Value) -> list[Value]:
    return [conv(x, 4, 3, pad=1, name=f"conv{k}") for k in range(2)]


def mixed(x: Value, gates: Value, filters: int = 4) -> Value:
    """A sum of kernels for each sample, as CondConv declares it."""
    count = gates.shape[1]
    weights = learned(x, (int(str(count)), filters, 4, 3, 3), "kernels")
    return mixed_conv(x, weights, gates, learned(x, (int(str(count)), filters), "biases"), pad=1)


def constant(x: Value, value: float, shape: tuple[object, ...]) -> Value:
    return x.graph.emit(Full(value=value, shape=shape))  # type: ignore[arg-type]


def twice_normed(x: Value) -> Value:
    return batch_norm(merge_sum(normed(x, pad=1), normed(x, kernel=1)))


ONE_CONVOLUTION: dict[str, Layers] = {
    "R1 norm of a strided, dilated, grouped one": lambda x: normed(
        x, stride=2, dilation=2, groups=2, pad=2
    ),
    "R1 norm after the sum": twice_normed,
    "R2 norm before an unpadded one": lambda x: conv(batch_norm(x), 6, 3),
    "R2 scale before a padded grouped one": lambda x: conv(
        x * learned(x, (4, 1, 1)), 6, 3, pad=1, groups=2
    ),
    "R3 one axis padded more": lambda x: merge_sum(
        conv(x, 5, 3, pad=1), conv(x, 5, (3, 1), pad=(1, 0)), conv(x, 5, 3, pad=(0, 2, 2, 0))
    ),
    "R3 mean": lambda x: merge_mean(conv(x, 4, 3, pad=1), conv(x, 4, 1), conv(x, 4, 3, pad=1)),
    "R3 add and subtract": lambda x: conv(x, 4, 3, pad=1) + conv(x, 4, 1) - conv(x, 4, 1),
    "R3 the same value twice": lambda x: (lambda h: merge_sum(h, h))(conv(x, 4, 3, pad=1)),
    "R3 sums of sums": lambda x: merge_sum(
        merge_sum(conv(x, 4, (3, 1), pad=(1, 0)), conv(x, 4, (1, 3), pad=(0, 1))),
        conv(x, 4, 3, pad=1),
    ),
    "R4 groups that need no common ones": lambda x: merge_sum(
        conv(x, 8, 3, pad=1, groups=2), conv(x, 8, 3, pad=1, groups=4)
    ),
    "R4 two groups of one": lambda x: merge_sum(
        conv(x, 8, 3, pad=1), conv(x, 8, 3, pad=1, groups=4)
    ),
    "R5 identity, norm and a padded shift": lambda x: merge_sum(
        conv(x, 4, 3, pad=1, groups=2), batch_norm(x), x
    ),
    "R5 sampled shortcut": lambda x: merge_sum(conv(x, 4, 3, stride=2, pad=1), *halves(x)),
    "R5 zeros around": lambda x: conv(pad(x, (0, 0, 1, 0), (0, 0, 2, 1)), 4, 3),
    "R6 a strided 1x1 first": lambda x: conv(
        conv(x, 3, 1, stride=2, bias=False), 5, 3, pad=1, stride=2
    ),
    "R6 in groups": lambda x: conv(conv(x, 8, 1, groups=4, pad=1), 4, 3, groups=2),
    "R7": lambda x: conv(conv(x, 9, 3, pad=1, dilation=2), 4, 1, stride=2),
    "R8 unpadded": lambda x: conv(conv(x, 9, 3, stride=2, pad=1), 3, 2),
    "R8 full padding first": lambda x: conv(conv(x, 9, 2, pad=1, bias=False), 2, 2, pad=1),
    "R8 depthwise twice": lambda x: conv(conv(x, 4, 3, groups=4), 4, 3, groups=4),
    "R8 dilated twice": lambda x: conv(conv(x, 30, 2, dilation=2), 2, 2, dilation=2),
    "R9 pooled and thinned": lambda x: average_pool(conv(x, 4, 3, pad=1), 2, stride=2),
    "R9 pooling as a branch": lambda x: merge_sum(
        conv(x, 4, 3, pad=1), average_pool(x, 3, stride=1, pad=1)
    ),
    "R10 side by side": lambda x: concat(conv(x, 3, 3, pad=1), normed(x, 5, pad=1)),
    "R10 dual: some channels": lambda x: cut(conv(x, 9, 3, pad=1), 2, 5),
    "R10 dual: every third channel of groups": lambda x: cut(conv(x, 12, 3, groups=2), 1, 4, 3),
    "R10 dual: channels of one group": lambda x: cut(conv(x, 12, 3, groups=2), 6, 3),
    "R10 dual: before a norm": lambda x: batch_norm(cut(conv(x, 9, 3, pad=1), 1, 4, 2)),
    "R12 dilations with a common divisor": lambda x: merge_sum(
        conv(x, 4, 3, dilation=4, pad=4), conv(x, 4, 5, dilation=2, pad=4)
    ),
    "R13 scales, shifts and signs": lambda x: -(
        (conv(x, 4, 3) * 2.0 + learned(x, (4, 1, 1), "shift")) / learned(x, (1, 4, 1, 1))
    ),
    "R13 fixed gates": lambda x: merge_sum(
        gate(conv(x, 4, 3, pad=1), learned(x, (), "open")), conv(x, 4, 3, pad=1)
    ),
    "R13 gates that are the same for all samples": lambda x: weighted_sum(
        pair(x), for_all(x, learned(x, (2,), "scores"))
    ),
    "R13 ones for all samples": lambda x: gate(
        conv(x, 4, 3), constant(x, 1.0, (x.shape[0], 4, 1, 1))
    ),
    "R13 divided by the same for all samples": lambda x: conv(x, 4, 3)
    / constant(x, 3.0, (x.shape[0], 1, 1, 1)),
    "R13 a gate that is deaf": lambda x: weighted_sum(pair(x), closed(x, constant(x, 0.0, (2, 3)))),
    "R13 kernels that are the same for all samples": lambda x: batch_norm(
        mixed(x, softmax(broadcast_to(learned(x, (3,), "scores"), (x.shape[0], 3))))
    ),
    "R15 shifts": lambda x: merge_sum(
        conv(x, 4, 3, pad=1), shifted(x, 1), shifted(shifted(x, 1, axis=3), 1)
    ),
    "R15 the inside": lambda x: merge_sum(conv(x, 4, 3), cut(cut(x, 1, 5, axis=2), 2, 5, axis=3)),
    "R15 a fixed filter": lambda x: conv(
        conv(x, 4, 3, groups=4, bias=False, weight=_fixed_filter(x)), 1, 1
    ),
    "one axis": lambda x: _lines(x),
    "RepVGG": partial(repvgg_unit, filters=4),
    "RepVGG in groups": partial(repvgg_unit, filters=4, groups=2),
    "ACNet": partial(acnet, filters=6),
    "ACNet, 5x5 strided": partial(acnet, filters=6, kernel=5, stride=2),
    "DBB": partial(dbb, filters=6),
    "DBB strided": partial(dbb, filters=4, kernel=5, stride=2),
}  # fmt: skip


def _fixed_filter(x: Value) -> Value:
    """A kernel written as a constant."""
    return x.graph.emit(Full(value=0.125, shape=(4, 1, 3, 3)))


def _lines(x: Value) -> Value:
    """Convolutions over one axis."""
    h = reshape(x, (x.shape[0], 4, 49))
    return merge_sum(conv(h, 4, 3, pad=1), conv(h, 4, 5, pad=2), conv(h, 4, 5, pad=(1, 3)))


#: Rewrites that cost more and have to be asked for.
GROWING: dict[str, Layers] = {
    "R3 1x1 and pooling": lambda x: merge_sum(
        conv(x, 4, 1), average_pool(x, 3, stride=1, pad=1, cover_all=True)
    ),
    "R7 depthwise, then 1x1": lambda x: conv(conv(x, 8, 3, pad=1, groups=4), 5, 1),
    "R7 1x1, then depthwise": lambda x: conv(conv(x, 8, 1, bias=False), 8, 3, pad=1, groups=8),
    "R8 depthwise after groups": lambda x: conv(
        conv(x, 8, 3, groups=2, dilation=2), 8, 2, groups=8
    ),
    "R9 before": lambda x: conv(average_pool(x, 2, stride=2, cover_all=True), 3, 3),
    "R9 sums": lambda x: conv(average_pool(x, 2, stride=2, divisor="one"), 3, 2),
    "R9 unpadded, counted inside": lambda x: conv(average_pool(x, 2, divisor="inside"), 3, 2),
    "R10 of several kernels": lambda x: concat(
        conv(x, 3, 3, pad=1), conv(x, 2, 1, bias=False), conv(x, 4, 5, pad=2, groups=2)
    ),
    "R10 dual: some depthwise channels": lambda x: cut(conv(x, 4, 3, groups=4), 1, 2),
    "R12 dilated and plain": lambda x: merge_sum(
        conv(x, 4, 3, pad=1), conv(x, 4, 3, dilation=2, pad=2)
    ),
}


@pytest.mark.parametrize("kind", ONE_CONVOLUTION)
def test_it_is_one_convolution(kind: str) -> None:
    graph, _ = fused(ONE_CONVOLUTION[kind])
    assert [c for c in opcodes(graph) if c != "reshape"] == ["conv"]


@pytest.mark.parametrize("kind", GROWING)
def test_what_costs_more_is_done_when_asked_for(kind: str) -> None:
    graph, report = fused(GROWING[kind])
    assert len(opcodes(graph)) > 1
    assert any("it would raise MACs" in why for _, why in report.refusals)
    graph, _ = fused(GROWING[kind], grow=True)
    assert opcodes(graph) == ["conv"]


def test_a_dense_layer_after_a_flattened_convolution_is_a_convolution() -> None:
    graph, report = fused(lambda x: dense(flatten(conv(x, 20, 3)), 3))
    assert opcodes(graph) == ["conv", "reshape"]
    assert ": R8+R14, exact, " in report.matches[-1] or ": R14, exact, " in report.matches[-1]


def test_a_classifier_on_pooled_features_stays_unless_asked_for() -> None:
    head: Layers = lambda x: dense(global_average_pool(x), 3)  # noqa: E731
    assert opcodes(fused(head)[0]) == ["reduce_mean", "dense"]
    assert opcodes(fused(head, grow=True)[0]) == ["conv", "reshape"]


def test_parts_of_a_sum_and_of_a_concat_are_fused() -> None:
    def layers(x: Value) -> Value:
        both = merge_sum(conv(x, 4, 3, pad=1), relu(x), conv(x, 4, 3, pad=1), name="sum")
        return concat(both, conv(x, 4, 3, pad=1), conv(x, 3, 3, pad=1), name="concat")

    graph, _ = fused(layers)
    assert Counter(opcodes(graph)) == {"conv": 2, "sum": 1, "concat": 1, "relu": 1}


def test_as_many_branches_are_fused_as_pay() -> None:
    def layers(x: Value) -> Value:
        return merge_sum(conv(x, 4, 3, pad=1), conv(x, 4, 1), conv(x, 4, 3, dilation=3, pad=3))

    graph, _ = fused(layers)
    assert Counter(opcodes(graph)) == {"conv": 2, "sum": 1}


def test_different_inputs_are_joined_when_a_concatenation_is_asked_for() -> None:
    def layers(x: Value) -> Value:
        return merge_sum(conv(relu(x), 4, 3, pad=1), conv(sigmoid(x), 4, 3, pad=1))

    graph, report = fused(layers)
    assert "concats=true" in report.refusals[-1][1]
    assert opcodes(graph).count("conv") == 2
    graph, report = fused(layers, concats=True)
    assert opcodes(graph) == ["relu", "sigmoid", "concat", "conv"]
    assert ": R11, exact, +0 MACs" in report.matches[0]


def test_gates_by_sample_mix_kernels_and_ungated_branches_count_as_they_are() -> None:
    def layers(x: Value) -> Value:
        means = global_average_pool(x)
        gates = [sigmoid(dense(means, w, name=f"g{w}")) for w in (1, 5)]
        scaled = scale_channels(conv(x, 5, 3, pad=1), gates[1])
        mixed = conv(x, 5, 3, pad=1) * _columns(gates[0])
        return merge_sum(scaled, mixed, conv(x, 5, 3, pad=1))

    graph, _ = fused(layers, size=12)
    assert Counter(opcodes(graph))["sample_conv"] == 1
    assert "conv" not in opcodes(graph)


def sample_gates(x: Value, ways: int, normal: bool = True) -> list[Value]:
    gates = dense(global_average_pool(x), ways, name="gates")
    columns = _columns(softmax(gates) if normal else sigmoid(gates))
    return [cut(columns, k, 1) for k in range(ways)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_gates_that_sum_to_one_save_a_product(order: tuple[int, ...]) -> None:
    def layers(x: Value, normal: bool) -> Value:
        gates = sample_gates(x, 3, normal)
        kernels = [conv(x, 4, 3, pad=1), conv(x, 4, 1), conv(x, 4, 3, pad=1, bias=False)]
        return weighted_sum(kernels, [gates[k] for k in order])

    (graph, report), (other, plain) = (fused(partial(layers, normal=n)) for n in (True, False))
    # One product an element of a kernel and of a bias.
    assert plain.macs[1] - report.macs[1] == 4 * 4 * 9 + 4
    assert [n.inputs[0].shape[1] for n in graph.nodes if n.op.opcode == "matmul"] == [2, 2]
    assert [n.inputs[0].shape[1] for n in other.nodes if n.op.opcode == "matmul"] == [3, 3]


@pytest.mark.parametrize("used", [(0, 1), (0, 1, 1), (0, 1, None)])
def test_gates_that_need_not_sum_to_one_are_all_multiplied(used: tuple[int | None, ...]) -> None:
    """Some of a softmax, one of it twice, and a branch without gate."""

    def layers(x: Value) -> Value:
        gates = sample_gates(x, 3)
        kernels = [conv(x, 4, 3, pad=1) for _ in used]
        return merge_sum(*(h if k is None else h * gates[k] for h, k in zip(kernels, used)))

    graph, _ = fused(layers)
    assert {n.inputs[0].shape[1] for n in graph.nodes if n.op.opcode == "matmul"} == {len(used)}


def test_all_forms_of_a_gated_block_are_equal() -> None:
    """Convolutions and their weighted sum, kernels mixed for each sample, these in groups of one
    convolution, and kernels mixed around the last one, for several samples of odd sizes."""
    rng = np.random.default_rng(3)
    samples, kernels = 3, rng.normal(size=(4, 6, 4, 3, 3))
    x, scores = rng.normal(size=(samples, 4, 7, 9)), rng.normal(size=(samples, 4))
    feeds = {"x": x, "scores": scores}

    def result(build: Callable[[Value, list[Value], Value], Value]) -> np.ndarray:
        graph = Graph("form")
        value = graph.input("x", x.shape, DType.F64)
        gates = softmax(graph.input("scores", scores.shape, DType.F64))
        states = [State(f"k{i}", k.shape, DType.F64) for i, k in enumerate(kernels)]
        graph.output("y", build(value, [graph.read(s) for s in states], gates))
        store = Store(dict(zip(states, kernels)))
        formed = FuseBranches().apply(graph) if build is summed else graph
        return interpret(formed, feeds, store, DType.F64).outputs["y"]

    def summed(x: Value, weights: list[Value], gates: Value) -> Value:
        layers = [conv(x, 6, 3, pad=1, weight=w, bias=False) for w in weights]
        return weighted_sum(layers, [cut(_columns(gates), k, 1) for k in range(4)])

    def by_sample(x: Value, weights: list[Value], gates: Value) -> Value:
        return mixed_conv(x, concat(*(_rows(w) for w in weights), axis=0), gates, pad=1)

    def in_groups(x: Value, weights: list[Value], gates: Value) -> Value:
        flat = concat(*(reshape(w, (1, 6 * 4 * 9)) for w in weights), axis=0)
        kernels = reshape(x.graph.emit(MatMul(), gates, flat), (samples * 6, 4, 3, 3))
        wide = reshape(x, (1, samples * 4, 7, 9))
        y = conv(wide, samples * 6, 3, pad=1, groups=samples, weight=kernels, bias=False)
        return reshape(y, (samples, 6, 7, 9))

    truth = result(lambda *args: summed(*args))
    for form in (by_sample, in_groups, summed):
        np.testing.assert_allclose(result(form), truth, **EXACT)


def _rows(x: Value) -> Value:
    return reshape(x, (1, *x.shape))


@pytest.mark.parametrize("normal", [True, False])
def test_a_norm_behind_a_mixture_is_folded_into_what_is_mixed(normal: bool) -> None:
    def layers(x: Value) -> Value:
        summed = weighted_sum(pair(x), sample_gates(x, 2, normal), name="sum")
        return batch_norm(summed) * learned(x, (4, 1, 1)) + 1.0

    graph, report = fused(layers, size=9)
    assert Counter(opcodes(graph))["sample_conv"] == 1
    assert not {"conv", "batch_norm_inference", "multiply"} & set(opcodes(graph))
    assert "R1+R13, exact" in " ".join(report.matches)


def test_a_norm_behind_excited_kernels_is_folded_too() -> None:
    def layers(x: Value) -> Value:
        gates = sigmoid(dense(global_average_pool(x), 4))
        return batch_norm(scale_channels(conv(x, 4, 3, pad=1, bias=False), gates))

    graph, _ = fused(layers, grow=True)
    assert Counter(opcodes(graph))["sample_conv"] == 1
    assert "batch_norm_inference" not in opcodes(graph)


def test_a_norm_behind_kernels_that_are_computed_stays() -> None:
    def layers(x: Value) -> Value:
        kernels = dense(global_average_pool(x), 4 * 4 * 9)
        y = sample_conv(x, reshape(kernels, (x.shape[0], 4, 4, 3, 3)), pad=1)
        return batch_norm(y, name="norm")

    _, report = fused(layers)
    reason = "R1: the kernels of sample_conv are no mixtures of fixed ones"
    assert report.refusals == [("norm", reason)]


def test_gates_that_differ_between_samples_stay_gates() -> None:
    """Numbers that are learned for each of two samples, and a gate whose last layer is not 0."""
    graph = Graph("given")
    x = graph.input("x", (2, 4, 7, 7))
    graph.output("y", conv(x, 4, 3, pad=1) * learned(x, (2, 4, 1, 1)))
    assert not FuseBranches().run(graph).report.matches
    graph, _ = fused(lambda x: weighted_sum(pair(x), closed(x, learned(x, (2, 3)))))
    assert Counter(opcodes(graph))["sample_conv"] == 1


def test_what_nobody_reads_of_a_split_layer_goes() -> None:
    def layers(x: Value) -> Value:
        h = conv(x, 9, 3, pad=1, groups=1, name="wide")
        first, _, last = x.graph.apply(Split(axis=1, sizes=(2, 3, 4)), h)
        return concat(relu(first), sigmoid(last))

    graph, _ = fused(layers)
    assert opcodes(graph) == ["conv", "split", "relu", "sigmoid", "concat"]
    assert graph.nodes[0].output.shape[1] == 6


def test_a_split_that_is_read_whole_stays() -> None:
    def layers(x: Value) -> Value:
        first, last = x.graph.apply(Split(axis=1, sizes=(3, 3)), conv(x, 6, 3))
        return merge_sum(relu(first), last)

    assert not fused(layers)[1].matches


def test_scales_in_place_of_norms_are_fused_while_they_are_trained() -> None:
    """Rule R16: one convolution a step, and the gradients of all branches."""

    def layers(x: Value) -> Value:
        scaled = [
            conv(x, 4, k, pad=k // 2, name=f"conv{k}") * learned(x, (4, 1, 1), f"scale{k}")
            for k in (1, 3)
        ]
        return batch_norm(merge_sum(*scaled), name="norm")

    graph = specialise(declared(layers), training=True)
    graph.output("loss", reduce_mean(relu(graph.outputs["y"]), (0, 1, 2, 3)))
    result = FuseBranches(rules=("R3", "R16")).run(graph)
    assert len(result.report.matches) == 3
    store = randomised(graph)
    x = np.random.default_rng(0).normal(size=(3, 4, 7, 7))
    before, after = (
        interpret(differentiate(g), {"x": x}, store, DType.F64) for g in (graph, result.graph)
    )
    assert before.gradients.keys() == after.gradients.keys()
    assert len(after.gradients) == 8
    for state, gradient in before.gradients.items():
        np.testing.assert_allclose(after.gradients[state], gradient, **EXACT)


def test_a_gated_sum_of_dense_layers_stays() -> None:
    def layers(x: Value) -> Value:
        means = global_average_pool(x)
        gates = [sigmoid(dense(means, 1, name=f"g{k}")) for k in range(2)]
        return weighted_sum([dense(means, 5, name=f"d{k}") for k in range(2)], gates)

    _, report = fused(layers)
    assert not report.matches
    assert any("R13: a product for each sample" in why for _, why in report.refusals)


def _columns(gates: Value) -> Value:
    return reshape(gates, (*gates.shape, 1, 1))


# -- refusals --------------------------------------------------------------------------------------


def both(first: Value, second: Value) -> Value:
    return merge_sum(first, second, name="sum")


def shared(x: Value) -> Value:
    h = conv(x, 4, 3, pad=1)
    return concat(batch_norm(h), relu(h))


def shared_branch(x: Value) -> Value:
    h = conv(x, 4, 3, pad=1)
    return concat(both(h, conv(x, 4, 3, pad=1)), relu(h))


def shared_channels(x: Value) -> Value:
    h = conv(x, 4, 3, pad=1)
    return concat(relu(cut(h, 0, 2)), relu(h))


def through_half(x: Value) -> Value:
    return cast(cast(conv(x, 4, 3, pad=1), DType.F64), DType.F32)


REFUSALS: dict[str, tuple[Layers, str]] = {
    "a value that is read elsewhere": (shared, "R1: conv is read elsewhere too"),
    "a branch that is read elsewhere": (shared_branch, "R3: conv is read elsewhere too"),
    "different strides": (
        lambda x: both(conv(x, 4, 3, stride=2, pad=1), conv(x, 4, 4)),
        "R3: the layers have different strides",
    ),
    "a max pooling beside": (
        lambda x: both(conv(x, 4, 3, pad=1), max_pool(x, 3, stride=1, pad=1, name="pool")),
        "R3: pool stands between the layers and their sum; it is not linear",
    ),
    "a nonlinearity in between": (
        lambda x: both(conv(x, 4, 3, pad=1), relu(conv(x, 4, 3, pad=1), name="relu")),
        "R3: relu stands between the layers and their sum; it is not linear",
    ),
    "channels of a value that is read elsewhere": (
        shared_channels, "R10: conv is read elsewhere too"
    ),
    "channels of groups": (
        lambda x: cut(conv(x, 4, 3, groups=4), 1, 2), "R10: it would raise MACs"
    ),
    "a nonlinearity before a norm": (
        lambda x: batch_norm(relu(conv(x, 4, 3))),
        "R1: no convolution or dense layer feeds it, but relu",
    ),
    "a max pooling before a norm": (
        lambda x: batch_norm(max_pool(conv(x, 4, 3), 2)),
        "R1: no convolution or dense layer feeds it, but max_pool",
    ),
    "different inputs": (
        lambda x: both(conv(relu(x), 4, 3), conv(sigmoid(x), 4, 3)),
        "R3: the operands are no layers of one value",
    ),
    "another dtype in between": (
        lambda x: both(through_half(x), conv(x, 4, 3, pad=1)),
        "R3: cast stands between the layers and their sum; it is not linear",
    ),
    "R2, padded": (lambda x: conv(batch_norm(x), 4, 3, pad=1), "R2: a bias meets zero padding"),
    "R6, padded": (
        lambda x: conv(conv(x, 4, 1), 4, 3, pad=1), "R6: a bias meets zero padding"
    ),
    "R8, padded": (
        lambda x: conv(conv(x, 20, 3, pad=1, bias=False), 2, 3, pad=1),
        "R8: spatial axis 0 is padded between two convolutions",
    ),
    "R9, padding left out": (
        lambda x: conv(average_pool(x, 3, stride=1, pad=1, divisor="inside"), 4, 1),
        "R9: average_pool: the divisor leaves the padding out",
    ),
    "R9, overhanging": (
        lambda x: conv(average_pool(x, 2, stride=2, cover_all=True, divisor="padded"), 4, 1),
        "R9: average_pool: windows overhang the end",
    ),
    "MACs": (
        lambda x: conv(conv(x, 4, 3, pad=1, groups=4), 8, 1),
        "R7: it would raise MACs from 3,332 to 14,112; grow=true",
    ),
    "weights": (
        lambda x: average_pool(conv(x, 4, 1, pad=(1, 1, 0, 0)), 2, stride=2),
        "R9: it would save no MACs and raise weights",
    ),
    "groups without a common divisor": (
        lambda x: both(conv(x, 12, 3, groups=2), conv(x, 12, 3, groups=3)),
        "R3: it would raise MACs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_the_reason_names_the_rule(kind: str) -> None:
    layers, reason = REFUSALS[kind]
    _, report = fused(layers, channels=12 if "divisor" in kind else 4)
    assert any(why.startswith(reason) for _, why in report.refusals), report.refusals


def test_a_root_is_not_fused_away() -> None:
    graph = Graph("root")
    h = graph.output("h", conv(image_input(graph), 4, 3, name="conv"))
    graph.output("y", batch_norm(h, name="norm"))
    report = FuseBranches().run(specialise(graph, training=False)).report
    assert report.refusals == [("norm", "R1: conv is read elsewhere too")]


def test_numbers_and_vectors_are_no_layers() -> None:
    """Losses have too few axes for channels; the graph of a training step is full of them."""
    graph = Graph("losses")
    for name, shape in (("number", ()), ("vector", ("N",))):
        loss, weight = (graph.input(f"{name}{k}", shape) for k in (1, 2))
        two = constant(loss, 2.0, loss.shape)
        graph.output(f"{name}.fixed", gate(loss / two, two) * two - two)
        graph.output(f"{name}.free", gate(loss, weight) * weight + loss / weight)
    result = FuseBranches(bias_maps=True, concats=True, grow=True).run(graph)
    assert not result.report.matches
    assert not result.report.refusals


def test_a_training_graph_stays_the_same_function() -> None:
    branches = declared(lambda x: relu(merge_sum(conv(x, 4, 3, pad=1), conv(x, 4, 1))))
    graph = specialise(branches, training=True)
    h = graph.outputs["y"]
    graph.output("loss", reduce_mean(h * h, (0, 1, 2, 3)) * graph.input("weight", (), default=0.5))
    graph.keep(output=lambda name: name == "loss")
    trained = differentiate(graph)
    result = FuseBranches().run(trained, record=True)
    assert result.report.matches
    check_claim(trained, result.graph, "exact", report=result.report)
    assert not FuseBranches().run(result.graph).report.matches


@pytest.mark.parametrize("training", [None, True])
def test_norms_that_are_not_fixed_are_refused_with_the_remedy(training: bool | None) -> None:
    graph = declared(partial(repvgg_unit, filters=4))
    given = specialise(graph, training=True) if training else graph
    report = FuseBranches().run(given).report
    assert not report.matches
    norms = [why for _, why in report.refusals if why.startswith("R1")]
    assert norms == ["R1: its statistics are not fixed; specialise(training=False)"] * 3


def test_a_bias_map_needs_a_known_size() -> None:
    graph = Graph("open")
    x = graph.input("x", (2, 4, "H"))
    graph.output("y", conv(conv(x, 4, 1), 4, 3, pad=1))
    report = FuseBranches(bias_maps=True).run(graph).report
    assert "the size is not known for a bias map; bind it" in report.refusals[0][1]


@pytest.mark.parametrize("zero", [False, True])
def test_a_value_for_each_channel_is_padded_where_no_scale_is_zero(zero: bool) -> None:
    """Exact for every size, and known to be so for the states that are given."""
    graph = Graph("open")
    x = graph.input("x", ("N", 4, "H", "W"))
    graph.output("y", conv(batch_norm(x, name="norm"), 6, 3, pad=(1, 0, 2, 1)))
    graph = specialise(graph, training=False)
    store = randomised(graph)
    if zero:
        (gamma,) = (s for s in graph.states if s.name == "norm.gamma")
        store[gamma] = np.arange(4, dtype=np.float32)
    step = FuseBranches(pad_values=True)
    result = step.run(graph, record=True, values=store)
    assert not step.run(result.graph, values=store).report.matches
    if zero:
        assert ("conv", "R2: a scale of norm is 0") in _shortened(result.report, 24)
        assert not result.report.matches
        return
    check_claim(graph, result.graph, "exact", report=result.report)
    assert opcodes(materialise(result.graph)[0]) == ["add", "conv"]
    for sizes in ((1, 5, 7), (3, 8, 9)):
        array = np.random.default_rng(0).normal(size=(sizes[0], 4, *sizes[1:]))
        before, after = (
            interpret(g, {"x": array}, store, DType.F64).outputs["y"] for g in (graph, result.graph)
        )
        np.testing.assert_allclose(after, before, **EXACT)


def _shortened(report: Report, size: int) -> list[tuple[str, str]]:
    return [(where, why[:size]) for where, why in report.refusals]


def test_padding_by_channel_needs_the_values_of_the_states() -> None:
    _, report = fused(REFUSALS["R2, padded"][0], pad_values=True)
    assert not report.matches
    assert any(
        why.startswith("R2: pad_values=true divides by scales") for _, why in report.refusals
    )


@pytest.mark.parametrize("kind", ["R2, padded", "R6, padded"])
def test_a_bias_map_repairs_padding(kind: str) -> None:
    graph, report = fused(REFUSALS[kind][0], bias_maps=True)
    assert opcodes(graph) == ["conv", "add"]
    assert ", exact for this size, " in report.matches[0]


def test_a_branch_with_a_bias_map_is_fused_with_its_neighbours() -> None:
    def layers(x: Value) -> Value:
        return batch_norm(both(conv(conv(x, 4, 1), 4, 3, pad=1), normed(x, pad=1)))

    graph, _ = fused(layers, bias_maps=True)
    assert opcodes(graph).count("conv") == 1


# -- options ---------------------------------------------------------------------------------------


def test_only_the_rules_that_are_named_are_used() -> None:
    layers = partial(repvgg_unit, filters=4)
    graph, _ = fused(layers, rules=("R1",))
    assert Counter(opcodes(graph)) == {"conv": 2, "batch_norm_inference": 1, "sum": 1}
    graph, _ = fused(layers, rules=("R1", "R3"))
    assert Counter(opcodes(graph)) == {"conv": 1, "batch_norm_inference": 1, "sum": 1}
    assert opcodes(fused(layers, rules=("R1", "R3", "R5"))[0]) == ["conv"]
    assert not fused(layers, rules=("R10",))[1].matches


def test_the_specification_string() -> None:
    step = Pass.from_spec("fuse_branches:rules=R1+R3,bias_maps=true")
    assert step == FuseBranches(rules=("R1", "R3"), bias_maps=True)
    assert Pass.from_spec(step.name) == step
    assert FuseBranches().name.startswith("fuse_branches:rules=all,")
    assert FuseBranches(rules=("R16",)).enabled == {"R13", "R16"}
    assert FuseBranches(rules=("R15",)).enabled == {"R3", "R6", "R15"}
    with pytest.raises(FormatError, match="rules are R1 to R16.*got R17"):
        FuseBranches(rules=("R1", "R17"))


# -- networks --------------------------------------------------------------------------------------


def deployed(graph: Graph) -> Graph:
    step = FuseBranches()
    result = step.run(specialise(graph, training=False))
    plain = materialise(result.graph)[0]
    assert not step.run(plain).report.matches
    return plain


#: Network to its trainable parameters with every batch norm folded, and the plain network.
FOLDED: dict[str, tuple[Graph, int, Graph | None]] = {
    "pd_a_resnet18": (pd_a_resnet(18, size=64), 11_684_712, imagenet_resnet(18, size=64)),
    "pd_a_resnet50": (pd_a_resnet(50, size=64), 25_530_472, imagenet_resnet(50, size=64)),
    "pd_a_resnet34": (pd_a_resnet(34, size=64), 21_789_160, imagenet_resnet(34, size=64)),
    "ac_resnet18": (ac_resnet(18, size=64), 11_684_712, imagenet_resnet(18, size=64)),
    "dbb_resnet18": (dbb_resnet(18, size=64), 11_684_712, imagenet_resnet(18, size=64)),
    "imagenet_resnet18": (imagenet_resnet(18, size=64), 11_684_712, imagenet_resnet(18, size=64)),
    "repvgg_a0": (repvgg("a0", size=64), 8_309_384, None),
    "repvgg_b1g2": (repvgg("b1g2", size=64), 41_360_104, None),
}


@pytest.mark.parametrize("name", FOLDED)
def test_networks_have_the_parameters_and_macs_of_the_plain_ones(name: str) -> None:
    graph, parameters, plain = FOLDED[name]
    found = deployed(graph)
    assert parameter_count(found) == parameters
    assert "batch_norm_inference" not in opcodes(found)
    if plain is not None:
        assert cost(found).per_sample().macs == cost(plain).per_sample().macs
        assert Counter(opcodes(found)) == Counter(opcodes(deployed(plain)))


def test_pd_a_resnet_at_full_size_has_the_published_cost() -> None:
    before, after = (deployed(g) for g in (imagenet_resnet(18), pd_a_resnet(18)))
    assert cost(after).per_sample() == cost(before).per_sample()
    assert cost(after, "paradise").per_sample() == cost(before, "paradise").per_sample()


def test_every_gated_block_of_pd_b_is_one_convolution_for_each_sample() -> None:
    found = Counter(opcodes(deployed(pd_b_resnet(18, size=64))))
    assert (found["sample_conv"], found["conv"]) == (16, 4)


@pytest.mark.parametrize(
    "network",
    [
        partial(pd_a_resnet, 18, size=32, classes=10),
        partial(pd_a_resnet, 50, size=32, classes=10),
        partial(pd_b_resnet, 18, size=64, classes=10),
        partial(dbb_resnet, 18, size=32, classes=10, width=16),
        partial(repvgg, "a0", size=32, classes=10),
    ],
)
def test_logits_stay_within_the_bound(network: Callable[[], Graph]) -> None:
    graph = specialise(network(), training=False)
    store = _calm(graph)
    result = FuseBranches().apply(graph)
    plain, origin = materialise(result)
    evaluate_origin(origin, store)
    size = graph.inputs["x"].shape[-1]
    x = np.random.default_rng(1).normal(size=(2, 3, size, size)).astype(np.float32)
    truth, expressions = (
        interpret(g, {"x": x}, store, DType.F64).outputs["logits"] for g in (graph, result)
    )
    scale = max(1.0, float(np.abs(truth).max()))
    assert np.abs(expressions - truth).max() <= 1e-9 * scale
    once = interpret(plain, {"x": x}, store).outputs["logits"]
    assert np.abs(once - truth).max() <= 5e-5 * scale


def _calm(graph: Graph):  # type: ignore[no-untyped-def]
    """Initial weights with norms near 1 / 2, so that activations neither vanish nor explode."""
    store = randomised(graph)
    rng = np.random.default_rng(0)
    for state in graph.states:
        leaf = state.name.rpartition(".")[2]
        if state.role is Role.STATISTIC:
            continue
        if leaf == "gamma":
            store[state] = rng.uniform(0.2, 0.5, state.shape) * rng.choice([-1, 1], state.shape)
        elif leaf == "weight":
            fan = max(1, int(np.prod(state.shape[1:])))
            store[state] = rng.normal(size=state.shape) / np.sqrt(fan)
    return store


@given(random_graphs())
@settings(max_examples=40, deadline=None)
def test_random_networks_stay_the_same_function(graph: Graph) -> None:
    graph = specialise(graph, training=False)
    for step in (FuseBranches(), FuseBranches(bias_maps=True, concats=True, grow=True)):
        result = step.run(graph, record=True)
        check_claim(graph, result.graph, "exact", report=result.report)
        assert not step.run(result.graph).report.matches


def test_a_pipeline_verifies_it() -> None:
    graph = specialise(declared(partial(dbb, filters=6)), training=False)
    found = Pipeline((FuseBranches(),), verify=True).apply(graph)
    assert opcodes(materialise(found)[0]) == ["conv"]


# -- random linear networks ------------------------------------------------------------------------


def _pads(draw: st.DrawFn, most: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(0, most)) for _ in range(4))


def _random_conv(draw: st.DrawFn, x: Value) -> Value:
    channels = int(str(x.shape[1]))
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 4) if channels % g == 0]))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    return conv(
        x,
        4,
        kernel,
        stride=draw(st.sampled_from([1, 1, 1, 2])),
        pad=_pads(draw, 2),
        dilation=draw(st.sampled_from([1, 1, 2])),
        groups=groups,
        bias=draw(st.booleans()),
    )


def _random_pool(draw: st.DrawFn, x: Value) -> Value:
    return average_pool(
        x,
        2,
        stride=draw(st.integers(1, 2)),
        pad=_pads(draw, 1),
        cover_all=draw(st.booleans()),
        divisor=draw(st.sampled_from(["kernel", "padded", "inside", "one"])),
    )


def _random_scale(draw: st.DrawFn, x: Value) -> Value:
    name = x.graph.unused_name("scale")
    shape = draw(st.sampled_from([(), (1, 1), (x.shape[1], 1, 1), (1, x.shape[1], 1, 1)]))
    scale = learned(x, shape, f"{name}{len(x.graph.nodes)}")
    return draw(st.sampled_from([x * scale, scale * x, x + scale, scale - x, x - scale, -x]))


def _random_gate(draw: st.DrawFn, x: Value) -> Value:
    channels = x.shape[1] if draw(st.booleans()) else 1
    return x * sigmoid(x.graph.inputs["gates"] if channels != 1 else x.graph.inputs["gate"])


def _random_padding(draw: st.DrawFn, x: Value) -> Value:
    return pad(x, (0, 0, *_pads(draw, 1)[:2]), (0, 0, *_pads(draw, 1)[:2]))


def _random_sampling(draw: st.DrawFn, x: Value) -> Value:
    size = int(str(x.shape[2]))
    return x.graph.emit(Slice(axis=2, start=0, size=(size - 1) // 2 + 1, step=2), x)


def _random_cut(draw: st.DrawFn, x: Value) -> Value:
    """A part of a spatial axis, or two parts of the channels side by side."""
    axis = draw(st.integers(1, 3))
    if axis > 1:
        return cut(x, draw(st.integers(0, 1)), int(str(x.shape[axis])) - 1, axis=axis)
    if x.shape[1] != 4 or draw(st.booleans()):
        return concat(cut(x, 0, 2), cut(conv(x, 4, 1), draw(st.integers(0, 1)), 2, 2))
    first, _, last = x.graph.apply(Split(axis=1, sizes=(3, 0, 1)), x)
    return concat(last, first)


def _random_constant_gate(draw: st.DrawFn, x: Value) -> Value:
    shape = (x.shape[0], draw(st.sampled_from([1, x.shape[1]])), 1, 1)
    return draw(st.sampled_from([gate, lambda a, b: a * b, lambda a, b: a / b]))(
        x, constant(x, 0.5, shape)
    )


_STEPS = (
    *(_random_conv,) * 4, _random_pool, _random_scale, _random_gate, _random_padding,
    _random_sampling, _random_cut, _random_constant_gate,
    lambda draw, x: batch_norm(x), lambda draw, x: relu(x),
)  # fmt: skip


@st.composite
def linear_networks(draw: st.DrawFn) -> Graph:
    """Layers of every geometry, summed and concatenated where their shapes allow it."""
    graph = Graph("linear")
    graph.input("gates", ("N", 4, 1, 1))
    graph.input("gate", ("N", 1, 1, 1))
    values = [graph.input("x", ("N", 4, 9, 8))]
    for _ in range(draw(st.integers(2, 9))):
        x = draw(st.sampled_from([values[0], values[-1], draw(st.sampled_from(values))]))
        alike = [v for v in values[1:] if v.shape == x.shape]
        if len(alike) > 1 and draw(st.booleans()):
            merge = draw(st.sampled_from([merge_sum, merge_sum, merge_mean]))
            values.append(merge(*draw(st.lists(st.sampled_from(alike), min_size=2, max_size=4))))
        elif min(int(str(d)) for d in x.shape[2:]) > 4 or draw(st.booleans()):
            with contextlib.suppress(ShapeError):
                values.append(draw(st.sampled_from(_STEPS))(draw, x))
    last = [v for v in values if v.shape == values[-1].shape and v is not values[0]]
    graph.output("y", concat(*last[-3:]) if len(last) > 1 else relu(values[-1]))
    return graph


def assert_it_stays_the_same(graph: Graph, bias_maps: bool, grow: bool) -> None:
    graph = specialise(graph, training=False)
    step = FuseBranches(bias_maps=bias_maps, grow=grow, concats=grow)
    result = step.run(graph, record=True)
    check_claim(graph, result.graph, "exact", report=result.report)
    assert not step.run(result.graph).report.matches
    assert grow or result.report.macs[1] <= result.report.macs[0]


@given(linear_networks(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_linear_networks_stay_the_same_function(
    graph: Graph, bias_maps: bool, grow: bool
) -> None:
    assert_it_stays_the_same(graph, bias_maps, grow)


def _random_branch(draw: st.DrawFn, x: Value, stride: int, depth: int = 0) -> Value:
    """A branch whose result has the size of x over the stride."""
    kind = draw(st.integers(0, 9))
    if kind == 0 and stride == 1:
        return x
    if kind == 1 and depth < 2:
        several = draw(st.sampled_from([merge_sum, merge_mean, lambda a, b: a - b]))
        return several(*(_random_branch(draw, x, stride, depth + 1) for _ in range(2)))
    if kind == 2 and depth < 2:
        return batch_norm(_random_branch(draw, x, stride, depth + 1))
    if kind == 3 and depth < 2:
        return _random_scale(draw, _random_branch(draw, x, stride, depth + 1))
    if kind == 4 and depth < 2:
        return _random_gate(draw, _random_branch(draw, x, stride, depth + 1))
    if kind == 5 and depth < 2:
        return _random_branch(draw, conv(x, 4, 1, groups=draw(st.sampled_from([1, 2]))), stride, 2)
    dilation = draw(st.sampled_from([1, 1, 2]))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    reach = [(k - 1) * dilation for k in kernel]
    begin = [draw(st.integers(0, r)) for r in reach]
    pads = (*begin, *(r - b for r, b in zip(reach, begin)))
    if kind == 6 and dilation == 1:
        return average_pool(x, kernel, stride=stride, pad=pads)
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    return conv(x, 4, kernel, stride=stride, pad=pads, dilation=dilation, groups=groups)


@st.composite
def branched_blocks(draw: st.DrawFn) -> Graph:
    """Sums and concats of branches of one input."""
    graph = Graph("branched")
    graph.input("gates", ("N", 4, 1, 1))
    graph.input("gate", ("N", 1, 1, 1))
    x = relu(graph.input("x", ("N", 4, 9, 8)))
    stride = draw(st.integers(1, 2))
    branches = [_random_branch(draw, x, stride) for _ in range(draw(st.integers(2, 5)))]
    merge = draw(st.sampled_from([merge_sum, merge_sum, merge_mean, concat]))
    graph.output("y", relu(merge(*branches)))
    return graph


@given(branched_blocks(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_branched_blocks_stay_the_same_function(
    graph: Graph, bias_maps: bool, grow: bool
) -> None:
    assert_it_stays_the_same(graph, bias_maps, grow)
