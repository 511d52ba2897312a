"""3x3 convolutions of stride 1, and both gradients, by generated kernels (`codegen.winograd`).

They are taken where their products of matrices, the transforms, and reading the weights, which
become four times as large, take less time than the sums of the convolution, for which oneDNN needs
almost exactly one multiplication of vectors a cycle. The estimate counts cycles of one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import Any

from branchgraph.backends.onednn import library
from branchgraph.backends.onednn.kernels.common import arranged, fpmath, replaceable
from branchgraph.backends.onednn.plan import Place, Site, Step
from branchgraph.backends.onednn.tensors import Tensor
from branchgraph.codegen import engine, winograd
from branchgraph.codegen.winograd import PATCH, Geometry
from branchgraph.ir.ops.activation import Relu, ReluGradient
from branchgraph.ir.ops.conv import Conv, ConvTranspose, ConvWeightGradient
from branchgraph.ir.ops.elementwise import Add
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.types import DType

_POINTS = PATCH * PATCH
#: Cycles to transform a vector of one of the 36 points, there or back.
_TRANSFORM = 5
#: Bytes of weights that arrive in a cycle from the second-level cache, and from beyond it.
_NEAR, _FAR, _NEAR_BYTES = 32, 4, 1_000_000
#: Bytes of transformed weights that are written in a cycle.
_PACKED = 9
#: What share of the convolution's time must be left over.
_GAIN = 0.9


def convolution(site: Site) -> bool:
    """A convolution, its bias, sums and ReLUs behind it."""
    op = site.op
    if not isinstance(op, Conv):
        return False
    x, weight, *bias = (site.builder.tensors[b] for b in site.first.reads)
    appended = _epilogue(site)
    geometry = _geometry(site, op, x.shape, site.shape(site.first.writes[0]))
    if (
        appended is None
        or geometry is None
        or not _pays(geometry, x.shape[0], _packing(site, geometry, weight))
    ):
        return False
    if not _floats(x, weight, *bias, *appended[1]) or not weight.row_major:
        return False
    names, operands = appended
    x = arranged(site, x)
    operands = [arranged(site, t) for t in operands]
    out = site.output(site.last.writes[0], last=True)
    packed = _packed(site, weight, geometry, turned=False)
    _run(site, geometry, names, [x, packed], out, bias, operands)
    return True


def data_gradient(site: Site) -> bool:
    """The gradient in the input: a convolution with the weights turned and transposed.

    Other gradients are added to it, and it goes back through a ReLU, as members behind it say.
    """
    op = site.op
    appended = _epilogue(site)
    if not isinstance(op, ConvTranspose) or appended is None:
        return False
    names, operands = appended
    dy, weight = (site.builder.tensors[b] for b in site.first.reads)
    shape = site.shape(site.first.writes[0])
    direct = _geometry(site, op, shape, dy.shape)
    if direct is None or not _floats(dy, weight, *operands) or not weight.row_major:
        return False
    pad = (2 - direct.pad[0], 2 - direct.pad[1])
    geometry = Geometry(direct.filters, direct.channels, direct.out, direct.size, pad, direct.lanes)
    if not _pays(geometry, dy.shape[0], _packing(site, geometry, weight)):
        return False
    dy = arranged(site, dy)
    operands = [arranged(site, t) for t in operands]
    out = site.output(site.last.writes[0], last=True)
    packed = _packed(site, weight, geometry, turned=True)
    _run(site, geometry, names, [dy, packed], out, [], operands)
    return True


def weight_gradient(site: Site) -> bool:
    """The gradient in the weights; each thread sums over its tiles, then they are added up."""
    op = site.op
    if not isinstance(op, ConvWeightGradient):
        return False
    x, dy = site.inputs
    geometry = _geometry(site, op, x.shape, dy.shape)
    if geometry is None or not _floats(x, dy) or not _pays(geometry, x.shape[0], sums=True):
        return False
    buffer = site.first.writes[0]
    if site.builder.dtype(buffer) is not DType.F32:
        return False
    x, dy, out = arranged(site, x), arranged(site, dy), site.output(buffer)
    images, threads = x.shape[0], library.threads()
    work = winograd.work(geometry, images, threads)
    sums = site.builder.temporary(work.sums(geometry))
    scratch = site.builder.temporary(work.scratch(geometry))
    routine = engine.made(winograd.weight_gradient, geometry, work)

    def emit(place: Place) -> list[Step]:
        at = place.address
        return [routine.call([at(x), at(dy), at(out), at(sums), at(scratch), images], threads)]

    site.add("llvm winograd", [x.buffer, dy.buffer], [out.buffer, sums, scratch], emit)
    return True


def _run(
    site: Site, geometry: Geometry, epilogue: Sequence[str], reads: Sequence[Tensor], out: Tensor,
    bias: Sequence[Tensor], operands: Sequence[Tensor],
) -> None:  # fmt: skip
    """A kernel of `winograd.forward`: `reads` are activations and packed weights."""
    images, threads = out.shape[0], library.threads()
    work = winograd.work(geometry, images, threads)
    scratch = site.builder.temporary(work.scratch(geometry))
    routine = engine.made(winograd.forward, geometry, work, bool(bias), tuple(epilogue))

    def emit(place: Place) -> list[Step]:
        at = place.address
        added = map(at, (*bias, *operands))
        return [routine.call([*map(at, reads), at(out), at(scratch), images, *added], threads)]

    touched = [t.buffer for t in (*reads, *bias, *operands)]
    over = replaceable(out, operands, touched)
    site.add("llvm winograd", touched, [out.buffer, scratch], emit, over)


def _packed(site: Site, weight: Tensor, geometry: Geometry, *, turned: bool) -> Tensor:
    """The transformed weights."""

    def fill(target: Tensor) -> None:
        threads = library.threads()
        routine = engine.made(winograd.pack, geometry, turned, improved=False)

        def emit(place: Place) -> list[Step]:
            return [routine.call([place.address(weight), place.address(target)], threads)]

        site.add("pack llvm winograd", [weight.buffer], [target.buffer], emit)

    form = ("winograd", turned)
    return site.builder.prepared(weight, form, geometry.packed, fill)


def _epilogue(site: Site) -> tuple[list[str], list[Tensor]] | None:
    """What the members behind the first do, and the tensors they read beside its value."""
    names: list[str] = []
    operands: list[Tensor] = []
    value = site.first.writes[0]
    shape = site.shape(value)
    for member in site.cluster.members[1:]:
        if isinstance(member.op, Relu):
            names.append("relu")
        elif isinstance(member.op, ReluGradient) and member.reads[0] != value:
            names.append("mask")
            operands.append(site.builder.tensors[member.reads[0]])
        elif isinstance(member.op, (Add, Sum)) and member.reads.count(value) == 1:
            others = [site.builder.tensors[b] for b in member.reads if b != value]
            names += ["add"] * len(others)
            operands += others
        else:
            return None
        value = member.writes[0]
    return (names, operands) if all(t.shape == shape for t in operands) else None


def _geometry(site: Site, op: Any, size: Sequence[int], out: Sequence[int]) -> Geometry | None:
    """The convolution [N, C, H, W] to [N, K, H', W'], if it is one of those here."""
    if len(size) != 4 or fpmath(site) != "strict" or engine.missing():
        return None
    if op.groups != 1 or (*op.stride, *op.dilation) != (1, 1, 1, 1):
        return None
    kernel = [(s + b + e) - o + 1 for s, b, e, o in zip(size[2:], op.begin, op.end, out[2:])]
    if kernel != [3, 3] or not all(0 <= b <= 2 for b in op.begin) or 0 in (*size, *out):
        return None
    (height, width), (down, across), (top, left) = size[2:], out[2:], op.begin
    return Geometry(size[1], out[1], (height, width), (down, across), (top, left), engine.lanes())


def _packing(site: Site, geometry: Geometry, weight: Tensor) -> float:
    """Cycles of a run that transforming the weights takes."""
    return 0.0 if site.builder.fixed(weight) else geometry.packed / _PACKED / library.threads()


def _pays(geometry: Geometry, images: int, packing: float = 0.0, *, sums: bool = False) -> bool:
    """Whether it takes less time than the sums; `sums`: for the gradient in the weights."""
    g, threads = geometry, library.threads()
    work = winograd.work(g, images, threads)
    channels, filters = g.padded(g.channels) // g.lanes, g.padded(g.filters) // g.lanes
    direct = images * prod(g.out) * 9 * g.channels * filters / threads
    tiles = images * g.tiles
    if work.together:
        rows = tiles if sums else ceil(tiles / work.rows) * work.rows
        products = ceil(_POINTS / threads) * rows * g.channels * filters
        tiles, moved = ceil(tiles / threads), g.packed * (2 if sums else 1) / threads
    else:
        tiles = ceil(tiles / threads)
        products = tiles * _POINTS * g.channels * filters
        moved = g.packed * ceil(tiles / work.block) * (2 if sums else 1)
    transforms = tiles * _POINTS * (channels + filters) * _TRANSFORM
    weights = moved / (_NEAR if g.packed < _NEAR_BYTES else _FAR)
    return products + transforms + weights + packing < _GAIN * direct


def _floats(*tensors: Tensor) -> bool:
    return all(t.dtype is DType.F32 and t.size for t in tensors)


__all__ = ["convolution", "data_gradient", "weight_gradient"]
