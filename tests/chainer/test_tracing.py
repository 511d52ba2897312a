"""A traced model is the declared graph that the native builder would make."""

from __future__ import annotations

import numpy as np
import pytest

import branchgraph.chainer.functions as F
from branchgraph.chainer.tracing import trace
from branchgraph.chainer.variable import Parameter, Variable
from branchgraph.compiler import compile
from branchgraph.ir.builder import conv, dense, relu
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.hash import structural_hash

RNG = np.random.default_rng(0)


def parameters() -> dict[str, Parameter]:
    shapes = {"w": (4, 3, 3, 3), "b": (4,), "fc": (5, 144), "fcb": (5,)}
    return {k: Parameter(RNG.normal(size=s).astype(np.float32)) for k, s in shapes.items()}


def model(p: dict[str, Parameter], x: Variable) -> Variable:
    h = F.relu(F.convolution_2d(x, p["w"], p["b"], pad=1))
    return F.linear(h, p["fc"], p["fcb"])


def native() -> Graph:
    graph = Graph("native")
    h = relu(conv(graph.input("x", ("N", 3, 6, 6)), 4, 3, pad=1))
    graph.output("y", dense(h, 5))
    return graph


def test_the_trace_has_the_structure_of_the_native_declaration() -> None:
    p = parameters()
    graph, store = trace(lambda x: model(p, x), ("N", 3, 6, 6))
    assert structural_hash(graph) == structural_hash(native())
    x = RNG.normal(size=(4, 3, 6, 6)).astype(np.float32)
    traced = compile(graph, store=store)(x0=x)["y0"]
    np.testing.assert_allclose(traced, model(p, Variable(x)).array, rtol=1e-5, atol=1e-5)


def test_nothing_runs_while_a_model_is_traced() -> None:
    p = parameters()
    with pytest.raises(GraphError, match="reads values"):
        trace(lambda x: Variable(model(p, x).array), ("N", 3, 6, 6))


def test_a_structure_that_depends_on_the_batch_is_refused() -> None:
    def odd(x: Variable) -> Variable:
        return F.relu(x) if x.shape[0] == 3 else F.leaky_relu(x)

    with pytest.raises(GraphError, match="other operations at other batch sizes"):
        trace(odd, ("N", 3))
