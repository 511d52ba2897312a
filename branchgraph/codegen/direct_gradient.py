"""The gradients of a direct convolution in its weights and its bias, for few channels.

For filter k, channel c and tap (u, v), stride (s, t) and leading pads (p, q)

    dW[k, c, u, v] = sum_{n, i, j} dy[n, k, i, j] x[n, c, i s - p + u, j t - q + v]
    db[k]          = sum_{n, i, j} dy[n, k, i, j]

where only the x that exist are met. Lanes are samples n: a group of them is transposed to vectors,
and the sums of `filters` filters and one row of taps stay in registers while the output positions
(i, j) go by. Vectors of sums are kept from group to group; each thread has its own. In the end the
lanes and the threads are added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod

from branchgraph.codegen.assembly import Function
from branchgraph.codegen.direct import CACHED, Layer, gathered, registers, rows_of

_FLOAT = 4


@dataclass(frozen=True)
class Gradient:
    """How the gradients of `layer` are computed; its pooling and ReLU do not count."""

    layer: Layer
    lanes: int
    filters: int

    @staticmethod
    def of(layer: Layer, lanes: int) -> Gradient:
        """As many filters together as registers allow and as divide their number."""
        across = layer.kernel[1]
        fitting = [n for n in range(1, layer.filters + 1) if n * across + across < registers()]
        return Gradient(
            layer, lanes, max((n for n in fitting if layer.filters % n == 0), default=1)
        )

    @staticmethod
    def best(layer: Layer, lanes: int, samples: int, threads: int) -> Gradient | None:
        """The one that takes the fewest cycles and stays in the second-level cache, if any."""
        choices = [Gradient.of(layer, n) for n in sorted({8, lanes})]
        fitting = [g for g in choices if g.sums + g.scratch <= 2 * CACHED]
        return min(fitting, key=lambda g: g.cycles(samples, threads), default=None)

    @property
    def sums(self) -> int:
        """Bytes of sums a thread: of each weight, then of each bias, a vector."""
        layer = self.layer
        count = layer.filters * (layer.channels * prod(layer.kernel) + 1)
        return count * self.lanes * _FLOAT

    @property
    def scratch(self) -> int:
        """Bytes a thread for a group of samples of x and dy."""
        return sum(self._floats) * self.lanes * _FLOAT

    @property
    def _floats(self) -> tuple[int, int]:
        layer = self.layer
        return prod(layer.size) * layer.channels, prod(layer.convolved) * layer.filters

    def cycles(self, samples: int, threads: int) -> float:
        """Cycles as far as they are counted: a product takes one of 16 lanes, and waits four."""
        layer, tile = self.layer, self.filters * self.layer.kernel[1]
        products = layer.products * max(1.1, 4 / tile)
        group = products + prod(layer.convolved) * layer.filters + 8 * sum(self._floats)
        groups = -(-samples // self.lanes)
        weights = layer.filters * layer.channels * prod(layer.kernel)
        return -(-groups // threads) * group * self.lanes / 16 + weights * (4 * threads + 12)

    # -- sums ----------------------------------------------------------------------------------

    def text(self) -> str:
        """`kernel(x, dy, sums, scratch, samples)`; x and dy are [N, rows, columns, channels]."""
        f = Function(["x", "dy", "sums", "scratch", "samples"], lanes=self.lanes)
        x, dy, sums, scratch, samples = f.arguments
        me = f.thread()
        sums = f.add(sums, f.mul(me, self.sums))
        planes = f.add(scratch, f.mul(me, self.scratch))
        cotangents = f.add(planes, self._floats[0] * self.lanes * _FLOAT)
        with f.loop(0, self.sums, self.lanes * _FLOAT) as place:
            f.store(f.zero, f.add(sums, place.index))
        start, end = f.share(f.div(f.add(samples, self.lanes - 1), self.lanes))
        with f.loop(start, end) as group:
            rows = rows_of(f, group.index, samples, self.lanes)
            gathered(f, x, rows, planes, self._floats[0])
            gathered(f, dy, rows, cotangents, self._floats[1])
            self._cleared(f, planes, f.sub(samples, f.mul(group.index, self.lanes)))
            self._group(f, planes, cotangents, sums)
        return f.text()

    def _cleared(self, f: Function, planes: str, count: str) -> None:
        """Let lanes of x and dy from the `count`th on be 0: samples that are not there."""
        with f.when(f.value(f"icmp slt i64 {count}, {self.lanes}")):
            there = f.first_lanes(count)
            with f.loop(0, self.scratch, self.lanes * _FLOAT) as place:
                at = f.add(planes, place.index)
                f.store(f.pick(there, f.load(at), f.zero), at)

    def _group(self, f: Function, x: str, dy: str, sums: str) -> None:
        """Add what one group of samples gives."""
        layer, vector = self.layer, self.lanes * _FLOAT
        (down, across), channels = layer.kernel, layer.channels
        tile = self.filters * across * vector
        biases = f.add(sums, layer.filters * channels * down * across * vector)
        with f.loop(0, layer.filters, self.filters) as first:
            cotangents = f.add(dy, f.mul(first.index, vector))
            self._bias(f, cotangents, f.add(biases, f.mul(first.index, vector)))
            block = f.add(sums, f.mul(first.index, channels * down * across * vector))
            with f.loop(0, channels) as channel:
                planes = f.add(x, f.mul(channel.index, vector))
                with f.loop(0, down) as tap:
                    turn = f.add(f.mul(channel.index, down), tap.index)
                    self._row(f, planes, cotangents, f.add(block, f.mul(turn, tile)), tap.index)

    def _bias(self, f: Function, dy: str, sums: str) -> None:
        layer, vector = self.layer, self.lanes * _FLOAT
        before = [f.load(sums, q * vector) for q in range(self.filters)]
        step = layer.filters * vector
        with f.loop(0, prod(layer.convolved) * step, step, carried=before) as place:
            at = f.add(dy, place.index)
            place.following = [
                f.vadd(value, f.load(at, q * vector)) for q, value in enumerate(place.carried)
            ]
        for q, value in enumerate(place.carried):
            f.store(value, sums, q * vector)

    def _row(self, f: Function, x: str, dy: str, sums: str, tap: str) -> None:
        """The sums of one row of taps, over all output positions."""
        layer, vector = self.layer, self.lanes * _FLOAT
        count = self.filters * layer.kernel[1]
        before = [f.load(sums, n * vector) for n in range(count)]
        shift = f.sub(layer.begin[0], tap)  # the first row is the least i with i s >= p - u
        down, most = layer.stride[0], layer.convolved[0]
        first = f.div(f.add(f.most(shift, 0), down - 1), down)
        end = f.div(f.most(f.add(shift, layer.size[0] - 1 + down), 0), down)
        with f.loop(first, f.least(end, most), carried=before) as row:
            here = f.sub(f.mul(row.index, down), shift)
            xs = f.add(x, f.mul(here, layer.size[1] * layer.channels * vector))
            ys = f.add(dy, f.mul(row.index, layer.convolved[1] * layer.filters * vector))
            values = row.carried
            for column, turns, taps in self._columns():
                move = (column * layer.stride[1] - layer.begin[1]) * layer.channels * vector
                at, there = f.add(xs, move), f.add(ys, column * layer.filters * vector)
                if turns == 1:
                    values = self._products(f, at, there, taps, values)
                    continue
                with f.loop(0, turns, carried=values) as turn:
                    step = layer.stride[1] * layer.channels * vector
                    turn.following = self._products(
                        f, f.add(at, f.mul(turn.index, step)),
                        f.add(there, f.mul(turn.index, layer.filters * vector)),
                        taps, turn.carried,
                    )  # fmt: skip
                values = turn.carried
            row.following = values
        for n, value in enumerate(row.carried):
            f.store(value, sums, n * vector)

    def _columns(self) -> Iterator[tuple[int, int, range]]:
        """(first column, columns like it, its taps in x) along a row."""
        taps = [self.layer.inside(1, column) for column in range(self.layer.convolved[1])]
        column = 0
        for valid, equal in groupby(taps):
            turns = len(list(equal))
            yield column, turns, valid
            column += turns

    def _products(self, f: Function, x: str, dy: str, taps: range, values: list[str]) -> list[str]:
        """What one output position gives."""
        across, vector = self.layer.kernel[1], self.lanes * _FLOAT
        found = list(values)
        cells = {v: f.load(x, v * self.layer.channels * vector) for v in taps}
        for q in range(self.filters):
            cotangent = f.load(dy, q * vector)
            for v, cell in cells.items():
                found[q * across + v] = f.fma(cotangent, cell, found[q * across + v])
        return found

    # -- results -------------------------------------------------------------------------------

    def finish(self, threads: int, *, bias: bool) -> str:
        """`kernel(sums, dW, db)`: the totals of lanes and threads; dW is [K, C, kh, kw]."""
        f = Function(["sums", "weights", "biases"], lanes=self.lanes)
        sums, weights, biases = f.arguments
        layer, vector = self.layer, self.lanes * _FLOAT
        across, taps = layer.kernel[1], layer.channels * prod(layer.kernel)

        def total(place: str, offset: int) -> str:
            values = [f.load(place, offset + n * self.sums) for n in range(threads)]
            while len(values) > 1:
                values = [f.vadd(values[0], values[1]), *values[2:]]
            return f.lane_sum(values[0])

        start, end = f.share(layer.filters // self.filters)
        with f.loop(start, end) as block:
            first = f.mul(block.index, self.filters)
            tiles = f.add(sums, f.mul(first, taps * vector))
            with f.loop(0, layer.channels * layer.kernel[0]) as line:
                tile = f.add(tiles, f.mul(line.index, self.filters * across * vector))
                place = f.add(f.mul(first, taps), f.mul(line.index, across))
                out = f.add(weights, f.mul(place, _FLOAT))
                with f.loop(0, self.filters) as number:
                    row = f.add(tile, f.mul(number.index, across * vector))
                    target = f.add(out, f.mul(number.index, taps * _FLOAT))
                    for v in range(across):
                        f.store_scalar(total(row, v * vector), target, v * _FLOAT)
            if bias:
                row = f.add(sums, f.mul(f.add(first, layer.filters * taps), vector))
                for q in range(self.filters):
                    target = f.add(biases, f.mul(first, _FLOAT))
                    f.store_scalar(total(row, q * vector), target, q * _FLOAT)
        return f.text()
