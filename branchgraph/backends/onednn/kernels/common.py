"""What makers share: descriptors of tensors, copies into the order primitives want, post-ops.

Most primitives take nothing but dense tensors whose channels lie last; on strided ones (a slice of
channels) and on row-major ones they are refused, or several times slower. `arranged` copies those
first, which costs a reorder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from branchgraph.backends.onednn.bindings import OneDNNError
from branchgraph.backends.onednn.plan import Place, Site, Step
from branchgraph.backends.onednn.primitives import (
    Arg,
    Attributes,
    Binary,
    Desc,
    Eltwise,
    post_op_operand,
    reorder,
)
from branchgraph.backends.onednn.tensors import Shape, Tensor, dense, row_major
from branchgraph.compiler.program import Instruction
from branchgraph.ir.op import Op
from branchgraph.ir.ops import activation, elementwise, merge
from branchgraph.ir.types import DType

#: Element types that primitives compute in.
FLOATS = (DType.F32, DType.BF16)

_BINARY: dict[type[Op], Binary] = {
    elementwise.Add: Binary.ADD,
    elementwise.Multiply: Binary.MUL,
    merge.Sum: Binary.ADD,
    merge.Product: Binary.MUL,
}


@dataclass(frozen=True)
class Function:
    """An element-wise function of oneDNN and its parameters."""

    algorithm: Eltwise
    alpha: float = 0.0
    beta: float = 0.0


def function_of(op: Op) -> Function | None:
    """What computes an element-wise op of one operand.

    Left to NumPy are functions that pass over NaN (the exponential makes it infinity, clipping a
    bound), and the logarithm, which is slower here.
    """
    match op:
        case activation.Relu():
            return Function(Eltwise.RELU)
        case activation.LeakyRelu(slope=slope):
            return Function(Eltwise.RELU, slope)
        case activation.Elu(alpha=alpha):
            return Function(Eltwise.ELU, alpha)
        case activation.Sigmoid():
            return Function(Eltwise.LOGISTIC)
        case activation.Tanh():
            return Function(Eltwise.TANH)
        case elementwise.Negate():
            return Function(Eltwise.LINEAR, -1.0)
        case elementwise.Absolute():
            return Function(Eltwise.ABS)
        case elementwise.Sqrt():
            return Function(Eltwise.SQRT)
    return None


def binary_of(op: Op) -> Binary | None:
    """What computes an element-wise op of several operands in any order."""
    return _BINARY.get(type(op))


def epilogue(instruction: Instruction) -> bool:
    """Whether kernels can append this element-wise instruction to what comes before it."""
    if instruction.types[0].dtype not in FLOATS:
        return False
    return function_of(instruction.op) is not None or binary_of(instruction.op) is not None


def fpmath(site: Site) -> str:
    """The arithmetic that float32 products may use; `strict` unless the runner was told."""
    return site.builder.fpmath


# -- tensors -----------------------------------------------------------------------------------


def desc(tensor: Tensor) -> Desc:
    """The descriptor of a tensor where it lies; a number is a vector of one.

    Strides of single elements are those of the order the tensor lies in: with others oneDNN 3.2
    takes a gradient of 1x1 planes for a mixture of orders, and its product of matrices for that
    (`x64:gemm:jit`) writes wrong values, and beyond its buffers.
    """
    if not tensor.shape:
        return Desc.strided((1,), tensor.dtype)
    if tensor.channels_last:
        return Desc.channels_last(tensor.shape, tensor.dtype)
    if tensor.row_major:
        return Desc.strided(tensor.shape, tensor.dtype)
    return Desc.strided(tensor.shape, tensor.dtype, tensor.strides)


def computable(*tensors: Tensor) -> bool:
    """Whether primitives can work on all of `tensors`: their type, and something to do."""
    return all(t.dtype in FLOATS and t.size > 0 for t in tensors)


def lies(tensor: Tensor, *, last: bool = True) -> bool:
    """Whether a tensor is dense, with its channels last (where it has planes) or row-major."""
    return tensor.channels_last if last and len(tensor.shape) > 2 else tensor.row_major


def arranged(site: Site, tensor: Tensor, *, last: bool = True) -> Tensor:
    """`tensor`, copied if it does not lie so; what was copied before is not copied again.

    Strides of single elements are set to those of the order, since oneDNN compares them.
    """
    if lies(tensor, last=last):
        standard = dense(tensor.buffer, tensor.shape, tensor.dtype, last=last)
        return tensor.viewed(tensor.shape, standard.strides)

    def make() -> Tensor:
        return copied(site, tensor, temporary(site, tensor.shape, tensor.dtype, last=last))

    return site.builder.copy(tensor, last, make)


def widened(site: Site, tensor: Tensor) -> Tensor:
    """`tensor` in float32."""
    if tensor.dtype is DType.F32:
        return tensor
    wide = temporary(site, tensor.shape, DType.F32)
    return copied(site, tensor, replace(wide, strides=tensor.strides) if tensor.dense else wide)


def temporary(site: Site, shape: Shape, dtype: DType, *, last: bool = True) -> Tensor:
    """A tensor in memory of its own, which lives as long as kernels touch it."""
    made = dense(0, shape, dtype, last=last)
    return replace(made, buffer=site.builder.temporary(made.nbytes))


def copied(site: Site, source: Tensor, target: Tensor) -> Tensor:
    """A kernel that puts the elements of `source` into `target`, which is of equal shape."""
    try:
        primitive = reorder(desc(source), desc(target))
    except OneDNNError:

        def emit(place: Place) -> list[Step]:
            return [(np.copyto, (place.array(target), place.array(source)), None)]

        site.add("numpy copy", [source.buffer], [target.buffer], emit)
    else:
        site.primitive(primitive, {Arg.SRC: source}, {Arg.DST: target})
    return target


def ranked(tensor: Tensor, rank: int) -> Tensor | None:
    """`tensor` with leading axes of size 1 up to `rank`."""
    missing = rank - len(tensor.shape)
    if missing < 0:
        return None
    step = max(tensor.size, 1)
    return tensor.viewed((1,) * missing + tensor.shape, (step,) * missing + tensor.strides)


def plain(tensor: Tensor, shape: Shape) -> Tensor:
    """A dense tensor as a row-major one of another shape, its elements in the order they lie."""
    return tensor.viewed(shape, row_major(shape))


def replaceable(
    out: Tensor, operands: Iterable[Tensor], reads: Iterable[int]
) -> list[tuple[int, int]]:
    """(result, operand) for operands that lie as the result does.

    `reads` are the buffers of all operands of a kernel that reads an element of `operands` before
    it writes that of `out`, and no other later; what is read in another way as well is left out.
    """
    count = Counter(reads)
    place = (out.shape, out.strides, out.dtype, 0)
    return [
        (out.buffer, t.buffer)
        for t in operands
        if count[t.buffer] == 1 and out.offset == 0
        and (t.shape, t.strides, t.dtype, t.offset) == place
    ]  # fmt: skip


# -- post-ops ----------------------------------------------------------------------------------


def post_ops(
    site: Site, members: Sequence[Instruction], value: int, *,
    start: Attributes | None = None, last: bool = True,
) -> tuple[Attributes, dict[int, Tensor]] | None:  # fmt: skip
    """Post-ops for `members`, the first of which reads `value`, and the operands they read.

    They follow those of `start`; the result lies channels last or not.
    """
    attributes = Attributes() if start is None else start
    operands: dict[int, Tensor] = {}
    rank = len(site.shape(value))
    for member in members:
        function = function_of(member.op)
        if function is not None:
            attributes = attributes.eltwise(function.algorithm, function.alpha, function.beta)
            value = member.writes[0]
            continue
        algorithm = binary_of(member.op)
        if algorithm is None:
            return None
        for buffer in member.reads:
            if buffer == value:
                continue
            other = ranked(site.builder.tensors[buffer], rank)
            if other is None or not computable(other):
                return None
            other = arranged(site, other, last=last)
            operands[post_op_operand(len(attributes.post_ops))] = other
            attributes = attributes.binary(algorithm, desc(other))
        value = member.writes[0]
    return attributes, operands
