"""Chainer's hooks: the formulas of `branchgraph.ir.hooks`, recorded with their numbers fed.

`GradientNoise` draws from NumPy's global generator, as Chainer does; the others draw nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from branchgraph.chainer.optimizer import fed, replay
from branchgraph.chainer.recorder import Tensor, type_of
from branchgraph.ir import hooks
from branchgraph.ir.graph import Value
from branchgraph.ir.types import DType


class _EachGradient:
    """Base of hooks that change the gradient of one parameter."""

    name = ""
    call_for_each_param = True
    timing = "pre"

    def __call__(self, rule: Any, param: Any) -> None:
        """Replace the gradient of `param`, if it has one."""
        if param._holder is None or param._grad is None:
            return
        p, g = param._holder.tensor(), param._grad
        numbers = [fed(n, g.type.dtype) for n in self.numbers()]
        (param._grad,) = replay((type(self),), self.changed, p, g, *numbers)

    def numbers(self) -> tuple[float, ...]:
        """What `changed` is fed."""
        raise NotImplementedError

    @staticmethod
    def changed(p: Value, g: Value, *numbers: Value) -> tuple[Value]:
        """The new gradient."""
        raise NotImplementedError


class WeightDecay(_EachGradient):
    """Adds `rate` times the parameter: the gradient of half the squared norm."""

    name = "WeightDecay"

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def numbers(self) -> tuple[float, ...]:
        return (self.rate,)

    @staticmethod
    def changed(p: Value, g: Value, *numbers: Value) -> tuple[Value]:
        return (hooks.weight_decay(p, g, *numbers),)


class Lasso(_EachGradient):
    """Adds `rate` times the sign of the parameter: the gradient of the absolute norm."""

    name = "Lasso"

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def numbers(self) -> tuple[float, ...]:
        return (self.rate,)

    @staticmethod
    def changed(p: Value, g: Value, *numbers: Value) -> tuple[Value]:
        return (hooks.lasso(p, g, *numbers),)


class GradientHardClipping(_EachGradient):
    """Clips each element to the bounds."""

    name = "GradientHardClipping"

    def __init__(self, lower_bound: float, upper_bound: float) -> None:
        self.lower_bound = lower_bound
        self.upper_bound = upper_bound

    def numbers(self) -> tuple[float, ...]:
        return (self.lower_bound, self.upper_bound)

    @staticmethod
    def changed(p: Value, g: Value, *numbers: Value) -> tuple[Value]:
        return (hooks.hard_clipping(p, g, *numbers),)


class GradientLARS(_EachGradient):
    """Scales the gradient of each parameter to the parameter's norm."""

    name = "GradientLARS"

    def __init__(
        self, threshold: float = 1e-2, weight_decay: float = 0.0, eps: float = 1e-9
    ) -> None:
        self.threshold = threshold
        self.weight_decay = weight_decay
        self.eps = eps

    def numbers(self) -> tuple[float, ...]:
        return (self.threshold, self.weight_decay, self.eps)

    @staticmethod
    def changed(p: Value, g: Value, *numbers: Value) -> tuple[Value]:
        return (hooks.lars(p, g, *numbers),)


class GradientClipping:
    """Scales all gradients so that their common 2-norm is at most `threshold`."""

    name = "GradientClipping"
    timing = "pre"

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, opt: Any) -> None:
        """Replace the gradients of all parameters of the target."""
        params = [p for p in opt.target.params() if p._holder is not None and p._grad is not None]
        if not params:
            return
        threshold = fed(self.threshold, DType.F64)
        clipped = replay((type(self),), _clipped, threshold, *[p._grad for p in params])
        for param, gradient in zip(params, clipped):
            param._grad = gradient


def _clipped(threshold: Value, *gradients: Value) -> tuple[Value, ...]:
    return hooks.norm_clipping(threshold, gradients)


def exponential_decay_noise(
    xp: Any, shape: tuple[int, ...], dtype: Any, hook: Any, opt: Any
) -> np.ndarray:
    """Normal noise of variance eta / (1 + t)^0.55 from NumPy's global generator."""
    std = np.sqrt(hook.eta / (1 + opt.t) ** 0.55)
    drawn: np.ndarray = xp.random.normal(0, std, shape).astype(dtype)
    return drawn


class GradientNoise:
    """Adds noise that fades with the number of updates of the parameter."""

    name = "GradientNoise"
    call_for_each_param = True
    timing = "pre"

    def __init__(
        self, eta: float, noise_func: Callable[..., np.ndarray] = exponential_decay_noise
    ) -> None:
        self.eta = eta
        self.noise_func = noise_func

    def __call__(self, rule: Any, param: Any) -> None:
        """Add noise to the gradient of `param`, if it has one."""
        if param._holder is None or param._grad is None:
            return
        noise = np.asarray(self.noise_func(np, param.shape, param.dtype, self, rule))
        fed_noise = Tensor(type_of(noise), noise)
        (param._grad,) = replay((type(self),), lambda g, n: (g + n,), param._grad, fed_noise)
