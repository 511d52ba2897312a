"""A folder that carries one cell (network, mode, batch) to the process that measures it.

    meta.json     what is below, and the threads, learning rate and momentum
    params.npz    p0, p1, ...: the arrays that a peer's `forward(p, ...)` reads
    states.npz    s0, s1, ...: the states of the declared network, for branchgraph itself
    inputs.npz    x, and labels in training
    NAME.py       the network in a peer's own words;  model.onnx: the same as ONNX
    NAME.error    why a peer cannot express it (model.error: why there is no model.onnx)

Imports NumPy alone: the interpreters of old peers read it too.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np


class Bundle:
    """One cell, read from its folder."""

    def __init__(self, folder):  # type: ignore[no-untyped-def]
        self.folder = Path(folder)
        self.meta = json.loads((self.folder / "meta.json").read_text())

    @property
    def training(self) -> bool:
        return self.meta["mode"] == "train"

    @property
    def trainable(self):  # type: ignore[no-untyped-def]
        """Positions of the arrays that are trained."""
        return self.meta["trainable"]

    def params(self):  # type: ignore[no-untyped-def]
        """The arrays of `params.npz` in order."""
        return list(_numbered(self.folder / "params.npz", "p"))

    def states(self):  # type: ignore[no-untyped-def]
        """The arrays of `states.npz` in order, read one by one: who copies them holds no two."""
        return _numbered(self.folder / "states.npz", "s")

    def inputs(self):  # type: ignore[no-untyped-def]
        """x, and labels in training."""
        with np.load(self.folder / "inputs.npz") as arrays:
            return [arrays[name] for name in self.meta["inputs"]]

    def module(self, name):  # type: ignore[no-untyped-def]
        """The peer's source, imported; `RuntimeError` with the reason where there is none."""
        path = self.folder / (name + ".py")
        self.require(path)
        spec = importlib.util.spec_from_file_location("network_" + name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def require(self, path):  # type: ignore[no-untyped-def]
        """Raise `RuntimeError` with the reason that was left if `path` was not made."""
        reason = path.with_suffix(".error")
        if not path.exists():
            raise RuntimeError(reason.read_text() if reason.exists() else "no " + path.name)


def save(folder, meta, params, states, inputs):  # type: ignore[no-untyped-def]
    """Write a bundle; sources are written beside it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").write_text(json.dumps({**meta, "inputs": list(inputs)}))
    np.savez(folder / "params.npz", **{f"p{i}": a for i, a in enumerate(params)})
    np.savez(folder / "states.npz", **{f"s{i}": a for i, a in enumerate(states)})
    np.savez(folder / "inputs.npz", **inputs)


def _numbered(path, letter):  # type: ignore[no-untyped-def]
    with np.load(path) as arrays:
        for i in range(len(arrays.files)):
            yield arrays[letter + str(i)]
