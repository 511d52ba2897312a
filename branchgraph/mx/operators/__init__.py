"""The operators of MXNet, one module a family. Importing this package registers all of them."""

from branchgraph.mx.operators import (  # noqa: F401
    activation,
    convolution,
    elementwise,
    movement,
    normalisation,
    output,
    pooling,
    reduction,
)
from branchgraph.mx.operators.base import Operator, named, read_operator

__all__ = ["Operator", "named", "read_operator"]
