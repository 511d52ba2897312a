"""The text form of a graph: stable, readable, and parsed back to an equal graph.

    graph b_lenet {
      state conv1.W : f32[5, 1, 5, 5] param init=lecun_normal(fan_in=25, scale=1.0)
      input x : f32[N, 1, 28, 28]
      input exit1.threshold : f64[] = 0.5
      %0 = conv(x, conv1.W, conv1.b) {stride=[1, 1], ...} : f32[N, 5, 30, 30]  # conv1
      branch exit1 {
        %1 = max_pool(%0) {kernel=[2, 2], ...} : f32[N, 5, 15, 15]  # pool1
      }
      output y = %9
      update conv1.W = %40
      gradient conv1.W = %33
    }

Values of nodes are numbered in topological order; states that share a name are told apart by
`~2`, `~3`; names that are not plain labels are JSON strings. `scope` and `branch` blocks say where
the nodes inside stand, and what follows `#` is the name of the node.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from math import prod
from typing import Any, NoReturn

from branchgraph.ir.attributes import Word, build, format_value
from branchgraph.ir.dims import LARGEST_DIMENSION, Dim, DimLike, as_shape
from branchgraph.ir.errors import BranchgraphError, FormatError
from branchgraph.ir.graph import Graph, Location, Node, Scope, Value, at, shared_scope
from branchgraph.ir.initialisers import Initialiser
from branchgraph.ir.op import Op
from branchgraph.ir.state import Role, State
from branchgraph.ir.types import DType, TensorType

_LABEL = re.compile(r"[A-Za-z_/][A-Za-z0-9_./]*\Z")
_KEYWORDS = frozenset(
    {"graph", "state", "input", "output", "update", "gradient", "scope", "branch"}
)

#: Longest text that is parsed, in characters.
LONGEST_TEXT = 64 * 2**20
#: Longest line that is parsed, in characters.
LONGEST_LINE = 2**18
#: Deepest nesting of scopes that is parsed.
DEEPEST_SCOPE = 64
#: Most operands of a node, axes of a shape, and terms of a dimension that are parsed.
MOST_OPERANDS = 1024
MOST_AXES = 32
MOST_TERMS = 32
#: Most tokens of one attribute value or dimension, and longest message.
_LONGEST_LITERAL = 8 * MOST_TERMS
_LONGEST_MESSAGE = 1000


def _quoted(name: str) -> str:
    return name if _LABEL.match(name) and name not in _KEYWORDS else json.dumps(name)


# -- writing ---------------------------------------------------------------------------------------


class Labels:
    """Names of values and states as text spells them."""

    def __init__(self, graph: Graph) -> None:
        self.states: dict[State, str] = {}
        self.values: dict[Value, str] = {}
        taken: set[str] = set()
        for name, value in graph.inputs.items():
            self.values[value] = _quoted(name)
            taken.add(name)
        counts: dict[str, int] = {}
        for state in graph.states:
            name = state.name
            while name in taken:
                counts[state.name] = counts.get(state.name, 1) + 1
                name = f"{state.name}~{counts[state.name]}"
            taken.add(name)
            self.states[state] = _state_label(state.name, name)
        for state, value in graph.reads.items():
            self.values[value] = self.states[state]
        numbered = (v for node in graph.nodes for v in node.outputs)
        self.values.update((value, f"%{i}") for i, value in enumerate(numbered))


def _state_label(name: str, unique: str) -> str:
    return _quoted(name) + unique[len(name) :]


def format_graph(graph: Graph) -> str:
    """The text of `graph`, ending in a newline."""
    labels = Labels(graph)
    lines = [f"graph {_quoted(graph.name)} {{"]
    lines += (f"  state {labels.states[s]} : {_format_state(s)}" for s in graph.states)
    for value in graph.inputs.values():
        default = "" if value.default is None else f" = {format_value(value.default)}"
        lines.append(f"  input {labels.values[value]} : {value.type}{default}")
    lines += _format_nodes(graph, labels)
    for kind, roots in (("update", graph.updates), ("gradient", graph.gradients)):
        lines += (f"  {kind} {labels.states[s]} = {labels.values[v]}" for s, v in roots.items())
    lines += (f"  output {_quoted(n)} = {labels.values[v]}" for n, v in graph.outputs.items())
    return "\n".join([*lines, "}", ""])


def _format_state(state: State) -> str:
    values = state.init.attributes().items()
    arguments = ", ".join(f"{k}={format_value(v)}" for k, v in values)
    return f"{state.type} {state.role.value} init={state.init.spelling}({arguments})"


def _format_nodes(graph: Graph, labels: Labels) -> Iterator[str]:
    open_scopes: Location = ()
    for node in graph.nodes:
        shared = len(shared_scope(open_scopes, node.scope))
        for depth in range(len(open_scopes), shared, -1):
            yield "  " * depth + "}"
        for depth in range(shared, len(node.scope)):
            part = node.scope[depth]
            kind = "branch" if part.branch else "scope"
            yield "  " * (depth + 1) + f"{kind} {_quoted(part.name)} {{"
        open_scopes = node.scope
        yield "  " * (len(open_scopes) + 1) + format_node(node, labels)
    for depth in range(len(open_scopes), 0, -1):
        yield "  " * depth + "}"


def format_node(node: Node, labels: Labels) -> str:
    """One line of the text form."""
    results = ", ".join(labels.values[v] for v in node.outputs)
    operands = ", ".join(labels.values[v] for v in node.inputs)
    values = ", ".join(f"{k}={format_value(v)}" for k, v in node.op.attributes().items())
    attributes = f" {{{values}}}" if values else ""
    types = ", ".join(str(v.type) for v in node.outputs)
    name = f"  # {_quoted(node.name)}" if node.name else ""
    return f"{results} = {node.op.opcode}({operands}){attributes} : {types}{name}"


# -- reading ---------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+)
      | (?P<newline>\n)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<value>%\d{1,9})
      | (?P<float>-?\d+(?:\.\d*(?:[eE][+-]?\d+)?|[eE][+-]?\d+))
      | (?P<int>-?\d{1,18}(?![\d.]))
      | (?P<label>[A-Za-z_/][A-Za-z0-9_./]*)
      | (?P<suffix>~\d{1,9})
      | (?P<mark>[{}()\[\],:=*+\#-])""",
    re.VERBOSE | re.ASCII,
)
_BLANK = re.compile(r"[ \t\r\n]*")


class _Tokens:
    """A stream of (kind, text), read line by line, with line numbers for messages.

    `items` holds one line, so that what is wrong is found before what follows is read.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.at_char = 0
        self.line = 1
        self.items: list[tuple[str, str]] = []
        self.position = 0
        self._read_line()

    def _read_line(self) -> None:
        """Fill `items` with the next line that is not blank."""
        self.line += sum(kind == "newline" for kind, _ in self.items)
        self.items, self.position = [], 0
        start = self._skip_blank()
        end = self.source.find("\n", start) + 1 or len(self.source)
        if end - start > LONGEST_LINE:
            raise FormatError(
                f"line {self.line}: {end - start} characters; the limit is {LONGEST_LINE}"
            )
        while self.at_char < end:
            match = _TOKEN.match(self.source, self.at_char, end)
            if match is None:
                unexpected = self.source[self.at_char]
                raise FormatError(f"line {self.line}: unexpected character {unexpected!r}")
            kind = match.lastgroup or ""
            if kind != "space":
                self.items.append((kind, match.group()))
            self.at_char = match.end()
        if end == len(self.source):
            self.items.append(("end", "end of text"))

    def _skip_blank(self) -> int:
        match = _BLANK.match(self.source, self.at_char)
        assert match is not None
        self.line += self.source.count("\n", self.at_char, match.end())
        self.at_char = match.end()
        return self.at_char

    def advance(self) -> None:
        self.position += 1
        if self.position == len(self.items) and self.items[-1][0] != "end":
            self._read_line()

    @property
    def kind(self) -> str:
        return self.items[self.position][0]

    @property
    def text(self) -> str:
        return self.items[self.position][1]

    def fail(self, expected: str) -> NoReturn:
        found = "end of line" if self.kind == "newline" else repr(self.text)
        raise FormatError(f"line {self.line}: expected {expected}, got {found[:80]}")

    def take(self, kind: str, what: str) -> str:
        if self.kind != kind:
            self.fail(what)
        text = self.text
        self.advance()
        return text

    def accept(self, text: str) -> bool:
        if self.text != text or self.kind not in ("mark", "label"):
            return False
        self.advance()
        return True

    def expect(self, text: str) -> None:
        if not self.accept(text):
            self.fail(repr(text))

    def name(self, what: str) -> str:
        if self.kind == "string":
            return _unquote(self.take("string", what), self)
        return self.take("label", what)

    def skip_lines(self) -> None:
        while self.kind == "newline":
            self.advance()

    def end_line(self) -> None:
        self.take("newline", "end of line")
        self.skip_lines()


def _unquote(text: str, tokens: _Tokens) -> str:
    try:
        name = str(json.loads(text))
        name.encode()
    except (json.JSONDecodeError, UnicodeEncodeError):
        return tokens.fail("a JSON string without lone surrogates before this")
    return name


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = _Tokens(text)
        self.values: dict[str, Value] = {}
        self.states: dict[str, State] = {}

    def graph(self) -> Graph:
        t = self.tokens
        t.skip_lines()
        t.expect("graph")
        graph = Graph(t.name("a graph name"))
        t.expect("{")
        t.end_line()
        self._body(graph)
        t.expect("}")
        t.skip_lines()
        if t.kind != "end":
            t.fail("the end of the text")
        self._forget_reads(graph)
        return graph

    def _forget_reads(self, graph: Graph) -> None:
        """Leave states that are only updated unread; those before a state that is read stay.

        So the states come in the order of their declarations, and labels stay what they are.
        """
        kept = list(graph.reads)
        roots = set(graph.roots)
        while kept:
            value = graph.reads[kept[-1]]
            if value.users or value in roots or kept[-1] not in graph.updates:
                break
            kept.pop()
        graph.keep(read=set(kept).__contains__)

    def _body(self, graph: Graph) -> None:
        statements = {
            "state": self._state, "input": self._input, "output": self._output,
            "update": self._update, "gradient": self._gradient,
        }  # fmt: skip
        t = self.tokens
        location: Location = ()
        while True:
            if t.kind == "value":
                with at(location):
                    self._node(graph)
            elif t.kind == "label" and t.text in ("scope", "branch"):
                location = self._open(location)
            elif t.text == "}" and t.kind == "mark" and location:
                t.expect("}")
                location = location[:-1]
            elif t.kind == "label" and t.text in statements:
                statements[t.take("label", "a statement")](graph)
            else:
                break
            t.end_line()

    def _open(self, location: Location) -> Location:
        is_branch = self.tokens.take("label", "scope or branch") == "branch"
        name = self.tokens.name("a scope name")
        self.tokens.expect("{")
        if len(location) >= DEEPEST_SCOPE:
            self.tokens.fail(f"at most {DEEPEST_SCOPE} nested scopes")
        return (*location, Scope(name, is_branch))

    def _label(self, what: str) -> tuple[str, str]:
        """A name, and the same with its `~k` suffix."""
        name = self.tokens.name(what)
        suffix = self.tokens.take("suffix", what) if self.tokens.kind == "suffix" else ""
        return name, name + suffix

    def _state(self, graph: Graph) -> None:
        t = self.tokens
        name, unique = self._label("a state name")
        if unique in self.states:
            t.fail(f"a new name; state {unique} is declared twice")
        t.expect(":")
        type = self._type()
        role = self._role()
        t.expect("init")
        t.expect("=")
        init = self._initialiser()
        shape = tuple(d if isinstance(d, int) else t.fail("a concrete shape") for d in type.shape)
        if prod(shape) > LARGEST_DIMENSION:
            t.fail(f"a state of at most {LARGEST_DIMENSION} elements before this")
        self.states[unique] = State(name, shape, type.dtype, role, init)
        graph.read(self.states[unique])

    def _role(self) -> Role:
        word = self.tokens.take("label", "a role")
        for role in Role:
            if role.value == word:
                return role
        self.tokens.position -= 1
        return self.tokens.fail("one of the roles " + ", ".join(r.value for r in Role))

    def _initialiser(self) -> Initialiser:
        spelling = self.tokens.take("label", "an initialiser")
        cls = Initialiser.registry.get(spelling)
        if cls is None:
            known = ", ".join(Initialiser.registry)
            raise FormatError(f"unknown initialiser {spelling!r}; known: {known}")
        built: Initialiser = build(cls, self._attributes("(", ")"), f"initialiser {spelling}")
        return built

    def _input(self, graph: Graph) -> None:
        name = self.tokens.name("an input name")
        self.tokens.expect(":")
        type = self._type()
        default = None
        if self.tokens.accept("="):
            default = self._number()
        if name in self.states:
            self.tokens.fail(f"a new name before this; {name} is a state")
        self.values[name] = graph.input(name, type.shape, type.dtype, default)

    def _number(self) -> float:
        value = self._literal()
        if isinstance(value, str) and value not in ("inf", "-inf", "nan"):
            self.tokens.fail(f"a number instead of {value[:80]!r} before this")
        return float(value)

    def _output(self, graph: Graph) -> None:
        name = self.tokens.name("an output name")
        self.tokens.expect("=")
        graph.output(name, self._operand(graph))

    def _update(self, graph: Graph) -> None:
        state = self._known_state()
        if state in graph.updates:
            self.tokens.fail(f"one update a state; {state.name} has one before this")
        self.tokens.expect("=")
        graph.update(state, self._operand(graph))

    def _gradient(self, graph: Graph) -> None:
        state = self._known_state()
        if state in graph.gradients:
            self.tokens.fail(f"one gradient a state; {state.name} has one before this")
        self.tokens.expect("=")
        graph.set_gradient(state, self._operand(graph))

    def _known_state(self) -> State:
        _, unique = self._label("a state")
        if unique not in self.states:
            self.tokens.position -= 1
            self.tokens.fail("a declared state")
        return self.states[unique]

    def _operand(self, graph: Graph) -> Value:
        t = self.tokens
        if t.kind == "value":
            if t.text not in self.values:
                t.fail("a value defined above (graphs are acyclic)")
            return self.values[t.take("value", "a value")]
        position = t.position
        _, unique = self._label("a value, an input or a state")
        if unique in self.values:
            return self.values[unique]
        if unique in self.states:
            return graph.read(self.states[unique])
        t.position = position
        return t.fail("a declared input or state")

    def _node(self, graph: Graph) -> None:
        t = self.tokens
        results = [t.take("value", "a result")]
        while t.accept(","):
            results.append(t.take("value", "a result"))
        t.expect("=")
        cls = Op.named(t.take("label", "an op"))
        inputs = self._operands(graph)
        attributes = self._attributes("{", "}") if t.text == "{" else {}
        op: Op = build(cls, attributes, f"op {cls.opcode}")
        t.expect(":")
        types = [self._type()]
        while t.accept(","):
            types.append(self._type())
        name = t.name("a node name") if t.accept("#") else ""
        outputs = graph.apply(op, *inputs, name=name)
        inferred = [v.type for v in outputs]
        if inferred != types:
            listed = ", ".join(map(str, inferred))
            t.fail(f"the types {listed} for {cls.opcode} (as inferred)")
        if len(results) != len(outputs):
            t.fail(f"{len(outputs)} results of {cls.opcode}")
        for label, value in zip(results, outputs):
            if label in self.values:
                t.fail(f"a new value; {label} is defined twice")
            self.values[label] = value

    def _operands(self, graph: Graph) -> list[Value]:
        t = self.tokens
        t.expect("(")
        operands: list[Value] = []
        while not t.accept(")"):
            if operands:
                t.expect(",")
            if len(operands) == MOST_OPERANDS:
                t.fail(f"at most {MOST_OPERANDS} operands")
            operands.append(self._operand(graph))
        return operands

    def _type(self) -> TensorType:
        dtype = DType.of(self.tokens.take("label", "a dtype"))
        return TensorType(self._shape(), dtype)

    def _shape(self) -> tuple[DimLike, ...]:
        shape = as_shape(_as_dim_text(v) for v in self._list())
        if len(shape) > MOST_AXES:
            self.tokens.fail(f"at most {MOST_AXES} axes before this")
        for d in shape:
            if isinstance(d, int) and d > LARGEST_DIMENSION:
                self.tokens.fail(f"dimensions up to {LARGEST_DIMENSION}")
            if isinstance(d, Dim) and len(d.terms) > MOST_TERMS:
                self.tokens.fail(f"dimensions of at most {MOST_TERMS} terms before this")
        return shape

    def _attributes(self, opening: str, closing: str) -> dict[str, object]:
        t = self.tokens
        t.expect(opening)
        found: dict[str, object] = {}
        while not t.accept(closing):
            if found:
                t.expect(",")
            key = t.take("label", "an attribute name")
            if key in found:
                t.fail(f"each attribute once; {key} came before")
            t.expect("=")
            found[key] = self._list() if t.text == "[" else self._literal()
        return found

    def _list(self) -> list[object]:
        t = self.tokens
        t.expect("[")
        found: list[object] = []
        while not t.accept("]"):
            if found:
                t.expect(",")
            found.append(self._literal())
        return found

    def _literal(self) -> Any:
        """An int, a float, a string, or a Word (bare word or affine expression)."""
        t = self.tokens
        if t.kind == "string":
            return _unquote(t.take("string", "a string"), t)
        if t.kind == "float":
            return float(t.take("float", "a number"))
        parts: list[str] = []
        while t.kind in ("int", "label") or (t.kind == "mark" and t.text in "*+-"):
            parts.append(t.text)
            t.advance()
            if len(parts) > _LONGEST_LITERAL:
                t.fail("a shorter expression before this")
        if not parts:
            t.fail("an attribute value")
        if len(parts) == 1 and parts[0].lstrip("-").isdigit():
            return int(parts[0])
        return Word("".join(parts))


def _as_dim_text(value: object) -> DimLike | str:
    if isinstance(value, (int, Word)):
        return value
    raise FormatError(f"{value!r} is no dimension")


def parse_graph(text: str) -> Graph:
    """The graph written as `text`.

    Raises `FormatError` with the line number when the text is not well formed, names something
    undeclared, defines something twice, or states a type that inference contradicts.
    """
    if len(text) > LONGEST_TEXT:
        raise FormatError(f"text of {len(text)} characters; the limit is {LONGEST_TEXT}")
    parser: _Parser | None = None
    try:
        parser = _Parser(text)
        return parser.graph()
    except BranchgraphError as error:
        message = str(error)
        if parser is not None and not message.startswith("line "):
            message = f"line {parser.tokens.line}: {message}"
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + " ..."
        raise FormatError(message) from None
