"""Convolutions of few channels, with the pooling and the layers behind them (`codegen.direct`).

oneDNN's kernels have vectors of channels, and five, ten or twenty fill sixteen lanes badly. In
inference a convolution takes along what only it feeds: ReLU, max pooling whose windows lie side by
side, and further convolutions of the kind. What is taken along is marked as done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from math import inf, prod

from branchgraph.backends.onednn import library
from branchgraph.backends.onednn.clusters import Cluster
from branchgraph.backends.onednn.kernels import layers
from branchgraph.backends.onednn.kernels.common import arranged, fpmath
from branchgraph.backends.onednn.plan import Kernel, Place, Site, Step
from branchgraph.backends.onednn.tensors import Tensor
from branchgraph.codegen import direct, engine
from branchgraph.codegen.direct import Chain, Layer
from branchgraph.codegen.direct_gradient import Gradient
from branchgraph.compiler.program import Instruction
from branchgraph.ir.ops.activation import Relu
from branchgraph.ir.ops.conv import Conv, ConvTranspose, ConvWeightGradient
from branchgraph.ir.ops.pool import MaxPool
from branchgraph.ir.types import DType

#: Most vectors of filters, all of which are computed together where lanes are filters.
_MOST_VECTORS = 4
#: What share of the other kernels' time must be left over.
_GAIN = 0.9
#: Cycles to pack weights that change from run to run, besides 8 for each.
_PACKING = 20_000


@dataclass(frozen=True)
class _Link:
    """A layer, the instructions it carries out, and its weight and bias."""

    layer: Layer
    members: tuple[Instruction, ...]
    parameters: tuple[Tensor, ...]
    #: Whether the weight is that of the layer whose data gradient this is.
    turned: bool = False


def convolutions(site: Site) -> bool:
    """A convolution of few channels, and what may go with it."""
    if engine.missing() or fpmath(site) != "strict" or not isinstance(site.op, Conv):
        return False
    return _taken(site, _links(site))


def data_gradient(site: Site) -> bool:
    """The gradient of a convolution of stride 1 in its input.

        dx[c, i] = sum_{k, u} W[k, c, u] dy[k, i + p - u]

    is a convolution of dy with W turned about, W'[c, k, u] = W[k, c, kh - 1 - u], and with the pad
    kh - 1 - p (rows; the columns alike).
    """
    op = site.op
    if engine.missing() or fpmath(site) != "strict" or not isinstance(op, ConvTranspose):
        return False
    dy, weight = site.inputs
    size = site.shape(site.first.writes[0])
    if len(size) != 4 or not _plain(op, dy, weight) or max(op.stride) > 1 or 0 in size:
        return False
    if not weight.row_major:
        return False
    filters, channels, *kernel = weight.shape
    begin = [k - 1 - p for k, p in zip(kernel, op.begin)]
    end = [n + k - 1 - d - b for n, k, d, b in zip(size[2:], kernel, dy.shape[2:], begin)]
    if min(*begin, *end) < 0:
        return False
    layer = Layer(
        filters, channels, (dy.shape[2], dy.shape[3]), (kernel[0], kernel[1]),
        begin=(begin[0], begin[1]), end=(end[0], end[1]),
    )  # fmt: skip
    link = _Link(layer, site.cluster.members, (weight,), turned=True)
    return _taken(site, [link])


def weight_gradient(site: Site) -> bool:
    """The gradient of a convolution in its weight, and in its bias where that is asked for."""
    op = site.op
    if engine.missing() or fpmath(site) != "strict" or not isinstance(op, ConvWeightGradient):
        return False
    x, dy = site.inputs
    buffer, sums = site.first.writes[0], layers.bias_gradient(site)
    outputs = (buffer,) if sums is None else (buffer, sums.writes[0])
    if not _plain(op, x, dy) or any(site.builder.dtype(b) is not DType.F32 for b in outputs):
        return False
    filters, channels, *kernel = site.shape(buffer)
    layer = Layer(
        channels, filters, (x.shape[2], x.shape[3]), (kernel[0], kernel[1]),
        (op.stride[0], op.stride[1]), (op.begin[0], op.begin[1]), (op.end[0], op.end[1]),
    )  # fmt: skip
    count, threads = x.shape[0], library.threads()
    found = Gradient.best(layer, engine.lanes(), count, threads)
    other = _library_gradient(layer) * count / threads
    if found is None or found.cycles(count, threads) > _GAIN * other:
        return False
    out = [site.output(b) for b in outputs]
    if sums is not None:
        site.builder.done.add(sums.writes[0])
    _run_gradient(site, found, arranged(site, x), arranged(site, dy), out, threads)
    return True


def _library_gradient(layer: Layer) -> float:
    """Cycles of oneDNN's weight gradient for a sample, by what was measured.

    It has vectors of 8 filters where these are no multiple of 16, sums up products with padding,
    and has a kernel of its own for one channel, which takes twice as long; where they are a
    multiple, it is as fast as what is here.
    """
    if layer.filters % 16 == 0:
        return 0
    vectors = -(-layer.filters // 8) / 2
    taps = layer.channels * prod(layer.kernel)
    return prod(layer.convolved) * vectors * taps * (1 + 1 / layer.channels**2)


def _taken(site: Site, found: Iterable[_Link]) -> bool:
    """Whether the first layers of `found` are faster here; then there is a kernel for them."""
    count, threads = site.shape(site.first.reads[0])[0], library.threads()
    links = list(takewhile(lambda link: _pays(site, link, count, threads), found))
    if not links:
        return False
    chain = Chain.best([link.layer for link in links], engine.lanes(), count, threads)
    _run(site, links, chain, min(threads, -(-count // chain.lanes)))
    return True


def _plain(op: Conv | ConvTranspose | ConvWeightGradient, *tensors: Tensor) -> bool:
    """Whether a convolution is of the kind here; `tensors` are what it reads."""
    if len(op.stride) != 2 or op.groups != 1 or op.dilation != (1, 1) or op.symbolic:
        return False
    return all(t.dtype is DType.F32 and t.size for t in tensors)


def _pays(site: Site, link: _Link, count: int, threads: int) -> bool:
    """Whether a layer is faster here than with other kernels."""
    layer, lanes = link.layer, engine.lanes()
    if layer.filters > _MOST_VECTORS * lanes:
        return False
    weight = link.parameters[0]
    packing = 0 if site.builder.fixed(weight) else _PACKING + 8 * weight.size
    here = Chain.best([layer], lanes, count, threads).cycles(count, threads) + packing
    other = min(_library(layer, lanes), _winograd(layer, lanes)) * count / threads
    return here < _GAIN * other


def _library(layer: Layer, lanes: int) -> float:
    """Cycles of oneDNN's convolution for a sample, by what was measured.

    Up to three channels it sums up all taps, those in the padding too, and starts and stores every
    sum, which counts like six taps. With more it is a product of matrices for each tap inside,
    which for one vector of filters costs like four channels more; strides cost a tenth.
    """
    taps, vectors = layer.channels * prod(layer.kernel), -(-layer.filters // lanes) * lanes / 16
    if layer.channels <= 3:
        return prod(layer.convolved) * vectors * (taps + 6)
    sums = layer.products / layer.filters * (vectors + 4 / layer.channels)
    return sums * (1.1 if max(layer.stride) > 1 else 1)


def _winograd(layer: Layer, lanes: int) -> float:
    """Cycles of Winograd's algorithm for a sample, where it can be used (`winograd`)."""
    if layer.kernel != (3, 3) or layer.stride != (1, 1):
        return inf
    channels, filters = (-(-n // lanes) * lanes / 16 for n in (layer.channels, layer.filters))
    tiles = prod(-(-size // 4) for size in layer.convolved)
    cycles = tiles * 36 * (layer.channels * filters + 5 * (channels + filters))
    sums = prod(layer.convolved) * 9 * layer.channels * filters
    return 1.2 * cycles if cycles < _GAIN * sums else inf  # 1.15 to 1.4 times it was measured


# -- what goes along ---------------------------------------------------------------------------


def _links(site: Site) -> Iterator[_Link]:
    """The convolution of `site`, and those that follow it through nothing but ReLU and pooling."""
    cluster: Cluster | None = site.cluster
    while cluster is not None:
        link = _link(site, cluster)
        if link is None:
            return
        link = _with_pool(site, link)
        yield link
        cluster = _behind(site, link.members[-1].writes[0])


def _link(site: Site, cluster: Cluster) -> _Link | None:
    """The convolution that `cluster` consists of, with ReLU or without."""
    first, *behind = cluster.members
    op = first.op
    if not isinstance(op, Conv) or not all(isinstance(m.op, Relu) for m in behind):
        return None
    x, known = first.reads[0], site.builder.tensors
    if not all(b in known for b in first.reads[1:]):
        return None
    weight, *bias = parameters = tuple(known[b] for b in first.reads[1:])
    size = site.shape(x)
    if not _plain(op, *parameters) or 0 in size or site.builder.dtype(x) is not DType.F32:
        return None
    if not all(t.row_major for t in parameters):
        return None
    filters, channels, *kernel = weight.shape
    layer = Layer(
        channels, filters, (size[2], size[3]), (kernel[0], kernel[1]),
        (op.stride[0], op.stride[1]), (op.begin[0], op.begin[1]), (op.end[0], op.end[1]),
        bias=bool(bias), relu=bool(behind),
    )  # fmt: skip
    return _Link(layer, cluster.members, parameters)


def _with_pool(site: Site, link: _Link) -> _Link:
    """The layer with the max pooling that reads it, and the ReLU behind that."""
    pool = _behind(site, link.members[-1].writes[0])
    op = pool.members[0].op if pool is not None and len(pool.members) == 1 else None
    if pool is None or not isinstance(op, MaxPool) or op.kernel != op.stride or any(op.pad):
        return link
    window = (op.kernel[0], op.kernel[1])
    layer = replace(link.layer, pool=window, cover_all=op.cover_all)
    if 0 in layer.result or window == (1, 1):
        return link
    members = (*link.members, *pool.members)
    relu = _behind(site, members[-1].writes[0])
    if relu is not None and len(relu.members) == 1 and isinstance(relu.members[0].op, Relu):
        layer, members = replace(layer, relu=True), (*members, *relu.members)
    return _Link(layer, members, link.parameters)


def _behind(site: Site, buffer: int) -> Cluster | None:
    """The cluster in this part that starts with a value, if nothing else needs that."""
    readers = site.builder.readers(buffer)
    if len(readers) != 1 or buffer in site.builder.program.results:
        return None
    cluster = site.builder.cluster(readers[0])
    return cluster if cluster is not None and cluster.members[0] is readers[0] else None


# -- kernels -----------------------------------------------------------------------------------


def _run(site: Site, links: Sequence[_Link], chain: Chain, threads: int) -> None:
    x = arranged(site, site.builder.tensors[site.first.reads[0]])
    out = site.output(links[-1].members[-1].writes[0], last=True)
    weights = [_packed(site, link, chain, number) for number, link in enumerate(links)]
    biases = [link.parameters[1] if link.layer.bias else None for link in links]
    scratch = site.builder.temporary(chain.scratch * threads)
    routine = engine.routine(chain.text(), improved=False)

    def emit(place: Place) -> list[Step]:
        at = place.address
        added = [0 if b is None else at(b) for b in biases]
        arguments = [at(x), at(out), at(scratch), x.shape[0], *map(at, weights), *added]
        return [routine.call(arguments, threads)]

    members = tuple(m for link in links for m in link.members)
    reads = (x.buffer, *(t.buffer for t in weights), *(b.buffer for b in biases if b is not None))
    kernel = Kernel("llvm direct", Cluster("layer", members), reads, (out.buffer, scratch), emit)
    site.builder.add(kernel)
    site.builder.done.update(m.writes[0] for m in members[len(site.cluster.members) :])


def _run_gradient(
    site: Site, gradient: Gradient, x: Tensor, dy: Tensor, out: Sequence[Tensor], threads: int
) -> None:
    """The kernel of a gradient; `out` are the weight's and perhaps the bias's."""
    count, bias = x.shape[0], len(out) > 1
    threads = min(threads, -(-count // gradient.lanes))
    sums = site.builder.temporary(gradient.sums * threads)
    scratch = site.builder.temporary(gradient.scratch * threads)
    routine = engine.routine(gradient.text(), improved=False)
    finish = engine.routine(gradient.finish(threads, bias=bias), improved=False)

    def emit(place: Place) -> list[Step]:
        at = place.address
        totals = [at(sums), at(out[0]), at(out[1]) if bias else 0]
        return [
            routine.call([at(x), at(dy), at(sums), at(scratch), count], threads),
            finish.call(totals, 1),
        ]

    writes = [*(t.buffer for t in out), sums, scratch]
    site.add("llvm direct gradient", [x.buffer, dy.buffer], writes, emit)


def _packed(site: Site, link: _Link, chain: Chain, number: int) -> Tensor:
    """The weights of a layer as its tiles read them."""
    weight, filters = link.parameters[0], chain.tiles[number].filters
    floats = chain.packed(number)

    def fill(target: Tensor) -> None:
        flat = replace(target, shape=(floats,), dtype=DType.F32)

        def emit(place: Place) -> list[Step]:
            pack = partial(direct.pack, filters=filters, out=place.array(flat))
            array = place.array(weight)
            if link.turned:
                array = array[:, :, ::-1, ::-1].swapaxes(0, 1)
            return [(pack, (array,), None)]

        site.add("pack llvm direct", [weight.buffer], [target.buffer], emit)

    return site.builder.prepared(weight, ("direct", filters, link.turned), floats * 4, fill)


__all__ = ["convolutions", "data_gradient", "weight_gradient"]
