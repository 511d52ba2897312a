"""Every op: its values, its derivative, its rows, its refusals."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from branchgraph.ir.dims import Dim
from branchgraph.ir.errors import GradientError, GraphError, ShapeError
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import Run, interpret
from branchgraph.ir.op import Op
from branchgraph.ir.ops.activation import Elu, LeakyRelu, LogSoftmax, Relu, ReluGradient, Softmax
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.conv import Conv, ConvTranspose, ConvWeightGradient
from branchgraph.ir.ops.elementwise import (
    Absolute,
    Add,
    Cast,
    Clip,
    Compare,
    Divide,
    LogicalAnd,
    Where,
)
from branchgraph.ir.ops.exit import Exit, ExitScore
from branchgraph.ir.ops.gate import ScaleGradient, Select, StraightThrough
from branchgraph.ir.ops.linear import Dense, MatMul
from branchgraph.ir.ops.loss import CrossEntropy, OneHot
from branchgraph.ir.ops.merge import Concat, Maximum, Mean, Sum
from branchgraph.ir.ops.mode import ByMode, Noise
from branchgraph.ir.ops.norm import BatchNorm, BatchNormTraining, LocalResponseNorm
from branchgraph.ir.ops.pool import (
    AveragePool,
    AveragePoolGradient,
    GatherPooled,
    MaxPool,
    MaxPoolIndex,
    ScatterPooled,
)
from branchgraph.ir.ops.random import Dropout, RandomUniform, philox4x32
from branchgraph.ir.ops.reduce import ArgMax, BroadcastTo, ReduceMax, ReduceMean, ReduceSum
from branchgraph.ir.ops.reshape import Embed, Pad, Reshape, Slice, Split, Transpose
from branchgraph.ir.ops.roi import RoiMaxPool
from branchgraph.ir.ops.rows import Compact, Scatter
from branchgraph.ir.ops.sample_conv import SampleConv
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType, TensorType
from branchgraph.passes.specialise import specialise
from tests.ir.op_cases import CASES, DIFFERENTIABLE, PLAIN, Case, N, gaps, named, of
from tests.ir.op_references import REFERENCES, exit_score

K = Dim.symbol("K")

#: float64 against float64 by another order of summation.
SAME_FORMULA = 1e-12
#: float32 against a float64 reference: a few hundred roundings of 6e-8.
SINGLE = 1e-5
#: Central differences of step 1e-6 err by step^2 and by 1e-16 / step, both far below this.
DERIVATIVE = 1e-6
STEP = 1e-6


def agree(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Equal within `tolerance` of the largest expected magnitude, or of 1."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


def each(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """One test a case, under the case's id."""
    return pytest.mark.parametrize("case", cases, ids=[c.id for c in cases])


def rows_of(case: Case, rows: Sequence[int]) -> Case:
    """The case on some rows of its batch."""
    index = np.array(rows, int)
    kept = (x[index] if c else x for x, c in zip(case.inputs, case.carries))
    return Case(case.id, case.bound(len(rows)), tuple(kept))


def cotangents_of(case: Case) -> list[np.ndarray]:
    """A cotangent for every floating output, the same on every call."""
    rng = np.random.default_rng(len(case.id))
    return [rng.standard_normal(y.shape) for y in case.evaluate() if y.dtype.kind == "f"]


def pull_back(
    case: Case, cotangents: Sequence[np.ndarray], *, symbolic: bool = False
) -> list[np.ndarray]:
    """Cotangents of the differentiated inputs, by `vjp` and the interpreter."""
    graph = Graph(case.id)
    types = case.types(symbolic)
    values = [graph.input(f"x{i}", t.shape, t.dtype) for i, t in enumerate(types)]
    outputs = graph.apply(case.op if symbolic else case.bound(), *values)
    floating = [y for y in outputs if y.dtype.is_float]
    seeds = {y: graph.input(f"dy{j}", y.shape, y.dtype) for j, y in enumerate(floating)}
    wanted = [v for v, d in zip(values, case.differentiated) if d]
    found = vjp(graph, seeds, wanted)
    for value in wanted:
        graph.output(f"d{value.name}", found.get(value) or zeros_like(value))
    feeds = {f"x{i}": x for i, x in enumerate(case.inputs)}
    feeds |= {f"dy{j}": dy for j, dy in enumerate(cotangents)}
    return list(interpret(graph, feeds).outputs.values())


def zeros_like(value: Value) -> Value:
    """What the cotangent of a value is that nothing flows to."""
    return value.graph.emit(Full(0.0, value.shape, value.dtype))


def central_difference(function: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    """The derivative of `function` by every element of `x`."""
    slope = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[at] += STEP
        below[at] -= STEP
        slope[at] = (function(above) - function(below)) / (2 * STEP)
    return slope


def contracted(outputs: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]) -> float:
    """sum of y dy over the floating outputs."""
    floating = [y for y in outputs if y.dtype.kind == "f"]
    return math.fsum(float((y * dy).sum()) for y, dy in zip(floating, cotangents))


def with_input(case: Case, i: int, x: np.ndarray) -> Case:
    """The case with input i replaced."""
    return Case(case.id, case.op, (*case.inputs[:i], x, *case.inputs[i + 1 :]))


def wanted_positions(case: Case) -> list[int]:
    """Positions of the differentiated inputs."""
    return [i for i, d in enumerate(case.differentiated) if d]


# -- the table itself ----------------------------------------------------------------------------


def test_cases_cover_every_op_and_vary_every_attribute() -> None:
    assert gaps(CASES, Op.registry) == []


def test_an_op_without_cases_is_noticed() -> None:
    remaining = [c for c in CASES if not isinstance(c.op, LocalResponseNorm)]
    assert gaps(remaining, Op.registry) == ["lrn has no case"]


def test_an_attribute_that_never_varies_is_noticed() -> None:
    ungrouped = [c for c in CASES if not isinstance(c.op, Conv) or c.op.groups == 1]
    assert gaps(ungrouped, Op.registry) == ["conv.groups is 1 in every case"]


def test_an_optional_operand_that_is_never_given_is_noticed() -> None:
    unbiased = [c for c in CASES if not isinstance(c.op, Dense) or len(c.inputs) == 2]
    assert gaps(unbiased, Op.registry) == ["dense has 2 operands in every case"]


def test_case_ids_are_unique() -> None:
    assert len({c.id for c in CASES}) == len(CASES)


def test_every_plain_op_has_a_reference() -> None:
    assert set(REFERENCES) == {c.op.opcode for c in PLAIN}


# -- values --------------------------------------------------------------------------------------


@each(PLAIN)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(DType.F64, SAME_FORMULA), (DType.F32, SINGLE)], ids=["f64", "f32"]
)
def test_values_agree_with_the_reference(case: Case, dtype: DType, tolerance: float) -> None:
    rounded = case.in_dtype(dtype.numpy)
    expected = REFERENCES[case.op.opcode](rounded.bound(), *rounded.inputs)
    actual = rounded.evaluate()
    assert len(actual) == len(expected)
    for y, reference in zip(actual, expected):
        agree(y, reference, tolerance)


@each(PLAIN)
@pytest.mark.parametrize("dtype", [d for d in DType if d.is_float], ids=str)
def test_results_have_the_inferred_types(case: Case, dtype: DType) -> None:
    rounded = case.in_dtype(dtype.numpy)
    inferred = rounded.bound().infer(*rounded.types())
    results = rounded.evaluate()
    assert [y.dtype for y in results] == [t.dtype.numpy for t in inferred]
    if not case.op.introduces:
        assert [y.shape for y in results] == [t.shape for t in inferred]


@each(PLAIN)
def test_operands_are_left_alone(case: Case) -> None:
    before = [x.copy() for x in case.inputs]
    case.evaluate()
    for x, was in zip(case.inputs, before):
        np.testing.assert_array_equal(x, was)


def test_divisors_differ_where_windows_overhang() -> None:
    ones, expected = np.ones((1, 1, 4)), {"kernel": 1 / 3, "padded": 0.5, "inside": 1, "one": 1}
    for divisor, last in expected.items():
        op = AveragePool((3,), (2,), (1, 1), cover_all=True, divisor=divisor)
        (y,) = op.evaluate(ones)
        first = {"kernel": 2 / 3, "padded": 2 / 3, "inside": 1, "one": 2}[divisor]
        middle = 3 if divisor == "one" else 1
        agree(y, np.array([[[first, middle, last]]]), SAME_FORMULA)


def test_clip_passes_nan_and_its_bounds_have_a_gradient() -> None:
    x = np.array([-np.inf, -1.0, 0.0, 2.0, np.inf, np.nan])
    op = Clip(-1.0, 2.0)
    np.testing.assert_array_equal(op.evaluate(x)[0], [-1.0, -1.0, 0.0, 2.0, 2.0, np.nan])
    (dx,) = pull_back(Case("clip", op, (x,)), [np.ones(6)])
    np.testing.assert_array_equal(dx, [0, 1, 1, 1, 0, 0])


def test_convolution_of_no_samples_is_empty() -> None:
    op = SampleConv((1,), (0, 0), (1,))
    (y,) = op.evaluate(np.zeros((0, 2, 5)), np.zeros((0, 3, 2, 3)))
    assert y.shape == (0, 3, 3)


def test_regions_of_images_that_are_not_there_are_refused() -> None:
    with pytest.raises(ShapeError, match="region 0 lies in image 2, x has 2 images"):
        RoiMaxPool((2, 2)).evaluate(np.zeros((2, 1, 4, 4)), np.array([[2.0, 0, 0, 1, 1]]))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_regions_without_end_are_refused(number: float) -> None:
    with pytest.raises(ShapeError, match="regions must be finite"):
        RoiMaxPool((2, 2)).evaluate(np.zeros((2, 1, 4, 4)), np.array([[0, 0, number, 1, 1]]))


def test_softmax_family_survives_large_logits() -> None:
    x = np.array([[1e4, 0.0, -1e4]], np.float32)
    np.testing.assert_array_equal(Softmax().evaluate(x)[0], [[1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(LogSoftmax().evaluate(x)[0], [[0.0, -1e4, -2e4]])
    (loss,) = CrossEntropy().evaluate(x, np.array([2]))
    np.testing.assert_array_equal(loss, np.array([2e4], np.float32))


def test_covering_windows_round_up() -> None:
    sizes = {32: 16, 30: 15, 28: 14, 16: 8, 15: 7, 8: 4, 7: 3}
    plain = {32: 15, 30: 14, 28: 13, 16: 7, 15: 7, 8: 3, 7: 3}
    for size in sizes:
        assert MaxPool((3,), (2,), (0, 0), cover_all=True).out_size((size,)) == (sizes[size],)
        assert MaxPool((3,), (2,), (0, 0)).out_size((size,)) == (plain[size],)


def test_window_of_padding_only_is_minus_infinity_and_passes_no_gradient() -> None:
    op = MaxPool((1,), (3,), (0, 0), cover_all=True)
    x = np.array([[[4.0, 5.0]]])
    np.testing.assert_array_equal(op.evaluate(x)[0], [[[4.0, -np.inf]]])
    (dx,) = pull_back(Case("padding", op, (x,)), [np.array([[[2.0, 7.0]]])])
    np.testing.assert_array_equal(dx, [[[2.0, 0.0]]])
    for divisor in ("kernel", "padded", "inside", "one"):
        average = AveragePool((1,), (3,), (0, 0), cover_all=True, divisor=divisor)
        np.testing.assert_array_equal(average.evaluate(x)[0], [[[4.0, 0.0]]])


def test_max_pool_gives_the_gradient_to_the_first_of_equal_elements() -> None:
    x = np.array([[[[1.0, 1.0], [1.0, 1.0]]]])
    (dx,) = pull_back(
        Case("ties", MaxPool((2, 2), (1, 1), (0,) * 4), (x,)), [np.ones((1, 1, 1, 1))]
    )
    np.testing.assert_array_equal(dx, [[[[1.0, 0.0], [0.0, 0.0]]]])


def test_max_pool_of_infinities_and_nan_still_points_into_x() -> None:
    x = np.array([[[-np.inf, -np.inf, 1.0, np.nan]]])
    (index,) = MaxPoolIndex((2,), (2,), (0, 0)).evaluate(x)
    np.testing.assert_array_equal(index, [[[0, 3]]])
    np.testing.assert_array_equal(MaxPool((2,), (2,), (0, 0)).evaluate(x)[0], [[[-np.inf, np.nan]]])


def test_even_response_window_counts_as_the_next_odd_one() -> None:
    x = named("lrn-even").inputs[0]
    even, odd = LocalResponseNorm(4, 0.3), LocalResponseNorm(5, 0.3)
    np.testing.assert_array_equal(even.evaluate(x)[0], odd.evaluate(x)[0])


def test_cross_entropy_refuses_labels_outside_the_classes() -> None:
    with pytest.raises(ShapeError, match=r"labels run from 0 to 3, expected 0\.\.2"):
        CrossEntropy().evaluate(np.zeros((2, 3)), np.array([0, 3]))


def test_entropy_counts_an_impossible_class_as_zero() -> None:
    logits = np.array([[0.0, 0.0, -np.inf]])
    agree(ExitScore("entropy").evaluate(logits)[0], np.array([math.log(2)]), SAME_FORMULA)


# -- derivatives ---------------------------------------------------------------------------------


@each(DIFFERENTIABLE)
def test_gradients_agree_with_central_differences(case: Case) -> None:
    cotangents = cotangents_of(case)
    found = pull_back(case, cotangents)
    for i, dx in zip(wanted_positions(case), found):

        def loss(x: np.ndarray, i: int = i) -> float:
            return contracted(with_input(case, i, x).evaluate(), cotangents)

        agree(dx, central_difference(loss, case.inputs[i]), DERIVATIVE)


#: Ops whose gradient is one fused op without a gradient of its own.
ONCE_ONLY = {
    "batch_norm_training": "batch_norm_gradient",
    "lrn": "lrn_gradient",
    "grid_sample": "grid_sample_gradient",
}

FIRST_CASES = tuple({c.op.opcode: c for c in reversed(DIFFERENTIABLE)}.values())


@each([c for c in FIRST_CASES if c.op.opcode not in ONCE_ONLY])
def test_second_derivatives_agree_with_central_differences(case: Case) -> None:
    cotangents = cotangents_of(case)
    directions = [
        np.cos(np.arange(dx.size)).reshape(dx.shape) for dx in pull_back(case, cotangents)
    ]
    found = _second_order(case, cotangents, directions)
    for i, dx in zip(wanted_positions(case), found):

        def loss(x: np.ndarray, i: int = i) -> float:
            return contracted(pull_back(with_input(case, i, x), cotangents), directions)

        agree(dx, central_difference(loss, case.inputs[i]), DERIVATIVE)


def _second_order(
    case: Case, cotangents: Sequence[np.ndarray], directions: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The derivative of sum_i directions_i . dx_i by the differentiated inputs."""
    graph = Graph(case.id)
    values = [graph.input(f"x{i}", t.shape, t.dtype) for i, t in enumerate(case.types())]
    outputs = [y for y in graph.apply(case.bound(), *values) if y.dtype.is_float]
    seeds = {y: graph.input(f"dy{j}", y.shape, y.dtype) for j, y in enumerate(outputs)}
    wanted = [values[i] for i in wanted_positions(case)]
    first = vjp(graph, seeds, wanted)
    again = {
        first.get(v) or zeros_like(v): graph.input(f"v_{v.name}", v.shape, v.dtype) for v in wanted
    }
    second = vjp(graph, again, wanted)
    for value in wanted:
        graph.output(value.name, second.get(value) or zeros_like(value))
    feeds = {f"x{i}": x for i, x in enumerate(case.inputs)}
    feeds |= {f"dy{j}": dy for j, dy in enumerate(cotangents)}
    feeds |= {f"v_{v.name}": d for v, d in zip(wanted, directions)}
    return list(interpret(graph, feeds).outputs.values())


@pytest.mark.parametrize("opcode", ONCE_ONLY)
def test_fused_gradients_say_that_they_have_none(opcode: str) -> None:
    case = next(c for c in FIRST_CASES if c.op.opcode == opcode)
    with pytest.raises(GradientError, match=f"{ONCE_ONLY[opcode]} defines no gradient"):
        _second_order(case, cotangents_of(case), case.inputs)


@pytest.mark.parametrize("statistic", [1, 2])
def test_batch_statistics_alone_have_gradients(statistic: int) -> None:
    graph = Graph()
    x, gamma, beta = (
        graph.input(n, s, "f64") for n, s in (("x", (4, 3)), ("g", (3,)), ("b", (3,)))
    )
    value = graph.apply(BatchNormTraining(), x, gamma, beta)[statistic]
    found = vjp(graph, {value: None}, [x, gamma, beta])
    assert list(found) == [x]


@pytest.mark.parametrize(
    ("op", "types"),
    [
        (ExitScore("entropy"), [("f64", (3, 4))]),
        (Cast(DType.I64), [("f64", (3, 4))]),
        (Compare("less"), [("f64", (3,)), ("f64", (3,))]),
        (ArgMax(axis=1), [("f64", (3, 4))]),
    ],
    ids=lambda p: p.opcode if isinstance(p, Op) else "",
)
def test_nothing_flows_through_decisions(op: Op, types: list[tuple[str, tuple[int, ...]]]) -> None:
    graph = Graph()
    values = [graph.input(f"x{i}", shape, dtype) for i, (dtype, shape) in enumerate(types)]
    decision = graph.emit(Cast(DType.F64), graph.emit(op, *values))
    assert vjp(graph, {decision: None}, values) == {}


def test_cast_takes_the_cotangent_back() -> None:
    graph = Graph()
    x = graph.input("x", (2,), "f32")
    wide = graph.emit(Cast(DType.F64), x)
    graph.output("dx", vjp(graph, {wide: graph.input("dy", (2,), "f64")}, [x])[x])
    dx = interpret(graph, {"x": np.zeros(2), "dy": np.array([1.0, 0.1])}).outputs["dx"]
    np.testing.assert_array_equal(dx, np.array([1.0, 0.1], np.float32))
    assert dx.dtype == np.float32


@pytest.mark.parametrize(
    ("op", "slope"),
    [(Relu(), 0.0), (Absolute(), 0.0), (LeakyRelu(0.2), 0.2), (Elu(0.5), 0.5)],
    ids=["relu", "absolute", "leaky_relu", "elu"],
)
def test_derivative_at_the_kink(op: Op, slope: float) -> None:
    (dx,) = pull_back(Case("kink", op, (np.zeros(1),)), [np.array([3.0])])
    np.testing.assert_array_equal(dx, [3.0 * slope])


def test_maximum_gives_the_gradient_to_the_first_of_equal_operands() -> None:
    tied = (np.array([1.0, 0.0]), np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    found = pull_back(Case("ties", Maximum(), tied), [np.array([5.0, 7.0])])
    np.testing.assert_array_equal(found, [[5.0, 0.0], [0.0, 7.0], [0.0, 0.0]])


def test_reduce_max_gives_every_equal_element_the_whole_gradient() -> None:
    x = np.array([[1.0, 1.0, 0.0]])
    (dx,) = pull_back(Case("ties", ReduceMax(axes=(1,)), (x,)), [np.array([3.0])])
    np.testing.assert_array_equal(dx, [[3.0, 3.0, 0.0]])


# -- rows ----------------------------------------------------------------------------------------


def is_row_wise(case: Case) -> bool:
    return case.op.row_wise(case.types(symbolic=True), case.carries)


ROW_WISE = tuple(c for c in PLAIN if any(c.carries) and is_row_wise(c))

#: Cases whose inputs have rows that the op mixes, moves, or does not promise to keep apart.
MIXING = {
    *(c.id for op in (BatchNormTraining, ConvWeightGradient, Compact, Scatter) for c in of(op)),
    *(c.id for c in PLAIN if c.op.opcode in ("batch_norm_gradient", "embedding_gradient")),
    *(c.id for c in PLAIN if c.op.opcode in ("roi_max_pool", "roi_max_pool_index")),
    "reshape-across-rows",
    "transpose-across-rows",
    "slice-of-rows",
    "embed-of-rows",
    "split-rows",
    "pad-with-rows",
    *(f"{op}-rows" for op in ("running_sum", "running_product", "recurrence")),
    *(f"{op}-rows" for op in ("gather", "scatter_add", "flip")),
    *(
        f"{op}-{axes}"
        for op in ("reduce_sum", "reduce_mean", "reduce_max")
        for axes in ("all", "per-channel")
    ),
    "broadcast_to-new-axis",
    "arg_max-rows",
    "top_k-rows",
    "softmax-rows",
    "log_softmax-rows",
    "concat-rows",
    "matmul-tn",
    "matmul-tt",
}


def test_ops_that_mix_rows_say_so() -> None:
    assert {c.id for c in PLAIN if any(c.carries) and not is_row_wise(c)} == MIXING


@each(ROW_WISE)
@pytest.mark.parametrize("rows", [[2, 0], [1], []], ids=["two", "one", "none"])
def test_row_wise_ops_compute_some_rows_as_they_compute_all(case: Case, rows: list[int]) -> None:
    chosen = [r for r in rows if r < case.batch]
    for some, all_rows in zip(rows_of(case, chosen).evaluate(), case.evaluate()):
        agree(some, all_rows[np.array(chosen, int)], SAME_FORMULA)


@each([c for c in ROW_WISE if any(c.differentiated)])
def test_row_wise_ops_have_gradients_for_a_symbolic_batch(case: Case) -> None:
    cotangents = cotangents_of(case)
    for symbolic, concrete in zip(
        pull_back(case, cotangents, symbolic=True), pull_back(case, cotangents)
    ):
        np.testing.assert_array_equal(symbolic, concrete)


@each([c for c in ROW_WISE if any(c.differentiated)])
def test_no_rows_give_zero_gradients(case: Case) -> None:
    nothing = Case(case.id, case.op, rows_of(case, []).inputs)
    found = pull_back(nothing, cotangents_of(nothing), symbolic=True)
    for i, dx in zip(wanted_positions(case), found):
        np.testing.assert_array_equal(dx, np.zeros_like(nothing.inputs[i]))


@pytest.mark.parametrize(
    "id",
    [
        "conv-biased",
        "conv_transpose-plain",
        "dense-biased",
        "matmul-nn",
        "batch_norm_inference-dense",
    ],
)
def test_weights_that_differ_from_row_to_row_are_not_row_wise(id: str) -> None:
    case = named(id)
    assert not case.op.row_wise(case.types(), (True,) * len(case.inputs))


def test_a_bias_that_broadcasts_over_a_shorter_batch_is_not_row_wise() -> None:
    matrix, vector = TensorType((N, 3), DType.F32), TensorType((N,), DType.F32)
    assert not Add().row_wise((matrix, vector), (True, True))


# -- gates, estimators, row selection ------------------------------------------------------------


def test_closed_gate_hides_nan_and_infinity() -> None:
    value, gate = np.array([np.nan, np.inf, -np.inf, 2.0]), np.array([0.0, -0.0, 0.0, 3.0])
    (y,) = Select().evaluate(value, gate)
    np.testing.assert_array_equal(y, [0.0, 0.0, 0.0, 6.0])


def test_nothing_leaks_back_through_a_closed_gate() -> None:
    case = Case("closed", Select(), (np.array([1.0, 2.0]), np.array([0.0, 0.5])))
    dvalue, _ = pull_back(case, [np.array([np.nan, 4.0])])
    np.testing.assert_array_equal(dvalue, [0.0, 2.0])


def test_closed_gate_learns_from_what_it_hides() -> None:
    value = np.arange(6.0).reshape(2, 3)
    case = Case("closed", Select(), (value, np.zeros((1, 3))))
    _, dgate = pull_back(case, [np.ones((2, 3))])
    np.testing.assert_array_equal(dgate, [[3.0, 5.0, 7.0]])


def _vjp_of(op: Op, inputs: Sequence[np.ndarray], dy: np.ndarray) -> dict[str, np.ndarray]:
    """Cotangents by operand name, for ops whose gradient is not their derivative."""
    graph = Graph()
    values = [graph.input(n, x.shape, DType.of(x.dtype)) for n, x in zip(op.operands, inputs)]
    y = graph.emit(op, *values)
    for value, d in vjp(graph, {y: graph.input("dy", y.shape, y.dtype)}, values).items():
        graph.output(value.name, d)
    return interpret(graph, {**dict(zip(op.operands, inputs)), "dy": dy}).outputs


def test_straight_through_hands_the_cotangent_to_the_surrogate() -> None:
    case, dy = named("straight_through-rows"), np.full((3, 4), 2.5)
    found = _vjp_of(StraightThrough(), case.inputs, dy)
    assert list(found) == ["surrogate"]
    np.testing.assert_array_equal(found["surrogate"], dy)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_scale_gradient_multiplies_the_cotangent(scale: float) -> None:
    found = _vjp_of(ScaleGradient(), (np.ones(3), np.array(scale)), np.array([1.0, 2.0, 4.0]))
    assert list(found) == ["x"]
    np.testing.assert_array_equal(found["x"], np.array([1.0, 2.0, 4.0]) * scale)


@pytest.mark.parametrize("mask", [[False] * 3, [True, False, True], [True] * 3])
def test_scatter_undoes_compact(mask: list[bool]) -> None:
    m, x = np.array(mask), np.arange(12.0).reshape(3, 4)
    (kept,) = Compact(K).evaluate(m, x)
    (back,) = Scatter().evaluate(m, kept)
    (over,) = Scatter().evaluate(m, kept, x)
    np.testing.assert_array_equal(back, x * m[:, None])
    np.testing.assert_array_equal(over, x)


def test_scatter_refuses_rows_that_do_not_fit_the_mask() -> None:
    with pytest.raises(ShapeError, match="the mask keeps 1 rows, got 2"):
        Scatter().evaluate(np.array([True, False]), np.zeros((2, 3)))


# -- randomness ----------------------------------------------------------------------------------

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_numbers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    drawn = philox4x32(tuple(np.asarray(c) for c in counter), key)
    assert tuple(int(w) for w in drawn) == words


KEY, STEP_COUNT = np.array([3, 4], np.uint32), np.array(5)


def test_uniform_numbers_are_the_same_in_both_precisions() -> None:
    single, double = (
        RandomUniform(1, (50, 7), dtype).evaluate(KEY, STEP_COUNT)[0]
        for dtype in (DType.F32, DType.F64)
    )
    np.testing.assert_array_equal(single.astype(np.float64), double)
    assert double.min() >= 0.0
    assert double.max() < 1.0


def test_uniform_numbers_of_a_row_do_not_depend_on_the_batch() -> None:
    few, many = (RandomUniform(1, (n, 3, 5)).evaluate(KEY, STEP_COUNT)[0] for n in (2, 9))
    np.testing.assert_array_equal(few, many[:2])


def test_rows_select_uniform_numbers() -> None:
    chosen = np.array([6, 0, 6])
    (some,) = RandomUniform(1, (3, 5)).evaluate(KEY, STEP_COUNT, chosen)
    (every,) = RandomUniform(1, (9, 5)).evaluate(KEY, STEP_COUNT)
    np.testing.assert_array_equal(some, every[chosen])


@pytest.mark.parametrize(
    "other",
    [
        RandomUniform(2, (4, 5)).evaluate(KEY, STEP_COUNT)[0],
        RandomUniform(1, (4, 5)).evaluate(KEY, STEP_COUNT + 1)[0],
        RandomUniform(1, (4, 5)).evaluate(KEY[::-1], STEP_COUNT)[0],
    ],
    ids=["stream", "step", "key"],
)
def test_streams_steps_and_keys_draw_apart(other: np.ndarray) -> None:
    (own,) = RandomUniform(1, (4, 5)).evaluate(KEY, STEP_COUNT)
    assert (own != other).all()


# -- declared ops, through specialise ------------------------------------------------------------


class Declared:
    """A graph of one declared op, whose running statistics are states, and its values."""

    def __init__(self, case: Case) -> None:
        self.graph = Graph(case.id)
        self.store = Store()
        self.feeds: dict[str, np.ndarray] = {}
        values = [self._leaf(n, x) for n, x in zip(case.operands, case.inputs)]
        self.graph.output("y", self.graph.emit(case.op, *values))

    def _leaf(self, name: str, x: np.ndarray) -> Value:
        if not name.startswith("running_"):
            self.feeds[name] = x
            return self.graph.input(name, x.shape, DType.of(x.dtype))
        state = State(name, x.shape, DType.F64, Role.STATISTIC)
        self.store[state] = x
        return self.graph.read(state)

    def specialised(self, training: bool) -> Graph:
        graph = specialise(self.graph, training=training, exits="all")
        self.store.initialise(graph.states, seed=11)
        return graph

    def run(self, graph: Graph, **feeds: np.ndarray) -> Run:
        return interpret(graph, self.feeds | feeds, self.store)

    def check_gradients(self, training: bool) -> None:
        """Every fed float operand, against central differences."""
        graph = self.specialised(training)
        y = graph.outputs["y"]
        dy = np.cos(np.arange(self.run(graph).outputs["y"].size)).reshape(y.shape)
        wanted = list(graph.inputs.values())
        seed = graph.input("dy", y.shape, y.dtype)
        for value, found in vjp(graph, {y: seed}, wanted).items():
            graph.output(value.name, found)
        run = self.run(graph, dy=dy)
        for value in wanted:

            def loss(x: np.ndarray, name: str = value.name) -> float:
                return contracted([self.run(graph, dy=dy, **{name: x}).outputs["y"]], [dy])

            expected = central_difference(loss, self.feeds[value.name])
            agree(run.outputs[value.name], expected, DERIVATIVE)


@each(of(BatchNorm))
def test_batch_norm_trains_on_batch_statistics(case: Case) -> None:
    assert isinstance(case.op, BatchNorm)
    declared = Declared(case)
    graph = declared.specialised(training=True)
    run = declared.run(graph)
    x, gamma, beta, *running = case.inputs
    y, mean, var = REFERENCES["batch_norm_training"](case.op, x, gamma, beta)
    m = x.size // x.shape[1]
    seen = (mean, var * m / max(m - 1, 1) if case.op.unbiased else var)
    agree(run.outputs["y"], y, SAME_FORMULA)
    updates = {s.name: v for s, v in run.updates.items()}
    assert list(updates) == ["running_mean", "running_var"]
    for old, batch, new in zip(running, seen, updates.values()):
        agree(new, case.op.decay * old + (1 - case.op.decay) * batch, SAME_FORMULA)


@each(of(BatchNorm))
def test_batch_norm_infers_from_running_statistics(case: Case) -> None:
    declared = Declared(case)
    run = declared.run(declared.specialised(training=False))
    (expected,) = REFERENCES["batch_norm_inference"](case.op, *case.inputs)
    agree(run.outputs["y"], expected, SAME_FORMULA)
    assert run.updates == {}


@each([c for c in of(BatchNorm) if c.batch > 1] + list(of(Dropout)))
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_specialised_gradients_agree_with_central_differences(case: Case, training: bool) -> None:
    Declared(case).check_gradients(training)


def draws_of(op: Dropout, x: np.ndarray) -> tuple[int, ...]:
    """The shape of what dropout draws for x: one element along the shared axes."""
    return tuple(1 if a in op.axes else d for a, d in enumerate(x.shape))


@each(of(Dropout))
def test_dropout_keeps_what_its_stream_draws(case: Case) -> None:
    assert isinstance(case.op, Dropout)
    declared = Declared(case)
    graph = declared.specialised(training=True)
    run = declared.run(graph)
    (x,) = case.inputs
    stored = {s.role: declared.store[s] for s in graph.states}
    key, step = stored[Role.KEY], stored[Role.STEP]
    draw = RandomUniform(case.op.stream, draws_of(case.op, x), DType.F64)
    (u,) = REFERENCES["random_uniform"](draw, key, step)
    agree(run.outputs["y"], np.where(u >= case.op.ratio, x / (1 - case.op.ratio), 0), SAME_FORMULA)
    assert {s.role: int(v) for s, v in run.updates.items()} == {Role.STEP: int(step) + 1}


@each(of(ByMode))
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_choice_by_mode_is_its_operand(case: Case, training: bool) -> None:
    declared = Declared(case)
    run = declared.run(declared.specialised(training=training))
    agree(run.outputs["y"], case.inputs[0 if training else 1], SAME_FORMULA)


@each(of(Noise))
def test_noise_is_drawn_in_training_and_its_mean_in_inference(case: Case) -> None:
    assert isinstance(case.op, Noise)
    graph = Graph("noise")
    graph.output("y", graph.emit(case.op))
    inference = interpret(specialise(graph, training=False)).outputs["y"]
    assert (inference == 0.5).all()
    training = specialise(graph, training=True)
    store = Store.initialised(training.states, seed=9)
    run = interpret(training, store=store)
    draw = RandomUniform(case.op.stream, case.op.shape, case.op.dtype)
    key, step = np.array([9, 0], np.uint32), np.array(0)
    (expected,) = REFERENCES["random_uniform"](draw, key, step)
    np.testing.assert_array_equal(run.outputs["y"], expected)
    assert run.outputs["y"].dtype == inference.dtype == case.op.dtype.numpy


@each(of(Dropout))
def test_dropout_takes_draws_of_the_host(case: Case) -> None:
    assert isinstance(case.op, Dropout)
    declared = Declared(case)
    graph = specialise(declared.graph, training=True, randomness="host")
    (x,) = case.inputs
    shape = draws_of(case.op, x)
    u = np.where(np.arange(np.prod(shape)).reshape(shape) % 2, case.op.ratio, 0.0)
    run = declared.run(graph, **{f"random.{case.op.stream}": u})
    expected = np.where(u >= case.op.ratio, x / (1 - case.op.ratio), 0)
    agree(run.outputs["y"], expected, SAME_FORMULA)


@each(of(Dropout))
def test_dropout_is_the_identity_in_inference_unless_it_always_draws(case: Case) -> None:
    assert isinstance(case.op, Dropout)
    declared = Declared(case)
    run, trained = (declared.run(declared.specialised(training=mode)) for mode in (False, True))
    expected = trained.outputs["y"] if case.op.always else case.inputs[0]
    np.testing.assert_array_equal(run.outputs["y"], expected)


@each(of(Exit))
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_exit_is_its_logits_where_every_row_is_kept(case: Case, training: bool) -> None:
    declared = Declared(case)
    run = declared.run(declared.specialised(training))
    np.testing.assert_array_equal(run.outputs["y"], case.inputs[0])


LEAVES = {
    "entropy": operator.lt,
    "normalised_entropy": operator.lt,
    "confidence": operator.gt,
    "margin": operator.gt,
}


def _leaving(op: Exit, logits: np.ndarray, threshold: float, *previous: np.ndarray) -> list[bool]:
    """Which rows leave, one after another."""
    if op.criterion != "patience":
        return [LEAVES[op.criterion](s, threshold) for s in exit_score(op.criterion, logits)]
    answers = [np.argmax(p, axis=1).tolist() for p in (logits, *reversed(previous))]
    runs = []
    for row in zip(*answers):
        run = 1
        while run < len(row) and row[run] == row[0]:
            run += 1
        runs.append(run >= threshold)
    return runs


@each([c for c in of(Exit) if len(c.inputs) > 1])
def test_rows_leave_at_an_exit_by_its_criterion(case: Case) -> None:
    assert isinstance(case.op, Exit)
    graph = Graph()
    symbolic = [("N", *x.shape[1:]) if x.ndim else () for x in case.inputs]
    early = [graph.input(f"x{i}", s, DType.F64) for i, s in enumerate(symbolic)]
    late = graph.input("late", symbolic[0], DType.F64)
    graph.emit(case.op, *early)
    graph.output("y", graph.emit(Exit("last"), late))
    lowered = specialise(graph, training=False)
    feeds = {f"x{i}": x for i, x in enumerate(case.inputs)}
    rest = np.zeros_like(case.inputs[0])
    outputs = interpret(lowered, {**feeds, "late": rest}).outputs
    logits, threshold, *previous = case.inputs
    leaving = np.array(_leaving(case.op, logits, float(threshold), *previous), bool)
    assert 0 < leaving.sum() < len(leaving)
    np.testing.assert_array_equal(outputs["exit"], np.where(leaving, 0, 1))
    np.testing.assert_array_equal(
        outputs["logits"], np.where(leaving[:, None], case.inputs[0], rest)
    )
    assert any(case.op.name in node.path for node in lowered.nodes)


# -- refusals ------------------------------------------------------------------------------------


Typed = tuple[str, tuple[int | str, ...]]


def typed(dtype: str, *shape: int | str) -> Typed:
    return dtype, shape


def f64(*shape: int | str) -> Typed:
    return typed("f64", *shape)


SAMPLE_2D = SampleConv((1, 1), (0,) * 4, (1, 1))
PLAIN_2D = Conv((1, 1), (0,) * 4, (1, 1))
GROUPED_2D = Conv((1, 1), (0,) * 4, (1, 1), groups=2)
BACK_2D = ConvTranspose((1, 1), (0,) * 4, (1, 1), size=(4, 4))
WEIGHT_2D = ConvWeightGradient((1, 1), (0,) * 4, (1, 1), kernel=(3, 3))
POOL_2D = MaxPool((2, 2), (2, 2), (0,) * 4)

REFUSALS: list[tuple[Op, list[Typed], str]] = [
    (Reshape((5,)), [f64(2, 3)], r"6 elements do not fit shape \['5'\]"),
    (Transpose((0, 0)), [f64(2, 3)], "no permutation of the 2 axes"),
    (Slice(1, 2, 2), [f64(2, 3)], "positions up to 3 exceed size 3"),
    (Slice(0, 0, 2), [f64("N", 3)], "axis 0 has symbolic size N"),
    (Slice(2, 0, 1), [f64(2, 3)], "axis 2 exceeds rank 2"),
    (Embed(1, 1, 3), [f64(2, 3)], "position 3 exceeds size 3"),
    (Embed(0, 0, 3), [f64("N")], "axis 0 has symbolic size N"),
    (Split(1, (1, 1)), [f64(2, 3)], "sizes sum to 2, axis has 3"),
    (Pad((1,), (1,)), [f64(2, 3)], "pads 1 axes, x has 2"),
    (ReduceSum((2,)), [f64(2, 3)], r"axes \(2,\) exceed rank 2"),
    (ReduceMean((0,)), [typed("i64", 2)], "needs a floating dtype, got i64"),
    (BroadcastTo((2, 3)), [f64(2, 2)], r"do not broadcast: 2 against 3"),
    (BroadcastTo((3,)), [f64(2, 3)], "does not broadcast to"),
    (ArgMax(1), [f64(2)], "axis 1 exceeds rank 1"),
    (Add(), [f64(2, 3), f64(2)], "do not broadcast: 3 against 2"),
    (Add(), [f64(2), typed("f32", 2)], "must share one dtype, got f64 and f32"),
    (Divide(), [typed("i64", 2), typed("i64", 2)], "needs a floating dtype, got i64"),
    (Compare("less"), [f64(2), typed("f32", 2)], "must share one dtype"),
    (LogicalAnd(), [typed("bool", 2), f64(2)], "needs bool, got bool and f64"),
    (Where(), [f64(2), f64(2), f64(2)], "condition must be bool, got f64"),
    (Relu(), [typed("i32", 2)], "needs a floating dtype, got i32"),
    (ReluGradient(), [f64(2), f64(3)], "y and dy must have one type"),
    (Softmax(axis=1), [f64(3)], "axis 1 exceeds rank 1"),
    (Full(0.5, (), DType.I64), [], "value 0.5 does not fit i64"),
    (PLAIN_2D, [f64(2, 3, 4), f64(4, 3, 2)], "2 spatial axes need rank 4"),
    (PLAIN_2D, [f64(2, 3, 4, 4), f64(4, 2, 3, 3)], "x has 3 channels, weight reads 2"),
    (
        PLAIN_2D,
        [f64(2, 3, 4, 4), f64(4, 3, 5, 1)],
        "kernel 5 exceeds padded size on spatial axis 0",
    ),
    (PLAIN_2D, [f64(2, 3, 4, 4), f64(4, 3, 3, 3), f64(3)], r"bias must have shape \[4\]"),
    (PLAIN_2D, [f64(2, 3, 4, 4), typed("f32", 4, 3, 3, 3)], "must share one dtype"),
    (GROUPED_2D, [f64(2, 4, 4, 4), f64(4, 4, 3, 3)], r"weight reads 8 \(4 in each of 2 groups\)"),
    (GROUPED_2D, [f64(2, 4, 4, 4), f64(3, 2, 3, 3)], "3 filters in 2 groups"),
    (BACK_2D, [f64(2, 3, 2, 2), f64(4, 1, 3, 3)], "dy has 3 channels, weight 4"),
    (BACK_2D, [f64(2, 3, 3, 2), f64(3, 1, 3, 3)], r"gives \(2, 2\), dy has \(3, 2\)"),
    (
        ConvTranspose((1,), (0, 0), (1,), 2, size=(4,)),
        [f64(2, 3, 2), f64(3, 1, 3)],
        "3 filters in 2 groups",
    ),
    (WEIGHT_2D, [f64(2, 3, 4, 4), f64(3, 3, 2, 2)], "batches differ"),
    (WEIGHT_2D, [f64(2, 3, 4, 4), f64(2, 3, 3, 2)], r"spatial size \(2, 2\), dy has \(3, 2\)"),
    (SAMPLE_2D, [f64(2, 3, 4, 4), f64(4, 3, 3, 3)], r"5 axes, got f64\[4, 3, 3, 3\]"),
    (SAMPLE_2D, [f64(2, 3, 4, 4), f64(3, 4, 3, 3, 3)], "batches differ"),
    (SAMPLE_2D, [f64(2, 3, 4, 4), f64(2, 4, 2, 3, 3)], "x has 3 channels, weight reads 2"),
    (
        SAMPLE_2D,
        [f64(2, 3, 4, 4), f64(2, 4, 3, 3, 3), f64(4)],
        r"biases must have shape \[2, 4\]",
    ),
    (RoiMaxPool((2, 2)), [f64(2, 3, 4), f64(2, 5)], r"x is \[N, C, H, W\]"),
    (RoiMaxPool((2, 2)), [f64(2, 3, 4, 4), f64(2, 4)], r"regions are \[R, 5\]"),
    (MatMul(), [f64(2, 3), f64(2, 3)], "inner sizes differ: 3 and 2"),
    (MatMul(), [f64(2, 3, 4), f64(3, 4, 5)], "leading axes differ"),
    (MatMul(), [f64(3), f64(3)], "rank >= 2"),
    (Dense(), [f64(2, 3, 4), f64(5, 12)], "reshape x"),
    (Dense(), [f64(2, 3), f64(5, 4)], "x has 3 features, weight reads 4"),
    (Dense(), [f64(2, 3), f64(5, 3), f64(4)], r"bias must have shape \[5\]"),
    (Sum(), [], "at least one operand"),
    (Mean(), [f64(2), f64(3)], "operands must have one type"),
    (Concat(), [f64(2, 3), f64(3, 3)], "may differ on axis 1 only"),
    (Concat(axis=2), [f64(2, 3)], "axis 2 exceeds rank 2"),
    (Select(), [f64(2, 3), f64(2)], "do not broadcast: 3 against 2"),
    (Select(), [f64(2, 1), f64(2, 3)], "does not broadcast to value"),
    (Select(), [f64(2), typed("f32")], "value is f64, gate is f32; cast one"),
    (StraightThrough(), [f64(2), f64(3)], "must have one type"),
    (ScaleGradient(), [f64(2), f64(1)], r"scale must be f64\[\], got f64\[1\]"),
    (Compact(K), [f64(2), f64(2, 3)], r"mask must be bool\[N\], got f64\[2\]"),
    (Compact(K), [typed("bool", 2), f64(3, 3)], "must have the 2 rows of the mask"),
    (Compact(K), [typed("bool", 2)], "at least one value"),
    (Scatter(), [typed("bool", 3), f64(2, 4), f64(3, 5)], r"base must be f64\[3, 4\]"),
    (BatchNorm(), [f64(2, 3), f64(3), f64(3), f64(4), f64(3)], r"have shape \[3\], got f64\[4\]"),
    (BatchNormTraining(), [f64(3), f64(3), f64(3)], "needs a batch and a channel axis"),
    (LocalResponseNorm(), [f64(3)], "x needs a channel axis"),
    (POOL_2D, [f64(2, 3, 4)], "2 spatial axes need rank 4"),
    (POOL_2D, [f64(2, 3, 4, 1)], "window 2 exceeds spatial axis 1"),
    (POOL_2D, [typed("i64", 2, 3, 4, 4)], "needs a floating dtype"),
    (
        AveragePoolGradient((2,), (2,), (0, 0), size=(4,)),
        [f64(2, 3, 3)],
        r"gives \(2,\), dy has \(3,\)",
    ),
    (ScatterPooled((4,)), [f64(2, 3, 2), f64(2, 3, 2)], "index must be i64, got f64"),
    (ScatterPooled((4,)), [f64(2, 3, 2), typed("i64", 2, 3, 3)], "must have one shape"),
    (GatherPooled(), [f64(2, 3, 4), typed("i64", 2, 2, 2)], "planes differ"),
    (OneHot(3), [f64(2)], "labels must be integers, got f64"),
    (CrossEntropy(), [f64(2, 3), f64(2)], "labels must be integers, got f64"),
    (CrossEntropy(), [f64(2, 3, 4), typed("i64", 2)], r"must have shape \(2, 4\)"),
    (Exit("e"), [f64(2, 3, 4)], r"logits must be \[N, classes\]"),
    (Exit("e"), [f64(2, 3), typed("f32")], r"threshold must be f64\[\], got f32\[\]"),
    (Exit("e"), [f64(2, 3), f64(), f64(2, 3)], "only the criterion patience reads previous"),
    (ExitScore("margin"), [f64(3)], r"logits must be \[N, classes\]"),
    (RandomUniform(0), [typed("i64", 2), typed("i64")], r"key must be u32\[2\]"),
    (RandomUniform(0), [typed("u32", 2), f64()], r"step must be i64\[\]"),
    (RandomUniform(0, (3,)), [typed("u32", 2), typed("i64"), typed("i64", 2)], r"i64\[3\]"),
    (RandomUniform(0), [typed("u32", 2), typed("i64"), typed("i64")], "shape without an axis"),
    (RandomUniform(0, (), DType.I64), [typed("u32", 2), typed("i64")], "needs a floating dtype"),
    (Relu(), [f64(2), f64(2)], r"takes \(x\), got 2 operands"),
    (Dense(), [f64(2, 3)], r"takes \(x, weight, bias\?\), got 1 operands"),
]


@pytest.mark.parametrize(
    ("op", "types", "rule"),
    REFUSALS,
    ids=[f"{op.opcode}-{i}" for i, (op, _, _) in enumerate(REFUSALS)],
)
def test_operands_that_do_not_fit_are_refused(op: Op, types: list[Typed], rule: str) -> None:
    graph = Graph()
    values = [graph.input(f"x{i}", shape, dtype) for i, (dtype, shape) in enumerate(types)]
    with pytest.raises(ShapeError, match=rule) as refusal:
        graph.apply(op, *values)
    assert str(refusal.value).startswith(f"{op.opcode}: ")
    assert all(f"x{i}: " in str(refusal.value) for i in range(len(types)))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Conv((1, 1), (0,), (1, 1)), "needs 4 pads and 2 dilations"),
        (lambda: Conv((), (), ()), "at least one spatial axis"),
        (lambda: Conv((0,), (0, 0), (1,)), "at least 1"),
        (lambda: Conv((1,), (-1, 0), (1,)), "pad is not negative"),
        (lambda: MaxPool((2, 2), (2,), (0,) * 4), "needs 2 strides and 4 pads"),
        (lambda: MaxPool((), (), ()), "at least one spatial axis"),
        (lambda: MaxPool((0,), (1,), (0, 0)), "at least 1"),
        (lambda: AveragePool((2,), (2,), (0, 0), divisor="all"), "'all' is none of"),
        (lambda: RoiMaxPool((2,)), "two positive numbers"),
        (lambda: RoiMaxPool((2, 2), 0.0), "scale must be positive"),
        (lambda: Clip(1.0, 0.0), "low must not exceed high"),
        (lambda: Clip(0.0, float("nan")), "low must not exceed high"),
        (lambda: Slice(0, -1, 2), "not negative"),
        (lambda: Embed(0, 0, 2, step=0), "step is at least 1"),
        (lambda: Split(0, (3, -1)), "none negative"),
        (lambda: Pad((1,), (1, 2)), "one entry an axis"),
        (lambda: ReduceSum((1, 0)), "ascending"),
        (lambda: Compare("near"), "'near' is none of"),
        (lambda: BatchNorm(eps=0.0), "eps must be positive"),
        (lambda: LocalResponseNorm(size=0), "size is at least 1"),
        (lambda: Dropout(1.0, 0), r"outside \[0, 1\)"),
        (lambda: Dropout(0.5, 0, axes=(1, 0)), "ascending"),
        (lambda: RandomUniform(-1), "random stream -1"),
        (lambda: Exit("e", "luck"), "criterion 'luck' is none of"),
        (lambda: ExitScore("patience"), "patience has no score"),
        (lambda: Conv((True,), (0, 0), (1,)), r"Conv\.stride\[0\]: expected int, got True"),
    ],
)
def test_attributes_that_contradict_are_refused(make: Callable[[], Op], rule: str) -> None:
    with pytest.raises(GraphError, match=rule):
        make()
