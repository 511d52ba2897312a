"""Initial values: distributions, dtypes, and Chainer's use of random numbers."""

from __future__ import annotations

import numpy as np
import pytest

import branchgraph.chainer as chainer
import branchgraph.chainer.links as L
from branchgraph.chainer import initializers as I
from branchgraph.chainer.initializers import generate_array, get_fans

SHAPE = (40, 30, 3, 3)


@pytest.mark.parametrize(
    ("initializer", "std"),
    [
        (I.Normal(), 0.05),
        (I.LeCunNormal(), (1 / 270) ** 0.5),
        (I.GlorotNormal(), (2 / 630) ** 0.5),
        (I.HeNormal(), (2 / 270) ** 0.5),
        (I.HeNormal(0.5), 0.5 * (2 / 270) ** 0.5),
        (I.HeNormal(fan_option="fan_out"), (2 / 360) ** 0.5),
        (I.Uniform(), 0.05 / 3**0.5),
        (I.LeCunUniform(), (1 / 270) ** 0.5),
        (I.GlorotUniform(), (2 / 630) ** 0.5),
        (I.HeUniform(), (2 / 270) ** 0.5),
    ],
)
def test_standard_deviations(initializer, std: float) -> None:
    np.random.seed(0)
    drawn = generate_array(initializer, SHAPE)
    assert drawn.dtype == np.float32
    assert drawn.std() == pytest.approx(std, rel=0.02)  # 10 800 samples: 3 sigma


def test_one_draw_an_array_in_float64_from_the_global_generator() -> None:
    np.random.seed(3)
    link = L.Linear(4, 2)
    second = I.Uniform(0.5)
    drawn = generate_array(second, (3, 2))
    np.random.seed(3)
    expected = np.random.normal(0.0, 0.5, (2, 4)).astype(np.float32)
    np.testing.assert_array_equal(link.W.array, expected)
    np.testing.assert_array_equal(drawn, np.random.uniform(-0.5, 0.5, (3, 2)).astype(np.float32))


def test_constants_draw_nothing() -> None:
    np.random.seed(0)
    for initializer in (I.Zero(), I.One(), I.NaN(), I.Constant(3), 2.0, I.Identity(2)):
        generate_array(initializer, (2, 2))
    drawn = np.random.rand()
    np.random.seed(0)
    assert drawn == np.random.rand()


def test_a_generator_replaces_the_global_one() -> None:
    drawn = [generate_array(I.Normal(rng=np.random.RandomState(1)), (3,)) for _ in range(2)]
    np.testing.assert_array_equal(*drawn)


def test_orthogonal_rows_or_columns() -> None:
    for shape in ((4, 6), (6, 4), (4, 2, 3)):
        matrix = generate_array(I.Orthogonal(2.0), shape).reshape(shape[0], -1)
        small = matrix @ matrix.T if shape[0] < matrix.shape[1] else matrix.T @ matrix
        np.testing.assert_allclose(small, 4 * np.eye(len(small)), atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "shape"), [("projection", (3, 2)), ("embedding", (2, 3)), ("basis", (2, 3))]
)
def test_modes_of_orthogonal_restrict_the_shape(mode: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=mode):
        generate_array(I.Orthogonal(mode=mode), shape)
    assert generate_array(I.Orthogonal(mode=mode), (2, 2)).shape == (2, 2)


def test_identity_needs_a_square() -> None:
    assert generate_array(I.Identity(3), (2, 2)).tolist() == [[3, 0], [0, 3]]
    with pytest.raises(ValueError, match="square"):
        generate_array(I.Identity(), (2, 3))


def test_triangle_filters() -> None:
    up = generate_array(I.UpsamplingDeconvFilter(), (2, 2, 4, 4))
    line = np.array([0.25, 0.75, 0.75, 0.25])
    np.testing.assert_allclose(up[0, 0], np.outer(line, line))
    assert not up[0, 1].any()
    down = generate_array(I.DownsamplingConvFilter(), (2, 2, 3, 3))
    assert down[1, 1].sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="linear"):
        I.UpsamplingDeconvFilter("cubic")


def test_fans() -> None:
    assert get_fans((5, 4, 3, 3)) == (36, 45)
    with pytest.raises(ValueError, match="two axes"):
        get_fans((3,))
    with pytest.raises(ValueError, match="fan_option"):
        generate_array(I.HeNormal(fan_option="fan"), (2, 2))


def test_the_dtype_is_the_initialisers_or_the_configurations() -> None:
    assert generate_array(I.One(np.float64), (2,)).dtype == np.float64
    with chainer.using_config("dtype", np.float64):
        assert generate_array(I.Normal(), (2,)).dtype == np.float64
        assert L.Linear(2, 2, initialW=np.ones((2, 2), np.float32)).W.dtype == np.float64
    with chainer.using_config("dtype", chainer.mixed16):
        assert L.Linear(2, 2).W.dtype == np.float16
        assert L.Linear(None, 2).W.dtype == np.float16
        assert L.BatchNormalization(2).gamma.dtype == np.float32
        assert L.BatchNormalization(2).avg_var.dtype == np.float32


@pytest.mark.parametrize(
    "given", [2.0, np.full((2, 3), 2.0), I.Constant(2.0), lambda a: a.fill(2.0)]
)
def test_numbers_arrays_and_callables_are_initialisers(given) -> None:
    assert (L.Linear(3, 2, initialW=given).W.array == 2.0).all()
