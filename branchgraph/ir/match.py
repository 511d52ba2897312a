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
  A result that is used twice (`z = p.exp(x)`, then `p.divide(z, p.reduce_sum(z))`) is one node.
- Operands of commutative ops are found in any order.
- `p.each("convs", template)` takes all the operands that are left: `template(p)` is a pattern that
  every one of them has by itself; `p.others()` takes them whatever they are.
- `p.siblings("convs", x, template)` is a result that stands for all readers of x that look like
  `template(p, x)`; `match.each("convs")` are their own matches.
- A function may return several values: one node is found for each, sharing variables.

What cannot match (unknown ops and attributes, too many operands) is refused when it is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from branchgraph.ir.attributes import field_types, normalise
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
    #: Whether it came as a parameter of the pattern function.
    parameter: bool = False


@dataclass(frozen=True, eq=False)
class Number(Symbol):
    """A constant filled with one number."""

    value: float


@dataclass(frozen=True, eq=False)
class Each(Symbol):
    """The operands that are left, each like one template if there is one."""

    name: str
    template: Pattern | None
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
    #: Nodes by the symbol that stands for them, so that one used twice is one node.
    bound: Mapping[Symbol, Node] = field(default_factory=dict)

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

    def _entered(self, node: Node, symbol: Applied) -> Match:
        nodes = {**self.nodes, symbol.name: node} if symbol.name else self.nodes
        inside = self.inside if node in self.inside else (*self.inside, node)
        return self._with(nodes=nodes, inside=inside, bound={**self.bound, symbol: node})


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
        name = options.pop("name", "")
        symbols = tuple(map(_symbol, operands))
        for code in codes:
            _check_operands(Op.named(code), symbols)
        found = {k: _wanted(codes, k, v) for k, v in options.items()}
        return Applied(codes, symbols, found, name)

    def each(self, name: str, template: Callable[..., Any], at_least: int = 0) -> Symbol:
        """All operands that are left, each like `template(p)`."""
        return Each(name, _template(template), at_least)

    def others(self, at_least: int = 0) -> Symbol:
        """All operands that are left, whatever they are."""
        return Each("", None, at_least)

    def siblings(
        self, name: str, of: Symbol, template: Callable[..., Any], at_least: int = 2
    ) -> Symbol:
        """All readers of a value that look like `template(p, x)`, as one result."""
        found = _template(template)
        if not found.variables:
            raise GraphError(f"siblings {name!r}: the template takes (p, x), x what they read")
        return Siblings(name, of, found, at_least)

    def __getattr__(self, opcode: str) -> Callable[..., Symbol]:
        if opcode.startswith("_"):
            raise AttributeError(opcode)
        Op.named(opcode)
        return lambda *operands, **options: self.op(opcode, *operands, **options)


def _symbol(value: Any) -> Symbol:
    if isinstance(value, Siblings):
        raise GraphError(f"siblings {value.name!r} are a result, not an operand")
    if isinstance(value, Symbol):
        return value
    if isinstance(value, (int, float)):
        return Number(float(value))
    raise GraphError(f"an operand is a variable, a number or the result of an op, got {value!r}")


def _check_operands(op: type[Op], symbols: tuple[Symbol, ...]) -> None:
    """Raise `GraphError` if no node of `op` has operands like `symbols`."""
    if any(isinstance(s, Each) for s in symbols[:-1]):
        raise GraphError(
            f"{op.opcode}: p.each stands for the operands that are left, so it is last"
        )
    names = op.operands
    variadic = bool(names) and names[-1].startswith("*")
    needed = sum(not n.endswith("?") for n in names) - variadic
    least = sum(not (isinstance(s, Each) or _is_optional(s)) for s in symbols)
    most = len(symbols) + (len(names) if symbols and isinstance(symbols[-1], Each) else 0)
    if most < needed or (least > len(names) and not variadic):
        raise GraphError(f"{op.opcode} takes ({', '.join(names)}), got {len(symbols)} operands")


def _is_optional(symbol: Symbol) -> bool:
    return isinstance(symbol, Variable) and symbol.optional


def _wanted(opcodes: tuple[str, ...], name: str, value: Any) -> Any:
    """A test of an attribute, or its value in canonical form."""
    for code in opcodes:
        known = field_types(Op.named(code))
        if name not in known:
            raise GraphError(
                f"{code} has no attribute {name!r}; it has: {', '.join(known) or 'none'}"
            )
        if not callable(value):
            value = normalise(value, known[name], f"{code}.{name}")
    return value


def _template(function: Callable[..., Any]) -> Pattern:
    made = Pattern(function)
    if len(made.roots) != 1 or not isinstance(made.roots[0], Applied):
        raise GraphError(f"template {made.name}: it must be one result of an op")
    return made


class Pattern:
    """A pattern function, called once; see the module for what it may write."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        _, *names = inspect.signature(function).parameters
        self.variables = tuple(names)
        given = [Variable(n, parameter=True) for n in names]
        made = function(Maker(), *given)
        self.roots: tuple[Symbol, ...] = made if isinstance(made, tuple) else (made,)
        for root in self.roots:
            if not isinstance(root, (Applied, Siblings)):
                raise GraphError(f"pattern {self.name}: its result must come from an op")
        if len(self.roots) > 1 and any(isinstance(r, Siblings) for r in self.roots):
            raise GraphError(f"pattern {self.name}: siblings must be its only result")
        self._check_names(given)

    def _check_names(self, given: list[Variable]) -> None:
        for symbol in _symbols(self.roots):
            if isinstance(symbol, Variable) and symbol.parameter and symbol not in given:
                raise GraphError(
                    f"template {self.name} reads {symbol.name!r} of the pattern around it; it "
                    "matches by itself, so compare values in the rule's check"
                )
        names = [s.name for s in _symbols(self.roots) if isinstance(s, Applied) and s.name]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice:
            raise GraphError(f"pattern {self.name}: two nodes are called {twice!r}")

    @property
    def opcodes(self) -> tuple[str, ...]:
        """Opcodes of the node that a match starts at."""
        first = self.roots[0]
        start = first.template.roots[0] if isinstance(first, Siblings) else first
        return start.opcodes if isinstance(start, Applied) else ()

    @property
    def depth(self) -> int:
        """How many nodes may stand above one another in a match."""
        return max(map(_depth, self.roots))

    def match(self, node: Node) -> Match | None:
        """The first match whose first result `node` makes, or None."""
        return next(self.matches(node), None)

    def matches(self, node: Node) -> Iterator[Match]:
        """All ways to match the pattern with `node` as what makes its first result."""
        first, *others = self.roots
        if isinstance(first, Siblings):
            yield from _family(first, node)
            return
        for match in _applied(first, node, Match()):
            yield from _others(others, match._with(roots=(node,)))


def pattern(function: Callable[..., Any]) -> Pattern:
    """The pattern that `function` writes."""
    return Pattern(function)


# -- unification -----------------------------------------------------------------------------------


def _family(symbol: Siblings, node: Node) -> Iterator[Match]:
    """All siblings of `node`, if it is the first of them."""
    seen: set[Value] = set()
    for start in symbol.template.matches(node):
        parent = start.values[symbol.template.variables[0]]
        if parent in seen:
            continue
        seen.add(parent)
        family = _alike(symbol.template, parent)
        first = next(family, None)
        if first is None or first.roots[0] is not node:
            continue
        parts = [first, *family]
        if len(parts) >= symbol.at_least:
            inside = tuple(n for m in parts for n in m.inside)
            roots = tuple(n for m in parts for n in m.roots)
            whole = Match(parts={symbol.name: tuple(parts)}, inside=inside, roots=roots)
            yield from _unified(symbol.of, parent, whole)


def _alike(template: Pattern, parent: Value) -> Iterator[Match]:
    """Matches of a template by the nodes that read `parent` through it."""
    variable = template.variables[0]
    for user in _readers([parent], template.depth, template.opcodes):
        ways = (m for m in template.matches(user) if m.values[variable] is parent)
        yield from islice(ways, 1)


def _readers(values: Iterable[Value], levels: int, opcodes: tuple[str, ...]) -> Iterator[Node]:
    """Nodes of `opcodes` that read one of `values`, directly or through fewer than `levels` nodes.

    Depth first, so that the first one is found without a look at all the others.
    """
    seen: dict[Node, int] = {}
    for value in values:
        yield from _climb(value, levels, opcodes, seen)


def _climb(
    value: Value, levels: int, opcodes: tuple[str, ...], seen: dict[Node, int]
) -> Iterator[Node]:
    for node in value.users:
        reached = seen.get(node, 0)
        if reached >= levels:
            continue
        seen[node] = levels
        if not reached and node.op.opcode in opcodes:
            yield node
        for output in node.outputs if levels > 1 else ():
            yield from _climb(output, levels - 1, opcodes, seen)


def _others(roots: list[Symbol], match: Match) -> Iterator[Match]:
    """The match extended by the other results, each found among readers of what is matched."""
    if not roots:
        yield match
        return
    first, *rest = roots
    if first in match.bound:
        yield from _others(rest, match._with(roots=(*match.roots, match.bound[first])))
        return
    assert isinstance(first, Applied)
    made = (v for node in match.inside for v in node.outputs)
    known = [*match.values.values(), *made]
    for node in _readers(known, _depth(first), first.opcodes):
        if node not in match.inside:
            for found in _applied(first, node, match):
                yield from _others(rest, found._with(roots=(*found.roots, node)))


def _symbols(roots: tuple[Symbol, ...]) -> list[Symbol]:
    """All symbols below `roots`, each once, templates left out."""
    found: dict[Symbol, None] = {}
    pending = list(roots)
    while pending:
        symbol = pending.pop()
        if symbol not in found:
            found[symbol] = None
            pending += symbol.operands if isinstance(symbol, Applied) else ()
            pending += (symbol.of,) if isinstance(symbol, Siblings) else ()
    return list(found)


def _depth(symbol: Symbol) -> int:
    if isinstance(symbol, Applied):
        return 1 + max(map(_depth, symbol.operands), default=0)
    if isinstance(symbol, Each):
        return symbol.template.depth if symbol.template else 0
    return symbol.template.depth + _depth(symbol.of) if isinstance(symbol, Siblings) else 0


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
    if symbol in match.bound:
        if match.bound[symbol] is node:
            yield match
        return
    if not isinstance(symbol, Applied) or node.op.opcode not in symbol.opcodes:
        return
    for name, wanted in symbol.attributes.items():
        value = getattr(node.op, name)
        if not (wanted(value) if callable(wanted) else value == wanted):
            return
    commutes = node.op.opcode in COMMUTATIVE
    yield from _operands(symbol.operands, node.inputs, match._entered(node, symbol), commutes)


def _operands(
    symbols: tuple[Symbol, ...], values: tuple[Value, ...], match: Match, commutes: bool
) -> Iterator[Match]:
    if not symbols:
        if not values:
            yield match
        return
    first, *rest = symbols
    if isinstance(first, Each):
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
    if symbol.template is None:
        yield match
        return
    parts = []
    for value in values:
        producer = value.producer
        single = producer is not None and len(producer.outputs) == 1
        part = symbol.template.match(producer) if producer and single else None
        if part is None:
            return
        parts.append(part)
    inside = dict.fromkeys([*match.inside, *(n for part in parts for n in part.inside)])
    yield match._with(parts={**match.parts, symbol.name: tuple(parts)}, inside=tuple(inside))
