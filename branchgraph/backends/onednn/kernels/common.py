"""What makers share: descriptors of tensors, and post-ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from branchgraph.backends.onednn.plan import Site
from branchgraph.backends.onednn.primitives import (
    Attributes,
    Binary,
    Desc,
    Eltwise,
    post_op_operand,
)
from branchgraph.backends.onednn.tensors import Tensor
from branchgraph.compiler.program import Instruction
from branchgraph.ir.op import Op
from branchgraph.ir.ops import activation, elementwise, merge
from branchgraph.ir.types import DType

#: Element types that primitives compute in.
FLOATS = (DType.F32,)

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
    """What computes an element-wise op of one operand."""
    match op:
        case activation.Relu():
            return Function(Eltwise.RELU)
        case activation.LeakyRelu(slope=slope):
            return Function(Eltwise.RELU, slope)
        case activation.Sigmoid():
            return Function(Eltwise.LOGISTIC)
        case activation.Tanh():
            return Function(Eltwise.TANH)
        case elementwise.Negate():
            return Function(Eltwise.LINEAR, -1.0)
    return None


def binary_of(op: Op) -> Binary | None:
    """What computes an element-wise op of several operands in any order."""
    return _BINARY.get(type(op))


def epilogue(instruction: Instruction) -> bool:
    """Whether kernels can append this element-wise instruction to what comes before it."""
    if instruction.types[0].dtype not in FLOATS:
        return False
    return function_of(instruction.op) is not None or binary_of(instruction.op) is not None


def desc(tensor: Tensor) -> Desc:
    """The descriptor of a tensor where it lies."""
    return Desc.strided(tensor.shape, tensor.dtype, tensor.strides)


def computable(*tensors: Tensor) -> bool:
    """Whether primitives can work on all of `tensors`: their type, and something to do."""
    return all(t.dtype in FLOATS and t.size > 0 and t.shape for t in tensors)


def post_ops(
    site: Site, members: Sequence[Instruction], value: int
) -> tuple[Attributes, dict[int, Tensor]] | None:
    """Post-ops for `members`, the first of which reads `value`, and the operands they read."""
    attributes = Attributes()
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
            other = _ranked(site.builder.tensors[buffer], rank)
            if other is None or not computable(other):
                return None
            operands[post_op_operand(len(attributes.post_ops))] = other
            attributes = attributes.binary(algorithm, desc(other))
        value = member.writes[0]
    return attributes, operands


def _ranked(tensor: Tensor, rank: int) -> Tensor | None:
    """`tensor` with leading axes of size 1 up to `rank`."""
    missing = rank - len(tensor.shape)
    if missing < 0:
        return None
    step = max(tensor.size, 1)
    return tensor.viewed((1,) * missing + tensor.shape, (step,) * missing + tensor.strides)
