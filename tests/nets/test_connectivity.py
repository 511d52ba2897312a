"""Connectivity learning: the formulas of Ahmed & Torresani, since no recording of a run exists."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from builders import randomised

from branchgraph.compiler import compile
from branchgraph.data import load
from branchgraph.ir.builder import cross_entropy
from branchgraph.ir.cost import cost
from branchgraph.ir.errors import FormatError, GraphError
from branchgraph.ir.functions.reduction import reduce_sum
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Node
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.hooks import GradientClipping, WeightDecay
from branchgraph.ir.interpret import interpret
from branchgraph.ir.masks import mask, normalised
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.gate import Select, StraightThrough
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.optimisers import SGD, MaskSGD, MomentumSGD, optimiser
from branchgraph.ir.rebuild import clone
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.ir.verify import verify
from branchgraph.nets.catalogue import Catalogue
from branchgraph.nets.connectivity import (
    NETWORKS,
    branch_connect,
    connectivity,
    masked_resnet,
    masked_resnext,
    resnext,
)
from branchgraph.nets.connectivity.wiring import drawn
from branchgraph.passes.specialise import specialise
from branchgraph.training import Training, train

#: A network whose steps take milliseconds: 3 modules of 4 blocks on images of 8x8.
TINY = {"depth": 11, "width": 1, "cardinality": 4, "k": 2, "channels": 1, "size": 8}
CATALOGUE = Catalogue(NETWORKS)


def pictures(n: int = 6, channels: int = 1, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, channels, size, size)).astype(np.float32)


def gate_states(graph: Graph) -> list[State]:
    return [s for s in graph.states if s.role is Role.GATE]


def masks_of(graph: Graph) -> list[Node]:
    """The nodes whose value is a mask: a `straight_through` that something slices or transposes."""
    cuts = ("slice", "transpose")
    return [
        n for n in graph.nodes
        if isinstance(n.op, StraightThrough) and any(u.op.opcode in cuts for u in n.output.users)
    ]  # fmt: skip


def edges(graph: Graph) -> dict[str, int]:
    """Operands of the merges that a consumer reads, by the path of the merge."""
    merges = (n for n in graph.nodes if n.name == "merge" and isinstance(n.op, Sum))
    return {n.path: len(n.inputs) for n in merges}


# -- sizes -----------------------------------------------------------------------------------------


def test_gates_are_one_entry_for_every_pair_of_blocks() -> None:
    graph = masked_resnext(29, 8, 8)
    assert sum(int(np.prod(s.shape)) for s in gate_states(graph)) == 8 * 8**2
    assert sum(isinstance(n.op, Select) for n in graph.nodes) == 8 * 8**2
    assert len(graph.branches()) == 9 * 8


def test_the_forms_of_resnext_cost_the_same() -> None:
    a, c = (cost(resnext(29, 64, 8, form=f)).per_sample() for f in ("branches", "grouped"))
    assert (a.macs, a.parameters) == (c.macs, c.parameters)
    # The publication's 4.1e9 multiply-adds for {50,4,32} at 224 (facebookresearch/ResNeXt).
    assert cost(resnext(50, 4, 32, 1000)).per_sample().macs == pytest.approx(4.2e9, rel=0.03)


def test_the_largest_network_is_declared_in_about_a_second() -> None:
    start = time.process_time()
    resnext(101, 4, 64, 1000)
    assert time.process_time() - start < 3.0


# -- every network ---------------------------------------------------------------------------------

SMALL = [
    "resnext:depth=11,width=1,cardinality=4,size=8",
    "resnext:depth=11,width=1,cardinality=4,size=8,form=branches",
    "masked_resnext:depth=11,width=1,cardinality=4,k=1,size=8",
    "masked_resnext:depth=11,width=1,cardinality=4,size=8,preact=true",
    "masked_resnext:depth=11,width=1,cardinality=4,size=8,identity=sum",
    "masked_resnext:depth=11,width=1,cardinality=4,size=8,policy=random",
    "masked_resnext:depth=11,width=1,cardinality=4,size=8,policy=full",
    "masked_resnet:depth=8,k=2,widths=4+8+16,size=8",
    "masked_resnet:depth=8,widths=4+8+16,size=8,policy=all",
    "masked_resnet:depth=8,widths=4+8+16,size=8,policy=previous",
    "masked_resnet:depth=8,widths=4+8+16,size=8,policy=random,k=2",
    "branch_connect:stem=4,widths=8,size=8",
    "branch_connect:stem=4,widths=8,size=8,policy=full",
]


@pytest.mark.parametrize("spec", SMALL)
def test_networks_verify_round_trip_and_train_a_step(spec: str) -> None:
    graph = CATALOGUE.network(spec)
    verify(graph)
    assert structural_hash(parse_graph(format_graph(graph))) == structural_hash(graph)
    rule = MomentumSGD(0.01, gates=MaskSGD())
    training = Training.of(graph, rule)
    fed = {"x": pictures(channels=3), "labels": np.arange(6) % 10}
    losses = [float(training.step.run(fed)["loss"]) for _ in range(2)]
    assert np.isfinite(losses).all()
    logits = compile(graph, store=training.store)(x=pictures(3, channels=3))["logits"]
    assert logits.shape == (3, 10)
    for score in gate_states(graph):
        assert 0 <= training.store[score].min() <= training.store[score].max() <= 1


@pytest.mark.parametrize("name", CATALOGUE)
def test_networks_have_a_summary_and_defaults_that_build(name: str) -> None:
    assert CATALOGUE[name].summary
    assert CATALOGUE[name].family == "connectivity learning"
    assert CATALOGUE.network(name).outputs["logits"].shape[1] == 10


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("masked_resnext:depth=21", GraphError, "depth is 9 n \\+ 2 for small images, got 21"),
        ("masked_resnext:k=9", GraphError, "k is in 1..8, got 9"),
        ("masked_resnext:k=0", GraphError, "k is in 1..8, got 0"),
        ("masked_resnext:policy=full,k=4", GraphError, "policy full reads all 8 blocks"),
        ("masked_resnext:policy=luck", GraphError, "'luck' is none of learned, full, random"),
        ("masked_resnext:identity=none", GraphError, "identity 'none' is none of mean, sum"),
        ("masked_resnext:seed=-1", GraphError, "seed is at least 0"),
        ("masked_resnext:cardinality=0", GraphError, "cardinality is at least 1"),
        ("masked_resnext:k=two", FormatError, "masked_resnext:k: expected int, got 'two'"),
        ("resnext:form=split", GraphError, "form 'split' is none of branches, grouped"),
        ("resnext:layout=broad", GraphError, "none of auto, narrow, wide, imagenet"),
        ("resnext:layout=imagenet", GraphError, "depths for ImageNet are 50, 101, 152, got 29"),
        ("resnext:size=2", GraphError, "size is at least 4, got 2"),
        ("resnext:k=4", FormatError, "no option 'k'; it has: depth, width"),
        ("masked_resnet:depth=39", GraphError, "depth is 6 n \\+ 2, got 39"),
        ("masked_resnet:widths=32+16+8", GraphError, "three channel counts that do not fall"),
        ("masked_resnet:policy=full", GraphError, "none of learned, previous, all, random"),
        ("branch_connect:k=5", GraphError, "k is in 1..4, got 5"),
        ("branch_connect:size=4", GraphError, "size is at least 8, got 4"),
    ],
)
def test_options_that_cannot_be_built_say_what_can(spec, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        CATALOGUE.network(spec)


# -- the function ----------------------------------------------------------------------------------


def from_resnext(plain: Graph, store: Store, masked: Graph, cardinality: int) -> Store:
    """Weights of form C cut for the blocks of a masked network with K = C.

    Block k has the k-th part of the grouped layers; of the batch norm after the sum gamma and
    sigma, and beta and mu divided by C; of the shortcut's batch norm a copy.
    """
    values = {s.name: store[s] for s in plain.states}
    made = Store()
    for state in masked.states:
        place, _, rest = state.name.partition("/block")
        block, _, layer = rest.partition("/")
        if not rest:
            name = state.name.replace("shortcut.weight", "shortcut/conv.weight")
            made[state] = values[name]
            continue
        value, kind = values[f"{place}/{layer}"], layer.rpartition(".")[2]
        if layer == "expand/conv.weight":
            value = np.split(value, cardinality, axis=1)[int(block)]
        elif layer.startswith(("reduce", "spatial")):
            value = np.split(value, cardinality, axis=0)[int(block)]
        elif layer.startswith("expand") and kind in ("beta", "running_mean"):
            value = value / cardinality
        made[state] = value
    return made


def positive(store: Store) -> Store:
    """Non-negative scales: what a trained batch norm looks like, and logits of a moderate size."""
    for state in store:
        if state.name.endswith("gamma"):
            store[state] = np.abs(store[state])
    return store


@pytest.mark.parametrize("spec", [{"depth": 11}, {"depth": 20, "layout": "narrow"}])
def test_reading_all_blocks_is_resnext(spec: dict) -> None:
    options = {"width": 2, "cardinality": 4, "channels": 1, "size": 8, **spec}
    plain, masked = resnext(**options), masked_resnext(**options, policy="full")
    store = positive(randomised(plain))
    expected = compile(plain, store=store)(x=pictures())["logits"]
    found = compile(masked, store=from_resnext(plain, store, masked, 4))(x=pictures())["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_branches_of_resnext_are_its_grouped_convolutions() -> None:
    options = {"depth": 11, "width": 2, "cardinality": 4, "channels": 1, "size": 8}
    grouped, branches = resnext(**options), resnext(**options, form="branches")
    values = {s.name: s for s in grouped.states}
    store = positive(randomised(grouped))
    split = Store()
    for state in branches.states:
        place, _, rest = state.name.partition("/block")
        block, _, layer = rest.partition("/")
        if not rest:
            split[state] = store[values[state.name]]
        elif layer == "expand.weight":
            whole = store[values[f"{place}/expand/conv.weight"]]
            split[state] = np.split(whole, 4, axis=1)[int(block)]
        else:
            split[state] = np.split(store[values[f"{place}/{layer}"]], 4)[int(block)]
    for training in (False, True):  # one batch norm follows the sum: batch statistics too
        a, b = (specialise(g, training=training) for g in (grouped, branches))
        expected = interpret(a, {"x": pictures()}, store, DType.F64).outputs["logits"]
        found = interpret(b, {"x": pictures()}, split, DType.F64).outputs["logits"]
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_reading_the_module_before_is_resnet() -> None:
    graph = masked_resnet(8, policy="previous", widths=(4, 8, 16), size=8, channels=1)
    assert not gate_states(graph)
    assert not edges(graph)  # no merge but residual sums
    assert sum(isinstance(n.op, Sum) for n in graph.nodes) == 3
    assert sum(isinstance(n.op, Conv) for n in graph.nodes) == 7


@pytest.mark.parametrize("policy", ["learned", "all", "random"])
def test_the_identity_path_of_a_module_level_net_has_gain_one(policy: str) -> None:
    """With residuals of 0 every x_i is the thinned stem, whoever reads whom."""
    graph = masked_resnet(14, 2, policy=policy, widths=(4, 4, 4), size=8, channels=1)
    store = Store.initialised(graph.states)
    for state in graph.states:
        if "residual/second/bn.gamma" in state.name:
            store[state] = np.zeros(state.shape)
    inference = specialise(clone(graph), training=False)
    inference.output("stem", inference.find("stem/relu").output)
    inference.output("last", inference.find("head/relu").output)
    found = interpret(inference, {"x": pictures()}, store, DType.F64).outputs
    np.testing.assert_allclose(found["last"], found["stem"][:, :, ::4, ::4], rtol=1e-12)


@pytest.mark.parametrize("policy", ["learned", "full", "random"])
@pytest.mark.parametrize("identity", ["mean", "sum"])
def test_the_identity_path_of_a_multi_branch_net_has_gain_one(policy: str, identity: str) -> None:
    """With F = 0 and projections that only add channels of zeros, the head sees the stem."""
    k = None if policy == "full" else 3
    graph = masked_resnext(**{**TINY, "depth": 20, "k": k}, policy=policy, identity=identity)
    store = Store.initialised(graph.states)
    for state in graph.states:
        if state.name.endswith("expand/bn.gamma"):
            store[state] = np.zeros(state.shape)
        elif state.name.endswith("shortcut.weight"):
            store[state] = np.eye(*state.shape[:2])[:, :, None, None]
    inference = specialise(clone(graph), training=False)
    inference.output("stem", inference.find("stem/relu").output)
    inference.output("last", inference.find("head/relu").output)
    found = interpret(inference, {"x": pictures()}, store, DType.F64).outputs
    # Five modules read K blocks each, the head reads four.
    gain = 1 if identity == "mean" else (k or 4) ** 5 * 4
    # The batch norms of three projections divide by (1 + 1e-5)^(1/2).
    expected = gain * found["stem"][:, :, ::4, ::4] * (1 + 1e-5) ** -1.5
    np.testing.assert_allclose(found["last"][:, :16], expected, rtol=1e-9, atol=1e-12)


def test_modules_read_k_of_the_modules_before() -> None:
    graph = masked_resnet(20, 3)
    assert [s.shape for s in gate_states(graph)] == [(1, i) for i in range(4, 10)]
    assert edges(graph) == {f"module{i}/merge": i for i in range(2, 10)}
    fixed = edges(masked_resnet(20, 3, policy="random"))
    assert fixed == {f"module{i}/merge": min(3, i) for i in range(2, 10)}


def test_classes_add_up_the_branches_that_they_chose() -> None:
    graph = branch_connect(3, 1, classes=4, stem=(4,), widths=(5,), size=8, channels=1)
    store = randomised(graph)
    (score,) = gate_states(graph)
    scores = np.array([[0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4], [0.0, 1.0, 0.0]])
    store[score] = scores
    inference = specialise(clone(graph), training=False)
    for b in range(3):
        inference.output(f"f{b}", inference.find(f"branch{b}/features").output)
    run = interpret(inference, {"x": pictures()}, store, DType.F64).outputs
    values = {s.name: store[s].astype(np.float64) for s in graph.states}
    chosen = scores.argmax(axis=1)
    f = np.stack([run[f"f{b}"] for b in chosen])  # [classes, N, features]
    expected = np.einsum("cf,cnf->nc", values["head/fc.weight"], f) + values["head/fc.bias"]
    np.testing.assert_allclose(run["logits"], expected, rtol=1e-9)
    assert connectivity(graph, store) == {"head": [[b] for b in chosen]}


@pytest.mark.parametrize("fill", [np.nan, np.inf])
def test_what_lies_behind_closed_gates_does_not_leak(fill: float) -> None:
    graph = masked_resnext(**TINY)
    store = Store.initialised(graph.states)
    scores = {s.name: s for s in gate_states(graph)}
    rows = np.array([[0.4, 0.3, 0.2, 0.1]] * 4)
    store[scores["module2/mask.score"]] = rows  # nobody reads blocks 2 and 3 of module 1
    before = compile(graph, store=store)(x=pictures())["logits"]
    for state in graph.states:
        if state.name.startswith(("module1/block2", "module1/block3")):
            store[state] = np.full(state.shape, fill)
    after = compile(graph, store=store)(x=pictures())["logits"]
    assert np.isfinite(after).all()
    np.testing.assert_array_equal(after, before)


# -- learned rows ----------------------------------------------------------------------------------


def row_graph(rows: np.ndarray, k: int) -> tuple[Graph, State, Store]:
    """A mask over rows of scores, and as loss its product with the input `x`."""
    graph = Graph("rows")
    score = State("score", rows.shape, DType.F64, Role.GATE)
    made = graph.output("mask", mask(graph.read(score), k))
    graph.output("loss", reduce_sum(made * graph.input("x", rows.shape, DType.F64)))
    return graph, score, Store({score: rows})


def test_rows_are_drawn_without_replacement_in_proportion() -> None:
    p, count = np.array([0.4, 0.25, 0.2, 0.1, 0.05]), 4000
    graph, _, store = row_graph(np.tile(3.0 * p, (count, 1)), 2)  # only ratios matter
    step = compile(specialise(graph, training=True), store=store, seed=0)
    found = step(x=np.zeros((count, 5)))["mask"]
    assert set(found.sum(axis=1)) == {2.0}
    assert set(found.ravel()) == {0.0, 1.0}
    # Both orders of each pair: p_i p_j / (1 - p_i) + p_i p_j / (1 - p_j).
    expected = np.array([a + sum(b * a / (1 - b) for b in p if b != a) for a in p])
    np.testing.assert_allclose(expected, [0.699, 0.520, 0.433, 0.230, 0.118], atol=6e-4)
    sigma = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found.mean(axis=0) - expected) < 3 * sigma).all()


def test_rows_with_too_few_positive_scores_still_give_k_distinct_ones() -> None:
    graph, _, store = row_graph(np.array([[0.0, 1.0, 0.0, 0.0], [0.0] * 4]), 2)
    found = compile(specialise(graph, training=True), store=store)(x=np.zeros((2, 4)))["mask"]
    assert found.sum(axis=1).tolist() == [2.0, 2.0]
    assert found[0, 1] == 1.0
    assert compile(graph, store=store)(x=np.zeros((2, 4)))["mask"].tolist() == [
        [1, 1, 0, 0], [1, 1, 0, 0],
    ]  # fmt: skip


def test_scores_follow_the_rule_by_hand() -> None:
    """Two blocks, rate 0.2: divide by the sum, subtract, clip; the drawn entry plays no part."""
    graph, score, store = row_graph(np.array([[0.5, 0.5], [0.9, 0.3]]), 1)
    training = MaskSGD(0.2).attach(differentiate(specialise(graph, training=True)))
    step = compile(training, store=store)
    step(x=np.array([[1.0, -0.5], [0.0, 2.0]]))
    np.testing.assert_allclose(store[score], [[0.3, 0.6], [0.75, 0.0]], rtol=1e-12)
    step(x=np.array([[1.0, -2.0], [0.0, 0.0]]))
    np.testing.assert_allclose(store[score], [[1 / 3 - 0.2, 1.0], [1.0, 0.0]], rtol=1e-12)
    step(x=np.full((2, 2), 9.0))
    assert store[score].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    step(x=np.zeros((2, 2)))  # a row of zeros is a uniform one
    assert store[score].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_rows_need_a_concrete_size() -> None:
    graph = Graph("g")
    with pytest.raises(GraphError, match="masks are rows of a concrete size"):
        normalised(graph.input("x", ("N",)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: masked_resnext(**TINY),
        # One width: zeros in place of new channels would stand on the kink of the ReLU.
        lambda: masked_resnet(14, 2, widths=(4, 4, 4), size=8, channels=1),
        lambda: branch_connect(3, 1, stem=(4,), widths=(6,), size=8, channels=1),
    ],
    ids=["masked_resnext", "masked_resnet", "branch_connect"],
)
def test_gate_gradients_are_central_differences_for_open_and_closed_gates(
    build: Callable[[], Graph],
) -> None:
    graph = with_loss(specialise(build(), training=True))
    store = Store.initialised(differentiate(graph).states, seed=2)
    fed = {"x": pictures(), "labels": np.arange(6)}
    gradients = interpret(differentiate(graph), fed, store, DType.F64).gradients
    drawn_masks, opened = opened_masks(graph, fed, store)
    closed = []
    for state, node in zip(gate_states(graph), masks_of(graph)):
        assert node.inputs[1].state is state
        m = drawn_masks[state.name]
        assert 0 < m.mean() < 1
        closed.append(gradients[state][m == 0])
        rng = np.random.default_rng(1)
        for index in (tuple(i) for i in rng.permutation(np.argwhere(m >= 0))[:6]):
            numeric = central_difference(opened, {**fed, **drawn_masks}, state.name, index, store)
            np.testing.assert_allclose(gradients[state][index], numeric, rtol=1e-6, atol=1e-9)
    assert np.concatenate(closed).any()


def with_loss(training: Graph) -> Graph:
    labels = training.input("labels", training.outputs["logits"].shape[:1], DType.I64)
    training.output("loss", cross_entropy(training.outputs["logits"], labels))
    return training


def opened_masks(graph: Graph, fed: dict, store: Store) -> tuple[dict[str, np.ndarray], Graph]:
    """The masks that are drawn, and the graph with the masks as inputs named like their states."""
    shown, opened = clone(graph), clone(graph)
    for state, seen, node in zip(gate_states(graph), masks_of(shown), masks_of(opened)):
        shown.output(state.name, seen.output)
        opened.replace(node.output, opened.input(state.name, state.shape))
    outputs = interpret(shown, fed, store, DType.F64).outputs
    return {s.name: outputs[s.name] for s in gate_states(graph)}, opened


def central_difference(
    graph: Graph, fed: dict, name: str, index: tuple[int, ...], store: Store, h: float = 1e-6
) -> float:
    def loss(offset: float) -> float:
        moved = fed[name].copy()
        moved[index] += offset
        return interpret(graph, {**fed, name: moved}, store, DType.F64).outputs["loss"]

    return float((loss(h) - loss(-h)) / (2 * h))


def drawn_sequence(seed: int, steps: int = 3) -> list[np.ndarray]:
    graph = specialise(masked_resnext(**TINY), training=True)
    for node in masks_of(graph):
        graph.output(node.path or str(len(graph.outputs)), node.output)
    graph.keep(output=lambda name: name != "logits")
    step = compile(graph, store=Store(), seed=seed)
    return [np.stack(list(step(x=pictures()).values())) for _ in range(steps)]


def test_the_same_seed_draws_the_same_masks() -> None:
    a, b, c = (drawn_sequence(seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (np.asarray(a) != np.asarray(c)).any()
    assert (a[0] != a[1]).any()  # drawn anew in each step
    assert (np.stack(a).sum(axis=-1) == 2).all()


def test_random_rows_come_from_the_seed_and_have_k_producers() -> None:
    options = {**TINY, "policy": "random"}
    graph, again, other = (masked_resnext(**options, seed=s) for s in (5, 5, 6))
    assert structural_hash(graph) == structural_hash(again)
    assert structural_hash(graph) != structural_hash(other)
    found = {p: n for p, n in edges(graph).items() if "block" in p}
    assert len(found) == 8
    assert set(found.values()) == {2}
    assert not gate_states(graph)
    assert drawn(5, 2, 0, 8, 4) == sorted(set(drawn(5, 2, 0, 8, 4)))


def test_learned_rows_compute_what_fixed_rows_with_the_same_producers_do() -> None:
    learned, fixed = masked_resnext(**TINY), masked_resnext(**TINY, policy="random", seed=4)
    store = randomised(learned)
    values = {s.name: s for s in learned.states}
    for state in gate_states(learned):
        module = int(state.name.partition("/")[0].removeprefix("module"))
        rows = np.zeros((4, 4))
        for j in range(4):
            rows[j, drawn(4, module, j, 4, 2)] = 0.5
        store[state] = rows
    same = Store({s: store[values[s.name]] for s in fixed.states})
    expected = compile(fixed, store=same)(x=pictures())["logits"]
    np.testing.assert_array_equal(compile(learned, store=store)(x=pictures())["logits"], expected)


def test_reading_all_blocks_needs_no_masks() -> None:
    all_of_them = masked_resnext(**{**TINY, "k": 4})
    full = masked_resnext(**{**TINY, "k": None}, policy="full")
    assert not gate_states(full)
    assert structural_hash(all_of_them) == structural_hash(full)


def test_inference_reads_the_largest_scores_and_ties_the_lower_index() -> None:
    graph = masked_resnext(**TINY)
    store = Store.initialised(graph.states)
    assert connectivity(graph, store) == {m: [[0, 1]] * 4 for m in ("module2", "module3")}
    scores = np.random.default_rng(0).uniform(size=(4, 4))
    store[gate_states(graph)[0]] = scores
    found = connectivity(graph, store)["module2"]
    assert found == np.sort(np.argsort(-scores, axis=1)[:, :2]).tolist()
    inference = specialise(graph, training=False)
    sliced = {n.inputs[0] for n in inference.nodes if n.path.startswith("module2/block")
              and n.op.opcode == "slice" and n.inputs[0].shape == (4, 4)}  # fmt: skip
    (value,) = sliced
    inference.output("mask", value)
    m = interpret(inference, {"x": pictures()}, store).outputs["mask"]
    assert [np.flatnonzero(row).tolist() for row in m] == found


# -- training --------------------------------------------------------------------------------------


def test_gate_scores_have_a_rule_and_a_rate_of_their_own() -> None:
    graph = Graph("g")
    p, r = State("p", (2,)), State("r", (2,), role=Role.GATE)
    for state in (p, r):
        graph.set_gradient(state, graph.read(state) * 0.0)
    store = Store({p: np.array([1.0, 3.0]), r: np.array([1.0, 3.0])})
    rule = SGD(0.5, hooks=(WeightDecay(0.1),), gates=MaskSGD(0.2))
    attached = rule.attach(graph)
    assert {k: v.default for k, v in attached.inputs.items()} == {
        "learning_rate": 0.5, "gates.learning_rate": 0.2,
    }  # fmt: skip
    compile(attached, store=store)()
    np.testing.assert_allclose(store[p], [0.95, 2.85], rtol=1e-6)  # decayed
    assert store[r].tolist() == [0.25, 0.75]  # divided by the sum, not decayed


def test_hooks_of_the_parameters_do_not_see_gates() -> None:
    graph = Graph("g")
    p, r = State("p", (2,)), State("r", (2,), role=Role.GATE)
    for state in (p, r):
        graph.read(state)
        graph.set_gradient(state, graph.input(f"d{state.name}", (2,)))
    store = Store.initialised((p, r))
    rule = SGD(1.0, hooks=(GradientClipping(1.0),), gates=MaskSGD(0.5))
    compile(rule.attach(graph), store=store)(dp=np.array([3.0, -4.0]), dr=np.array([0.2, -0.6]))
    np.testing.assert_allclose(store[p], [-0.6, 0.8], rtol=1e-6)  # the norm is 5
    np.testing.assert_allclose(store[r], [0.4, 0.8], rtol=1e-6)


def test_the_rule_of_gates_is_reached_by_specification() -> None:
    made = optimiser("nesterov_ag:learning_rate=0.1,gates=mask_sgd", (WeightDecay(5e-4),))
    assert made.gates == MaskSGD(0.2)
    assert not made.gates.hooks
    assert optimiser("adam").gates is None
    with pytest.raises(FormatError, match="unknown optimiser 'luck'"):
        optimiser("adam:gates=luck")


def run(seed: int = 0, shuffled: bool = False, epochs: int = 6) -> tuple[Training, Graph, float]:
    """A short training on 256 digits; the mean loss of the last epoch."""
    digits = load("digits")
    x, labels = digits.train_images[:256], digits.train_labels[:256].astype(np.int64)
    if shuffled:
        labels = np.random.default_rng(9).permutation(labels)
    graph = masked_resnext(**TINY)
    rule = MomentumSGD(0.05, gates=MaskSGD(0.2))
    training = Training.of(graph, rule, seed=seed)
    history = train(training, x, labels, epochs=epochs, batch=32, seed=seed)
    return training, graph, history.epochs[-1]["loss"]


def test_a_masked_network_learns_the_digits_and_its_masks_move() -> None:
    training, graph, loss = run()
    assert loss < 0.6
    for score in gate_states(graph):
        value = training.store[score]
        assert 0.0 <= value.min() <= value.max() <= 1.0
        assert np.ptp(value) > 0.01
    assert run(shuffled=True)[2] > 2.0


def test_two_runs_with_one_seed_are_equal_bit_for_bit() -> None:
    first, second = run(epochs=1), run(epochs=1)
    assert first[2] == second[2]
    for a, b in zip(first[0].step.states, second[0].step.states):
        np.testing.assert_array_equal(first[0].store[a], second[0].store[b])
