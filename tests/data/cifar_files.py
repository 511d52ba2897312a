"""Miniature CIFAR files in every version, for the tests."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

TEN = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
HUNDRED = ["train", "test"]


def batch(number: int, classes: int, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [count, 3072] and labels; the first batches hold every class in turn."""
    rng = np.random.default_rng(number)
    labels = (np.arange(count) + number * count) % classes
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), labels


def records(pixels: np.ndarray, labels: np.ndarray, coarse: bool = False) -> bytes:
    """The binary version; `coarse` puts the label of CIFAR-100 that is not read in front."""
    marks = [np.full(len(labels), 255)] * coarse + [labels]
    return np.column_stack([np.stack(marks, 1).astype(np.uint8), pixels]).tobytes()


def pickled(pixels: np.ndarray, labels: np.ndarray, key: str = "labels") -> bytes:
    """The Python version as Python 2 wrote it: protocol 2, strings of bytes."""
    content = pixels.tobytes()
    numbers = b"".join(b"K" + bytes([n]) for n in labels)
    return b"".join(
        [
            b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03",
            b"U" + bytes([len(key)]) + key.encode() + b"q\x04]q\x05(" + numbers + b"e",
            b"U\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08",
            b"K\x00\x85U\x01b\x87Rq\t(K\x01M" + struct.pack("<H", len(pixels)),
            b"M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNN",
            b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", len(content)),
            content + b"tbU\tfilenamesq\x0c]q\r(U\x05a.pngq\x0eU\x05b.pngq\x0feu.",
        ]
    )


def pickled_today(pixels: np.ndarray, labels: np.ndarray, key: str = "labels") -> bytes:
    """The Python version as this Python writes it."""
    return pickle.dumps({key: [int(n) for n in labels], "data": pixels, "coarse": None}, 4)


def members_of(version: str) -> dict[str, bytes]:
    """Names and contents of all files, by the name of the folder that they belong in."""
    hundred = "100" in version
    classes = 100 if hundred else 10
    found = {}
    for number, name in enumerate(HUNDRED if hundred else TEN):
        pixels, labels = batch(number, classes)
        if version.endswith(("-py", "-python")):
            found[name] = pickled(pixels, labels, "fine_labels" if hundred else "labels")
        else:
            found[f"{name}.bin"] = records(pixels, labels, hundred)
    return found


def write_folder(root: Path, version: str) -> Path:
    folder = root / version
    folder.mkdir()
    for name, content in members_of(version).items():
        (folder / name).write_bytes(content)
    return folder


def archive_of(members: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    """A tar archive with these members, in the format that GNU tar writes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=tarfile.GNU_FORMAT) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def write_archive(root: Path, version: str, archive: str) -> Path:
    named = {f"{version}/{name}": content for name, content in members_of(version).items()}
    path = root / archive
    path.write_bytes(archive_of({f"{version}/readme.html": b"<p>", **named}))
    return path
