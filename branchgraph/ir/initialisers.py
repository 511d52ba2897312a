"""Initial values of states: constants and the usual random families.

Random initialisers take their fans explicitly, because a quadrant of a layer is initialised with
the fans of the whole layer. The normal and uniform families follow

    LeCun  var = 1/fan_in             (LeCun et al. 1998)
    Glorot var = 2/(fan_in+fan_out)   (Glorot & Bengio 2010)
    He     var = 2/fan                (He et al. 2015)

with std = sqrt(var) and uniform bound sqrt(3 var).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from branchgraph.ir.attributes import Attributes


class Generator(Protocol):
    """What an initialiser draws from: NumPy's `Generator` and legacy `RandomState` both fit."""

    def normal(self, loc: float, scale: float, size: tuple[int, ...]) -> np.ndarray: ...

    def uniform(self, low: float, high: float, size: tuple[int, ...]) -> np.ndarray: ...


class Initialiser(Attributes):
    """Base: a frozen dataclass that fills a shape, drawing in float64."""

    spelling: ClassVar[str]
    registry: ClassVar[dict[str, type[Initialiser]]] = {}

    def __init_subclass__(cls, spelling: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if spelling:
            cls.spelling = spelling
            Initialiser.registry[spelling] = cls

    def values(self, shape: tuple[int, ...], rng: Generator) -> np.ndarray:
        """A float64 array of `shape`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Initialiser, spelling="constant"):
    """Every element is `value`."""

    value: float

    def values(self, shape: tuple[int, ...], rng: Generator) -> np.ndarray:
        return np.full(shape, self.value)


@dataclass(frozen=True)
class Zeros(Initialiser, spelling="zeros"):
    """Every element is 0."""

    def values(self, shape: tuple[int, ...], rng: Generator) -> np.ndarray:
        return np.zeros(shape)


@dataclass(frozen=True)
class Ones(Initialiser, spelling="ones"):
    """Every element is 1."""

    def values(self, shape: tuple[int, ...], rng: Generator) -> np.ndarray:
        return np.ones(shape)


@dataclass(frozen=True)
class IdentityKernel(Initialiser, spelling="identity_kernel"):
    """The weight [C, C, *kernel] of a layer that gives back its input: 1 at the middle tap.

    W[o, c, i, ...] = 1 where o = c and every i = kernel // 2, else 0; a dense weight is the
    identity matrix. A convolution needs odd kernels and as much pad on either side.
    """

    def values(self, shape: tuple[int, ...], rng: Generator) -> np.ndarray:
        weight = np.zeros(shape)
        middle = tuple(k // 2 for k in shape[2:])
        for channel in range(min(shape[:2])):
            index = (channel, channel, *middle)
            weight[index] = 1.0
        return weight


@dataclass(frozen=True)
class Normal(Initialiser, spelling="normal"):
    """N(0, std^2)."""

    std: float

    def values(self, shape: tuple[int, ...], rng: Generator) -> np.ndarray:
        return rng.normal(0.0, self.std, shape)


@dataclass(frozen=True)
class Uniform(Initialiser, spelling="uniform"):
    """U(low, high)."""

    low: float
    high: float

    def values(self, shape: tuple[int, ...], rng: Generator) -> np.ndarray:
        return rng.uniform(self.low, self.high, shape)


@dataclass(frozen=True)
class LeCunNormal(Initialiser, spelling="lecun_normal"):
    """N(0, scale^2 / fan_in)."""

    fan_in: int
    scale: float = 1.0

    def values(self, shape: tuple[int, ...], rng: Generator) -> np.ndarray:
        return rng.normal(0.0, self.scale * math.sqrt(1.0 / self.fan_in), shape)


@dataclass(frozen=True)
class HeNormal(Initialiser, spelling="he_normal"):
    """N(0, 2 scale^2 / fan); pass the fan-in or the fan-out, whichever the network uses."""

    fan: int
    scale: float = 1.0

    def values(self, shape: tuple[int, ...], rng: Generator) -> np.ndarray:
        return rng.normal(0.0, self.scale * math.sqrt(2.0 / self.fan), shape)


@dataclass(frozen=True)
class GlorotUniform(Initialiser, spelling="glorot_uniform"):
    """U(-b, b), b = scale sqrt(6 / (fan_in + fan_out))."""

    fan_in: int
    fan_out: int
    scale: float = 1.0

    def values(self, shape: tuple[int, ...], rng: Generator) -> np.ndarray:
        bound = self.scale * math.sqrt(6.0 / (self.fan_in + self.fan_out))
        return rng.uniform(-bound, bound, shape)
