"""Cases of every op: instances whose attributes take at least two values each, with operands.

Operands are float64 where they float, drawn from a seed derived from the case's id, and away from
kinks, so that central differences hold. An attribute may hold the symbol `N`, the batch size.
`gaps` tells which ops, attributes and operand counts the cases do not vary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from branchgraph.ir.dims import Dim
from branchgraph.ir.op import Op
from branchgraph.ir.ops import (
    activation,
    constant,
    conv,
    deep,
    elementwise,
    exit,
    gate,
    index,
    linear,
    loss,
    math,
    merge,
    mode,
    norm,
    output,
    pool,
    random,
    reduce,
    reshape,
    roi,
    rows,
    sample_conv,
)
from branchgraph.ir.types import DType, TensorType

N = Dim.symbol("N")

#: Operands that belong to the layer or to the run, never to a row of the batch.
SHARED_OPERANDS = frozenset(
    [
        "weight",
        "bias",
        "gamma",
        "beta",
        "mean",
        "var",
        "running_mean",
        "running_var",
        "scale",
        "key",
        "step",
        "threshold",
    ]
)

#: Ops through which no gradient flows, or whose own gradient is not defined.
WITHOUT_GRADIENT = frozenset(
    [
        "full",
        "extent",
        "compare",
        "logical_not",
        "logical_and",
        "arg_max",
        "top_k",
        "one_hot",
        "random_uniform",
        "exit_score",
        "max_pool_index",
        "roi_max_pool_index",
        "batch_norm_gradient",
        "lrn_gradient",
        "grid_sample_gradient",
        "window_to_plane",
        "plane_to_window",
        "floor_divide",
        "round",
        "sign",
    ]
)

#: Ops whose gradient is not their derivative, on purpose.
ESTIMATORS = frozenset(
    {
        "straight_through",
        "scale_gradient",
        "soft_cross_entropy",
        "softmax_output",
        "regression_output",
        "make_loss",
    }
)


@dataclass(frozen=True, eq=False)
class Case:
    """One op with concrete operands."""

    id: str
    op: Op
    inputs: tuple[np.ndarray, ...]

    @property
    def operands(self) -> tuple[str, ...]:
        """The operand name of every input; a variadic name repeats."""
        names = tuple(name.rstrip("?") for name in self.op.operands)
        if names and names[-1].startswith("*"):
            extra = len(self.inputs) - len(names) + 1
            names = (*names[:-1], *(names[-1][1:],) * extra)
        return names[: len(self.inputs)]

    @property
    def carries(self) -> tuple[bool, ...]:
        """Which inputs have the batch on axis 0."""
        own = [
            x.shape[0] if x.ndim and name not in SHARED_OPERANDS else None
            for x, name in zip(self.inputs, self.operands)
        ]
        batch = next((n for n in own if n is not None), None)
        return tuple(n is not None and n == batch for n in own)

    @property
    def batch(self) -> int:
        """Number of rows; 0 when no input carries any."""
        return next((len(x) for x, c in zip(self.inputs, self.carries) if c), 0)

    @property
    def differentiated(self) -> tuple[bool, ...]:
        """Which inputs are differentiated: every float one, unless the op has no derivative."""
        excluded = self.op.opcode in WITHOUT_GRADIENT | ESTIMATORS
        narrowed = isinstance(self.op, elementwise.Cast) and self.op.dtype is not DType.F64
        return tuple(x.dtype.kind == "f" and not (excluded or narrowed) for x in self.inputs)

    def types(self, symbolic: bool = False) -> tuple[TensorType, ...]:
        """Types of the inputs, with the batch size as a number or as the symbol `N`."""
        return tuple(
            TensorType((N, *x.shape[1:]) if symbolic and c else x.shape, DType.of(x.dtype))
            for x, c in zip(self.inputs, self.carries)
        )

    def bound(self, batch: int | None = None) -> Op:
        """The op for `batch` rows (all of them by default)."""
        return self.op.bind({"N": self.batch if batch is None else batch})

    def evaluate(self) -> tuple[np.ndarray, ...]:
        """The op applied to the inputs."""
        return self.bound().evaluate(*self.inputs)

    def in_dtype(self, dtype: np.dtype) -> Case:
        """The case with its floating operands rounded to `dtype`."""
        cast = (x.astype(dtype) if x.dtype.kind == "f" else x for x in self.inputs)
        return Case(self.id, self.op, tuple(cast))


# -- operands ------------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator], np.ndarray]


def normal(*shape: int) -> Draw:
    return lambda rng: np.asarray(rng.standard_normal(shape))


def positive(*shape: int) -> Draw:
    return lambda rng: rng.uniform(0.5, 1.5, shape)


def off_zero(*shape: int) -> Draw:
    """Both signs, no element nearer to 0 than 0.2."""
    return lambda rng: rng.uniform(0.2, 1.5, shape) * rng.choice([-1.0, 1.0], shape)


def distinct(*shape: int) -> Draw:
    """Both signs, any two elements at least 0.1 apart."""
    return lambda rng: (rng.permutation(int(np.prod(shape))).reshape(shape) - 4.5) * 0.1


def integers(low: int, high: int, *shape: int) -> Draw:
    return lambda rng: rng.integers(low, high, shape)


def whole(*shape: int) -> Draw:
    """Floats among -1, 0, 1, so that equal ones meet."""
    return lambda rng: rng.integers(-1, 2, shape).astype(np.float64)


def bools(*shape: int) -> Draw:
    return lambda rng: rng.random(shape) < 0.5


def case(op: Op, label: str, *operands: Draw | np.ndarray) -> Case:
    """The case `<opcode>-<label>`; drawn operands come from its own stream."""
    id = f"{op.opcode}-{label}"
    rng = np.random.default_rng(zlib.crc32(id.encode()))
    return Case(id, op, tuple(d(rng) if callable(d) else d for d in operands))


# -- data movement and reductions ----------------------------------------------------------------


def _movement() -> Iterator[Case]:
    yield case(reshape.Reshape((N, 6)), "within-rows", normal(3, 2, 3))
    yield case(reshape.Reshape((6, 3)), "across-rows", normal(3, 2, 3))
    yield case(reshape.Transpose((0, 2, 1)), "within-rows", normal(3, 2, 4))
    yield case(reshape.Transpose((2, 0, 1)), "across-rows", normal(3, 2, 4))
    yield case(reshape.Slice(axis=1, start=1, size=2, step=2), "strided", normal(3, 5))
    yield case(reshape.Slice(axis=0, start=0, size=2), "of-rows", normal(3, 5))
    yield case(reshape.Slice(axis=2, start=1, size=0), "empty", normal(3, 2, 4))
    yield case(reshape.Embed(axis=1, start=1, size=6, step=2), "strided", normal(3, 3))
    yield case(reshape.Embed(axis=0, start=0, size=5), "of-rows", normal(3, 2))
    yield case(reshape.Split(axis=1, sizes=(1, 3, 2)), "channels", normal(3, 6, 2))
    yield case(reshape.Split(axis=0, sizes=(2, 1)), "rows", normal(3, 4))
    yield case(reshape.Split(axis=1, sizes=(4,)), "whole", normal(3, 4))
    yield case(reshape.Pad((0, 1, 2), (0, 0, 1)), "within-rows", normal(3, 2, 2))
    yield case(reshape.Pad((1, 0), (0, 2), value=-1.5), "with-rows", normal(3, 2))
    for op in (reduce.ReduceSum, reduce.ReduceMean, reduce.ReduceMax):
        yield case(op(axes=(1,)), "channels", distinct(3, 2, 4))
        yield case(op(axes=(2, 3), keepdims=True), "spatial-kept", distinct(3, 2, 2, 3))
        yield case(op(axes=(0, 2), keepdims=True), "per-channel", distinct(3, 2, 4))
        yield case(op(axes=(0, 1)), "all", distinct(3, 4))
    yield case(reduce.ReduceSum(axes=()), "nothing", normal(3, 2))
    yield case(reduce.BroadcastTo((N, 4, 2)), "unit-axis", normal(3, 1, 2))
    yield case(reduce.BroadcastTo((2, 3, 4)), "new-axis", normal(3, 1))
    yield case(reduce.BroadcastTo((2, 2)), "scalar", normal())
    yield case(reduce.ArgMax(axis=1), "channels", distinct(3, 4, 2))
    yield case(reduce.ArgMax(axis=0), "rows", distinct(3, 4))
    yield case(reduce.ArgMax(axis=1), "ties", whole(3, 8))
    yield case(reduce.TopK(k=1, axis=1), "one", distinct(3, 5))
    yield case(reduce.TopK(k=3, axis=1), "ties", whole(3, 8))
    yield case(reduce.TopK(k=2, axis=0), "rows", distinct(4, 3))


# -- arithmetic ----------------------------------------------------------------------------------


def _arithmetic() -> Iterator[Case]:
    for binary in (elementwise.Add, elementwise.Subtract, elementwise.Multiply, elementwise.Divide):
        yield case(binary(), "one-shape", normal(3, 4), off_zero(3, 4))
        yield case(binary(), "per-channel", normal(3, 4, 2), off_zero(4, 1))
        yield case(binary(), "outer", normal(3, 1, 2), off_zero(1, 4, 1))
        yield case(binary(), "scalar", normal(), off_zero(3, 2))
    for unary in (elementwise.Negate, elementwise.Exp, activation.Sigmoid, activation.Tanh):
        yield case(unary(), "rows", normal(3, 4))
        yield case(unary(), "scalar", normal())
    for of_positive in (elementwise.Log, elementwise.Sqrt):
        yield case(of_positive(), "rows", positive(3, 4))
    for kinked in (elementwise.Absolute, activation.Relu):
        yield case(kinked(), "rows", off_zero(3, 4, 2))
    yield case(activation.ReluGradient(), "rows", off_zero(3, 4), normal(3, 4))
    for slope in (0.2, 0.01):
        yield case(activation.LeakyRelu(slope), f"slope-{slope}", off_zero(3, 5))
    for low, high in ((-0.5, 0.6), (-float("inf"), 0.9), (0.1, float("inf"))):
        yield case(elementwise.Clip(low, high), f"{low}-{high}", off_zero(3, 5))
    for alpha in (1.0, 0.3):
        yield case(activation.Elu(alpha), f"alpha-{alpha}", off_zero(3, 5))
    for softmax in (activation.Softmax, activation.LogSoftmax):
        yield case(softmax(), "classes", normal(3, 5))
        yield case(softmax(axis=1), "channels", normal(3, 4, 2, 2))
        yield case(softmax(axis=2), "last", normal(3, 2, 4))
        yield case(softmax(axis=0), "rows", normal(3, 2))
    for relation in ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal"):
        yield case(elementwise.Compare(relation), relation, whole(3, 8), whole(8))
    yield case(elementwise.Compare("equal"), "integers", integers(0, 2, 3, 6), integers(0, 2, 3, 6))
    yield case(elementwise.LogicalNot(), "rows", bools(3, 4))
    yield case(elementwise.LogicalAnd(), "rows", bools(3, 8), bools(3, 8))
    yield case(elementwise.LogicalAnd(), "broadcast", bools(3, 4), bools(3, 1))
    yield case(elementwise.Where(), "one-shape", bools(3, 4), normal(3, 4), normal(3, 4))
    yield case(elementwise.Where(), "broadcast", bools(3, 1), normal(3, 4), normal())
    for dtype in (DType.F64, DType.F32, DType.F16, DType.I64, DType.BOOL):
        yield case(elementwise.Cast(dtype), str(dtype), off_zero(3, 5))
    yield case(constant.Full(2.5, (2, 3), DType.F64), "matrix")
    yield case(constant.Full(-1.0, (), DType.I32), "scalar")
    yield case(constant.Extent(7), "number")
    yield case(constant.Extent(3 * N, DType.F32), "symbol")


# -- mathematics and positions -------------------------------------------------------------------


def inside(*shape: int) -> Draw:
    """Both signs, no element beyond 0.8, where all elementary functions are smooth."""
    return lambda rng: rng.uniform(-0.8, 0.8, shape)


def _mathematics() -> Iterator[Case]:
    for unary in (
        math.Sin, math.Cos, math.Tan, math.Arcsin, math.Arccos, math.Arctan, math.Sinh, math.Cosh,
        math.Arctanh, math.Expm1, math.Log1p, math.Erf,
    ):  # fmt: skip
        yield case(unary(), "rows", inside(3, 4))
        yield case(unary(), "scalar", inside())
    for binary in (math.Power, math.Arctan2, math.Remainder, math.FloorDivide):
        yield case(binary(), "one-shape", positive(3, 4), off_zero(3, 4))
        yield case(binary(), "outer", positive(3, 1, 2), off_zero(1, 4, 1))
    for mode_of_rounding in ("floor", "ceil", "truncate"):
        yield case(math.Round(mode_of_rounding), mode_of_rounding, normal(3, 5))
    yield case(math.Sign(), "rows", whole(3, 8))
    for running in (math.RunningSum, math.RunningProduct):
        yield case(running(axis=1), "columns", normal(3, 4, 2))
        yield case(running(axis=1, reverse=True), "reverse", normal(3, 4))
        yield case(running(axis=1), "zeros", whole(3, 6))
        yield case(running(axis=0), "rows", normal(3, 2))
    yield case(math.Recurrence(axis=1), "columns", normal(3, 4, 2), normal(3, 4, 2))
    yield case(math.Recurrence(axis=1, reverse=True), "reverse", normal(3, 4), normal(3, 4))
    yield case(math.Recurrence(axis=0), "rows", normal(3, 2), normal(3, 2))


def _positions() -> Iterator[Case]:
    yield case(index.Gather(axis=1), "columns", normal(3, 5), integers(0, 5, 4))
    yield case(index.Gather(axis=1), "matrix", normal(3, 4, 2), integers(0, 4, 2, 5))
    yield case(index.Gather(axis=1), "one", normal(3, 4), integers(0, 4))
    yield case(index.Gather(axis=0), "rows", normal(3, 4), integers(0, 3, 5))
    yield case(index.ScatterAdd(axis=1, size=5), "columns", normal(3, 4), integers(0, 5, 4))
    yield case(index.ScatterAdd(1, 3), "matrix", normal(3, 2, 5, 2), integers(0, 3, 2, 5))
    yield case(index.ScatterAdd(axis=0, size=4), "rows", normal(3, 2), integers(0, 4, 3))
    yield case(index.Flip(axis=1), "columns", normal(3, 4, 2))
    yield case(index.Flip(axis=0), "rows", normal(3, 4))


# -- convolution and products --------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """A convolution in words of its attributes and operand shapes."""

    attributes: Mapping[str, Any]
    x: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool = False


def _window(
    stride: tuple[int, ...], pad: tuple[int, ...], dilation: tuple[int, ...], groups: int = 1
) -> dict[str, Any]:
    return {"stride": stride, "pad": pad, "dilation": dilation, "groups": groups}


CONVOLUTIONS = {
    "plain": Geometry(_window((1, 1), (0,) * 4, (1, 1)), (3, 2, 4, 5), (4, 2, 3, 2)),
    "biased": Geometry(_window((1, 1), (1,) * 4, (1, 1)), (3, 2, 3, 3), (2, 2, 3, 3), bias=True),
    "asymmetric": Geometry(_window((2, 1), (1, 0, 2, 1), (1, 1)), (3, 2, 4, 3), (2, 2, 3, 2)),
    "remainder": Geometry(_window((3, 2), (0,) * 4, (1, 1)), (3, 1, 6, 6), (2, 1, 2, 3)),
    "dilated": Geometry(_window((1, 2), (1, 2, 1, 2), (2, 3)), (3, 1, 5, 4), (2, 1, 3, 2)),
    "grouped": Geometry(
        _window((1, 1), (0, 1, 1, 0), (1, 1), 2), (3, 4, 3, 3), (6, 2, 2, 2), bias=True
    ),
    "depthwise": Geometry(_window((2, 2), (1,) * 4, (1, 1), 4), (3, 4, 3, 4), (4, 1, 3, 3)),
    "one-axis": Geometry(_window((2,), (2, 1), (2,)), (3, 2, 7), (4, 2, 3), bias=True),
    "three-axes": Geometry(
        _window((1, 2, 1), (0, 1, 0, 1, 0, 0), (1, 1, 2)), (2, 2, 3, 3, 3), (4, 2, 2, 2, 2)
    ),
}


def _convolutions() -> Iterator[Case]:
    for label, g in CONVOLUTIONS.items():
        op = conv.Conv(**g.attributes)
        bias = [normal(g.weight[0])] if g.bias else []
        yield case(op, label, normal(*g.x), normal(*g.weight), *bias)
        types = (TensorType(g.x, DType.F64), TensorType(g.weight, DType.F64))
        out = tuple(int(str(d)) for d in op.infer(*types)[0].shape)
        back = conv.ConvTranspose(**g.attributes, size=g.x[2:])
        yield case(back, label, normal(*out), normal(*g.weight))
        by_weight = conv.ConvWeightGradient(**g.attributes, kernel=g.weight[2:])
        yield case(by_weight, label, normal(*g.x), normal(*out))


def _sample_convolutions() -> Iterator[Case]:
    for label, g in CONVOLUTIONS.items():
        op, n = sample_conv.SampleConv(**g.attributes), g.x[0]
        weights = (n, *g.weight)
        biases = [normal(n, g.weight[0])] if g.bias else []
        yield case(op, label, normal(*g.x), normal(*weights), *biases)
        types = (TensorType(g.x, DType.F64), TensorType(weights, DType.F64))
        out = tuple(int(str(d)) for d in op.infer(*types)[0].shape)
        back = sample_conv.SampleConvTranspose(**g.attributes, size=g.x[2:])
        yield case(back, label, normal(*out), normal(*weights))
        by_weight = sample_conv.SampleConvWeightGradient(**g.attributes, kernel=g.weight[2:])
        yield case(by_weight, label, normal(*g.x), normal(*out))


def _products() -> Iterator[Case]:
    for ta in (False, True):
        for tb in (False, True):
            op = linear.MatMul(transpose_a=ta, transpose_b=tb)
            a, b = ((5, 3) if ta else (3, 5)), ((4, 5) if tb else (5, 4))
            label = f"{'t' if ta else 'n'}{'t' if tb else 'n'}"
            yield case(op, label, normal(*a), normal(*b))
            yield case(op, f"{label}-batched", normal(3, *a), normal(3, *b))
    yield case(linear.Dense(), "plain", normal(3, 4), normal(5, 4))
    yield case(linear.Dense(), "biased", normal(3, 4), normal(5, 4), normal(5))


# -- merges, gates, rows -------------------------------------------------------------------------


def _merges() -> Iterator[Case]:
    for op in (merge.Sum, merge.Mean, merge.Product):
        for count in (1, 2, 3):
            yield case(op(), f"of-{count}", *(normal(3, 4) for _ in range(count)))
    for count in (1, 2, 3):
        apart = case(merge.Sum(), f"apart-{count}", distinct(3, 4, count)).inputs[0]
        yield case(merge.Maximum(), f"of-{count}", *np.moveaxis(apart, 2, 0))
    yield case(merge.Sum(), "scalars", normal(), normal())
    for count in (1, 2, 3):
        parts = (normal(3, 1 + i, 2) for i in range(count))
        yield case(merge.Concat(), f"channels-{count}", *parts)
    yield case(merge.Concat(axis=0), "rows", normal(3, 2), normal(1, 2))
    yield case(merge.Concat(axis=2), "last", normal(3, 2, 1), normal(3, 2, 4))


def _gates() -> Iterator[Case]:
    gates = {
        "scalar": np.array(0.7),
        "closed": np.array(0.0),
        "per-channel": np.array([[1.0], [0.0], [-0.5], [0.2]]),
        "per-sample": np.array([0.0, 1.0, 0.3]).reshape(3, 1, 1),
        "full": np.where(np.arange(24).reshape(3, 4, 2) % 3, 0.5, 0.0),
    }
    for label, g in gates.items():
        yield case(gate.Select(), label, normal(3, 4, 2), g)
    yield case(gate.StraightThrough(), "rows", whole(3, 4), normal(3, 4))
    yield case(gate.ScaleGradient(), "rows", normal(3, 4), np.array(-0.5))


def _rows() -> Iterator[Case]:
    some, none, every = ([True, False, True], [False] * 3, [True] * 3)
    for label, mask in (("some", some), ("none", none), ("all", every)):
        m, kept = np.array(mask), sum(mask)
        k = Dim.symbol("K" if label == "some" else "M")
        yield case(rows.Compact(k), label, m, normal(3, 4))
        yield case(rows.Compact(k), f"{label}-of-two", m, normal(3, 4), normal(3, 2, 2))
        yield case(rows.Scatter(), label, m, normal(kept, 4))
        yield case(rows.Scatter(), f"{label}-over-base", m, normal(kept, 4), normal(3, 4))


# -- normalisation -------------------------------------------------------------------------------


def _norms() -> Iterator[Case]:
    shapes = {"dense": (5, 3), "spatial": (2, 3, 2, 2)}
    for eps, (label, shape) in zip((2e-5, 0.1), shapes.items()):
        x, vector = normal(*shape), (off_zero(3), normal(3))
        yield case(norm.BatchNormTraining(eps), label, x, *vector)
        inference = norm.BatchNormInference(eps)
        yield case(inference, label, x, *vector, normal(3), positive(3))
        given = case(norm.BatchNormTraining(eps), f"{label}-saved", x, *vector)
        _, mean, var = given.evaluate()
        saved = (*given.inputs[:2], mean, var)
        yield case(norm.BatchNormGradient(eps), label, *saved, normal(*shape))
    declared = {
        "chainer": norm.BatchNorm(),
        "mxnet": norm.BatchNorm(eps=1e-3, decay=0.7, unbiased=False),
    }
    for label, op in declared.items():
        statistics = (normal(3), positive(3))
        yield case(op, label, normal(4, 3, 2), off_zero(3), normal(3), *statistics)
    one_row = (normal(1, 3), off_zero(3), normal(3), normal(3), positive(3))
    yield case(norm.BatchNorm(eps=0.1), "one-row", *one_row)
    parameters = {
        "alexnet": (5, 1e-4, 0.75, 2.0),
        "strong": (3, 0.5, 0.5, 1.0),
        "even": (4, 0.3, 0.75, 1.5),
        "wider-than-x": (15, 0.3, 1.25, 1.0),
    }
    for label, attributes in parameters.items():
        forward, back = norm.LocalResponseNorm(*attributes), attributes
        yield case(forward, label, normal(3, 6, 2))
        yield case(norm.LocalResponseNormGradient(*back), label, normal(3, 6, 2), normal(3, 6, 2))


# -- pooling -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """A pooling in words of its attributes and operand shape."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    cover_all: bool
    x: tuple[int, ...]

    @property
    def attributes(self) -> dict[str, Any]:
        names = ("kernel", "stride", "pad", "cover_all")
        return {name: getattr(self, name) for name in names}


POOLS = {
    "plain": Windows((2, 2), (2, 2), (0,) * 4, False, (3, 2, 4, 5)),
    "overlapping": Windows((3, 2), (2, 1), (0,) * 4, False, (3, 2, 5, 4)),
    "asymmetric": Windows((3, 3), (2, 2), (1, 0, 0, 2), False, (3, 1, 5, 4)),
    "covering": Windows((3, 3), (2, 2), (0,) * 4, True, (3, 2, 6, 4)),
    "covering-padded": Windows((3, 2), (2, 3), (1, 1, 1, 0), True, (3, 1, 4, 6)),
    "gaps": Windows((1, 2), (2, 3), (0,) * 4, False, (3, 2, 3, 5)),
    "one-axis": Windows((3,), (2,), (1, 1), True, (3, 2, 6)),
    "three-axes": Windows((2, 2, 1), (1, 2, 1), (0, 1, 0, 0, 1, 0), False, (2, 1, 3, 2, 2)),
}


#: Image, x0, y0, x1, y1: the whole image, one pixel, one beyond every edge, one outside.
REGIONS = np.array(
    [[0, 0, 0, 9, 8], [1, 4, 3, 4, 3], [1, -2, -3, 12, 11], [0, 20, 1, 25, 2]], np.float64
)


def _pools() -> Iterator[Case]:
    for label, w in POOLS.items():
        yield case(pool.MaxPool(**w.attributes), label, distinct(*w.x))
        yield case(pool.MaxPoolIndex(**w.attributes), label, distinct(*w.x))
        for divisor in ("kernel", "padded", "inside", "one"):
            op = pool.AveragePool(**w.attributes, divisor=divisor)
            name = f"{label}-{divisor}"
            yield case(op, name, normal(*w.x))
            out = tuple(int(str(d)) for d in op.out_size(w.x[2:]))
            back = pool.AveragePoolGradient(**w.attributes, divisor=divisor, size=w.x[2:])
            yield case(back, name, normal(*w.x[:2], *out))
    for label, (cells, scale) in {"plain": ((2, 3), 1.0), "scaled": ((3, 2), 0.6)}.items():
        yield case(roi.RoiMaxPool(cells, scale), label, distinct(2, 2, 5, 6), REGIONS)
        yield case(roi.RoiMaxPoolIndex(cells, scale), label, distinct(2, 2, 5, 6), REGIONS)
    index = np.array([[0, 5, -1], [5, 5, 2]]).reshape(2, 3, 1).repeat(2, axis=2)
    yield case(pool.ScatterPooled((2, 3)), "repeated", normal(2, 3, 2), index)
    yield case(pool.ScatterPooled((7,)), "one-axis", normal(3, 2, 4), integers(-1, 7, 3, 2, 4))
    yield case(pool.GatherPooled(), "repeated", normal(2, 3, 2, 3), index)
    yield case(pool.GatherPooled(), "one-axis", normal(3, 2, 7), integers(-1, 7, 3, 2, 4))


# -- losses, exits, randomness -------------------------------------------------------------------


def _losses() -> Iterator[Case]:
    yield case(loss.OneHot(4), "labels", integers(0, 4, 3))
    yield case(loss.OneHot(5, DType.F64), "positions", integers(-1, 5, 3, 2))
    yield case(loss.CrossEntropy(), "labels", normal(3, 4), integers(0, 4, 3))
    positions = (normal(3, 4, 2, 2), integers(-1, 4, 3, 2, 2))
    yield case(loss.CrossEntropy(ignore_label=-1), "positions", *positions)
    yield case(
        loss.CrossEntropy(ignore_label=2), "class-ignored", normal(3, 4), np.array([2, 0, 3])
    )


def numbers(low: int, high: int, *shape: int) -> Draw:
    """Whole numbers as floats, the way MXNet has its labels."""
    return lambda rng: rng.integers(low, high, shape).astype(np.float64)


def _outputs() -> Iterator[Case]:
    softmax = output.SoftmaxOutput
    yield case(softmax(), "labels", normal(3, 4), numbers(0, 4, 3))
    yield case(softmax(), "flattened", normal(3, 2, 2), numbers(0, 4, 3))
    yield case(softmax(2.0, normalization="batch"), "probabilities", normal(3, 4), positive(3, 4))
    smooth = softmax(smooth_alpha=0.1, normalization="valid", out_grad=True)
    yield case(smooth, "smooth", normal(3, 4), numbers(-1, 4, 3))
    ignoring = softmax(0.5, 2.0, use_ignore=True, multi_output=True, normalization="batch")
    yield case(ignoring, "positions", normal(3, 4, 2, 2), numbers(0, 4, 3, 4))
    yield case(softmax(preserve_shape=True), "last", normal(3, 2, 4), numbers(0, 4, 3, 2))
    for kind in ("linear", "logistic", "mae"):
        yield case(output.RegressionOutput(kind), kind, normal(3, 4), normal(3, 4))
        column = output.RegressionOutput(kind, 0.5)
        yield case(column, f"{kind}-column", normal(3, 1), normal(3))
    yield case(output.MakeLoss(), "rows", normal(3, 4))
    yield case(output.MakeLoss(2.0, 0.5, "valid"), "valid", normal(3, 4))
    yield case(output.MakeLoss(3.0, normalization="batch"), "batch", normal(3, 2, 2))


def _exits() -> Iterator[Case]:
    for criterion in ("entropy", "normalised_entropy", "confidence", "margin"):
        yield case(exit.ExitScore(criterion), criterion, normal(3, 5))
        yield case(exit.ExitScore(criterion), f"{criterion}-one-class", normal(3, 1))
        impossible = np.array([[0.0, -np.inf, 1.0], [-np.inf, 2.0, -np.inf]])
        yield case(exit.ExitScore(criterion), f"{criterion}-impossible", impossible)
    thresholds = {"entropy": 1.0, "normalised_entropy": 0.7, "confidence": 0.5, "margin": 0.2}
    for criterion, threshold in thresholds.items():
        op = exit.Exit(f"early_{criterion}", criterion)
        yield case(op, criterion, normal(6, 4), np.array(threshold))
    agreeing = case(exit.Exit("patient", "patience"), "logits", normal(6, 3)).inputs[0]
    half = np.where(np.arange(6)[:, None] % 2 == 0, agreeing, -agreeing)
    patient = exit.Exit("patient", "patience")
    yield case(patient, "patience", agreeing, np.array(2.0), half)
    yield case(exit.Exit("last"), "last", normal(6, 4))


def _randomness() -> Iterator[Case]:
    key, step = np.array([7, 2**32 - 1], np.uint32), np.array(2**33 + 5)
    yield case(random.RandomUniform(0, (N, 5)), "rows", key, step, np.array([4, 0, 9]))
    yield case(random.RandomUniform(2**32 - 1, (2, 3, 3), DType.F64), "shape", key, step)
    yield case(random.RandomUniform(3), "scalar", key, step)
    yield case(random.Dropout(0.5, stream=0), "half", normal(3, 6))
    yield case(random.Dropout(0.25, stream=3), "quarter", normal(3, 2, 5))
    yield case(random.Dropout(0.25, 4, axes=(1,), always=True), "shared", normal(3, 2, 5))
    yield case(mode.Noise(0, (3, 4)), "single")
    yield case(mode.Noise(5, (2,), DType.F64), "double")
    yield case(mode.ByMode(), "rows", normal(3, 4), normal(3, 4))


# -- look-ups, resampling, soft targets ----------------------------------------------------------


def between_pixels(width: int, height: int, *shape: int) -> Draw:
    """Sampling points in -1 .. 1 and around it, none near a row or a column of pixels."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        axes = []
        for size in (width, height):
            pixel = rng.integers(-2, size + 1, shape) + rng.uniform(0.2, 0.8, shape)
            axes.append(pixel * 2 / (size - 1) - 1)
        return np.stack(axes, axis=1)

    return draw


def _deep() -> Iterator[Case]:
    for beta in (1.0, 2.5):
        yield case(deep.Softplus(beta), f"beta-{beta}", normal(3, 4))
    for ceiling in (20.0, 0.9):
        yield case(deep.ClippedRelu(ceiling), f"ceiling-{ceiling}", off_zero(3, 4))
    for floor in (1e-7, 1e-3):
        yield case(deep.FlooredSqrt(floor), f"floor-{floor}", positive(3, 4))
    for label, shape in {"labels": (3, 4), "positions": (3, 4, 2)}.items():
        yield case(deep.SoftCrossEntropy(), label, normal(*shape), positive(*shape))
    yield case(deep.Embedding(), "vector", integers(0, 5, 3), normal(5, 2))
    yield case(deep.Embedding(-1), "ignoring", integers(-1, 5, 3, 4), normal(5, 2))
    yield case(deep.EmbeddingGradient(5), "vector", integers(0, 5, 3), normal(3, 2))
    repeated = np.array([[1, -1, 1], [0, 1, -1]])
    yield case(deep.EmbeddingGradient(4, -1), "ignoring", repeated, normal(2, 3, 2))
    for label, (x, y) in {"larger": ((3, 4), (5, 7)), "smaller": ((5, 6), (3, 2))}.items():
        for mode_ in ("bilinear", "nearest"):
            for aligned in (True, False):
                name = f"{label}-{mode_}-{'aligned' if aligned else 'centred'}"
                yield case(deep.Resize(y, mode_, aligned), name, normal(3, 2, *x))
                yield case(deep.ResizeGradient(x, mode_, aligned), name, normal(3, 2, *y))
    for label, points in {"wide": (2, 3), "tall": (4, 1)}.items():
        x, grid = normal(3, 2, 4, 5), between_pixels(5, 4, 3, *points)
        yield case(deep.GridSample(), label, x, grid)
        yield case(deep.GridSampleGradient(), label, x, grid, normal(3, 2, *points))
    places = {
        "plane": ((2, 3), (2, 2), (0, 1), (4, 5), (3, 2, 2, 3)),
        "line": ((3,), (1,), (1,), (4,), (3, 1, 4)),
    }
    for label, (kernel, stride, pad, size, shape) in places.items():
        cells = int(np.prod(kernel))
        to_plane = deep.WindowToPlane(kernel, stride, pad, size)
        local = case(to_plane, label, integers(0, cells, *shape))
        yield local
        yield case(deep.PlaneToWindow(kernel, stride, pad, size), label, *local.evaluate())


CASES: tuple[Case, ...] = (
    *_movement(),
    *_arithmetic(),
    *_mathematics(),
    *_positions(),
    *_convolutions(),
    *_sample_convolutions(),
    *_products(),
    *_merges(),
    *_gates(),
    *_rows(),
    *_norms(),
    *_pools(),
    *_losses(),
    *_outputs(),
    *_exits(),
    *_randomness(),
    *_deep(),
)
PLAIN = tuple(c for c in CASES if not c.op.declared)
DIFFERENTIABLE = tuple(c for c in PLAIN if any(c.differentiated))


def named(id: str) -> Case:
    """The case with that id."""
    return next(c for c in CASES if c.id == id)


def of(op: type[Op]) -> tuple[Case, ...]:
    """All cases of an op."""
    return tuple(c for c in CASES if type(c.op) is op)


def gaps(cases: Iterable[Case], registry: Mapping[str, type[Op]]) -> list[str]:
    """What `cases` leave out: ops without a case, attributes and operand counts of one value."""
    by_op: dict[str, list[Case]] = {opcode: [] for opcode in registry}
    for c in cases:
        by_op[c.op.opcode].append(c)
    found = []
    for opcode, mine in by_op.items():
        if not mine:
            found.append(f"{opcode} has no case")
            continue
        for field in fields(registry[opcode]):
            values = {getattr(c.op, field.name) for c in mine}
            if len(values) < 2:
                found.append(f"{opcode}.{field.name} is {values.pop()!r} in every case")
        optional = any(n.endswith("?") or n.startswith("*") for n in registry[opcode].operands)
        counts = {len(c.inputs) for c in mine}
        if optional and len(counts) < 2:
            found.append(f"{opcode} has {counts.pop()} operands in every case")
    return found
