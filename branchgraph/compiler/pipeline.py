"""From a graph to an executable."""

from __future__ import annotations

from dataclasses import dataclass

from branchgraph.compiler.backend import Backend, Options
from branchgraph.compiler.backend import backend as find_backend
from branchgraph.compiler.derived import Derived, derive
from branchgraph.compiler.donation import donate
from branchgraph.compiler.early_relu import relu_before_pool
from branchgraph.compiler.executable import Executable
from branchgraph.compiler.horizontal import fuse_horizontally, mode
from branchgraph.compiler.program import Program, schedule
from branchgraph.ir.graph import Graph
from branchgraph.ir.hash import canonical_states, structural_hash
from branchgraph.ir.state import Store
from branchgraph.ir.verify import declared_ops, verify
from branchgraph.passes.clean import Canonical, CommonSubexpressions, Constants, DeadCode
from branchgraph.passes.fold_batch_norm import FoldBatchNorm
from branchgraph.passes.fuse_branches import FuseBranches
from branchgraph.passes.pipeline import Pipeline
from branchgraph.passes.specialise import specialise

#: What every graph goes through before it is scheduled.
CLEANING = Pipeline((DeadCode(), Canonical(), Constants(), CommonSubexpressions(), DeadCode()))

#: What graphs go through besides for a backend that optimises: batch norms and parallel linear
#: branches become single layers where that saves multiplications.
OPTIMISING = Pipeline((FuseBranches(), FoldBatchNorm()))

_PROGRAMS: dict[tuple[str, str, str], _Prepared] = {}
_REMEMBERED = 256


@dataclass
class _Counter:
    """Programs made by this process."""

    programs: int = 0


_COUNTER = _Counter()


def compile(
    graph: Graph, backend: str = "numpy", *, store: Store | None = None, seed: int = 0,
    threads: int | None = None, fpmath: str = "strict",
) -> Executable:  # fmt: skip
    """An executable of `graph`: outputs, gradients and updates in one program.

    A graph with declared ops is specialised for inference first (specialise a training graph
    yourself, where you differentiate it). It is cleaned before that, so that what an exit's head
    shares with the trunk is computed once, before the cut. States without a value in `store` are
    initialised from `seed`. Programs are cached by structure: a graph built again is not compiled
    again.

    `threads` and `fpmath` (`strict` or `bf16`, what float32 products may be computed in) are for
    backends that have them; others raise `UnsupportedError`. The names of backends are those of
    `compiler.backend.backends()`, and `auto`.
    """
    options = Options(threads, fpmath)
    if declared_ops(graph):
        graph = specialise(CLEANING.apply(graph), training=False)
    verify(graph)
    states = canonical_states(graph)
    chosen = find_backend(backend)
    prepared = _prepared(graph, chosen)
    store = Store() if store is None else store
    store.initialise(graph.states, seed)
    return Executable(
        prepared.program,
        chosen.load(prepared.program, options),
        tuple(graph.inputs),
        tuple(states),
        tuple(graph.outputs),
        store,
        prepared.derived,
        chosen.name,
    )


@dataclass(frozen=True)
class _Prepared:
    program: Program
    derived: Derived


def _prepared(graph: Graph, backend: Backend) -> _Prepared:
    key = (structural_hash(graph), backend.name, mode())
    if key not in _PROGRAMS:
        if len(_PROGRAMS) >= _REMEMBERED:
            _PROGRAMS.pop(next(iter(_PROGRAMS)))
        numbering = {s: i for i, s in enumerate(canonical_states(graph))}
        graph, derived = CLEANING.apply(graph), Derived(graph, (), ())
        if backend.optimises:
            graph = OPTIMISING.apply(graph)
            if not graph.updates and not graph.gradients:  # training is fused before its gradient
                graph = fuse_horizontally(relu_before_pool(graph), backend)
            graph, derived = derive(graph, numbering)
        program = schedule(graph, numbering)
        if backend.optimises:
            program = donate(program)
        _PROGRAMS[key] = _Prepared(program, derived)
        _COUNTER.programs += 1
    return _PROGRAMS[key]


def compilations() -> int:
    """How many programs were made so far; tests count them."""
    return _COUNTER.programs
