"""One layer after another as one layer (R1, R2, R6, R7, R8, R14), and where that is exact.

For a first layer (W1, b1, k1, s1, d1, p1) and a second one, written for one spatial axis:

    W'[o, c, t] = sum_m sum_{u s1 d2 + i d1 = t} W2[o, m, u] W1[m, c, i]
    b'[o]       = b2[o] + sum_{m, u} W2[o, m, u] b1[m]
    stride s1 s2,  pad p1 + p2 s1 at both ends,  K = (k1 - 1) d1 + (k2 - 1) s1 d2 + 1 taps

where tap t is i of the first kernel at u of the second; where all taps lie D apart, the result has
dilation D. A batch norm or scale is a depthwise 1x1 kernel, so

    R1, R13  layer, then scale and shift    W'[o] = a[o] W[o],  b'[o] = a[o] b[o] + t[o]
    R2       scale and shift, then layer    W'[o, c] = W[o, c] a[c],
                                            b'[o] = b[o] + sum_{c, i} W[o, c, i] t[c]
    R6       1x1, then k x k                taps of the second at dilation s1
    R7       k x k, then 1x1
    R8       k1 x k1, then k2 x k2
    R14      dense, then dense              W2 W1,  W2 b1 + b2

The second layer sees zeros around the result of the first, the fused layer what the first would
make there. They agree iff the second has no padding or

    (k1 - 1) d1 - p1 < s1     and     H1 s1 - p1 >= H

at the leading and the trailing end of every padded axis (no tap of the first is inside x there; 1x1
kernels fulfil it, and full padding), and b1 = 0. With b1 the bias becomes the map B = second(b1
everywhere, zeros around it), which needs a known size: exact for that size.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from branchgraph.ir.dims import DimLike
from branchgraph.ir.functions import broadcast_to
from branchgraph.ir.graph import Value
from branchgraph.passes.fuse_branches.layer import (
    Layer,
    Lazy,
    applied_to,
    column,
    once,
    operator,
    product_weight,
    reshaped,
    total,
)


def composed(second: Layer, first: Layer, *, bias_maps: bool) -> Layer | str:
    """`second` after `first` as a layer of the input of `first`, or why that is not exact."""
    ring = [a for a in range(second.axes) if second.begin[a] or second.end[a]]
    for a in ring:
        if not _zero_beyond(first, second, a):
            return (
                f"spatial axis {a} is padded between two convolutions, and beyond its border the "
                "first is not zero"
            )
    maps = [second.map] if second.map else []
    biases = [second.bias] if second.bias else []
    made = False
    if first.map:
        maps.append(_mapped(second, first.map))
    if first.bias and not ring:
        biases.append(_constant(second, first.bias))
    elif first.bias:
        reason = _no_map(first, bias_maps)
        if reason:
            return reason
        maps.append(_mapped(second, _everywhere(first)))
        made = True
    return replace(
        _geometry(second, first),
        bias=_sum(biases),
        map=_sum(maps),
        nodes=(*second.nodes, *first.nodes),
        rules=_rules(second, first),
        for_size=first.for_size or second.for_size or made,
    )


def _zero_beyond(first: Layer, second: Layer, a: int) -> bool:
    """Whether no tap of `first` is inside its input where `second` pads, along one axis."""
    s, reach = first.stride[a], (first.kernel[a] - 1) * first.dilation[a]
    if second.begin[a] and reach - first.begin[a] >= s:
        return False
    if not second.end[a] or first.end[a] >= reach:
        return True
    after, size = first.size[a], first.x.shape[2 + a]
    if not isinstance(after, int) or not isinstance(size, int):
        return False
    return after * s - first.begin[a] >= size


def _no_map(first: Layer, bias_maps: bool) -> str:
    """Why there can be no bias map, or nothing."""
    if not all(isinstance(d, int) for d in first.size):
        return "a bias meets zero padding, and the size is not known for a bias map; bind it"
    if not bias_maps:
        return "a bias meets zero padding; bias_maps=true repairs it with a bias for each position"
    return ""


def _geometry(second: Layer, first: Layer) -> Layer:
    """Kernel, stride, pad and dilation of the whole; biases are those of `second`."""
    outer = tuple(s * d for s, d in zip(first.stride, second.dilation))
    reach = tuple(
        (k2 - 1) * u + (k1 - 1) * d
        for k2, u, k1, d in zip(second.kernel, outer, first.kernel, first.dilation)
    )
    unit = tuple(
        gcd(u if k2 > 1 else 0, d if k1 > 1 else 0) or 1
        for k2, u, k1, d in zip(second.kernel, outer, first.kernel, first.dilation)
    )
    kernel = tuple(r // u + 1 for r, u in zip(reach, unit))
    groups = first.groups if second.depthwise else gcd(second.groups, first.groups)
    return replace(
        second,
        x=first.x,
        weight=once(lambda: product_weight(second, first, unit, kernel, groups)),
        shape=(second.filters, first.channels // groups, *kernel),
        stride=tuple(a * b for a, b in zip(first.stride, second.stride)),
        begin=tuple(p + q * s for p, q, s in zip(first.begin, second.begin, first.stride)),
        end=tuple(p + q * s for p, q, s in zip(first.end, second.end, first.stride)),
        dilation=unit,
        groups=groups,
        ones=first.ones and second.ones,
        tap=_tap(second, first, outer, unit),
    )


def _tap(
    second: Layer, first: Layer, outer: tuple[int, ...], unit: tuple[int, ...]
) -> tuple[int, ...]:
    """Where the tap of two layers of one tap is."""
    inside = (t * d for t, d in zip(first.position, first.dilation))
    return tuple((t * u + i) // e for t, u, i, e in zip(second.position, outer, inside, unit))


def _rules(second: Layer, first: Layer) -> frozenset[str]:
    if second.adjusts:
        return second.rules | first.rules
    if first.adjusts:
        return second.rules | {"R2"}
    both = second.rules | first.rules
    if not second.axes:
        return both | {"R14"}
    if first.pointwise:
        return both | {"R6"}
    return both | {"R7" if second.pointwise else "R8"}


def _constant(second: Layer, bias: Lazy) -> Lazy:
    return once(lambda: applied_to(second, bias()))


def _everywhere(first: Layer) -> Lazy:
    """The bias of `first` at every position of its result: [1, M, *size]."""
    assert first.bias is not None
    bias = first.bias
    shape: tuple[DimLike, ...] = (1, first.filters, *first.size)
    return once(lambda: broadcast_to(_row(bias(), first.axes), shape))


def _row(bias: Value, axes: int) -> Value:
    """[M] as [1, M, 1, ...]."""
    return reshaped(column(bias, 1 + axes), (1, bias.shape[0], *(1,) * axes))


def _mapped(second: Layer, values: Lazy) -> Lazy:
    """What `second` makes of given values [1, M, *size], without its own bias."""
    return once(lambda: second.x.graph.emit(operator(second), values(), second.weight()))


def _sum(parts: list[Lazy]) -> Lazy | None:
    """The sum of parts, or nothing."""
    return once(lambda: total(part() for part in reversed(parts))) if parts else None
