"""What carries out each kind of cluster: makers are tried in order, NumPy comes last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from branchgraph.backends.onednn.kernels import host, layers, norms, pointwise, pools
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
    "pool_gradient": (pools.maximum_gradient,),
    "single": (
        host.constant,
        host.view,
        layers.convolution,
        layers.convolution_data_gradient,
        layers.convolution_weight_gradient,
        layers.dense,
        layers.product,
        norms.training,
        norms.gradient,
        norms.inference,
        pools.maximum,
        pools.average,
        pools.average_gradient,
        pools.plane_mean,
        pointwise.merge,
        pointwise.function,
        pointwise.relu_gradient,
        pointwise.softmax,
        pointwise.concatenation,
        host.compact,
        host.scatter,
        host.ufunc,
        host.evaluated,
    ),
}


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


__all__ = ["MAKERS", "enters_channels_last", "epilogue"]
