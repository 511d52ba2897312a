"""Element types of MXNet: the flag in files, the name in parameters, and the type here."""

from __future__ import annotations

import ml_dtypes
import numpy as np

#: The flag in `.params` files and in `__dtype__`, and the array type; nothing else is defined.
FLAGS: dict[int, np.dtype] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float64),
    2: np.dtype(np.float16),
    3: np.dtype(np.uint8),
    4: np.dtype(np.int32),
    5: np.dtype(np.int8),
    6: np.dtype(np.int64),
    7: np.dtype(np.bool_),
    8: np.dtype(np.int16),
    9: np.dtype(np.uint16),
    10: np.dtype(np.uint32),
    11: np.dtype(np.uint64),
    12: np.dtype(ml_dtypes.bfloat16),
}

#: The array type by its name in parameters (`float32`).
NAMES: dict[str, np.dtype] = {str(dtype): dtype for dtype in FLAGS.values()}


def flag_of(dtype: np.dtype) -> int | None:
    """The flag of an array type, or None where MXNet has none."""
    return next((flag for flag, known in FLAGS.items() if known == dtype), None)
