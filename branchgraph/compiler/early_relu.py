"""ReLU before max pooling instead of behind it, where it costs nothing.

ReLU does not decrease, so it commutes with the maximum over a window W that has a cell in x:

    max(max_{i in W} x_i, 0) = max_{i in W} max(x_i, 0)

The numbers are equal bit by bit. Behind a layer the ReLU is then applied while the layer stores its
result, and a kernel over the pooled values is saved. For graphs without gradients: backward would
mask the larger tensor.
"""

from __future__ import annotations

from branchgraph.ir.graph import Graph, Node, at
from branchgraph.ir.ops.activation import Relu
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.elementwise import Add
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.ops.norm import BatchNormInference
from branchgraph.ir.ops.pool import MaxPool
from branchgraph.ir.rebuild import clone

#: Ops to whose kernel a ReLU is appended.
_ABSORBING = (Conv, BatchNormInference, Add, Sum)


def relu_before_pool(graph: Graph) -> Graph:
    """A copy of `graph` in which ReLUs stand before max pooling where a layer absorbs them."""
    new = clone(graph)
    if new.gradients:
        return new
    roots = set(new.roots)
    for relu in new.nodes:
        pool = relu.inputs[0].producer if isinstance(relu.op, Relu) else None
        if pool is None or not _movable(pool) or roots & {pool.output, pool.inputs[0]}:
            continue
        with at(relu.scope):
            early = new.emit(relu.op, pool.inputs[0], name=relu.name)
        with at(pool.scope):
            new.replace(relu.output, new.emit(pool.op, early, name=pool.name))
        new.remove(relu)
        new.remove(pool)
    new.touch()
    return new


def _movable(pool: Node) -> bool:
    """Whether a max pooling may follow the one ReLU that reads it."""
    if not isinstance(pool.op, MaxPool) or len(pool.output.users) != 1:
        return False
    x = pool.inputs[0]
    absorbed = x.producer is not None and isinstance(x.producer.op, _ABSORBING)
    return absorbed and len(x.users) == 1 and _inside(pool.op)


def _inside(op: MaxPool) -> bool:
    """Whether every window has a cell in x: then padding, which is -inf, is never the maximum."""
    pads = zip(op.kernel * 2, op.pad)
    return all(k > p for k, p in pads) and all(k >= s for k, s in zip(op.kernel, op.stride))
