"""Preprocessing does what its formulas say; augmentation repeats itself."""

from __future__ import annotations

import numpy as np
import pytest

from branchgraph.data import transforms
from branchgraph.data.dataset import Dataset
from branchgraph.data.transforms import (
    Contrast,
    Normalise,
    PadCropMirror,
    Whiten,
    first_classes,
    transformed,
)
from branchgraph.ir.errors import ShapeError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few images take several blocks."""
    monkeypatch.setattr(transforms, "_BLOCK", 7)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).random((60, 3, 4, 4), np.float32)


def test_normalise_is_by_channel(images: np.ndarray) -> None:
    done = Normalise((0.1, 0.2, 0.3), (1, 2, 4))(images)
    expected = np.stack([images[:, 0] - 0.1, (images[:, 1] - 0.2) / 2, (images[:, 2] - 0.3) / 4], 1)
    np.testing.assert_allclose(done, expected, rtol=1e-6, atol=1e-7)
    assert done.dtype == np.float32
    with pytest.raises(ShapeError, match="each of 3 channels, got 1 and 1"):
        Normalise((0,), (1,))(images)


def test_published_statistics_are_for_images_up_to_one() -> None:
    white = np.ones((1, 3, 2, 2), np.float32)
    np.testing.assert_allclose(
        Normalise.of("cifar10")(white)[0, :, 0, 0],
        [(255 - 125.307) / 62.993, (255 - 122.950) / 62.089, (255 - 113.865) / 66.705],
        rtol=1e-6,
    )


def test_contrast_leaves_no_mean_and_unit_deviation(images: np.ndarray) -> None:
    images[3] = images.mean(0)
    contrast = Contrast.fit(images)
    done = contrast(images).reshape(60, -1).astype(np.float64)
    np.testing.assert_allclose(done.mean(1), 0, atol=1e-6)
    others = np.arange(60) != 3
    np.testing.assert_allclose(done[others].std(1, ddof=1), 1, rtol=1e-5)
    flat = (images - images.mean(0, dtype=np.float64)).reshape(60, -1)[5]
    np.testing.assert_allclose(
        done[5], (flat - flat.mean()) / flat.std(ddof=1), rtol=1e-5, atol=1e-6
    )


def test_an_image_without_contrast_is_not_divided() -> None:
    flat = np.full((2, 1, 3, 3), 0.25, np.float32)
    assert Contrast(np.zeros((1, 3, 3)))(flat).tolist() == np.zeros((2, 1, 3, 3)).tolist()


def test_whitening_decorrelates_before_it_stretches(images: np.ndarray) -> None:
    images[:, 0] += images[:, 1]
    images[:, :, 0, 0] = 0.5  # without variance
    whiten = Whiten.fit(images)
    flat = (images.astype(np.float64) - whiten.mean).reshape(60, -1) @ whiten.matrix
    covariance = flat.T @ flat / 60
    varying = np.arange(48).reshape(3, 16)[:, 1:].ravel()
    np.testing.assert_allclose(covariance[np.ix_(varying, varying)], np.eye(45), atol=1e-6)
    done = whiten(images)
    assert (done.min((1, 2, 3)) == 0).all()
    assert (done.max((1, 2, 3)) == 1).all()
    low, high = flat.min(1, keepdims=True), flat.max(1, keepdims=True)
    np.testing.assert_allclose(done.reshape(60, -1), (flat - low) / (high - low), atol=1e-6)


def test_in_place_and_new_agree(images: np.ndarray) -> None:
    labels = np.arange(60) % 5
    dataset = Dataset("made", 5, images, labels, images[:9].copy(), labels[:9])
    new = transformed(dataset, Contrast.fit(images))
    assert new.train_images is not images
    before = images.copy()
    same = transformed(dataset, Contrast.fit(before), in_place=True)
    assert same.train_images is images
    np.testing.assert_array_equal(new.train_images, images)
    np.testing.assert_array_equal(new.test_images, same.test_images)


def test_first_classes(images: np.ndarray) -> None:
    labels = np.arange(60) % 5
    few = first_classes(Dataset("made", 5, images, labels, images, labels), 2)
    assert (few.classes, len(few.train_labels), few.test_labels.max()) == (2, 24, 1)


def test_images_of_another_kind_are_refused(images: np.ndarray) -> None:
    for wrong in (images[0], images.astype(np.float64)):
        with pytest.raises(ShapeError, match="expected float32 images"):
            Contrast(np.zeros(1))(wrong)
    with pytest.raises(ShapeError, match="expected float32 images"):
        Contrast(np.zeros(1))(images, out=images[:2])


# -- augmentation ----------------------------------------------------------------------------------


def test_a_crop_is_a_window_of_the_padded_image(images: np.ndarray) -> None:
    augment = PadCropMirror(pad=2, fill=(0.5, 0.0, 1.0), seed=3)
    numbers = np.arange(60)
    done = augment(images, numbers, 0)
    down, right, mirrored = augment.draw(numbers, 0)
    for row in range(60):
        padded = np.stack(
            [np.pad(images[row, c], 2, constant_values=v) for c, v in enumerate(augment.fill)]
        )
        crop = padded[:, down[row] : down[row] + 4, right[row] : right[row] + 4]
        expected = crop[:, :, ::-1] if mirrored[row] else crop
        np.testing.assert_array_equal(done[row], expected)


def test_an_example_is_augmented_alike_wherever_it_stands(images: np.ndarray) -> None:
    augment = PadCropMirror(seed=1)
    whole = augment(images, np.arange(60), 5)
    order = np.random.default_rng(0).permutation(60)[:20]
    np.testing.assert_array_equal(augment(images[order], order, 5), whole[order])
    assert not np.array_equal(augment(images, np.arange(60), 6), whole)
    assert not np.array_equal(PadCropMirror(seed=2)(images, np.arange(60), 5), whole)
    assert not np.array_equal(PadCropMirror(seed=1 + 2**32)(images, np.arange(60), 5), whole)


DRAWN = ([2, 6, 8, 4, 7, 2], [0, 0, 8, 5, 4, 7], [False, True, False, True, True, False])


def test_draws_do_not_change_between_versions() -> None:
    down, right, mirrored = PadCropMirror(seed=7).draw(np.arange(6), 2)
    assert (down.tolist(), right.tolist(), mirrored.tolist()) == DRAWN


def test_draws_are_uniform() -> None:
    down, right, mirrored = PadCropMirror(pad=4).draw(np.arange(90_000), 0)
    for offsets in (down, right):
        assert np.bincount(offsets, minlength=9) == pytest.approx(np.full(9, 10_000), abs=400)
    assert mirrored.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef([down, right, mirrored])[np.triu_indices(3, 1)]).max() < 0.02
    assert not PadCropMirror(mirror=0).draw(np.arange(1000), 0)[2].any()
    assert PadCropMirror(mirror=1).draw(np.arange(1000), 0)[2].all()


def test_numbers_and_fill_must_fit(images: np.ndarray) -> None:
    with pytest.raises(ShapeError, match="n numbers"):
        PadCropMirror()(images, np.arange(59), 0)
    with pytest.raises(ShapeError, match="each of 3 channels, got 1"):
        PadCropMirror(fill=(0.0,))(images, np.arange(60), 0)
