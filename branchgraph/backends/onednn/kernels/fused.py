"""Element-wise ops as generated kernels: one call for an expression, or for it over many tensors.

Operands of one element may lie anywhere; all others, and the results, lie without gaps and in the
same order. Bodies that do not are left to what carries out their parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from branchgraph.backends.onednn import library
from branchgraph.backends.onednn.clusters import Cluster
from branchgraph.backends.onednn.elementwise import Body, translatable, wanted_outside
from branchgraph.backends.onednn.kernels.common import replaceable
from branchgraph.backends.onednn.plan import Place, Site, Step
from branchgraph.backends.onednn.tensors import Tensor
from branchgraph.codegen import engine, pointwise


@dataclass(frozen=True)
class _Row:
    """A body, and where its operands and results lie."""

    body: Body
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return self.outputs[0].size


def body(site: Site) -> bool:
    """One element-wise instruction on float32, or a body of them."""
    types = site.builder.program.types
    if engine.missing() or not all(translatable(m, types) for m in site.cluster.members):
        return False
    row = _row(site, site.cluster)
    if row is None:
        return False
    _add(site, [row])
    return True


def table(site: Site) -> bool:
    """Bodies of one expression: those that fit in one call, then the others by themselves."""
    if engine.missing():
        return False
    rows, others = [], []
    for part in site.cluster.parts:
        row = _row(site, part)
        if row is None:
            others.append(part)
        else:
            rows.append(row)
    if rows:
        _add(site, rows)
    for part in others:
        site.builder.make(part)
    return True


def _row(site: Site, cluster: Cluster) -> _Row | None:
    """Tensors of the body of `cluster`, if they lie in one order."""
    builder = site.builder
    program = builder.program
    wanted = wanted_outside(cluster.members, program.results, builder.readers)
    found = Body.of(cluster.members, program.types, wanted)
    if not found.outputs:
        return None
    inputs = tuple(builder.tensors[b] for b in found.inputs)
    spread = [t for t, kind in zip(inputs, found.expression.inputs) if kind != pointwise.FLOAT]
    shape = builder.shape(found.outputs[0])
    if any(t.shape != shape or not t.size for t in spread):
        return None
    last = any(t.channels_last and not t.row_major for t in spread)
    if any(not (t.channels_last if last else t.row_major) for t in spread):
        return None
    outputs = tuple(builder.output(b, last=last) for b in found.outputs)
    if any(not (t.channels_last if last else t.row_major) for t in outputs):
        return None
    return _Row(found, inputs, outputs)


def _add(site: Site, rows: Sequence[_Row]) -> None:
    expression = rows[0].body.expression
    reads = dict.fromkeys(t.buffer for r in rows for t in r.inputs)
    writes = dict.fromkeys(t.buffer for r in rows for t in r.outputs)

    def emit(place: Place) -> list[Step]:
        placed = [
            pointwise.Row(r.size, tuple(place.address(t) for t in (*r.inputs, *r.outputs)))
            for r in rows
        ]
        return [pointwise.call(expression, placed, library.threads())]

    read = [t.buffer for r in rows for t in r.inputs]
    over = [pair for r in rows for out in r.outputs for pair in replaceable(out, r.inputs, read)]
    site.add(f"llvm {_label(rows[0].body)} of {len(rows)}", reads, writes, emit, over)


def _label(body: Body) -> str:
    """The steps, for reports."""
    names = dict.fromkeys(s.name for s in body.expression.steps if s.name != "constant")
    return "+".join(names)


__all__ = ["body", "table"]
