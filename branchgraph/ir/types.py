"""Element types and tensor types: what is known of a value before it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import ml_dtypes
import numpy as np

from branchgraph.ir.dims import DimLike, Shape, format_shape, product
from branchgraph.ir.errors import ShapeError


class DType(Enum):
    """An element type; its value is the spelling in text and files."""

    BOOL = "bool"
    U8 = "u8"
    U32 = "u32"
    I8 = "i8"
    I16 = "i16"
    I32 = "i32"
    I64 = "i64"
    F16 = "f16"
    BF16 = "bf16"
    F32 = "f32"
    F64 = "f64"

    # Members are singletons; hashing by name, as Enum does, costs a Python call for every lookup.
    __hash__ = object.__hash__

    @property
    def numpy(self) -> np.dtype:
        """The NumPy dtype (bfloat16 through ml_dtypes)."""
        return _TO_NUMPY[self]

    @property
    def is_float(self) -> bool:
        return self in _FLOATS

    @property
    def is_integer(self) -> bool:
        return self not in _FLOATS and self is not DType.BOOL

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.numpy.itemsize

    @staticmethod
    def of(dtype: DTypeLike) -> DType:
        """The DType for a spelling (`"f32"`), a NumPy dtype or a DType."""
        if isinstance(dtype, DType):
            return dtype
        if isinstance(dtype, str) and dtype in _BY_SPELLING:
            return _BY_SPELLING[dtype]
        try:
            return _FROM_NUMPY[np.dtype(dtype)]
        except (KeyError, TypeError):
            known = ", ".join(_BY_SPELLING)
            raise ShapeError(f"unknown dtype {dtype!r}; known: {known}") from None

    def __str__(self) -> str:
        return str(self.value)


DTypeLike = DType | str | np.dtype | type

_BY_SPELLING = {d.value: d for d in DType}
_FLOATS = frozenset({DType.F16, DType.BF16, DType.F32, DType.F64})
_TO_NUMPY: dict[DType, np.dtype] = {
    DType.BOOL: np.dtype(np.bool_),
    DType.U8: np.dtype(np.uint8),
    DType.U32: np.dtype(np.uint32),
    DType.I8: np.dtype(np.int8),
    DType.I16: np.dtype(np.int16),
    DType.I32: np.dtype(np.int32),
    DType.I64: np.dtype(np.int64),
    DType.F16: np.dtype(np.float16),
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.F32: np.dtype(np.float32),
    DType.F64: np.dtype(np.float64),
}
_FROM_NUMPY = {v: k for k, v in _TO_NUMPY.items()}


@dataclass(frozen=True)
class TensorType:
    """Shape and element type of a value."""

    shape: Shape
    dtype: DType

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> DimLike:
        """Number of elements."""
        return product(self.shape)

    @property
    def nbytes(self) -> DimLike:
        """Bytes of the dense array."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{format_shape(self.shape)}"
