"""Preprocessing of images, and augmentation that can be repeated.

Preprocessing works on float32 images [n, channels, height, width] in blocks, with statistics in
float64. `transform(images)` returns new images; `transform(images, out=images)` works in place,
which matters where the images fill much of the memory.

    Normalise   (x - mean[c]) / std[c]
    Contrast    y = x - m,  m the mean image of the training set;  (y - mean(y)) / std(y) an image,
                std with divisor pixels - 1, divisors below 1e-8 taken as 1
    Whiten      y = (x - m) U diag(1/sqrt(S)) U^T, U diag(S) U^T the covariance of the training set,
                then (y - min(y)) / (max(y) - min(y)) an image

Source of the last two: the loaders of BranchyNet (S. Teerapittayanon, B. McDanel, H. T. Kung,
"BranchyNet: fast inference via early exiting from deep neural networks", ICPR 2016); A. Krizhevsky,
"Learning multiple layers of features from tiny images" (2009), appendix A.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from branchgraph.data.dataset import Dataset
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.ops.random import philox4x32

#: Images worked on at a time.
_BLOCK = 1000
#: Directions with less than this part of the largest variance hold rounding only.
_NO_VARIANCE = 1e-12

#: Mean and standard deviation of each channel, red, green, blue, of bytes 0..255. Source: the code
#: published with "Deep convolutional neural networks with merge-and-run mappings" (2016).
CHANNELS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((125.307, 122.950, 113.865), (62.993, 62.089, 66.705)),
    "cifar100": ((129.304, 124.070, 112.434), (68.170, 65.392, 70.418)),
    "svhn": ((111.609, 113.161, 120.565), (50.498, 51.259, 50.244)),
}


class Transform:
    """Images to images of the same shape; statistics of other images were taken beforehand."""

    def __call__(self, images: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The images transformed, in `out` where that is given, which may be `images`."""
        target = np.empty_like(images) if out is None else out
        if images.ndim != 4 or images.dtype != np.float32 or target.shape != images.shape:
            raise ShapeError(
                "expected float32 images [n, channels, height, width] and room of that shape, got "
                f"{images.dtype} {list(images.shape)} and {list(target.shape)}"
            )
        for rows in _blocks(len(images)):
            target[rows] = self.block(images[rows].astype(np.float64))
        return target

    def block(self, images: np.ndarray) -> np.ndarray:
        """What the transform does to some images in float64, which it may overwrite."""
        raise NotImplementedError


@dataclass(frozen=True)
class Normalise(Transform):
    """Subtract a mean from each channel and divide by a standard deviation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, name: str) -> Normalise:
        """With the published statistics of a data set of `CHANNELS`, for images in 0..1."""
        mean, std = CHANNELS[name]
        return cls(tuple(m / 255 for m in mean), tuple(s / 255 for s in std))

    def block(self, images: np.ndarray) -> np.ndarray:
        if not len(self.mean) == len(self.std) == images.shape[1]:
            raise ShapeError(
                f"expected a mean and a deviation for each of {images.shape[1]} channels, got "
                f"{len(self.mean)} and {len(self.std)}"
            )
        images -= np.reshape(self.mean, (-1, 1, 1))
        images /= np.reshape(self.std, (-1, 1, 1))
        return images


@dataclass(frozen=True, eq=False)
class Contrast(Transform):
    """Global contrast normalisation after subtraction of a mean image."""

    mean: np.ndarray

    @classmethod
    def fit(cls, images: np.ndarray) -> Contrast:
        """With the mean of these images, those of training."""
        return cls(_mean(images))

    def block(self, images: np.ndarray) -> np.ndarray:
        flat = (images - self.mean).reshape(len(images), -1)
        flat -= flat.mean(1, keepdims=True)
        deviation = flat.std(1, ddof=1, keepdims=True)
        flat /= np.where(deviation < 1e-8, 1, deviation)
        return flat.reshape(images.shape)


@dataclass(frozen=True, eq=False)
class Whiten(Transform):
    """ZCA whitening without a regulariser, then each image stretched to 0..1."""

    mean: np.ndarray
    matrix: np.ndarray

    @classmethod
    def fit(cls, images: np.ndarray) -> Whiten:
        """With mean and covariance of these images, those of training.

        Directions without variance are left out, where the formula would divide by zero. On all of
        CIFAR-10 this is about 10^12 operations.
        """
        mean = _mean(images)
        size = mean.size
        covariance = np.zeros((size, size))
        for rows in _blocks(len(images)):
            flat = (images[rows] - mean).reshape(-1, size)
            covariance += flat.T @ flat
        covariance /= max(len(images), 1)
        variances, directions = np.linalg.eigh(covariance)
        kept = variances > _NO_VARIANCE * max(variances.max(initial=0), 0)
        directions = directions[:, kept]
        return cls(mean, (directions / np.sqrt(variances[kept])) @ directions.T)

    def block(self, images: np.ndarray) -> np.ndarray:
        flat = (images - self.mean).reshape(len(images), -1) @ self.matrix
        flat -= flat.min(1, keepdims=True)
        largest = flat.max(1, keepdims=True)
        flat /= np.where(largest == 0, 1, largest)
        return flat.reshape(images.shape)


def transformed(dataset: Dataset, transform: Transform, *, in_place: bool = False) -> Dataset:
    """The data set with the images of both parts transformed."""
    train, test = dataset.train_images, dataset.test_images
    return replace(
        dataset,
        train_images=transform(train, train if in_place else None),
        test_images=transform(test, test if in_place else None),
    )


def first_classes(dataset: Dataset, classes: int) -> Dataset:
    """The examples of the first classes only."""
    return dataset.subset(classes=classes)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))


def _mean(images: np.ndarray) -> np.ndarray:
    total = np.zeros(images.shape[1:])
    for rows in _blocks(len(images)):
        total += images[rows].sum(0, dtype=np.float64)
    return total / max(len(images), 1)


@dataclass(frozen=True)
class PadCropMirror:
    """Pad, crop to the old size at a random place, mirror left to right with a probability.

    What happens to an example depends on (seed, epoch, number of the example) alone, so a resumed
    or reordered epoch sees the same images: with words w of Philox 4x32-10,

        counter = (number, epoch, 0, 0), key = seed; offsets floor(w (2 pad + 1) / 2^32) down and
        right, mirrored where w / 2^32 < mirror

    `fill` is the value of the border, one for each channel; none is 0.
    Source: L. Zhao et al., "Deep convolutional neural networks with merge-and-run mappings" (2016).
    """

    pad: int = 4
    mirror: float = 0.5
    fill: tuple[float, ...] = ()
    seed: int = 0

    def __call__(self, images: np.ndarray, numbers: np.ndarray, epoch: int) -> np.ndarray:
        """A batch of images, which `numbers` say are which examples of the data set."""
        if images.ndim != 4 or np.shape(numbers) != images.shape[:1]:
            raise ShapeError(
                "expected images [n, channels, height, width] and n numbers, got "
                f"{list(images.shape)} and {list(np.shape(numbers))}"
            )
        down, right, mirrored = self.draw(numbers, epoch)
        height, width = images.shape[2:]
        padded = self._padded(images)
        out = np.empty_like(images)
        for row, (y, x, turn) in enumerate(zip(down, right, mirrored)):
            crop = padded[row, :, y : y + height, x : x + width]
            out[row] = crop[:, :, ::-1] if turn else crop
        return out

    def draw(self, numbers: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Offsets down and right, in 0..2 pad, and whether each example is mirrored."""
        key = (self.seed & 0xFFFFFFFF, self.seed >> 32)
        zero = np.zeros(1, np.uint64)
        counter = (np.asarray(numbers), np.asarray([epoch]), zero, zero)
        first, second, third, _ = philox4x32(counter, key)
        places = np.uint64(2 * self.pad + 1)
        shift = np.uint64(32)
        mirrored = third.astype(np.float64) < self.mirror * 2.0**32
        return (
            ((first * places) >> shift).astype(np.int64),
            ((second * places) >> shift).astype(np.int64),
            mirrored,
        )

    def _padded(self, images: np.ndarray) -> np.ndarray:
        count, channels, height, width = images.shape
        if self.fill and len(self.fill) != channels:
            raise ShapeError(
                f"expected a fill for each of {channels} channels, got {len(self.fill)}"
            )
        pad = self.pad
        padded = np.empty((count, channels, height + 2 * pad, width + 2 * pad), images.dtype)
        padded[...] = np.reshape(self.fill or (0.0,) * channels, (-1, 1, 1))
        padded[:, :, pad : pad + height, pad : pad + width] = images
        return padded
