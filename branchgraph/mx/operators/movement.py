"""Moving elements: shapes, parts, joins, order of axes, padding, rows of a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from branchgraph.ir import builder, functions
from branchgraph.ir.dims import DimLike, product
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.functions.layout import axis_of, reshaped
from branchgraph.ir.graph import Value
from branchgraph.ir.op import make
from branchgraph.ir.ops.elementwise import cast, compare, where
from branchgraph.ir.types import DType
from branchgraph.mx.attributes import DTypeName
from branchgraph.mx.attributes import Shape as Sizes
from branchgraph.mx.operators.base import (
    Operator,
    Shape,
    Shapes,
    all_equal,
    counted,
    known,
    size_of,
)

# -- shapes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flatten(Operator, spelling="Flatten", aliases=("flatten",)):
    """[N, the rest]."""

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (builder.flatten(inputs[0]),)


@dataclass(frozen=True)
class Reshape(Operator, spelling="Reshape", aliases=("reshape",)):
    """Another shape, in codes: 0 copies a dimension, -1 is inferred, -2 copies all that remain,
    -3 merges two, -4 splits one into the next two entries. `reverse` matches from the right.

    The older `target_shape` infers what is 0; with `keep_highest` the first dimension is kept.
    """

    shape: Sizes = ()
    reverse: bool = False
    target_shape: Sizes = ()
    keep_highest: bool = False

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        return (reshaped(x, self.target(x.shape)),)

    def target(self, source: Shape) -> Shape:
        """The shape that `source` takes."""
        if not self.shape:
            return self._legacy(source)
        if not self.reverse:
            return _filled(source, list(_decoded(self.shape, list(source))))
        entries = list(_decoded(_reversed_codes(self.shape), list(reversed(source)), True))
        return _filled(source, entries[::-1])

    def _legacy(self, source: Shape) -> Shape:
        if not self.target_shape:
            raise ShapeError("Reshape: neither shape nor target_shape is given")
        first = [source[0]] if self.keep_highest else []
        rest = [None if d == 0 else d for d in self.target_shape[len(first) :]]
        return _filled(source, [*first, *rest])


def _reversed_codes(codes: Sizes) -> Sizes:
    """The codes from right to left, a split's two entries kept behind it."""
    units: list[Sizes] = []
    rest = list(codes)
    while rest:
        count = 3 if rest[0] == -4 else 1
        units.append(tuple(rest[:count]))
        rest = rest[count:]
    return tuple(code for unit in reversed(units) for code in unit)


def _decoded(
    codes: Sizes, source: list[DimLike], backwards: bool = False
) -> Iterator[DimLike | None]:
    """One dimension an output axis, None where it is to be inferred."""
    pending, remaining = list(codes), list(source)

    def take() -> DimLike:
        if not remaining:
            raise ShapeError(f"Reshape: {codes} asks for more dimensions than the data has")
        return remaining.pop(0)

    while pending:
        code = pending.pop(0)
        if code > 0 or code == -1:
            if remaining:
                remaining.pop(0)
            yield code if code > 0 else None
        elif code == 0:
            yield take()
        elif code == -2:
            yield from remaining
            remaining = []
        elif code == -3:
            yield take() * take()
        elif code == -4 and len(pending) >= 2:
            parts = _split(take(), pending.pop(0), pending.pop(0))
            yield from reversed(parts) if backwards else parts
        else:
            raise ShapeError(f"Reshape: {codes} has the code {code}; known are 0 to -4")


def _split(whole: DimLike, first: int, second: int) -> tuple[DimLike, DimLike]:
    if first == second == -1 or min(first, second) < -1 or 0 in (first, second):
        raise ShapeError(f"Reshape: {whole} cannot be split into {first} and {second}")
    a: DimLike = whole // second if first == -1 else first
    b: DimLike = whole // first if second == -1 else second
    if a * b != whole:
        raise ShapeError(f"Reshape: {whole} does not split into {first} and {second}")
    return a, b


def _filled(source: Shape, entries: list[DimLike | None]) -> Shape:
    """`entries` with the one that is None inferred from the number of elements."""
    if entries.count(None) > 1:
        raise ShapeError("Reshape: only one dimension can be inferred")
    if None not in entries:
        return tuple(d for d in entries if d is not None)
    kept, given = list(source), [d for d in entries if d is not None]
    for d in list(given):  # dimensions on both sides cancel, so that symbols divide
        if d in kept:
            kept.remove(d)
            given.remove(d)
    total, rest = product(kept), product(given)
    if rest == 0 or (isinstance(total, int) and not isinstance(rest, int)):
        raise ShapeError(f"Reshape: {total} elements leave nothing to infer beside {rest}")
    inferred = total // rest
    return tuple(inferred if d is None else d for d in entries)


@dataclass(frozen=True)
class ExpandDims(Operator, spelling="expand_dims"):
    """A unit axis inserted at `axis`."""

    axis: int

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        return (functions.expand_dims(x, self.axis),)


@dataclass(frozen=True)
class Squeeze(Operator, spelling="squeeze"):
    """Unit axes removed: the given ones, or all."""

    axis: Sizes | None = None

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        y = functions.squeeze(x, self.axis)
        return (reshaped(y, y.shape or (1,)),)


@dataclass(frozen=True)
class Transpose(Operator, spelling="transpose"):
    """The axes in another order, reversed by default."""

    axes: Sizes = ()

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        return (functions.transpose(x, self.axes or None),)


@dataclass(frozen=True)
class SwapAxis(Operator, spelling="SwapAxis", aliases=("swapaxes", "SwapAxes")):
    """Two axes exchanged."""

    dim1: int = 0
    dim2: int = 0

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        return (functions.swap_axes(x, self.dim1, self.dim2),)


# -- parts ---------------------------------------------------------------------------------------


def _window(x: Value, axis: int, start: int, size: int) -> Value:
    """`size` elements along an axis; x itself where these are all."""
    if start == 0 and x.shape[axis] == size:
        return x
    return x.graph.emit(make("slice", axis=axis, start=start, size=size), x)


def _sliced(x: Value, axis: int, begin: int | None, end: int | None, step: int | None) -> Value:
    """Python's slicing of one axis; a symbolic axis can be kept whole only."""
    if (begin, end) in ((None, None), (0, None)) and step in (None, 1):
        return x
    positions = range(*slice(begin, end, step).indices(size_of(x.shape[axis], "slicing")))
    if not positions:
        raise ShapeError(f"slicing axis {axis} of {x.type} from {begin} to {end} leaves nothing")
    low, stride = min(positions[0], positions[-1]), abs(positions.step)
    op = make("slice", axis=axis, start=low, size=len(positions), step=stride)
    part = x.graph.emit(op, x)
    return part if positions.step > 0 else x.graph.emit(make("flip", axis=axis), part)


@dataclass(frozen=True)
class Crop(Operator, spelling="Crop"):
    """A window of the image: of size `h_w`, or of the size of a second image."""

    num_args: int
    offset: Sizes = (0, 0)
    h_w: Sizes = (0, 0)
    center_crop: bool = False

    def arguments(self) -> tuple[str, ...]:
        return ("data",) if self.num_args == 1 else ("data", "crop_like")

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        x, *like = inputs
        if len(x.shape) != 4 or len(self.offset) != 2 or len(self.h_w) != 2:
            raise ShapeError(f"Crop: the data is [N, C, H, W] and sizes are pairs, got {x.type}")
        sizes = like[0].shape[2:] if like else self.h_w
        for axis, (start, size) in enumerate(zip(self.offset, sizes), start=2):
            extent = size_of(x.shape[axis], "Crop")
            window = size_of(size, "Crop")
            begin = (extent - window) // 2 if self.center_crop else start
            if window < 1 or begin < 0 or begin + window > extent:
                raise ShapeError(f"Crop: {window} elements at {begin} do not lie in {extent}")
            x = _window(x, axis, begin, window)
        return (x,)


@dataclass(frozen=True)
class Slice(Operator, spelling="slice", aliases=("crop",)):
    """Python's slicing of the leading axes."""

    begin: tuple[int | None, ...]
    end: tuple[int | None, ...]
    step: tuple[int | None, ...] = ()

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        steps = self.step or (None,) * len(self.begin)
        if not len(self.begin) == len(self.end) == len(steps) <= len(x.shape):
            raise ShapeError(f"slice: begin, end and step do not fit one another and {x.type}")
        for axis, part in enumerate(zip(self.begin, self.end, steps)):
            if part[2] == 0:
                raise ShapeError("slice: a step is not 0")
            x = _sliced(x, axis, *part)
        return (x,)


@dataclass(frozen=True)
class SliceAxis(Operator, spelling="slice_axis"):
    """Python's slicing of one axis."""

    axis: int
    begin: int
    end: int | None

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        return (
            _sliced(x, axis_of(self.axis, len(x.shape), self.spelling), self.begin, self.end, None),
        )


@dataclass(frozen=True)
class SliceLike(Operator, spelling="slice_like"):
    """As many leading elements along `axes` (all by default) as another operand has."""

    axes: Sizes = ()

    def arguments(self) -> tuple[str, ...]:
        return ("data", "shape_like")

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        x, like = inputs
        rank = len(x.shape)
        for axis in (axis_of(a, rank, self.spelling) for a in self.axes or range(rank)):
            target = like.shape[axis_of(axis, len(like.shape), self.spelling)]
            if target != x.shape[axis]:
                x = _window(x, axis, 0, size_of(target, "slice_like"))
        return (x,)


@dataclass(frozen=True)
class SliceChannel(Operator, spelling="SliceChannel", aliases=("split",)):
    """Equal parts along an axis, each an output."""

    num_outputs: int
    axis: int = 1
    squeeze_axis: bool = False

    def outputs(self) -> tuple[str, ...]:
        return ("output",) if self.num_outputs == 1 else counted(self.num_outputs, "output")

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        axis = axis_of(self.axis, len(x.shape), self.spelling)
        extent, count = size_of(x.shape[axis], "SliceChannel"), self.num_outputs
        if count < 1 or extent % count or (self.squeeze_axis and extent != count):
            raise ShapeError(f"SliceChannel: {extent} elements in {count} equal parts")
        parts = x.graph.apply(make("split", axis=axis, sizes=(extent // count,) * count), x)
        if not self.squeeze_axis:
            return parts
        return tuple(reshaped(p, (*p.shape[:axis], *p.shape[axis + 1 :])) for p in parts)


# -- joins and padding ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Variadic(Operator):
    num_args: int

    def arguments(self) -> tuple[str, ...]:
        return counted(self.num_args)


@dataclass(frozen=True)
class Concat(_Variadic, spelling="Concat", aliases=("concat",)):
    """The operands one after another."""

    dim: int = 1

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (
            builder.concat(*inputs, axis=axis_of(self.dim, len(inputs[0].shape), self.spelling)),
        )


@dataclass(frozen=True)
class Stack(_Variadic, spelling="stack"):
    """The operands side by side along a new axis."""

    axis: int = 0

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        return all_equal(shapes)

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        return (functions.stack(inputs, self.axis),)


@dataclass(frozen=True)
class Pad(Operator, spelling="Pad", aliases=("pad",)):
    """Images surrounded by a constant, by their edge or by their reflection."""

    mode: Literal["constant", "edge", "reflect"]
    pad_width: Sizes
    constant_value: float = 0.0

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        (x,) = inputs
        if len(self.pad_width) != 2 * len(x.shape):
            raise ShapeError(f"Pad: pad_width {self.pad_width} does not fit {x.type}")
        begin, end = self.pad_width[::2], self.pad_width[1::2]
        return (functions.pad(x, begin, end, mode=self.mode, value=self.constant_value),)


# -- rows of a table -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding(Operator, spelling="Embedding"):
    """The rows of a table; positions outside take the first or the last one."""

    input_dim: int
    output_dim: int
    dtype: DTypeName | None = None
    sparse_grad: bool = False

    def arguments(self) -> tuple[str, ...]:
        return ("data", "weight")

    def infer_inputs(self, shapes: Shapes) -> Shapes:
        return (shapes[0], known(shapes[1], (self.input_dim, self.output_dim)))

    def build(self, *inputs: Value) -> tuple[Value, ...]:
        data, weight = inputs
        graph = data.graph
        ids = cast(data, DType.I64)
        first, last = (graph.constant(float(i), DType.I64) for i in (0, self.input_dim - 1))
        ids = where(compare("less", ids, first), first, ids)
        ids = where(compare("greater", ids, last), last, ids)
        return (graph.emit(make("embedding"), ids, weight),)
