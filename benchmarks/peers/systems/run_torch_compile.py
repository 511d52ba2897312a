"""`torch.compile` with its defaults over the function that eager mode runs."""

from __future__ import annotations

# The compiler is part of the imports, as branchgraph's is.
import torch._inductor.compile_fx  # noqa: F401

from peers.systems import run_torch
from peers.systems.run_torch import prepare

__all__ = ["load", "prepare"]


def load(bundle):  # type: ignore[no-untyped-def]
    return run_torch.load(bundle, compiled=True)
