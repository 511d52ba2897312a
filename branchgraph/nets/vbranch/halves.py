"""Virtual branching: B copies of a network that share a part of each layer (vbranch, section 2).

A value of branch i has a shared half of s channels and a unique half. Both live in one tensor, the
shared channels first, so that every layer of a branch is an ordinary layer. With a and v the shared
and unique channels of the input, s and u those of the output, the weight of branch i is

    W_i = [[W_ss, W_us_i],      [s, a] [s, v]         W_ss exists once, the others once a branch;
           [W_su_i, W_uu_i]]    [u, a] [u, v]         first letter: input half, second: output half

an expression over states (OIHW, and [out, in] for dense layers). At s = 0 it is one matrix a
branch, at s = n one for all. Blocks of width 0 do not exist, and all blocks are drawn with the fans
of the whole layer. There is one bias a half, shared where W_ss exists, b_i = [b_s, b_u_i].

Shared states are read through `scale_gradient(., 1/B)`. The gradient of the sum of the branches'
losses is then the mean over branches for a shared state and its branch's own for a unique one
(section 2.10).

`legacy_layout` is the layout of the reference: a bias a block (b_ss + b_us_i, b_su_i + b_uu_i), and
convolutions larger than 1x1 keep a W_us_i of each branch at s = n (section 7, Q3 and Q5).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from branchgraph.ir.builder import (
    Size,
    batch_norm,
    concat,
    conv,
    dense,
    merge_sum,
    scale_gradient,
    spread,
    state,
)
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Location, Value, at, here, path
from branchgraph.ir.initialisers import Initialiser, Ones, Zeros
from branchgraph.ir.ops.norm import BatchNormTraining
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.types import DType
from branchgraph.nets.units import Fans, he_fan_in

Share = float | int

#: Default of batch norm in the reference, and the weight of old running statistics in Keras.
EPS, DECAY = 1e-6, 0.99


class SharingWarning(UserWarning):
    """A share that shares nothing."""


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


def same_pads(size: tuple[int, ...], kernel: tuple[int, ...], stride: int) -> tuple[int, ...]:
    """TensorFlow's `same`: leading, then trailing pads; the odd one is at the bottom and right.

    total = max((ceil(size / stride) - 1) stride + kernel - size, 0)
    """
    total = [max((-(-n // stride) - 1) * stride + k - n, 0) for n, k in zip(size, kernel)]
    return (*(t // 2 for t in total), *(t - t // 2 for t in total))


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


class SharedStates:
    """States that exist once for B branches, read so that their gradient is the mean.

    Without `mean` they have the plain gradient: for networks with one loss.
    """

    def __init__(self, graph: Graph, branches: int, mean: bool = True) -> None:
        self.graph = graph
        self.branches = branches
        self.mean = mean
        self._values: dict[str, Value] = {}
        self._readers: set[tuple[str, Location]] = set()
        self._warned: set[str] = set()
        self._scales: dict[DType, Value] = {}

    def read(
        self, layer: str, kind: str, shape: tuple[int, ...], init: Initialiser, dtype: DType
    ) -> Value:
        """The state `<layer>.<kind>` of the present location outside all branches."""
        with at(_outside()):
            key = f"{path(here())}/{layer}.{kind}".lstrip("/")
            if key not in self._values:
                new = state(self.graph, layer, kind, shape, init, dtype=dtype)
                self._values[key] = self._scaled(new)
        if (key, here()) in self._readers:
            raise GraphError(f"two layers of a branch share {key}; give them different names")
        self._readers.add((key, here()))
        value = self._values[key]
        if value.shape != shape:
            raise GraphError(f"{key}: another branch shares {list(value.shape)}, not {list(shape)}")
        return value

    def warn_unshared(self, layer: str) -> None:
        """Say once that the shared half of a layer is made by weights of each branch (Q4)."""
        where = "/".join(filter(None, (path(_outside()), layer)))
        if where in self._warned:
            return
        self._warned.add(where)
        text = f"{where} shares channels, but none that it reads is shared: each branch makes them"
        warnings.warn(text, SharingWarning, stacklevel=2)

    def _scaled(self, value: Value) -> Value:
        if not self.mean:
            return value
        if value.dtype not in self._scales:
            with at(()):
                self._scales[value.dtype] = self.graph.constant(1.0 / self.branches, value.dtype)
        return scale_gradient(value, self._scales[value.dtype])


@dataclass(frozen=True)
class Layers:
    """The layers with weights of one branch. Without `shared` they are those of a plain network."""

    shared: SharedStates | None = None
    legacy_layout: bool = False
    batch_stats: bool = False
    init: Fans = he_fan_in

    def dense(
        self, x: Halves, features: int, share: Share = 0, *, bias: bool = True, name: str = ""
    ) -> Halves:
        """A dense layer on [N, C]: there is no flattening of halves."""
        if len(x.value.shape) != 2:
            raise GraphError(f"dense {name}: expected [N, C] (pool globally), got {x.value.type}")
        name = name or self._unused(x, "fc")
        s = self._shared_channels(share, features)
        weight = self._weight(x, name, s, (features, x.channels))
        b: bool | Value = self._bias(x, name, s, features, 1) if bias else False
        return Halves(dense(x.value, features, weight=weight, bias=b, name=name), s)

    def conv(
        self, x: Halves, filters: int, kernel: Size, share: Share = 0, *, stride: int = 1,
        pad: int | None = None, bias: bool = True, name: str = "",
    ) -> Halves:  # fmt: skip
        """A convolution; without `pad` it pads as TensorFlow's `same`."""
        name = name or self._unused(x, "conv")
        area = spread(kernel, len(x.value.shape) - 2, "kernel")
        pads = same_pads(_spatial(x), area, stride) if pad is None else pad
        s = self._shared_channels(share, filters)
        weight = self._weight(x, name, s, (filters, x.channels, *area))
        b: bool | Value = self._bias(x, name, s, filters, prod(area)) if bias else False
        options = {"stride": stride, "pad": pads, "bias": b, "weight": weight, "name": name}
        return Halves(conv(x.value, filters, kernel, **options), s)  # type: ignore[arg-type]

    def norm(self, x: Halves, *, eps: float = EPS, name: str = "") -> Halves:
        """Batch norm: scale and shift of the shared half are shared, of a plain tensor nothing.

        Statistics are those of the branch, and so are the running averages: the reference keeps
        none and uses the statistics of the test batch (`batch_stats`). Section 7 asks for averages
        over branches in the shared half. Each branch has its own here, since the halves p_i differ
        between branches and a branch that is taken out must go on as it was.
        """
        name = name or self._unused(x, "bn")
        gamma = self._channel_state(x, name, "gamma", Ones())
        beta = self._channel_state(x, name, "beta", Zeros())
        if self.batch_stats:
            op = BatchNormTraining(eps=eps)
            return Halves(x.value.graph.apply(op, x.value, gamma, beta, name=name)[0], x.shared)
        options = {"eps": eps, "decay": DECAY, "unbiased": False, "name": name}
        return Halves(batch_norm(x.value, gamma=gamma, beta=beta, **options), x.shared)  # type: ignore[arg-type]

    def _unused(self, x: Halves, kind: str) -> str:
        return x.value.graph.unused_name(kind)

    def _shared_channels(self, share: Share, channels: int) -> int:
        s = shared_channels(share, channels)
        return s if self.shared else 0

    def _block(
        self, x: Halves, layer: str, kind: str, shape: tuple[int, ...], init: Initialiser,
        shared: bool = False,
    ) -> Value | None:  # fmt: skip
        """A block of a layer: of all branches or of this one; an empty block does not exist."""
        if 0 in shape:
            return None
        if shared and self.shared:
            return self.shared.read(layer, kind, shape, init, x.value.dtype)
        return state(x.value.graph, layer, kind, shape, init, dtype=x.value.dtype)

    def _is_whole(self, s: int, n: int, area: int) -> bool:
        """Whether a layer is one matrix for all branches."""
        return s == n and (area == 1 or not self.legacy_layout)

    def _weight(self, x: Halves, layer: str, s: int, shape: tuple[int, ...]) -> Value:
        """[[W_ss, W_us], [W_su, W_uu]] of the module's docstring."""
        n, channels, *kernel = shape
        area = prod(kernel)
        init = self.init(channels * area, n * area)
        whole = self._is_whole(s, n, area)
        if s == 0 or whole:
            return _stacked(0, self._block(x, layer, "weight", shape, init, whole))
        a, v, u = *_input_halves(x), n - s
        if a == 0 and self.shared:
            self.shared.warn_unshared(layer)

        def block(kind: str, rows: int, columns: int, shared: bool = False) -> Value | None:
            size = (rows, columns, *kernel)
            return self._block(x, layer, f"weight_{kind}", size, init, shared)

        rows = [
            _stacked(1, *blocks)
            for blocks in (
                (block("ss", s, a, True), block("us", s, v)),
                (block("su", u, a), block("uu", u, v)),
            )
            if any(b is not None for b in blocks)
        ]
        return _stacked(0, *rows)

    def _bias(self, x: Halves, layer: str, s: int, n: int, area: int) -> Value:
        """[b_s, b_u]; in the legacy layout [b_ss + b_us, b_su + b_uu]."""

        def block(kind: str, size: int, shared: bool = False) -> Value | None:
            return self._block(x, layer, f"bias{kind}", (size,), Zeros(), shared)

        whole = self._is_whole(s, n, area)
        if s == 0 or whole:
            return _stacked(0, block("", n, whole))
        a, v = _input_halves(x)
        if not self.legacy_layout:
            return _stacked(0, block("_s", s, a > 0), block("_u", n - s))
        halves = []
        for out, size in (("s", s), ("u", n - s)):
            shared = block(f"_s{out}", size, out == "s") if a else None
            halves.append(_summed(shared, block(f"_u{out}", size) if v else None))
        return _stacked(0, *halves)

    def _channel_state(self, x: Halves, layer: str, kind: str, init: Initialiser) -> Value:
        """One number a channel, shared in the shared half."""
        s, n = x.shared or 0, x.channels
        if s in (0, n):
            return _stacked(0, self._block(x, layer, kind, (n,), init, s == n))
        shared = self._block(x, layer, f"{kind}_s", (s,), init, True)
        return _stacked(0, shared, self._block(x, layer, f"{kind}_u", (n - s,), init))


def _spatial(x: Halves) -> tuple[int, ...]:
    sizes = tuple(n for n in x.value.shape[2:] if isinstance(n, int))
    if len(sizes) != len(x.value.shape) - 2:
        raise GraphError(f"padding `same` needs concrete sizes, got {x.value.type}; give `pad`")
    return sizes


def _input_halves(x: Halves) -> tuple[int, int]:
    """Shared and unique input channels of a layer that shares; a plain input counts as shared."""
    a = x.channels if x.shared is None else x.shared
    return a, x.channels - a


def _stacked(axis: int, *blocks: Value | None) -> Value:
    """The blocks that exist, one after another."""
    present = [b for b in blocks if b is not None]
    return present[0] if len(present) == 1 else concat(*present, axis=axis)


def _summed(*terms: Value | None) -> Value | None:
    """The sum of the terms that exist."""
    present = [t for t in terms if t is not None]
    return merge_sum(*present) if len(present) > 1 else next(iter(present), None)


def _outside() -> Location:
    """The present location without its branches."""
    return tuple(part for part in here() if not part.branch)
