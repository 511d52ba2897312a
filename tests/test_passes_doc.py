"""`docs/passes.md` names every pass with its options, and its commands print what it says."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from branchgraph.cli import main
from branchgraph.ir.file import save
from branchgraph.ir.spec import format_value
from branchgraph.ir.state import Store
from branchgraph.nets import network
from branchgraph.passes.base import Pass

PAGE = Path(__file__).parent.parent / "docs" / "passes.md"
TEXT = PAGE.read_text(encoding="utf-8")
#: Name of a pass to its section.
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", TEXT, re.MULTILINE | re.DOTALL))
MASKED = "masked_resnext:depth=11,width=1,cardinality=4,channels=1,size=8"


def blocks(section: str, language: str) -> list[list[str]]:
    """Lines of the fenced blocks of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [text.splitlines() for text in found]


def test_every_pass_has_a_section() -> None:
    assert set(SECTIONS) == set(Pass.registry)
    assert len(re.findall(r"^### ", TEXT, re.MULTILINE)) == len(SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_claim_formula_and_source_are_said(name: str) -> None:
    assert f"Claim: `{Pass.registry[name].claim}`" in SECTIONS[name]
    assert "Source: " in SECTIONS[name]
    assert re.search(r"^    \S", SECTIONS[name], re.MULTILINE)


@pytest.mark.parametrize("name", SECTIONS)
def test_options_are_those_of_the_pass_with_their_defaults(name: str) -> None:
    said = re.findall(r"^- `(\w+)(?:=([^`]*))?`( \(required\))?:", SECTIONS[name], re.MULTILINE)
    expected = []
    for field in dataclasses.fields(Pass.registry[name]):
        required = field.default is dataclasses.MISSING
        default = "" if required else format_value(field.default)
        expected.append((field.name, default, " (required)" if required else ""))
    assert said == expected


@pytest.mark.parametrize("name", SECTIONS)
def test_the_commands_run_and_print_what_is_shown(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    graph = network(MASKED)
    save("masked.bg", graph, Store.initialised(graph.states, 0))
    printed = ""
    for line in (line for block in blocks(SECTIONS[name], "bash") for line in block):
        program, *arguments = shlex.split(line)
        result = CliRunner().invoke(main, arguments)
        assert program == "branchgraph"
        assert result.exit_code == 0, result.output
        assert name in line
        printed += result.output
    for line in (line for block in blocks(SECTIONS[name], "text") for line in block):
        assert f"\n{line}" in f"\n{printed}", line


def test_the_python_of_the_page_runs() -> None:
    (source,) = blocks(TEXT, "python")
    names: dict[str, object] = {}
    exec("\n".join(source), names)
    assert "skip_overflow" in "\n".join(source)


def test_the_readme_links_to_the_page() -> None:
    assert "(docs/passes.md)" in (PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
