"""Every op has a kind, and words that are not its class name."""

import pytest

from branchgraph.ir.builder import exit, gate, global_average_pool, max_pool, merge_sum, relu
from branchgraph.ir.graph import Graph
from branchgraph.ir.op import Op, make
from branchgraph.show import describe
from branchgraph.show.style import Kind, kind


def test_kinds_follow_from_the_op() -> None:
    g = Graph("kinds")
    x = g.input("x", ("N", 4, 8, 8))
    flat = global_average_pool(x)
    made = {
        Kind.ACTIVATION: relu(x),
        Kind.POOLING: max_pool(x, 2),
        Kind.MERGE: merge_sum(x, x),
        Kind.GATE: gate(x, x),
        Kind.EXIT: exit(flat, "out", last=True),
        Kind.OTHER: x + 1.0,
    }
    for expected, value in made.items():
        assert value.producer is not None
        assert kind(value.producer) is expected
    assert flat.producer is not None
    assert kind(flat.producer) is Kind.POOLING
    assert describe.words(flat.producer) == "global average pool"


def test_a_mean_over_other_axes_is_no_pooling() -> None:
    g = Graph("mean")
    x = g.input("x", ("N", 4, 8, 8))
    node = g.emit(make("reduce_mean", axes=(0,)), x).producer
    assert node is not None
    assert kind(node) is Kind.OTHER
    assert describe.details(node) == "over axis 0"


def test_ops_in_the_table_of_details_exist() -> None:
    assert set(describe._DETAILS) <= set(Op.registry)


@pytest.mark.parametrize(
    ("pad", "text"),
    [
        ((1, 1, 1, 1), "pad 1"),
        ((1, 2, 1, 2), "pad 1x2"),
        ((0, 0, 1, 1), "pad 0..1"),
        ((0, 0, 0, 0), ""),
    ],
)
def test_pads_are_short(pad: tuple[int, ...], text: str) -> None:
    g = Graph("pads")
    node = max_pool(g.input("x", ("N", 1, 8, 8)), 2, stride=(2, 1), pad=pad).producer
    assert node is not None
    assert describe.details(node) == ", ".join(filter(None, ["2x2/2x1", text]))


def test_shapes_show_symbols_and_other_types() -> None:
    g = Graph("shapes")
    assert describe.shape(g.input("a", ("2*N + 1", 3)).type) == "(2N+1)×3"
    assert describe.shape(g.input("b", ("3*N",), "i64").type) == "3N i64"
    assert describe.shape(g.input("c").type) == "scalar"


@pytest.mark.parametrize(
    ("op", "shapes", "expected", "text"),
    [
        (make("clip", low=0.0, high=6.0), [("N", 4)], Kind.OTHER, "clip 0..6"),
        (
            make("sample_conv", stride=(1, 1), pad=(1,) * 4, dilation=(1, 1), groups=1),
            [("N", 4, 8, 8), ("N", 6, 4, 3, 3)],
            Kind.TRAINABLE,
            "conv per sample 3x3, 6, pad 1",
        ),
        (make("softmax_output"), [("N", 4), ("N",)], Kind.LOSS, "softmax with loss"),
        (
            make("regression_output", kind="logistic"),
            [("N", 1), ("N", 1)],
            Kind.LOSS,
            "regression with loss logistic",
        ),
        (make("make_loss"), [("N",)], Kind.LOSS, "loss"),
        (
            make("roi_max_pool", cells=(7, 7)),
            [("N", 4, 32, 32), ("R", 5)],
            Kind.POOLING,
            "RoI max pool 7x7",
        ),
        (make("top_k", k=2, axis=1), [("N", 5, 3)], Kind.OTHER, "top k 2 of 5"),
    ],
)
def test_ops_have_words(
    op: Op, shapes: list[tuple[str | int, ...]], expected: Kind, text: str
) -> None:
    g = Graph("words")
    operands = [g.input(f"x{i}", shape) for i, shape in enumerate(shapes)]
    node = g.emit(op, *operands).producer
    assert node is not None
    assert kind(node) is expected
    assert " ".join(filter(None, (describe.title(node), describe.details(node)))) == text


@pytest.mark.parametrize(
    ("divisor", "text"),
    [
        ("kernel", "2x2/2"),
        ("one", "2x2/2, sum"),
        ("inside", "2x2/2, over the part inside"),
        ("padded", "2x2/2, over the padded part"),
    ],
)
def test_an_average_says_what_it_divides_by(divisor: str, text: str) -> None:
    g = Graph("average")
    op = make(
        "average_pool", kernel=(2, 2), stride=(2, 2), pad=(0,) * 4, cover_all=False, divisor=divisor
    )
    node = g.emit(op, g.input("x", ("N", 1, 8, 8))).producer
    assert node is not None
    assert describe.details(node) == text
