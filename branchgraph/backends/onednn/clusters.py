"""Clusters: instructions of a program that one kernel carries out together.

    layer           conv or dense, then what is added to it or applied to each of its elements
    layer_gradient  the gradient of a conv in its input, what is added to it, and that of a ReLU
    merge           a sum (or one other element-wise op of two operands), then the like
    norm            batch norm by the statistics of the batch, then ReLU
    norm_gradient   the gradient of that ReLU, then that of the batch norm
    exit            the score of an exit's criterion, its comparison, and the mask of what stays
    elementwise     a body of element-wise ops, and
    table           bodies with equal expressions, both made by `elementwise.grouped`

Nothing outside a cluster reads what is inside. A cluster runs where its last instruction stood; its
other operands are there by then, because programs are in topological order. Only `norm` runs where
its first one stood, since the statistics may be read before the ReLU comes. No instruction is moved
past an update that is made in place, since it may read what the state held before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from branchgraph.compiler.program import Instruction, Program
from branchgraph.ir.ops.activation import Relu, ReluGradient
from branchgraph.ir.ops.conv import Conv, ConvTranspose
from branchgraph.ir.ops.elementwise import Add, Binary, Compare, LogicalNot, Unary
from branchgraph.ir.ops.exit import ExitScore
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.ops.norm import BatchNormGradient, BatchNormInference, BatchNormTraining

#: Most element-wise ops that follow an anchor in one kernel; oneDNN takes up to 32 post-ops.
_LONGEST = 8


@dataclass(frozen=True)
class Cluster:
    """Instructions in order; the last one's results are the cluster's, besides the anchor's own."""

    kind: str
    members: tuple[Instruction, ...]
    #: The clusters that it was put together from.
    parts: tuple[Cluster, ...] = ()

    def singles(self) -> list[Cluster]:
        """Its parts, or each instruction by itself, for where no kernel does them together."""
        if self.parts:
            return list(self.parts)
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
        donated = {buffer for _, buffer in program.donated}
        #: Numbers of the instructions that write an update where its state was.
        self.in_place = [n for n, i in enumerate(instructions) if donated.intersection(i.writes)]

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
        if isinstance(op, ConvTranspose):
            return self._gradient(number)
        if isinstance(op, (BatchNormInference, Sum, Add)):
            return "merge", self._appended(number)
        if isinstance(op, ExitScore):
            return self._decision(number)
        pairs = {
            BatchNormTraining: (Relu, "norm"),
            ReluGradient: (BatchNormGradient, "norm_gradient"),
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
            if self._passes_update(number, follows):
                break
            members.append(follows)
        return members

    def _gradient(self, number: int) -> tuple[str, list[int]]:
        """A gradient, other paths' gradients added to it, and the ReLU's that it goes through.

        The ReLU of a batch norm is left to the gradient of that.
        """
        members = [number]
        while len(members) <= _LONGEST:
            follows = self._only_reader(members[-1])
            if follows is None or self._passes_update(number, follows):
                break
            after = self.instructions[follows]
            value = self.instructions[members[-1]].writes[0]
            added = isinstance(after.op, (Add, Sum)) and after.reads.count(value) == 1
            masked = isinstance(after.op, ReluGradient) and after.reads[0] != value
            if after.types != self.instructions[number].types or not (added or masked):
                break
            if masked and self._normalised(follows):
                break
            members.append(follows)
        return ("layer_gradient" if len(members) > 1 else "single"), members

    def _normalised(self, number: int) -> bool:
        """Whether a ReLU's gradient goes to that of a batch norm only."""
        follows = self._only_reader(number)
        return follows is not None and isinstance(self.instructions[follows].op, BatchNormGradient)

    def _decision(self, number: int) -> tuple[str, list[int]]:
        """A score with its comparison and the negation of that."""
        members = [number]
        for kind in (Compare, LogicalNot):
            follows = self._only_reader(members[-1])
            if follows is None or not isinstance(self.instructions[follows].op, kind):
                return "single", [number]
            if self.instructions[follows].reads[0] != self.instructions[members[-1]].writes[0]:
                return "single", [number]
            members.append(follows)
        if self._passes_update(number, members[-1]):
            return "single", [number]
        return "exit", members

    def _passes_update(self, number: int, follows: int) -> bool:
        """Whether an update would be made in place before `number`, if that ran at `follows`.

        An element-wise anchor may give the update itself; a layer reads its operands to the end.
        """
        layer = isinstance(self.instructions[number].op, (Conv, ConvTranspose, Dense))
        return any(number < n < follows + layer for n in self.in_place)

    def _only_reader(self, number: int) -> int | None:
        """The one instruction that reads the first result, if nothing else needs it."""
        buffer = self.instructions[number].writes[0]
        readers = self.readers[buffer]
        if len(readers) != 1 or buffer in self.kept or readers[0] in self.taken:
            return None
        return readers[0]
