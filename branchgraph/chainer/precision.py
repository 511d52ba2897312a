"""Dtypes of new parameters: `config.dtype`, and `mixed16`, half precision with wide statistics."""

from __future__ import annotations

from typing import Any

import numpy as np

from branchgraph.chainer.configuration import config


class _Mixed16:
    """Parameters in float16; batch normalisation keeps its own in float32."""

    name = "mixed16"
    dtype = np.dtype(np.float16)

    def __repr__(self) -> str:
        return "dtype('mixed16')"

    def __reduce__(self) -> str:
        return "mixed16"


mixed16 = _Mixed16()


def get_dtype(dtype: Any = None, map_mixed16: Any = None) -> np.dtype:
    """`dtype`, or `config.dtype`; `mixed16` becomes `map_mixed16`, float16 by default."""
    if dtype is None:
        dtype = config.dtype
    if dtype is mixed16 or (isinstance(dtype, str) and dtype == mixed16.name):
        dtype = mixed16.dtype if map_mixed16 is None else map_mixed16
    return np.dtype(dtype)
