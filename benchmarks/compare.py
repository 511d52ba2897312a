"""branchgraph beside its peers: the same network with the same weights, checked, then timed.

    python benchmarks/compare.py --net lenet,resnet:depth=20 --mode infer --batch 1,64
    python benchmarks/compare.py --net cross:depth=110 --mode train --batch 64 --json cross.json
    python benchmarks/compare.py --net pd_a_resnet18,pd_a_resnet18@specialise@fuse_branches
    python benchmarks/compare.py --net lenet --batch 1,64 --runs 5 --once torch.compile,jax
    python benchmarks/compare.py --mode exits --weights b_lenet.bg --batch 1,256

Run it with the interpreter of the environment that `make_peers.py` makes; Chainer and MXNet need an
older one (`--legacy-python`, or $BRANCHGRAPH_LEGACY_PYTHON). Passes behind `@` are applied by
branchgraph alone; peers run the network as it was declared.

A graph becomes each peer's own source (`peers/walker.py`). PyTorch, torch.compile, ONNX Runtime,
OpenVINO, JAX and branchgraph live in one process, Chainer and MXNet in one each. Before timing,
all are compared with branchgraph's interpreter in float64 (with the first peer, where that would
take too long): tolerances in `peers/agreement.py`. A system that fails or disagrees leaves its
error in its row and counts as missing. Then rounds are interleaved: in each, every system runs a
burst after an untimed step and a pause in which the threads of the one before fall asleep. Printed
are medians and minima over all steps, the ratio to PyTorch eager, the multiple of the time that the
MACs take at the rate of a large matrix product in the same process, peak resident memory beyond the
imports (each system by itself in a process), the difference from the reference, and the seconds
from the declared network to the end of the first step.

What is timed: inference takes NumPy arrays in branchgraph, ONNX Runtime, OpenVINO and Chainer, and
tensors made once in PyTorch, JAX and MXNet; branchgraph's outputs are fresh arrays. A training step
is forward, joint loss, backward and momentum SGD (0.9) on every parameter; branchgraph's also
gives each exit's accuracy. The batch stays the same. Running statistics move in all, but are not
compared, since libraries differ in which variance they take. Networks that draw random numbers in
training (dropout, stochastic gates) are compared in inference only. All systems have `--threads`
threads and are kept on as many cores, which needs Linux, as counting memory does. In every run the
caches on disk of torch.compile and of branchgraph's tuning start empty; memory is counted with them
filled. `--mode exits` is told in `compare_exits.py`. Measure on a quiet machine: threads that wait
for each other lose whole time slices to other work.

`--runs N` repeats the whole measurement of a cell in fresh processes; how runs are summed up is
told in `peers/report.py`. Agreement and memory are those of the first run. Systems named by
`--once`, for which compiling takes long, are in the first run only; so is one that failed in it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import agreement
from peers.client import Client, ServerError, environment
from peers.declared import Cell, make_cell, network_of
from peers.express import express
from peers.report import Row, Run, Summary, merge, table, write_json

OURS = "branchgraph"
#: Peers that share a process with branchgraph, and those that need an interpreter of their own.
PEERS = ("torch", "torch.compile", "onnxruntime", "openvino", "jax")
LEGACY = ("chainer", "mxnet")
#: Peers that only infer.
INFERENCE_ONLY = ("onnxruntime", "openvino")
REFERENCE = "reference"
#: So small that the second step is taken where the first one was: in deep networks with batch norm
#: a larger step makes rounding errors of the first gradient (1 % in DFN-MR-56) grow to a third. At
#: 1e-4 every system is a fifth or more from float64 in ResNet-110 at batch 8, at 1e-5 a twelfth.
LEARNING_RATE, MOMENTUM = 1e-5, 0.9
#: Steps of training that are compared: the second one shows the momentum.
STEPS = 2
PAUSE = 0.03


@dataclass(frozen=True)
class Options:
    """How cells are measured."""

    systems: tuple[str, ...]
    backend: str
    threads: int
    #: None: as many as suit the MACs of the cell.
    rounds: int | None
    burst: float
    memory: bool
    check: bool
    reference_macs: float
    legacy_python: str | None

    def python(self, system: str) -> str:
        """The interpreter of a system."""
        if system not in LEGACY:
            return sys.executable
        if self.legacy_python is None:
            raise ServerError(f"{system} needs --legacy-python or $BRANCHGRAPH_LEGACY_PYTHON")
        return self.legacy_python


class Measurement:
    """One cell: its bundle, the processes, and a row for each system."""

    def __init__(self, cell: Cell, options: Options, folder: Path) -> None:
        self.cell, self.options, self.folder = cell, options, folder
        self.rows = {s: Row(cell.spec, cell.mode, cell.batch, s) for s in options.systems}
        self.clients: dict[str, Client] = {}
        self.losses: dict[str, list[float]] = {}
        self.gflops: float | None = None

    @property
    def working(self) -> list[str]:
        """Systems without an error so far."""
        return [s for s, row in self.rows.items() if not row.error]

    def run(self) -> Run:
        """Express, load, check, time, weigh."""
        express(self.cell, self.folder, self._meta())
        try:
            for system in self.working:
                self._guarded(system, self._load)
            if self.options.check:
                self._check()
            self._time()
        finally:
            for client in set(self.clients.values()):
                client.close()
        if self.options.memory:
            for system in self.working:
                self._guarded(system, self._weigh)
        return Run(list(self.rows.values()), self.gflops)

    def _meta(self) -> dict[str, Any]:
        net, passes = network_of(self.cell.spec)
        return {
            "net": net, "passes": passes, "mode": self.cell.mode, "batch": self.cell.batch,
            "threads": self.options.threads, "backend": self.options.backend,
            "learning_rate": LEARNING_RATE, "momentum": MOMENTUM,
        }  # fmt: skip

    def _guarded(self, system: str, action: Any) -> None:
        """An error of a system is its own."""
        try:
            action(system)
        except ServerError as error:
            self.rows[system].error = str(error)

    # -- loading and checking --------------------------------------------------------------------

    def _client(self, system: str) -> Client:
        """The process of a system; a new one where the last ended."""
        key = system if system in LEGACY else "shared"
        client = self.clients.get(key)
        if client is None or not client.alive:
            client = self._process(system)
            self.clients[key] = client
            lost = [s for s in self.working if s in self.losses and s not in LEGACY]
            for other in lost if key == "shared" else ():
                self._guarded(other, self._load)
        return client

    def _process(self, system: str) -> Client:
        """A new process; what is cached on disk is this run's, so compilers start cold."""
        return Client(self.options.python(system), self.options.threads, self.folder / "cache")

    def _load(self, system: str) -> None:
        if self.cell.mode == "train" and system in INFERENCE_ONLY:
            raise ServerError(f"{system} does not train")
        client = self._client(system)
        client.ask("import", system=system, meta=self._meta())
        ready = client.ask("load", system=system, bundle=str(self.folder))["seconds"]
        self.rows[system].compile_s = ready
        if not self.options.check:
            return
        file = str(self.folder / f"{system}.npz")
        self.losses[system] = client.ask("check", system=system, steps=STEPS, file=file)["losses"]

    def _check(self) -> None:
        """Compare everybody with the reference; who disagrees has an error."""
        if self.cell.draws or not self.working:
            return
        try:
            reference = self._reference()
        except ServerError as error:
            for system in self.working:
                self.rows[system].error = f"there is no reference: {error}"
            return
        for system in self.working:
            row = self.rows[system]
            row.difference, tolerance = self._difference(system, reference)
            if not row.difference <= tolerance:
                row.error = f"differs from {reference} by {row.difference:.1e} > {tolerance:.0e}"

    def _reference(self) -> str:
        """The interpreter where it is quick enough, else the first system that works."""
        if self.cell.macs > self.options.reference_macs:
            return next(s for s in (*self.working[1:], *self.working))
        client = self._process(REFERENCE)
        try:
            client.ask("import", system=REFERENCE, meta=self._meta())
            client.ask("load", system=REFERENCE, bundle=str(self.folder))
            file = str(self.folder / f"{REFERENCE}.npz")
            asked = client.ask("check", system=REFERENCE, steps=STEPS, file=file)
            self.losses[REFERENCE] = asked["losses"]
        finally:
            client.close()
        return REFERENCE

    def _difference(self, system: str, reference: str) -> tuple[float, float]:
        """How far a system is from the reference, and what is tolerated."""
        ours, theirs = (_arrays(self.folder / f"{s}.npz") for s in (system, reference))
        if self.cell.mode == "infer":
            return agreement.outputs_difference(ours, theirs), agreement.OUTPUTS
        losses = agreement.losses_difference(self.losses[system], self.losses[reference])
        if losses > agreement.LOSSES:
            return losses, agreement.LOSSES
        trained = [i for i, s in enumerate(self.cell.params) if s.role.trainable]
        start = [self.cell.store[s] for s in self.cell.params]
        chosen = ([arrays[i] for i in trained] for arrays in (start, ours, theirs))
        return agreement.steps_difference(*chosen), agreement.STEPS

    # -- timing ----------------------------------------------------------------------------------

    def _time(self) -> None:
        counts = {}
        for system in self.working:
            self._guarded(system, lambda s: counts.update({s: self._count(s)}))
        for k in range(self.options.rounds or rounds_for(self.cell.macs)):
            order = self.working
            first = k % max(len(order), 1)
            for system in order[first:] + order[:first]:
                self._guarded(system, lambda s: self._burst(s, *counts[s]))
            self._gemm()

    def _count(self, system: str) -> tuple[int, int]:
        """Steps of a burst, timed and untimed."""
        client = self._client(system)
        quickest = min(client.ask("burst", system=system, count=1, warm=0)["times"])
        if quickest < self.options.burst:
            quickest = min(client.ask("burst", system=system, count=2, warm=0)["times"])
        timed = max(1, min(500, int(self.options.burst / quickest)))
        return timed, 1 if quickest < self.options.burst else 0

    def _burst(self, system: str, count: int, warm: int) -> None:
        time.sleep(PAUSE)
        answer = self._client(system).ask("burst", system=system, count=count, warm=warm)
        self.rows[system].times.extend(answer["times"])

    def _gemm(self) -> None:
        """The best rate of a matrix product so far, in the shared process."""
        client = self.clients.get("shared")
        if client is not None and client.alive:
            time.sleep(PAUSE)
            with contextlib.suppress(ServerError):
                found = client.ask("gemm", size=2048, seconds=0.2)["gflops"]
                self.gflops = max(found, self.gflops or 0.0)

    def _weigh(self, system: str) -> None:
        """Peak memory beyond the imports, in a process of its own."""
        client = self._process(system)
        try:
            client.ask("import", system=system, meta=self._meta())
            client.ask("mark")
            client.ask("load", system=system, bundle=str(self.folder))
            client.ask("burst", system=system, count=2, warm=0)
            self.rows[system].peak_mb = client.ask("peak")["peak_mb"]
        finally:
            client.close()


def _arrays(path: Path) -> list[np.ndarray]:
    with np.load(path) as arrays:
        return [arrays[f"a{i}"] for i in range(len(arrays.files))]


def rounds_for(macs: int) -> int:
    """Fewer rounds where a step takes seconds."""
    return 10 if macs < 2e9 else 6 if macs < 100e9 else 3


def measured(
    cell: Cell, options: Options, runs: int, once: Collection[str] = ()
) -> Iterator[list[Run]]:
    """The runs so far, after each: see the head of this file for what later runs leave out."""
    done: list[Run] = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            done.append(Measurement(cell, options, Path(folder)).run())
        yield done
        failed = [row.system for row in done[-1].rows if row.error]
        kept = tuple(s for s in options.systems if s not in failed and s not in once)
        options = replace(options, systems=kept, memory=False, check=False)


def networks(text: str) -> list[str]:
    """Specifications joined by commas; `a:x=1,y=2,b` is `a:x=1,y=2` and `b`."""
    found: list[str] = []
    for part in text.split(","):
        option = "=" in part and ":" not in part.partition("=")[0]
        if option and found:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def about(options: Options) -> dict[str, Any]:
    """What the numbers depend on."""
    named = ("branchgraph", "numpy", "torch", "onnxruntime", "openvino", "jax")
    there = {d.name.lower(): d.version for d in metadata.distributions()}
    versions = {"python": platform.python_version()}
    versions |= {name: there[name] for name in named if name in there}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "threads": options.threads,
        "backend": options.backend,
        "rounds": options.rounds or "by MACs",
        "versions": versions,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--net", default="lenet", help="specifications, joined by commas")
    parser.add_argument("--mode", choices=("infer", "train", "exits"), default="infer")
    parser.add_argument("--batch", default="1", help="sizes, joined by commas")
    parser.add_argument("--peers", default=",".join(PEERS), help="'' for branchgraph alone")
    parser.add_argument("--backend", default="auto", help="of branchgraph")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1, help="in fresh processes")
    parser.add_argument("--once", default="", help="systems of the first run only")
    parser.add_argument("--rounds", type=int, help="of a run; by default 3 to 10, by MACs")
    parser.add_argument("--burst", type=float, default=0.1, help="seconds a system runs in a round")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument(
        "--reference-gmacs", type=float, default=60.0,
        help="cells with more are compared with the first peer instead of the interpreter",
    )  # fmt: skip
    parser.add_argument("--legacy-python", default=os.environ.get("BRANCHGRAPH_LEGACY_PYTHON"))
    parser.add_argument("--weights", help="of --mode exits: a trained network (.bg)")
    parser.add_argument("--threshold", type=float, default=0.025, help="of --mode exits")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    chosen.peers = [p for p in chosen.peers.split(",") if p]
    chosen.once = [p for p in chosen.once.split(",") if p]
    unknown = [p for p in (*chosen.peers, *chosen.once) if p not in (*PEERS, *LEGACY)]
    if unknown:
        parser.error(f"no peer {unknown[0]!r}; there are: {', '.join((*PEERS, *LEGACY))}")
    if chosen.mode == "exits" and chosen.weights is None:
        parser.error("--mode exits needs --weights; see the head of compare_exits.py")
    chosen.batch = [int(b) for b in chosen.batch.split(",")]
    chosen.net = networks(chosen.net)
    return chosen


def measure_exits(chosen: argparse.Namespace) -> int:
    """Run `compare_exits.py` with the threads asked for; its exit status."""
    command = [
        sys.executable, str(Path(__file__).with_name("compare_exits.py")), chosen.weights,
        "--batch", ",".join(map(str, chosen.batch)), "--threshold", str(chosen.threshold),
        "--backend", chosen.backend, "--rounds", str(chosen.rounds or 10),
    ]  # fmt: skip
    if chosen.json:
        command += ["--json", str(chosen.json)]
    return subprocess.call(command, env=environment(os.environ, chosen.threads))


def main(arguments: list[str] | None = None) -> None:
    """Measure every cell, print its table, write the file."""
    chosen = parse(arguments)
    if chosen.mode == "exits":
        sys.exit(measure_exits(chosen))
    options = Options(
        (OURS, *chosen.peers), chosen.backend, chosen.threads, chosen.rounds, chosen.burst,
        not chosen.no_memory, True, chosen.reference_gmacs * 1e9, chosen.legacy_python,
    )  # fmt: skip
    before: list[Summary] = []
    cells: list[dict[str, Any]] = []
    for spec in chosen.net:
        for batch in chosen.batch:
            cell = make_cell(spec, chosen.mode, batch)
            about_cell = {"net": spec, "mode": chosen.mode, "batch": batch, "macs": cell.macs}
            summaries: list[Summary] = []
            for runs in measured(cell, options, chosen.runs, chosen.once):
                summaries = merge(runs, cell.macs)
                found = [*cells, {**about_cell, "gemm_gflops": [run.gflops for run in runs]}]
                if chosen.json:
                    about_all = {**about(options), "cells": found}
                    write_json(chosen.json, [*before, *summaries], about_all)
            print(table(summaries), end="\n\n", flush=True)
            before, cells = [*before, *summaries], found


if __name__ == "__main__":
    main()
