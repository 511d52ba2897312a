"""Networks and random graphs that many tests build."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from branchgraph.ir.builder import (
    average_pool,
    batch_norm,
    concat,
    conv,
    dense,
    dropout,
    exit,
    gate,
    global_average_pool,
    max_pool,
    merge_maximum,
    merge_mean,
    merge_product,
    merge_sum,
    relu,
    sigmoid,
    tanh,
)
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.ir.state import Role, State, Store

#: float64 results of two forms of the same function; about 4 digits above the rounding of a sum of
#: a thousand terms.
EXACT = {"rtol": 1e-9, "atol": 1e-10}
#: float32 forms of the same function, sums of up to a thousand terms.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def randomised(graph: Graph, seed: int = 0) -> Store:
    """A store in which no state is at a special value: statistics and biases are random too."""
    rng = np.random.default_rng(seed)
    store = Store.initialised(graph.states, seed)
    for state in graph.states:
        if not state.dtype.is_float:
            continue
        if state.role is Role.STATISTIC:
            store[state] = rng.uniform(0.5, 1.5, state.shape)
        elif state.role.trainable:
            # Gates too: behind a gate at 0 every activation would stand on its kink.
            store[state] = rng.normal(0.0, 0.5, state.shape)
    return store


def image_input(graph: Graph, channels: int = 3, size: int = 6) -> Value:
    return graph.input("x", ("N", channels, size, size))


def one_norm_applied_twice() -> Graph:
    """One batch norm, by hand, whose states serve two applications."""
    graph = Graph("twice")
    x = image_input(graph)
    y = batch_norm(x, name="bn")
    assert y.producer is not None
    twice = graph.emit(y.producer.op, relu(y), *y.producer.inputs[1:], name="bn")
    graph.output("y", twice)
    return graph


def branches_of_every_kind() -> Graph:
    """Branches, merges, a gate, dropout, batch norm and two exits in one small network."""
    graph = Graph("every_kind")
    h = relu(batch_norm(conv(image_input(graph), 4, 3, pad=1, name="stem")))
    with scope("block"):
        with branch("left"):
            a = conv(h, 4, 3, pad=1)
        with branch("right"):
            b = relu(conv(h, 4, 1))
        score = graph.read(State("block/gate", (), role=Role.GATE))
        h = merge_sum(a, gate(b, score), h, name="merge")
    with branch("exit1"):
        exit(dense(global_average_pool(h), 5), "exit1", threshold=0.7)
    h = dropout(max_pool(h, 2), 0.25)
    exit(dense(h, 5), "exit2", last=True)
    return graph


def dense_net_with_exits() -> Graph:
    """A DenseNet block: an exit in the middle, concats and their operands alive across the cut."""
    graph = Graph("dense_net")
    first = relu(conv(image_input(graph), 4, 3, pad=1, name="conv0"))
    second = relu(conv(first, 4, 3, pad=1, name="conv1"))
    both = concat(first, second, name="both")
    with branch("exit1"):
        exit(dense(global_average_pool(both), 5), "exit1", threshold=1.5)
    third = relu(conv(both, 4, 3, pad=1, name="conv2"))
    with branch("exit2"):
        exit(dense(global_average_pool(third), 5), "exit2", threshold=1.5)
    h = merge_sum(conv(concat(both, third), 4, 1, name="conv3"), first, second)
    exit(dense(global_average_pool(h), 5), "exit3", last=True)
    return graph


def merge_and_run_with_exits() -> Graph:
    """Two parallel residual branches that exchange their mean, with exits between the blocks."""
    graph = Graph("merge_and_run")
    stem = relu(conv(image_input(graph), 4, 3, pad=1, name="stem"))
    left = right = stem
    for k in (1, 2):
        with scope(f"block{k}"):
            mean = merge_mean(left, right, name="mean")
            with branch("left"):
                new_left = merge_sum(relu(conv(left, 4, 3, pad=1)), mean)
            with branch("right"):
                new_right = merge_sum(relu(conv(right, 4, 3, pad=1)), mean)
            left, right = new_left, new_right
        if k == 1:
            with branch("exit1"):
                pooled = global_average_pool(merge_sum(left, right))
                exit(dense(pooled, 5), "exit1", threshold=1.4)
    exit(dense(global_average_pool(merge_sum(left, right)), 5), "exit2", last=True)
    return graph


# -- random graphs ---------------------------------------------------------------------------------

_UNARY = (relu, sigmoid, tanh, lambda x: -x, lambda x: x * 0.5)
_MERGES = (merge_sum, merge_mean, merge_product, merge_maximum)


@st.composite
def random_graphs(draw: st.DrawFn, norms: bool = True) -> Graph:
    """Multi-branch image networks: every value has the shape [N, 4, 6, 6] until the head."""
    graph = Graph(draw(st.sampled_from(["net", "a b", 'quo"te', "net"])))
    values = [conv(image_input(graph), 4, 3, pad=1)]
    for k in range(draw(st.integers(1, 6))):
        values.append(_random_step(draw, graph, values, k, norms))
    h = global_average_pool(concat(*values[-2:]))
    graph.output("logits", dense(h, 5))
    return graph


def _random_step(draw: st.DrawFn, graph: Graph, values: list[Value], k: int, norms: bool) -> Value:
    pick = st.sampled_from(values)
    kind = draw(st.integers(0, 6 if norms else 5))
    with branch(f"b{draw(st.integers(0, 2))}") if draw(st.booleans()) else scope(f"s{k}"):
        if kind == 0:
            groups = draw(st.sampled_from([1, 2, 4]))
            return conv(draw(pick), 4, 3, pad=1, groups=groups, bias=draw(st.booleans()))
        if kind == 1:
            return draw(st.sampled_from(_UNARY))(draw(pick))
        if kind == 2:
            operands = draw(st.lists(pick, min_size=1, max_size=3))
            return draw(st.sampled_from(_MERGES))(*operands)
        if kind == 3:
            return draw(pick) + draw(pick)
        if kind == 4:
            score = graph.read(State("gate", (4, 1, 1), role=Role.GATE))
            return gate(draw(pick), score)
        if kind == 5:
            return average_pool(draw(pick), 3, stride=1, pad=1)
        return batch_norm(draw(pick))


def images(n: int = 5, channels: int = 3, size: int = 6, seed: int = 1) -> np.ndarray:
    """Random input for `image_input`."""
    return np.random.default_rng(seed).normal(size=(n, channels, size, size)).astype(np.float32)
