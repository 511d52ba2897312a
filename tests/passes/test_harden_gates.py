"""Learned gates become what inference reads, as numbers in the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import CLOSE, image_input, images
from click.testing import CliRunner
from gated_nets import TINY, gate_states, scored

from branchgraph.cli import main
from branchgraph.compiler import compile
from branchgraph.ir import gates
from branchgraph.ir.builder import conv, gate, global_average_pool, weighted_sum
from branchgraph.ir.errors import RefusalError
from branchgraph.ir.file import save
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.elementwise import cast
from branchgraph.ir.ops.reduce import ReduceSum
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.ir.verify import declared_ops
from branchgraph.nets.connectivity import (
    branch_connect,
    connectivity,
    masked_resnet,
    masked_resnext,
)
from branchgraph.passes.constant_arrays import KnownArrays, write
from branchgraph.passes.harden_gates import HardenGates, harden
from branchgraph.passes.pipeline import pipeline
from branchgraph.passes.specialise import specialise

SCORES = np.array([0.4, 0.25, -3.0, 0.1, 2.5], np.float32)

BEFORE = """\
graph small {
  state r : f32[3] gate init=zeros()
  input x : f32[N, 3]
  %0 = full() {value=0.5, shape=[], dtype=f32} : f32[]
  %1 = compare(r, %0) {relation="greater"} : bool[3]
  %2 = cast(%1) {dtype=f32} : f32[3]
  %3 = straight_through(%2, r) : f32[3]
  %4 = select(x, %3) : f32[N, 3]
  output y = %4
}
"""
AFTER = """\
graph small {
  input x : f32[N, 3]
  %0 = full() {value=0.0, shape=[1], dtype=f32} : f32[1]
  %1 = full() {value=1.0, shape=[2], dtype=f32} : f32[2]
  %2 = concat(%0, %1) {axis=0} : f32[3]
  %3 = select(x, %2) : f32[N, 3]
  output y = %3
}
"""


def test_the_rewrite_as_text() -> None:
    graph = Graph("small")
    x = graph.input("x", ("N", 3))
    score = State("r", (3,), role=Role.GATE)
    graph.output("y", gate(x, gates.hard(graph.read(score))))
    assert format_graph(graph) == BEFORE
    hardened = harden(graph, Store({score: np.array([0.1, 0.7, 0.9])}))
    assert format_graph(graph) == BEFORE
    assert format_graph(hardened) == AFTER


KINDS = {
    "hard": gates.hard,
    "top_k": lambda s: gates.top_k(s, 2),
    "sigmoid": gates.sigmoid,
    "softmax": gates.softmax,
    "hard_concrete": gates.hard_concrete,
    "gumbel": lambda s: gates.gumbel(s, s.graph.input("temperature", (), DType.F32, 1.0)),
    "hard gumbel": lambda s: gates.gumbel(
        s, s.graph.input("temperature", (), DType.F32, 1.0), hard=True
    ),
    "itself": lambda s: s,
}


def gated(kind: str) -> tuple[Graph, Store]:
    graph = Graph("gated")
    x = graph.input("x", ("N", 5))
    state = State("score", (5,), role=Role.GATE)
    graph.output("y", gate(x, KINDS[kind](graph.read(state))))
    return graph, Store({state: SCORES})


def y(graph: Graph, store: Store) -> np.ndarray:
    return compile(graph, store=store)(x=np.ones((2, 5), np.float32))["y"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_what_inference_computes(kind: str) -> None:
    graph, store = gated(kind)
    result = HardenGates().run(graph, values=store)
    assert result.report.matches == ["score"]
    np.testing.assert_array_equal(y(result.graph, Store()), y(graph, store))
    assert not gate_states(result.graph)
    assert not declared_ops(result.graph)
    assert structural_hash(parse_graph(format_graph(result.graph))) == structural_hash(result.graph)
    again = HardenGates().run(result.graph)
    assert not again.report.matches
    assert structural_hash(again.graph) == structural_hash(result.graph)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("sigmoid", {"threshold": 0.5}, [1, 1, 0, 1, 1]),
        ("hard_concrete", {}, [None, None, 0, None, 1]),
        ("softmax", {"one_hot": True}, [0, 0, 0, 0, 1]),
        ("softmax", {"threshold": 0.1}, [0, 0, 0, 0, 1]),
        ("top_k", {"threshold": 0.5}, [1, 0, 0, 0, 1]),
    ],
)
def test_soft_gates_harden_on_request(kind: str, options: dict, expected: list) -> None:
    graph, store = gated(kind)
    found = y(HardenGates(**options).apply(graph, store), Store())[0]
    for number, wanted in zip(found, expected):
        assert number == wanted if wanted is not None else 0 < number < 1


def test_masks_become_one_number_an_edge() -> None:
    graph = masked_resnext(**TINY, k=2)
    store = scored(graph)
    result = HardenGates().run(graph, values=store)
    assert result.report.notes == ["32 gates: 16 closed, 16 open, 0 in between"]
    assert result.report.matches == ["module2/mask.score", "module3/mask.score"]
    found: dict[str, list[int]] = {}
    known = KnownArrays(result.graph.nodes)
    for node in result.graph.nodes:
        if node.op.opcode == "select" and known.get(node.inputs[1]) == 1:
            found.setdefault(node.path.rpartition("/")[0], []).append(int(node.name[4:]))
    expected = connectivity(graph, store)
    assert found == {
        f"{m}/block{j}": row for m, rows in expected.items() for j, row in enumerate(rows)
    }


@pytest.mark.parametrize("net", [masked_resnet(8, k=2, size=8), branch_connect(size=8)], ids=str)
def test_inference_computes_the_same(net: Graph) -> None:
    store = scored(net)
    x = images(2, 3, 8)
    results = [compile(g, store=store)(x=x)["logits"] for g in (net, harden(net, store))]
    np.testing.assert_array_equal(*results)


def test_weights_of_a_sum_are_gates_too() -> None:
    graph = Graph("mixed")
    x = image_input(graph, 4)
    score = State("mix", (2,), role=Role.GATE)
    share = gates.softmax(graph.read(score))
    weights = [graph.emit(Slice(axis=0, start=i, size=1), share) for i in range(2)]
    graph.output("y", weighted_sum((x, conv(x, 4, 1)), weights))
    store = Store.initialised(graph.states)
    hardened = HardenGates(one_hot=True).apply(graph, store)
    np.testing.assert_allclose(
        compile(hardened, store=store)(x=images(channels=4))["y"], images(channels=4), **CLOSE
    )


# -- refusals --------------------------------------------------------------------------------------


def test_scores_must_be_given() -> None:
    with pytest.raises(RefusalError, match="needs the values of the scores"):
        HardenGates().apply(gated("hard")[0])
    graph = Graph("none")
    graph.output("y", image_input(graph))
    assert not HardenGates().run(graph).report.matches


def test_gates_of_each_sample_keep_reading_it_with_fixed_scores() -> None:
    graph = Graph("samples")
    pooled = global_average_pool(image_input(graph, 4))
    score = State("r", (4,), role=Role.GATE)
    graph.output("y", gate(pooled, gates.hard(pooled + graph.read(score), 0.0), name="skip"))
    store = Store({score: np.array([-9.0, 0.0, 0.0, 9.0])})
    hardened = harden(graph, store)
    assert not hardened.states
    results = [compile(g, store=store)(x=images(channels=4))["y"] for g in (graph, hardened)]
    np.testing.assert_array_equal(*results)
    assert results[0].any(axis=0).tolist() == [False, True, True, True]


def test_a_graph_that_trains_its_scores_is_refused() -> None:
    graph, _ = gated("sigmoid")
    loss = graph.emit(ReduceSum(axes=(0, 1)), graph.outputs["y"])
    graph.keep(output=lambda name: False)
    graph.output("loss", loss)
    trained = differentiate(specialise(graph, training=True))
    report = HardenGates().run(trained).report
    assert report.refusals == [("score", "the graph trains it; harden the declared graph")]


def test_gates_that_are_not_finite_are_refused() -> None:
    graph, store = gated("sigmoid")
    (score,) = gate_states(graph)
    store[score] = SCORES * np.nan
    with pytest.raises(RefusalError, match="is not finite"):
        harden(graph, store)


def test_gates_of_several_low_types_are_counted_together() -> None:
    """As they are when a network was cast twice: float16 and bfloat16 promote to no common type."""
    graph = Graph("two types")
    h, store = graph.input("x", ("N", 3)), Store()
    for k, low in enumerate((DType.F16, DType.BF16)):
        score = State(f"s{k}", (3,), role=Role.GATE)
        h = cast(gate(cast(h, low), cast(gates.hard(graph.read(score)), low)), DType.F32)
        store[score] = np.array([0.1, 0.9, 0.9])
    graph.output("y", h)
    result = HardenGates().run(graph, values=store)
    assert result.report.notes == ["6 gates: 2 closed, 4 open, 0 in between"]
    ones = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(
        interpret(result.graph, {"x": ones}).outputs["y"], ones * [0.0, 1.0, 1.0]
    )


# -- arrays in graphs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array", [np.zeros(()), np.ones((1, 1)), np.eye(3), np.array([1.0, 1.0, 0.1]), SCORES * 1e-7]
)
def test_arrays_are_read_as_they_were_written(array: np.ndarray) -> None:
    graph = Graph("arrays")
    value: Value = write(graph, array.astype(np.float32), DType.F32)
    found = KnownArrays(graph.nodes).get(value)
    assert found is not None
    assert found.shape == array.shape
    np.testing.assert_array_equal(found, array.astype(np.float32))


# -- the command line ------------------------------------------------------------------------------


def test_files_with_values_harden_and_prune_on_the_command_line(tmp_path: Path) -> None:
    graph = masked_resnext(**TINY, k=1)
    save(tmp_path / "net.bg", graph, scored(graph))
    arguments = ["show", str(tmp_path / "net.bg"), "--pass", "harden_gates", "--pass"]
    shown = CliRunner().invoke(main, [*arguments, "prune_gates"])
    assert shown.exit_code == 0, shown.output
    assert "24 closed, 8 open" in shown.output
    assert "branches removed" in shown.output
    spec = "masked_resnext:depth=11,width=1,cardinality=4"
    refused = CliRunner().invoke(main, ["show", spec, "--pass", "harden_gates"])
    assert refused.exit_code == 2
    assert "give a .bg file" in refused.output


def test_pipelines_hand_the_values_on() -> None:
    graph = masked_resnext(**TINY, k=1)
    both = pipeline("harden_gates", "prune_gates", verify=True)
    pruned = both.apply(graph, scored(graph))
    assert len(pruned.branches()) < len(graph.branches())


def test_a_gate_that_is_not_finite_is_refused_without_a_warning() -> None:
    graph = Graph("endless")
    x = graph.input("x", ("N", 4))
    score = graph.read(State("s", (4,), role=Role.GATE))
    graph.output("y", gate(x, score / (score * 0.0)))
    with pytest.raises(RefusalError, match="is not finite under the given scores"):
        HardenGates().apply(graph, values=Store.initialised(graph.states))
