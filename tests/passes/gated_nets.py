"""Gated networks and random gated graphs for the tests of gate passes."""

from __future__ import annotations

import numpy as np
from builders import image_input
from hypothesis import strategies as st

from branchgraph.ir.builder import (
    batch_norm,
    concat,
    conv,
    dense,
    gate,
    global_average_pool,
    max_pool,
    merge_mean,
    merge_sum,
    relu,
    sigmoid,
)
from branchgraph.ir.graph import Graph, Scope, Value, at, branch
from branchgraph.ir.state import Role, State, Store
from branchgraph.passes.constant_arrays import write

#: A masked network whose steps take milliseconds: 3 modules of 4 blocks on images of 8x8.
TINY = {"depth": 11, "width": 1, "cardinality": 4, "channels": 1, "size": 8}


def fixed(graph: Graph, *numbers: float, shape: tuple[int, ...] | None = None) -> Value:
    """A gate that the graph knows: one number, or one a channel."""
    array = np.array(numbers, np.float32).reshape(shape or (len(numbers), 1, 1))
    like = next(iter(graph.inputs.values()))
    return write(graph, array, like.dtype)


def closed(value: Value) -> Value:
    return gate(value, fixed(value.graph, 0.0))


def norm_of_two(graph: Graph, first: Value, second: Value) -> tuple[Value, Value]:
    """One batch norm applied to two values, as batch norms of shared layers are."""
    y = batch_norm(first, name="bn")
    assert y.producer is not None
    with at((Scope("again"),)):
        return y, graph.emit(y.producer.op, second, *y.producer.inputs[1:], name="bn")


def gate_states(graph: Graph) -> list[State]:
    return [s for s in graph.states if s.role is Role.GATE]


def scored(graph: Graph, seed: int = 0) -> Store:
    """A store with random gate scores, different in every mask."""
    store = Store.initialised(graph.states, seed)
    rng = np.random.default_rng(seed)
    for state in gate_states(graph):
        store[state] = rng.uniform(0.0, 1.0, state.shape)
    return store


def wired(graph: Graph, rows: dict[int, list[int]]) -> Store:
    """Scores of masks with K = 1: block j of module i reads block `rows[i][j]`."""
    store = Store.initialised(graph.states)
    for state in gate_states(graph):
        number = int(state.name.partition("/")[0].removeprefix("module"))
        score = np.full(state.shape, 0.1)
        score[np.arange(len(rows[number])), rows[number]] = 0.9
        store[state] = score
    return store


_GATES = st.sampled_from(
    [
        *[(0.0,), (1.0,)] * 2,
        (0.5,),
        (0.0, 1.0, 0.0, 1.0),
        (0.0, 0.0, 1.0, 2.0),
        (1.0, 1.0, 1.0, 1.0),
        (0.0, 0.0, 0.0, 0.0),
    ]
)


@st.composite
def gated_graphs(draw: st.DrawFn, norms: bool = True) -> Graph:
    """Branches of [N, 4, 6, 6] with fixed gates between them, read through sums and concats."""
    graph = Graph("gated")
    values = [conv(image_input(graph), 4, 3, pad=1)]
    for k in range(draw(st.integers(1, 7))):
        with branch(f"b{k}"):
            values.append(_step(draw, graph, values, norms))
    left, right = draw(st.sampled_from(values)), values[-1]
    mixed = conv(concat(left, right), 3, draw(st.sampled_from([1, 3])), pad=draw(st.integers(0, 1)))
    graph.output("logits", dense(global_average_pool(mixed), 5))
    if draw(st.booleans()):
        graph.output("flat", dense(max_pool(concat(right, left), 2), 2))
    return graph


def _step(draw: st.DrawFn, graph: Graph, values: list[Value], norms: bool) -> Value:
    pick = st.sampled_from(values)
    kind = draw(st.integers(0, 8 if norms else 7))
    if kind <= 2:
        return gate(draw(pick), fixed(graph, *draw(_GATES)))
    if kind == 3:
        groups = draw(st.sampled_from([1, 2, 4]))
        return conv(draw(pick), 4, 3, pad=1, groups=groups, bias=draw(st.booleans()))
    if kind == 4:
        return merge_sum(*draw(st.lists(pick, min_size=1, max_size=3)))
    if kind == 5:
        return draw(st.sampled_from([relu, sigmoid, lambda x: x * 0.5, lambda x: x + 1.0]))(
            draw(pick)
        )
    if kind == 6:
        return conv(concat(draw(pick), draw(pick)), 4, 1, bias=draw(st.booleans()))
    if kind == 7:
        return merge_mean(draw(pick), draw(pick)) + draw(pick)
    return batch_norm(draw(pick))
