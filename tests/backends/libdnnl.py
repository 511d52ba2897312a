"""What tests of the oneDNN backend share: the library or a skip, and arrays in and out."""

from __future__ import annotations

import os
import platform
import sys

import numpy as np
import pytest

from branchgraph.backends.onednn import library
from branchgraph.backends.onednn.primitives import Arg, Desc, Memory, Primitive, reorder
from branchgraph.ir.errors import MissingError


def require_libdnnl() -> None:
    """Skip the calling module without oneDNN; fail where CI should have installed it."""
    try:
        library.load()
    except MissingError as error:
        if os.environ.get("CI") and (sys.platform, platform.machine()) == ("linux", "x86_64"):
            pytest.fail(str(error))
        pytest.skip(str(error), allow_module_level=True)


def execute(
    primitive: Primitive, inputs: dict[int, np.ndarray], *outputs: int
) -> tuple[np.ndarray, ...]:
    """Run on row-major arrays, whatever layouts the primitive has chosen."""
    memories = {index: placed(_layout(primitive, index), x) for index, x in inputs.items()}
    for index in outputs:
        memories.setdefault(index, Memory.empty(_layout(primitive, index)))
    if primitive.scratchpad is not None:
        memories[Arg.SCRATCHPAD] = Memory.empty(primitive.scratchpad)
    primitive.run(memories)
    return tuple(fetched(memories[index]) for index in outputs)


def _layout(primitive: Primitive, index: int) -> Desc:
    layout = primitive.argument(index)
    assert layout is not None, f"{primitive} has no argument {index}"
    return layout


def placed(layout: Desc, x: np.ndarray) -> Memory:
    """A copy of `x` in a layout."""
    if layout.strides is None and layout.dims != x.shape:  # a workspace: opaque bytes
        return Memory(layout, np.ascontiguousarray(x))
    plain = Desc.strided(x.shape, x.dtype)
    memory = Memory.empty(layout)
    move = reorder(plain, layout)
    move.run({Arg.SRC: Memory(plain, np.ascontiguousarray(x)), Arg.DST: memory} | _scratch(move))
    return memory


def fetched(memory: Memory) -> np.ndarray:
    """A row-major copy of what a memory holds."""
    plain = Desc.strided(memory.desc.dims, memory.desc.dtype)
    result = np.empty(plain.dims, plain.dtype.numpy)
    move = reorder(memory.desc, plain)
    move.run({Arg.SRC: memory, Arg.DST: Memory(plain, result)} | _scratch(move))
    return result


def _scratch(primitive: Primitive) -> dict[int, Memory]:
    scratchpad = primitive.scratchpad
    return {} if scratchpad is None else {Arg.SCRATCHPAD: Memory.empty(scratchpad)}
