"""A traced model is the declared graph that the native builder would make."""

from __future__ import annotations

import numpy as np
import pytest

import branchgraph.chainer as chainer
import branchgraph.chainer.functions as F
import branchgraph.chainer.links as L
from branchgraph.chainer.recorder import recorder
from branchgraph.chainer.tracing import trace
from branchgraph.chainer.variable import Parameter, Variable
from branchgraph.compiler import compile
from branchgraph.ir.builder import batch_norm, conv, dense, dropout, relu
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.hash import structural_hash
from branchgraph.passes.specialise import specialise

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


class Normed(chainer.Chain):
    """A network with batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(3, 4, 3, pad=1)
            self.bn = L.BatchNormalization(4)
            self.fc = L.Linear(144, 5)

    def forward(self, x: Variable) -> Variable:
        h = F.dropout(F.relu(self.bn(self.conv(x))), 0.3)
        return self.fc(F.dropout(h, 0.5))


def native_normed() -> Graph:
    graph = Graph("native")
    h = relu(batch_norm(conv(graph.input("x", ("N", 3, 6, 6)), 4, 3, pad=1)))
    graph.output("y", dense(dropout(dropout(h, 0.3), 0.5), 5))
    return graph


def test_one_network_natively_and_as_a_chain_has_one_hash() -> None:
    graph, store = trace(Normed(), ("N", 3, 6, 6))
    assert structural_hash(graph) == structural_hash(native_normed())
    assert {s.name for s in graph.states} == {
        "conv/W", "conv/b", "bn/gamma", "bn/beta", "bn/avg_mean", "bn/avg_var", "fc/W", "fc/b",
    }  # fmt: skip
    assert all(s in store for s in graph.states)


def test_a_traced_chain_serves_both_modes() -> None:
    model = Normed()
    graph, store = trace(model, ("N", 3, 6, 6))
    x = RNG.normal(size=(4, 3, 6, 6)).astype(np.float32)
    with chainer.using_config("train", False):
        expected = model(x).array
    np.testing.assert_allclose(
        compile(graph, store=store)(x0=x)["y0"], expected, rtol=1e-5, atol=1e-5
    )
    training = specialise(graph, training=True)
    assert {s.name for s in training.updates} >= {"bn/avg_mean", "bn/avg_var"}
    assert not recorder().pending


def test_tracing_moves_no_statistics_and_draws_nothing() -> None:
    model = Normed()
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    trace(model, ("N", 3, 6, 6))
    assert (np.random.get_state()[1] == before).all()
    assert not model.bn.avg_mean.any()


def test_nothing_runs_while_a_model_is_traced() -> None:
    p = parameters()
    with pytest.raises(GraphError, match="reads values"):
        trace(lambda x: Variable(model(p, x).array), ("N", 3, 6, 6))


def test_a_structure_that_depends_on_the_batch_is_refused() -> None:
    def odd(x: Variable) -> Variable:
        return F.relu(x) if x.shape[0] == 3 else F.leaky_relu(x)

    with pytest.raises(GraphError, match="other operations at other batch sizes"):
        trace(odd, ("N", 3))
