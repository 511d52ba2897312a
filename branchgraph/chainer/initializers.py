"""`chainer.initializers`."""

from __future__ import annotations

from typing import Any

import numpy as np

from branchgraph.chainer.configuration import config


def generate_array(initializer: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new array filled by an initialiser, a number or an array."""
    dtype = np.dtype(getattr(initializer, "dtype", None) or config.dtype)
    array = np.empty(shape, dtype)
    if callable(initializer):
        initializer(array)
    else:
        array[...] = initializer
    return array
