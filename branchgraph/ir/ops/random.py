"""Counter-based randomness: the same numbers on every backend, after a resume, and under passes.

A number depends only on (key, step, stream, row, element) through Philox 4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011):

    counter = (element // 4, row, step mod 2^32, stream),  word = philox(counter, key)[element % 4]
    uniform = (word >> (32 - b)) / 2^b,  b = 24 (11 in float16, 8 in bfloat16)    exact, below 1
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from branchgraph.ir.dims import DimLike
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.lowering import Lowering
from branchgraph.ir.op import STREAM, Cotangents, Op, Wanted, concrete, require, require_float
from branchgraph.ir.ops.elementwise import cast, compare
from branchgraph.ir.types import DType, TensorType

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
#: Bits of a draw in the dtypes that do not hold 24 exactly.
_BITS = {DType.F16: 11, DType.BF16: 8}
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Ten rounds of Philox 4x32 on broadcast counter words; four words, uint64 below 2^32."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) & _LOW for c in counter)
    k0, k1 = (int(k) & 0xFFFFFFFF for k in key)
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> _SHIFT) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _SHIFT) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


@dataclass(frozen=True)
class RandomUniform(Op, opcode="random_uniform", operands=("key", "step", "rows?")):
    """U[0, 1) of `shape`, whose axis 0 is the row; `rows` gives row numbers other than 0, 1, 2...

    key: u32[2], step: i64[], rows: i64[shape[0]].
    """

    stream: int = field(metadata=STREAM)
    shape: tuple[DimLike, ...] = ()
    dtype: DType = DType.F32

    def check(self) -> None:
        if not 0 <= self.stream < 2**32:
            raise GraphError(f"random stream {self.stream} is outside 0..2^32 - 1")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        key, step, *rows = inputs
        require(key == TensorType((2,), DType.U32), f"key must be u32[2], got {key}")
        require(step == TensorType((), DType.I64), f"step must be i64[], got {step}")
        require(self.dtype.is_float, f"needs a floating dtype, got {self.dtype}")
        require(bool(self.shape) or not rows, "a shape without an axis has no rows to choose")
        expected = TensorType(self.shape[:1], DType.I64)
        require(all(r == expected for r in rows), f"rows must be {expected}")
        return (TensorType(self.shape, self.dtype),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        key, step, *rows = inputs
        shape = concrete(self.shape, "random_uniform")
        count = shape[0] if shape else 1
        row = rows[0] if rows else np.arange(count)
        elements = int(np.prod(shape[1:])) if shape else 1
        blocks = np.arange((elements + 3) // 4)
        counter = (blocks[None, :], row[:, None], step, np.asarray(self.stream))
        words = philox4x32(counter, (int(key[0]), int(key[1])))
        drawn = np.stack(words, axis=-1).reshape(count, 4 * len(blocks))[:, :elements]
        bits = _BITS.get(self.dtype, 24)
        uniform = (drawn >> np.uint64(32 - bits)).astype(np.float64) * 2.0**-bits
        return (uniform.astype(self.dtype.numpy).reshape(shape),)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return tuple(None for _ in node.inputs)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return len(inputs) == 3


@dataclass(frozen=True)
class Dropout(Op, opcode="dropout", operands=("x",)):
    """Inverted dropout (Srivastava et al. 2014): x mask / (1 - ratio), mask = u >= ratio.

    Inference is the identity, unless `always`. `stream` separates the draws of different layers;
    along `axes` the elements share one draw.
    """

    ratio: float
    stream: int = field(metadata=STREAM)
    axes: tuple[int, ...] = ()
    always: bool = False
    declared = True

    def check(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise GraphError(f"dropout ratio {self.ratio} is outside [0, 1)")
        if list(self.axes) != sorted(set(self.axes)) or any(a < 0 for a in self.axes):
            raise GraphError(f"axes {self.axes} must be distinct, ascending and not negative")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (x,) = inputs
        require_float(x)
        require(not self.axes or self.axes[-1] < x.rank, f"axes {self.axes} exceed rank {x.rank}")
        return inputs

    def lower(self, inputs: tuple[Value, ...], lowering: Lowering) -> tuple[Value, ...]:
        (x,) = inputs
        if not (lowering.training or self.always):
            return (x,)
        shape = tuple(1 if a in self.axes else d for a, d in enumerate(x.shape))
        u = uniform(lowering, self.stream, TensorType(shape, x.dtype))
        keep = cast(compare("greater_equal", u, u.graph.constant(self.ratio, u.dtype)), x.dtype)
        return (x * (keep * (1.0 / (1.0 - self.ratio))),)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return 0 not in self.axes


def uniform(lowering: Lowering, stream: int, like: TensorType) -> Value:
    """U[0, 1) in the shape of `like`: from the counter-based stream, or fed by the host.

    Host-fed draws are float64 inputs named `random.<stream>`, as NumPy's generators make them.
    """
    graph = lowering.graph
    if lowering.randomness == "host":
        name = f"random.{stream}"
        return graph.inputs.get(name) or graph.input(name, like.shape, DType.F64)
    key, step = lowering.random_key()
    op = RandomUniform(stream=stream, shape=like.shape, dtype=like.dtype)
    return graph.emit(op, key, step)
