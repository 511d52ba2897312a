"""Tensors of a plan: concrete shapes, and where in a buffer their elements lie.

Shapes are logical (N, C, *spatial) everywhere. Activations that windows move over lie channels
last, which is what oneDNN is fastest with; everything else lies in row-major order. A slice or a
reshape that moves nothing is a tensor in the same buffer with other strides.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from branchgraph.ir.types import DType

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """`shape` elements of `dtype` in buffer `buffer`; strides count elements, offset bytes."""

    buffer: int
    shape: Shape
    dtype: DType
    strides: Shape
    offset: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.size * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last one."""
        if not self.size:
            return 0
        reach = sum((d - 1) * s for d, s in zip(self.shape, self.strides))
        return (reach + 1) * self.dtype.itemsize

    @property
    def dense(self) -> bool:
        """Whether the elements lie without gaps, in whatever order of axes."""
        return self.span == self.nbytes

    @property
    def row_major(self) -> bool:
        """Whether the elements lie in the order of their indices."""
        return _same(self.shape, self.strides, row_major(self.shape))

    @property
    def channels_last(self) -> bool:
        """Whether the elements lie in the order N, *spatial, C."""
        return len(self.shape) > 2 and _same(self.shape, self.strides, channels_last(self.shape))

    @property
    def rows_outermost(self) -> bool:
        """Whether the elements of a row lie together, row behind row."""
        return not self.size or self.strides[0] * self.shape[0] >= self.size

    def viewed(self, shape: Shape, strides: Shape, offset: int = 0) -> Tensor:
        """Another tensor over the same buffer, `offset` bytes further on."""
        return replace(self, shape=shape, strides=strides, offset=self.offset + offset)

    def array(self, memory: np.ndarray) -> np.ndarray:
        """The elements as an array over the bytes of the buffer."""
        width = self.dtype.itemsize
        strides = tuple(s * width for s in self.strides)
        found: np.ndarray = np.ndarray(self.shape, self.dtype.numpy, memory, self.offset, strides)
        return found


def row_major(shape: Shape) -> Shape:
    """Strides, in elements, of the order of indices."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def channels_last(shape: Shape) -> Shape:
    """Strides, in elements, of [N, C, *spatial] that lies as [N, *spatial, C]."""
    n, *spatial, c = row_major((shape[0], *shape[2:], shape[1]))
    return (n, c, *spatial)


def dense(buffer: int, shape: Shape, dtype: DType, *, last: bool = False) -> Tensor:
    """A tensor without gaps at the start of `buffer`."""
    strides = channels_last(shape) if last and len(shape) > 2 else row_major(shape)
    return Tensor(buffer, shape, dtype, strides)


def reshaped(tensor: Tensor, shape: Shape) -> Tensor | None:
    """`tensor` in another shape where it lies, or None if elements would have to move.

    Axes are matched in runs of equal size; a run can change its shape if it has no gaps inside.
    """
    old = [(d, s) for d, s in zip(tensor.shape, tensor.strides) if d != 1]
    strides: list[int] = []
    position = 0
    pending = [d for d in shape if d != 1]
    done = 0
    while done < len(pending) or position < len(old):
        if done >= len(pending) or position >= len(old):
            return None
        have, want = old[position][0], pending[done]
        first, start = position, done
        position, done = position + 1, done + 1
        while have != want:
            if have < want:
                if position >= len(old):
                    return None
                have *= old[position][0]
                position += 1
            else:
                if done >= len(pending):
                    return None
                want *= pending[done]
                done += 1
        run = old[first:position]
        if any(a[1] != b[0] * b[1] for a, b in itertools.pairwise(run)):
            return None
        step = run[-1][1]
        inner = []
        for d in reversed(pending[start:done]):
            inner.append(step)
            step *= d
        strides.extend(reversed(inner))
    given = iter(strides)
    full = tuple(next(given) if d != 1 else 1 for d in shape)
    return tensor.viewed(shape, full)


def _same(shape: Shape, a: Shape, b: Shape) -> bool:
    """Whether two strides mean the same places: those of single elements do not matter."""
    return 0 in shape or all(x == y for d, x, y in zip(shape, a, b) if d != 1)
