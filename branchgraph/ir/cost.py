"""The cost model: multiply-accumulates, parameters and activation bytes of a graph.

`macs` counts convolutions and products only. The mode `paradise` counts as the ParaDise repository
does, per image: a convolution adds one MAC an output element for its bias, batch norm 2 an input
element, activations 1 an output element, pooling 1 an input element; additions, softmax, sigmoid
and means are free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from branchgraph.ir.dims import DimLike
from branchgraph.ir.errors import DimensionError, FormatError
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.ops.activation import Elu, LeakyRelu, Relu
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.norm import BatchNorm, BatchNormInference, BatchNormTraining
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.sample_conv import SampleConv
from branchgraph.ir.state import Role
from branchgraph.ir.static import frontier, static_values

Rule = Callable[[Node], DimLike]


def _plain(node: Node) -> DimLike:
    types = tuple(v.type for v in node.inputs), tuple(v.type for v in node.outputs)
    return node.op.macs(*types)


def _conv_with_bias(node: Node) -> DimLike:
    biased = len(node.inputs) == 3
    return _plain(node) + (node.output.type.size if biased else 0)


def _twice_input(node: Node) -> DimLike:
    return 2 * node.inputs[0].type.size


def _input_elements(node: Node) -> DimLike:
    return node.inputs[0].type.size


def _output_elements(node: Node) -> DimLike:
    return node.output.type.size


_PARADISE: dict[type, Rule] = {
    Conv: _conv_with_bias,
    SampleConv: _conv_with_bias,
    Dense: _plain,
    BatchNorm: _twice_input,
    BatchNormTraining: _twice_input,
    BatchNormInference: _twice_input,
    Relu: _output_elements,
    LeakyRelu: _output_elements,
    Elu: _output_elements,
    MaxPool: _input_elements,
    AveragePool: _input_elements,
}


def _paradise(node: Node) -> DimLike:
    rule = _PARADISE.get(type(node.op))
    return rule(node) if rule else 0


#: Counting mode to the MACs of one node.
MODES: dict[str, Rule] = {
    "plain": _plain,
    "paradise": _paradise,
}


@dataclass(frozen=True)
class GraphCost:
    """Cost of a graph; dimensions may hold the batch symbol."""

    macs: DimLike
    parameters: int
    activation_bytes: DimLike

    def per_sample(self) -> SampleCost:
        """The same for a batch of one."""
        return SampleCost(_at_one(self.macs), self.parameters, _at_one(self.activation_bytes))


@dataclass(frozen=True)
class SampleCost:
    """Cost of a graph for one sample."""

    macs: int
    parameters: int
    activation_bytes: int


def _at_one(d: DimLike) -> int:
    if isinstance(d, int):
        return d
    value = d.substitute(dict.fromkeys(d.symbols, 1))
    assert isinstance(value, int)
    return value


def node_macs(node: Node, mode: str = "plain") -> DimLike:
    """Multiply-accumulates of one node under a counting mode."""
    if mode not in MODES:
        raise FormatError(f"unknown counting mode {mode!r}; known: {', '.join(MODES)}")
    return MODES[mode](node)


def cost(graph: Graph, mode: str = "plain") -> GraphCost:
    """MACs, trainable parameters and bytes of all node outputs."""
    macs: DimLike = 0
    activation_bytes: DimLike = 0
    for node in graph.nodes:
        macs = macs + node_macs(node, mode)
        for value in node.outputs:
            activation_bytes = activation_bytes + value.type.nbytes
    return GraphCost(macs, parameter_count(graph), activation_bytes)


@dataclass(frozen=True)
class DeployedCost:
    """Cost for one sample of a graph whose parameter expressions are evaluated."""

    #: None where it is no affine form: a layer's sizes are products of symbols.
    macs: int | None
    parameters: int


def deployed_cost(graph: Graph) -> DeployedCost:
    """Cost for one sample once parameter expressions are evaluated (`materialise`).

    Work of static nodes counts nothing, and parameters are the trained arrays, or results of
    expressions over them, that the rest of the graph reads.
    """
    static = static_values(graph)
    left = (n for n in graph.nodes if not (n.outputs and n.outputs[0] in static))
    macs: int | None
    try:
        macs = sum(_at_one(node_macs(node)) for node in left)
    except DimensionError:
        macs = None
    return DeployedCost(macs, _deployed_parameters(graph, static))


def _deployed_parameters(graph: Graph, static: set[Value]) -> int:
    """Elements of what the rest reads, of kinds that are trained."""
    if graph.updates:
        return parameter_count(graph)
    trained = {v for s, v in graph.reads.items() if s.role is Role.PARAMETER}
    for node in graph.nodes:
        if node.outputs[0] in static and any(v in trained for v in node.inputs):
            trained.update(node.outputs)
    return sum(_elements(_concrete(v)) for v in frontier(graph, static) if v in trained)


def _concrete(value: Value) -> tuple[int, ...]:
    return tuple(d for d in value.shape if isinstance(d, int))


def parameter_count(graph: Graph) -> int:
    """Number of trained scalars; a parameter that is read twice counts once."""
    return sum(_elements(s.shape) for s in graph.states if s.role is Role.PARAMETER)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def branch_macs(graph: Graph, mode: str = "plain") -> Mapping[str, int]:
    """MACs per sample of each declared branch, and of the rest under the name `` (empty)."""
    totals: dict[str, int] = {"": 0}
    inside = {n: p for p, nodes in graph.branches().items() for n in nodes}
    for node in graph.nodes:
        path = inside.get(node, "")
        totals[path] = totals.get(path, 0) + _at_one(node_macs(node, mode))
    return totals
