"""The file format: a graph and the values of its states in one file.

A `.bg` file is a safetensors file. Its metadata holds

    format   "branchgraph"
    version  "1"
    needs    the first release that reads this version, "0.1.0"
    graph    the text of the graph (`branchgraph.ir.text`)

and notes of whoever wrote it (`training`: where a run stands). Its tensors are the values of the
states, each under the label that the text gives the state, so states that share a name stay apart.
A state without a value in the store has no tensor, and has no value after loading either. Nothing
in a file is ever executed: there is no pickle in it.

    save("net.bg", graph, store)
    graph, store = load("net.bg")
    load_values("epoch12.bg", graph, store)      # values only, into a store that is in use

Every error is a `BranchgraphError` that names the file, what was expected and what came:
`MissingError` when a file or folder is not there, `FormatError` when a file cannot be read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from branchgraph.ir.atomic import replacing
from branchgraph.ir.errors import BranchgraphError, FormatError, GraphError
from branchgraph.ir.file_header import Entry, Header, read_header
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import State, Store
from branchgraph.ir.text import Labels, format_graph, parse_graph
from branchgraph.ir.types import DType, TensorType
from branchgraph.ir.verify import verify

FORMAT = "branchgraph"
VERSION = 1
#: The first release that reads files of `VERSION`.
NEEDS = "0.1.0"

Path = str | os.PathLike[str]

_SPELLING = {
    DType.BOOL: "BOOL",
    DType.U8: "U8",
    DType.U32: "U32",
    DType.I8: "I8",
    DType.I16: "I16",
    DType.I32: "I32",
    DType.I64: "I64",
    DType.F16: "F16",
    DType.BF16: "BF16",
    DType.F32: "F32",
    DType.F64: "F64",
}
#: Metadata of the format itself; the rest are notes.
_OWN = {"format", "version", "needs", "graph"}
_RELEASE = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}\Z", re.ASCII)
_LISTED = 5


# -- writing ---------------------------------------------------------------------------------------


def save(path: Path, graph: Graph, store: Store, *, notes: Mapping[str, str] | None = None) -> None:
    """Write `graph` and the values that `store` has of its states to `path`, whole or not at all.

    `notes` are texts that `read_notes` gives back. The file is complete on the disk before it takes
    the place of an old one. Raises `MissingError` when the folder does not exist, and
    `BranchgraphError` when the file cannot be written or would not be readable again; the old file
    is untouched then.
    """
    shown = os.fspath(path)
    labels = Labels(graph).states
    arrays = {label: _checked(s, store, shown) for s, label in labels.items() if s in store}
    notes = notes or {}
    if _OWN & notes.keys():
        raise GraphError(f"a note cannot be called {min(_OWN & notes.keys())}; the format uses it")
    metadata = {
        **notes,
        "format": FORMAT,
        "version": str(VERSION),
        "needs": NEEDS,
        "graph": format_graph(graph),
    }
    with replacing(path) as temporary:
        try:
            save_file(arrays, temporary, metadata)
            _check_readable(temporary, arrays, shown)
        except SafetensorError as error:
            raise BranchgraphError(
                f"{shown}: cannot be written: {error}; what stood there before is unchanged. "
                "Make room, or choose another folder"
            ) from error


def _checked(state: State, store: Store, shown: str) -> np.ndarray:
    """The value of `state`, contiguous; a backend may have put anything into the store."""
    value = np.asarray(store[state], order="C")
    if state.name == "__metadata__":
        raise BranchgraphError(
            f"{shown}: a state is named __metadata__, which safetensors keeps for itself; rename it"
        )
    if value.shape != state.shape or value.dtype != state.dtype.numpy:
        raise BranchgraphError(
            f"{shown}: state {state.name} is declared {state.type}, but the store holds "
            f"{value.dtype}{list(value.shape)}; assign it with store[state] = value"
        )
    return value


def _check_readable(temporary: Path, arrays: Mapping[str, np.ndarray], shown: str) -> None:
    """A file that could not be read back never replaces one that can."""
    written = read_header(temporary, shown)
    with safe_open(temporary, framework="np"):
        pass
    if written.tensors.keys() != arrays.keys():
        raise BranchgraphError(f"{shown}: what was written reads back differently; save it again")


# -- reading ---------------------------------------------------------------------------------------


def load(path: Path, *, allow_nonfinite: bool = False) -> tuple[Graph, Store]:
    """The graph of the file at `path`, and a store with the values the file holds.

    States that had no value when the file was written are absent from the store. Raises
    `FormatError` unless every tensor belongs to a declared state, has its shape and dtype, and is
    free of NaN and infinity; `allow_nonfinite=True` lets those pass.
    """
    header = read_header(path)
    graph = _graph(header, os.fspath(path))
    store = Store()
    for state, value in _values(path, header, graph, allow_nonfinite).items():
        store.commit(state, value)
    return graph, store


def load_graph(path: Path) -> Graph:
    """The graph of the file at `path`; values are neither read nor checked."""
    return _graph(read_header(path), os.fspath(path))


def read_notes(path: Path) -> dict[str, str]:
    """The notes of the file at `path`; neither the graph nor values are read."""
    header = read_header(path)
    _check_format(header.metadata, os.fspath(path))
    return {name: text for name, text in header.metadata.items() if name not in _OWN}


def load_values(
    path: Path, graph: Graph, store: Store, *, partial: bool = False, allow_nonfinite: bool = False
) -> None:
    """Take the values of the file at `path` into `store`, matched to `graph` by label.

    The file may hold another graph over the same states (training against inference). Raises
    `FormatError` naming the states that only one side declares, unless `partial=True`, and those
    whose shape or dtype differs; `store` is unchanged then. States that the file declares without
    a value keep the one they have.
    """
    shown = os.fspath(path)
    header = read_header(path)
    theirs = _graph(header, shown)
    ours = {label: state for state, label in Labels(graph).states.items()}
    declared = set(Labels(theirs).states.values())
    missing = [label for label in ours if label not in declared]
    unexpected = [label for label in header.tensors if label not in ours]
    if (missing or unexpected) and not partial:
        sides = (("misses", missing), ("has unexpected", unexpected))
        found = " and ".join(f"{verb} {_listed(names)}" for verb, names in sides if names)
        raise FormatError(
            f"{shown}: expected the states of graph {graph.name!r}; the file {found}. "
            "Load into the graph it was saved from, or pass partial=True to take what matches"
        )
    taken: dict[State, np.ndarray] = {}
    labels = Labels(theirs).states
    for state, value in _values(path, header, theirs, allow_nonfinite).items():
        label = labels[state]
        if label in ours:
            _check_entry(label, ours[label].type, header.tensors[label], shown)
            taken[ours[label]] = value
    for state, value in taken.items():
        store.commit(state, value)


def _graph(header: Header, shown: str) -> Graph:
    """The verified graph of the file."""
    _check_format(header.metadata, shown)
    try:
        graph = parse_graph(header.metadata["graph"])
        verify(graph)
    except GraphError as error:
        raise FormatError(f"{shown}: the graph breaks a rule: {error}") from error
    except FormatError as error:
        raise FormatError(f"{shown}: in the text of the graph, {error}") from error
    return graph


def _check_format(metadata: Mapping[str, str], shown: str) -> None:
    if metadata.get("format") != FORMAT:
        named = f"the format {metadata['format']!r:.60}" if "format" in metadata else "none"
        raise FormatError(
            f"{shown}: a safetensors file, but not one of branchgraph: expected the metadata to "
            f"name the format {FORMAT!r}, got {named}; write such files with "
            "branchgraph.ir.file.save"
        )
    version = metadata.get("version", "")
    if re.fullmatch(r"[0-9]{1,9}", version, re.ASCII) and int(version) > VERSION:
        needs = metadata.get("needs", "")
        wanted = f">={needs}" if _RELEASE.match(needs) else ""
        raise FormatError(
            f"{shown}: written in version {version} of the format; this branchgraph reads version "
            f"{VERSION}. Upgrade: python -m pip install --upgrade 'branchgraph{wanted}'"
        )
    if version != str(VERSION):
        raise FormatError(
            f"{shown}: expected version {VERSION} of the format, got {version!r:.60}; "
            "save the file again"
        )
    if "graph" not in metadata:
        raise FormatError(
            f"{shown}: expected the text of a graph in the metadata, got none; save the file again"
        )


def _values(
    path: Path, header: Header, graph: Graph, allow_nonfinite: bool
) -> dict[State, np.ndarray]:
    """All tensors of the file by state, checked before any of them is read."""
    shown = os.fspath(path)
    states = {label: state for state, label in Labels(graph).states.items()}
    unknown = [name for name in header.tensors if name not in states]
    if unknown:
        raise FormatError(
            f"{shown}: holds {_listed(unknown)}, which its graph does not declare; "
            "save the file again"
        )
    for label, entry in header.tensors.items():
        _check_entry(label, states[label].type, entry, shown)
    values: dict[State, np.ndarray] = {}
    try:
        with safe_open(path, framework="np") as file:
            for label in header.tensors:
                value = file.get_tensor(label)
                _check_elements(label, value, shown, allow_nonfinite)
                values[states[label]] = value
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{shown}: broken tensors: {error}; copy or save the file again"
        ) from error
    return values


def _check_entry(label: str, type: TensorType, entry: Entry, shown: str) -> None:
    if (_SPELLING[type.dtype], type.shape) != (entry.dtype, entry.shape):
        expected = Entry(_SPELLING[type.dtype], tuple(int(str(d)) for d in type.shape))
        raise FormatError(
            f"{shown}: state {label}: expected {expected} as the graph declares, got {entry}; "
            "load the file that was saved with this graph"
        )


def _check_elements(label: str, value: np.ndarray, shown: str, allow_nonfinite: bool) -> None:
    if value.dtype == np.bool_ and np.any(value.view(np.uint8) > 1):
        raise FormatError(f"{shown}: state {label}: expected 0 and 1 as bool, got other bytes")
    if allow_nonfinite or not DType.of(value.dtype).is_float:
        return
    bad = value.size - int(np.count_nonzero(np.isfinite(value)))
    if bad:
        raise FormatError(
            f"{shown}: state {label}: expected finite values, got {bad} of {value.size} that are "
            "NaN or infinite; pass allow_nonfinite=True to load them all the same"
        )


def _listed(names: Iterable[str]) -> str:
    """`a, b, c and 12 more`."""
    names = list(names)
    shown = ", ".join(name[:80] for name in names[:_LISTED])
    more = len(names) - _LISTED
    return f"{shown} and {more} more" if more > 0 else shown
