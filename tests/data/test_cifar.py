"""CIFAR comes the same from every version, whole and checked, or says what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from cifar_files import batch, pickled_today, write_archive, write_folder

from branchgraph import data
from branchgraph.data.cifar import load_cifar10, load_cifar100
from branchgraph.data.folder import data_folder
from branchgraph.ir.errors import FormatError, MissingError

TEN = [
    ("cifar-10-batches-bin", ""),
    ("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
    ("cifar-10-batches-py", ""),
    ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
]
HUNDRED = [
    ("cifar-100-binary", ""),
    ("cifar-100-binary", "cifar-100-binary.tar.gz"),
    ("cifar-100-python", ""),
    ("cifar-100-python", "cifar-100-python.tar.gz"),
]


def write(root: Path, folder: str, archive: str) -> Path:
    return write_archive(root, folder, archive) if archive else write_folder(root, folder)


def is_what_was_written(images: np.ndarray, labels: np.ndarray, numbers: range) -> None:
    pixels, expected = (np.concatenate(part) for part in zip(*(batch(n, 10) for n in numbers)))
    np.testing.assert_array_equal(labels, expected)
    scaled = pixels.reshape(-1, 3, 32, 32).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(images, scaled)


@pytest.mark.parametrize(("folder", "archive"), TEN)
def test_cifar10_is_read_from_every_version(folder: str, archive: str, tmp_path: Path) -> None:
    write(tmp_path, folder, archive)
    read = load_cifar10(tmp_path)
    assert repr(read) == "<Dataset cifar10: 20 + 4 images [3, 32, 32], 10 classes>"
    assert read.train_images.flags.writeable
    is_what_was_written(read.train_images, read.train_labels, range(5))
    is_what_was_written(read.test_images, read.test_labels, range(5, 6))


@pytest.mark.parametrize(("folder", "archive"), HUNDRED)
def test_cifar100_has_fine_labels(folder: str, archive: str, tmp_path: Path) -> None:
    write(tmp_path, folder, archive)
    read = load_cifar100(tmp_path)
    assert (read.classes, len(read.train_labels), len(read.test_labels)) == (100, 4, 4)
    np.testing.assert_array_equal(read.train_labels, batch(0, 100)[1])
    np.testing.assert_array_equal(read.test_labels, batch(1, 100)[1])


def test_the_folder_of_the_files_may_be_named_itself(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "cifar-10-batches-bin")
    assert len(load_cifar10(folder).test_labels) == 4


def test_pickles_of_this_python_are_read_too(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "cifar-10-batches-py")
    (folder / "test_batch").write_bytes(pickled_today(*batch(9, 10)))
    np.testing.assert_array_equal(load_cifar10(tmp_path).test_labels, batch(9, 10)[1])


def test_first_classes_and_first_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, "cifar-10-batches-bin")
    monkeypatch.setenv("BRANCHGRAPH_DATA", str(tmp_path))
    whole = data.load("cifar10")
    for options in (
        {"classes": 2},
        {"train": 7},
        {"train": 0, "test": 0},
        {"classes": 3, "train": 5},
    ):
        spec = ",".join(f"{k}={v}" for k, v in options.items())
        read, expected = data.load(f"cifar10:{spec}"), whole.subset(**options)
        assert repr(read) == repr(expected)
        np.testing.assert_array_equal(read.train_images, expected.train_images)
        np.testing.assert_array_equal(read.train_labels, expected.train_labels)
        np.testing.assert_array_equal(read.test_images, expected.test_images)
    with pytest.raises(FormatError, match=r"cifar10: expected train in 0..20, got 21"):
        data.load("cifar10:train=21")
    with pytest.raises(FormatError, match="cifar10: expected train of at least 0, got -1"):
        data.load("cifar10:train=-1")
    with pytest.raises(FormatError, match=r"cifar10: expected classes in 1..10, got 0"):
        data.load("cifar10:classes=0")


def test_few_examples_do_not_read_all_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "cifar-10-batches-bin")
    (folder / "data_batch_4.bin").write_bytes(b"broken")
    assert len(load_cifar10(tmp_path, train=12).train_labels) == 12
    with pytest.raises(FormatError, match=r"data_batch_4.bin: expected records of 3073 bytes"):
        load_cifar10(tmp_path, train=13)


def test_what_is_missing_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        load_cifar10(tmp_path)
    message = str(caught.value)
    for part in (str(tmp_path), "cifar-10-binary.tar.gz", "cifar-10-batches-py/", "test_batch.bin"):
        assert part in message
    assert "Run: branchgraph data fetch cifar10, or put the files there" in message
    folder = write_folder(tmp_path, "cifar-10-batches-bin")
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(MissingError, match=r"data_batch_3.bin: there is no such file"):
        load_cifar10(tmp_path)


@pytest.mark.skipif(
    not os.environ.get("BRANCHGRAPH_DATA") or not data_folder("cifar-10-batches-bin").is_dir(),
    reason="set BRANCHGRAPH_DATA to a folder with cifar-10-batches-bin/ to test the real CIFAR-10",
)
def test_the_real_cifar10_is_complete() -> None:
    cifar10 = data.load("cifar10")
    assert repr(cifar10) == "<Dataset cifar10: 50000 + 10000 images [3, 32, 32], 10 classes>"
    assert np.bincount(cifar10.train_labels).tolist() == [5000] * 10
    assert np.bincount(cifar10.test_labels).tolist() == [1000] * 10
    means = [cifar10.train_images[:, c].mean(dtype=np.float64) for c in range(3)]
    # What is published, of the original; ours may have gone through JPEG.
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=2e-3)
