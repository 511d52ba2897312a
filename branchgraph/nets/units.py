"""What the families share: convolution units, residual merges, heads, by the conventions of the
framework that a network comes from.

A unit is convolution, batch norm, ReLU, in a scope of its own, so that states are called
`stem/conv.weight`, `stem/bn.gamma` and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod

from branchgraph.ir.builder import (
    Size,
    batch_norm,
    conv,
    dense,
    global_average_pool,
    merge_sum,
    relu,
    state,
)
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Value, scope
from branchgraph.ir.initialisers import HeNormal, Initialiser, LeCunNormal, Ones, Uniform, Zeros

#: Fan-in and fan-out of a layer to its initialiser.
Fans = Callable[[int, int], Initialiser]


def he_fan_in(fan_in: int, fan_out: int) -> Initialiser:
    """N(0, 2 / fan_in)."""
    return HeNormal(fan_in)


def he_fan_out(fan_in: int, fan_out: int) -> Initialiser:
    """N(0, 2 / fan_out)."""
    return HeNormal(fan_out)


def lecun(fan_in: int, fan_out: int) -> Initialiser:
    """N(0, 1 / fan_in)."""
    return LeCunNormal(fan_in)


def uniform_fan_in(fan_in: int, fan_out: int) -> Initialiser:
    """U(-b, b), b = 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return Uniform(-bound, bound)


def zeros(fan_in: int, fan_out: int) -> Initialiser:
    """0."""
    return Zeros()


@dataclass(frozen=True)
class Convention:
    """How a framework, and those who published in it, set up a layer."""

    eps: float
    decay: float
    unbiased: bool
    conv_init: Fans
    dense_init: Fans
    #: Whether convolutions that are followed by batch norm have a bias.
    bias: bool = False
    #: Biases of dense layers.
    dense_bias_init: Fans = zeros
    #: Running variances of batch norm.
    var_init: Initialiser = field(default_factory=Ones)

    def conv(
        self, x: Value, filters: int, kernel: Size, *, stride: Size = 1, pad: Size | None = None,
        groups: int = 1, bias: bool | None = None, weight: Value | None = None, name: str = "conv",
    ) -> Value:  # fmt: skip
        """A convolution; without `pad` an odd kernel keeps the size. Fan-out is O prod(kernel).

        A `weight` that is given, because layers share it, is used instead of a new one.
        """
        size = (kernel,) * (len(x.shape) - 2) if isinstance(kernel, int) else tuple(kernel)
        channels = x.shape[1]
        if not isinstance(channels, int):
            raise GraphError(f"{name}: needs a concrete number of channels, got {x.type}")
        area = prod(size)
        init = self.conv_init(channels // groups * area, filters * area)
        return conv(
            x,
            filters,
            size,
            stride=stride,
            pad=tuple(k // 2 for k in size) if pad is None else pad,
            groups=groups,
            bias=self.bias if bias is None else bias,
            weight=weight,
            init=init,
            name=name,
        )

    def norm(
        self, x: Value, name: str = "bn", *, gamma: Value | None = None, beta: Value | None = None
    ) -> Value:
        """Batch norm; `gamma` and `beta` that are given, because layers share them, are used."""
        return batch_norm(
            x,
            eps=self.eps,
            decay=self.decay,
            unbiased=self.unbiased,
            gamma=gamma,
            beta=beta,
            var_init=self.var_init,
            name=name,
        )

    def unit(
        self, x: Value, filters: int, kernel: Size, *, stride: Size = 1, pad: Size | None = None,
        groups: int = 1, activate: bool = True, name: str = "",
    ) -> Value:  # fmt: skip
        """Convolution, batch norm and (unless told otherwise) ReLU in the scope `name`."""
        with scope(name or x.graph.unused_name("unit")):
            h = self.norm(self.conv(x, filters, kernel, stride=stride, pad=pad, groups=groups))
            return relu(h, name="relu") if activate else h

    def dense(self, x: Value, features: int, *, bias: bool = True, name: str = "fc") -> Value:
        """A dense layer."""
        fan_in = prod(d for d in x.shape[1:] if isinstance(d, int))
        init = self.dense_init(fan_in, features)
        if not bias:
            return dense(x, features, bias=False, init=init, name=name)
        start = self.dense_bias_init(fan_in, features)
        beta = state(x.graph, name, "bias", (features,), start, dtype=x.dtype)
        return dense(x, features, bias=beta, init=init, name=name)

    def head(self, x: Value, classes: int, name: str = "fc") -> Value:
        """Global average pooling and a dense layer: logits [N, classes]."""
        return self.dense(global_average_pool(x, name="pool"), classes, name=name)


#: Batch norm as Chainer has it, LeCun normal everywhere: BranchyNet's networks.
CHAINER = Convention(2e-5, 0.9, True, lecun, lecun, bias=True)
#: MXNet: biased running variance; He normal over the fan-in, dense layers uniform: Deep Fusion.
MXNET = Convention(2e-5, 0.9, False, he_fan_in, uniform_fan_in)
#: PyTorch: He normal over the fan-out, dense layers and their biases uniform: ParaDise, RepVGG.
PYTORCH = Convention(
    1e-5, 0.9, True, he_fan_out, uniform_fan_in, dense_bias_init=uniform_fan_in
)  # fmt: skip
#: Torch, where dense biases were set to 0: ResNeXt.
TORCH = replace(PYTORCH, dense_bias_init=zeros)


def residual(body: Value, shortcut: Value, name: str = "relu") -> Value:
    """relu(shortcut + body)."""
    return relu(merge_sum(shortcut, body, name="sum"), name=name)
