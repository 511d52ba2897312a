"""Convolutions whose kernels are values: given, depthwise, scaled by channel, mixed by sample.

`builder.conv` makes the kernel's state; these read any value instead. Geometry arguments are those
of `builder.conv`.
"""

from __future__ import annotations

from branchgraph.ir.builder import Size, pads, spread
from branchgraph.ir.dims import product
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.functions.layout import reshaped
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.linear import MatMul
from branchgraph.ir.ops.sample_conv import SampleConv


def _axes(x: Value, what: str) -> int:
    axes = len(x.shape) - 2
    if axes < 1:
        raise ShapeError(f"{what}: needs [N, C, spatial...], got {x.type}")
    return axes


def convolve(
    x: Value, weight: Value, bias: Value | None = None, *, stride: Size = 1, pad: Size = 0,
    dilation: Size = 1, groups: int = 1,
) -> Value:  # fmt: skip
    """x [N, C, *size] with weight [O, C/groups, *kernel] and bias [O]: [N, O, *out]."""
    axes = _axes(x, "convolve")
    op = Conv(
        stride=spread(stride, axes, "stride"),
        pad=pads(pad, axes),
        dilation=spread(dilation, axes, "dilation"),
        groups=groups,
    )
    return x.graph.emit(op, x, weight, *([] if bias is None else [bias]))


def depthwise_conv(
    x: Value, weight: Value, bias: Value | None = None, *, stride: Size = 1, pad: Size = 0,
    dilation: Size = 1,
) -> Value:  # fmt: skip
    """Every channel of x [N, C, *size] with m kernels of its own: weight [C m, 1, *kernel].

    Output channel c m + j is input channel c under its kernel j; bias is [C m].
    """
    channels = x.shape[1] if len(x.shape) > 2 else None
    if not isinstance(channels, int) or channels < 1:
        raise ShapeError(f"depthwise_conv: needs a known number of channels, got {x.type}")
    return convolve(
        x, weight, bias, stride=stride, pad=pad, dilation=dilation, groups=channels
    )  # fmt: skip


def separable_conv(
    x: Value, depthwise: Value, pointwise: Value, bias: Value | None = None, *, stride: Size = 1,
    pad: Size = 0, dilation: Size = 1,
) -> Value:  # fmt: skip
    """A depthwise convolution, then one with 1x1 kernels.

    depthwise: [C m, 1, *kernel], pointwise: [O, C m, 1, ...]; the bias [O] belongs to the
    second. (Chollet, "Xception", arXiv 1610.02357.)
    """
    spatial = depthwise_conv(x, depthwise, stride=stride, pad=pad, dilation=dilation)
    return convolve(spatial, pointwise, bias)


def scale_channels(x: Value, scale: Value) -> Value:
    """y[n, c, ...] = s x[n, c, ...], with s = scale[c], or scale[n, c] for every sample."""
    fits = scale.shape in (x.shape[1:2], x.shape[:2]) and len(x.shape) >= 2
    if not fits:
        raise ShapeError(f"scale_channels: scale of {x.type} is [C] or [N, C], got {scale.type}")
    lead = scale.shape if len(scale.shape) == 2 else (1, *scale.shape)
    return x * reshaped(scale, (*lead, *(1,) * (len(x.shape) - 2)))


def channel_scaled_conv(
    x: Value, weight: Value, scale: Value, bias: Value | None = None, *, stride: Size = 1,
    pad: Size = 0, dilation: Size = 1, groups: int = 1,
) -> Value:  # fmt: skip
    """A convolution with channel multipliers: y_o = s_o (sum W_o x + b_o), scale [O] or [N, O].

    It is written as the convolution and the multiplication, the cheap form while training. A scale
    [O] folds into the convolution exactly, W'_o = s_o W_o and b'_o = s_o b_o; a scale [N, O] that
    does not vary over space gives every sample a kernel of its own, W'[n, o] = s[n, o] W_o, that is
    `sample_conv`, worth it only where kernels are mixed anyway.
    """
    y = convolve(
        x, weight, bias, stride=stride, pad=pad, dilation=dilation, groups=groups
    )  # fmt: skip
    return scale_channels(y, scale)


def sample_conv(
    x: Value, weights: Value, biases: Value | None = None, *, stride: Size = 1, pad: Size = 0,
    dilation: Size = 1, groups: int = 1,
) -> Value:  # fmt: skip
    """Sample n of x [N, C, *size] with weights[n] [O, C/groups, *kernel] and biases[n] [O]."""
    axes = _axes(x, "sample_conv")
    op = SampleConv(
        stride=spread(stride, axes, "stride"),
        pad=pads(pad, axes),
        dilation=spread(dilation, axes, "dilation"),
        groups=groups,
    )
    return x.graph.emit(op, x, weights, *([] if biases is None else [biases]))


def mixed_conv(
    x: Value, weights: Value, mixture: Value, biases: Value | None = None, *, stride: Size = 1,
    pad: Size = 0, dilation: Size = 1, groups: int = 1,
) -> Value:  # fmt: skip
    """Sample n convolved with sum_k mixture[n, k] weights[k], and biased by the same mixture.

    weights: [K, O, C/groups, *kernel], mixture: [N, K], biases: [K, O]. It equals the weighted sum
    of K convolutions (ParaDise's PD-B; CondConv, arXiv 1904.04971, with a sigmoid mixture; Dynamic
    Convolution, arXiv 1912.03458, with a softmax one) at the cost of one and of mixing the kernels.
    """
    _axes(x, "mixed_conv")
    count = weights.shape[0] if weights.shape else None
    if len(mixture.shape) != 2 or mixture.shape[1] != count:
        raise ShapeError(
            f"mixed_conv: mixture of {count} kernels is [N, {count}], got {mixture.type}"
        )
    if biases is not None and biases.shape != weights.shape[:2]:
        raise ShapeError(f"mixed_conv: biases of {weights.type} are [K, O], got {biases.type}")
    samples = mixture.shape[0]
    flat = reshaped(weights, (weights.shape[0], product(weights.shape[1:])))
    kernels = reshaped(x.graph.emit(MatMul(), mixture, flat), (samples, *weights.shape[1:]))
    mixed = None if biases is None else x.graph.emit(MatMul(), mixture, biases)
    return sample_conv(
        x, kernels, mixed, stride=stride, pad=pad, dilation=dilation, groups=groups
    )  # fmt: skip
