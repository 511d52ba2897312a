"""Templates replay what was traced, whatever the shape of its graph."""

from __future__ import annotations

import numpy as np

from branchgraph.chainer.recorder import Tensor, recorder, type_of
from branchgraph.chainer.template import Template, replay
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.ops.reshape import Split


def tensor(*values: float) -> Tensor:
    array = np.array(values, np.float32)
    return Tensor(type_of(array), array)


def several(x: Value) -> tuple[Value, ...]:
    """Two ops of several results each, and steps between and behind them."""
    a, b, c = x.graph.apply(Split(axis=0, sizes=(1, 1, 1)), x)
    d = a * b + c
    doubled = x * 2.0
    e, f = x.graph.apply(Split(axis=0, sizes=(1, 2)), doubled)
    return (d - e, f, a)


def test_ops_with_several_results_keep_their_numbers_apart() -> None:
    graph = Graph("several")
    template = Template.of(graph, several(graph.input("x", (3,))))
    written = [n for _, _, outputs in template.steps for n in outputs]
    assert len(set(written)) == len(written)
    results = replay(("several",), several, tensor(2, 3, 5))
    values = [recorder().value(t).tolist() for t in results]
    assert values == [[2 * 3 + 5 - 4], [6.0, 10.0], [2.0]]


def test_a_calculation_is_traced_once_for_each_signature() -> None:
    traced: list[tuple[int, ...]] = []

    def build(x: Value) -> tuple[Value, ...]:
        traced.append(x.shape)  # type: ignore[arg-type]
        return (x * 2.0,)

    for operand in (tensor(1, 2), tensor(3, 4), tensor(1, 2, 3)):
        replay(("counted",), build, operand)
    assert traced == [(2,), (3,)]


def test_what_nothing_flows_to_has_no_result() -> None:
    graph = Graph("none")
    x = graph.input("x", (2,))
    template = Template.of(graph, [None, x * 3.0, x])
    nothing, tripled, same = template.replay([operand := tensor(1, 2)], traced=False)
    assert nothing is None
    assert same is operand
    assert recorder().value(tripled).tolist() == [3.0, 6.0]  # type: ignore[arg-type]
