"""Ops of deep networks that would be awkward to compose: look-ups, resampling, soft targets.

embedding    y[i..., d] = W[x[i...], d], 0 where x[i...] is ignored
resize       y[n, c, i, j] = sum_{h, w} A[i, h] B[j, w] x[n, c, h, w]   A, B: one axis each
grid_sample  y[n, c, i, j] = sum_{h, w} t(v - h) t(u - w) x[n, c, h, w],  t(d) = max(1 - |d|, 0)
             u = (g[n, 0, i, j] + 1)(W - 1)/2,  v = (g[n, 1, i, j] + 1)(H - 1)/2
             (Jaderberg et al., "Spatial transformer networks", 2015)
softplus     ln(1 + e^(beta x)) / beta
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from branchgraph.ir.dims import DimLike
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.op import (
    Cotangents,
    Op,
    Wanted,
    concrete,
    require,
    require_float,
)  # fmt: skip
from branchgraph.ir.ops.activation import Sigmoid, Softmax
from branchgraph.ir.ops.elementwise import LogicalAnd, Unary, compare, where
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.types import DType, TensorType

# -- functions of one value ----------------------------------------------------------------------


@dataclass(frozen=True)
class Softplus(Unary, opcode="softplus", operands=("x",)):
    """y = ln(1 + e^(beta x)) / beta, computed as (max(beta x, 0) + ln(1 + e^-|beta x|)) / beta."""

    beta: float = 1.0

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        beta = inputs[0].dtype.type(self.beta)
        z = beta * inputs[0]
        rest = np.log1p(np.exp(-np.abs(z)))
        return (np.asarray((np.maximum(z, z.dtype.type(0)) + rest) / beta),)

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        return dy * dy.graph.emit(Sigmoid(), x * self.beta)


@dataclass(frozen=True)
class ClippedRelu(Unary, opcode="clipped_relu", operands=("x",)):
    """y = min(max(x, 0), ceiling); the derivative is 1 strictly between the bounds, else 0."""

    ceiling: float = 20.0

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        t = x.dtype.type
        return (np.asarray(np.minimum(np.maximum(x, t(0)), t(self.ceiling))),)

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        zero = dy.graph.constant(0.0, dy.dtype)
        ceiling = dy.graph.constant(self.ceiling, dy.dtype)
        above, below = compare("greater", x, zero), compare("less", x, ceiling)
        return where(dy.graph.emit(LogicalAnd(), above, below), dy, zero)


@dataclass(frozen=True)
class FlooredSqrt(Unary, opcode="floored_sqrt", operands=("x",)):
    """y = x^(1/2) with dx = dy / (2 max(y, floor)); a zero norm differentiates to 0."""

    floor: float = 1e-7

    function = np.sqrt

    def check(self) -> None:
        if not self.floor > 0:
            raise GraphError(f"floored_sqrt: floor must be positive, got {self.floor}")

    def pull_back(self, x: Value, y: Value, dy: Value) -> Value:
        floor = dy.graph.constant(self.floor, dy.dtype)
        bounded = where(compare("greater", y, floor), y, floor)
        return dy / (bounded * 2.0)


# -- soft targets --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftCrossEntropy(Op, opcode="soft_cross_entropy", operands=("logits", "targets")):
    """loss[n, ...] = -sum_c targets[n, c, ...] ln softmax(logits)[n, c, ...].

    The gradient is dlogits = dloss (softmax(logits) - targets), which is the derivative when the
    targets of a position sum to 1; none flows to the targets.
    """

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        logits, targets = inputs
        require_float(logits, targets)
        require(logits.rank >= 2, f"logits need a class axis, got {logits}")
        require(logits.shape == targets.shape, f"targets of {logits} must have its shape")
        return (TensorType((logits.shape[0], *logits.shape[2:]), logits.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        logits, targets = inputs
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return (-(targets * log_p).sum(axis=1, dtype=logits.dtype),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dloss,) = cotangents
        assert dloss is not None
        logits, targets = node.inputs
        graph = dloss.graph
        per_class = Reshape(shape=(dloss.shape[0], 1, *dloss.shape[1:]))
        error = graph.emit(Softmax(axis=1), logits) - targets
        return (error * graph.emit(per_class, dloss), None)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows)


# -- rows of a table -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding(Op, opcode="embedding", operands=("ids", "weight")):
    """y[i..., :] = weight[ids[i...], :]; 0 where the id is `ignore_label`.

    ids: integers of any shape, weight: [rows, D]. Any other id outside the table is an error.
    """

    ignore_label: int | None = None

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        ids, weight = inputs
        require(ids.dtype.is_integer, f"ids must be integers, got {ids.dtype}")
        require_float(weight)
        require(weight.rank == 2, f"weight is [rows, D], got {weight}")
        return (TensorType((*ids.shape, weight.shape[1]), weight.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        ids, weight = inputs
        kept = _kept(ids, self.ignore_label)
        chosen = np.where(kept, ids, 0)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(weight)):
            raise ShapeError(
                f"embedding: ids run from {chosen.min()} to {chosen.max()}, "
                f"expected 0..{len(weight) - 1}"
            )
        return (np.where(kept[..., None], weight[chosen], weight.dtype.type(0)),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        ids, weight = node.inputs
        back = EmbeddingGradient(rows=weight.shape[0], ignore_label=self.ignore_label)
        return (None, dy.graph.emit(back, ids, dy))

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return rows[0] and not rows[1]


def _kept(ids: np.ndarray, ignore_label: int | None) -> np.ndarray:
    return np.ones(ids.shape, bool) if ignore_label is None else np.asarray(ids != ignore_label)


@dataclass(frozen=True)
class EmbeddingGradient(Op, opcode="embedding_gradient", operands=("ids", "dy")):
    """dweight[r, :] = sum of dy[i..., :] over the ids that are r; `rows` rows."""

    rows: DimLike
    ignore_label: int | None = None

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        ids, dy = inputs
        require(ids.dtype.is_integer, f"ids must be integers, got {ids.dtype}")
        require_float(dy)
        require(dy.shape[:-1] == ids.shape, f"dy of ids {ids} has their shape and one axis: {dy}")
        return (TensorType((self.rows, dy.shape[-1]), dy.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        ids, dy = inputs
        kept = _kept(ids, self.ignore_label)
        (rows,) = concrete((self.rows,), "embedding_gradient")
        dweight = np.zeros((rows, dy.shape[-1]), np.result_type(dy.dtype, np.float32))
        np.add.at(dweight, ids[kept], dy[kept].astype(dweight.dtype))
        return (dweight.astype(dy.dtype, copy=False),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dweight,) = cotangents
        assert dweight is not None
        look_up = Embedding(ignore_label=self.ignore_label)
        return (None, dweight.graph.emit(look_up, node.inputs[0], dweight))


# -- resampling ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Resize(Op):
    """Geometry of resizing the two spatial axes to `size`.

    bilinear: position v = i (H - 1)/(out - 1) with aligned corners, else
              max((i + 1/2) H/out - 1/2, 0); neighbours floor(v) and min(floor(v) + 1, H - 1)
    nearest:  position floor(i H/out)
    """

    size: tuple[DimLike, ...]
    mode: str = "bilinear"
    align_corners: bool = True

    def check(self) -> None:
        if len(self.size) != 2:
            raise GraphError(f"resize: size has two entries, got {self.size}")
        if self.mode not in ("bilinear", "nearest"):
            raise GraphError(f"resize: mode is bilinear or nearest, got {self.mode!r}")

    def matrix(self, source: int, target: int, dtype: np.dtype) -> np.ndarray:
        """The map of one axis: [target, source]."""
        weights = np.zeros((target, source))
        row = np.arange(target)
        if self.mode == "nearest":
            weights[row, np.minimum(row * source // target, source - 1)] = 1
            return weights.astype(dtype)
        if self.align_corners:
            position = np.linspace(0, source - 1, target)
        else:
            position = np.maximum((row + 0.5) * source / target - 0.5, 0)
        low = np.minimum(np.floor(position).astype(np.int64), source - 1)
        np.add.at(weights, (row, low), 1 - (position - low))
        np.add.at(weights, (row, np.minimum(low + 1, source - 1)), position - low)
        return weights.astype(dtype)

    def sizes(self) -> tuple[int, int]:
        """`size` as plain numbers."""
        height, width = concrete(self.size, self.opcode)
        return height, width

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        require_float(x)
        require(x.rank == 4, f"needs [N, C, H, W], got {x}")
        return (TensorType((*x.shape[:2], *self.size), x.dtype),)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return True


def _separable(rows: np.ndarray, x: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """rows x columns over the last two axes of x."""
    result = np.matmul(np.matmul(rows, x), columns)
    return np.asarray(result).astype(x.dtype, copy=False)


@dataclass(frozen=True)
class Resize(_Resize, opcode="resize", operands=("x",)):
    """Resample the spatial axes of x: [N, C, H, W] to `size`: y = A x B^T."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (x,) = inputs
        maps = (self.matrix(s, t, x.dtype) for s, t in zip(x.shape[2:], self.sizes()))
        a, b = maps
        return (_separable(a, x, b.T),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        back = ResizeGradient(node.inputs[0].shape[2:], self.mode, self.align_corners)
        return (dy.graph.emit(back, dy),)


@dataclass(frozen=True)
class ResizeGradient(_Resize, opcode="resize_gradient", operands=("dy",)):
    """The transpose of `Resize`, back to spatial `size`: dx = A^T dy B."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (dy,) = inputs
        maps = (self.matrix(s, t, dy.dtype) for s, t in zip(self.sizes(), dy.shape[2:]))
        a, b = maps
        return (_separable(a.T, dy, b),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dx,) = cotangents
        assert dx is not None
        forward = Resize(node.inputs[0].shape[2:], self.mode, self.align_corners)
        return (dx.graph.emit(forward, dx),)


@dataclass(frozen=True)
class _Corner:
    """One of the four neighbours of every sampling point: where it is, and its two weights."""

    inside: np.ndarray
    row: np.ndarray
    column: np.ndarray
    v_weight: np.ndarray
    u_weight: np.ndarray
    v_slope: int
    u_slope: int


def _corners(height: int, width: int, grid: np.ndarray) -> Iterator[_Corner]:
    t = grid.dtype.type
    u = (grid[:, 0] + t(1)) * t((width - 1) / 2)
    v = (grid[:, 1] + t(1)) * t((height - 1) / 2)
    left, top = np.floor(u), np.floor(v)
    u_part, v_part = u - left, v - top
    column = np.clip(left.astype(np.float64), -2, width).astype(np.int64)
    row = np.clip(top.astype(np.float64), -2, height).astype(np.int64)
    for i, j in np.ndindex(2, 2):
        r, c = row + i, column + j
        yield _Corner(
            inside=(r >= 0) & (r < height) & (c >= 0) & (c < width),
            row=np.clip(r, 0, height - 1),
            column=np.clip(c, 0, width - 1),
            v_weight=v_part if i else t(1) - v_part,
            u_weight=u_part if j else t(1) - u_part,
            v_slope=1 if i else -1,
            u_slope=1 if j else -1,
        )


def _cells(x: np.ndarray, corner: _Corner) -> np.ndarray:
    """The neighbour of every point: [N, C, H', W'], 0 outside x."""
    batch = np.arange(len(x))[:, None, None]
    cells = np.moveaxis(x[batch, :, corner.row, corner.column], -1, 1)
    return np.where(corner.inside[:, None], cells, x.dtype.type(0))


def _check_grid(x: TensorType, grid: TensorType) -> None:
    require_float(x, grid)
    require(x.rank == 4, f"x is [N, C, H, W], got {x}")
    fits = grid.rank == 4 and grid.shape[0] == x.shape[0] and grid.shape[1] == 2
    require(fits, f"grid of {x} is [{x.shape[0]}, 2, H', W'], got {grid}")


@dataclass(frozen=True)
class GridSample(Op, opcode="grid_sample", operands=("x", "grid")):
    """Bilinear samples of x: [N, C, H, W] at grid: [N, 2, H', W'] in [-1, 1]; 0 outside."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, grid = inputs
        _check_grid(x, grid)
        return (TensorType((*x.shape[:2], *grid.shape[2:]), x.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, grid = inputs
        y = np.zeros((*x.shape[:2], *grid.shape[2:]), x.dtype)
        for corner in _corners(x.shape[2], x.shape[3], grid):
            y += _cells(x, corner) * (corner.v_weight * corner.u_weight)[:, None]
        return (y,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        (dy,) = cotangents
        assert dy is not None
        return dy.graph.apply(GridSampleGradient(), *node.inputs, dy)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows)


@dataclass(frozen=True)
class GridSampleGradient(Op, opcode="grid_sample_gradient", operands=("x", "grid", "dy")):
    """(dx, dgrid) of `GridSample`; on a grid line the slope to the right is taken."""

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        x, grid, dy = inputs
        _check_grid(x, grid)
        expected = TensorType((*x.shape[:2], *grid.shape[2:]), x.dtype)
        require(dy == expected, f"dy must be {expected}, got {dy}")
        return (x, grid)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, grid, dy = inputs
        height, width = x.shape[2:]
        t = x.dtype.type
        batch = np.arange(len(x))[:, None, None]
        dx = np.zeros((len(x), height, width, x.shape[1]), np.result_type(x.dtype, np.float32))
        du, dv = np.zeros((2, *grid[:, 0].shape), x.dtype)
        for corner in _corners(height, width, grid):
            weight = np.where(corner.inside, corner.v_weight * corner.u_weight, t(0))
            share = np.moveaxis(dy * weight[:, None], 1, -1).astype(dx.dtype)
            np.add.at(dx, (batch, corner.row, corner.column), share)
            along = (dy * _cells(x, corner)).sum(axis=1, dtype=x.dtype)
            du += along * corner.v_weight * t(corner.u_slope)
            dv += along * corner.u_weight * t(corner.v_slope)
        dgrid = np.stack((du * t((width - 1) / 2), dv * t((height - 1) / 2)), axis=1)
        return (np.moveaxis(dx, -1, 1).astype(x.dtype), dgrid)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return all(rows)


# -- places in pooling windows -------------------------------------------------------------------


@dataclass(frozen=True)
class _Place(Op):
    """Windows of `kernel` that move by `stride` over spatial `size` padded by `pad` in front."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    size: tuple[DimLike, ...]

    def check(self) -> None:
        if not len(self.kernel) == len(self.stride) == len(self.pad) == len(self.size) > 0:
            raise GraphError(f"{self.opcode}: kernel, stride, pad and size have one entry an axis")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (index,) = inputs
        require(index.dtype is DType.I64, f"index must be i64, got {index.dtype}")
        rank = len(self.kernel) + 2
        require(index.rank == rank, f"{rank - 2} spatial axes need rank {rank}, got {index}")
        return (index,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return (None,)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return True

    def starts(self, windows: tuple[int, ...]) -> list[np.ndarray]:
        """Where every window begins, an open mesh of one array an axis."""
        steps = zip(windows, self.stride, self.pad)
        return list(np.ix_(*(np.arange(o) * s - p for o, s, p in steps)))


@dataclass(frozen=True)
class WindowToPlane(_Place, opcode="window_to_plane", operands=("index",)):
    """Row-major index in each window to the row-major index in the plane; -1 outside of it."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (index,) = inputs
        taps = np.unravel_index(np.clip(index, 0, np.prod(self.kernel) - 1), self.kernel)
        inside = index >= 0
        flat = np.zeros_like(index)
        sizes = concrete(self.size, self.opcode)
        for tap, start, size in zip(taps, self.starts(index.shape[2:]), sizes):
            along = tap + start
            inside &= (along >= 0) & (along < size)
            flat = flat * size + along
        return (np.where(inside, flat, -1),)


@dataclass(frozen=True)
class PlaneToWindow(_Place, opcode="plane_to_window", operands=("index",)):
    """Row-major index in the plane to the row-major index in each window; 0 for -1."""

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (index,) = inputs
        places = np.unravel_index(np.maximum(index, 0), concrete(self.size, self.opcode))
        local = np.zeros_like(index)
        for place, start, kernel in zip(places, self.starts(index.shape[2:]), self.kernel):
            local = local * kernel + place - start
        return (np.where(index >= 0, local, 0),)
