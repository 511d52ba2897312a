"""ParaDise's blocks and those it is compared with, as functions over values.

With C input channels, K filters and T a convolution with its own batch norm (eps 1e-5):

    PD-A   y = T1(x) + T2(x) + [T_3x1(x) + T_1x3(x)] + T_grouped(x)
    PD-B   y[n] = sum_b pi[n, b] T_b(x[n]),
           pi[n] = softmax(A2 relu(A1 mean_hw(x[n]) + d1) + d2),  A1: [C // reduction, C]

(Ma et al., "Parameter disentanglement for diverse representations", Big Data Mining and Analytics
8(3), 2025, doi 10.26599/BDMA.2024.9020087.) The branches and the order of their weights are
`BRANCHES`; the skeleton is one branch of two convolutions. Gates y = x s:

    SE     s[n, c] = sigmoid(A2 relu(A1 mean_hw(x) + d1) + d2)                     (1709.01507)
    GE     s = sigmoid(nearest(mlp(gather(x))))                                    (1810.12348)
    CBAM   s[n, c] = sigmoid(M(mean_hw(x)) + M(max_hw(x))), then
           s[n, h, w] = sigmoid(bn(7x7([max_c(x), mean_c(x)])))                    (1807.06521)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace

from branchgraph.ir.builder import (
    average_pool,
    concat,
    dense,
    global_average_pool,
    max_pool,
    merge_sum,
    relu,
    reshape,
    sigmoid,
    softmax,
    state,
    weighted_sum,
)
from branchgraph.ir.dims import DimLike
from branchgraph.ir.errors import GraphError
from branchgraph.ir.functions import (
    adaptive_average_pool,
    reduce_max,
    reduce_mean,
    resize_nearest,
    scale_channels,
)
from branchgraph.ir.graph import Value, branch, scope
from branchgraph.ir.initialisers import Ones, Zeros
from branchgraph.ir.ops.reshape import Slice
from branchgraph.ir.state import Role
from branchgraph.nets.units import PYTORCH, he_fan_out

#: The branches of a PD block, in the order of PD-B's weights.
BRANCHES = ("standard1", "standard2", "skeleton", "group")


# -- disentangled convolutions ---------------------------------------------------------------------


def pd_a(
    x: Value, filters: int, *, stride: int = 1, branches: Iterable[str] = BRANCHES,
    groups: int = 64, name: str = "",
) -> Value:  # fmt: skip
    """The sum of parallel 3x3, 3x1 + 1x3 and grouped 3x3 convolutions, each with batch norm.

    Inference folds it into one 3x3 convolution. `branches` is a subset of `BRANCHES`.
    """
    name = name or x.graph.unused_name("pd_a")
    with scope(name):
        values = _disentangled(x, filters, stride, branches, groups)
    return merge_sum(*values, name=name)


def pd_b(
    x: Value, filters: int, *, stride: int = 1, branches: Iterable[str] = BRANCHES,
    groups: int = 64, reduction: int = 16, name: str = "",
) -> Value:  # fmt: skip
    """PD-A's branches weighted for each sample by a softmax gate that sees the block's input.

    The gate has C // `reduction` hidden units and one output a branch; the two convolutions of the
    skeleton share one weight.
    """
    name = name or x.graph.unused_name("pd_b")
    with scope(name):
        hidden = _reduced(x, reduction, name)
        values = _disentangled(x, filters, stride, branches, groups)
        weights = mixture(global_average_pool(x, name="pool"), len(values), hidden, len(x.shape))
    return weighted_sum(values, weights, name=name)


def ac(
    x: Value, filters: int, *, kernel: int = 3, pad: int = 1, stride: int = 1, name: str = ""
) -> Value:
    """The skeleton of an asymmetric block: a 3x1 and a 1x3 convolution, each with batch norm.

    They are centred in the window of a `kernel` x `kernel` convolution with padding `pad`, so that
    they can be added to one (ACNet, arXiv 1908.03930).
    """
    name = name or x.graph.unused_name("ac")
    margin = pad - kernel // 2
    if margin < 0:
        raise GraphError(
            f"{name}: pad {pad} is less than half of kernel {kernel}; the skeleton would have to "
            f"read a crop of x; use pad >= {kernel // 2}"
        )
    with scope(name):
        values = _skeleton(x, filters, stride, margin)
    return merge_sum(*values, name=name)


def mixture(x: Value, ways: int, hidden: int, rank: int) -> list[Value]:
    """Softmax weights over `ways` branches from features x [N, C], each [N, 1, ...] of `rank`."""
    with scope("gate"):
        h = relu(PYTORCH.dense(x, hidden, name="fc1"), name="relu")
        weights = softmax(PYTORCH.dense(h, ways, name="fc2"), name="softmax")
        shaped = reshape(weights, (x.shape[0], ways, *(1,) * (rank - 2)))
        cuts = (Slice(axis=1, start=k, size=1) for k in range(ways))
        return [x.graph.emit(cut, shaped) for cut in cuts]


def _disentangled(
    x: Value, filters: int, stride: int, branches: Iterable[str], groups: int
) -> list[Value]:
    """The values of the chosen branches, in the order of `BRANCHES`."""
    makers: dict[str, Callable[[], Value]] = {
        "standard1": lambda: _square(x, filters, stride),
        "standard2": lambda: _square(x, filters, stride),
        "skeleton": lambda: merge_sum(*_skeleton(x, filters, stride), name="sum"),
        "group": lambda: _square(x, filters, stride, groups),
    }
    values = []
    for name in chosen(branches):
        with branch(name):
            values.append(makers[name]())
    return values


def chosen(branches: Iterable[str]) -> tuple[str, ...]:
    """A subset of `BRANCHES` in their order; `GraphError` for anything else."""
    given = tuple(branches)
    unknown = [b for b in given if b not in BRANCHES]
    if unknown or not given or len(set(given)) < len(given):
        raise GraphError(
            f"a PD block's branches are distinct ones of {', '.join(BRANCHES)}, "
            f"got {', '.join(given) or 'none'}"
        )
    return tuple(b for b in BRANCHES if b in given)


def _square(x: Value, filters: int, stride: int, groups: int = 1) -> Value:
    return PYTORCH.norm(PYTORCH.conv(x, filters, 3, stride=stride, groups=groups))


def _skeleton(x: Value, filters: int, stride: int, margin: int = 0) -> list[Value]:
    """The 3x1 and the 1x3 convolution, padded by `margin` more than keeps the size."""
    values = []
    for name, kernel in (("vertical", (3, 1)), ("horizontal", (1, 3))):
        with branch(name):
            pad = tuple(k // 2 + margin for k in kernel)
            values.append(PYTORCH.norm(PYTORCH.conv(x, filters, kernel, stride=stride, pad=pad)))
    return values


def _reduced(x: Value, reduction: int, what: str) -> int:
    """C // reduction, at least one."""
    channels = x.shape[1]
    if not isinstance(channels, int) or reduction < 1 or channels // reduction < 1:
        raise GraphError(f"{what}: {channels} channels reduced {reduction} times leave none")
    return channels // reduction


# -- gates -----------------------------------------------------------------------------------------


def se(x: Value, *, reduction: int = 16, name: str = "se") -> Value:
    """Squeeze and excitation: channels scaled by a function of their means."""
    hidden = _reduced(x, reduction, name)
    with scope(name):
        scale = sigmoid(_squeezed([adaptive_average_pool(x, 1)], hidden)[0], name="gate")
        return scale_channels(x, scale)


def cbam(
    x: Value, *, reduction: int = 16, pools: Iterable[str] = ("average", "maximum"),
    spatial: bool = True, name: str = "cbam",
) -> Value:  # fmt: skip
    """Channels scaled by a function of their means and maxima, then positions.

    One two-layer perceptron serves all `pools`; without `spatial` only channels are scaled.
    """
    hidden = _reduced(x, reduction, name)
    with scope(name):
        with scope("channel"):
            scores = _squeezed(_pooled(x, pools, name), hidden)
            x = scale_channels(x, sigmoid(merge_sum(*scores), name="gate"))
        return _spatial_gate(x) if spatial else x


def _pooled(x: Value, pools: Iterable[str], what: str) -> list[Value]:
    """Global poolings of x [N, C, H, W], each [N, C, 1, 1]."""
    kinds = {"average": average_pool, "maximum": max_pool}
    names = tuple(pools)
    if not names or any(p not in kinds for p in names):
        raise GraphError(f"{what}: pools are some of {', '.join(kinds)}, got {names}")
    return [kinds[p](x, _extent(x, what), name=p) for p in names]


def _squeezed(values: list[Value], hidden: int) -> list[Value]:
    """One perceptron C -> hidden -> C with relu, applied to every value [N, C, 1, 1]."""
    channels = values[0].shape[1]
    assert isinstance(channels, int)
    inner = _shared_dense(values, hidden, "fc1")
    return _shared_dense([relu(h) for h in inner], channels, "fc2")


def _shared_dense(values: list[Value], features: int, name: str) -> list[Value]:
    """The same dense layer of several values."""
    first = PYTORCH.dense(values[0], features, name=name)
    assert first.producer is not None
    _, weight, bias = first.producer.inputs
    return [first, *(dense(v, features, weight=weight, bias=bias) for v in values[1:])]


def _spatial_gate(x: Value) -> Value:
    with scope("spatial"):
        pair = concat(reduce_max(x, 1, keepdims=True), reduce_mean(x, 1, keepdims=True))
        h = replace(PYTORCH, decay=0.99).norm(PYTORCH.conv(pair, 1, 7))
        return x * sigmoid(h, name="gate")


def ge(
    x: Value, *, extent: int = 8, parameters: bool = True, mlp: bool = False, reduction: int = 16,
    name: str = "ge",
) -> Value:  # fmt: skip
    """Gather and excite: x gated by its own context over `extent` positions (0: all of them).

    With `parameters` the context is gathered by depthwise convolutions (GE-theta), else by average
    pooling; `mlp` adds two 1x1 convolutions (GE-theta plus).
    """
    if extent not in (0, 2, 4, 8):
        raise GraphError(f"{name}: extent is 0 (global), 2, 4 or 8, got {extent}")
    height, width = _extent(x, name)
    with scope(name):
        h = _gather(x, extent) if parameters else _averaged(x, extent)
        if mlp:
            with scope("mlp"):
                h = relu(PYTORCH.conv(h, _reduced(x, reduction, name), 1, name="fc1"))
                h = PYTORCH.conv(h, _channels(x), 1, name="fc2")
        return x * sigmoid(resize_nearest(h, size=(height, width)), name="gate")


def _averaged(x: Value, extent: int) -> Value:
    sizes = _extent(x, "ge")
    return adaptive_average_pool(x, [max(s // extent, 1) if extent else 1 for s in sizes])


def _gather(x: Value, extent: int) -> Value:
    """Context by depthwise convolutions: one as large as x, or log2(extent) of stride 2."""
    channels = _channels(x)
    with scope("gather"):
        if extent == 0:
            kernel = _extent(x, "ge")
            return PYTORCH.norm(PYTORCH.conv(x, channels, kernel, pad=0, groups=channels))
        steps = extent.bit_length() - 1
        for k in range(steps):
            with scope(str(k)) if steps > 1 else nullcontext():
                x = _halved(x, last=k == steps - 1)
        return x


def _halved(x: Value, last: bool) -> Value:
    """A depthwise 3x3 convolution of stride 2, batch norm and (but for the last) ReLU.

    As in the reference, x itself is passed on where its width is 2 or 3; the states are there
    all the same, so that parameter counts and checkpoints do not depend on the size of images.
    """
    channels = _channels(x)
    if _extent(x, "ge")[1] // 2 == 1:
        _declare_unread(x, channels)
        return x
    h = PYTORCH.norm(PYTORCH.conv(x, channels, 3, stride=2, groups=channels))
    return h if last else relu(h, name="relu")


def _declare_unread(x: Value, channels: int) -> None:
    """The states of a depthwise convolution and its batch norm, which no node reads."""
    weights = (channels, 1, 3, 3)
    state(x.graph, "conv", "weight", weights, he_fan_out(9, 9 * channels), dtype=x.dtype)
    for name, init, role in (
        ("gamma", Ones(), Role.PARAMETER),
        ("beta", Zeros(), Role.PARAMETER),
        ("running_mean", Zeros(), Role.STATISTIC),
        ("running_var", Ones(), Role.STATISTIC),
    ):
        state(x.graph, "bn", name, (channels,), init, role, x.dtype)


def _channels(x: Value) -> int:
    channels = x.shape[1]
    assert isinstance(channels, int)
    return channels


def _extent(x: Value, what: str) -> tuple[int, int]:
    """Height and width, which have to be known."""
    sizes: tuple[DimLike, ...] = x.shape[2:]
    if len(sizes) != 2 or not all(isinstance(s, int) for s in sizes):
        raise GraphError(f"{what}: needs [N, C, H, W] with known sizes, got {x.type}")
    height, width = sizes
    assert isinstance(height, int)
    assert isinstance(width, int)
    return height, width
