"""How a graph is made ready: passes, a program, and an executable bound to a store."""

from __future__ import annotations

from branchgraph.compiler.executable import Executable
from branchgraph.compiler.pipeline import compile

__all__ = ["Executable", "compile"]
