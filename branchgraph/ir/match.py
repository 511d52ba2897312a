"""Patterns: ordinary functions over symbolic values, matched against a graph.

    @pattern
    def normalised(p, x, weight):
        z = p.conv(x, weight, p.maybe("bias"), name="conv")
        return p.batch_norm_inference(z, p.any(), p.any(), p.any(), p.any(), name="norm")

    match = normalised.match(node)          # of the node that makes the result, or None
    match["x"], match.node("conv").op.stride

The function is called once, with `p` and a variable for each of its other parameters.

- `p.OPCODE(*operands, **attributes)` is one op; an attribute is a value or a test of it, and
  `name=` says how the match calls the node. `p.op(("conv", "dense"), ...)` is one of several.
- A variable stands for any value, the same one wherever it comes; `p.any()` for any at all,
  `p.maybe("bias")` for an operand that may be absent; a number for a constant filled with it.
- Operands of commutative ops are found in any order.
- `p.each("convs", template)` takes all the operands that are left: `template(p)` is a pattern that
  every one of them has by itself. `p.siblings("convs", x, template)` is a result that stands for
  all readers of x that look like `template(p, x)`; `match.each("convs")` are their own matches.
- A function may return several values: one node is found for each, sharing variables.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import Op

#: Ops whose operands may stand in any order.
COMMUTATIVE = frozenset({"add", "multiply", "logical_and", "sum", "product", "maximum", "mean"})


@dataclass(frozen=True, eq=False)
class Symbol:
    """Base of what may stand in a pattern."""


@dataclass(frozen=True, eq=False)
class Variable(Symbol):
    """Any value; one with a name is the same value wherever it comes."""

    name: str = ""
    optional: bool = False


@dataclass(frozen=True, eq=False)
class Number(Symbol):
    """A constant filled with one number."""

    value: float


@dataclass(frozen=True, eq=False)
class Each(Symbol):
    """The operands that are left, each like one template."""

    name: str
    template: Pattern
    at_least: int


@dataclass(frozen=True, eq=False)
class Applied(Symbol):
    """The result of one op."""

    opcodes: tuple[str, ...]
    operands: tuple[Symbol, ...]
    attributes: Mapping[str, Any]
    name: str = ""


@dataclass(frozen=True, eq=False)
class Siblings(Symbol):
    """All readers of a value that look like one template."""

    name: str
    of: Symbol
    template: Pattern
    at_least: int


@dataclass(frozen=True)
class Match:
    """What a pattern found: values of variables, nodes by name, and matches of n-ary parts."""

    values: Mapping[str, Value] = field(default_factory=dict)
    nodes: Mapping[str, Node] = field(default_factory=dict)
    parts: Mapping[str, tuple[Match, ...]] = field(default_factory=dict)
    #: All matched nodes, and those whose values the pattern returns.
    inside: tuple[Node, ...] = ()
    roots: tuple[Node, ...] = ()

    def __getitem__(self, name: str) -> Value:
        if name not in self.values:
            raise GraphError(f"the match has no value {name!r}; it has: {', '.join(self.values)}")
        return self.values[name]

    def get(self, name: str) -> Value | None:
        """The value of an optional variable."""
        return self.values.get(name)

    def node(self, name: str) -> Node:
        """The node called `name`."""
        if name not in self.nodes:
            raise GraphError(f"the match has no node {name!r}; it has: {', '.join(self.nodes)}")
        return self.nodes[name]

    def each(self, name: str) -> tuple[Match, ...]:
        """The matches of an n-ary part."""
        if name not in self.parts:
            raise GraphError(f"the match has no part {name!r}; it has: {', '.join(self.parts)}")
        return self.parts[name]

    @property
    def outputs(self) -> tuple[Value, ...]:
        """The values that the pattern returns."""
        return tuple(v for node in self.roots for v in node.outputs)

    def _with(self, **changes: Any) -> Match:
        return Match(**{**self.__dict__, **changes})

    def _bound(self, name: str, value: Value) -> Match | None:
        """The match with a variable bound; None if it is bound to another value."""
        if not name:
            return self
        if name in self.values:
            return self if self.values[name] is value else None
        return self._with(values={**self.values, name: value})

    def _entered(self, node: Node, name: str) -> Match:
        nodes = {**self.nodes, name: node} if name else self.nodes
        return self._with(nodes=nodes, inside=(*self.inside, node))


class Maker:
    """What a pattern function writes with: `p.relu(x)` is the op of that opcode."""

    def any(self, name: str = "") -> Symbol:
        """Any value."""
        return Variable(name)

    def maybe(self, name: str) -> Symbol:
        """A value, or no operand."""
        return Variable(name, optional=True)

    def op(self, opcodes: str | tuple[str, ...], *operands: Any, **options: Any) -> Symbol:
        """One of several ops."""
        codes = (opcodes,) if isinstance(opcodes, str) else tuple(opcodes)
        for code in codes:
            Op.named(code)
        name = options.pop("name", "")
        return Applied(codes, tuple(map(_symbol, operands)), options, name)

    def each(self, name: str, template: Callable[..., Any], at_least: int = 0) -> Symbol:
        """All operands that are left, each like `template(p)`."""
        return Each(name, Pattern(template), at_least)

    def siblings(
        self, name: str, of: Symbol, template: Callable[..., Any], at_least: int = 2
    ) -> Symbol:
        """All readers of a value that look like `template(p, x)`, as one result."""
        return Siblings(name, of, Pattern(template), at_least)

    def __getattr__(self, opcode: str) -> Callable[..., Symbol]:
        if opcode.startswith("_"):
            raise AttributeError(opcode)
        Op.named(opcode)
        return lambda *operands, **options: self.op(opcode, *operands, **options)


def _symbol(value: Any) -> Symbol:
    return value if isinstance(value, Symbol) else Number(float(value))


class Pattern:
    """A pattern function, called once; see the module for what it may write."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        _, *names = inspect.signature(function).parameters
        self.variables = tuple(names)
        made = function(Maker(), *(Variable(n) for n in names))
        self.roots: tuple[Symbol, ...] = made if isinstance(made, tuple) else (made,)
        for root in self.roots:
            if not isinstance(root, (Applied, Siblings)):
                raise GraphError(f"pattern {self.name}: its result must come from an op")

    @property
    def opcodes(self) -> tuple[str, ...]:
        """Opcodes of the node that a match starts at."""
        first = self.roots[0]
        start = first.template.roots[0] if isinstance(first, Siblings) else first
        return start.opcodes if isinstance(start, Applied) else ()

    def match(self, node: Node) -> Match | None:
        """The first match whose first result `node` makes, or None."""
        first, *others = self.roots
        found = (
            self._family(first, node)
            if isinstance(first, Siblings)
            else _applied(first, node, Match())
        )
        for match in found:
            whole = _others(others, match._with(roots=match.roots or (node,)))
            if whole is not None:
                return whole
        return None

    def _family(self, symbol: Siblings, node: Node) -> Iterator[Match]:
        """All siblings of `node`, if it is the first of them."""
        for start in symbol.template.matches(node):
            parent = start.values[symbol.template.variables[0]]
            parts = [m for user in parent.users if (m := _sibling(symbol, user, parent))]
            if len(parts) < symbol.at_least or parts[0].roots[0] is not node:
                continue
            inside = tuple(n for m in parts for n in m.inside)
            roots = tuple(n for m in parts for n in m.roots)
            whole = Match(parts={symbol.name: tuple(parts)}, inside=inside, roots=roots)
            yield from _unified(symbol.of, parent, whole)

    def matches(self, node: Node) -> Iterator[Match]:
        """All ways to match a pattern of one op."""
        (root,) = self.roots
        for match in _applied(root, node, Match()):
            yield match._with(roots=(node,))


def pattern(function: Callable[..., Any]) -> Pattern:
    """The pattern that `function` writes."""
    return Pattern(function)


# -- unification -----------------------------------------------------------------------------------


def _sibling(symbol: Siblings, user: Node, parent: Value) -> Match | None:
    variable = symbol.template.variables[0]
    return next((m for m in symbol.template.matches(user) if m.values[variable] is parent), None)


def _others(roots: list[Symbol], match: Match) -> Match | None:
    """The match extended by the other results, each found among readers of bound values."""
    if not roots:
        return match
    first, *rest = roots
    readers = dict.fromkeys(user for value in match.values.values() for user in value.users)
    for node in readers:
        if node in match.inside:
            continue
        for found in _applied(first, node, match):
            whole = _others(rest, found._with(roots=(*found.roots, node)))
            if whole is not None:
                return whole
    return None


def _unified(symbol: Symbol, value: Value, match: Match) -> Iterator[Match]:
    """All ways to read `value` as `symbol`."""
    if isinstance(symbol, Variable):
        bound = match._bound(symbol.name, value)
        if bound is not None:
            yield bound
    elif isinstance(symbol, Number):
        if _constant(value) == symbol.value:
            yield match
    elif isinstance(symbol, Applied) and value.producer and len(value.producer.outputs) == 1:
        yield from _applied(symbol, value.producer, match)


def _constant(value: Value) -> float | None:
    if value.producer is None or value.producer.op.opcode != "full":
        return None
    number: float = value.producer.op.attributes()["value"]
    return number


def _applied(symbol: Symbol, node: Node, match: Match) -> Iterator[Match]:
    """All ways to read `node` as an op of a pattern."""
    if not isinstance(symbol, Applied) or node.op.opcode not in symbol.opcodes:
        return
    attributes = node.op.attributes()
    for name, wanted in symbol.attributes.items():
        if name not in attributes:
            raise GraphError(f"{node.op.opcode} has no attribute {name!r}")
        fits = wanted(attributes[name]) if callable(wanted) else attributes[name] == wanted
        if not fits:
            return
    commutes = node.op.opcode in COMMUTATIVE
    yield from _operands(symbol.operands, node.inputs, match._entered(node, symbol.name), commutes)


def _operands(
    symbols: tuple[Symbol, ...], values: tuple[Value, ...], match: Match, commutes: bool
) -> Iterator[Match]:
    if not symbols:
        if not values:
            yield match
        return
    first, *rest = symbols
    if isinstance(first, Each):
        if not rest:
            yield from _rest(first, values, match)
        return
    left = tuple(rest)
    positions = range(len(values)) if commutes else range(min(1, len(values)))
    for i in positions:
        others = values[:i] + values[i + 1 :]
        for found in _unified(first, values[i], match):
            yield from _operands(left, others, found, commutes)
    if isinstance(first, Variable) and first.optional and not values:
        yield from _operands(left, values, match, commutes)


def _rest(symbol: Each, values: tuple[Value, ...], match: Match) -> Iterator[Match]:
    """The operands that are left, each matched by itself."""
    if len(values) < symbol.at_least:
        return
    parts = []
    for value in values:
        producer = value.producer
        part = producer and next(symbol.template.matches(producer), None)
        if not part:
            return
        parts.append(part)
    inside = tuple(n for part in parts for n in part.inside)
    yield match._with(
        parts={**match.parts, symbol.name: tuple(parts)}, inside=(*match.inside, *inside)
    )
