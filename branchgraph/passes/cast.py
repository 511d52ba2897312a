"""Mixed precision: products and activations in float16 or bfloat16, masters in float32.

    y = op(x; W)    ->    y = f32(op(low(x); low(W)))           low, f32: casts; two in a row vanish

States stay float32 and are read through casts, so gradients come back to float32 masters. What
computes parameters from states stays float32 as well. Of the other ops

    low         convolutions and products
    as x is     element-wise arithmetic, activations, max pooling, merges, data movement: low where
                what they read was low
    float32     all the rest: reductions, softmax, losses, exponentials. Batch norm, LRN and average
                pooling too, but what follows them goes on in the low type.

Loss scaling (Micikevicius et al., Mixed precision training, arXiv 1710.03740) lifts gradients over
the smallest number of float16. It is said where the types meet, so it holds for any loss:

    f32(y) = scale_gradient(cast(y), S)          low(x) = cast(scale_gradient(x, 1 / S))

Inside the low region cotangents are S times what they are; outside they are what they were. With
`dynamic`, S is a state, and `skip_overflow` (after the optimiser) moves it: where a gradient is not
finite the step is left out and S halved, down to 1; after 1000 clean steps it is doubled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.initialisers import Constant, Zeros
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import LogicalAnd, cast, compare, where
from branchgraph.ir.ops.gate import ScaleGradient
from branchgraph.ir.state import Role, State
from branchgraph.ir.types import DType
from branchgraph.passes.base import Pass, Report

#: Ops that are worth the low type wherever they stand.
PRODUCTS = frozenset({"conv", "conv_transpose", "dense", "matmul", "sample_conv"})
#: Ops that take the type of what they read.
FOLLOWERS = frozenset({
    "relu", "leaky_relu", "clipped_relu", "elu", "sigmoid", "tanh", "add", "subtract",
    "multiply", "negate", "absolute", "clip", "sum", "mean", "product", "maximum", "concat",
    "select", "dropout", "by_mode", "max_pool", "reshape", "transpose", "slice", "embed",
    "split", "pad", "flip", "broadcast_to",
})  # fmt: skip
#: Float32 ops in the middle of activations: what reads them goes on in the low type.
BETWEEN = frozenset(
    {"batch_norm", "batch_norm_training", "batch_norm_inference", "lrn", "average_pool"}
)
#: Steps without overflow after which the scale is doubled.
CLEAN_STEPS = 1000


@dataclass(frozen=True)
class MixedPrecision(Pass, spelling="cast", claim="different"):
    """Compute in `dtype` what is safe there; `keep` names scopes and nodes that stay float32.

    `loss_scale` multiplies gradients inside the low region; a power of two loses nothing.
    """

    dtype: DType = DType.BF16
    keep: tuple[str, ...] = ()
    loss_scale: float = 1.0
    dynamic: bool = False

    def check(self) -> None:
        if self.dtype not in (DType.F16, DType.BF16):
            raise GraphError(f"cast: dtype is f16 or bf16, got {self.dtype}")
        if not self.loss_scale >= 1:
            raise GraphError(f"cast: loss_scale is at least 1, got {self.loss_scale}")

    def rewrite(self, graph: Graph, report: Report) -> None:
        if graph.gradients:
            raise GraphError("cast: the graph has gradients; cast before differentiate(graph)")
        _Casting(graph, self, report).run()

    def keeps(self, node: Node) -> bool:
        """Whether `node` stands in a scope that stays float32."""
        return any(f"{node.path}/".startswith(f"{scope}/") for scope in self.keep)


class _Casting:
    def __init__(self, graph: Graph, options: MixedPrecision, report: Report) -> None:
        self.graph = graph
        self.options = options
        self.report = report
        #: Low forms of float32 values, and the float32 values that low ones stand behind.
        self.low: dict[Value, Value] = {}
        self.warm: set[Value] = set()
        self.made: list[Node] = []
        self.scales: tuple[Value, Value] | None = None

    def run(self) -> None:
        nodes = self.graph.nodes
        fixed: set[Value] = set(self.graph.reads.values())
        for node in nodes:
            if all(v in fixed for v in node.inputs):
                fixed.update(node.outputs)
            elif self._wants(node):
                self._lower(node)
            elif node.op.opcode in BETWEEN and node.inputs[0] in self.warm:
                self.warm.add(node.outputs[0])
        self._sweep()
        for scope in self.options.keep:
            if not any(f"{node.path}/".startswith(f"{scope}/") for node in nodes):
                self.report.noted(f"nothing stands in {scope!r}, which is to be kept in f32")

    def _wants(self, node: Node) -> bool:
        """Whether `node` should be computed in the low type."""
        floats = [v for v in node.inputs if v.dtype.is_float]
        if not floats or any(v.dtype is not DType.F32 for v in (*floats, *node.outputs)):
            return False
        product = node.op.opcode in PRODUCTS
        follows = node.op.opcode in FOLLOWERS and any(v in self.warm for v in floats)
        if product and self.options.keeps(node):
            self.report.refused(node, "it stands in a scope that is kept in f32")
        return (product or follows) and not self.options.keeps(node)

    def _lower(self, node: Node) -> None:
        self.report.matched(node)
        with at(node.scope):
            inputs = [self._lowered(v) for v in node.inputs]
            outputs = self.graph.apply(node.op, *inputs, name=node.name)
            for old, new in zip(node.outputs, outputs):
                back = self._scaled(self._note(cast(new, DType.F32)), 0)
                self.low[back] = new
                self.warm.add(back)
                self.graph.replace(old, back)
        self.graph.remove(node)

    def _lowered(self, value: Value) -> Value:
        if value.dtype is not DType.F32:
            return value
        if value not in self.low:
            constant = value.producer is not None and not value.producer.inputs
            given = value if constant else self._scaled(value, 1)
            self.low[value] = self._note(cast(given, self.options.dtype))
        return self.low[value]

    def _scaled(self, value: Value, which: int) -> Value:
        """`value` with its cotangent multiplied by the scale (0) or divided by it (1)."""
        if self.options.loss_scale == 1 and not self.options.dynamic:
            return value
        if self.scales is None:
            self.scales = self._both_scales()
        return self._note(self.graph.emit(ScaleGradient(), value, self.scales[which]))

    def _both_scales(self) -> tuple[Value, Value]:
        scale = self.options.loss_scale
        with at(()):
            if not self.options.dynamic:
                return self.graph.constant(scale), self.graph.constant(1.0 / scale)
            state = State("loss_scale", (), DType.F32, Role.LOSS_SCALE, Constant(scale))
            read = self.graph.read(state)
            return read, 1.0 / read

    def _note(self, value: Value) -> Value:
        assert value.producer is not None
        self.made.append(value.producer)
        return value

    def _sweep(self) -> None:
        """Take out casts that nobody reads."""
        roots = set(self.graph.roots)
        for node in reversed(self.made):
            if not node.output.users and node.output not in roots:
                self.graph.remove(node)


@dataclass(frozen=True)
class SkipOverflow(Pass, spelling="skip_overflow", claim="different"):
    """Leave out steps whose gradients are not finite, and move the dynamic loss scale.

    Held back are parameters, gates and what belongs to the optimiser; running statistics and random
    streams go on. The scale is halved at an overflow, not below 1, and doubled after `clean` steps.
    """

    clean: int = CLEAN_STEPS

    def rewrite(self, graph: Graph, report: Report) -> None:
        if not graph.gradients or not graph.updates:
            raise GraphError("skip_overflow: needs gradients and updates; attach an optimiser")
        scale = next((s for s in graph.reads if s.role is Role.LOSS_SCALE), None)
        if scale is None or scale in graph.updates:
            report.refused(graph.name, "no loss scale to move; cast with dynamic=true first")
            return
        report.matched("loss_scale")
        with at(()):
            finite = _all_finite(graph.gradients.values())
            for state, value in list(graph.updates.items()):
                if state.role in _HELD and not state.name.startswith("random."):
                    graph.update(state, where(finite, value, graph.read(state)))
            self._move(graph, scale, finite)

    def _move(self, graph: Graph, scale: State, finite: Value) -> None:
        count = State(f"{scale.name}.clean", (), DType.F32, Role.SLOT, Zeros())
        one = graph.constant(1.0)
        old, after = graph.read(scale), graph.read(count) + 1.0
        long = compare("greater_equal", after, graph.constant(float(self.clean)))
        halved = graph.emit(make("maximum"), old * 0.5, one)
        graph.update(scale, where(finite, where(long, old * 2.0, old), halved))
        going = where(long, graph.constant(0.0), after)
        graph.update(count, where(finite, going, graph.constant(0.0)))


_HELD = (Role.PARAMETER, Role.GATE, Role.SLOT, Role.STEP)


def _all_finite(values: Iterable[Value]) -> Value:
    """Whether no element is NaN or infinite: 0 times each adds up to 0."""
    found = []
    for value in values:
        axes = tuple(range(len(value.shape)))
        total = value.graph.emit(make("reduce_sum", axes=axes), value * 0.0)
        found.append(compare("equal", total, value.graph.constant(0.0, value.dtype)))
    return reduce(lambda a, b: a.graph.emit(LogicalAnd(), a, b), found)
