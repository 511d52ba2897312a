"""3x3 convolutions of stride 1 by Winograd's algorithm F(4x4, 3x3), channels last.

A tile of 4x4 results needs a patch d of 6x6 elements of each channel. With the polynomials that are
0 at all but one of the points 0, a, -a, b, -b and infinity (Cook and Toom; Winograd 1980; Lavin and
Gray, "Fast Algorithms for Convolutional Neural Networks", 2016),

    y = A' [ sum_c (G w G') * (B' d B) ] A            36 products where the sum itself takes 144

where ' transposes, * is element by element, and with N(p) = product of p - q over other points q

    B'   0    d4 - (a^2 + b^2) d2 + a^2 b^2 d0        G    0    w0 / N(0)
        +-a   (d4 - b^2 d2) +- a (d3 - b^2 d1)            +-a   (w0 +- a w1 + a^2 w2) / N(a)
        +-b   (d4 - a^2 d2) +- b (d3 - a^2 d1)            +-b   (w0 +- b w1 + b^2 w2) / N(b)
        inf   d5 - (a^2 + b^2) d3 + a^2 b^2 d1            inf   w2

    A'  y_i = e(0) 0^i + a^i (e(a) + (-1)^i e(-a)) + b^i (e(b) + (-1)^i e(-b)) + [i = 3] e(inf)

a = 5/8 and b = 3/2 and their powers are exact in float32, and near the points of least error, about
twice that of the sum itself (a = 1, b = 2: six times; Barabasz et al., "Error analysis and
improving the accuracy of Winograd convolution", 2020).

The gradient in the input is the convolution with the weights turned by 180 degrees and transposed.
That in the weights is the adjoint of the formula above:

    dw = G' [ sum_tiles (A dy A') * (B' d B) ] G

Between the transforms are 36 products of matrices, tiles x channels by channels x filters (for dw:
channels x tiles by tiles x filters). Where there are many tiles each thread takes its own blocks,
so small that patches and sums stay in its cache. Few tiles are one block, on which all threads work
together: first on its tiles, then on the 36 products, then on its tiles again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from branchgraph.codegen.assembly import Function, Loop

_A, _B = 5 / 8, 3 / 2
_AA, _BB = _A * _A, _B * _B
#: 1 / N at 0, a and b.
_N0, _NA, _NB = 1 / (_AA * _BB), 0.5 / (_AA * (_AA - _BB)), 0.5 / (_BB * (_BB - _AA))

#: Results and elements of a tile, along an axis.
TILE, PATCH = 4, 6
_POINTS = PATCH * PATCH
#: What patches and sums of a block of tiles may take of a thread's second-level cache.
_CACHE = 400_000
#: Weights of more bytes are read from afar for each block, which then has at least so many tiles.
_NEAR, _FAR_TILES = 1_000_000, 96
#: What they may take of the caches of all threads, if those work on one block.
_SHARED = 1_500_000


@dataclass(frozen=True)
class Geometry:
    """A convolution of [N, *size, channels] to [N, *out, filters]."""

    channels: int
    filters: int
    #: Height and width of the input and of the result.
    size: tuple[int, int]
    out: tuple[int, int]
    #: Zeros above and left of the input.
    pad: tuple[int, int]
    lanes: int

    @property
    def rows(self) -> int:
        """Tiles down an image."""
        return -(-self.out[0] // TILE)

    @property
    def columns(self) -> int:
        """Tiles across an image."""
        return -(-self.out[1] // TILE)

    @property
    def tiles(self) -> int:
        """Tiles of an image."""
        return self.rows * self.columns

    def padded(self, size: int) -> int:
        """`size` rounded up to whole vectors."""
        return -(-size // self.lanes) * self.lanes

    @property
    def vectors(self) -> int:
        """Vectors of filters whose sums are in registers at a time."""
        whole = self.padded(self.filters) // self.lanes
        return next(q for q in (4, 2, 1) if whole % q == 0)

    @property
    def slab(self) -> int:
        """Bytes of the transformed weights of a point, [panels, channels, filters of a panel]."""
        return _skewed(self.channels * self.padded(self.filters) * 4)

    @property
    def packed(self) -> int:
        """Bytes of transformed weights."""
        return _POINTS * self.slab


def _skewed(nbytes: int) -> int:
    """At least `nbytes`, so that what lies so far apart 36 times is not in one set of a cache."""
    lines = -(-nbytes // 64)
    return 64 * (lines + 1 - lines % 2)


@dataclass(frozen=True)
class Work:
    """How a convolution's tiles are worked on."""

    #: Tiles whose sums are in registers at a time.
    rows: int
    #: Tiles whose patches and sums are in memory at a time.
    block: int
    #: Whether all threads work on one block.
    together: bool
    threads: int

    def scratch(self, geometry: Geometry) -> int:
        """Bytes that `forward` needs beside its operands."""
        return _scratch(geometry, self.block) * (1 if self.together else self.threads)

    def sums(self, geometry: Geometry) -> int:
        """Bytes that `weight_gradient` needs beside those."""
        return geometry.packed * (1 if self.together else self.threads)


def _scratch(g: Geometry, block: int) -> int:
    """Bytes of zeros for a pixel, of patches, and of sums of a block."""
    channels, filters = g.padded(g.channels), g.padded(g.filters)
    rows = _skewed(block * channels * 4) + _skewed(block * filters * 4)
    return max(channels, filters) * 4 + _POINTS * rows


def work(geometry: Geometry, images: int, threads: int) -> Work:
    """The way that suits `images` images; it is the same for most numbers of them."""
    g = geometry
    tiles = 4
    while tiles < images * g.tiles:
        tiles *= 2
    if _scratch(g, tiles) <= _SHARED:
        rows = min({1: 16, 2: 8, 4: 4}[g.vectors] * g.lanes // 16, tiles)
        return Work(rows, tiles, together=True, threads=threads)
    rows = {1: 16, 2: 8, 4: 6}[g.vectors] * g.lanes // 16
    near = _CACHE // _scratch(g, rows)
    block = max(near, 2 if g.packed < _NEAR else _FAR_TILES // rows) * rows
    return Work(rows, block, together=False, threads=threads)


# -- transforms along one axis -----------------------------------------------------------------


def _patch(f: Function, d: Sequence[str]) -> list[str]:
    """B' d."""
    c = f.constant
    even_a, odd_a = f.fma(d[2], c(-_BB), d[4]), f.fma(d[1], c(-_BB), d[3])
    even_b, odd_b = f.fma(d[2], c(-_AA), d[4]), f.fma(d[1], c(-_AA), d[3])
    return [
        f.fma(d[2], c(-_AA - _BB), f.fma(d[0], c(_AA * _BB), d[4])),
        f.fma(odd_a, c(_A), even_a),
        f.fma(odd_a, c(-_A), even_a),
        f.fma(odd_b, c(_B), even_b),
        f.fma(odd_b, c(-_B), even_b),
        f.fma(d[3], c(-_AA - _BB), f.fma(d[1], c(_AA * _BB), d[5])),
    ]


def _result(f: Function, e: Sequence[str]) -> list[str]:
    """A' e."""
    c = f.constant
    even_a, odd_a = f.vadd(e[1], e[2]), f.vsub(e[1], e[2])
    even_b, odd_b = f.vadd(e[3], e[4]), f.vsub(e[3], e[4])
    return [
        f.vadd(e[0], f.vadd(even_a, even_b)),
        f.fma(odd_b, c(_B), f.vmul(odd_a, c(_A))),
        f.fma(even_b, c(_BB), f.vmul(even_a, c(_AA))),
        f.fma(odd_b, c(_B * _BB), f.fma(odd_a, c(_A * _AA), e[5])),
    ]


def _result_adjoint(f: Function, y: Sequence[str]) -> list[str]:
    """A y."""
    c = f.constant
    even_a, odd_a = f.fma(y[2], c(_AA), y[0]), f.fma(y[3], c(_A * _AA), f.vmul(y[1], c(_A)))
    even_b, odd_b = f.fma(y[2], c(_BB), y[0]), f.fma(y[3], c(_B * _BB), f.vmul(y[1], c(_B)))
    return [
        y[0], f.vadd(even_a, odd_a), f.vsub(even_a, odd_a),
        f.vadd(even_b, odd_b), f.vsub(even_b, odd_b), y[3],
    ]  # fmt: skip


def _weight(f: Function, w: Sequence[str]) -> list[str]:
    """G w."""
    c = f.constant
    even_a, odd_a = f.fma(w[2], c(_AA), w[0]), f.vmul(w[1], c(_A))
    even_b, odd_b = f.fma(w[2], c(_BB), w[0]), f.vmul(w[1], c(_B))
    return [
        f.vmul(w[0], c(_N0)),
        f.vmul(f.vadd(even_a, odd_a), c(_NA)),
        f.vmul(f.vsub(even_a, odd_a), c(_NA)),
        f.vmul(f.vadd(even_b, odd_b), c(_NB)),
        f.vmul(f.vsub(even_b, odd_b), c(_NB)),
        w[2],
    ]


def _weight_adjoint(f: Function, u: Sequence[str]) -> list[str]:
    """G' u."""
    c = f.constant
    even_a, odd_a = f.vmul(f.vadd(u[1], u[2]), c(_NA)), f.vmul(f.vsub(u[1], u[2]), c(_NA))
    even_b, odd_b = f.vmul(f.vadd(u[3], u[4]), c(_NB)), f.vmul(f.vsub(u[3], u[4]), c(_NB))
    return [
        f.fma(u[0], c(_N0), f.vadd(even_a, even_b)),
        f.fma(odd_b, c(_B), f.vmul(odd_a, c(_A))),
        f.fma(even_b, c(_BB), f.fma(even_a, c(_AA), u[5])),
    ]


_Transform = Callable[[Function, Sequence[str]], list[str]]


def _both_axes(
    f: Function, transform: _Transform, grid: Sequence[Sequence[str]]
) -> list[list[str]]:
    """A transform down the columns of a grid of vectors, then along its rows."""
    down = [transform(f, column) for column in zip(*grid)]
    return [transform(f, row) for row in zip(*down)]


# -- weights -----------------------------------------------------------------------------------


def pack(geometry: Geometry, turned: bool) -> str:
    """(weights, packed): weights [filters, channels, 3, 3], transformed for `forward`.

    `turned`: the weights are those of the convolution whose gradient in the input is wanted, which
    are [channels, filters, 3, 3] in terms of `geometry`.
    """
    g = geometry
    f = Function(["weights", "packed"], lanes=g.lanes)
    weights, packed = f.arguments
    own, other = (9 * 4, 9 * g.filters * 4) if turned else (9 * g.channels * 4, 9 * 4)
    across = g.vectors * g.lanes
    start, end = f.share(g.channels)
    with f.loop(start, end) as row:
        source = f.add(weights, f.mul(row.index, other))
        target = f.add(packed, f.mul(row.index, across * 4))

        def vector(lane: str, used: int | None) -> None:
            corner = f.add(source, f.mul(lane, own))
            taps = [f.gather(corner, own, 4 * tap, used) for tap in range(9)]
            taps = taps[::-1] if turned else taps
            grid = _both_axes(f, _weight, [taps[r : r + 3] for r in (0, 3, 6)])
            panel = f.mul(f.div(lane, across), g.channels * across * 4)
            place = f.add(f.add(target, panel), f.mul(f.rem(lane, across), 4))
            for number, value in enumerate(v for line in grid for v in line):
                f.store(value, place, number * g.slab)

        _over_vectors(f, g, g.filters, vector)
    return f.text()


def _unpack(f: Function, g: Geometry, sums: str, gradient: str, parts: int) -> None:
    """Sums [parts, 36, channels, filters] to the gradient [filters, channels, 3, 3]."""
    width = g.padded(g.filters) * 4
    start, end = f.share(g.channels)
    with f.loop(start, end) as row:
        source = f.add(sums, f.mul(row.index, width))
        target = f.add(gradient, f.mul(row.index, 9 * 4))

        def vector(lane: str, used: int | None) -> None:
            place = f.add(source, f.mul(lane, 4))
            points = [_total(f, g, place, n * g.slab, parts) for n in range(_POINTS)]
            grid = [points[i : i + PATCH] for i in range(0, _POINTS, PATCH)]
            taps = [v for line in _both_axes(f, _weight_adjoint, grid) for v in line]
            corner = f.add(target, f.mul(lane, 9 * g.channels * 4))
            for tap, value in enumerate(taps):
                f.scatter(value, corner, 9 * g.channels * 4, 4 * tap, used)

        _over_vectors(f, g, g.filters, vector)


def _total(f: Function, g: Geometry, place: str, offset: int, parts: int) -> str:
    value = f.load(place, offset)
    for other in range(1, parts):
        value = f.vadd(value, f.load(place, offset + other * g.packed))
    return value


def _over_vectors(
    f: Function, g: Geometry, size: int, body: Callable[[str, int | None], None]
) -> None:
    """`body(first element, lanes used)` for every vector of `size` elements."""
    whole = size // g.lanes * g.lanes
    if whole:
        with f.loop(0, whole, g.lanes) as loop:
            body(loop.index, None)
    if size > whole:
        body(f.add(whole, 0), size - whole)


# -- tiles -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """Where a tile lies: its image, and its first row and column of results."""

    image: str
    row: str
    column: str


def _tile(f: Function, g: Geometry, number: str) -> _Tile:
    image, rest = f.div(number, g.tiles), f.rem(number, g.tiles)
    row, column = f.div(rest, g.columns), f.rem(rest, g.columns)
    return _Tile(image, f.mul(row, TILE), f.mul(column, TILE))


def _corners(
    f: Function, base: str, shape: tuple[int, int, int], tile: _Tile, shift: tuple[int, int],
    side: int, zeros: str,
) -> list[list[str]]:  # fmt: skip
    """Addresses of side x side pixels from the tile's first one, moved up and left by `shift`.

    Pixels outside the image of `shape` (height, width, channels) are found at `zeros`.
    """
    height, width, channels = shape
    row, column = f.sub(tile.row, shift[0]), f.sub(tile.column, shift[1])
    down = [f.within(f.add(row, i), height) for i in range(side)]
    across = [f.within(f.add(column, j), width) for j in range(side)]
    pixel = f.add(f.mul(f.add(f.mul(tile.image, height), row), width), column)
    first = f.add(base, f.mul(pixel, channels * 4))
    return [
        [
            f.choose(
                f.both(down[i], across[j]), f.add(first, (i * width + j) * channels * 4), zeros
            )
            for j in range(side)
        ]
        for i in range(side)
    ]


def _transformed(
    f: Function, g: Geometry, size: int, at: list[list[str]], transform: _Transform, target: str,
    slab: int,
) -> None:  # fmt: skip
    def vector(lane: str, used: int | None) -> None:
        offset = f.mul(lane, 4)
        pixels = [[f.load(f.add(a, offset), 0, used) for a in line] for line in at]
        place = f.add(target, offset)
        values = (v for line in _both_axes(f, transform, pixels) for v in line)
        for number, value in enumerate(values):
            f.store(value, place, number * slab)

    _over_vectors(f, g, size, vector)


# -- blocks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scratch:
    """Where a thread keeps what is between the transforms."""

    zeros: str
    #: [36, block, channels] and [36, block, filters].
    patches: str
    sums: str


class _Writer:
    """What `forward` and `weight_gradient` have in common."""

    def __init__(self, geometry: Geometry, work: Work, arguments: Sequence[str]) -> None:
        self.geometry, self.work = geometry, work
        self.f = Function(arguments, lanes=geometry.lanes)
        #: Bytes of a row of patches, and of sums; and of all rows of a block.
        self.width = geometry.padded(geometry.channels) * 4
        self.filters = geometry.padded(geometry.filters) * 4
        self.patch_slab = _skewed(work.block * self.width)
        self.sum_slab = _skewed(work.block * self.filters)

    def scratch(self, start: str) -> _Scratch:
        """Parts of the scratch memory; the zeros are written."""
        f = self.f
        if not self.work.together:
            start = f.add(start, f.mul(f.thread(), _scratch(self.geometry, self.work.block)))
        longest = max(self.width, self.filters)
        with f.loop(0, longest, f.lanes * 4) as loop:
            f.store(f.zero, f.add(start, loop.index))
        patches = f.add(start, longest)
        return _Scratch(start, patches, f.add(patches, _POINTS * self.patch_slab))

    @contextmanager
    def blocks(self, images: str) -> Iterator[tuple[str, str]]:
        """(first tile, number of tiles) of each block of this thread, or of all of them."""
        f, tiles = self.f, self.f.mul(images, self.geometry.tiles)
        if self.work.together:
            yield f.add(0, 0), tiles
            return
        start, end = f.share(tiles, self.work.rows)
        with f.loop(start, end, self.work.block) as block:
            yield block.index, f.least(f.sub(end, block.index), self.work.block)

    def each(self, count: str | int) -> AbstractContextManager[Loop]:
        """A loop over `count` things of a block; those of this thread if all share the block."""
        if self.work.together:
            return self.f.loop(*self.f.share(count))
        return self.f.loop(0, count)

    def meet(self) -> None:
        """Wait for the others if they work on the same block."""
        if self.work.together:
            self.f.barrier()

    def transform_patches(self, x: str, first: str, one: str, scratch: _Scratch) -> None:
        """B' d B of tile `first + one`, for all channels."""
        f, g = self.f, self.geometry
        tile = _tile(f, g, f.add(first, one))
        at = _corners(f, x, (*g.size, g.channels), tile, g.pad, PATCH, scratch.zeros)
        target = f.add(scratch.patches, f.mul(one, self.width))
        _transformed(f, g, g.channels, at, _patch, target, self.patch_slab)


# -- forward -----------------------------------------------------------------------------------

#: What may follow the bias: `relu`; `add` of a tensor of the result's shape; `mask`, which leaves
#: the value where such a tensor is positive, and 0 elsewhere.
EPILOGUE = ("relu", "add", "mask")


def forward(geometry: Geometry, work: Work, bias: bool, epilogue: Sequence[str] = ()) -> str:
    """(x, packed, y, scratch, images, bias if any, operands...): with what follows it."""
    added = ["bias"] * bias + [f"operand {k}" for k, n in enumerate(epilogue) if n != "relu"]
    writer = _Writer(geometry, work, ["x", "packed", "y", "scratch", "images", *added])
    f, g = writer.f, geometry
    x, packed, y, start, images, *operands = f.arguments
    bias_at = operands.pop(0) if bias else None
    scratch = writer.scratch(start)
    with writer.blocks(images) as (first, count):
        with writer.each(count) as one:
            writer.transform_patches(x, first, one.index, scratch)
        writer.meet()
        with writer.each(_POINTS) as point:
            _product(
                writer,
                f.add(scratch.patches, f.mul(point.index, writer.patch_slab)),
                f.add(packed, f.mul(point.index, g.slab)),
                f.add(scratch.sums, f.mul(point.index, writer.sum_slab)),
                count,
            )
        writer.meet()
        with writer.each(count) as one:
            tile = _tile(f, g, f.add(first, one.index))
            source = f.add(scratch.sums, f.mul(one.index, writer.filters))
            _results(writer, source, tile, y, bias_at, epilogue, operands)
    return f.text()


def _product(writer: _Writer, rows: str, matrix: str, result: str, count: str) -> None:
    """[count, channels] times [channels, filters], a panel of filters at a time."""
    f, work, vectors = writer.f, writer.work, writer.geometry.vectors
    vector, channels = f.lanes * 4, writer.geometry.channels
    panel = vectors * vector
    with f.loop(0, writer.filters, panel) as column, f.loop(0, count, work.rows) as row:
        left = f.add(rows, f.mul(row.index, writer.width))
        right = f.add(matrix, f.mul(column.index, channels))
        zeros = [f.zero] * (work.rows * vectors)
        with f.loop(0, channels, carried=zeros) as channel:
            line = f.add(right, f.mul(channel.index, panel))
            weights = [f.load(line, k * vector) for k in range(vectors)]
            element = f.add(left, f.mul(channel.index, 4))
            for r in range(work.rows):
                one = f.spread(f.load_scalar(element, r * writer.width))
                for k, weight in enumerate(weights):
                    channel.following.append(f.fma(one, weight, channel.carried[r * vectors + k]))
        place = f.add(f.add(result, f.mul(row.index, writer.filters)), column.index)
        for r in range(work.rows):
            for k in range(vectors):
                value = channel.carried[r * vectors + k]
                f.store(value, place, r * writer.filters + k * vector)


def _results(
    writer: _Writer, source: str, tile: _Tile, y: str, bias: str | None,
    epilogue: Sequence[str], operands: Sequence[str],
) -> None:  # fmt: skip
    """A' e A of a tile, and what follows, for all filters."""
    f, g, slab = writer.f, writer.geometry, writer.sum_slab
    pixel = f.add(f.mul(f.add(f.mul(tile.image, g.out[0]), tile.row), g.out[1]), tile.column)
    first = f.mul(pixel, g.filters * 4)

    def vector(lane: str, used: int | None) -> None:
        offset = f.mul(lane, 4)
        place = f.add(source, offset)
        grid = [[f.load(place, (i * PATCH + j) * slab) for j in range(PATCH)] for i in range(PATCH)]
        values = _both_axes(f, _result, grid)
        added = None if bias is None else f.load(f.add(bias, offset), 0, used)
        target = f.add(first, offset)
        for i in range(TILE):
            for j in range(TILE):
                step = (i * g.out[1] + j) * g.filters * 4

                def write(value: str = values[i][j], step: int = step) -> None:
                    if added is not None:
                        value = f.vadd(value, added)
                    value = _followed(f, value, epilogue, operands, target, step, used)
                    f.store(value, f.add(y, target), step, used)

                _where_inside(f, g, tile, i, j, write)

    _over_vectors(f, g, g.filters, vector)


def _followed(
    f: Function, value: str, epilogue: Sequence[str], operands: Sequence[str], target: str,
    step: int, used: int | None,
) -> str:  # fmt: skip
    given = iter(operands)
    for name in epilogue:
        if name == "relu":
            value = f.relu(value)
        else:
            other = f.load(f.add(next(given), target), step, used)
            value = f.vadd(value, other) if name == "add" else f.where_positive(other, value)
    return value


def _where_inside(
    f: Function, g: Geometry, tile: _Tile, i: int, j: int, write: Callable[[], None]
) -> None:
    """`write` for pixel (i, j) of a tile unless it lies beyond the results."""
    conditions = []
    if g.out[0] % TILE and i:
        conditions.append(f.within(f.add(tile.row, i), g.out[0]))
    if g.out[1] % TILE and j:
        conditions.append(f.within(f.add(tile.column, j), g.out[1]))
    if not conditions:
        write()
        return
    inside = conditions[0] if len(conditions) == 1 else f.both(*conditions)
    with f.when(inside):
        write()


# -- the gradient in the weights ---------------------------------------------------------------


def weight_gradient(geometry: Geometry, work: Work) -> str:
    """(x, dy, gradient, sums, scratch, images): gradient [filters, channels, 3, 3]."""
    writer = _Writer(geometry, work, ["x", "dy", "gradient", "sums", "scratch", "images"])
    f, g = writer.f, geometry
    x, dy, gradient, sums, start, images = f.arguments
    scratch = writer.scratch(start)
    own = sums if work.together else f.add(sums, f.mul(f.thread(), g.packed))
    if not work.together:
        _clear_sums(f, g, work, sums)
    with writer.blocks(images) as (first, count):
        with writer.each(count) as one:
            writer.transform_patches(x, first, one.index, scratch)
            tile = _tile(f, g, f.add(first, one.index))
            at = _corners(f, dy, (*g.out, g.filters), tile, (0, 0), TILE, scratch.zeros)
            target = f.add(scratch.sums, f.mul(one.index, writer.filters))
            _transformed(f, g, g.filters, at, _result_adjoint, target, writer.sum_slab)
        writer.meet()
        with writer.each(_POINTS) as point:
            _outer_product(
                writer,
                f.add(scratch.patches, f.mul(point.index, writer.patch_slab)),
                f.add(scratch.sums, f.mul(point.index, writer.sum_slab)),
                f.add(own, f.mul(point.index, g.slab)),
                count,
            )
    f.barrier()
    _unpack(f, g, sums, gradient, 1 if work.together else work.threads)
    return f.text()


def _clear_sums(f: Function, g: Geometry, work: Work, sums: str) -> None:
    """Each thread its own, and those of threads that OpenMP did not give."""
    with f.loop(f.thread(), work.threads, f.threads()) as thread:
        place = f.add(sums, f.mul(thread.index, g.packed))
        with f.loop(0, g.packed, f.lanes * 4) as loop:
            f.store(f.zero, f.add(place, loop.index))


def _outer_product(writer: _Writer, left: str, right: str, sums: str, count: str) -> None:
    """[count, channels]' times [count, filters], added to the sums of a thread's earlier blocks."""
    channels, most = writer.geometry.channels, writer.work.rows
    whole = channels // most * most
    if whole:
        with writer.f.loop(0, whole, most) as row:
            _outer_rows(writer, left, right, sums, count, row.index, most)
    if channels > whole:
        first = writer.f.add(whole, 0)
        _outer_rows(writer, left, right, sums, count, first, channels - whole)


def _outer_rows(
    writer: _Writer, left: str, right: str, sums: str, count: str, first: str, number: int
) -> None:
    """Those of `number` channels."""
    f, filters, vectors = writer.f, writer.filters, writer.geometry.vectors
    vector = f.lanes * 4
    places = [(r, k) for r in range(number) for k in range(vectors)]
    with f.loop(0, filters, vectors * vector) as column:
        place = f.add(f.add(sums, f.mul(first, filters)), column.index)
        before = [f.zero] * len(places)
        if not writer.work.together:
            before = [f.load(place, r * filters + k * vector) for r, k in places]
        element = f.add(left, f.mul(first, 4))
        line = f.add(right, column.index)
        with f.loop(0, count, carried=before) as tile:
            at = f.add(line, f.mul(tile.index, filters))
            others = [f.load(at, k * vector) for k in range(vectors)]
            here = f.add(element, f.mul(tile.index, writer.width))
            for r in range(number):
                one = f.spread(f.load_scalar(here, r * 4))
                for k, other in enumerate(others):
                    tile.following.append(f.fma(one, other, tile.carried[r * vectors + k]))
        for value, (r, k) in zip(tile.carried, places):
            f.store(value, place, r * filters + k * vector)
