"""The C functions of libdnnl 3 that the backend calls: one table, and one checked way to call them.

Source of the prototypes: oneDNN v3.2, `dnnl.h` and `dnnl_common.h`. Handles are plain integers
(addresses). Every function returns a status except those whose prototype says otherwise; `call`
turns a status other than success into `OneDNNError`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint, c_void_p
from functools import cache
from typing import Any, NamedTuple

from branchgraph.backends.onednn import library
from branchgraph.ir.errors import BranchgraphError

STATUS = (
    "success",
    "out of memory",
    "invalid arguments",
    "unimplemented",
    "last implementation reached",
    "runtime error",
    "not required",
    "invalid graph",
    "invalid graph op",
    "invalid shape",
    "invalid data type",
)


class OneDNNError(BranchgraphError):
    """A function of oneDNN failed; `status` is the name of what it returned."""

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


class Argument(ctypes.Structure):
    """`dnnl_exec_arg_t`: which argument of a primitive, and the memory bound to it."""

    _fields_ = (("index", c_int), ("memory", c_void_p))


class Prototype(NamedTuple):
    """Argument types, and the result's type where it is not a status."""

    arguments: tuple[Any, ...]
    result: Any = None


_DIM = c_int64
_DIMS = POINTER(c_int64)
_HANDLE = c_void_p
_HANDLES = POINTER(c_void_p)
_OUT = POINTER(c_void_p)
_FLOATS = POINTER(c_float)


def _function(*arguments: Any, returns: Any = None) -> Prototype:
    return Prototype(arguments, returns)


def _primitive(*arguments: Any) -> Prototype:
    """Creation of a primitive descriptor: (out, engine, ..., attributes)."""
    return Prototype((_OUT, _HANDLE, *arguments, _HANDLE))


_TWO, _THREE, _FOUR = (_HANDLE,) * 2, (_HANDLE,) * 3, (_HANDLE,) * 4
_WINDOW = (_DIMS,) * 4
_HINT = _HANDLE

#: Name without the prefix `dnnl_`, and prototype.
FUNCTIONS: dict[str, Prototype] = {
    "engine_create": _function(_OUT, c_int, c_size_t),
    "stream_create": _function(_OUT, _HANDLE, c_uint),
    "stream_wait": _function(_HANDLE),
    "stream_destroy": _function(_HANDLE),
    "memory_desc_create_with_strides": _function(_OUT, c_int, _DIMS, c_int, _DIMS),
    "memory_desc_create_with_tag": _function(_OUT, c_int, _DIMS, c_int, c_int),
    "memory_desc_clone": _function(_OUT, _HANDLE),
    "memory_desc_destroy": _function(_HANDLE),
    "memory_desc_query": _function(_HANDLE, c_int, _HANDLE),
    "memory_desc_equal": _function(_HANDLE, _HANDLE, returns=c_int),
    "memory_desc_get_size": _function(_HANDLE, returns=c_size_t),
    "memory_create": _function(_OUT, _HANDLE, _HANDLE, c_void_p),
    "memory_destroy": _function(_HANDLE),
    "memory_set_data_handle": _function(_HANDLE, c_void_p),
    "post_ops_create": _function(_OUT),
    "post_ops_destroy": _function(_HANDLE),
    "post_ops_append_sum": _function(_HANDLE, c_float, c_int32, c_int),
    "post_ops_append_eltwise": _function(_HANDLE, c_int, c_float, c_float),
    "post_ops_append_binary": _function(_HANDLE, c_int, _HANDLE),
    "primitive_attr_create": _function(_OUT),
    "primitive_attr_destroy": _function(_HANDLE),
    "primitive_attr_set_fpmath_mode": _function(_HANDLE, c_int),
    "primitive_attr_set_scratchpad_mode": _function(_HANDLE, c_int),
    "primitive_attr_set_post_ops": _function(_HANDLE, _HANDLE),
    "primitive_desc_query": _function(_HANDLE, c_int, c_int, _HANDLE),
    "primitive_desc_query_md": _function(_HANDLE, c_int, c_int, returns=c_void_p),
    "primitive_desc_destroy": _function(_HANDLE),
    "primitive_create": _function(_OUT, _HANDLE),
    "primitive_destroy": _function(_HANDLE),
    "primitive_execute": _function(_HANDLE, _HANDLE, c_int, POINTER(Argument)),
    "convolution_forward_primitive_desc_create": _primitive(c_int, c_int, *_FOUR, *_WINDOW),
    "convolution_backward_data_primitive_desc_create": _primitive(c_int, *_THREE, *_WINDOW, _HINT),
    "convolution_backward_weights_primitive_desc_create": _primitive(
        c_int, *_FOUR, *_WINDOW, _HINT
    ),
    "inner_product_forward_primitive_desc_create": _primitive(c_int, *_FOUR),
    "inner_product_backward_data_primitive_desc_create": _primitive(*_THREE, _HINT),
    "inner_product_backward_weights_primitive_desc_create": _primitive(*_FOUR, _HINT),
    "matmul_primitive_desc_create": _primitive(*_FOUR),
    "batch_normalization_forward_primitive_desc_create": _primitive(c_int, *_TWO, c_float, c_uint),
    "batch_normalization_backward_primitive_desc_create": _primitive(
        c_int, *_THREE, c_float, c_uint, _HINT
    ),
    "lrn_forward_primitive_desc_create": _primitive(
        c_int, c_int, *_TWO, _DIM, c_float, c_float, c_float
    ),
    "lrn_backward_primitive_desc_create": _primitive(
        c_int, *_THREE, _DIM, c_float, c_float, c_float, _HINT
    ),
    "pooling_forward_primitive_desc_create": _primitive(c_int, c_int, *_TWO, *_WINDOW, _DIMS),
    "pooling_backward_primitive_desc_create": _primitive(c_int, *_TWO, *_WINDOW, _DIMS, _HINT),
    "eltwise_forward_primitive_desc_create": _primitive(c_int, c_int, *_TWO, c_float, c_float),
    "eltwise_backward_primitive_desc_create": _primitive(c_int, *_THREE, c_float, c_float, _HINT),
    "softmax_forward_primitive_desc_create": _primitive(c_int, c_int, *_TWO, c_int),
    "softmax_backward_primitive_desc_create": _primitive(c_int, *_THREE, c_int, _HINT),
    "resampling_forward_primitive_desc_create": _primitive(c_int, c_int, _FLOATS, *_TWO),
    "resampling_backward_primitive_desc_create": _primitive(c_int, _FLOATS, *_TWO, _HINT),
    "binary_primitive_desc_create": _primitive(c_int, *_THREE),
    "reduction_primitive_desc_create": _primitive(c_int, *_TWO, c_float, c_float),
    "concat_primitive_desc_create": _primitive(_HANDLE, c_int, c_int, _HANDLES),
    "sum_primitive_desc_create": _primitive(_HANDLE, c_int, _FLOATS, _HANDLES),
    "reorder_primitive_desc_create": _primitive(*_THREE),
}


@cache
def _resolved(name: str) -> Any:
    arguments, result = FUNCTIONS[name]
    function = library.load()[f"dnnl_{name}"]  # by item: a function object of our own
    function.argtypes = arguments
    function.restype = result or c_int
    return function


def call(name: str, *arguments: Any) -> Any:
    """Call `dnnl_<name>`: its value, or None after a checked status.

    Raises OneDNNError naming the function and the status, ForkedError in a forked child.
    """
    library.require_same_process()
    result = _resolved(name)(*arguments)
    if FUNCTIONS[name].result is not None:
        return result
    if result != 0:
        status = STATUS[result] if result < len(STATUS) else f"status {result}"
        raise OneDNNError(f"dnnl_{name}: {status}", status)
    return None


def create(name: str, *arguments: Any) -> int:
    """Call a function whose first argument takes the handle it creates; the handle."""
    handle = c_void_p()
    call(name, ctypes.byref(handle), *arguments)
    assert handle.value is not None
    return handle.value


def destroyer(name: str) -> Any:
    """`dnnl_<name>_destroy` for finalisers: unchecked, since nothing could be done about it."""
    return _resolved(f"{name}_destroy")


@cache
def fast_execute() -> Any:
    """`dnnl_primitive_execute` without checks and conversions, for the loop over a program.

    Its arguments must be prepared ctypes objects: (c_void_p, c_void_p, c_int, c_void_p).
    """
    function = library.load()["dnnl_primitive_execute"]
    function.restype = c_int
    return function


def int64s(values: Sequence[int]) -> Any:
    """`dnnl_dims_t`, as far as it is used."""
    return (c_int64 * len(values))(*values)


def floats(values: Sequence[float]) -> Any:
    """An array of C floats."""
    return (c_float * len(values))(*values)


def handles(values: Sequence[int]) -> Any:
    """An array of handles."""
    return (c_void_p * len(values))(*values)


def query_dims(desc: int, what: int, count: int) -> tuple[int, ...]:
    """One of the lists of int64 that a memory descriptor holds."""
    pointer = POINTER(c_int64)()
    call("memory_desc_query", desc, what, ctypes.byref(pointer))
    return tuple(pointer[:count])


def query_int(desc: int, what: int) -> int:
    """One of the 32-bit integers (and enumerators) that a memory descriptor holds."""
    value = c_int()
    call("memory_desc_query", desc, what, ctypes.byref(value))
    return value.value


def query_text(primitive_desc: int, what: int) -> str:
    """One of the strings that a primitive descriptor holds."""
    text = c_char_p()
    call("primitive_desc_query", primitive_desc, what, 0, ctypes.byref(text))
    return (text.value or b"").decode()
