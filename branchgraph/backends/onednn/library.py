"""The shared library of oneDNN (libdnnl, version 3): where it is, and what runs beside it.

It is looked for in `$BRANCHGRAPH_LIBDNNL`, then among the files of the package `onednn-cpu-gomp`,
then in the `lib` folders of the environment. Nothing is loaded or set at import.

Threads. libdnnl brings an OpenMP runtime along, and reads its thread count when a primitive is
created; `set_threads` belongs before that. OpenMP keeps the count per calling thread.

Fork. The pool of OpenMP threads does not survive a fork, and a child that uses it waits for ever.
A child of a process that has loaded the library is therefore refused (`ForkedError`).
"""

from __future__ import annotations

import ctypes
import os
import site
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from branchgraph.ir.errors import BranchgraphError, MissingError

VARIABLE = "BRANCHGRAPH_LIBDNNL"
PACKAGE = "onednn-cpu-gomp"
_NAME = "libdnnl.so.3"
_MAJOR = 3

#: `dnnl_cpu_runtime` of builds whose primitives run in the calling process as soon as called.
_DIRECT_RUNTIMES = {1: "sequential", 2: "OpenMP", 4: "TBB"}
_OTHER_RUNTIMES = {0: "none", 8: "threadpool", 512: "SYCL"}


class ForkedError(BranchgraphError, RuntimeError):
    """oneDNN was called in a child forked from a process that had loaded it."""


class _Version(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
        ("patch", ctypes.c_int),
        ("hash", ctypes.c_char_p),
        ("cpu_runtime", ctypes.c_uint),
        ("gpu_runtime", ctypes.c_uint),
    )


# -- loading -----------------------------------------------------------------------------------


def load() -> ctypes.CDLL:
    """The library, loaded once in a process.

    Raises MissingError if there is none that fits, ForkedError in a forked child.
    """
    require_same_process()
    return _load()


@cache
def _load() -> ctypes.CDLL:
    named = os.environ.get(VARIABLE)
    if named:
        return _checked(_open(Path(named), f"${VARIABLE}"), named)
    for path in _installed():
        if path.is_file():
            return _checked(_open(path, f"package {PACKAGE}"), str(path))
    raise MissingError(f"oneDNN (libdnnl {_MAJOR}) is not installed: {_remedy()}")


def _remedy() -> str:
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        return f"pip install {PACKAGE}"
    return f"no package has it for this platform; build it and name the library in ${VARIABLE}"


def _installed() -> Iterator[Path]:
    """Where the package may have put the library, the likeliest place first."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    yield from (Path(str(f.locate())) for f in files if f.name == _NAME)
    for prefix in (sys.prefix, site.getuserbase()):
        yield Path(prefix, "lib", _NAME)


def _open(path: Path, source: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        reason = str(error)
    if "libgomp" in reason:
        raise MissingError(
            f"oneDNN needs the OpenMP runtime of GCC ({reason}): apt install libgomp1"
        )
    remedy = f"name a libdnnl of version {_MAJOR} in ${VARIABLE}, or unset it and {_remedy()}"
    raise MissingError(f"{source} is {path}, which does not load ({reason}): {remedy}")


def _checked(library: ctypes.CDLL, path: str) -> ctypes.CDLL:
    try:
        function = library.dnnl_version
    except AttributeError:
        raise MissingError(f"{path} is no oneDNN: it has no dnnl_version") from None
    function.restype = ctypes.POINTER(_Version)
    found = function().contents
    version = f"{found.major}.{found.minor}.{found.patch}"
    if found.major != _MAJOR:
        raise MissingError(f"oneDNN {_MAJOR} is needed, {path} is {version}: {_remedy()}")
    if found.cpu_runtime not in _DIRECT_RUNTIMES:
        runtime = _OTHER_RUNTIMES.get(found.cpu_runtime, str(found.cpu_runtime))
        expected = ", ".join(_DIRECT_RUNTIMES.values())
        raise MissingError(
            f"{path} has the CPU runtime {runtime}, expected {expected}: {_remedy()}"
        )
    _remember_process()
    return library


def available() -> bool:
    """Whether `load` finds a library."""
    try:
        load()
    except MissingError:
        return False
    return True


def version() -> tuple[int, int, int]:
    """(major, minor, patch) of the loaded library."""
    found = load().dnnl_version().contents
    return (found.major, found.minor, found.patch)


# -- fork --------------------------------------------------------------------------------------

_forked = False


def _remember_process() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_mark_forked)


def _mark_forked() -> None:
    global _forked
    _forked = True


def require_same_process() -> None:
    """Raise ForkedError in a forked child; costs a look at a flag."""
    if _forked:
        raise ForkedError(
            "oneDNN was loaded before this process was forked, and the child lacks its threads:"
            ' start workers with multiprocessing.get_context("spawn"), or fork before the first'
            " use of the onednn backend"
        )


# -- threads -----------------------------------------------------------------------------------


def set_threads(count: int | None = None) -> int:
    """Let primitives that this thread creates from now on use `count` threads; returns the count.

    None stands for `$OMP_NUM_THREADS`, else one thread for each physical core that this process may
    use.
    """
    if count is None:
        count = default_threads()
    if count < 1:
        raise MissingError(f"oneDNN needs at least one thread, got {count}")
    setter = _openmp("omp_set_num_threads")
    if setter is not None:
        setter(ctypes.c_int(count))
    return threads()


def threads() -> int:
    """How many threads a primitive created now by this thread would use."""
    getter = _openmp("omp_get_max_threads")
    return int(getter()) if getter is not None else 1


def default_threads() -> int:
    """The thread count of `set_threads(None)`."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    """The logical CPUs of the core of `cpu`, as Linux lists them; `cpu` where it does not say."""
    try:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def _openmp(name: str) -> ctypes._NamedFuncPointer | None:
    """A function of the OpenMP runtime that libdnnl is linked with; None without OpenMP.

    A look-up in a library also searches what it is linked with, so the runtime needs no name.
    """
    return getattr(load(), name, None)


# -- OpenBLAS ----------------------------------------------------------------------------------

_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)


def quiet_openblas() -> int:
    """Give every OpenBLAS loaded in this process one thread; returns the largest earlier count.

    After a matrix product of NumPy the workers of OpenBLAS wait for the next one in a loop, on the
    cores that the threads of oneDNN need: a convolution after it was measured 4 to 12 times slower.
    With one thread OpenBLAS has no workers. The count is 0 where no OpenBLAS is loaded.
    """
    return max((_set_blas_threads(path, 1) for path in _loaded_openblas()), default=0)


def set_openblas_threads(count: int) -> None:
    """Give every OpenBLAS loaded in this process `count` threads, to undo `quiet_openblas`."""
    for path in _loaded_openblas():
        _set_blas_threads(path, count)


def _loaded_openblas() -> list[str]:
    """Files of the OpenBLAS builds that are mapped into this process (NumPy's, SciPy's)."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {
                fields[5].rstrip("\n") for line in maps if len(fields := line.split(None, 5)) == 6
            }
    except OSError:
        return []
    return sorted(p for p in paths if "openblas" in Path(p).name)


def _set_blas_threads(path: str, count: int) -> int:
    """Set the thread count of one OpenBLAS; its earlier count, 0 if it has no such function."""
    blas = ctypes.CDLL(path)
    for name in _SETTERS:
        setter = getattr(blas, name, None)
        getter = getattr(blas, name.replace("_set_", "_get_"), None)
        if setter is not None and getter is not None:
            earlier = int(getter())
            setter(ctypes.c_int(count))
            return earlier
    return 0
