"""oneDNN's objects with Python's manners: descriptors, memories, attributes, primitives, steps.

A primitive is built from descriptors of its tensors and run on memories:

    relu = eltwise_forward(Eltwise.RELU, desc, desc)
    step = relu.step({Arg.SRC: Memory(desc, x), Arg.DST: Memory(desc, y)})
    for call, arguments, _ in (step,):
        call(*arguments)

Names and arguments are oneDNN's (https://oneapi-src.github.io/oneDNN/v3.2): logical dimensions are
NC[D]HW and [G]OI[D]HW, strides count elements, and a dilation of 0 means neighbouring cells.
Scratch memory is always the caller's. Objects free what they own when they are collected.

The reference implementations of oneDNN are about a thousand times slower than the others and are
refused unless asked for, since they are chosen silently.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_int, c_void_p
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from branchgraph.backends.onednn import bindings
from branchgraph.backends.onednn.bindings import OneDNNError
from branchgraph.compiler.memory import ALIGNMENT
from branchgraph.ir.errors import ShapeError, UnsupportedError
from branchgraph.ir.types import DType, DTypeLike


class ReferenceImplementation(OneDNNError):
    """oneDNN has only its slow reference implementation for a combination of descriptors."""


# -- constants of dnnl_types.h -----------------------------------------------------------------


class Arg(IntEnum):
    """What a memory is to a primitive."""

    SRC = 1
    SRC_1 = 2
    DST = 17
    WEIGHTS = 33
    BIAS = 41
    MEAN = 49
    VARIANCE = 50
    SCALE = 51
    SHIFT = 52
    WORKSPACE = 64
    SCRATCHPAD = 80
    DIFF_SRC = 129
    DIFF_DST = 145
    DIFF_WEIGHTS = 161
    DIFF_BIAS = 169
    DIFF_SCALE = 255
    DIFF_SHIFT = 256


def multiple_source(index: int) -> int:
    """The argument of operand `index` of `concat` and `sum_of`."""
    return 1024 + index


def post_op_operand(index: int) -> int:
    """The argument that feeds post-op `index`, which is a binary one."""
    return 32768 * (index + 1) | Arg.SRC_1


class Eltwise(IntEnum):
    """Element-wise functions of x with parameters a (alpha) and b (beta)."""

    RELU = 0x20  #: x if x > 0 else a x
    TANH = 0x21
    ELU = 0x22  #: x if x > 0 else a (e^x - 1)
    SQUARE = 0x23
    ABS = 0x24
    SQRT = 0x25
    LINEAR = 0x26  #: a x + b
    SOFT_RELU = 0x27  #: ln(1 + e^(a x)) / a
    HARDSIGMOID = 0x28  #: max(0, min(1, a x + b))
    LOGISTIC = 0x29
    EXP = 0x2A
    GELU_TANH = 0x2B
    SWISH = 0x2C  #: x / (1 + e^(-a x))
    LOG = 0x2D
    CLIP = 0x2E  #: max(a, min(b, x))
    CLIP_V2 = 0x2F  #: as CLIP, with gradient 0 at the bounds
    POW = 0x30  #: a x^b
    GELU_ERF = 0x31
    ROUND = 0x32
    MISH = 0x33
    HARDSWISH = 0x34
    #: For the gradient only: the data operand is the function's result.
    RELU_FROM_RESULT = 0x100
    TANH_FROM_RESULT = 0x101
    ELU_FROM_RESULT = 0x102
    SQRT_FROM_RESULT = 0x103
    LOGISTIC_FROM_RESULT = 0x104
    EXP_FROM_RESULT = 0x105
    CLIP_V2_FROM_RESULT = 0x106


class Binary(IntEnum):
    """Functions of two operands; the comparisons give 1 and 0."""

    ADD = 0x1FFF0
    MUL = 0x1FFF1
    MAX = 0x1FFF2
    MIN = 0x1FFF3
    DIV = 0x1FFF4
    SUB = 0x1FFF5
    GE = 0x1FFF6
    GT = 0x1FFF7
    LE = 0x1FFF8
    LT = 0x1FFF9
    EQ = 0x1FFFA
    NE = 0x1FFFB


class Pooling(IntEnum):
    """What a window becomes."""

    MAX = 0x1FF
    AVERAGE_INCLUDE_PADDING = 0x2FF
    AVERAGE_EXCLUDE_PADDING = 0x3FF


class Reduction(IntEnum):
    """What reduced axes become."""

    MAX = 0x2FFF2
    MIN = 0x2FFF3
    SUM = 0x2FFF4
    MUL = 0x2FFF5
    MEAN = 0x2FFF6


class Softmax(IntEnum):
    """Softmax or its logarithm."""

    ACCURATE = 0x30000
    LOG = 0x30001


class Resampling(IntEnum):
    """Interpolation."""

    NEAREST = 0x2FFF0
    LINEAR = 0x2FFF1


class Normalization(IntFlag):
    """Flags of batch normalisation."""

    NONE = 0
    USE_GLOBAL_STATS = 1
    USE_SCALE = 2
    USE_SHIFT = 4
    FUSE_NORM_RELU = 8


_FPMATH = {"strict": 0, "bf16": 1, "f16": 2, "any": 3, "tf32": 4}
_TRAINING, _INFERENCE, _BACKWARD = 64, 96, 128
_CPU, _IN_ORDER, _USER_SCRATCHPAD = 1, 1, 1
_CONVOLUTION_DIRECT, _LRN_ACROSS_CHANNELS = 1, 0xAFF
_TAG_ANY, _FORMAT_BLOCKED = 1, 2

_DTYPES = {DType.F16: 1, DType.BF16: 2, DType.F32: 3, DType.I32: 4, DType.I8: 5, DType.U8: 6}
_FROM_CODE = {code: dtype for dtype, code in _DTYPES.items()}

#: Queries of memory descriptors.
_NDIMS, _DIMS, _DATA_TYPE, _STRIDES = 256, 257, 258, 14
_FORMAT_KIND, _INNER_BLOCKS = 262, 263
#: Queries of primitive descriptors.
_IMPLEMENTATION, _ARGUMENT = 8, 255
_DESCS = {
    "src": 129,
    "diff_src": 130,
    "weights": 131,
    "diff_weights": 132,
    "dst": 133,
    "diff_dst": 134,
    "workspace": 135,
    "scratchpad": 136,
}


def _own(owner: object, kind: str, handle: int) -> int:
    """Free `handle` when `owner` is collected; not at exit, when the library may be gone."""
    weakref.finalize(owner, bindings.destroyer(kind), c_void_p(handle)).atexit = False
    return handle


# -- engine and streams ------------------------------------------------------------------------

_lock = threading.Lock()
_engine: int | None = None
_local = threading.local()


def engine() -> int:
    """The handle of the process's CPU engine."""
    global _engine
    with _lock:
        if _engine is None:
            _engine = bindings.create("engine_create", _CPU, 0)
    return _engine


class Stream:
    """An in-order queue of primitives; one thread at a time may use it."""

    def __init__(self) -> None:
        self.handle = _own(self, "stream", bindings.create("stream_create", engine(), _IN_ORDER))

    def wait(self) -> None:
        """Return when everything in the stream has run; with OpenMP it has already."""
        bindings.call("stream_wait", self.handle)


def thread_stream() -> Stream:
    """The stream of the calling thread, made at its first use."""
    if not hasattr(_local, "stream"):
        _local.stream = Stream()
    found: Stream = _local.stream
    return found


# -- memory descriptors ------------------------------------------------------------------------


class Desc:
    """Logical dimensions, element type and physical layout of a tensor."""

    def __init__(self, handle: int) -> None:
        """Takes over `handle`; use the constructors below."""
        self.handle = _own(self, "memory_desc", handle)
        rank = bindings.query_int(handle, _NDIMS)
        self.dims = bindings.query_dims(handle, _DIMS, rank)
        self.nbytes = int(bindings.call("memory_desc_get_size", handle))

    @staticmethod
    def strided(
        dims: Sequence[int], dtype: DTypeLike, strides: Sequence[int] | None = None
    ) -> Desc:
        """A layout given by its strides, in elements; row-major without them."""
        if strides is None:
            strides = _row_major(dims)
        if len(strides) != len(dims):
            raise ShapeError(f"{len(dims)} dims {tuple(dims)} need as many strides, got {strides}")
        return _described("with_strides", dims, dtype, bindings.int64s(strides))

    @staticmethod
    def channels_last(dims: Sequence[int], dtype: DTypeLike) -> Desc:
        """N[D]HWC in memory for logical dims NC[D]HW."""
        n, c, *spatial = dims
        n_stride, *spatial_strides, c_stride = _row_major((n, *spatial, c))
        return Desc.strided(dims, dtype, (n_stride, c_stride, *spatial_strides))

    @staticmethod
    def any(dims: Sequence[int], dtype: DTypeLike) -> Desc:
        """A layout that the primitive chooses; ask it with `Primitive.desc`."""
        return _described("with_tag", dims, dtype, _TAG_ANY)

    @cached_property
    def dtype(self) -> DType:
        """Element type."""
        return _FROM_CODE[bindings.query_int(self.handle, _DATA_TYPE)]

    @cached_property
    def strides(self) -> tuple[int, ...] | None:
        """Strides in elements; None if the layout is blocked or still to be chosen."""
        if bindings.query_int(self.handle, _FORMAT_KIND) != _FORMAT_BLOCKED:
            return None
        if bindings.query_int(self.handle, _INNER_BLOCKS):
            return None
        return bindings.query_dims(self.handle, _STRIDES, len(self.dims))

    @cached_property
    def span(self) -> int:
        """Bytes from the first to the last element; `nbytes` also counts the gap after the last."""
        if self.strides is None:
            return self.nbytes
        if 0 in self.dims:
            return 0
        last = sum((d - 1) * stride for d, stride in zip(self.dims, self.strides))
        return (last + 1) * self.dtype.itemsize

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Desc):
            return NotImplemented
        return bool(bindings.call("memory_desc_equal", self.handle, other.handle))

    def __hash__(self) -> int:
        return hash((self.dims, self.nbytes))

    def __str__(self) -> str:
        layout = self.strides
        shown = f"strides {list(layout)}" if layout is not None else "no plain layout"
        return f"{self.dtype}{list(self.dims)} ({shown})"

    __repr__ = __str__


def _row_major(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(max(d, 1) for d in dims[axis + 1 :]) for axis in range(len(dims)))


def _described(how: str, dims: Sequence[int], dtype: DTypeLike, layout: Any) -> Desc:
    element = DType.of(dtype)
    if element not in _DTYPES:
        known = ", ".join(str(d) for d in _DTYPES)
        raise UnsupportedError(f"oneDNN has no element type {element}; it has {known}")
    name = f"memory_desc_create_{how}"
    return Desc(bindings.create(name, len(dims), bindings.int64s(dims), _DTYPES[element], layout))


# -- memory ------------------------------------------------------------------------------------


class Memory:
    """A descriptor bound to a buffer, which stays the caller's."""

    def __init__(self, desc: Desc, data: np.ndarray | int) -> None:
        """`data`: an array that spans at least `desc.span` bytes, kept alive, or an address."""
        self.desc = desc
        self.data = data
        pointer = c_void_p(_address(desc, data))
        handle = bindings.create("memory_create", desc.handle, engine(), pointer)
        self.handle = _own(self, "memory", handle)

    @staticmethod
    def empty(desc: Desc) -> Memory:
        """Memory of its own, aligned and not initialised."""
        return Memory(desc, allocate(desc.nbytes))

    def point(self, data: np.ndarray | int) -> None:
        """Bind to another buffer; steps that hold this memory follow."""
        address = _address(self.desc, data)
        bindings.call("memory_set_data_handle", self.handle, c_void_p(address))
        self.data = data


def _address(desc: Desc, data: np.ndarray | int) -> int:
    """The first byte of a buffer that must hold `desc`."""
    if isinstance(data, int):
        return data
    if any(stride < 0 for stride in data.strides):
        raise ShapeError(f"an array with negative strides {data.strides} cannot be bound to {desc}")
    last = sum((n - 1) * stride for n, stride in zip(data.shape, data.strides))
    available = last + data.itemsize if data.size else 0
    if available < desc.span:
        raise ShapeError(f"{desc} takes {desc.span} bytes, the array spans {available}")
    return int(data.ctypes.data)


def allocate(nbytes: int) -> np.ndarray:
    """A buffer of `nbytes` bytes (u8), aligned: vector loads across cache lines cost up to 3x."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


# -- attributes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """Post-op: add `scale` times what dst held before."""

    scale: float = 1.0


@dataclass(frozen=True)
class EltwisePostOp:
    """Post-op: an element-wise function."""

    algorithm: Eltwise
    alpha: float = 0.0
    beta: float = 0.0


@dataclass(frozen=True)
class BinaryPostOp:
    """Post-op: a binary function with another tensor, broadcast from its extents of 1."""

    algorithm: Binary
    desc: Desc


PostOp = Sum | EltwisePostOp | BinaryPostOp


@dataclass(frozen=True)
class Attributes:
    """Post-ops in the order in which they apply, and the arithmetic that float32 may use.

    `fpmath` is `strict`, `bf16`, `f16`, `tf32` or `any`. The builders return extended copies.
    """

    post_ops: tuple[PostOp, ...] = ()
    fpmath: str = "strict"

    def sum(self, scale: float = 1.0) -> Attributes:
        """Then add `scale` times the earlier content of dst."""
        return replace(self, post_ops=(*self.post_ops, Sum(scale)))

    def eltwise(self, algorithm: Eltwise, alpha: float = 0.0, beta: float = 0.0) -> Attributes:
        """Then apply an element-wise function."""
        return replace(self, post_ops=(*self.post_ops, EltwisePostOp(algorithm, alpha, beta)))

    def binary(self, algorithm: Binary, desc: Desc) -> Attributes:
        """Then combine with a tensor, given at execution as `post_op_operand(index)`."""
        return replace(self, post_ops=(*self.post_ops, BinaryPostOp(algorithm, desc)))


class _AttributeHandle:
    """The C object of attributes; primitive descriptors copy it."""

    def __init__(self, attributes: Attributes) -> None:
        if attributes.fpmath not in _FPMATH:
            known = ", ".join(_FPMATH)
            raise UnsupportedError(f"unknown fpmath mode {attributes.fpmath!r}; known: {known}")
        handle = bindings.create("primitive_attr_create")
        self.handle = _own(self, "primitive_attr", handle)
        bindings.call("primitive_attr_set_scratchpad_mode", handle, _USER_SCRATCHPAD)
        bindings.call("primitive_attr_set_fpmath_mode", handle, _FPMATH[attributes.fpmath])
        if attributes.post_ops:
            self._set_post_ops(attributes.post_ops)

    def _set_post_ops(self, post_ops: tuple[PostOp, ...]) -> None:
        chain = _own(self, "post_ops", bindings.create("post_ops_create"))
        for op in post_ops:
            match op:
                case Sum(scale):
                    bindings.call("post_ops_append_sum", chain, scale, 0, 0)
                case EltwisePostOp(algorithm, alpha, beta):
                    bindings.call("post_ops_append_eltwise", chain, algorithm, alpha, beta)
                case BinaryPostOp(algorithm, desc):
                    bindings.call("post_ops_append_binary", chain, algorithm, desc.handle)
        bindings.call("primitive_attr_set_post_ops", self.handle, chain)


# -- primitives --------------------------------------------------------------------------------


class Step(NamedTuple):
    """A prepared execution: `call(*arguments)` runs it and returns oneDNN's status (0: success)."""

    call: Callable[..., int]
    arguments: tuple[Any, ...]
    keep: tuple[Any, ...]  #: what must stay alive as long as the step


class Primitive:
    """A chosen implementation of an operation on described tensors."""

    def __init__(self, kind: str, handle: int) -> None:
        """Takes over the primitive descriptor `handle`; use the functions below."""
        self.kind = kind
        self.descriptor = _own(self, "primitive_desc", handle)
        self.implementation = bindings.query_text(handle, _IMPLEMENTATION)

    def desc(self, what: str, index: int = 0) -> Desc:
        """The layout of `src`, `weights`, `dst`, `diff_src`, `diff_weights`, `diff_dst`, ...

        The bias is `weights` (or `diff_weights`) 1; operands are `src` 0, 1, and so on.
        """
        found = self._find(_DESCS[what], index)
        if found is None:
            raise UnsupportedError(f"{self.kind} has no {what} {index}")
        return found

    def argument(self, index: int) -> Desc | None:
        """The layout of the memory that `step` takes as argument `index`, None if it takes none."""
        return self._find(_ARGUMENT, index)

    def _find(self, what: int, index: int) -> Desc | None:
        borrowed = bindings.call("primitive_desc_query_md", self.descriptor, what, index)
        if not borrowed or not bindings.query_int(borrowed, _NDIMS):
            return None
        return Desc(bindings.create("memory_desc_clone", borrowed))

    @cached_property
    def scratchpad(self) -> Desc | None:
        """Memory that must be lent to every step, if any."""
        return self._find(_DESCS["scratchpad"], 0)

    @cached_property
    def workspace(self) -> Desc | None:
        """What a forward primitive in training writes for its backward one, if anything."""
        return self._find(_DESCS["workspace"], 0)

    @cached_property
    def handle(self) -> int:
        """The executable object; code is generated when it is first asked for."""
        return _own(self, "primitive", bindings.create("primitive_create", self.descriptor))

    def step(self, arguments: Mapping[int, Memory], stream: Stream | None = None) -> Step:
        """Prepare one execution in `stream`, by default that of the calling thread.

        Raises ShapeError if a memory is missing or has another layout than the primitive reads.
        """
        self._check(arguments)
        if stream is None:
            stream = thread_stream()
        packed = (bindings.Argument * len(arguments))(
            *(bindings.Argument(index, memory.handle) for index, memory in arguments.items())
        )
        call = bindings.fast_execute()
        prepared = (
            c_void_p(self.handle), c_void_p(stream.handle), c_int(len(packed)), byref(packed)
        )  # fmt: skip
        return Step(call, prepared, (self, stream, packed, tuple(arguments.values())))

    def run(self, arguments: Mapping[int, Memory], stream: Stream | None = None) -> None:
        """Execute once, checked; a program prepares steps instead."""
        step = self.step(arguments, stream)
        primitive, queue, count, _ = step.arguments
        bindings.call("primitive_execute", primitive, queue, count, step.keep[2])

    def _check(self, arguments: Mapping[int, Memory]) -> None:
        needed = {Arg.SCRATCHPAD: self.scratchpad, Arg.WORKSPACE: self.workspace}
        for argument, desc in needed.items():
            if desc is not None and argument not in arguments:
                raise ShapeError(f"{self.kind} needs a {argument.name} of {desc.nbytes} bytes")
        for index, memory in arguments.items():
            expected = self.argument(index)
            if expected is not None and expected != memory.desc:
                name = Arg(index).name if index in set(Arg) else f"argument {index}"
                raise ShapeError(
                    f"{self.kind} reads {name} as {expected}, the memory is {memory.desc};"
                    " reorder it first"
                )

    def __repr__(self) -> str:
        return f"<{self.kind}: {self.implementation}>"


def _build(
    kind: str, *arguments: Any, attributes: Attributes | None, allow_reference: bool
) -> Primitive:
    """Create the descriptor of a primitive; Desc, Primitive and sequences of ints are converted."""
    attribute_handle = _AttributeHandle(attributes or Attributes())
    converted = [_converted(a) for a in arguments]
    shown = ", ".join(str(a) for a in arguments if isinstance(a, Desc))
    if kind != "reorder":
        converted.insert(0, engine())
    try:
        name = f"{kind}_primitive_desc_create"
        handle = bindings.create(name, *converted, attribute_handle.handle)
    except OneDNNError as error:
        raise OneDNNError(f"{kind} of {shown}: oneDNN says {error.status}", error.status) from None
    primitive = Primitive(kind, handle)
    if primitive.implementation.startswith("ref") and not allow_reference:
        raise ReferenceImplementation(
            f"{kind} of {shown}: oneDNN has only {primitive.implementation}, which is about a"
            " thousand times slower; choose other layouts or element types, or allow_reference",
            "unimplemented",
        )
    return primitive


def _converted(argument: Any) -> Any:
    match argument:
        case Desc(handle=handle):
            return handle
        case Primitive(descriptor=handle):
            return handle
        case tuple() | list():
            return bindings.int64s(argument)
    return argument


def _refuse_sum(kind: str, attributes: Attributes | None) -> None:
    if attributes is not None and any(isinstance(op, Sum) for op in attributes.post_ops):
        raise UnsupportedError(f"oneDNN 3.2 ignores the post-op sum of {kind}; use binary instead")


def _forward(training: bool) -> int:
    return _TRAINING if training else _INFERENCE


def convolution_forward(
    src: Desc,
    weights: Desc,
    bias: Desc | None,
    dst: Desc,
    *,
    strides: Sequence[int],
    dilates: Sequence[int],
    pad_l: Sequence[int],
    pad_r: Sequence[int],
    training: bool = False,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC, WEIGHTS, BIAS -> DST. Weights are OI[D]HW, or GOI[D]HW with groups."""
    window = (tuple(strides), tuple(dilates), tuple(pad_l), tuple(pad_r))
    return _build(
        "convolution_forward", _forward(training), _CONVOLUTION_DIRECT, src, weights, bias, dst,
        *window, attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def convolution_backward_data(
    diff_src: Desc,
    weights: Desc,
    diff_dst: Desc,
    *,
    strides: Sequence[int],
    dilates: Sequence[int],
    pad_l: Sequence[int],
    pad_r: Sequence[int],
    hint: Primitive | None = None,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """DIFF_DST, WEIGHTS -> DIFF_SRC. The layouts follow `hint`, the forward primitive."""
    window = (tuple(strides), tuple(dilates), tuple(pad_l), tuple(pad_r))
    return _build(
        "convolution_backward_data", _CONVOLUTION_DIRECT, diff_src, weights, diff_dst, *window,
        hint, attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def convolution_backward_weights(
    src: Desc,
    diff_weights: Desc,
    diff_bias: Desc | None,
    diff_dst: Desc,
    *,
    strides: Sequence[int],
    dilates: Sequence[int],
    pad_l: Sequence[int],
    pad_r: Sequence[int],
    hint: Primitive | None = None,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC, DIFF_DST -> DIFF_WEIGHTS, DIFF_BIAS."""
    window = (tuple(strides), tuple(dilates), tuple(pad_l), tuple(pad_r))
    return _build(
        "convolution_backward_weights", _CONVOLUTION_DIRECT, src, diff_weights, diff_bias, diff_dst,
        *window, hint, attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def inner_product_forward(
    src: Desc,
    weights: Desc,
    bias: Desc | None,
    dst: Desc,
    *,
    training: bool = False,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC, WEIGHTS, BIAS -> DST [N, O]; src and weights have the same dims after the first."""
    return _build(
        "inner_product_forward", _forward(training), src, weights, bias, dst,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def inner_product_backward_data(
    diff_src: Desc,
    weights: Desc,
    diff_dst: Desc,
    *,
    hint: Primitive | None = None,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """DIFF_DST, WEIGHTS -> DIFF_SRC."""
    return _build(
        "inner_product_backward_data", diff_src, weights, diff_dst, hint,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def inner_product_backward_weights(
    src: Desc,
    diff_weights: Desc,
    diff_bias: Desc | None,
    diff_dst: Desc,
    *,
    hint: Primitive | None = None,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC, DIFF_DST -> DIFF_WEIGHTS, DIFF_BIAS."""
    return _build(
        "inner_product_backward_weights", src, diff_weights, diff_bias, diff_dst, hint,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def matmul(
    src: Desc,
    weights: Desc,
    bias: Desc | None,
    dst: Desc,
    *,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC [*, M, K], WEIGHTS [*, K, N], BIAS of dst's rank -> DST [*, M, N]."""
    return _build(
        "matmul", src, weights, bias, dst, attributes=attributes, allow_reference=allow_reference
    )


def batch_normalization_forward(
    src: Desc,
    dst: Desc,
    epsilon: float,
    flags: Normalization,
    *,
    training: bool = False,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC, SCALE, SHIFT -> DST and, in training, MEAN and (biased) VARIANCE.

    With USE_GLOBAL_STATS the statistics are read. FUSE_NORM_RELU in training needs the WORKSPACE.
    """
    return _build(
        "batch_normalization_forward", _forward(training), src, dst, epsilon, int(flags),
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def batch_normalization_backward(
    diff_src: Desc,
    diff_dst: Desc,
    src: Desc,
    epsilon: float,
    flags: Normalization,
    *,
    hint: Primitive | None = None,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC, MEAN, VARIANCE, SCALE, DIFF_DST -> DIFF_SRC, DIFF_SCALE, DIFF_SHIFT.

    FUSE_NORM_RELU reads the WORKSPACE of the forward primitive, which is then the `hint`.
    """
    return _build(
        "batch_normalization_backward", _BACKWARD, diff_src, diff_dst, src, epsilon, int(flags),
        hint, attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def lrn_forward(
    src: Desc,
    dst: Desc,
    *,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    training: bool = False,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC -> DST = src (k + alpha/size sum of squares over `size` channels)^-beta."""
    return _build(
        "lrn_forward", _forward(training), _LRN_ACROSS_CHANNELS, src, dst, size, alpha, beta, k,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def lrn_backward(
    diff_src: Desc,
    diff_dst: Desc,
    src: Desc,
    *,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    hint: Primitive | None = None,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC, DIFF_DST, WORKSPACE if there is one -> DIFF_SRC."""
    return _build(
        "lrn_backward", _LRN_ACROSS_CHANNELS, diff_src, diff_dst, src, size, alpha, beta, k, hint,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def pooling_forward(
    algorithm: Pooling,
    src: Desc,
    dst: Desc,
    *,
    strides: Sequence[int],
    kernel: Sequence[int],
    dilates: Sequence[int],
    pad_l: Sequence[int],
    pad_r: Sequence[int],
    training: bool = False,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC -> DST and, for the maximum in training, WORKSPACE (where the maxima are).

    Ties go to the first cell. The post-op `sum` is refused: v3.2 ignores it.
    """
    _refuse_sum("pooling", attributes)
    window = (tuple(strides), tuple(kernel), tuple(dilates), tuple(pad_l), tuple(pad_r))
    return _build(
        "pooling_forward", _forward(training), algorithm, src, dst, *window,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def pooling_backward(
    algorithm: Pooling,
    diff_src: Desc,
    diff_dst: Desc,
    *,
    strides: Sequence[int],
    kernel: Sequence[int],
    dilates: Sequence[int],
    pad_l: Sequence[int],
    pad_r: Sequence[int],
    hint: Primitive | None = None,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """DIFF_DST, WORKSPACE -> DIFF_SRC. The maximum needs the forward primitive as `hint`."""
    window = (tuple(strides), tuple(kernel), tuple(dilates), tuple(pad_l), tuple(pad_r))
    return _build(
        "pooling_backward", algorithm, diff_src, diff_dst, *window, hint,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def eltwise_forward(
    algorithm: Eltwise,
    src: Desc,
    dst: Desc,
    alpha: float = 0.0,
    beta: float = 0.0,
    *,
    training: bool = False,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC -> DST, which may be the same memory. The post-op `sum` is refused: v3.2 ignores it."""
    _refuse_sum("eltwise", attributes)
    return _build(
        "eltwise_forward", _forward(training), algorithm, src, dst, alpha, beta,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def eltwise_backward(
    algorithm: Eltwise,
    diff_src: Desc,
    diff_dst: Desc,
    data: Desc,
    alpha: float = 0.0,
    beta: float = 0.0,
    *,
    hint: Primitive | None = None,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """DIFF_DST and SRC (DST for the algorithms `..._FROM_RESULT`) -> DIFF_SRC."""
    return _build(
        "eltwise_backward", algorithm, diff_src, diff_dst, data, alpha, beta, hint,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def softmax_forward(
    src: Desc,
    dst: Desc,
    axis: int,
    algorithm: Softmax = Softmax.ACCURATE,
    *,
    training: bool = False,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC -> DST along `axis`."""
    return _build(
        "softmax_forward", _forward(training), algorithm, src, dst, axis,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def softmax_backward(
    diff_src: Desc,
    diff_dst: Desc,
    dst: Desc,
    axis: int,
    algorithm: Softmax = Softmax.ACCURATE,
    *,
    hint: Primitive | None = None,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """DST, DIFF_DST -> DIFF_SRC."""
    return _build(
        "softmax_backward", algorithm, diff_src, diff_dst, dst, axis, hint,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def resampling_forward(
    algorithm: Resampling,
    src: Desc,
    dst: Desc,
    *,
    training: bool = False,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC -> DST: cell centres are aligned, x' = (x + 1/2) H / H' - 1/2, clipped to the image."""
    return _build(
        "resampling_forward", _forward(training), algorithm, None, src, dst,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def resampling_backward(
    algorithm: Resampling,
    diff_src: Desc,
    diff_dst: Desc,
    *,
    hint: Primitive | None = None,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """DIFF_DST -> DIFF_SRC."""
    return _build(
        "resampling_backward", algorithm, None, diff_src, diff_dst, hint,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def binary(
    algorithm: Binary,
    src: Desc,
    src_1: Desc,
    dst: Desc,
    *,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC, SRC_1 -> DST; extents of 1 broadcast, ranks are equal. DST may be SRC's memory."""
    return _build(
        "binary", algorithm, src, src_1, dst,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def reduction(
    algorithm: Reduction,
    src: Desc,
    dst: Desc,
    *,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """SRC -> DST of the same rank, 1 along the axes that are reduced."""
    return _build(
        "reduction", algorithm, src, dst, 0.0, 0.0,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def concat(
    sources: Sequence[Desc],
    axis: int,
    dst: Desc,
    *,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """`multiple_source(i)` -> DST, joined along `axis`."""
    joined = bindings.handles([d.handle for d in sources])
    return _build(
        "concat", dst, len(sources), axis, joined,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def sum_of(
    sources: Sequence[Desc],
    scales: Sequence[float],
    dst: Desc,
    *,
    attributes: Attributes | None = None,
    allow_reference: bool = False,
) -> Primitive:
    """`multiple_source(i)` -> DST = sum of scales[i] times source i."""
    if len(scales) != len(sources):
        raise ShapeError(f"{len(sources)} sources need as many scales, got {len(scales)}")
    added = bindings.handles([d.handle for d in sources])
    return _build(
        "sum", dst, len(sources), bindings.floats(scales), added,
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip


def reorder(
    src: Desc, dst: Desc, *, attributes: Attributes | None = None, allow_reference: bool = False
) -> Primitive:
    """SRC -> DST: the same tensor in another layout or element type."""
    return _build(
        "reorder", src, engine(), dst, engine(),
        attributes=attributes, allow_reference=allow_reference,
    )  # fmt: skip
