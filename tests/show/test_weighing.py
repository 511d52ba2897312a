"""Multiplications by sigmoids and softmaxes are gates, and what only forms gates is not drawn."""

from collections.abc import Callable

import pytest

from branchgraph.ir.builder import (
    concat,
    conv,
    dense,
    global_average_pool,
    relu,
    reshape,
    sigmoid,
    softmax,
    tanh,
    weighted_sum,
)
from branchgraph.ir.functions import resize_nearest, scale_channels
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.ir.op import make
from branchgraph.nets.paradise_blocks import pd_b
from branchgraph.show import counts, to_dot, to_text
from branchgraph.show.picture import Picture


def graph_of(make_output: Callable[[Value], Value]) -> Graph:
    g = Graph("weighed")
    g.output("y", make_output(g.input("x", ("N", 4, 8, 8))))
    return g


def squeezed(x: Value) -> Value:
    return scale_channels(x, sigmoid(dense(global_average_pool(x), 4)))


def mixed(x: Value) -> Value:
    """Five equal branches, weighted by slices of one softmax."""
    weights = reshape(softmax(dense(global_average_pool(x), 5)), ("N", 5, 1, 1))
    parts = [x.graph.emit(make("slice", axis=1, start=k, size=1), weights) for k in range(5)]
    values = []
    for k in range(5):
        with branch(f"p{k}"):
            values.append(conv(x, 4, 1, name="conv"))
    return weighted_sum(values, parts)


@pytest.mark.parametrize(
    ("make_output", "gates"),
    [
        (squeezed, 1),
        (lambda x: x * sigmoid(x), 0),
        (lambda x: sigmoid(relu(x)) * tanh(x), 1),
        (lambda x: x * relu(x), 0),
        (mixed, 5),
    ],
    ids=["squeeze", "swish", "gated unit", "product", "mixture"],
)
def test_gates_are_told_from_products(make_output: Callable[[Value], Value], gates: int) -> None:
    assert counts(graph_of(make_output)).gates == gates


def test_a_gate_reads_its_maker() -> None:
    text = to_text(graph_of(squeezed))
    assert "reshape" not in text
    assert "◇ gate sigmoid ← x, %" in text


def test_forms_of_gates_are_drawn_with_states() -> None:
    g = graph_of(squeezed)
    assert "reshape" in to_text(g, states=True)


def test_a_form_that_something_else_reads_stays() -> None:
    def also_read(x: Value) -> Value:
        gate = reshape(sigmoid(dense(global_average_pool(x), 4)), ("N", 4, 1, 1))
        x.graph.output("gate", gate)
        return x * gate

    assert "reshape" in to_text(graph_of(also_read))


def test_weighted_branches_are_drawn_once_and_read_the_softmax() -> None:
    picture = Picture(graph_of(mixed))
    assert [r.label for r in picture.repeats] == ["×5 branches"]
    (gate,) = (n for n in picture.nodes if n.op.opcode == "multiply")
    makers = [v.producer.op.opcode for v in picture.operands(gate) if v.producer]
    assert makers == ["conv", "softmax"]


def test_pd_b_has_a_gate_a_branch() -> None:
    assert counts(graph_of(lambda x: pd_b(x, 4, groups=2, reduction=2))).gates == 4


# -- words -----------------------------------------------------------------------------------------


def test_paddings_and_sizes_are_said_briefly() -> None:
    def padded(x: Value) -> Value:
        front = x.graph.emit(make("pad", begin=(0, 4, 0, 0), end=(0, 0, 0, 0), value=0.0), x)
        edge = make("pad", begin=(0, 0, 1, 0), end=(0, 0, 1, 2), value=1.0)
        return resize_nearest(x.graph.emit(edge, front), size=(20, 20))

    text = to_text(graph_of(padded))
    assert "pad 4 channels in front " in text
    assert "pad axis 2 by 1, axis 3 by 0..2, of 1" in text
    assert "resize nearest to 20x20" in text


# -- clusters --------------------------------------------------------------------------------------


def test_a_scope_of_one_box_is_a_prefix() -> None:
    def scoped(x: Value) -> Value:
        with scope("outer"), scope("stem"):
            x = relu(conv(x, 4, 1, name="conv"), name="relu")
        with scope("two"):
            return concat(conv(x, 4, 1, name="a"), conv(x, 4, 1, name="b"))

    source = to_dot(graph_of(scoped))
    assert "<B>outer/stem/conv</B>" in source
    assert "<B>relu</B>" in source
    assert source.count("subgraph cluster") == 1


def test_equal_branches_that_meet_in_another_scope_are_drawn_once() -> None:
    def split(x: Value) -> Value:
        with scope("module"):
            values = []
            for k in range(6):
                with branch(f"p{k}"):
                    values.append(conv(x, 4, 1, name="conv"))
        with scope("head"):
            return relu(concat(*values))

    assert [r.label for r in Picture(graph_of(split)).repeats] == ["p0 … p5 ×6 branches"]
