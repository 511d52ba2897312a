"""One graph on two backends: NumPy, which is right by definition, and oneDNN.

Tolerances. With u = 2^-24, a sum of n float32 products in any order is within n u sum |a_i b_i| of
the exact one, to first order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1),
so two orders differ by at most twice that. Along a path of a graph the lengths n add up. Elementary
functions err by a few units in the last place, so every op counts for `ELEMENTARY` roundings more.
`roundings` is that sum over the longest path. What it is multiplied by is the largest magnitude in
the tensor; rounding errors of independent signs add up to sqrt(n) u instead of n u, which leaves
room for sums whose terms cancel to sqrt(n) of their magnitudes.

Where a network magnifies roundings by more (batch norm over a few samples, gradients that cancel to
nothing), float64 decides: oneDNN may be `CONDITIONED` times as far from it as NumPy's float32 is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from branchgraph.backends.onednn.plan import Kernel
from branchgraph.compiler import Executable, compile
from branchgraph.ir.dims import substitute_shape
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.state import State, Store
from branchgraph.ir.types import DType, TensorType

UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
#: Roundings of one exp, log, division, ... on top of those of sums.
ELEMENTARY = 8
#: How much farther than NumPy a result may be from what float64 gives, if roundings are magnified.
CONDITIONED = 8
#: A result that only cancellation makes small is measured against this part of the largest one.
CANCELLED = 1e-3

Arrays = Mapping[Any, np.ndarray]


def roundings(graph: Graph, **sizes: int) -> int:
    """The largest number of roundings one after the other, for dimensions `sizes`."""
    counts: dict[Value, int] = {}
    for node in graph.nodes:
        before = max((counts.get(v, 0) for v in node.inputs), default=0)
        counts.update(dict.fromkeys(node.outputs, before + _longest(node, sizes) + ELEMENTARY))
    return max(counts.values(), default=0)


def _longest(node: Node, sizes: Mapping[str, int]) -> int:
    """How many elements meet in one element of a result."""
    if node.op.symbolic and node.op.introduces:
        return 0
    ins = tuple(_concrete(v.type, sizes) for v in node.inputs)
    outs = tuple(_concrete(v.type, sizes) for v in node.outputs)
    results = [_elements(t) for t in outs if _elements(t)]
    if not results:
        return 0
    most = max([int(str(node.op.macs(ins, outs))), *map(_elements, ins)])
    return most // min(results)


def _concrete(type_: TensorType, sizes: Mapping[str, int]) -> TensorType:
    """The type with sizes for symbols; counts of survivors are at most the batch."""
    symbols = {s for d in type_.shape if not isinstance(d, int) for s in d.symbols}
    known = {s: sizes.get(s, max(sizes.values(), default=1)) for s in symbols}
    return TensorType(substitute_shape(type_.shape, known), type_.dtype)


def _elements(type_: TensorType) -> int:
    return int(np.prod([int(str(d)) for d in type_.shape]))


def assert_agree(
    found: Arrays, expected: Arrays, count: int, what: str = "",
    precise: Callable[[], Arrays] | None = None,
) -> None:  # fmt: skip
    """Equal names, shapes, dtypes, and numbers within `2 count` roundings; integers exactly.

    `precise` computes the same in float64, and is asked, once, where roundings alone do not explain
    it.
    """
    exact: Arrays = {}
    assert list(found) == list(expected)
    largest = max((_magnitude(e) for e in expected.values()), default=0.0)
    for key, reference in expected.items():
        actual = found[key]
        label = f"{what} {getattr(key, 'name', key)}".strip()
        assert actual.dtype == reference.dtype, label
        assert actual.shape == reference.shape, label
        unit = UNIT.get(str(reference.dtype))
        if unit is None:
            np.testing.assert_array_equal(actual, reference, err_msg=label)
            continue
        scale = max(_magnitude(reference), CANCELLED * largest)
        a, b = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
        bound = 2 * count * unit * scale
        if precise is not None and not np.allclose(a, b, rtol=0, atol=bound, equal_nan=True):
            exact = exact or precise()
            centre = np.asarray(exact[key], np.float64)
            bound += CONDITIONED * float(np.abs(b - centre).max())
            b = centre
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=label)


def _magnitude(array: np.ndarray) -> float:
    if str(array.dtype) not in UNIT:
        return 0.0
    wide = np.asarray(array, np.float64)
    return float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0))


def pair(graph: Graph, store: Store | None = None) -> tuple[Executable, Executable]:
    """Executables on NumPy and on oneDNN, over equal stores of their own."""
    store = Store.initialised(graph.states) if store is None else store
    return compile(graph, "numpy", store=store.copy()), compile(graph, "onednn", store=store.copy())


def check(
    graph: Graph, feeds: Mapping[str, Any], store: Store | None = None, *, runs: int = 1,
    count: int | None = None,
) -> None:  # fmt: skip
    """Outputs, gradients and updated states of oneDNN are those of NumPy, run after run."""
    expected, found = pair(graph, store)
    sizes = sizes_of(graph, feeds)
    count = roundings(graph, **sizes) if count is None else count
    for run in range(runs):
        assert_agree(found.run(feeds), expected.run(feeds), count * (run + 1), "output")
    if graph.gradients:
        before = expected.store.copy()
        assert_agree(
            found.gradients(feeds), expected.gradients(feeds), count * runs, "gradient",
            lambda: interpret(graph, feeds, before, precision=DType.F64).gradients,
        )  # fmt: skip
    updated = list(graph.updates)
    old, new = states_of(expected.store, updated), states_of(found.store, updated)
    assert_agree(new, old, count * (runs + 1), "state")


def states_of(store: Store, states: Sequence[State]) -> dict[State, np.ndarray]:
    """Copies of values."""
    return {state: store.peek(state).copy() for state in states}


def sizes_of(graph: Graph, feeds: Mapping[str, Any]) -> dict[str, int]:
    """What `feeds` make of the symbols in the shapes of inputs."""
    found: dict[str, int] = {}
    for name, value in graph.inputs.items():
        if name in feeds:
            for size, d in zip(np.shape(feeds[name]), value.shape):
                if not isinstance(d, int) and str(d) in d.symbols:
                    found[str(d)] = size
    return found


def all_kernels(executable: Executable) -> list[Kernel]:
    """The kernels of all plans that an executable on oneDNN has made."""
    plans = (plan for known in executable._runner._plans for plan in known.values())  # type: ignore[attr-defined]
    return [kernel for plan in plans for kernel in plan.kernels]


def kernels_of(executable: Executable) -> list[str]:
    """Their names."""
    return [kernel.name for kernel in all_kernels(executable)]
