"""Reading `-symbol.json`: the symbols of MXNet of all ages.

    {"nodes": [{"op": "null", "name": "data", "inputs": []},
               {"op": "Flatten", "name": "flat", "attrs": {}, "inputs": [[0, 0, 0]]}],
     "arg_nodes": [0], "heads": [[1, 0, 0]], "attrs": {"mxnet_version": ["int", 10901]}}

Nodes come in topological order; `"null"` is a variable; an entry is [node, output], with a version
behind it from 0.9 on. Older files keep parameters under `param` or `attr`. They are upgraded as
MXNet does it, by their version (major*10000 + minor*100 + patch, 800 where none is said):

1. keys that are or end in a hidden name (`lr_mult`) become `__lr_mult__` of the node, or of the
   variable that `weight_lr_mult` speaks of;
2. before 0.9.0 operators with missing trailing inputs get variables `<node>_<input>`;
3. before 0.9.4 variables get the `__init__` that their operator prescribes;
4. before 0.9.5 an `axis` of -1 of argmax and argmin is dropped, since it meant all axes;
5. `param` is joined with the attributes, which win.

A file is never trusted: sizes are limited, every type is checked, and an entry may only point back.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from branchgraph.ir.errors import FormatError, MissingError
from branchgraph.mx.attributes import is_hidden, shown
from branchgraph.mx.operators import Operator, named, read_operator

#: Longest file, in bytes.
LARGEST_FILE = 64 * 2**20
#: Most nodes of a symbol, and most inputs of all of them.
MOST_NODES = 2**18
MOST_ENTRIES = 2**20
#: The version that files are upgraded to.
VERSION = 10901

_VARIABLE = "null"
_HIDDEN_NAMES = ("ctx_group", "lr_mult", "wd_mult", "force_mirroring", "mirror_stage")
_NODE_KEYS = frozenset(
    ["op", "name", "param", "attr", "attrs", "inputs", "backward_source_id", "control_deps",
     "subgraphs"]
)  # fmt: skip
_GRAPH_KEYS = frozenset(["nodes", "arg_nodes", "node_row_ptr", "heads", "attrs"])


class Entry(NamedTuple):
    """One output of one node, by number."""

    node: int
    output: int


@dataclass(frozen=True)
class SymbolNode:
    """A variable (`operator` is None) or an operator with its parameters, read and as texts."""

    name: str
    operator: Operator | None = None
    inputs: tuple[Entry, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the visible outputs; a variable is its own."""
        if self.operator is None:
            return (self.name,)
        return tuple(f"{self.name}_{o}" for o in self.operator.outputs())


@dataclass(frozen=True)
class Symbol:
    """A read symbol: nodes in topological order, and the entries that are its outputs."""

    nodes: tuple[SymbolNode, ...]
    heads: tuple[Entry, ...]
    version: int = VERSION

    def inputs(self) -> list[int]:
        """The variables that the heads depend on, depth first in order of the inputs."""
        return [n for n in self.walk() if self.nodes[n].operator is None]

    def walk(self) -> Iterator[int]:
        """The nodes that the heads depend on, each after its inputs, depth first."""
        seen: set[int] = set()
        for head in self.heads:
            stack = [(head.node, iter(self.nodes[head.node].inputs))]
            if head.node in seen:
                continue
            seen.add(head.node)
            while stack:
                number, pending = stack[-1]
                following = next((e.node for e in pending if e.node not in seen), None)
                if following is None:
                    stack.pop()
                    yield number
                else:
                    seen.add(following)
                    stack.append((following, iter(self.nodes[following].inputs)))

    def auxiliary(self) -> list[int]:
        """The variables that are auxiliary states of an operator, in order of `inputs`."""
        states = {
            entry.node
            for node in self.nodes
            if node.operator is not None
            for entry in node.inputs[len(node.operator.arguments()) :]
        }
        return [n for n in self.inputs() if n in states]

    def arguments(self) -> list[int]:
        """The other variables, in order of `inputs`."""
        states = set(self.auxiliary())
        return [n for n in self.inputs() if n not in states]

    def argument_names(self) -> list[str]:
        """Names of `arguments`; two of them may share one."""
        return [self.nodes[n].name for n in self.arguments()]

    def auxiliary_names(self) -> list[str]:
        """Names of `auxiliary`."""
        return [self.nodes[n].name for n in self.auxiliary()]

    def output_names(self) -> list[str]:
        """Names of the heads."""
        return [self.nodes[h.node].output_names[h.output] for h in self.heads]


def load_symbol(path: str | os.PathLike[str]) -> Symbol:
    """The symbol in a file; `FormatError` where it is none, `MissingError` without a file."""
    target = Path(path)
    if not target.is_file():
        raise MissingError(f"{target}: there is no such file; give the path of a -symbol.json")
    with target.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    return read_symbol(content, str(target))


def read_symbol(content: bytes | str, what: str = "symbol") -> Symbol:
    """The symbol in JSON text; errors are `FormatError` and begin with `what`."""
    if len(content) > LARGEST_FILE:
        raise FormatError(f"{what}: more than {LARGEST_FILE} bytes; that is no symbol")
    try:
        text = content.decode() if isinstance(content, bytes) else content
        decoded = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(f"{what}: no JSON in UTF-8: {reason}") from None
    try:
        return _Reader(decoded).symbol()
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None


# -- checked access ------------------------------------------------------------------------------


def _typed(value: Any, kind: type, what: str) -> Any:
    """`value` if it is of the JSON type `kind`; a boolean is no number."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {dict: "an object", list: "a list", str: "a text", int: "an integer"}
        raise FormatError(f"{what} is {words[kind]}, got {shown(json.dumps(value))}")
    return value


def _texts(value: Any, what: str) -> dict[str, str]:
    """A map from texts to texts."""
    found = _typed(value, dict, what)
    return {key: _typed(text, str, f"{what}, {shown(key)},") for key, text in found.items()}


def _only(value: dict[str, Any], keys: frozenset[str], what: str) -> None:
    for key in value:
        if key not in keys:
            raise FormatError(
                f"{what} has the key {shown(key)}; known are {', '.join(sorted(keys))}"
            )


@dataclass
class _Raw:
    """A node while it is upgraded."""

    op: str
    name: str
    attributes: dict[str, str]
    inputs: list[Entry]

    @property
    def what(self) -> str:
        return f"{self.op} {shown(self.name)}"


class _Reader:
    """One symbol on its way from JSON to its record."""

    def __init__(self, decoded: Any) -> None:
        self.graph: dict[str, Any] = _typed(decoded, dict, "a symbol")
        _only(self.graph, _GRAPH_KEYS, "the symbol")
        for key in ("nodes", "arg_nodes", "heads"):
            if key not in self.graph:
                raise FormatError(f"the symbol has no {key!r}")
        self.version = self._version()
        self.entries = 0
        self.nodes: list[_Raw] = []

    def symbol(self) -> Symbol:
        listed = _typed(self.graph["nodes"], list, "'nodes'")
        if len(listed) > MOST_NODES:
            raise FormatError(f"{len(listed)} nodes, at most {MOST_NODES} are read")
        self._check_names(len(listed))
        raw = [self._node(number, node) for number, node in enumerate(listed)]
        numbers: list[int] = []
        for node in raw:
            node.inputs = [Entry(numbers[e.node], e.output) for e in node.inputs]
            self._upgrade(node)
            numbers.append(len(self.nodes))
            self.nodes.append(node)
        heads = _typed(self.graph["heads"], list, "'heads'")
        if not heads:
            raise FormatError("'heads' is empty; a symbol has at least one output")
        found = [self._entry(h, len(raw), "a head") for h in heads]
        finished = tuple(self._finished(n) for n in self.nodes)
        entries = [Entry(numbers[h.node], h.output) for h in found]
        for entry in (*(e for n in finished for e in n.inputs), *entries):
            _check_output(finished[entry.node], entry.output)
        symbol = Symbol(finished, tuple(entries), self.version)
        _check_states(symbol)
        return symbol

    def _version(self) -> int:
        attributes = _typed(self.graph.get("attrs", {}), dict, "'attrs'")
        for key, pair in attributes.items():
            typed = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
            if not typed:
                raise FormatError(f"'attrs', {shown(key)}, is a pair of a type and a value")
        version = attributes.get("mxnet_version", ["int", 800])[1]
        number: int = _typed(version, int, "'mxnet_version'")
        if number > VERSION:
            warnings.warn(
                f"the symbol was written by MXNet {number}, newer than {VERSION}; reading it as is",
                stacklevel=4,
            )
        return number

    def _check_names(self, count: int) -> None:
        """`arg_nodes` lists variables; it says nothing that the nodes do not."""
        for number in _typed(self.graph["arg_nodes"], list, "'arg_nodes'"):
            if not 0 <= _typed(number, int, "an entry of 'arg_nodes'") < count:
                raise FormatError(f"'arg_nodes' names node {number}; there are {count}")

    def _node(self, number: int, value: Any) -> _Raw:
        what = f"node {number}"
        node = _typed(value, dict, what)
        _only(node, _NODE_KEYS, what)
        for key in ("op", "name", "inputs"):
            if key not in node:
                raise FormatError(f"{what} has no {key!r}")
        op = _typed(node["op"], str, f"'op' of {what}")
        name = _typed(node["name"], str, f"'name' of {what}")
        if node.get("subgraphs") or node.get("control_deps"):
            raise FormatError(f"{what}, {shown(name)}: sub-graphs and control flow are not read")
        attributes: dict[str, str] = {}
        for key in ("param", "attr", "attrs"):
            attributes |= _texts(node.get(key, {}), f"{key!r} of {what}")
        listed = _typed(node["inputs"], list, f"'inputs' of {what}")
        self.entries += len(listed)
        if self.entries > MOST_ENTRIES:
            raise FormatError(f"more than {MOST_ENTRIES} inputs")
        return _Raw(op, name, attributes, [self._entry(e, number, what) for e in listed])

    def _entry(self, value: Any, before: int, what: str) -> Entry:
        entry = _typed(value, list, f"an entry of {what}")
        if len(entry) not in (2, 3):
            raise FormatError(f"an entry of {what} has two or three numbers, got {len(entry)}")
        node, output, *version = (_typed(e, int, f"an entry of {what}") for e in entry)
        if not 0 <= node < before:
            raise FormatError(f"{what} reads node {node}, but nodes come after their inputs")
        if output < 0 or any(v < 0 for v in version):
            raise FormatError(f"{what} reads output {output} of node {node}")
        return Entry(node, output)

    # -- upgrading -----------------------------------------------------------------------------

    def _upgrade(self, node: _Raw) -> None:
        if self.version < VERSION:
            self._hide(node)
        if node.op == _VARIABLE:
            return
        cls = _operator(node)
        of_all = cls.spelling in ("argmax", "argmin") and node.attributes.get("axis") == "-1"
        if self.version < 905 and of_all:
            del node.attributes["axis"]
        operator = read_operator(node.op, node.attributes, node.name)
        names = operator.inputs()
        if self.version < 900:
            for name in names[len(node.inputs) :]:
                node.inputs.append(Entry(len(self.nodes), 0))
                self.nodes.append(_Raw(_VARIABLE, f"{node.name}_{name}", dict(node.attributes), []))
        if self.version < 904:
            for name, entry in zip(names, node.inputs):
                source = self.nodes[entry.node]
                if name in operator.initial and source.op == _VARIABLE:
                    source.attributes.setdefault("__init__", operator.initial[name])

    def _hide(self, node: _Raw) -> None:
        """Old hidden keys get their underscores, on the node or on the input they speak of."""
        for key in list(node.attributes):
            hidden = next((h for h in _HIDDEN_NAMES if key.endswith(h)), None)
            if hidden is None:
                continue
            if key == hidden:
                node.attributes[f"__{hidden}__"] = node.attributes.pop(key)
            elif node.op != _VARIABLE and key.endswith(f"_{hidden}"):
                self._pass_on(node, key, hidden)

    def _pass_on(self, node: _Raw, key: str, hidden: str) -> None:
        rest = {k: v for k, v in node.attributes.items() if not k.endswith(_HIDDEN_NAMES)}
        names = read_operator(_operator(node).spelling, rest, node.name).inputs()
        argument = key[: -len(hidden) - 1]
        for name, entry in zip(names, node.inputs):
            if name == argument and self.nodes[entry.node].op == _VARIABLE:
                self.nodes[entry.node].attributes[f"__{hidden}__"] = node.attributes.pop(key)

    def _finished(self, node: _Raw) -> SymbolNode:
        if node.op == _VARIABLE:
            if node.inputs:
                raise FormatError(f"the variable {shown(node.name)} has inputs")
            return SymbolNode(node.name, attributes=node.attributes)
        operator = read_operator(node.op, node.attributes, node.name)
        names = operator.inputs()
        if len(node.inputs) != len(names):
            raise FormatError(
                f"{node.what} takes {len(names)} inputs ({', '.join(names)}), got "
                f"{len(node.inputs)}"
            )
        return SymbolNode(node.name, operator, tuple(node.inputs), node.attributes)


def _operator(node: _Raw) -> type[Operator]:
    try:
        return named(node.op)
    except FormatError as error:
        raise FormatError(f"node {shown(node.name)}: {error}") from None


def _check_output(node: SymbolNode, output: int) -> None:
    count = len(node.output_names)
    if output >= count:
        raise FormatError(f"output {output} of {shown(node.name)} is read; it has {count} to show")


def _check_states(symbol: Symbol) -> None:
    """Auxiliary states are variables."""
    for node in symbol.nodes:
        if node.operator is None:
            continue
        for name, entry in zip(node.operator.inputs(), node.inputs):
            source = symbol.nodes[entry.node]
            if name in node.operator.auxiliary and source.operator is not None:
                raise FormatError(f"{name} of {shown(node.name)} is a state and no computed value")


def user_attributes(node: SymbolNode) -> dict[str, str]:
    """The hidden attributes of a node, underscores included."""
    return {k: v for k, v in node.attributes.items() if is_hidden(k)}
