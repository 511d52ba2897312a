"""How many threads a kernel gets: one where the others would come too late.

To start a team of OpenMP threads and to wait for its last one costs more than a microsecond, and a
time slice where another process has the core. What one thread does in a few microseconds is
therefore left to it. The time is estimated from multiply-accumulates and bytes.

oneDNN reads the number when a primitive is created and again when it runs, so both happen under the
same: a plan begins with a step that sets it, and has one between kernels with different numbers,
and one at the end that sets the number of the executable.
OpenMP keeps the number for each calling thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int
from functools import cache
from typing import Any

from branchgraph.backends.onednn import library
from branchgraph.backends.onednn.chain import Step

#: What one thread does in a nanosecond: multiply-accumulates of layers, bytes of all else.
_MACS, _BYTES = 50.0, 40.0
#: Nanoseconds of one thread from which on others help.
_WORTH = 4000.0


def worth(macs: int, nbytes: int, most: int) -> int:
    """The number of threads for so much work, of at most `most`."""
    return most if macs / _MACS + nbytes / _BYTES > _WORTH else 1


@contextmanager
def using(count: int, after: int) -> Iterator[None]:
    """`count` threads for what is created meanwhile, and `after` for what comes then."""
    library.set_threads(count)
    try:
        yield
    finally:
        library.set_threads(after)


def switch(count: int) -> list[Step]:
    """A step from which on the calling thread has teams of `count`; none without OpenMP."""
    setter = _setter()
    return [] if setter is None else [(setter, (c_int(count),), None)]


@cache
def _setter() -> Any:
    try:
        function = library.load()["omp_set_num_threads"]
    except AttributeError:
        return None
    function.restype = None
    return function
