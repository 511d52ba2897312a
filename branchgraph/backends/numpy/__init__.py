"""The reference backend: a loop over `Op.evaluate`. Complete, float64-capable, no cleverness."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from branchgraph.compiler.backend import Observer, Options, Results, Work
from branchgraph.compiler.program import Instruction, Program
from branchgraph.ir.dims import Dim, bind_shape, substitute_shape
from branchgraph.ir.errors import GraphError, UnsupportedError
from branchgraph.ir.op import Op

#: Bound forms of symbolic ops that are remembered, over all programs.
_REMEMBERED = 4096


class NumpyRunner:
    """One program; each run has buffers of its own, so runs do not disturb each other."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(
        self,
        arguments: Mapping[str, np.ndarray],
        states: Sequence[np.ndarray],
        version: int = 0,
        observer: Observer | None = None,
    ) -> Results:
        program = self.program
        buffers: list[np.ndarray | None] = [None] * program.buffers
        bindings: dict[str, int] = {}
        borrowed: set[int] = set()
        for argument in program.arguments:
            array = arguments[argument.name]
            bind_shape(argument.type.shape, array.shape, bindings, f"input {argument.name!r}")
            buffers[argument.buffer] = array
            borrowed.add(id(array))
        for number, buffer in program.states:
            buffers[buffer] = states[number]
            borrowed.add(id(states[number]))
        with np.errstate(all="ignore"):  # infinity and NaN are values; who asks finds them
            for instruction in program.instructions:
                start = time.perf_counter() if observer else 0.0
                _step(instruction, buffers, bindings)
                if observer:
                    work = Work(f"numpy {instruction.op.opcode}", (instruction,))
                    observer(work, time.perf_counter() - start)
        owned = _Owner(buffers, borrowed)
        return Results(
            [owned.take(b) for b in program.outputs],
            [owned.take(b) for _, b in program.updates],
            [owned.take(b) for _, b in program.gradients],
        )

    def footprint(self) -> None:
        """Arrays come and go with each run."""


def _step(
    instruction: Instruction, buffers: list[np.ndarray | None], bindings: dict[str, int]
) -> None:
    if instruction.rows is not None and bindings[instruction.rows] == 0:
        results: Sequence[np.ndarray] = _empty(instruction, bindings)
    else:
        op = instruction.op
        if op.symbolic and not op.introduces:
            op = _bound(op, tuple(bindings.items()))
        results = op.evaluate(*(buffers[b] for b in instruction.reads))  # type: ignore[arg-type]
    for buffer, result in zip(instruction.writes, results):
        buffers[buffer] = result
    if instruction.op.introduces:
        size = instruction.types[0].shape[0]
        if isinstance(size, Dim):
            bindings[size.symbols[0]] = results[0].shape[0]
    for buffer in instruction.releases:
        buffers[buffer] = None


@lru_cache(maxsize=_REMEMBERED)
def _bound(op: Op, bindings: tuple[tuple[str, int], ...]) -> Op:
    return op.bind(dict(bindings))


def _empty(instruction: Instruction, bindings: Mapping[str, int]) -> list[np.ndarray]:
    """Outputs of a segment that no row survived to."""
    shapes = (substitute_shape(t.shape, bindings) for t in instruction.types)
    return [np.empty(s, t.dtype.numpy) for s, t in zip(shapes, instruction.types)]  # type: ignore[arg-type]


class _Owner:
    """Hands results out as arrays of their own: no views, no inputs, no states, none twice."""

    def __init__(self, buffers: list[np.ndarray | None], borrowed: set[int]) -> None:
        self.buffers = buffers
        self.taken = borrowed

    def take(self, buffer: int) -> np.ndarray:
        array = self.buffers[buffer]
        if array is None:
            raise GraphError(f"buffer {buffer} was released before its result was taken")
        if array.base is not None or id(array) in self.taken:
            array = np.array(array)
        self.taken.add(id(array))
        return array


class NumpyBackend:
    """Runs every op that has a meaning."""

    name = "numpy"
    optimises = False

    def missing(self) -> str:
        return ""

    def describe(self) -> str:
        return f"NumPy {np.__version__}, the reference"

    def primitives(self) -> tuple[str, ...]:
        return ()

    def load(self, program: Program, options: Options) -> NumpyRunner:
        """Every op evaluates itself, so every program loads."""
        if options != Options():
            raise UnsupportedError(
                f"the backend numpy has neither threads nor fpmath to choose, got {options};"
                " leave them out, or use the backend onednn"
            )
        return NumpyRunner(program)


BACKEND = NumpyBackend()
