"""branchgraph's NumPy backend, which every other system is judged against; no passes."""

from __future__ import annotations

from peers.systems import run_branchgraph
from peers.systems.run_branchgraph import prepare

__all__ = ["load", "prepare"]


def load(bundle):  # type: ignore[no-untyped-def]
    bundle.meta |= {"backend": "numpy", "passes": []}
    return run_branchgraph.load(bundle)
