"""A cell written down for every peer: sources, the ONNX model, values and inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from peers import bundle, chainer_ops, jax_ops, mxnet_ops, onnx_ops, torch_ops
from peers.declared import Cell
from peers.walker import NotExpressible, write

#: Peers whose source a table writes; JAX's function takes new statistics and a random key too.
SOURCES = {
    "torch": (torch_ops, "p"),
    "jax": (jax_ops, "p, s, key"),
    "chainer": (chainer_ops, "p"),
    "mxnet": (mxnet_ops, "p"),
}


def source(cell: Cell, peer: str) -> str:
    """The module that holds the cell's network in a peer's words; may raise `NotExpressible`."""
    words, arguments = SOURCES[peer]
    return write(
        cell.graph, words.TABLE, peer,
        states=cell.params, header=words.HEADER, arguments=arguments,
    )  # fmt: skip


def express(cell: Cell, folder: Path, meta: dict[str, Any]) -> None:
    """Write the bundle of a cell; what a peer cannot express leaves its reason there."""
    params, declared = cell.params, cell.declared.states
    arrays = [cell.store[s] for s in params]
    known = {s: i for i, s in enumerate(declared)}
    meta = {
        **meta,
        "outputs": list(cell.graph.outputs),
        "trainable": [i for i, s in enumerate(params) if s.role.trainable],
        "positions": [known[s] for s in params] if cell.mode == "train" else [],
    }
    bundle.save(folder, meta, arrays, [cell.store[s] for s in declared], cell.inputs)
    for peer in SOURCES:
        _write(folder / f"{peer}.py", partial(source, cell, peer))
    if cell.mode == "infer":
        _write(folder / "model.onnx", partial(onnx_ops.model_of, cell.graph, params, arrays))


def _write(path: Path, make: Callable[[], str | bytes]) -> None:
    """Write what `make` gives, or why it gives nothing (beside it, as `.error`)."""
    try:
        made = make()
    except (NotExpressible, ImportError) as error:
        path.with_suffix(".error").write_text(str(error))
    else:
        path.write_bytes(made if isinstance(made, bytes) else made.encode())
