"""CIFAR-10 and CIFAR-100: 50 000 + 10 000 colour images, 32x32, in whichever version lies there.

    binary   a record an image: 1 byte label (CIFAR-100: coarse, then fine), then the planes of red,
             green and blue, 1024 bytes each, row by row
    Python   a pickled dictionary: data, bytes [n, 3072] with planes as above, and labels
             (CIFAR-100: fine_labels)

Either version may be unpacked or still in its .tar.gz. Archives are read without unpacking, pickles
without running them. Files may hold fewer images than the published ones, never more.

Bytes are turned into float32 file by file and let go, so loading needs little more than the result.

Source: A. Krizhevsky, "Learning multiple layers of features from tiny images" (2009).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from branchgraph.data.dataset import Dataset
from branchgraph.data.folder import data_folder
from branchgraph.data.pickled import read_pickled
from branchgraph.data.tar import read_members
from branchgraph.ir.errors import FormatError, MissingError

_PIXELS = 3 * 32 * 32
#: Names of files and labels beside the pixels of a pickled image, in bytes, generously.
_PICKLED_REST = 256

Read = Callable[[str], "bytes | bytearray"]


@dataclass(frozen=True)
class Version:
    """A folder of files, or an archive of that folder; files with their number of images."""

    folder: str
    archive: str
    train: Mapping[str, int]
    test: Mapping[str, int]
    pickled: bool = False

    @property
    def files(self) -> dict[str, int]:
        """All files, in order."""
        return {**self.train, **self.test}


@dataclass(frozen=True)
class Kind:
    """What distinguishes the two data sets."""

    name: str
    classes: int
    label_bytes: int
    label_key: str
    versions: tuple[Version, ...]

    def limit(self, version: Version, name: str) -> int:
        """Most bytes of a file."""
        images = version.files[name]
        if version.pickled:
            return images * (_PIXELS + _PICKLED_REST) + 2**16
        return images * (_PIXELS + self.label_bytes)


_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR10 = Kind(
    "cifar10",
    10,
    1,
    "labels",
    (
        Version(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            {f"{batch}.bin": 10_000 for batch in _BATCHES},
            {"test_batch.bin": 10_000},
        ),
        Version(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            dict.fromkeys(_BATCHES, 10_000),
            {"test_batch": 10_000},
            pickled=True,
        ),
    ),
)
CIFAR100 = Kind(
    "cifar100",
    100,
    2,
    "fine_labels",
    (
        Version(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            {"train.bin": 50_000},
            {"test.bin": 10_000},
        ),
        Version(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            {"train": 50_000},
            {"test": 10_000},
            pickled=True,
        ),
    ),
)


def load_cifar10(
    folder: str | os.PathLike[str] | None = None,
    *,
    classes: int | None = None,
    train: int | None = None,
    test: int | None = None,
) -> Dataset:
    """CIFAR-10 with images byte/255, float32 [n, 3, 32, 32], planes red, green, blue.

    Looks in `folder`, else in the data folder, for the binary version, unpacked or as .tar.gz, then
    for the Python version. Keeps the first `classes` classes, and of these the first `train` and
    `test` examples. Raises `MissingError` naming what is not there, `FormatError` for files that
    are broken.
    """
    return _load(CIFAR10, folder, classes, train, test)


def load_cifar100(
    folder: str | os.PathLike[str] | None = None,
    *,
    classes: int | None = None,
    train: int | None = None,
    test: int | None = None,
) -> Dataset:
    """CIFAR-100 with its 100 fine labels; everything else is as in `load_cifar10`."""
    return _load(CIFAR100, folder, classes, train, test)


def found(kind: Kind, folder: str | os.PathLike[str] | None = None) -> tuple[Version, Path]:
    """The version that `load` reads and where it lies: a folder or an archive."""
    root = data_folder("") if folder is None else Path(folder)
    for version in kind.versions:
        for place in (root / version.folder, root):
            if (place / next(iter(version.train))).exists():
                return version, place
        if (root / version.archive).exists():
            return version, root / version.archive
    ways = " or ".join(f"{v.folder}/ or {v.archive}" for v in kind.versions)
    first = kind.versions[0]
    raise MissingError(
        f"{kind.name}: nothing of it in {root}; expected {ways}, the first with "
        f"{', '.join(first.files)}. Run: branchgraph data fetch {kind.name}, or put the files "
        "there, or set BRANCHGRAPH_DATA to the folder that holds them"
    )


def _load(
    kind: Kind,
    folder: str | os.PathLike[str] | None,
    classes: int | None,
    train: int | None,
    test: int | None,
) -> Dataset:
    kept = kind.classes if classes is None else classes
    if not 1 <= kept <= kind.classes:
        raise FormatError(f"{kind.name}: expected classes in 1..{kind.classes}, got {kept}")
    for part, count in (("train", train), ("test", test)):
        if count is not None and count < 0:
            raise FormatError(f"{kind.name}: expected {part} of at least 0, got {count}")
    version, place = found(kind, folder)
    read = _reader(kind, version, place)
    parts = []
    for part, names, count in (("train", version.train, train), ("test", version.test, test)):
        chosen = _Chosen(kind, kept, part, count)
        parts.append(chosen.images_and_labels(names, read, place, version.pickled))
    return Dataset(kind.name, kept, *parts[0], *parts[1])


def _reader(kind: Kind, version: Version, place: Path) -> Read:
    """A function that gives the bytes of a file, once."""
    limits = {name: kind.limit(version, name) for name in version.files}
    if place.name != version.archive:
        return lambda name: _read_file(place / name, limits[name])
    members = read_members(place, {f"{version.folder}/{n}": most for n, most in limits.items()})

    def member(name: str) -> bytearray:
        try:
            return members.pop(f"{version.folder}/{name}")
        except KeyError:
            raise MissingError(
                f"{place}: no {version.folder}/{name} in the archive; download the file again"
            ) from None

    return member


def _read_file(path: Path, limit: int) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FormatError(f"{path}: expected a file of CIFAR, got something that is no file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise FormatError(
                    f"{path}: {size} bytes; the published file has at most {limit}. "
                    "Check that this is the file you mean"
                )
            return file.read(size)
    except FileNotFoundError:
        raise MissingError(
            f"{path}: there is no such file; the other files of the data set lie there, so add it"
        ) from None
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read: {error.strerror or error}; check the permissions"
        ) from error


@dataclass
class _Chosen:
    """The examples of one part that are wanted: of the first classes, the first `count`."""

    kind: Kind
    classes: int
    part: str
    count: int | None

    def images_and_labels(
        self, names: Iterable[str], read: Read, place: Path, pickled: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        decode = _decode_pickle if pickled else _decode_records
        blocks, labels, total = [], [], 0
        for name in names:
            if self.count is not None and total >= self.count:
                break
            block = decode(read(name), self.kind, f"{place}{os.sep}{name}")
            pixels, marks = self.chosen(*block, total)
            blocks.append(pixels)
            labels.append(marks)
            total += len(marks)
        if self.count is not None and total != self.count:
            raise FormatError(
                f"{self.kind.name}: expected {self.part} in 0..{total}, got {self.count}"
            )
        return _scaled(blocks, total), np.concatenate([np.zeros(0, np.int64), *labels])

    def chosen(
        self, pixels: np.ndarray, labels: np.ndarray, already: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.classes < self.kind.classes:
            rows = labels < self.classes
            pixels, labels = pixels[rows], labels[rows]
        most = len(labels) if self.count is None else self.count - already
        return pixels[:most], labels[:most]


def _scaled(blocks: list[np.ndarray], total: int) -> np.ndarray:
    """All blocks of bytes as float32 images; takes the blocks out of the list as it goes."""
    images = np.empty((total, 3, 32, 32), np.float32)
    end = total
    while blocks:
        block = blocks.pop().reshape(-1, 3, 32, 32)
        target = images[end - len(block) : end]
        np.divide(block, np.float32(255), out=target, dtype=np.float32)
        end -= len(block)
    return images


def _decode_records(
    content: bytes | bytearray, kind: Kind, shown: str
) -> tuple[np.ndarray, np.ndarray]:
    size = _PIXELS + kind.label_bytes
    if not content or len(content) % size:
        raise FormatError(
            f"{shown}: expected records of {size} bytes, got {len(content)} bytes, which are no "
            "whole number of them; download the file again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = records[:, kind.label_bytes - 1].astype(np.int64)
    return records[:, kind.label_bytes :], _in_range(labels, kind, shown)


def _decode_pickle(
    content: bytes | bytearray, kind: Kind, shown: str
) -> tuple[np.ndarray, np.ndarray]:
    batch = read_pickled(content, shown)
    pixels, labels = batch.get("data"), batch.get(kind.label_key)
    if not isinstance(pixels, np.ndarray) or pixels.shape[1] != _PIXELS:
        raise FormatError(
            f"{shown}: expected data of bytes [n, {_PIXELS}]; check that this is a batch of "
            f"{kind.name}"
        )
    if (
        not isinstance(labels, list)
        or len(labels) != len(pixels)
        or not all(type(n) is int and 0 <= n < 256 for n in labels)
    ):
        raise FormatError(
            f"{shown}: expected {kind.label_key} as a list of {len(pixels)} numbers; check that "
            f"this is a batch of {kind.name}"
        )
    return pixels, _in_range(np.array(labels, np.int64), kind, shown)


def _in_range(labels: np.ndarray, kind: Kind, shown: str) -> np.ndarray:
    if labels.size and labels.max() >= kind.classes:
        raise FormatError(
            f"{shown}: expected labels in 0..{kind.classes - 1}, got {labels.max()}; "
            f"check that this is a file of {kind.name}"
        )
    return labels
