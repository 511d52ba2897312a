"""What each kind of node looks like: shape, colours, symbol and legend words.

The colours are tints of the palette of Okabe and Ito (2008), which readers with any of the common
colour deficiencies can tell apart; shapes and symbols say the same again without colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from branchgraph.ir.graph import Node
from branchgraph.ir.ops.reduce import ReduceMax, ReduceMean
from branchgraph.show.weighing import gate_of


class Kind(Enum):
    """Kinds of things in a picture, in the order of the legend."""

    INPUT = "input"
    TRAINABLE = "trainable"
    NORMALISATION = "normalisation"
    ACTIVATION = "activation"
    POOLING = "pooling"
    RANDOM = "random"
    OTHER = "other"
    MERGE = "merge"
    GATE = "gate"
    ROWS = "rows"
    EXIT = "exit"
    LOSS = "loss"
    OUTPUT = "output"
    STATE = "state"
    UPDATE = "update"


@dataclass(frozen=True)
class Look:
    """How a kind is drawn: Graphviz shape and colours, a symbol for text, words for the legend."""

    words: str
    symbol: str
    shape: str
    fill: str
    line: str = "#5A5A5A"
    ink: str = "#1A1A1A"
    style: str = "filled"


LOOKS: dict[Kind, Look] = {
    Kind.INPUT: Look("input", "○", "ellipse", "#FFFFFF"),
    Kind.TRAINABLE: Look("convolution, dense", "■", "box", "#BBDDF4"),
    Kind.NORMALISATION: Look("normalisation", "≈", "box", "#BFE5D6"),
    Kind.ACTIVATION: Look("activation", "ƒ", "box", "#F8F2A9"),
    Kind.POOLING: Look("pooling", "▽", "box", "#F7DDAB"),
    Kind.RANDOM: Look("random", "~", "box", "#DDD6EC", style="filled,dashed"),
    Kind.OTHER: Look("reshaping, arithmetic", "·", "box", "#ECECEC"),
    Kind.MERGE: Look("merge", "⊕", "invtrapezium", "#E7B6D2", "#8A3F68"),
    Kind.GATE: Look("gate", "◇", "diamond", "#F0AE1E", "#7A5200"),
    Kind.ROWS: Look("row selection", "⇣", "octagon", "#F6CBB0", "#A04600"),
    Kind.EXIT: Look("exit", "⇥", "doubleoctagon", "#C65200", "#7A3200", "#FFFFFF"),
    Kind.LOSS: Look("loss", "✕", "hexagon", "#0F6CA8", "#08395A", "#FFFFFF"),
    Kind.OUTPUT: Look("output", "●", "ellipse", "#4A4A4A", "#1A1A1A", "#FFFFFF"),
    Kind.STATE: Look("state", "▭", "cylinder", "#FFFFFF"),
    Kind.UPDATE: Look("update, gradient", "↺", "note", "#FFFFFF", style="filled,dashed"),
}

#: Background and outline of clusters: declared branches, and plain scopes.
BRANCH_FILL, BRANCH_LINE = "#EEF3FA", "#6F8FB8"
SCOPE_FILL, SCOPE_LINE = "#FAFAFA", "#C4C4C4"
#: Outline of a cluster that stands for several equal ones.
REPEAT_LINE = "#3D6AA3"

#: Kinds that may share a box with their neighbours: the steps of one layer.
STEPS = frozenset(
    {
        Kind.TRAINABLE,
        Kind.NORMALISATION,
        Kind.ACTIVATION,
        Kind.POOLING,
        Kind.RANDOM,
        Kind.OTHER,
    }
)

_BY_OPCODE = {
    "exit": Kind.EXIT,
    "exit_score": Kind.ROWS,
    "cross_entropy": Kind.LOSS,
    "softmax_output": Kind.LOSS,
    "regression_output": Kind.LOSS,
    "make_loss": Kind.LOSS,
    "sample_conv": Kind.TRAINABLE,
    "roi_max_pool": Kind.POOLING,
}
_BY_FAMILY = {
    "activation": Kind.ACTIVATION,
    "conv": Kind.TRAINABLE,
    "linear": Kind.TRAINABLE,
    "norm": Kind.NORMALISATION,
    "pool": Kind.POOLING,
    "random": Kind.RANDOM,
    "rows": Kind.ROWS,
}
_OPS = "branchgraph.ir.ops."


def kind(node: Node) -> Kind:
    """The kind of `node`: by what it does, by its opcode, else by the family (file) of its op."""
    op = node.op
    if op.merge:
        return Kind.MERGE
    if gate_of(node):
        return Kind.GATE
    if is_global_pool(node):
        return Kind.POOLING
    family = type(op).__module__.removeprefix(_OPS)
    return _BY_OPCODE.get(op.opcode) or _BY_FAMILY.get(family, Kind.OTHER)


def is_global_pool(node: Node) -> bool:
    """Whether `node` reduces all spatial axes of [N, C, ...]."""
    op = node.op
    if not isinstance(op, (ReduceMean, ReduceMax)):
        return False
    rank = node.inputs[0].type.rank
    return rank > 2 and op.axes == tuple(range(2, rank))
