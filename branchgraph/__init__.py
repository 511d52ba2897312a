"""branchgraph: the symbolic graph compiler for multi-branch neural networks.

Declare a network with `Graph` and the functions of `branchgraph.ir.builder`, rewrite it with
passes, train and run it with `Training` and `compile`. The rooms of the package are described in
`docs/architecture.md`.
"""

from branchgraph.compiler import Executable, compile
from branchgraph.ir.builder import (
    average_pool,
    batch_norm,
    concat,
    conv,
    cross_entropy,
    dense,
    dropout,
    exit,
    flatten,
    gate,
    global_average_pool,
    global_max_pool,
    lrn,
    max_pool,
    merge_maximum,
    merge_mean,
    merge_product,
    merge_sum,
    relu,
    sigmoid,
    softmax,
    tanh,
)
from branchgraph.ir.errors import BranchgraphError
from branchgraph.ir.file import load, save
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, branch, scope
from branchgraph.ir.optimisers import SGD, Adam, MomentumSGD
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.nets import network
from branchgraph.passes.base import Pass
from branchgraph.passes.materialise import evaluate_origin, materialise
from branchgraph.passes.pipeline import Pipeline
from branchgraph.passes.specialise import specialise
from branchgraph.training import Training, joint_loss, train

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "BranchgraphError",
    "Executable",
    "Graph",
    "MomentumSGD",
    "Pass",
    "Pipeline",
    "Role",
    "State",
    "Store",
    "Training",
    "average_pool",
    "batch_norm",
    "branch",
    "compile",
    "concat",
    "conv",
    "cross_entropy",
    "dense",
    "differentiate",
    "dropout",
    "evaluate_origin",
    "exit",
    "flatten",
    "format_graph",
    "gate",
    "global_average_pool",
    "global_max_pool",
    "joint_loss",
    "load",
    "lrn",
    "materialise",
    "max_pool",
    "merge_maximum",
    "merge_mean",
    "merge_product",
    "merge_sum",
    "network",
    "parse_graph",
    "relu",
    "save",
    "scope",
    "sigmoid",
    "softmax",
    "specialise",
    "tanh",
    "train",
]
