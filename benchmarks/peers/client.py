"""The other end of `server.py`: a process of one interpreter, and what it is asked."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BENCHMARKS = Path(__file__).resolve().parents[1]


class ServerError(RuntimeError):
    """What a system answered instead of a result, or how its process ended."""


class Client:
    """A server process, limited to `threads` cores and threads; see `environment` for `cache`."""

    def __init__(self, python: str, threads: int, cache: Path) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in `close`)
        cores = sorted(os.sched_getaffinity(0))[:threads]
        try:
            self.process = subprocess.Popen(
                [python, "-m", "peers.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                env=environment(os.environ, threads, cache),
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
        except OSError as error:
            self.errors.close()
            raise ServerError(f"{python}: {error.strerror}") from None

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer; `ServerError` if it is an error or the process is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ServerError(f"the process ended ({self.process.wait()}): {self._last_line()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ServerError(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def _last_line(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        """End the process and wait for it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def environment(base: Mapping[str, str], threads: int, cache: Path | None = None) -> dict[str, str]:
    """The same number of threads for every library; OpenBLAS's workers sleep soon after a call.

    `cache` is where torch.compile keeps what it compiled and branchgraph what it measured.
    """
    folders = ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
    kept = {} if cache is None else dict.fromkeys(folders, str(cache))
    counts = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")
    return {
        **base,
        **kept,
        **dict.fromkeys(counts, str(threads)),
        "OPENBLAS_THREAD_TIMEOUT": "4",
        "PYTHONPATH": str(_BENCHMARKS),
        "PYTHONWARNINGS": "ignore",
    }
