"""Equal blocks in a row and equal branches are drawn once; what differs or is read is not."""

import contextlib
import random
import re
import time
from collections.abc import Callable

import pytest
from families import (
    FAMILIES,
    connected,
    densenet,
    ensemble,
    image,
    merge_and_run_net,
    resnet,
    resnext,
    unit,
)
from pictured import ODD, training

from branchgraph.ir.builder import (
    conv,
    dropout,
    exit,
    flatten,
    gate,
    global_average_pool,
    merge_sum,
    relu,
    state,
)
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.ir.initialisers import Ones
from branchgraph.ir.op import make
from branchgraph.passes.specialise import specialise
from branchgraph.show import counts, to_dot, to_text
from branchgraph.show.picture import Picture


def badges(g: Graph) -> list[str]:
    """What the clusters that stand for several say."""
    return [r.label for r in Picture(g).repeats]


def edges(g: Graph) -> list[tuple[str, str]]:
    """Edges between boxes, by their first lines."""
    dot = to_dot(g, legend=False)
    names = {
        id: re.sub(r"<[^>]*>", " ", label).split()[0]
        for id, label in re.findall(r"\t(\w+) \[label=<(.*?)> \w+=", dot)
    }
    return [(names[a], names[b]) for a, b in re.findall(r"\t(\w+) -> (\w+)", dot)]


def chain(sizes: list[int], *, exits: tuple[int, ...] = ()) -> Graph:
    """Blocks `b0`, `b1`, ... of one convolution each with kernels of `sizes`."""
    g = Graph("chain")
    h = g.input("x", ("N", 4, 8, 8))
    for k, size in enumerate(sizes):
        with scope(f"b{k}"):
            h = relu(conv(h, 4, size, pad=size // 2, name="conv"))
        if k in exits:
            exit(flatten(h), f"exit{k}", threshold=0.5)
    g.output("y", h)
    return g


def parallel(branches: int, make_branch: Callable[[Value, int], Value]) -> Graph:
    """Branches `p0`, `p1`, ... of one input, summed."""
    g = Graph("parallel")
    x = g.input("x", ("N", 4, 8, 8))
    paths = []
    for k in range(branches):
        with branch(f"p{k}"):
            paths.append(make_branch(x, k))
    g.output("y", merge_sum(*paths, name="join"))
    return g


# -- in a row --------------------------------------------------------------------------------------


def test_blocks_of_a_stage_are_drawn_once_after_the_first_that_differs() -> None:
    g = resnet(9)
    assert badges(g) == ["block1 … block9 ×9", "block2 … block9 ×8", "block2 … block9 ×8"]
    text = to_text(g)
    assert "│ ╭ block2 … block9 ×8" in text
    assert text.count("stage") == 3
    assert "block2 … block9 ×8" in to_dot(g)
    assert "block3" not in text + to_dot(g)


def test_totals_are_those_of_the_whole_network() -> None:
    g = resnet(9)
    head = to_text(g, collapse=False).splitlines()[0]
    assert to_text(g).splitlines()[0] == head
    assert "855,770 parameters" in head
    assert "855,770 parameters" in to_dot(g)


def test_what_follows_reads_the_block_that_is_drawn() -> None:
    assert ("join,", "global") in edges(resnet(4))
    g = chain([3, 3, 3])
    assert sorted(edges(g)) == [("conv", "y"), ("x", "conv")]


def test_collapsing_can_be_switched_off() -> None:
    g = resnet(3)
    whole = to_dot(g, collapse=False)
    assert all(f"block{k}<" in whole for k in (1, 2, 3))
    assert "×3<" not in whole
    text = to_text(g, collapse=False)
    assert sum(line.lstrip().startswith("%") for line in text.splitlines()) == len(g.nodes)


def test_blocks_that_pass_two_streams_on_are_drawn_once() -> None:
    g = merge_and_run_net(9)
    assert badges(g) == ["block2 … block9 ×8"] * 3
    assert edges(g).count(("sum,", "join,")) == 2, "both streams leave the drawn block"


def test_two_blocks_are_enough_and_say_both_names() -> None:
    assert badges(chain([3, 3])) == ["b0, b1 ×2"]


def test_attributes_that_differ_keep_blocks_apart() -> None:
    assert badges(chain([3, 1, 3, 1])) == []
    assert badges(chain([3, 3, 1, 1, 1])) == ["b0, b1 ×2", "b2 … b4 ×3"]


def test_alternating_blocks_repeat_in_pairs() -> None:
    assert badges(chain([3, 1, 3, 1, 3, 1])) == ["×3"]
    assert counts(chain([3, 1] * 3)).boxes == 2


def test_an_exit_behind_a_block_ends_the_row() -> None:
    g = resnet(9, exits=["stage2/block5"])
    assert badges(g)[1:3] == ["block2 … block5 ×4", "block6 … block9 ×4"]
    assert ("join,", "global") in edges(g)
    assert badges(chain([3] * 4, exits=(1,))) == ["b0, b1 ×2", "b2, b3 ×2"]


def test_an_inner_value_that_is_read_elsewhere_keeps_its_block() -> None:
    g = Graph("peeked")
    h = g.input("x", ("N", 4, 8, 8))
    for k in range(6):
        with scope(f"b{k}"):
            inner = conv(h, 4, 1, name="first")
            h = relu(conv(relu(inner), 4, 1, name="second"))
        if k == 2:
            g.output("peek", inner)
    g.output("y", h)
    assert badges(g) == ["b0, b1 ×2", "b3 … b5 ×3"]


def test_a_long_skip_from_inside_a_row_keeps_it_apart() -> None:
    g = Graph("skipped")
    h = g.input("x", ("N", 4, 8, 8))
    kept = []
    for k in range(6):
        with scope(f"b{k}"):
            h = relu(conv(h, 4, 1))
        kept.append(h)
    g.output("y", merge_sum(h, kept[2]))
    assert badges(g) == ["b0 … b2 ×3", "b3 … b5 ×3"]


def test_shapes_that_change_keep_blocks_apart() -> None:
    assert badges(densenet()) == []
    g = Graph("shrinking")
    h = g.input("x", ("N", 4, 32, 32))
    for k in range(4):
        with scope(f"b{k}"):
            h = relu(conv(h, 4, 3))
    g.output("y", h)
    assert badges(g) == []


def test_layers_without_scopes_repeat_from_three_on() -> None:
    def layers(count: int) -> Graph:
        g, h = image("plain")
        h = relu(unit(h, 16, name="stem"))
        for k in range(count):
            h = relu(unit(h, 16, name=f"conv{k}"))
        g.output("y", h)
        return g

    assert badges(layers(2)) == []
    assert badges(layers(3)) == ["conv0 … conv2 ×3"]
    assert "╭ conv0 … conv2 ×3" in to_text(layers(3))


def test_residual_layers_without_scopes_repeat_together() -> None:
    g, h = image("unscoped")
    h = relu(unit(h, 16))
    for _ in range(5):
        h = relu(merge_sum(h, unit(relu(unit(h, 16)), 16)))
    g.output("y", h)
    assert badges(g) == ["×5"]
    assert counts(g).boxes == 1 + 3


def test_random_streams_do_not_keep_blocks_apart() -> None:
    g = Graph("dropped")
    h = g.input("x", ("N", 4))
    for k in range(3):
        with scope(f"b{k}"):
            h = relu(dropout(h, 0.5))
    g.output("y", h)
    assert badges(g) == ["b0 … b2 ×3"]


def test_weights_that_all_blocks_share_are_said_to_be_shared() -> None:
    def recurrent(own: bool) -> Graph:
        g = Graph("recurrent")
        h = g.input("x", ("N", 4, 8, 8))
        op = make("conv", stride=(1, 1), pad=(0,) * 4, dilation=(1, 1), groups=1)
        weight = state(g, "w", "weight", (4, 4, 1, 1), Ones())
        for k in range(4):
            with scope(f"step{k}"):
                if own and k > 1:
                    weight = state(g, "w", "weight", (4, 4, 1, 1), Ones())
                h = relu(g.emit(op, h, weight, name="conv"))
        g.output("y", h)
        return g

    assert badges(recurrent(own=False)) == ["step0 … step3 ×4 · shared weights"]
    first = "step0, step1 ×2 · shared weights"
    assert badges(recurrent(own=True)) == [first, "step2, step3 ×2"]


def test_a_row_is_drawn_once_in_inference_and_training_too() -> None:
    assert badges(specialise(resnet(4), training=False)) == badges(resnet(4))
    step = training(ending_in_an_exit())
    assert badges(step) == ["b0 … b3 ×4"]
    assert "b3 ×4" not in to_dot(step, updates=True), "gradients read inner values"


def ending_in_an_exit() -> Graph:
    g = Graph("trained")
    h = g.input("x", ("N", 4, 8, 8))
    for k in range(4):
        with scope(f"b{k}"):
            h = relu(conv(h, 4, 1, name="conv"))
    exit(global_average_pool(h), "out", last=True)
    return g


# -- in parallel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_equal_branches_are_drawn_once_with_their_gates(inside: bool) -> None:
    g = resnext(8, 3, inside=inside)
    label = "path0 … path7 ×8 branches" if inside else "×8 branches"
    assert badges(g) == [label]
    assert label in to_dot(g)
    assert f"┏ {label}" in to_text(g)
    assert "gate 3 of 8 by mask.score" in to_text(g)
    assert edges(g).count(("gate", "join,")) == 1
    assert edges(g).count(("stem", "join,")) == 1, "the shortcut stays"


def test_rows_of_blocks_of_equal_branches_nest() -> None:
    assert sorted(badges(resnext(8, modules=4))) == [
        "module1 … module4 ×4",
        "path0 … path7 ×8 branches",
    ]


def test_blocks_that_choose_among_blocks_are_drawn_once() -> None:
    g = connected(modules=4, blocks=8, chosen=2)
    assert sorted(badges(g)) == [
        "block1 … block8 ×8 branches",
        "block1 … block8 ×8 branches",
        "module2 … module4 ×3",
        "×8 gates",
    ]
    assert counts(g).gates == 3 * 64
    assert to_text(g).count("gate 2 of 8 by mask.score") == 1
    assert badges(connected(modules=2, blocks=4)) == []


def test_branches_that_lead_to_different_layers_stay() -> None:
    g = Graph("heads")
    x = g.input("x", ("N", 4, 8, 8))
    for k in range(6):
        with branch(f"p{k}"):
            y = conv(x, 4, 1, name="conv")
        g.output(f"y{k}", relu(y))
    assert badges(g) == []


def test_four_equal_branches_are_drawn_side_by_side() -> None:
    def one(x: Value, k: int) -> Value:
        return conv(x, 4, 3, pad=1, name="conv")

    assert badges(parallel(4, one)) == []
    assert badges(parallel(5, one)) == ["p0 … p4 ×5 branches"]


def test_branches_that_differ_stay() -> None:
    g = parallel(8, lambda x, k: conv(x, 4, 3 if k == 5 else 1, pad=int(k == 5), name="conv"))
    assert badges(g) == ["p0 … p4 ×5 branches"]
    assert counts(g).boxes == 1 + 3 + 1


def test_a_branch_with_an_output_of_its_own_stays() -> None:
    g = parallel(8, lambda x, k: relu(conv(x, 4, 1, name="conv")))
    g.output("seen", g.find("p6/conv").output)
    assert badges(g) == ["p0 … p5 ×6 branches"]


def test_constant_gates_of_different_values_keep_branches_apart() -> None:
    def gated(x: Value, k: int) -> Value:
        return gate(conv(x, 4, 1, name="conv"), x.graph.constant(float(k < 5)))

    g = parallel(10, gated)
    assert badges(g) == ["p0 … p4 ×5 branches", "p5 … p9 ×5 branches"]
    assert "gate = 1" in to_text(g)
    assert "gate = 0" in to_text(g)


def test_branches_that_read_their_own_slices_are_equal() -> None:
    def sliced(step: Callable[[int], int]) -> Callable[[Value, int], Value]:
        def one(x: Value, k: int) -> Value:
            part = x.graph.emit(make("slice", axis=2, start=step(k), size=1), x)
            return conv(part, 4, 1, name="conv")

        return one

    assert badges(parallel(6, sliced(lambda k: k))) == ["p0 … p5 ×6 branches"]
    assert badges(parallel(6, sliced(lambda k: k * k % 7))) == []


def test_branches_that_read_different_values_stay() -> None:
    g = Graph("inputs")
    values = [g.input(f"x{k}", ("N", 4)) for k in range(6)]
    g.output("y", merge_sum(*map(relu, values)))
    assert badges(g) == []


def test_members_of_an_ensemble_say_what_they_share() -> None:
    assert badges(ensemble(8)) == ["member1 … member8 ×8 branches · partly shared weights"]
    assert badges(ensemble(8, shared=False)) == ["member1 … member8 ×8 branches"]
    assert badges(ensemble(4)) == []


# -- everywhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_networks_have_equal_pictures(name: str) -> None:
    assert to_dot(FAMILIES[name]()) == to_dot(FAMILIES[name]())
    assert to_text(FAMILIES[name]()) == to_text(FAMILIES[name]())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"states": True}, {"stack": False}])
def test_no_edge_is_lost(name: str, options: dict[str, bool]) -> None:
    g = FAMILIES[name]()
    shown = {k: v for k, v in options.items() if k != "stack"}
    picture, whole = Picture(g, **shown), Picture(g, collapse=False, **shown)
    for node in picture.nodes:
        assert bool(picture.operands(node)) == bool(whole.operands(node)), node
    assert {v for _, v in picture.outputs} <= {v for n in picture.nodes for v in n.outputs}
    ids = set(re.findall(r"\t(\w+) \[", to_dot(g, **options)))
    for tail, head in re.findall(r"\t(\w+) -> (\w+)", to_dot(g, **options)):
        assert {tail, head} <= ids


@pytest.mark.parametrize("name", ODD)
def test_odd_names_of_repeated_blocks_do_no_harm(name: str) -> None:
    g = Graph(name)
    h = g.input("x", ("N", 4, 8, 8))
    for k in range(3):
        with branch(f"{name}{k}"):
            h = relu(conv(h, 4, 1, name=name))
    for _ in range(3):
        h = relu(conv(h, 4, 3, pad=1, name=name))
    g.output("y", h)
    assert [b[-2:] for b in badges(g)] == ["×3", "×3"]
    assert len(to_text(g).splitlines()) == len(to_text(resembling(g)).splitlines())
    to_dot(g).encode()


def resembling(g: Graph) -> Graph:
    """The same network under plain names."""
    plain = Graph("plain")
    h = plain.input("x", ("N", 4, 8, 8))
    for k in range(3):
        with branch(f"b{k}"):
            h = relu(conv(h, 4, 1, name="c"))
    for _ in range(3):
        h = relu(conv(h, 4, 3, pad=1, name="c"))
    plain.output("y", h)
    return plain


@pytest.mark.parametrize("seed", range(40))
def test_no_edge_is_lost_in_random_networks(seed: int) -> None:
    g = random_network(seed)
    picture, whole = Picture(g), Picture(g, collapse=False)
    for node in picture.nodes:
        for value in whole.operands(node):
            assert picture.draws(picture.shown(value)), (node, value)
    assert all(picture.draws(value) for _, value in picture.outputs)


def random_network(seed: int) -> Graph:
    """Runs of equal parts with skips, outputs and odd parts between them."""
    draw = random.Random(seed)
    g = Graph("random")
    h = g.input("x", ("N", 4, 8, 8))
    seen = [h]
    for run in range(4):
        kind = draw.randrange(4)
        for k in range(draw.randint(1, 6)):
            with scope(f"r{run}_{k}") if kind % 2 else contextlib.nullcontext():
                h = random_part(h, kind)
            if draw.random() < 0.1:
                h = merge_sum(h, draw.choice(seen))
            if draw.random() < 0.1:
                inner = draw.choice(g.nodes).outputs[0]
                g.output(f"seen{len(g.outputs)}", inner)
            seen.append(h)
    g.output("y", h)
    return g


def random_part(h: Value, kind: int) -> Value:
    if kind == 0:
        return relu(conv(h, 4, 1))
    if kind == 1:
        return relu(merge_sum(h, conv(relu(conv(h, 4, 1)), 4, 1)))
    paths = []
    for k in range(6):
        with branch(f"p{k}"):
            paths.append(conv(h, 4, 1, name="c"))
    return merge_sum(*paths) if kind == 2 else merge_sum(h, *paths)


@pytest.mark.parametrize("build", [lambda: resnet(140), lambda: ensemble(60, 16), lambda: mixed()])
def test_thousands_of_nodes_are_drawn_in_seconds(build: Callable[[], Graph]) -> None:
    g = build()
    assert len(g.nodes) > 2900
    started = time.perf_counter()
    to_dot(g)
    to_text(g)
    assert time.perf_counter() - started < 20, "a few seconds, on a machine that is busy"


def mixed() -> Graph:
    """A long chain in which nothing repeats."""
    g = Graph("mixed")
    h = g.input("x", ("N", 4, 8, 8))
    for k in range(1500):
        size = (3, 1)[(k * k // 7) % 2]
        h = relu(conv(h, 4, size, pad=size // 2, bias=bool(k % 3)))
    g.output("y", h)
    return g
