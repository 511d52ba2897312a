"""Layers side by side over one input, brought to one kernel (R3, R4, R12).

Tap i of layer b reads x at i d_b - p_b beside every output position. With

    P = max_b p_b                                       the common padding
    D = the greatest common divisor of all P - p_b and of all d_b with k_b > 1
    K = max_b (P - p_b + (k_b - 1) d_b) / D + 1

tap i goes to (P - p_b + i d_b) / D of K taps with dilation D. It is exact for any alignment if the
strides agree and the results have one size. What comes after the end follows from the size: with
p'_b the trailing padding and c_b = p_b + p'_b - (k_b - 1) d_b,

    P' = c_b - P + (K - 1) D      for a b where that is not negative (the one that reaches furthest)

R12 is the case of different dilations, R4 that of different groups: gcd_b g_b groups hold them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd
from typing import Any

from branchgraph.ir.graph import Value
from branchgraph.passes.fuse_branches.layer import Layer, Lazy, once, placed, regrouped, total


@dataclass(frozen=True)
class Frame:
    """A kernel that holds the kernels of several layers."""

    stride: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel: tuple[int, ...]
    groups: int

    def weight(self, layer: Layer) -> Value:
        """The kernel of `layer` in this one."""
        starts = tuple(
            (p - q) // d for p, q, d in zip(self.begin, layer.begin, self.dilation)
        )  # fmt: skip
        steps = tuple(
            e // d if k > 1 else 1
            for e, d, k in zip(layer.dilation, self.dilation, layer.kernel)
        )  # fmt: skip
        return placed(regrouped(layer, self.groups), starts, steps, self.kernel)

    def around(self, like: Layer, filters: int, channels: int) -> Layer:
        """A layer with this geometry."""
        return replace(
            like,
            shape=(filters, channels // self.groups, *self.kernel),
            stride=self.stride,
            begin=self.begin,
            end=self.end,
            dilation=self.dilation,
            groups=self.groups,
            ones=False,
        )


def frame_of(layers: Sequence[Layer], groups: int | None = None) -> Frame:
    """The smallest frame that holds `layers`, which have one stride and one size of results."""
    along = [_along(layers, a) for a in range(layers[0].axes)]
    begin, end, dilation, kernel = zip(*along) if along else ((), (), (), ())
    common = reduce(gcd, (layer.groups for layer in layers)) if groups is None else groups
    return Frame(layers[0].stride, begin, end, dilation, kernel, common)


def _along(layers: Sequence[Layer], a: int) -> tuple[int, int, int, int]:
    """Leading and trailing pad, dilation and taps of one axis."""
    pad = max(layer.begin[a] for layer in layers)
    steps = [layer.dilation[a] for layer in layers if layer.kernel[a] > 1]
    unit = reduce(gcd, (*steps, *(pad - layer.begin[a] for layer in layers))) or 1
    reach = max(pad + _ahead(layer, a) for layer in layers)
    ends = (_slack(layer, a) - pad + reach for layer in layers)
    return pad, min(e for e in ends if e >= 0), unit, reach // unit + 1


def _ahead(layer: Layer, a: int) -> int:
    """How far after an output position its last tap reads."""
    return (layer.kernel[a] - 1) * layer.dilation[a] - layer.begin[a]


def _slack(layer: Layer, a: int) -> int:
    """By how much results outnumber the positions of the input, at stride 1."""
    return layer.end[a] - _ahead(layer, a)


def side_by_side(layers: Sequence[Layer]) -> Layer:
    """The sum of layers of one input, one stride and one size of results."""
    frame = frame_of(layers)
    first = layers[0]
    return replace(
        frame.around(first, first.filters, first.channels),
        weight=once(lambda: total(frame.weight(layer) for layer in layers)),
        rules=frozenset({"R3"}).union(*(v.rules for v in layers), regroups(layers, frame)),
        **summed(layers),
    )


def summed(layers: Sequence[Layer]) -> dict[str, Any]:
    """What a sum of layers has but for its kernel."""
    return {
        "bias": _total([layer.bias for layer in layers]),
        "map": _total([layer.map for layer in layers]),
        "nodes": tuple(dict.fromkeys(n for layer in layers for n in layer.nodes)),
        "for_size": any(layer.for_size for layer in layers),
    }


def _total(parts: Sequence[Lazy | None]) -> Lazy | None:
    present = [part for part in parts if part is not None]
    return once(lambda: total(part() for part in present)) if present else None


def regroups(layers: Sequence[Layer], frame: Frame) -> frozenset[str]:
    """Which of R4, R5 and R12 a frame takes."""
    found = set()
    for layer in layers:
        itself = layer.diagonal and not layer.spent
        if itself:
            found.add("R5")
        elif layer.groups != frame.groups and "R9" not in layer.rules:
            found.add("R4")
        dilated = zip(layer.kernel, layer.dilation, frame.dilation)
        if any(k > 1 and d != common for k, d, common in dilated):
            found.add("R12")
    return frozenset(found)
