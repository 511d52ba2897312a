"""The Python blocks of every tutorial run, in order, in one namespace a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from branchgraph.ir.op import Op
from branchgraph.passes.base import Pass

FOLDER = Path(__file__).parent.parent / "docs" / "tutorials"
PAGES = sorted(FOLDER.glob("*.md"))
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line of the first statement and text of each block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in _BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_tutorial_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pass, "registry", dict(Pass.registry))
    monkeypatch.setattr(Op, "registry", dict(Op.registry))
    found = blocks(page)
    assert found, f"{page.name} has no Python block"
    namespace: dict[str, object] = {"__name__": f"tutorial_{page.stem}"}
    for line, source in found:
        # Blank lines before it make a traceback point at the line of the page.
        exec(compile("\n" * line + source, str(page), "exec"), namespace)


def test_a_pass_takes_less_than_thirty_lines() -> None:
    """The claim of the page, counted without blank lines and imports."""
    (_, source), *_ = blocks(FOLDER / "write_a_pass.md")
    lines = [s for s in source.splitlines() if s.strip() and not re.match(r"from|import", s)]
    assert len(lines) < 30
