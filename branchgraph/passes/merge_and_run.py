"""Deep Fusion networks turned into each other,

A block of the family (arXiv 1611.07718) has lines (a shortcut x, or a projection of it) and bodies
(chains of units: convolution, batch norm, ReLU between). Written with a unit less its last ReLU:

    plain    relu(body(x))                                    a body is 1 unit, no line
    resnet   relu(line(x) + body(x))                          2 units
    fuse3/6  relu(line(x) + body(x))                          a stage is 1 or 2 blocks; 3x3 lines
    side     relu(body_1(x) + body_2(x))                      2 units each, no line
    half     relu(line(x) + body_1(x) + body_2(x))
    cross    y_i = relu(m + body_i(x_i)),  m = (line_1(x_1) + line_2(x_2)) / 2; the last block of
             the network joins its streams: relu(m + body_1(x_1) + body_2(x_2))

In all of them a stage is one sequence of units; they differ in how the sequence is cut into bodies
(four units u1 u2 u3 u4: bodies u1 u2 and u3 u4 side by side, or one behind the other) and in the
lines. `merge_and_run` cuts it anew. Units whose weights have the shape that their new place needs,
and lines where the new form has them, keep their states; the others are new, initialised as the
family does (He normal over the fan-in, batch norm at 1 and 0). It claims `different`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from branchgraph.ir.builder import merge_mean, merge_sum, relu, state
from branchgraph.ir.errors import GraphError, RefusalError
from branchgraph.ir.graph import Graph, Location, Node, Value, at, branch, scope
from branchgraph.ir.initialisers import HeNormal, Ones, Zeros
from branchgraph.ir.ops.activation import Relu
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.merge import Mean, Sum
from branchgraph.ir.ops.norm import BatchNorm
from branchgraph.ir.state import Role, State
from branchgraph.passes.base import Pass, Report

# -- the family ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """A convolution and its batch norm that are in the network, or a new pair of this kernel."""

    kernel: int
    conv: Node | None = None
    norm: Node | None = None


@dataclass(frozen=True)
class Block:
    """Lines (None is the identity) and bodies; two lines are two streams."""

    lines: tuple[Unit | None, ...]
    bodies: tuple[tuple[Unit, ...], ...]


@dataclass(frozen=True)
class Stage:
    """Blocks between which the number of channels stays the same."""

    width: int
    stride: int
    #: Whether its first block changes the shape, so that shortcuts are projections.
    changes: bool
    blocks: tuple[Block, ...]

    @property
    def units(self) -> list[Unit]:
        """The units of all bodies in their order."""
        return [u for block in self.blocks for body in block.bodies for u in body]

    @property
    def projections(self) -> list[Unit]:
        """The lines of the first block that have parameters."""
        return [u for u in self.blocks[0].lines if u is not None]


@dataclass(frozen=True)
class Form:
    """One network of the family: the shape of its blocks."""

    lines: int
    bodies: int
    #: Units of a body; 0 means a `blocks`-th of a stage.
    length: int = 0
    blocks: int = 1
    #: Kernel of projections, and whether the first block of the network has one as well.
    kernel: int = 1
    always: bool = False

    def size(self, stage: Stage) -> int:
        """Units of a block."""
        return self.bodies * self.length if self.length else len(stage.units) // self.blocks


FORMS = {
    "plain": Form(lines=0, bodies=1, length=1),
    "resnet": Form(lines=1, bodies=1, length=2),
    "side": Form(lines=0, bodies=2, length=2),
    "half": Form(lines=1, bodies=2, length=2),
    "cross": Form(lines=2, bodies=2, length=2),
    "fuse3": Form(lines=1, bodies=1, blocks=1, kernel=3, always=True),
    "fuse6": Form(lines=1, bodies=1, blocks=2, kernel=3, always=True),
}


@dataclass(frozen=True)
class MergeAndRun(Pass, spelling="merge_and_run", claim="different"):
    """Turn a network of the family into the form `to`."""

    to: str = "cross"

    def check(self) -> None:
        if self.to not in FORMS:
            raise GraphError(f"unknown form {self.to!r}; known: {', '.join(FORMS)}")

    def rewrite(self, graph: Graph, report: Report) -> None:
        try:
            found = _read(graph)
            wanted = [_cut(s, FORMS[self.to], i == 0) for i, s in enumerate(found.stages)]
        except RefusalError as error:
            report.refused(graph.name, str(error))
            return
        if wanted == list(found.stages):
            report.refused(graph.name, f"it has the form {self.to} already")
            return
        old = set(graph.states)
        made = _Emission(graph, found).emit(wanted)
        report.matched(graph.name)
        graph.replace(found.result, made)
        found.take_out(graph)
        graph.touch()
        self._count(graph, old, report)

    def _count(self, graph: Graph, old: set[State], report: Report) -> None:
        """Say how many parameters went along."""
        left = set(graph.states)
        kept, new, gone = map(_parameters, (left & old, left - old, old - left))
        report.noted(f"{kept:,} parameters kept, {new:,} new, {gone:,} dropped")


def _parameters(states: set[State]) -> int:
    return sum(prod(s.shape) for s in states if s.role is Role.PARAMETER)


# -- reading a network -----------------------------------------------------------------------------


@dataclass
class _Network:
    """The stages of a network, the value they start from, the one they end in, and their nodes."""

    stem: Value
    result: Value
    stages: tuple[Stage, ...]
    nodes: set[Node] = field(default_factory=set)

    def take_out(self, graph: Graph) -> None:
        """Remove the old blocks and states that nobody reads any more."""
        for node in reversed([n for n in graph.nodes if n in self.nodes]):
            graph.remove(node)
        roots = set(graph.roots)
        graph.keep(read=lambda s: bool(graph.reads[s].users) or graph.reads[s] in roots)


@dataclass(frozen=True)
class _Found:
    """A block as it stands in a graph: from which values, to which, over which nodes."""

    starts: tuple[Value, ...]
    ends: tuple[Value, ...]
    nodes: frozenset[Node]
    block: Block


def _read(graph: Graph) -> _Network:
    """The network as stages of blocks, or `RefusalError`."""
    blocks = list(_fused_blocks(graph)) or list(_plain_blocks(graph))
    if not blocks:
        raise RefusalError("no blocks of the Deep Fusion family were found in it")
    current: tuple[Value, ...] = blocks[0].starts[:1]
    stem = current[0]
    for found in blocks:
        if found.starts not in (current, current * len(found.starts)):
            where = found.ends[0].label
            raise RefusalError(f"something stands between the block of {where} and the one before")
        current = found.ends
    if len(current) != 1:
        raise RefusalError("its last block does not join the streams")
    nodes = {n for found in blocks for n in found.nodes}
    network = _Network(stem, current[0], tuple(_stages(blocks)), nodes)
    roots = set(graph.roots)
    for node in (n for n in graph.nodes if n in nodes):
        for value in node.outputs:
            inside = value not in roots and all(u in nodes for u in value.users)
            if value is not network.result and not inside:
                raise RefusalError(f"{value.label} is read outside its blocks")
    return network


def _stages(blocks: Sequence[_Found]) -> Iterator[Stage]:
    """Blocks of equal width together."""
    groups: list[list[_Found]] = []
    for found in blocks:
        if not groups or _width(groups[-1][0].ends[0]) != _width(found.ends[0]):
            groups.append([])
        groups[-1].append(found)
    for group in groups:
        first = group[0]
        conv = first.block.bodies[0][0].conv
        assert conv is not None
        assert isinstance(conv.op, Conv)
        width, stride = _width(first.ends[0]), conv.op.stride[0]
        changes = stride > 1 or _width(first.starts[0]) != width
        yield Stage(width, stride, changes, tuple(found.block for found in group))


def _width(value: Value) -> int:
    size = value.shape[1]
    assert isinstance(size, int)
    return size


def _fused_blocks(graph: Graph) -> Iterator[_Found]:
    """Blocks that end in relu(sum(...)), those that share a mean as one."""
    ends: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        joined = node.inputs[0].producer if isinstance(node.op, Relu) else None
        if joined is not None and isinstance(joined.op, Sum):
            means = [v.producer for v in joined.inputs if v.producer and _is_mean(v)]
            ends.setdefault(means[0] if len(means) == 1 else joined, []).append(node)
    for key, relus in ends.items():
        yield _merge_and_run(key, relus) if isinstance(key.op, Mean) else _fusion(key, relus)


def _is_mean(value: Value) -> bool:
    return value.producer is not None and isinstance(value.producer.op, Mean)


def _fusion(joined: Node, relus: list[Node]) -> _Found:
    """relu(sum of chains from one value); chains of one unit or none at the front are lines."""
    chains = [_chain(v) for v in joined.inputs]
    start = _common(chains)
    parts = [chain[: chain.index(start)] for chain in chains]
    units = [_units(part) for part in parts]
    short = [i for i, p in enumerate(units) if len(p) < 2]
    lines = short if len(short) < len(units) else short[:1]
    if len(lines) > 1:
        raise RefusalError(f"the block {relus[0].path} has {len(lines)} shortcuts")
    bodies = tuple(p for i, p in enumerate(units) if i not in lines)
    block = Block(tuple(units[i][0] if units[i] else None for i in lines), bodies)
    nodes = _producers(v for part in parts for v in part)
    return _found((start,), relus, {joined, *nodes}, block)


def _merge_and_run(mean: Node, relus: list[Node]) -> _Found:
    """Streams that each add the mean of all lines."""
    sums = [n.inputs[0].producer for n in relus]
    tops = [v for s in sums if s for v in s.inputs if v.producer is not mean]
    if len(tops) != len(mean.inputs):
        raise RefusalError(f"{mean.path} averages {len(mean.inputs)} lines for {len(tops)} bodies")
    lines, bodies, starts, nodes = [], [], [], {mean, *(s for s in sums if s)}
    for line, body in zip(mean.inputs, tops):
        chains = [_chain(line), _chain(body)]
        start = _common(chains)
        starts.append(start)
        line_part, body_part = (chain[: chain.index(start)] for chain in chains)
        nodes.update(_producers((*line_part, *body_part)))
        unit = _units(line_part)
        if len(unit) > 1:
            raise RefusalError(f"the line {line.label} has {len(unit)} convolutions")
        lines.append(unit[0] if unit else None)
        bodies.append(_units(body_part))
    return _found(tuple(starts), relus, nodes, Block(tuple(lines), tuple(bodies)))


def _found(starts: tuple[Value, ...], relus: list[Node], nodes: set[Node], block: Block) -> _Found:
    """A block, once its bodies are known to be of the family."""
    where = relus[0].path or "relu"
    for body in block.bodies:
        if not body:
            raise RefusalError(f"the block {where} has no two parts with parameters")
        if any(unit.kernel != 3 for unit in body):
            raise RefusalError(f"a body of the block {where} has convolutions that are not 3x3")
    return _Found(starts, tuple(n.output for n in relus), frozenset((*nodes, *relus)), block)


def _plain_blocks(graph: Graph) -> Iterator[_Found]:
    """Units in a row behind the first one, which is the stem."""
    relus = [n for n in graph.nodes if isinstance(n.op, Relu)]
    for node in relus[1:]:
        chain = _chain(node.inputs[0])
        stops = [i for i, v in enumerate(chain) if v.producer and isinstance(v.producer.op, Relu)]
        if not stops:
            raise RefusalError(f"{node.path or 'relu'} does not end a unit behind the stem")
        part = chain[: stops[0]]
        block = Block((), (_units(part),))
        yield _found((chain[stops[0]],), [node], _producers(part), block)


def _chain(value: Value) -> list[Value]:
    """`value` and what it is made from, one operand after another, through units."""
    chain = [value]
    while value.producer is not None and isinstance(value.producer.op, (Conv, BatchNorm, Relu)):
        value = value.producer.inputs[0]
        chain.append(value)
    return chain


def _common(chains: list[list[Value]]) -> Value:
    """The first value that all chains come from."""
    for value in chains[0]:
        if all(value in chain for chain in chains[1:]):
            return value
    raise RefusalError(f"the parts that {chains[0][0].label} belongs to start from no one value")


def _producers(values: Sequence[Value] | Iterator[Value]) -> set[Node]:
    return {v.producer for v in values if v.producer is not None}


def _units(part: list[Value]) -> tuple[Unit, ...]:
    """The convolutions of a chain, first to last, each with its batch norm; ReLU lies between."""
    ops = [v.producer for v in reversed(part) if v.producer is not None]
    units: list[Unit] = []
    for i in range(0, len(ops), 3):
        shape = [type(n.op) for n in ops[i : i + 3]]
        last = i + 3 > len(ops)
        if shape != ([Conv, BatchNorm] if last else [Conv, BatchNorm, Relu]) or (
            not last and i + 3 == len(ops)
        ):
            raise RefusalError(
                f"{part[0].label} is no chain of convolutions, declared batch norms and, between "
                "them, ReLU"
            )
        units.append(Unit(_kernel(ops[i]), ops[i], ops[i + 1]))
    return tuple(units)


def _kernel(node: Node) -> int:
    """The kernel of a convolution that a unit of the family has."""
    size = {k for k in node.inputs[1].shape[2:] if isinstance(k, int)}
    assert isinstance(node.op, Conv)
    kernel = size.pop()
    if size or node.op.groups > 1 or set(node.op.pad) != {kernel // 2} or max(node.op.dilation) > 1:
        raise RefusalError(f"{node.path} is no square convolution in one group that keeps the size")
    return kernel


# -- cutting and emission --------------------------------------------------------------------------


def _cut(stage: Stage, form: Form, first: bool) -> Stage:
    """The same units as blocks of another form."""
    units, size = stage.units, form.size(stage)
    if not size or len(units) % size or len(units) % form.blocks:
        wanted = f"blocks of {size} units" if form.length else f"{form.blocks} equal blocks"
        raise RefusalError(
            f"the stage of {stage.width} channels has {len(units)} units, which do not make "
            f"{wanted}"
        )
    length = size // form.bodies
    blocks = []
    for k in range(0, len(units), size):
        bodies = (tuple(units[j : j + length]) for j in range(k, k + size, length))
        lines = _lines(stage, form, projected=k == 0 and (stage.changes or (first and form.always)))
        blocks.append(Block(lines, tuple(bodies)))
    return replace(stage, blocks=tuple(blocks))


def _lines(stage: Stage, form: Form, projected: bool) -> tuple[Unit | None, ...]:
    """Lines of a block: those of the stage that fit, new ones, or identities."""
    if not projected:
        return (None,) * form.lines
    kept = [u for u in stage.projections if u.kernel == form.kernel][: form.lines]
    return (*kept, *(Unit(form.kernel) for _ in range(form.lines - len(kept))))


class _Emission:
    """Writes stages behind the stem, in the scopes of the family."""

    def __init__(self, graph: Graph, network: _Network) -> None:
        self.graph = graph
        self.stem = network.stem
        #: What new units are like.
        self.like = next(u for s in network.stages for u in s.units)
        self.root = _root(network.result)

    def emit(self, stages: Sequence[Stage]) -> Value:
        """The result of the last block."""
        streams: tuple[Value, ...] = (self.stem,)
        with at(self.root):
            for i, stage in enumerate(stages, start=1):
                for k, block in enumerate(stage.blocks, start=1):
                    last = i == len(stages) and k == len(stage.blocks)
                    with scope(f"g{i}/b{k}"):
                        streams = self._block(streams, block, stage, k == 1, last)
        return streams[0]

    def _block(
        self, streams: tuple[Value, ...], block: Block, stage: Stage, first: bool, last: bool
    ) -> tuple[Value, ...]:
        stride = stage.stride if first else 1
        if len(block.lines) == 2:
            return self._crossed(streams * 2 if len(streams) == 1 else streams, block, stage,
                                 stride, last)  # fmt: skip
        (x,) = streams
        parts = []
        for line in block.lines:
            with branch("p0"):
                parts.append(self._line(x, line, stage.width, stride))
        names = ("p1", "p2") if len(block.bodies) == 2 else ("p2",) if block.lines else ("p1",)
        for name, body in zip(names, block.bodies):
            with branch(name):
                parts.append(self._body(x, body, stage.width, stride))
        joined = parts[0] if len(parts) == 1 else merge_sum(*parts, name="sum")
        return (relu(joined, name="relu"),)

    def _crossed(
        self, streams: tuple[Value, ...], block: Block, stage: Stage, stride: int, last: bool
    ) -> tuple[Value, ...]:
        lines, bodies = [], []
        for i, (x, line) in enumerate(zip(streams, block.lines), start=1):
            with branch(f"l{i}"):
                lines.append(self._line(x, line, stage.width, stride))
        for i, (x, body) in enumerate(zip(streams, block.bodies), start=1):
            with branch(f"d{i}"):
                bodies.append(self._body(x, body, stage.width, stride))
        mean = merge_mean(*lines)
        sums = (
            [merge_sum(mean, *bodies, name="sum")] if last else [merge_sum(b, mean) for b in bodies]
        )
        return tuple(relu(y, name=f"relu{i}") for i, y in enumerate(sums, start=1))

    def _line(self, x: Value, unit: Unit | None, width: int, stride: int) -> Value:
        return x if unit is None else self._unit(x, unit, width, stride, "line")

    def _body(self, x: Value, body: tuple[Unit, ...], width: int, stride: int) -> Value:
        for k, unit in enumerate(body):
            name = f"two{k + 1}" if len(body) == 2 else str(k)
            x = self._unit(x, unit, width, stride if k == 0 else 1, name)
            if k < len(body) - 1:
                with scope(name):
                    x = relu(x, name="relu")
        return x

    def _unit(self, x: Value, unit: Unit, width: int, stride: int, name: str) -> Value:
        """A unit without ReLU; its states stay where the weight has the shape that is needed."""
        like = unit.conv or self.like.conv
        assert like is not None
        assert isinstance(like.op, Conv)
        shape = (width, _width(x), *(unit.kernel,) * like.op.axes)
        pads = (unit.kernel // 2,) * (2 * like.op.axes)
        op = replace(like.op, stride=(stride,) * like.op.axes, pad=pads)
        with scope(name):
            if unit.conv is None or unit.conv.inputs[1].shape != shape:
                return self._new(x, op, shape, biased=len(like.inputs) > 2)
            h = self.graph.emit(op, x, *unit.conv.inputs[1:], name="conv")
            assert unit.norm is not None
            return self.graph.emit(unit.norm.op, h, *unit.norm.inputs[1:], name="bn")

    def _new(self, x: Value, op: Conv, shape: tuple[int, ...], biased: bool) -> Value:
        """A unit with states of its own, initialised as the family does."""
        graph, width, dtype = self.graph, shape[0], x.dtype
        operands = [state(graph, "conv", "weight", shape, HeNormal(prod(shape[1:])), dtype=dtype)]
        if biased:
            operands.append(state(graph, "conv", "bias", (width,), Zeros(), dtype=dtype))
        h = graph.emit(op, x, *operands, name="conv")
        vectors = (
            state(graph, "bn", "gamma", (width,), Ones(), dtype=dtype),
            state(graph, "bn", "beta", (width,), Zeros(), dtype=dtype),
            state(graph, "bn", "running_mean", (width,), Zeros(), Role.STATISTIC, dtype),
            state(graph, "bn", "running_var", (width,), Ones(), Role.STATISTIC, dtype),
        )
        assert self.like.norm is not None
        return graph.emit(self.like.norm.op, h, *vectors, name="bn")


def _root(result: Value) -> Location:
    """The location that the stages stand in: that of the last block less stage and block."""
    scope_of = result.producer.scope if result.producer else ()
    return scope_of[: max(0, len(scope_of) - 2)]
