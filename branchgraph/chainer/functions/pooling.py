"""Pooling, its inverses, and resampling.

Maximum pooling and unpooling cover the whole input by default; average pooling never does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from branchgraph.chainer.functions.compose import expect, floating, shaped
from branchgraph.chainer.functions.record import (
    as_variable,
    check_removed,
    function,
    pair,
    record,
)  # fmt: skip
from branchgraph.chainer.variable import Variable
from branchgraph.ir.ops.deep import GridSample, PlaneToWindow, Resize, WindowToPlane
from branchgraph.ir.ops.linear import MatMul
from branchgraph.ir.ops.merge import Concat
from branchgraph.ir.ops.pool import (
    AveragePool,
    AveragePoolGradient,
    MaxPool,
    MaxPoolIndex,
    ScatterPooled,
)
from branchgraph.ir.ops.roi import RoiMaxPool

__all__ = [
    "average_pooling_1d",
    "average_pooling_2d",
    "average_pooling_3d",
    "average_pooling_nd",
    "max_pooling_1d",
    "max_pooling_2d",
    "max_pooling_3d",
    "max_pooling_nd",
    "resize_images",
    "roi_pooling_2d",
    "spatial_pyramid_pooling_2d",
    "spatial_transformer_grid",
    "spatial_transformer_sampler",
    "unpooling_1d",
    "unpooling_2d",
    "unpooling_3d",
    "unpooling_nd",
    "upsampling_2d",
]

REMOVED = {"use_cudnn": "use chainer.using_config('use_cudnn', ...)"}
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _window(x: Variable, ksize: Any, stride: Any, pad: Any, axes: int | None = None) -> Window:
    """Kernel, stride and leading pad, one number a spatial axis each."""
    axes = x.ndim - 2 if axes is None else axes
    expect(x.ndim == axes + 2 > 2, f"{axes} spatial axes need {axes + 2} axes, got {x.shape}")
    kernel = pair(ksize, axes)
    steps = kernel if stride is None else pair(stride, axes)
    window = kernel, steps, pair(pad, axes)
    expect(all(len(w) == axes for w in window), f"ksize, stride and pad need {axes} numbers")
    return window


# -- maximum -------------------------------------------------------------------------------------


def _max_pooling(
    x: Any, axes: int | None, ksize: Any, stride: Any, pad: Any, cover_all: bool, indices: bool
) -> Any:
    x = floating(x)
    kernel, steps, pads = _window(x, ksize, stride, pad, axes)
    geometry = (kernel, steps, pads * 2, bool(cover_all))
    if not indices:
        return record(MaxPool(*geometry), x)
    place = record(MaxPoolIndex(*geometry), x)
    local = record(PlaneToWindow(kernel, steps, pads, x.shape[2:]), place)
    return record(MaxPool(*geometry), x), local.array


@function
def max_pooling_nd(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, cover_all: bool = True,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    """The largest element of every window; with `return_indices`, also its index in the window."""
    return _max_pooling(x, None, ksize, stride, pad, cover_all, return_indices)


@function
def max_pooling_1d(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, cover_all: bool = True,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    """Maximum pooling over one axis."""
    return _max_pooling(x, 1, ksize, stride, pad, cover_all, return_indices)


@function
def max_pooling_2d(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, cover_all: bool = True,
    return_indices: bool = False, **removed: Any,
) -> Any:  # fmt: skip
    """Maximum pooling over two axes."""
    check_removed("max_pooling_2d", removed, REMOVED)
    return _max_pooling(x, 2, ksize, stride, pad, cover_all, return_indices)


@function
def max_pooling_3d(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, cover_all: bool = True,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    """Maximum pooling over three axes."""
    return _max_pooling(x, 3, ksize, stride, pad, cover_all, return_indices)


@function
def spatial_pyramid_pooling_2d(
    x: Any, pyramid_height: int, pooling: str | None = None, **removed: Any
) -> Variable:
    """Maxima over 1, 2, 4, ... windows an axis, one after the other: [N, channels, 1, 1]."""
    check_removed("spatial_pyramid_pooling_2d", removed, REMOVED)
    if pooling != "max":
        raise ValueError(f"pooling must be 'max', got {pooling!r}")
    x = floating(x)
    expect(x.ndim == 4, f"x must have 4 axes, got {x.shape}")
    levels = []
    for level in range(pyramid_height):
        windows = 2**level
        kernel = tuple(-(-size // windows) for size in x.shape[2:])
        pad = tuple((k * windows - size) // 2 for k, size in zip(kernel, x.shape[2:]))
        y = _max_pooling(x, 2, kernel, None, pad, True, False)
        levels.append(shaped(y, x.shape[0], y.size // max(x.shape[0], 1), 1, 1))
    return record(Concat(1), *levels)


@function
def roi_pooling_2d(x: Any, rois: Any, outh: int, outw: int, spatial_scale: float) -> Variable:
    """The largest elements of outh by outw cells of every region; 0 where a cell is empty.

    x: [N, C, H, W]; rois: [R, 5], each image, x_min, y_min, x_max, y_max before scaling.
    """
    x, regions = floating(x), floating(rois, "rois")
    expect(regions.dtype == x.dtype, f"rois must be {x.dtype}, got {regions.dtype}")
    return record(RoiMaxPool((int(outh), int(outw)), float(spatial_scale)), x, regions)


# -- average -------------------------------------------------------------------------------------


def _average_pooling(
    x: Any, axes: int | None, ksize: Any, stride: Any, pad: Any, pad_value: int | None
) -> Variable:
    if pad_value not in (0, None):
        raise ValueError(f"pad_value must be 0 or None, got {pad_value!r}")
    x = floating(x)
    kernel, steps, pads = _window(x, ksize, stride, pad, axes)
    divisor = "inside" if pad_value is None else "kernel"
    return record(AveragePool(kernel, steps, pads * 2, False, divisor), x)


@function
def average_pooling_nd(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, pad_value: int | None = 0
) -> Variable:
    """The mean of every window; with `pad_value` None, of its elements inside x only."""
    return _average_pooling(x, None, ksize, stride, pad, pad_value)


@function
def average_pooling_1d(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, pad_value: int | None = 0
) -> Variable:
    """Average pooling over one axis."""
    return _average_pooling(x, 1, ksize, stride, pad, pad_value)


@function
def average_pooling_2d(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, **removed: Any
) -> Variable:
    """Average pooling over two axes; padding counts."""
    check_removed("average_pooling_2d", removed, REMOVED)
    return _average_pooling(x, 2, ksize, stride, pad, 0)


@function
def average_pooling_3d(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, pad_value: int | None = 0
) -> Variable:
    """Average pooling over three axes."""
    return _average_pooling(x, 3, ksize, stride, pad, pad_value)


# -- the way back --------------------------------------------------------------------------------


def _unpooled_size(x: Variable, window: Window, outsize: Any, cover_all: bool) -> tuple[int, ...]:
    """The size given, or the one that pooling would reduce to x's."""
    if outsize is not None:
        return pair(outsize, x.ndim - 2)
    extents = zip(x.shape[2:], *window)
    size = tuple(
        s * (h - 1) + k - 2 * p - (s - 1 if cover_all else 0) for h, k, s, p in extents
    )  # fmt: skip
    expect(min(size) > 0, f"the output would have size {size}")
    return size


def _unpooling(
    x: Any, axes: int | None, ksize: Any, stride: Any, pad: Any, outsize: Any, cover_all: bool
) -> Variable:
    x = floating(x)
    kernel, steps, pads = window = _window(x, ksize, stride, pad, axes)
    size = _unpooled_size(x, window, outsize, cover_all)
    spread = AveragePoolGradient(kernel, steps, pads * 2, bool(cover_all), "one", size)
    return record(spread, x)


@function
def unpooling_nd(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, outsize: Any = None,
    cover_all: bool = True,
) -> Variable:  # fmt: skip
    """Every element added to all cells of its window."""
    return _unpooling(x, None, ksize, stride, pad, outsize, cover_all)


@function
def unpooling_1d(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, outsize: Any = None,
    cover_all: bool = True,
) -> Variable:  # fmt: skip
    """Unpooling over one axis."""
    return _unpooling(x, 1, ksize, stride, pad, outsize, cover_all)


@function
def unpooling_2d(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, outsize: Any = None,
    cover_all: bool = True,
) -> Variable:  # fmt: skip
    """Unpooling over two axes."""
    return _unpooling(x, 2, ksize, stride, pad, outsize, cover_all)


@function
def unpooling_3d(
    x: Any, ksize: Any, stride: Any = None, pad: Any = 0, outsize: Any = None,
    cover_all: bool = True,
) -> Variable:  # fmt: skip
    """Unpooling over three axes."""
    return _unpooling(x, 3, ksize, stride, pad, outsize, cover_all)


@function
def upsampling_2d(
    x: Any, indexes: Any, ksize: Any, stride: Any = None, pad: Any = 0, outsize: Any = None,
    cover_all: bool = True,
) -> Variable:  # fmt: skip
    """Every element put where maximum pooling took it: at `indexes` in its window."""
    x, local = floating(x), as_variable(indexes)
    expect(local.shape == x.shape, f"indexes must have shape {x.shape}, got {local.shape}")
    kernel, steps, pads = window = _window(x, ksize, stride, pad, 2)
    size = _unpooled_size(x, window, outsize, cover_all)
    place = record(WindowToPlane(kernel, steps, pads, size), local)
    return record(ScatterPooled(size), x, place)


# -- resampling ----------------------------------------------------------------------------------


@function
def resize_images(
    x: Any, output_shape: tuple[int, int], *, mode: str = "bilinear", align_corners: bool = True
) -> Variable:
    """The spatial axes of x: [N, C, H, W] resampled to `output_shape`."""
    x = as_variable(x)
    expect(x.dtype == np.float32, f"x must be float32, got {x.dtype}")
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f"mode must be 'bilinear' or 'nearest', got {mode!r}")
    return record(Resize(pair(output_shape), mode, bool(align_corners)), x)


@function
def spatial_transformer_grid(theta: Any, output_shape: tuple[int, int], **removed: Any) -> Variable:
    """Sampling points of affine maps: theta [N, 2, 3] to [N, 2, H, W], x first, from -1 to 1."""
    check_removed("spatial_transformer_grid", removed, REMOVED)
    theta = floating(theta, "theta")
    expect(theta.shape[1:] == (2, 3), f"theta is [N, 2, 3], got {theta.shape}")
    height, width = pair(output_shape)
    v, u = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    points = np.stack([u.ravel(), v.ravel(), np.ones(u.size)]).astype(theta.dtype)
    n = theta.shape[0]
    grid = record(MatMul(), shaped(theta, n * 2, 3), points)
    return shaped(grid, n, 2, height, width)


@function
def spatial_transformer_sampler(x: Any, grid: Any, **removed: Any) -> Variable:
    """Bilinear samples of x: [N, C, H, W] at grid: [N, 2, H', W'], 0 outside."""
    check_removed("spatial_transformer_sampler", removed, REMOVED)
    return record(GridSample(), floating(x), floating(grid, "grid"))
