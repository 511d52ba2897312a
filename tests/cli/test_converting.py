"""`branchgraph convert`, as a user types it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from branchgraph.cli import main
from branchgraph.compiler import compile
from branchgraph.interop.weights import collect, read_arrays, write_arrays
from branchgraph.ir.file import load, save
from branchgraph.ir.state import Store
from branchgraph.nets import NETWORKS
from tests.builders import images, randomised
from tests.goldens import golden


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["convert", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("spec", ["b_lenet", "cross:depth=14", "pd_a_resnet18:width=8,groups=8"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".params"])
def test_weights_under_the_names_of_the_original_go_in(
    tmp_path: Path, spec: str, suffix: str
) -> None:
    found, raw = NETWORKS.find(spec)
    graph = found.declare(raw)
    store = Store.initialised(graph.states, seed=3)
    names = {s: found.exchange(s) for s in graph.states}
    assert len(set(names.values())) == len(names)
    write_arrays(tmp_path / f"weights{suffix}", collect(store, names))
    result = run(spec, str(tmp_path / f"weights{suffix}"), "-o", str(tmp_path / "net.bg"))
    assert result.exit_code == 0, result.output
    loaded, values = load(tmp_path / "net.bg")
    for state, other in zip(graph.states, loaded.states):
        np.testing.assert_array_equal(values[other], store[state], err_msg=state.name)


def test_our_own_names_come_out_and_go_in(tmp_path: Path) -> None:
    path = golden("branchynet/lenet_mnist_100.npz")
    whole = tmp_path / "whole.bg"
    refused = run("b_lenet", str(path), "-o", str(whole))
    assert refused.exit_code == 2
    assert "have unexpected mainhead.0.fc.W, mainhead.0.fc.b" in refused.output
    assert not whole.exists()
    assert run("b_lenet", str(path), "--partial", "-o", str(whole)).exit_code == 0
    assert run(str(whole), "-o", str(tmp_path / "own.npz")).exit_code == 0
    assert "exit1/fc.weight" in read_arrays(tmp_path / "own.npz")
    again = run("b_lenet", str(tmp_path / "own.npz"), "-o", str(tmp_path / "again.bg"))
    assert again.exit_code == 0, again.output
    first, second = load(whole), load(tmp_path / "again.bg")
    for a, b in zip(first[0].states, second[0].states):
        np.testing.assert_array_equal(first[1][a], second[1][b])


def trained(path: Path, spec: str) -> Path:
    """A .bg file of a network at random values."""
    graph = NETWORKS.network(spec)
    save(path, graph, randomised(graph))
    return path


def logits(path: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    graph, store = load(path)
    return compile(graph, store=store)(x=x)


def test_a_trained_network_is_rewritten_with_its_weights(tmp_path: Path) -> None:
    source = trained(tmp_path / "pd_a.bg", "pd_a_resnet18:width=8,groups=8,size=32,classes=5")
    fused = tmp_path / "fused.bg"
    passes = ("--pass", "specialise", "--pass", "fuse_branches")
    result = run(str(source), *passes, "-o", str(fused))
    assert result.exit_code == 0, result.output
    graph, _ = load(fused)
    assert sum(n.op.opcode == "conv" for n in graph.nodes) == 20  # of a plain ResNet-18
    assert not any(n.op.opcode.startswith("batch_norm") for n in graph.nodes)
    x = images(2, channels=3, size=32)
    before, after = logits(source, x)["logits"], logits(fused, x)["logits"]
    assert np.abs(after - before).max() <= 5e-5 * max(1.0, np.abs(before).max())


def test_exits_still_leave_early_after_batch_norm_is_folded(tmp_path: Path) -> None:
    source = trained(tmp_path / "b_resnet.bg", "b_resnet:blocks=1")
    folded = tmp_path / "folded.bg"
    passes = ("--pass", "specialise", "--pass", "fold_batch_norm")
    assert run(str(source), *passes, "-o", str(folded)).exit_code == 0
    graph, _ = load(folded)
    assert [n.op.opcode for n in graph.nodes].count("exit") == 3
    x = images(4, channels=3, size=32)
    before, after = logits(source, x), logits(folded, x)
    np.testing.assert_array_equal(after["exit"], before["exit"])
    scale = max(1.0, np.abs(before["logits"]).max())
    assert np.abs(after["logits"] - before["logits"]).max() <= 1e-4 * scale


def test_branches_start_from_the_weights_they_share(tmp_path: Path) -> None:
    source = trained(tmp_path / "fcn.bg", "fcn:sizes=8,features=6,outputs=3")
    shared = tmp_path / "shared.bg"
    spec = "share_weights:branches=2,shared=0.5"
    assert run(str(source), "--pass", spec, "-o", str(shared)).exit_code == 0
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    expected = logits(source, x)["logits"]
    for value in logits(shared, x).values():
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("b_lenet", "none.npz", "-o", "net.bg"), "none.npz: there is no such file"),
        (("b_lenet", "-o", "net.npz"), "expected a .bg file"),
        (("net.bg", "-o", "net.pt"), "must end in .bg or .npz or .safetensors or .params"),
        (("nothing", "none.npz", "-o", "net.bg"), "unknown network 'nothing'"),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
