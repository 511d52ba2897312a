"""Run random pipelines of passes over random networks and print what they matched and refused.

    python tools/random_passes.py --seeds 0 2000
    python tools/random_passes.py --seeds 0 100000 --processes 2 --log random_passes

The generator and the checks are those of the tests (`tests/passes/random_pipelines.py`). The log is
a folder with a file for each chunk of seeds that is done, written whole or not at all. Where it is
there already its chunks are read instead of run, so a run that was stopped goes on where it was,
and ranges may be added one after another. A folder belongs to one tree: delete it when a pass or a
motif has changed. What is printed is the table for `docs/random_passes.md`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "passes")]

from random_pipelines import Tally  # noqa: E402

#: Seeds that a process runs before it reports; ranges in the log start at multiples of it.
CHUNK = 100


def counted(seeds: range) -> tuple[range, Tally]:
    """The counts of some seeds."""
    warnings.simplefilter("error")
    tally = Tally()
    for seed in seeds:
        tally.add(seed)
    return seeds, tally


def chunks_of(first: int, stop: int) -> list[range]:
    """The seeds in chunks whose limits do not depend on where a range starts."""
    limits = [first, *range(first - first % CHUNK + CHUNK, stop, CHUNK), stop]
    return [range(a, b) for a, b in pairwise(limits) if a < b]


def tallies(chunks: list[range], processes: int) -> Iterator[tuple[range, Tally]]:
    """The counts of chunks, in their order."""
    if processes == 1 or len(chunks) < 2:
        yield from map(counted, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(counted, chunks)


def file_of(log: Path, seeds: range) -> Path:
    """Where the log has the counts of a chunk."""
    return log / f"{seeds.start:09d}-{seeds.stop:09d}.json"


def write(path: Path, tally: Tally) -> None:
    """Put counts into the log."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(tally.to_json(), indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def gathered(chunks: list[range], processes: int, log: Path | None) -> Tally:
    """The counts of all chunks; those in the log are read."""
    whole, todo = Tally(), []
    for seeds in chunks:
        if log and file_of(log, seeds).exists():
            whole.merge(Tally.from_json(json.loads(file_of(log, seeds).read_text("utf-8"))))
        else:
            todo.append(seeds)
    if whole.graphs:
        print(f"{whole.graphs:,} graphs were done before", file=sys.stderr)
    for seeds, tally in tallies(todo, processes):
        if log:
            write(file_of(log, seeds), tally)
        whole.merge(tally)
        for failure in tally.failures:
            print(failure, file=sys.stderr, flush=True)
    return whole


def main() -> None:
    """Run the seeds that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 2000), metavar=("FIRST", "STOP"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--log", type=Path, help="folder that keeps what is done")
    given = parser.parse_args()
    (first, stop), start = given.seeds, time.perf_counter()
    if given.log:
        given.log.mkdir(parents=True, exist_ok=True)
    whole = gathered(chunks_of(first, stop), given.processes, given.log)
    print(f"seeds {first} to {stop - 1}\n{whole}")
    print(f"{time.perf_counter() - start:,.0f} s", file=sys.stderr)
    sys.exit(bool(whole.failures or whole.unlisted))


if __name__ == "__main__":
    main()
