"""Parameter expressions: written by passes, evaluated once in float64, carried with their slots."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import EXACT, randomised
from goldens import golden

from branchgraph.compiler import compile
from branchgraph.ir.builder import batch_norm, conv, dense, merge_mean, merge_sum, relu
from branchgraph.ir.cost import cost, parameter_count
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Node, Value, branch
from branchgraph.ir.initialisers import HeNormal, Zeros
from branchgraph.ir.interpret import interpret
from branchgraph.ir.op import make
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.merge import Concat, Sum
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.ops.reshape import Embed, Reshape, Slice
from branchgraph.ir.optimisers import SGD, Adam, MomentumSGD
from branchgraph.ir.rebuild import clone
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType
from branchgraph.passes.clean import DeadCode
from branchgraph.passes.fold_batch_norm import FoldBatchNorm
from branchgraph.passes.materialise import (
    carry_slots,
    composed,
    evaluate_origin,
    materialise,
    origin_of,
    provenance,
)
from branchgraph.passes.specialise import specialise

# -- PD-A: five conv + batch norm branches into one convolution (ParaDise, section 2.2) ------------

#: Branch: kernel, pad (top, left, bottom, right), grouped?
PD_BRANCHES = {
    "ori": ((3, 3), (1, 1, 1, 1), False),
    "new": ((3, 3), (1, 1, 1, 1), False),
    "group": ((3, 3), (1, 1, 1, 1), True),
    "ac_convbn.ver": ((3, 1), (1, 0, 1, 0), False),
    "ac_convbn.hor": ((1, 3), (0, 1, 0, 1), False),
}


def pd_a(
    c_in: int, c_out: int, stride: int = 1, groups: int = 64, size: tuple[int, int] = (6, 6)
) -> Graph:
    """The block as it is trained."""
    graph = Graph("pd_a")
    x = graph.input("x", ("N", c_in, *size))
    outputs = []
    for name, (kernel, pad, grouped) in PD_BRANCHES.items():
        with branch(name):
            y = conv(x, c_out, kernel, stride=stride, pad=pad, bias=False,
                     groups=groups if grouped else 1, name="conv")  # fmt: skip
            outputs.append(batch_norm(y, eps=1e-5, name="bn"))
    graph.output("y", merge_sum(*outputs))
    return graph


def fuse_by_expressions(graph: Graph) -> Graph:
    """The five folded branches as one convolution; its kernel is an expression over states."""
    folded = FoldBatchNorm().apply(graph)
    merge = folded.outputs["y"].producer
    assert merge is not None
    branches = [v.producer for v in merge.inputs if v.producer]
    kernels = [embedded(node) for node in branches]
    weight = folded.emit(Sum(), *kernels, name="fused.weight")
    bias = folded.emit(Sum(), *(n.inputs[2] for n in branches), name="fused.bias")
    op = next(n.op for n in branches if n.scope[-1].name == "ori")
    y = folded.emit(op, branches[0].inputs[0], weight, bias, name="fused")
    folded.replace(folded.outputs["y"], y)
    return folded


def embedded(node: Node) -> Value:
    """A branch's kernel as a dense 3x3 one: zeros around 3x1 and 1x3, blocks for groups."""
    weight, graph = node.inputs[1], node.graph
    groups = node.op.attributes()["groups"]
    if groups > 1:
        filters, inner = weight.shape[0] // groups, weight.shape[1]  # type: ignore[operator]
        blocks = []
        for q in range(groups):
            part = graph.emit(Slice(axis=0, start=q * filters, size=filters), weight)  # type: ignore[arg-type]
            blocks.append(
                graph.emit(Embed(axis=1, start=q * inner, size=groups * inner), part)  # type: ignore[operator]
            )
        weight = graph.emit(Concat(axis=0), *blocks)
    for axis in (2, 3):
        if weight.shape[axis] == 1:
            weight = graph.emit(Embed(axis=axis, start=1, size=3), weight)
    return weight


PD_FILES = {"c64_c64_s1": (64, 64, 1), "c64_c128_s2": (64, 128, 2), "c128_c128_s1": (128, 128, 1)}
BN_KEYS = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean",
           "running_var": "running_var"}  # fmt: skip


def pd_golden(name: str) -> tuple[Graph, Store, dict[str, np.ndarray]]:
    arrays = dict(np.load(golden(f"paradise/pd_a_{name}.npz")))
    size = arrays["input"].shape[2:]
    graph = pd_a(*PD_FILES[name], size=size)
    store = Store()
    for state in graph.states:
        place, key = state.name.rsplit(".", 1)
        branch_name, layer = place.rsplit("/", 1)
        prefix = f"{branch_name}_{layer}"
        store[state] = arrays[f"{prefix}.{BN_KEYS.get(key, key) if layer == 'bn' else key}"]
    return graph, store, arrays


@pytest.mark.parametrize("name", PD_FILES)
def test_pd_a_is_fused_by_expressions_alone_and_gives_the_recorded_kernel(name: str) -> None:
    graph, store, arrays = pd_golden(name)
    declared = interpret(specialise(graph, training=False), {"x": arrays["input"]}, store)
    np.testing.assert_allclose(declared.outputs["y"], arrays["output"], rtol=0, atol=4e-5)
    fused, origin = materialise(fuse_by_expressions(specialise(graph, training=False)))
    evaluate_origin(origin, store)
    assert [n.op.opcode for n in fused.nodes] == ["conv"]
    weight, bias = (store[s] for s in fused.states)
    np.testing.assert_allclose(weight, arrays["fused.weight"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(bias, arrays["fused.bias"], rtol=0, atol=1e-6)
    run = interpret(fused, {"x": arrays["input"]}, store)
    bound = 2e-6 * max(1.0, float(np.abs(arrays["output_f64"]).max()))
    assert np.abs(run.outputs["y"] - arrays["output_f64"]).max() <= bound
    assert parameter_count(fused) == arrays["fused.weight"].size + arrays["fused.bias"].size


def test_pd_a_goes_on_being_trained_in_branch_form_and_is_folded_again() -> None:
    declared = pd_a(4, 4, groups=2)
    x = np.random.default_rng(0).normal(size=(6, 4, 6, 6)).astype(np.float32)
    inference = fuse_by_expressions(specialise(declared, training=False))
    fused, origin = materialise(inference)
    training = specialise(declared, training=True)
    squared = training.emit(make("multiply"), training.outputs["y"], training.outputs["y"])
    loss = training.emit(ReduceSum(axes=(0, 1, 2, 3)), squared)
    training.output("loss", loss)
    store = randomised(declared)
    step = compile(SGD(learning_rate=1e-5).attach(differentiate(training)), store=store)
    losses = []
    for _ in range(3):
        evaluate_origin(origin, store)
        branch_form = interpret(specialise(declared, training=False), {"x": x}, store, DType.F64)
        fused_form = interpret(fused, {"x": x}, store, DType.F64)
        # The fused kernel was rounded to float32 once.
        np.testing.assert_allclose(
            fused_form.outputs["y"], branch_form.outputs["y"], rtol=1e-5, atol=1e-5
        )
        losses.append(float(step(x=x)["loss"]))
    assert losses[0] > losses[1] > losses[2]


def test_evaluation_in_float64_rounds_once() -> None:
    graph = Graph("sum")
    states = [State(f"w{k}", (1,)) for k in range(3)]
    total = graph.emit(Sum(), *(graph.read(s) for s in states), name="total")
    graph.output("y", total * graph.input("x", ("N", 1)))
    materialised, origin = materialise(graph)
    store = Store(dict(zip(states, ([1e8], [1.0], [-1e8]))))
    evaluate_origin(origin, store)
    (new,) = materialised.states
    assert store[new].tolist() == [1.0], "in float32 the 1 would be lost"


def test_states_that_the_graph_updates_are_not_static() -> None:
    graph = Graph("g")
    w = graph.read(State("w", (3,)))
    y = (w * 2.0) * graph.input("x", ("N", 3))
    graph.output("y", y)
    assert w.state is not None
    graph.update(w.state, w * 0.5)
    materialised, origin = materialise(graph)
    assert not origin.updates
    assert w.state in materialised.states


# -- vbranch quadrants (vbranch, sections 2.2, 2.3, 2.10) ------------------------------------------

FEATURES, HIDDEN, BRANCHES = 6, 8, 3


def shared_net(fraction: float) -> tuple[Graph, dict[str, list[Value]]]:
    """Two dense layers for B branches, quadrants of the second concatenated into whole matrices.

    The gradient of a shared block is the mean over branches: the loss is the mean of theirs, and
    unique blocks are scaled back by B.
    """
    graph = Graph("vbranch")
    s = math.trunc(fraction * HIDDEN)
    u = HIDDEN - s
    fan1, fan2 = HeNormal(fan=FEATURES), HeNormal(fan=HIDDEN)
    shared = {
        "W1": block(graph, "shared.W1", (s, FEATURES), fan1),
        "Wss": block(graph, "shared.Wss", (s, s), fan2),
    }
    losses, outputs = [], []
    for i in range(BRANCHES):
        with branch(f"branch{i}"):
            x = graph.input(f"x{i}", ("N", FEATURES))
            target = graph.input(f"t{i}", ("N", HIDDEN))
            own = {
                "W1": block(graph, f"branch{i}.W1", (u, FEATURES), fan1),
                "Wus": block(graph, f"branch{i}.Wus", (s, u), fan2),
                "Wsu": block(graph, f"branch{i}.Wsu", (u, s), fan2),
                "Wuu": block(graph, f"branch{i}.Wuu", (u, u), fan2),
            }
            first = stacked(graph, 0, shared["W1"], own["W1"])
            top = stacked(graph, 1, shared["Wss"], own["Wus"])
            bottom = stacked(graph, 1, own["Wsu"], own["Wuu"])
            h = relu(graph.emit(Dense(), x, first))
            y = graph.emit(Dense(), h, stacked(graph, 0, top, bottom))
            error = y - target
            losses.append(graph.emit(ReduceSum(axes=(0, 1)), error * error))
            outputs.append(y)
    graph.output("loss", merge_mean(*losses))
    for i, loss in enumerate(losses):
        graph.output(f"loss{i}", loss)
    graph.output("ensemble", merge_mean(*outputs))
    return graph, {"shared": [v for v in shared.values() if v is not None]}  # type: ignore[misc]


def block(graph: Graph, name: str, shape: tuple[int, int], init: HeNormal) -> Value | None:
    """A quadrant, initialised with the fans of the whole; an empty one does not exist."""
    return graph.read(State(name, shape, init=init)) if 0 not in shape else None


def stacked(graph: Graph, axis: int, *parts: Value | None) -> Value | None:
    present = [p for p in parts if p is not None]
    return graph.emit(Concat(axis=axis), *present) if present else None  # type: ignore[return-value]


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_quadrants_at_every_fraction_train_with_averaged_shared_gradients(fraction: float) -> None:
    graph, shared = shared_net(fraction)
    s = math.trunc(fraction * HIDDEN)
    unique = HIDDEN * (FEATURES + HIDDEN) - s * (FEATURES + s)
    assert parameter_count(graph) == s * (FEATURES + s) + BRANCHES * unique
    rng = np.random.default_rng(0)
    fed = {f"x{i}": rng.normal(size=(4, FEATURES)) for i in range(BRANCHES)}
    fed |= {f"t{i}": rng.normal(size=(4, HIDDEN)) for i in range(BRANCHES)}
    whole = differentiate(graph)
    store = Store.initialised(graph.states)
    mean = interpret(whole, fed, store, DType.F64).gradients
    each = [
        interpret(differentiate(graph, f"loss{i}"), fed, store, DType.F64).gradients
        for i in range(BRANCHES)
    ]
    for state, gradient in mean.items():
        total = sum(g[state] for g in each if state in g)
        np.testing.assert_allclose(gradient, total / BRANCHES, **EXACT)
    assert sum(1 for v in shared["shared"] if all(v.state in g for g in each)) == len(
        shared["shared"]
    )


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_quadrants_materialise_into_whole_matrices_one_a_branch(fraction: float) -> None:
    graph, _ = shared_net(fraction)
    inference = graph_without_losses(graph)
    whole, origin = materialise(inference)
    store = Store.initialised(graph.states)
    evaluate_origin(origin, store)
    dense_nodes = [n for n in whole.nodes if isinstance(n.op, Dense)]
    assert [n.inputs[1].shape for n in dense_nodes] == [
        (HIDDEN, FEATURES), (HIDDEN, HIDDEN)] * BRANCHES  # fmt: skip
    assert all(n.inputs[1].state is not None for n in dense_nodes)
    fed = {f"x{i}": np.ones((2, FEATURES)) for i in range(BRANCHES)}
    before = interpret(inference, fed, store, DType.F64).outputs["ensemble"]
    after = interpret(whole, fed, store, DType.F64).outputs["ensemble"]
    np.testing.assert_array_equal(before, after)


def graph_without_losses(graph: Graph) -> Graph:
    copy = clone(graph)
    copy.keep(output=lambda name: name == "ensemble")
    copy = DeadCode().apply(copy)
    copy.keep(input=lambda name: name.startswith("x"))
    return copy


def test_initial_values_of_a_quadrant_have_the_spread_of_the_whole_layer() -> None:
    state = State("q", (200, 50), init=HeNormal(fan=400))
    values = Store.initialised([state])[state]
    # 10 000 draws: the standard deviation is within 4 % of sqrt(2 / 400).
    assert values.std() == pytest.approx(math.sqrt(2 / 400), rel=0.04)


# -- slots through a prune -------------------------------------------------------------------------


def trained_two_layers() -> tuple[Graph, Store, Adam]:
    graph = Graph("two")
    x = graph.input("x", ("N", 5))
    h = relu(dense(x, 6, name="first"))
    y = dense(h, 3, name="second")
    graph.output("y", y)
    graph.output("loss", graph.emit(ReduceSum(axes=(0, 1)), y * y))
    optimiser = Adam(learning_rate=0.01)
    store = Store()
    step = compile(optimiser.attach(differentiate(graph)), store=store)
    x_values = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    for _ in range(4):
        step(x=x_values)
    return graph, store, optimiser


def pruned(graph: Graph, kept: tuple[int, int]) -> Graph:
    """The graph with hidden units outside [start, start + size) cut out, by expressions."""
    start, size = kept
    new = clone(graph)
    first, second = (n for n in new.nodes if isinstance(n.op, Dense))
    x, weight, bias = first.inputs
    w2, b2 = second.inputs[1:]
    cut_w = new.emit(Slice(axis=0, start=start, size=size), weight, name="first.weight")
    cut_b = new.emit(Slice(axis=0, start=start, size=size), bias, name="first.bias")
    cut_w2 = new.emit(Slice(axis=1, start=start, size=size), w2, name="second.weight")
    h = relu(new.emit(Dense(), x, cut_w, cut_b))
    new.replace(second.output, new.emit(Dense(), h, cut_w2, b2, name="second"))
    return new


def test_optimiser_slots_follow_a_prune() -> None:
    graph, store, optimiser = trained_two_layers()
    small, origin = materialise(pruned(graph, (2, 3)))
    evaluate_origin(origin, store)
    carried = carry_slots(origin, optimiser.slots, store)
    assert not carried.reset
    old = {s.name: s for s in graph.states}
    new = {s.name: s for s in small.states}
    cuts = {"first.weight": np.s_[2:5], "first.bias": np.s_[2:5], "second.weight": np.s_[:, 2:5]}
    for name, cut in cuts.items():
        np.testing.assert_array_equal(store[new[name]], store[old[name]][cut])
        for slot in ("m", "v"):
            before = store[optimiser.slots[old[name], slot]]
            after = store[carried.slots[new[name], slot]]
            assert before.any()
            np.testing.assert_array_equal(after, before[cut])
    continued = Adam(learning_rate=0.01, slots=carried.slots)
    step = compile(continued.attach(differentiate(small)), store=store)
    losses = [float(step(x=np.ones((4, 5), np.float32))["loss"]) for _ in range(3)]
    assert losses[2] < losses[0]
    step_state = optimiser.slots[None, "step"]
    assert store[step_state] == 4 + 3


def test_slots_start_again_where_the_algebra_mixes_parameters() -> None:
    graph = Graph("g")
    a, b = State("a", (3,)), State("b", (3,))
    total = graph.emit(Sum(), graph.read(a), graph.read(b), name="total")
    graph.output("y", total * graph.input("x", ("N", 3)))
    optimiser = MomentumSGD()
    slots = {(s, "v"): State(f"{s.name}.v", (3,), role=Role.SLOT, init=Zeros()) for s in (a, b)}
    store = Store.initialised([a, b, *slots.values()])
    _, origin = materialise(graph)
    evaluate_origin(origin, store)
    carried = carry_slots(origin, slots, store)
    assert [s.name for s in carried.reset] == ["total"]
    assert optimiser.slots == {}


def test_slots_of_whole_copies_are_copied() -> None:
    old, new = State("old", (3,)), State("new", (3,))
    origin = Graph("net.origin")
    origin.update(new, origin.read(old))
    slots = {(old, "v"): State("old.v", (3,), role=Role.SLOT, init=Zeros())}
    store = Store({old: np.ones(3), slots[old, "v"]: np.arange(3.0)})
    carried = carry_slots(origin, slots, store)
    assert not carried.reset
    np.testing.assert_array_equal(store[carried.slots[new, "v"]], np.arange(3.0))


# -- origins one after another ---------------------------------------------------------------------


def cut(graph: Graph, new: State, value: Value, start: int, size: int) -> None:
    graph.update(new, graph.emit(Slice(axis=0, start=start, size=size), value))


def test_origins_of_two_steps_compose() -> None:
    w, b = State("w", (6,)), State("b", (6,))
    left, right, inner = State("left", (4,)), State("right", (2,)), State("inner", (2,))
    first, second = Graph("first.origin"), Graph("second.origin")
    cut(first, left, first.read(w), 0, 4)
    cut(first, right, first.read(w), 4, 2)
    cut(second, inner, second.read(left), 1, 2)
    cut(second, right, second.read(b), 0, 2)
    both = composed(first, second)
    assert provenance(both) == {left: [w], right: [b], inner: [w]}
    store = Store({w: np.arange(6.0), b: -np.arange(6.0)})
    evaluate_origin(both, store)
    assert store[inner].tolist() == [1, 2]
    assert store[right].tolist() == [0, -1], "the later step has the last word"
    part = origin_of([inner, w], both)
    assert provenance(part) == {inner: [w]}
    slots = {(w, "v"): State("w.v", (6,), role=Role.SLOT, init=Zeros())}
    store[slots[w, "v"]] = np.arange(6.0) * 2
    carried = carry_slots(part, slots, store)
    assert not carried.reset
    np.testing.assert_array_equal(store[carried.slots[inner, "v"]], [2, 4])
    assert set(first.updates) == {left, right}, "the arguments are not changed"


def test_a_state_that_is_only_renamed_by_the_second_step_keeps_its_source() -> None:
    w, once, twice = State("w", (6,)), State("once", (6,)), State("twice", (6,))
    first, second = Graph("first.origin"), Graph("second.origin")
    first.update(once, first.read(w))
    second.update(twice, second.read(once))
    assert provenance(composed(first, second)) == {once: [w], twice: [w]}


def test_a_materialised_expression_may_be_reshaped_data() -> None:
    graph = Graph("g")
    w = graph.read(State("w", (2, 3)))
    flat = graph.emit(Reshape(shape=(6,)), w, name="flat")
    graph.output("y", flat * graph.input("x", ("N", 6)))
    materialised, _ = materialise(graph)
    assert [s.shape for s in materialised.states] == [(6,)]
    assert cost(materialised).parameters == 6
