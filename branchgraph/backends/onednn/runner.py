"""Running a program: segments between early exits, each with a plan for the sizes it meets.

A program is cut where a `compact` brings a number of rows into being. The segments before are
planned for the sizes of the inputs; the ones after it for a number of rows that is rounded up to
one of a few sizes where every op is computed row by row, so that a few plans serve all numbers of
survivors; what the rows behind the survivors hold is computed and never read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from branchgraph.backends.onednn import kernels, library
from branchgraph.backends.onednn.bindings import STATUS, OneDNNError
from branchgraph.backends.onednn.plan import Builder, Plan, symbols_of
from branchgraph.backends.onednn.tensors import Tensor, dense
from branchgraph.compiler.backend import Footprint, Observer, Options, Results, Work
from branchgraph.compiler.program import Instruction, Program
from branchgraph.ir.dims import Dim, bind_shape
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.rows import Compact, Scatter

#: Plans that a segment keeps, one for each combination of sizes.
_KEPT = 64


@dataclass(frozen=True)
class Segment:
    """Consecutive instructions; `count` is the symbol that the first one introduces."""

    instructions: tuple[Instruction, ...]
    count: str | None
    mask: int | None
    #: Whether rows behind the counted ones may be computed too.
    padded: bool
    #: Buffers that later segments or the results read.
    exports: frozenset[int]
    #: Buffers of earlier segments that this one reads.
    imports: frozenset[int]


class OneDNNRunner:
    """One program for one executable: arena, packed weights and plans are its own."""

    def __init__(self, program: Program, options: Options | None = None) -> None:
        self.program = program
        self.options = options or Options()
        self._thread: int | None = None
        self.segments = segments(program)
        self.counts: dict[str, int] = {}
        self._donated = {b: n for n, b in program.donated}
        self._plans: list[dict[tuple[int, ...], Plan]] = [{} for _ in self.segments]
        self._states: dict[int, np.ndarray] = {}
        self._state_ids: tuple[int, ...] = ()
        self._copies: dict[int, np.ndarray] = {}
        self._version: int | None = None
        self._generation = 0
        self._shapes: tuple[tuple[int, ...], ...] | None = None
        self._bound: dict[str, int] = {}

    def run(
        self,
        arguments: Mapping[str, np.ndarray],
        states: Sequence[np.ndarray],
        version: int = 0,
        observer: Observer | None = None,
    ) -> Results:
        library.require_same_process()
        if self._thread != threading.get_ident():  # OpenMP keeps the number for each thread
            self._thread = threading.get_ident()
            library.set_threads(self.options.threads)
        sizes = self._bind(arguments)
        if version != self._version or not self._state_ids:
            self._bind_states(states)
            self._version = version
            self._generation += 1
        key = tuple(sizes.values())
        plans: list[Plan] = []
        with np.errstate(all="ignore"):
            for number, segment in enumerate(self.segments):
                if segment.count is not None:
                    rows = self._count(segment, plans)
                    sizes[segment.count] = rows
                    key = (*key, rows)
                plan = self._plan(number, key, sizes, plans)
                if number == 0:
                    self._enter(plan, arguments)
                plans.append(plan)
                if plan.generation != self._generation:
                    _loop(plan.prologue)
                    plan.generation = self._generation
                if observer is None:
                    _loop(plan.steps)
                else:
                    _timed(plan, observer)
        self._return_copies(states)
        return self._results(plans)

    def footprint(self) -> Footprint | None:
        """The largest plan of each segment, together."""
        plans = [max(k.values(), key=lambda p: p.layout.size) for k in self._plans if k]
        if not plans:
            return None
        return Footprint(
            sum(p.layout.size for p in plans),
            sum(p.layout.lower_bound for p in plans),
            sum(p.kept for p in plans),
            sum(k.name.startswith("numpy") for p in plans for k in p.kernels),
        )

    # -- sizes ---------------------------------------------------------------------------------

    def _bind(self, arguments: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Sizes by symbol; those of the last run where the shapes are its."""
        shapes = tuple([a.shape for a in arguments.values()])
        if shapes != self._shapes:
            found: dict[str, int] = {}
            for argument in self.program.arguments:
                array = arguments[argument.name]
                bind_shape(argument.type.shape, array.shape, found, f"input {argument.name!r}")
            self._bound, self._shapes = found, shapes
        self.counts.update(self._bound)
        return dict(self._bound)

    def _count(self, segment: Segment, plans: Sequence[Plan]) -> int:
        """The rows that go on into `segment`, and the size it is planned for."""
        assert segment.mask is not None
        assert segment.count is not None
        type_ = self.program.types[segment.mask]
        mask = self._array(segment.mask, plans)[: self._rows(type_.shape[0])]
        rows = int(np.count_nonzero(mask))
        self.counts[segment.count] = rows
        return min(bucket(rows), len(mask)) if segment.padded else rows

    def _rows(self, size: object) -> int:
        """A leading size of this run."""
        return int(size.substitute(self.counts)) if isinstance(size, Dim) else int(size)  # type: ignore[arg-type, call-overload]

    # -- plans ---------------------------------------------------------------------------------

    def _plan(
        self, number: int, key: tuple[int, ...], sizes: Mapping[str, int], plans: Sequence[Plan]
    ) -> Plan:
        known = self._plans[number]
        plan = known.get(key)
        if plan is None:
            plan = self._made(number, sizes, plans)
            if len(known) >= _KEPT:
                known.pop(next(iter(known)))
                for later in self._plans[number + 1 :]:  # they read the memory of this one
                    later.clear()
            known[key] = plan
        return plan

    def _made(self, number: int, sizes: Mapping[str, int], plans: Sequence[Plan]) -> Plan:
        segment = self.segments[number]
        tensors: dict[int, Tensor] = {}
        memories: dict[int, np.ndarray] = {}
        for buffer in segment.imports:
            for earlier in reversed(plans):
                if buffer in earlier.builder.tensors:
                    tensor = tensors[buffer] = earlier.builder.tensors[buffer]
                    memories[tensor.buffer] = earlier.memory(tensor.buffer)
                    break
        builder = Builder(
            self.program, segment.instructions, sizes, tensors, kernels.MAKERS, kernels.epilogue
        )
        builder.fpmath = self.options.fpmath
        if number == 0:
            for argument in self.program.arguments:
                shape = builder.shape(argument.buffer)
                last = kernels.enters_channels_last(builder, argument.buffer)
                builder.place(
                    argument.buffer,
                    dense(argument.buffer, shape, argument.type.dtype, last=last),
                )
        plan = Plan.of(builder, set(segment.exports), memories)
        plan.emit(self._states, self.counts)
        return plan

    # -- data ----------------------------------------------------------------------------------

    def _bind_states(self, states: Sequence[np.ndarray]) -> None:
        """Let the plans read these arrays; where one is not contiguous, a copy of it."""
        for number, buffer in self.program.states:
            array = states[number]
            if not array.flags.c_contiguous:
                copy = self._copies.setdefault(buffer, np.empty(array.shape, array.dtype))
                np.copyto(copy, array)
        ids = tuple([s.__array_interface__["data"][0] for s in states])
        if ids != self._state_ids or not self._states:
            self._state_ids = ids
            for number, buffer in self.program.states:
                held = states[number]
                held = held if held.flags.c_contiguous else self._copies[buffer]
                self._states[buffer] = held.reshape(-1).view(np.uint8)
            for known in self._plans:
                for plan in known.values():
                    plan.emit(self._states, self.counts)

    def _return_copies(self, states: Sequence[np.ndarray]) -> None:
        """Give donated updates to the arrays that a copy stands for."""
        if self._copies:
            buffer_of = dict(self.program.states)
            for number in self._donated.values():
                copy = self._copies.get(buffer_of[number])
                if copy is not None:
                    np.copyto(states[number], copy)

    def _enter(self, plan: Plan, arguments: Mapping[str, np.ndarray]) -> None:
        """Copy the inputs to where the first plan reads them: NumPy does it faster than oneDNN."""
        for argument in self.program.arguments:
            if argument.buffer in plan.memories:
                np.copyto(plan.array(argument.buffer), arguments[argument.name])

    def _array(self, buffer: int, plans: Sequence[Plan]) -> np.ndarray:
        for plan in reversed(plans):
            if buffer in plan.builder.tensors:
                return plan.array(buffer)
        raise KeyError(buffer)

    def _results(self, plans: Sequence[Plan]) -> Results:
        program = self.program
        return Results(
            [np.array(self._result(b, plans), order="C") for b in program.outputs],
            [None if b in self._donated else self._result(b, plans) for _, b in program.updates],
            [self._result(b, plans) for _, b in program.gradients],
        )

    def _result(self, buffer: int, plans: Sequence[Plan]) -> np.ndarray:
        """A result, without the rows that were computed beyond the counted ones."""
        array = self._array(buffer, plans)
        shape = self.program.types[buffer].shape
        if shape and isinstance(shape[0], Dim):
            return array[: self._rows(shape[0])]
        return array


def segments(program: Program) -> list[Segment]:
    """The parts of a program between the places where numbers of rows come into being."""
    cuts: list[tuple[str | None, list[Instruction]]] = [(None, [])]
    known: set[str] = set()
    for instruction in program.instructions:
        new = [s for s in instruction.op.introduces if s not in known]
        if new:
            known.update(new)
            cuts.append((new[0], []))
        cuts[-1][1].append(instruction)
    made: dict[int, int] = {}
    for number, (_, part) in enumerate(cuts):
        made.update({b: number for i in part for b in i.writes})
    made.update({a.buffer: 0 for a in program.arguments})
    result = []
    for number, (count, part) in enumerate(cuts):
        later = (i for _, others in cuts[number + 1 :] for i in others)
        exports = {b for i in later for b in i.reads} | program.results
        imports = {b for i in part for b in i.reads if made.get(b, number) < number}
        result.append(
            Segment(
                tuple(part),
                count,
                part[0].reads[0] if count is not None else None,
                count is not None and _row_wise(program, part, count),
                frozenset(b for b in exports if made.get(b) == number),
                frozenset(imports),
            )
        )
    return result


def _row_wise(program: Program, instructions: Sequence[Instruction], count: str) -> bool:
    """Whether what one row of `count` gives does not depend on the other rows."""
    for instruction in instructions:
        types = tuple(program.types[b] for b in instruction.reads)
        if isinstance(instruction.op, (Compact, Scatter, Full)):
            continue
        mentioned = any(count in symbols_of(t.shape) for t in (*types, *instruction.types))
        if not mentioned and not (instruction.op.symbolic and count in str(instruction.op)):
            continue
        rows = tuple(bool(t.shape) and str(t.shape[0]) == count for t in types)
        if not all(t.shape and str(t.shape[0]) == count for t in instruction.types):
            return False
        if not instruction.op.row_wise(types, rows):
            return False
    return True


def bucket(rows: int) -> int:
    """The number of rows planned for `rows`: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ..."""
    size = 1
    while size < rows:
        if size * 3 // 2 >= rows and size > 1:
            return size * 3 // 2
        size *= 2
    return size if rows else 0


def _loop(steps: Sequence[tuple]) -> None:  # type: ignore[type-arg]
    for call, args, _ in steps:
        status = call(*args)
        if status.__class__ is int and status:
            name = STATUS[status] if status < len(STATUS) else f"status {status}"
            raise OneDNNError(f"dnnl_primitive_execute: {name}", name)


def _timed(plan: Plan, observer: Observer) -> None:
    for kernel, start, end in plan.spans:
        began = time.perf_counter()
        _loop(plan.steps[start:end])
        observer(Work(kernel.name, kernel.cluster.members), time.perf_counter() - began)
