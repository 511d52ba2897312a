"""Networks that the tests of pictures draw."""

from branchgraph.ir.builder import (
    batch_norm,
    conv,
    cross_entropy,
    dense,
    dropout,
    exit,
    gate,
    global_average_pool,
    max_pool,
    merge_sum,
    relu,
    state,
)
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value, branch, scope
from branchgraph.ir.initialisers import Ones
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.optimisers import Adam
from branchgraph.ir.state import Role, State
from branchgraph.passes.specialise import specialise


def network() -> Graph:
    """A stem, two branches (one of them gated) and a merge in a scope, an early and a last exit."""
    g = Graph("net")
    x = g.input("x", ("N", 3, 8, 8))
    h = relu(batch_norm(conv(x, 4, 3, pad=1, name="stem"), name="bn"))
    with branch("early"):
        exit(dense(max_pool(h, 2), 10, name="fc"), "early", threshold=0.25)
    with scope("block"):
        with branch("left"):
            left = conv(h, 4, 3, stride=2, pad=1, groups=2, name="conv")
        with branch("right"):
            right = conv(h, 4, 1, stride=2, name="conv")
            opened = state(g, "gate", "score", (1, 4, 1, 1), Ones(), Role.GATE)
            right = gate(right, opened)
        merged = merge_sum(left, right, name="join")
    logits = dense(global_average_pool(dropout(merged, 0.3)), 10, name="fc")
    exit(logits, "final", last=True)
    return g


def training(g: Graph) -> Graph:
    """The training step of `g`: joint loss, gradients and Adam."""
    step = specialise(g, training=True)
    labels = step.input("labels", ("N",), "i64")
    losses = [cross_entropy(v, labels) for v in list(step.outputs.values())]
    step.output("loss", merge_sum(*losses))
    return Adam().attach(differentiate(step))


ODD = [
    'say "hi"', "a\nb", "<b>bold</b>", "R&D &lt;", "back\\slash\\N", "trailing\\", "größe 層 🙂",
    "tab\tnul\x00bell\x07", "lone\ud800surrogate", "{a|b}", "->", "// no comment", "<>", "",
]  # fmt: skip


def named(name: str) -> Graph:
    """A graph in which everything that has a name is called `name`."""
    g = Graph(name)
    x: Value = g.input(name, ("N", 2, 4, 4))
    with branch(name), scope(name or "s"):
        y = merge_sum(relu(conv(x, 2, 1, name=name), name=name), x, name=name)
        y = g.emit(Conv((1, 1), (0,) * 4, (1, 1), 1), y, g.read(State(name, (2, 2, 1, 1))))
    g.output(name, y)
    return g
