"""Sums and means along axes, and their way back, repetition.

oneDNN's own reduction is a reference implementation but along the innermost axis, so

    over planes          average pooling whose window is the plane; a sum is its mean times the size
    over all but the     the same, with all samples as one plane: x lies as [N H W, C]
      channels
    over rows of [N, C]  likewise
    over all but rows,   the reduction, on rows of the elements as they lie
      or over everything

A mean repeated over planes or samples is interpolation to the nearest of one cell.
"""

from __future__ import annotations

from math import prod

from branchgraph.backends.onednn.bindings import OneDNNError
from branchgraph.backends.onednn.kernels.common import arranged, computable, desc, plain
from branchgraph.backends.onednn.plan import Site
from branchgraph.backends.onednn.primitives import (
    Arg,
    Attributes,
    Eltwise,
    Pooling,
    Primitive,
    Reduction,
    Resampling,
    pooling_forward,
    reduction,
    resampling_forward,
)
from branchgraph.backends.onednn.tensors import Tensor, channels_last
from branchgraph.ir.ops.reduce import BroadcastTo, ReduceMean, ReduceSum

#: Elements from which a primitive beats NumPy, whose calls cost less.
_WORTH = 256


def reduced(site: Site) -> bool:
    """A sum or a mean."""
    op = site.op
    if not isinstance(op, (ReduceSum, ReduceMean)) or not computable(*site.inputs):
        return False
    (x,) = site.inputs
    rank, axes = len(x.shape), tuple(op.axes)
    mean = isinstance(op, ReduceMean)
    if x.size < _WORTH or not axes:
        return False
    if axes in (tuple(range(rank)), tuple(range(1, rank))):
        return _rows(site, x, axes[0], mean=mean)
    if rank > 2 and axes == tuple(range(2, rank)):
        batch, area = x.shape[0], prod(x.shape[2:])
    elif axes == (0, *range(2, rank)):
        batch, area = 1, x.size // x.shape[1]
    else:
        return False
    return _averaged(site, arranged(site, x), (batch, x.shape[1], area, 1), mean=mean)


def _averaged(site: Site, x: Tensor, shape: tuple[int, ...], *, mean: bool) -> bool:
    """Means or sums of the planes of `x` seen as `shape`."""
    n, c, area, _ = shape
    out = site.output(site.first.writes[0])
    small = (n, c, 1, 1)
    source = x.viewed(shape, channels_last(shape))
    target = out.viewed(small, channels_last(small))
    attributes = Attributes() if mean else Attributes().eltwise(Eltwise.LINEAR, float(area))
    try:
        primitive = pooling_forward(
            Pooling.AVERAGE_INCLUDE_PADDING, desc(source), desc(target), strides=(area, 1),
            kernel=(area, 1), dilates=(0, 0), pad_l=(0, 0), pad_r=(0, 0), attributes=attributes,
        )  # fmt: skip
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.SRC: source}, {Arg.DST: target})
    return True


def _rows(site: Site, x: Tensor, first: int, *, mean: bool) -> bool:
    """Sums or means of rows, or of everything (`first` is 0), in whatever order elements lie."""
    x = arranged(site, x) if first or not x.dense else x
    out = site.output(site.first.writes[0])
    rows = x.shape[0] if first else 1
    source, target = plain(x, (rows, x.size // rows)), plain(out, (rows, 1))
    algorithm = Reduction.MEAN if mean else Reduction.SUM
    try:
        primitive = reduction(algorithm, desc(source), desc(target))
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.SRC: source}, {Arg.DST: target})
    return True


def repeated(site: Site) -> bool:
    """One value a plane, or a channel, repeated over it."""
    op = site.op
    if not isinstance(op, BroadcastTo) or not computable(*site.inputs):
        return False
    (x,) = site.inputs
    buffer = site.first.writes[0]
    shape = site.shape(buffer)
    if len(x.shape) != len(shape) or len(shape) < 3 or prod(shape) < _WORTH:
        return False
    n, c, *size = shape
    if x.shape == (n, c, *(1,) * len(size)):
        batch = n
    elif x.shape == (1, c, *(1,) * len(size)):
        batch = 1
    else:
        return False
    out = site.output(buffer, last=True)
    small, large = (batch, c, 1, 1), (batch, c, out.size // (batch * c), 1)
    source = arranged(site, x).viewed(small, channels_last(small))
    target = out.viewed(large, channels_last(large))
    try:
        primitive: Primitive = resampling_forward(Resampling.NEAREST, desc(source), desc(target))
    except OneDNNError:
        return False
    site.primitive(primitive, {Arg.SRC: source}, {Arg.DST: target})
    return True
