"""`chainer.initializers`: initial values, filled into an array that exists.

The fans of a weight of shape (a, b, r1, r2, ...) are fan_in = b prod r and fan_out = a prod r. The
random ones draw once an array, in float64, from `numpy.random` (or `rng`), and cast: the numbers of
a seeded run are Chainer's.

    Normal          N(0, scale^2)
    LeCunNormal     N(0, scale^2 / fan_in)                    LeCun et al. 1998
    GlorotNormal    N(0, scale^2 2 / (fan_in + fan_out))      Glorot & Bengio 2010
    HeNormal        N(0, scale^2 2 / fan)                     He et al. 2015
    Uniform         U(-scale, scale)
    LeCunUniform    U(-l, l),  l = scale sqrt(3 / fan_in)
    GlorotUniform   U(-l, l),  l = scale sqrt(6 / (fan_in + fan_out))
    HeUniform       U(-l, l),  l = scale sqrt(6 / fan_in)
    Orthogonal      Q of a normal matrix, its columns signed by diag R      Saxe et al. 2013
"""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

import numpy as np

from branchgraph.chainer.precision import get_dtype


class Initializer:
    """Base: an object called with the array to fill. `dtype` overrides `config.dtype`."""

    def __init__(self, dtype: Any = None) -> None:
        self.dtype = dtype

    def __call__(self, array: np.ndarray) -> None:
        raise NotImplementedError


class Constant(Initializer):
    """One number, or an array of values."""

    def __init__(self, fill_value: Any, dtype: Any = None) -> None:
        super().__init__(dtype)
        self.fill_value = fill_value

    def __call__(self, array: np.ndarray) -> None:
        array[...] = self.fill_value


class _Fixed(Constant):
    value = 0.0

    def __init__(self, dtype: Any = None) -> None:
        super().__init__(self.value, dtype)


class Zero(_Fixed):
    """Zeros."""


class One(_Fixed):
    """Ones."""

    value = 1.0


class NaN(_Fixed):
    """Not a number: a value that nobody may use before it is set."""

    value = float("nan")


class Identity(Initializer):
    """`scale` on the diagonal of a square matrix."""

    def __init__(self, scale: float = 1.0, dtype: Any = None) -> None:
        super().__init__(dtype)
        self.scale = scale

    def __call__(self, array: np.ndarray) -> None:
        if array.ndim != 2 or array.shape[0] != array.shape[1]:
            raise ValueError(f"Identity fills a square matrix, got shape {array.shape}")
        array[...] = 0
        np.fill_diagonal(array, self.scale)


def get_fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight."""
    if len(shape) < 2:
        raise ValueError(f"fans need a weight of at least two axes, got shape {tuple(shape)}")
    receptive = prod(shape[2:])
    return shape[1] * receptive, shape[0] * receptive


def _fan(shape: tuple[int, ...], option: str) -> float:
    fan_in, fan_out = get_fans(shape)
    fans = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
    if option not in fans:
        raise ValueError(f"fan_option is one of {', '.join(fans)}, got {option!r}")
    return fans[option]


class _Random(Initializer):
    """A distribution times `scale`, drawn from `rng` or the global generator."""

    def __init__(self, scale: float = 1.0, dtype: Any = None, rng: Any = None) -> None:
        super().__init__(dtype)
        self.scale = scale
        self.rng = rng

    def width(self, shape: tuple[int, ...]) -> float:
        """Standard deviation, or bound, of a weight of `shape`."""
        return self.scale


class _Normal(_Random):
    def __call__(self, array: np.ndarray) -> None:
        generator = np.random if self.rng is None else self.rng
        array[...] = generator.normal(loc=0.0, scale=self.width(array.shape), size=array.shape)


class _Uniform(_Random):
    def __call__(self, array: np.ndarray) -> None:
        generator = np.random if self.rng is None else self.rng
        bound = self.width(array.shape)
        array[...] = generator.uniform(low=-bound, high=bound, size=array.shape)


class Normal(_Normal):
    """N(0, scale^2)."""

    def __init__(self, scale: float = 0.05, dtype: Any = None, rng: Any = None) -> None:
        super().__init__(scale, dtype, rng)


class LeCunNormal(_Normal):
    """N(0, scale^2 / fan_in), the default of every weight."""

    def width(self, shape: tuple[int, ...]) -> float:
        return self.scale * sqrt(1 / _fan(shape, "fan_in"))


class GlorotNormal(_Normal):
    """N(0, scale^2 2 / (fan_in + fan_out))."""

    def width(self, shape: tuple[int, ...]) -> float:
        return self.scale * sqrt(1 / _fan(shape, "fan_avg"))


class HeNormal(_Normal):
    """N(0, scale^2 2 / fan); `fan_option` is fan_in or fan_out."""

    def __init__(
        self, scale: float = 1.0, dtype: Any = None, fan_option: str = "fan_in", rng: Any = None
    ) -> None:
        super().__init__(scale, dtype, rng)
        self.fan_option = fan_option

    def width(self, shape: tuple[int, ...]) -> float:
        return self.scale * sqrt(2 / _fan(shape, self.fan_option))


class Uniform(_Uniform):
    """U(-scale, scale)."""

    def __init__(self, scale: float = 0.05, dtype: Any = None, rng: Any = None) -> None:
        super().__init__(scale, dtype, rng)


class LeCunUniform(_Uniform):
    """U(-l, l), l = scale sqrt(3 / fan_in)."""

    def width(self, shape: tuple[int, ...]) -> float:
        return self.scale * sqrt(3 / _fan(shape, "fan_in"))


class GlorotUniform(_Uniform):
    """U(-l, l), l = scale sqrt(6 / (fan_in + fan_out))."""

    def width(self, shape: tuple[int, ...]) -> float:
        return self.scale * sqrt(3 / _fan(shape, "fan_avg"))


class HeUniform(_Uniform):
    """U(-l, l), l = scale sqrt(6 / fan_in)."""

    def width(self, shape: tuple[int, ...]) -> float:
        return self.scale * sqrt(6 / _fan(shape, "fan_in"))


class Orthogonal(_Random):
    """Orthonormal rows or columns times `scale`.

    The weight counts as a matrix (out, in). `mode` restricts it: 'projection' needs out <= in,
    'embedding' out >= in, 'basis' out = in; 'auto' takes any.
    """

    MODES = ("auto", "projection", "embedding", "basis")

    def __init__(
        self, scale: float = 1.1, dtype: Any = None, mode: str = "auto", rng: Any = None
    ) -> None:
        super().__init__(scale, dtype, rng)
        if mode not in self.MODES:
            raise ValueError(f"mode is one of {', '.join(self.MODES)}, got {mode!r}")
        self.mode = mode

    def __call__(self, array: np.ndarray) -> None:
        if not array.size:
            raise ValueError(f"Orthogonal needs an array with elements, got shape {array.shape}")
        generator = np.random if self.rng is None else self.rng
        if not array.ndim:
            array[...] = self.scale * (2 * generator.randint(2) - 1)
            return
        rows, columns = len(array), array.size // len(array)
        self._check(rows, columns)
        wide = columns > rows
        drawn = generator.normal(loc=0.0, scale=1.0, size=(rows, columns))
        q, r = np.linalg.qr(drawn.T if wide else drawn)
        q *= np.copysign(self.scale, np.diag(r))
        array[...] = (q.T if wide else q).reshape(array.shape)

    def _check(self, rows: int, columns: int) -> None:
        fits = {"projection": rows <= columns, "embedding": rows >= columns,
                "basis": rows == columns}  # fmt: skip
        if not fits.get(self.mode, True):
            raise ValueError(f"mode {self.mode!r} does not fit a matrix of {rows} x {columns}")


class _TriangleFilter(Initializer):
    """A separable triangle on the diagonal of the channels."""

    normalised = False

    def __init__(self, interpolation: str = "linear", dtype: Any = None) -> None:
        super().__init__(dtype)
        if interpolation != "linear":
            raise ValueError(f"interpolation is 'linear', got {interpolation!r}")
        self.interpolation = interpolation

    def __call__(self, array: np.ndarray) -> None:
        first, second, *sizes = array.shape
        if first != second and 1 not in (first, second):
            raise ValueError(
                f"{type(self).__name__} needs equal channel numbers or 1, got {first} and {second}"
            )
        kernel = np.ones((1,) * len(sizes))
        for axis, size in enumerate(sizes):
            line = _triangle(size)
            kernel = kernel * line.reshape([-1 if a == axis else 1 for a in range(len(sizes))])
        if self.normalised:
            kernel = kernel / kernel.sum()
        array[...] = 0
        array[np.arange(first), np.arange(second)] = kernel


def _triangle(size: int) -> np.ndarray:
    factor = (size + 1) // 2
    center = factor - 1 if size % 2 else factor - 0.5
    return 1 - np.abs(np.arange(size) - center) / factor


class UpsamplingDeconvFilter(_TriangleFilter):
    """Bilinear upsampling by a deconvolution."""


class DownsamplingConvFilter(_TriangleFilter):
    """Bilinear downsampling by a convolution: the kernel sums to 1."""

    normalised = True


def get_initializer(value: Any, default: Any = None) -> Any:
    """What links accept - None, a number, an array, a callable - as a callable."""
    if value is None:
        return LeCunNormal() if default is None else get_initializer(default)
    return value if callable(value) else Constant(value)


def generate_array(
    initializer: Any, shape: tuple[int, ...], xp: Any = None, dtype: Any = None, device: Any = None
) -> np.ndarray:
    """A new array filled by an initialiser, a number or an array.

    The dtype is the initialiser's own, else `dtype`, else `config.dtype`.
    """
    own = getattr(initializer, "dtype", None)
    array = np.empty(shape, get_dtype(dtype if own is None else own))
    if callable(initializer):
        initializer(array)
    else:
        array[...] = np.nan if initializer is None else initializer
    return array
