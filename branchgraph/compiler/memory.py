"""A memory plan: where in one arena the buffers of a program lie, given when they live.

A buffer lives from the instruction that writes it first to the last one that touches it, both
included, and buffers that live at the same instruction must not share bytes. Finding the smallest
arena is dynamic storage allocation, which is NP-hard, so buffers are placed one by one: into the
smallest gap that holds them among the placed buffers they meet in time, else above all of these
(Pisarchyk and Lee, arXiv 2001.03288, "greedy by size for offset calculation"). The order decides
how good the result is. Two are tried, largest first and first use first, and the smaller arena is
taken. No arena is smaller than the bytes alive at the fullest instruction; the plan says both.

A request may lie inside another one: a slice of a concatenation, a reshape, a result computed in
place. What shares one host is placed as a block of the host's size that lives as long as any of it.
Nothing here knows a backend or a graph; `intervals` is the way from a `Program` to lifetimes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from branchgraph.compiler.program import Program
from branchgraph.ir.errors import GraphError

#: Bytes; a cache line, and the widest vector register.
ALIGNMENT = 64


@dataclass(frozen=True)
class Request:
    """A buffer of `size` bytes that lives at the instructions `first` to `last`, both included.

    `inside` = (index of another request, byte offset in it) places it within that request, which
    may lie within a third. Whether buffers of one host may share bytes is for the caller to know.
    """

    size: int
    first: int
    last: int
    inside: tuple[int, int] | None = None


@dataclass(frozen=True)
class Layout:
    """Byte offsets of the requests, in their order, in an arena of `size` bytes.

    Offsets are multiples of the alignment, but for requests inside others. `lower_bound` is the
    largest number of (aligned) bytes alive at one instruction; no arena can be smaller.
    """

    offsets: tuple[int, ...]
    size: int
    lower_bound: int


@dataclass
class _Block:
    """What is placed as one: a request that lies in no other, with all that lie in it."""

    size: int
    first: int
    last: int


def plan(requests: Sequence[Request], alignment: int = ALIGNMENT) -> Layout:
    """Offsets of `requests` in one arena; the same requests always get the same offsets.

    Raises `GraphError`, naming the request, for a negative size, a lifetime that ends before it
    begins, and an `inside` that names no request, leaves its host or leads back to itself.
    """
    if alignment < 1:
        raise GraphError(f"an alignment is at least 1 byte, not {alignment}")
    for index, request in enumerate(requests):
        _check(index, request, requests)
    places = _places(requests)
    blocks = _blocks(requests, places, alignment)
    plans = (_place(blocks, order) for order in _orders(blocks))
    starts, size = min(((p, _extent(blocks, p)) for p in plans), key=lambda found: found[1])
    offsets = tuple(starts.get(host, 0) + offset for host, offset in places)
    return Layout(offsets, size, _most_alive(blocks.values()))


def intervals(program: Program) -> dict[int, tuple[int, int]]:
    """First and last position of every computed buffer: its writer, and its last reader.

    A buffer that nobody reads lives at its writer alone. Results (outputs, updates, gradients) live
    to the last instruction. Arguments and states are not computed, so they are not listed.
    """
    spans: dict[int, tuple[int, int]] = {}
    for position, instruction in enumerate(program.instructions):
        for buffer in instruction.reads:
            if buffer in spans:
                spans[buffer] = spans[buffer][0], position
        for buffer in instruction.writes:
            spans[buffer] = spans[buffer][0] if buffer in spans else position, position
    end = len(program.instructions) - 1
    stored = (buffer for _, buffer in (*program.updates, *program.gradients))
    for buffer in (*program.outputs, *stored):
        if buffer in spans:
            spans[buffer] = spans[buffer][0], end
    return spans


def _check(index: int, request: Request, requests: Sequence[Request]) -> None:
    if request.size < 0:
        raise GraphError(f"request {index}: a size is at least 0 bytes, not {request.size}")
    if request.first > request.last:
        raise GraphError(
            f"request {index}: it is written at instruction {request.first} but touched last at "
            f"{request.last}; the last position is at least the first"
        )
    if request.inside is None:
        return
    host, offset = request.inside
    if not 0 <= host < len(requests):
        raise GraphError(
            f"request {index}: it lies inside request {host}, but there are only {len(requests)}"
        )
    room = requests[host].size
    if offset < 0 or offset + request.size > room:
        raise GraphError(
            f"request {index}: bytes {offset} to {offset + request.size} do not lie inside "
            f"request {host}, which has {room} bytes"
        )


def _places(requests: Sequence[Request]) -> list[tuple[int, int]]:
    """Outermost host and byte offset in it, of each request; a request in no other is its own."""
    found: dict[int, tuple[int, int]] = {}
    for index in range(len(requests)):
        path: dict[int, int] = {}
        at = index
        while at not in found and (inside := requests[at].inside) is not None:
            if at in path:
                cycle = " -> ".join(str(i) for i in (*list(path)[list(path).index(at) :], at))
                raise GraphError(f"request {at}: it lies inside itself ({cycle}); cut the cycle")
            path[at] = inside[1]
            at = inside[0]
        host, offset = found.setdefault(at, (at, 0))
        for member in reversed(path):
            offset += path[member]
            found[member] = host, offset
    return [found[index] for index in range(len(requests))]


def _blocks(
    requests: Sequence[Request], places: Sequence[tuple[int, int]], alignment: int
) -> dict[int, _Block]:
    """A block for each outermost host with bytes, its size a multiple of the alignment."""
    blocks: dict[int, _Block] = {}
    for request, (host, _) in zip(requests, places):
        block = blocks.get(host)
        if block is None:
            size = -(-requests[host].size // alignment) * alignment
            block = blocks[host] = _Block(size, request.first, request.last)
        block.first = min(block.first, request.first)
        block.last = max(block.last, request.last)
    return {host: block for host, block in blocks.items() if block.size}


def _most_alive(blocks: Iterable[_Block]) -> int:
    """The largest sum of sizes over blocks that live at one position."""
    changes: dict[int, int] = {}
    for block in blocks:
        changes[block.first] = changes.get(block.first, 0) + block.size
        changes[block.last + 1] = changes.get(block.last + 1, 0) - block.size
    alive = most = 0
    for position in sorted(changes):
        alive += changes[position]
        most = max(most, alive)
    return most


def _orders(blocks: dict[int, _Block]) -> Iterable[list[int]]:
    """Orders in which to place blocks; ties go to the request that comes first."""
    yield sorted(blocks, key=lambda h: (-blocks[h].size, blocks[h].first, h))
    yield sorted(blocks, key=lambda h: (blocks[h].first, -blocks[h].size, h))


def _place(blocks: dict[int, _Block], order: Sequence[int]) -> dict[int, int]:
    """Offsets of blocks that are placed one by one in `order`.

    The placed ones are columns (start, end, first, last) in order of start, so that finding the
    gaps for one block is a few array operations instead of a loop.
    """
    offsets: dict[int, int] = {}
    columns = np.zeros((4, len(order)), np.int64)
    for count, host in enumerate(order):
        block = blocks[host]
        starts, ends, firsts, lasts = columns[:, :count]
        met = (firsts <= block.last) & (lasts >= block.first)
        offset = _best_fit(starts[met], ends[met], block.size)
        at = int(np.searchsorted(starts, offset))
        columns[:, at + 1 : count + 1] = columns[:, at:count].copy()
        columns[:, at] = offset, offset + block.size, block.first, block.last
        offsets[host] = offset
    return offsets


def _extent(blocks: dict[int, _Block], offsets: dict[int, int]) -> int:
    """Bytes of the arena that holds all blocks."""
    return max((offset + blocks[host].size for host, offset in offsets.items()), default=0)


def _best_fit(starts: np.ndarray, ends: np.ndarray, size: int) -> int:
    """Where the smallest gap of at least `size` bytes begins, else where the last block ends.

    Blocks are in order of start and may overlap, since they need not meet each other in time.
    """
    floors = np.concatenate(([0], np.maximum.accumulate(ends)))
    gaps = starts - floors[:-1]
    fitting = np.flatnonzero(gaps >= size)
    if not fitting.size:
        return int(floors[-1])
    return int(floors[fitting[np.argmin(gaps[fitting])]])
