"""Maximum pooling over regions of interest (Girshick, "Fast R-CNN", ICCV 2015).

A region (n, x0, y0, x1, y1) of image n has its corners scaled and rounded, ends included, and is
cut into oh by ow cells. With u = rint(x0 s), w = max(rint(x1 s) - u + 1, 1) and the same for the
other axis, cell j along the width covers the columns

    floor(j w/ow) + u  ..  ceil((j + 1) w/ow) + u - 1        clipped to the image

and the output is the largest element of the cell, 0 where nothing of it lies in the image. Its
gradient goes to the first largest element in row-major order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import product
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.graph import Node
from branchgraph.ir.op import Cotangents, Op, Wanted, require, require_float
from branchgraph.ir.ops.elementwise import compare, where
from branchgraph.ir.ops.index import ScatterAdd
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.types import DType, TensorType

#: A cell of a region: where it stands in the output, and the image, rows and columns it covers.
_Cell = tuple[tuple[int, int, int], int, slice, slice]


@dataclass(frozen=True)
class _RoiPool(Op):
    """Geometry: cells along height and width, and the scale from regions to x."""

    cells: tuple[int, ...]
    scale: float = 1.0

    def check(self) -> None:
        if len(self.cells) != 2 or min(self.cells) < 1:
            raise GraphError(f"{self.opcode}: cells are two positive numbers, got {self.cells}")
        if not 0 < self.scale < float("inf"):
            raise GraphError(f"{self.opcode}: scale must be positive, got {self.scale}")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, regions = inputs
        require_float(x, regions)
        require(x.rank == 4, f"x is [N, C, H, W], got {x}")
        fits = regions.rank == 2 and regions.shape[1] == 5
        require(fits, f"regions are [R, 5]: image, x0, y0, x1, y1; got {regions}")
        return (TensorType((regions.shape[0], x.shape[1], *self.cells), x.dtype),)

    def covered(self, shape: tuple[int, ...], regions: np.ndarray) -> Iterator[_Cell]:
        """The cells of all regions that meet x of `shape`."""
        count, _, height, width = shape
        if not np.isfinite(regions).all():
            raise ShapeError(f"{self.opcode}: regions must be finite numbers")
        corners = np.rint(regions[:, 1:] * regions.dtype.type(self.scale)).astype(np.float64)
        for r, (region, (x0, y0, x1, y1)) in enumerate(zip(regions, corners)):
            image = int(np.rint(region[0]))
            if not 0 <= image < count:
                raise ShapeError(
                    f"{self.opcode}: region {r} lies in image {image}, x has {count} images"
                )
            rows = list(_spans(y0, y1, self.cells[0], height))
            columns = list(_spans(x0, x1, self.cells[1], width))
            for i, j in np.ndindex(*self.cells):
                if rows[i].start < rows[i].stop and columns[j].start < columns[j].stop:
                    yield (r, i, j), image, rows[i], columns[j]


def _spans(first: float, last: float, cells: int, size: int) -> Iterator[slice]:
    """Positions that each cell along one axis covers, inside 0 .. size - 1."""
    step = max(last - first + 1.0, 1.0) / cells
    for i in range(cells):
        start = min(max(np.floor(i * step) + first, 0), size)
        stop = min(max(np.ceil((i + 1) * step) + first, 0), size)
        yield slice(int(start), int(stop))


@dataclass(frozen=True)
class RoiMaxPool(_RoiPool, opcode="roi_max_pool", operands=("x", "regions")):
    """Largest element of every cell: x [N, C, H, W], regions [R, 5] to [R, C, *cells]."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, regions = inputs
        y = np.zeros((len(regions), x.shape[1], *self.cells), x.dtype)
        for (r, i, j), image, rows, columns in self.covered(x.shape, regions):
            y[r, :, i, j] = x[image, :, rows, columns].max(axis=(1, 2))
        return (y,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        x, regions = node.inputs
        if not wanted[0]:
            return (None, None)
        graph = dy.graph
        index = graph.emit(RoiMaxPoolIndex(self.cells, self.scale), x, regions)
        flat = Reshape(shape=(product(dy.shape),))
        found = compare("greater_equal", index, graph.constant(0, index.dtype))
        kept = where(found, dy, graph.constant(0.0, dy.dtype))
        place = where(found, index, graph.constant(0, index.dtype))
        add = ScatterAdd(axis=0, size=product(x.shape))
        summed = graph.emit(add, graph.emit(flat, kept), graph.emit(flat, place))
        return (graph.emit(Reshape(shape=x.shape), summed), None)


@dataclass(frozen=True)
class RoiMaxPoolIndex(_RoiPool, opcode="roi_max_pool_index", operands=("x", "regions")):
    """Position of every cell's maximum, flat over the whole of x; -1 where a cell is empty."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (y,) = super().infer(*inputs)
        return (TensorType(y.shape, DType.I64),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, regions = inputs
        _, channels, height, width = x.shape
        index = np.full((len(regions), channels, *self.cells), -1, np.int64)
        for (r, i, j), image, rows, columns in self.covered(x.shape, regions):
            cell = x[image, :, rows, columns]
            row, column = np.divmod(cell.reshape(channels, -1).argmax(axis=1), cell.shape[2])
            plane = image * channels + np.arange(channels)
            index[r, :, i, j] = (plane * height + rows.start + row) * width + columns.start + column
        return (index,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return (None, None)
