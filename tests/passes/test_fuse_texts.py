"""A small example of every rule: the text of the graph before and after."""
# ruff: noqa: E501

from __future__ import annotations

import pytest

from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.passes.base import Pass

#: Rule to options, the graph before, and after.
TEXTS = {
    "R1": (
        "fuse_branches",
        """\
graph small {
  state conv.weight : f32[2, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state norm.gamma : f32[2] param init=zeros()
  state norm.beta : f32[2] param init=zeros()
  state norm.mean : f32[2] statistic init=zeros()
  state norm.var : f32[2] statistic init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = conv(x, conv.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 2, 2]  # conv
  %1 = batch_norm_inference(%0, norm.gamma, norm.beta, norm.mean, norm.var) {eps=0.5} : f32[N, 2, 2, 2]  # norm
  output y = %1
}
""",
        """\
graph small {
  state norm.var : f32[2] statistic init=zeros()
  state norm.gamma : f32[2] param init=zeros()
  state conv.weight : f32[2, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state norm.mean : f32[2] statistic init=zeros()
  state norm.beta : f32[2] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = full() {value=0.5, shape=[], dtype=f32} : f32[]
  %1 = add(norm.var, %0) : f32[2]
  %2 = sqrt(%1) : f32[2]
  %3 = divide(norm.gamma, %2) : f32[2]
  %4 = reshape(%3) {shape=[2, 1, 1, 1]} : f32[2, 1, 1, 1]
  %5 = multiply(conv.weight, %4) : f32[2, 2, 3, 3]  # conv.weight
  %6 = multiply(norm.mean, %3) : f32[2]
  %7 = subtract(norm.beta, %6) : f32[2]  # conv.bias
  %8 = conv(x, %5, %7) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 2, 2]  # conv
  output y = %8
}
""",
    ),
    "R2": (
        "fuse_branches",
        """\
graph small {
  state scale : f32[2, 1, 1] param init=zeros()
  state conv.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state conv.bias : f32[1] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = multiply(x, scale) : f32[N, 2, 4, 4]
  %1 = conv(%0, conv.weight, conv.bias) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 1, 4, 4]  # conv
  output y = %1
}
""",
        """\
graph small {
  state scale : f32[2, 1, 1] param init=zeros()
  state conv.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state conv.bias : f32[1] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = reshape(scale) {shape=[1, 2, 1, 1]} : f32[1, 2, 1, 1]
  %1 = multiply(conv.weight, %0) : f32[1, 2, 3, 3]  # conv.weight
  %2 = conv(x, %1, conv.bias) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 1, 4, 4]  # conv
  output y = %2
}
""",
    ),
    "R2 with a bias map": (
        "fuse_branches:bias_maps=true",
        """\
graph small {
  state shift : f32[2, 1, 1] param init=zeros()
  state conv.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  input x : f32[N, 2, 4, 4]
  %0 = add(x, shift) : f32[N, 2, 4, 4]
  %1 = conv(%0, conv.weight) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 1, 4, 4]  # conv
  output y = %1
}
""",
        """\
graph small {
  state conv.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state shift : f32[2, 1, 1] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = conv(x, conv.weight) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 1, 4, 4]  # conv
  %1 = reshape(shift) {shape=[1, 2, 1, 1]} : f32[1, 2, 1, 1]
  %2 = broadcast_to(%1) {shape=[1, 2, 4, 4]} : f32[1, 2, 4, 4]
  %3 = conv(%2, conv.weight) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[1, 1, 4, 4]  # conv.bias_map
  %4 = add(%0, %3) : f32[N, 1, 4, 4]  # conv.biased
  output y = %4
}
""",
    ),
    "R3": (
        "fuse_branches",
        """\
graph small {
  state square.weight : f32[2, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state square.bias : f32[2] param init=zeros()
  state row.weight : f32[2, 2, 1, 2] param init=lecun_normal(fan_in=4, scale=1.0)
  input x : f32[N, 2, 4, 4]
  %0 = conv(x, square.weight, square.bias) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 2, 4, 4]  # square
  %1 = conv(x, row.weight) {stride=[1, 1], pad=[0, 1, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 4, 4]  # row
  %2 = sum(%0, %1) : f32[N, 2, 4, 4]  # sum
  output y = %2
}
""",
        """\
graph small {
  state row.weight : f32[2, 2, 1, 2] param init=lecun_normal(fan_in=4, scale=1.0)
  state square.weight : f32[2, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state square.bias : f32[2] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = embed(row.weight) {axis=2, start=1, size=3, step=1} : f32[2, 2, 3, 2]
  %1 = embed(%0) {axis=3, start=0, size=3, step=1} : f32[2, 2, 3, 3]
  %2 = sum(square.weight, %1) : f32[2, 2, 3, 3]  # sum.weight
  %3 = conv(x, %2, square.bias) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 2, 4, 4]  # sum
  output y = %3
}
""",
    ),
    "R4": (
        "fuse_branches",
        """\
graph small {
  state full.weight : f32[2, 2, 1, 1] param init=lecun_normal(fan_in=2, scale=1.0)
  state grouped.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  input x : f32[N, 2, 4, 4]
  %0 = conv(x, full.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 4, 4]  # full
  %1 = conv(x, grouped.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 4, 4]  # grouped
  %2 = sum(%0, %1) : f32[N, 2, 4, 4]  # sum
  output y = %2
}
""",
        """\
graph small {
  state grouped.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  state full.weight : f32[2, 2, 1, 1] param init=lecun_normal(fan_in=2, scale=1.0)
  input x : f32[N, 2, 4, 4]
  %0 = reshape(grouped.weight) {shape=[1, 1, 2, 1]} : f32[1, 1, 2, 1]
  %1 = embed(%0) {axis=2, start=0, size=4, step=3} : f32[1, 1, 4, 1]
  %2 = reshape(%1) {shape=[2, 2, 1, 1]} : f32[2, 2, 1, 1]
  %3 = sum(full.weight, %2) : f32[2, 2, 1, 1]  # sum.weight
  %4 = conv(x, %3) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 4, 4]  # sum
  output y = %4
}
""",
    ),
    "R5": (
        "fuse_branches",
        """\
graph small {
  state conv.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  state conv.bias : f32[2] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = conv(x, conv.weight, conv.bias) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 4, 4]  # conv
  %1 = sum(%0, x) : f32[N, 2, 4, 4]  # sum
  output y = %1
}
""",
        """\
graph small {
  state conv.weight : f32[2, 1, 1, 1] param init=lecun_normal(fan_in=1, scale=1.0)
  state conv.bias : f32[2] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = full() {value=1.0, shape=[2, 1, 1, 1], dtype=f32} : f32[2, 1, 1, 1]
  %1 = sum(conv.weight, %0) : f32[2, 1, 1, 1]  # sum.weight
  %2 = conv(x, %1, conv.bias) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 4, 4]  # sum
  output y = %2
}
""",
    ),
    "R6": (
        "fuse_branches",
        """\
graph small {
  state first.weight : f32[3, 2, 1, 1] param init=lecun_normal(fan_in=2, scale=1.0)
  state first.bias : f32[3] param init=zeros()
  state second.weight : f32[1, 3, 3, 3] param init=lecun_normal(fan_in=27, scale=1.0)
  state second.bias : f32[1] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = conv(x, first.weight, first.bias) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 3, 6, 6]  # first
  %1 = conv(%0, second.weight, second.bias) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 4, 4]  # second
  output y = %1
}
""",
        """\
graph small {
  state second.weight : f32[1, 3, 3, 3] param init=lecun_normal(fan_in=27, scale=1.0)
  state first.weight : f32[3, 2, 1, 1] param init=lecun_normal(fan_in=2, scale=1.0)
  state first.bias : f32[3] param init=zeros()
  state second.bias : f32[1] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = conv_transpose(second.weight, first.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1, size=[3, 3]} : f32[1, 2, 3, 3]  # second.weight
  %1 = reduce_sum(second.weight) {axes=[2, 3], keepdims=false} : f32[1, 3]
  %2 = reshape(%1) {shape=[1, 1, 3]} : f32[1, 1, 3]
  %3 = reshape(first.bias) {shape=[1, 3, 1]} : f32[1, 3, 1]
  %4 = matmul(%2, %3) {transpose_a=false, transpose_b=false} : f32[1, 1, 1]
  %5 = reshape(%4) {shape=[1]} : f32[1]
  %6 = sum(%5, second.bias) : f32[1]  # second.bias
  %7 = conv(x, %0, %6) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 1, 4, 4]  # second
  output y = %7
}
""",
    ),
    "R7": (
        "fuse_branches",
        """\
graph small {
  state first.weight : f32[3, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state second.weight : f32[1, 3, 1, 1] param init=lecun_normal(fan_in=3, scale=1.0)
  state second.bias : f32[1] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = conv(x, first.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 3, 2, 2]  # first
  %1 = conv(%0, second.weight, second.bias) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 2, 2]  # second
  output y = %1
}
""",
        """\
graph small {
  state second.weight : f32[1, 3, 1, 1] param init=lecun_normal(fan_in=3, scale=1.0)
  state first.weight : f32[3, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state second.bias : f32[1] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = conv_transpose(second.weight, first.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1, size=[3, 3]} : f32[1, 2, 3, 3]  # second.weight
  %1 = conv(x, %0, second.bias) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 2, 2]  # second
  output y = %1
}
""",
    ),
    "R8": (
        "fuse_branches",
        """\
graph small {
  state first.weight : f32[3, 2, 2, 2] param init=lecun_normal(fan_in=8, scale=1.0)
  state second.weight : f32[1, 3, 2, 2] param init=lecun_normal(fan_in=12, scale=1.0)
  input x : f32[N, 2, 4, 4]
  %0 = conv(x, first.weight) {stride=[2, 2], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 3, 2, 2]  # first
  %1 = conv(%0, second.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 1, 1]  # second
  output y = %1
}
""",
        """\
graph small {
  state second.weight : f32[1, 3, 2, 2] param init=lecun_normal(fan_in=12, scale=1.0)
  state first.weight : f32[3, 2, 2, 2] param init=lecun_normal(fan_in=8, scale=1.0)
  input x : f32[N, 2, 4, 4]
  %0 = conv_transpose(second.weight, first.weight) {stride=[2, 2], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1, size=[4, 4]} : f32[1, 2, 4, 4]  # second.weight
  %1 = conv(x, %0) {stride=[2, 2], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 1, 1]  # second
  output y = %1
}
""",
    ),
    "R9": (
        "fuse_branches",
        """\
graph small {
  state conv.weight : f32[2, 1, 2, 2] param init=lecun_normal(fan_in=4, scale=1.0)
  state conv.bias : f32[2] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = conv(x, conv.weight, conv.bias) {stride=[2, 2], pad=[0, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 2, 2]  # conv
  %1 = average_pool(x) {kernel=[2, 2], stride=[2, 2], pad=[0, 0, 0, 0], cover_all=false, divisor="kernel"} : f32[N, 2, 2, 2]  # pool
  %2 = sum(%0, %1) : f32[N, 2, 2, 2]  # sum
  output y = %2
}
""",
        """\
graph small {
  state conv.weight : f32[2, 1, 2, 2] param init=lecun_normal(fan_in=4, scale=1.0)
  state conv.bias : f32[2] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = full() {value=0.25, shape=[2, 1, 2, 2], dtype=f32} : f32[2, 1, 2, 2]
  %1 = sum(conv.weight, %0) : f32[2, 1, 2, 2]  # sum.weight
  %2 = conv(x, %1, conv.bias) {stride=[2, 2], pad=[0, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 2, 2]  # sum
  output y = %2
}
""",
    ),
    "R10": (
        "fuse_branches",
        """\
graph small {
  state left.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state left.bias : f32[1] param init=zeros()
  state right.weight : f32[2, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state right.bias : f32[2] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = conv(x, left.weight, left.bias) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 2, 2]  # left
  %1 = conv(x, right.weight, right.bias) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 2, 2]  # right
  %2 = concat(%0, %1) {axis=1} : f32[N, 3, 2, 2]  # concat
  output y = %2
}
""",
        """\
graph small {
  state left.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state right.weight : f32[2, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state left.bias : f32[1] param init=zeros()
  state right.bias : f32[2] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = concat(left.weight, right.weight) {axis=0} : f32[3, 2, 3, 3]  # concat.weight
  %1 = concat(left.bias, right.bias) {axis=0} : f32[3]  # concat.bias
  %2 = conv(x, %0, %1) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 3, 2, 2]  # concat
  output y = %2
}
""",
    ),
    "R11": (
        "fuse_branches:concats=true",
        """\
graph small {
  state left.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state left.bias : f32[1] param init=zeros()
  state right.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  input x : f32[N, 2, 4, 4]
  %0 = relu(x) : f32[N, 2, 4, 4]  # relu
  %1 = conv(%0, left.weight, left.bias) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 2, 2]  # left
  %2 = sigmoid(x) : f32[N, 2, 4, 4]  # sigmoid
  %3 = conv(%2, right.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 2, 2]  # right
  %4 = sum(%1, %3) : f32[N, 1, 2, 2]  # sum
  output y = %4
}
""",
        """\
graph small {
  state left.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state right.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state left.bias : f32[1] param init=zeros()
  input x : f32[N, 2, 4, 4]
  %0 = relu(x) : f32[N, 2, 4, 4]  # relu
  %1 = sigmoid(x) : f32[N, 2, 4, 4]  # sigmoid
  %2 = concat(%0, %1) {axis=1} : f32[N, 4, 4, 4]
  %3 = concat(left.weight, right.weight) {axis=1} : f32[1, 4, 3, 3]  # sum.weight
  %4 = conv(%2, %3, left.bias) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 2, 2]  # sum
  output y = %4
}
""",
    ),
    "R12": (
        "fuse_branches:grow=true",
        """\
graph small {
  state dilated.weight : f32[1, 2, 2, 2] param init=lecun_normal(fan_in=8, scale=1.0)
  state plain.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  input x : f32[N, 2, 4, 4]
  %0 = conv(x, dilated.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[2, 2], groups=1} : f32[N, 1, 2, 2]  # dilated
  %1 = conv(x, plain.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 2, 2]  # plain
  %2 = sum(%0, %1) : f32[N, 1, 2, 2]  # sum
  output y = %2
}
""",
        """\
graph small {
  state dilated.weight : f32[1, 2, 2, 2] param init=lecun_normal(fan_in=8, scale=1.0)
  state plain.weight : f32[1, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  input x : f32[N, 2, 4, 4]
  %0 = embed(dilated.weight) {axis=2, start=0, size=3, step=2} : f32[1, 2, 3, 2]
  %1 = embed(%0) {axis=3, start=0, size=3, step=2} : f32[1, 2, 3, 3]
  %2 = sum(%1, plain.weight) : f32[1, 2, 3, 3]  # sum.weight
  %3 = conv(x, %2) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 2, 2]  # sum
  output y = %3
}
""",
    ),
    "R13": (
        "fuse_branches",
        """\
graph small {
  state conv0.weight : f32[2, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state conv0.bias : f32[2] param init=zeros()
  state conv1.weight : f32[2, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state conv1.bias : f32[2] param init=zeros()
  input x : f32[N, 2, 20, 20]
  input gate : f32[N, 2, 1, 1]
  %0 = conv(x, conv0.weight, conv0.bias) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 2, 20, 20]  # conv0
  %1 = conv(x, conv1.weight, conv1.bias) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 2, 20, 20]  # conv1
  %2 = slice(gate) {axis=1, start=0, size=1, step=1} : f32[N, 1, 1, 1]
  %3 = slice(gate) {axis=1, start=1, size=1, step=1} : f32[N, 1, 1, 1]
  %4 = multiply(%0, %2) : f32[N, 2, 20, 20]
  %5 = multiply(%1, %3) : f32[N, 2, 20, 20]
  %6 = sum(%4, %5) : f32[N, 2, 20, 20]  # sum
  output y = %6
}
""",
        """\
graph small {
  state conv0.weight : f32[2, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state conv1.weight : f32[2, 2, 3, 3] param init=lecun_normal(fan_in=18, scale=1.0)
  state conv0.bias : f32[2] param init=zeros()
  state conv1.bias : f32[2] param init=zeros()
  input x : f32[N, 2, 20, 20]
  input gate : f32[N, 2, 1, 1]
  %0 = reshape(conv0.weight) {shape=[1, 2, 2, 3, 3]} : f32[1, 2, 2, 3, 3]
  %1 = reshape(conv1.weight) {shape=[1, 2, 2, 3, 3]} : f32[1, 2, 2, 3, 3]
  %2 = concat(%0, %1) {axis=0} : f32[2, 2, 2, 3, 3]
  %3 = reshape(conv0.bias) {shape=[1, 2]} : f32[1, 2]
  %4 = reshape(conv1.bias) {shape=[1, 2]} : f32[1, 2]
  %5 = concat(%3, %4) {axis=0} : f32[2, 2]  # sum.bias
  %6 = reshape(gate) {shape=[N, 2]} : f32[N, 2]
  %7 = reshape(%2) {shape=[2, 36]} : f32[2, 36]  # sum.weight
  %8 = matmul(%6, %7) {transpose_a=false, transpose_b=false} : f32[N, 36]
  %9 = reshape(%8) {shape=[N, 2, 2, 3, 3]} : f32[N, 2, 2, 3, 3]
  %10 = matmul(%6, %5) {transpose_a=false, transpose_b=false} : f32[N, 2]
  %11 = sample_conv(x, %9, %10) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1} : f32[N, 2, 20, 20]  # sum
  output y = %11
}
""",
    ),
    "R14": (
        "fuse_branches",
        """\
graph small {
  state first.weight : f32[2, 3] param init=lecun_normal(fan_in=3, scale=1.0)
  state first.bias : f32[2] param init=zeros()
  state second.weight : f32[1, 2] param init=lecun_normal(fan_in=2, scale=1.0)
  state second.bias : f32[1] param init=zeros()
  input x : f32[N, 3]
  %0 = dense(x, first.weight, first.bias) : f32[N, 2]  # first
  %1 = dense(%0, second.weight, second.bias) : f32[N, 1]  # second
  output y = %1
}
""",
        """\
graph small {
  state second.weight : f32[1, 2] param init=lecun_normal(fan_in=2, scale=1.0)
  state first.weight : f32[2, 3] param init=lecun_normal(fan_in=3, scale=1.0)
  state first.bias : f32[2] param init=zeros()
  state second.bias : f32[1] param init=zeros()
  input x : f32[N, 3]
  %0 = matmul(second.weight, first.weight) {transpose_a=false, transpose_b=false} : f32[1, 3]  # second.weight
  %1 = reshape(second.weight) {shape=[1, 1, 2]} : f32[1, 1, 2]
  %2 = reshape(first.bias) {shape=[1, 2, 1]} : f32[1, 2, 1]
  %3 = matmul(%1, %2) {transpose_a=false, transpose_b=false} : f32[1, 1, 1]
  %4 = reshape(%3) {shape=[1]} : f32[1]
  %5 = sum(%4, second.bias) : f32[1]  # second.bias
  %6 = dense(x, %0, %5) : f32[N, 1]  # second
  output y = %6
}
""",
    ),
}


@pytest.mark.parametrize("rule", TEXTS)
def test_the_rewrite_as_text(rule: str) -> None:
    spec, before, after = TEXTS[rule]
    step = Pass.from_spec(spec)
    result = step.run(parse_graph(before))
    assert result.report.matches
    assert all(rule.partition(" ")[0] in m for m in result.report.matches[-1:])
    assert format_graph(result.graph) == after
    assert not step.run(parse_graph(after)).report.matches
