"""The comparison with peers: what runs without any peer. Times are never asserted."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from branchgraph.compiler import compile as compile_graph
from branchgraph.ir.builder import conv, max_pool
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compare
import compare_exits
import make_peers
import suite
from peers import agreement, torch_ops
from peers.client import environment
from peers.declared import make_cell, network_of
from peers.express import SOURCES, express, source
from peers.geometry import Pool
from peers.report import Row, Run, merge, table
from peers.tables import Found, ratio_to, reached, summary, tables
from peers.walker import Call, NotExpressible, steps, write

NETWORKS = ("lenet", "resnet:depth=20", "cross:depth=26", "cnn:branches=4")
cell_of = lru_cache(make_cell)


def _by_evaluation(graph: Graph):
    """A table that writes every op as its own `evaluate`, and the ops it numbers."""
    ops = []

    def call(c: Call) -> str:
        ops.append(c.op)
        text = f"ops[{len(ops) - 1}].evaluate({', '.join(c.args)})"
        return text if len(c.step.outputs) > 1 else f"{text}[0]"

    return {step.opcode: call for step in steps(graph)}, ops


# -- sources ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("peer", SOURCES)
def test_every_peer_has_words_for_the_suite(peer, mode):
    for spec in NETWORKS:
        text = source(cell_of(spec, mode, 2), peer)
        compile(text, f"{peer}.py", "exec")
        assert "def forward(p" in text


@pytest.mark.parametrize("spec", ["lenet", "cnn:branches=4", "cross:depth=26"])
def test_written_source_computes_what_the_graph_does(spec):
    cell = cell_of(spec, "infer", 2)
    words, ops = _by_evaluation(cell.graph)
    text = write(cell.graph, words, "numpy", states=cell.params, header="import numpy as np")
    bound = {"ops": ops}
    exec(text, bound)
    result = bound["forward"]([cell.store[s] for s in cell.params], **cell.inputs)
    result = result if isinstance(result, tuple) else (result,)
    expected = interpret(cell.graph, cell.inputs, cell.store).outputs.values()
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_name_is_used_again_when_its_value_is_dead():
    text = source(cell_of("lenet", "infer", 1), "torch")
    assert "h1" in text
    assert "h2" not in text


def test_training_source_is_the_declared_network_with_its_loss():
    text = source(cell_of("resnet:depth=20", "train", 2), "torch")
    assert "True, 0.1, 2e-05)" in text  # batch statistics and the running rule
    assert text.count("F.cross_entropy") == 1


def test_weights_of_exits_at_one_are_no_multiplication():
    text = source(cell_of("b_lenet", "train", 2), "torch")
    assert text.count("F.cross_entropy") == 2
    assert "*" not in text


@pytest.mark.parametrize("peer", SOURCES)
def test_learned_gates_have_words_in_every_peer(peer):
    cell = cell_of("masked_resnext:depth=11", "train", 2)
    opcodes = {step.opcode for step in steps(cell.graph)}
    assert opcodes >= {"noise", "compare", "where", "top_k", "straight_through", "select"}
    compile(source(cell, peer), f"{peer}.py", "exec")


def test_rows_behind_an_exit_need_a_peer_with_dynamic_shapes():
    cell = cell_of("b_lenet", "infer", 4)
    assert "[h" in source(cell, "torch")
    assert "scatter(h" in source(cell, "chainer")
    for peer in ("jax", "mxnet"):
        with pytest.raises(NotExpressible, match=f"not expressible in {peer}: rows behind an exit"):
            source(cell, peer)


def test_an_op_without_words_names_op_and_peer():
    cell = cell_of("lenet", "infer", 1)
    words = {k: v for k, v in torch_ops.TABLE.items() if k != "max_pool"}
    with pytest.raises(NotExpressible, match="not expressible in torch: .* 'max_pool'"):
        write(cell.graph, words, "torch", states=cell.params, header="")


@pytest.mark.parametrize("cover_all", [False, True])
@pytest.mark.parametrize(("size", "kernel", "stride", "pad"), [
    (6, 2, 2, 0), (7, 2, 2, 0), (7, 3, 2, 1), (8, 3, 2, 1), (5, 3, 1, 1), (9, 2, 3, 1),
])  # fmt: skip
def test_pools_are_said_as_libraries_say_them(size, kernel, stride, pad, cover_all):
    graph = Graph()
    x = graph.input("x", (1, 1, size, size))
    y = max_pool(x, kernel, stride=stride, pad=pad, cover_all=cover_all)
    graph.output("y", y)
    pool = Pool.of(Call(steps(graph)[0], ["x"], [-1]))
    out = y.shape[2]
    floor = (size + 2 * pad - kernel) // stride + 1
    ceil = -(-(size + 2 * pad - kernel) // stride) + 1
    assert not pool.plain or out == floor
    assert not pool.ceil or out == ceil
    assert size + pool.begin[0] + pool.end[0] >= (out - 1) * stride + kernel


def test_uneven_padding_is_a_step_of_its_own():
    graph = Graph()
    x = graph.input("x", (1, 1, 6, 6))
    graph.output("y", conv(x, 2, 2, pad=(0, 0, 1, 1), bias=False, name="c"))
    states = graph.states
    text = write(graph, torch_ops.TABLE, "torch", states=states, header="")
    assert "F.conv2d(F.pad(x, (0, 1, 0, 1)), p[0], None, 1, 0)" in text


@pytest.mark.parametrize(("spec", "outputs"), [
    ("lenet", ["logits"]), ("b_lenet", ["logits", "exit"]),
])  # fmt: skip
def test_the_onnx_model_has_the_names_of_the_graph(tmp_path, spec, outputs):
    onnx = pytest.importorskip("onnx")
    express(cell_of(spec, "infer", 2), tmp_path, {"mode": "infer"})
    model = onnx.load(tmp_path / "model.onnx")
    assert [v.name for v in model.graph.input] == ["x"]
    assert [v.name for v in model.graph.output] == outputs


# -- agreement -------------------------------------------------------------------------------------


def test_differences_are_relative_and_shapes_count():
    a, b = [np.float32([1, 2])], [np.float32([1, 4])]
    assert agreement.outputs_difference(a, b) == 0.5
    assert agreement.outputs_difference(a, [np.float32([1])]) == float("inf")
    assert agreement.outputs_difference([np.float32([np.nan])], [np.float32([1])]) == float("inf")
    assert agreement.outputs_difference([np.array([0, 1])], [np.array([0, 0])]) == 0.5
    assert agreement.losses_difference([1.0, 3.0], [1.0, 2.0]) == 0.5


def test_steps_are_compared_by_what_they_added():
    start = [np.full(2, 100.0), np.zeros(1)]
    moved = [np.array([101.0, 100.0]), np.zeros(1)]
    assert agreement.steps_difference(start, moved, moved) == 0.0
    assert agreement.steps_difference(start, start, moved) == 1.0
    noise = [moved[0], np.full(1, 1e-7)]
    assert agreement.steps_difference(start, noise, moved) < 1e-4


# -- the command line and its results --------------------------------------------------------------


def test_specifications_keep_their_own_commas():
    text = "lenet,masked_resnext:depth=20,width=4,cardinality=8,resnet:depth=20"
    assert compare.networks(text) == [
        "lenet",
        "masked_resnext:depth=20,width=4,cardinality=8",
        "resnet:depth=20",
    ]
    assert network_of("pd_a_resnet18@specialise@fuse_branches:rules=R1+R3") == (
        "pd_a_resnet18", ("specialise", "fuse_branches:rules=R1+R3"),
    )  # fmt: skip


def test_an_unknown_peer_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        compare.parse(["--peers", "torch,caffe"])
    assert "no peer 'caffe'; there are: torch" in capsys.readouterr().err


def test_all_libraries_get_the_same_number_of_threads():
    found = environment({"PATH": "here"}, 3)
    assert found["OMP_NUM_THREADS"] == found["OPENBLAS_NUM_THREADS"] == "3"
    assert found["PATH"] == "here"


def run_of(ours, torch, jax=None, gflops=100.0, **more):
    """A run of LeNet; times in seconds, None for a system that is left out."""
    times = {"branchgraph": ours, "torch": torch, "jax": jax}
    rows = [Row("lenet", "infer", 1, s, t, **more) for s, t in times.items() if t is not None]
    return Run(rows, gflops)


def test_the_table_has_ratios_bounds_and_errors():
    rows = [
        Row("lenet", "infer", 1, "branchgraph", [0.001, 0.002, 0.006], 5.0, 1e-7, compile_s=0.1),
        Row("lenet", "infer", 1, "torch", [0.008], 20.0),
        Row("lenet", "infer", 1, "jax", error="no jax"),
    ]
    lines = table(merge([Run(rows, 100.0)], 50_000_000)).splitlines()
    cells = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    assert cells[2][3:] == [
        "branchgraph", "2.000", "1.000", "0.250", "0.250", "0.250", "2.00", "5", "1.0e-07", "0.1",
    ]  # fmt: skip
    assert cells[3][6] == "1.000"
    assert cells[4][4] == "no jax"
    assert len({len(c) for c in cells}) == 1


def test_ratios_are_taken_within_runs_and_times_over_them():
    """The second run was twice as slow for both; the third for PyTorch alone."""
    runs = [run_of([0.2], [1.0]), run_of([0.4, 0.6, 0.1], [2.0]), run_of([0.2], [2.0])]
    ours, torch = merge(runs, 10_000_000_000)
    assert ours.runs == pytest.approx((200, 400, 200))
    assert (ours.median_ms, ours.min_ms) == pytest.approx((200, 100))
    assert (ours.ratio, ours.ratio_low, ours.ratio_high) == pytest.approx((0.2, 0.1, 0.2))
    assert ours.bound_multiple == pytest.approx(1.0)
    assert (torch.ratio_low, torch.ratio_high) == (1.0, 1.0)


def test_a_system_of_the_first_run_only_is_compared_with_that_run():
    runs = [run_of([0.2], [1.0], jax=[0.5], peak_mb=7.0), run_of([0.1], [2.0])]
    ours, _, jax = merge(runs, 1)
    assert jax.runs == (500, None)
    assert (jax.ratio, jax.ratio_high, jax.median_ms) == (0.5, 0.5, 500)
    assert ours.peak_mb == 7.0


def test_an_error_in_any_run_is_the_systems():
    late = Run([Row("lenet", "infer", 1, "branchgraph", [0.1], error="it ended")], None)
    ours, torch = merge([run_of([0.1], [1.0]), late], 1)
    assert (ours.error, ours.median_ms, ours.ratio) == ("it ended", None, None)
    assert (torch.runs, torch.error) == ((1000, None), "")
    assert ours.as_json() == {
        "net": "lenet", "mode": "infer", "batch": 1, "system": "branchgraph",
        "median_ms": None, "min_ms": None, "peak_mb": None, "error": "it ended",
    }  # fmt: skip


def test_later_runs_measure_what_is_left_in_fresh_processes():
    options = compare.Options(
        ("branchgraph", "mxnet", "chainer"), "numpy", 1, 1, 0.001, False, True, 1e9, "no/python"
    )
    done = list(compare.measured(cell_of("lenet", "infer", 2), options, 2, ("chainer",)))[-1]
    assert [[row.system for row in run.rows] for run in done] == [
        ["branchgraph", "mxnet", "chainer"], ["branchgraph"],
    ]  # fmt: skip
    first, second = (run.rows[0] for run in done)
    assert first.difference < 1e-5
    assert second.difference is None
    assert first.times
    assert second.times


# -- the suite -------------------------------------------------------------------------------------


def found_of(runs, target=0.1, macs=10_000_000, **more):
    content = {"rows": [s.as_json() for s in merge(runs, macs)], **more}
    return Found("LeNet", "infer", 1, target, content)


def test_every_target_is_a_cell_of_the_suite():
    targets = suite.chosen_cells("*", targets=True)
    assert len(targets) == 24
    assert suite.cells()[:24] == targets
    names = [cell.name for cell in suite.cells()]
    assert len(set(names)) == len(names)
    assert [c.name for c in suite.chosen_cells("resnet-depth-20.train.*", targets=True)] == [
        "resnet-depth-20.train.b8", "resnet-depth-20.train.b64",
    ]  # fmt: skip


def test_a_target_is_reached_within_five_percent():
    assert reached(0.1, 0.1) == "yes"
    assert reached(0.105, 0.1) == "within 5 %"
    assert reached(0.106, 0.1) == "no"
    assert reached(0.1, None) == reached(None, 0.1) == "-"


def test_the_closest_peer_is_the_one_we_are_least_ahead_of():
    found = found_of([
        run_of([0.002], [0.010], jax=[0.004], peak_mb=9.0, compile_s=0.3), run_of([0.001], [0.002])
    ])  # fmt: skip
    assert ratio_to(found, "jax") == pytest.approx(0.5)
    assert ratio_to(found, "torch") == pytest.approx(0.35)
    assert ratio_to(found, "mxnet") is None
    assert summary(found) == [
        "LeNet", "1", "1.5", "0.35 (0.20 to 0.50)", "≤ 0.10", "no", "jax 0.50", "7.50",
        "9 / 9", "0.3 / -",
    ]  # fmt: skip


def test_tables_name_what_failed_and_leave_holes():
    errors = {"jax": "no jax", "openvino": "openvino does not train"}
    rows = [Row("lenet", "infer", 1, system, error=error) for system, error in errors.items()]
    failed = Run([*run_of([0.1], [1.0]).rows, *rows], 1.0)
    stopped = Found("LeNet", "train", 64, 0.5, {"rows": [], "failure": "stopped after 9 s"})
    text = tables([found_of([failed]), stopped])
    assert "- LeNet, inference, batch 1: jax: no jax" in text
    assert "- LeNet, training step, batch 64: stopped after 9 s" in text
    assert "openvino" not in text
    assert "| LeNet | 64 | - | - | ≤ 0.50 | - | - | - | - / - | - / - |" in text


def test_a_measured_cell_is_not_measured_again_and_a_stopped_one_says_so(tmp_path, monkeypatch):
    cell = suite.chosen_cells("lenet.infer.b1", targets=True)[0]
    asked = []

    def slow(command, limit):
        asked.append(command)
        return f"stopped after {limit:.0f} s"

    monkeypatch.setattr(suite, "run", slow)
    assert suite.measure(cell, tmp_path, ["--runs", "5"], 9) == "stopped after 9 s"
    assert suite.measure(cell, tmp_path, ["--runs", "5"], 9) == "is there"
    assert len(asked) == 1
    (found,) = suite.read(tmp_path, suite.cells())
    assert found.content == {"rows": [], "failure": "stopped after 9 s"}


def test_a_command_that_takes_too_long_is_ended():
    assert suite.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.2).startswith("stop")
    assert suite.run([sys.executable, "-c", "raise SystemExit(3)"], 60) == "compare.py ended with 3"
    assert suite.run([sys.executable, "-c", ""], 60) == ""


def test_a_run_writes_its_rows_and_a_missing_peer_leaves_its_error(tmp_path, capsys):
    target = tmp_path / "rows.json"
    compare.main([
        "--net", "lenet", "--batch", "2", "--peers", "chainer,mxnet", "--backend", "numpy",
        "--threads", "1", "--rounds", "1", "--burst", "0.001", "--no-memory",
        "--legacy-python", str(tmp_path / "python"), "--json", str(target),
    ])  # fmt: skip
    found = json.loads(target.read_text())
    ours, chainer, mxnet = found["rows"]
    assert set(ours) >= {"net", "mode", "batch", "system", "median_ms", "min_ms", "peak_mb"}
    assert (ours["net"], ours["mode"], ours["batch"]) == ("lenet", "infer", 2)
    assert ours["system"] == "branchgraph"
    assert 0 < ours["difference"] < 1e-5  # from float64
    assert ours["min_ms"] > 0
    for row in (chainer, mxnet):
        assert row["median_ms"] is None
        assert "No such file" in row["error"]
    assert found["cells"][0]["macs"] == 2 * 1_140_070
    assert "| lenet | infer | 2 | branchgraph |" in capsys.readouterr().out


def test_a_backend_that_is_not_there_is_an_error_of_the_row(tmp_path, capsys):
    compare.main([
        "--net", "lenet", "--peers", "", "--backend", "abacus", "--threads", "1", "--rounds", "1",
        "--no-memory",
    ])  # fmt: skip
    assert "there is no backend 'abacus'" in capsys.readouterr().out


def test_exits_are_measured_beside_the_network_without_them():
    """Where nobody leaves all is computed; where all leave nothing is behind the cut."""
    cell = cell_of("b_lenet", "train", 2)
    rng = np.random.default_rng(0)
    images = rng.random((6, 1, 28, 28), dtype=np.float32)
    labels = rng.integers(0, 10, 6)
    stay, leave = (
        compare_exits.measure(
            cell.declared, cell.store, images, labels,
            batch=4, threshold=threshold, backend="numpy", rounds=1,
        )
        for threshold in (0.0, 10.0)
    )  # fmt: skip
    assert (stay.leaving, leave.leaving) == (0.0, 1.0)
    assert stay.lenet_accuracy == stay.accuracy
    assert stay.by_macs < 1 < leave.by_macs
    lines = compare_exits.table([stay, leave]).splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_two_early_exits_are_refused():
    with pytest.raises(GraphError, match="expected one early exit, it has 2"):
        compare_exits.Parts.of(cell_of("b_alexnet", "train", 1).declared)


def test_the_environments_are_pinned():
    lines = [" ".join(line) for line in make_peers.pip_lines(legacy=False)]
    assert lines[0] == "torch==2.13.0"
    legacy = " ".join(" ".join(line) for line in make_peers.pip_lines(legacy=True))
    for pin in ("setuptools<70", "numpy==1.23.5", "mxnet==1.9.1", "chainer==7.8.1"):
        assert pin in legacy


def test_macs_are_those_of_the_executed_graph():
    """A training step counts forward and backward; all exits are computed."""
    infer, train = (cell_of("lenet", mode, 4).macs for mode in ("infer", "train"))
    assert infer == 4 * 1_140_070
    assert 2 * infer < train < 3 * infer


def test_peers_get_the_values_of_the_compiled_network():
    """Running statistics are moved away from 0 and 1, for peers and for us alike."""
    cell = cell_of("resnet:depth=20", "infer", 2)
    ours = compile_graph(cell.declared, store=cell.store).run(cell.inputs)["logits"]
    peers = interpret(cell.graph, cell.inputs, cell.store).outputs["logits"]
    np.testing.assert_allclose(ours, peers, rtol=1e-4, atol=1e-4)
