"""The whole suite, cell by cell into a folder, and its tables.

    python benchmarks/suite.py FOLDER --targets --runs 5       the cells that have a target
    python benchmarks/suite.py FOLDER --only 'cross*.train.*'  cells by name
    python benchmarks/suite.py FOLDER --list                   which there are, and which are there
    python benchmarks/suite.py FOLDER --tables tables.md       write the tables of what is there

Run it with the interpreter that `compare.py` needs. A cell is one call of that script; what it
found lies in FOLDER as `NET.MODE.bBATCH.json` as soon as it is complete, and a cell that lies there
is not measured again: delete it to have it anew. A cell that takes longer than `--limit` ends with
the runs it has. The tables are written at the end of every call (`FOLDER/tables.md`); what they say
is told in `peers/tables.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.tables import Found, tables

COMPARE = Path(__file__).with_name("compare.py")
PEERS = "torch,torch.compile,onnxruntime,openvino,jax"
LEGACY = "chainer,mxnet"


@dataclass(frozen=True)
class Net:
    """A network of the suite with its batch sizes; the numbers are ratios to PyTorch to reach."""

    title: str
    spec: str
    infer: dict[int, float | None]
    train: dict[int, float | None] = field(default_factory=dict)


def _batches(*sizes: int) -> dict[int, float | None]:
    return dict.fromkeys(sizes)


SUITE = (
    Net("LeNet", "lenet",
        {1: 0.10, 8: None, 64: 0.17, 256: None}, {8: None, 64: 0.5, 256: None}),
    Net("ResNet-20", "resnet:depth=20",
        {1: 0.20, 8: None, 64: 0.60, 256: None}, {8: 0.52, 64: 0.62, 256: None}),
    Net("DFN-MR-56", "cross:depth=110",
        {1: 0.20, 8: None, 64: 0.45, 256: None}, {8: 0.55, 64: 0.62}),
    Net("ResNet-110", "resnet:depth=110",
        {1: 0.20, 8: None, 64: 0.50, 256: None}, {8: 0.55, 64: 0.62}),
    Net("PD-A-ResNet18, branches", "pd_a_resnet18",
        {1: 0.55, 8: None, 64: 0.55}, {8: None, 64: 0.65}),
    Net("PD-A-ResNet18, fused", "pd_a_resnet18@specialise@fuse_branches",
        {1: 0.25, 8: None, 64: 0.25}),
    Net("vbranch CNN ×4", "cnn:branches=4",
        {1: 0.25, 8: None, 64: 0.55, 256: None}, {8: 0.5, 64: 0.6, 256: None}),
    Net("B-LeNet", "b_lenet", _batches(1, 8, 64, 256), _batches(8, 64, 256)),
    Net("B-AlexNet", "b_alexnet", _batches(1, 8, 64, 256), _batches(8, 64, 256)),
    Net("ResNet-56", "resnet:depth=56", _batches(1, 8, 64, 256), _batches(8, 64)),
    Net("PD-B-ResNet18", "pd_b_resnet18", _batches(1, 8, 64), _batches(8)),
    Net("MaskConnect ResNeXt {20,4,8}", "masked_resnext:depth=20,width=4,cardinality=8",
        _batches(1, 8, 64, 256), _batches(8, 64)),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One network in one mode at one batch size, and the ratio to PyTorch to reach, if any."""

    title: str
    spec: str
    mode: str
    batch: int
    target: float | None

    @property
    def name(self) -> str:
        """What `--only` matches, and the file is called."""
        return f"{re.sub(r'[^A-Za-z0-9_]+', '-', self.spec)}.{self.mode}.b{self.batch}"


def cells(suite: Iterable[Net] = SUITE) -> list[Cell]:
    """All cells; those with a target first."""
    found = [
        Cell(net.title, net.spec, mode, batch, target)
        for net in suite
        for mode, batches in (("infer", net.infer), ("train", net.train))
        for batch, target in batches.items()
    ]
    return sorted(found, key=lambda cell: cell.target is None)


def chosen_cells(only: str, targets: bool) -> list[Cell]:
    """Cells whose name matches a pattern."""
    return [c for c in cells() if fnmatch(c.name, only) and (c.target is not None or not targets)]


def measure(cell: Cell, folder: Path, options: Sequence[str], limit: float) -> str:
    """Measure a cell unless it is there; what came of it, in a word."""
    target = folder / f"{cell.name}.json"
    if target.exists():
        return "is there"
    unfinished = target.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    command = [
        sys.executable, str(COMPARE), "--net", cell.spec, "--mode", cell.mode,
        "--batch", str(cell.batch), "--json", str(unfinished), *options,
    ]  # fmt: skip
    failure = run(command, limit)
    if not unfinished.exists():
        unfinished.write_text(json.dumps({"rows": [], "failure": failure or "it wrote nothing"}))
    elif failure:
        unfinished.write_text(
            json.dumps({**json.loads(unfinished.read_text()), "failure": failure})
        )
    unfinished.rename(target)
    return failure or "measured"


def run(command: Sequence[str], limit: float) -> str:
    """Run a command with all it starts for at most `limit` seconds; why it failed, or ''."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"compare.py ended with {status}" if status else ""


def read(folder: Path, listed: Iterable[Cell]) -> list[Found]:
    """The measured ones of the cells."""
    paths = ((cell, folder / f"{cell.name}.json") for cell in listed)
    return [
        Found(cell.title, cell.mode, cell.batch, cell.target, json.loads(path.read_text()))
        for cell, path in paths
        if path.exists()
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="of names such as --list has"
    )
    parser.add_argument("--targets", action="store_true", help="only cells that have a target")
    parser.add_argument("--list", action="store_true", help="name the cells and end")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="write the tables and end")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for a cell")
    parser.add_argument(
        "--peers", help="by default all; the old ones where --legacy-python is said"
    )
    parser.add_argument("--once", help="peers of the first run only; by default all but torch")
    parser.add_argument("--rounds", help="of a run; by default by the cell's MACs")
    parser.add_argument("--burst", default="0.2", help="seconds a system runs in a round")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--legacy-python", default=os.environ.get("BRANCHGRAPH_LEGACY_PYTHON"))
    chosen = parser.parse_args(arguments)
    if chosen.peers is None:
        chosen.peers = f"{PEERS},{LEGACY}" if chosen.legacy_python else PEERS
    if chosen.once is None:
        chosen.once = ",".join(p for p in chosen.peers.split(",") if p not in ("", "torch"))
    return chosen


def options_of(chosen: argparse.Namespace) -> list[str]:
    """What is handed on to compare.py."""
    given = ["--runs", str(chosen.runs), "--peers", chosen.peers, "--once", chosen.once,
             "--burst", chosen.burst, "--threads", chosen.threads]  # fmt: skip
    if chosen.rounds:
        given += ["--rounds", chosen.rounds]
    if chosen.no_memory:
        given += ["--no-memory"]
    if chosen.legacy_python:
        given += ["--legacy-python", chosen.legacy_python]
    return given


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, then write the tables."""
    chosen = parse(arguments)
    listed = chosen_cells(chosen.only, chosen.targets)
    if chosen.list:
        for cell in listed:
            there = (chosen.folder / f"{cell.name}.json").exists()
            print(cell.name, "measured" if there else "")
        return
    chosen.folder.mkdir(parents=True, exist_ok=True)
    if chosen.tables is None:
        for i, cell in enumerate(listed, start=1):
            start = time.monotonic()
            came = measure(cell, chosen.folder, options_of(chosen), chosen.limit)
            seconds = time.monotonic() - start
            print(f"[{i}/{len(listed)}] {cell.name}: {came}, {seconds:.0f} s", flush=True)
    target = chosen.tables or chosen.folder / "tables.md"
    target.write_text(tables(read(chosen.folder, listed)))
    print(target)


if __name__ == "__main__":
    main()
