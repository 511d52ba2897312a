"""Patterns find what they say, in every way they allow, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from builders import image_input

from branchgraph.ir.builder import (
    batch_norm,
    concat,
    conv,
    dense,
    flatten,
    merge_product,
    merge_sum,
    relu,
    sigmoid,
    tanh,
)
from branchgraph.ir.errors import BranchgraphError
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.match import Match, Pattern, pattern
from branchgraph.ir.op import make
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.ops.reshape import Split


def matrix(name: str = "x") -> Value:
    return Graph("g").input(name, ("N", 4))


def node(value: Value) -> Node:
    assert value.producer is not None
    return value.producer


def found(function: Callable[..., object], value: Value) -> Match | None:
    return Pattern(function).match(node(value))


def test_a_pattern_names_values_and_nodes() -> None:
    @pattern
    def normalised(p, x, weight):  # type: ignore[no-untyped-def]
        z = p.conv(x, weight, p.maybe("bias"), name="conv")
        return p.batch_norm(z, p.any(), p.any(), p.any(), p.any(), name="norm")

    x = image_input(Graph("g"))
    y = batch_norm(conv(x, 4, 3, name="c", bias=False), name="bn")
    match = normalised.match(node(y))
    assert match is not None
    assert match["x"] is x
    assert match["weight"].name == "c.weight"
    assert match.get("bias") is None
    assert match.node("conv").path == "c"
    assert match.roots == (match.node("norm"),)
    assert match.outputs == (y,)
    assert set(match.inside) == {match.node("conv"), match.node("norm")}
    assert normalised.opcodes == ("batch_norm",)
    assert normalised.depth == 2
    assert normalised.match(match.node("conv")) is None


def test_an_operand_that_may_be_absent_is_bound_where_it_is_there() -> None:
    x = image_input(Graph("g"))
    match = found(lambda p, x, w: p.conv(x, w, p.maybe("bias")), conv(x, 4, 3, name="c"))
    assert match is not None
    assert match["bias"].name == "c.bias"


def test_without_the_operand_a_pattern_that_wants_it_does_not_match() -> None:
    x = image_input(Graph("g"))
    assert found(lambda p, x, w, b: p.conv(x, w, b), conv(x, 4, 3, bias=False)) is None
    assert found(lambda p, x, w: p.conv(x, w), conv(x, 4, 3)) is None


def test_a_variable_is_the_same_value_wherever_it_comes() -> None:
    x = matrix()
    y = x.graph.input("y", ("N", 4))
    square = lambda p, x: p.multiply(x, x)  # noqa: E731
    assert found(square, x * x) is not None
    assert found(square, x * y) is None
    assert found(lambda p, x: p.add(p.relu(x), p.tanh(x)), relu(x) + tanh(y)) is None


def test_any_is_another_value_each_time() -> None:
    x = matrix()
    y = x.graph.input("y", ("N", 4))
    assert found(lambda p: p.multiply(p.any(), p.any()), x * y) is not None
    assert found(lambda p: p.multiply(p.any("a"), p.any("a")), x * y) is None


def test_a_result_that_is_used_twice_is_one_node() -> None:
    def softmax(p, x):  # type: ignore[no-untyped-def]
        z = p.exp(x, name="exp")
        return p.divide(z, p.reduce_sum(z))

    x = matrix()
    exp = [x.graph.emit(make("exp"), x) for _ in range(2)]
    total = [x.graph.emit(ReduceSum(axes=(1,), keepdims=True), e) for e in exp]
    match = found(softmax, exp[0] / total[0])
    assert match is not None
    assert match.node("exp") is node(exp[0])
    assert len(match.inside) == 3
    assert found(softmax, exp[0] / total[1]) is None


def test_numbers_are_constants_filled_with_them() -> None:
    x = matrix()
    assert found(lambda p, x: p.add(x, 1), x + 1.0) is not None
    assert found(lambda p, x: p.add(x, 1), x + 2.0) is None
    assert found(lambda p, x: p.add(x, 1), x + x) is None
    full = x.graph.emit(make("full", value=0.0, shape=("N", 4), dtype="f32"))
    assert found(lambda p, x: p.multiply(x, 0.0), x * full) is not None


def test_attributes_are_values_or_tests() -> None:
    x = image_input(Graph("g"))
    wide = conv(x, 4, 3, stride=2)

    def strided(stride):  # type: ignore[no-untyped-def]
        return lambda p, x: p.conv(x, p.any(), p.any(), stride=stride)

    assert found(strided((2, 2)), wide)
    assert found(strided([2, 2]), wide), "a list is read as the attribute would be"
    assert not found(strided((1, 1)), wide)
    assert found(strided(lambda s: max(s) > 1), wide)
    assert not found(strided(lambda s: max(s) > 2), wide)
    assert found(lambda p, x: p.cast(x, dtype="f64"), x.graph.emit(make("cast", dtype="f64"), x))


def test_one_of_several_ops() -> None:
    x = matrix()
    either = lambda p, x: p.op(("relu", "tanh"), x, name="act")  # noqa: E731
    assert Pattern(either).opcodes == ("relu", "tanh")
    match = found(either, tanh(x))
    assert match is not None
    assert match.node("act").op.opcode == "tanh"
    assert found(either, sigmoid(x)) is None


@pytest.mark.parametrize("swapped", [False, True])
def test_operands_of_commutative_ops_stand_in_any_order(swapped: bool) -> None:
    x = matrix()
    a, b = relu(x), tanh(x)
    y = b + a if swapped else a + b
    assert found(lambda p, x: p.add(p.relu(x), p.tanh(x)), y) is not None
    z = b - a if swapped else a - b
    assert (found(lambda p, x: p.subtract(p.relu(x), p.tanh(x)), z) is None) == swapped


def test_a_choice_that_leads_nowhere_is_taken_back() -> None:
    """The first relu could be either operand; only one choice lets `x` be the same below."""
    x = matrix()
    z = x.graph.input("z", ("N", 4))
    y = merge_sum(relu(z), relu(x), tanh(x))
    match = found(lambda p, x, y: p.sum(p.relu(x), p.tanh(x), p.relu(y)), y)
    assert match is not None
    assert match["x"] is x
    assert match["y"] is z


def test_all_ways_are_found() -> None:
    x = matrix()
    a, b, c = relu(x), tanh(x), sigmoid(x)
    both = Pattern(lambda p, x, y: p.sum(x, y, p.any()))
    pairs = [(m["x"], m["y"]) for m in both.matches(node(merge_sum(a, b, c)))]
    assert len(pairs) == len(set(pairs)) == 6
    assert set(pairs) == {(u, v) for u in (a, b, c) for v in (a, b, c) if u is not v}


def test_each_takes_the_operands_that_are_left() -> None:
    def branches(p, x):  # type: ignore[no-untyped-def]
        return p.sum(x, p.each("convs", lambda p, x, w: p.conv(x, w, p.maybe("b"), name="conv")))

    x = image_input(Graph("g"), 4)
    convs = [conv(x, 4, 1, name=f"c{i}", bias=i > 0) for i in range(3)]
    match = found(branches, merge_sum(convs[0], x, *convs[1:]))
    assert match is not None
    assert match["x"] is x
    assert [part.node("conv").path for part in match.each("convs")] == ["c0", "c1", "c2"]
    assert [part["w"].name for part in match.each("convs")] == [
        "c0.weight",
        "c1.weight",
        "c2.weight",
    ]
    assert [part.get("b") is None for part in match.each("convs")] == [True, False, False]
    assert len(match.inside) == 4
    alone = found(branches, merge_sum(x))
    assert alone is not None
    assert alone.each("convs") == ()
    assert found(branches, merge_sum(x, relu(x))) is None


def test_each_may_ask_for_a_number_of_operands() -> None:
    x = matrix()
    two = lambda p: p.concat(p.each("r", lambda p, x: p.relu(x), at_least=2))  # noqa: E731
    assert found(two, concat(relu(x))) is None
    assert found(two, concat(relu(x), relu(x))) is not None
    parts = x.graph.apply(Split(axis=1, sizes=(1, 3)), x)
    halves = lambda p: p.concat(p.each("s", lambda p, x: p.split(x)))  # noqa: E731
    assert found(halves, concat(*parts)) is None, "an operand is no whole node with two results"


def readers_of(p, x):  # type: ignore[no-untyped-def]
    def alike(p, x):  # type: ignore[no-untyped-def]
        return p.relu(p.dense(x, p.any("weight"), p.maybe("bias")), name="act")

    return p.siblings("acts", x, alike)


def test_siblings_are_all_readers_that_look_alike() -> None:
    x = matrix()
    acts = [relu(dense(x, k, name=f"d{k}")) for k in (2, 3, 5)]
    other = tanh(dense(x, 2))
    siblings = pattern(readers_of)
    assert siblings.opcodes == ("relu",)
    match = None
    for value in (*acts, other):
        reader = siblings.match(node(value))
        assert (reader is not None) == (value is acts[0]), "the family starts at its first node"
        match = match or reader
    assert match is not None
    assert match["x"] is x
    assert match.outputs == tuple(acts)
    assert [part["weight"].name for part in match.each("acts")] == [
        f"d{k}.weight" for k in (2, 3, 5)
    ]
    assert len(match.inside) == 6


def test_one_reader_has_no_siblings() -> None:
    x = matrix()
    y = relu(dense(x, 2))
    relu(dense(relu(x), 2))
    assert found(readers_of, y) is None


def test_siblings_of_the_result_of_an_op() -> None:
    def after_flatten(p, x):  # type: ignore[no-untyped-def]
        return p.siblings("d", p.reshape(x), lambda p, h: p.dense(h, p.any(), p.any()))

    x = image_input(Graph("g"))
    h = flatten(x)
    y, _ = dense(h, 2), dense(h, 3)
    match = found(after_flatten, y)
    assert match is not None
    assert match["x"] is x
    assert node(h) in match.inside
    z = x.graph.input("z", ("N", 3))
    w, _ = dense(z, 2), dense(z, 2)
    assert found(after_flatten, w) is None


def test_several_results_share_variables() -> None:
    pair = pattern(lambda p, x: (p.relu(x), p.tanh(x)))
    x = matrix()
    a, _, b = relu(x), tanh(relu(x)), tanh(x)
    match = pair.match(node(a))
    assert match is not None
    assert match.outputs == (a, b)
    assert pair.match(node(b)) is None, "a match starts at the first result"
    assert pair.match(node(relu(x.graph.input("y", ("N", 4))))) is None


def test_a_result_may_be_inside_another() -> None:
    def both(p, x):  # type: ignore[no-untyped-def]
        h = p.relu(x)
        return h, p.tanh(h)

    x = matrix()
    h = relu(x)
    y = tanh(h)
    match = found(both, h)
    assert match is not None
    assert match.outputs == (h, y)
    assert len(match.inside) == 2
    swapped = found(lambda p, x: both(p, x)[::-1], y)
    assert swapped is not None
    assert swapped.outputs == (y, h)


def test_a_split_is_matched_by_what_makes_its_results() -> None:
    x = matrix()
    parts = x.graph.apply(Split(axis=1, sizes=(1, 3)), x)
    match = found(lambda p, x: p.split(x, axis=1), parts[0])
    assert match is not None
    assert match.outputs == parts
    assert found(lambda p, x: p.relu(p.split(x)), relu(parts[1])) is None


def test_a_merge_of_any_arity_needs_each() -> None:
    x = matrix()
    assert found(lambda p, x: p.product(x, x), merge_product(x, x, x)) is None
    assert found(lambda p, x: p.product(x, x, x), merge_product(x, x, x)) is not None


MISTAKES = {
    "unknown op": (lambda p, x: p.rleu(x), "unknown op 'rleu'"),
    "unknown op of several": (lambda p, x: p.op(("relu", "tahn"), x), "unknown op 'tahn'"),
    "unknown attribute": (lambda p, x: p.relu(x, slope=1), "relu has no attribute 'slope'"),
    "attribute of one op only": (
        lambda p, x: p.op(("conv", "dense"), x, p.any(), stride=(1, 1)),
        "dense has no attribute 'stride'",
    ),
    "attribute of another type": (lambda p, x: p.cast(x, dtype=3), "unknown dtype"),
    "too many operands": (lambda p, x: p.relu(x, x), r"relu takes \(x\), got 2 operands"),
    "too few operands": (lambda p, x: p.conv(x), "conv takes"),
    "operands after each": (
        lambda p, x: p.sum(p.each("a", lambda p, x: p.relu(x)), x),
        "it is last",
    ),
    "a word as operand": (lambda p, x: p.add(x, "one"), "got 'one'"),
    "no op": (lambda p, x: x, "its result must come from an op"),
    "template without op": (lambda p: p.sum(p.each("a", lambda p, x: x)), "must come from an op"),
    "template of two results": (
        lambda p: p.sum(p.each("a", lambda p, x: (p.relu(x), p.tanh(x)))),
        "one result",
    ),
    "siblings of nothing": (
        lambda p, x: p.siblings("a", x, lambda p: p.relu(p.any())),
        "the template takes",
    ),
    "siblings as operand": (
        lambda p, x: p.relu(p.siblings("a", x, lambda p, x: p.relu(x))),
        "not an operand",
    ),
    "siblings beside a result": (
        lambda p, x: (p.relu(x), p.siblings("a", x, lambda p, x: p.tanh(x))),
        "only result",
    ),
    "one name twice": (lambda p, x: p.relu(p.relu(x, name="a"), name="a"), "two nodes are called"),
    "a template that reads around itself": (
        lambda p, x: p.sum(p.each("a", lambda p: p.relu(x))),
        "reads 'x' of the pattern around it",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_can_never_match_is_refused_when_it_is_written(kind: str) -> None:
    function, message = MISTAKES[kind]
    with pytest.raises(BranchgraphError, match=message):
        Pattern(function)


def test_asking_a_match_for_what_it_has_not_lists_what_it_has() -> None:
    match = found(lambda p, x: p.relu(x, name="act"), relu(matrix()))
    assert match is not None
    with pytest.raises(BranchgraphError, match="no value 'y'; it has: x"):
        match["y"]
    with pytest.raises(BranchgraphError, match="no node 'conv'; it has: act"):
        match.node("conv")
    with pytest.raises(BranchgraphError, match="no part 'convs'"):
        match.each("convs")


def test_others_are_operands_of_any_kind() -> None:
    x = matrix()
    act = lambda p, x: p.sum(p.relu(x), p.others(at_least=1))  # noqa: E731
    assert found(act, merge_sum(x, tanh(x), relu(x))) is not None
    assert found(act, merge_sum(relu(x))) is None
    assert found(act, merge_sum(x, tanh(x))) is None
