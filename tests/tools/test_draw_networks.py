"""The sheet of networks: its pictures, its page, and that what is committed is complete."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from branchgraph.nets import NETWORKS

TOP = Path(__file__).parents[2]
tool = SimpleNamespace(**runpy.run_path(str(TOP / "tools" / "draw_networks.py")))
ENTRIES = [e for family in tool.SHEET for e in family.entries]
#: Bytes of all pictures in the repository.
MOST = 4_000_000


def test_chosen_networks_are_drawn_and_the_page_is_written(tmp_path: Path) -> None:
    tool.main(["b_lenet", "pd_b", "--docs", str(tmp_path)])
    pictures = sorted(p.name for p in (tmp_path / "images" / "networks").iterdir())
    assert pictures == ["b_lenet.png", "pd_b.png"]
    content = (tmp_path / "images" / "networks" / "pd_b.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    page = (tmp_path / "networks.md").read_text()
    assert "`b_lenet`: 74,694 parameters, 1 branch, 2 exits." in page
    assert "`pd_b(x, 64)`: 99,800 parameters, 6 branches, 2 merges, 4 gates." in page


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["b_lenett"])
    assert "no picture b_lenett; there are b_lenet, " in capsys.readouterr().err


def test_names_are_unique() -> None:
    names = [e.name for e in ENTRIES]
    assert len(names) == len(set(names))


def test_every_family_has_pictures() -> None:
    drawn = {e.spec.partition(":")[0].rstrip("0123456789") for e in ENTRIES}
    families = {net.family for name, net in NETWORKS.items() if name.rstrip("0123456789") in drawn}
    assert families == {net.family for net in NETWORKS.values()}


def test_the_committed_sheet_is_complete_and_small() -> None:
    folder = TOP / "docs" / "images" / "networks"
    assert {p.stem for p in folder.iterdir()} == {e.name for e in ENTRIES}
    assert sum(p.stat().st_size for p in folder.iterdir()) < MOST
    assert (TOP / "docs" / "networks.md").read_text() == tool.page(tool.SHEET)
