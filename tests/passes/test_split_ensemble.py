"""One network for each branch of an ensemble."""

from __future__ import annotations

import numpy as np
import pytest

from branchgraph.ir.builder import (
    dense,
    dropout,
    exit,
    merge_mean,
    merge_sum,
    scale_gradient,
    softmax,
)
from branchgraph.ir.errors import FormatError, GraphError, RefusalError
from branchgraph.ir.graph import Graph, branch
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.state import Role
from branchgraph.ir.types import DType
from branchgraph.ir.verify import verify
from branchgraph.passes.base import Pass
from branchgraph.passes.clean import CommonSubexpressions
from branchgraph.passes.materialise import evaluate_origin, materialise
from branchgraph.passes.share_weights import ShareWeights
from branchgraph.passes.specialise import specialise
from branchgraph.passes.split_ensemble import SplitEnsemble, branches_of, split
from tests.builders import EXACT, dense_net_with_exits
from tests.nets.vbranch_nets import batch, outputs, scattered, small


@pytest.mark.parametrize("inputs", ["one", "each"])
@pytest.mark.parametrize("name", ["fcn", "cnn", "densenet_bc"])
def test_every_branch_computes_what_it_did_in_the_ensemble(name: str, inputs: str) -> None:
    whole = ShareWeights(3, (0.5,), inputs=inputs).apply(small(name))
    store = scattered(whole)
    fed = {k: batch(name, seed=i) for i, k in enumerate(whole.inputs)}
    together = outputs(whole, store, **fed)
    parts = split(whole)
    assert list(parts) == ["branch1", "branch2", "branch3"]
    for k, (branch_name, part) in enumerate(parts.items(), start=1):
        own = "x" if inputs == "one" else f"x{k}"
        assert (list(part.inputs), list(part.outputs)) == ([own], ["logits"])
        got = outputs(part, store, **{own: fed[own]})["logits"]
        np.testing.assert_array_equal(got, together[branch_name])


def test_shared_states_are_kept_and_those_of_other_branches_go() -> None:
    whole = ShareWeights(2, (0.5,)).apply(small("fcn"))
    part = SplitEnsemble("branch2").apply(whole)
    assert set(part.states) == {s for s in whole.states if not s.name.startswith("branch1/")}
    assert any(s.name == "fc2.weight_ss" for s in part.states)
    assert not part.branches()


@pytest.mark.parametrize("merge", ["mean", "sum", "concat", "after_mean"])
def test_the_operands_of_a_merge_are_the_branches(merge: str) -> None:
    plain = small("fcn")
    apart = ShareWeights(2, (0.5,)).apply(plain)
    joined = ShareWeights(2, (0.5,), merge=merge).apply(plain)
    for name, part in split(joined).items():
        assert list(part.outputs) == ["logits"]
        assert structural_hash(part) == structural_hash(SplitEnsemble(name).apply(apart))


def test_a_branch_that_is_materialised_is_the_plain_network() -> None:
    plain = small("fcn")
    part = SplitEnsemble("branch1").apply(ShareWeights(2, (0.5,)).apply(plain))
    whole, origin = materialise(part)
    assert structural_hash(whole) == structural_hash(plain)
    store = scattered(part)
    evaluate_origin(origin, store)
    got = outputs(whole, store, x=batch("fcn"))["logits"]
    np.testing.assert_allclose(got, outputs(part, store, x=batch("fcn"))["logits"], **EXACT)
    assert {s.name for s in whole.states if s.role is Role.PARAMETER} == {
        s.name for s in plain.states if s.role is Role.PARAMETER
    }


def test_a_branch_alone_has_its_whole_gradient() -> None:
    plain = small("fcn")
    part = SplitEnsemble("branch1").apply(ShareWeights(2, (1.0,)).apply(plain))
    assert structural_hash(part) == structural_hash(plain)


def test_a_scale_of_the_users_own_stays() -> None:
    graph = Graph("reversed")
    x = scale_gradient(graph.input("x", ("N", 3)), graph.constant(-1.0))
    for k in (1, 2):
        with branch(f"branch{k}"):
            graph.output(f"branch{k}", dense(x, 2, name="fc"))
    part = SplitEnsemble("branch2").apply(graph)
    assert [n.op.opcode for n in part.nodes] == ["full", "scale_gradient", "dense"]


def test_several_outputs_keep_their_names() -> None:
    plain = small("fcn")
    plain.output("features", plain.find("relu_fc2").output)
    for merge in ("none", "mean"):
        part = SplitEnsemble("branch1").apply(ShareWeights(2, merge=merge).apply(plain))
        assert list(part.outputs) == ["logits", "features"]


def test_a_trunk_goes_with_every_branch() -> None:
    whole = ShareWeights(2, (0.5,), after="relu_fc1").apply(small("fcn"))
    store = scattered(whole)
    expected = outputs(whole, store, x=batch("fcn"))
    for name, part in split(whole).items():
        got = outputs(part, store, x=batch("fcn"))["logits"]
        np.testing.assert_array_equal(got, expected[name])
        assert "fc1.weight" in {s.name for s in part.states}


def test_masked_branches_are_split_too() -> None:
    whole = ShareWeights(2, layout="masks", overlap=0.5).apply(small("cnn"))
    store = scattered(whole)
    expected = outputs(whole, store, x=batch("cnn"))
    for name, part in split(whole).items():
        got = outputs(part, store, x=batch("cnn"))["logits"]
        np.testing.assert_array_equal(got, expected[name])


def test_branches_whose_common_part_was_found_are_split() -> None:
    whole = ShareWeights(2, (1.0, 1.0, 0.5)).apply(small("fcn"))
    inference = CommonSubexpressions().apply(specialise(whole, training=False))
    store = scattered(whole)
    expected = interpret(inference, {"x": batch("fcn")}, store, DType.F64).outputs
    for name, part in split(inference).items():
        got = interpret(part, {"x": batch("fcn")}, store, DType.F64).outputs
        np.testing.assert_array_equal(got["logits"], expected[name])


def test_updates_go_with_the_branch_they_are_of() -> None:
    whole = specialise(ShareWeights(2, (0.5,)).apply(small("fcn")), training=True)
    part = SplitEnsemble("branch1").apply(whole)
    assert {s.name.partition("/")[0] for s in part.updates} == {"branch1"}
    assert len(part.updates) == len(whole.updates) / 2
    assert set(part.updates) <= set(part.states)


def test_updates_of_a_trunk_and_of_random_streams_stay() -> None:
    plain = small("cnn")
    plain.keep(output=lambda name: False)
    plain.output("logits", dropout(plain.find("fc").output))
    whole = specialise(ShareWeights(2, after="avg_pool").apply(plain), training=True)
    part = SplitEnsemble("branch2").apply(whole)
    names = {s.name for s in part.updates}
    assert {"bn_1_1.running_mean", "branch2/bn_fc1.running_var", "random.step"} <= names
    assert not [n for n in names if n.startswith("branch1")]
    assert not part.branches()


def ensemble_of(*names: str) -> Graph:
    graph = Graph("g")
    x = graph.input("x", ("N", 3))
    for name in names:
        with branch(name):
            graph.output(name, dense(x, 2, name="fc"))
    return graph


def test_branches_of_the_user_are_named_as_they_are() -> None:
    graph = ensemble_of("left", "right")
    assert list(split(graph)) == ["left", "right"]
    merged = Graph("m")
    x = merged.input("x", ("N", 3))
    values = []
    for name in ("left", "right"):
        with branch(name):
            values.append(softmax(dense(x, 2, name="fc"), name="p"))
    merged.output("probabilities", merge_mean(*values))
    assert {k: list(v) for k, v in branches_of(merged).items()} == {
        "left": ["logits"], "right": ["logits"],
    }  # fmt: skip


def test_an_input_that_alone_brings_the_batch_stays() -> None:
    graph = Graph("constants")
    x, y = (graph.input(name, ("N", 4)) for name in "xy")
    for name in ("left", "right"):
        with branch(name):
            graph.output(name, graph.emit(Full(value=0.5, shape=(x.shape[0], 3))))
    graph.output("sum", x + y)
    for name, part in split(graph).items():
        verify(part)
        assert list(part.inputs) == ["x"], name
        fed = {"x": np.zeros((2, 4), np.float32)}
        assert interpret(part, fed).outputs["logits"].shape == (2, 3)


def test_a_second_application_is_refused() -> None:
    step = Pass.from_spec("split_ensemble:branch=branch1")
    assert Pass.from_spec(step.name) == step
    once = step.run(ShareWeights(2).apply(small("fcn")))
    assert once.report.matches == ["branch1"]
    again = step.run(once.graph)
    assert again.report.refusals == [("branch1", "there are no branches")]
    assert not again.report.matches


def residual() -> Graph:
    graph = Graph("residual")
    x = graph.input("x", ("N", 3))
    with branch("body"):
        body = dense(x, 3, name="fc")
    graph.output("y", merge_sum(x, body))
    return graph


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (dense_net_with_exits, RefusalError, "dense_net is no ensemble: .* found none"),
        (lambda: ensemble_of("left"), RefusalError, "g is no ensemble: .* found left"),
        (residual, RefusalError, "residual is no ensemble"),
        (lambda: ensemble_of("left", "right"), GraphError, "no branch 'branch1'.*: left, right"),
    ],
)  # fmt: skip
def test_what_is_no_ensemble_is_refused(graph, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        SplitEnsemble("branch1").apply(graph())


def test_gradients_of_the_whole_are_refused() -> None:
    graph = ensemble_of("left", "right")
    state = next(iter(graph.reads))
    graph.set_gradient(state, graph.reads[state])
    with pytest.raises(RefusalError, match="split before differentiating"):
        SplitEnsemble("left").apply(graph)


def test_the_branch_must_be_named() -> None:
    with pytest.raises(FormatError, match="branch"):
        Pass.from_spec("split_ensemble")


def test_an_exit_inside_a_branch_makes_no_member() -> None:
    graph = Graph("g")
    x = graph.input("x", ("N", 3))
    for k in (1, 2):
        with branch(f"exit{k}"):
            exit(dense(x, 2, name="fc"), f"exit{k}", last=k == 2)
    with pytest.raises(RefusalError, match="no ensemble"):
        SplitEnsemble("exit1").apply(graph)
