"""Direct convolutions for few channels, one after the other, each with its bias, pooling and ReLU.

For filter k and output position (i, j), stride (s, t) and leading pads (p, q)

    y[k, i, j] = b[k] + sum_{c, u, v} W[k, c, u, v] x[c, i s - p + u, j t - q + v]

where only the taps that lie in x are summed: nothing is padded, and no product with a padding zero
is computed (at the borders of small planes those are a quarter to two fifths of all). A tile of
`vectors` times `columns` sums stays in registers while the taps go by; every loaded x serves all
filters of the tile, every loaded weight all its columns.

What the lanes of a vector are decides the mode of the whole chain; the tile is the same for both:

    samples     lane = sample: x is a vector, a weight one number. All lanes work, whatever the
                channels are. Samples are transposed on the way in and on the way out.
    filters     lane = filter: x is one number, weights are vectors. For few samples.

Planes lie as [row][column][channel], outside and between the layers of a chain; elements are
numbers in the second mode and vectors of samples in the first. Between layers only one sample (or
one vector of samples) is in flight, in scratch memory of its thread, so the chain stays in cache.

A sum takes its products in the order of rows, channels and columns of taps in both, so a sample has
the same bits in every batch.

Max pooling with windows that do not overlap reads one line of conv rows while it is in cache. ReLU
follows the maximum, with which it commutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod

import numpy as np

from branchgraph.codegen import engine
from branchgraph.codegen.assembly import Function

_FLOAT = 4
#: Most bytes of scratch memory of a thread; half of a usual second-level cache.
CACHED = 1 << 19
#: What part of the time a product more in the text may save without being worth its compilation.
_SHORT = 1e-4
#: Most vectors of weights that stay in registers for a row of taps.
_HELD = 12
#: Most filters of a tile whose lanes are samples.
_MOST_FILTERS = 10


@dataclass(frozen=True)
class Layer:
    """A convolution (groups and dilation 1) and what follows it. Pairs are (rows, columns)."""

    channels: int
    filters: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    begin: tuple[int, int] = (0, 0)
    end: tuple[int, int] = (0, 0)
    bias: bool = False
    relu: bool = False
    #: Windows of max pooling, side by side.
    pool: tuple[int, int] = (1, 1)
    #: Whether windows of pooling count that overhang the end.
    cover_all: bool = False

    @property
    def convolved(self) -> tuple[int, int]:
        """Size of the planes before pooling."""
        height, width = (
            (d + b + e - k) // s + 1
            for d, b, e, k, s in zip(self.size, self.begin, self.end, self.kernel, self.stride)
        )
        return height, width

    @property
    def result(self) -> tuple[int, int]:
        """Size of the planes behind pooling."""
        height, width = (
            -(-d // w) if self.cover_all else d // w for d, w in zip(self.convolved, self.pool)
        )
        return height, width

    @property
    def products(self) -> int:
        """Products of a sample whose x is not padding."""
        taps = [
            sum(len(self.inside(axis, at)) for at in range(size))
            for axis, size in enumerate(self.convolved)
        ]
        return self.filters * self.channels * taps[0] * taps[1]

    def inside(self, axis: int, at: int) -> range:
        """Taps of the window at output position `at` that lie in x."""
        start = at * self.stride[axis] - self.begin[axis]
        return range(max(0, -start), min(self.kernel[axis], self.size[axis] - start))


@dataclass(frozen=True)
class Tile:
    """Sums in registers: `vectors` of `lanes` for each of `columns` positions of a row."""

    lanes: int
    vectors: int
    columns: int
    #: Whether lanes are samples; else they are filters.
    samples: bool

    @property
    def filters(self) -> int:
        """Filters of a tile."""
        return self.vectors * (1 if self.samples else self.lanes)

    @property
    def element(self) -> int:
        """Bytes of one element of x."""
        return _FLOAT * (self.lanes if self.samples else 1)

    def padded(self, filters: int) -> int:
        """Filters of whole tiles."""
        return -(-filters // self.filters) * self.filters

    def by_tap(self, layer: Layer) -> bool:
        """Whether x is loaded anew for each tap of a row, not to keep the weights of all."""
        return not self.samples and self.vectors * layer.kernel[1] > _HELD

    def registers(self, layer: Layer) -> int:
        """Vectors that are alive together: sums, and what the taps of a row share."""
        across = layer.kernel[1]
        if self.samples:
            shared = (self.columns - 1) * layer.stride[1] + across
        else:
            # LLVM loads the weights of the next tap while those of one are used.
            shared = self.vectors * (2 if self.by_tap(layer) else across)
        return self.vectors * self.columns + shared + 1

    def blocks(self, layer: Layer) -> Iterator[tuple[int, int, tuple[range, ...]]]:
        """(first column, number of equal blocks, taps in x of each column) along a row."""
        width = layer.convolved[1]
        taps = [layer.inside(1, column) for column in range(width)]
        parts = (tuple(taps[n : n + self.columns]) for n in range(0, width, self.columns))
        column = 0
        for block, equal in groupby(parts):
            turns = len(list(equal))
            yield column, turns, block
            column += turns * len(block)

    def written(self, layer: Layer) -> int:
        """Products in the text."""
        return self.vectors * sum(len(t) for _, _, taps in self.blocks(layer) for t in taps)

    def cycles(self, layer: Layer) -> float:
        """Cycles for all filters of one sample, or of `lanes` samples, as far as they are counted.

        A product takes one of 16 lanes, two loads one; a sum waits four for its previous product.
        """
        height, width = layer.convolved
        speed = 16 / self.lanes
        taps = [len(layer.inside(1, column)) for column in range(width)]
        row = 0.0
        for start in range(0, width, self.columns):
            part = taps[start : start + self.columns]
            products = self.vectors * sum(part) / speed
            shared = (len(part) - 1) * layer.stride[1] + max(part)
            cells = sum(part) if self.by_tap(layer) else shared
            loads = (self.vectors * max(part) + cells) / 2 * (1 if self.samples else 1 / speed)
            row += max(products, loads, 4 * max(part)) + 2
        rows = sum(len(layer.inside(0, line)) for line in range(height))
        tiles = self.padded(layer.filters) // self.filters
        outputs = height * width * self.vectors * (3 if layer.pool != (1, 1) else 2) / speed
        return tiles * (rows * layer.channels * row + outputs)


def registers() -> int:
    """Vectors to plan with: AVX-512 has 32 registers, also for shorter vectors, AVX2 has 16."""
    return 31 if engine.lanes() == 16 else 15


def pack(weight: np.ndarray, filters: int, out: np.ndarray) -> None:
    """Weights as tiles of `filters` read them.

    weight: [K, C, kh, kw]; out: for every tile [kh, C, kw, filters], flat; filters that are not
    there are 0.
    """
    count, channels, height, width = weight.shape
    tiles = out.reshape(-1, height, channels, width, filters)
    if count % filters:
        tiles[-1] = 0
    for number, target in enumerate(tiles):
        part = weight[number * filters : (number + 1) * filters]
        np.copyto(target[..., : len(part)], part.transpose(2, 1, 3, 0))


def tile(layer: Layer, lanes: int, samples: bool) -> Tile:
    """The tile that takes the fewest cycles by the count, if its text is not much longer."""
    found = []
    for vectors in _heights(layer, lanes, samples):
        for columns in range(1, min(layer.convolved[1], registers()) + 1):
            made = Tile(lanes, vectors, columns, samples)
            if columns > 1 and made.registers(layer) > registers():
                break
            found.append(made)
    return min(found, key=lambda t: t.cycles(layer) * (1 + t.written(layer) * _SHORT))


def _heights(layer: Layer, lanes: int, samples: bool) -> Sequence[int]:
    """How many vectors of filters a tile may have: all of them, or a divisor of their number."""
    if not samples:
        return [-(-layer.filters // lanes)]
    divisors = [d for d in range(1, layer.filters + 1) if layer.filters % d == 0]
    return [d for d in divisors if d <= _MOST_FILTERS] if len(divisors) > 2 else divisors[-1:]


@dataclass(frozen=True)
class Chain:
    """Layers, each of which reads what the one before gives, and how they are computed."""

    layers: tuple[Layer, ...]
    tiles: tuple[Tile, ...]

    def __post_init__(self) -> None:
        for number, (before, after) in enumerate(pairwise(self.layers)):
            given, read = (*before.result, before.filters), (*after.size, after.channels)
            if given != read:
                raise ValueError(f"layer {number + 1} reads {read}, layer {number} gives {given}")

    @staticmethod
    def of(layers: Sequence[Layer], lanes: int, samples: bool) -> Chain:
        """`lanes` of a full vector; lanes of filters are halved where that leaves fewer empty."""
        tiles = []
        for layer in layers:
            half = lanes // 2 if lanes > 8 else lanes
            fits = -(-layer.filters // lanes) * lanes == -(-layer.filters // half) * half
            tiles.append(tile(layer, lanes if samples or fits else half, samples))
        return Chain(tuple(layers), tuple(tiles))

    @staticmethod
    def best(layers: Sequence[Layer], lanes: int, samples: int, threads: int) -> Chain:
        """The chain that takes the fewest cycles for so many samples.

        Lanes are samples only where what is in flight stays in the second-level cache.
        """
        short = {lanes, max(lanes // 2, 8)}
        chains = [Chain.of(layers, lanes, False)]
        chains += [Chain.of(layers, n, True) for n in sorted(short) if 2 * samples > n]
        fitting = [c for c in chains if not c.samples or c.scratch <= CACHED]
        return min(fitting, key=lambda c: c.cycles(samples, threads))

    def cycles(self, samples: int, threads: int) -> float:
        """Cycles for so many samples, as far as they are counted."""
        counted = sum(t.cycles(layer) for t, layer in zip(self.tiles, self.layers))
        if self.samples:
            ends = (prod(self._shape(n)) for n in (0, len(self.layers)))
            counted = 1.1 * counted + 8 * sum(ends)
        groups = -(-samples // self.lanes)
        return -(-groups // threads) * (counted + 200)

    @property
    def samples(self) -> bool:
        """Whether lanes are samples."""
        return self.tiles[0].samples

    @property
    def lanes(self) -> int:
        """Samples that go through together."""
        return self.tiles[0].lanes if self.samples else 1

    def packed(self, number: int) -> int:
        """Floats of the packed weights of a layer."""
        layer = self.layers[number]
        taps = layer.channels * layer.kernel[0] * layer.kernel[1]
        return self.tiles[number].padded(layer.filters) * taps

    @property
    def scratch(self) -> int:
        """Bytes of scratch memory a thread."""
        return sum(self._parts())

    def _parts(self) -> tuple[int, int, int]:
        """Bytes of two planes that take turns, and of the line of rows that are pooled."""
        even, odd = [0], [0]
        for number in range(len(self.layers) + 1):
            (even, odd)[number % 2].append(self._plane(number))
        line = [
            layer.pool[0] * layer.convolved[1] * found.vectors * found.lanes * _FLOAT
            for layer, found in zip(self.layers, self.tiles)
        ]
        return _aligned(max(even)), _aligned(max(odd)), _aligned(max(line))

    def _plane(self, number: int) -> int:
        """Bytes in scratch memory of what layer `number` reads; the last is the result."""
        outside = number in (0, len(self.layers))
        if outside and not self.samples:
            return 0
        height, width, channels = self._shape(number)
        return height * width * channels * self.tiles[0].element

    def _shape(self, number: int) -> tuple[int, int, int]:
        """Rows, columns, channels with padding of what layer `number` reads."""
        if number == 0:
            return (*self.layers[0].size, self.layers[0].channels)
        layer = self.layers[number - 1]
        last = number == len(self.layers)
        filters = layer.filters if last else self.tiles[number - 1].padded(layer.filters)
        return (*layer.result, filters)

    def text(self) -> str:
        """The function `kernel(x, y, scratch, samples, weights of each layer..., biases...)`.

        Weights are packed. A layer without a bias still has an argument for it, which is not read.
        """
        count = len(self.layers)
        names = [f"{kind}{n}" for kind in ("weights", "bias") for n in range(count)]
        f = Function(["x", "y", "scratch", "samples", *names], lanes=self.tiles[0].lanes)
        x, y, scratch, samples = f.arguments[:4]
        weights, biases = f.arguments[4 : 4 + count], f.arguments[4 + count :]
        parts = self._parts()
        home = f.add(scratch, f.mul(f.thread(), sum(parts)))
        planes = (home, f.add(home, parts[0]))
        line = f.add(home, parts[0] + parts[1])
        groups = f.div(f.add(samples, self.lanes - 1), self.lanes)
        floats = [h * w * c for h, w, c in (self._shape(0), self._shape(count))]
        start, end = f.share(groups)
        with f.loop(start, end) as group:
            if self.samples:
                rows = rows_of(f, group.index, samples, self.lanes)
                gathered(f, x, rows, planes[0], floats[0])
                first, last = planes[0], planes[count % 2]
            else:
                first, last = (
                    f.add(a, f.mul(group.index, n * _FLOAT)) for a, n in zip((x, y), floats)
                )
            for number in range(count):
                source = planes[number % 2] if number else first
                target = planes[(number + 1) % 2] if number + 1 < count else last
                with f.vectors(self.tiles[number].lanes):
                    self._layer(f, number, source, target, weights[number], biases[number], line)
            if self.samples:
                _scattered(f, last, rows, y, floats[1])
        return f.text()

    def _layer(
        self, f: Function, number: int, source: str, target: str, weights: str, bias: str,
        line: str,
    ) -> None:  # fmt: skip
        layer, found = self.layers[number], self.tiles[number]
        blocks = found.padded(layer.filters) // found.filters
        pack = self.packed(number) // blocks * _FLOAT
        _, width, channels = self._shape(number)
        reads = _Planes(width * channels * found.element, channels * found.element, found.element)
        _, wide, deep = self._shape(number + 1)
        writes = _Planes(wide * deep * found.element, deep * found.element, _FLOAT * found.lanes)
        used = deep if not found.samples and deep % found.lanes else None
        with f.loop(0, blocks) as block:
            move = f.mul(block.index, found.filters * _FLOAT)
            writer = _Writer(
                f, layer, found, source, reads, f.add(weights, f.mul(block.index, pack)),
                f.add(bias, move), used,
            )  # fmt: skip
            out = f.add(target, f.mul(block.index, found.filters * found.element))
            if layer.pool == (1, 1):
                with f.loop(0, layer.convolved[0]) as row:
                    at = f.add(out, f.mul(row.index, writes.row))
                    writer.row(row.index, at, writes, last=True)
            else:
                writer.pooled(out, writes, line)


@dataclass(frozen=True)
class _Planes:
    """Bytes from one row, column and vector of channels (or channel) to the next."""

    row: int
    column: int
    channel: int


@dataclass(frozen=True)
class _Writer:
    """Writes the loops of one layer for one tile of filters."""

    f: Function
    layer: Layer
    tile: Tile
    source: str
    reads: _Planes
    weights: str
    bias: str
    #: Channels that may be written, if those of the result are no whole vectors.
    used: int | None

    def row(self, row: str, target: str, writes: _Planes, *, last: bool) -> None:
        """One row of the convolution; `last` if nothing but ReLU follows."""
        f, layer = self.f, self.layer
        start = f.sub(f.mul(row, layer.stride[0]), layer.begin[0])
        first = f.most(f.sub(0, start), 0)
        end = f.least(f.sub(layer.size[0], start), layer.kernel[0])
        line = f.add(self.source, f.mul(start, self.reads.row))
        for column, turns, taps in self.tile.blocks(layer):
            move = column * layer.stride[1] - layer.begin[1]
            x, out = f.add(line, move * self.reads.column), f.add(target, column * writes.column)
            if turns == 1:
                self._block(x, first, end, out, writes, taps, last)
                continue
            with f.loop(0, turns) as turn:
                step = len(taps)
                there = f.mul(turn.index, step * layer.stride[1] * self.reads.column)
                here = f.mul(turn.index, step * writes.column)
                self._block(f.add(x, there), first, end, f.add(out, here), writes, taps, last)

    def _block(
        self, x: str, first: str, end: str, out: str, writes: _Planes,
        taps: Sequence[range], last: bool,
    ) -> None:  # fmt: skip
        """The sums of `len(taps)` columns, through all rows of taps and all channels."""
        f, layer, tile = self.f, self.layer, self.tile
        weight_column = tile.filters * _FLOAT
        weight_channel = layer.kernel[1] * weight_column
        sums = [b for b in self._biases() for _ in taps]
        with f.loop(first, end, carried=sums) as rows:
            xs = f.add(x, f.mul(rows.index, self.reads.row))
            ws = f.add(self.weights, f.mul(rows.index, layer.channels * weight_channel))
            if layer.channels == 1:
                rows.following = self._taps(xs, ws, taps, rows.carried)
            else:
                with f.loop(0, layer.channels, carried=rows.carried) as channels:
                    xc = f.add(xs, f.mul(channels.index, self.reads.channel))
                    wc = f.add(ws, f.mul(channels.index, weight_channel))
                    channels.following = self._taps(xc, wc, taps, channels.carried)
                rows.following = channels.carried
        for q in range(tile.vectors):
            for p in range(len(taps)):
                value = rows.carried[q * len(taps) + p]
                place = p * writes.column + q * writes.channel
                if last:
                    value = f.relu(value) if layer.relu else value
                    f.store(value, out, place, self._used(q))
                else:
                    f.store(value, out, place)

    def _taps(self, x: str, weights: str, taps: Sequence[range], sums: Sequence[str]) -> list[str]:
        """The products of one row of taps and one channel."""
        f, tile, found = self.f, self.tile, list(sums)
        stride, count = self.layer.stride[1], len(taps)
        cells = sorted({p * stride + v for p, valid in enumerate(taps) for v in valid})
        used = sorted({v for valid in taps for v in valid})
        xs: dict[int, str] = {}
        ws: dict[tuple[int, int], str] = {}

        def add(p: int, v: int) -> None:
            for q in range(tile.vectors):
                place = q * count + p
                found[place] = f.fma(ws[v, q], xs[p * stride + v], found[place])

        def weigh(v: int) -> None:
            for q in range(tile.vectors):
                ws[v, q] = self._weight(weights, v * tile.vectors + q)

        if tile.samples:
            xs = {cell: f.load(x, cell * self.reads.column) for cell in cells}
        if tile.samples or tile.by_tap(self.layer):
            for v in used:
                weigh(v)
                for p in range(count):
                    if v in taps[p]:
                        if not tile.samples:
                            xs[p * stride + v] = self._cell(x, p * stride + v)
                        add(p, v)
            return found
        for v in used:
            weigh(v)
        for cell in cells:
            xs[cell] = self._cell(x, cell)
            for p in range(count):
                if cell - p * stride in taps[p]:
                    add(p, cell - p * stride)
        return found

    def _cell(self, x: str, column: int) -> str:
        """One number of x in all lanes."""
        return self.f.spread(self.f.load_scalar(x, column * self.reads.column))

    def _biases(self) -> list[str]:
        """What the sums of each vector start with."""
        f, tile = self.f, self.tile
        if not self.layer.bias:
            return [f.zero] * tile.vectors
        if tile.samples:
            return [self._weight(self.bias, q) for q in range(tile.vectors)]
        rest = [min(tile.lanes, self.layer.filters - q * tile.lanes) for q in range(tile.vectors)]
        return [f.load(self.bias, q * tile.lanes * _FLOAT, used) for q, used in enumerate(rest)]

    def _weight(self, address: str, number: int) -> str:
        """The weights of one vector of sums."""
        if self.tile.samples:
            return self.f.spread(self.f.load_scalar(address, number * _FLOAT))
        return self.f.load(address, number * _FLOAT * self.tile.lanes)

    def pooled(self, out: str, writes: _Planes, line: str) -> None:
        """All rows, with max pooling."""
        f, layer, tile = self.f, self.layer, self.tile
        vector = tile.lanes * _FLOAT
        lines = _Planes(layer.convolved[1] * tile.vectors * vector, tile.vectors * vector, vector)
        high, height = layer.pool[0], layer.convolved[0]
        with f.loop(0, layer.result[0]) as result:
            start = f.mul(result.index, high)
            rows = f.least(f.sub(height, start), high)
            with f.loop(0, rows) as row:
                at = f.add(line, f.mul(row.index, lines.row))
                self.row(f.add(start, row.index), at, lines, last=False)
            # A row that is not there is replaced by the last one that is.
            there = [f.add(line, f.mul(f.least(f.sub(rows, 1), n), lines.row)) for n in range(high)]
            self._windows(there, f.add(out, f.mul(result.index, writes.row)), lines, writes)

    def _windows(self, lines: Sequence[str], out: str, reads: _Planes, writes: _Planes) -> None:
        """One row of maxima."""
        f, wide = self.f, self.layer.pool[1]
        whole, rest = divmod(self.layer.convolved[1], wide)
        with f.loop(0, whole) as window:
            move = f.mul(window.index, wide * reads.column)
            at = f.add(out, f.mul(window.index, writes.column))
            self._window([f.add(line, move) for line in lines], at, wide, reads, writes)
        if rest and self.layer.cover_all:
            after, at = whole * wide * reads.column, f.add(out, whole * writes.column)
            self._window([f.add(line, after) for line in lines], at, rest, reads, writes)

    def _window(
        self, lines: Sequence[str], out: str, wide: int, reads: _Planes, writes: _Planes
    ) -> None:
        f = self.f
        for q in range(self.tile.vectors):
            cells = [
                f.load(line, p * reads.column + q * reads.channel)
                for line in lines for p in range(wide)
            ]  # fmt: skip
            value = cells[0]
            for cell in cells[1:]:
                value = f.maximum(value, cell)
            value = f.relu(value) if self.layer.relu else value
            f.store(value, out, q * writes.channel, self._used(q))

    def _used(self, vector: int) -> int | None:
        """Lanes of a vector of results that are written."""
        if self.used is None:
            return None
        return min(self.tile.lanes, self.used - vector * self.tile.lanes)


def rows_of(f: Function, group: str, samples: str, lanes: int) -> list[str]:
    """The samples of a group; what is beyond the last one is that one again."""
    first = f.mul(group, lanes)
    return [f.least(f.add(first, lane), f.sub(samples, 1)) for lane in range(lanes)]


def gathered(f: Function, x: str, rows: Sequence[str], target: str, floats: int) -> None:
    """Samples of `floats` elements each to vectors of samples."""
    at = [f.add(x, f.mul(row, floats * _FLOAT)) for row in rows]
    for place, used in _squares(f, floats):
        vectors = f.transposed([f.load(f.add(a, place), 0, used) for a in at])
        out = f.add(target, f.mul(place, f.lanes))
        for number, vector in enumerate(vectors[:used]):
            f.store(vector, out, number * f.lanes * _FLOAT)


def _scattered(f: Function, source: str, rows: Sequence[str], y: str, floats: int) -> None:
    """Vectors of samples to samples."""
    at = [f.add(y, f.mul(row, floats * _FLOAT)) for row in rows]
    for place, used in _squares(f, floats):
        start = f.add(source, f.mul(place, f.lanes))
        count = f.lanes if used is None else used
        vectors = [f.load(start, n * f.lanes * _FLOAT) for n in range(count)]
        vectors += [f.zero] * (f.lanes - count)
        for a, vector in zip(at, f.transposed(vectors)):
            f.store(vector, f.add(a, place), 0, used)


def _squares(f: Function, floats: int) -> Iterator[tuple[str, int | None]]:
    """(byte, elements used) of every stretch of `lanes` elements; the last one may overlap."""
    step = f.lanes * _FLOAT
    if floats < f.lanes:
        yield f.add(0, 0), floats
        return
    with f.loop(0, floats * _FLOAT, step) as loop:
        yield f.least(loop.index, floats * _FLOAT - step), None


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
