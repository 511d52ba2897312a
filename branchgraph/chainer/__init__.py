"""Chainer's programming interface on the graph: `import branchgraph.chainer as chainer`."""

from branchgraph.chainer import (
    functions,
    initializers,
    links,
    optimizer,
    optimizer_hooks,
    optimizers,
    serializers,
)
from branchgraph.chainer.configuration import (
    config,
    force_backprop_mode,
    global_config,
    no_backprop_mode,
    using_config,
)
from branchgraph.chainer.function_node import Function, FunctionNode
from branchgraph.chainer.link import Chain, ChainList, Link
from branchgraph.chainer.optimizer import GradientMethod, Optimizer, UpdateRule
from branchgraph.chainer.precision import get_dtype, mixed16
from branchgraph.chainer.sequential import Sequential
from branchgraph.chainer.serializer import AbstractSerializer, Deserializer, Serializer
from branchgraph.chainer.tracing import trace
from branchgraph.chainer.variable import Parameter, Variable, as_variable

__all__ = [
    "AbstractSerializer",
    "Chain",
    "ChainList",
    "Deserializer",
    "Function",
    "FunctionNode",
    "GradientMethod",
    "Link",
    "Optimizer",
    "Parameter",
    "Sequential",
    "Serializer",
    "UpdateRule",
    "Variable",
    "as_variable",
    "config",
    "force_backprop_mode",
    "functions",
    "get_dtype",
    "global_config",
    "initializers",
    "links",
    "mixed16",
    "no_backprop_mode",
    "optimizer",
    "optimizer_hooks",
    "optimizers",
    "serializers",
    "trace",
    "using_config",
]
