"""Branches of linear layers fused into one: n-ary, exact, over parameter expressions.

Rules R1 to R16 of general fusion (ParaDise; RepVGG, arXiv 2101.03697; ACNet, 1908.03930; DBB,
2103.13425), a module for each group:

    chains    R1 norm, R2, R6, R7, R8, R9, R13 scales, R14: one layer after another
    shifts    R2 where a padding for each channel is asked for
    sums      R3 with R4, R5, R9, R12: a sum of layers on one input; R11: on several
    concats   R10: layers side by side;  parts: its dual, channels taken out of a layer
    mixtures  R13: branches gated for each sample
    samples   R1 and R13 behind these; gates that are the same for all samples
    compose, frame, layer, reading, world    the algebra they share

R15 (fixed filters: kernels that are constants, shifts) comes with R3 and R6, which fuse them. R16
(on-line fusion: scales in place of batch norm) is R13; nothing has to be fixed for it, so a graph
that is trained afterwards computes the gradients of all branches through one kernel.

`rules` names the rules that may be used (R1+R3), all by default. A match says the rules it took,
whether it is exact for every size, and how MACs change. Refused are what is inexact, values that
others read, and kernels that cost more than what they replace, unless `grow` asks for them. With
`bias_maps` a bias that meets zero padding becomes a bias for each position, exact for the size of
the graph. `concats` lets R11 put a concatenation of inputs in. `pad_values` lets R2 pad channels
with a value for each, which takes the values of the states, since no scale may be 0.

Rules are applied in the order of the groups until none fits, so a second application matches
nothing. The network must be in inference form where it has batch norm. Fusion is many-to-one: keep
the training graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from branchgraph.ir.errors import FormatError
from branchgraph.ir.graph import Graph, Node, at
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.fuse_branches.chains import chains, heads, norms
from branchgraph.passes.fuse_branches.concats import concats
from branchgraph.passes.fuse_branches.found import Fusion, Refusal, Rule
from branchgraph.passes.fuse_branches.mixtures import mixtures, single
from branchgraph.passes.fuse_branches.parts import parts
from branchgraph.passes.fuse_branches.samples import adjusted, settled
from branchgraph.passes.fuse_branches.shifts import shifts
from branchgraph.passes.fuse_branches.sums import joins, sums
from branchgraph.passes.fuse_branches.world import World

#: The names of all rules.
RULES = tuple(f"R{k}" for k in range(1, 17))
#: Rules that are others under another name, or need none.
_SAME = {"R16": ("R13",), "R15": ("R3", "R6")}


@dataclass(frozen=True)
class FuseBranches(Pass, spelling="fuse_branches", claim="exact"):
    """Fuse parallel, chained and gated linear layers."""

    rules: tuple[str, ...] = ("all",)
    bias_maps: bool = False
    concats: bool = False
    grow: bool = False
    pad_values: bool = False

    def check(self) -> None:
        unknown = [r for r in self.rules if r not in (*RULES, "all")]
        if unknown or not self.rules:
            raise FormatError(
                f"fuse_branches: rules are R1 to R16 joined by +, or all; "
                f"got {', '.join(unknown) or 'none'}"
            )

    @property
    def enabled(self) -> frozenset[str]:
        """Names of the rules that may be used."""
        if "all" in self.rules:
            return frozenset(RULES)
        return frozenset({*self.rules, *(same for r in self.rules for same in _SAME.get(r, ()))})

    def rewrite(self, graph: Graph, report: Report) -> None:
        world = World(
            graph, self.enabled, self.bias_maps, self.grow, self.pad_values, report.values
        )
        _Driver(world, self._groups(), report).run()

    def _groups(self) -> list[tuple[Rule, ...]]:
        """Rules in the order of application; those of a group are tried at one visit."""
        join = partial(joins, concats=self.concats)
        return [
            (norms,), (chains,), (heads,), (settled,), (parts,), (sums,), (concats,), (join,),
            (mixtures,), (single,), (adjusted,), (shifts,),
        ]  # fmt: skip


class _Driver:
    """Applies groups of rules until none fits, then reports what the last round refused."""

    def __init__(self, world: World, groups: Iterable[tuple[Rule, ...]], report: Report) -> None:
        self.world = world
        self.graph = world.graph
        self.groups = list(groups)
        self.report = report

    def run(self) -> None:
        while any(self._exhausted(group) for group in self.groups):
            pass
        self._report_refusals()

    def _exhausted(self, group: tuple[Rule, ...]) -> bool:
        """Whether rules of the group were applied; it is swept until none fits."""
        applied = False
        while self._swept(group):
            applied = True
        return applied

    def _swept(self, group: tuple[Rule, ...]) -> bool:
        applied = False
        for node in self.graph.nodes:
            if node not in self.graph or not self._lives(node):
                continue
            for found in self._found(node, group):
                if isinstance(found, Fusion):
                    self._apply(found)
                    applied = True
                    break
        return applied

    def _lives(self, node: Node) -> bool:
        """Whether a node is part of the network and not of an expression over its weights."""
        return bool(node.outputs) and not self.world.fixed(node.outputs[0])

    def _found(self, node: Node, group: Iterable[Rule]) -> Iterable[Fusion | Refusal]:
        for rule in group:
            found = rule(node, self.world)
            if found is not None:
                yield found

    def _apply(self, fusion: Fusion) -> None:
        old, before = fusion.old, self.graph.size
        with at(fusion.location):
            new = fusion.made()
        fresh = self.graph.latest(self.graph.size - before)
        self._remove(n for n in reversed(fresh) if not set(new) & set(n.outputs))
        where = fusion.node.path or fusion.node.op.opcode
        self.report.matched(f"{where}: {fusion}", before=old, after=new)
        for replaced, value in zip(old, new):
            self.graph.replace(replaced, value)
        self._remove(fusion.inside)
        self.graph.touch()

    def _remove(self, nodes: Iterable[Node]) -> None:
        """Take out nodes that nobody reads any more, and what only they read."""
        rooted = set(self.graph.roots)
        pending = list(nodes)
        while pending:
            node = pending.pop(0)
            read = any(v.users or v in rooted for v in node.outputs)
            if node in self.graph and not read:
                self.graph.remove(node)
                pending += [v.producer for v in node.inputs if v.producer is not None]

    def _report_refusals(self) -> None:
        for node in self.graph.nodes:
            if not self._lives(node):
                continue
            every = [rule for group in self.groups for rule in group]
            refusals = (f for f in self._found(node, every) if isinstance(f, Refusal))
            for text in dict.fromkeys(str(r) for r in refusals if r.rule in self.world.enabled):
                self.report.refused(node, text)


__all__ = ["RULES", "FuseBranches"]
