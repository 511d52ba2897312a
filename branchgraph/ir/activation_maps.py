"""Where a network looks: maps of its activations, and the loss that keeps them off a heat map.

The class activation map of h [N, C, H, W] at a size [H', W'] is, image by image,

    a = mean over channels of resize(h),    cam = (a - min a) / (max a - min a)

bilinear, in [0, 1]; a map without contrast is 0. With heat maps of the same size

    loss = sum over images and pixels of heat cam

which is small where the branch is active only outside the heat map (arXiv 1803.05872 has one branch
a body key-point and the weight 0.2).
"""

from __future__ import annotations

from branchgraph.ir.dims import DimLike
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.functions import resize_bilinear
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.elementwise import compare, where
from branchgraph.ir.ops.reduce import ReduceMax, ReduceMean, ReduceSum


def class_activation_map(h: Value, size: tuple[DimLike, DimLike] | None = None) -> Value:
    """Activations h [N, C, H, W] as one map an image [N, H', W'], from 0 to 1.

    Without `size` the map has that of h. Raises `ShapeError` for other ranks.
    """
    if len(h.shape) != 4:
        raise ShapeError(f"a class activation map needs [N, C, H, W], got {h.type}")
    graph = h.graph
    if size is not None and tuple(size) != h.shape[2:]:
        h = resize_bilinear(h, size=size)
    a = graph.emit(ReduceMean(axes=(1,)), h)
    pixels = ReduceMax(axes=(1, 2), keepdims=True)
    raised = a + graph.emit(pixels, -a)
    range_ = graph.emit(pixels, raised)
    flat = compare("equal", range_, graph.constant(0.0, a.dtype))
    return raised / where(flat, graph.constant(1.0, a.dtype), range_)


def heat_map_loss(cam: Value, heat: Value) -> Value:
    """sum heat cam over maps of the same shape [N, H, W]: one number.

    Raises `ShapeError` where they differ.
    """
    if cam.type != heat.type or len(cam.shape) != 3:
        raise ShapeError(f"a heat map is [N, H, W] like the map, got {heat.type} for {cam.type}")
    return cam.graph.emit(ReduceSum(axes=(0, 1, 2)), heat * cam)
