"""Operators beyond the recordings: what their parameters mean, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from branchgraph.ir.dims import Dim
from branchgraph.ir.errors import FormatError, ShapeError
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.state import Store
from branchgraph.mx.operators import Operator, named, read_operator
from branchgraph.mx.operators.movement import Reshape
from branchgraph.passes.specialise import specialise

N = Dim.symbol("N")
RNG = np.random.default_rng(3)

#: float64 against float64 by another order of summation.
SAME_FORMULA = 1e-12


def apply(
    name: str, *arrays: np.ndarray, training: bool = False, seed: int = 0, **parameters: str
) -> list[np.ndarray]:
    """The outputs of an operator on float64 arrays, its parameters as texts."""
    graph = built(read_operator(name, parameters), *arrays)
    lowered = specialise(graph, training=training)
    store = Store.initialised(lowered.states, seed)
    return list(interpret(lowered, feeds(*arrays), store).outputs.values())


def built(operator: Operator, *arrays: np.ndarray) -> Graph:
    graph = Graph(operator.spelling)
    values = [graph.input(f"x{i}", a.shape, a.dtype) for i, a in enumerate(arrays)]
    for i, y in enumerate(operator.build(*values)):
        graph.output(f"y{i}", y)
    return graph


def feeds(*arrays: np.ndarray) -> Mapping[str, np.ndarray]:
    return {f"x{i}": a for i, a in enumerate(arrays)}


def gradients(name: str, *arrays: np.ndarray, **parameters: str) -> list[np.ndarray]:
    """Cotangents of all inputs where every output's is 1; zeros where nothing flows."""
    graph = specialise(built(read_operator(name, parameters), *arrays), training=True)
    values = list(graph.inputs.values())
    seeds: dict[Value, Value | None] = dict.fromkeys(graph.outputs.values())
    found = vjp(graph, seeds, values)
    for value in found:
        graph.output(f"d{value.name}", found[value])
    outputs = interpret(graph, feeds(*arrays), Store.initialised(graph.states)).outputs
    return [outputs.get(f"dx{i}", np.zeros_like(a)) for i, a in enumerate(arrays)]


def agree(actual: np.ndarray, expected: Any) -> None:
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=SAME_FORMULA, atol=SAME_FORMULA)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


# -- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "codes", "reverse", "expected"),
    [
        ((2, 3, 4), (4, 0, 2), False, (4, 3, 2)),
        ((2, 3, 4), (6, 1, -1), False, (6, 1, 4)),
        ((2, 3, 4), (-2,), False, (2, 3, 4)),
        ((2, 3, 4), (2, -2), False, (2, 3, 4)),
        ((2, 3, 4), (-2, 1, 1), False, (2, 3, 4, 1, 1)),
        ((2, 3, 4, 5), (-3, -3), False, (6, 20)),
        ((2, 3, 4), (0, -3), False, (2, 12)),
        ((2, 3, 4), (-4, 1, 2, -2), False, (1, 2, 3, 4)),
        ((2, 3, 4), (2, -4, -1, 3, -2), False, (2, 1, 3, 4)),
        ((10, 5, 4), (-1, 0), False, (40, 5)),
        ((10, 5, 4), (-1, 0), True, (50, 4)),
        ((N, 3, 4), (-1, 12), False, (N, 12)),
        ((N, 6, 4), (-1, 4), False, (6 * N, 4)),
        ((N, 6, 4), (-3, 0), False, (6 * N, 4)),
        ((6 * N, 4), (-4, -1, 6, 0), False, (N, 6, 4)),
        ((N, 6, 4), (0, 0, -1), False, (N, 6, 4)),
    ],
)
def test_reshape_codes(
    source: tuple[Any, ...], codes: tuple[int, ...], reverse: bool, expected: tuple[Any, ...]
) -> None:
    assert Reshape(shape=codes, reverse=reverse).target(source) == expected


def test_the_older_reshape_infers_zeros() -> None:
    assert Reshape(target_shape=(2, 0)).target((2, 3, 4)) == (2, 12)
    assert Reshape(target_shape=(0, 6), keep_highest=True).target((2, 6)) == (2, 6)
    with pytest.raises(ShapeError, match="neither shape nor target_shape"):
        Reshape().target((2, 3))


@pytest.mark.parametrize(
    ("codes", "rule"),
    [((-1, -1), "only one"), ((-5,), "the code -5"), ((0, 0, 0, 0), "more dimensions"),
     ((-4, -1, -1), "cannot be split"), ((-4, 5, -1), "does not split"), ((-4, 2), "the code -4")],
)  # fmt: skip
def test_reshape_codes_that_make_no_sense(codes: tuple[int, ...], rule: str) -> None:
    with pytest.raises(ShapeError, match=rule):
        Reshape(shape=codes).target((2, 3, 4))


def test_squeezing_everything_leaves_one_element() -> None:
    assert apply("squeeze", np.ones((1, 1)))[0].shape == (1,)
    assert apply("squeeze", np.ones((1, 2, 1)), axis="(0,)")[0].shape == (2, 1)


def test_slices_are_pythons() -> None:
    x = normal(5, 6)
    agree(apply("slice", x, begin="(4, None)", end="(None, 5)", step="(-2, 2)")[0], x[4::-2, :5:2])
    agree(apply("slice", x, begin="(None, -3)", end="(None, None)")[0], x[:, -3:])
    agree(apply("slice_axis", x, axis="-1", begin="-4", end="-1")[0], x[:, -4:-1])
    agree(apply("slice_axis", x, axis="0", begin="1", end="None")[0], x[1:])
    with pytest.raises(ShapeError, match="leaves nothing"):
        apply("slice_axis", x, axis="0", begin="3", end="3")


def test_like_gives_a_size_and_gets_no_gradient() -> None:
    x, like = normal(2, 3, 6, 7), normal(1, 1, 3, 4)
    agree(apply("Crop", x, like, num_args="2", offset="(2, 1)")[0], x[:, :, 2:5, 1:5])
    agree(apply("Crop", x, like, num_args="2", center_crop="True")[0], x[:, :, 1:4, 1:5])
    agree(apply("slice_like", x, normal(2, 1, 6, 2))[0], x[:, :1, :, :2])
    dx, dlike = gradients("Crop", x, like, num_args="2")
    assert (dx.sum(), dlike.sum()) == (2 * 3 * 3 * 4, 0)
    with pytest.raises(ShapeError, match="do not lie in"):
        apply("Crop", x, num_args="1", h_w="(9, 9)")


# -- convolution, products, pooling --------------------------------------------------------------


def test_a_deconvolution_is_the_transpose_of_the_convolution() -> None:
    geometry = {"kernel": "(3, 2)", "stride": "(2, 3)", "pad": "(1, 0)", "num_group": "2",
                "dilate": "(1, 2)"}  # fmt: skip
    x, weight = normal(2, 4, 7, 9), normal(6, 2, 3, 2)
    (y,) = apply("Convolution", x, weight, num_filter="6", no_bias="True", **geometry)
    dy = normal(*y.shape)
    size = f"{tuple(x.shape[2:])}"
    (dx,) = apply("Deconvolution", dy, weight, num_filter="4", target_shape="()", adj="(0, 0)",
                  **geometry)  # fmt: skip
    (aimed,) = apply("Deconvolution", dy, weight, num_filter="4", target_shape=size,
                     **{**geometry, "pad": "(5, 5)"})  # fmt: skip
    np.testing.assert_allclose((y * dy).sum(), (x * aimed).sum(), rtol=1e-10)
    assert aimed.shape == x.shape
    assert dx.shape == (2, 4, 2 * (y.shape[2] - 1) + 1, 3 * (y.shape[3] - 1) + 3)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolutions_of_all_ranks_infer_their_weights(axes: int) -> None:
    kernel = str((3,) * axes)
    data = (N, 4, *(8,) * axes)
    conv = read_operator("Convolution", {"kernel": kernel, "num_filter": "6", "num_group": "2"})
    assert conv.infer_inputs((data, None, None))[1:] == ((6, 2, *(3,) * axes), (6,))
    back = read_operator(
        "Deconvolution", {"kernel": kernel, "num_filter": "6", "num_group": "2", "no_bias": "0"}
    )
    assert back.infer_inputs((data, None, None))[1:] == ((4, 3, *(3,) * axes), (6,))
    x, w, b = normal(2, 4, *(5,) * axes), normal(4, 3, *(3,) * axes), normal(6)
    (y,) = apply("Deconvolution", x, w, b, kernel=kernel, num_filter="6", num_group="2",
                 no_bias="False", stride=str((2,) * axes), adj=str((1,) * axes))  # fmt: skip
    assert y.shape == (2, 6, *(12,) * axes)


def test_groups_that_do_not_divide_are_refused() -> None:
    conv = read_operator("Convolution", {"kernel": "3", "num_filter": "4", "num_group": "3"})
    with pytest.raises(ShapeError, match="6 channels and 4 filters in 3 groups"):
        conv.infer_inputs(((2, 6, 8), None, None))


def test_dot_contracts_the_last_axis_with_the_first() -> None:
    a, b = normal(2, 3, 4), normal(4, 5, 6)
    agree(apply("dot", a, b)[0], np.tensordot(a, b, 1))
    agree(apply("dot", a.T, b, transpose_a="True")[0], np.tensordot(a.T, b, (0, 0)))
    agree(apply("dot", a, b.T, transpose_b="True")[0], np.tensordot(a, b.T, (-1, -1)))
    agree(apply("dot", normal(3) * 0 + 1, np.ones(3))[0], [3.0])


def windows(x: np.ndarray, k: int, s: int, p: int, count: int) -> list[tuple[slice, int]]:
    """For each window of one axis: the part inside x, and its length with padding."""
    found = []
    for i in range(count):
        start, end = i * s - p, min(i * s - p + k, x.shape[-1] + p)
        found.append((slice(max(start, 0), min(end, x.shape[-1])), end - start))
    return found


@pytest.mark.parametrize(
    ("convention", "size", "count"), [("valid", 9, 4), ("full", 9, 5), ("same", 10, 6)]
)
@pytest.mark.parametrize("include", ["True", "False", "None"])
def test_windows_of_pooling(convention: str, size: int, count: int, include: str) -> None:
    x, k, s, p = normal(2, 3, size), 4, 2, 1
    parameters = {"kernel": "(4,)", "stride": "(2,)", "pad": "(1,)",
                  "pooling_convention": convention}  # fmt: skip
    parts = windows(x, k, s, p, count)
    averages = [
        x[..., w].sum(-1) / (w.stop - w.start if include == "False" else length)
        for w, length in parts
    ]
    average = apply("Pooling", x, pool_type="avg", count_include_pad=include, **parameters)[0]
    agree(average, np.stack(averages, -1))
    largest = apply("Pooling", x, pool_type="max", **parameters)[0]
    agree(largest, np.stack([x[..., w].max(-1) for w, _ in parts], -1))
    total = apply("Pooling", x, pool_type="sum", **parameters)[0]
    agree(total, np.stack([x[..., w].sum(-1) for w, _ in parts], -1))
    for power in (1, 2):
        normed = apply("Pooling", x, pool_type="lp", p_value=str(power), **parameters)[0]
        norms = [(np.abs(x[..., w]) ** power).sum(-1) ** (1 / power) for w, _ in parts]
        agree(normed, np.stack(norms, -1))


@pytest.mark.parametrize("kind", ["max", "avg", "sum", "lp"])
def test_global_pooling_ignores_kernel_stride_and_pad(kind: str) -> None:
    x = normal(2, 3, 4, 5)
    parameters = {"kernel": "(2, 2)", "pad": "(1, 1)", "stride": "(2, 2)", "p_value": "2"}
    (y,) = apply("Pooling", x, pool_type=kind, global_pool="True", **parameters)
    reduce = {"max": np.max, "avg": np.mean, "sum": np.sum, "lp": np.linalg.norm}[kind]
    agree(y, reduce(x, axis=(2, 3), keepdims=True))


def test_pooling_refusals() -> None:
    x = normal(1, 1, 4, 4)
    for parameters, rule in (
        ({"kernel": "(2,)"}, "does not fit 2 spatial axes"),
        ({"kernel": "(9, 9)"}, "exceeds"),
        ({"kernel": "(2, 2)", "pooling_convention": "same"}, "one spatial axis"),
        ({"kernel": "(2, 2)", "pool_type": "lp", "p_value": "3"}, "p_value is 1 or 2"),
    ):
        with pytest.raises(ShapeError, match=rule):
            apply("Pooling", x, **parameters)


def test_upsampling_joins_images_at_the_size_of_the_first() -> None:
    a, b = normal(1, 2, 2, 3), normal(1, 1, 4, 6)
    (y,) = apply("UpSampling", a, b, scale="4", sample_type="nearest", num_args="2")
    large = [np.repeat(np.repeat(v, f, 2), f, 3) for v, f in ((a, 4), (b, 2))]
    agree(y, np.concatenate(large, 1))
    with pytest.raises(ShapeError, match="by a scale of 1 or more"):
        apply("UpSampling", a, scale="0", sample_type="nearest")
    (total,) = apply("UpSampling", a, a, scale="2", sample_type="nearest", num_args="2",
                     multi_input_mode="sum")  # fmt: skip
    agree(total, 2 * np.repeat(np.repeat(a, 2, 2), 2, 3))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_bilinear_upsampling_has_a_filter_for_every_channel(scale: int) -> None:
    operator = read_operator("UpSampling", {"scale": str(scale), "sample_type": "bilinear"})
    weight = operator.infer_inputs(((1, 2, 3, 4), None))[1]
    assert weight is not None
    graph = built(operator, normal(1, 2, 3, 4), normal(*map(int, map(str, weight))))
    assert graph.outputs["y0"].shape == (1, 2, 3 * scale, 4 * scale)


# -- normalisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 3, -1])
def test_batch_norm_normalises_all_axes_but_one(axis: int) -> None:
    x = normal(3, 4, 2, 5)
    c = x.shape[axis]
    vectors = [normal(c), normal(c), normal(c), normal(c) ** 2]
    gamma, beta, mean, var = (
        v.reshape([-1 if a == axis % 4 else 1 for a in range(4)]) for v in vectors
    )
    parameters = {"axis": str(axis), "fix_gamma": "False", "eps": "0.1"}
    agree(
        apply("BatchNorm", x, *vectors, **parameters)[0],
        (x - mean) / np.sqrt(var + 0.1) * gamma + beta,
    )
    rest = tuple(a for a in range(4) if a != axis % 4)
    batch = (x - x.mean(rest, keepdims=True)) / np.sqrt(x.var(rest, keepdims=True) + 0.1)
    graph = built(read_operator("BatchNorm", parameters), x, *vectors)
    trained = specialise(graph, training=True, statistics="none")
    agree(interpret(trained, feeds(x, *vectors)).outputs["y0"], batch * gamma + beta)
    operator = read_operator("BatchNorm", parameters)
    assert operator.infer_inputs((x.shape, *(None,) * 4))[1:] == ((c,),) * 4


@pytest.mark.parametrize(
    ("mode", "axes"), [("instance", (1, 2, 3)), ("channel", 1), ("spatial", (2, 3))]
)
def test_l2_normalisation(mode: str, axes: Any) -> None:
    x = normal(2, 3, 4, 2)
    expected = x / np.sqrt((x * x).sum(axis=axes, keepdims=True) + 0.5)
    agree(apply("L2Normalization", x, mode=mode, eps="0.5")[0], expected)


def test_an_even_response_window_is_refused() -> None:
    with pytest.raises(ShapeError, match="nsize is odd"):
        apply("LRN", normal(1, 4, 2), nsize="4")


# -- activations ---------------------------------------------------------------------------------


def test_kinks_have_the_slopes_of_mxnet() -> None:
    x = np.array([[-1.0, 0.0, 2.0]])
    gamma = np.array([0.1, 0.2, 0.3])
    dx, dgamma = gradients("LeakyReLU", x, gamma, act_type="prelu")
    agree(dx, [[0.1, 0.2, 1.0]])
    agree(dgamma, [-1.0, 0.0, 0.0])
    agree(gradients("LeakyReLU", x, slope="0.5")[0], [[0.5, 0.5, 1.0]])
    agree(gradients("Activation", x, act_type="relu")[0], [[0.0, 0.0, 1.0]])
    agree(gradients("abs", x)[0], [[-1.0, 0.0, 1.0]])
    agree(gradients("clip", x, a_min="-1", a_max="0")[0], [[1.0, 1.0, 0.0]])


def test_a_random_slope_is_its_mean_in_inference_and_between_its_bounds_in_training() -> None:
    x = -np.ones((4, 50))
    parameters = {"act_type": "rrelu", "lower_bound": "0.2", "upper_bound": "0.4"}
    agree(apply("LeakyReLU", x, **parameters)[0], x * 0.3)
    drawn = -apply("LeakyReLU", x, training=True, **parameters)[0]
    assert 0.2 <= drawn.min() < 0.25
    assert 0.35 < drawn.max() < 0.4


def test_dropout_shares_draws_along_axes() -> None:
    x = np.ones((3, 40, 5))
    (y,) = apply("Dropout", x, training=True, p="0.5", axes="(0, -1)")
    assert (y == y[:1, :, :1]).all()
    assert set(np.unique(y)) == {0.0, 2.0}
    agree(apply("Dropout", x)[0], x)


def test_softmax_takes_a_temperature_and_a_type() -> None:
    x = normal(2, 3)
    e = np.exp(x / 2)
    agree(apply("softmax", x, temperature="2")[0], e / e.sum(-1, keepdims=True))
    assert apply("softmax", x, dtype="float32")[0].dtype == np.float32
    with pytest.raises(ShapeError, match="use_length is not supported"):
        apply("softmax", x, use_length="True")
    channel = apply("SoftmaxActivation", normal(2, 3, 4), mode="channel")[0]
    agree(channel.sum(1), np.ones((2, 4)))


# -- arithmetic, reductions, look-up -------------------------------------------------------------


@pytest.mark.parametrize("name", ["broadcast_maximum", "broadcast_minimum", "_maximum", "_minimum"])
def test_ties_go_to_the_left(name: str) -> None:
    dleft, dright = gradients(name, np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    agree(dleft, [1.0, 1.0])
    agree(dright, [0.0, 0.0])


@pytest.mark.parametrize("name", ["_maximum_scalar", "_minimum_scalar"])
def test_a_number_that_is_reached_lets_the_gradient_pass(name: str) -> None:
    agree(gradients(name, np.array([2.0]), scalar="2")[0], [1.0])


@pytest.mark.parametrize(
    ("axis", "exclude", "axes"),
    [("None", "False", (0, 1, 2)), ("()", "True", (0, 1, 2)), ("-1", "False", (2,)),
     ("(0, 2)", "False", (0, 2)), ("1", "True", (0, 2))],
)  # fmt: skip
@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "prod"])
def test_reductions(name: str, axis: str, exclude: str, axes: tuple[int, ...]) -> None:
    x = normal(2, 3, 4)
    for keep in (True, False):
        expected = getattr(np, name)(x, axis=axes, keepdims=keep)
        (y,) = apply(name, x, axis=axis, exclude=exclude, keepdims=str(keep))
        agree(y, expected if expected.shape else expected.reshape(1))


def test_tied_extremes_share_nothing_and_all_receive() -> None:
    x = np.array([[1.0, 3.0, 3.0], [0.0, 0.0, 2.0]])
    agree(gradients("max", x, axis="1")[0], [[0, 1, 1], [0, 0, 1]])
    agree(gradients("min", x, axis="1")[0], [[1, 0, 0], [1, 1, 0]])


def test_positions_of_extremes() -> None:
    x = np.array([[1.0, 3.0, 3.0], [0.0, 0.0, 2.0]])
    agree(apply("argmax", x, axis="1")[0], [1.0, 2.0])
    agree(apply("argmin", x, axis="-1", keepdims="True")[0], [[0.0], [0.0]])
    agree(apply("argmax", x)[0], [1.0])
    agree(apply("argmin", x, keepdims="True")[0], [[3.0]])


def test_rows_outside_the_table_are_the_nearest_ones() -> None:
    table = normal(4, 2)
    (y,) = apply("Embedding", np.array([-3.0, 1.9, 9.0]), table, input_dim="4", output_dim="2")
    agree(y, table[[0, 1, 3]])
    operator = read_operator("Embedding", {"input_dim": "4", "output_dim": "2"})
    assert operator.infer_inputs(((N,), None))[1] == (4, 2)


def test_parts_that_are_not_equal_are_refused() -> None:
    with pytest.raises(ShapeError, match="4 elements in 3 equal parts"):
        apply("SliceChannel", normal(2, 4), num_outputs="3")


# -- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "data", "expected"),
    [
        ("FullyConnected", {"num_hidden": "5"}, (N, 3, 4), [(5, 12), (5,)]),
        ("FullyConnected", {"num_hidden": "5", "flatten": "0"}, (N, 3, 4), [(5, 4), (5,)]),
        ("InstanceNorm", {}, (N, 3, 4), [(3,), (3,)]),
        ("LeakyReLU", {"act_type": "prelu"}, (N, 3, 4), [(3,)]),
        ("SoftmaxOutput", {}, (N, 3), [(N,)]),
        ("SoftmaxOutput", {"multi_output": "1"}, (N, 3, 4, 5), [(N, 20)]),
        ("SoftmaxOutput", {"preserve_shape": "1"}, (N, 3, 4), [(N, 3)]),
        ("LinearRegressionOutput", {}, (N, 3), [(N, 3)]),
        ("LinearRegressionOutput", {}, (N, 1), [(N,)]),
        ("elemwise_add", {}, (N, 3), [(N, 3)]),
        ("stack", {"num_args": "3"}, (N, 3), [(N, 3)] * 2),
    ],
)
def test_shapes_of_inputs_follow(
    name: str, parameters: dict[str, str], data: tuple[Any, ...], expected: list[tuple[Any, ...]]
) -> None:
    operator = read_operator(name, parameters)
    unknown = (None,) * (len(operator.inputs()) - 1)
    assert list(operator.infer_inputs((data, *unknown))) == [data, *expected]
    assert operator.infer_inputs((None, *unknown))[0] is None


def test_an_unknown_operator_is_named_with_the_known_ones() -> None:
    with pytest.raises(FormatError, match="no operator 'Foo'; known are: Activation, "):
        named("Foo")


def test_every_operator_says_what_it_is() -> None:
    assert all(cls.__doc__ for cls in Operator.canonical.values())
    assert all(cls.spelling == name for name, cls in Operator.canonical.items())
