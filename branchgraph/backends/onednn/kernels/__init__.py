"""What carries out each kind of cluster: makers are tried in order, NumPy comes last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from branchgraph.backends.onednn.kernels import (
    calls,
    exits,
    fused,
    held,
    host,
    layers,
    norms,
    pointwise,
    pools,
    reductions,
    sample_layers,
    small,
    winograd,
)
from branchgraph.backends.onednn.kernels.common import epilogue
from branchgraph.backends.onednn.plan import Builder, Maker
from branchgraph.ir.ops.conv import Conv, ConvTranspose, ConvWeightGradient
from branchgraph.ir.ops.norm import BatchNormInference, BatchNormTraining
from branchgraph.ir.ops.pool import AveragePool, MaxPool

MAKERS: Mapping[str, Sequence[Maker]] = {
    "layer": (small.convolutions, winograd.convolution, layers.convolution, layers.dense),
    "layer_gradient": (winograd.data_gradient,),
    "merge": (norms.inference, pointwise.merge),
    "norm": (norms.training,),
    "norm_gradient": (norms.gradient,),
    "exit": (exits.decision,),
    "elementwise": (fused.body,),
    "table": (fused.table,),
    "single": (
        host.constant,
        host.view,
        exits.score,
        exits.compact,
        exits.scatter,
        held.flattened,
        held.cast,
        small.convolutions,
        winograd.convolution,
        layers.convolution,
        small.data_gradient,
        winograd.data_gradient,
        layers.convolution_data_gradient,
        winograd.weight_gradient,
        small.weight_gradient,
        layers.convolution_weight_gradient,
        layers.dense,
        layers.product,
        sample_layers.forward,
        sample_layers.data_gradient,
        sample_layers.weight_gradient,
        norms.training,
        norms.gradient,
        norms.inference,
        pools.maximum,
        pools.average,
        pools.average_gradient,
        pools.positions,
        pools.scattered,
        norms.response,
        norms.response_gradient,
        reductions.reduced,
        reductions.repeated,
        pointwise.merge,
        pointwise.gate,
        pointwise.function,
        pointwise.relu_gradient,
        pointwise.softmax,
        pointwise.concatenation,
        pointwise.embedded,
        host.compact,
        host.scatter,
        fused.body,
        calls.cross_entropy,
        calls.direct,
        host.ufunc,
        host.evaluated,
    ),
}


#: Ops that the library's primitives carry out, and in many cases generated kernels, in float32 and
#: bfloat16 and where sizes are worth it.
PRIMITIVES = (
    "absolute", "add", "average_pool", "average_pool_gradient", "batch_norm_gradient",
    "batch_norm_inference", "batch_norm_training", "broadcast_to", "concat", "conv",
    "conv_transpose", "conv_weight_gradient", "dense", "divide", "elu", "embed", "leaky_relu",
    "log_softmax", "lrn", "lrn_gradient", "matmul", "max_pool", "max_pool_index", "mean",
    "multiply", "negate", "pad", "product", "reduce_mean", "reduce_sum", "relu",
    "relu_gradient", "sample_conv", "sample_conv_transpose", "sample_conv_weight_gradient",
    "scatter_pooled", "select", "sigmoid", "softmax", "sqrt", "subtract", "sum", "tanh",
)  # fmt: skip
#: Ops that only generated kernels carry out, in float32. All others are NumPy's.
GENERATED = (
    "clip", "compact", "cross_entropy", "exit_score", "maximum", "scatter", "where",
)  # fmt: skip

_WINDOWS = (Conv, ConvTranspose, ConvWeightGradient, MaxPool, AveragePool)


def enters_channels_last(builder: Builder, buffer: int) -> bool:
    """Whether an input is put channels last: where windows or batch norm read it first."""
    if len(builder.shape(buffer)) < 3:
        return False
    norms = (BatchNormInference, BatchNormTraining)
    return any(
        isinstance(i.op, (*_WINDOWS, *norms)) and i.reads[0] == buffer
        for i in builder.readers(buffer)
    )


__all__ = ["GENERATED", "MAKERS", "PRIMITIVES", "enters_channels_last", "epilogue"]
