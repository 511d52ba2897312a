"""Element-wise instructions that one generated kernel carries out: bodies, and tables of them.

A *body* is a set of element-wise instructions on float32 of one shape, connected by the values they
hand on; operands of one element are read as numbers. Values that nothing outside reads never reach
memory. A *table* is several bodies of one expression, none of which reads what another writes: the
momentum updates of all parameters, the running means of all batch norms.

A group runs where its last instruction stood, so the others move back. For a member at position i
and a group that runs at m that is right if between i and m, outside of the group,

    nothing reads what the member writes,
    nothing writes a state in place that the member reads, by itself or through a view of it,
    nothing stands but element-wise instructions and views,

the last because operands would otherwise live longer beside the large values of layers. What comes
later in the program only moves further back itself, so groups do not disturb each other. Clusters
of layers and norms keep the element-wise instructions that they carry out on the way.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from branchgraph.backends.onednn.clusters import Cluster
from branchgraph.codegen.pointwise import BOOLS, FLOAT, FLOATS, Expression, Step
from branchgraph.compiler.program import Instruction, Program
from branchgraph.ir.op import Op
from branchgraph.ir.ops import activation, elementwise, merge
from branchgraph.ir.ops.elementwise import (
    Binary,
    Cast,
    Compare,
    LogicalAnd,
    LogicalNot,
    Unary,
    Where,
)
from branchgraph.ir.ops.gate import Select
from branchgraph.ir.ops.reshape import Reshape, Slice, Split, Transpose
from branchgraph.ir.types import DType, TensorType

#: Most instructions in one body; the values of a vector should fit the registers.
_LONGEST = 64
#: Ops whose results may lie in the memory of their operand.
_VIEWS = (Reshape, Slice, Split, Transpose, Cast)
#: What a member may be moved past.
_LIGHT = (
    Binary, Compare, LogicalAnd, LogicalNot, merge.Merge, activation.ReluGradient, Select, Unary,
    Where, *_VIEWS,
)  # fmt: skip

#: Adds a step to an expression and gives the number of its value.
_Emit = Callable[..., int]


def _folded(name: str) -> Callable[[_Emit, Op, Sequence[int]], int]:
    """Of two or more operands, from left to right."""

    def translate(emit: _Emit, _: Op, operands: Sequence[int]) -> int:
        value, *others = operands
        for other in others:
            value = emit(name, value, other)
        return value

    return translate


def _single(name: str) -> Callable[[_Emit, Op, Sequence[int]], int]:
    return lambda emit, _, operands: emit(name, *operands)


def _mean(emit: _Emit, op: Op, operands: Sequence[int]) -> int:
    total = _folded("add")(emit, op, operands)
    return emit("divide", total, emit("constant", number=float(len(operands))))


def _clip(emit: _Emit, op: Op, operands: Sequence[int]) -> int:
    assert isinstance(op, elementwise.Clip)
    raised = emit("maximum", operands[0], emit("constant", number=op.low))
    return emit("minimum", raised, emit("constant", number=op.high))


def _relu(emit: _Emit, _: Op, operands: Sequence[int]) -> int:
    return emit("maximum", operands[0], emit("constant"))


def _relu_gradient(emit: _Emit, _: Op, operands: Sequence[int]) -> int:
    y, dy = operands
    zero = emit("constant")
    return emit("where", emit("greater", y, zero), dy, zero)


def _leaky_relu(emit: _Emit, op: Op, operands: Sequence[int]) -> int:
    assert isinstance(op, activation.LeakyRelu)
    (x,) = operands
    below = emit("multiply", emit("constant", number=op.slope), x)
    return emit("where", emit("greater", x, emit("constant")), x, below)


def _select(emit: _Emit, _: Op, operands: Sequence[int]) -> int:
    value, gate = operands
    zero = emit("constant")
    return emit("where", emit("equal", gate, zero), zero, emit("multiply", value, gate))


def _compare(emit: _Emit, op: Op, operands: Sequence[int]) -> int:
    assert isinstance(op, Compare)
    return emit(op.relation, *operands)


#: What each op is in steps, with the roundings of its `evaluate`.
_TRANSLATIONS: Mapping[type[Op], Callable[[_Emit, Op, Sequence[int]], int]] = {
    elementwise.Add: _folded("add"),
    elementwise.Subtract: _folded("subtract"),
    elementwise.Multiply: _folded("multiply"),
    elementwise.Divide: _folded("divide"),
    elementwise.Negate: _single("negate"),
    elementwise.Absolute: _single("absolute"),
    elementwise.Sqrt: _single("sqrt"),
    elementwise.Clip: _clip,
    Compare: _compare,
    Where: _single("where"),
    Select: _select,
    merge.Sum: _folded("add"),
    merge.Product: _folded("multiply"),
    merge.Maximum: _folded("maximum"),
    merge.Mean: _mean,
    activation.Relu: _relu,
    activation.ReluGradient: _relu_gradient,
    activation.LeakyRelu: _leaky_relu,
}


def translatable(instruction: Instruction, types: Sequence[TensorType]) -> bool:
    """Whether a body may hold an instruction; `types` are those of all buffers."""
    if type(instruction.op) not in _TRANSLATIONS:
        return False
    (made,) = instruction.types
    reads = [types[b] for b in instruction.reads]
    compares, asks = isinstance(instruction.op, Compare), isinstance(instruction.op, Where)
    if made.dtype is not (DType.BOOL if compares else DType.F32):
        return False
    for position, read in enumerate(reads):
        if read.dtype is not (DType.BOOL if asks and position == 0 else DType.F32):
            return False
        if read.shape != made.shape and (read.dtype is DType.BOOL or not _one(read)):
            return False
    return True


def _one(type_: TensorType) -> bool:
    """Whether there is one element whatever the sizes."""
    return all(d == 1 for d in type_.shape)


@dataclass(frozen=True)
class Body:
    """An expression and the buffers of its inputs and outputs."""

    expression: Expression
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @staticmethod
    def of(
        members: Sequence[Instruction], types: Sequence[TensorType], wanted: Callable[[int], bool]
    ) -> Body:
        """What `members` do, in their order; the values that are `wanted` outside are stored."""
        made = {b for m in members for b in m.writes}
        inputs = list(dict.fromkeys(b for m in members for b in m.reads if b not in made))
        shape = members[0].types[0].shape
        steps: list[Step] = []
        constants: dict[Step, int] = {}
        number = {b: k for k, b in enumerate(inputs)}

        def emit(name: str, *operands: int, number: float = 0.0) -> int:
            step = Step.constant(number) if name == "constant" else Step(name, operands)
            if step in constants:
                return constants[step]
            steps.append(step)
            value = len(inputs) + len(steps) - 1
            if name == "constant":
                constants[step] = value
            return value

        for member in members:
            operands = [number[b] for b in member.reads]
            number[member.writes[0]] = _TRANSLATIONS[type(member.op)](emit, member.op, operands)
        kinds = tuple(_kind(types[b], shape) for b in inputs)
        outputs = tuple(m.writes[0] for m in members if wanted(m.writes[0]))
        stored = tuple(number[b] for b in outputs)
        return Body(Expression(kinds, tuple(steps), stored), tuple(inputs), outputs)


def _kind(type_: TensorType, shape: tuple[object, ...]) -> str:
    if type_.dtype is DType.BOOL:
        return BOOLS
    return FLOATS if type_.shape == shape else FLOAT


def _readers_of(program: Program) -> Mapping[int, Sequence[Instruction]]:
    """The instructions that read each buffer."""
    readers: dict[int, list[Instruction]] = defaultdict(list)
    for instruction in program.instructions:
        for buffer in dict.fromkeys(instruction.reads):
            readers[buffer].append(instruction)
    return readers


def wanted_outside(
    members: Iterable[Instruction], results: Set[int],
    readers: Callable[[int], Sequence[Instruction]],
) -> Callable[[int], bool]:  # fmt: skip
    """Whether a buffer is a result of the program, or read by other instructions than `members`."""
    inside = {id(m) for m in members}
    return lambda buffer: buffer in results or any(id(r) not in inside for r in readers(buffer))


def grouped(found: Sequence[Cluster], program: Program) -> list[Cluster]:
    """Clusters in the order they run, with bodies and tables in the place of what they hold."""
    return _Grouping(found, program).run()


@dataclass
class _Group:
    """Positions of clusters that one kernel carries out, and the first it cannot move past."""

    positions: set[int]
    limit: float
    #: The bodies of a table.
    rows: list[_Group] = field(default_factory=list)

    @property
    def place(self) -> int:
        return max(self.positions)


class _Grouping:
    def __init__(self, found: Sequence[Cluster], program: Program) -> None:
        self.found = found
        self.program = program
        self.results = program.results
        self.readers = _readers_of(program)
        self.root = _roots(program)
        states = dict(program.states)
        home = {buffer: states[number] for number, buffer in program.donated}
        #: Where each buffer is made and read, and each state written in place, by position.
        self.maker: dict[int, int] = {}
        self.read_at: dict[int, list[int]] = defaultdict(list)
        self.written_at: dict[int, int] = {}
        #: Positions of what nothing is moved past.
        self.heavy: list[int] = []
        for position, cluster in enumerate(found):
            for member in cluster.members:
                for buffer in member.reads:
                    self.read_at[buffer].append(position)
                for buffer in member.writes:
                    self.maker[buffer] = position
                    if buffer in home:
                        self.written_at[home[buffer]] = position
            if not all(isinstance(m.op, _LIGHT) or not m.reads for m in cluster.members):
                self.heavy.append(position)
        self.fixed = self._constants()

    def run(self) -> list[Cluster]:
        bodies = self._bodies()
        groups = [g for g in self._tables(bodies) if len(g.positions) > 1]
        taken = {p for g in groups for p in g.positions}
        placed = [(p, c) for p, c in enumerate(self.found) if p not in taken]
        placed += [(g.place, self._cluster(g)) for g in groups]
        return [cluster for _, cluster in sorted(placed, key=lambda pair: pair[0])]

    # -- bodies --------------------------------------------------------------------------------

    def _bodies(self) -> list[_Group]:
        """Connected clusters joined as far as that is right, in order of where they run."""
        group_of: dict[int, _Group] = {}
        for position, cluster in enumerate(self.found):
            if not self._eligible(cluster):
                continue
            group = _Group({position}, self._limit({position}))
            shape = cluster.members[0].types[0].shape
            for buffer in (b for m in cluster.members for b in m.reads):
                other = group_of.get(self.maker.get(buffer, -1))
                if other is None or other is group:
                    continue
                first = self.found[other.place].members[0]
                if first.types[0].shape == shape:
                    group = self._joined(group, other, group_of) or group
            for p in group.positions:
                group_of[p] = group
        return sorted({id(g): g for g in group_of.values()}.values(), key=lambda g: g.place)

    def _joined(
        self, group: _Group, other: _Group, group_of: Mapping[int, _Group]
    ) -> _Group | None:
        positions = group.positions | other.positions
        if sum(len(self.found[p].members) for p in positions) > _LONGEST:
            return None
        limit = self._limit(positions)
        return _Group(positions, limit) if limit > max(positions) else None

    def _eligible(self, cluster: Cluster) -> bool:
        """Whether all members may be in a body, and have one shape."""
        if cluster.kind not in ("single", "merge"):
            return False
        members = cluster.members
        types = self.program.types
        if any(m.writes[0] in self.fixed or not translatable(m, types) for m in members):
            return False
        return all(m.types[0].shape == members[0].types[0].shape for m in members)

    def _limit(self, positions: set[int]) -> float:
        """The first position behind a member that a group of `positions` must not be moved past."""
        after = bisect.bisect_right(self.heavy, min(positions))
        limit = self.heavy[after] if after < len(self.heavy) else math.inf
        for position in positions:
            for member in self.found[position].members:
                for reader in self.read_at.get(member.writes[0], ()):
                    if reader not in positions:
                        limit = min(limit, reader)
                for buffer in member.reads:
                    writer = self.written_at.get(self.root.get(buffer, buffer), -1)
                    if writer > position and writer not in positions:
                        limit = min(limit, writer)
        return limit

    def _constants(self) -> set[int]:
        """Buffers that no input and no state decides."""
        found: set[int] = set()
        for instruction in self.program.instructions:
            if not instruction.op.introduces and found.issuperset(instruction.reads):
                found.update(instruction.writes)
        return found

    # -- tables --------------------------------------------------------------------------------

    def _tables(self, bodies: Sequence[_Group]) -> list[_Group]:
        """Bodies of one expression put together, as long as the first may wait for the last."""
        tables: list[_Group] = []
        latest: dict[Expression, _Group] = {}
        for body in bodies:
            key = self._body(body).expression
            table = latest.get(key)
            if table is not None and body.place < table.limit:
                table.positions |= body.positions
                table.limit = min(table.limit, body.limit)
                table.rows.append(body)
            else:
                table = latest[key] = _Group(set(body.positions), body.limit, rows=[body])
                tables.append(table)
        return tables

    def _body(self, group: _Group) -> Body:
        members = self._members(group)
        wanted = wanted_outside(members, self.results, lambda b: self.readers.get(b, ()))
        return Body.of(members, self.program.types, wanted)

    def _members(self, group: _Group) -> tuple[Instruction, ...]:
        return tuple(m for p in sorted(group.positions) for m in self.found[p].members)

    def _cluster(self, group: _Group) -> Cluster:
        """The cluster of a table, whose parts are bodies, or of its one body."""
        bodies = []
        for row in group.rows:
            parts = tuple(self.found[p] for p in sorted(row.positions))
            bodies.append(Cluster("elementwise", self._members(row), parts))
        if len(bodies) == 1:
            return bodies[0]
        return Cluster("table", tuple(m for b in bodies for m in b.members), tuple(bodies))


def _roots(program: Program) -> dict[int, int]:
    """The buffer that a chain of views starts from, for each view."""
    root: dict[int, int] = {}
    for instruction in program.instructions:
        if isinstance(instruction.op, _VIEWS):
            source = instruction.reads[0]
            root.update(dict.fromkeys(instruction.writes, root.get(source, source)))
    return root


__all__ = ["Body", "grouped", "translatable", "wanted_outside"]
