"""Batch norm folds into the layer before it, exactly, or says why not."""

from __future__ import annotations

import numpy as np
import pytest
from builders import EXACT, image_input, images, randomised

from branchgraph.ir.builder import batch_norm, conv, dense, flatten, relu
from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret
from branchgraph.ir.text import format_graph
from branchgraph.ir.types import DType
from branchgraph.passes.fold_batch_norm import FoldBatchNorm
from branchgraph.passes.materialise import evaluate_origin, materialise
from branchgraph.passes.specialise import specialise


def normed(layer, channels: int = 4) -> Graph:  # type: ignore[no-untyped-def]
    graph = Graph("normed")
    graph.output("y", relu(batch_norm(layer(image_input(graph, channels)), eps=1e-3, name="bn")))
    return graph


LAYERS = {
    "convolution": lambda x: conv(x, 6, 3, pad=1, bias=False, name="conv"),
    "with bias": lambda x: conv(x, 6, 3, stride=2, name="conv"),
    "grouped and dilated": lambda x: conv(x, 6, 3, groups=2, dilation=2, pad=2, name="conv"),
    "depthwise": lambda x: conv(x, 4, 3, groups=4, pad=(0, 1, 2, 1), name="conv"),
    "dense": lambda x: dense(flatten(x), 6, name="conv"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_folded_network_is_the_same_function(kind: str) -> None:
    inference = specialise(normed(LAYERS[kind]), training=False)
    store = randomised(inference)
    result = FoldBatchNorm().run(inference)
    assert result.report.matches == ["bn"]
    folded, origin = materialise(result.graph)
    evaluate_origin(origin, store)
    ops = [n.op.opcode for n in folded.nodes if n.op.opcode != "reshape"]
    assert ops == ["dense" if kind == "dense" else "conv", "relu"]
    assert {s.name for s in folded.states} == {"conv.weight", "conv.bias"}
    x = images(channels=4)
    before, expressions = (
        interpret(g, {"x": x}, store, DType.F64).outputs["y"] for g in (inference, result.graph)
    )
    np.testing.assert_allclose(expressions, before, **EXACT)
    once_rounded = interpret(folded, {"x": x}, store, DType.F64).outputs["y"]
    np.testing.assert_allclose(once_rounded, before, rtol=1e-5, atol=1e-5)


BEFORE = """\
graph small {
  state conv.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  state bn.gamma : f32[2] param init=ones()
  state bn.beta : f32[2] param init=zeros()
  state bn.running_mean : f32[2] statistic init=zeros()
  state bn.running_var : f32[2] statistic init=ones()
  input x : f32[N, 1, 3, 3]
  %0 = conv(x, conv.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 3, 3]  # conv
  %1 = batch_norm_inference(%0, bn.gamma, bn.beta, bn.running_mean, bn.running_var) {eps=0.5} : f32[N, 2, 3, 3]  # bn
  output y = %1
}
"""  # noqa: E501
AFTER = """\
graph small {
  state bn.running_var : f32[2] statistic init=ones()
  state bn.gamma : f32[2] param init=ones()
  state bn.running_mean : f32[2] statistic init=zeros()
  state conv.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  state bn.beta : f32[2] param init=zeros()
  input x : f32[N, 1, 3, 3]
  %0 = full() {value=0.5, shape=[], dtype=f32} : f32[]
  %1 = add(bn.running_var, %0) : f32[2]
  %2 = sqrt(%1) : f32[2]
  %3 = divide(bn.gamma, %2) : f32[2]
  %4 = multiply(bn.running_mean, %3) : f32[2]
  %5 = negate(%4) : f32[2]
  %6 = reshape(%3) {shape=[2, 1, 1, 1]} : f32[2, 1, 1, 1]
  %7 = multiply(conv.weight, %6) : f32[2, 1, 1, 1]  # conv.weight
  %8 = add(bn.beta, %5) : f32[2]  # conv.bias
  %9 = conv(x, %7, %8) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 3, 3]  # conv
  output y = %9
}
"""  # noqa: E501


def test_the_rewrite_as_text() -> None:
    graph = Graph("small")
    x = graph.input("x", ("N", 1, 3, 3))
    graph.output("y", batch_norm(conv(x, 2, 1, bias=False, name="conv"), eps=0.5, name="bn"))
    inference = specialise(graph, training=False)
    assert format_graph(inference) == BEFORE
    assert format_graph(FoldBatchNorm().apply(inference)) == AFTER


def refusal(graph: Graph) -> str:
    report = FoldBatchNorm().run(graph).report
    assert not report.matches
    ((_, reason),) = report.refusals
    return reason


def test_statistics_that_are_not_fixed_are_refused() -> None:
    assert "specialise" in refusal(normed(LAYERS["convolution"]))
    training = specialise(normed(LAYERS["convolution"]), training=True)
    assert "specialise" in refusal(training)


def test_a_convolution_that_is_read_elsewhere_is_refused() -> None:
    graph = Graph("shared")
    h = conv(image_input(graph), 4, 3)
    graph.output("y", batch_norm(h) + h)
    assert "read elsewhere" in refusal(specialise(graph, training=False))


def test_a_norm_without_a_layer_before_it_is_refused() -> None:
    graph = Graph("alone")
    graph.output("y", batch_norm(image_input(graph)))
    assert "no convolution" in refusal(specialise(graph, training=False))
