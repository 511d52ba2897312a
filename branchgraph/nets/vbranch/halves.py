"""Virtual branching: B copies of a network that share a part of each layer (vbranch, section 2).

How a layer is cut into blocks, and how shared states are read, is in `ir.sharing`; here are the
layers that networks are declared with. All blocks are drawn with the fans of the whole layer.

`legacy_layout` is the layout of the reference: a bias a block (b_ss + b_us_i, b_su_i + b_uu_i), and
convolutions larger than 1x1 keep a W_us_i of each branch at s = n (section 7, Q3 and Q5).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import prod

from branchgraph.ir.builder import (
    Size,
    batch_norm,
    conv,
    dense,
    spread,
    state,
)
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Location, Value, at, here, path
from branchgraph.ir.initialisers import Initialiser, Ones, Zeros
from branchgraph.ir.ops.norm import BatchNormTraining
from branchgraph.ir.sharing import (
    Block,
    Cut,
    Halves,
    Share,
    SharedReads,
    channel_state,
    shared_channels,
)
from branchgraph.ir.types import DType
from branchgraph.nets.units import Fans, he_fan_in

#: Default of batch norm in the reference, and the weight of old running statistics in Keras.
EPS, DECAY = 1e-6, 0.99


class SharingWarning(UserWarning):
    """A share that shares nothing."""


def same_pads(size: tuple[int, ...], kernel: tuple[int, ...], stride: int) -> tuple[int, ...]:
    """TensorFlow's `same`: leading, then trailing pads; the odd one is at the bottom and right.

    total = max((ceil(size / stride) - 1) stride + kernel - size, 0)
    """
    total = [max((-(-n // stride) - 1) * stride + k - n, 0) for n, k in zip(size, kernel)]
    return (*(t // 2 for t in total), *(t - t // 2 for t in total))


class SharedStates:
    """States that exist once for B branches, read so that their gradient is the mean.

    Without `mean` they have the plain gradient: for networks with one loss.
    """

    def __init__(self, graph: Graph, branches: int, mean: bool = True) -> None:
        self.graph = graph
        self._reads = SharedReads(graph, branches, mean)
        self._values: dict[str, Value] = {}
        self._readers: set[tuple[str, Location]] = set()
        self._warned: set[str] = set()
        self._halves: dict[str, str] = {}

    def agree(self, layer: str, halves: str) -> None:
        """A layer has the same halves in all branches; `GraphError` where they differ."""
        where = "/".join(filter(None, (path(_outside()), layer)))
        first = self._halves.setdefault(where, halves)
        if first != halves:
            raise GraphError(f"{where}: another branch has {first}, not {halves}")

    def read(
        self, layer: str, kind: str, shape: tuple[int, ...], init: Initialiser, dtype: DType
    ) -> Value:
        """The state `<layer>.<kind>` of the present location outside all branches."""
        with at(_outside()):
            key = f"{path(here())}/{layer}.{kind}".lstrip("/")
            if key not in self._values:
                new = state(self.graph, layer, kind, shape, init, dtype=dtype)
                self._values[key] = self._reads.scaled(new)
        if (key, here()) in self._readers:
            raise GraphError(f"two layers of a branch share {key}; give them different names")
        self._readers.add((key, here()))
        return self._values[key]

    def warn_unshared(self, layer: str) -> None:
        """Say once that the shared half of a layer is made by weights of each branch (Q4)."""
        where = "/".join(filter(None, (path(_outside()), layer)))
        if where in self._warned:
            return
        self._warned.add(where)
        text = f"{where} shares channels, but none that it reads is shared: each branch makes them"
        warnings.warn(text, SharingWarning, stacklevel=2)


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
        cut = self._cut(x, s, features, 1)
        weight = self._weight(x, name, cut)
        b = self._bias(x, name, cut) if bias else False
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
        cut = self._cut(x, s, filters, prod(area))
        weight = self._weight(x, name, cut, area)
        b = self._bias(x, name, cut) if bias else False
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
        if self.shared:
            self.shared.agree(name, _described(x))
        gamma = channel_state(x, self._block(x, name, "gamma", Ones()))
        beta = channel_state(x, self._block(x, name, "beta", Zeros()))
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

    def _block(self, x: Halves, layer: str, kind: str, init: Initialiser) -> Block:
        """The blocks of a state: of all branches or of this one."""

        def block(part: str, shape: tuple[int, ...], shared: bool) -> Value:
            name = f"{kind}_{part}" if part else kind
            if shared and self.shared:
                return self.shared.read(layer, name, shape, init, x.value.dtype)
            return state(x.value.graph, layer, name, shape, init, dtype=x.value.dtype)

        return block

    def _cut(self, x: Halves, s: int, n: int, area: int) -> Cut:
        a, v = x.sizes
        return Cut(a, v, s, n - s, whole=area == 1 or not self.legacy_layout)

    def _weight(self, x: Halves, layer: str, cut: Cut, kernel: tuple[int, ...] = ()) -> Value:
        if self.shared:
            self.shared.agree(layer, f"{_described(x)} -> {cut.s}+{cut.u}")
            if cut.unshared:
                self.shared.warn_unshared(layer)
        area = prod(kernel)
        init = self.init(x.channels * area, (cut.s + cut.u) * area)
        return cut.weight(self._block(x, layer, "weight", init), kernel)

    def _bias(self, x: Halves, layer: str, cut: Cut) -> bool | Value:
        return cut.bias(self._block(x, layer, "bias", Zeros()), per_block=self.legacy_layout)


def _described(x: Halves) -> str:
    """Shared and unique channels, or the channels of a plain tensor."""
    if x.shared is None:
        return f"{x.channels} plain"
    return f"{x.shared}+{x.channels - x.shared}"


def _spatial(x: Halves) -> tuple[int, ...]:
    sizes = tuple(n for n in x.value.shape[2:] if isinstance(n, int))
    if len(sizes) != len(x.value.shape) - 2:
        raise GraphError(f"padding `same` needs concrete sizes, got {x.value.type}; give `pad`")
    return sizes


def _outside() -> Location:
    """The present location without its branches."""
    return tuple(part for part in here() if not part.branch)
