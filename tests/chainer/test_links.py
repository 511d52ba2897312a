"""Links: shapes and names of parameters, lazy sizes, and what a call computes."""

from __future__ import annotations

import numpy as np
import pytest

import branchgraph.chainer as chainer
import branchgraph.chainer.functions as F
import branchgraph.chainer.links as L
from branchgraph.chainer.recorder import recorder

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 6, 5, 5)).astype(np.float32)
ROWS = RNG.normal(size=(4, 3)).astype(np.float32)

#: A link, an input, the shapes of its parameters after the call, and of the result.
SHAPES = [
    (lambda: L.Linear(5), IMAGES, {"/W": (5, 150), "/b": (5,)}, (4, 5)),
    (lambda: L.Linear(3, 2, nobias=True), ROWS, {"/W": (2, 3)}, (4, 2)),
    (lambda: L.Convolution2D(8, 3), IMAGES, {"/W": (8, 6, 3, 3), "/b": (8,)}, (4, 8, 3, 3)),
    (
        lambda: L.Convolution2D(6, 4, (3, 1), 2, (1, 0), True, groups=2, dilate=1),
        IMAGES, {"/W": (4, 3, 3, 1)}, (4, 4, 3, 3),
    ),
    (
        lambda: L.DilatedConvolution2D(None, 2, 3, 1, 0, 2),
        IMAGES, {"/W": (2, 6, 3, 3), "/b": (2,)}, (4, 2, 1, 1),
    ),
    (
        lambda: L.DepthwiseConvolution2D(None, 2, 3),
        IMAGES, {"/W": (2, 6, 3, 3), "/b": (12,)}, (4, 12, 3, 3),
    ),
    (lambda: L.Deconvolution2D(8, 3), IMAGES, {"/W": (6, 8, 3, 3), "/b": (8,)}, (4, 8, 7, 7)),
    (
        lambda: L.Deconvolution2D(6, 4, 3, 2, groups=2, outsize=(12, 12)),
        IMAGES, {"/W": (6, 2, 3, 3), "/b": (4,)}, (4, 4, 12, 12),
    ),
    (lambda: L.Convolution1D(4, 3), IMAGES[..., 0], {"/W": (4, 6, 3), "/b": (4,)}, (4, 4, 3)),
    (
        lambda: L.Convolution3D(6, 2, 2), IMAGES[..., None].repeat(2, -1),
        {"/W": (2, 6, 2, 2, 2), "/b": (2,)}, (4, 2, 4, 4, 1),
    ),
    (
        lambda: L.ConvolutionND(2, None, 2, 3, cover_all=True, stride=2),
        IMAGES, {"/W": (2, 6, 3, 3), "/b": (2,)}, (4, 2, 2, 2),
    ),
    (lambda: L.Deconvolution1D(4, 3), IMAGES[..., 0], {"/W": (6, 4, 3), "/b": (4,)}, (4, 4, 7)),
    (
        lambda: L.Deconvolution3D(6, 2, 2), IMAGES[..., None].repeat(2, -1),
        {"/W": (6, 2, 2, 2, 2), "/b": (2,)}, (4, 2, 6, 6, 3),
    ),
    (
        lambda: L.DeconvolutionND(2, 6, 2, 3), IMAGES,
        {"/W": (6, 2, 3, 3), "/b": (2,)}, (4, 2, 7, 7),
    ),
    (
        lambda: L.LocalConvolution2D(None, 2, ksize=3),
        IMAGES, {"/W": (2, 3, 3, 6, 3, 3), "/b": (2, 3, 3)}, (4, 2, 3, 3),
    ),
    (lambda: L.GroupNormalization(3), IMAGES, {"/beta": (6,), "/gamma": (6,)}, IMAGES.shape),
    (lambda: L.LayerNormalization(), ROWS, {"/beta": (3,), "/gamma": (3,)}, (4, 3)),
    (
        lambda: L.BatchNormalization(axis=(0, 2, 3), use_beta=False),
        IMAGES, {"/gamma": (6,)}, IMAGES.shape,
    ),
    (
        lambda: L.Scale(1, (6,), bias_term=True),
        IMAGES, {"/W": (6,), "/bias/b": (6,)}, IMAGES.shape,
    ),
    (lambda: L.PReLU((6,)), IMAGES, {"/W": (6,)}, IMAGES.shape),
    (lambda: L.Swish(None), IMAGES, {"/beta": (6, 5, 5)}, IMAGES.shape),
    (lambda: L.Maxout(3, 2, 4), ROWS, {"/linear/W": (8, 3), "/linear/b": (8,)}, (4, 2)),
    (lambda: L.Maxout(3, 2, 4, initial_bias=None), ROWS, {"/linear/W": (8, 3)}, (4, 2)),
    (
        lambda: L.MLPConvolution2D((4, 2), 3),
        IMAGES, {"/0/W": (4, 6, 3, 3), "/0/b": (4,), "/1/W": (2, 4, 1, 1), "/1/b": (2,)},
        (4, 2, 3, 3),
    ),
    (lambda: L.SimplifiedDropconnect(None, 2), ROWS, {"/W": (2, 3), "/b": (2,)}, (4, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("make", "x", "parameters", "result"), SHAPES)
def test_names_and_shapes(make, x, parameters, result) -> None:
    link = make()
    y = link(x)
    assert {path: p.shape for path, p in link.namedparams()} == parameters
    assert y.shape == result
    assert np.isfinite(y.array).all()


def test_a_bias_that_is_not_there_is_none() -> None:
    for link in (L.Linear(2, 2, nobias=True), L.Convolution2D(2, 2, 3, nobias=True)):
        assert link.b is None


def test_linear_keeps_batch_axes_and_flattens_the_rest() -> None:
    link = L.Linear(None, 7)
    assert link(IMAGES.reshape(4, 6, 25), n_batch_axes=2).shape == (4, 6, 7)
    assert link.W.shape == (7, 25)


def test_a_link_from_arrays() -> None:
    W, b = np.ones((2, 3), np.float32), np.ones(2, np.float32)
    np.testing.assert_allclose(L.Linear.from_params(W, b)(ROWS).array, ROWS @ W.T + b, rtol=1e-5)
    assert L.Linear.from_params(W).b is None
    kernel = np.ones((2, 6, 3, 3), np.float32)
    assert L.Convolution2D.from_params(kernel, pad=1)(IMAGES).shape == (4, 2, 5, 5)
    assert L.ConvolutionND.from_params(kernel)(IMAGES).shape == (4, 2, 3, 3)
    assert L.EmbedID.from_params(W).W.shape == (2, 3)


def test_arguments_that_chainer_removed_are_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="cudnn_deterministic"):
        L.Convolution2D(2, 2, 3, deterministic=True)
    with pytest.raises(ValueError, match="using_config"):
        L.BatchNormalization(3)(ROWS, test=True)
    with pytest.raises(TypeError, match="unknown"):
        L.Convolution2D(2, 2, 3, unknown=1)
    with pytest.raises(ValueError, match="groups"):
        L.Convolution2D(3, 4, 3, groups=2)


def test_depthwise_filters_are_drawn_with_their_own_deviation() -> None:
    link = L.DepthwiseConvolution2D(40, 30, 3)
    # 10 800 samples: three standard errors are 2 %
    assert link.W.array.std() == pytest.approx((1 / 360) ** 0.5, rel=0.02)


def test_embedding_rows_and_ignored_labels() -> None:
    link = L.EmbedID(4, 3, ignore_label=-1)
    labels = np.array([[0, -1], [3, 3]], np.int32)
    y = link(labels).array
    np.testing.assert_array_equal(y[1, 1], link.W.array[3])
    assert not y[0, 1].any()


def test_scale_and_bias_take_the_second_input_or_their_own() -> None:
    w = np.array([1.0, 2.0, 3.0], np.float32)
    np.testing.assert_allclose(L.Scale()(ROWS, w).array, ROWS * w)
    np.testing.assert_allclose(L.Bias()(ROWS, w).array, ROWS + w)
    with pytest.raises(AttributeError, match="own W"):
        L.Scale(1, (3,))(ROWS, w)
    with pytest.raises(ValueError, match="no b"):
        L.Bias()(ROWS)
    with pytest.raises(ValueError, match="bias_shape"):
        L.Scale(bias_term=True)


def test_bilinear_is_the_sum_over_both_inputs() -> None:
    link = L.Bilinear(3, 2, 4, initial_bias=(None, None, 0.5))
    right = RNG.normal(size=(4, 2)).astype(np.float32)
    expected = np.einsum("ni,nj,ijk->nk", ROWS, right, link.W.array)
    expected = expected + ROWS @ link.V1.array + right @ link.V2.array + 0.5
    np.testing.assert_allclose(link(ROWS, right).array, expected, rtol=1e-4, atol=1e-5)
    assert [p for p, _ in L.Bilinear(None, None, 4, nobias=True).namedparams()] == ["/W"]


def test_highway_carries_at_first() -> None:
    link = L.Highway(3)
    assert link.transform.b.array.tolist() == [-1, -1, -1]
    assert link(ROWS).shape == (4, 3)


def test_inception_concatenates_its_branches() -> None:
    link = L.Inception(None, 1, 2, 3, 2, 4, 5)
    assert link(IMAGES).shape == (4, 13, 5, 5)
    assert (link(IMAGES).array >= 0).all()


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_inception_bn_strides_without_the_first_branch(pool: str) -> None:
    link = L.InceptionBN(6, 0, 2, 3, 2, 4, pool, stride=2)
    assert link(IMAGES).shape == (4, 13, 3, 3)
    assert "conv1" not in dict(link._named_children())
    full = L.InceptionBN(6, 2, 2, 3, 2, 4, pool, 5)
    assert full(IMAGES).shape == (4, 14, 5, 5)
    with pytest.raises(ValueError, match="out1"):
        L.InceptionBN(6, 2, 2, 3, 2, 4, pool, stride=2)


def test_a_parameter_link_returns_its_parameter() -> None:
    link = L.Parameter(ROWS)
    assert link() is link.W


# -- batch normalisation ---------------------------------------------------------------------------


def moved(old, batch, decay=0.9):
    return decay * old + (1 - decay) * batch


def test_running_statistics_move_without_anybody_asking_for_a_value() -> None:
    bn = L.BatchNormalization(6)
    bn(IMAGES)
    mean, var = IMAGES.mean((0, 2, 3)), IMAGES.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(bn.avg_mean, moved(0, mean), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bn.avg_var, moved(1, var), rtol=1e-5)


def test_a_link_applied_twice_sees_its_first_update() -> None:
    bn = L.BatchNormalization(3)
    bn(ROWS)
    bn(ROWS + 1)
    expected = moved(moved(0, ROWS.mean(0)), ROWS.mean(0) + 1)
    np.testing.assert_allclose(bn.avg_mean, expected, rtol=1e-5)


def test_statistics_move_once_a_call_however_often_values_are_read() -> None:
    bn = L.BatchNormalization(3)
    x = chainer.Variable(ROWS)
    bn.cleargrads()
    y = bn(x)
    _ = y.array
    loss = F.sum(y * y * y)
    loss.backward()
    _ = x.grad
    recorder().flush()
    np.testing.assert_allclose(bn.avg_mean, moved(0, ROWS.mean(0)), rtol=1e-5)


def test_test_mode_reads_the_statistics_and_leaves_them() -> None:
    bn = L.BatchNormalization(3, initial_avg_mean=1.0, initial_avg_var=4.0, eps=1e-3)
    with chainer.using_config("train", False):
        y = bn(ROWS)
    np.testing.assert_allclose(y.array, (ROWS - 1) / np.sqrt(4.001), rtol=1e-5, atol=1e-6)
    assert bn.avg_mean.tolist() == [1, 1, 1]


def test_test_mode_right_behind_an_update_reads_the_new_statistics() -> None:
    bn = L.BatchNormalization(3)
    bn(ROWS)
    with chainer.using_config("train", False):
        y = bn(ROWS)
    expected = (ROWS - bn.avg_mean) / np.sqrt(bn.avg_var + 2e-5)
    np.testing.assert_allclose(y.array, expected, rtol=1e-4, atol=1e-5)


def test_an_edit_of_the_statistics_is_seen_and_comes_behind_earlier_calls() -> None:
    bn = L.BatchNormalization(3)
    with chainer.using_config("train", False):
        before = bn(ROWS)
        bn.avg_mean[...] = 5
        after = bn(ROWS)
    np.testing.assert_allclose(before.array, ROWS, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.array, ROWS - 5, rtol=1e-4, atol=1e-4)


def test_a_shared_copy_moves_the_same_statistics_even_behind_a_file() -> None:
    bn = L.BatchNormalization(3)
    other = bn.copy()
    chainer.serializers.DictionarySerializer().save(bn)
    bn(ROWS)
    other(ROWS)
    expected = moved(moved(0, ROWS.mean(0)), ROWS.mean(0))
    np.testing.assert_allclose(bn.avg_mean, expected, rtol=1e-5)


def test_finetuning_averages_evenly() -> None:
    bn = L.BatchNormalization(3)
    bn(ROWS * 3)
    bn.start_finetuning()
    for k in range(3):
        bn(ROWS + k, finetune=True)
    assert bn.N == 3
    np.testing.assert_allclose(bn.avg_mean, ROWS.mean(0) + 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "axes"),
    [
        (lambda: L.BatchNormalization((6, 5, 5)), (0,)),
        (lambda: L.BatchNormalization((6, 5)), (0, 3)),
        (lambda: L.BatchNormalization(axis=(0, 2, 3)), (0, 2, 3)),
        (lambda: L.BatchNormalization(axis=(0, 1, 2)), (0, 1, 2)),
        (lambda: L.BatchNormalization(axis=(0, 2)), (0, 2)),
    ],
)
def test_any_axes_are_averaged_over(make, axes) -> None:
    bn = make()
    y = bn(IMAGES)
    mean, var = (f(IMAGES, axis=axes, keepdims=True) for f in (np.mean, np.var))
    np.testing.assert_allclose(y.array, (IMAGES - mean) / np.sqrt(var + 2e-5), atol=1e-4)
    np.testing.assert_allclose(bn.avg_mean, 0.1 * IMAGES.mean(axes), rtol=1e-4, atol=1e-6)
    with chainer.using_config("train", False):
        assert bn(IMAGES).shape == IMAGES.shape


def test_one_element_a_statistic_gives_beta_and_a_warning() -> None:
    bn = L.BatchNormalization(3, initial_beta=0.5)
    with pytest.warns(UserWarning, match="one element"):
        y = bn(ROWS[:1])
    np.testing.assert_allclose(y.array, np.full((1, 3), 0.5), atol=1e-6)


def test_batch_normalisation_needs_size_or_ascending_axes() -> None:
    with pytest.raises(RuntimeError, match="size or axis"):
        L.BatchNormalization()
    with pytest.raises(ValueError, match="ascending"):
        L.BatchNormalization(axis=(2, 0))


def test_gradients_flow_through_the_batch_statistics() -> None:
    bn = L.BatchNormalization(3)
    bn.cleargrads()
    x = chainer.Variable(ROWS)
    F.sum(bn(x)).backward()
    np.testing.assert_allclose(x.grad, 0, atol=1e-5)
    np.testing.assert_allclose(bn.beta.grad, [4, 4, 4], rtol=1e-5)


def test_iterations_with_statistics_compile_once() -> None:
    net = chainer.Sequential(L.Linear(3, 4), L.BatchNormalization(4), F.relu, L.Linear(4, 2))

    def iteration() -> None:
        net.cleargrads()
        F.sum(net(ROWS)).backward()
        recorder().flush()

    iteration()
    before = recorder().compilations
    for _ in range(5):
        iteration()
    assert recorder().compilations == before


# -- Classifier ------------------------------------------------------------------------------------

LABELS = np.array([0, 1, 1, 0], np.int32)


def test_a_classifier_keeps_output_loss_and_accuracy() -> None:
    model = L.Classifier(L.Linear(3, 2))
    loss = model(ROWS, LABELS)
    assert loss is model.loss
    assert model.y.shape == (4, 2)
    expected = (model.y.array.argmax(1) == LABELS).mean()
    assert float(model.accuracy.array) == pytest.approx(expected)
    assert [p for p, _ in model.namedparams()] == ["/predictor/W", "/predictor/b"]
    model.compute_accuracy = False
    model(ROWS, LABELS)
    assert model.accuracy is None


def test_labels_by_position_or_keyword() -> None:
    predictor = L.Linear(3, 2)
    last = float(L.Classifier(predictor)(ROWS, LABELS).array)
    assert float(L.Classifier(predictor, label_key=0)(LABELS, ROWS).array) == last
    assert float(L.Classifier(predictor, label_key="t")(ROWS, t=LABELS).array) == last
    with pytest.raises(ValueError, match="label_key"):
        L.Classifier(predictor, label_key="t")(ROWS, LABELS)
    with pytest.raises(ValueError, match="outside"):
        L.Classifier(predictor, label_key=2)(ROWS, LABELS)
    with pytest.raises(TypeError, match="label_key"):
        L.Classifier(predictor, label_key=1.5)


# -- tracing ---------------------------------------------------------------------------------------


def test_a_traced_link_declares_batch_normalisation_with_its_statistics() -> None:
    from branchgraph.chainer.tracing import trace
    from branchgraph.compiler import compile

    net = chainer.Sequential(L.Convolution2D(6, 3, 3), L.BatchNormalization(3), F.relu)
    net(IMAGES)
    graph, store = trace(net, ("N", 6, 5, 5))
    assert sorted(state.name for state in store) == [
        "0/W", "0/b", "1/avg_mean", "1/avg_var", "1/beta", "1/gamma",
    ]  # fmt: skip
    with chainer.using_config("train", False):
        expected = net(IMAGES).array
    found = compile(graph, store=store)(x0=IMAGES)["y0"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="axis 1"):
        trace(L.BatchNormalization(axis=(0, 1, 2)).copy(), ("N", 6, 5, 5))
