"""The driver applies rules wherever they fit, until none does, and says what it left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from branchgraph.ir.builder import dense, merge_sum, relu, sigmoid, tanh
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.ir.match import Match, Pattern
from branchgraph.ir.op import make
from branchgraph.ir.ops.merge import Sum
from branchgraph.ir.verify import verify
from branchgraph.passes.base import Report
from branchgraph.passes.checking import check_claim
from branchgraph.passes.rewriting import Rule, RulePass, apply_rules


@dataclass(frozen=True)
class Rules(RulePass):
    """Rules of a test, which no specification string needs to build."""

    given: tuple[int, ...] = ()
    made: list[Rule] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        """Rules are no attributes, so there is nothing to normalise."""

    @property
    def name(self) -> str:
        return "rules"

    def rules(self) -> Iterable[Rule]:
        return self.made


def rewritten(graph: Graph, *rules: Rule, check: bool = True) -> tuple[Graph, Report]:
    result = Rules(made=list(rules)).run(graph, record=True)
    if check:
        check_claim(graph, result.graph, "exact", report=result.report)
        assert len(result.report.regions) == len(result.report.matches)
    return result.graph, result.report


def opcodes(graph: Graph) -> list[str]:
    return [n.op.opcode for n in graph.nodes]


def matrix(name: str = "g") -> tuple[Graph, Value]:
    graph = Graph(name)
    return graph, graph.input("x", ("N", 4))


def rule(
    function: Callable[..., object], rewrite: Callable[[Match], object], **options: object
) -> Rule:
    return Rule(Pattern(function), rewrite, **options)  # type: ignore[arg-type]


ONCE = rule(lambda p, x: p.relu(p.relu(x)), lambda m: relu(m["x"]), name="relu twice")


def test_a_rule_is_applied_until_nothing_is_left() -> None:
    graph, x = matrix()
    h = x
    for _ in range(7):
        h = relu(h)
    graph.output("y", h)
    after, report = rewritten(graph, ONCE)
    assert opcodes(after) == ["relu"]
    assert len(report.matches) == 6
    assert not report.refusals
    assert opcodes(graph) == ["relu"] * 7, "the argument is not changed"
    assert not rewritten(after, ONCE)[1].matches


def test_new_nodes_stand_in_the_scope_of_what_they_replace() -> None:
    graph, x = matrix()
    with scope("a"):
        h = relu(x)
        with branch("left"):
            graph.output("y", relu(h, name="last"))
    (node,) = rewritten(graph, ONCE)[0].nodes
    assert node.path == "a/left"
    assert rewritten(graph, ONCE)[1].matches == ["a/left/last"]


def test_results_of_two_branches_are_made_in_the_scope_they_share() -> None:
    pair = rule(
        lambda p, x: p.siblings("r", x, lambda p, x: p.relu(x)),
        lambda m: (merge_sum(relu(m["x"])),) * len(m.each("r")),
    )
    graph, x = matrix()
    with scope("block"):
        for name in ("left", "right"):
            with branch(name):
                graph.output(name, relu(x))
    after, _ = rewritten(graph, pair)
    assert {n.path for n in after.nodes} == {"block"}


def test_a_value_that_is_read_elsewhere_is_refused_by_name() -> None:
    graph, x = matrix()
    h = relu(x, name="inner")
    graph.output("y", relu(h, name="outer") + h)
    after, report = rewritten(graph, ONCE)
    assert opcodes(after) == ["relu", "relu", "add"]
    assert report.refusals == [("outer", "inner is read elsewhere too")]


def test_a_value_that_is_an_output_is_refused() -> None:
    graph, x = matrix()
    h = graph.output("h", relu(x))
    graph.output("y", relu(h))
    assert rewritten(graph, ONCE)[1].refusals == [("relu", "relu is read elsewhere too")]


def test_what_a_rule_keeps_may_be_read_elsewhere() -> None:
    through = rule(
        lambda p, x: p.tanh(p.relu(x, name="act")),
        lambda m: tanh(merge_sum(m.node("act").output)),
        keeps=frozenset({"act"}),
    )
    graph, x = matrix()
    h = relu(x)
    graph.output("y", tanh(h) + h)
    with pytest.raises(GraphError, match="do not come to an end"):
        rewritten(graph, rule(lambda p, x: p.tanh(x), lambda m: tanh(relu(m["x"]))))
    after, report = rewritten(graph, through)
    assert not report.refusals
    assert opcodes(after) == ["relu", "sum", "tanh", "add"]


def test_what_a_rule_keeps_may_be_a_node_of_a_part() -> None:
    doubled = rule(
        lambda p: p.sum(p.each("acts", lambda p, x: p.relu(x, name="act"), at_least=2)),
        lambda m: m.each("acts")[0].node("act").output * 2.0,
        keeps=frozenset({"act"}),
        check=lambda m: "" if m.inside[1:] == (m.each("acts")[0].node("act"),) else "they differ",
    )
    graph, x = matrix()
    h = relu(x)
    graph.output("y", merge_sum(h, h) + h)
    graph.output("z", merge_sum(h, relu(x), name="mixed"))
    after, report = rewritten(graph, doubled)
    assert sorted(opcodes(after)) == ["add", "full", "multiply", "relu", "relu", "sum"]
    assert len(report.matches) == 1
    assert report.refusals == [("mixed", "they differ")]


def test_a_check_refuses_with_its_reason() -> None:
    picky = rule(
        lambda p, x: p.relu(p.relu(x)),
        lambda m: relu(m["x"]),
        check=lambda m: "not today",
    )
    graph, x = matrix()
    graph.output("y", relu(relu(x), name="y"))
    after, report = rewritten(graph, picky)
    assert report.refusals == [("y", "not today")]
    assert opcodes(after) == ["relu", "relu"]


def test_another_way_to_match_is_tried_when_the_first_is_refused() -> None:
    """Either operand of the sum could be the tanh that goes; only the second is read once."""
    spliced = rule(lambda p, x, y: p.add(p.tanh(x), y), lambda m: m["x"] + m["y"])
    graph, x = matrix()
    kept = tanh(x, name="kept")
    graph.output("y", kept + tanh(relu(x)))
    graph.output("z", kept)
    after, report = rewritten(graph, spliced, check=False)
    assert opcodes(after) == ["tanh", "relu", "add"]
    assert len(report.matches) == 1
    assert report.refusals == [("add", "kept is read elsewhere too")], "what is left to refuse"


def test_a_refusal_that_no_longer_stands_is_not_reported() -> None:
    """The second reader of the inner relu goes when its own rule fires."""
    dropped = rule(lambda p, x: p.multiply(x, 0.0), lambda m: m["x"].graph.emit(_zeros(m["x"])))
    graph, x = matrix()
    h = relu(x)
    graph.output("y", relu(h) + relu(h) * 0.0)
    h2 = tanh(h) * 0.0
    graph.output("z", h2)
    after, report = rewritten(graph, ONCE, dropped)
    assert sorted(opcodes(after)) == ["add", "full", "full", "relu"]
    assert len(report.matches) == 3
    assert not report.refusals


def _zeros(like: Value):  # type: ignore[no-untyped-def]
    return make("full", value=0.0, shape=like.shape, dtype=like.dtype)


def test_a_match_that_waits_far_away_is_looked_at_again() -> None:
    """The value has many readers, so only what waits for it is looked at again, not all."""
    graph, x = matrix()
    h = relu(x, name="h")
    inner = relu(h, name="inner")
    graph.output("y", relu(inner, name="outer"))
    rest = [sigmoid(tanh(inner)) for _ in range(50)]
    graph.output("z", merge_sum(*rest))
    chain = rule(lambda p, x: p.sigmoid(p.tanh(x)), lambda m: m["x"].graph.emit(_zeros(m["x"])))
    after, report = rewritten(graph, ONCE, chain, check=False)
    assert not report.refusals
    assert opcodes(after).count("relu") == 1


def test_a_deep_pattern_is_found_when_its_far_end_appears() -> None:
    """The rule below makes the relu that a pattern three nodes up waits for."""
    up = rule(lambda p, x: p.tanh(p.sigmoid(p.negate(p.relu(x)))), lambda m: tanh(m["x"]))
    low = rule(lambda p, x: p.exp(x), lambda m: relu(m["x"]))
    graph, x = matrix()
    top = tanh(sigmoid(-graph.emit(make("exp"), x)))
    graph.output("y", top)
    reordered = Report("rules")
    apply_rules(graph, [up, low], reordered)
    verify(graph)
    assert opcodes(graph) == ["tanh"]
    assert len(reordered.matches) == 2


def test_a_rule_that_never_ends_is_stopped_with_its_name() -> None:
    swap = rule(lambda p, x, y: p.add(x, y), lambda m: m["y"] + m["x"], name="swap")
    grow = rule(lambda p, x: p.tanh(x), lambda m: tanh(tanh(m["x"])), name="grow")
    still = rule(lambda p, x: p.relu(x), lambda m: m.outputs[0], name="still")
    graph, x = matrix()
    graph.output("y", tanh(relu(x)) + x)
    for endless in (swap, grow, still):
        with pytest.raises(GraphError, match=f"do not come to an end.*{endless.title}"):
            rewritten(graph, endless)


def test_a_rule_that_builds_on_what_it_replaces_is_stopped() -> None:
    loop = rule(lambda p, x: p.tanh(x), lambda m: relu(m.outputs[0]), name="loop")
    graph, x = matrix()
    graph.output("y", tanh(x))
    with pytest.raises(
        GraphError, match=r"rule loop: .*relu.* reads tanh, which is to be replaced"
    ):
        rewritten(graph, loop)


def test_a_rule_that_gives_too_few_results_is_stopped() -> None:
    half = rule(lambda p, x: (p.tanh(x), p.relu(x)), lambda m: m["x"], name="half")
    graph, x = matrix()
    graph.output("y", tanh(x) + relu(x))
    with pytest.raises(GraphError, match="rule half: expected 2 values, got 1"):
        rewritten(graph, half)


def test_a_result_of_another_type_is_stopped() -> None:
    graph, x = matrix()
    graph.output("y", tanh(dense(x, 3)))
    wrong = rule(lambda p, x: p.tanh(p.dense(x, p.any(), p.any())), lambda m: m["x"])
    with pytest.raises(GraphError, match="expected f32"):
        rewritten(graph, wrong, check=False)


def test_a_match_whose_result_is_an_output_is_rewritten() -> None:
    graph, x = matrix()
    y = relu(relu(x))
    graph.output("y", y)
    graph.output("again", y)
    after, _ = rewritten(graph, ONCE)
    assert after.outputs["y"] is after.outputs["again"]
    gone = rule(lambda p, x: p.relu(x), lambda m: m["x"])
    plain, _ = rewritten(after, gone, check=False)
    assert plain.outputs["y"] is plain.inputs["x"]


def test_the_first_rule_that_fits_is_taken() -> None:
    first = rule(lambda p, x: p.relu(x), lambda m: tanh(m["x"]))
    second = rule(lambda p, x: p.relu(x), lambda m: sigmoid(m["x"]))
    graph, x = matrix()
    graph.output("y", relu(x))
    assert opcodes(rewritten(graph, first, second, check=False)[0]) == ["tanh"]
    assert opcodes(rewritten(graph, second, first, check=False)[0]) == ["sigmoid"]


PAIR = rule(
    lambda p, a, b, c: (p.tanh(p.multiply(a, c)), p.sigmoid(p.multiply(b, c))),
    lambda m: (tanh(merge_sum(m["a"] * m["c"])), sigmoid(merge_sum(m["b"] * m["c"]))),
    name="pair",
)


def test_several_results_are_replaced_together() -> None:
    graph, x = matrix()
    c = graph.input("c", ("N", 4))
    u, v = tanh(x * c), sigmoid(relu(x) * c)
    graph.output("y", u + v)
    after, report = rewritten(graph, PAIR)
    assert opcodes(after).count("sum") == 2
    assert len(report.matches) == 1


def test_results_that_are_computed_from_each_other_are_refused() -> None:
    """Made together they would read themselves."""
    graph, x = matrix()
    c = graph.input("c", ("N", 4))
    u = tanh(x * c, name="first")
    graph.output("y", sigmoid(relu(u) * c))
    after, report = rewritten(graph, PAIR)
    assert opcodes(after) == opcodes(graph)
    (refusal,) = report.refusals
    assert refusal == ("first", "one of its results is computed from another, first")


def test_siblings_of_which_one_reads_another_are_refused() -> None:
    scaled = rule(
        lambda p, x: p.siblings("s", x, lambda p, x, y: p.multiply(x, y)),
        lambda m: tuple(p["x"] * p["y"] for p in m.each("s")),
    )
    graph, x = matrix()
    first = x * tanh(x)
    graph.output("y", x * sigmoid(first))
    _, report = rewritten(graph, scaled)
    assert not report.matches
    assert "computed from another" in report.refusals[0][1]


def test_merges_of_merges_become_one() -> None:
    """An n-ary rule, written once: sum(..., sum(...), ...) without the inner sum."""

    def splice(match: Match) -> Value:
        inner, outer = match.node("inner"), match.node("outer")
        terms = [v for v in outer.inputs if v is not inner.output]
        return outer.graph.emit(Sum(), *inner.inputs, *terms)

    flat = rule(_sum_of_sum, splice, check=_inner_once)
    graph, x = matrix()
    h = merge_sum(tanh(x), relu(x))
    for k in range(5):
        h = merge_sum(sigmoid(x), h) if k % 2 else merge_sum(h, -x)
    graph.output("y", h)
    after, report = rewritten(graph, flat)
    assert opcodes(after).count("sum") == 1
    assert len(report.matches) == 5


def _sum_of_sum(p):  # type: ignore[no-untyped-def]
    return p.sum(p.sum(p.others(), name="inner"), p.others(), name="outer")


def _inner_once(match: Match) -> str:
    inner = match.node("inner").output
    return "" if match.node("outer").inputs.count(inner) == 1 else "it comes twice"
