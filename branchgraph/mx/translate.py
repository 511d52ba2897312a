"""From a symbol to a declared graph: variables become inputs or states, operators native ops.

    translation = translate(load_symbol("net-symbol.json"), {"data": ("N", 3, 32, 32)})
    graph = translation.graph

Variables whose shape is given as an input, and labels of loss operators, are inputs of the run; the
other arguments are parameters and auxiliary states statistics, all bound by name. Shapes of
arguments follow from those of the data, operator by operator, in the order of the symbol; what
cannot be told yet waits for what comes later.

To train, specialise with `statistics="backward"` and differentiate the heads:

    graph = specialise(translation.graph, training=True, statistics="backward")
    vjp(graph, {graph.outputs[name]: seed, ...}, wrt=...)

Arrays that operators overwrite (gamma under `fix_gamma`) are updates of the graph in both modes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from branchgraph.ir.dims import Dim, DimLike, as_shape, format_shape
from branchgraph.ir.errors import FormatError, GraphError, ShapeError
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.initialisers import Constant, Initialiser, LeCunNormal, Ones, Zeros
from branchgraph.ir.op import make
from branchgraph.ir.state import Role, State
from branchgraph.ir.types import DType
from branchgraph.mx.attributes import Shape as Sizes
from branchgraph.mx.attributes import kind_of, parse
from branchgraph.mx.dtypes import FLAGS
from branchgraph.mx.operators.base import Operator, Shape
from branchgraph.mx.symbol_file import Entry, Symbol, SymbolNode

#: Initial values by what an operator calls the input; weights are drawn.
_INITIAL: dict[str, Initialiser] = {
    "bias": Zeros(),
    "beta": Zeros(),
    "gamma": Ones(),
    "moving_mean": Zeros(),
    "moving_var": Ones(),
}


@dataclass
class Translation:
    """A declared graph and what became of the variables of the symbol.

    `arguments` and `auxiliary` list (name, value) in MXNet's order, a name as often as variables
    carry it; a value is an input or reads a state. `heads` are the names of the graph's outputs in
    order of the symbol's heads.
    """

    graph: Graph
    arguments: list[tuple[str, Value]] = field(default_factory=list)
    auxiliary: list[tuple[str, Value]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)

    def states(self) -> list[State]:
        """Parameters and statistics in MXNet's order."""
        variables = (*self.arguments, *self.auxiliary)
        return [value.state for _, value in variables if value.state is not None]


def translate(
    symbol: Symbol,
    inputs: Mapping[str, Iterable[DimLike | str]],
    *,
    shapes: Mapping[str, Iterable[int]] | None = None,
    dtypes: Mapping[str, DType] | None = None,
    name: str = "symbol",
) -> Translation:
    """A declared graph of `symbol`.

    `inputs` gives the shapes of the variables that are fed, symbols such as "N" among the sizes;
    `shapes` those of parameters that do not follow, and `dtypes` element types other than those
    that follow from the data. Raises `GraphError` for names the symbol has not, and `ShapeError`,
    naming the node, where shapes contradict each other or cannot be told.
    """
    fed = {key: as_shape(shape) for key, shape in inputs.items()}
    given: dict[str, Shape] = {key: tuple(s) for key, s in (shapes or {}).items()}
    known = {symbol.nodes[n].name for n in symbol.inputs()}
    for key in (*fed, *given, *(dtypes or {})):
        if key not in known:
            names = ", ".join(dict.fromkeys(symbol.argument_names()))
            raise GraphError(f"no variable {key!r} in the symbol; there are: {names}")
    for key, shape in (*fed.items(), *given.items()):
        if not shape or any(isinstance(d, int) and d < 1 for d in shape):
            raise ShapeError(
                f"{key!r} has the shape {format_shape(shape)}; MXNet has no arrays without axes, "
                "and sizes are at least 1"
            )
    return _Translator(symbol, fed, given, dict(dtypes or {}), name).run()


class _Translator:
    def __init__(
        self,
        symbol: Symbol,
        fed: dict[str, Shape],
        given: dict[str, Shape],
        dtypes: dict[str, DType],
        name: str,
    ) -> None:
        self.symbol = symbol
        self.nodes = symbol.nodes
        self.fed = fed
        self.given = given
        self.dtypes = dtypes
        self.graph = Graph(name)
        self.outputs: dict[int, tuple[Value, ...]] = {}
        self.roles = dict(_roles(symbol))

    def run(self) -> Translation:
        order = list(self.symbol.walk())
        for number in order:
            node = self.nodes[number]
            if node.operator is None and node.name in self.fed:
                self.outputs[number] = (self._input(node, self.fed[node.name]),)
        waiting = [n for n in order if self.nodes[n].operator is not None]
        while waiting:
            left = [n for n in waiting if not self._visit(n)]
            if len(left) == len(waiting):
                self._incomplete(left)
            waiting = left
        for number in order:  # variables that are heads and nothing else
            if number not in self.outputs and not self._declare(number, None, None):
                raise ShapeError(f"the shape of {self.nodes[number].name!r} is not given")
        return self._finished()

    # -- nodes ---------------------------------------------------------------------------------

    def _visit(self, number: int) -> bool:
        """Build a node, if the shapes of its inputs can be told by now."""
        node = self.nodes[number]
        assert node.operator is not None
        shapes = tuple(self._shape(e) for e in node.inputs)
        try:
            inferred = node.operator.infer_inputs(shapes)
        except GraphError as error:
            raise type(error)(f"{_title(node)}: {error}") from None
        beside = self._float_beside(node)
        for entry, shape in zip(node.inputs, inferred):
            if entry.node not in self.outputs:
                self._declare(entry.node, shape, beside)
        if any(e.node not in self.outputs for e in node.inputs):
            return False
        values = [self.outputs[e.node][e.output] for e in node.inputs]
        try:
            self.outputs[number] = self._built(node, node.operator, values)
        except GraphError as error:
            raise type(error)(f"{_title(node)}: {error}") from None
        return True

    def _built(
        self, node: SymbolNode, operator: Operator, values: list[Value]
    ) -> tuple[Value, ...]:
        outputs = operator.build(*values)
        made = outputs[0].producer
        if made is not None and not made.name and outputs[0] not in values:
            made.name = node.name
        for name, number in operator.overwrites().items():
            target = values[operator.inputs().index(name)]
            if target.state is not None:
                full = make("full", value=number, shape=target.shape, dtype=target.dtype)
                self.graph.update(target.state, self.graph.emit(full))
        return outputs

    def _shape(self, entry: Entry) -> Shape | None:
        if entry.node in self.outputs:
            return self.outputs[entry.node][entry.output].shape
        node = self.nodes[entry.node]
        return self._said(node) if node.operator is None else None

    def _said(self, node: SymbolNode) -> Shape | None:
        """The shape of a variable by the caller or by itself, if it is complete."""
        if node.name in self.given:
            return self.given[node.name]
        text = node.attributes.get("__shape__")
        if text is None:
            return None
        sizes: Sizes = parse(kind_of(Sizes), text, f"__shape__ of {node.name!r}")
        return None if not sizes or min(sizes) < 1 else sizes

    # -- variables -----------------------------------------------------------------------------

    def _declare(self, number: int, shape: Shape | None, beside: DType | None) -> bool:
        """Make a variable of that shape an input or a state; False if nothing tells its shape."""
        node = self.nodes[number]
        if node.operator is not None:
            return False
        said = self._said(node)
        shape = shape if said is None else said
        if shape is None:
            return False
        role = self.roles.get(number, _Variable())
        if role.label:
            self.outputs[number] = (self._input(node, shape, beside),)
            return True
        if any(isinstance(d, Dim) for d in shape):
            raise ShapeError(
                f"the parameter {node.name!r} would have the shape {format_shape(shape)}; feed it "
                "as an input, or give the data a shape without a symbol"
            )
        sizes = tuple(int(d) for d in shape if isinstance(d, int))
        kind = Role.STATISTIC if role.auxiliary else Role.PARAMETER
        init = _initialiser(role.input, sizes, role.operator)
        state = State(node.name, sizes, self._dtype(node, beside), kind, init)
        self.outputs[number] = (self.graph.read(state),)
        return True

    def _input(self, node: SymbolNode, shape: Shape, beside: DType | None = None) -> Value:
        """The input of that name; variables of one name share it."""
        existing = self.graph.inputs.get(node.name)
        if existing is not None:
            return existing
        return self.graph.input(node.name, shape, self._dtype(node, beside))

    def _dtype(self, node: SymbolNode, beside: DType | None) -> DType:
        if node.name in self.dtypes:
            return self.dtypes[node.name]
        text = node.attributes.get("__dtype__")
        if text is None:
            return beside or DType.F32
        flag = parse(kind_of(int), text, f"__dtype__ of {node.name!r}")
        if flag not in FLAGS:
            raise FormatError(f"__dtype__ of {node.name!r}: the element type {flag} is unknown")
        return DType.of(FLAGS[flag])

    def _float_beside(self, node: SymbolNode) -> DType | None:
        """The element type of the first input that has one, if it is a floating type."""
        values = (self.outputs[e.node][e.output] for e in node.inputs if e.node in self.outputs)
        return next((v.dtype for v in values if v.dtype.is_float), None)

    # -- the end -------------------------------------------------------------------------------

    def _incomplete(self, waiting: list[int]) -> None:
        """`ShapeError` that names the first variable whose shape nothing tells."""
        for number in waiting:
            for entry in self.nodes[number].inputs:
                source = self.nodes[entry.node]
                if entry.node not in self.outputs and source.operator is None:
                    raise ShapeError(
                        f"the shape of {source.name!r} does not follow from the inputs; "
                        f"{_title(self.nodes[number])} reads it. Give it in inputs or shapes"
                    )

    def _finished(self) -> Translation:
        translation = Translation(self.graph)
        for listed, numbers in (
            (translation.arguments, self.symbol.arguments()),
            (translation.auxiliary, self.symbol.auxiliary()),
        ):
            listed += [(self.nodes[n].name, self.outputs[n][0]) for n in numbers]
        for title, head in zip(self.symbol.output_names(), self.symbol.heads):
            name, repeated = title, 1
            while name in self.graph.outputs:
                name, repeated = f"{title}#{repeated}", repeated + 1
            self.graph.output(name, self.outputs[head.node][head.output])
            translation.heads.append(name)
        return translation


@dataclass(frozen=True)
class _Variable:
    """What the first operator that reads a variable takes it for."""

    input: str = ""
    label: bool = False
    auxiliary: bool = False
    operator: Operator | None = None


def _roles(symbol: Symbol) -> Iterable[tuple[int, _Variable]]:
    """Roles of variables, the last reader first, so that the first one decides."""
    for node in reversed(symbol.nodes):
        operator = node.operator
        if operator is None:
            continue
        for name, entry in zip(operator.inputs(), node.inputs):
            if symbol.nodes[entry.node].operator is None:
                label, state = name in operator.labels, name in operator.auxiliary
                yield entry.node, _Variable(name, label, state, operator)


def _initialiser(name: str, shape: Sizes, operator: Operator | None) -> Initialiser:
    if operator is not None and "Constant" in operator.initial.get(name, ""):
        return Constant(0.25)
    fan_in = prod(shape[1:])
    return _INITIAL.get(name) or (LeCunNormal(fan_in=fan_in) if fan_in else Zeros())


def _title(node: SymbolNode) -> str:
    assert node.operator is not None
    return f"{node.operator.spelling} {node.name!r}"
