"""Gates are drawn with what opens them; exits with criterion and threshold."""

from collections.abc import Callable

import pytest
from families import disentangled, resnext, with_exits

from branchgraph.ir import gates
from branchgraph.ir.builder import conv, gate, softmax, state, weighted_sum
from branchgraph.ir.graph import Graph, Value, scope
from branchgraph.ir.initialisers import Uniform
from branchgraph.ir.op import make
from branchgraph.ir.state import Role
from branchgraph.passes.specialise import specialise
from branchgraph.show import counts, to_dot, to_text


def gated(kind: Callable[[Value], Value]) -> Graph:
    """A convolution whose four channels are gated by a kind of gate of learned scores."""
    g = Graph("gated")
    x = g.input("x", ("N", 3, 8, 8))
    with scope("block"):
        score = state(g, "gate", "score", (4, 1, 1), Uniform(0.0, 1.0), Role.GATE)
        y = gate(conv(x, 4, 1, name="conv"), kind(score))
    g.output("y", y)
    return g


def gumbel(hard: bool) -> Callable[[Value], Value]:
    def kind(score: Value) -> Value:
        heat = score.graph.input("temperature", (), default=1.0)
        return gates.gumbel(score, heat, axis=0, hard=hard)

    return kind


KINDS: dict[str, Callable[[Value], Value]] = {
    "> 0.5": gates.hard,
    "2 of 4": lambda s: gates.top_k(s, 2, axis=0),
    "sigmoid": gates.sigmoid,
    "softmax": lambda s: gates.softmax(s, axis=0),
    "hard concrete": gates.hard_concrete,
    "Gumbel": gumbel(hard=False),
}


def line(g: Graph) -> str:
    (found,) = [x for x in to_text(g).splitlines() if "◇" in x and "%" in x]
    return found


@pytest.mark.parametrize("words", KINDS)
def test_a_learned_gate_says_its_kind_and_its_scores(words: str) -> None:
    g = gated(KINDS[words])
    assert f"gate {words} by gate.score" in line(g)
    assert counts(g).boxes == 2, "the noise and the estimators are folded into the gate"
    assert counts(g, states=True).boxes > 2, "they are drawn together with the states"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("words", KINDS)
def test_a_specialised_gate_still_names_its_scores(words: str, training: bool) -> None:
    assert "by gate.score" in line(specialise(gated(KINDS[words]), training=training))


def test_hard_gumbel_gates_are_recognised() -> None:
    assert "gate Gumbel by gate.score" in line(gated(gumbel(hard=True)))


@pytest.mark.parametrize("level", [0.0, 1.0, 0.5])
def test_a_constant_gate_shows_its_value(level: float) -> None:
    g = gated(lambda s: s.graph.constant(level))
    assert f"gate = {level:g}" in line(g)
    assert f"= {level:g}<" in to_dot(g)


def test_a_constant_behind_a_change_of_shape_is_seen() -> None:
    def wide(score: Value) -> Value:
        one = score.graph.constant(1.0)
        return score.graph.emit(make("broadcast_to", shape=(4, 1, 1)), one)

    assert "gate = 1" in line(gated(wide))


def test_a_gate_that_is_fed_shows_its_name_and_default() -> None:
    assert "gate by open (0.5)" in line(gated(lambda s: s.graph.input("open", (), default=0.5)))


def test_a_gate_that_looks_at_data_is_a_path_of_its_own() -> None:
    g = disentangled(gated=True)
    text = to_text(g)
    assert text.count("◇ gate softmax") == 4
    assert "┏ branch gate" in text
    assert "fc2 dense 4" in text


def test_weights_of_a_sum_that_are_learned_are_named() -> None:
    g = Graph("weighted")
    x = g.input("x", ("N", 4))
    score = state(g, "mix", "score", (2,), Uniform(0.0, 1.0), Role.GATE)
    weights = g.apply(make("split", axis=0, sizes=(1, 1)), softmax(score, axis=0))
    g.output("y", weighted_sum([x, x], weights))
    assert "gate softmax by mix.score" in to_text(g)


def test_scores_that_also_feed_the_loss_stay_in_the_picture() -> None:
    g = gated(gates.sigmoid)
    (opened,) = [n.output for n in g.nodes if n.op.opcode == "sigmoid"]
    g.output("cost", opened)
    assert "ƒ sigmoid" in to_text(g)


def test_gates_of_k_of_n_branches_name_the_scores_of_their_module() -> None:
    assert "gate 3 of 8 by mask.score" in to_text(resnext(8, 3))


def test_exits_say_criterion_and_threshold() -> None:
    for drawn in (to_text(with_exits()), to_dot(with_exits())):
        for words in ("entropy", "0.5", "confidence", "0.75", "takes the rest"):
            assert words in drawn
