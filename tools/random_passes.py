"""Run random pipelines of passes over random networks and print what they matched and refused.

    python tools/random_passes.py --seeds 0 2000
    python tools/random_passes.py --seeds 0 100000 --processes 2 --log random_passes.txt

The generator and the checks are those of the tests (`tests/passes/random_pipelines.py`). The log
gets the counts so far and every failure, so a run may be stopped and its range is known.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "passes")]

from random_pipelines import Tally  # noqa: E402

#: Seeds that a process runs before it reports.
CHUNK = 100


def counted(seeds: range) -> Tally:
    """The counts of some seeds."""
    warnings.simplefilter("error")
    tally = Tally()
    for seed in seeds:
        tally.add(seed)
    return tally


def tallies(first: int, stop: int, processes: int) -> Iterator[Tally]:
    """The counts of chunks in order."""
    chunks = [range(k, min(k + CHUNK, stop)) for k in range(first, stop, CHUNK)]
    if processes == 1:
        yield from map(counted, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(counted, chunks)


def main() -> None:
    """Run the seeds that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 2000), metavar=("FIRST", "STOP"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--log", type=Path)
    given = parser.parse_args()
    (first, stop), start, whole = given.seeds, time.perf_counter(), Tally()
    for tally in tallies(first, stop, given.processes):
        whole.merge(tally)
        for failure in tally.failures:
            print(failure, file=sys.stderr, flush=True)
        seconds = time.perf_counter() - start
        if given.log:
            head = f"seeds {first} to {first + whole.graphs - 1}, {seconds:,.0f} s"
            given.log.write_text(f"{head}\n{whole}\n")
    print(f"{whole}\n{seconds:,.1f} s, {whole.graphs / seconds:.1f} graphs a second")
    sys.exit(bool(whole.failures or whole.unlisted))


if __name__ == "__main__":
    main()
