"""A plan: one part of a program at concrete sizes, as calls over one arena.

Kernels are made in the order of clusters; each chooses where its results lie. When all are known,
lifetimes are, and the arena is laid out; only then are the calls prepared, with every pointer in
them, so that a run is a loop over calls and allocates nothing. What does not change while the
states do not (packed weights, constants) lies outside the arena and is made when they change.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from branchgraph.backends.onednn import library
from branchgraph.backends.onednn.chain import Step as Step
from branchgraph.backends.onednn.chain import chained, native
from branchgraph.backends.onednn.clusters import Cluster, clusters
from branchgraph.backends.onednn.elementwise import grouped
from branchgraph.backends.onednn.primitives import Arg, Desc, Memory, Primitive, allocate
from branchgraph.backends.onednn.rows import Counts
from branchgraph.backends.onednn.tensors import Shape, Tensor, dense, row_major
from branchgraph.backends.onednn.threads import switch, using, worth
from branchgraph.codegen import engine
from branchgraph.compiler.memory import Layout, Request
from branchgraph.compiler.memory import plan as lay_out
from branchgraph.compiler.program import Instruction, Program
from branchgraph.ir.dims import Dim, substitute_shape
from branchgraph.ir.op import Op
from branchgraph.ir.types import DType, TensorType


@dataclass(frozen=True)
class Kernel:
    """Calls that carry out one cluster, or one part of it."""

    name: str
    cluster: Cluster
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    emit: Callable[[Place], list[Step]]
    #: The number of threads that it is made for, and runs with.
    threads: int = 1
    #: (result, operand): the one may lie where the other did, if nothing reads that any more.
    over: tuple[tuple[int, int], ...] = ()

    @property
    def buffers(self) -> tuple[int, ...]:
        """All buffers it touches."""
        return (*self.reads, *self.writes)


@dataclass(frozen=True)
class Origin:
    """A forward op as its gradient knows it: its kind, the value it reads, and what else counts."""

    kind: str
    source: int
    details: tuple[Hashable, ...] = ()


@dataclass(frozen=True)
class Forward:
    """A forward primitive, which the backward one asks for, and the workspace it fills."""

    primitive: Primitive
    workspace: Tensor | None = None


class Place:
    """Where buffers are, once they have memory."""

    def __init__(self, memories: Mapping[int, np.ndarray], counts: Counts) -> None:
        self._memories = memories
        #: Numbers of rows of the run, by symbol; kernels may keep this and read it in each run.
        self.counts = counts

    def array(self, tensor: Tensor) -> np.ndarray:
        """The elements of `tensor`, in logical order of axes."""
        return tensor.array(self._memories[tensor.buffer])

    def rows(self, tensor: Tensor) -> np.ndarray:
        """The elements of a dense `tensor` as [rows, elements a row], in the order they lie."""
        shape = (tensor.shape[0], prod(tensor.shape[1:]))
        return self.array(tensor.viewed(shape, row_major(shape)))

    def address(self, place: Tensor | int) -> int:
        """Where a tensor's first element lies, or a buffer starts."""
        if isinstance(place, Tensor):
            return self.address(place.buffer) + place.offset
        return int(self._memories[place].ctypes.data)

    def memory(self, buffer: int, desc: Desc, offset: int = 0) -> Memory:
        """oneDNN's view of a buffer, `offset` bytes into it."""
        return Memory(desc, self._memories[buffer][offset:])


@dataclass
class Site:
    """One cluster about to get its kernels: its op, operands and results."""

    builder: Builder
    cluster: Cluster
    #: The first member, with symbols in its attributes replaced.
    op: Op
    inputs: tuple[Tensor, ...]

    @property
    def first(self) -> Instruction:
        return self.cluster.members[0]

    @property
    def last(self) -> Instruction:
        return self.cluster.members[-1]

    def shape(self, buffer: int) -> Shape:
        """Concrete shape of the value in `buffer`."""
        return self.builder.shape(buffer)

    def wanted(self, buffer: int) -> bool:
        """Whether anything outside this cluster reads `buffer`."""
        return self.builder.read_outside(buffer, self.cluster)

    def output(self, buffer: int, *, last: bool = False) -> Tensor:
        """A tensor without gaps for the value in `buffer`, channels last if asked."""
        return self.builder.output(buffer, last=last)

    def alias(self, buffer: int, tensor: Tensor) -> None:
        """Let the value in `buffer` be `tensor`, which lies in another buffer."""
        self.builder.place(buffer, tensor)

    def add(
        self, name: str, reads: Iterable[int], writes: Iterable[int],
        emit: Callable[[Place], list[Step]],
        over: Iterable[tuple[int, int]] = (),
    ) -> None:  # fmt: skip
        """One kernel of this cluster; `over` are results that may replace operands."""
        kernel = Kernel(name, self.cluster, tuple(reads), tuple(writes), emit, over=tuple(over))
        self.builder.add(kernel)

    def primitive(
        self, primitive: Primitive, reads: Mapping[Any, Tensor], writes: Mapping[Any, Tensor],
        over: Iterable[tuple[int, int]] = (),
    ) -> None:  # fmt: skip
        """One kernel that runs `primitive` over operands by argument number."""
        self.builder.primitive(self.cluster, primitive, reads, writes, over=over)


#: Makes the kernels of a cluster, or says that it cannot.
Maker = Callable[[Site], bool]


class Builder:
    """Makes the kernels of one part of a program at given sizes."""

    #: What products of float32 may be computed in: `strict` or `bf16`; the runner's choice.
    fpmath = "strict"

    def __init__(
        self, program: Program, instructions: Sequence[Instruction], sizes: Mapping[str, int],
        imported: Mapping[int, Tensor],
        makers: Mapping[str, Sequence[Maker]],
        epilogue: Callable[[Instruction], bool],
    ) -> None:  # fmt: skip
        self.program = program
        self.instructions = instructions
        self.sizes = dict(sizes)
        self.makers = makers
        self.kernels: list[Kernel] = []
        self.prologue: list[Kernel] = []
        self.tensors: dict[int, Tensor] = dict(imported)
        #: Buffers of earlier parts, where imported values lie.
        self.imported = frozenset(t.buffer for t in imported.values())
        self.constants: dict[int, np.ndarray] = {}
        #: Sizes in bytes of buffers that are not of the program: packs, workspaces, scratch.
        self.extra: dict[int, int] = {}
        self.persistent: set[int] = set()
        #: What forward kernels leave for backward ones.
        self.forward: dict[Origin, Forward] = {}
        #: Backward primitives of max pooling, by the buffer of the positions they scatter to.
        self.scatters: dict[int, Primitive] = {}
        #: Results that a kernel of another cluster has given already.
        self.done: set[int] = set()
        #: Symbols of rows that a kernel of this part counts, into their cells.
        self.counted: set[str] = set()
        #: The most threads that a kernel gets, and what those being made now get.
        self.threads = self._now = library.threads()
        self._copies: dict[tuple[Tensor, Hashable], Tensor] = {}
        self._next = max([program.buffers, *(b + 1 for b in self.imported)])
        self._states = {buffer for _, buffer in program.states}
        updated = {number for number, _ in program.updates}
        state_buffer = dict(program.states)
        self._donated = {buffer: state_buffer[number] for number, buffer in program.donated}
        self._fixed = {buffer for number, buffer in program.states if number not in updated}
        self._clusters = clusters(instructions, program, epilogue)
        if not engine.missing():
            self._clusters = grouped(self._clusters, program)
        self._readers: dict[int, list[Instruction]] = {}
        for instruction in program.instructions:
            for buffer in instruction.reads:
                self._readers.setdefault(buffer, []).append(instruction)
        for _, buffer in program.states:
            self.tensors.setdefault(buffer, dense(buffer, self.shape(buffer), self.dtype(buffer)))

    # -- what makers ask -----------------------------------------------------------------------

    def shape(self, buffer: int) -> Shape:
        """Concrete shape of a value of the program."""
        shape = substitute_shape(self.program.types[buffer].shape, self.sizes)
        return tuple(int(d) for d in shape)  # type: ignore[arg-type]

    def dtype(self, buffer: int) -> DType:
        return self.program.types[buffer].dtype

    def read_outside(self, buffer: int, cluster: Cluster) -> bool:
        """Whether anything but the members of `cluster` needs the value in `buffer`."""
        others = (i for i in self._readers.get(buffer, ()) if i not in cluster.members)
        return buffer in self.program.results or any(True for _ in others)

    def readers(self, buffer: int) -> Sequence[Instruction]:
        """Instructions of the program that read `buffer`."""
        return self._readers.get(buffer, ())

    def cluster(self, instruction: Instruction) -> Cluster | None:
        """The cluster that an instruction belongs to, if it is in this part."""
        found = (c for c in self._clusters if any(m is instruction for m in c.members))
        return next(found, None)

    def output(self, buffer: int, *, last: bool) -> Tensor:
        """A tensor for a result: in the array of a state where its update is donated."""
        home = self._donated.get(buffer, buffer)
        last = last and home == buffer
        tensor = dense(home, self.shape(buffer), self.dtype(buffer), last=last)
        return self.place(buffer, tensor)

    def place(self, buffer: int, tensor: Tensor) -> Tensor:
        """Say where the value in `buffer` lies."""
        self.tensors[buffer] = tensor
        return tensor

    def temporary(self, nbytes: int, *, persistent: bool = False) -> int:
        """A buffer of `nbytes` that lives as long as kernels touch it, or for good."""
        buffer, self._next = self._next, self._next + 1
        self.extra[buffer] = nbytes
        if persistent:
            self.persistent.add(buffer)
        return buffer

    def opaque(self, layout: Desc) -> Tensor:
        """A buffer for a layout that only oneDNN reads."""
        return Tensor(self.temporary(layout.nbytes), (layout.nbytes,), DType.U8, (1,))

    def fixed(self, tensor: Tensor) -> bool:
        """Whether `tensor` changes only when states do that the program does not write."""
        return tensor.buffer in self._fixed or tensor.buffer in self.constants

    def packed(
        self, cluster: Cluster, tensor: Tensor, key: Desc,
        pack: Callable[[Tensor, Desc], Primitive],
        source: int, destination: int,
    ) -> Tensor:  # fmt: skip
        """`tensor` in the layout `key`: for good if it is fixed, else once a run."""

        def fill(target: Tensor) -> None:
            primitive = pack(tensor, key)
            self.primitive(cluster, primitive, {source: tensor}, {destination: target}, name="pack")

        return self.prepared(tensor, key, key.nbytes, fill)

    def prepared(
        self, tensor: Tensor, form: Hashable, nbytes: int, fill: Callable[[Tensor], None]
    ) -> Tensor:
        """`tensor` in another form of `nbytes`, which the kernels that `fill` adds write.

        They run once for good if `tensor` is fixed, else once a run.
        """

        def make() -> Tensor:
            fixed = self.fixed(tensor)
            target = Tensor(self.temporary(nbytes, persistent=fixed), (nbytes,), DType.U8, (1,))
            kernels = self.kernels
            self.kernels = self.prologue if fixed else kernels
            fill(target)
            self.kernels = kernels
            return target

        return self.copy(tensor, form, make)

    def copy(self, tensor: Tensor, form: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """`tensor` in another form: what `make` made of its present value, or makes now."""
        found = self._copies.get((tensor, form))
        if found is None:
            found = self._copies[tensor, form] = make()
        return found

    def add(self, kernel: Kernel) -> None:
        """One more kernel. If it updates a state in place, copies of the old value are forgotten.

        All other buffers hold one value only.
        """
        self.kernels.append(replace(kernel, threads=self._now))
        updated = self._states.intersection(kernel.writes)
        if updated:
            kept = {k: c for k, c in self._copies.items() if k[0].buffer not in updated}
            self._copies = kept

    def primitive(
        self, cluster: Cluster, primitive: Primitive, reads: Mapping[Any, Tensor],
        writes: Mapping[Any, Tensor],
        name: str = "", over: Iterable[tuple[int, int]] = (),
    ) -> None:  # fmt: skip
        """A kernel that runs `primitive`; its scratchpad is a buffer like any other."""
        arguments = {**reads, **writes}
        touched = [t.buffer for t in writes.values()]
        scratch = primitive.scratchpad
        if scratch is not None and scratch.nbytes:
            pad = Tensor(self.temporary(scratch.nbytes), (scratch.nbytes,), DType.U8, (1,))
            arguments[Arg.SCRATCHPAD] = pad
            touched.append(pad.buffer)

        def emit(place: Place) -> list[Step]:
            memories = {}
            for number, t in arguments.items():
                layout = primitive.argument(number)
                assert layout is not None
                memories[number] = place.memory(t.buffer, layout, t.offset)
            return [primitive.step(memories)]

        label = f"{name} {primitive.implementation}" if name else primitive.implementation
        read = tuple(t.buffer for t in reads.values())
        self.add(Kernel(label, cluster, read, tuple(touched), emit, over=tuple(over)))

    # -- building ------------------------------------------------------------------------------

    def build(self) -> None:
        """Make every kernel."""
        for cluster in self._clusters:
            self.make(cluster)

    def make(self, cluster: Cluster) -> None:
        """The kernels of one cluster, or of its parts."""
        if all(b in self.done for b in cluster.members[-1].writes):
            return
        if self._empty(cluster):
            return
        self._now = self._worth(cluster)
        with using(self._now, self.threads):
            made = self._made(cluster)
        if made:
            return
        if cluster.kind == "single":
            raise AssertionError(f"no kernel for {cluster.members[0].op.opcode}")
        for single in cluster.singles():
            self.make(single)

    def _made(self, cluster: Cluster) -> bool:
        """Ask the makers, and undo what those did that gave up."""
        site = self._site(cluster)
        kernels, prologue, copies = len(self.kernels), len(self.prologue), self._copies
        for maker in self.makers.get(cluster.kind, ()):
            self._copies = dict(copies)
            if maker(site):
                return True
            del self.kernels[kernels:], self.prologue[prologue:]
        self._copies = copies
        return False

    def _worth(self, cluster: Cluster) -> int:
        """The number of threads for the kernels of a cluster."""
        macs = 0
        for m in cluster.members:
            reads, writes = (tuple(map(self._type, bs)) for bs in (m.reads, m.writes))
            macs += int(str(m.op.macs(reads, writes)))
        touched = {b for m in cluster.members for b in (*m.reads, *m.writes)}
        nbytes = sum(dense(b, self.shape(b), self.dtype(b)).nbytes for b in touched)
        return worth(macs, nbytes, self.threads)

    def _type(self, buffer: int) -> TensorType:
        return TensorType(self.shape(buffer), self.dtype(buffer))

    def _empty(self, cluster: Cluster) -> bool:
        """Give results without elements their places, if a cluster has no others."""
        written = [b for m in cluster.members for b in m.writes]
        if any(0 not in self.shape(b) for b in written):
            return False
        for buffer in written:
            self.output(buffer, last=False)
        return True

    def _site(self, cluster: Cluster) -> Site:
        inside = {b for m in cluster.members for b in m.writes}
        reads = [b for m in cluster.members for b in m.reads if b not in inside]
        op = cluster.members[0].op
        op = op.bind(self.sizes) if op.symbolic and not op.introduces else op
        return Site(self, cluster, op, tuple(self.tensors[b] for b in reads))


@dataclass
class Plan:
    """Kernels with memory. `steps` are prepared for the arrays of states given to `emit`."""

    builder: Builder
    kernels: list[Kernel]
    arena: np.ndarray
    layout: Layout
    memories: dict[int, np.ndarray]
    imported: Mapping[int, np.ndarray]
    steps: list[Step] = field(default_factory=list)
    #: `steps` in as few calls as possible, and whether some of them are Python's.
    calls: list[Step] = field(default_factory=list)
    host: bool = True
    prologue: list[Step] = field(default_factory=list)
    spans: list[tuple[Kernel, int, int]] = field(default_factory=list)
    #: Bytes of states by buffer, those that the steps were prepared for.
    states: Mapping[int, np.ndarray] = field(default_factory=dict)
    #: Values that were asked for, by buffer.
    arrays: dict[int, np.ndarray] = field(default_factory=dict)
    #: Of which states the prologue was run; the runner counts.
    generation: int = -1

    @staticmethod
    def of(builder: Builder, exports: set[int], imported: Mapping[int, np.ndarray]) -> Plan:
        """Build, and give every buffer its memory; `exports` are read when the plan has run."""
        builder.build()
        roots = {builder.tensors[b].buffer for b in exports if b in builder.tensors}
        kernels = builder.kernels
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for position, kernel in enumerate(kernels):
            for buffer in kernel.buffers:
                first.setdefault(buffer, position)
                last[buffer] = position
        inputs = {a.buffer for a in builder.program.arguments}
        outside = {*builder.imported, *builder.persistent, *builder.constants, *builder._states}
        numbers = [b for b in {**first, **dict.fromkeys(roots)} if b not in outside]
        end = len(kernels)
        sizes = {b: _size(builder, b) for b in numbers}
        hosts = _hosts(kernels, first, last, roots, sizes)
        index = {b: number for number, b in enumerate(numbers)}
        requests = [
            Request(
                sizes[b],
                0 if b in inputs else first.get(b, 0),
                end if b in roots else last.get(b, 0),
                inside=(index[hosts[b]], 0) if b in hosts else None,
            )
            for b in numbers
        ]
        layout = lay_out(requests)
        arena = allocate(layout.size)
        memories = {b: arena[o : o + r.size] for b, o, r in zip(numbers, layout.offsets, requests)}
        for buffer in builder.persistent:
            memories[buffer] = allocate(builder.extra[buffer])
        for buffer, array in builder.constants.items():
            memories[buffer] = _bytes(array)
        return Plan(builder, kernels, arena, layout, memories, imported)

    def emit(self, states: Mapping[int, np.ndarray], counts: Counts) -> None:
        """Prepare the calls; `states` are bytes by buffer."""
        self.states, self.arrays = states, {}
        place = Place({**self.imported, **states, **self.memories}, counts)
        self.prologue, _ = _emitted(self.builder.prologue, place, self.builder.threads)
        self.steps, self.spans = _emitted(self.kernels, place, self.builder.threads)
        self.calls = chained(self.steps)
        self.host = not all(map(native, self.steps))

    @property
    def kept(self) -> int:
        """Bytes outside the arena: packed weights and constants."""
        builder = self.builder
        constants = sum(a.nbytes for a in builder.constants.values())
        return constants + sum(builder.extra[b] for b in builder.persistent)

    def array(self, buffer: int) -> np.ndarray:
        """The value in `buffer` after a run, in logical order of axes."""
        found = self.arrays.get(buffer)
        if found is None:
            tensor = self.builder.tensors[buffer]
            found = self.arrays[buffer] = tensor.array(self.memory(tensor.buffer))
        return found

    def memory(self, buffer: int) -> np.ndarray:
        """The bytes of a buffer."""
        for held in (self.memories, self.imported, self.states):
            if buffer in held:
                return held[buffer]
        raise KeyError(buffer)


def _emitted(
    kernels: Sequence[Kernel], place: Place, threads: int
) -> tuple[list[Step], list[tuple[Kernel, int, int]]]:
    """The steps of kernels, each with its number of threads, and which steps are whose."""
    steps: list[Step] = []
    spans = []
    now = 0
    for kernel in kernels:
        start = len(steps)
        if kernel.threads != now:
            steps += switch(kernel.threads)
            now = kernel.threads
        with using(now, threads):
            steps += kernel.emit(place)
        spans.append((kernel, start, len(steps)))
    if now != threads and kernels:
        steps += switch(threads)
    return steps, spans


def _hosts(
    kernels: Sequence[Kernel], first: Mapping[int, int], last: Mapping[int, int],
    roots: Container[int], sizes: Mapping[int, int],
) -> dict[int, int]:  # fmt: skip
    """Results that are computed where an operand lies that nothing reads any more."""
    hosts: dict[int, int] = {}
    for position, kernel in enumerate(kernels):
        for result, operand in kernel.over:
            dies = operand not in roots and last[operand] == position == first[result]
            fits = sizes.get(result, -1) == sizes.get(operand)
            if dies and fits and result not in hosts and operand not in hosts.values():
                hosts[result] = operand
    return hosts


def _size(builder: Builder, buffer: int) -> int:
    if buffer in builder.extra:
        return builder.extra[buffer]
    return dense(buffer, builder.shape(buffer), builder.dtype(buffer)).nbytes


def _bytes(array: np.ndarray) -> np.ndarray:
    """The memory of a contiguous array, as bytes."""
    return array.reshape(-1).view(np.uint8)


def symbols_of(shape: Iterable[Any]) -> set[str]:
    """Symbols in a symbolic shape."""
    return {s for d in shape if isinstance(d, Dim) for s in d.symbols}
