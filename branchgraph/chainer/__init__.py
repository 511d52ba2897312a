"""Chainer's programming interface on the graph: `import branchgraph.chainer as chainer`."""

from branchgraph.chainer import functions, initializers
from branchgraph.chainer.configuration import (
    config,
    force_backprop_mode,
    global_config,
    no_backprop_mode,
    using_config,
)
from branchgraph.chainer.variable import Parameter, Variable, as_variable

__all__ = [
    "Parameter",
    "Variable",
    "as_variable",
    "config",
    "force_backprop_mode",
    "functions",
    "global_config",
    "initializers",
    "no_backprop_mode",
    "using_config",
]
