"""Heads of early exits: small classifiers behind a tap, by the name of a template.

C channels at the tap, K classes, n convolutions of w channels (3x3, pad 1); pools keep what hangs
over (BranchyNet, arXiv 1709.01686):

    conv     pool 2/2, relu, n times (conv, pool 2/2, relu), dense K          LeNet:   n = 1, w = 2C
    alexnet  relu, pool 3/2, LRN, n times (conv, relu), pool 3/2, dense K     AlexNet: n = 2, w = 32
    convs    n times (conv, relu), dense K                                    ResNet:  n = 1, w = 32
    resnet   n residual blocks of C channels (conv, batch norm), dense K      ResNet:  n = 1
    pool     global average pool, dense K
    dense    dense K
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from branchgraph.ir.builder import (
    batch_norm,
    conv,
    dense,
    flatten,
    global_average_pool,
    lrn,
    max_pool,
    merge_sum,
    relu,
)
from branchgraph.ir.dims import DimLike
from branchgraph.ir.graph import Value, scope
from branchgraph.ir.initialisers import HeNormal
from branchgraph.ir.types import TensorType

#: The features that the classifier reads, from: tap, convolutions, channels.
Body = Callable[[Value, int, int], Value]


@dataclass(frozen=True)
class Head:
    """A template: its body, and what its options are when they are not given."""

    body: Body
    #: Convolutions (or blocks) and their channels; None where the template has no such option.
    convs: int | None = None
    width: Callable[[int], int] | None = None
    #: Fewest axes of a tap.
    rank: int = 2

    def build(self, tap: Value, classes: int, convs: int | None, width: int | None) -> Value:
        """Logits [N, classes] behind `tap`."""
        channels = _number(tap.shape[1])
        count = convs if convs is not None else self.convs or 0
        if width is None:
            width = self.width(channels) if self.width else channels
        return dense(self.body(tap, count, width), classes, name="fc")

    def misfit(self, tap: TensorType, batch: DimLike) -> str:
        """Why the head cannot hang on a tap of this type, or nothing."""
        if not tap.dtype.is_float or not tap.shape or tap.shape[0] != batch:
            return f"it has no row for every sample: {tap}"
        if len(tap.shape) < self.rank or not isinstance(tap.shape[1], int):
            axes = "[N, C, spatial...]" if self.rank > 2 else "[N, C, ...]"
            return f"the head needs {axes}, got {tap}"
        return ""


def _number(size: DimLike) -> int:
    assert isinstance(size, int)
    return size


def _conv(x: Value, width: int) -> Value:
    return conv(x, width, 3, pad=1, name=x.graph.unused_name("conv"))


def _pooled(x: Value) -> Value:
    return relu(max_pool(x, 2, cover_all=True))


def _lenet(tap: Value, convs: int, width: int) -> Value:
    h = _pooled(tap)
    for _ in range(convs):
        h = _pooled(_conv(h, width))
    return h


def _convs(tap: Value, convs: int, width: int) -> Value:
    for _ in range(convs):
        tap = relu(_conv(tap, width))
    return tap


def _alexnet(tap: Value, convs: int, width: int) -> Value:
    pooled = max_pool(relu(tap), 3, stride=2, cover_all=True)
    h = _convs(lrn(pooled, 3, alpha=5e-5, beta=0.75, k=2.0), convs, width)
    return max_pool(h, 3, stride=2, cover_all=True)


def _block(x: Value) -> Value:
    """relu(x + bn(conv(relu(bn(conv(x)))))), He normal over the fan-in."""
    channels = _number(x.shape[1])
    h = x
    with scope("body"):
        for k in (1, 2):
            with scope(f"unit{k}"):
                init = HeNormal(9 * channels)
                h = batch_norm(conv(h, channels, 3, pad=1, init=init, name="conv"), name="bn")
                h = relu(h, name="relu") if k == 1 else h
    return relu(merge_sum(x, h, name="sum"), name="relu")


def _resnet(tap: Value, blocks: int, width: int) -> Value:
    for k in range(blocks):
        with scope("block" if k == 0 else f"block{k + 1}"):
            tap = _block(tap)
    return tap


HEADS: dict[str, Head] = {
    "conv": Head(_lenet, convs=1, width=lambda channels: 2 * channels, rank=4),
    "alexnet": Head(_alexnet, convs=2, width=lambda channels: 32, rank=4),
    "convs": Head(_convs, convs=1, width=lambda channels: 32, rank=4),
    "resnet": Head(_resnet, convs=1, rank=4),
    "pool": Head(lambda tap, convs, width: global_average_pool(tap), rank=3),
    "dense": Head(lambda tap, convs, width: flatten(tap)),
}
