"""What closed gates hide goes, to the fixpoint, and nothing that stays changes by a bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from builders import image_input, images, randomised
from gated_nets import (
    TINY,
    closed,
    fixed,
    gate_states,
    gated_graphs,
    norm_of_two,
    scored,
    wired,
)
from hypothesis import given, settings

from branchgraph.compiler import compile
from branchgraph.ir.builder import (
    batch_norm,
    concat,
    conv,
    dense,
    dropout,
    exit,
    gate,
    global_average_pool,
    merge_maximum,
    merge_sum,
    relu,
    sigmoid,
    tanh,
)
from branchgraph.ir.cost import cost
from branchgraph.ir.errors import ClaimError
from branchgraph.ir.file import load, save
from branchgraph.ir.functions.reduction import reduce_mean
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, branch
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.initialisers import LeCunNormal
from branchgraph.ir.interpret import interpret
from branchgraph.ir.optimisers import MomentumSGD
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph
from branchgraph.nets.connectivity import branch_connect, masked_resnet, masked_resnext
from branchgraph.passes.base import Report
from branchgraph.passes.checking import check_claim
from branchgraph.passes.harden_gates import harden
from branchgraph.passes.prune_gates import PruneGates
from branchgraph.passes.specialise import specialise
from branchgraph.training import Training


def prune(graph: Graph, **options: bool) -> tuple[Graph, Report]:
    """The pruned graph, its claim checked, and the report."""
    result = PruneGates(**options).run(graph, record=True)
    check_claim(graph, result.graph, "equal", report=result.report)
    again = PruneGates(**options).run(result.graph)
    assert not again.report.matches
    return result.graph, result.report


def ops(graph: Graph) -> list[str]:
    return [n.op.opcode for n in graph.nodes]


def rules(report: Report) -> str:
    found = [n for n in report.notes if n.startswith("by rule: ")]
    return found[0].removeprefix("by rule: ") if found else ""


# -- rules -----------------------------------------------------------------------------------------

BEFORE = """\
graph small {
  state a.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  state b.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  state c.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  input x : f32[N, 1, 3, 3]
  branch a {
    %0 = conv(x, a.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 3, 3]  # a
  }
  branch b {
    %1 = conv(x, b.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 3, 3]  # b
  }
  branch c {
    %2 = conv(x, c.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 3, 3]  # c
  }
  %3 = full() {value=1.0, shape=[1, 1, 1], dtype=f32} : f32[1, 1, 1]
  %4 = select(%0, %3) : f32[N, 2, 3, 3]  # open
  %5 = full() {value=0.0, shape=[1, 1, 1], dtype=f32} : f32[1, 1, 1]
  %6 = select(%1, %5) : f32[N, 2, 3, 3]  # closed
  %7 = sum(%4, %6, %2) : f32[N, 2, 3, 3]  # merge
  output y = %7
}
"""  # noqa: E501
AFTER = """\
graph small {
  state a.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  state c.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  input x : f32[N, 1, 3, 3]
  branch a {
    %0 = conv(x, a.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 3, 3]  # a
  }
  branch c {
    %1 = conv(x, c.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 3, 3]  # c
  }
  %2 = sum(%0, %1) : f32[N, 2, 3, 3]  # merge
  output y = %2
}
"""  # noqa: E501


def three_branches() -> Graph:
    graph = Graph("small")
    x = graph.input("x", ("N", 1, 3, 3))
    made = {}
    for name in "abc":
        init = LeCunNormal(fan_in=1)
        weight = graph.read(State(f"{name}.weight", (2, 1, 1, 1), init=init))
        with branch(name):
            made[name] = conv(x, 2, 1, bias=False, weight=weight, name=name)
    a = gate(made["a"], fixed(graph, 1.0), name="open")
    b = gate(made["b"], fixed(graph, 0.0), name="closed")
    graph.output("y", merge_sum(a, b, made["c"], name="merge"))
    return graph


def test_the_rewrite_as_text() -> None:
    graph = three_branches()
    pruned, report = prune(graph)
    assert format_graph(graph) == BEFORE
    assert format_graph(pruned) == AFTER
    assert rules(report) == "1 open gate, 1 closed gate, 1 zero edge, 3 dead code"
    assert "1 of 3 branches removed: b" in report.notes
    assert ("b/b", "dead code") in report.removed
    assert ("closed", "closed gate") in report.removed
    assert report.parameters == (6, 4)
    assert report.macs == (54, 36)


def test_a_sum_of_closed_gates_is_zero_of_the_same_shape() -> None:
    graph = Graph("none")
    x = image_input(graph)
    graph.output("y", merge_sum(closed(conv(x, 2, 1)), closed(conv(x, 2, 3, pad=1))))
    pruned, _ = prune(graph)
    assert ops(pruned) == ["full"]
    assert not pruned.states


def test_one_operand_that_is_left_is_the_value() -> None:
    graph = Graph("one")
    x = image_input(graph)
    graph.output("y", relu(merge_sum(closed(conv(x, 2, 1)), conv(x, 2, 1))))
    graph.output("z", concat(merge_maximum(x)))
    pruned, report = prune(graph)
    assert ops(pruned) == ["conv", "relu"]
    assert "2 single operand" in rules(report)


def test_zero_goes_through_what_maps_zero_to_zero() -> None:
    graph = Graph("zeros")
    x = image_input(graph, 4)
    h = relu(conv(closed(x), 4, 3, pad=1, bias=False)) * 0.5
    graph.output("y", merge_sum(x, h))
    assert ops(prune(graph)[0]) == []


@pytest.mark.parametrize(
    "layer", [lambda h: conv(h, 4, 3, pad=1), sigmoid, batch_norm, lambda h: h + 1.0]
)
def test_a_block_at_zero_input_is_no_zero(layer) -> None:  # type: ignore[no-untyped-def]
    graph = Graph("not zero")
    x = image_input(graph, 4)
    graph.output("y", merge_sum(x, layer(closed(x))))
    assert "sum" in ops(prune(graph)[0])
    graph = specialise(graph, training=False)
    assert "sum" in ops(prune(graph)[0])


def test_a_mean_keeps_its_share_and_a_gated_identity_its_shortcut() -> None:
    graph = Graph("identity")
    x = image_input(graph, 4)
    y = merge_sum(closed(conv(x, 4, 3, pad=1)), x * 0.25)
    graph.output("y", y)
    assert ops(prune(graph)[0]) == ["full", "multiply"]


def test_states_that_something_else_reads_stay() -> None:
    graph = Graph("shared")
    x = image_input(graph, 4)
    h = conv(x, 4, 1, name="conv")
    assert h.producer is not None
    graph.output("y", merge_sum(closed(conv(x, 4, 1, weight=h.producer.inputs[1])), h))
    assert [s.name for s in prune(graph)[0].states] == ["conv.weight", "conv.bias"]


# -- refusals --------------------------------------------------------------------------------------


def refusal(graph: Graph, **options: bool) -> tuple[str, str]:
    before = structural_hash(graph)
    pruned, report = prune(graph, **options)
    assert structural_hash(pruned) == before
    (found,) = report.refusals
    return found


def test_learned_gates_are_refused_by_the_name_of_their_scores() -> None:
    graph = masked_resnext(**TINY, k=2)
    for g in (graph, specialise(graph, training=True), specialise(graph, training=False)):
        result = PruneGates().run(g)
        assert not result.report.matches
        assert result.report.refusals == [
            ("module2/mask.score", "it is still learned; harden_gates first"),
            ("module3/mask.score", "it is still learned; harden_gates first"),
        ]
        assert structural_hash(result.graph) == structural_hash(g)


def test_gates_of_each_sample_are_refused() -> None:
    graph = Graph("samples")
    x = image_input(graph, 4)
    g = sigmoid(conv(x, 1, 6), name="g")
    graph.output("y", merge_sum(x, gate(conv(x, 4, 1), g, name="skip")))
    assert refusal(graph) == ("skip", "its gate depends on the input x")


def test_gates_with_a_value_in_the_store_are_refused() -> None:
    graph = Graph("stored")
    x = image_input(graph, 4)
    score = graph.read(State("s", (), role=Role.CONSTANT))
    graph.output("y", merge_sum(x, gate(conv(x, 4, 1), score, name="skip")))
    assert refusal(graph) == ("skip", "its gate depends on the state s")


def test_graphs_with_gradients_are_refused() -> None:
    graph = specialise(three_branches(), training=True)
    graph.output("loss", reduce_mean(graph.outputs["y"], (0, 1, 2, 3)))
    graph.keep(output=lambda name: name == "loss")
    graph = differentiate(graph)
    result = PruneGates().run(graph)
    assert result.report.refusals == [("small", "it has gradients; prune before differentiating")]


# -- exits -----------------------------------------------------------------------------------------


def with_closed_exit() -> Graph:
    graph = Graph("exits")
    h = relu(conv(image_input(graph), 4, 3, name="stem"))
    with branch("exit1"):
        logits = dense(global_average_pool(h), 5)
        exit(gate(logits, fixed(graph, 0.0, shape=(1, 1))), "exit1", threshold=0.5)
    exit(dense(conv(h, 4, 3), 5), "exit2", last=True)
    return graph


def test_gated_off_exits_go_on_request() -> None:
    place, reason = PruneGates().run(with_closed_exit()).report.refusals[0]
    assert place == "exit1/exit1"
    assert "exits=true" in reason
    pruned, report = prune(with_closed_exit(), exits=True)
    assert list(pruned.outputs) == ["exit2"]
    assert list(pruned.inputs) == ["x"]
    assert report.dropped == ["exit1"]
    assert "1 gated-off exit" in rules(report)
    assert ops(pruned) == ["conv", "relu", "conv", "reshape", "dense", "exit"]


def test_gated_off_exits_that_are_read_stay() -> None:
    graph = with_closed_exit()
    graph.output("read", relu(graph.outputs["exit1"]))
    reasons = dict(PruneGates(exits=True).run(graph).report.refusals)
    assert reasons == {"exit1/exit1": "its gate is closed, but relu reads it"}
    alone = Graph("alone")
    logits = dense(image_input(alone), 5)
    exit(gate(logits, fixed(alone, 0.0, shape=(1, 1))), "out", last=True)
    reasons = dict(PruneGates(exits=True).run(alone).report.refusals)
    assert reasons == {"out": "its gate is closed, but it is the last exit"}


def test_an_output_that_is_gone_by_mistake_breaks_the_claim() -> None:
    graph = with_closed_exit()
    pruned = PruneGates(exits=True).apply(graph)
    with pytest.raises(ClaimError, match="which is gone"):
        check_claim(graph, pruned, "equal")


# -- the fixpoint ----------------------------------------------------------------------------------


def surviving(graph: Graph, modules: int) -> list[int]:
    kept = Counter(p.partition("/")[0] for p in graph.branches())
    return [kept[f"module{i}"] for i in range(1, modules + 1)]


def test_the_published_fixpoint_keeps_what_live_blocks_read() -> None:
    # A test of each module by itself keeps 4, 6, 5, 6, 4, 8 blocks; dead readers leave fewer.
    rows = {
        6: [0, 0, 1, 1, 2, 2, 3, 3],
        5: [0, 1, 2, 3, 4, 5, 0, 0],
        4: [0, 1, 2, 3, 4, 0, 0, 0],
        3: [0, 1, 2, 2, 3, 4, 5, 0],
        2: [0, 1, 1, 2, 3, 0, 0, 0],
    }
    assert [len(set(rows[i])) for i in range(2, 7)] == [4, 6, 5, 6, 4]
    graph = masked_resnext(20, 4, 8, k=1, size=8)
    result = PruneGates().run(harden(graph, wired(graph, rows)))
    report = result.report
    assert surviving(result.graph, 6) == [2, 3, 4, 4, 4, 8]
    assert any(n.startswith("23 of 48 branches removed: module1/block2") for n in report.notes)
    assert report.parameters == (266_714, cost(result.graph).per_sample().parameters)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_pruned_masked_networks_are_equal_bit_for_bit(k: int, seed: int) -> None:
    graph = masked_resnext(**TINY, k=k)
    store = scored(graph, seed)
    hardened = harden(graph, store)
    pruned, _ = prune(hardened)
    x = images(3, 1, 8)
    results = [compile(g, store=store)(x=x)["logits"] for g in (graph, hardened, pruned)]
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
    assert "select" not in ops(pruned)
    if k == 1:
        assert len(pruned.branches()) < len(graph.branches())


@pytest.mark.parametrize(
    "net",
    [
        masked_resnet(8, k=2, widths=(4, 8, 16), size=8),
        masked_resnext(**TINY, k=1, preact=True),
    ],
    ids=["masked_resnet", "preact"],
)
def test_other_gated_networks_prune(net: Graph) -> None:
    pruned, report = prune(harden(net, scored(net)))
    assert report.matches
    assert not gate_states(pruned)


def test_a_branch_that_no_class_chose_goes() -> None:
    net = branch_connect(stem=(4,), widths=(8,), size=8)
    store = scored(net)
    (score,) = gate_states(net)
    store[score] = store[score] * np.array([1, 0, 1, 1], np.float32)
    pruned, _ = prune(harden(net, store))
    assert list(pruned.branches()) == ["branch0", "branch2", "branch3"]


def random_masks(depth: int, width: int, k: int, count: int) -> tuple[int, float, float]:
    """Parameters before, mean after, and mean share of blocks removed, over random masks."""
    graph = masked_resnext(depth, width, 8, k=k, classes=100)
    blocks = len(graph.branches())
    after, gone = [], []
    for seed in range(count):
        pruned = PruneGates().apply(harden(graph, scored(graph, seed)))
        after.append(cost(pruned).per_sample().parameters)
        gone.append(1 - len(pruned.branches()) / blocks)
    return cost(graph).per_sample().parameters, float(np.mean(after)), float(np.mean(gone))


def test_random_masks_keep_the_expected_number_of_parameters() -> None:
    # 0.57 and 0.856 M of 0.86 M on average over many masks; few of them here.
    before, after, gone = random_masks(29, 8, 1, 4)
    assert before == 864_564
    assert after == pytest.approx(570_000, rel=0.15)
    assert 0.3 < gone < 0.7
    assert random_masks(29, 8, 4, 1)[1] == pytest.approx(856_000, rel=0.02)


# -- NaN, gradients, training ----------------------------------------------------------------------


def gated_block(gates: tuple[float, float, float] = (1.0, 0.0, 1.0)) -> Graph:
    """Three branches with batch norm and dropout behind gates; the middle one is closed."""
    graph = Graph("block")
    h = relu(batch_norm(conv(image_input(graph), 4, 3, pad=1, name="stem")))
    terms = []
    for k, number in enumerate(gates):
        with branch(f"b{k}"):
            term = dropout(relu(batch_norm(conv(h, 4, 3, pad=1))), 0.5)
            terms.append(gate(term, fixed(graph, number)))
    graph.output("logits", dense(global_average_pool(merge_sum(*terms)), 5))
    return graph


def test_nan_behind_a_closed_gate_stays_invisible() -> None:
    graph = gated_block()
    pruned = PruneGates().apply(graph)
    store = randomised(graph)
    for state in graph.states:
        if state.name.startswith("b1/"):
            store[state] = np.full(state.shape, np.nan)
    results = [
        interpret(specialise(g, training=False), {"x": images()}, store).outputs["logits"]
        for g in (graph, pruned)
    ]
    assert np.isfinite(results[0]).all()
    np.testing.assert_array_equal(*results)


def test_updates_of_a_removed_branch_go_with_it() -> None:
    training = specialise(gated_block(), training=True)
    pruned, report = prune(training)
    assert "2 update" in rules(report)
    names = {s.name for s in training.updates} - {s.name for s in pruned.updates}
    assert names == {"b1/batch_norm.running_mean", "b1/batch_norm.running_var"}
    assert not any(s.name.startswith("b1/") for s in pruned.states)


def test_an_update_that_observes_living_parts_too_stays() -> None:
    graph = Graph("counter")
    x = image_input(graph, 4)
    h, dead = relu(x), conv(x, 4, 1)
    graph.output("y", merge_sum(h, closed(dead)))
    counter = State("counter", (), role=Role.STATISTIC)
    everything = (0, 1, 2, 3)
    seen = reduce_mean(h, everything) + reduce_mean(dead, everything)
    graph.update(counter, graph.read(counter) + seen)
    pruned, report = prune(graph)
    assert report.refusals == [("counter", "its update observes parts that stay, too")]
    assert counter in pruned.updates


def test_a_gate_that_hides_one_of_two_applications_of_a_batch_norm_stays() -> None:
    graph = Graph("shared norm")
    x = image_input(graph, 4)
    y, hidden = norm_of_two(graph, x, relu(x))
    shut = gate(hidden, fixed(graph, 0.0), name="shut")
    later = gate(relu(shut), fixed(graph, 0.0), name="later")
    graph.output("y", merge_sum(y, later, closed(relu(x))))
    pruned, report = prune(graph)
    reason = (
        "its gate is closed, but again/bn behind it moves the running statistics of bn in "
        "training; specialise first"
    )
    assert report.refusals == [("shut", reason), ("later", reason)]
    assert ops(pruned).count("select") == 2, "the third gate hides no batch norm"
    for training, norms in ((False, 1), (True, 2)):
        form, report = prune(specialise(graph, training=training))
        assert sum(op.startswith("batch_norm") for op in ops(form)) == norms
        assert "select" not in ops(form)


def test_gates_that_hide_every_application_of_a_batch_norm_go() -> None:
    graph = Graph("shared norm")
    x = image_input(graph, 4)
    graph.output("y", merge_sum(x, *map(closed, norm_of_two(graph, x, relu(x)))))
    pruned, report = prune(graph)
    assert not report.refusals
    assert not pruned.nodes


def test_a_batch_norm_that_a_kept_gate_lets_live_keeps_its_other_gates() -> None:
    graph = Graph("chained norms")
    x = image_input(graph, 4)
    y, hidden = norm_of_two(graph, x, relu(x))
    # A second batch norm all of whose applications seem hidden, until the first gate has to stay.
    inner, outer = norm_of_two(graph, hidden, tanh(x))
    one = gate(inner, fixed(graph, 0.0), name="one")
    two = gate(outer, fixed(graph, 0.0), name="two")
    graph.output("y", merge_sum(y, one, two))
    pruned, report = prune(graph)
    assert [where for where, _ in report.refusals] == ["one", "two"]
    assert ops(pruned).count("batch_norm") == 4


def test_an_application_of_a_batch_norm_that_nobody_reads_stays_with_the_others() -> None:
    graph = Graph("unread norm")
    x = image_input(graph, 4)
    y, _ = norm_of_two(graph, x, relu(x))
    graph.output("y", merge_sum(y, closed(relu(x))))
    pruned, report = prune(graph)
    assert not report.refusals
    assert "select" not in ops(pruned)
    assert ops(pruned).count("batch_norm") == 2


def gradients(graph: Graph, store: Store) -> dict[State, np.ndarray]:
    training = specialise(graph, training=True)
    squared = training.outputs["logits"] * training.outputs["logits"]
    training.output("loss", reduce_mean(squared, (0, 1)))
    training.keep(output=lambda name: name == "loss")
    made = differentiate(training)
    store.initialise(made.states)
    return interpret(made, {"x": images()}, store).gradients


def test_gradients_of_survivors_are_equal_and_of_the_rest_were_zero() -> None:
    graph = gated_block()
    store = randomised(graph)
    before, after = gradients(graph, store), gradients(PruneGates().apply(graph), store)
    assert set(after) < set(before)
    for state, value in before.items():
        if state in after:
            np.testing.assert_array_equal(after[state], value)
        else:
            assert state.name.startswith("b1/")
            assert not value.any()


def test_what_is_left_of_a_checkpoint_serves_the_pruned_graph(tmp_path: Path) -> None:
    graph = masked_resnext(**TINY, k=1)
    store = scored(graph)
    pruned = PruneGates().apply(harden(graph, store))
    assert set(pruned.states) < set(graph.states)
    save(tmp_path / "pruned.bg", pruned, store)
    loaded, values = load(tmp_path / "pruned.bg")
    x = images(3, 1, 8)
    results = [compile(g, store=s)(x=x)["logits"] for g, s in ((graph, store), (loaded, values))]
    np.testing.assert_array_equal(*results)


def test_training_goes_on_alike_after_pruning() -> None:
    hardened = gated_block()
    rng = np.random.default_rng(0)
    batches = [{"x": images(8, seed=i), "labels": rng.integers(0, 5, 8)} for i in range(3)]
    runs = []
    for graph in (hardened, PruneGates().apply(hardened)):
        training = Training.of(graph, MomentumSGD(0.05), store=randomised(hardened), seed=4)
        losses = [float(training.step.run(batch)["loss"]) for batch in batches]
        runs.append((training, losses))
    (whole, losses), (pruned, pruned_losses) = runs
    assert pruned_losses == losses
    shared = set(hardened.states) & set(PruneGates().apply(hardened).states)
    assert {s.role for s in shared} == {Role.PARAMETER, Role.STATISTIC}
    for state in shared:
        np.testing.assert_array_equal(pruned.store[state], whole.store[state])
    streams = [
        {s.name: t.store[s].tolist() for s in t.step.states if s.role in (Role.KEY, Role.STEP)}
        for t in (whole, pruned)
    ]
    assert streams[0] == streams[1] != {}


# -- random graphs ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(gated_graphs())
def test_random_gated_graphs_keep_their_values(graph: Graph) -> None:
    pruned, report = prune(graph)
    assert report.parameters[1] <= report.parameters[0]
    assert report.macs[1] <= report.macs[0]
    assert len(pruned.nodes) <= len(graph.nodes)
    inference = specialise(graph, training=False)
    prune(inference)
    prune(specialise(graph, training=True))


@settings(max_examples=15, deadline=None)
@given(gated_graphs(norms=False))
def test_pruning_commutes_with_choosing_the_mode(graph: Graph) -> None:
    first = PruneGates().apply(specialise(graph, training=False))
    last = specialise(PruneGates().apply(graph), training=False)
    assert structural_hash(first) == structural_hash(last)


def test_a_closed_gate_on_rows_that_an_exit_left_stays() -> None:
    graph = Graph("rows")
    h = relu(conv(image_input(graph), 4, 3, name="stem"))
    with branch("exit1"):
        exit(dense(global_average_pool(h), 5), "exit1", threshold=0.5)
    logits = dense(global_average_pool(conv(h, 4, 3, name="later")), 5)
    closed_logits = gate(logits, fixed(graph, 0.0, shape=(1, 1)), name="skip")
    exit(closed_logits, "last", last=True)
    lowered = specialise(graph, training=False)
    report = prune(lowered)[1]
    reason = "it has the rows that an exit left; prune before lowering exits"
    assert ("skip", reason) in report.refusals
