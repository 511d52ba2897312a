"""Recordings of the original frameworks, and where to find them.

`$BRANCHGRAPH_GOLDENS` names a folder with one sub-folder a framework (`chainer`, `mxnet`, ...).
Without it, the extract in `tests/data/recordings` is replayed, and tests whose recordings are not
in it skip; in continuous integration (`$CI`) those fail, so that nobody takes a run without
recordings for a run that passed them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchgraph.data import load
from branchgraph.ir.errors import MissingError

VARIABLE = "BRANCHGRAPH_GOLDENS"
EXTRACT = Path(__file__).parent / "data" / "recordings"


def folder(framework: str) -> Path:
    """The recordings of `framework`; skips the test without them, fails it where `$CI` is set."""
    root = os.environ.get(VARIABLE)
    path = Path(root, framework) if root else None
    if path is not None and path.is_dir():
        return path
    missing = f"no recordings of {framework}: set ${VARIABLE} to the folder that holds {framework}/"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def golden(name: str) -> Path:
    """One recorded file, for example `chainer/manifest.json`: all recordings, else the extract."""
    root = Path(os.environ.get(VARIABLE) or EXTRACT)
    if (root / name).is_file():
        return root / name
    framework, _, rest = name.partition("/")
    return folder(framework) / rest


def mnist_test_set() -> tuple[np.ndarray, np.ndarray]:
    """The 10 000 test images and labels of MNIST; skips without them, fails where `$CI` is set."""
    try:
        data = load("mnist")
    except MissingError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    return data.test_images, data.test_labels


@dataclass(frozen=True)
class Recording:
    """The cases of one framework's manifest, and the arrays they name."""

    cases: tuple[Mapping[str, Any], ...]
    arrays: Mapping[str, np.ndarray]

    def of(self, target: str) -> list[Mapping[str, Any]]:
        """The cases of one recorded function."""
        return [c for c in self.cases if c["target"] == target]


def chainer_functions() -> Recording:
    """The recorded calls of `chainer.functions`."""
    manifest = json.loads(golden("chainer/manifest.json").read_text())
    cases = tuple(c for c in manifest["cases"] if c["group"] == "function")
    with np.load(golden("chainer/functions.npz")) as arrays:
        return Recording(cases, dict(arrays))


def assert_within(
    actual: np.ndarray, expected: np.ndarray, tolerance: Mapping[str, float] | None, what: str
) -> None:
    """`actual` is `expected` within `rtol` and `atol`, or exactly when there is no tolerance."""
    found = f"{what}: expected {expected.dtype}{expected.shape}, got {actual.dtype}{actual.shape}"
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), found
    if tolerance is None or expected.dtype.kind != "f":
        np.testing.assert_array_equal(actual, expected, err_msg=what)
    else:
        np.testing.assert_allclose(actual, expected, **tolerance, err_msg=what)
