"""Checkpoints: a run that was cut anywhere goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from branchgraph.data import load as load_data
from branchgraph.ir.builder import batch_norm, conv, dense, dropout, exit, relu
from branchgraph.ir.errors import BranchgraphError, FormatError, GraphError
from branchgraph.ir.file import load, save
from branchgraph.ir.graph import Graph, branch
from branchgraph.ir.optimisers import SGD, Adam, MomentumSGD
from branchgraph.ir.text import format_graph
from branchgraph.training import (
    Progress,
    Recipe,
    Training,
    load_checkpoint,
    save_checkpoint,
    train,
)

DIGITS = load_data("digits").subset(train=300)
COMMAND = [sys.executable, "-m", "branchgraph.cli", "train"]


def stochastic() -> Graph:
    """Two exits, batch norm, dropout twice, and two layers of one name."""
    graph = Graph("stochastic")
    h = dropout(relu(batch_norm(conv(graph.input("x", ("N", 1, 8, 8)), 4, 3, name="c"))), 0.3)
    with branch("exit1"):
        exit(dense(h, 10, name="fc"), "exit1", threshold=0.5)
    h = dropout(relu(conv(h, 4, 3, name="c")), 0.2)
    exit(dense(h, 10, name="fc"), "exit2", last=True)
    return graph


def cut_and_resumed(path: Path, cuts: list[int], epochs: int = 3, batch: int = 32) -> Progress:
    """Train, stopping after the given numbers of steps and going on from the file each time."""

    class Cut(Exception):
        pass

    graph, progress = stochastic(), Progress()
    training = Training.of(graph, Adam(), seed=5)
    for cut in [*cuts, None]:
        left = cut

        def on_step(result: dict[str, float]) -> None:
            nonlocal left
            if left is not None:
                left -= 1
                if left == 0:
                    raise Cut

        try:
            train(
                training, DIGITS.train_images, DIGITS.train_labels, epochs=epochs, batch=batch,
                seed=5, progress=progress, on_step=on_step,
            )  # fmt: skip
        except Cut:
            save_checkpoint(path, graph, training, progress)
            checkpoint = load_checkpoint(path)
            graph, progress = checkpoint.graph, checkpoint.progress
            training = checkpoint.resume(Adam())
    save_checkpoint(path, graph, training, progress)
    return progress


@pytest.mark.parametrize("cuts", [[1], [10], [3, 4, 20], [9, 1, 1]], ids=str)
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, cuts: list[int]) -> None:
    whole = cut_and_resumed(tmp_path / "whole.bg", [])
    cut = cut_and_resumed(tmp_path / "cut.bg", cuts)
    assert cut.history.epochs == whole.history.epochs
    expected, found = load_file(tmp_path / "whole.bg"), load_file(tmp_path / "cut.bg")
    assert expected.keys() == found.keys()
    assert any(".adam." in name for name in found)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_checkpoint_is_a_network_like_any_other(tmp_path: Path) -> None:
    cut_and_resumed(tmp_path / "net.bg", [], epochs=1)
    graph, store = load(tmp_path / "net.bg")
    assert [n.op.opcode for n in graph.nodes] == [n.op.opcode for n in stochastic().nodes]
    assert all(s in store for s in graph.states)
    assert format_graph(load_checkpoint(tmp_path / "net.bg").graph) == format_graph(stochastic())


def test_a_network_that_was_only_saved_is_no_checkpoint(tmp_path: Path) -> None:
    training = Training.of(stochastic(), SGD())
    save(tmp_path / "net.bg", stochastic(), training.store)
    with pytest.raises(FormatError, match="no checkpoint"):
        load_checkpoint(tmp_path / "net.bg")


def test_another_optimiser_is_refused(tmp_path: Path) -> None:
    cut_and_resumed(tmp_path / "net.bg", [], epochs=1)
    checkpoint = load_checkpoint(tmp_path / "net.bg")
    with pytest.raises(GraphError, match=r"no state .*momentum_sgd.v"):
        checkpoint.resume(MomentumSGD())


GOOD = {
    "epochs": [{"loss": 1.0}], "seconds": [1.0], "step": 0, "sums": {}, "step_seconds": 0.0,
    "recipe": {
        "data": "digits", "examples": 3, "optimiser": "sgd", "weight_decay": 0.0, "batch": 1,
        "seed": 0, "epochs": 1, "inputs": {}, "validate": False, "backend": "numpy",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "note",
    [
        "", "[]", "7", "{}", "[" * 100_000, json.dumps({**GOOD, "step": -1}),
        json.dumps({**GOOD, "step": 1.5}), json.dumps({**GOOD, "epochs": [[1]]}),
        json.dumps({**GOOD, "seconds": []}), json.dumps({**GOOD, "sums": {"loss": "high"}}),
        json.dumps({**GOOD, "recipe": {}}), json.dumps({**GOOD, "recipe": None}),
        json.dumps({**GOOD, "recipe": {**GOOD["recipe"], "batch": "many"}}),
    ],
    ids=lambda note: note[:40],
)  # fmt: skip
def test_a_broken_note_is_named(tmp_path: Path, note: str) -> None:
    training = Training.of(stochastic(), SGD())
    save(tmp_path / "net.bg", stochastic(), training.store, notes={"training": note})
    with pytest.raises(FormatError, match=r"net\.bg: what it says of its training"):
        load_checkpoint(tmp_path / "net.bg")


def test_the_good_note_of_the_table_is_good(tmp_path: Path) -> None:
    training = Training.of(stochastic(), SGD())
    save(tmp_path / "net.bg", stochastic(), training.store, notes={"training": json.dumps(GOOD)})
    assert load_checkpoint(tmp_path / "net.bg").recipe == Recipe(**GOOD["recipe"])


def test_notes_cannot_take_the_names_of_the_format(tmp_path: Path) -> None:
    training = Training.of(stochastic(), SGD())
    with pytest.raises(GraphError, match="cannot be called graph"):
        save(tmp_path / "net.bg", stochastic(), training.store, notes={"graph": "x"})


# -- processes -------------------------------------------------------------------------------------


def arguments(folder: Path, name: str) -> list[str]:
    source = folder / "net.txt"
    source.write_text(format_graph(stochastic()))
    return [
        str(source), "--epochs", "4", "--batch", "16", "--seed", "3", "--checkpoint-steps", "5",
        "--log", str(folder / f"{name}.jsonl"), "-o", str(folder / f"{name}.bg"),
    ]  # fmt: skip


def losses(log: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def steps_done(path: Path) -> int:
    """Steps that the checkpoint at `path` stands for; 0 while there is none."""
    if not path.exists():
        return 0
    progress = load_checkpoint(path).progress
    return 90 * progress.epoch + progress.step  # 1437 digits in batches of 16


def killed_after(command: list[str], steps: int, file: Path, number: int) -> int:
    """Run a command and send it a signal once its checkpoint has come so far; its exit code."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while steps_done(file) < steps and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(timeout=60)


def test_kill_9_at_three_random_moments_costs_nothing(tmp_path: Path) -> None:
    subprocess.run(COMMAND + arguments(tmp_path, "whole"), check=True, capture_output=True)
    moments = sorted(np.random.default_rng().integers(5, 350, size=3))
    file, log = tmp_path / "cut.bg", ["--log", str(tmp_path / "cut.jsonl")]
    command = COMMAND + arguments(tmp_path, "cut")
    for moment in moments:
        assert killed_after(command, moment, file, signal.SIGKILL) == -signal.SIGKILL, moments
        command = [*COMMAND, "--resume", str(file), "--checkpoint-steps", "5", *log]
    subprocess.run(command, check=True, capture_output=True)
    assert losses(tmp_path / "cut.jsonl") == losses(tmp_path / "whole.jsonl"), moments
    expected, found = load_file(tmp_path / "whole.bg"), load_file(file)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=f"{name} after {moments}")
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".bg") == [
        "cut.bg", "whole.bg",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
def test_an_interrupt_leaves_a_checkpoint_of_the_last_step(tmp_path: Path, number: int) -> None:
    file = tmp_path / "net.bg"
    command = COMMAND + arguments(tmp_path, "net")
    assert killed_after(command, 20, file, number) == 130
    stopped = steps_done(file)
    assert stopped >= 20
    resumed = subprocess.run(
        [*COMMAND, "--resume", str(file)], check=True, capture_output=True, text=True
    )
    assert "epoch 4:" in resumed.stdout
    assert steps_done(file) == 360


def test_a_full_disk_is_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    file = tmp_path / "net.bg"
    subprocess.run(
        [*COMMAND, *arguments(tmp_path, "net"), "--epochs", "1"], check=True, capture_output=True
    )
    before = file.read_bytes()

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    result = subprocess.run(
        [*COMMAND, "--resume", str(file), "--epochs", "2"],
        capture_output=True, text=True, preexec_fn=fill,
    )  # fmt: skip
    assert result.returncode == 2
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert file.read_bytes() == before


def test_an_unwritable_folder_is_found_before_training(tmp_path: Path) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc, a folder nobody can write to")
    training = Training.of(stochastic(), SGD())
    with pytest.raises(BranchgraphError, match="cannot be written"):
        save_checkpoint("/proc/net.bg", stochastic(), training, Progress())
    assert not os.path.exists("/proc/net.bg")
