"""Functions of values: compositions of ops that hold no state.

`ir.builder` makes layers, which create their states; here every operand is a value, so the same
function serves a state, a mixture of states, or the output of another branch. Modules by theme:

    elementary     activations and arithmetic of one or two values
    layout         axes, repetition, padding, resizing
    reduction      reductions, norms, normalisation
    windows        poolings beyond `builder.average_pool` and `max_pool`
    convolution    convolutions with given, scaled and mixed kernels
    draws          declared random values
"""

from branchgraph.ir.functions.convolution import (
    channel_scaled_conv,
    convolve,
    depthwise_conv,
    mixed_conv,
    sample_conv,
    scale_channels,
    separable_conv,
)
from branchgraph.ir.functions.draws import bernoulli, gumbel, normal, rrelu, uniform
from branchgraph.ir.functions.elementary import (
    absolute,
    clip,
    exp,
    gelu,
    hard_sigmoid,
    log,
    maximum,
    maxout,
    minimum,
    prelu,
    relu6,
    selu,
    silu,
    softplus,
    softsign,
    sqrt,
    square,
    swish,
)
from branchgraph.ir.functions.layout import (
    broadcast_to,
    expand_dims,
    pad,
    repeat,
    resize_bilinear,
    resize_nearest,
    squeeze,
    stack,
    swap_axes,
    tile,
    transpose,
)
from branchgraph.ir.functions.reduction import (
    global_norm,
    group_norm,
    instance_norm,
    l2_normalise,
    layer_norm,
    norm,
    reduce_max,
    reduce_mean,
    reduce_min,
    reduce_prod,
    reduce_sum,
)
from branchgraph.ir.functions.windows import adaptive_average_pool, lp_pool, sum_pool

__all__ = [
    "absolute",
    "adaptive_average_pool",
    "bernoulli",
    "broadcast_to",
    "channel_scaled_conv",
    "clip",
    "convolve",
    "depthwise_conv",
    "exp",
    "expand_dims",
    "gelu",
    "global_norm",
    "group_norm",
    "gumbel",
    "hard_sigmoid",
    "instance_norm",
    "l2_normalise",
    "layer_norm",
    "log",
    "lp_pool",
    "maximum",
    "maxout",
    "minimum",
    "mixed_conv",
    "norm",
    "normal",
    "pad",
    "prelu",
    "reduce_max",
    "reduce_mean",
    "reduce_min",
    "reduce_prod",
    "reduce_sum",
    "relu6",
    "repeat",
    "resize_bilinear",
    "resize_nearest",
    "rrelu",
    "sample_conv",
    "scale_channels",
    "selu",
    "separable_conv",
    "silu",
    "softplus",
    "softsign",
    "sqrt",
    "square",
    "squeeze",
    "stack",
    "sum_pool",
    "swap_axes",
    "swish",
    "tile",
    "transpose",
    "uniform",
]
