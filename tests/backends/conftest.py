"""Memory that plans get is full of NaN here, so that reading what nothing wrote is noticed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from branchgraph.backends.onednn import plan


@pytest.fixture(scope="package", autouse=True)
def _poisoned_memory() -> Iterator[None]:
    fresh = plan.allocate

    def poisoned(nbytes: int) -> np.ndarray:
        memory = fresh(nbytes)
        memory.fill(0xFF)  # NaN in every floating type, -1 in signed integers
        return memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "allocate", poisoned)
        yield
