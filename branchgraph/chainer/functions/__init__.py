"""`chainer.functions`: Chainer's names and conventions over recorded ops."""

from branchgraph.chainer.functions.activation import *
from branchgraph.chainer.functions.arithmetic import (
    absolute,
    add,
    add_operator,
    divide_operator,
    multiply_operator,
    neg,
    subtract_operator,
)
from branchgraph.chainer.functions.array import *
from branchgraph.chainer.functions.connection import *
from branchgraph.chainer.functions.loss import *
