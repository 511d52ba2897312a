"""Sharing channels between branches: halves, the blocks of a layer, shared states.

A value of a branch has a shared half of some channels and a unique half. Both live in one tensor,
the shared channels first, so that every layer of a branch is an ordinary layer. With a and v the
shared and unique channels of the input, s and u those of the output, the weight of branch i is

    W_i = [[W_ss, W_us_i],      [s, a] [s, v]         W_ss exists once, the others once a branch;
           [W_su_i, W_uu_i]]    [u, a] [u, v]         first letter: input half, second: output half

an expression over states (OIHW, and [out, in] for dense layers). At s = 0 it is one matrix a
branch, at s = n one for all. Blocks of width 0 do not exist. There is one bias a half, shared where
W_ss exists, b_i = [b_s, b_u_i]; or one a block, b_i = [b_ss + b_us_i, b_su_i + b_uu_i].

Shared states are read through `scale_gradient(., 1/B)`: the gradient of the sum of the branches'
losses is then the mean over branches for a shared state and its branch's own for a unique one.
(The system that followed arXiv 1803.05872.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from branchgraph.ir.builder import concat, merge_sum, scale_gradient
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, at
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.state import State
from branchgraph.ir.types import DType

Share = float | int


def shared_channels(share: Share, channels: int) -> int:
    """trunc(share * channels) for a float, `share` itself for an int.

    The product is double precision and not rounded: 0.29 of 100 channels are 28.
    """
    if channels < 1:
        raise GraphError(f"a layer has at least one channel, got {channels}")
    if type(share) not in (int, float):
        raise GraphError(f"a share is an int (channels) or a float (fraction), got {share!r}")
    if not 0 <= share <= (channels if isinstance(share, int) else 1):
        raise GraphError(
            f"a share of {share!r} of {channels} channels: expected 0.0 to 1.0 or 0 to n"
        )
    return share if isinstance(share, int) else int(share * channels)


# -- halves ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves:
    """A tensor of one branch whose first `shared` channels are the shared half.

    `shared` is None for a plain tensor: an input, or halves that were merged.
    """

    value: Value
    shared: int | None = None

    @property
    def channels(self) -> int:
        """All channels, of both halves."""
        size = self.value.shape[1]
        if not isinstance(size, int) or size < 1:
            raise GraphError(f"halves need a number of channels, got {self.value.type}")
        return size

    @property
    def sizes(self) -> tuple[int, int]:
        """Shared and unique channels for a layer that shares; a plain tensor counts as shared."""
        a = self.channels if self.shared is None else self.shared
        return a, self.channels - a

    def map(self, function: Callable[..., Value], *args: Any, **options: Any) -> Halves:
        """A layer that works on each channel by itself: activation, pooling."""
        return Halves(function(self.value, *args, **options), self.shared)

    def merged(self) -> Halves:
        """The half merge: concat(shared, unique) as one plain tensor."""
        return Halves(self.value)

    def half(self, unique: bool) -> Value | None:
        """One half as a tensor; None if it is empty."""
        s, n = self.shared or 0, self.channels
        start, size = (s, n - s) if unique else (0, s)
        if size in (0, n):
            return self.value if size else None
        return self.value.graph.emit(Slice(axis=1, start=start, size=size), self.value)


def add(*terms: Halves, name: str = "") -> Halves:
    """Sum, half by half; empty halves are ignored."""
    shared = _split(terms, "add")
    if len({(t.shared, t.channels) for t in terms}) == 1:
        return Halves(merge_sum(*(t.value for t in terms), name=name), shared)
    halves = [[h for t in terms if (h := t.half(unique)) is not None] for unique in (False, True)]
    widths = [{h.shape[1] for h in half} for half in halves]
    if shared is None or any(len(w) > 1 for w in widths):
        sizes = ", ".join(f"{t.shared}+{t.channels - (t.shared or 0)}" for t in terms)
        raise GraphError(f"add {name}: halves differ (shared+unique channels: {sizes})")
    sums = [merge_sum(*half) if len(half) > 1 else half[0] for half in halves if half]
    return Halves(concat(*sums, name=name), max(t.shared or 0 for t in terms))


def concatenate(*parts: Halves, name: str = "") -> Halves:
    """All shared halves, then all unique halves: not the channel order of an unbranched network."""
    shared = _split(parts, "concatenate")
    order = [h for unique in (False, True) for p in parts if (h := p.half(unique)) is not None]
    total = None if shared is None else sum(p.shared or 0 for p in parts)
    return Halves(concat(*order, name=name), total)


def _split(values: tuple[Halves, ...], what: str) -> int | None:
    """The shared channels of the first value; all are split, or none is."""
    if len({v.shared is None for v in values}) != 1:
        raise GraphError(f"{what}: some values have halves and some are plain; split or merge all")
    return values[0].shared


# -- the blocks of a layer -------------------------------------------------------------------------


class Block(Protocol):
    """Makes or finds the block `part` (`ss`, `us`, ..., or `` for the whole) of a state."""

    def __call__(self, part: str, shape: tuple[int, ...], shared: bool) -> Value: ...


@dataclass(frozen=True)
class Cut:
    """How a layer is cut: a + v channels in, s + u channels out.

    `whole` says that a layer with u = 0 is one matrix for all branches, whatever it reads.
    """

    a: int
    v: int
    s: int
    u: int
    whole: bool = True

    @property
    def uncut(self) -> bool:
        """Whether the layer is one matrix: of a branch (s = 0), or of all."""
        return self.s == 0 or (self.u == 0 and self.whole)

    @property
    def unshared(self) -> bool:
        """Whether channels are shared that only weights of each branch make."""
        return not self.uncut and self.a == 0

    def weight(self, block: Block, kernel: tuple[int, ...] = ()) -> Value:
        """[[W_ss, W_us], [W_su, W_uu]] of the module's docstring."""
        n, c = self.s + self.u, self.a + self.v
        if self.uncut:
            return block("", (n, c, *kernel), self.s > 0)

        def row(out: str, size: int) -> Value | None:
            columns = (("s", self.a), ("u", self.v))
            return _stacked(
                1,
                *(
                    block(f"{half}{out}", (size, width, *kernel), half + out == "ss")
                    for half, width in columns
                    if size and width
                ),
            )

        return _one(_stacked(0, row("s", self.s), row("u", self.u)))

    def bias(self, block: Block, per_block: bool = False) -> Value:
        """[b_s, b_u], or [b_ss + b_us, b_su + b_uu] with a bias `per_block`."""
        if self.uncut:
            return block("", (self.s + self.u,), self.s > 0)
        if not per_block:
            return _one(_stacked(0, *(
                block(out, (size,), out == "s" and self.a > 0)
                for out, size in (("s", self.s), ("u", self.u)) if size
            )))  # fmt: skip
        halves = []
        for out, size in (("s", self.s), ("u", self.u)):
            parts = [half for half, width in (("s", self.a), ("u", self.v)) if size and width]
            terms = [block(f"{half}{out}", (size,), half + out == "ss") for half in parts]
            halves.append(merge_sum(*terms) if len(terms) > 1 else next(iter(terms), None))
        return _one(_stacked(0, *halves))


def channel_state(x: Halves, block: Block) -> Value:
    """One number a channel, shared in the shared half; of a plain tensor nothing is shared."""
    s, n = x.shared or 0, x.channels
    if s in (0, n):
        return block("", (n,), s == n)
    return concat(block("s", (s,), True), block("u", (n - s,), False), axis=0)


def _stacked(axis: int, *blocks: Value | None) -> Value | None:
    """The blocks that exist, one after another."""
    present = [b for b in blocks if b is not None]
    return concat(*present, axis=axis) if len(present) > 1 else next(iter(present), None)


def _one(value: Value | None) -> Value:
    if value is None:
        raise GraphError("a layer has at least one channel in and one out")
    return value


# -- shared states ---------------------------------------------------------------------------------


class SharedReads:
    """States that B branches share, read so that their gradient is the mean over branches.

    Without `mean` they have the plain gradient: for networks with one loss.
    """

    def __init__(self, graph: Graph, branches: int, mean: bool = True) -> None:
        self.graph = graph
        self.branches = branches
        self.mean = mean
        self._read: dict[State, Value] = {}
        self._scales: dict[DType, Value] = {}

    def read(self, state: State) -> Value:
        """The value of a shared state."""
        if state not in self._read:
            self._read[state] = self.scaled(self.graph.read(state))
        return self._read[state]

    def scaled(self, value: Value) -> Value:
        """`value`, its gradient divided by the number of branches."""
        if not self.mean:
            return value
        if value.dtype not in self._scales:
            with at(()):
                self._scales[value.dtype] = self.graph.constant(1.0 / self.branches, value.dtype)
        return scale_gradient(value, self._scales[value.dtype])
