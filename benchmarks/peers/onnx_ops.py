"""The graph as an ONNX model, for ONNX Runtime and OpenVINO (inference only).

Opset 17. Rows that go on behind an exit are compressed by a mask and scattered back, so their sizes
are dynamic; everything else is static.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.state import State
from branchgraph.ir.types import DType
from peers.geometry import Pool, sized
from peers.walker import NotExpressible, Step, numbers, steps

PEER = "onnx"
OPSET = 17


class _Model:
    """Nodes and initialisers under way."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initialisers: list[Any] = []

    def constant(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        self.initialisers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))


#: Writes one step: the model, the step, names of operands, name of the output.
Writer = Callable[[_Model, Step, list[str], str], None]


def _plain(kind: str) -> Writer:
    def write(m: _Model, step: Step, args: list[str], out: str) -> None:
        m.node(kind, args, out)

    return write


def _conv(m: _Model, step: Step, args: list[str], out: str) -> None:
    op: Any = step.op
    m.node(
        "Conv", args, out, strides=op.stride, pads=op.pad, dilations=op.dilation, group=op.groups
    )


def _dense(m: _Model, step: Step, args: list[str], out: str) -> None:
    m.node("Gemm", args, out, transB=1)


def _pool(kind: str) -> Writer:
    def write(m: _Model, step: Step, args: list[str], out: str) -> None:
        from peers.walker import Call

        op: Any = step.op
        pool = Pool.of(Call(step, args, []))
        options = {"kernel_shape": pool.kernel, "strides": pool.stride}
        if kind == "AveragePool":
            if op.divisor != "kernel" and pool.padded:
                raise NotExpressible(f"not expressible in {PEER}: divisor {op.divisor}")
            options["count_include_pad"] = 1
        m.node(kind, args, out, pads=(*pool.begin, *pool.end), **options)

    return write


def _batch_norm(m: _Model, step: Step, args: list[str], out: str) -> None:
    op: Any = step.op
    m.node("BatchNormalization", args, out, epsilon=op.eps)


def _lrn(m: _Model, step: Step, args: list[str], out: str) -> None:
    op: Any = step.op
    m.node("LRN", args, out, size=op.size, alpha=op.alpha * op.size, beta=op.beta, bias=op.k)


def _softmax(m: _Model, step: Step, args: list[str], out: str) -> None:
    op: Any = step.op
    m.node("Softmax", args, out, axis=op.axis)


def _reshape(m: _Model, step: Step, args: list[str], out: str) -> None:
    sizes = np.array([d if isinstance(d, int) else -1 for d in step.outputs[0].shape], np.int64)
    m.node("Reshape", [args[0], m.constant(f"{out}.shape", sizes)], out)


def _concat(m: _Model, step: Step, args: list[str], out: str) -> None:
    op: Any = step.op
    m.node("Concat", args, out, axis=op.axis)


def _slice(m: _Model, step: Step, args: list[str], out: str) -> None:
    op: Any = step.op
    parts = {"starts": op.start, "ends": op.stop, "axes": op.axis, "steps": op.step}
    extra = [m.constant(f"{out}.{k}", np.array([v], np.int64)) for k, v in parts.items()]
    m.node("Slice", [args[0], *extra], out)


def _mean(m: _Model, step: Step, args: list[str], out: str) -> None:
    m.node("Mean", args, out)


def _sum(m: _Model, step: Step, args: list[str], out: str) -> None:
    m.node("Add" if len(args) == 2 else "Sum", args, out)


def _reduce(m: _Model, step: Step, args: list[str], out: str) -> None:
    op: Any = step.op
    if op.opcode == "reduce_mean" and tuple(op.axes) == (2, 3):
        pooled = out if op.keepdims else f"{out}.pooled"
        m.node("GlobalAveragePool", args, pooled)
        if not op.keepdims:
            m.node("Flatten", [pooled], out)
        return
    if op.opcode == "reduce_sum":
        axes = m.constant(f"{out}.axes", np.array(op.axes, np.int64))
        m.node("ReduceSum", [args[0], axes], out, keepdims=int(op.keepdims))
    else:
        m.node("ReduceMean", args, out, axes=op.axes, keepdims=int(op.keepdims))


RELATIONS = {
    "less": "Less", "less_equal": "LessOrEqual", "greater": "Greater",
    "greater_equal": "GreaterOrEqual", "equal": "Equal",
}  # fmt: skip


def _compare(m: _Model, step: Step, args: list[str], out: str) -> None:
    """Scores are in float32 here, thresholds are cast to it."""
    op: Any = step.op
    if op.relation not in RELATIONS:
        raise NotExpressible(f"not expressible in {PEER}: {op.relation}")
    same = [f"{out}.{i}" for i in range(2)]
    for arg, cast in zip(args, same):
        m.node("Cast", [arg], cast, to=_element(DType.F32))
    m.node(RELATIONS[op.relation], same, out)


def _exit_score(m: _Model, step: Step, args: list[str], out: str) -> None:
    op: Any = step.op
    p, log, terms = f"{out}.p", f"{out}.log", f"{out}.terms"
    m.node("Softmax", args, p, axis=1)
    if op.criterion == "confidence":
        m.node("ReduceMax", [p], out, axes=[1], keepdims=0)
        return
    if op.criterion != "entropy":
        raise NotExpressible(f"not expressible in {PEER}: exit criterion {op.criterion}")
    m.node("LogSoftmax", args, log, axis=1)
    m.node("Mul", [p, log], terms)
    total = f"{out}.sum"
    m.node("ReduceSum", [terms, m.constant(f"{out}.axes", np.array([1]))], total, keepdims=0)
    m.node("Neg", [total], out)


def _compact(m: _Model, step: Step, args: list[str], out: str) -> None:
    mask, *values = args
    for value, target in zip(values, _names(out, len(values))):
        m.node("Compress", [value, mask], target, axis=0)


def _full(m: _Model, step: Step, args: list[str], out: str) -> None:
    """A constant with as many rows as data leaves is one row, which `_scatter` repeats."""
    op: Any = step.op
    shape = tuple(d if isinstance(d, int) else 1 for d in op.shape)
    m.constant(out, np.full(shape, op.value, op.dtype.numpy))


def _scatter(m: _Model, step: Step, args: list[str], out: str) -> None:
    if len(args) < 3:
        raise NotExpressible(f"not expressible in {PEER}: scatter without a base")
    mask, rows, base = args
    columns, places = f"{out}.columns", f"{out}.places"
    m.node("NonZero", [mask], columns)
    m.node("Transpose", [columns], places, perm=[1, 0])
    rows = _repeated(m, step.inputs[1], rows, places, f"{out}.rows")
    base = _repeated(m, step.inputs[2], base, mask, f"{out}.base")
    m.node("ScatterND", [base, places, rows], out)


def _repeated(m: _Model, value: Value, name: str, like: str, out: str) -> str:
    """A constant row as many times as `like` has rows; other values as they are."""
    if value.producer is None or value.producer.op.opcode != "full":
        return name
    shape, count, whole = f"{out}.shape", f"{out}.count", f"{out}.whole"
    m.node("Shape", [like], shape)
    m.node("Slice", [shape, m.constant(f"{out}.0", np.array([0])),
                     m.constant(f"{out}.1", np.array([1]))], count)  # fmt: skip
    tail = m.constant(f"{out}.tail", np.ones(len(value.shape) - 1, np.int64))
    m.node("Concat", [count, tail], whole, axis=0)
    m.node("Expand", [name, whole], out)
    return out


def _element(dtype: DType) -> int:
    from onnx import TensorProto

    return int({DType.F32: TensorProto.FLOAT, DType.I64: TensorProto.INT64}[dtype])


def _names(out: str, count: int) -> list[str]:
    """Names of the outputs of a step."""
    return [out, *(f"{out}.{i}" for i in range(1, count))]


TABLE: dict[str, Writer] = {
    "conv": _conv,
    "dense": _dense,
    "relu": _plain("Relu"),
    "sigmoid": _plain("Sigmoid"),
    "tanh": _plain("Tanh"),
    "softmax": _softmax,
    "max_pool": _pool("MaxPool"),
    "average_pool": _pool("AveragePool"),
    "batch_norm_inference": _batch_norm,
    "lrn": _lrn,
    "reshape": _reshape,
    "concat": _concat,
    "slice": _slice,
    "sum": _sum,
    "mean": _mean,
    "reduce_mean": _reduce,
    "reduce_sum": _reduce,
    "add": _plain("Add"),
    "subtract": _plain("Sub"),
    "multiply": _plain("Mul"),
    "divide": _plain("Div"),
    "negate": _plain("Neg"),
    "log": _plain("Log"),
    "select": _plain("Mul"),
    "compare": _compare,
    "logical_not": _plain("Not"),
    "full": _full,
    "exit_score": _exit_score,
    "compact": _compact,
    "scatter": _scatter,
}


def model_of(graph: Graph, states: Sequence[State], arrays: Sequence[np.ndarray]) -> bytes:
    """The serialised model; its inputs and outputs carry the graph's names."""
    from onnx import checker, helper

    model = _Model()
    names: dict[Value, str] = {v: v.name for v in graph.inputs.values()}
    for i, (state, array) in enumerate(zip(states, arrays)):
        names[graph.reads[state]] = model.constant(f"p{i}", array)
    for i, (value, text) in enumerate(numbers(graph).items()):
        names[value] = model.constant(f"c{i}", np.array(float(text), value.dtype.numpy))
    for i, step in enumerate(steps(graph)):
        if step.opcode not in TABLE:
            raise NotExpressible(f"not expressible in {PEER}: its table has no op {step.opcode!r}")
        args = [names[v] for v in step.inputs]
        names |= zip(step.outputs, _names(f"h{i}", len(step.outputs)))
        TABLE[step.opcode](model, step, args, f"h{i}")
    for name, value in graph.outputs.items():
        model.node("Identity", [names[value]], name)
    tensors = [
        [
            helper.make_tensor_value_info(n, _element(v.dtype), [sized(d) for d in v.shape])
            for n, v in listed.items()
        ]
        for listed in (graph.inputs, graph.outputs)
    ]
    made = helper.make_graph(model.nodes, graph.name, *tensors, initializer=model.initialisers)
    opset = [helper.make_opsetid("", OPSET)]
    whole = helper.make_model(made, opset_imports=opset, ir_version=8)
    checker.check_model(whole)
    return bytes(whole.SerializeToString())
