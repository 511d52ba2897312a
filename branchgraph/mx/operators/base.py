"""What an operator of MXNet is to this package.

An operator is a frozen dataclass: its fields are its parameters, as a symbol spells them. It names
its inputs, tells their shapes from those that are known, and builds its outputs from native ops:

    @dataclass(frozen=True)
    class Flatten(Operator, spelling="Flatten", aliases=("flatten",)):
        def build(self, *inputs: Value) -> tuple[Value, ...]: ...

Layout is [N, C, spatial...] everywhere. What MXNet does on the side is said here too: inputs it
overwrites (`overwrites`), auxiliary states and the initial values it prescribes (`initial`).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from branchgraph.ir.dims import DimLike
from branchgraph.ir.errors import FormatError, ShapeError
from branchgraph.ir.functions.layout import axis_of
from branchgraph.ir.graph import Value
from branchgraph.ir.op import make
from branchgraph.mx.attributes import read_parameters, shown

#: A shape that may hold symbols.
Shape = tuple[DimLike, ...]
#: Shapes of the inputs in order; None where unknown.
Shapes = tuple["Shape | None", ...]


#: Most operands or outputs of a node; a file may announce any number.
MOST_OPERANDS = 2**14


@dataclass(frozen=True)
class Operator:
    """Base of all operators; `build` and, where there are parameters to shape, `infer_inputs`."""

    spelling: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    #: Other inputs of the run than data: targets of a loss.
    labels: ClassVar[tuple[str, ...]] = ()
    #: Inputs with memory that is no parameter; they come last.
    auxiliary: ClassVar[tuple[str, ...]] = ()
    #: The value of `__init__` that MXNet prescribes for an input.
    initial: ClassVar[Mapping[str, str]] = {}
    registry: ClassVar[dict[str, type[Operator]]] = {}
    #: Canonical names only, sorted by definition.
    canonical: ClassVar[dict[str, type[Operator]]] = {}

    def __init_subclass__(cls, spelling: str = "", aliases: tuple[str, ...] = (), **kwargs: object):
        super().__init_subclass__(**kwargs)
        if spelling:
            cls.spelling, cls.aliases = spelling, aliases
            Operator.canonical[spelling] = cls
            Operator.registry.update(dict.fromkeys((spelling, *aliases), cls))

    def arguments(self) -> tuple[str, ...]:
        """Names of the inputs, auxiliary states left out."""
        return ("data",)

    def inputs(self) -> tuple[str, ...]:
        """Names of all inputs in order."""
        return (*self.arguments(), *self.auxiliary)

    def outputs(self) -> tuple[str, ...]:
        """What is appended to the name of a node for each visible output."""
        return ("output",)

    def overwrites(self) -> Mapping[str, float]:
        """Inputs whose arrays the operator fills with a number, in training and inference."""
        return {}

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        """The shapes of all inputs as far as they follow from the known ones."""
        return shapes

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        """The visible outputs, from native ops."""
        raise NotImplementedError(self.spelling)


def named(name: str) -> type[Operator]:
    """The operator of that name or alias; `FormatError` with the known names otherwise."""
    try:
        return Operator.registry[name]
    except KeyError:
        known = ", ".join(sorted(Operator.canonical))
        raise FormatError(f"no operator {shown(name)}; known are: {known}") from None


def declare(
    base: type[Operator],
    spelling: str,
    function: Callable[..., Value],
    aliases: Iterable[str] = (),
) -> None:
    """An operator that differs from `base` in the class variable `function` only."""
    members = {"function": staticmethod(function), "__doc__": base.__doc__}
    words = {"spelling": spelling, "aliases": tuple(aliases)}
    made = types.new_class(spelling, (base,), words, lambda space: space.update(members))
    dataclass(frozen=True)(made)


def read_operator(name: str, texts: Mapping[str, str], node: str = "") -> Operator:
    """An operator with its parameters read from texts; errors name the operator and the node."""
    cls = named(name)
    where = f"{cls.spelling} {node!r}" if node else cls.spelling
    return read_parameters(cls, texts, where)


def counted(count: int, prefix: str = "arg") -> tuple[str, ...]:
    """`arg0`, `arg1`, ...; `FormatError` for a number that no symbol has."""
    if not 1 <= count <= MOST_OPERANDS:
        raise FormatError(f"{count} operands or outputs; there are 1 to {MOST_OPERANDS}")
    return tuple(f"{prefix}{i}" for i in range(count))


# -- what families share -------------------------------------------------------------------------


def known(shape: Shape | None, *rest: Shape | None) -> Shape | None:
    """The first of the shapes that is known."""
    return next((s for s in (shape, *rest) if s is not None), None)


def all_equal(shapes: Shapes) -> Shapes:
    """Inputs of one shape: the unknown ones have that of the first known one."""
    return tuple(known(s, *shapes) for s in shapes)


def per_channel(data: Shape | None, shapes: Shapes, axis: int = 1) -> Shapes:
    """Inputs after the first are vectors with one element a channel of `data`."""
    if data is None:
        return shapes
    channels = (data[axis_of(axis, len(data), "the channel axis")],)
    return (data, *(known(s, channels) for s in shapes[1:]))


def blocked(x: Value) -> Value:
    """x, through which no gradient flows."""
    zero = x.graph.emit(make("full", value=0.0, shape=x.shape, dtype=x.dtype))
    return x.graph.emit(make("straight_through"), x, zero)


def size_of(dim: DimLike, what: str) -> int:
    """A dimension as a number; `ShapeError` asking for it where it is a symbol."""
    if not isinstance(dim, int):
        raise ShapeError(f"{what} needs a number, got {dim}; give the shape without a symbol")
    return dim
