"""The 1797 handwritten digits, 8x8, that come with scikit-learn: real data without a download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository (1998).
"""

from __future__ import annotations

import numpy as np

from branchgraph.data.dataset import Dataset
from branchgraph.ir.errors import MissingError

_TEST = 360


def load_digits() -> Dataset:
    """Digits with images grey/16, float32 [n, 1, 8, 8], and labels int64 [n].

    The last 360 are the test set. Raises `MissingError` when scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingError(
            "the digits come with scikit-learn, which is not installed; install it: "
            "python -m pip install 'branchgraph[demo]'"
        ) from None
    raw = datasets.load_digits()
    images = (raw.images[:, None] / 16).astype(np.float32)
    labels = raw.target.astype(np.int64)
    return Dataset("digits", 10, images[:-_TEST], labels[:-_TEST], images[-_TEST:], labels[-_TEST:])
