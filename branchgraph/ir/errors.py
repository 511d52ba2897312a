"""The errors a user can cause, each saying what was expected, what came, and what to do.

Everything derives from `BranchgraphError`, so a command line or a notebook can catch one type and
print its message without a traceback.
"""

from __future__ import annotations


class BranchgraphError(Exception):
    """Base of every error that input, files, graphs or the environment can cause."""


class GraphError(BranchgraphError):
    """A graph is malformed or was used in a way its contracts forbid."""


class ShapeError(GraphError):
    """Shapes or dtypes of operands break a rule of the op that reads them."""


class DimensionError(GraphError):
    """An expression over symbolic dimensions has no affine integer form."""


class GradientError(GraphError):
    """A gradient was asked for that the op does not define."""


class RefusalError(GraphError):
    """A pass declined to rewrite because its algebra would not hold."""


class ClaimError(GraphError):
    """A pass changed values that it claims to keep."""


class FormatError(BranchgraphError):
    """A text, file or specification string cannot be read."""


class MissingError(BranchgraphError):
    """Something outside the package is missing; the message names the command that brings it."""


class UnsupportedError(BranchgraphError):
    """A backend has no kernel for an op of the program."""
