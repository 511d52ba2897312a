"""Exits in generated kernels: the criterion with all that follows from it, and rows that move.

A score, its comparison with the threshold, the mask of the rows that stay and their number are one
kernel, which leaves the number where the runner looks for it. Where a plan is for all rows, or for
none, there is nothing to gather and nothing to put back: results are other names of what is there.
"""

from __future__ import annotations

from ctypes import addressof, c_int64
from math import prod

from branchgraph.backends.onednn.plan import Builder, Place, Site, Step
from branchgraph.backends.onednn.rows import all_stay
from branchgraph.backends.onednn.tensors import Tensor
from branchgraph.codegen import engine, exits
from branchgraph.ir.dims import Dim, DimLike
from branchgraph.ir.ops.elementwise import Compare
from branchgraph.ir.ops.exit import ExitScore
from branchgraph.ir.ops.rows import Compact, Scatter
from branchgraph.ir.types import DType


def decision(site: Site) -> bool:
    """Score, comparison with the threshold, mask of the rows that stay, and their number."""
    score, comparison, _ = (m.op for m in site.cluster.members)
    if not isinstance(score, ExitScore) or not isinstance(comparison, Compare) or engine.missing():
        return False
    logits, threshold = site.inputs
    rows = _leading(site)
    if rows is None or not _readable(logits) or comparison.relation not in exits.RELATIONS:
        return False
    mask = site.output(site.last.writes[0])
    symbol = _counted_by(site.builder, mask.buffer)
    if symbol is not None:
        site.builder.counted.add(symbol)
    classes, relation = logits.shape[1], comparison.relation
    routine = engine.routine(exits.decision(score.criterion, classes, engine.lanes(), relation))

    def emit(place: Place) -> list[Step]:
        height = place.counts.cell_of(rows)
        count = place.counts.cell(symbol) if symbol is not None else c_int64()
        call, arguments, keep = routine.call(
            [
                place.address(logits), addressof(height), place.address(threshold),
                place.address(mask), addressof(count),
            ],
            1,
        )  # fmt: skip
        return [(call, arguments, (keep, height, count))]

    site.add("llvm exit", [logits.buffer, threshold.buffer], [mask.buffer], emit)
    return True


def _counted_by(builder: Builder, mask: int) -> str | None:
    """The symbol of the number of rows that a mask keeps, if rows are selected by it."""
    for reader in builder.readers(mask):
        op = reader.op
        if isinstance(op, Compact) and reader.reads[0] == mask and _simple(op.count):
            return op.introduces[0] if op.introduces else None
    return None


def score(site: Site) -> bool:
    """The score of a criterion by itself."""
    op = site.op
    if not isinstance(op, ExitScore) or engine.missing():
        return False
    (logits,) = site.inputs
    rows = _leading(site)
    if rows is None or not _readable(logits):
        return False
    out = site.output(site.first.writes[0])
    routine = engine.routine(exits.score(op.criterion, logits.shape[1], engine.lanes()))

    def emit(place: Place) -> list[Step]:
        height = place.counts.cell_of(rows)
        addresses = [place.address(logits), addressof(height), place.address(out)]
        call, arguments, keep = routine.call(addresses, 1)
        return [(call, arguments, (keep, height))]

    site.add(f"llvm {op.criterion}", [logits.buffer], [out.buffer], emit)
    return True


def _readable(logits: Tensor) -> bool:
    return logits.dtype is DType.F32 and logits.row_major and logits.shape[1] > 0


def compact(site: Site) -> bool:
    """The rows where the mask holds, of all tensors in one pass; none move if all of them stay."""
    if not isinstance(site.op, Compact):
        return False
    mask, *values = site.inputs
    if not all(v.dense and v.rows_outermost for v in values):
        return False
    writes = site.first.writes
    planned = site.shape(writes[0])[0]
    if all_stay(planned, mask.shape[0]) and not any(_is_state(site.builder, v) for v in values):
        for buffer, value in zip(writes, values):
            site.alias(buffer, value)
        return True
    rows = _leading(site)
    if rows is None or engine.missing():
        return False
    outs = [site.output(b, last=v.channels_last) for b, v in zip(writes, values)]
    routine = engine.routine(exits.gather([_row_bytes(v) for v in values]))

    def emit(place: Place) -> list[Step]:
        height = place.counts.cell_of(rows)
        addresses = [place.address(t) for pair in zip(values, outs) for t in pair]
        call, arguments, keep = routine.call(
            [place.address(mask), addressof(height), *addresses], 1
        )
        return [(call, arguments, (keep, height))]

    site.add("llvm compact", [t.buffer for t in site.inputs], [t.buffer for t in outs], emit)
    return True


def scatter(site: Site) -> bool:
    """Rows put back among zeros or the rows of a base; none move if all of them left, or none."""
    if not isinstance(site.op, Scatter):
        return False
    mask, kept, *base = site.inputs
    if not all(v.dense and v.rows_outermost for v in (kept, *base)):
        return False
    if any(b.channels_last != kept.channels_last for b in base):
        return False
    (buffer,) = site.first.writes
    unmoved = None
    if all_stay(kept.shape[0], mask.shape[0]):
        unmoved = kept
    elif base and not kept.shape[0]:
        unmoved = base[0]
    if unmoved is not None and not _is_state(site.builder, unmoved):
        site.alias(buffer, unmoved)
        return True
    rows = _leading(site)
    if rows is None or engine.missing():
        return False
    out = site.output(buffer, last=kept.channels_last)
    routine = engine.routine(exits.scatter(_row_bytes(kept), base=bool(base)))

    def emit(place: Place) -> list[Step]:
        height = place.counts.cell_of(rows)
        start = place.address(base[0]) if base else 0
        call, arguments, keep = routine.call(
            [
                place.address(mask), addressof(height), place.address(kept), start,
                place.address(out),
            ],
            1,
        )  # fmt: skip
        return [(call, arguments, (keep, height))]

    site.add("llvm scatter", [t.buffer for t in site.inputs], [out.buffer], emit)
    return True


def _leading(site: Site) -> DimLike | None:
    """The number of rows of the first operand, if it is a number or a symbol."""
    size = site.builder.program.types[site.first.reads[0]].shape[0]
    return size if _simple(size) else None


def _simple(size: DimLike) -> bool:
    return isinstance(size, int) or size == Dim.symbol(size.symbols[0])


def _row_bytes(tensor: Tensor) -> int:
    return prod(tensor.shape[1:]) * tensor.dtype.itemsize


def _is_state(builder: Builder, tensor: Tensor) -> bool:
    return any(tensor.buffer == buffer for _, buffer in builder.program.states)
