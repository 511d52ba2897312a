"""`chainer.functions`: Chainer's names and conventions over recorded ops."""

from branchgraph.chainer.functions.activation import *
from branchgraph.chainer.functions.arithmetic import *
from branchgraph.chainer.functions.array import *
from branchgraph.chainer.functions.connection import *
from branchgraph.chainer.functions.evaluation import *
from branchgraph.chainer.functions.loss import *
from branchgraph.chainer.functions.noise import *
from branchgraph.chainer.functions.normalization import *
from branchgraph.chainer.functions.pooling import *
from branchgraph.chainer.functions.reduction import *
