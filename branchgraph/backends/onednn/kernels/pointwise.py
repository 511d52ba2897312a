"""Element-wise ops, merges and softmax on activations."""

from __future__ import annotations

from collections.abc import Sequence

from branchgraph.backends.onednn.kernels.common import (
    binary_of,
    computable,
    desc,
    function_of,
    post_ops,
)
from branchgraph.backends.onednn.kernels.host import follows_channels_last
from branchgraph.backends.onednn.plan import Site
from branchgraph.backends.onednn.primitives import (
    Arg,
    Attributes,
    Binary,
    Eltwise,
    OneDNNError,
    binary,
    concat,
    eltwise_backward,
    eltwise_forward,
    multiple_source,
    post_op_operand,
    softmax_forward,
)
from branchgraph.backends.onednn.tensors import Tensor
from branchgraph.ir.ops.activation import Relu, ReluGradient, Softmax
from branchgraph.ir.ops.merge import Concat

#: Elements from which a primitive beats NumPy, whose calls cost less.
_WORTH = 256


def merge(site: Site) -> bool:
    """A sum of two or more, then post-ops."""
    op = site.op
    algorithm = binary_of(op)
    if algorithm is None or not computable(*site.inputs):
        return False
    first = site.first
    if len(first.reads) < 2:
        return False
    out = site.output(site.last.writes[0], last=follows_channels_last(site, first.writes[0]))
    if out.size < _WORTH:
        return False
    a, b, *more = (site.builder.tensors[r] for r in first.reads)
    if a.shape != out.shape or b.shape != out.shape:
        return False
    rest = _chained(site, more)
    if rest is None:
        return False
    attributes, operands = rest
    try:
        primitive = binary(algorithm, desc(a), desc(b), desc(out), attributes=attributes)
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.SRC: a, Arg.SRC_1: b, **operands}, {Arg.DST: out})
    return True


def _chained(site: Site, more: Sequence[Tensor]) -> tuple[Attributes, dict[int, Tensor]] | None:
    """Post-ops for the operands of a sum behind the second one, then the members behind it."""
    appended = post_ops(site, site.cluster.members[1:], site.first.writes[0])
    if appended is None:
        return None
    attributes, operands = appended
    shifted = {key + 32768 * len(more): t for key, t in operands.items()}
    full = Attributes()
    for number, tensor in enumerate(more):
        shifted[post_op_operand(number)] = tensor
        full = full.binary(Binary.ADD, desc(tensor))
    return Attributes((*full.post_ops, *attributes.post_ops)), shifted


def function(site: Site) -> bool:
    """An element-wise function of one operand."""
    found = function_of(site.op)
    if found is None or not computable(*site.inputs):
        return False
    (x,) = site.inputs
    if x.size < _WORTH and not isinstance(site.op, Relu):
        return False
    buffer = site.first.writes[0]
    out = site.output(buffer, last=follows_channels_last(site, buffer))
    try:
        primitive = eltwise_forward(found.algorithm, desc(x), desc(out), found.alpha, found.beta)
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.SRC: x}, {Arg.DST: out})
    return True


def relu_gradient(site: Site) -> bool:
    """dy where the result of the ReLU is positive."""
    if not isinstance(site.op, ReluGradient) or not computable(*site.inputs):
        return False
    y, dy = site.inputs
    buffer = site.first.writes[0]
    out = site.output(buffer, last=follows_channels_last(site, buffer))
    try:
        hint = eltwise_forward(Eltwise.RELU, desc(y), desc(y), training=True)
        primitive = eltwise_backward(
            Eltwise.RELU_FROM_RESULT, desc(out), desc(dy), desc(y), hint=hint
        )
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.DST: y, Arg.DIFF_DST: dy}, {Arg.DIFF_SRC: out})
    return True


def softmax(site: Site) -> bool:
    """Softmax along an axis."""
    op = site.op
    if not isinstance(op, Softmax) or not computable(*site.inputs):
        return False
    (x,) = site.inputs
    buffer = site.first.writes[0]
    out = site.output(buffer, last=follows_channels_last(site, buffer))
    try:
        primitive = softmax_forward(desc(x), desc(out), op.axis % len(x.shape))
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.SRC: x}, {Arg.DST: out})
    return True


def concatenation(site: Site) -> bool:
    """Operands side by side along an axis."""
    op = site.op
    if not isinstance(op, Concat) or not computable(*site.inputs) or len(site.inputs) < 2:
        return False
    buffer = site.first.writes[0]
    out = site.output(buffer, last=follows_channels_last(site, buffer))
    if out.size < _WORTH:
        return False
    try:
        primitive = concat([desc(t) for t in site.inputs], op.axis % len(out.shape), desc(out))
    except OneDNNError:
        return False
    reads = {multiple_source(i): t for i, t in enumerate(site.inputs)}
    site.primitive(primitive, reads, {Arg.DST: out})
    return True
