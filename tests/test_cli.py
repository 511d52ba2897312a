"""The command line, as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from branchgraph.cli import main
from branchgraph.ir.file import load
from branchgraph.ir.text import format_graph
from branchgraph.nets import b_lenet

DIGITS = "lenet:size=8,kernel=3,widths=4+8+16"


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("command", list(main.commands))
def test_every_command_has_help_with_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert f"branchgraph {command}" in result.output.split("Options:")[0].partition("\n")[2]


def test_the_commands_are_those_of_the_design() -> None:
    assert set(main.commands) == {
        "show", "train", "eval", "sweep", "convert", "bench", "nets", "passes", "info", "data",
        "demo",
    }  # fmt: skip


def test_nets_lists_options_parameters_and_macs() -> None:
    text = run("nets").output
    assert "67,824 parameters, 1,140,070 MACs" in text
    listed = {e["name"]: e for e in json.loads(run("nets", "--json").output)}
    assert listed["b_lenet"]["options"]["criterion"] == "entropy"
    assert listed["b_lenet"]["family"] == "BranchyNet"
    one = run("nets", "BranchyNet").output
    assert one.startswith("BranchyNet\n  lenet: ")
    assert "pd_a_resnet" not in one
    assert "there are: BranchyNet" in run("nets", "AlexNets").output


def test_passes_lists_claims_and_options() -> None:
    text = run("passes").output
    assert "fold_batch_norm (exact)" in text
    assert "after=required" in text


def test_passes_explain_what_they_do_and_where_parameters_come_from() -> None:
    spec = "resnet_a:blocks=1"
    text = run("passes", "specialise", "fold_batch_norm", "--explain", spec, "--verify").output
    assert "fold_batch_norm: 7 matched, 0 refused" in text
    assert "matched stage2/block1/body/unit1/bn" in text
    assert "stem/conv.weight f32[16, 3, 3, 3] from " in text
    assert "stem/bn.gamma" in text
    assert text.endswith("all claims hold\n")
    refused = run("passes", "fold_batch_norm", "--explain", spec).output
    assert "refused stem/bn: its statistics are not fixed" in refused


def test_show_keeps_the_steps(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    run("show", "lenet", "--pass", "insert_exits:after=conv1", "--steps", str(steps))
    assert (steps / "1-insert_exits.svg").exists()


def test_show_draws_text_without_an_output_file() -> None:
    text = run("show", "lenet", "--pass", "insert_exits:after=conv1").output
    assert "branch exit1" in text
    assert "1 matched" in text


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf", "dot", "txt"])
def test_show_writes_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"net.{suffix}"
    result = run("show", "b_lenet", "-o", str(target))
    assert result.exit_code == 0, result.output
    starts = {
        "svg": b"<?xml",
        "png": b"\x89PNG",
        "pdf": b"%PDF",
        "dot": b"digraph",
        "txt": b"b_lenet",
    }
    assert target.read_bytes().lstrip(b"// \n").startswith(starts[suffix])


def test_show_reads_the_text_form(tmp_path: Path) -> None:
    source = tmp_path / "net.txt"
    source.write_text(format_graph(b_lenet()))
    assert run("show", str(source)).output == run("show", "b_lenet").output


def test_train_then_sweep_then_show_the_file(tmp_path: Path) -> None:
    file = tmp_path / "net.bg"
    trained = run(
        "train", DIGITS, "--pass", "insert_exits:after=conv1", "--epochs", "2", "--batch", "128",
        "--seed", "1", "-o", str(file),
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert "exit1.accuracy" in trained.output
    graph, store = load(file)
    assert all(s in store for s in graph.states)
    table, plot = tmp_path / "sweep.csv", tmp_path / "sweep.png"
    swept = run(
        "sweep", str(file), "--thresholds", "0.1,1,5", "--batch", "64", "--repeats", "1",
        "--csv", str(table), "--plot", str(plot),
    )  # fmt: skip
    assert swept.exit_code == 0, swept.output
    assert swept.output.count("B-lenet") == 3
    assert len(table.read_text().splitlines()) == 5
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "branch exit1" in run("show", str(file)).output


def test_train_writes_logs_and_curves_and_goes_on(tmp_path: Path) -> None:
    file, csv, lines = (tmp_path / name for name in ("net.bg", "log.csv", "log.jsonl"))
    plot = tmp_path / "curves.png"
    trained = run(
        "train", DIGITS, "--pass", "insert_exits:after=conv1", "--epochs", "2", "--batch", "256",
        "--optimiser", "momentum_sgd:momentum=0.5", "--learning-rate", "0.05", "--weight-decay",
        "1e-4", "--weight", "exit1=0.3", "--validate", "--log", str(csv), "--log", str(lines),
        "--plot", str(plot), "-o", str(file),
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(
        0.3 * rows[0]["exit1.loss"] + rows[0]["exit2.loss"], rel=1e-6
    )
    assert len(csv.read_text().splitlines()) == 3
    assert plot.read_bytes().startswith(b"\x89PNG")
    resumed = run("train", "--resume", str(file), "--epochs", "3", "--log", str(lines))
    assert resumed.exit_code == 0, resumed.output
    assert "epoch 3:" in resumed.output
    assert len(lines.read_text().splitlines()) == 3


def test_eval_measures_every_exit_and_early_exits(tmp_path: Path) -> None:
    file = tmp_path / "net.bg"
    run(
        "train", DIGITS, "--pass", "insert_exits:after=conv1", "--epochs", "2", "--batch", "64",
        "--validate", "--log", str(tmp_path / "log.jsonl"), "-o", str(file),
    )  # fmt: skip
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    found = json.loads(run("eval", str(file), "--threshold", "exit1=10", "--json").output)
    for name in ("loss", "exit1.loss", "exit2.accuracy"):
        assert found[name] == pytest.approx(last[f"test.{name}"], rel=1e-6)
    assert found["early_exits.shares"] == [1.0, 0.0]
    assert found["early_exits.accuracy"] == pytest.approx(found["exit1.accuracy"])
    assert found["early_exits.accuracies"][1] is None
    text = run("eval", str(file), "--train-set", "--batch", "100").output
    assert "samples: 1,437" in text
    assert "early_exits.shares: " in text


def test_info_tells_of_installations_networks_and_files(tmp_path: Path) -> None:
    assert "numpy NumPy " in run("info").output
    facts = json.loads(run("info", "b_lenet", "--json").output)
    assert facts["parameters"] == 74_694
    assert facts["exits"] == {"exit1": "entropy", "exit2": "the rest"}
    file = tmp_path / "net.bg"
    run("train", DIGITS, "--epochs", "1", "-o", str(file))
    text = run("info", str(file)).output
    assert "1 of 1 epochs on digits with adam, batch 512, seed 0" in text
    assert "slot 20" in text


def test_the_demo_writes_what_it_says(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    result = run("demo", "--epochs", "1", "-o", str(folder))
    assert result.exit_code == 0, result.output
    assert "8x8 digits" in result.output
    written = {
        Path(line.strip())
        for line in result.output.splitlines()
        if line.startswith("  " + str(folder))
    }
    assert {p.name for p in written} == {
        "before.svg", "after.svg", "sweep.svg", "training.svg", "sweep.csv", "network.bg",
    }  # fmt: skip
    assert all(p.stat().st_size > 0 for p in written)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nothing"), "unknown network 'nothing'; known: ac_resnet, alexnet"),
        (("show", "lenet", "--pass", "melt"), "unknown pass 'melt'"),
        (("show", "lenet", "--pass", "insert_exits:after=conv9"), "no node 'conv9'"),
        (("show", "missing.bg"), "missing.bg"),
        (("show", "missing.txt"), "missing.txt"),
        (("show", "lenet", "-o", "net.bmp"), "use one of .svg"),
        (("train", "lenet", "--data", "cats", "-o", "x.bg"), "no data set 'cats'"),
        (("train", "lenet", "--optimiser", "magic", "-o", "x.bg"), "known: sgd"),
        (("train", "lenet", "-o", "x.bg"), "expected shape [N, 1, 28, 28], got [512, 1, 8, 8]"),
        (("train", DIGITS, "-o", "x.txt"), "end in .bg"),
        (("train", DIGITS), "-o NET.bg"),
        (("train",), "name a network to train, or a checkpoint"),
        (("train", DIGITS, "--resume", "x.bg"), "not both"),
        (("train", "--resume", "x.bg"), "no such file"),
        (
            ("train", "--resume", "x.bg", "--batch", "3", "--seed", "1"),
            "leave them out: batch, seed",
        ),
        (("train", DIGITS, "-o", "x.bg", "--log", "x.xml"), "must end in .csv or .jsonl"),
        (("train", DIGITS, "-o", "x.bg", "--log", "no/x.csv"), "no folder no"),
        (("train", DIGITS, "-o", "x.bg", "--weight", "exit1"), "expected NAME=NUMBER"),
        (("train", DIGITS, "-o", "x.bg", "--weight", "exit7=1"), "no input 'exit7.weight'"),
        (("train", DIGITS, "-o", "x.bg", "--backend", "abacus"), "no backend 'abacus'"),
        (("train", DIGITS, "-o", "x.bg", "--optimiser", "sgd:speed=1"), "has no option 'speed'"),
        (("train", DIGITS, "-o", "x.bg", "--learning-rate", "1e30"), "try a lower --learning-rate"),
        (("passes", "melt", "--explain", "lenet"), "unknown pass 'melt'"),
        (("passes", "dead_code"), "name the network"),
        (("eval", "missing.bg"), "missing.bg"),
        (("info", "missing.bg"), "missing.bg"),
        (("info", "nothing"), "unknown network 'nothing'"),
        (("sweep", "missing.bg"), "missing.bg"),
        (("sweep", "missing.bg", "--thresholds", "low"), "threshold 'low' is no number"),
        (("demo", "--data", "cats"), "no data set 'cats'"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("branchgraph: ")
    assert message in last
    assert "Traceback" not in result.output


def test_missing_mnist_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRANCHGRAPH_DATA", str(tmp_path))
    result = run("train", "lenet", "--data", "mnist", "-o", str(tmp_path / "x.bg"))
    assert result.exit_code == 2
    assert str(tmp_path) in result.output


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="unknown network"):
        run("--debug", "show", "nothing")


def test_a_full_disk_or_missing_folder_does_not_cost_the_training_run(tmp_path: Path) -> None:
    result = run("train", DIGITS, "--epochs", "1", "-o", str(tmp_path / "no" / "net.bg"))
    assert result.exit_code == 2
    assert "epoch" not in result.output, "refused before training, not after"


def test_training_does_not_replace_a_file_unless_told(tmp_path: Path) -> None:
    file = tmp_path / "net.bg"
    assert run("train", DIGITS, "--epochs", "1", "-o", str(file)).exit_code == 0
    before = file.read_bytes()
    again = run("train", DIGITS, "--epochs", "1", "-o", str(file))
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    assert file.read_bytes() == before
    done = run("train", "--resume", str(file))
    assert "train on with --epochs 2" in done.output
    assert run("train", DIGITS, "--epochs", "1", "-o", str(file), "--overwrite").exit_code == 0


def test_show_without_graphviz_draws_text_and_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    monkeypatch.setattr(shutil, "which", lambda *a, **k: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("show", "b_lenet", "-o", str(tmp_path / "net.svg"))
    assert result.exit_code == 0, result.output
    assert "python -m pip install 'pygraphviz>=2'" in result.output
    assert (tmp_path / "net.txt").read_text().startswith("b_lenet")
    assert not (tmp_path / "net.svg").exists()
