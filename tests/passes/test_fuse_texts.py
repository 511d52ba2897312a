"""A small example of every rule: the nodes of the graph before and after.

`{valid}` and `{same}` stand for the attributes of a convolution without padding and of one that
pads by 1, `{plain}` for those of a product of matrices as they are.
"""
# ruff: noqa: E501

from __future__ import annotations

import re
from dataclasses import dataclass
from textwrap import dedent

import numpy as np
import pytest

from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.passes.base import Pass, Result

_SHORT = {
    "{valid}": "{stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1}",
    "{same}": "{stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=1}",
    "{plain}": "{transpose_a=false, transpose_b=false}",
}


@dataclass(frozen=True)
class Rewrite:
    """Nodes before and after; the last value is the output, unless outputs are listed."""

    states: str
    before: str
    after: str
    inputs: tuple[str, ...] = ("x : f32[N, 2, 4, 4]",)
    options: str = ""

    @property
    def graph(self) -> Graph:
        """The graph before."""
        states = re.findall(r"([\w.]+) (\[.*?\])", self.states)
        lines = [f"state {name} : f32{shape} param init=zeros()" for name, shape in states]
        lines += [f"input {each}" for each in self.inputs]
        return parse_graph("\n".join(["graph small {", *lines, *nodes(self.before), "}"]))


def nodes(text: str) -> list[str]:
    """The lines of a text, written out."""
    lines = dedent(text).strip().splitlines()
    if not lines[-1].startswith("output"):
        lines.append(f"output y = {lines[-1].partition(' = ')[0]}")
    for short, long in _SHORT.items():
        lines = [line.replace(short, long) for line in lines]
    return lines


REWRITES = {
    "R1": Rewrite(
        states=(
            "conv.weight [2, 2, 3, 3], norm.gamma [2], norm.beta [2], norm.mean [2], norm.var [2]"
        ),
        before="""
        %0 = conv(x, conv.weight) {valid} : f32[N, 2, 2, 2]  # conv
        %1 = batch_norm_inference(%0, norm.gamma, norm.beta, norm.mean, norm.var) {eps=0.5} : f32[N, 2, 2, 2]  # norm
        """,
        after="""
        %0 = full() {value=0.5, shape=[], dtype=f32} : f32[]
        %1 = add(norm.var, %0) : f32[2]
        %2 = sqrt(%1) : f32[2]
        %3 = divide(norm.gamma, %2) : f32[2]
        %4 = reshape(%3) {shape=[2, 1, 1, 1]} : f32[2, 1, 1, 1]
        %5 = multiply(conv.weight, %4) : f32[2, 2, 3, 3]  # conv.weight
        %6 = multiply(norm.mean, %3) : f32[2]
        %7 = subtract(norm.beta, %6) : f32[2]  # conv.bias
        %8 = conv(x, %5, %7) {valid} : f32[N, 2, 2, 2]  # conv
        """,
    ),
    "R1 behind a mixture": Rewrite(
        states="kernels [2, 36], gamma [2], beta [2], mean [2], var [2]",
        inputs=(
            "x : f32[N, 2, 4, 4]",
            "gates : f32[N, 2]",
        ),
        before="""
        %0 = matmul(gates, kernels) {plain} : f32[N, 36]
        %1 = reshape(%0) {shape=[N, 2, 2, 3, 3]} : f32[N, 2, 2, 3, 3]
        %2 = sample_conv(x, %1) {same} : f32[N, 2, 4, 4]  # mixed
        %3 = batch_norm_inference(%2, gamma, beta, mean, var) {eps=0.5} : f32[N, 2, 4, 4]  # norm
        """,
        after="""
        %0 = full() {value=0.5, shape=[], dtype=f32} : f32[]
        %1 = add(var, %0) : f32[2]
        %2 = sqrt(%1) : f32[2]
        %3 = divide(gamma, %2) : f32[2]
        %4 = multiply(mean, %3) : f32[2]
        %5 = subtract(beta, %4) : f32[2]
        %6 = reshape(%5) {shape=[1, 2]} : f32[1, 2]
        %7 = broadcast_to(%6) {shape=[N, 2]} : f32[N, 2]  # mixed.bias
        %8 = reshape(%3) {shape=[1, 2, 1, 1, 1]} : f32[1, 2, 1, 1, 1]
        %9 = broadcast_to(%8) {shape=[1, 2, 2, 3, 3]} : f32[1, 2, 2, 3, 3]
        %10 = reshape(%9) {shape=[1, 36]} : f32[1, 36]
        %11 = multiply(kernels, %10) : f32[2, 36]
        %12 = matmul(gates, %11) {plain} : f32[N, 36]
        %13 = reshape(%12) {shape=[N, 2, 2, 3, 3]} : f32[N, 2, 2, 3, 3]
        %14 = sample_conv(x, %13, %7) {same} : f32[N, 2, 4, 4]  # mixed
        """,
    ),
    "R2": Rewrite(
        states="scale [2, 1, 1], conv.weight [1, 2, 3, 3], conv.bias [1]",
        before="""
        %0 = multiply(x, scale) : f32[N, 2, 4, 4]
        %1 = conv(%0, conv.weight, conv.bias) {same} : f32[N, 1, 4, 4]  # conv
        """,
        after="""
        %0 = reshape(scale) {shape=[1, 2, 1, 1]} : f32[1, 2, 1, 1]
        %1 = multiply(conv.weight, %0) : f32[1, 2, 3, 3]  # conv.weight
        %2 = conv(x, %1, conv.bias) {same} : f32[N, 1, 4, 4]  # conv
        """,
    ),
    "R2 with a bias map": Rewrite(
        states="shift [2, 1, 1], conv.weight [1, 2, 3, 3]",
        options="bias_maps=true",
        before="""
        %0 = add(x, shift) : f32[N, 2, 4, 4]
        %1 = conv(%0, conv.weight) {same} : f32[N, 1, 4, 4]  # conv
        """,
        after="""
        %0 = conv(x, conv.weight) {same} : f32[N, 1, 4, 4]  # conv
        %1 = reshape(shift) {shape=[1, 2, 1, 1]} : f32[1, 2, 1, 1]
        %2 = broadcast_to(%1) {shape=[1, 2, 4, 4]} : f32[1, 2, 4, 4]
        %3 = conv(%2, conv.weight) {same} : f32[1, 1, 4, 4]  # conv.bias_map
        %4 = add(%0, %3) : f32[N, 1, 4, 4]  # conv.biased
        """,
    ),
    "R2 padded by channel": Rewrite(
        states="gamma [2], beta [2], mean [2], var [2], conv.weight [1, 2, 3, 3]",
        inputs=("x : f32[N, 2, H, W]",),
        options="pad_values=true",
        before="""
        %0 = batch_norm_inference(x, gamma, beta, mean, var) {eps=0.5} : f32[N, 2, H, W]  # norm
        %1 = conv(%0, conv.weight) {same} : f32[N, 1, H, W]  # conv
        """,
        after="""
        %0 = full() {value=0.5, shape=[], dtype=f32} : f32[]
        %1 = add(var, %0) : f32[2]
        %2 = sqrt(%1) : f32[2]
        %3 = divide(gamma, %2) : f32[2]
        %4 = multiply(mean, %3) : f32[2]
        %5 = subtract(beta, %4) : f32[2]
        %6 = divide(%5, %3) : f32[2]
        %7 = reshape(%6) {shape=[2, 1, 1]} : f32[2, 1, 1]
        %8 = add(x, %7) : f32[N, 2, H, W]
        %9 = reshape(%3) {shape=[1, 2, 1, 1]} : f32[1, 2, 1, 1]
        %10 = multiply(conv.weight, %9) : f32[1, 2, 3, 3]  # conv.weight
        %11 = conv(%8, %10) {same} : f32[N, 1, H, W]  # conv
        """,
    ),
    "R3": Rewrite(
        states="square.weight [2, 2, 3, 3], square.bias [2], row.weight [2, 2, 1, 2]",
        before="""
        %0 = conv(x, square.weight, square.bias) {same} : f32[N, 2, 4, 4]  # square
        %1 = conv(x, row.weight) {stride=[1, 1], pad=[0, 1, 0, 0], dilation=[1, 1], groups=1} : f32[N, 2, 4, 4]  # row
        %2 = sum(%0, %1) : f32[N, 2, 4, 4]  # sum
        """,
        after="""
        %0 = embed(row.weight) {axis=2, start=1, size=3, step=1} : f32[2, 2, 3, 2]
        %1 = embed(%0) {axis=3, start=0, size=3, step=1} : f32[2, 2, 3, 3]
        %2 = sum(square.weight, %1) : f32[2, 2, 3, 3]  # sum.weight
        %3 = conv(x, %2, square.bias) {same} : f32[N, 2, 4, 4]  # sum
        """,
    ),
    "R4": Rewrite(
        states="full.weight [2, 2, 1, 1], grouped.weight [2, 1, 1, 1]",
        before="""
        %0 = conv(x, full.weight) {valid} : f32[N, 2, 4, 4]  # full
        %1 = conv(x, grouped.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 4, 4]  # grouped
        %2 = sum(%0, %1) : f32[N, 2, 4, 4]  # sum
        """,
        after="""
        %0 = reshape(grouped.weight) {shape=[1, 1, 2, 1]} : f32[1, 1, 2, 1]
        %1 = embed(%0) {axis=2, start=0, size=4, step=3} : f32[1, 1, 4, 1]
        %2 = reshape(%1) {shape=[2, 2, 1, 1]} : f32[2, 2, 1, 1]
        %3 = sum(full.weight, %2) : f32[2, 2, 1, 1]  # sum.weight
        %4 = conv(x, %3) {valid} : f32[N, 2, 4, 4]  # sum
        """,
    ),
    "R5": Rewrite(
        states="conv.weight [2, 1, 1, 1], conv.bias [2]",
        before="""
        %0 = conv(x, conv.weight, conv.bias) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 4, 4]  # conv
        %1 = sum(%0, x) : f32[N, 2, 4, 4]  # sum
        """,
        after="""
        %0 = full() {value=1.0, shape=[2, 1, 1, 1], dtype=f32} : f32[2, 1, 1, 1]
        %1 = sum(conv.weight, %0) : f32[2, 1, 1, 1]  # sum.weight
        %2 = conv(x, %1, conv.bias) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 4, 4]  # sum
        """,
    ),
    "R6": Rewrite(
        states=(
            "first.weight [3, 2, 1, 1], first.bias [3], second.weight [1, 3, 3, 3], second.bias [1]"
        ),
        before="""
        %0 = conv(x, first.weight, first.bias) {same} : f32[N, 3, 6, 6]  # first
        %1 = conv(%0, second.weight, second.bias) {valid} : f32[N, 1, 4, 4]  # second
        """,
        after="""
        %0 = conv_transpose(second.weight, first.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1, size=[3, 3]} : f32[1, 2, 3, 3]  # second.weight
        %1 = reduce_sum(second.weight) {axes=[2, 3], keepdims=false} : f32[1, 3]
        %2 = reshape(%1) {shape=[1, 1, 3]} : f32[1, 1, 3]
        %3 = reshape(first.bias) {shape=[1, 3, 1]} : f32[1, 3, 1]
        %4 = matmul(%2, %3) {plain} : f32[1, 1, 1]
        %5 = reshape(%4) {shape=[1]} : f32[1]
        %6 = sum(%5, second.bias) : f32[1]  # second.bias
        %7 = conv(x, %0, %6) {same} : f32[N, 1, 4, 4]  # second
        """,
    ),
    "R7": Rewrite(
        states="first.weight [3, 2, 3, 3], second.weight [1, 3, 1, 1], second.bias [1]",
        before="""
        %0 = conv(x, first.weight) {valid} : f32[N, 3, 2, 2]  # first
        %1 = conv(%0, second.weight, second.bias) {valid} : f32[N, 1, 2, 2]  # second
        """,
        after="""
        %0 = conv_transpose(second.weight, first.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1, size=[3, 3]} : f32[1, 2, 3, 3]  # second.weight
        %1 = conv(x, %0, second.bias) {valid} : f32[N, 1, 2, 2]  # second
        """,
    ),
    "R8": Rewrite(
        states="first.weight [3, 2, 2, 2], second.weight [1, 3, 2, 2]",
        before="""
        %0 = conv(x, first.weight) {stride=[2, 2], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 3, 2, 2]  # first
        %1 = conv(%0, second.weight) {valid} : f32[N, 1, 1, 1]  # second
        """,
        after="""
        %0 = conv_transpose(second.weight, first.weight) {stride=[2, 2], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1, size=[4, 4]} : f32[1, 2, 4, 4]  # second.weight
        %1 = conv(x, %0) {stride=[2, 2], pad=[0, 0, 0, 0], dilation=[1, 1], groups=1} : f32[N, 1, 1, 1]  # second
        """,
    ),
    "R9": Rewrite(
        states="conv.weight [2, 1, 2, 2], conv.bias [2]",
        before="""
        %0 = conv(x, conv.weight, conv.bias) {stride=[2, 2], pad=[0, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 2, 2]  # conv
        %1 = average_pool(x) {kernel=[2, 2], stride=[2, 2], pad=[0, 0, 0, 0], cover_all=false, divisor="kernel"} : f32[N, 2, 2, 2]  # pool
        %2 = sum(%0, %1) : f32[N, 2, 2, 2]  # sum
        """,
        after="""
        %0 = full() {value=0.25, shape=[2, 1, 2, 2], dtype=f32} : f32[2, 1, 2, 2]
        %1 = sum(conv.weight, %0) : f32[2, 1, 2, 2]  # sum.weight
        %2 = conv(x, %1, conv.bias) {stride=[2, 2], pad=[0, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 2, 2]  # sum
        """,
    ),
    "R10": Rewrite(
        states="left.weight [1, 2, 3, 3], left.bias [1], right.weight [2, 2, 3, 3], right.bias [2]",
        before="""
        %0 = conv(x, left.weight, left.bias) {valid} : f32[N, 1, 2, 2]  # left
        %1 = conv(x, right.weight, right.bias) {valid} : f32[N, 2, 2, 2]  # right
        %2 = concat(%0, %1) {axis=1} : f32[N, 3, 2, 2]  # concat
        """,
        after="""
        %0 = concat(left.weight, right.weight) {axis=0} : f32[3, 2, 3, 3]  # concat.weight
        %1 = concat(left.bias, right.bias) {axis=0} : f32[3]  # concat.bias
        %2 = conv(x, %0, %1) {valid} : f32[N, 3, 2, 2]  # concat
        """,
    ),
    "R10 dual, a slice": Rewrite(
        states="conv.weight [4, 2, 3, 3], conv.bias [4]",
        before="""
        %0 = conv(x, conv.weight, conv.bias) {same} : f32[N, 4, 4, 4]  # conv
        %1 = slice(%0) {axis=1, start=1, size=2, step=1} : f32[N, 2, 4, 4]
        """,
        after="""
        %0 = slice(conv.weight) {axis=0, start=1, size=2, step=1} : f32[2, 2, 3, 3]  # conv.weight
        %1 = slice(conv.bias) {axis=0, start=1, size=2, step=1} : f32[2]  # conv.bias
        %2 = conv(x, %0, %1) {same} : f32[N, 2, 4, 4]  # conv
        """,
    ),
    "R10 dual, a split": Rewrite(
        states="conv.weight [4, 2, 3, 3]",
        before="""
        %0 = conv(x, conv.weight) {same} : f32[N, 4, 4, 4]  # conv
        %1, %2, %3 = split(%0) {axis=1, sizes=[1, 2, 1]} : f32[N, 1, 4, 4], f32[N, 2, 4, 4], f32[N, 1, 4, 4]
        output left = %1
        output right = %3
        """,
        after="""
        %0 = slice(conv.weight) {axis=0, start=0, size=1, step=1} : f32[1, 2, 3, 3]
        %1 = slice(conv.weight) {axis=0, start=3, size=1, step=1} : f32[1, 2, 3, 3]
        %2 = concat(%0, %1) {axis=0} : f32[2, 2, 3, 3]  # conv.weight
        %3 = conv(x, %2) {same} : f32[N, 2, 4, 4]  # conv
        %4, %5 = split(%3) {axis=1, sizes=[1, 1]} : f32[N, 1, 4, 4], f32[N, 1, 4, 4]
        output left = %4
        output right = %5
        """,
    ),
    "R11": Rewrite(
        states="left.weight [1, 2, 3, 3], left.bias [1], right.weight [1, 2, 3, 3]",
        options="concats=true",
        before="""
        %0 = relu(x) : f32[N, 2, 4, 4]  # relu
        %1 = conv(%0, left.weight, left.bias) {valid} : f32[N, 1, 2, 2]  # left
        %2 = sigmoid(x) : f32[N, 2, 4, 4]  # sigmoid
        %3 = conv(%2, right.weight) {valid} : f32[N, 1, 2, 2]  # right
        %4 = sum(%1, %3) : f32[N, 1, 2, 2]  # sum
        """,
        after="""
        %0 = relu(x) : f32[N, 2, 4, 4]  # relu
        %1 = sigmoid(x) : f32[N, 2, 4, 4]  # sigmoid
        %2 = concat(%0, %1) {axis=1} : f32[N, 4, 4, 4]
        %3 = concat(left.weight, right.weight) {axis=1} : f32[1, 4, 3, 3]  # sum.weight
        %4 = conv(%2, %3, left.bias) {valid} : f32[N, 1, 2, 2]  # sum
        """,
    ),
    "R12": Rewrite(
        states="dilated.weight [1, 2, 2, 2], plain.weight [1, 2, 3, 3]",
        options="grow=true",
        before="""
        %0 = conv(x, dilated.weight) {stride=[1, 1], pad=[0, 0, 0, 0], dilation=[2, 2], groups=1} : f32[N, 1, 2, 2]  # dilated
        %1 = conv(x, plain.weight) {valid} : f32[N, 1, 2, 2]  # plain
        %2 = sum(%0, %1) : f32[N, 1, 2, 2]  # sum
        """,
        after="""
        %0 = embed(dilated.weight) {axis=2, start=0, size=3, step=2} : f32[1, 2, 3, 2]
        %1 = embed(%0) {axis=3, start=0, size=3, step=2} : f32[1, 2, 3, 3]
        %2 = sum(%1, plain.weight) : f32[1, 2, 3, 3]  # sum.weight
        %3 = conv(x, %2) {valid} : f32[N, 1, 2, 2]  # sum
        """,
    ),
    "R13": Rewrite(
        states=(
            "conv0.weight [2, 2, 3, 3], conv0.bias [2], conv1.weight [2, 2, 3, 3], conv1.bias [2]"
        ),
        inputs=(
            "x : f32[N, 2, 20, 20]",
            "gate : f32[N, 2, 1, 1]",
        ),
        before="""
        %0 = conv(x, conv0.weight, conv0.bias) {same} : f32[N, 2, 20, 20]  # conv0
        %1 = conv(x, conv1.weight, conv1.bias) {same} : f32[N, 2, 20, 20]  # conv1
        %2 = slice(gate) {axis=1, start=0, size=1, step=1} : f32[N, 1, 1, 1]
        %3 = slice(gate) {axis=1, start=1, size=1, step=1} : f32[N, 1, 1, 1]
        %4 = multiply(%0, %2) : f32[N, 2, 20, 20]
        %5 = multiply(%1, %3) : f32[N, 2, 20, 20]
        %6 = sum(%4, %5) : f32[N, 2, 20, 20]  # sum
        """,
        after="""
        %0 = reshape(conv0.weight) {shape=[1, 2, 2, 3, 3]} : f32[1, 2, 2, 3, 3]
        %1 = reshape(conv1.weight) {shape=[1, 2, 2, 3, 3]} : f32[1, 2, 2, 3, 3]
        %2 = reshape(conv0.bias) {shape=[1, 2]} : f32[1, 2]
        %3 = reshape(conv1.bias) {shape=[1, 2]} : f32[1, 2]
        %4 = reshape(gate) {shape=[N, 2]} : f32[N, 2]
        %5 = concat(%0, %1) {axis=0} : f32[2, 2, 2, 3, 3]
        %6 = reshape(%5) {shape=[2, 36]} : f32[2, 36]  # sum.weight
        %7 = matmul(%4, %6) {plain} : f32[N, 36]
        %8 = reshape(%7) {shape=[N, 2, 2, 3, 3]} : f32[N, 2, 2, 3, 3]
        %9 = concat(%2, %3) {axis=0} : f32[2, 2]  # sum.bias
        %10 = matmul(%4, %9) {plain} : f32[N, 2]
        %11 = sample_conv(x, %8, %10) {same} : f32[N, 2, 20, 20]  # sum
        """,
    ),
    "R13 gates that sum to 1": Rewrite(
        states="conv0.weight [2, 2, 3, 3], conv0.bias [2], conv1.weight [2, 2, 3, 3]",
        inputs=(
            "x : f32[N, 2, 20, 20]",
            "scores : f32[N, 2]",
        ),
        before="""
        %0 = conv(x, conv0.weight, conv0.bias) {same} : f32[N, 2, 20, 20]  # conv0
        %1 = conv(x, conv1.weight) {same} : f32[N, 2, 20, 20]  # conv1
        %2 = softmax(scores) {axis=1} : f32[N, 2]
        %3 = reshape(%2) {shape=[N, 2, 1, 1]} : f32[N, 2, 1, 1]
        %4 = slice(%3) {axis=1, start=0, size=1, step=1} : f32[N, 1, 1, 1]
        %5 = slice(%3) {axis=1, start=1, size=1, step=1} : f32[N, 1, 1, 1]
        %6 = multiply(%0, %4) : f32[N, 2, 20, 20]
        %7 = multiply(%1, %5) : f32[N, 2, 20, 20]
        %8 = sum(%6, %7) : f32[N, 2, 20, 20]  # sum
        """,
        after="""
        %0 = reshape(conv0.weight) {shape=[1, 2, 2, 3, 3]} : f32[1, 2, 2, 3, 3]
        %1 = reshape(conv1.weight) {shape=[1, 2, 2, 3, 3]} : f32[1, 2, 2, 3, 3]
        %2 = reshape(conv0.bias) {shape=[1, 2]} : f32[1, 2]
        %3 = full() {value=0.0, shape=[2], dtype=f32} : f32[2]
        %4 = reshape(%3) {shape=[1, 2]} : f32[1, 2]
        %5 = softmax(scores) {axis=1} : f32[N, 2]
        %6 = slice(%5) {axis=1, start=0, size=1, step=1} : f32[N, 1]
        %7 = subtract(%0, %1) : f32[1, 2, 2, 3, 3]
        %8 = reshape(%7) {shape=[1, 36]} : f32[1, 36]  # sum.weight
        %9 = matmul(%6, %8) {plain} : f32[N, 36]
        %10 = reshape(%9) {shape=[N, 2, 2, 3, 3]} : f32[N, 2, 2, 3, 3]
        %11 = add(%1, %10) : f32[N, 2, 2, 3, 3]
        %12 = subtract(%2, %4) : f32[1, 2]  # sum.bias
        %13 = matmul(%6, %12) {plain} : f32[N, 2]
        %14 = add(%4, %13) : f32[N, 2]
        %15 = sample_conv(x, %11, %14) {same} : f32[N, 2, 20, 20]  # sum
        """,
    ),
    "R13 gates that are the same for all samples": Rewrite(
        states="conv.weight [2, 2, 3, 3], scores [2]",
        before="""
        %0 = conv(x, conv.weight) {same} : f32[N, 2, 4, 4]  # conv
        %1 = broadcast_to(scores) {shape=[N, 2]} : f32[N, 2]
        %2 = softmax(%1) {axis=1} : f32[N, 2]
        %3 = reshape(%2) {shape=[N, 2, 1, 1]} : f32[N, 2, 1, 1]
        %4 = multiply(%0, %3) : f32[N, 2, 4, 4]  # gated
        """,
        after="""
        %0 = broadcast_to(scores) {shape=[1, 2]} : f32[1, 2]
        %1 = softmax(%0) {axis=1} : f32[1, 2]
        %2 = reshape(%1) {shape=[2, 1, 1, 1]} : f32[2, 1, 1, 1]
        %3 = multiply(conv.weight, %2) : f32[2, 2, 3, 3]  # conv.weight
        %4 = conv(x, %3) {same} : f32[N, 2, 4, 4]  # conv
        """,
    ),
    "R13 kernels that are the same for all samples": Rewrite(
        states="kernels [2, 36], gate.bias [2]",
        before="""
        %0 = reduce_mean(x) {axes=[2, 3], keepdims=false} : f32[N, 2]
        %1 = full() {value=0.0, shape=[2, 2], dtype=f32} : f32[2, 2]
        %2 = dense(%0, %1, gate.bias) : f32[N, 2]
        %3 = softmax(%2) {axis=1} : f32[N, 2]
        %4 = matmul(%3, kernels) {plain} : f32[N, 36]
        %5 = reshape(%4) {shape=[N, 2, 2, 3, 3]} : f32[N, 2, 2, 3, 3]
        %6 = sample_conv(x, %5) {same} : f32[N, 2, 4, 4]  # mixed
        """,
        after="""
        %0 = reshape(gate.bias) {shape=[1, 2]} : f32[1, 2]
        %1 = softmax(%0) {axis=1} : f32[1, 2]
        %2 = matmul(%1, kernels) {plain} : f32[1, 36]
        %3 = reshape(%2) {shape=[2, 2, 3, 3]} : f32[2, 2, 3, 3]  # mixed.weight
        %4 = conv(x, %3) {same} : f32[N, 2, 4, 4]  # mixed
        """,
    ),
    "R13 of R16, scales in place of norms": Rewrite(
        states=(
            "left.weight [2, 2, 1, 1], left.scale [2, 1, 1], right.weight [2, 2, 1, 1], "
            "right.scale [2, 1, 1]"
        ),
        options="rules=R3+R16",
        before="""
        %0 = conv(x, left.weight) {valid} : f32[N, 2, 4, 4]  # left
        %1 = multiply(%0, left.scale) : f32[N, 2, 4, 4]
        %2 = conv(x, right.weight) {valid} : f32[N, 2, 4, 4]  # right
        %3 = multiply(%2, right.scale) : f32[N, 2, 4, 4]
        %4 = sum(%1, %3) : f32[N, 2, 4, 4]  # sum
        """,
        after="""
        %0 = reshape(left.scale) {shape=[2, 1, 1, 1]} : f32[2, 1, 1, 1]
        %1 = multiply(left.weight, %0) : f32[2, 2, 1, 1]  # left.weight
        %2 = reshape(right.scale) {shape=[2, 1, 1, 1]} : f32[2, 1, 1, 1]
        %3 = multiply(right.weight, %2) : f32[2, 2, 1, 1]  # right.weight
        %4 = sum(%1, %3) : f32[2, 2, 1, 1]  # sum.weight
        %5 = conv(x, %4) {valid} : f32[N, 2, 4, 4]  # sum
        """,
    ),
    "R14": Rewrite(
        states="first.weight [2, 3], first.bias [2], second.weight [1, 2], second.bias [1]",
        inputs=("x : f32[N, 3]",),
        before="""
        %0 = dense(x, first.weight, first.bias) : f32[N, 2]  # first
        %1 = dense(%0, second.weight, second.bias) : f32[N, 1]  # second
        """,
        after="""
        %0 = matmul(second.weight, first.weight) {plain} : f32[1, 3]  # second.weight
        %1 = reshape(second.weight) {shape=[1, 1, 2]} : f32[1, 1, 2]
        %2 = reshape(first.bias) {shape=[1, 2, 1]} : f32[1, 2, 1]
        %3 = matmul(%1, %2) {plain} : f32[1, 1, 1]
        %4 = reshape(%3) {shape=[1]} : f32[1]
        %5 = sum(%4, second.bias) : f32[1]  # second.bias
        %6 = dense(x, %0, %5) : f32[N, 1]  # second
        """,
    ),
    "R15 a fixed filter": Rewrite(
        states="conv.weight [2, 2, 3, 3]",
        before="""
        %0 = conv(x, conv.weight) {same} : f32[N, 2, 4, 4]  # conv
        %1 = full() {value=0.125, shape=[2, 1, 3, 3], dtype=f32} : f32[2, 1, 3, 3]
        %2 = conv(x, %1) {stride=[1, 1], pad=[1, 1, 1, 1], dilation=[1, 1], groups=2} : f32[N, 2, 4, 4]  # average
        %3 = sum(%0, %2) : f32[N, 2, 4, 4]  # sum
        """,
        after="""
        %0 = full() {value=0.125, shape=[2, 1, 3, 3], dtype=f32} : f32[2, 1, 3, 3]
        %1 = reshape(%0) {shape=[1, 1, 2, 9]} : f32[1, 1, 2, 9]
        %2 = embed(%1) {axis=2, start=0, size=4, step=3} : f32[1, 1, 4, 9]
        %3 = reshape(%2) {shape=[2, 2, 3, 3]} : f32[2, 2, 3, 3]
        %4 = sum(conv.weight, %3) : f32[2, 2, 3, 3]  # sum.weight
        %5 = conv(x, %4) {same} : f32[N, 2, 4, 4]  # sum
        """,
    ),
    "R15 a shift": Rewrite(
        states="conv.weight [2, 1, 2, 1]",
        before="""
        %0 = conv(x, conv.weight) {stride=[1, 1], pad=[1, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 4, 4]  # conv
        %1 = pad(x) {begin=[0, 0, 1, 0], end=[0, 0, 0, 0], value=0.0} : f32[N, 2, 5, 4]
        %2 = slice(%1) {axis=2, start=0, size=4, step=1} : f32[N, 2, 4, 4]
        %3 = sum(%0, %2) : f32[N, 2, 4, 4]  # sum
        """,
        after="""
        %0 = full() {value=1.0, shape=[2, 1, 1, 1], dtype=f32} : f32[2, 1, 1, 1]
        %1 = embed(%0) {axis=2, start=0, size=2, step=1} : f32[2, 1, 2, 1]
        %2 = sum(conv.weight, %1) : f32[2, 1, 2, 1]  # sum.weight
        %3 = conv(x, %2) {stride=[1, 1], pad=[1, 0, 0, 0], dilation=[1, 1], groups=2} : f32[N, 2, 4, 4]  # sum
        """,
    ),
}


@pytest.mark.parametrize("rule", REWRITES)
def test_the_rewrite_as_text(rule: str) -> None:
    rewrite = REWRITES[rule]
    spec = f"fuse_branches:{rewrite.options}" if rewrite.options else "fuse_branches"
    result = run(spec, rewrite.graph)
    named = {r for match in result.report.matches for r in re.findall(r"R\d+", match)}
    assert rule.partition(" ")[0] in named
    printed = format_graph(result.graph)
    assert re.findall(r"^  ((?:%|output).*)$", printed, re.MULTILINE) == nodes(rewrite.after)
    assert not run(spec, parse_graph(printed)).report.matches


def run(spec: str, graph: Graph) -> Result:
    """What a pass makes of a graph whose states are all 1."""
    values = Store({state: np.ones(state.shape, np.float32) for state in graph.states})
    return Pass.from_spec(spec).run(graph, values=values)
