"""Finding libdnnl, its threads, and what is refused; each with a process to itself where needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from branchgraph.backends.onednn import bindings, library
from branchgraph.backends.onednn.bindings import OneDNNError
from branchgraph.ir.errors import MissingError
from tests.backends.libdnnl import require_libdnnl

require_libdnnl()

LOAD = "from branchgraph.backends.onednn import library; library.load()"


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter; a hang is a failure."""
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def last_line(code: str, **variables: str) -> str:
    """The message with which the code fails."""
    process = run(code, **variables)
    assert process.returncode != 0, process.stdout
    return process.stderr.strip().splitlines()[-1]


def test_the_library_is_version_3() -> None:
    assert library.version()[0] == 3
    assert library.available()


def test_a_named_library_that_does_not_load(tmp_path: Path) -> None:
    bad = tmp_path / "libdnnl.so.3"
    bad.write_text("not a library")
    message = last_line(LOAD, BRANCHGRAPH_LIBDNNL=str(bad))
    assert message.startswith("branchgraph.ir.errors.MissingError: $BRANCHGRAPH_LIBDNNL is ")
    assert f"{bad}, which does not load" in message


def test_a_named_library_that_is_something_else() -> None:
    message = last_line(LOAD, BRANCHGRAPH_LIBDNNL="libm.so.6")
    assert "libm.so.6 is no oneDNN: it has no dnnl_version" in message


def test_the_named_library_is_the_one_that_is_loaded() -> None:
    path = next(p for p in library._installed() if p.is_file())
    assert run(LOAD, BRANCHGRAPH_LIBDNNL=str(path)).returncode == 0


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, "_installed", lambda: iter([Path("nowhere", "libdnnl.so.3")]))
    with pytest.raises(MissingError, match="is not installed: pip install onednn-cpu-gomp"):
        library._load.__wrapped__()


def test_a_missing_openmp_runtime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(library.ctypes, "CDLL", fail)
    with pytest.raises(MissingError, match="apt install libgomp1"):
        library._open(Path("libdnnl.so.3"), "package")


def test_another_major_version_is_refused() -> None:
    class Old:
        @staticmethod
        def dnnl_version() -> object:
            return library.ctypes.pointer(library._Version(2, 6, 3, b"", 2, 0))

    with pytest.raises(MissingError, match=r"oneDNN 3 is needed, old\.so is 2\.6\.3"):
        library._checked(Old, "old.so")  # type: ignore[arg-type]


def test_builds_with_queues_are_refused() -> None:
    class Queued:
        @staticmethod
        def dnnl_version() -> object:
            return library.ctypes.pointer(library._Version(3, 13, 2, b"", 512, 0))

    with pytest.raises(MissingError, match="has the CPU runtime SYCL, expected sequential, OpenMP"):
        library._checked(Queued, "sycl.so")  # type: ignore[arg-type]


def test_nothing_happens_at_import() -> None:
    code = """
import branchgraph.backends.onednn.primitives
assert "libdnnl" not in open("/proc/self/maps").read()
"""
    process = run(code)
    assert process.returncode == 0, process.stderr


# -- threads -----------------------------------------------------------------------------------


def test_threads_are_set() -> None:
    before = library.threads()
    try:
        assert library.set_threads(3) == library.threads() == 3
        with pytest.raises(MissingError, match="at least one thread, got 0"):
            library.set_threads(0)
    finally:
        library.set_threads(before)


def test_the_default_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert library.default_threads() == 5
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= library.default_threads() <= (os.cpu_count() or 1)


def test_the_default_counts_cores_and_not_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5}, raising=False)
    monkeypatch.setattr(library, "_siblings", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
    assert library.default_threads() == 2


# -- fork --------------------------------------------------------------------------------------

FORK = """
import os, sys
from branchgraph.backends.onednn import library
from branchgraph.backends.onednn.primitives import Desc
if {early}:
    Desc.strided((2,), "f32")
child = os.fork()
if child == 0:
    try:
        Desc.strided((2,), "f32")
    except library.ForkedError as error:
        assert isinstance(error, RuntimeError)
        assert 'get_context("spawn")' in str(error)
        os._exit(7)
    os._exit(0)
Desc.strided((2,), "f32")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("early", [True, False])
def test_a_child_is_refused_only_what_its_parent_had_loaded(early: bool) -> None:
    process = run(FORK.format(early=early))
    assert process.returncode == (7 if early else 0), process.stderr


# -- OpenBLAS ----------------------------------------------------------------------------------


def test_openblas_is_quietened() -> None:
    code = """
import numpy
from branchgraph.backends.onednn import library
if library._loaded_openblas():
    library.set_openblas_threads(2)
    assert library.quiet_openblas() == 2
    assert library.quiet_openblas() == 1
else:
    assert library.quiet_openblas() == 0
"""
    process = run(code, OPENBLAS_NUM_THREADS="2")
    assert process.returncode == 0, process.stderr


# -- calls -------------------------------------------------------------------------------------


def test_every_function_of_the_table_exists() -> None:
    loaded = library.load()
    missing = [name for name in bindings.FUNCTIONS if not hasattr(loaded, f"dnnl_{name}")]
    assert not missing


def test_a_failed_call_names_function_and_status() -> None:
    with pytest.raises(OneDNNError, match="dnnl_stream_wait: invalid arguments") as error:
        bindings.call("stream_wait", None)
    assert error.value.status == "invalid arguments"
