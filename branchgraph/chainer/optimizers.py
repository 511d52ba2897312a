"""Chainer's optimizers by name, with its defaults; the formulas are in `ir/optimisers.py`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from branchgraph.chainer.optimizer import GradientMethod
from branchgraph.ir import optimisers


class SGD(GradientMethod):
    """Plain stochastic gradient descent."""

    native = optimisers.SGD
    names: ClassVar[Mapping[str, str]] = {"lr": "learning_rate"}

    def __init__(self, lr: float = 0.01, model: Any = None) -> None:
        super().__init__(model, lr=lr)


class _Momentum(GradientMethod):
    names: ClassVar[Mapping[str, str]] = {"lr": "learning_rate", "momentum": "momentum"}

    def __init__(self, lr: float = 0.01, momentum: float = 0.9, model: Any = None) -> None:
        super().__init__(model, lr=lr, momentum=momentum)


class MomentumSGD(_Momentum):
    """Momentum over steps."""

    native = optimisers.MomentumSGD


class CorrectedMomentumSGD(_Momentum):
    """Momentum over gradients, so that the learning rate acts on all of it."""

    native = optimisers.CorrectedMomentumSGD


class NesterovAG(_Momentum):
    """Nesterov's accelerated gradient."""

    native = optimisers.NesterovAG


class Adam(GradientMethod):
    """Adam; the flags turn it into AdamW, AMSGrad, AdaBound and AMSBound.

    float16 parameters are calculated in float32.
    """

    native = optimisers.Adam
    names: ClassVar[Mapping[str, str]] = {
        "alpha": "learning_rate", "beta1": "beta1", "beta2": "beta2", "eps": "eps", "eta": "eta",
        "weight_decay_rate": "weight_decay_rate", "amsgrad": "amsgrad", "adabound": "adabound",
        "final_lr": "final_lr", "gamma": "gamma",
    }  # fmt: skip
    widened = True

    def __init__(
        self, alpha: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
        eta: float = 1.0, weight_decay_rate: float = 0, amsgrad: bool = False,
        adabound: bool = False, final_lr: float = 0.1, gamma: float = 1e-3, model: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            model, alpha=alpha, beta1=beta1, beta2=beta2, eps=eps, eta=eta,
            weight_decay_rate=weight_decay_rate, amsgrad=amsgrad, adabound=adabound,
            final_lr=final_lr, gamma=gamma,
        )  # fmt: skip

    @property
    def alpha_t(self) -> float:
        """The step size with the bias corrections of the last update."""
        if self.t == 0:
            raise RuntimeError("the step size of Adam is not known before the first update")
        rule = optimisers.Adam(beta1=self.beta1, beta2=self.beta2)  # type: ignore[attr-defined]
        rate = rule.scalars(self.alpha, float(self.t))["rate"]  # type: ignore[attr-defined]
        assert isinstance(rate, float)
        return rate

    @property
    def lr(self) -> float:
        """The old name of `alpha_t`."""
        warnings.warn("Adam.lr is deprecated; use alpha_t", DeprecationWarning, stacklevel=2)
        return self.alpha_t


class AdamW(Adam):
    """Adam with decoupled weight decay, which alpha does not multiply."""

    def __init__(
        self, alpha: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
        eta: float = 1.0, weight_decay_rate: float = 0, model: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(alpha, beta1, beta2, eps, eta, weight_decay_rate, model=model)


class AMSGrad(Adam):
    """Adam with the greatest second moment so far."""

    def __init__(
        self, alpha: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
        eta: float = 1.0, model: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(alpha, beta1, beta2, eps, eta, amsgrad=True, model=model)


class AdaBound(Adam):
    """Adam whose step sizes are clipped to bounds that close in on `final_lr`."""

    def __init__(
        self, alpha: float = 0.001, beta1: float = 0.9, beta2: float = 0.999,
        final_lr: float = 0.1, gamma: float = 1e-3, eps: float = 1e-8, eta: float = 1.0,
        model: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            alpha, beta1, beta2, eps, eta, adabound=True, final_lr=final_lr, gamma=gamma,
            model=model,
        )  # fmt: skip


class AMSBound(Adam):
    """AdaBound with the greatest second moment so far."""

    def __init__(
        self, alpha: float = 0.001, beta1: float = 0.9, beta2: float = 0.999,
        final_lr: float = 0.1, gamma: float = 1e-3, eps: float = 1e-8, eta: float = 1.0,
        model: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            alpha, beta1, beta2, eps, eta, amsgrad=True, adabound=True, final_lr=final_lr,
            gamma=gamma, model=model,
        )  # fmt: skip


class RMSprop(GradientMethod):
    """Steps divided by the root of the running mean of squared gradients."""

    native = optimisers.RMSprop
    names: ClassVar[Mapping[str, str]] = {
        "lr": "learning_rate", "alpha": "alpha", "eps": "eps", "eps_inside_sqrt": "eps_inside_sqrt",
    }  # fmt: skip

    def __init__(
        self, lr: float = 0.01, alpha: float = 0.99, eps: float = 1e-8,
        eps_inside_sqrt: bool = False, model: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(model, lr=lr, alpha=alpha, eps=eps, eps_inside_sqrt=eps_inside_sqrt)


class RMSpropGraves(GradientMethod):
    """Steps divided by the running standard deviation of gradients, with momentum."""

    native = optimisers.RMSpropGraves
    names: ClassVar[Mapping[str, str]] = {
        "lr": "learning_rate",
        "alpha": "alpha",
        "momentum": "momentum",
        "eps": "eps",
    }

    def __init__(
        self, lr: float = 1e-4, alpha: float = 0.95, momentum: float = 0.9, eps: float = 1e-4,
        model: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(model, lr=lr, alpha=alpha, momentum=momentum, eps=eps)


class AdaGrad(GradientMethod):
    """Steps divided by the root of the sum of squared gradients."""

    native = optimisers.AdaGrad
    names: ClassVar[Mapping[str, str]] = {"lr": "learning_rate", "eps": "eps"}

    def __init__(self, lr: float = 0.001, eps: float = 1e-8, model: Any = None) -> None:
        super().__init__(model, lr=lr, eps=eps)


class AdaDelta(GradientMethod):
    """Steps in the parameter's own units, without a learning rate."""

    native = optimisers.AdaDelta
    names: ClassVar[Mapping[str, str]] = {"rho": "rho", "eps": "eps"}

    def __init__(self, rho: float = 0.95, eps: float = 1e-6, model: Any = None) -> None:
        super().__init__(model, rho=rho, eps=eps)


class SMORMS3(GradientMethod):
    """Step sizes by how far gradients agree."""

    native = optimisers.SMORMS3
    names: ClassVar[Mapping[str, str]] = {"lr": "learning_rate", "eps": "eps"}

    def __init__(self, lr: float = 0.001, eps: float = 1e-16, model: Any = None) -> None:
        super().__init__(model, lr=lr, eps=eps)
