"""Running a program: segments between early exits, each with a plan for the sizes it meets.

A program is cut where a `compact` brings a number of rows into being. The segments before are
planned for the sizes of the inputs; the ones after it for a number of rows that is rounded up to
one of a few sizes where every op is computed row by row, so that a few plans serve all numbers of
survivors; what the rows behind the survivors hold is computed and never read.

What depends on sizes only is looked up once and kept in a tree of stages: one for each shape of the
inputs, and behind it one for each number of rows that went on. A run copies the inputs, walks
down the tree, one call of native code a stage where there is no NumPy in between, and copies the
results.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from ctypes import c_int64
from dataclasses import dataclass, field

import numpy as np

from branchgraph.backends.onednn import kernels, library
from branchgraph.backends.onednn.bindings import STATUS, OneDNNError
from branchgraph.backends.onednn.plan import Builder, Plan, symbols_of
from branchgraph.backends.onednn.rows import Counts, bucket
from branchgraph.backends.onednn.tensors import Shape, Tensor, dense
from branchgraph.compiler.backend import Footprint, Observer, Options, Results, Work
from branchgraph.compiler.program import Instruction, Program
from branchgraph.ir.dims import Dim, DimLike, bind_shape
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


#: A result where it lies, and the size of its leading axis if only the run decides it.
_Value = tuple[np.ndarray, DimLike | None]


@dataclass
class _Stage:
    """A run up to some segment, for given sizes: all that can be looked up before it."""

    #: Of the segments so far; what is left to run is the last one.
    plans: tuple[Plan, ...]
    sizes: dict[str, int]
    #: Where inputs are copied to.
    inputs: list[tuple[np.ndarray, str]] = field(default_factory=list)
    #: Where the number of rows that go on is, and the mask they are counted in; None if it ends.
    cell: c_int64 | None = None
    mask: np.ndarray = field(default_factory=lambda: np.zeros(0, np.bool_))
    masked: DimLike = 0
    #: Whether a kernel of the stage counts them.
    counted: bool = False
    #: What comes next, by that number.
    following: dict[int, _Stage] = field(default_factory=dict)
    outputs: list[_Value] = field(default_factory=list)
    updates: list[_Value | None] = field(default_factory=list)
    gradients: list[_Value] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return self.plans[-1]

    def rows(self, counts: Counts) -> int:
        """The rows that go on, once this stage has run."""
        assert self.cell is not None
        if not self.counted:
            self.cell.value = int(np.count_nonzero(self.mask[: counts.of(self.masked)]))
        return self.cell.value

    def results(self, counts: Counts) -> Results:
        """What the program gives, once the last stage has run; outputs are copies."""
        return Results(
            [(a if n is None else a[: counts.of(n)]).copy() for a, n in self.outputs],
            [v and _counted(v, counts) for v in self.updates] if self.updates else [],
            [_counted(v, counts) for v in self.gradients] if self.gradients else [],
        )


def _counted(value: _Value, counts: Counts) -> np.ndarray:
    """A result, without the rows that were computed beyond the counted ones."""
    array, size = value
    return array if size is None else array[: counts.of(size)]


class OneDNNRunner:
    """One program for one executable: arena, packed weights and plans are its own."""

    def __init__(self, program: Program, options: Options | None = None) -> None:
        self.program = program
        self.options = options or Options()
        self.segments = segments(program)
        self.counts = Counts()
        #: Symbols that only a run decides.
        self._late = {s for i in program.instructions for s in i.op.introduces}
        self._donated = {b: n for n, b in program.donated}
        self._plans: list[dict[tuple[int, ...], Plan]] = [{} for _ in self.segments]
        self._states: dict[int, np.ndarray] = {}
        self._state_ids: tuple[int, ...] = ()
        self._copies: dict[int, np.ndarray] = {}
        self._version: int | None = None
        self._generation = 0
        self._shapes: tuple[Shape, ...] | None = None
        self._stages: dict[tuple[Shape, ...], _Stage] = {}

    def run(
        self,
        arguments: Mapping[str, np.ndarray],
        states: Sequence[np.ndarray],
        version: int = 0,
        observer: Observer | None = None,
    ) -> Results:
        library.require_same_process()
        if version != self._version:
            self._bind_states(states)
            self._version = version
            self._generation += 1
        stage = self._first(arguments)
        for target, name in stage.inputs:
            target[...] = arguments[name]
        self._execute(stage.plan, observer)
        while stage.cell is not None:
            stage = self._following(stage)
            self._execute(stage.plan, observer)
        if self._copies:
            self._return_copies(states)
        return stage.results(self.counts)

    def _execute(self, plan: Plan, observer: Observer | None) -> None:
        if plan.generation != self._generation:
            with np.errstate(all="ignore"):
                _loop(plan.prologue)
            plan.generation = self._generation
        if observer is not None:
            with np.errstate(all="ignore"):
                _timed(plan, observer)
        elif plan.host:
            with np.errstate(all="ignore"):
                _loop(plan.calls)
        else:
            _loop(plan.calls)

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

    # -- stages --------------------------------------------------------------------------------

    def _first(self, arguments: Mapping[str, np.ndarray]) -> _Stage:
        """The first stage for arguments of these shapes; that of the last run where they are its.

        Raises `ShapeError` where shapes do not fit.
        """
        shapes = tuple([a.shape for a in arguments.values()])
        if shapes == self._shapes:
            return self._stages[shapes]
        found: dict[str, int] = {}
        for argument in self.program.arguments:
            array = arguments[argument.name]
            bind_shape(argument.type.shape, array.shape, found, f"input {argument.name!r}")
        for symbol, size in found.items():
            self.counts[symbol] = size
        if shapes not in self._stages:
            self._stages[shapes] = self._stage(found, ())
        self._shapes = shapes
        return self._stages[shapes]

    def _following(self, stage: _Stage) -> _Stage:
        """The stage behind `stage` for the rows that go on."""
        rows = stage.rows(self.counts)
        following = stage.following.get(rows)
        if following is None:
            segment = self.segments[len(stage.plans)]
            assert segment.count is not None
            planned = min(bucket(rows), len(stage.mask)) if segment.padded else rows
            sizes = {**stage.sizes, segment.count: planned}
            following = self._stage(sizes, stage.plans)
            stage.following[rows] = following
        return following

    def _stage(self, sizes: dict[str, int], before: tuple[Plan, ...]) -> _Stage:
        """Prepare one more segment, behind those with plans already."""
        number = len(before)
        plans = (*before, self._plan(number, sizes, before))
        stage = _Stage(plans, sizes)
        if number == 0:
            held = (a for a in self.program.arguments if a.buffer in plans[0].memories)
            stage.inputs = [(plans[0].array(a.buffer), a.name) for a in held]
        if len(plans) < len(self.segments):
            following = self.segments[len(plans)]
            assert following.mask is not None
            assert following.count is not None
            stage.cell = self.counts.cell(following.count)
            stage.mask = _array(following.mask, plans)
            stage.masked = self.program.types[following.mask].shape[0]
            stage.counted = any(following.count in p.builder.counted for p in plans)
        else:
            program = self.program
            stage.outputs = [self._value(b, plans) for b in program.outputs]
            stage.updates = [
                None if b in self._donated else self._value(b, plans) for _, b in program.updates
            ]
            stage.gradients = [self._value(b, plans) for _, b in program.gradients]
        return stage

    def _value(self, buffer: int, plans: Sequence[Plan]) -> _Value:
        """A result, and of how many rows it is if there may be others behind them."""
        shape = self.program.types[buffer].shape
        size = shape[0] if shape else 1
        late = isinstance(size, Dim) and not self._late.isdisjoint(size.symbols)
        return _array(buffer, plans), size if late else None

    def _plan(self, number: int, sizes: Mapping[str, int], plans: Sequence[Plan]) -> Plan:
        known, key = self._plans[number], tuple(sizes.values())
        plan = known.get(key)
        if plan is None:
            plan = self._made(number, sizes, plans)
            if len(known) >= _KEPT:
                known.pop(next(iter(known)))
                for later in self._plans[number + 1 :]:  # they read the memory of this one
                    later.clear()
                self._forget_stages()
            known[key] = plan
        return plan

    def _forget_stages(self) -> None:
        self._stages.clear()
        self._shapes = None

    def _made(self, number: int, sizes: Mapping[str, int], plans: Sequence[Plan]) -> Plan:
        library.set_threads(self.options.threads)
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
            self._forget_stages()

    def _return_copies(self, states: Sequence[np.ndarray]) -> None:
        """Give donated updates to the arrays that a copy stands for."""
        if self._copies:
            buffer_of = dict(self.program.states)
            for number in self._donated.values():
                copy = self._copies.get(buffer_of[number])
                if copy is not None:
                    np.copyto(states[number], copy)


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


def _array(buffer: int, plans: Sequence[Plan]) -> np.ndarray:
    """The value in `buffer` after a run of `plans`."""
    for plan in reversed(plans):
        if buffer in plan.builder.tensors:
            return plan.array(buffer)
    raise KeyError(buffer)


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
