"""Every op on oneDNN gives what it gives on NumPy: values, gradients, special numbers, no rows.

The cases are those of the reference (`tests/ir/op_cases.py`); geometries of windows are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from branchgraph.backends.onednn.kernels import GENERATED, PRIMITIVES
from branchgraph.backends.onednn.kernels.common import FLOATS
from branchgraph.compiler import compile
from branchgraph.ir.errors import BranchgraphError
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph
from branchgraph.ir.op import Op
from branchgraph.ir.ops.activation import ReluGradient, Softmax
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.rows import Compact, Scatter
from branchgraph.ir.types import DType
from tests.backends.against_numpy import (
    ELEMENTARY,
    all_kernels,
    assert_agree,
    check,
    pair,
    roundings,
)
from tests.backends.libdnnl import require_libdnnl
from tests.ir.op_cases import DIFFERENTIABLE, PLAIN, Case
from tests.ir.test_ops import ROW_WISE, cotangents_of, rows_of

require_libdnnl()

#: Ops that are not NumPy's.
KERNELS = {*PRIMITIVES, *GENERATED}


def each(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """One test a case, under the case's id."""
    return pytest.mark.parametrize("case", cases, ids=[c.id for c in cases])


def each_in(dtypes: Sequence[DType], cases: Sequence[Case]) -> pytest.MarkDecorator:
    """One test a case and dtype; with `--slow` those in which NumPy computes what it always does.

    Ops of primitives are left to NumPy in other types than those of primitives, so these run.
    """
    params = [
        pytest.param(
            case,
            dtype,
            id=f"{dtype}-{case.id}",
            marks=() if dtype in FLOATS or case.op.opcode in KERNELS else pytest.mark.slow,
        )
        for dtype in dtypes
        for case in cases
    ]
    return pytest.mark.parametrize(("case", "dtype"), params)


def graph_of(case: Case, *, backward: bool = False, symbolic: bool = False) -> Graph:
    """The op of a case over inputs `x0`, ...; `backward` adds its gradients, given `dy0`, ..."""
    graph = Graph(case.id)
    types = case.types(symbolic)
    values = [graph.input(f"x{i}", t.shape, t.dtype) for i, t in enumerate(types)]
    outputs = graph.apply(case.op if symbolic else case.bound(), *values)
    for i, y in enumerate(outputs):
        graph.output(f"y{i}", y)
    if backward:
        floating = [y for y in outputs if y.dtype.is_float]
        seeds = {y: graph.input(f"dy{j}", y.shape, y.dtype) for j, y in enumerate(floating)}
        wanted = [v for v, d in zip(values, case.differentiated) if d]
        found = vjp(graph, seeds, wanted)
        for value in wanted:
            zeros = Full(0.0, value.shape, value.dtype)
            graph.output(f"d{value.name}", found.get(value) or graph.emit(zeros))
    return graph


def feeds_of(case: Case, *, backward: bool = False) -> dict[str, np.ndarray]:
    feeds = {f"x{i}": x for i, x in enumerate(case.inputs)}
    if backward:
        floating = [y.dtype for y in case.evaluate() if str(y.dtype) in _FLOATS]
        wide = cotangents_of(case.in_dtype(np.dtype(np.float64)))
        feeds |= {f"dy{j}": dy.astype(t) for j, (dy, t) in enumerate(zip(wide, floating))}
    return feeds


_FLOATS = {str(d.numpy) for d in DType if d.is_float}


def test_every_op_has_a_case() -> None:
    plain = {name for name, op in Op.registry.items() if not op.declared}
    assert {c.op.opcode for c in PLAIN} == plain


# -- values and gradients --------------------------------------------------------------------------


@each_in([d for d in DType if d.is_float], PLAIN)
def test_values_are_those_of_numpy(case: Case, dtype: DType) -> None:
    rounded = case.in_dtype(dtype.numpy)
    check(graph_of(rounded), feeds_of(rounded))


@each_in([DType.F32, DType.F64], [c for c in DIFFERENTIABLE if not c.op.introduces])
def test_gradients_are_those_of_numpy(case: Case, dtype: DType) -> None:
    rounded = case.in_dtype(dtype.numpy)
    check(graph_of(rounded, backward=True), feeds_of(rounded, backward=True))


@pytest.mark.parametrize("mask", [[True, False, True], [False] * 3, [True] * 3])
def test_gradients_pass_through_chosen_rows(mask: list[bool]) -> None:
    graph = Graph("chosen")
    x, chosen = graph.input("x", ("N", 4)), graph.input("mask", ("N",), DType.BOOL)
    (rows,) = graph.apply(Compact("K"), chosen, x)
    y = graph.emit(Scatter(), chosen, rows * rows)
    graph.output("y", y)
    graph.output("dx", vjp(graph, {y: graph.input("dy", ("N", 4))}, [x])[x])
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(3, 4)).astype(np.float32) for name in ("x", "dy")}
    check(graph, {**arrays, "mask": np.array(mask)}, count=ELEMENTARY)


@each(ROW_WISE)
def test_any_number_of_rows(case: Case) -> None:
    """Three, one and none, one after the other."""
    whole = case.in_dtype(np.dtype(np.float32))
    graph = graph_of(whole, symbolic=True)
    expected, found = pair(graph)
    for rows in ([2, 0, 1], [1], []):
        part = rows_of(whole, [r for r in rows if r < whole.batch])
        feeds, count = feeds_of(part), roundings(graph, N=max(1, part.batch))
        assert_agree(found.run(feeds), expected.run(feeds), count, f"{part.batch} rows")


@each([c for c in ROW_WISE if c.batch])
def test_many_rows(case: Case) -> None:
    """Small tensors may be left to NumPy; these are not small. Samples with kernels are many."""
    whole = case.in_dtype(np.dtype(np.float32))
    rng = np.random.default_rng(len(case.id))
    count = 20 if case.op.opcode.startswith("sample_conv") else 150
    many = rows_of(whole, list(rng.integers(0, whole.batch, count)))
    backward = any(case.differentiated) and not case.op.introduces
    check(graph_of(many, backward=backward), feeds_of(many, backward=backward))


ALL = (np.nan, np.inf, -np.inf)
#: Special numbers that an operand may hold for the results to be those of NumPy, where not all may.
#: What the primitives do with the others is said by the tests below.
PLACES: dict[str, dict[str, tuple[float, ...]]] = {
    "conv": {"weight": ()},
    "conv_weight_gradient": {"dy": ()},
    "sample_conv": {"weights": ()},
    "sample_conv_weight_gradient": {"dy": ()},
    "max_pool": {"x": (np.inf, -np.inf)},
    "relu_gradient": {"y": (np.inf, -np.inf), "dy": ()},
    "softmax": {"x": (-np.inf,)},
}


@each([c for c in PLAIN if any(x.dtype.kind == "f" and x.size for x in c.inputs)])
def test_special_numbers_are_those_of_numpy(case: Case) -> None:
    rounded = case.in_dtype(np.dtype(np.float32))
    rng = np.random.default_rng(len(case.id))
    allowed = PLACES.get(case.op.opcode, {})
    inputs = zip(rounded.operands, rounded.inputs)
    special = [sprinkled(x, rng, allowed.get(name, ALL)) for name, x in inputs]
    feeds = {f"x{i}": x for i, x in enumerate(special)}
    graph = graph_of(rounded)
    try:
        expected = compile(graph, "numpy").run(feeds)
    except BranchgraphError as error:
        with pytest.raises(type(error)):
            compile(graph, "onednn").run(feeds)
        return
    assert_agree(compile(graph, "onednn").run(feeds), expected, roundings(graph))


def sprinkled(x: np.ndarray, rng: np.random.Generator, special: Sequence[float]) -> np.ndarray:
    """`x` with special numbers in one of eight places, and at least in one."""
    if x.dtype.kind != "f" or not x.size or not special:
        return x
    where = rng.random(x.shape) < 1 / 8
    where.flat[int(rng.integers(x.size))] = True
    return np.where(where, rng.choice(np.array(special, np.float32), x.shape), x)


# -- special numbers that primitives treat in another way ------------------------------------------


def applied(op: Op, *inputs: object) -> np.ndarray:
    """The first result of an op on oneDNN."""
    arrays = tuple(np.asarray(x, np.float32) for x in inputs)
    case = Case("special", op, arrays)
    return compile(graph_of(case), "onednn").run(feeds_of(case))["y0"]


def test_a_convolution_does_not_multiply_padding() -> None:
    """NumPy multiplies it, and 0 times infinity is NaN; oneDNN leaves it out."""
    op = Conv((1,), (1, 1), (1,), 1)
    x, weight = [[[1.0, 2.0, 3.0]]], [[[np.inf, 1.0, 0.0]]]
    with np.errstate(invalid="ignore"):
        (reference,) = op.evaluate(np.array(x), np.array(weight))
    np.testing.assert_array_equal(reference, [[[np.nan, np.inf, np.inf]]])
    y = applied(op, x, weight)
    assert y[0, 0, 0] == 1.0 or np.isnan(y[0, 0, 0])
    np.testing.assert_array_equal(y[0, 0, 1:], [np.inf, np.inf])


def test_a_maximum_may_pass_over_nan() -> None:
    """In NumPy a window with a NaN gives NaN; with oneDNN it may be the maximum of the others."""
    op = MaxPool((2,), (2,), (0, 0))
    y = applied(op, [[[1.0, np.nan, np.nan, 2.0, 3.0, 4.0]]])[0, 0]
    assert np.isnan(y[0]) or y[0] == 1.0
    assert np.isnan(y[1]) or y[1] == 2.0
    assert y[2] == 4.0


def test_relu_gradient_multiplies() -> None:
    """NumPy selects 0 where y is not positive; with oneDNN 0 times infinity may be NaN there."""
    y = [-1.0, -1.0, 0.0, 2.0, 2.0, np.nan]
    dy = [np.inf, np.nan, 5.0, np.inf, np.nan, 1.0]
    dx = applied(ReluGradient(), y, dy)
    assert all(np.isnan(v) or v == 0.0 for v in dx[:2])
    np.testing.assert_array_equal(dx[2:5], [0.0, np.inf, np.nan])
    assert np.isnan(dx[5]) or dx[5] in (0.0, 1.0)


@pytest.mark.parametrize("special", [np.inf, np.nan])
def test_softmax_of_an_undefined_row_holds_nan(special: float) -> None:
    """In NumPy the whole row is NaN, with oneDNN a part of it may be 0; other rows are apart."""
    x = [[0.0, 1.0, special, 2.0, 0.5], [0.0, 1.0, 2.0, 3.0, 4.0]]
    y = applied(Softmax(), x)
    assert np.isnan(y[0, 2])
    assert all(np.isnan(v) or v == 0.0 for v in y[0])
    (expected,) = Softmax().evaluate(np.array(x[1:]))
    np.testing.assert_allclose(y[1:], expected, rtol=1e-6)


# -- geometries of windows -------------------------------------------------------------------------

CHANNELS = (1, 3, 5, 10, 20)
#: Attributes, shapes of the operands, seed of their numbers.
Drawn = tuple[dict[str, Any], list[tuple[int, ...]], int]


def window(
    stride: tuple[int, ...], pad: tuple[int, ...], dilation: tuple[int, ...], groups: int = 1
) -> dict[str, Any]:
    """Attributes of a convolution."""
    return {"stride": stride, "pad": pad, "dilation": dilation, "groups": groups}


@st.composite
def windows(draw: st.DrawFn, rank: int) -> tuple[tuple[int, ...], ...]:
    """Spatial size, kernel, stride, pad (all before, then all behind) of a window that fits."""
    size = tuple(draw(st.integers(4, 9 if rank < 3 else 6)) for _ in range(rank))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    pad = tuple(draw(st.integers(0, k - 1)) for k in 2 * kernel)
    return size, kernel, stride, pad


@st.composite
def convolutions(draw: st.DrawFn) -> Drawn:
    """A convolution with its operands: odd channels, groups, depthwise, 1-D to 3-D."""
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    size, kernel, stride, pad = draw(windows(rank))
    padded = [n + before + behind for n, before, behind in zip(size, pad, pad[rank:])]
    room = [(n - 1) // (k - 1) if k > 1 else 3 for n, k in zip(padded, kernel)]
    dilation = tuple(draw(st.integers(1, max(1, min(3, r)))) for r in room)
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    depthwise = draw(st.booleans())
    if groups == 1:
        given, made, per_group = draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(CHANNELS)), 0
        per_group = given
    elif depthwise:
        groups = given = draw(st.sampled_from(CHANNELS))
        made, per_group = given * draw(st.integers(1, 2)), 1
    else:
        per_group = draw(st.integers(1, 4))
        given, made = groups * per_group, groups * draw(st.integers(1, 4))
    n = draw(st.sampled_from([0, 1, 2, 3]))
    shapes = [(n, given, *size), (made, per_group, *kernel)]
    if draw(st.booleans()):
        shapes.append((made,))
    return window(stride, pad, dilation, groups), shapes, draw(st.integers(0, 99))


@st.composite
def pools(draw: st.DrawFn) -> Drawn:
    """A pooling with its operand: asymmetric pads, windows that overhang, all divisors."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    size, kernel, stride, pad = draw(windows(rank))
    attributes: dict[str, Any] = {"kernel": kernel, "stride": stride, "pad": pad}
    attributes["cover_all"] = draw(st.booleans())
    if draw(st.booleans()):
        attributes["divisor"] = draw(st.sampled_from(["kernel", "padded", "inside", "one"]))
    shape = (draw(st.sampled_from([0, 1, 3])), draw(st.sampled_from(CHANNELS)), *size)
    return attributes, [shape], draw(st.integers(0, 99))


def case_of(kind: type[Op], drawn: Drawn) -> Case:
    attributes, shapes, seed = drawn
    rng = np.random.default_rng(seed)
    inputs = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    return Case("drawn", kind(**attributes), tuple(inputs))


def check_both_ways(case: Case) -> None:
    check(graph_of(case, backward=True), feeds_of(case, backward=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
@example((window((2, 2), (0,) * 4, (1, 1)), [(2, 5, 7, 7), (3, 5, 1, 1)], 0))
@example((window((1, 1), (1,) * 4, (1, 1)), [(2, 20, 9, 9), (20, 20, 3, 3)], 0))
def test_convolutions_of_any_geometry(drawn: Drawn) -> None:
    check_both_ways(case_of(Conv, drawn))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pools())
def test_pools_of_any_geometry(drawn: Drawn) -> None:
    check_both_ways(case_of(AveragePool if "divisor" in drawn[0] else MaxPool, drawn))


def test_windows_of_padding_only() -> None:
    """With `cover_all`, a stride longer than the kernel leaves a last window outside."""
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    for kind in (MaxPool, AveragePool):
        check_both_ways(Case("outside", kind((1, 1), (1, 2), (0,) * 4, cover_all=True), (x,)))


# -- who computes ----------------------------------------------------------------------------------

#: Primitives that need larger tensors than those of the cases, or a ReLU or pooling beside them.
LARGER = {"broadcast_to", "lrn", "lrn_gradient", "max_pool_index", "scatter_pooled"}


def test_primitives_are_listed() -> None:
    """What `branchgraph info` says of primitives and NumPy is what the cases meet."""
    met: set[str] = set()
    for case in PLAIN:
        if case.op.opcode in met:  # the graph has no other op
            continue
        narrow = case.in_dtype(np.dtype(np.float32))
        sizes = [narrow]
        if case in ROW_WISE and case.batch:
            sizes.append(rows_of(narrow, [k % case.batch for k in range(150)]))
        for sized in sizes:
            run = compile(graph_of(sized), "onednn")
            try:
                run.run(feeds_of(sized))
            except BranchgraphError:
                continue
            for kernel in all_kernels(run):
                if not kernel.name.startswith("numpy"):
                    met.update(member.op.opcode for member in kernel.cluster.members)
    assert met <= KERNELS
    assert KERNELS - met <= LARGER
