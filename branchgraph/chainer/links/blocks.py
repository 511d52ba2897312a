"""Small networks as links: Inception modules, network in network."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from branchgraph.chainer import functions as F
from branchgraph.chainer.functions.record import check_removed
from branchgraph.chainer.link import Chain, ChainList
from branchgraph.chainer.links.connection import Convolution2D
from branchgraph.chainer.links.normalization import BatchNormalization
from branchgraph.chainer.variable import Variable


class Inception(Chain):
    """The module of GoogLeNet (Szegedy et al. 2014): 1x1, 3x3, 5x5 and pooling side by side."""

    def __init__(
        self, in_channels: int | None, out1: int, proj3: int, out3: int, proj5: int, out5: int,
        proj_pool: int, conv_init: Any = None, bias_init: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        init = {"initialW": conv_init, "initial_bias": bias_init}
        with self.init_scope():
            self.conv1 = Convolution2D(in_channels, out1, 1, **init)
            self.proj3 = Convolution2D(in_channels, proj3, 1, **init)
            self.conv3 = Convolution2D(proj3, out3, 3, pad=1, **init)
            self.proj5 = Convolution2D(in_channels, proj5, 1, **init)
            self.conv5 = Convolution2D(proj5, out5, 5, pad=2, **init)
            self.projp = Convolution2D(in_channels, proj_pool, 1, **init)

    def forward(self, x: Any) -> Variable:
        """relu of the four branches' channels in order."""
        branches = (
            self.conv1(x),
            self.conv3(F.relu(self.proj3(x))),
            self.conv5(F.relu(self.proj5(x))),
            self.projp(F.max_pooling_2d(x, 3, stride=1, pad=1)),
        )
        return F.relu(F.concat(branches, axis=1))


class InceptionBN(Chain):
    """The module of Ioffe & Szegedy 2015: 1x1, 3x3, twice 3x3 and pooling, with batch norm."""

    def __init__(
        self, in_channels: int | None, out1: int, proj3: int, out3: int, proj33: int, out33: int,
        pooltype: str, proj_pool: int | None = None, stride: int = 1, conv_init: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if pooltype not in ("max", "avg"):
            raise NotImplementedError(f"pooltype is 'max' or 'avg', got {pooltype!r}")
        if out1 > 0 and (stride != 1 or proj_pool is None):
            raise ValueError("out1 > 0 needs stride 1 and proj_pool")
        self.out1, self.proj_pool, self.stride, self.pooltype = out1, proj_pool, stride, pooltype
        self._conv = {"initialW": conv_init, "nobias": True}
        self._dtype = dtype
        with self.init_scope():
            self._unit("proj3", in_channels, proj3, 1)
            self._unit("conv3", proj3, out3, 3, pad=1, stride=stride)
            self._unit("proj33", in_channels, proj33, 1)
            self._unit("conv33a", proj33, out33, 3, pad=1)
            self._unit("conv33b", out33, out33, 3, pad=1, stride=stride)
            if out1 > 0:
                self._unit("conv1", in_channels, out1, 1)
            if proj_pool is not None:
                self._unit("poolp", in_channels, proj_pool, 1)

    def _unit(self, name: str, n_in: int | None, n_out: int, ksize: int, **how: Any) -> None:
        setattr(self, name, Convolution2D(n_in, n_out, ksize, **how, **self._conv))
        setattr(self, f"{name}n", BatchNormalization(n_out, dtype=self._dtype))

    def _apply(self, x: Any, *names: str) -> Variable:
        for name in names:
            x = F.relu(self[f"{name}n"](self[name](x)))
        return x  # type: ignore[no-any-return]

    def forward(self, x: Any) -> Variable:
        """The branches' channels in order."""
        branches = [self._apply(x, "conv1")] if self.out1 > 0 else []
        branches.append(self._apply(x, "proj3", "conv3"))
        branches.append(self._apply(x, "proj33", "conv33a", "conv33b"))
        if self.pooltype == "max":
            pooled = F.max_pooling_2d(x, 3, stride=self.stride, pad=1, cover_all=False)
        else:
            pooled = F.average_pooling_2d(x, 3, stride=self.stride, pad=1)
        branches.append(pooled if self.proj_pool is None else self._apply(pooled, "poolp"))
        return F.concat(branches, axis=1)


class MLPConvolution2D(ChainList):
    """Convolution and 1x1 convolutions (Lin et al. 2013); no activation behind the last one."""

    def __init__(
        self, in_channels: Any, out_channels: Any, ksize: Any = None, stride: Any = 1,
        pad: Any = 0, activation: Callable[..., Any] | None = None, *, conv_init: Any = None,
        bias_init: Any = None, **removed: Any,
    ) -> None:  # fmt: skip
        check_removed("MLPConvolution2D", removed, {"wscale": "use conv_init"})
        if ksize is None:
            out_channels, ksize, in_channels = in_channels, out_channels, None
        init = {"initialW": conv_init, "initial_bias": bias_init}
        first = Convolution2D(in_channels, out_channels[0], ksize, stride, pad, **init)
        sizes = itertools.pairwise(out_channels)
        super().__init__(first, *[Convolution2D(i, o, 1, **init) for i, o in sizes])
        self.activation = F.relu if activation is None else activation

    def forward(self, x: Any) -> Variable:
        """x: [N, in, H, W]."""
        *inner, last = self
        for link in inner:
            x = self.activation(link(x))
        return last(x)  # type: ignore[no-any-return]
