"""What carries out each kind of cluster: makers are tried in order, NumPy comes last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from branchgraph.backends.onednn.kernels import (
    held,
    host,
    layers,
    norms,
    pointwise,
    pools,
    reductions,
    sample_layers,
)
from branchgraph.backends.onednn.kernels.common import epilogue
from branchgraph.backends.onednn.plan import Builder, Maker
from branchgraph.ir.ops.conv import Conv, ConvTranspose, ConvWeightGradient
from branchgraph.ir.ops.norm import BatchNormInference, BatchNormTraining
from branchgraph.ir.ops.pool import AveragePool, MaxPool

MAKERS: Mapping[str, Sequence[Maker]] = {
    "layer": (layers.convolution, layers.dense),
    "merge": (norms.inference, pointwise.merge),
    "norm": (norms.training,),
    "norm_gradient": (norms.gradient,),
    "single": (
        host.constant,
        host.view,
        held.flattened,
        held.cast,
        layers.convolution,
        layers.convolution_data_gradient,
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
        host.ufunc,
        host.evaluated,
    ),
}


#: Ops that primitives carry out, in float32 and bfloat16 and where sizes are worth it; all others
#: are NumPy's.
PRIMITIVES = (
    "absolute", "add", "average_pool", "average_pool_gradient", "batch_norm_gradient",
    "batch_norm_inference", "batch_norm_training", "broadcast_to", "concat", "conv",
    "conv_transpose", "conv_weight_gradient", "dense", "divide", "elu", "embed", "leaky_relu",
    "log_softmax", "lrn", "lrn_gradient", "matmul", "max_pool", "max_pool_index", "mean",
    "multiply", "negate", "pad", "product", "reduce_mean", "reduce_sum", "relu", "relu_gradient",
    "sample_conv", "sample_conv_transpose", "sample_conv_weight_gradient", "scatter_pooled",
    "select", "sigmoid", "softmax", "sqrt", "subtract", "sum", "tanh",
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


__all__ = ["MAKERS", "PRIMITIVES", "enters_channels_last", "epilogue"]
