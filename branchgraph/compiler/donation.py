"""Donated states: updates computed in place, at the end of a program.

An update whose last op is element by element can be written straight into the array of its state,
which saves a buffer and a copy, if nothing reads the old value afterwards. Such instructions, and
the element-wise ones that only serve them, move to the end of the program, each update behind what
it needs. Until the first of them runs no state has changed, so a run that fails before leaves all
states as they were; and what serves one update is dead before the next one begins.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from branchgraph.compiler.program import Instruction, Program, with_releases
from branchgraph.ir.ops.elementwise import Binary, Cast, Compare, Unary, Where
from branchgraph.ir.ops.merge import Maximum, Merge, Product, Sum
from branchgraph.ir.ops.reshape import Reshape, Slice, Split, Transpose

#: Ops whose results may lie in the memory of their operand.
_VIEWS = (Reshape, Slice, Split, Transpose)


def donate(program: Program) -> Program:
    """`program` with its updates at the end, and those that may be made in place noted."""
    tail = _tail(program)
    if not tail:
        return program
    head = [i for i in program.instructions if id(i) not in {id(t) for t in tail}]
    moved = replace(program, instructions=with_releases((*head, *tail), program))
    return replace(moved, donated=_donated(moved, {b for i in tail for b in i.writes}))


def _tail(program: Program) -> list[Instruction]:
    """The element-wise instructions that serve updates only, in the order of the updates."""
    producer = {b: i for i in program.instructions for b in i.writes}
    readers: dict[int, list[Instruction]] = defaultdict(list)
    for instruction in program.instructions:
        for buffer in instruction.reads:
            readers[buffer].append(instruction)
    updates = {b for _, b in program.updates}
    seen_outside = {*program.outputs, *(b for _, b in program.gradients)}
    serving: dict[int, Instruction] = {}
    for instruction in reversed(program.instructions):
        (buffer, *more) = instruction.writes
        if more or not _elementwise(instruction) or buffer in seen_outside:
            continue
        used = buffer in updates or readers[buffer]
        if used and all(id(r) in serving for r in readers[buffer]):
            serving[id(instruction)] = instruction
    ordered: dict[int, Instruction] = {}

    def visit(instruction: Instruction) -> None:
        if id(instruction) in ordered:
            return
        for buffer in instruction.reads:
            before = producer.get(buffer)
            if before is not None and id(before) in serving:
                visit(before)
        ordered[id(instruction)] = instruction

    for instruction in program.instructions:
        if id(instruction) in serving and instruction.writes[0] in updates:
            visit(instruction)
    return list(ordered.values())


def _elementwise(instruction: Instruction) -> bool:
    """Whether it is cheap, element by element, and so at home behind everything else."""
    return isinstance(instruction.op, (Binary, Cast, Compare, Merge, Unary, Where))


def _in_place(instruction: Instruction) -> bool:
    """Whether it is one NumPy function, so that its result may lie where an operand did."""
    op = instruction.op
    known = isinstance(op, (Binary, Maximum, Product, Sum, Unary))
    return known and isinstance(getattr(type(op), "function", None), np.ufunc)


def _donated(program: Program, moved: set[int]) -> tuple[tuple[int, int], ...]:
    """(state, buffer) of the updates that may be written into the array of the state."""
    buffer_of = dict(program.states)
    written = {b: (n, i) for n, i in enumerate(program.instructions) for b in i.writes}
    kept = {*program.outputs, *(b for _, b in program.gradients)}
    wanted = [b for _, b in program.updates]
    last_read = _last_reads(program)
    found = []
    for state, buffer in program.updates:
        old = buffer_of.get(state)
        if buffer not in moved or wanted.count(buffer) > 1 or old is None or old in kept:
            continue
        position, instruction = written[buffer]
        direct, through_views = last_read.get(old, (-1, -1))
        if direct > position or through_views >= position or old in instruction.reads[2:]:
            continue
        if _in_place(instruction) and program.types[old] == program.types[buffer]:
            found.append((state, buffer))
    return tuple(found)


def _last_reads(program: Program) -> dict[int, tuple[int, int]]:
    """For each buffer the last instruction that reads it, and the last that reads a view of it."""
    last: dict[int, tuple[int, int]] = {}
    for position in reversed(range(len(program.instructions))):
        instruction = program.instructions[position]
        views = -1
        if isinstance(instruction.op, _VIEWS):
            views = max(max(last.get(b, (-1, -1))) for b in instruction.writes)
        for buffer in instruction.reads:
            direct, through = last.get(buffer, (-1, -1))
            last[buffer] = max(direct, position), max(through, views)
    return last
