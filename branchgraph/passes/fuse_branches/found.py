"""What a rule found at a node: a fusion to be made, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from branchgraph.ir.graph import Location, Node, Value
from branchgraph.passes.fuse_branches.layer import Layer, emit_layer
from branchgraph.passes.fuse_branches.world import World


@dataclass(frozen=True, eq=False)
class Fusion:
    """Nodes that other values can take the place of.

    The value of `node` is replaced, or of its values those in `replaced`; `build` makes as many.
    """

    node: Node
    inside: tuple[Node, ...]
    rules: frozenset[str]
    macs: int
    build: Callable[[], Value | tuple[Value, ...]]
    location: Location
    for_size: bool = False
    replaced: tuple[Value, ...] = ()

    @property
    def old(self) -> tuple[Value, ...]:
        """The values that are replaced."""
        return self.replaced or (self.node.output,)

    def made(self) -> tuple[Value, ...]:
        """The values that take their place, emitted."""
        built = self.build()
        return built if isinstance(built, tuple) else (built,)

    def __str__(self) -> str:
        kind = "exact for this size" if self.for_size else "exact"
        listed = "+".join(sorted(self.rules, key=lambda r: int(r[1:])))
        return f"{listed}, {kind}, {self.macs:+,} MACs"


@dataclass(frozen=True)
class Refusal:
    """A rule that came close, and why it does not hold."""

    rule: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.reason}"


Rule = Callable[[Node, World], Fusion | Refusal | None]


def too_dear(before: int, after: int) -> str:
    """The reason for refusing as much work, or more."""
    if after == before:
        return f"it would save none of {before:,} MACs; grow=true asks for it all the same"
    return f"it would raise MACs from {before:,} to {after:,}; grow=true asks for it all the same"


def fused_into(
    layer: Layer, node: Node, inside: Iterable[Node], name: str, where: Location
) -> Fusion:
    """`layer` in place of the value of `node`."""
    return Fusion(
        node, tuple(inside), layer.rules, layer.macs - layer.spent,
        lambda: emit_layer(layer, name), where, layer.for_size,
    )  # fmt: skip


def name_for(node: Node, layers: Iterable[Layer]) -> tuple[str, Location]:
    """What a layer in place of `node` is called: as `node`, or as the first that is a layer now."""
    if node.name:
        return node.name, node.scope
    named = (n for layer in layers for n in layer.nodes if n.name and layer.spent)
    return next(((n.name, node.scope) for n in named), ("", node.scope))


def part_name(node: Node, name: str) -> str:
    """What a layer in place of some operands of `node` is called."""
    return node.graph.unused_name(f"{name}.fused" if name else "fused")
