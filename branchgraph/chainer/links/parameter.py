"""A parameter as a link."""

from __future__ import annotations

from typing import Any

import numpy as np

from branchgraph.chainer import variable
from branchgraph.chainer.link import Link


class Parameter(Link):
    """One parameter W; the call returns it."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__()
        with self.init_scope():
            self.W = variable.Parameter(array)

    def forward(self, **ignored: Any) -> variable.Parameter:
        """W."""
        return self.W
