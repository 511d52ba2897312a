"""Activations."""

from __future__ import annotations

from branchgraph.chainer.functions.record import as_variable, function, record
from branchgraph.chainer.variable import Variable
from branchgraph.ir.ops.activation import LeakyRelu, Relu

__all__ = ["leaky_relu", "relu"]


@function
def relu(x: Variable) -> Variable:
    """max(x, 0), derivative 0 at 0."""
    return record(Relu(), as_variable(x))


@function
def leaky_relu(x: Variable, slope: float = 0.2) -> Variable:
    """x where positive, else slope x."""
    return record(LeakyRelu(slope=float(slope)), as_variable(x))
