"""A pass that breaks its claim is caught, at the place where it breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from builders import branches_of_every_kind, image_input, random_graphs
from hypothesis import given, settings

from branchgraph.ir.builder import (
    batch_norm,
    conv,
    dense,
    dropout,
    gate,
    global_average_pool,
    merge_sum,
    relu,
    reshape,
    sigmoid,
    tanh,
)
from branchgraph.ir.errors import ClaimError
from branchgraph.ir.graph import Graph, Value, scope
from branchgraph.ir.match import Match, Pattern
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import Clip
from branchgraph.ir.rebuild import clone
from branchgraph.ir.state import Role, State
from branchgraph.ir.types import DType
from branchgraph.passes.base import Claim, Pass, Report
from branchgraph.passes.checking import check_claim, difference
from branchgraph.passes.clean import Canonical
from branchgraph.passes.rewriting import Rule, RulePass


def of(build: Callable[[Value], Value]) -> Graph:
    graph = Graph("g")
    graph.output("y", build(graph.input("x", ("N", 4))))
    return graph


def differs(before: Graph, after: Graph, claim: Claim = "exact") -> str:
    with pytest.raises(ClaimError) as caught:
        check_claim(before, after, claim)
    return str(caught.value)


def test_equal_graphs_keep_every_claim() -> None:
    graph = branches_of_every_kind()
    for claim in ("equal", "exact", "different"):
        check_claim(graph, clone(graph), claim)  # type: ignore[arg-type]


def test_nothing_is_compared_where_nothing_is_claimed() -> None:
    check_claim(of(relu), of(tanh), "different")


def test_another_order_of_additions_is_exact_but_not_equal() -> None:
    left, right = of(lambda x: (x + 0.1) + 0.7), of(lambda x: x + (x * 0.0 + 0.1 + 0.7))
    check_claim(left, right, "exact")
    assert "claimed equal, but output 'y' differs by" in differs(left, right, "equal")


def test_what_is_not_the_same_function_is_not_exact() -> None:
    assert "claimed exact" in differs(of(lambda x: x * 1.000001), of(lambda x: x))


ONE, NAN, INF = np.array([1.0, 2.0]), np.array([1.0, np.nan]), np.array([1.0, np.inf])
CASES = {
    "same": (ONE, ONE, 0, 0),
    "rounding": (ONE, ONE + 1e-12, 1e-12, 0),
    "small beside the largest": (np.array([1e-9, 1e6]), np.array([2e-9, 1e6]), 1e-9, 0),
    "small beside one": (np.array([1e-8]), np.array([3e-8]), 2e-8, 2e-8),
    "sign of zero": (np.array([0.0]), np.array([-0.0]), 0, 0),
    "NaN in the same place": (NAN, NAN.copy(), 0, 0),
    "NaN in another place": (NAN, NAN[::-1], np.inf, np.inf),
    "NaN that went": (NAN, ONE, np.inf, np.inf),
    "NaN that came": (ONE, NAN, np.inf, np.inf),
    "infinity": (INF, INF.copy(), 0, 0),
    "infinity of the other sign": (INF, np.array([1.0, -np.inf]), np.inf, np.inf),
    "infinity that went": (INF, ONE, np.inf, np.inf),
    "infinity beside rounding": (INF, INF + [1e-12, 0], 1e-12, 0),
    "shape": (ONE, ONE[:1], np.inf, np.inf),
    "shape that broadcasts": (ONE[:1], np.array([[1.0]]), np.inf, np.inf),
    "bool": (np.array([True]), np.array([False]), 1, 1),
    "empty": (np.zeros((0, 2)), np.zeros((0, 2)), 0, 0),
    "integers": (np.array([2**40]), np.array([2**40 + 1]), 1, 0),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_difference_of_two_arrays(kind: str) -> None:
    a, b, equal, exact = CASES[kind]
    assert difference(a, b, "equal") == pytest.approx(equal, rel=0.01)
    assert difference(a, b, "exact") == pytest.approx(exact, rel=0.01)


def test_a_zero_that_ignores_nan_is_not_equal() -> None:
    """x 0 is 0 for every number, and NaN for NaN: exact over the reals, but not equal."""
    before = of(lambda x: x * 0.0)
    after = of(lambda x: x.graph.emit(make("full", value=0.0, shape=x.shape, dtype=x.dtype)))
    check_claim(before, after, "exact")
    assert "fed NaN and infinities" in differs(before, after, "equal")


def test_the_sign_of_zero_is_free() -> None:
    check_claim(of(lambda x: relu(x) * 0.0 + 0.0), of(lambda x: relu(x) * 0.0), "equal")


def test_the_first_node_that_differs_is_named() -> None:
    def net(wrong: bool) -> Graph:
        graph = Graph("g")
        h = graph.input("x", ("N", 4))
        with scope("block"):
            h = tanh(h, name="first")
            h = (relu if wrong else sigmoid)(h, name="second")
        graph.output("y", dense(h, 2, name="last"))
        return graph

    before, after = net(False), net(True)
    states = {s.name: s for s in before.states}
    for old in after.states:
        after.replace(after.read(old), after.read(states[old.name]))
    assert "the first value to differ is block/second" in differs(before, after)


def test_an_output_that_is_gone_or_of_another_shape() -> None:
    two = of(relu)
    two.output("z", two.outputs["y"] * 2.0)
    assert "output 'z', which is gone" in differs(two, of(relu))
    flat = of(lambda x: reshape(x, (x.shape[0] * 4,)))
    assert "output 'y' differs by inf" in differs(of(lambda x: x), flat)


def counted(step: Callable[[Value], Value] | None, state: State) -> Graph:
    graph = of(lambda x: x * x.graph.read(state))
    if step is not None:
        graph.update(state, step(graph.read(state)))
    return graph


def test_updates_are_compared() -> None:
    state = State("count", ())
    up = counted(lambda v: v + 1.0, state)
    check_claim(up, clone(up), "equal")
    assert "the update of count differs" in differs(up, counted(lambda v: v + 2.0, state))
    assert "the update of count, which is gone" in differs(up, counted(None, state))
    assert "the update of count, which is new" in differs(counted(None, state), up)


def test_an_update_may_go_with_its_state() -> None:
    state = State("count", ())
    up = counted(lambda v: v + 1.0, state)
    before = clone(up)
    before.keep(output=lambda name: False)
    before.output("y", before.inputs["x"])
    check_claim(before, of(lambda x: x), "equal")


def test_gradients_are_compared() -> None:
    state = State("w", (4,))
    graphs = []
    for factor in (1.0, 2.0):
        graph = of(lambda x: x * x.graph.read(state))
        graph.set_gradient(state, graph.read(state) * factor)
        graphs.append(graph)
    assert "the gradient of w differs" in differs(*graphs)


def test_equal_claims_hold_in_training_too() -> None:
    """A dropout that is left out changes nothing in inference."""
    before, after = of(lambda x: dropout(x, 0.5)), of(lambda x: x)
    check_claim(before, after, "exact")
    assert "the whole in training: claimed equal" in differs(before, after, "equal")


def test_running_statistics_are_part_of_the_training_form() -> None:
    graph = Graph("g")
    graph.output("y", batch_norm(image_input(graph)))
    (node,) = graph.nodes
    slower = Graph("g")
    inputs = [slower.read(v.state) for v in node.inputs[1:] if v.state]
    op = make("batch_norm", eps=node.op.attributes()["eps"], decay=0.5)
    slower.output("y", slower.emit(op, image_input(slower), *inputs))
    check_claim(graph, slower, "exact")
    assert "the update of batch_norm.running_mean differs" in differs(graph, slower, "equal")


@pytest.mark.parametrize("seed", [0, 1])
def test_sizes_that_no_input_carries_are_given(seed: int) -> None:
    def filled(value: float) -> Graph:
        graph = Graph("g")
        graph.output("y", graph.emit(make("full", value=value, shape=("M", 2), dtype="f32")))
        return graph

    check_claim(filled(1.0), filled(1.0), "equal", seed=seed)
    assert "differs" in differs(filled(1.0), filled(2.0))


def test_sizes_of_inputs_are_bound_together() -> None:
    def dot(scale: float) -> Graph:
        graph = Graph("g")
        a, b = graph.input("a", ("N", "K")), graph.input("b", ("2*K+1", "N"))
        graph.output("y", graph.emit(make("matmul"), b, a) * scale)
        return graph

    check_claim(dot(1.0), dot(1.0), "equal")
    assert "differs" in differs(dot(1.0), dot(3.0))


# -- regions ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong(RulePass, claim="exact"):
    """tanh -> sigmoid, which is wrong wherever it shows."""

    @property
    def name(self) -> str:
        return "wrong"

    def rules(self) -> list[Rule]:
        return [Rule(Pattern(lambda p, x: p.tanh(x)), _sigmoid)]


def _sigmoid(match: Match) -> Value:
    return sigmoid(match["x"])


HIDING: dict[str, Callable[[Value], Value]] = {
    "multiplied by zero": lambda h: h * 0.0,
    "closed by a gate": lambda h: gate(h, h.graph.constant(0.0)),
    "clipped": lambda h: h.graph.emit(Clip(low=5.0, high=6.0), h),
    "never read": lambda h: h.graph.inputs["x"],
}


@pytest.mark.parametrize("kind", HIDING)
def test_a_part_is_caught_by_itself_when_the_whole_hides_it(kind: str) -> None:
    def hidden(x: Value) -> Value:
        with scope("deep"):
            return HIDING[kind](tanh(relu(x), name="culprit"))

    graph = of(hidden)
    result = Wrong().run(graph, record=True)
    check_claim(graph, result.graph, "exact")  # the whole is the same function
    with pytest.raises(ClaimError, match="the part rewritten at deep/culprit: claimed exact"):
        check_claim(graph, result.graph, "exact", report=result.report)


def test_regions_are_recorded_only_when_asked_for() -> None:
    assert Wrong().run(of(tanh)).report.regions == []


def test_a_region_is_cut_where_new_nodes_read_old_ones() -> None:
    (region,) = Wrong().run(of(lambda x: tanh(relu(relu(x)))), record=True).report.regions
    assert [n.op.opcode for n in region.before.nodes] == ["tanh"]
    assert [n.op.opcode for n in region.after.nodes] == ["sigmoid"]
    assert list(region.before.inputs) == list(region.after.inputs) == ["x0"]


def test_values_that_depend_on_each_other_are_not_fed_apart() -> None:
    """The new node reads x and relu(x), which must go on belonging together."""
    before = of(lambda x: relu(x) * 2.0)
    after = clone(before)
    known = frozenset(after.nodes)
    x, y = after.inputs["x"], after.outputs["y"]
    h = next(n.output for n in after.nodes if n.op.opcode == "relu")
    new = h + merge_sum(h, x) - x
    report = Report("r", known=known)
    report.matched("y", before=[y], after=[new])
    after.replace(y, new)
    check_claim(before, after, "exact", report=report)


def test_a_region_through_a_declared_op_is_specialised() -> None:
    graph = Graph("g")
    h = batch_norm(conv(image_input(graph), 4, 3))
    graph.output("y", tanh(global_average_pool(h)))
    report = Report("r", known=frozenset())
    report.matched("y", before=[graph.outputs["y"]], after=[graph.outputs["y"]])
    check_claim(graph, graph, "equal", report=report)


def test_gates_and_states_are_at_no_special_value() -> None:
    """A rule that takes a gate to be open is wrong, and seen to be, although gates start at 1."""
    state = State("gate", (4,), role=Role.GATE)
    assert "differs" in differs(
        of(lambda x: gate(x, x.graph.read(state))), of(lambda x: x + x.graph.read(state) * 0.0)
    )


def test_float32_graphs_are_compared_in_float64() -> None:
    before = of(lambda x: x.graph.emit(make("cast", dtype=DType.F16), x))
    after = of(lambda x: x.graph.emit(make("cast", dtype=DType.F16), (x + 1e-3) - 1e-3))
    check_claim(before, after, "exact")


@settings(max_examples=15, deadline=None)
@given(random_graphs())
def test_canonical_form_of_random_networks_is_equal(graph: Graph) -> None:
    step: Pass = Canonical()
    result = step.run(graph, record=True)
    check_claim(graph, result.graph, "equal", report=result.report)
