"""The structural hash sees structure and nothing else."""

from __future__ import annotations

from builders import branches_of_every_kind, random_graphs
from hypothesis import given, settings

from branchgraph.ir.builder import conv, dense, relu
from branchgraph.ir.graph import Graph, branch, scope
from branchgraph.ir.hash import canonical_states, structural_hash
from branchgraph.ir.initialisers import HeNormal
from branchgraph.ir.op import make
from branchgraph.ir.ops.random import Dropout
from branchgraph.ir.rebuild import bind, clone
from branchgraph.ir.state import Role, State


def net(symbol: str = "N", names: str = "a", streams: tuple[int, int] = (0, 1)) -> Graph:
    graph = Graph(names)
    x = graph.input(names + "x", (symbol, 3, 6, 6))
    with scope(names):
        h = conv(x, 4, 3, name=names, init=HeNormal(fan=27) if names == "b" else None)
    h = graph.emit(Dropout(0.5, streams[0]), relu(h))
    graph.output(names + "y", dense(graph.emit(Dropout(0.5, streams[1]), h), 2))
    return graph


def test_names_symbols_initialisers_and_stream_numbers_do_not_enter() -> None:
    assert structural_hash(net()) == structural_hash(net("M", "b", (7, 3)))


def test_two_layers_drawing_from_one_stream_are_another_network() -> None:
    assert structural_hash(net()) != structural_hash(net(streams=(0, 0)))


def test_branches_are_locations_and_do_not_enter() -> None:
    graph = Graph("plain")
    x = graph.input("x", ("N", 4))
    graph.output("y", relu(x))
    labelled = Graph("labelled")
    x = labelled.input("x", ("N", 4))
    with branch("left"):
        labelled.output("y", relu(x))
    assert structural_hash(graph) == structural_hash(labelled)


def test_dead_nodes_and_order_of_creation_do_not_enter() -> None:
    def build(swapped: bool) -> Graph:
        graph = Graph("g")
        x = graph.input("x", ("N", 4))
        parts = {}
        for name in ("b", "a") if swapped else ("a", "b"):
            parts[name] = graph.emit(make("exp" if name == "a" else "tanh"), x)
        if swapped:
            relu(x)
        graph.output("y", parts["a"] + parts["b"])
        return graph

    assert structural_hash(build(False)) == structural_hash(build(True))


def test_types_of_attributes_enter() -> None:
    def build(value: float, dtype: str) -> Graph:
        graph = Graph("g")
        graph.output("y", graph.constant(value, dtype))
        return graph

    hashes = {structural_hash(build(v, d)) for v, d in ((1, "f32"), (1, "i64"), (2, "f32"))}
    assert len(hashes) == 3


def test_roles_and_sharing_of_states_enter() -> None:
    def build(shared: bool, role: Role = Role.PARAMETER) -> Graph:
        graph = Graph("g")
        a = graph.read(State("a", (4,), role=role))
        b = a if shared else graph.read(State("a", (4,), role=role))
        graph.output("y", a * b)
        return graph

    built = (build(True), build(False), build(False, Role.GATE))
    assert len({structural_hash(g) for g in built}) == 3


def test_a_bound_batch_is_another_structure() -> None:
    assert structural_hash(bind(net(), N=4)) != structural_hash(net())


@settings(max_examples=40, deadline=None)
@given(random_graphs())
def test_a_clone_has_the_same_hash_and_states(graph: Graph) -> None:
    copy = clone(graph)
    assert structural_hash(copy) == structural_hash(graph)
    assert canonical_states(copy) == canonical_states(graph)


def test_the_hash_of_a_known_graph_is_stable_across_runs() -> None:
    first, second = (
        structural_hash(branches_of_every_kind()),
        structural_hash(branches_of_every_kind()),
    )
    assert first == second
