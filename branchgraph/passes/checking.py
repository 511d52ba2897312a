"""Whether a pass kept its claim: both graphs evaluated in float64 on the same random numbers.

    equal      equal values, NaN and infinity in the same places, the sign of zero free
    exact      |a - b| <= 1e-9 max(1, largest |a|)
    different  nothing is compared

Declared graphs are compared in inference form and, for `equal` claims, in training form too (exits
compute every row). Inputs without default, states and symbolic sizes get random values from a seed;
`equal` claims are checked a second time with NaN and infinities among the inputs. Updates may go
with the states they belong to, but not where the state is still read.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from branchgraph.ir.dims import Dim
from branchgraph.ir.errors import BranchgraphError, ClaimError
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import Run, interpret
from branchgraph.ir.rebuild import bind, clone
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType
from branchgraph.ir.verify import declared_ops
from branchgraph.passes.base import Claim, Report
from branchgraph.passes.specialise import specialise

#: Relative to the largest element, for sums in another order.
EXACT = 1e-9
#: What symbolic sizes are, the first one met first: odd, more than one, and not all the same.
_SIZES = (3, 5, 2)


def check_claim(
    before: Graph, after: Graph, claim: Claim, *, report: Report | None = None, seed: int = 0
) -> None:
    """Raise `ClaimError`, naming the first value that differs, unless `after` is as claimed.

    Every region that `report` recorded is compared by itself, then the whole once.
    """
    if claim == "different":
        return
    for region in report.regions if report else ():
        what = f"the part rewritten at {region.where}"
        try:
            _check(region.before, region.after, claim, seed, what)
        except ClaimError:
            raise
        except BranchgraphError as error:
            assert report is not None
            report.noted(f"{what} does not run by itself: {error}")
    if report and report.dropped:
        before = clone(before)
        before.keep(output=lambda name: name not in report.dropped)
    _check(before, after, claim, seed, "the whole")


def _check(before: Graph, after: Graph, claim: Claim, seed: int, what: str) -> None:
    modes = [False, True] if claim == "equal" else [False]
    declared = declared_ops(before) or declared_ops(after)
    for training in modes if declared else [False]:
        old, new = before, after
        if declared:
            old, new = (specialise(g, training=training, exits="all") for g in (old, new))
        label = f"{what}{' in training' if training else ''}"
        sizes: dict[str, int] = {}
        feeds = random_feeds(old, seed, sizes)
        old, new = _bound_rest(old, sizes), _bound_rest(new, sizes)
        _compare(old, new, claim, feeds, seed, label)
        if claim == "equal":
            special = _with_specials(feeds, seed)
            _compare(old, new, claim, special, seed, f"{label}, fed NaN and infinities")


def _compare(
    before: Graph, after: Graph, claim: Claim, feeds: Mapping[str, np.ndarray], seed: int, what: str
) -> None:
    store = random_store({*before.states, *after.states}, before.states, seed)
    with np.errstate(all="ignore"):
        old, new = (
            interpret(g, {k: v for k, v in feeds.items() if k in g.inputs}, store, DType.F64)
            for g in (before, after)
        )
    worst = _first_difference(_named(old), _named(new), claim) or _lost_update(before, after)
    if worst:
        name, size = worst
        place = _first_node(before, after, feeds, store, claim)
        raise ClaimError(
            f"{what}: claimed {claim}, but {name} differs by {size:.3g}"
            + (f"; the first value to differ is {place}" if place else "")
        )


def _named(run: Run) -> dict[str, np.ndarray]:
    """Outputs, updates and gradients by what they are called."""
    return {
        **{f"output {k!r}": v for k, v in run.outputs.items()},
        **{f"the update of {s.name} ({id(s)})": v for s, v in run.updates.items()},
        **{f"the gradient of {s.name} ({id(s)})": v for s, v in run.gradients.items()},
    }


def _first_difference(
    old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], claim: Claim
) -> tuple[str, float] | None:
    for name, value in old.items():
        if name in new:
            size = difference(value, new[name], claim)
            if size:
                return name.split(" (")[0], size
        elif name.startswith("output"):
            return f"{name}, which is gone,", float("inf")
    return None


def _lost_update(before: Graph, after: Graph) -> tuple[str, float] | None:
    """A state that one graph updates and the other reads without updating it."""
    for one, other, what in ((before, after, "gone"), (after, before, "new")):
        for state in one.updates:
            if state in other.reads and state not in other.updates:
                return f"the update of {state.name}, which is {what},", float("inf")
    return None


def difference(a: np.ndarray, b: np.ndarray, claim: Claim) -> float:
    """0 where `b` is as claimed, else the largest difference (infinite for shapes and NaN)."""
    if a.shape != b.shape:
        return float("inf")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0
    if not (np.isfinite(a[~same]).all() and np.isfinite(b[~same]).all()):
        return float("inf")
    worst = float(np.abs(a[~same] - b[~same]).max())
    scale = max(1.0, float(np.abs(a[np.isfinite(a)]).max(initial=0.0)))
    return 0.0 if claim == "exact" and worst <= EXACT * scale else worst


def _first_node(
    before: Graph, after: Graph, feeds: Mapping[str, np.ndarray], store: Store, claim: Claim
) -> str:
    """The first node, of those both graphs have under one path, whose value differs."""
    values = [_by_path(g, feeds, store) for g in (before, after)]
    for path, value in values[0].items():
        if path in values[1] and difference(value, values[1][path], claim):
            return path
    return ""


def _by_path(graph: Graph, feeds: Mapping[str, np.ndarray], store: Store) -> dict[str, np.ndarray]:
    """Values of nodes whose path no other node has."""
    probe = clone(graph)
    probe.keep(output=lambda n: False, update=lambda s: False, gradient=lambda s: False)
    paths: dict[str, list[Value]] = {}
    for node in probe.nodes:
        if node.name and len(node.outputs) == 1:
            paths.setdefault(node.path, []).append(node.output)
    for path, found in paths.items():
        if len(found) == 1:
            probe.output(path, found[0])
    given = {k: v for k, v in feeds.items() if k in probe.inputs}
    with np.errstate(all="ignore"):
        return interpret(probe, given, store, DType.F64).outputs


# -- random numbers --------------------------------------------------------------------------------


def random_feeds(
    graph: Graph, seed: int = 0, sizes: dict[str, int] | None = None
) -> dict[str, np.ndarray]:
    """A value for every input without a default; `sizes` takes what symbols were given."""
    rng = np.random.default_rng([seed, 1])
    sizes = {} if sizes is None else sizes
    return {
        name: _drawn(rng, _bound(value, sizes), value.dtype)
        for name, value in graph.inputs.items()
        if value.default is None
    }


def _with_specials(feeds: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """`feeds` with NaN and infinities in about one of eight places."""
    rng = np.random.default_rng([seed, 3])
    special = {}
    for name, value in feeds.items():
        chosen = rng.choice([np.nan, np.inf, -np.inf], value.shape)
        where = rng.random(value.shape) < 1 / 8
        special[name] = np.where(where, chosen, value) if value.dtype.kind == "f" else value
    return special


def _bound_rest(graph: Graph, sizes: dict[str, int]) -> Graph:
    """`graph` with the symbols bound that no input carries; those of its own ops stay."""
    own = {name for node in graph.nodes for name in node.op.introduces}
    fed = {s for v in graph.inputs.values() for s in _symbols(v)}
    rest = {s for n in graph.nodes for v in n.outputs for s in _symbols(v)} - own - fed
    if not rest:
        return graph
    return bind(graph, **{s: sizes.setdefault(s, _SIZES[0]) for s in sorted(rest)})


def _symbols(value: Value) -> list[str]:
    return [s for size in value.shape if isinstance(size, Dim) for s in size.symbols]


def random_store(states: set[State], order: list[State], seed: int = 0) -> Store:
    """Values for `states`: those in `order` at no special value, the others at their initial one.

    States that a pass adds are the others: it claims what the network is when they are new.
    """
    rng = np.random.default_rng([seed, 2])
    store = Store()
    rest = sorted(states - set(order), key=lambda s: s.name)
    store.initialise([*order, *rest], seed)
    for state in order:
        if state.dtype.is_float:
            positive = state.role in (Role.STATISTIC, Role.SLOT, Role.LOSS_SCALE)
            drawn = rng.uniform(0.5, 1.5, state.shape)
            store[state] = drawn if positive else rng.normal(0.0, 0.5, state.shape)
    return store


def _bound(value: Value, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of `value` with its symbols bound; new symbols are given a size."""
    for size in value.shape:
        for symbol in size.symbols if isinstance(size, Dim) else ():
            sizes.setdefault(symbol, _SIZES[len(sizes) % len(_SIZES)])
    found = (d.substitute(sizes) if isinstance(d, Dim) else d for d in value.shape)
    return tuple(int(str(d)) for d in found)


def _drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    if dtype is DType.BOOL:
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.is_integer:
        return rng.integers(0, 2, shape).astype(dtype.numpy)
    return rng.normal(size=shape)
