"""Data sets come whole and checked, or say what is missing and what to do."""

from __future__ import annotations

import builtins
import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from branchgraph import data
from branchgraph.data.dataset import Dataset
from branchgraph.data.folder import data_folder
from branchgraph.data.mnist import load_mnist
from branchgraph.ir.errors import FormatError, MissingError

FILES = {
    "train-images-idx3-ubyte": (7, 28, 28),
    "train-labels-idx1-ubyte": (7,),
    "t10k-images-idx3-ubyte": (3, 28, 28),
    "t10k-labels-idx1-ubyte": (3,),
}


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A miniature MNIST: three files compressed, one plain."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, shape in FILES.items():
        suffix = "" if name.startswith("t10k-images") else ".gz"
        top = 256 if len(shape) == 3 else 10
        write_idx(folder / (name + suffix), rng.integers(0, top, shape))
    return folder


def made(**changes: np.ndarray) -> Dataset:
    parts = {
        "train_images": np.zeros((4, 1, 2, 2), np.float32),
        "train_labels": np.array([0, 1, 2, 0]),
        "test_images": np.ones((2, 1, 2, 2), np.float32),
        "test_labels": np.array([2, 1]),
    }
    return Dataset("made", 3, **{**parts, **changes})


# -- the registry ----------------------------------------------------------------------------------


def test_known_names_are_listed() -> None:
    assert data.datasets() == ["cifar10", "cifar100", "digits", "mnist"]
    with pytest.raises(MissingError, match="no data set 'minst'; there are: cifar10, cifar100, "):
        data.load("minst")


def test_a_name_takes_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRANCHGRAPH_DATA", str(folder.parent))
    assert len(data.load("mnist:train=5,test=none").train_labels) == 5
    whole, part = data.load("mnist"), data.load("mnist:classes=5,train=1")
    rows = np.flatnonzero(whole.train_labels < 5)
    assert part.classes == 5
    np.testing.assert_array_equal(part.train_images, whole.train_images[rows[:1]])
    assert part.test_labels.tolist() == [n for n in whole.test_labels if n < 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("train=8", r"mnist: expected train in 0..7, got 8"),
        ("train=-1", r"mnist: expected train in 0..7, got -1"),
        ("classes=0", r"mnist: expected classes in 1..10, got 0"),
        ("classes=11", r"mnist: expected classes in 1..10, got 11"),
        ("train=few", "mnist:train: expected int, got 'few'"),
        ("size=3", "mnist has no option 'size'; it has: classes, train, test"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRANCHGRAPH_DATA", str(folder.parent))
    with pytest.raises(FormatError, match=message):
        data.load(f"mnist:{options}")


# -- MNIST -----------------------------------------------------------------------------------------


def test_mnist_is_scaled_to_one(folder: Path) -> None:
    mnist = load_mnist(folder)
    assert mnist.train_images.shape == (7, 1, 28, 28)
    assert (mnist.train_images.dtype, mnist.test_labels.dtype) == (np.float32, np.int64)
    assert mnist.train_images.max() == 1
    raw = np.random.default_rng(0).integers(0, 256, (7, 28, 28))
    np.testing.assert_array_equal(mnist.train_images[:, 0], raw.astype(np.float32) / 255)


def test_mnist_is_found_under_the_data_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRANCHGRAPH_DATA", str(folder.parent))
    assert len(data.load("mnist").test_labels) == 3


def test_the_data_folder_is_in_the_cache_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRANCHGRAPH_DATA", raising=False)
    assert data_folder("mnist").parts[-2:] == ("data", "mnist")
    assert "branchgraph" in str(data_folder("mnist"))


def test_a_missing_file_of_mnist_names_folder_files_and_remedy(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(MissingError) as caught:
        load_mnist(folder)
    message = str(caught.value)
    assert "no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz" in message
    assert all(part in message for part in [*FILES, str(folder), "set BRANCHGRAPH_DATA"])


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-images-idx3-ubyte", np.zeros((7, 8, 8)), r"expected uint8 images \[n, 28, 28\]"),
        ("train-labels-idx1-ubyte", np.zeros((7, 1)), r"expected uint8 labels \[n\]"),
        ("train-labels-idx1-ubyte", np.zeros(6), r"int64 labels \[7\].* got int64 \[6\]"),
        ("t10k-labels-idx1-ubyte", np.full(3, 10), "expected labels in 0..9, got 10..10"),
    ],
)
def test_files_of_mnist_that_do_not_fit_are_refused(
    name: str, array: np.ndarray, message: str, folder: Path
) -> None:
    write_idx(folder / name, array)
    with pytest.raises(FormatError, match=message):
        load_mnist(folder)


@pytest.mark.skipif(
    not os.environ.get("BRANCHGRAPH_DATA") or not data_folder("mnist").is_dir(),
    reason="set BRANCHGRAPH_DATA to a folder with mnist/ to test the real MNIST",
)
def test_the_real_mnist_is_complete() -> None:
    mnist = data.load("mnist")
    assert (len(mnist.train_labels), len(mnist.test_labels)) == (60_000, 10_000)
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(mnist.train_labels).min() == 5421
    assert mnist.train_images.mean(dtype=np.float64) == pytest.approx(0.1306605, abs=1e-6)


# -- digits ----------------------------------------------------------------------------------------


def test_digits_come_in_a_fixed_split() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    digits = data.load("digits")
    assert repr(digits) == "<Dataset digits: 1437 + 360 images [1, 8, 8], 10 classes>"
    assert digits.train_images.max() == digits.test_images.max() == 1
    assert np.bincount(digits.test_labels).tolist() == [35, 36, 35, 37, 37, 37, 37, 36, 33, 37]
    np.testing.assert_array_equal(data.load("digits").test_images, digits.test_images)


def test_digits_without_scikit_learn_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingError, match=r"python -m pip install 'branchgraph\[demo\]'"):
        data.load("digits")


# -- what every data set keeps to ------------------------------------------------------------------


def test_a_subset_keeps_the_first_examples() -> None:
    part = made().subset(train=2, test=1)
    assert (part.train_labels.tolist(), part.test_labels.tolist()) == ([0, 1], [2])
    assert len(made().subset(test=0).train_labels) == 4
    with pytest.raises(FormatError, match=r"made: expected train in 0..4, got 5"):
        made().subset(train=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((4, 2, 2), np.float32)}, "made, training: expected float32"),
        ({"test_images": np.zeros((2, 1, 2, 2))}, "made, test: expected float32"),
        ({"test_images": np.zeros((2, 1, 3, 3), np.float32)}, "both need one shape"),
        ({"train_labels": np.array([0, 1])}, r"expected int64 labels \[4\]"),
        ({"train_labels": np.zeros(4, np.int32)}, r"expected int64 labels \[4\]"),
        ({"test_labels": np.array([0, 3])}, "expected labels in 0..2, got 0..3"),
        ({"test_labels": np.array([-1, 0])}, "expected labels in 0..2, got -1..0"),
        ({"test_images": np.full((2, 1, 2, 2), np.nan, np.float32)}, "NaN or infinity"),
        ({"test_images": np.full((2, 1, 2, 2), -np.inf, np.float32)}, "NaN or infinity"),
    ],
)
def test_a_data_set_that_contradicts_itself_is_refused(
    changes: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        made(**changes)
