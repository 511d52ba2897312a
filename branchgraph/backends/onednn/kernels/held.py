"""Values that are held in another form than their type says, where all that read them know it.

    flattened   a reshape of planes to rows [N, C H W] stays [N, C, H, W] as it lies, for dense
                layers: oneDNN takes planes with weights [O, C, H, W]. Weights must be fixed, since
                they are packed for it; else copying the activations is cheaper
    narrow      a bfloat16 value cast to float32 stays bfloat16 for batch norm, which computes in
                float32 on either; its result does if it is cast back
    wide        float32 weights cast to bfloat16 stay float32 for layers, which convert them while
                they pack them; weight gradients that are cast to float32 are made in float32

The makers of the readers are told by the tensor's shape or dtype. What they cannot use so they
copy or convert themselves, so holding never fails.
"""

from __future__ import annotations

from collections.abc import Callable

from branchgraph.backends.onednn.kernels.common import (
    FLOATS,
    arranged,
    computable,
    copied,
)
from branchgraph.backends.onednn.plan import Site
from branchgraph.backends.onednn.tensors import row_major
from branchgraph.compiler.program import Instruction
from branchgraph.ir.op import Op
from branchgraph.ir.ops.conv import Conv, ConvTranspose
from branchgraph.ir.ops.elementwise import Cast
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.norm import BatchNormGradient, BatchNormInference, BatchNormTraining
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.types import DType


def only_read_by(site: Site, buffer: int, understands: Callable[[Instruction], bool]) -> bool:
    """Whether all that reads the value in `buffer` is in this part, and understands."""
    builder = site.builder
    readers = builder.readers(buffer)
    if not readers or buffer in builder.program.results:
        return False
    return all(any(r is i for i in builder.instructions) and understands(r) for r in readers)


def flattened(site: Site) -> bool:
    """A reshape that would move elements: held as it lies for dense layers, else copied."""
    if not isinstance(site.op, Reshape) or not computable(*site.inputs):
        return False
    (x,) = site.inputs
    buffer = site.first.writes[0]
    shape = site.shape(buffer)

    def understands(reader: Instruction) -> bool:
        if not isinstance(reader.op, Dense) or buffer in reader.reads[1:]:
            return False
        weight = site.builder.tensors.get(reader.reads[1])
        return weight is not None and site.builder.fixed(weight)

    rows = len(shape) == 2 and len(x.shape) > 2 and shape[0] == x.shape[0]
    if rows and only_read_by(site, buffer, understands):
        site.alias(buffer, arranged(site, x))
        return True
    out = site.output(buffer)
    copied(site, x, out.viewed(x.shape, row_major(x.shape)))
    return True


def cast(site: Site) -> bool:
    """A cast between the types that primitives compute in."""
    op = site.op
    if not isinstance(op, Cast) or not computable(*site.inputs):
        return False
    (x,) = site.inputs
    buffer = site.first.writes[0]
    if op.dtype is x.dtype:
        site.alias(buffer, x)
        return True
    if op.dtype not in FLOATS or not x.shape:
        return False
    narrow = x.dtype is DType.BF16
    understands = _normalises if narrow else _packs
    if only_read_by(site, buffer, lambda r: understands(r, buffer)):
        site.alias(buffer, x)
        return True
    out = site.output(buffer, last=x.channels_last and not x.row_major)
    copied(site, x, out)
    return True


def cast_back(site: Site, buffer: int, dtype: DType) -> bool:
    """Whether a value is only cast to `dtype`, so that it may be made in it."""
    return only_read_by(site, buffer, lambda r: isinstance(r.op, Cast) and r.op.dtype is dtype)


def _normalises(reader: Instruction, buffer: int) -> bool:
    """Whether batch norm reads `buffer` as activations or as their cotangent, and not as more."""
    places = _ACTIVATIONS.get(type(reader.op), ())
    return all(p in places for p, b in enumerate(reader.reads) if b == buffer)


_ACTIVATIONS: dict[type[Op], tuple[int, ...]] = {
    BatchNormTraining: (0,),
    BatchNormInference: (0,),
    BatchNormGradient: (0, 4),
}


def _packs(reader: Instruction, buffer: int) -> bool:
    """Whether a layer reads `buffer` as its weight, and as nothing else."""
    layer = isinstance(reader.op, (Conv, ConvTranspose, Dense))
    return layer and reader.reads[1] == buffer and reader.reads.count(buffer) == 1
