"""A memory plan keeps apart what lives together, in little more than the bytes alive at once."""

from __future__ import annotations

from itertools import combinations

import pytest
from builders import random_graphs
from hypothesis import given, settings
from hypothesis import strategies as st

from branchgraph.compiler.memory import ALIGNMENT, Layout, Request, intervals, plan
from branchgraph.compiler.pipeline import CLEANING
from branchgraph.compiler.program import Program, schedule
from branchgraph.ir.builder import relu
from branchgraph.ir.dims import product, substitute_shape
from branchgraph.ir.errors import GraphError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph
from branchgraph.ir.hash import canonical_states
from branchgraph.ir.optimisers import MomentumSGD
from branchgraph.nets import network
from branchgraph.passes.specialise import specialise
from branchgraph.training import joint_loss

#: Arenas of networks may be this much larger than the bytes alive at the fullest instruction.
RATIO = 1.15


@st.composite
def requests(draw: st.DrawFn, nested: bool = True) -> list[Request]:
    """Requests over thirty instructions, some inside others, hosts before and after them."""
    found: list[Request] = []
    for _ in range(draw(st.integers(0, 20))):
        first = draw(st.integers(0, 29))
        last = draw(st.integers(first, 29))
        if nested and found and draw(st.integers(0, 3)) == 0:
            host = draw(st.integers(0, len(found) - 1))
            offset = draw(st.integers(0, found[host].size))
            size = draw(st.integers(0, found[host].size - offset))
            found.append(Request(size, first, last, (host, offset)))
        else:
            found.append(Request(draw(st.integers(0, 1000)), first, last))
    order = draw(st.permutations(range(len(found))))
    place = {old: new for new, old in enumerate(order)}
    return [_renumbered(found[old], place) for old in order]


def _renumbered(request: Request, place: dict[int, int]) -> Request:
    if request.inside is None:
        return request
    host, offset = request.inside
    return Request(request.size, request.first, request.last, (place[host], offset))


def outermost(wanted: list[Request], index: int) -> int:
    while (inside := wanted[index].inside) is not None:
        index = inside[0]
    return index


def lives(wanted: list[Request]) -> dict[int, set[int]]:
    """Positions at which each outermost request, or anything in it, lives: from first to last."""
    touched: dict[int, set[int]] = {}
    for index, request in enumerate(wanted):
        touched.setdefault(outermost(wanted, index), set()).update((request.first, request.last))
    return {host: set(range(min(t), max(t) + 1)) for host, t in touched.items()}


def check(wanted: list[Request], layout: Layout, alignment: int = ALIGNMENT) -> None:
    """What every layout promises, from the definitions."""
    alive = lives(wanted)
    for index, (request, offset) in enumerate(zip(wanted, layout.offsets)):
        assert 0 <= offset <= offset + request.size <= layout.size
        if request.inside is None:
            assert offset % alignment == 0
        else:
            host, within = request.inside
            assert offset == layout.offsets[host] + within, index
    for a, b in combinations(alive, 2):
        if alive[a] & alive[b]:
            low, high = sorted((a, b), key=lambda i: (layout.offsets[i], wanted[i].size))
            assert layout.offsets[low] + wanted[low].size <= layout.offsets[high], (a, b)
    aligned = {host: -(-wanted[host].size // alignment) * alignment for host in alive}
    positions = set().union(*alive.values())
    sums = [sum(aligned[h] for h in alive if p in alive[h]) for p in positions]
    assert layout.lower_bound == max(sums, default=0)
    assert layout.lower_bound <= layout.size <= sum(aligned.values())


@settings(deadline=None)
@given(requests())
def test_a_layout_keeps_its_promises(wanted: list[Request]) -> None:
    check(wanted, plan(wanted))


@settings(deadline=None)
@given(requests(), st.sampled_from([1, 2, 48, 256, 4096]))
def test_any_alignment(wanted: list[Request], alignment: int) -> None:
    check(wanted, plan(wanted, alignment), alignment)


@settings(deadline=None)
@given(requests())
def test_the_same_requests_get_the_same_layout(wanted: list[Request]) -> None:
    assert plan(list(wanted)) == plan(tuple(wanted))


@settings(deadline=None)
@given(requests(nested=False))
def test_backwards_in_time_as_many_bytes_are_alive(wanted: list[Request]) -> None:
    mirrored = [Request(r.size, -r.last, -r.first) for r in wanted]
    check(mirrored, plan(mirrored))
    assert plan(mirrored).lower_bound == plan(wanted).lower_bound


def test_nothing_needs_nothing() -> None:
    assert plan([]) == Layout((), 0, 0)
    assert plan([Request(0, 0, 3), Request(0, 1, 2)]) == Layout((0, 0), 0, 0)


@pytest.mark.parametrize("length", [2, 3, 50])
def test_a_chain_of_equal_buffers_takes_turns_in_two(length: int) -> None:
    layout = plan([Request(100, i, i + 1) for i in range(length)])
    assert layout.size == layout.lower_bound == 2 * 128
    assert layout.offsets == tuple(128 * (i % 2) for i in range(length))


def test_buffers_that_never_meet_share_everything() -> None:
    assert plan([Request(64 * (i + 1), i, i) for i in range(5)]) == Layout((0,) * 5, 320, 320)


def test_buffers_that_all_meet_share_nothing() -> None:
    layout = plan([Request(64 * (i + 1), i, 9) for i in range(5)])
    assert layout.size == layout.lower_bound == 64 * 15


def units(*wanted: tuple[int, int, int]) -> list[Request]:
    """Requests from (number of aligned units, first, last)."""
    return [Request(ALIGNMENT * size, first, last) for size, first, last in wanted]


def test_the_smallest_gap_that_fits_is_filled() -> None:
    """Taking the lowest gap instead needs 16 units here, in either order."""
    layout = plan(
        units((1, 4, 5), (3, 0, 2), (5, 3, 6), (4, 2, 5), (3, 0, 2), (4, 0, 3), (4, 5, 6))
    )
    assert layout.size == layout.lower_bound == 14 * ALIGNMENT


@pytest.mark.parametrize(
    ("wanted", "best"),
    [
        pytest.param([(4, 1, 2), (1, 0, 1), (2, 2, 2)], 6, id="largest first"),
        pytest.param([(3, 0, 0), (3, 2, 4), (2, 1, 2), (2, 0, 1)], 5, id="first use first"),
    ],
)
def test_the_better_of_two_orders_is_taken(wanted: list[tuple[int, int, int]], best: int) -> None:
    """One order reaches the optimum, the other leaves a hole."""
    layout = plan(units(*wanted))
    assert layout.size == layout.lower_bound == best * ALIGNMENT


def test_slices_of_a_concatenation_lie_side_by_side_while_any_of_them_lives() -> None:
    """The whole is written by the branches, at 0 and 4; something else must keep off in between."""
    slices = [Request(100, 0, 0, (2, 0)), Request(60, 4, 4, (2, 100))]
    wanted = [*slices, Request(160, 5, 6), Request(64, 2, 2)]
    layout = plan(wanted)
    check(wanted, layout)
    assert layout.offsets[1] - layout.offsets[0] == 100
    assert layout.size == layout.lower_bound == 192 + 64


def test_results_in_place_chain_into_one_buffer() -> None:
    wanted = [Request(256, 0, 1), *(Request(256, i, i + 1, (i - 1, 0)) for i in range(1, 2000))]
    assert plan(wanted) == Layout((0,) * 2000, 256, 256)


def test_offsets_add_up_along_a_chain_whatever_the_order() -> None:
    wanted = [Request(8, 3, 3, (1, 4)), Request(16, 2, 2, (2, 32)), Request(100, 0, 1)]
    assert plan(wanted).offsets == (36, 32, 0)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([Request(1, 0, 0), Request(-1, 0, 0)], "request 1: a size is at least 0 bytes, not -1"),
        ([Request(1, 3, 2)], "request 0: it is written at instruction 3 but touched last at 2"),
        ([Request(1, 0, 0, (1, 0))], "request 0: it lies inside request 1, but there are only 1"),
        ([Request(1, 0, 0, (-1, 0))], "request 0: it lies inside request -1"),
        (
            [Request(64, 0, 0), Request(32, 0, 0, (0, 33))],
            "request 1: bytes 33 to 65 do not lie inside request 0, which has 64 bytes",
        ),
        ([Request(64, 0, 0), Request(32, 0, 0, (0, -1))], "request 1: bytes -1 to 31"),
        ([Request(1, 0, 0, (0, 0))], r"request 0: it lies inside itself \(0 -> 0\)"),
        (
            [Request(1, 0, 0, (1, 0)), Request(1, 0, 0, (2, 0)), Request(1, 0, 0, (1, 0))],
            r"request 1: it lies inside itself \(1 -> 2 -> 1\)",
        ),
    ],
)
def test_errors_name_the_request(wanted: list[Request], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        plan(wanted)


def test_an_alignment_is_positive() -> None:
    with pytest.raises(GraphError, match="at least 1 byte, not 0"):
        plan([], 0)


def residual_training(depth: int, batch: int) -> list[Request]:
    """A chain of `depth` layers in three stages, with a skip connection over every two of them.

    Position i computes layer i, position 2·depth − 1 − i its gradients. What a layer puts out lives
    to its own backward step; its cotangent to the step below, or two steps below if it skips.
    """
    wanted = []
    end = 2 * depth - 1
    for i in range(depth):
        stage = 3 * i // depth
        activation = 4 * batch * (16 << stage) * (32 >> stage) ** 2
        backward = end - i
        skips = 2 if i % 2 == 0 else 0
        wanted.append(Request(activation, i, backward))
        wanted.append(Request(activation, backward - 1, min(backward + skips, end)))
        wanted.append(Request(4 * 9 * (16 << stage) ** 2, backward, end))
        wanted.append(Request(activation // 3, i, i))
        wanted.append(Request(activation // 2, backward, backward))
    return wanted


@pytest.mark.parametrize("depth", [2, 9, 54, 402])
@pytest.mark.parametrize("batch", [1, 100])
def test_training_a_residual_chain_is_close_to_the_bytes_alive(depth: int, batch: int) -> None:
    layout = plan(residual_training(depth, batch))
    assert layout.size <= RATIO * layout.lower_bound


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "name", ["b_lenet", "b_alexnet", "resnet:depth=20", "cross:depth=26", "lenet"]
)
def test_programs_of_networks_are_close_to_the_bytes_alive(name: str, training: bool) -> None:
    wanted = buffers(program(network(name), training), batch=32)
    layout = plan(wanted)
    check(wanted, layout)
    assert layout.size <= RATIO * layout.lower_bound
    assert 2 * layout.size < sum(r.size for r in wanted), "most buffers share memory"


def program(graph: Graph, training: bool) -> Program:
    graph = specialise(graph, training=training)
    if training:
        graph = MomentumSGD().attach(differentiate(joint_loss(graph)))
    graph = CLEANING.apply(graph)
    return schedule(graph, {s: i for i, s in enumerate(canonical_states(graph))})


def buffers(made: Program, batch: int) -> list[Request]:
    """A request for each computed buffer, every symbolic number of rows being `batch`."""
    types = {b: t for i in made.instructions for b, t in zip(i.writes, i.types)}
    found = []
    for buffer, (first, last) in intervals(made).items():
        shape = types[buffer].shape
        rows = {s: batch for d in shape if not isinstance(d, int) for s in d.symbols}
        elements = int(str(product(substitute_shape(shape, rows))))
        found.append(Request(elements * types[buffer].dtype.itemsize, first, last))
    return found


@settings(max_examples=25, deadline=None)
@given(random_graphs(), st.booleans())
def test_intervals_end_where_the_program_releases(graph: Graph, training: bool) -> None:
    made = program(graph, training)
    released = {b: p for p, i in enumerate(made.instructions) for b in i.releases}
    written = {b: p for p, i in enumerate(made.instructions) for b in i.writes}
    end = len(made.instructions) - 1
    assert intervals(made) == {b: (p, released.get(b, end)) for b, p in written.items()}


def test_results_live_to_the_end_and_arguments_are_not_planned() -> None:
    graph = Graph("g")
    x = graph.input("x", (64,))
    early = relu(x)
    graph.output("early", early)
    graph.output("x", x)
    graph.output("late", relu(relu(early)))
    made = schedule(graph, {})
    early_buffer, x_buffer, late_buffer = made.outputs
    assert x_buffer == made.arguments[0].buffer
    between = made.instructions[1].writes[0]
    assert intervals(made) == {early_buffer: (0, 2), between: (1, 2), late_buffer: (2, 2)}
