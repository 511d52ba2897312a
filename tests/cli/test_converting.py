"""`branchgraph convert`, as a user types it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from branchgraph.cli import main
from branchgraph.interop.weights import collect, read_arrays, write_arrays
from branchgraph.ir.file import load
from branchgraph.ir.state import Store
from branchgraph.nets import NETWORKS
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("b_lenet", "none.npz", "-o", "net.bg"), "none.npz: there is no such file"),
        (("b_lenet", "none.npz", "-o", "net.npz"), "must end in .bg"),
        (("b_lenet", "-o", "net.npz"), "expected a .bg file"),
        (("net.bg", "-o", "net.pt"), "must end in .npz or .safetensors or .params"),
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
