"""The rooms: who may import whom. `docs/architecture.md` says why."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

import branchgraph

PACKAGE = Path(branchgraph.__file__).parent

#: Room to the rooms it may import; a room may always import itself.
MAY_IMPORT: dict[str, set[str]] = {
    "ir": set(),
    "passes": {"ir"},
    "compiler": {"ir", "passes"},
    "codegen": {"ir"},
    "backends": {"ir", "compiler", "codegen"},
    "nets": {"ir"},
    "data": {"ir"},
    "training": {"ir", "passes", "compiler", "data"},
    "analysis": {"ir", "passes", "compiler"},
    "chainer": {"ir", "passes", "compiler"},
    "mx": {"ir", "passes", "compiler"},
    "interop": {"ir", "mx"},
    "show": {"ir"},
    "demo": {"ir", "passes", "compiler", "nets", "data", "training", "analysis", "show"},
    "cli": {
        "ir",
        "passes",
        "compiler",
        "nets",
        "data",
        "training",
        "analysis",
        "interop",
        "show",
        "demo",
    },
}


def modules() -> dict[str, Path]:
    """Dotted module name to file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, at_import: bool = False) -> Iterator[str]:
    """Modules of the package that a file imports (only those that run at import time, if asked)."""
    tree = ast.parse(path.read_text())
    nodes = _run_at_import(tree) if at_import else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements outside functions and outside `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not typing_only:
            yield node
            yield from _run_at_import(node)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("module", sorted(m for m in modules() if room(m)))
def test_a_room_looks_down_never_up(module: str) -> None:
    mine = room(module)
    assert mine in MAY_IMPORT, f"room {mine} is new: say in docs/architecture.md what it may import"
    for imported in imports(modules()[module]):
        other = room(imported) if imported.startswith("branchgraph.") else ""
        assert not other or other == mine or other in MAY_IMPORT[mine], f"{module} -> {imported}"


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    graph = networkx.DiGraph()
    for module, path in known.items():
        for imported in imports(path, at_import=True):
            if imported in known and not _package_of(imported, module):
                graph.add_edge(module, imported)
    assert not list(networkx.simple_cycles(graph))


def _package_of(imported: str, module: str) -> bool:
    """Whether `imported` is the package that `module` lies in (its __init__ runs first anyway)."""
    return module.startswith(imported + ".") or imported == module


def test_backends_do_not_import_each_other() -> None:
    for module, path in modules().items():
        parts = module.split(".")
        if len(parts) > 2 and parts[1] == "backends":
            for imported in imports(path):
                other = imported.split(".")
                assert other[:2] != ["branchgraph", "backends"] or other[2:3] == parts[2:3]


def test_the_architecture_page_names_every_room() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for name in MAY_IMPORT:
        assert f"`{name}" in page, name


def test_importing_the_package_is_light() -> None:
    heavy = {"matplotlib", "sklearn", "pygraphviz", "networkx", "graphviz", "tqdm", "click"}
    for room_name in ("ir", "passes", "compiler", "nets"):
        for module, path in modules().items():
            if room(module) == room_name:
                for imported in _third_party(path):
                    assert imported not in heavy, f"{module} imports {imported} at import time"


def _third_party(path: Path) -> Iterator[str]:
    for node in _run_at_import(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
