"""Snapshots of the steps of a pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from branchgraph.ir.errors import BranchgraphError
from branchgraph.ir.text import parse_graph
from branchgraph.nets import lenet
from branchgraph.passes.insert_exits import InsertExits, RemoveExits
from branchgraph.passes.pipeline import Pipeline
from branchgraph.show.snapshots import Snapshots


def test_every_step_leaves_text_report_and_picture(tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    steps = (InsertExits(after=("conv1",)), RemoveExits())
    Pipeline(steps, (Snapshots(folder, picture=".dot"),)).apply(lenet())
    assert sorted(p.name for p in folder.iterdir()) == [
        "0.dot", "0.txt",
        "1-insert_exits.dot", "1-insert_exits.report.txt", "1-insert_exits.txt",
        "2-remove_exits.dot", "2-remove_exits.report.txt", "2-remove_exits.txt",
    ]  # fmt: skip
    assert "exit1" in parse_graph((folder / "1-insert_exits.txt").read_text()).outputs
    assert "1 matched" in (folder / "1-insert_exits.report.txt").read_text()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BranchgraphError, match="cannot make this folder"):
        Snapshots(tmp_path / "file" / "steps")
