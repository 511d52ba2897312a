"""The words of a picture: names, key attributes and shapes, in the spelling of the field.

A convolution reads `5x5, 16, stride 2, pad 3`, a pooling `2x2/2`, an exit `entropy < 0.5`, a shape
`N×16×30×30`. Everything that a user named is cleaned here of what no renderer can draw.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from branchgraph.ir.attributes import format_value
from branchgraph.ir.dims import Dim, DimLike
from branchgraph.ir.graph import Location, Node, Value
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.exit import RELATIONS
from branchgraph.ir.types import DType, TensorType
from branchgraph.show.style import is_global_pool
from branchgraph.show.weighing import gate_of

#: Longest name in a picture; longer ones end in an ellipsis.
LONGEST_NAME = 48

_UNDRAWABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """`text` on one line: control characters and lone surrogates as escapes."""
    return _UNDRAWABLE.sub(lambda m: m.group().encode("unicode_escape").decode(), text)


def clean(text: str) -> str:
    """`text` as a printable name, cut where it is too long."""
    seen = printable(text)
    return seen if len(seen) <= LONGEST_NAME else seen[: LONGEST_NAME - 1] + "…"


def number(value: float) -> str:
    """A short decimal: `0.5`, `1e-05`."""
    return f"{value:g}"


def relative(name: str, to: Location) -> str:
    """`name` as seen from the place `to`: `res2/left/conv1` within `res2` is `left/conv1`."""
    parts = name.split("/")
    place = [part.name for part in to]
    shared = len(place) if parts[: len(place)] == place else 0
    return clean("/".join(parts[shared:]))


# -- shapes ----------------------------------------------------------------------------------------


def dim(size: DimLike) -> str:
    """`720N`, `(2N+1)`."""
    text = str(size).replace("*", "").replace(" ", "")
    return f"({text})" if isinstance(size, Dim) and re.search("[+-]", text) else text


def shape(type: TensorType) -> str:
    """`N×16×30×30`; the element type is named when it is not f32, a 0-d value is a `scalar`."""
    sizes = "×".join(map(dim, type.shape)) or "scalar"
    return sizes if type.dtype is DType.F32 else f"{sizes} {type.dtype}"


# -- attributes ------------------------------------------------------------------------------------


def _per_axis(sizes: Sequence[int]) -> str:
    """One number where all axes agree, else `3x1`."""
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))


def _pad(pad: Sequence[int]) -> str:
    """Pads as one number, one an axis, or leading and trailing ones."""
    half = len(pad) // 2
    lead, trail = pad[:half], pad[half:]
    return _per_axis(lead) if lead == trail else f"{_per_axis(lead)}..{_per_axis(trail)}"


def _geometry(node: Node, kernel: Sequence[DimLike], filters: DimLike) -> str:
    op = node.op.attributes()
    parts = ["x".join(map(str, kernel)), str(filters)]
    parts += [f"stride {_per_axis(op['stride'])}"] * (set(op["stride"]) != {1})
    parts += [f"pad {_pad(op['pad'])}"] * any(op["pad"])
    parts += [f"dilation {_per_axis(op['dilation'])}"] * (set(op["dilation"]) != {1})
    parts += [f"groups {op['groups']}"] * (op["groups"] > 1)
    return ", ".join(parts)


def _conv(node: Node) -> str:
    weight = node.inputs[1].shape
    return _geometry(node, weight[2:], weight[0])


def _conv_transpose(node: Node) -> str:
    return _geometry(node, node.inputs[1].shape[2:], node.output.shape[1])


def _conv_weight_gradient(node: Node) -> str:
    weight = node.output.shape
    return _geometry(node, weight[2:], weight[0])


def _pool(node: Node) -> str:
    op = node.op.attributes()
    parts = [f"{'x'.join(map(str, op['kernel']))}/{_per_axis(op['stride'])}"]
    parts += [f"pad {_pad(op['pad'])}"] * any(op["pad"])
    parts += ["cover all"] * op["cover_all"]
    parts += [_DIVISORS.get(op.get("divisor", ""), "")]
    return ", ".join(filter(None, parts))


#: What an average pooling divides by, where that is not the size of its kernel.
_DIVISORS = {
    "padded": "over the padded part",
    "inside": "over the part inside",
    "one": "sum",
}


def _clip(node: Node) -> str:
    """`0..1`: the bounds, whatever they are called."""
    bounds = [v for v in node.op.attributes().values() if isinstance(v, (int, float))]
    return "..".join(map(number, bounds))


def _sample_conv(node: Node) -> str:
    """Kernels that differ from sample to sample: [N, filters, channels, *kernel]."""
    weight = node.inputs[1].shape
    return _geometry(node, weight[3:], weight[1]) if len(weight) > 3 else _all(node)


def _top_k(node: Node) -> str:
    op = node.op.attributes()
    return f"{op['k']} of {node.output.shape[op['axis']]}"


def _roi_pool(node: Node) -> str:
    return "x".join(map(str, node.output.shape[2:]))


def _features(node: Node) -> str:
    return str(node.output.shape[1])


def _axis(node: Node) -> str:
    axis = node.op.attributes()["axis"]
    return "" if axis == 1 else f"axis {axis}"


def _cut(node: Node) -> str:
    op = node.op.attributes()
    step = "" if op["step"] == 1 else f":{op['step']}"
    start, size = op["start"], op["size"]
    stop = start + size * op["step"] if node.op.opcode == "slice" else f"{start}+"
    return f"{start}:{stop}{step} of axis {op['axis']}"


def _embedded(node: Node) -> str:
    op = node.op.attributes()
    axis, start, size = op["axis"], op["start"], op["size"]
    return f"{start}:{start + node.inputs[0].shape[axis]} of {size} in axis {axis}"


def _zeros(node: Node) -> str:
    """`16 channels in front`, `axis 2 by 1..2`: what a padding adds, and of what value."""
    op = node.op.attributes()
    parts = [
        _added(axis, before, after)
        for axis, (before, after) in enumerate(zip(op["begin"], op["end"]))
        if before or after
    ]
    return ", ".join([*parts, *[f"of {number(op['value'])}"] * (op["value"] != 0)])


def _added(axis: int, before: int, after: int) -> str:
    if axis == 1 and not (before and after):
        place = "in front" if before else "behind"
        return f"{before or after} channels {place}"
    return f"axis {axis} by {before if before == after else f'{before}..{after}'}"


def _resized(node: Node) -> str:
    return f"{node.op.attributes()['mode']} to {'x'.join(map(str, node.output.shape[2:]))}"


def _reduced(node: Node) -> str:
    axes = node.op.attributes()["axes"]
    listed = ("axis " if len(axes) == 1 else "axes ") + ", ".join(map(str, axes))
    return "" if is_global_pool(node) else f"over {listed}"


def _exit(node: Node) -> str:
    if len(node.inputs) == 1:
        return "takes the rest"
    criterion = node.op.attributes()["criterion"]
    relation = RELATIONS[criterion]
    return f"{criterion.replace('_', ' ')} {INFIX[relation]} {_scalar(node.inputs[1])}"


def _scalar(value: Value) -> str:
    """A 0-d operand: its default or its name; `T` when it is computed."""
    if value.default is not None:
        return number(value.default)
    return "T" if value.producer else clean(value.name)


def _named(name: str) -> Callable[[Node], str]:
    """The attribute `name` as `name value`."""
    return lambda node: f"{name} {format_value(node.op.attributes()[name])}"


def _attribute(name: str) -> Callable[[Node], str]:
    """The attribute `name` as its value alone."""
    return lambda node: str(node.op.attributes()[name]).replace("_", " ")


def _nothing(node: Node) -> str:
    return ""


def _all(node: Node) -> str:
    """Every attribute, for ops that the table does not know."""
    return ", ".join(f"{k} {format_value(v)}" for k, v in node.op.attributes().items())


#: Relations and arithmetic between two operands, by opcode or relation.
INFIX = {
    "add": "+", "subtract": "−", "multiply": "×", "divide": "÷", "logical_and": "and",
    "less": "<", "greater": ">", "greater_equal": "≥", "less_equal": "≤", "equal": "=",
    "not_equal": "≠",
}  # fmt: skip

_DETAILS: dict[str, Callable[[Node], str]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "conv_weight_gradient": _conv_weight_gradient,
    "dense": _features,
    "matmul": _nothing,
    "max_pool": _pool,
    "max_pool_index": _pool,
    "average_pool": _pool,
    "average_pool_gradient": _pool,
    "scatter_pooled": _nothing,
    "batch_norm": _nothing,
    "batch_norm_training": _nothing,
    "batch_norm_inference": _nothing,
    "batch_norm_gradient": _nothing,
    "lrn": _named("size"),
    "lrn_gradient": _named("size"),
    "leaky_relu": _named("slope"),
    "elu": _named("alpha"),
    "softmax": _axis,
    "log_softmax": _axis,
    "concat": _axis,
    "dropout": _attribute("ratio"),
    "random_uniform": _named("stream"),
    "slice": _cut,
    "embed": _embedded,
    "pad": _zeros,
    "split": _axis,
    "reshape": _nothing,
    "resize": _resized,
    "broadcast_to": _nothing,
    "reduce_sum": _reduced,
    "reduce_mean": _reduced,
    "reduce_max": _reduced,
    "arg_max": _axis,
    "compact": _nothing,
    "one_hot": _nothing,
    "cross_entropy": _nothing,
    "cast": lambda node: f"to {node.output.dtype}",
    "full": lambda node: number(node.op.attributes()["value"]),
    "exit": _exit,
    "exit_score": _attribute("criterion"),
    "compare": _nothing,
    "clip": _clip,
    "sample_conv": _sample_conv,
    "softmax_output": _nothing,
    "regression_output": _attribute("kind"),
    "make_loss": _nothing,
    "roi_max_pool": _roi_pool,
    "top_k": _top_k,
}

_WORDS = {
    "relu": "ReLU",
    "elu": "ELU",
    "leaky_relu": "leaky ReLU",
    "lrn": "LRN",
    "reduce_mean": "mean",
    "reduce_sum": "sum",
    "reduce_max": "maximum",
    "sample_conv": "conv per sample",
    "softmax_output": "softmax with loss",
    "regression_output": "regression with loss",
    "make_loss": "loss",
    "roi_max_pool": "RoI max pool",
    "batch_norm_inference": "batch norm",
    "batch_norm_training": "batch norm (batch statistics)",
}


def words(node: Node) -> str:
    """The op in words: `max pool`, `ReLU`, `flatten`, `global average pool`."""
    opcode = node.op.opcode
    if gate_of(node):
        return "gate"
    if is_global_pool(node):
        return "global average pool" if opcode == "reduce_mean" else "global max pool"
    if opcode == "reshape" and _flattens(node):
        return "flatten"
    return _WORDS.get(opcode, opcode.replace("_", " "))


def _flattens(node: Node) -> bool:
    before, after = node.inputs[0].shape, node.output.shape
    return len(after) == 2 < len(before) and before[0] == after[0]


def details(node: Node) -> str:
    """The key attributes, compact; an op that is not in the table shows all it has."""
    return _DETAILS.get(node.op.opcode, _all)(node)


def title(node: Node) -> str:
    """The name, else the op in words."""
    return clean(node.name) if node.name else words(node)


def subtitle(node: Node) -> str:
    """What the title leaves out: the op unless the name says it, and the key attributes."""
    if not node.name:
        return details(node)
    stem = re.sub(r"[\W\d_]+", "", node.name).lower()
    said = re.sub(r"[\W_]+", "", words(node)).lower()
    return " ".join(filter(None, ("" if stem == said else words(node), details(node))))


def constant(value: Value) -> float | None:
    """The number that `value` is, if it is a constant filled with one."""
    op = value.producer.op if value.producer else None
    return op.value if isinstance(op, Full) else None


def count(items: int, noun: str) -> str:
    """`1 node`, `2,000 nodes`."""
    return f"{items:,} {noun}" + ("" if items == 1 else "s")
