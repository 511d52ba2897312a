"""`torch.compile` with its defaults over the function that eager mode runs."""

from __future__ import annotations

from peers.systems import run_torch
from peers.systems.run_torch import prepare

__all__ = ["load", "prepare"]


def load(bundle):  # type: ignore[no-untyped-def]
    return run_torch.load(bundle, compiled=True)
