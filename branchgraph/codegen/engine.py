"""Machine code from LLVM assembly, in this process, on the threads that oneDNN uses too.

A compiled function is `void f(ptr arguments)` over an array of 64-bit numbers and addresses. With
several threads `GOMP_parallel` calls it once on each; which share is whose the function finds out
itself (`Function.share`). Equal texts are compiled once a machine (`objects`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from branchgraph.codegen.objects import Objects
from branchgraph.ir.errors import MissingError

#: Set to 0, this environment variable leaves everything to libraries.
VARIABLE = "BRANCHGRAPH_GENERATED"
_ENTRY = "kernel"
_lock = threading.Lock()


def missing() -> str:
    """Why nothing is compiled here, and what would help; empty if it can be."""
    if os.environ.get(VARIABLE, "") == "0":
        return f"switched off by ${VARIABLE}=0"
    try:
        _compiler()
    except MissingError as error:
        return str(error)
    return ""


def version() -> str:
    """Of llvmlite and LLVM."""
    _compiler()
    import llvmlite
    from llvmlite import binding

    return f"llvmlite {llvmlite.__version__} (LLVM {binding.llvm_version_info[0]})"


@cache
def lanes() -> int:
    """Floats in the widest vector register of this processor."""
    features = _compiler().llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8


@dataclass(frozen=True)
class Routine:
    """A compiled function."""

    address: int

    def call(
        self, arguments: Sequence[int], threads: int
    ) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
        """A prepared call: the function, its arguments, and what must stay alive with them."""
        packed = np.array(arguments, np.int64)
        if threads == 1:
            return _direct(self.address), (packed.ctypes.data,), packed
        return _compiler().parallel, (self.address, packed.ctypes.data, threads, 0), packed


_routines: dict[str, Routine] = {}


def routine(text: str, *, improved: bool = True) -> Routine:
    """Compile a module whose one function is named `kernel` (`Function.text`), once a process.

    Where the text has nothing that LLVM's passes over it would find, `improved` false leaves them
    out, which halves the time that this takes.
    """
    compiler = _compiler()
    key = hashlib.sha256(f"{compiler.identity}\n{improved}\n{text}".encode()).hexdigest()[:32]
    with _lock:
        if key not in _routines:
            name = f"{_ENTRY}_{key}"
            named = re.sub(rf"@{_ENTRY}\b", f"@{name}", text)
            _routines[key] = Routine(compiler.add(name, named, improved))
        return _routines[key]


@cache
def made(write: Callable[..., str], *arguments: Hashable, improved: bool = True) -> Routine:
    """The routine of the text `write(*arguments)`, which is written once a process, too."""
    return routine(write(*arguments), improved=improved)


@cache
def _direct(address: int) -> Callable[..., Any]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


class _Compiler:
    """The execution engine of LLVM, for this processor."""

    def __init__(self, llvm: Any, openmp: ctypes.CDLL) -> None:
        self.llvm = llvm
        self.parallel = openmp.GOMP_parallel
        self.parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self.parallel.restype = None
        for name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
            address = ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value
            llvm.add_symbol(name, address)
        for name in ("expf", "logf"):  # what the intrinsics `exp` and `log` call
            address = ctypes.cast(getattr(ctypes.CDLL("libm.so.6"), name), ctypes.c_void_p).value
            llvm.add_symbol(name, address)
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        #: What code depends on besides its text.
        self.identity = f"{cpu} {features} {llvm.llvm_version_info}"
        self._target = llvm.Target.from_default_triple().create_target_machine(
            cpu=cpu,
            features=features,
            opt=3,
            codemodel="jitdefault",
            jit=True,
        )
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self._target)
        self._objects = Objects.of_user()
        # Loops are unrolled where they are written; to find more to unroll or to fold takes longer
        # than it saves.
        self._options = llvm.create_pipeline_tuning_options(speed_level=1)
        self._options.loop_unrolling = False

    def add(self, name: str, text: str, improved: bool) -> int:
        """The address of the function `name` of a module, whose object code may be known."""
        code = self._objects.get(name)
        if code is None:
            code = self._compiled(text, improved)
            self._objects.put(name, code)
        self._engine.add_object_file(self.llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        return int(self._engine.get_function_address(name))

    def _compiled(self, text: str, improved: bool) -> bytes:
        module = self.llvm.parse_assembly(text)
        module.verify()
        if improved:
            passes = self.llvm.create_pass_builder(self._target, self._options)
            passes.getModulePassManager().run(module, passes)
        return bytes(self._target.emit_object(module))


@cache
def _compiler() -> _Compiler:
    try:
        from llvmlite import binding as llvm
    except ImportError:
        raise MissingError("llvmlite is not installed: pip install llvmlite") from None
    if not hasattr(llvm, "create_pass_builder"):
        raise MissingError("llvmlite is too old: pip install --upgrade 'llvmlite>=0.45'")
    try:
        openmp = ctypes.CDLL("libgomp.so.1")
    except OSError as error:
        raise MissingError(
            f"generated kernels need the OpenMP runtime of GCC ({error}): apt install libgomp1"
        ) from None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if not (features.get("avx2") and features.get("fma")):
        raise MissingError("generated kernels need a processor with AVX2 and FMA")
    return _Compiler(llvm, openmp)
