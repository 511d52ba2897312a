"""Windows of convolutions and pools as libraries describe them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from branchgraph.ir.dims import DimLike, Shape
from peers.walker import Call, NotExpressible


@dataclass(frozen=True)
class Pool:
    """One pooling: sizes, and how a library may say where its windows end."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    begin: tuple[int, ...]
    #: Trailing padding that holds every window.
    end: tuple[int, ...]
    #: Whether plain windows of symmetric padding are the same.
    plain: bool
    #: Whether windows that overhang the end, kept, are the same with symmetric padding.
    ceil: bool

    @staticmethod
    def of(call: Call) -> Pool:
        """The geometry of a pooling step."""
        op: Any = call.op
        n = len(op.kernel)
        begin = op.pad[:n]
        sizes = [sized(d) for d in call.shape()[2:]]
        out = [sized(d) for d in call.out_shape[2:]]
        each = list(zip(sizes, out, op.kernel, op.stride, begin))
        reach = [(o - 1) * s + k - h - b for h, o, k, s, b in each]
        plain = all(o == (h + 2 * b - k) // s + 1 for h, o, k, s, b in each)
        ceil = all(
            o == -(-(h + 2 * b - k) // s) + 1 and (o - 1) * s < h + b for h, o, k, s, b in each
        )
        small = all(2 * b <= k for _, _, k, _, b in each)
        end = tuple(max(r, 0) for r in reach)
        return Pool(op.kernel, op.stride, begin, end, plain and small, ceil and small)

    @property
    def padded(self) -> bool:
        return any(self.begin) or any(self.end)


def symmetric(call: Call) -> tuple[int, ...] | None:
    """The padding of a convolution, where both ends have the same."""
    op: Any = call.op
    begin, end = op.pad[: op.axes], op.pad[op.axes :]
    return tuple(begin) if begin == end else None


def two_axes(call: Call, peer: str) -> None:
    """Raise `NotExpressible` unless the window has two spatial axes."""
    if len(call.shape()) != 4:
        raise NotExpressible(f"not expressible in {peer}: {call.step.opcode} not over two axes")


def sized(dim: DimLike) -> int:
    """A size that is known; rows are bound before peers see a graph."""
    if isinstance(dim, int):
        return dim
    raise NotExpressible(f"the size {dim} is not known before data comes")


def shape_text(shape: Shape) -> str:
    """A shape to reshape to: what depends on data is -1."""
    return "(" + ", ".join(str(d) if isinstance(d, int) else "-1" for d in shape) + ",)"


def short(sizes: tuple[int, ...]) -> str:
    """`2` for (2, 2), as people write it."""
    return str(sizes[0]) if len(set(sizes)) == 1 else str(tuple(sizes))
