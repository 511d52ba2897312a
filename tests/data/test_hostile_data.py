"""Data files made to harm are refused: with a message, in little time, in little memory.

The attacks are in `hostile_files.py`. One process reads them all with an address space that leaves
half a GiB beside what Python and NumPy take; each attack is a test of what came of it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hostile_files
import numpy as np
import pytest
from cifar_files import archive_of
from hostile_files import GOOD_PICKLE, SOUND, archive, good_members, npy

from branchgraph.data.cifar import load_cifar10
from branchgraph.ir.errors import BranchgraphError, FormatError
from branchgraph.ir.npz import open_npz

#: Generous on a slow and busy machine; what runs away takes minutes.
SECONDS = 8.0

Result = tuple[str, str, float]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    """Error, message and seconds by reader and attack."""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits of the address space are kept by Linux")
    folder = tmp_path_factory.mktemp("hostile")
    with open(folder / "out", "w+") as out:
        done = subprocess.run(
            [sys.executable, str(hostile_files.__file__), str(folder)],
            stdout=out, stderr=subprocess.STDOUT, timeout=300, check=False,
        )  # fmt: skip
        out.seek(0)
        lines = out.read().splitlines()
    assert done.returncode == 0, "\n".join(lines[-20:])
    found = [json.loads(line) for line in lines]  # a pickle that ran would print
    return {(reader, name): (error, message, s) for reader, name, error, message, s in found}


@pytest.mark.parametrize(("reader", "attack", "words"), hostile_files.attacks())
def test_an_attack_is_refused(
    reader: str, attack: str, words: str, results: dict[tuple[str, str], Result]
) -> None:
    error, message, seconds = results[reader, attack]
    assert error in ("FormatError", "MissingError"), message
    assert re.search(words, message), message
    assert len(message) < 1000
    assert seconds < SECONDS


def damaged(content: bytes, times: int) -> Iterator[bytes]:
    """The content with bytes changed near its beginning or end, and cut half of the times."""
    rng = np.random.default_rng(0)
    edge = min(len(content), 300)
    for number in range(times):
        wrong = bytearray(content)
        for position in rng.integers(-edge, edge, 2):
            wrong[position] = rng.integers(0, 256)
        yield bytes(wrong[: rng.integers(len(content)) if number % 2 else None])


GOOD: dict[str, bytes] = {
    "tar": archive_of({"a": b"", **good_members()}, "w"),
    "pickle": GOOD_PICKLE,
    "npz": archive(("a.npy", SOUND), ("b.npy", npy("()", "'<i8'", bytes(8)))),
}


@pytest.mark.parametrize("reader", GOOD)
def test_random_damage_is_read_or_refused(reader: str, tmp_path: Path) -> None:
    read = hostile_files.READERS[reader][0]
    for number, content in enumerate(damaged(GOOD[reader], 50 if reader == "tar" else 300)):
        (tmp_path / str(number)).mkdir()
        with contextlib.suppress(BranchgraphError):
            read(tmp_path / str(number), gzip.compress(content, 1) if reader == "tar" else content)


@pytest.mark.parametrize("reader", GOOD)
def test_what_was_not_damaged_is_read(reader: str, tmp_path: Path) -> None:
    content = gzip.compress(GOOD[reader]) if reader == "tar" else GOOD[reader]
    hostile_files.READERS[reader][0](tmp_path, content)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this file system")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_pipes_and_folders_are_no_files(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "cifar-10-binary.tar.gz")
    with pytest.raises(FormatError, match="something that is no file"):
        load_cifar10(tmp_path)
    make(tmp_path / "weights.npz")
    with (
        pytest.raises(FormatError, match="something that is no file"),
        open_npz(tmp_path / "weights.npz"),
    ):
        pass
    (tmp_path / "cifar-10-batches-bin").mkdir()
    make(tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin")
    with pytest.raises(FormatError, match="something that is no file"):
        load_cifar10(tmp_path)
