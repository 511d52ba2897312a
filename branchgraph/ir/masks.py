"""Learned masks: K ones in each row of scores r in [0, 1], of which only the ratios matter.

They are the gates `top_k` with rows that are kept in bounds:

    training     r' = r / sum r;  the K largest of ln(r' + 1e-8) + Gumbel noise: K distinct draws
                 in proportion to r'
    inference    the K largest r, ties to the lower index
    backward     dr = dm, to every entry, drawn or not: a biased straight-through estimate
    update       r <- clip(r' - rate dr, 0, 1), the rule `optimisers.MaskSGD`

(Ahmed & Torresani, "Connectivity learning in multi-branch networks", 1709.09582, and "MaskConnect",
1807.11473. That the gradient of the binary value moves the real one is BinaryConnect's idea,
1511.00363.)
"""

from __future__ import annotations

from branchgraph.ir.builder import by_mode, straight_through
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.functions import draws
from branchgraph.ir.functions.elementary import log
from branchgraph.ir.functions.reduction import reduce_sum
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.elementwise import compare, where
from branchgraph.ir.ops.reduce import TopK

#: Keeps entries that were clipped to 0 drawable when a row has fewer than K positive ones.
FLOOR = 1e-8


def normalised(r: Value) -> Value:
    """Rows along the last axis divided by their sums; a row of zeros becomes uniform."""
    size = r.shape[-1] if r.shape else None
    if not isinstance(size, int):
        raise ShapeError(f"masks are rows of a concrete size, got {r.type}")
    total = reduce_sum(r, -1, keepdims=True)
    zero, one = r.graph.constant(0.0, r.dtype), r.graph.constant(1.0, r.dtype)
    empty = compare("equal", total, zero)
    return where(empty, r.graph.constant(1.0 / size, r.dtype), r / where(empty, one, total))


def mask(r: Value, k: int) -> Value:
    """K ones in each row along the last axis, zeros elsewhere; its cotangent is that of r."""
    largest = TopK(k=k, axis=len(r.shape) - 1)
    drawn = r.graph.emit(largest, log(normalised(r) + FLOOR) + draws.gumbel(r))
    # Inference compares what is stored: dividing could round two scores to one.
    return straight_through(by_mode(drawn, r.graph.emit(largest, r)), r)
