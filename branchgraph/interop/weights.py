"""Weights of other programs: flat arrays by name, in and out of a store.

    arrays = read_arrays("resnet18.safetensors")          # also .npz and MXNet's .params
    assign(store, arrays, names)                          # names: state -> its name in the file
    write_arrays("out.npz", collect(store, names))

The kind of a file is told by its content. A pickle is never loaded: PyTorch's own files are
refused with the line that rewrites them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from branchgraph.ir.atomic import replacing
from branchgraph.ir.errors import FormatError, MissingError
from branchgraph.ir.file_header import read_header
from branchgraph.ir.npz import open_npz
from branchgraph.ir.state import State, Store
from branchgraph.ir.types import DType
from branchgraph.mx.params import MAGIC, load_arrays, save_arrays

AnyPath = str | os.PathLike[str]

#: What frameworks keep beside weights and no network here needs: counts of batches seen.
IGNORED = ("num_batches_tracked", "/N")
#: What wrappers put before every name of a PyTorch network, longest first.
PREFIXES = ("module.1.", "module.", "1.")

_LISTED = 5


# -- files -----------------------------------------------------------------------------------------


def read_arrays(path: AnyPath) -> dict[str, np.ndarray]:
    """All arrays of an `.npz`, safetensors or MXNet `.params` file, by name.

    The prefixes `arg:` and `aux:` of MXNet are dropped. Raises `MissingError` when there is no
    file, and `FormatError` when it is none of these or damaged.
    """
    target = Path(path)
    if not target.is_file():
        raise MissingError(f"{target}: there is no such file; check the path")
    with target.open("rb") as file:
        beginning = file.read(8)
    if beginning.startswith(b"PK"):
        return _npz(target)
    if beginning == MAGIC.to_bytes(8, "little"):
        return _params(target)
    return _safetensors(target)


def _npz(path: Path) -> dict[str, np.ndarray]:
    with open_npz(path) as archive:
        if any(name.endswith("data.pkl") for name in archive):
            raise FormatError(
                f"{path}: a PyTorch file, which holds a pickle, and pickles are never loaded; "
                "write it again: safetensors.torch.save_file(model.state_dict(), 'N.safetensors')"
            )
        found = {name: archive[name] for name in archive}
    return {name: array for name, array in found.items() if array is not None}


def _params(path: Path) -> dict[str, np.ndarray]:
    arrays = load_arrays(path)
    if not isinstance(arrays, dict):
        raise FormatError(f"{path}: holds arrays without names; expected a checkpoint of a network")
    return {name.partition(":")[2] or name: array for name, array in arrays.items()}


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    header = read_header(path)
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in header.tensors}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: broken tensors: {error}; copy the file again") from error


def write_arrays(path: AnyPath, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as `.npz`, `.safetensors` or `.params` by the suffix, whole or not at all."""
    target = Path(path)
    if target.suffix == ".params":
        save_arrays(target, arrays)
        return
    if target.suffix not in (".npz", ".safetensors"):
        raise FormatError(f"{target}: the name must end in .npz, .safetensors or .params")
    with replacing(target) as temporary:
        if target.suffix == ".npz":
            with temporary.open("wb") as stream:
                np.savez(stream, **arrays)
        else:
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary)


# -- stores ----------------------------------------------------------------------------------------


def assign(
    store: Store, arrays: Mapping[str, np.ndarray], names: Mapping[State, str], *,
    ignored: Collection[str] = IGNORED, partial: bool = False, what: str = "the weights",
) -> None:  # fmt: skip
    """Give every state of `names` the array of its name; nothing is changed when something is off.

    Raises `FormatError` naming states without an array and arrays without a state (except those
    that end in one of `ignored`), unless `partial`; and arrays that do not fit or are not finite.
    """
    arrays = _unwrapped(arrays, set(names.values()))
    left = {k for k in arrays.keys() - set(names.values()) if not k.endswith(tuple(ignored))}
    missing = [name for name in names.values() if name not in arrays]
    if (missing or left) and not partial:
        sides = (("lack", missing), ("have unexpected", sorted(left)))
        found = " and ".join(f"{verb} {_listed(n)}" for verb, n in sides if n)
        raise FormatError(
            f"{what} {found}; bring the weights of this network, or pass partial=True"
        )
    taken = {s: _fitting(s, arrays[n], n, what) for s, n in names.items() if n in arrays}
    for state, value in taken.items():
        store[state] = value


def collect(store: Store, names: Mapping[State, str]) -> dict[str, np.ndarray]:
    """The values of states under the names they have elsewhere."""
    return {name: np.array(store[state]) for state, name in names.items()}


def _unwrapped(arrays: Mapping[str, np.ndarray], wanted: set[str]) -> Mapping[str, np.ndarray]:
    """`arrays` without a prefix that all of them carry and no wanted name does."""
    for prefix in PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            short = {name.removeprefix(prefix): array for name, array in arrays.items()}
            if wanted & short.keys():
                return short
    return arrays


def _fitting(state: State, array: np.ndarray, name: str, what: str) -> np.ndarray:
    dtype = DType.of(array.dtype)
    if array.shape != state.shape or dtype.is_float != state.dtype.is_float:
        raise FormatError(
            f"{what}: {name}: expected {state.type} for {state.name}, got {array.dtype}"
            f"{list(array.shape)}; bring the weights of this network"
        )
    if dtype.is_float and not np.isfinite(array.astype(np.float64)).all():
        raise FormatError(f"{what}: {name}: holds NaN or infinity; check where it comes from")
    return array.astype(state.dtype.numpy)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _LISTED
    shown = ", ".join(name[:80] for name in names[:_LISTED])
    return f"{shown} and {more} more" if more > 0 else shown
