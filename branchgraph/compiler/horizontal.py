"""Horizontal fusion of sibling branches: proposed by a pass, decided by the stopwatch.

`passes.fuse_siblings` finds families of layers that could be one layer, and predicts what that
gains. Here each family it proposes is cut out of its graph together with what reads it, made in
both forms, and timed on the backend with random numbers: forward for inference; forward, backward
and the assembling of kernels for training. The fused form is taken where it is faster by
`MARGIN`. What reads a family belongs to the comparison, since a split is not free everywhere: where
channels lie innermost, its parts are slices that many kernels cannot read as they are.

Training graphs are fused before they are differentiated, so that backward is fused too.

Decisions are kept, in memory and in `siblings.json` in the user's cache folder, by what they depend
on: structure and sizes of what was timed, mode, backend with version and threads, processor. A file
that cannot be read is ignored and written anew. `$BRANCHGRAPH_TUNING` says how to decide:

    measure    as above (the default)
    cost       by the cost model alone: nothing is timed, nothing read or written
    off        nothing is fused

With `measure` the order of float32 additions, and with it the last bits of results, may depend on
the machine; with `cost` and `off` it does not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from branchgraph.compiler.backend import Backend, Options, Work
from branchgraph.compiler.derived import derive
from branchgraph.compiler.program import schedule
from branchgraph.ir.dims import Dim, DimLike
from branchgraph.ir.errors import BranchgraphError
from branchgraph.ir.extract import extract, nodes_between
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.hash import canonical_states, structural_hash
from branchgraph.ir.ops.elementwise import Binary, Unary
from branchgraph.ir.ops.merge import Concat, Sum
from branchgraph.ir.ops.norm import BatchNormInference
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.reshape import Reshape, Slice, Split
from branchgraph.ir.rebuild import bind, clone
from branchgraph.ir.state import Store
from branchgraph.passes.checking import random_feeds, random_store
from branchgraph.passes.clean import Canonical, CommonSubexpressions, Constants, DeadCode
from branchgraph.passes.fuse_siblings import Family, FuseSiblings
from branchgraph.passes.materialise import materialise
from branchgraph.passes.pipeline import Pipeline

VARIABLE = "BRANCHGRAPH_TUNING"
MODES = ("measure", "cost", "off")
#: How much faster the fused form must be.
MARGIN = 1.05
#: Samples in a batch whose size the graph leaves open.
BATCH = 16

#: What the start of a kernel and moving an element cost on a CPU, in multiply-accumulates: 2.5 µs
#: and 0.8 ns, fitted to families of 2 and 4 layers on one core that does 50 of them in a ns.
LAUNCH, MOVE = 125_000, 40
#: Kernels a layer takes in a training step: forward, two gradients, packing of its weight.
_CALLS = 4
#: How often a training step passes over the results of a layer.
_PASSES = 2
#: Starts of kernels that a slice of an image costs where NumPy has to do what oneDNN refuses.
_REFUSED = 100
#: Families are timed if they would pay were the start of a kernel worth this many times `LAUNCH`.
_HOPE = 4
#: Version of the file of decisions, and of how they are made.
_FORMAT = 1
_ROUNDS, _FEWER_ROUNDS = 11, 5
#: Seconds that a sample takes at least, and from which there are fewer of them.
_SAMPLE, _LONG = 5e-4, 2e-2
#: How far behind its layers a family is read by element-wise ops that are timed with it.
_REACH = 3

_CLEANING = Pipeline((DeadCode(), Canonical(), Constants(), CommonSubexpressions(), DeadCode()))


class TuningError(BranchgraphError, ValueError):
    """`$BRANCHGRAPH_TUNING` is none of the known modes."""


def mode() -> str:
    """How decisions are made in this process: `measure`, `cost` or `off`."""
    found = os.environ.get(VARIABLE) or MODES[0]
    if found not in MODES:
        raise TuningError(f"${VARIABLE} is {found!r}; set it to one of {', '.join(MODES)}")
    return found


class Times(NamedTuple):
    """Median seconds of a family's layers, and what reads them, in both forms."""

    apart: float
    fused: float


@dataclass(frozen=True)
class Trial:
    """Both forms of a family with what reads it, at concrete sizes, with the same inputs."""

    apart: Graph
    fused: Graph


#: Times both forms on a backend.
Measure = Callable[[Trial, Backend], Times]


def fuse_horizontally(
    graph: Graph, backend: Backend, *, training: bool = False, batch: int = BATCH,
    measure: Measure | None = None, decisions: Decisions | None = None,
) -> Graph:  # fmt: skip
    """`graph`, specialised, with siblings fused where that is faster on `backend`.

    With `training` it is a graph to be differentiated. `batch` stands for symbolic sizes. `measure`
    and `decisions` stand in for the stopwatch and the cache of this process.
    """
    how = mode()
    if how == "off" or not backend.optimises:
        return graph
    judge = None
    if how == "measure":
        judge = _Judge(backend, training, batch, measure or stopwatch, decisions or _decisions())
    return _tidied(_Tuned(judge, training=training, batch=batch).apply(graph))


# -- what is proposed ------------------------------------------------------------------------------


class _Tuned(FuseSiblings):
    """`fuse_siblings` with the costs of a CPU, and a judge of what it proposes, if there is one.

    Against the pass alone, whose parts are views, it counts what reads the parts. With B layers of
    which n elements come, and all of it several times in training (`_CALLS`, `_PASSES`):

        joined again        a concatenation and its n elements are saved
        element by element  strided reads: half a move for each of n elements; unless it can be
                            timed, B - 1 kernels that each layer did on the way (its epilogue)
        otherwise           a copy a part; for images `_REFUSED`, since few kernels read slices
    """

    def __init__(self, judge: _Judge | None, *, training: bool, batch: int) -> None:
        launch = LAUNCH * (_HOPE if judge else 1)
        super().__init__(launch=launch, move=MOVE, training=training, batch=batch)
        object.__setattr__(self, "_judge", judge)

    def benefit(self, family: Family) -> int:
        calls, passes = (_CALLS, _PASSES) if self.training else (1, 1)
        count, sizes = len(family.layers), [n.node.output.type.size for n in family.layers]
        starts = calls * (count - 1) - 2 * self.training - self._starts_of_stack(family)
        moved = super().copied(family) * passes
        elements = passes * sum(_size(size, self.batch) for size in sizes)
        read = _reading([layer.node for layer in family.layers])
        if read == "joined":
            starts, moved = starts + passes, moved - elements
        elif read == "element-wise":
            moved += elements // 2
            starts -= (count - 1) * (self._judge is None)  # type: ignore[attr-defined]
        elif family.first.conv is not None:
            starts -= _REFUSED * count
        elif self.batch > 1:
            starts -= count
        return self.launch * starts - self.move * moved - passes * family.zero_macs(self.batch)

    def _starts_of_stack(self, family: Family) -> int:
        """Kernels that put inputs together, and for dense layers biases and results besides."""
        if not family.kind.stacked:
            return 0
        return (1 if family.first.conv else 3) * (1 + self.training)

    def objection(self, family: Family) -> str:
        judge: _Judge | None = self._judge  # type: ignore[attr-defined]
        return judge.objection(family) if judge else ""


def _size(size: DimLike, batch: int) -> int:
    """`size` with `batch` for every symbol."""
    bound = size.substitute(dict.fromkeys(size.symbols, batch)) if isinstance(size, Dim) else size
    assert isinstance(bound, int)
    return bound


def _reading(layers: Sequence[Node]) -> str:
    """How results of `layers`, as the parts of a split, would be read: as `_Tuned` says."""
    parts = [node.output for node in layers]
    while True:
        readers = list(dict.fromkeys(user for part in parts for user in part.users))
        if len(readers) != len(parts) or not _alike(readers, parts[0].graph):
            break
        parts = [reader.output for reader in readers]
    if len(readers) == 1 and readers[0].op == Concat(axis=1) and readers[0].inputs == tuple(parts):
        return "joined"
    light = all(isinstance(reader.op, (Unary, Binary, Sum)) for reader in readers)
    return "element-wise" if light else "otherwise"


#: Ops of one operand that treat every channel alike, so that they may stand before a split of them.
_CHANNELWISE = (Unary, MaxPool, AveragePool)


def _tidied(graph: Graph) -> Graph:
    """A copy whose splits of channels stand as late as they can, or are gone.

    f(x_1), f(x_2), ... with x_1, x_2, ... = split(x) are split(f(x)) for a channel-wise f, so that
    the layer before keeps its epilogue; concat(split(x)) is x.
    """
    new = clone(graph)
    pending = [node for node in new.nodes if isinstance(node.op, Split)]
    for split in pending:
        assert isinstance(split.op, Split)
        users = [value.users for value in split.outputs]
        readers = [found[0] for found in users if len(found) == 1]
        if split.op.axis == 1 and len(readers) == len(users) and _alike(readers, new):
            with at(readers[0].scope):
                whole = new.emit(readers[0].op, split.inputs[0], name=readers[0].name)
                parts = new.apply(split.op, whole)
            for reader, part in zip(readers, parts):
                new.replace(reader.output, part)
            later = parts[0].producer
            assert later is not None
            pending.append(later)
    new.touch()
    for node in new.nodes:
        found = _joined(node)
        if found is not None:
            new.replace(node.output, found)
    return DeadCode().apply(new)


def _joined(node: Node) -> Value | None:
    """x where `node` is concat(split(x))."""
    if not isinstance(node.op, Concat):
        return None
    split = node.inputs[0].producer
    if split is None or not isinstance(split.op, Split) or node.inputs != split.outputs:
        return None
    return split.inputs[0] if split.op == replace(split.op, axis=node.op.axis) else None


def _alike(readers: Sequence[Node], graph: Graph) -> bool:
    """Whether `readers` are different nodes of one channel-wise op."""
    first = readers[0]
    roots = set(graph.roots)
    return (
        isinstance(first.op, _CHANNELWISE)
        and len(set(readers)) == len(readers)
        and all(r.op == first.op for r in readers)
        and not any(v in roots for r in readers for v in r.inputs)
    )


# -- what is decided -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judge:
    """Decides about families by measurement, each kind once."""

    backend: Backend
    training: bool
    batch: int
    measure: Measure
    decisions: Decisions

    def objection(self, family: Family) -> str:
        """Why `family` stays apart, or nothing."""
        found = trial(family, self.batch, training=self.training)
        key = self._key(found)
        times = self.decisions.get(key)
        if times is None:
            times = self.measure(found, self.backend)
            self.decisions.put(key, times)
        if times.apart >= MARGIN * times.fused:
            return ""
        return (
            f"it would not pay: fused it takes {times.fused * 1e6:.1f} µs, "
            f"apart {times.apart * 1e6:.1f} µs on {self.backend.name}"
        )

    def _key(self, found: Trial) -> str:
        forms = structural_hash(found.apart), structural_hash(found.fused)
        facts = [_FORMAT, *forms, self.training, self.backend.describe(), processor()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@cache
def processor() -> str:
    """The processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


class Decisions:
    """Times by key: in memory, and in a JSON file where there is one."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, Times] | None = None
        self._lock = threading.Lock()

    def get(self, key: str) -> Times | None:
        """The times that were put under `key`, here or in another process."""
        with self._lock:
            return self._loaded().get(key)

    def put(self, key: str, times: Times) -> None:
        """Keep `times`. Where the file cannot be written, that is said and memory alone keeps them.

        What other processes have written since is kept.
        """
        with self._lock:
            self._known = {**self._loaded(), **self._read(), key: times}
            if self.path is None:
                return
            try:
                _write(self.path, {"format": _FORMAT, "seconds": self._known})
            except OSError as error:
                warnings.warn(
                    f"measurements are not kept: {error}; set ${VARIABLE}=cost to make none",
                    stacklevel=2,
                )
                self.path = None

    def _loaded(self) -> dict[str, Times]:
        if self._known is None:
            self._known = self._read()
        return self._known

    def _read(self) -> dict[str, Times]:
        """What the file holds; nothing if it is of another version or no such file at all."""
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                return {}
            found = {str(k): Times(*map(float, v)) for k, v in content["seconds"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
        return found if all(min(t) > 0 for t in found.values()) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Replace a file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@cache
def _decisions() -> Decisions:
    """Those of the user."""
    return Decisions(Path(platformdirs.user_cache_dir("branchgraph")) / "tuning" / "siblings.json")


# -- what is compared ------------------------------------------------------------------------------


def trial(family: Family, batch: int, *, training: bool) -> Trial:
    """`family`, apart and fused, with what reads it; weights are states of their own.

    In training both forms compute the gradients of all weights, which update them, and of inputs.
    """
    layers = [layer.node for layer in family.layers]
    region = dict.fromkeys((*layers, *_readers(layers)))
    useful = _useful(family.graph)
    ends = [v for n in region for v in n.outputs if _leaves(v, region, useful)]
    outputs = [node.output for node in layers]
    part = extract([*outputs, *ends], _boundary(family.graph, region))
    symbols = {s for v in part.inputs.values() for d in v.shape if isinstance(d, Dim)
               for s in d.symbols}  # fmt: skip
    whole, _ = materialise(bind(part, **dict.fromkeys(symbols, batch)))
    count = len(layers)
    apart, fused = clone(whole), _with_family_fused(whole, family)
    for form in (apart, fused):
        form.keep(output=lambda name: int(name[1:]) >= count)
    forms = [_tidied(form) for form in (apart, fused)]
    if training:
        forms = [_learning(form) for form in forms]
    return Trial(*(_as_images(_CLEANING.apply(form)) for form in forms))


#: Ops that a kernel before them carries out, or that move nothing: what reads them is timed too.
_LIGHT = (Unary, Binary, Sum, Concat, BatchNormInference, Reshape, Split, Slice)


def _readers(layers: Sequence[Node]) -> Iterator[Node]:
    """What reads `layers` on the way to an output, through element-wise ops."""
    useful = _useful(layers[0].graph)
    front = list(layers)
    for _ in range(_REACH):
        readers = dict.fromkeys(u for n in front for v in n.outputs for u in v.users)
        reached = [n for n in readers if n in useful and not n.op.introduces]
        yield from reached
        front = [n for n in reached if isinstance(n.op, _LIGHT)]


def _useful(graph: Graph) -> set[Node]:
    """Nodes that outputs depend on; running statistics alone do not count."""
    return set(nodes_between(graph.outputs.values(), ()))


def _leaves(value: Value, region: dict[Node, None], useful: set[Node]) -> bool:
    """Whether `value` is read outside of `region` on the way to an output, or is one."""
    read = any(user in useful and user not in region for user in value.users)
    return read or value in value.graph.outputs.values()


def _boundary(graph: Graph, region: dict[Node, None]) -> list[Value]:
    """What `region` reads from outside of it, but for what only states decide."""
    fed = set(graph.inputs.values())
    for node in graph.nodes:
        if any(v in fed for v in node.inputs):
            fed.update(node.outputs)
    read = (v for n in region for v in n.inputs if v in fed)
    return list(dict.fromkeys(v for v in read if v.producer not in region))


def _with_family_fused(whole: Graph, family: Family) -> Graph:
    """A copy of `whole` whose first outputs, the layers of `family`, come from one layer."""
    new = clone(whole)
    nodes = [v.producer for v, _ in zip(new.outputs.values(), family.layers) if v.producer]
    for node, value in zip(nodes, family.over(nodes).build("siblings")):
        new.replace(node.output, value)
    new.touch()
    return new


def _learning(graph: Graph) -> Graph:
    """A copy with the gradients of all outputs, for cotangents that are fed."""
    new = clone(graph)
    results = [v for v in dict.fromkeys(new.outputs.values()) if v.dtype.is_float]
    inputs = {n: v for n, v in new.inputs.items() if v.dtype.is_float}
    weights = {s: v for s, v in new.reads.items() if s.role.trainable}
    seeds = {v: new.input(f"cotangent{i}", v.shape, v.dtype) for i, v in enumerate(results)}
    found = vjp(new, seeds, [*inputs.values(), *weights.values()])
    for name, value in inputs.items():
        if value in found:
            new.output(f"gradient.{name}", found[value])
    for state, value in weights.items():
        if value in found:
            new.update(state, found[value])
    return new


#: Name of nodes that stand in a trial but are not timed.
_BESIDE = "beside"


def _as_images(graph: Graph) -> Graph:
    """A copy in which a window is laid over every image that is fed, for nothing but this:

    inside a network images have the layout that windows ask for, and a backend chooses the layout
    of an input by what reads it.
    """
    new = clone(graph)
    for name, value in list(new.inputs.items()):
        axes = len(value.shape) - 2
        if axes > 0 and value.dtype.is_float:
            window = MaxPool(kernel=(1,) * axes, stride=(1,) * axes, pad=(0,) * 2 * axes)
            new.output(f"{_BESIDE}.{name}", new.emit(window, value, name=_BESIDE))
    return new


# -- measuring -------------------------------------------------------------------------------------


def stopwatch(trial: Trial, backend: Backend) -> Times:
    """Medians over interleaved samples of the seconds spent in kernels."""
    store = random_store({*trial.apart.states}, [*trial.apart.states])
    forms = [_Timed(form, backend, store) for form in (trial.apart, trial.fused)]
    first = min(form.seconds(1) for form in forms for _ in range(2))
    repeats = min(50, math.ceil(_SAMPLE / max(first, 1e-6)))
    rounds = _ROUNDS if first < _LONG else _FEWER_ROUNDS
    samples = [[form.seconds(repeats) for form in forms] for _ in range(rounds)]
    return Times(*(statistics.median(column) for column in zip(*samples)))


class _Timed:
    """A graph made ready on a backend, with random inputs."""

    def __init__(self, graph: Graph, backend: Backend, store: Store) -> None:
        states = canonical_states(graph)
        arrays = [store[s] for s in states]
        numbering = {s: i for i, s in enumerate(states)}
        cut, derived = derive(graph, numbering)
        program = schedule(cut, numbering)
        self._arrays = [*arrays, *derived.values(arrays)]
        feeds = random_feeds(graph)
        names = zip(graph.inputs, program.arguments)
        self._feeds = {a.name: feeds[n].astype(a.type.dtype.numpy) for n, a in names}
        self._runner = backend.load(program, Options())
        self._sum = 0.0

    def seconds(self, repeats: int) -> float:
        """Seconds that the kernels of one run take, the mean of `repeats` runs."""
        self._sum = 0.0
        for _ in range(repeats):
            self._runner.run(self._feeds, self._arrays, 0, self._count)
        return self._sum / repeats

    def _count(self, work: Work, seconds: float) -> None:
        if work.instructions[0].name != _BESIDE:
            self._sum += seconds
