"""Consecutive calls of native code as one: what Python takes for a call is then paid once.

A small compiled function walks a table of addresses and arguments:

    for function, a, b, c, d, checked in table:
        status = function(a, b, c, d)
        if status & checked: return status

Functions with fewer arguments do not look at the others' registers (System V calling convention);
`checked` is 0 for those without a status, and all ones for those of oneDNN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from branchgraph.codegen import engine

#: A call, its arguments, and what must stay alive; a non-zero int as its result is an error.
Step = tuple[Callable[..., Any], tuple[Any, ...], Any]

#: 64-bit numbers of an entry, and the most arguments that it has room for.
_WIDTH, _ARGUMENTS = 6, 4
_CHECKED = -1
_ADDRESS = ctypes.c_void_p
#: The type of functions that ctypes calls without a trip into Python.
_NATIVE = ctypes.CFUNCTYPE(None).__mro__[1]

_WALK = f"""
define i32 @kernel(ptr %entry, i64 %count) {{
start:
  br label %head
head:
  %i = phi i64 [0, %start], [%next, %body]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %body, label %well
body:
  %first = mul nsw i64 %i, {_WIDTH}
  %f = getelementptr i64, ptr %entry, i64 %first
  %pa = getelementptr i64, ptr %f, i64 1
  %pb = getelementptr i64, ptr %f, i64 2
  %pc = getelementptr i64, ptr %f, i64 3
  %pd = getelementptr i64, ptr %f, i64 4
  %pchecked = getelementptr i64, ptr %f, i64 5
  %function = load ptr, ptr %f
  %a = load i64, ptr %pa
  %b = load i64, ptr %pb
  %c = load i64, ptr %pc
  %d = load i64, ptr %pd
  %status = call i32 %function(i64 %a, i64 %b, i64 %c, i64 %d)
  %checked = load i32, ptr %pchecked
  %failure = and i32 %status, %checked
  %next = add nsw i64 %i, 1
  %fine = icmp eq i32 %failure, 0
  br i1 %fine, label %head, label %badly
well:
  ret i32 0
badly:
  ret i32 %failure
}}
"""


def chained(steps: Sequence[Step]) -> list[Step]:
    """`steps` with runs of native calls joined; as they are where nothing can be compiled."""
    if engine.missing():
        return list(steps)
    return list(_joined(steps))


def native(step: Step) -> bool:
    """Whether a step runs no Python, and its arguments are numbers and addresses."""
    call, arguments, _ = step
    whole = (int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    return (
        isinstance(call, _NATIVE)
        and len(arguments) <= _ARGUMENTS
        and all(isinstance(a, whole) or hasattr(a, "_obj") for a in arguments)
    )


def _joined(steps: Sequence[Step]) -> Iterator[Step]:
    for together, group in groupby(steps, native):
        run = list(group)
        if together and len(run) > 1:
            yield _chain(run)
        else:
            yield from run


def _chain(steps: Sequence[Step]) -> Step:
    table = np.array([list(_entry(call, arguments)) for call, arguments, _ in steps], np.int64)
    walk = ctypes.CFUNCTYPE(ctypes.c_int, _ADDRESS, ctypes.c_int64)(engine.routine(_WALK).address)
    arguments = (_ADDRESS(table.ctypes.data), ctypes.c_int64(len(steps)))
    return walk, arguments, (table, tuple(steps))


def _entry(call: Any, arguments: Iterable[Any]) -> Iterator[int]:
    yield ctypes.cast(call, _ADDRESS).value or 0
    numbers = [_number(a) for a in arguments]
    yield from numbers
    yield from [0] * (_ARGUMENTS - len(numbers))
    yield _CHECKED if call.restype is ctypes.c_int else 0


def _number(argument: Any) -> int:
    """What a prepared argument puts into its register."""
    if isinstance(argument, int):
        return argument
    if hasattr(argument, "_obj"):  # byref
        return ctypes.addressof(argument._obj)
    return argument.value or 0
