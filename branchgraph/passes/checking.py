"""Whether a pass kept its claim: both graphs evaluated in float64 on the same random numbers.

    equal      equal values, NaN and infinity in the same places, the sign of zero free
    exact      |a - b| <= 1e-9 max(1, largest |a|)
    different  nothing is compared

Declared graphs are compared in inference form and, for `equal` claims, in training form too (exits
compute every row). Inputs without default, states and symbolic sizes get random values from a seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from branchgraph.ir.dims import Dim
from branchgraph.ir.errors import ClaimError
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import Run, interpret
from branchgraph.ir.rebuild import clone
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
        _check(region.before, region.after, claim, seed, f"the part rewritten at {region.where}")
    _check(before, after, claim, seed, "the whole")


def _check(before: Graph, after: Graph, claim: Claim, seed: int, what: str) -> None:
    modes = [False, True] if claim == "equal" else [False]
    declared = declared_ops(before) or declared_ops(after)
    for training in modes if declared else [False]:
        old, new = before, after
        if declared:
            old, new = (specialise(g, training=training, exits="all") for g in (old, new))
        _compare(old, new, claim, seed, f"{what}{' in training' if training else ''}")


def _compare(before: Graph, after: Graph, claim: Claim, seed: int, what: str) -> None:
    store = random_store({*before.states, *after.states}, before.states, seed)
    feeds = random_feeds(before, seed)
    with np.errstate(all="ignore"):
        old, new = (
            interpret(g, {k: v for k, v in feeds.items() if k in g.inputs}, store, DType.F64)
            for g in (before, after)
        )
    worst = _first_difference(_named(old), _named(new), claim)
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
    worst = float(np.abs(a - b)[~same].max())
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


def random_feeds(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """A value for every input without a default."""
    rng = np.random.default_rng([seed, 1])
    sizes: dict[str, int] = {}
    return {
        name: _drawn(rng, _bound(value, sizes), value.dtype)
        for name, value in graph.inputs.items()
        if value.default is None
    }


def random_store(states: set[State], order: list[State], seed: int = 0) -> Store:
    """Values for `states`, those in `order` first; none is at a special value."""
    rng = np.random.default_rng([seed, 2])
    store = Store()
    rest = sorted(states - set(order), key=lambda s: s.name)
    store.initialise([*order, *rest], seed)
    for state in [*order, *rest]:
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
