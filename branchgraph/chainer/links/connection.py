"""Links around one linear map: dense layers, convolutions and their relatives.

Weights are (out, in, ...) with LeCunNormal initial values unless said; `None` as the input size
means that the first call decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod, sqrt
from typing import Any

import numpy as np

from branchgraph.chainer import functions as F
from branchgraph.chainer.functions.record import check_removed, pair
from branchgraph.chainer.initializers import HeNormal, Normal, get_initializer
from branchgraph.chainer.link import Link
from branchgraph.chainer.variable import Parameter, Variable

_REMOVED = {
    "deterministic": "use using_config('cudnn_deterministic', value)",
    "wscale": "use initialW",
    "bias": "use initial_bias",
    "use_cudnn": "use using_config('use_cudnn', value)",
}


def _weight(initial: Any, shape: tuple[int, ...] | None, default: Any = None) -> Parameter:
    return Parameter(get_initializer(initial, default), shape)


def _bias(nobias: bool, initial: Any, shape: Any) -> Parameter | None:
    return None if nobias else Parameter(get_initializer(initial, 0), shape)


def _repeated(value: Any, axes: int) -> tuple[int, ...]:
    sizes = pair(value, axes)
    if len(sizes) != axes:
        raise ValueError(f"expected one number or {axes}, got {value!r}")
    return sizes


def _divisible(name: str, channels: int, groups: int) -> int:
    if groups < 1 or channels % groups:
        raise ValueError(f"{name} is a multiple of groups, got {channels} and {groups}")
    return channels // groups


class _Specs(Link):
    """A link whose `str` shows attributes."""

    _specs: tuple[str, ...] = ()

    @property
    def printable_specs(self) -> Iterator[tuple[str, Any]]:
        yield from ((name, getattr(self, name)) for name in self._specs)


class Linear(_Specs):
    """y = x W^T + b. W: [out, in], b: [out]. One positional size is the output's."""

    _specs = ("in_size", "out_size", "nobias")

    def __init__(
        self, in_size: int | None, out_size: int | None = None, nobias: bool = False,
        initialW: Any = None, initial_bias: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if out_size is None:
            in_size, out_size = None, in_size
        self.in_size, self.out_size, self.nobias = in_size, out_size, nobias
        with self.init_scope():
            shape = None if in_size is None else (out_size, in_size)
            self.W = _weight(initialW, shape)  # type: ignore[arg-type]
            self.b = _bias(nobias, initial_bias, out_size)

    @classmethod
    def from_params(cls, W: Any, b: Any = None, nobias: bool = False) -> Linear:
        """A link with given values."""
        W, b, nobias = _given(W, b, nobias)
        return cls(W.shape[1], W.shape[0], nobias, W, b)

    def forward(self, x: Any, n_batch_axes: int = 1) -> Variable:
        """x is flattened behind `n_batch_axes` axes."""
        if not self.W.is_initialized:
            self.in_size = prod(x.shape[n_batch_axes:])
            self.W.initialize((self.out_size, self.in_size))  # type: ignore[arg-type]
        return F.linear(x, self.W, self.b, n_batch_axes=n_batch_axes)


def _given(W: Any, b: Any, nobias: bool) -> tuple[Any, Any, bool]:
    arrays = [v.array if isinstance(v, Variable) else v for v in (W, b)]
    return arrays[0], arrays[1], nobias or b is None


class ConvolutionND(_Specs):
    """Cross-correlation over `ndim` axes. W: [out, in/groups, k, ...], b: [out].

    Without `ksize` the two sizes given are (out_channels, ksize).
    """

    _specs = ("in_channels", "out_channels", "ksize", "stride", "pad", "nobias", "dilate", "groups")

    def __init__(
        self, ndim: int, in_channels: Any, out_channels: Any, ksize: Any = None, stride: Any = 1,
        pad: Any = 0, nobias: bool = False, initialW: Any = None, initial_bias: Any = None,
        cover_all: bool = False, dilate: Any = 1, groups: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if ksize is None:
            out_channels, ksize, in_channels = in_channels, out_channels, None
        self.ndim, self.nobias, self.cover_all = ndim, nobias, cover_all
        self.in_channels, self.out_channels, self.ksize = in_channels, out_channels, ksize
        self.stride, self.pad = _repeated(stride, ndim), _repeated(pad, ndim)
        self.dilate, self.groups = _repeated(dilate, ndim), int(groups)
        with self.init_scope():
            shape = None if in_channels is None else self._shape(in_channels)
            self.W = _weight(initialW, shape)
            self.b = _bias(nobias, initial_bias, out_channels)

    @classmethod
    def from_params(
        cls, W: Any, b: Any = None, stride: Any = 1, pad: Any = 0, nobias: bool = False, **more: Any
    ) -> ConvolutionND:
        """A link with given values."""
        W, b, nobias = _given(W, b, nobias)
        out, inner, *ksize = W.shape
        sizes = (inner * more.get("groups", 1), out, tuple(ksize))
        if cls is ConvolutionND:
            sizes = (len(ksize), *sizes)  # type: ignore[assignment]
        return cls(*sizes, stride, pad, nobias, W, b, **more)

    def _shape(self, in_channels: int) -> tuple[int, ...]:
        inner = _divisible("in_channels", in_channels, self.groups)
        _divisible("out_channels", self.out_channels, self.groups)
        return (self.out_channels, inner, *_repeated(self.ksize, self.ndim))

    def _ready(self, x: Any) -> None:
        if not self.W.is_initialized:
            self.W.initialize(self._shape(x.shape[1]))

    def forward(self, x: Any) -> Variable:
        """x: [N, in, ...]."""
        self._ready(x)
        return F.convolution_nd(
            x, self.W, self.b, self.stride, self.pad, cover_all=self.cover_all,
            dilate=self.dilate, groups=self.groups,
        )  # fmt: skip


class Convolution1D(ConvolutionND):
    """`ConvolutionND` over one axis."""

    def __init__(self, in_channels: Any, out_channels: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(1, in_channels, out_channels, *args, **kwargs)


class Convolution3D(ConvolutionND):
    """`ConvolutionND` over three axes."""

    def __init__(self, in_channels: Any, out_channels: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(3, in_channels, out_channels, *args, **kwargs)


class Convolution2D(ConvolutionND):
    """Cross-correlation of images. W: [out, in/groups, kh, kw], b: [out]."""

    def __init__(
        self, in_channels: Any, out_channels: Any, ksize: Any = None, stride: Any = 1,
        pad: Any = 0, nobias: bool = False, initialW: Any = None, initial_bias: Any = None, *,
        dilate: Any = 1, groups: int = 1, **removed: Any,
    ) -> None:  # fmt: skip
        check_removed("Convolution2D", removed, _REMOVED)
        super().__init__(
            2, in_channels, out_channels, ksize, stride, pad, nobias, initialW, initial_bias,
            dilate=dilate, groups=groups,
        )  # fmt: skip

    def forward(self, x: Any) -> Variable:
        """x: [N, in, H, W]."""
        self._ready(x)
        return F.convolution_2d(
            x, self.W, self.b, self.stride, self.pad, dilate=self.dilate, groups=self.groups
        )


class DilatedConvolution2D(Convolution2D):
    """`Convolution2D` with `dilate` as the sixth positional argument."""

    def __init__(
        self, in_channels: Any, out_channels: Any, ksize: Any = None, stride: Any = 1,
        pad: Any = 0, dilate: Any = 1, nobias: bool = False, initialW: Any = None,
        initial_bias: Any = None, **removed: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, ksize, stride, pad, nobias, initialW, initial_bias,
            dilate=dilate, **removed,
        )  # fmt: skip


class DeconvolutionND(_Specs):
    """Transposed convolution over `ndim` axes. W: [in, out/groups, k, ...], b: [out]."""

    _specs = ("in_channels", "out_channels", "ksize", "stride", "pad", "nobias", "outsize",
              "dilate", "groups")  # fmt: skip

    def __init__(
        self, ndim: int, in_channels: Any, out_channels: Any, ksize: Any = None, stride: Any = 1,
        pad: Any = 0, nobias: bool = False, outsize: Any = None, initialW: Any = None,
        initial_bias: Any = None, dilate: Any = 1, groups: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if ksize is None:
            out_channels, ksize, in_channels = in_channels, out_channels, None
        self.ndim, self.nobias = ndim, nobias
        self.in_channels, self.out_channels, self.ksize = in_channels, out_channels, ksize
        self.stride, self.pad = _repeated(stride, ndim), _repeated(pad, ndim)
        self.outsize = None if outsize is None else _repeated(outsize, ndim)
        self.dilate, self.groups = _repeated(dilate, ndim), int(groups)
        with self.init_scope():
            shape = None if in_channels is None else self._shape(in_channels)
            self.W = _weight(initialW, shape)
            self.b = _bias(nobias, initial_bias, out_channels)

    def _shape(self, in_channels: int) -> tuple[int, ...]:
        _divisible("in_channels", in_channels, self.groups)
        inner = _divisible("out_channels", self.out_channels, self.groups)
        return (in_channels, inner, *_repeated(self.ksize, self.ndim))

    def _function(self) -> Any:
        return F.deconvolution_nd

    def forward(self, x: Any) -> Variable:
        """x: [N, in, ...]."""
        if not self.W.is_initialized:
            self.W.initialize(self._shape(x.shape[1]))
        return self._function()(  # type: ignore[no-any-return]
            x, self.W, self.b, self.stride, self.pad, self.outsize,
            dilate=self.dilate, groups=self.groups,
        )  # fmt: skip


class Deconvolution1D(DeconvolutionND):
    """`DeconvolutionND` over one axis."""

    def __init__(self, in_channels: Any, out_channels: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(1, in_channels, out_channels, *args, **kwargs)


class Deconvolution3D(DeconvolutionND):
    """`DeconvolutionND` over three axes."""

    def __init__(self, in_channels: Any, out_channels: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(3, in_channels, out_channels, *args, **kwargs)


class Deconvolution2D(DeconvolutionND):
    """Transposed convolution of images. W: [in, out/groups, kh, kw], b: [out]."""

    def __init__(
        self, in_channels: Any, out_channels: Any, ksize: Any = None, stride: Any = 1,
        pad: Any = 0, nobias: bool = False, outsize: Any = None, initialW: Any = None,
        initial_bias: Any = None, *, dilate: Any = 1, groups: int = 1, **removed: Any,
    ) -> None:  # fmt: skip
        check_removed("Deconvolution2D", removed, _REMOVED)
        super().__init__(
            2, in_channels, out_channels, ksize, stride, pad, nobias, outsize, initialW,
            initial_bias, dilate, groups,
        )  # fmt: skip

    def _function(self) -> Any:
        return F.deconvolution_2d


class DepthwiseConvolution2D(_Specs):
    """Every channel by its own filters. W: [multiplier, in, kh, kw], b: [in multiplier].

    Output channel c multiplier + m is filter m of input channel c. W is drawn with standard
    deviation sqrt(1 / (in kh kw)).
    """

    _specs = ("in_channels", "channel_multiplier", "ksize", "stride", "pad", "nobias")

    def __init__(
        self, in_channels: int | None, channel_multiplier: int, ksize: Any, stride: Any = 1,
        pad: Any = 0, nobias: bool = False, initialW: Any = None, initial_bias: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.channel_multiplier, self.ksize = (
            in_channels, channel_multiplier, ksize,
        )  # fmt: skip
        self.stride, self.pad, self.nobias = _repeated(stride, 2), _repeated(pad, 2), nobias
        with self.init_scope():
            self.W = _weight(initialW, None, HeNormal(1 / sqrt(2)))
            self.b = _bias(nobias, initial_bias, None)
        if in_channels is not None:
            self._initialize(in_channels)

    def _initialize(self, channels: int) -> None:
        if not self.W.is_initialized:
            self.W.initialize((self.channel_multiplier, channels, *_repeated(self.ksize, 2)))
        if self.b is not None and not self.b.is_initialized:
            self.b.initialize((self.channel_multiplier * channels,))

    def forward(self, x: Any) -> Variable:
        """x: [N, in, H, W]."""
        self._initialize(x.shape[1])
        return F.depthwise_convolution_2d(x, self.W, self.b, self.stride, self.pad)


class LocalConvolution2D(_Specs):
    """Convolution with its own filter at every place. W: [out, oh, ow, in, kh, kw]."""

    _specs = ("in_channels", "out_channels", "in_size", "ksize", "stride", "nobias")

    def __init__(
        self, in_channels: int | None, out_channels: int, in_size: Any = None, ksize: Any = None,
        stride: Any = 1, nobias: bool = False, initialW: Any = None, initial_bias: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.in_size = in_channels, out_channels, in_size
        self.ksize, self.stride, self.nobias = ksize, _repeated(stride, 2), nobias
        with self.init_scope():
            self.W = _weight(initialW, None)
            self.b = _bias(nobias, initial_bias, None)
        if in_channels is not None and in_size is not None:
            self._initialize(in_channels, _repeated(in_size, 2))

    def _initialize(self, channels: int, size: tuple[int, ...]) -> None:
        kernel = _repeated(self.ksize, 2)
        places = tuple(n - k + 1 for n, k in zip(size, kernel))
        if not self.W.is_initialized:
            self.W.initialize((self.out_channels, *places, channels, *kernel))
        if self.b is not None and not self.b.is_initialized:
            self.b.initialize((self.out_channels, *places))

    def forward(self, x: Any) -> Variable:
        """x: [N, in, H, W]."""
        self._initialize(x.shape[1], x.shape[2:])
        return F.local_convolution_2d(x, self.W, self.b, stride=self.stride)


class EmbedID(_Specs):
    """Rows of W: [in, out] by integer; rows of `ignore_label` are 0. W ~ N(0, 1)."""

    _specs = ("in_size", "out_size", "ignore_label")
    ignore_label: int | None = None

    def __init__(
        self, in_size: int, out_size: int, initialW: Any = None, ignore_label: int | None = None
    ) -> None:
        super().__init__()
        self.in_size, self.out_size, self.ignore_label = in_size, out_size, ignore_label
        with self.init_scope():
            self.W = _weight(initialW, (in_size, out_size), Normal(1.0))

    @classmethod
    def from_params(cls, W: Any, ignore_label: int | None = None) -> EmbedID:
        """A link with given values."""
        W, _, _ = _given(W, None, True)
        return cls(*W.shape, W, ignore_label)

    def forward(self, x: Any) -> Variable:
        """x: integers of any shape."""
        return F.embed_id(x, self.W, ignore_label=self.ignore_label)


class Bias(_Specs):
    """x plus a learnt b of `shape` from `axis` on; without `shape` plus the second input."""

    _specs = ("axis",)

    def __init__(self, axis: int = 1, shape: Any = None) -> None:
        super().__init__()
        self.axis = axis
        if shape is not None:
            with self.init_scope():
                self.b = Parameter(0, shape)

    def forward(self, x: Any, b: Any = None) -> Variable:
        """x + b."""
        return F.bias(x, one_of("b", b, getattr(self, "b", None)), self.axis)


def one_of(name: str, given: Any, own: Any) -> Any:
    """The second input of a call or the link's own value: one of the two must be there."""
    if given is not None and own is not None:
        raise AttributeError(f"the link has its own {name}; call it with one input")
    if given is None and own is None:
        raise ValueError(f"the link has no {name} of its own; call it with two inputs")
    return own if given is None else given


class Bilinear(_Specs):
    """y_k = x1 W_k x2 + x1 V1 + x2 V2 + b. W: [left, right, out]; W alone with `nobias`."""

    _specs = ("left_size", "right_size", "out_size", "nobias")

    def __init__(
        self, left_size: int | None, right_size: int | None, out_size: int, nobias: bool = False,
        initialW: Any = None, initial_bias: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.left_size, self.right_size = left_size, right_size
        self.out_size, self.nobias = out_size, nobias
        v1, v2, b = initial_bias if isinstance(initial_bias, tuple) else (initial_bias,) * 3
        with self.init_scope():
            self.W = _weight(initialW, None)
            if not nobias:
                self.V1, self.V2 = _weight(v1, None), _weight(v2, None)
                self.b = _bias(False, b, out_size)
        if left_size is not None and right_size is not None:
            self._initialize(left_size, right_size)

    def _initialize(self, left: int, right: int) -> None:
        shapes = {"W": (left, right, self.out_size), "V1": (left, self.out_size),
                  "V2": (right, self.out_size)}  # fmt: skip
        for name, shape in shapes.items():
            if name in self._params and not getattr(self, name).is_initialized:
                getattr(self, name).initialize(shape)

    def forward(self, e1: Any, e2: Any) -> Variable:
        """e1: [N, left], e2: [N, right]."""
        self._initialize(*(prod(e.shape[1:]) for e in (e1, e2)))
        terms = () if self.nobias else (self.V1, self.V2, self.b)
        return F.bilinear(e1, e2, self.W, *terms)


class SimplifiedDropconnect(_Specs):
    """A dense layer whose weights are dropped, one mask a sample."""

    _specs = ("in_size", "out_size", "ratio", "nobias")

    def __init__(
        self, in_size: int | None, out_size: int, ratio: float = 0.5, nobias: bool = False,
        initialW: Any = None, initial_bias: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_size, self.out_size, self.ratio, self.nobias = in_size, out_size, ratio, nobias
        with self.init_scope():
            self.W = _weight(initialW, None if in_size is None else (out_size, in_size))
            self.b = _bias(nobias, initial_bias, out_size)

    def forward(
        self,
        x: Any,
        train: bool = True,
        mask: np.ndarray | None = None,
        use_batchwise_mask: bool = True,
    ) -> Variable:
        """x: [N, ...]; `mask` replaces the draw."""
        if not self.W.is_initialized:
            self.W.initialize((self.out_size, prod(x.shape[1:])))
        return F.simplified_dropconnect(
            x, self.W, self.b, self.ratio, train, mask, use_batchwise_mask
        )
