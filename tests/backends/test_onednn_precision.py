"""Precision is chosen, never a default: float32, bfloat16 products of float32, bfloat16 storage.

bfloat16 has 8 significant bits, so rounding to it errs by at most u = 2^-8 of a number. An op whose
operands are bfloat16 and which sums in float32 is within

    u |y| + 2^-24 n sum |a_i b_i|

of the exact result for those operands, with n the number of terms; sums in bfloat16 would be wrong
by n u. Products of float32 operands rounded to bfloat16 are within (2 u + u^2) sum |a_i b_i|.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from branchgraph.compiler import compile
from branchgraph.ir.builder import batch_norm, conv, dense, relu
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph
from branchgraph.ir.losses import mean_squared_error
from branchgraph.ir.op import Op
from branchgraph.ir.ops.activation import Relu, ReluGradient, Sigmoid, Softmax, Tanh
from branchgraph.ir.ops.conv import Conv, ConvTranspose, ConvWeightGradient
from branchgraph.ir.ops.elementwise import Add, Cast, Multiply, Subtract
from branchgraph.ir.ops.linear import Dense, MatMul
from branchgraph.ir.ops.merge import Concat, Mean, Sum
from branchgraph.ir.ops.norm import BatchNormGradient, BatchNormTraining, LocalResponseNorm
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.reduce import BroadcastTo, ReduceMean, ReduceSum
from branchgraph.ir.state import Store
from branchgraph.ir.types import DType
from branchgraph.passes.cast import MixedPrecision
from branchgraph.passes.specialise import specialise
from tests.backends.against_numpy import kernels_of
from tests.backends.libdnnl import require_libdnnl

require_libdnnl()

U = 2.0**-8
WINDOW: Any = ((1, 1), (1, 1, 1, 1), (1, 1))
PLANES = (3, 5, 7, 9)

#: Op, shapes of its operands, terms of a sum in it, roundings to bfloat16 inside it.
Row = tuple[Op, Sequence[tuple[int, ...]], int, int]
LINEAR: dict[str, Row] = {
    "conv": (Conv(*WINDOW), [PLANES, (11, 5, 3, 3)], 45, 1),
    "conv biased": (Conv(*WINDOW), [PLANES, (11, 5, 3, 3), (11,)], 46, 1),
    "conv_transpose": (ConvTranspose(*WINDOW, size=(7, 9)), [PLANES, (5, 6, 3, 3)], 45, 1),
    "conv_weight_gradient": (
        ConvWeightGradient(*WINDOW, kernel=(3, 3)), [PLANES, (3, 4, 7, 9)], 189, 1
    ),
    "dense": (Dense(), [(7, 33), (5, 33), (5,)], 34, 1),
    "matmul": (MatMul(transpose_a=True), [(33, 7), (33, 5)], 33, 1),
    "average_pool": (AveragePool((3, 3), (2, 2), (1, 1, 1, 1)), [PLANES], 9, 1),
    "reduce_mean": (ReduceMean((2, 3)), [(3, 16, 7, 9)], 63, 1),
    "reduce_sum": (ReduceSum((0, 2, 3)), [(3, 16, 7, 9)], 189, 1),
    "sum": (Sum(), [PLANES] * 3, 3, 2),
    "mean": (Mean(), [PLANES] * 3, 3, 3),
    "add": (Add(), [PLANES, (1, 5, 1, 1)], 2, 1),
    "subtract": (Subtract(), [(1, 5, 1, 1), PLANES], 2, 2),
}  # fmt: skip
#: Ops whose results are bounded by their own size, or move numbers.
POINTWISE: dict[str, Row] = {
    "max_pool": (MaxPool((3, 3), (2, 2), (1, 1, 1, 1)), [PLANES], 0, 0),
    "relu": (Relu(), [PLANES], 0, 0),
    "relu_gradient": (ReluGradient(), [PLANES, PLANES], 0, 0),
    "multiply": (Multiply(), [PLANES, PLANES], 0, 1),
    "concat": (Concat(1), [PLANES, PLANES], 0, 0),
    "broadcast_to": (BroadcastTo((3, 16, 7, 9)), [(3, 16, 1, 1)], 0, 0),
    "sigmoid": (Sigmoid(), [PLANES], 0, 2),
    "tanh": (Tanh(), [PLANES], 0, 2),
    "softmax": (Softmax(1), [(64, 10)], 0, 2),
    "lrn": (LocalResponseNorm(5, 0.1, 0.75, 2.0), [PLANES], 0, 2),
}


def rounded(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)


def run_op(op: Op, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """The op on oneDNN, and the names of its kernels."""
    graph = Graph("op")
    values = [graph.input(f"x{i}", x.shape, DType.of(x.dtype)) for i, x in enumerate(arrays)]
    graph.output("y", graph.emit(op, *values))
    run = compile(graph, "onednn")
    y = run.run({f"x{i}": x for i, x in enumerate(arrays)})["y"]
    return y, kernels_of(run)


@pytest.mark.parametrize("name", [*LINEAR, *POINTWISE])
def test_bfloat16_ops_round_once_and_sum_in_float32(name: str) -> None:
    op, shapes, terms, roundings = (LINEAR | POINTWISE)[name]
    rng = np.random.default_rng(len(name))
    arrays = [rounded(rng, shape) for shape in shapes]
    y, names = run_op(op, arrays)
    assert not [n for n in names if n.startswith(("numpy", "ref"))], names
    assert y.dtype == ml_dtypes.bfloat16
    wide = [x.astype(np.float64) for x in arrays]
    (exact,) = op.evaluate(*wide)
    size = op.evaluate(*map(np.abs, wide))[0] if terms else np.abs(exact)
    inside = (roundings - 1) * U * np.abs(size) if roundings > 1 else 0.0
    allowed = min(roundings, 1) * U * np.abs(exact) + terms * 2.0**-24 * np.abs(size) + inside
    assert (np.abs(y.astype(np.float64) - exact) <= allowed * (1 + 2 * U)).all()


# -- what is held in another type than the graph says ----------------------------------------------


def test_weight_gradients_that_are_cast_are_made_in_float32() -> None:
    graph = Graph("gradient")
    x, dy = (graph.input(n, s, DType.BF16) for n, s in (("x", PLANES), ("dy", (3, 4, 7, 9))))
    low = graph.emit(ConvWeightGradient(*WINDOW, kernel=(3, 3)), x, dy)
    graph.output("dw", graph.emit(Cast(DType.F32), low))
    rng = np.random.default_rng(0)
    feeds = {"x": rounded(rng, PLANES), "dy": rounded(rng, (3, 4, 7, 9))}
    found = compile(graph, "onednn").run(feeds)["dw"]
    wide = [a.astype(np.float64) for a in feeds.values()]
    op = ConvWeightGradient(*WINDOW, kernel=(3, 3))
    (exact,), (size,) = op.evaluate(*wide), op.evaluate(*map(np.abs, wide))
    assert (np.abs(found - exact) <= 189 * 2.0**-24 * size).all()


@pytest.mark.parametrize("channels", [5, 16])
def test_batch_norm_between_casts_stays_in_bfloat16(channels: int) -> None:
    """Forward and backward, with float32 statistics; the casts cost no kernel."""
    shape = (3, channels, 7, 9)
    graph = Graph("norm")
    x, dy = (graph.input(n, shape, DType.BF16) for n in ("x", "dy"))
    gamma, beta = (graph.input(n, (channels,)) for n in ("gamma", "beta"))
    wide, wide_dy = (graph.emit(Cast(DType.F32), v) for v in (x, dy))
    y, mean, var = graph.apply(BatchNormTraining(), wide, gamma, beta)
    dx, dgamma, dbeta = graph.apply(BatchNormGradient(), wide, gamma, mean, var, wide_dy)
    for name, value in (("mean", mean), ("var", var), ("dgamma", dgamma), ("dbeta", dbeta)):
        graph.output(name, value)
    graph.output("y", graph.emit(Cast(DType.BF16), y))
    graph.output("dx", graph.emit(Cast(DType.BF16), dx))
    rng = np.random.default_rng(0)
    feeds = {"x": rounded(rng, shape), "dy": rounded(rng, shape)}
    feeds |= {n: rng.random(channels).astype(np.float32) + 1 for n in ("gamma", "beta")}
    run = compile(graph, "onednn")
    found = run.run(feeds)
    assert len(kernels_of(run)) <= 4, kernels_of(run)  # two copies to channels last, two norms
    wide64 = {k: v.astype(np.float64) for k, v in feeds.items()}
    forward = BatchNormTraining().evaluate(wide64["x"], wide64["gamma"], wide64["beta"])
    backward = BatchNormGradient().evaluate(
        wide64["x"], wide64["gamma"], *forward[1:], wide64["dy"]
    )
    names = ("y", "mean", "var", "dx", "dgamma", "dbeta")
    for name, exact in zip(names, (*forward, *backward)):
        low = found[name].dtype == ml_dtypes.bfloat16
        atol = 2.0**-24 * 189 * np.abs(exact).max() * 4
        np.testing.assert_allclose(
            found[name].astype(np.float64), exact, rtol=U * 1.01 if low else 0, atol=atol,
            err_msg=name,
        )  # fmt: skip


# -- networks --------------------------------------------------------------------------------------


def network() -> Graph:
    graph = Graph("small")
    x = graph.input("x", ("N", 3, 9, 9))
    y = relu(batch_norm(conv(x, 8, 3, pad=1)))
    y = relu(batch_norm(conv(y, 8, 3, pad=1)) + y)
    graph.output("y", dense(y, 6))
    return graph


def test_a_network_in_bfloat16_is_near_the_one_in_float32() -> None:
    """Six tensors are rounded on the way, each weighted by a gain of about 1."""
    graph = specialise(network(), training=True)
    low = MixedPrecision(DType.BF16).apply(graph)
    store = Store.initialised(graph.states)
    x = np.random.default_rng(0).standard_normal((5, 3, 9, 9)).astype(np.float32)
    reference = compile(graph, "numpy", store=store.copy()).run({"x": x})["y"]
    run = compile(low, "onednn", store=store.copy())
    found = run.run({"x": x})["y"]
    assert found.dtype == np.float32
    assert any("bf16" in name for name in kernels_of(run))
    error = np.linalg.norm(found - reference) / np.linalg.norm(reference)
    assert 2.0**-16 < error < 12 * U


def test_a_training_graph_in_bfloat16_runs_on_bfloat16_primitives() -> None:
    graph = MixedPrecision(DType.BF16).apply(specialise(network(), training=True))
    graph.output("loss", mean_squared_error(graph.outputs["y"], graph.input("t", ("N", 6))))
    graph = differentiate(graph)
    store = Store.initialised(graph.states)
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.standard_normal((5, 3, 9, 9)).astype(np.float32),
        "t": rng.standard_normal((5, 6)).astype(np.float32),
    }
    run = compile(graph, "onednn", store=store.copy())
    found = run.gradients(feeds)
    layers = [n for n in kernels_of(run) if "conv" in n or "gemm" in n]
    assert layers
    assert all("bf16" in n or "x64:gemm" in n for n in layers), layers
    expected = compile(graph, "numpy", store=store.copy()).gradients(feeds)
    scale = max(float(np.abs(g).max()) for g in expected.values())  # those of biases are 0
    for state, gradient in expected.items():
        assert found[state].dtype == np.float32
        assert np.abs(found[state] - gradient).max() <= 12 * U * scale, state.name


# -- bfloat16 products of float32 ------------------------------------------------------------------


@pytest.mark.parametrize("fpmath", ["strict", "bf16"])
@pytest.mark.parametrize("name", ["conv", "conv_transpose", "conv_weight_gradient", "matmul"])
def test_products_keep_the_bound_of_the_arithmetic_chosen(name: str, fpmath: str) -> None:
    op, shapes, terms, _ = LINEAR[name]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    graph = Graph("product")
    values = [graph.input(f"x{i}", x.shape) for i, x in enumerate(arrays)]
    graph.output("y", graph.emit(op, *values))
    run = compile(graph, "onednn", fpmath=fpmath)
    y = run.run({f"x{i}": x for i, x in enumerate(arrays)})["y"]
    wide = [x.astype(np.float64) for x in arrays]
    (exact,), (size,) = op.evaluate(*wide), op.evaluate(*map(np.abs, wide))
    products = 2 * U + U * U if fpmath == "bf16" else 0.0
    assert (np.abs(y - exact) <= (products + terms * 2.0**-24) * size).all()
