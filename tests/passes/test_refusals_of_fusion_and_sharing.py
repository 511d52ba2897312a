"""Refusals of `fuse_branches` and `share_weights` that their own tests do not meet, word for word.

`fuse_branches` leaves a place as it is and reports node and reason; `share_weights` raises.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from builders import image_input

from branchgraph.ir.builder import (
    batch_norm,
    concat,
    conv,
    dense,
    flatten,
    global_average_pool,
    merge_sum,
    noise,
    relu,
    reshape,
    sigmoid,
)
from branchgraph.ir.errors import FormatError, RefusalError
from branchgraph.ir.functions import sample_conv, scale_channels
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.op import make
from branchgraph.ir.state import State
from branchgraph.ir.text import format_graph
from branchgraph.passes.fuse_branches import FuseBranches
from branchgraph.passes.share_weights import ShareWeights
from branchgraph.passes.share_weights.branch_copies import Origin
from branchgraph.passes.share_weights.mask_branches import WideStates
from branchgraph.passes.specialise import specialise

Layers = Callable[[Value], Value]


def learned(graph: Graph, *shape: int, name: str = "learned") -> Value:
    return graph.read(State(name, shape))


# -- fuse_branches ---------------------------------------------------------------------------------


def read_by_an_activation_too(layer: Layers) -> Layers:
    """A value, what `layer` makes of it, and a ReLU that reads the value as well."""
    return lambda h: concat(layer(h), relu(h))


def computed_kernels(x: Value) -> Value:
    """A convolution whose kernels are no mixture: each sample computes its own."""
    kernels = dense(global_average_pool(x), 4 * 4 * 9, name="kernels")
    return sample_conv(x, reshape(kernels, (x.shape[0], 4, 4, 3, 3)), pad=1)


def scaled(h: Value) -> Value:
    return h * learned(h.graph, 4, 1, 1)


def normed(h: Value) -> Value:
    return batch_norm(h, name="norm")


def dear(before: str, after: str) -> str:
    return f"it would raise MACs from {before} to {after}; grow=true asks for it all the same"


#: Layers on [N, 4, 7, 7], the options of the pass, and the node and reason of the refusal. MACs are
#: 49 positions times C/groups, filters and kernel, where nothing else is said.
NOT_FUSED: dict[str, tuple[Layers, dict[str, bool], tuple[str, str]]] = {
    "R1, kernels read elsewhere": (
        lambda x: read_by_an_activation_too(normed)(computed_kernels(x)), {},
        ("norm", "R1: sample_conv is read elsewhere too"),
    ),
    "R13, kernels read elsewhere": (
        lambda x: read_by_an_activation_too(scaled)(computed_kernels(x)), {},
        ("multiply", "R13: sample_conv is read elsewhere too"),
    ),
    "R13, kernels that are computed": (
        lambda x: scaled(computed_kernels(x)), {},
        ("multiply", "R13: the kernels of sample_conv are no mixtures of fixed ones"),
    ),
    "R2, a norm that is read elsewhere": (
        lambda x: read_by_an_activation_too(lambda h: conv(h, 4, 3, pad=1, name="conv"))(normed(x)),
        {"pad_values": True},
        ("conv", "R2: norm is read elsewhere too"),
    ),
    "R10, small kernels beside a large one": (  # 3*9 + 2*1 + 4*25 taps, then 9*25
        lambda x: concat(
            conv(x, 3, 3, pad=1), conv(x, 2, 1), conv(x, 4, 5, pad=2), name="beside"
        ), {},
        ("beside", f"R10: {dear('25,284', '44,100')}"),
    ),
    "R11, a small kernel beside a large one": (  # 9 + 1 taps, then 9 taps of both inputs
        lambda x: merge_sum(
            conv(relu(x), 4, 3, pad=1), conv(sigmoid(x), 4, 1), name="sum"
        ), {"concats": True},
        ("sum", f"R11: {dear('7,840', '14,112')}"),
    ),
    "R13, one gate a sample and channel": (  # 4*4*9 products for kernels and 4 for biases
        lambda x: scale_channels(
            conv(x, 4, 3, pad=1), sigmoid(dense(global_average_pool(x), 4))
        ), {},
        ("multiply", f"R13: {dear('7,056', '7,204')}"),
    ),
    "R14, a dense layer of many outputs": (  # 25*2*4*9 + 50*20, then 20*4*49
        lambda x: dense(flatten(conv(x, 2, 3)), 20, name="fc"), {},
        ("fc", f"R14: {dear('2,800', '3,920')}"),
    ),
    "R14, as many products either way": (  # 25*7*4*9 + 175*300, then 300*4*49
        lambda x: dense(flatten(conv(x, 7, 3)), 300, name="fc"), {},
        ("fc", "R14: it would save none of 58,800 MACs; grow=true asks for it all the same"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_FUSED)
def test_what_is_not_fused_stays_and_the_reason_is_said(kind: str) -> None:
    layers, options, refusal = NOT_FUSED[kind]
    declared = Graph("net")
    declared.output("y", layers(image_input(declared, channels=4, size=7)))
    graph = specialise(declared, training=False)
    result = FuseBranches(**options).run(graph)  # type: ignore[arg-type]
    assert refusal in result.report.refusals
    assert not result.report.matches
    assert format_graph(result.graph) == format_graph(graph)


def test_fusion_needs_a_rule() -> None:
    with pytest.raises(FormatError, match="rules are R1 to R16 joined by .*, or all; got none"):
        FuseBranches(rules=())


# -- share_weights ---------------------------------------------------------------------------------


def net(last: Layers) -> Graph:
    """A convolution, and behind it what cannot be shared."""
    graph = Graph("net")
    graph.output("y", last(conv(image_input(graph), 4, 1, name="stem")))
    return graph


def headed(h: Value) -> Value:
    """A last layer, so that masks keep parts of the layers before it."""
    return conv(h, 4, 1, name="head")


def whose_statistics_are_read(h: Value) -> Value:
    gamma, beta = (learned(h.graph, 4, name=name) for name in ("gamma", "beta"))
    y, mean, _ = h.graph.apply(make("batch_norm_training"), h, gamma, beta, name="bn")
    h.graph.output("mean", mean)
    return y


def by_position(h: Value) -> Value:
    return h.graph.emit(make("add"), h, h.graph.input("t", (4, 6, 6)), name="plus")


def there_and_back(h: Value) -> Value:
    return headed(reshape(flatten(h), ("N", 4, 6, 6), name="back"))


def of_expression(h: Value) -> Value:
    weight = learned(h.graph, 4, 4, 1, 1, name="w") * 2.0
    return headed(conv(h, 4, 1, weight=weight, bias=False, name="expressed"))


def masks(branches: int = 2, overlap: float = 0.0, wide: str = "none") -> ShareWeights:
    return ShareWeights(branches, layout="masks", overlap=overlap, wide=wide)


#: What stands behind the convolution, the pass, and the whole message of its refusal.
NOT_SHARED: dict[str, tuple[Layers, ShareWeights, str]] = {
    "a layer of no channels": (
        lambda h: dense(learned(h.graph, 1, 8, name="query"), 4, name="key"),
        ShareWeights(),
        "key: it reads query, which has no number of channels",
    ),
    "a norm of no channels": (
        lambda h: batch_norm(learned(h.graph, 2, 4, name="query"), name="bn"),
        ShareWeights(),
        "bn: it reads query, which has no number of channels",
    ),
    "a concatenation of no channels": (
        lambda h: concat(h, noise(h), name="joined"),
        ShareWeights(),
        "joined: noise has no number of channels",
    ),
    "batch statistics": (
        whose_statistics_are_read,
        ShareWeights(),
        "bn: its batch statistics are read; share weights before specialising",
    ),
    "other axes": (
        by_position,
        ShareWeights(),
        "plus: t is broadcast along other axes than its own",
    ),
    "no logits": (
        relu,
        ShareWeights(merge="after_mean"),
        "after_mean needs logits [N, classes], got f32[N, 4, 6, 6]",
    ),
    "nothing of a branch alone, and too little in common": (
        lambda h: headed(conv(h, 2, 1, name="narrow")),
        masks(branches=5, overlap=0.5),
        "2 channels are too few for 5 branches that overlap 0.5",
    ),
    "fewer channels than branches": (
        headed,
        masks(branches=5),
        "4 channels are too few for 5 branches",
    ),
    "a reshape behind masks": (
        there_and_back,
        masks(),
        "back: a reshape other than flattening cannot be masked",
    ),
    "an expression, widened": (
        of_expression,
        masks(wide="all"),
        "expressed: its weight is no state but an expression; materialise it, or share weights "
        "before the pass that wrote it",
    ),
}


@pytest.mark.parametrize("kind", NOT_SHARED)
def test_what_cannot_be_shared_names_the_node_and_the_reason(kind: str) -> None:
    last, step, message = NOT_SHARED[kind]
    graph = net(last)
    text = format_graph(graph)
    with pytest.raises(RefusalError) as refused:
        step.apply(graph)
    assert str(refused.value) == message
    assert format_graph(graph) == text


def test_only_states_are_widened() -> None:
    """The pass refuses expressions before it widens; its widening does too."""
    graph = net(of_expression)
    node = graph.find("expressed")
    with pytest.raises(RefusalError) as refused:
        WideStates(graph, Origin("net")).read(node, node.inputs[1], (0, 1, 2, 3))
    assert str(refused.value) == (
        "expressed: multiply is no state but an expression; materialise it first"
    )
