"""Pooling over windows, and its gradient."""

from __future__ import annotations

from typing import Any

from branchgraph.backends.onednn.bindings import OneDNNError
from branchgraph.backends.onednn.kernels.common import arranged, computable, desc
from branchgraph.backends.onednn.kernels.held import only_read_by
from branchgraph.backends.onednn.plan import Forward, Origin, Site
from branchgraph.backends.onednn.primitives import (
    Arg,
    Pooling,
    Primitive,
    pooling_backward,
    pooling_forward,
)
from branchgraph.backends.onednn.tensors import Tensor, dense
from branchgraph.compiler.program import Instruction
from branchgraph.ir.ops.pool import (
    AveragePool,
    AveragePoolGradient,
    MaxPool,
    MaxPoolIndex,
    ScatterPooled,
)

_DIVISORS = {
    "kernel": Pooling.AVERAGE_INCLUDE_PADDING,
    "inside": Pooling.AVERAGE_EXCLUDE_PADDING,
}


def maximum(site: Site) -> bool:
    """Max pooling; it keeps where the maxima are if their gradient is asked for."""
    op = site.op
    if not isinstance(op, MaxPool) or not computable(*site.inputs):
        return False
    x = arranged(site, site.inputs[0])
    out = site.output(site.first.writes[0], last=True)
    if _beside(op, x.shape, out.shape):
        return False
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
        site.builder.forward[_origin(site)] = Forward(primitive, workspace)
    site.primitive(primitive, {Arg.SRC: x}, writes)
    return True


def positions(site: Site) -> bool:
    """Where the maxima are: nothing to do if pooling has kept it for all that ask."""
    op = site.op
    if not isinstance(op, MaxPoolIndex) or not computable(*site.inputs):
        return False
    forward = site.builder.forward.get(_origin(site))
    (x,) = site.inputs
    buffer = site.first.writes[0]
    shape = site.shape(buffer)

    def scatters(reader: Instruction) -> bool:
        return isinstance(reader.op, ScatterPooled) and site.shape(reader.writes[0]) == x.shape

    if forward is None or forward.workspace is None or not only_read_by(site, buffer, scatters):
        return False
    dx, dy = (desc(dense(0, t, site.inputs[0].dtype, last=True)) for t in (x.shape, shape))
    try:
        window = _window(op, x.shape, shape)
        primitive = pooling_backward(Pooling.MAX, dx, dy, **window, hint=forward.primitive)
    except OneDNNError:
        return False
    site.builder.scatters[buffer] = primitive
    site.alias(buffer, forward.workspace)
    return True


def scattered(site: Site) -> bool:
    """Gradients put where the maxima were: the gradient of max pooling."""
    if not isinstance(site.op, ScatterPooled):
        return False
    primitive = site.builder.scatters.get(site.first.reads[1])
    if primitive is None:
        return False
    dy, workspace = site.inputs
    dy = arranged(site, dy)
    dx = site.output(site.first.writes[0], last=True)
    site.primitive(primitive, {Arg.DIFF_DST: dy, Arg.WORKSPACE: workspace}, {Arg.DIFF_SRC: dx})
    return True


def average(site: Site) -> bool:
    """Average pooling, or the sums of windows."""
    op = site.op
    if not isinstance(op, AveragePool) or not computable(*site.inputs):
        return False
    x = arranged(site, site.inputs[0])
    out = site.output(site.first.writes[0], last=True)
    algorithm = _DIVISORS.get(op.divisor)
    if algorithm is None or _beside(op, x.shape, out.shape):
        return False
    primitive = _pooled(algorithm, op, x, out)
    if primitive is None:
        return False
    site.primitive(primitive, {Arg.SRC: x}, {Arg.DST: out})
    return True


def average_gradient(site: Site) -> bool:
    """The gradient of average pooling."""
    op = site.op
    if not isinstance(op, AveragePoolGradient) or not computable(*site.inputs):
        return False
    dy = arranged(site, site.inputs[0])
    dx = site.output(site.first.writes[0], last=True)
    algorithm = _DIVISORS.get(op.divisor)
    if algorithm is None or _beside(op, dx.shape, dy.shape):
        return False
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


def _origin(site: Site) -> Origin:
    """Max pooling, and the positions of its maxima, by the operand and the windows."""
    return Origin("max_pool", site.first.reads[0], _geometry(site.op))


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


def _beside(op: Any, size: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """Whether a window lies outside the planes altogether, where oneDNN and NumPy differ."""
    ends = ((o - 1) * s - p for o, s, p in zip(out[2:], op.stride, op.pad))
    starts = (k - p for k, p in zip(op.kernel, op.pad))
    return any(e >= d for e, d in zip(ends, size[2:])) or any(s <= 0 for s in starts)


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
