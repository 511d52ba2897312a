"""Native declaration: functions that take values, create their states, and return values.

    g = Graph("net")
    x = g.input("x", ("N", 3, 32, 32))
    h = relu(conv(x, 16, 3, pad=1, name="conv1"))
    with branch("left"):
        a = conv(h, 16, 1)
    with branch("right"):
        b = conv(h, 16, 3, pad=1)
    g.output("y", merge_sum(a, b))

States are named after the place and the layer (`left/conv.weight`). Layers whose mode is not yet
chosen (batch norm, dropout, exits) are declared; `specialise` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from branchgraph.ir.dims import DimLike, as_shape, product
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.graph import Graph, Scope, Value, here, path
from branchgraph.ir.initialisers import Initialiser, LeCunNormal, Ones, Zeros
from branchgraph.ir.op import Op
from branchgraph.ir.ops.activation import Elu, LeakyRelu, LogSoftmax, Relu, Sigmoid, Softmax, Tanh
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.exit import Exit
from branchgraph.ir.ops.gate import ScaleGradient, Select, StraightThrough
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.ops.loss import CrossEntropy
from branchgraph.ir.ops.merge import Concat, Maximum, Mean, Product, Sum
from branchgraph.ir.ops.mode import ByMode, Noise
from branchgraph.ir.ops.norm import BatchNorm, LocalResponseNorm
from branchgraph.ir.ops.pool import AveragePool, MaxPool
from branchgraph.ir.ops.random import Dropout
from branchgraph.ir.ops.reduce import ReduceMax, ReduceMean
from branchgraph.ir.ops.reshape import Reshape
from branchgraph.ir.state import Role, State
from branchgraph.ir.types import DType

Size = int | tuple[int, ...]


def spread(size: Size, axes: int, what: str) -> tuple[int, ...]:
    """One number an axis from an int or a tuple."""
    if isinstance(size, int):
        return (size,) * axes
    if len(size) != axes:
        raise ShapeError(f"{what} needs {axes} numbers, got {tuple(size)}")
    return tuple(size)


def pads(pad: Size, axes: int) -> tuple[int, ...]:
    """Leading, then trailing pads from an int, one an axis, or both ends of each axis."""
    if not isinstance(pad, int) and len(pad) == 2 * axes:
        return tuple(pad)
    return spread(pad, axes, "pad") * 2


def _spatial(x: Value, what: str) -> int:
    axes = len(x.shape) - 2
    if axes < 1:
        raise ShapeError(f"{what} needs [N, C, spatial...], got {x.type}")
    return axes


def _channels(x: Value, what: str) -> int:
    size = x.shape[1] if len(x.shape) > 1 else None
    if not isinstance(size, int):
        raise ShapeError(f"{what} needs a concrete channel count on axis 1, got {x.type}")
    return size


def state(
    graph: Graph,
    layer: str,
    name: str,
    shape: Iterable[int],
    init: Initialiser,
    role: Role = Role.PARAMETER,
    dtype: DType = DType.F32,
) -> Value:
    """A new state `<scope>/<layer>.<name>`, read."""
    full = path((*here(), Scope(layer)))
    return graph.read(State(f"{full}.{name}", tuple(shape), dtype, role, init))


def conv(
    x: Value,
    filters: int,
    kernel: Size,
    *,
    stride: Size = 1,
    pad: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool | Value = True,
    weight: Value | None = None,
    init: Initialiser | None = None,
    name: str = "",
) -> Value:
    """Convolution layer: x [N, C, *size] to [N, filters, *out], cross-correlation.

    `pad` is one number, one an axis, or all leading then all trailing pads. The default initialiser
    is LeCun normal over fan_in = C / groups * prod(kernel); biases start at 0. A `weight`
    [filters, C / groups, *kernel] or `bias` [filters] that is given is used instead of a new state:
    one that layers share, or an expression over states.
    """
    axes, channels = _spatial(x, "conv"), _channels(x, "conv")
    name = name or x.graph.unused_name("conv")
    if groups < 1 or channels % groups or filters % groups:
        raise ShapeError(
            f"conv {name}: {channels} channels and {filters} filters in {groups} groups"
        )
    size = spread(kernel, axes, "kernel")
    shape = (filters, channels // groups, *size)
    init = init or LeCunNormal(fan_in=prod(shape[1:]))
    if weight is None:
        weight = state(x.graph, name, "weight", shape, init, dtype=x.dtype)
    elif weight.shape != shape:
        raise ShapeError(f"conv {name}: expected a weight {list(shape)}, got {weight.type}")
    operands = [x, weight, *_bias(x.graph, name, filters, bias, x.dtype)]
    op = Conv(
        stride=spread(stride, axes, "stride"),
        pad=pads(pad, axes),
        dilation=spread(dilation, axes, "dilation"),
        groups=groups,
    )
    return x.graph.emit(op, *operands, name=name)


def _bias(
    graph: Graph, layer: str, features: int, bias: bool | Value, dtype: DType
) -> tuple[Value, ...]:
    """The bias operand of a layer: given, new, or none."""
    if isinstance(bias, Value):
        return (bias,)
    return (state(graph, layer, "bias", (features,), Zeros(), dtype=dtype),) if bias else ()


def flatten(x: Value) -> Value:
    """[N, ...] to [N, product of the rest]; x itself when it is a matrix."""
    if len(x.shape) == 2:
        return x
    return x.graph.emit(Reshape(shape=(x.shape[0], product(x.shape[1:]))), x)


def dense(
    x: Value, features: int, *, bias: bool | Value = True, weight: Value | None = None,
    init: Initialiser | None = None, name: str = "",
) -> Value:  # fmt: skip
    """Fully connected layer: x [N, ...], flattened, to [N, features].

    Initialised like `conv`, and like it takes a `weight` [features, K] or `bias` that is given.
    """
    flat = flatten(x)
    name = name or x.graph.unused_name("dense")
    fan_in = _channels(flat, "dense")
    shape = (features, fan_in)
    if weight is None:
        init = init or LeCunNormal(fan_in=fan_in)
        weight = state(x.graph, name, "weight", shape, init, dtype=x.dtype)
    elif weight.shape != shape:
        raise ShapeError(f"dense {name}: expected a weight {list(shape)}, got {weight.type}")
    operands = (flat, weight, *_bias(x.graph, name, features, bias, x.dtype))
    return x.graph.emit(Dense(), *operands, name=name)


def batch_norm(
    x: Value, *, eps: float = 2e-5, decay: float = 0.9, unbiased: bool = True,
    gamma: Value | None = None, beta: Value | None = None, var_init: Initialiser | None = None,
    name: str = "",
) -> Value:  # fmt: skip
    """Declared batch norm over axis 1; `decay` is the weight of the old running statistics.

    `gamma` and `beta` [C] may be given, as shared states or expressions; running statistics are
    the layer's own. The running variance starts at 1 unless `var_init` says otherwise.
    """
    name = name or x.graph.unused_name("batch_norm")
    shape, g, dtype = (_channels(x, "batch_norm"),), x.graph, x.dtype
    operands = (
        state(g, name, "gamma", shape, Ones(), dtype=dtype) if gamma is None else gamma,
        state(g, name, "beta", shape, Zeros(), dtype=dtype) if beta is None else beta,
        state(g, name, "running_mean", shape, Zeros(), Role.STATISTIC, dtype),
        state(g, name, "running_var", shape, var_init or Ones(), Role.STATISTIC, dtype),
    )
    return g.emit(BatchNorm(eps=eps, decay=decay, unbiased=unbiased), x, *operands, name=name)


def max_pool(
    x: Value, kernel: Size, *, stride: Size | None = None, pad: Size = 0, cover_all: bool = False,
    name: str = "",
) -> Value:  # fmt: skip
    """Max pooling; the stride defaults to the kernel. `cover_all` keeps overhanging windows."""
    axes = _spatial(x, "max_pool")
    size = spread(kernel, axes, "kernel")
    steps = size if stride is None else spread(stride, axes, "stride")
    return x.graph.emit(MaxPool(size, steps, pads(pad, axes), cover_all), x, name=name)


def average_pool(
    x: Value, kernel: Size, *, stride: Size | None = None, pad: Size = 0, cover_all: bool = False,
    divisor: str = "kernel", name: str = "",
) -> Value:  # fmt: skip
    """Average pooling; the stride defaults to the kernel.

    A window's sum is divided by the cells of the `kernel`, by those in x and its pads (`padded`),
    by those in x (`inside`), or by `one`: sum pooling.
    """
    axes = _spatial(x, "average_pool")
    size = spread(kernel, axes, "kernel")
    steps = size if stride is None else spread(stride, axes, "stride")
    op = AveragePool(size, steps, pads(pad, axes), cover_all, divisor)
    return x.graph.emit(op, x, name=name)


def global_average_pool(x: Value, name: str = "") -> Value:
    """[N, C, ...] to [N, C]: the mean over all spatial axes."""
    _spatial(x, "global_average_pool")
    return x.graph.emit(ReduceMean(axes=tuple(range(2, len(x.shape)))), x, name=name)


def global_max_pool(x: Value, name: str = "") -> Value:
    """[N, C, ...] to [N, C]: the maximum over all spatial axes."""
    _spatial(x, "global_max_pool")
    return x.graph.emit(ReduceMax(axes=tuple(range(2, len(x.shape)))), x, name=name)


def lrn(
    x: Value, size: int = 5, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0,
    name: str = "",
) -> Value:  # fmt: skip
    """Local response normalisation across channels; alpha is not divided by the window size."""
    return x.graph.emit(LocalResponseNorm(size, alpha, beta, k), x, name=name)


def relu(x: Value, name: str = "") -> Value:
    """max(x, 0)."""
    return x.graph.emit(Relu(), x, name=name)


def leaky_relu(x: Value, slope: float = 0.2, name: str = "") -> Value:
    """x where positive, else slope x."""
    return x.graph.emit(LeakyRelu(slope=slope), x, name=name)


def elu(x: Value, alpha: float = 1.0, name: str = "") -> Value:
    """x where positive, else alpha (e^x - 1)."""
    return x.graph.emit(Elu(alpha=alpha), x, name=name)


def sigmoid(x: Value, name: str = "") -> Value:
    """1 / (1 + e^-x)."""
    return x.graph.emit(Sigmoid(), x, name=name)


def tanh(x: Value, name: str = "") -> Value:
    """Hyperbolic tangent."""
    return x.graph.emit(Tanh(), x, name=name)


def softmax(x: Value, axis: int = 1, name: str = "") -> Value:
    """Softmax along `axis`."""
    return x.graph.emit(Softmax(axis=axis), x, name=name)


def log_softmax(x: Value, axis: int = 1, name: str = "") -> Value:
    """Logarithm of the softmax along `axis`."""
    return x.graph.emit(LogSoftmax(axis=axis), x, name=name)


def dropout(x: Value, ratio: float = 0.5, name: str = "") -> Value:
    """Declared inverted dropout with a random stream of its own."""
    return x.graph.emit(Dropout(ratio, unused_stream(x.graph)), x, name=name)


def unused_stream(graph: Graph) -> int:
    """The number of a random stream that no op of the graph draws from."""
    return 1 + max((getattr(n.op, "stream", -1) for n in graph.nodes), default=-1)


def noise(like: Value, shape: Iterable[DimLike | str] | None = None) -> Value:
    """Declared U[0, 1) in the shape of `like`, or in `shape`; 1/2 in inference.

    It has the dtype of `like` and a stream of its own.
    """
    size = like.shape if shape is None else as_shape(shape)
    op = Noise(stream=unused_stream(like.graph), shape=size, dtype=like.dtype)
    return like.graph.emit(op)


def by_mode(training: Value, inference: Value, name: str = "") -> Value:
    """One value in training, another in inference."""
    return training.graph.emit(ByMode(), training, inference, name=name)


def merge_sum(*values: Value, name: str = "") -> Value:
    """Branches joined by addition."""
    return _joined(Sum(), values, name)


def merge_mean(*values: Value, name: str = "") -> Value:
    """Branches joined by their mean."""
    return _joined(Mean(), values, name)


def merge_product(*values: Value, name: str = "") -> Value:
    """Branches joined by multiplication."""
    return _joined(Product(), values, name)


def merge_maximum(*values: Value, name: str = "") -> Value:
    """Branches joined by their element-wise maximum."""
    return _joined(Maximum(), values, name)


def concat(*values: Value, axis: int = 1, name: str = "") -> Value:
    """Branches joined one after another along `axis`."""
    return _joined(Concat(axis=axis), values, name)


def _joined(op: Op, values: tuple[Value, ...], name: str) -> Value:
    if not values:
        raise GraphError(f"{op.opcode}: a merge needs at least one branch")
    return values[0].graph.emit(op, *values, name=name)


def weighted_sum(values: Iterable[Value], weights: Iterable[Value], name: str = "") -> Value:
    """sum_i weight_i value_i; a weight broadcasts to its value (a scalar, or one a sample)."""
    terms = [v * w for v, w in zip(values, weights, strict=True)]
    return merge_sum(*terms, name=name)


def merge_and_run(inputs: Iterable[Value], outputs: Iterable[Value]) -> tuple[Value, ...]:
    """Branches that each add the mean of all their inputs: y_i = f_i(x_i) + mean_j x_j.

    (Zhao et al., "Deep convolutional neural networks with merge-and-run mappings", 1611.07718.)
    """
    mean = merge_mean(*inputs)
    return tuple(merge_sum(y, mean) for y in outputs)


def gate(value: Value, gate: Value, name: str = "") -> Value:
    """`value` gated: exactly zero where the gate is 0, multiplied by it elsewhere."""
    return value.graph.emit(Select(), value, gate, name=name)


def straight_through(value: Value, surrogate: Value, name: str = "") -> Value:
    """`value` forward, the gradient of `surrogate` backward."""
    return value.graph.emit(StraightThrough(), value, surrogate, name=name)


def scale_gradient(x: Value, scale: Value, name: str = "") -> Value:
    """`x`, its gradient multiplied by a 0-d value."""
    return x.graph.emit(ScaleGradient(), x, scale, name=name)


def exit(
    logits: Value,
    name: str,
    *,
    criterion: str = "entropy",
    threshold: float | None = None,
    last: bool = False,
    previous: Iterable[Value] = (),
) -> Value:
    """Mark `logits` [N, classes] as the way out `name`, and name the output after it.

    An early exit gets the 0-d input `<name>.threshold` with default `threshold` (0 if not given);
    the `last` one takes whatever is left. `previous` exits are read by the criterion `patience`.
    """
    graph = logits.graph
    operands = [logits]
    if not last:
        default = 0.0 if threshold is None else float(threshold)
        operands.append(graph.input(f"{name}.threshold", (), DType.F64, default))
        operands += previous
    value = graph.emit(Exit(name=name, criterion=criterion), *operands, name=name)
    return graph.output(name, value)


def cross_entropy(
    logits: Value, labels: Value, *, ignore_label: int | None = None, name: str = ""
) -> Value:
    """Mean softmax cross-entropy over the batch, a single number."""
    loss = logits.graph.emit(CrossEntropy(ignore_label=ignore_label), logits, labels)
    axes = tuple(range(len(loss.shape)))
    return logits.graph.emit(ReduceMean(axes=axes), loss, name=name)


def reshape(x: Value, shape: Iterable[DimLike], name: str = "") -> Value:
    """The same elements under another shape."""
    return x.graph.emit(Reshape(shape=tuple(shape)), x, name=name)
