"""Program: what a backend runs. Not a graph, but instructions over numbered buffers.

An instruction names its op, the buffers it reads and writes, and the buffers that die with it, so
a backend needs no graph walk at run time. Rows that depend on data guard their instructions: when
a count is zero the instructions of that segment are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from branchgraph.ir.dims import Dim
from branchgraph.ir.graph import Graph, Location, Value
from branchgraph.ir.op import Op
from branchgraph.ir.state import State
from branchgraph.ir.types import TensorType


@dataclass(frozen=True)
class Instruction:
    """One op on buffers. `rows` is the data-dependent symbol its outputs are counted by, if any."""

    op: Op
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    releases: tuple[int, ...]
    types: tuple[TensorType, ...]
    rows: str | None
    name: str
    scope: Location

    @property
    def in_branch(self) -> bool:
        """Whether it stands in a declared branch (the head of an exit, say)."""
        return any(part.branch for part in self.scope)


@dataclass(frozen=True)
class Argument:
    """An input: its buffer and what may be fed to it."""

    name: str
    buffer: int
    type: TensorType
    default: float | None


@dataclass(frozen=True)
class Program:
    """Instructions in order, and where arguments, states and results lie.

    States are positions in the list of states of the graph the program was made from, so that one
    program serves every graph of the same structure.
    """

    instructions: tuple[Instruction, ...]
    types: tuple[TensorType, ...]
    arguments: tuple[Argument, ...]
    states: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]
    updates: tuple[tuple[int, int], ...]
    gradients: tuple[tuple[int, int], ...]
    #: Updates, (state, buffer), that a backend may write into the array of the state at once.
    donated: tuple[tuple[int, int], ...] = ()

    @property
    def buffers(self) -> int:
        """Number of buffers; `types` has the type of each."""
        return len(self.types)

    @property
    def results(self) -> set[int]:
        """Buffers that are read when all instructions have run."""
        return {*self.outputs, *(b for _, b in (*self.updates, *self.gradients))}


def schedule(graph: Graph, numbering: Mapping[State, int]) -> Program:
    """The program of a graph, in the graph's own order, with buffers released after last use."""
    buffer: dict[Value, int] = {}
    for value in (*graph.inputs.values(), *graph.reads.values()):
        buffer[value] = len(buffer)
    nodes = graph.nodes
    for node in nodes:
        for value in node.outputs:
            buffer[value] = len(buffer)
    introduced = {s for n in nodes for s in n.op.introduces}
    instructions = [
        Instruction(
            node.op,
            tuple(buffer[v] for v in node.inputs),
            tuple(buffer[v] for v in node.outputs),
            (),
            tuple(v.type for v in node.outputs),
            _guard(node.outputs, node.op, introduced),
            node.name,
            node.scope,
        )
        for node in nodes
    ]
    program = Program(
        tuple(instructions),
        tuple(v.type for v in buffer),
        tuple(Argument(n, buffer[v], v.type, v.default) for n, v in graph.inputs.items()),
        tuple((numbering[s], buffer[v]) for s, v in graph.reads.items()),
        tuple(buffer[v] for v in graph.outputs.values()),
        tuple((numbering[s], buffer[v]) for s, v in graph.updates.items()),
        tuple((numbering[s], buffer[v]) for s, v in graph.gradients.items()),
    )
    return replace(program, instructions=with_releases(program.instructions, program))


def with_releases(instructions: Sequence[Instruction], program: Program) -> tuple[Instruction, ...]:
    """`instructions`, in a new order, each with the computed buffers that nothing reads later."""
    computed = {b for i in instructions for b in i.writes} - program.results
    last_use = {b: n for n, i in enumerate(instructions) for b in i.reads}
    released = []
    for position, instruction in enumerate(instructions):
        dying = dict.fromkeys(
            b
            for b in (*instruction.reads, *instruction.writes)
            if b in computed and last_use.get(b, position) == position
        )
        released.append(replace(instruction, releases=tuple(dying)))
    return tuple(released)


def _guard(outputs: tuple[Value, ...], op: Op, introduced: set[str]) -> str | None:
    """The data-dependent symbol that counts the rows of every output."""
    if op.introduces:
        return None
    leading = {v.shape[0] for v in outputs if v.shape}
    if len(leading) != 1 or any(not v.shape for v in outputs):
        return None
    (size,) = leading
    if isinstance(size, Dim) and str(size) in introduced:
        return str(size)
    return None
