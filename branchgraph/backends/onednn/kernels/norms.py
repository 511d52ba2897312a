"""Batch norm over channels, with the ReLU behind it, its gradient, and response norm.

Activations may be bfloat16 where the graph has float32 (see `held`); statistics, scale and shift
are float32 throughout, and what is between them is computed in float32 either way.

oneDNN divides the alpha of response norm by the window's size,

    y[c] = x[c] / (k + alpha' / size sum_{|j - c| <= half} x[j]^2)^beta

so alpha' = alpha size with size = 2 half + 1.
"""

from __future__ import annotations

from typing import Any

from branchgraph.backends.onednn.bindings import OneDNNError
from branchgraph.backends.onednn.kernels.common import (
    arranged,
    computable,
    desc,
    post_ops,
    replaceable,
    temporary,
    widened,
)
from branchgraph.backends.onednn.kernels.held import cast_back
from branchgraph.backends.onednn.plan import Forward, Origin, Site
from branchgraph.backends.onednn.primitives import (
    Arg,
    Normalization,
    batch_normalization_backward,
    batch_normalization_forward,
    lrn_backward,
    lrn_forward,
)
from branchgraph.backends.onednn.tensors import Tensor
from branchgraph.ir.ops.norm import (
    BatchNormGradient,
    BatchNormInference,
    BatchNormTraining,
    LocalResponseNorm,
    LocalResponseNormGradient,
)
from branchgraph.ir.types import DType

_AFFINE = Normalization.USE_SCALE | Normalization.USE_SHIFT


def training(site: Site) -> bool:
    """Batch norm by the statistics of the batch; a second member is the ReLU behind it."""
    op = site.op
    if not isinstance(op, BatchNormTraining) or not _supported(*site.inputs):
        return False
    given, gamma, beta = site.inputs
    _, mean, var = (site.output(b, last=True) for b in site.first.writes)
    relu = len(site.cluster.members) > 1
    x, out = _activations(site, given, site.last.writes[0])
    flags = _AFFINE | (Normalization.FUSE_NORM_RELU if relu else Normalization.NONE)
    try:
        primitive = batch_normalization_forward(desc(x), desc(out), op.eps, flags, training=True)
    except OneDNNError:
        return False
    writes = {Arg.DST: out, Arg.MEAN: mean, Arg.VARIANCE: var}
    workspace = None
    if relu and primitive.workspace is not None:
        workspace = writes[Arg.WORKSPACE] = site.builder.opaque(primitive.workspace)
    rectified = (site.last.writes[0],) if relu else ()
    origin = Origin("norm", site.first.reads[0], rectified)
    site.builder.forward[origin] = Forward(primitive, workspace)
    site.primitive(primitive, {Arg.SRC: x, Arg.SCALE: gamma, Arg.SHIFT: beta}, writes)
    return True


def gradient(site: Site) -> bool:
    """The gradient of `training`; the first of two members is the gradient of the ReLU."""
    relu = len(site.cluster.members) > 1
    op = site.last.op
    if not isinstance(op, BatchNormGradient):
        return False
    tensors = site.builder.tensors
    x, gamma, mean, var = (tensors[b] for b in site.last.reads[:4])
    given = site.last.reads[4]
    rectified = (site.first.reads[0],) if relu else ()
    forward = site.builder.forward.get(Origin("norm", site.last.reads[0], rectified))
    workspace = forward.workspace if forward is not None else None
    if relu:
        if workspace is None or given != site.first.writes[0]:
            return False
        given = site.first.reads[1]
    dy = tensors[given]
    if not _supported(x, gamma, mean, var) or not computable(dy):
        return False
    dx_buffer, *sums = site.last.writes
    if x.dtype is not dy.dtype or not _keeps(site, x, dx_buffer):
        x, dy = widened(site, x), widened(site, dy)
    x, dy = arranged(site, x), arranged(site, dy)
    _, dx = _activations(site, x, dx_buffer)
    dgamma, dbeta = (site.output(b) for b in sums)
    flags = _AFFINE | (Normalization.FUSE_NORM_RELU if relu else Normalization.NONE)
    try:
        hint = None if forward is None else forward.primitive
        if hint is None or hint.desc("src").dtype is not x.dtype:
            hint = batch_normalization_forward(desc(x), desc(dx), op.eps, flags, training=True)
        primitive = batch_normalization_backward(
            desc(dx), desc(dy), desc(x), op.eps, flags, hint=hint
        )
    except OneDNNError:
        return False
    reads = {Arg.SRC: x, Arg.MEAN: mean, Arg.VARIANCE: var, Arg.SCALE: gamma, Arg.DIFF_DST: dy}
    if workspace is not None:
        reads[Arg.WORKSPACE] = workspace
    writes = {Arg.DIFF_SRC: dx, Arg.DIFF_SCALE: dgamma, Arg.DIFF_SHIFT: dbeta}
    over = replaceable(dx, [dy], (t.buffer for t in reads.values()))
    site.primitive(primitive, reads, writes, over)
    return True


def inference(site: Site) -> bool:
    """Batch norm by given statistics, and what follows."""
    op = site.op
    if not isinstance(op, BatchNormInference):
        return False
    given, gamma, beta, mean, var = (site.builder.tensors[b] for b in site.first.reads)
    if not _supported(given, gamma, beta, mean, var):
        return False
    appended = post_ops(site, site.cluster.members[1:], site.first.writes[0])
    if appended is None:
        return False
    attributes, operands = appended
    x, out = _activations(site, given, site.last.writes[0])
    flags = _AFFINE | Normalization.USE_GLOBAL_STATS
    try:
        primitive = batch_normalization_forward(
            desc(x), desc(out), op.eps, flags, attributes=attributes
        )
    except OneDNNError:
        return False
    reads = {
        Arg.SRC: x, Arg.SCALE: gamma, Arg.SHIFT: beta, Arg.MEAN: mean, Arg.VARIANCE: var,
        **operands,
    }  # fmt: skip
    site.primitive(primitive, reads, {Arg.DST: out})
    return True


def _supported(x: Tensor, *vectors: Tensor) -> bool:
    """Whether batch norm takes these: its vectors are float32."""
    return computable(x, *vectors) and all(v.dtype is DType.F32 for v in vectors)


def _activations(site: Site, x: Tensor, buffer: int) -> tuple[Tensor, Tensor]:
    """The operand and the result: in bfloat16 if the one is and the other is cast to it."""
    out = site.output(buffer, last=True)
    if _keeps(site, x, buffer):
        if x.dtype is not out.dtype:
            out = site.builder.place(buffer, temporary(site, out.shape, x.dtype))
    else:
        x = widened(site, x)
    return arranged(site, x), out


def _keeps(site: Site, x: Tensor, buffer: int) -> bool:
    """Whether a result may have the type of `x`."""
    return x.dtype is site.builder.dtype(buffer) or cast_back(site, buffer, x.dtype)


# -- response norm -----------------------------------------------------------------------------


def response(site: Site) -> bool:
    """Local response norm."""
    op = site.op
    if not isinstance(op, LocalResponseNorm) or not computable(*site.inputs):
        return False
    if len(site.inputs[0].shape) != 4:
        return False
    x = arranged(site, site.inputs[0])
    out = site.output(site.first.writes[0], last=True)
    differentiated = any(
        isinstance(r.op, LocalResponseNormGradient) and _window(r.op) == _window(op)
        for r in site.builder.readers(site.first.reads[0])
    )
    try:
        primitive = lrn_forward(desc(x), desc(out), **_window(op), training=differentiated)
    except OneDNNError:
        return False
    writes = {Arg.DST: out}
    if primitive.workspace is not None:
        writes[Arg.WORKSPACE] = site.builder.opaque(primitive.workspace)
        site.builder.forward[_origin(site)] = Forward(primitive, writes[Arg.WORKSPACE])
    site.primitive(primitive, {Arg.SRC: x}, writes)
    return True


def response_gradient(site: Site) -> bool:
    """The gradient of local response norm."""
    op = site.op
    if not isinstance(op, LocalResponseNormGradient) or not computable(*site.inputs):
        return False
    if len(site.inputs[0].shape) != 4:
        return False
    x, dy = (arranged(site, t) for t in site.inputs)
    dx = site.output(site.first.writes[0], last=True)
    forward = site.builder.forward.get(_origin(site))
    try:
        hint = None if forward is None else forward.primitive
        hint = hint or lrn_forward(desc(x), desc(x), **_window(op), training=True)
        primitive = lrn_backward(desc(dx), desc(dy), desc(x), **_window(op), hint=hint)
    except OneDNNError:
        return False
    reads = {Arg.SRC: x, Arg.DIFF_DST: dy}
    if primitive.workspace is not None:
        if forward is None or forward.workspace is None:
            return False
        reads[Arg.WORKSPACE] = forward.workspace
    site.primitive(primitive, reads, {Arg.DIFF_SRC: dx})
    return True


def _origin(site: Site) -> Origin:
    """Response norm, and its gradient, by the operand and the window."""
    return Origin("lrn", site.first.reads[0], tuple(_window(site.op).values()))


def _window(op: Any) -> dict[str, Any]:
    size = 2 * (op.size // 2) + 1
    return {"size": size, "alpha": op.alpha * size, "beta": op.beta, "k": op.k}
