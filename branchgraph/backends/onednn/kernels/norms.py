"""Batch norm over channels, with the ReLU behind it, and its gradient."""

from __future__ import annotations

from branchgraph.backends.onednn.kernels.common import computable, desc, post_ops
from branchgraph.backends.onednn.plan import Site
from branchgraph.backends.onednn.primitives import (
    Arg,
    Normalization,
    OneDNNError,
    batch_normalization_backward,
    batch_normalization_forward,
)
from branchgraph.ir.ops.norm import BatchNormGradient, BatchNormInference, BatchNormTraining

_AFFINE = Normalization.USE_SCALE | Normalization.USE_SHIFT


def training(site: Site) -> bool:
    """Batch norm by the statistics of the batch; a second member is the ReLU behind it."""
    op = site.op
    if not isinstance(op, BatchNormTraining) or not computable(*site.inputs):
        return False
    x, gamma, beta = site.inputs
    if len(x.shape) < 3 or not x.channels_last:
        return False
    _, mean, var = (site.output(b, last=True) for b in site.first.writes)
    out = site.output(site.last.writes[0], last=True)
    relu = len(site.cluster.members) > 1
    flags = _AFFINE | (Normalization.FUSE_NORM_RELU if relu else Normalization.NONE)
    try:
        primitive = batch_normalization_forward(desc(x), desc(out), op.eps, flags, training=True)
    except OneDNNError:
        return False
    writes = {Arg.DST: out, Arg.MEAN: mean, Arg.VARIANCE: var}
    if relu and primitive.workspace is not None:
        workspace = site.builder.opaque(primitive.workspace)
        writes[Arg.WORKSPACE] = workspace
        site.builder.left["norm", x, site.last.writes[0]] = workspace
    site.builder.hints["norm", x, relu] = primitive
    site.primitive(primitive, {Arg.SRC: x, Arg.SCALE: gamma, Arg.SHIFT: beta}, writes)
    return True


def gradient(site: Site) -> bool:
    """The gradient of `training`; the first of two members is the gradient of the ReLU."""
    relu = len(site.cluster.members) > 1
    op = site.last.op
    if not isinstance(op, BatchNormGradient) or not computable(*site.inputs):
        return False
    x, gamma, mean, var, dy = (site.builder.tensors.get(b) for b in site.last.reads)
    assert x is not None
    assert gamma is not None
    assert mean is not None
    assert var is not None
    workspace = None
    if relu:
        y, dy = (site.builder.tensors[b] for b in site.first.reads)
        workspace = site.builder.left.get(("norm", x, site.first.reads[0]))
        if workspace is None or site.last.reads[4] != site.first.writes[0] or y.shape != x.shape:
            return False
    assert dy is not None
    if len(x.shape) < 3 or not x.channels_last or not dy.channels_last:
        return False
    dx, dgamma, dbeta = (site.output(b, last=True) for b in site.last.writes)
    flags = _AFFINE | (Normalization.FUSE_NORM_RELU if relu else Normalization.NONE)
    try:
        hint = site.builder.hints.get(("norm", x, relu)) or batch_normalization_forward(
            desc(x), desc(dx), op.eps, flags, training=True
        )
        primitive = batch_normalization_backward(
            desc(dx), desc(dy), desc(x), op.eps, flags, hint=hint
        )
    except OneDNNError:
        return False
    reads = {Arg.SRC: x, Arg.MEAN: mean, Arg.VARIANCE: var, Arg.SCALE: gamma, Arg.DIFF_DST: dy}
    if workspace is not None:
        reads[Arg.WORKSPACE] = workspace
    site.primitive(
        primitive, reads, {Arg.DIFF_SRC: dx, Arg.DIFF_SCALE: dgamma, Arg.DIFF_SHIFT: dbeta}
    )
    return True


def inference(site: Site) -> bool:
    """Batch norm by given statistics, and ReLU."""
    op = site.op
    if not isinstance(op, BatchNormInference) or not computable(*site.inputs):
        return False
    x, gamma, beta, mean, var = (site.builder.tensors[b] for b in site.first.reads)
    appended = post_ops(site, site.cluster.members[1:], site.first.writes[0])
    if len(x.shape) < 3 or not x.channels_last or appended is None:
        return False
    attributes, operands = appended
    out = site.output(site.last.writes[0], last=True)
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
