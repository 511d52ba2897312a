"""Op: a frozen dataclass whose typed fields are its attributes.

An op says what it computes (`infer`, `evaluate`), how to differentiate it (`gradient`), what it
costs (`cost`) and whether each row of the batch is computed by itself (`row_wise`). Adding an op is
one class in `ir/ops`, one test, and one kernel per fast backend.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from branchgraph.ir.attributes import Attributes
from branchgraph.ir.dims import Dim, DimLike, Shape, format_shape
from branchgraph.ir.errors import FormatError, GradientError, GraphError, ShapeError
from branchgraph.ir.types import TensorType

if TYPE_CHECKING:
    from branchgraph.ir.graph import Node, Value
    from branchgraph.ir.lowering import Lowering

#: One cotangent an output (or input) of a node; None where nothing flows.
Cotangents = tuple["Value | None", ...]
#: Which inputs of a node need a cotangent.
Wanted = tuple[bool, ...]

#: Metadata of a field that only labels the op (an exit's name): it prints, but does not hash.
LABEL = {"label": True}
#: Metadata of a field that names a random stream: hashes number streams by first use.
STREAM = {"stream": True}


@dataclass(frozen=True)
class Cost:
    """Work of one op: multiply-accumulates, and bytes it reads and writes."""

    macs: DimLike = 0
    bytes_read: DimLike = 0
    bytes_written: DimLike = 0


@dataclass(frozen=True)
class Op(Attributes):
    """Base of all ops. Subclasses are frozen dataclasses, named on definition:

        @dataclass(frozen=True)
        class Relu(Op, opcode="relu", operands=("x",)): ...

    Operand names ending in `?` may be absent (from the right); one that starts with `*` takes any
    number and comes last.
    """

    opcode: ClassVar[str] = ""
    operands: ClassVar[tuple[str, ...]] = ()
    #: A declared op has not chosen training or inference; `specialise` replaces it by plain ops.
    declared: ClassVar[bool] = False
    #: A merge joins branches on purpose; pictures and patterns treat it so.
    merge: ClassVar[bool] = False
    registry: ClassVar[dict[str, type[Op]]] = {}

    def __init_subclass__(
        cls, opcode: str = "", operands: tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if opcode:
            cls.opcode, cls.operands = opcode, operands
            Op.registry[opcode] = cls

    # -- meaning -------------------------------------------------------------------------------

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Types of the outputs, or `ShapeError` stating the rule that is broken."""
        raise NotImplementedError(self.opcode)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs in plain NumPy, in any float dtype: the meaning of the op."""
        raise NotImplementedError(self.opcode)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        """Cotangents of the inputs, one entry an input (None = no gradient flows there).

        `cotangents` has an entry an output, None where nothing depends on it; `wanted` tells which
        inputs need one, so that the others may be None.
        """
        raise GradientError(f"{self.opcode} defines no gradient")

    def lower(self, inputs: tuple[Value, ...], lowering: Lowering) -> tuple[Value, ...]:
        """Plain ops for a declared op, once training or inference is chosen."""
        raise NotImplementedError(self.opcode)

    def cost(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> Cost:
        """Work of the op; data movement only unless a subclass counts multiply-accumulates."""
        read: DimLike = 0
        written: DimLike = 0
        for t in inputs:
            read = read + t.nbytes
        for t in outputs:
            written = written + t.nbytes
        return Cost(self.macs(inputs, outputs), read, written)

    def macs(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> DimLike:
        """Multiply-accumulates of convolutions and products; 0 for everything else."""
        return 0

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        """Whether row n of every output depends on row n of the row-carrying inputs alone.

        `rows[i]` tells whether input i carries the batch on its axis 0. False unless a subclass
        knows better, so that a new op is never compacted by accident.
        """
        return False

    @property
    def introduces(self) -> tuple[str, ...]:
        """Symbols of data-dependent size that this op brings into being."""
        return ()

    # -- shared machinery ----------------------------------------------------------------------

    def check_arity(self, count: int) -> None:
        """Raise `ShapeError` unless `count` inputs fit the operand names."""
        names = self.operands
        variadic = bool(names) and names[-1].startswith("*")
        fixed = len(names) - variadic
        required = sum(not n.endswith("?") for n in names[:fixed])
        if count < required or (count > fixed and not variadic):
            raise ShapeError(f"takes ({', '.join(names)}), got {count} operands")

    @functools.cached_property
    def symbolic(self) -> bool:
        """Whether an attribute holds a symbol that must be bound before evaluation."""
        return any(_has_symbol(v) for v in self.attributes().values())

    def bind(self, bindings: Mapping[str, DimLike]) -> Op:
        """The op with symbols in its attributes replaced."""
        if not self.symbolic:
            return self
        new = {k: _substitute(v, bindings) for k, v in self.attributes().items()}
        return dataclasses.replace(self, **new)

    @staticmethod
    def named(opcode: str) -> type[Op]:
        """The op class spelled `opcode` in text."""
        try:
            return Op.registry[opcode]
        except KeyError:
            raise FormatError(f"unknown op {opcode!r}") from None


def make(opcode: str, **attributes: Any) -> Op:
    """An op by its opcode: for modules that come before the one that defines it."""
    return Op.named(opcode)(**attributes)


def _has_symbol(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_has_symbol(v) for v in value)
    return isinstance(value, Dim)


def _substitute(value: Any, bindings: Mapping[str, DimLike]) -> Any:
    if isinstance(value, tuple):
        return tuple(_substitute(v, bindings) for v in value)
    return value.substitute(bindings) if isinstance(value, Dim) else value


# -- helpers that ops share ----------------------------------------------------------------------


def require(condition: bool, rule: str) -> None:
    """Raise `ShapeError(rule)` unless `condition`."""
    if not condition:
        raise ShapeError(rule)


def require_float(*types: TensorType) -> None:
    """All of `types` must have one floating dtype."""
    first = types[0].dtype
    require(first.is_float, f"needs a floating dtype, got {first}")
    for t in types[1:]:
        require(
            t.dtype == first, f"operands must share one dtype, got {first} and {t.dtype}; cast one"
        )


def broadcast_shapes(*shapes: Shape) -> Shape:
    """NumPy's broadcasting over symbolic shapes."""
    rank = max((len(s) for s in shapes), default=0)
    result: list[DimLike] = []
    for axis in range(rank):
        size: DimLike = 1
        for shape in shapes:
            position = axis - rank + len(shape)
            d = shape[position] if position >= 0 else 1
            if d == 1 or d == size:
                continue
            if size != 1:
                listed = " and ".join(format_shape(s) for s in shapes)
                raise ShapeError(f"shapes {listed} do not broadcast: {size} against {d}")
            size = d
        result.append(size)
    return tuple(result)


def rows_broadcast(inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
    """Row-wise test of broadcasting ops: inputs that carry rows have the rank of the output."""
    rank = max(t.rank for t in inputs)
    return all(t.rank == rank for t, carries in zip(inputs, rows) if carries)


def carries_first(inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
    """Row-wise test of ops whose first operand is the batch and whose others are weights."""
    return rows[0] and not any(rows[1:])


def concrete(shape: Shape, what: str) -> tuple[int, ...]:
    """`shape` as plain ints, or `GraphError` asking to bind the symbols."""
    if any(isinstance(d, Dim) for d in shape):
        raise GraphError(
            f"{what} needs concrete sizes, got {list(map(str, shape))}; use bind(graph, ...)"
        )
    return tuple(int(d) for d in shape if isinstance(d, int))
