"""Drawing a graph into a file: SVG, PNG, PDF, DOT source or text, by the suffix of its name.

Pictures are laid out by Graphviz, which comes inside the wheels of pygraphviz; the program `dot` on
the PATH is the second choice. Where neither works the graph is drawn as text beside the file that
was asked for, with a warning that names the command which brings Graphviz.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import graphviz

from branchgraph.ir.atomic import replacing
from branchgraph.ir.errors import FormatError
from branchgraph.ir.graph import Graph
from branchgraph.show.dot import to_dot
from branchgraph.show.text import to_text

#: The one command that brings a renderer.
INSTALL = "python -m pip install 'pygraphviz>=2'"

#: Resolution of PNG files if not said otherwise, in pixels per inch.
PNG_DPI = 144

PICTURES = (".svg", ".png", ".pdf")
SUFFIXES = (*PICTURES, ".dot", ".txt")

#: Seconds after which a layout is given up.
LONGEST_LAYOUT = 300

#: DOT source and format to the bytes of a picture.
Renderer = Callable[[str, str], bytes]


class DrawingWarning(UserWarning):
    """A graph was drawn in another form than the one asked for."""


@dataclass(frozen=True)
class Drawing:
    """A file that was drawn: where it is, what drew it, and what there is to say about it."""

    path: Path
    renderer: str
    note: str = ""


def render(
    graph: Graph, path: str | os.PathLike[str], *, dpi: int = PNG_DPI, **options: bool
) -> Drawing:
    """Draw `graph` into `path`; the suffix chooses .svg, .png, .pdf, .dot or .txt.

    `options` are those of `to_dot`; PNG files have `dpi` pixels per inch. Raises `FormatError` for
    another suffix and `MissingError` when the folder does not exist. Without Graphviz the drawing
    is a `.txt` file beside `path`.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in SUFFIXES:
        raise FormatError(
            f"{target.name}: cannot draw {suffix!r}; use one of {', '.join(SUFFIXES)}"
        )
    if suffix == ".txt":
        return _text(graph, target, options)
    source = to_dot(graph, **options)
    if suffix == ".dot":
        write(target, source.encode())
        return Drawing(target, "source")
    if suffix == ".png":
        source = source.replace("{", f"{{\n\tdpi={dpi}", 1)
    failures: dict[str, Exception] = {}
    for name, renderer in RENDERERS.items():
        outcome = _attempt(renderer, source, suffix[1:])
        if isinstance(outcome, bytes):
            write(target, outcome)
            return Drawing(target, name)
        failures[name] = outcome
    drawing = _text(graph, target.with_suffix(".txt"), options)
    note = f"{target.name} was drawn as text into {drawing.path.name}: {_explain(failures)}"
    warnings.warn(note, DrawingWarning, stacklevel=2)
    return Drawing(drawing.path, drawing.renderer, note)


def _attempt(renderer: Renderer, source: str, format: str) -> bytes | Exception:
    """The picture, or why this renderer cannot draw it."""
    try:
        return renderer(source, format)
    except (ImportError, OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        return error


def _explain(failures: Mapping[str, Exception]) -> str:
    """Why no renderer worked, and what to do about it."""
    reasons = "; ".join(f"{name}: {_first_line(error)}" for name, error in failures.items())
    if isinstance(failures["pygraphviz"], ImportError):
        return f"Graphviz is missing ({reasons}); run: {INSTALL}"
    return f"Graphviz could not lay it out ({reasons}); draw less of it, or write a .dot file"


def _text(graph: Graph, target: Path, options: dict[str, bool]) -> Drawing:
    shown = {k: options[k] for k in ("states", "updates", "collapse") if k in options}
    write(target, to_text(graph, **shown).encode())
    return Drawing(target, "text")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- renderers -------------------------------------------------------------------------------------


#: The whole program of the child that draws. Graphviz inside a process ends it on a failed
#: assertion and writes warnings past Python, so it is not let into ours.
_CHILD = """
import sys, pygraphviz
picture = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode())
sys.stdout.buffer.write(picture.draw(format=sys.argv[1], prog="dot"))
"""


def _by_pygraphviz(source: str, format: str) -> bytes:
    import pygraphviz  # noqa: F401  (tells at once whether it is there)

    done = subprocess.run(
        [sys.executable, "-c", _CHILD, format],
        input=source.encode(),
        capture_output=True,
        timeout=LONGEST_LAYOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    complaints = done.stderr.decode(errors="replace").splitlines()
    wrong = [c for c in complaints if "lost" in c or "ssertion" in c or "Error: memory" in c]
    if done.returncode or not done.stdout or wrong:
        raise OSError((wrong or complaints or [f"ended with status {done.returncode}"])[-1])
    return done.stdout


def _by_dot(source: str, format: str) -> bytes:
    return bytes(graphviz.Source(source).pipe(format=format, quiet=True))


#: Renderers in the order in which they are tried.
RENDERERS: dict[str, Renderer] = {
    "pygraphviz": _by_pygraphviz,
    "dot": _by_dot,
}


def write(path: Path, content: bytes) -> None:
    """Write a whole file or nothing."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
