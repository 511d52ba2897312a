"""Compiled kernels on disk: found again, never half, never from a folder that others can write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from branchgraph.codegen import objects
from branchgraph.codegen.objects import Objects


@pytest.fixture
def kept(tmp_path: Path) -> Objects:
    return Objects(tmp_path / "kernels")


def test_what_was_put_is_found_by_another_process(kept: Objects) -> None:
    kept.put("a", b"code")
    assert Objects(kept.folder).get("a") == b"code"
    assert kept.get("b") is None
    assert [p.name for p in kept.folder.iterdir()] == ["a.o"]


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 40], ids=["empty", "short", "other"])
def test_damaged_files_are_as_good_as_none(kept: Objects, damage: bytes) -> None:
    kept.put("a", b"code")
    (kept.folder / "a.o").write_bytes(damage)
    assert kept.get("a") is None


def test_cut_files_are_as_good_as_none(kept: Objects) -> None:
    kept.put("a", b"code")
    whole = (kept.folder / "a.o").read_bytes()
    for length in range(len(whole)):
        (kept.folder / "a.o").write_bytes(whole[:length])
        assert kept.get("a") is None


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_is_not_used(kept: Objects, mode: int) -> None:
    kept.put("a", b"code")
    os.chmod(kept.folder, mode)
    assert kept.get("a") is None
    kept.put("b", b"code")
    assert not (kept.folder / "b.o").exists()


def test_a_link_to_a_folder_is_not_used(kept: Objects, tmp_path: Path) -> None:
    kept.put("a", b"code")
    link = tmp_path / "link"
    link.symlink_to(kept.folder)
    assert Objects(link).get("a") is None


def test_a_folder_that_cannot_be_made_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    kept = Objects(file / "kernels")
    kept.put("a", b"code")
    assert kept.get("a") is None


def test_the_oldest_go_when_there_is_too_much(
    kept: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_MOST", 250)
    for number, name in enumerate("abcd"):
        kept.put(name, bytes([number]) * 50)  # 82 with its check
        os.utime(kept.folder / f"{name}.o", (number, number))
    assert kept.get("a") is None
    assert kept.get("d") == bytes([3]) * 50
