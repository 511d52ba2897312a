"""Clusters: instructions of a program that one kernel carries out together.

    layer           conv or dense, then what is added to it or applied to each of its elements
    merge           a sum (or one other element-wise op of two operands), then the like
    norm            batch norm by the statistics of the batch, then ReLU
    norm_gradient   the gradient of that ReLU, then that of the batch norm
    pool_gradient   positions of maxima, then the gradient scattered to them

Nothing outside a cluster reads what is inside. A cluster runs where its last instruction stood; its
other operands are there by then, because programs are in topological order. Only `norm` runs where
its first one stood, since the statistics may be read before the ReLU comes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from branchgraph.compiler.program import Instruction, Program
from branchgraph.ir.ops.activation import Relu, ReluGradient
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.elementwise import Add, Binary, Unary
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.ops.norm import BatchNormGradient, BatchNormInference, BatchNormTraining
from branchgraph.ir.ops.pool import MaxPoolIndex, ScatterPooled

#: Most element-wise ops that follow an anchor in one kernel; oneDNN takes up to 32 post-ops.
_LONGEST = 8


@dataclass(frozen=True)
class Cluster:
    """Instructions in order; the last one's results are the cluster's, besides the anchor's own."""

    kind: str
    members: tuple[Instruction, ...]

    def singles(self) -> list[Cluster]:
        """Each instruction by itself, for where no kernel does them together."""
        return [Cluster("single", (m,)) for m in self.members]


def clusters(
    instructions: Sequence[Instruction], program: Program, epilogue: Callable[[Instruction], bool]
) -> list[Cluster]:
    """A part of a program as clusters; `epilogue` says which ops kernels can append."""
    return _Clustering(instructions, program, epilogue).run()


class _Clustering:
    def __init__(
        self,
        instructions: Sequence[Instruction],
        program: Program,
        epilogue: Callable[[Instruction], bool],
    ) -> None:
        self.instructions = instructions
        self.epilogue = epilogue
        self.readers: dict[int, list[int]] = defaultdict(list)
        for number, instruction in enumerate(instructions):
            for buffer in instruction.reads:
                self.readers[buffer].append(number)
        here = {b for i in instructions for b in i.writes}
        self.kept = program.results
        later = (i for i in program.instructions if not here.issuperset(i.writes))
        self.kept.update(b for i in later for b in i.reads)
        self.taken: set[int] = set()

    def run(self) -> list[Cluster]:
        found: list[tuple[int, Cluster]] = []
        for number, instruction in enumerate(self.instructions):
            if number in self.taken:
                continue
            kind, members = self._grow(number, instruction)
            self.taken.update(members)
            place = members[0] if kind == "norm" else members[-1]
            found.append((place, Cluster(kind, tuple(self.instructions[m] for m in members))))
        found.sort(key=lambda pair: pair[0])
        return [cluster for _, cluster in found]

    def _grow(self, number: int, instruction: Instruction) -> tuple[str, list[int]]:
        op = instruction.op
        if isinstance(op, (Conv, Dense)):
            return "layer", self._appended(number)
        if isinstance(op, (BatchNormInference, Sum, Add)):
            return "merge", self._appended(number)
        pairs = {
            BatchNormTraining: (Relu, "norm"),
            ReluGradient: (BatchNormGradient, "norm_gradient"),
            MaxPoolIndex: (ScatterPooled, "pool_gradient"),
        }
        for anchor, (follower, kind) in pairs.items():
            if isinstance(op, anchor):
                follows = self._only_reader(number)
                if follows is not None and isinstance(self.instructions[follows].op, follower):
                    return kind, [number, follows]
        return "single", [number]

    def _appended(self, number: int) -> list[int]:
        """`number` and the element-wise instructions that follow it in one kernel."""
        members = [number]
        while len(members) <= _LONGEST:
            follows = self._only_reader(members[-1])
            if follows is None:
                break
            after = self.instructions[follows]
            if not isinstance(after.op, (Binary, Unary, Sum)) or not self.epilogue(after):
                break
            if after.types != self.instructions[number].types[:1]:
                break
            members.append(follows)
        return members

    def _only_reader(self, number: int) -> int | None:
        """The one instruction that reads the first result, if nothing else needs it."""
        buffer = self.instructions[number].writes[0]
        readers = self.readers[buffer]
        if len(readers) != 1 or buffer in self.kept or readers[0] in self.taken:
            return None
        return readers[0]
