"""Normalisation links.

Batch normalisation (Ioffe & Szegedy 2015) over the axes that are not the statistics', m elements a
statistic, decay 0.9 the weight of the old value:

    avg_mean <- decay avg_mean + (1 - decay) mean
    avg_var  <- decay avg_var  + (1 - decay) var m / max(m - 1, 1)

The statistics are updated by the recorded program, in the order of the calls: a second call of the
same link sees the first one's update, and they move although nobody asks for a value.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from branchgraph.chainer import functions as F
from branchgraph.chainer.configuration import config
from branchgraph.chainer.functions.record import as_variable, check_removed, record
from branchgraph.chainer.initializers import generate_array, get_initializer
from branchgraph.chainer.link import Chain, Link
from branchgraph.chainer.links.connection import Bias, one_of
from branchgraph.chainer.precision import get_dtype
from branchgraph.chainer.recorder import Holder, recorder
from branchgraph.chainer.variable import Parameter, Variable
from branchgraph.ir.ops.norm import BatchNorm


class Statistic:
    """An attribute that reads as an array and that recorded programs update.

    Reading it runs what is pending, so that an edit in place comes behind every earlier call.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, link: Any, owner: type | None = None) -> Any:
        if link is None:
            return self
        holder = link._holders.get(self.name)
        if holder is None:
            return None
        recorder().flush()
        return holder.array

    def __set__(self, link: Any, value: np.ndarray | None) -> None:
        held = link._holders.get(self.name)
        if held is not None and value is held.array:
            return  # as reading and writing files do; copies may share the holder
        link._holders[self.name] = None if value is None else Holder(np.asarray(value))


class BatchNormalization(Link):
    """y = gamma (x - mean) / sqrt(var + eps) + beta.

    `size` is the shape of the statistics behind the batch axis (a number: channels); or `axis`
    names the axes that are averaged over.
    """

    avg_mean = Statistic()
    avg_var = Statistic()

    def __init__(
        self, size: Any = None, decay: float = 0.9, eps: float = 2e-5, dtype: Any = None,
        use_gamma: bool = True, use_beta: bool = True, initial_gamma: Any = None,
        initial_beta: Any = None, axis: Any = None, initial_avg_mean: Any = None,
        initial_avg_var: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if size is None and axis is None:
            raise RuntimeError("BatchNormalization needs size or axis")
        if isinstance(axis, int):
            axis = (axis,)
        if axis is not None and list(axis) != sorted(set(axis)):
            raise ValueError(f"axis is ascending, got {axis}")
        self.decay, self.eps, self.axis, self.N = decay, eps, axis, 0
        self.dtype = get_dtype(dtype, np.float32)
        self._initial = {"avg_mean": (initial_avg_mean, 0), "avg_var": (initial_avg_var, 1)}
        #: Where the statistics lie; None until their shape is known.
        self._holders: dict[str, Holder | None] = {"avg_mean": None, "avg_var": None}
        for name in ("avg_mean", "avg_var", "N"):
            self.register_persistent(name)
        with self.init_scope():
            if use_gamma:
                self.gamma = self._parameter(initial_gamma, 1)
            if use_beta:
                self.beta = self._parameter(initial_beta, 0)
        if size is not None:
            self._initialize((size,) if isinstance(size, (int, np.integer)) else tuple(size))

    def _parameter(self, initial: Any, default: float) -> Parameter:
        chosen = get_initializer(initial, default)
        if getattr(chosen, "dtype", self) is None:
            chosen.dtype = self.dtype
        return Parameter(chosen)

    def _initialize(self, shape: tuple[int, ...]) -> None:
        for name in sorted(self._params, reverse=True):
            if not getattr(self, name).is_initialized:
                getattr(self, name).initialize(shape)
        for name, (initial, default) in self._initial.items():
            if self._holders[name] is None:
                filler = get_initializer(initial, default)
                setattr(self, name, generate_array(filler, shape, dtype=self.dtype))

    @property
    def printable_specs(self) -> Iterator[tuple[str, Any]]:
        holder = self._holders["avg_mean"]
        yield "size", None if holder is None else holder.tensor().type.shape
        yield from ((n, getattr(self, n)) for n in ("decay", "eps", "dtype"))
        yield "use_gamma", "gamma" in self._params
        yield "use_beta", "beta" in self._params
        yield "axis", self.axis

    def start_finetuning(self) -> None:
        """Forget how many batches `finetune` has seen."""
        self.N = 0

    def forward(self, x: Any, finetune: bool = False, **removed: Any) -> Variable:
        """`finetune` averages the statistics of all such calls evenly."""
        check_removed("BatchNormalization", removed, {"test": "use using_config('train', False)"})
        x = as_variable(x)
        self._ready(x)
        gamma, beta = self._affine("gamma", 1), self._affine("beta", 0)
        if config.tracing:
            return self._declared(x, gamma, beta)
        if not config.train:
            mean, var = self._holders.values()
            return F.fixed_batch_normalization(
                x, gamma, beta, mean, var, eps=self.eps, axis=self.axis
            )
        if x.size == gamma.size:
            warnings.warn(
                "batch normalisation of one element a statistic gives beta; "
                "use a larger batch, or using_config('train', False)",
                stacklevel=2,
            )
        if finetune:
            self.N += 1
        moving = {} if config.in_recomputing else {
            "running_mean": self._holders["avg_mean"],
            "running_var": self._holders["avg_var"],
            "decay": 1.0 - 1.0 / self.N if finetune else self.decay,
        }  # fmt: skip
        return F.batch_normalization(x, gamma, beta, eps=self.eps, axis=self.axis, **moving)

    def _ready(self, x: Variable) -> None:
        if None in self._holders.values():
            kept = self._axes(x)
            self._initialize(tuple([x.shape[a] for a in kept]))

    def _axes(self, x: Variable) -> list[int]:
        """The axes of the statistics, when `axis` names the others."""
        return [a for a in range(x.ndim) if a not in self.axis]

    def _affine(self, name: str, default: float) -> Variable:
        if name in self._params:
            return getattr(self, name)  # type: ignore[no-any-return]
        holder = self._holders["avg_mean"]
        assert holder is not None
        filled = np.full(holder.tensor().type.shape, default, self.dtype)
        return Variable(filled, requires_grad=False)

    def _declared(self, x: Variable, gamma: Variable, beta: Variable) -> Variable:
        """Batch norm whose mode is chosen later, for tracing."""
        if gamma.ndim != 1 or (self.axis is not None and self._axes(x) != [1]):
            raise NotImplementedError("only batch norm over the channels of axis 1 is traced")
        held = [Variable._of(h.tensor()) for h in self._holders.values() if h is not None]
        return record(BatchNorm(eps=self.eps, decay=self.decay), x, gamma, beta, *held)

    def _share(self) -> Any:
        made = super()._share()
        made._holders = dict(self._holders)
        return made


class _Affine(Link):
    """gamma and beta of one axis, lazily sized."""

    def __init__(self, size: int | None, initial_gamma: Any, initial_beta: Any) -> None:
        super().__init__()
        with self.init_scope():
            self.gamma = Parameter(get_initializer(initial_gamma, 1))
            self.beta = Parameter(get_initializer(initial_beta, 0))
        if size is not None:
            self._initialize(size)

    def _initialize(self, size: int) -> None:
        for parameter in (self.gamma, self.beta):
            if not parameter.is_initialized:
                parameter.initialize((size,))


class GroupNormalization(_Affine):
    """Normalisation over groups of channels, per sample (Wu & He 2018)."""

    def __init__(
        self, groups: int, size: int | None = None, eps: float = 1e-5, initial_gamma: Any = None,
        initial_beta: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(size, initial_gamma, initial_beta)
        self.groups, self.eps = groups, eps

    def forward(self, x: Any) -> Variable:
        """x: [N, C, ...]."""
        self._initialize(x.shape[1])
        return F.group_normalization(x, self.groups, self.gamma, self.beta, self.eps)


class LayerNormalization(_Affine):
    """Normalisation over the features of a sample (Ba et al. 2016). x: [N, size]."""

    def __init__(
        self, size: int | None = None, eps: float = 1e-6, initial_gamma: Any = None,
        initial_beta: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(size, initial_gamma, initial_beta)
        self.eps = eps

    def forward(self, x: Any) -> Variable:
        """x: [N, size]."""
        self._initialize(prod(x.shape[1:]))
        return F.layer_normalization(x, self.gamma, self.beta, self.eps)


class Scale(Chain):
    """x times a learnt W from `axis` on, and a bias; without W times the second input."""

    def __init__(
        self, axis: int = 1, W_shape: Any = None, bias_term: bool = False, bias_shape: Any = None
    ) -> None:
        super().__init__()
        self.axis = axis
        if W_shape is None and bias_term and bias_shape is None:
            raise ValueError("bias_shape is needed when W is an input and bias_term is true")
        with self.init_scope():
            if W_shape is not None:
                self.W = Parameter(1, W_shape)
            if bias_term:
                self.bias = Bias(axis, W_shape if W_shape is not None else bias_shape)

    def forward(self, *xs: Any) -> Variable:
        """One input with an own W, two without."""
        x, given = (*xs, None)[:2]
        y = F.scale(x, one_of("W", given, getattr(self, "W", None)), self.axis)
        return self.bias(y) if "bias" in self._children else y  # type: ignore[no-any-return]
