"""Activations with parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from branchgraph.chainer import functions as F
from branchgraph.chainer.initializers import get_initializer
from branchgraph.chainer.link import Chain, Link
from branchgraph.chainer.links.connection import Linear
from branchgraph.chainer.variable import Parameter, Variable


class PReLU(Link):
    """max(x, 0) + W min(x, 0) with a learnt slope W (He et al. 2015)."""

    def __init__(self, shape: Any = (), init: Any = 0.25) -> None:
        super().__init__()
        with self.init_scope():
            self.W = Parameter(get_initializer(init), shape)

    def forward(self, x: Any) -> Variable:
        """W is broadcast over the batch and trailing axes."""
        return F.prelu(x, self.W)


class Swish(Link):
    """x sigmoid(beta x) with a learnt beta (Ramachandran et al. 2017)."""

    def __init__(self, beta_shape: Any, beta_init: Any = 1.0) -> None:
        super().__init__()
        with self.init_scope():
            self.beta = Parameter(get_initializer(beta_init), beta_shape)

    def forward(self, x: Any) -> Variable:
        """A shape of None becomes that of x without its batch axis."""
        if not self.beta.is_initialized:
            self.beta.initialize(x.shape[1:])
        return F.swish(x, self.beta)


class Maxout(Chain):
    """The largest of `pool_size` linear maps (Goodfellow et al. 2013)."""

    def __init__(
        self, in_size: int | None, out_size: int, pool_size: int, initialW: Any = None,
        initial_bias: Any = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_size, self.pool_size = out_size, pool_size
        shape = None if in_size is None else (out_size * pool_size, in_size)
        if shape and not (initialW is None or callable(initialW) or _is_number(initialW)):
            initialW = initialW.reshape(shape)
        if not (initial_bias is None or callable(initial_bias) or _is_number(initial_bias)):
            initial_bias = initial_bias.reshape(out_size * pool_size)
        with self.init_scope():
            self.linear = Linear(
                in_size, out_size * pool_size, initial_bias is None, initialW, initial_bias
            )

    def forward(self, x: Any) -> Variable:
        """x: [N, in]."""
        return F.maxout(self.linear(x), self.pool_size)


def _is_number(value: Any) -> bool:
    return not hasattr(value, "reshape") or not getattr(value, "shape", ())


class Highway(Chain):
    """t plain(x) + (1 - t) x, t = sigmoid(transform(x)) (Srivastava et al. 2015)."""

    def __init__(
        self, in_out_size: int, nobias: bool = False, activate: Callable[..., Any] | None = None,
        init_Wh: Any = None, init_Wt: Any = None, init_bh: Any = None, init_bt: Any = -1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activate = F.relu if activate is None else activate
        with self.init_scope():
            self.plain = Linear(in_out_size, in_out_size, nobias, init_Wh, init_bh)
            self.transform = Linear(in_out_size, in_out_size, nobias, init_Wt, init_bt)

    def forward(self, x: Any) -> Variable:
        """x: [N, size]."""
        plain = self.activate(self.plain(x))
        gate = F.sigmoid(self.transform(x))
        return plain * gate + x * (1 - gate)  # type: ignore[no-any-return]
