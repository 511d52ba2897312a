"""Pooling over windows, its gradient, and means over whole planes."""

from __future__ import annotations

from typing import Any

from branchgraph.backends.onednn.kernels.common import computable, desc
from branchgraph.backends.onednn.plan import Site
from branchgraph.backends.onednn.primitives import (
    Arg,
    OneDNNError,
    Pooling,
    Primitive,
    pooling_backward,
    pooling_forward,
)
from branchgraph.backends.onednn.tensors import Tensor, channels_last
from branchgraph.ir.ops.pool import (
    AveragePool,
    AveragePoolGradient,
    MaxPool,
    MaxPoolIndex,
    ScatterPooled,
)
from branchgraph.ir.ops.reduce import ReduceMean

_DIVISORS = {
    "kernel": Pooling.AVERAGE_INCLUDE_PADDING,
    "inside": Pooling.AVERAGE_EXCLUDE_PADDING,
}


def maximum(site: Site) -> bool:
    """Max pooling; it keeps where the maxima are if their gradient is asked for."""
    op = site.op
    if not isinstance(op, MaxPool) or not computable(*site.inputs):
        return False
    (x,) = site.inputs
    if not x.channels_last:
        return False
    out = site.output(site.first.writes[0], last=True)
    differentiated = any(
        isinstance(r.op, MaxPoolIndex) and _geometry(r.op) == _geometry(op)
        for r in site.builder.readers(site.first.reads[0])
    )
    primitive = _pooled(Pooling.MAX, op, x, out, training=differentiated)
    if primitive is None:
        return False
    writes = {Arg.DST: out}
    if differentiated and primitive.workspace is not None:
        workspace = site.builder.opaque(primitive.workspace)
        writes[Arg.WORKSPACE] = workspace
        site.builder.left["pool", site.first.reads[0], _geometry(op)] = workspace
        site.builder.hints["pool", site.first.reads[0], _geometry(op)] = primitive
    site.primitive(primitive, {Arg.SRC: x}, writes)
    return True


def maximum_gradient(site: Site) -> bool:
    """Positions of maxima and the gradient put there: the gradient of max pooling."""
    index, scattered = site.cluster.members
    op = site.op
    if not isinstance(op, MaxPoolIndex) or not isinstance(scattered.op, ScatterPooled):
        return False
    key = ("pool", index.reads[0], _geometry(op))
    workspace, hint = site.builder.left.get(key), site.builder.hints.get(key)
    x = site.builder.tensors[index.reads[0]]
    dy = site.builder.tensors[scattered.reads[0]]
    buffer = scattered.writes[0]
    if workspace is None or hint is None or scattered.reads[1] != index.writes[0]:
        return False
    if not computable(x, dy) or not dy.channels_last or site.shape(buffer) != x.shape:
        return False
    dx = site.output(buffer, last=True)
    try:
        primitive = pooling_backward(
            Pooling.MAX, desc(dx), desc(dy), **_window(op, x.shape, dy.shape), hint=hint
        )
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.DIFF_DST: dy, Arg.WORKSPACE: workspace}, {Arg.DIFF_SRC: dx})
    return True


def average(site: Site) -> bool:
    """Average pooling."""
    op = site.op
    if not isinstance(op, AveragePool) or not computable(*site.inputs):
        return False
    (x,) = site.inputs
    if op.divisor not in _DIVISORS or not x.channels_last:
        return False
    out = site.output(site.first.writes[0], last=True)
    primitive = _pooled(_DIVISORS[op.divisor], op, x, out)
    if primitive is None:
        return False
    site.primitive(primitive, {Arg.SRC: x}, {Arg.DST: out})
    return True


def average_gradient(site: Site) -> bool:
    """The gradient of average pooling."""
    op = site.op
    if not isinstance(op, AveragePoolGradient) or not computable(*site.inputs):
        return False
    (dy,) = site.inputs
    if op.divisor not in _DIVISORS or not dy.channels_last:
        return False
    dx = site.output(site.first.writes[0], last=True)
    algorithm = _DIVISORS[op.divisor]
    hint = _pooled(algorithm, op, dx, dy, training=True)
    if hint is None:
        return False
    try:
        primitive = pooling_backward(
            algorithm, desc(dx), desc(dy), **_window(op, dx.shape, dy.shape), hint=hint
        )
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.DIFF_DST: dy}, {Arg.DIFF_SRC: dx})
    return True


def plane_mean(site: Site) -> bool:
    """The mean of every plane, as a pooling whose window is the plane."""
    op = site.op
    if not isinstance(op, ReduceMean) or not computable(*site.inputs):
        return False
    (x,) = site.inputs
    rank = len(x.shape)
    if rank < 3 or tuple(op.axes) != tuple(range(2, rank)) or not x.channels_last:
        return False
    out = site.output(site.first.writes[0])
    shape = (*x.shape[:2], *(1,) * (rank - 2))
    pooled = out.viewed(shape, channels_last(shape))
    window = x.shape[2:]
    none = (0,) * len(window)
    try:
        primitive = pooling_forward(
            Pooling.AVERAGE_EXCLUDE_PADDING, desc(x), desc(pooled),
            strides=window, kernel=window, dilates=none, pad_l=none, pad_r=none,
        )  # fmt: skip
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.SRC: x}, {Arg.DST: pooled})
    return True


def _geometry(op: Any) -> tuple[Any, ...]:
    return (op.kernel, op.stride, op.pad, op.cover_all)


def _pooled(
    algorithm: Pooling, op: Any, x: Tensor, out: Tensor, *, training: bool = False
) -> Primitive | None:
    if not computable(x, out):
        return None
    try:
        return pooling_forward(
            algorithm, desc(x), desc(out), **_window(op, x.shape, out.shape), training=training
        )
    except OneDNNError:
        return None


def _window(op: Any, size: tuple[int, ...], out: tuple[int, ...]) -> dict[str, Any]:
    """Geometry for oneDNN, with trailing pads that reach exactly to the last window."""
    n = len(op.kernel)
    ends = [
        (out[2 + a] - 1) * op.stride[a] + op.kernel[a] - size[2 + a] - op.pad[a] for a in range(n)
    ]
    return {
        "strides": op.stride,
        "kernel": op.kernel,
        "dilates": (0,) * n,
        "pad_l": op.pad[:n],
        "pad_r": tuple(ends),
    }
