"""Kernels in NumPy, for what oneDNN has no primitive for.

They work on the buffers of the plan: views cost nothing, element-wise functions write where the
result lies, and everything else evaluates its op and copies the result there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from branchgraph.backends.onednn.plan import Place, Site, Step
from branchgraph.backends.onednn.rows import Counts
from branchgraph.backends.onednn.tensors import Tensor, reshaped, row_major
from branchgraph.ir.dims import DimLike
from branchgraph.ir.op import Op
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import Binary, Unary
from branchgraph.ir.ops.merge import Maximum, Product, Sum
from branchgraph.ir.ops.reshape import Reshape, Slice, Split, Transpose
from branchgraph.ir.ops.rows import Compact, Scatter

#: What a constant may weigh to be kept; larger ones are computed in every run.
_LARGEST_CONSTANT = 1 << 20


def constant(site: Site) -> bool:
    """What no input and no state decides is computed when the plan is made."""
    if any(t.buffer not in site.builder.constants for t in site.inputs):
        return False
    if site.op.introduces:
        return False
    counted = site.first.rows is not None or _depends_on_rows(site)
    if counted and not isinstance(site.op, Full):  # whose rows are equal, however many count
        return False
    operands = [t.array(_flat(site.builder.constants[t.buffer])) for t in site.inputs]
    with np.errstate(all="ignore"):
        results = site.op.evaluate(*operands)
    if sum(r.nbytes for r in results) > _LARGEST_CONSTANT:
        return False
    for buffer, result in zip(site.first.writes, results):
        array = np.ascontiguousarray(result)
        site.builder.constants[buffer] = array
        tensor = Tensor(buffer, result.shape, site.builder.dtype(buffer), row_major(result.shape))
        site.builder.place(buffer, tensor)
    return True


def _depends_on_rows(site: Site) -> bool:
    """Whether a symbol in the op is counted only while the program runs."""
    counted = {s for i in site.builder.program.instructions for s in i.op.introduces}
    return site.first.op.symbolic and any(s in str(site.first.op) for s in counted)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def view(site: Site) -> bool:
    """Reshapes, slices, splits and transposes that move nothing."""
    op, x = site.op, site.inputs[0] if site.inputs else None
    if x is None:
        return False
    found: Sequence[Tensor | None]
    if isinstance(op, Reshape):
        found = [reshaped(x, site.shape(site.first.writes[0]))]
    elif isinstance(op, (Slice, Split, Transpose)) and x.size:
        found = _strided(op, x)
    else:
        return False
    for buffer, tensor in zip(site.first.writes, found):
        if tensor is None or tensor.shape != site.shape(buffer):
            return False
    for buffer, tensor in zip(site.first.writes, found):
        assert tensor is not None
        site.alias(buffer, tensor)
    return True


def _strided(op: Op, x: Tensor) -> list[Tensor | None]:
    """The results of an op that NumPy gives as views, found on memory that is never read."""
    probe = np.lib.stride_tricks.as_strided(
        np.empty(1, x.dtype.numpy), x.shape, [s * x.dtype.itemsize for s in x.strides]
    )
    start = probe.__array_interface__["data"][0]
    found: list[Tensor | None] = []
    for result in op.evaluate(probe):
        if result.base is None or not np.may_share_memory(result, probe):
            return [None]
        strides = tuple(s // x.dtype.itemsize for s in result.strides)
        offset = result.__array_interface__["data"][0] - start
        found.append(x.viewed(result.shape, strides, offset))
    return found


def ufunc(site: Site) -> bool:
    """One NumPy call that writes where the result lies."""
    op = site.op
    function = getattr(type(op), "function", None)
    if not isinstance(function, np.ufunc) or not isinstance(
        op, (Binary, Unary, Maximum, Product, Sum)
    ):
        return False
    buffer = site.first.writes[0]
    if not isinstance(op, Unary) and len(site.inputs) < 2:
        return False
    out = site.output(buffer, last=follows_channels_last(site, buffer))

    def emit(place: Place) -> list[Step]:
        a, *others = [place.array(t) for t in site.inputs]
        y = place.array(out)
        call = partial(function, out=y)
        if not others:
            return [(call, (a,), None)]
        steps: list[Step] = []
        for b in others:
            steps.append((call, (a, b), None))
            a = y
        return steps

    site.add(f"numpy {function.__name__}", _buffers(site), [out.buffer], emit)
    return True


def compact(site: Site) -> bool:
    """The rows where the mask holds, gathered as they lie."""
    if not isinstance(site.op, Compact):
        return False
    mask, *values = site.inputs
    if not all(v.dense and v.rows_outermost for v in values):
        return False
    outs = [site.output(b, last=v.channels_last) for b, v in zip(site.first.writes, values)]
    leading = site.builder.program.types[site.first.reads[0]].shape[0]

    def emit(place: Place) -> list[Step]:
        pairs = [(place.rows(v), place.rows(o)) for v, o in zip(values, outs)]
        return [(_gather, (place.array(mask), pairs, place.counts, leading), None)]

    site.add("numpy compact", _buffers(site), site.first.writes, emit)
    return True


def scatter(site: Site) -> bool:
    """Rows put back among zeros or the rows of a base."""
    if not isinstance(site.op, Scatter):
        return False
    mask, rows, *base = site.inputs
    buffer = site.first.writes[0]
    if not all(v.dense and v.rows_outermost for v in (rows, *base)):
        return False
    if base and base[0].channels_last != rows.channels_last:
        return False
    out = site.output(buffer, last=rows.channels_last)
    leading = site.builder.program.types[site.first.reads[0]].shape[0]

    def emit(place: Place) -> list[Step]:
        start = place.rows(base[0]) if base else None
        return [
            (
                _put_back,
                (
                    place.array(mask),
                    place.rows(rows),
                    start,
                    place.rows(out),
                    place.counts,
                    leading,
                ),
                None,
            )
        ]

    site.add("numpy scatter", _buffers(site), [buffer], emit)
    return True


def _gather(mask: np.ndarray, pairs: Any, counts: Counts, leading: DimLike) -> None:
    kept = np.flatnonzero(mask[: counts.of(leading)])
    for source, target in pairs:
        np.take(source, kept, axis=0, out=target[: len(kept)], mode="clip")


def _put_back(
    mask: np.ndarray, rows: np.ndarray, base: Any, out: np.ndarray, counts: Counts, leading: DimLike
) -> None:
    kept = np.flatnonzero(mask[: counts.of(leading)])
    out[...] = 0 if base is None else base
    out[kept] = rows[: len(kept)]


def evaluated(site: Site) -> bool:
    """The op's own meaning; its results are copied to where they belong."""
    instruction = site.first
    outs = [site.output(b, last=follows_channels_last(site, b)) for b in instruction.writes]
    op = site.op
    call = _evaluate_counted if op.introduces else _evaluate

    def emit(place: Place) -> list[Step]:
        operands = [place.array(t) for t in site.inputs]
        results = [place.array(t) for t in outs]
        return [(call, (op, operands, results), None)]

    site.add(f"numpy {op.opcode}", _buffers(site), instruction.writes, emit)
    return True


def _evaluate(op: Op, operands: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> None:
    if results and not any(r.size for r in results):
        return
    for target, result in zip(results, op.evaluate(*operands)):
        np.copyto(target, result)


def _evaluate_counted(
    op: Op, operands: Sequence[np.ndarray], results: Sequence[np.ndarray]
) -> None:
    """As `_evaluate`, where results have as many rows as data decides."""
    for target, result in zip(results, op.evaluate(*operands)):
        target[: len(result)] = result


def follows_channels_last(site: Site, buffer: int) -> bool:
    """Whether a result lies best channels last: as the first operand of its rank does."""
    rank = len(site.shape(buffer))
    for tensor in site.inputs:
        if len(tensor.shape) == rank and tensor.size > 1:
            return rank > 2 and tensor.channels_last and not tensor.row_major
    return False


def _buffers(site: Site) -> list[int]:
    return [t.buffer for t in site.inputs]


__all__ = ["compact", "constant", "evaluated", "scatter", "ufunc", "view"]
