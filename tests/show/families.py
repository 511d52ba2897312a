"""Networks of the publications that pictures must show recognisably, small and with few options."""

from collections.abc import Iterable

from branchgraph.ir import gates
from branchgraph.ir.builder import (
    average_pool,
    batch_norm,
    concat,
    conv,
    dense,
    exit,
    gate,
    global_average_pool,
    max_pool,
    merge_and_run,
    merge_mean,
    merge_sum,
    relu,
    reshape,
    softmax,
    state,
)
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.ir.initialisers import Ones, Uniform
from branchgraph.ir.op import make
from branchgraph.ir.state import Role


def image(name: str) -> tuple[Graph, Value]:
    """A graph and its input, a batch of small colour images."""
    g = Graph(name)
    return g, g.input("x", ("N", 3, 32, 32))


def unit(x: Value, filters: int, kernel: int = 3, stride: int = 1, *, name: str = "") -> Value:
    """Convolution and batch norm."""
    pad = kernel // 2
    return batch_norm(conv(x, filters, kernel, stride=stride, pad=pad, bias=False, name=name))


def head(g: Graph, x: Value) -> Graph:
    """Pooling, classifier and output."""
    g.output("logits", dense(global_average_pool(x), 10, name="fc"))
    return g


def basic(x: Value, filters: int, stride: int = 1) -> Value:
    """A residual block of two convolutions."""
    y = unit(relu(unit(x, filters, stride=stride, name="conv1")), filters, name="conv2")
    line = unit(x, filters, 1, stride, name="line") if stride != 1 else x
    return relu(merge_sum(line, y, name="join"))


def resnet(blocks: int = 9, *, exits: Iterable[str] = ()) -> Graph:
    """Three stages of residual blocks; `exits` names blocks (`stage2/block5`) that have one."""
    g, x = image("resnet")
    h = relu(unit(x, 16, name="stem"))
    for s in range(3):
        for b in range(blocks):
            with scope(f"stage{s + 1}/block{b + 1}"):
                h = basic(h, 16 << s, 1 + (b == 0 < s))
            place = f"stage{s + 1}/block{b + 1}"
            if place in exits:
                with branch(f"exit_{place.replace('/', '_')}"):
                    logits = dense(global_average_pool(h), 10, name="fc")
                    exit(logits, f"exit at {place}", threshold=0.5)
    return head(g, h)


def merge_and_run_net(blocks: int = 9) -> Graph:
    """Two streams that share the mean of their inputs (DFN-MR)."""
    g, x = image("merge_and_run")
    streams: tuple[Value, ...] = (relu(unit(x, 16, name="stem")),) * 2
    for s in range(3):
        for b in range(blocks):
            with scope(f"stage{s + 1}/block{b + 1}"):
                streams = two_streams(streams, 16 << s, 1 + (b == 0 < s))
    return head(g, relu(merge_sum(*streams, name="join")))


def two_streams(inputs: tuple[Value, ...], filters: int, stride: int) -> tuple[Value, ...]:
    """One merge-and-run block."""
    outputs, lines = [], []
    for k, x in enumerate(inputs):
        with branch("lr"[k]):
            y = relu(unit(x, filters, stride=stride, name="conv1"))
            outputs.append(unit(y, filters, name="conv2"))
            lines.append(unit(x, filters, 1, stride, name="line") if stride != 1 else x)
    return tuple(map(relu, merge_and_run(lines, outputs)))


def resnext(branches: int = 8, chosen: int = 3, modules: int = 1, *, inside: bool = True) -> Graph:
    """Aggregated equal branches, of which the `chosen` largest scores are open."""
    g, x = image("resnext")
    h = relu(unit(x, 16, name="stem"))
    for m in range(modules):
        with scope(f"module{m + 1}"):
            score = state(g, "mask", "score", (branches,), Uniform(0.0, 1.0), Role.GATE)
            mask = gates.top_k(score, chosen)
            paths = []
            for k in range(branches):
                with branch(f"path{k}"):
                    y = relu(unit(h, 4, 1, name="reduce"))
                    y = unit(relu(unit(y, 4, name="conv")), 16, 1, name="expand")
                    if inside:
                        y = gate(y, one(mask, k))
                paths.append(y if inside else gate(y, one(mask, k)))
            h = relu(merge_sum(h, *paths, name="join"))
    return head(g, h)


def connected(modules: int = 3, blocks: int = 8, chosen: int = 2) -> Graph:
    """Modules of equal blocks; each learns which blocks before it to read (MaskConnect)."""
    g, x = image("mask_connect")
    values = [relu(unit(x, 16, name="stem"))]
    for m in range(modules):
        with scope(f"module{m + 1}"):
            values = [chooser(values, f"block{j + 1}", chosen) for j in range(blocks)]
    return head(g, relu(merge_sum(*values, name="join")))


def chooser(values: list[Value], name: str, chosen: int) -> Value:
    """A residual block that reads `chosen` of several values."""
    with branch(name):
        x = values[0]
        if len(values) > 1:
            init = Uniform(0.0, 1.0)
            score = state(x.graph, "mask", "score", (len(values),), init, Role.GATE)
            mask = gates.top_k(score, chosen)
            gated = [gate(v, one(mask, k)) for k, v in enumerate(values)]
            x = relu(merge_sum(*gated, name="choice"))
        y = unit(relu(unit(x, 4, 1, name="reduce")), 16, 1, name="expand")
        return merge_sum(x, y, name="sum")


def one(mask: Value, k: int) -> Value:
    """Element k of a vector."""
    return mask.graph.emit(make("slice", axis=0, start=k, size=1), mask)


def disentangled(*, gated: bool = False) -> Graph:
    """A PD-A block of five branches; `gated` makes it PD-B, weighted by a softmax of its input."""
    g = Graph("pd_b" if gated else "pd_a")
    x = g.input("x", ("N", 64, 14, 14))
    with scope("block"):
        parts = {}
        for name, groups in (("standard1", 1), ("standard2", 1), ("group", 64)):
            with branch(name):
                y = conv(x, 64, 3, pad=1, groups=groups, bias=False, name="conv")
                parts[name] = batch_norm(y, name="bn")
        with branch("skeleton"):
            with branch("vertical"):
                v = batch_norm(conv(x, 64, (3, 1), pad=(1, 0), bias=False, name="conv"))
            with branch("horizontal"):
                h = batch_norm(conv(x, 64, (1, 3), pad=(0, 1), bias=False, name="conv"))
            parts["skeleton"] = merge_sum(v, h)
        values = list(parts.values())
        if gated:
            with branch("gate"):
                hidden = relu(dense(global_average_pool(x), 4, name="fc1"))
                weights = softmax(dense(hidden, 4, name="fc2"))
            values = [
                gate(y, reshape(w, ("N", 1, 1, 1)))
                for y, w in zip(values, weights.graph.apply(_quarters, weights))
            ]
        y = merge_sum(*values, name="join")
    return head(g, relu(y))


_quarters = make("split", axis=1, sizes=(1, 1, 1, 1))


def with_exits() -> Graph:
    """A trunk with two early exits and the last one."""
    g, x = image("early_exits")
    h = relu(unit(x, 16, name="conv1"))
    for k, criterion in enumerate(("entropy", "confidence")):
        with branch(f"exit{k + 1}"):
            y = max_pool(relu(unit(h, 8, name="conv")), 2)
            exit(
                dense(y, 10, name="fc"), f"exit{k + 1}", criterion=criterion, threshold=0.5 + k / 4
            )
        h = max_pool(relu(unit(h, 32 << k, name=f"conv{k + 2}")), 2)
    exit(dense(global_average_pool(h), 10, name="fc"), "exit3", last=True)
    return g


def densenet(layers: int = 4) -> Graph:
    """Dense blocks: every layer reads all before it."""
    g, x = image("densenet")
    h = conv(x, 16, 3, pad=1, bias=False, name="stem")
    for b in range(2):
        with scope(f"dense{b + 1}"):
            known = [h]
            for k in range(layers):
                with scope(f"layer{k + 1}"):
                    before = concat(*known) if k else h
                    known.append(conv(relu(batch_norm(before)), 8, 3, pad=1, bias=False))
            h = concat(*known, name="join")
        with scope(f"transition{b + 1}"):
            h = average_pool(conv(relu(batch_norm(h)), 16, 1, bias=False), 2)
    return head(g, h)


def ensemble(members: int = 8, depth: int = 3, *, shared: bool = True) -> Graph:
    """Sub-networks of one input whose mean is the answer; `shared` gives them the same weights."""
    g, x = image("ensemble")
    answers = []
    kept: dict[str, Value] = {}
    for m in range(members):
        with branch(f"member{m + 1}"):
            h = x
            for k in range(depth):
                name = f"conv{k + 1}"
                if not shared or name not in kept:
                    shape = (16, h.shape[1], 3, 3)
                    kept[name] = state(g, name, "weight", shape, Ones())
                op = make("conv", stride=(1, 1), pad=(1, 1, 1, 1), dilation=(1, 1), groups=1)
                h = relu(batch_norm(g.emit(op, h, kept[name], name=name)))
            answers.append(dense(global_average_pool(h), 10, name="fc"))
    g.output("logits", merge_mean(*answers, name="vote"))
    return g


FAMILIES = {
    "resnet": resnet,
    "merge_and_run": merge_and_run_net,
    "resnext": resnext,
    "resnext_outside": lambda: resnext(inside=False, modules=3),
    "mask_connect": connected,
    "pd_a": disentangled,
    "pd_b": lambda: disentangled(gated=True),
    "exits": with_exits,
    "densenet": densenet,
    "ensemble": ensemble,
}
