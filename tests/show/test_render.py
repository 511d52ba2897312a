"""Drawing into files: suffixes, renderers in their order, and what happens without them."""

import builtins
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import graphviz
import pytest
from pictured import network, training

from branchgraph.ir.errors import BranchgraphError, FormatError, MissingError
from branchgraph.passes.specialise import specialise
from branchgraph.show import DrawingWarning, render, to_dot, to_text
from branchgraph.show.render import INSTALL, SUFFIXES

MAGIC = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF", ".dot": b"digraph"}


@pytest.fixture
def no_pygraphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygraphviz", None)


@pytest.fixture
def no_dot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))


@pytest.mark.parametrize("suffix", [*MAGIC, ".SVG"])
def test_the_suffix_chooses_the_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    drawing = render(network(), path)
    assert drawing.path == path
    assert drawing.note == ""
    assert path.read_bytes().startswith(MAGIC[suffix.lower()])
    assert os.listdir(tmp_path) == [path.name], "no temporary files are left"


def test_pygraphviz_draws_first(tmp_path: Path) -> None:
    assert render(network(), tmp_path / "net.svg").renderer == "pygraphviz"


def test_dot_and_text_need_no_renderer(tmp_path: Path, no_pygraphviz: None, no_dot: None) -> None:
    assert render(network(), tmp_path / "net.dot").renderer == "source"
    assert (tmp_path / "net.dot").read_text() == to_dot(network())
    assert render(network(), str(tmp_path / "net.txt")).renderer == "text"
    assert (tmp_path / "net.txt").read_text() == to_text(network())


def test_an_unknown_suffix_is_refused_with_the_list(tmp_path: Path) -> None:
    for name in ("net.jpeg", "net"):
        with pytest.raises(FormatError) as caught:
            render(network(), tmp_path / name)
        assert all(suffix in str(caught.value) for suffix in SUFFIXES)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for suffix in (".svg", ".dot", ".txt"):
        with pytest.raises(MissingError, match=r"there is no folder .*nowhere"):
            render(network(), tmp_path / "nowhere" / f"net{suffix}")


def test_the_program_dot_is_the_fall_back(
    tmp_path: Path, no_pygraphviz: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "dot"
    program.write_text("#!/bin/sh\ncat >/dev/null\necho '<svg/>'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    drawing = render(network(), tmp_path / "net.svg")
    assert drawing.renderer == "dot"
    assert (tmp_path / "net.svg").read_text().strip() == "<svg/>"


def test_without_a_renderer_text_is_drawn_and_one_command_named(
    tmp_path: Path, no_pygraphviz: None, no_dot: None
) -> None:
    with pytest.warns(DrawingWarning) as warned:
        drawing = render(network(), tmp_path / "net.png")
    assert drawing.renderer == "text"
    assert drawing.path == tmp_path / "net.txt"
    assert drawing.path.read_text() == to_text(network())
    assert not (tmp_path / "net.png").exists()
    assert drawing.note.count(INSTALL) == 1
    assert drawing.note.endswith("python -m pip install 'pygraphviz>=2'")
    assert [str(w.message) for w in warned] == [drawing.note]
    assert warned[0].filename == __file__


def test_an_import_that_fails_in_another_way_counts_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_dot: None
) -> None:
    real = builtins.__import__

    def broken(name: str, *rest: Any, **options: Any) -> Any:
        if name == "pygraphviz":
            raise ImportError("libcgraph.so: cannot open shared object file")
        return real(name, *rest, **options)

    monkeypatch.delitem(sys.modules, "pygraphviz", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.warns(DrawingWarning, match="libcgraph.so"):
        assert INSTALL in render(network(), tmp_path / "net.pdf").note


def test_a_layout_that_dies_is_told_and_text_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_dot: None
) -> None:
    def died(*_: Any, **__: Any) -> Any:
        complaint = b"python: mincross.c:275: Assertion `x' failed.\n"
        return subprocess.CompletedProcess([], -6, b"", complaint)

    monkeypatch.setattr(subprocess, "run", died)
    monkeypatch.setattr(graphviz.Source, "pipe", _no_program)
    with pytest.warns(DrawingWarning, match=r"could not lay it out .*Assertion"):
        drawing = render(network(), tmp_path / "net.svg")
    assert drawing.renderer == "text"
    assert "pip install" not in drawing.note


def _no_program(*_: Any, **__: Any) -> bytes:
    raise graphviz.ExecutableNotFound(["dot"])


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.txt"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BranchgraphError, match="no space"):
        render(network(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["net.txt"]


@pytest.mark.parametrize("options", [{}, {"states": True}, {"updates": True}])
def test_specialised_and_training_graphs_are_drawn(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    graphs = {
        "inference": specialise(network(), training=False),
        "training": training(network()),
    }
    for name, graph in graphs.items():
        assert render(graph, tmp_path / f"{name}.svg", **options).renderer == "pygraphviz"
        assert render(graph, tmp_path / f"{name}.txt", **options).path.stat().st_size > 500
