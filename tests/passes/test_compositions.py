"""Passes one after another: which orders are allowed, and what is equal then.

`SAME` lists two orders that give one network: one structural hash once parameter expressions are
materialised, and equal numbers, states that both added paired by the order of the hash. `ALIKE`
lists orders that give other structures of the same function. `REFUSED` lists the orders that are
not allowed, each with what the last pass says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from builders import EXACT, images

from branchgraph.ir.errors import BranchgraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.interpret import interpret
from branchgraph.ir.optimisers import Adam, MomentumSGD
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType
from branchgraph.nets import network
from branchgraph.passes.base import Pass
from branchgraph.passes.checking import random_feeds, random_store
from branchgraph.passes.materialise import carry_slots, evaluate_origin, materialise
from branchgraph.passes.pipeline import Pipeline, Reports, pipeline
from branchgraph.passes.specialise import specialise
from branchgraph.passes.split_ensemble import split
from branchgraph.training import Training, train
from branchgraph.training.rewriting import continued

PARADISE = "pd_a_resnet:width=8,size=32,classes=5,groups=4"
DIVERSE = "dbb_resnet:width=8,size=32,classes=5"
MASKED = "masked_resnext:depth=11,width=1,cardinality=4,channels=1,size=8"
CROSS = "cross:depth=14,size=8"
RESNET = "resnet:depth=14,size=8"
DENSE = "densenet_bc:depth=10,growth=4,size=8"
LENET = "lenet:size=8,kernel=3"
CONNECT = "branch_connect:size=8,branches=3,stem=4,widths=6"

#: `specialise`, which keeps exits for later.
S = "specialise"
FOLD = "fold_batch_norm"
WIDEN = "widen:layer=g0/conv,to=20"
BRANCH1 = "split_ensemble:branch=branch1"
BRANCH2 = "split_ensemble:branch=branch2"
POOL = "insert_exits:after=layer2/0/relu,head=pool"
RESIDUAL = "insert_exits:after=layer2/0/relu,head=resnet"
HALF = "insert_exits:at=0.5,head=conv"
STEM = "insert_exits:at=0.5,head=pool"
SHARE = "share_weights:branches=3,shared=0.5"
MEAN = "share_weights:branches=3,shared=0.5,merge=mean"
MASKS = "share_weights:layout=masks,branches=3,merge=sum"
MAPS = "prune_channels:bias_maps=true"

#: Network, and two orders that give one network.
SAME = [
    # An exit's head is no part of the branches that are fused, whatever comes first.
    (PARADISE, [POOL, S, "fuse_branches"], [S, "fuse_branches", POOL]),
    (PARADISE, [POOL, S, "fuse_branches"], [S, POOL, "fuse_branches"]),
    (PARADISE, [RESIDUAL, S, "fuse_branches"], [S, "fuse_branches", RESIDUAL, S, "fuse_branches"]),
    (PARADISE, [HALF, S, "fuse_branches"], [S, HALF, "fuse_branches"]),
    (PARADISE, [POOL, S, "fuse_branches:rules=R1+R3"], [S, "fuse_branches:rules=R1+R3", POOL]),
    (DIVERSE, [POOL, S, "fuse_branches"], [S, "fuse_branches", POOL]),
    (DIVERSE, [HALF, S, "fuse_branches"], [S, HALF, "fuse_branches"]),
    (RESNET, [HALF, S, FOLD], [S, FOLD, HALF]),
    # Siblings are those of the network, if no exit stands between them.
    (PARADISE, [POOL, S, "fuse_branches", "fuse_siblings"],
               [S, "fuse_branches", "fuse_siblings", POOL]),
    (CROSS, [STEM, S, FOLD, "fuse_siblings"], [S, FOLD, STEM, "fuse_siblings"]),
    # What is put in and taken out leaves no trace.
    (RESNET, [HALF, "remove_exits"], []),
    (RESNET, [S, "fuse_branches", HALF, "remove_exits"], [S, "fuse_branches"]),
    (PARADISE, [POOL, S, "fuse_branches", "remove_exits"], [S, "fuse_branches"]),
    # R1 is folding.
    (PARADISE, [S, FOLD, "fuse_branches"], [S, "fuse_branches"]),
    (DIVERSE, [S, FOLD, "fuse_branches"], [S, "fuse_branches"]),
    # Every branch of an ensemble by itself.
    (DENSE, ["share_weights", BRANCH1, S, FOLD], ["share_weights", S, FOLD, BRANCH1]),
    (DENSE, ["share_weights", BRANCH2, S, "fuse_branches"],
            ["share_weights", S, "fuse_branches", BRANCH2]),
    (DENSE, ["share_weights", BRANCH1, STEM, S, FOLD], ["share_weights", S, FOLD, BRANCH1, STEM]),
    # All branches of an ensemble, merged or not.
    (LENET, [MEAN, S, "fuse_branches"], [S, MEAN, "fuse_branches"]),
    (RESNET, [SHARE, S, "fuse_branches"], [S, SHARE, "fuse_branches"]),
    (RESNET, [MASKS, S, "fuse_branches"], [S, MASKS, "fuse_branches"]),
    (RESNET, [S, "share_weights", "fuse_branches", BRANCH1],
             ["share_weights", BRANCH1, S, "fuse_branches"]),
    # Gates are fixed, and what is closed goes, at any time.
    (MASKED, ["harden_gates", "prune_gates", S, FOLD], ["harden_gates", S, FOLD, "prune_gates"]),
    (MASKED, ["harden_gates", S, "prune_gates"], [S, "harden_gates", "prune_gates"]),
    (MASKED, ["harden_gates", S, "prune_gates", "prune_channels"],
             ["harden_gates", S, "prune_channels"]),
    (MASKED, [STEM, "harden_gates", "prune_gates"], ["harden_gates", "prune_gates", STEM]),
    # What is left of a pruned network is fused side by side.
    (MASKED, ["harden_gates", "prune_gates", S, FOLD, "fuse_siblings"],
             ["harden_gates", S, "prune_gates", FOLD, "fuse_siblings"]),
    (MASKED, ["harden_gates", S, "prune_channels", FOLD, "fuse_siblings"],
             ["harden_gates", S, FOLD, "prune_channels", "fuse_siblings"]),
    (MASKED, ["harden_gates", S, FOLD, "prune_gates", "fuse_siblings"],
             ["harden_gates", S, FOLD, "prune_channels", "fuse_siblings"]),
    (MASKED, ["harden_gates", S, FOLD, "prune_gates", MAPS, "fuse_siblings"],
             ["harden_gates", S, FOLD, MAPS, "fuse_siblings"]),
    # Averages do not see norms.
    (RESNET, ["merge_and_run", "fuse_means", S, FOLD], ["merge_and_run", S, FOLD, "fuse_means"]),
    # Channels are repeated before or after.
    (RESNET, [WIDEN, S, FOLD], [S, FOLD, WIDEN]),
    (RESNET, [WIDEN, S, FOLD], [S, WIDEN, FOLD]),
    (RESNET, [WIDEN, S, "fuse_branches"], [S, "fuse_branches", WIDEN]),
    (RESNET, ["deepen:after=g0/relu", S, FOLD], [S, FOLD, "deepen:after=g0/relu"]),
    # Casts stand at ops, not at modes.
    (RESNET, ["cast", S], [S, "cast"]),
]  # fmt: skip

#: Network, and two orders that give other structures of one function.
ALIKE = [
    # What is fused first cannot be pruned piece by piece, and kernels side by side hide branches.
    (MASKED, ["harden_gates", S, "prune_gates", FOLD, "fuse_siblings"],
             ["harden_gates", S, FOLD, "fuse_siblings", "prune_gates"]),
    (MASKED, ["harden_gates", S, FOLD, "prune_channels", "fuse_siblings"],
             ["harden_gates", S, FOLD, "fuse_siblings", "prune_channels"]),
    (MASKED, ["harden_gates", S, "prune_gates", "fuse_siblings"],
             ["harden_gates", S, "fuse_siblings", "prune_gates"]),
    (MASKED, ["harden_gates", S, FOLD, MAPS, "fuse_siblings"],
             ["harden_gates", S, FOLD, "fuse_siblings", MAPS]),
    (MASKED, ["harden_gates", "prune_gates", S, "fuse_branches", "fuse_siblings"],
             ["harden_gates", "prune_gates", S, "fuse_siblings", "fuse_branches"]),
    (CONNECT, ["harden_gates", "prune_gates", S, FOLD, "fuse_siblings"],
              ["harden_gates", S, FOLD, "fuse_siblings", "prune_gates"]),
    # A norm behind layers side by side is not folded into them.
    (RESNET, [SHARE, S, "fuse_branches", "fuse_siblings"],
             [SHARE, S, "fuse_siblings", "fuse_branches"]),
    (PARADISE, [S, "fuse_branches", "fuse_siblings"], [S, "fuse_siblings", "fuse_branches"]),
    (CROSS, [S, FOLD, "fuse_siblings"], [S, "fuse_siblings", FOLD]),
    (CROSS, [S, FOLD, WIDEN, "fuse_siblings"], [S, FOLD, "fuse_siblings", WIDEN]),
    # The new layer is widened as well where it is there already.
    (RESNET, ["deepen:after=g0/relu", WIDEN, S], [WIDEN, "deepen:after=g0/relu", S]),
]  # fmt: skip

#: Network, an order, and why its last pass matches nothing.
REFUSED = [
    (RESNET, [FOLD], "its statistics are not fixed"),
    (RESNET, ["specialise:training=true", FOLD], "its statistics are not fixed"),
    (PARADISE, ["fuse_branches"], "its statistics are not fixed"),
    (RESNET, ["specialise:training=true", "share_weights"], "share weights before specialising"),
    (RESNET, [S, "fuse_branches", "share_weights"], "share weights before the pass that wrote it"),
    (RESNET, [HALF, "share_weights"], "remove_exits first"),
    (PARADISE, ["share_weights"], "groups would be cut"),
    (DENSE, ["share_weights", STEM], "needs one output"),
    (DENSE, ["share_weights", "share_weights"], "branched already"),
    (DENSE, [BRANCH1], "there are no branches"),
    (DENSE, ["share_weights", BRANCH1, BRANCH1], "there are no branches"),
    (RESNET, [S, "merge_and_run"], "start from no one value"),
    (RESNET, [S, FOLD, "merge_and_run"], "declared batch norms"),
    (RESNET, ["merge_and_run", "fuse_means", "merge_and_run:to=half"], "something stands between"),
    (MASKED, ["prune_gates"], "harden_gates first"),
    (MASKED, [S, "prune_channels"], "harden_gates first"),
    (MASKED, ["share_weights"], "only layers and norms can share"),
    (RESNET, ["cast", S, FOLD], "no convolution or dense layer feeds it"),
    (RESNET, [WIDEN, "specialise:training=true"], "materialise(graph) first"),
]  # fmt: skip


def composed(graph: Graph, order: Sequence[str]) -> Graph:
    return pipeline(*order).apply(graph, gate_scores(graph))


def gate_scores(graph: Graph) -> Store:
    """What `harden_gates` asks for."""
    return Store.initialised([s for s in graph.states if s.role is Role.GATE], 0)


def outputs(graph: Graph, store: Store) -> dict[str, np.ndarray]:
    """Every exit for every sample, computed in float64."""
    plain = specialise(graph, training=False, exits="all")
    return interpret(plain, random_feeds(plain), store, DType.F64).outputs


def random_values(first: Graph, second: Graph, drawn: Sequence[State] | None = None) -> Store:
    """Values for both; what each of them added has those of its namesake in the other.

    States that are not `drawn` have their initial values.
    """
    every = [*first.states, *second.states]
    store = random_store(set(every), every if drawn is None else list(drawn))
    named = {s.name: s for s in first.states}
    assert len(named) == len(first.states)
    for state in second.states:
        twin = named.get(state.name)
        if state not in first.states and twin is not None and twin.shape == state.shape:
            store[state] = store[twin]
    return store


def assert_equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_allclose(right[name], value, **EXACT)


@pytest.mark.parametrize(("spec", "one", "other"), SAME)
def test_two_orders_give_one_network(spec: str, one: list[str], other: list[str]) -> None:
    graph = network(spec)
    first, second = composed(graph, one), composed(graph, other)
    (left, _), (right, _) = materialise(first), materialise(second)
    assert structural_hash(left) == structural_hash(right)
    store = random_values(first, second)
    assert_equal(outputs(first, store), outputs(second, store))


@pytest.mark.parametrize(("spec", "one", "other"), ALIKE)
def test_two_orders_compute_one_function(spec: str, one: list[str], other: list[str]) -> None:
    graph = network(spec)
    first, second = composed(graph, one), composed(graph, other)
    assert structural_hash(materialise(first)[0]) != structural_hash(materialise(second)[0])
    # What the passes added has its initial values: `deepen` claims what it does of these.
    store = random_values(first, second, graph.states)
    assert_equal(outputs(first, store), outputs(second, store))


@pytest.mark.parametrize(("spec", "order", "reason"), REFUSED)
def test_other_orders_are_refused_with_a_reason(spec: str, order: list[str], reason: str) -> None:
    *before, last = order
    graph = composed(network(spec), before)
    try:
        report = Pass.from_spec(last).run(graph, values=gate_scores(graph)).report
    except BranchgraphError as error:
        reasons, matches = [str(error)], []
    else:
        reasons, matches = [why for _, why in report.refusals], report.matches
    assert not matches
    assert any(reason in why for why in reasons)


# -- housekeeping ----------------------------------------------------------------------------------

TIDY = ("dead_code", "canonical", "constants", "common_subexpressions")

#: Network and an order that housekeeping may come into anywhere.
TIDIED = [
    (PARADISE, [POOL, S, "fuse_branches", "fuse_siblings"]),
    (MASKED, ["harden_gates", "prune_gates", S, FOLD, "prune_channels"]),
    (DENSE, ["share_weights", BRANCH1, S, FOLD]),
    (CROSS, ["fuse_means", WIDEN, S, FOLD]),
]


@pytest.mark.parametrize(("spec", "order"), TIDIED)
def test_housekeeping_may_come_in_anywhere(spec: str, order: list[str]) -> None:
    graph = network(spec)
    plain = composed(graph, order)
    tidied = composed(graph, [*TIDY, *(step for part in order for step in (part, *TIDY))])
    store = random_values(plain, tidied)
    assert_equal(outputs(plain, store), outputs(tidied, store))
    watch = Reports()
    Pipeline(tuple(map(Pass.from_spec, TIDY)), (watch,)).apply(tidied)
    assert not any(report.matches for report in watch.reports[:-1])


# -- ensembles -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "ordered"), [(DENSE, False), (LENET, True), (RESNET, True)])
def test_every_branch_fuses_into_what_the_plain_network_does(spec: str, ordered: bool) -> None:
    """With the values that `share_weights` cuts, all branches compute what the network did.

    Concatenations of halves have their channels in another order than those of the network.
    """
    plain = network(spec)
    shared = Pass.from_spec("share_weights:branches=3,shared=0.5").run(plain)
    assert shared.report.origin is not None
    whole = composed(plain, [S, "fuse_branches"])
    parts = [composed(g, [S, "fuse_branches"]) for g in split(shared.graph).values()]
    alike, *others = [structural_hash(materialise(g)[0]) for g in parts]
    assert others == [alike] * 2
    assert (structural_hash(materialise(whole)[0]) == alike) == ordered
    store = random_store({*plain.states, *shared.graph.states}, plain.states)
    evaluate_origin(shared.report.origin, store)
    for part in parts:
        assert_equal(outputs(whole, store), outputs(part, store))


def test_fusing_an_ensemble_fuses_branch_by_branch() -> None:
    shared = composed(network(DENSE), ["share_weights"])
    at_once = split(composed(shared, [S, "fuse_branches"]))
    for name, part in split(shared).items():
        by_itself = composed(part, [S, "fuse_branches"])
        assert structural_hash(by_itself) == structural_hash(at_once[name])


def test_slots_survive_sharing_splitting_and_assembling() -> None:
    """Cut into blocks and put together again, weights and slots are what they were."""
    plain = network(RESNET)
    training = Training.of(plain, MomentumSGD(), seed=3)
    train(training, images(16, size=8), np.arange(16) % 10, epochs=1, batch=8)
    shared = Pass.from_spec("share_weights").run(plain)
    assert shared.report.origin is not None
    evaluate_origin(shared.report.origin, training.store)
    cut = carry_slots(shared.report.origin, training.optimiser.slots, training.store)
    whole, origin = materialise(split(shared.graph)["branch2"])
    evaluate_origin(origin, training.store)
    carried = carry_slots(origin, cut.slots, training.store)
    assert not cut.reset
    assert not carried.reset
    after = {s.name.removeprefix("branch2/"): s for s in whole.states}
    for state in (s for s in plain.states if s.role is Role.PARAMETER):
        new = after[state.name]
        np.testing.assert_array_equal(training.store[new], training.store[state])
        slot = carried.slots[new, "v"]
        np.testing.assert_array_equal(
            training.store[slot], training.store[training.optimiser.slots[state, "v"]]
        )


# -- training goes on ------------------------------------------------------------------------------

#: Network, an order after training, and whether all optimiser slots are carried.
TRAINED = [
    (CROSS, ["fuse_siblings:training=true"], True),
    (MASKED, ["harden_gates", "prune_gates"], True),
    (MASKED, ["harden_gates", "prune_channels", "fuse_siblings"], True),
    (RESNET, [HALF], True),
    (RESNET, ["merge_and_run", "fuse_means"], True),
    (RESNET, [S, FOLD, HALF], False),
    (PARADISE, [S, "fuse_branches"], False),
    (CROSS, [WIDEN, "canonical"], False),
]


@pytest.mark.parametrize(("spec", "order", "carries"), TRAINED)
def test_training_goes_on_after_a_composition(spec: str, order: list[str], carries: bool) -> None:
    plain = network(spec)
    feeds = random_feeds(specialise(plain, training=False, exits="all"))
    x = np.concatenate([feeds["x"]] * 2).astype(np.float32)
    classes = next(iter(plain.outputs.values())).shape[1]
    labels = np.arange(len(x)) % int(str(classes))
    training = Training.of(plain, Adam(learning_rate=1e-3), seed=1)
    train(training, x, labels, epochs=2, batch=3)
    graph = pipeline(*order).apply(plain, training.store)
    found = continued(training, graph)
    assert (not found.reset) == carries, found.reset
    kept = [k for k in training.optimiser.slots if k in found.training.optimiser.slots]
    assert kept
    losses = [float(found.training.step(x=x, labels=labels)["loss"]) for _ in range(3)]
    assert losses[-1] < losses[0]
