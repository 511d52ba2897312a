"""Exits: ways out of the network for samples that are classified well enough.

With p = softmax(logits), C classes and T the threshold, a sample leaves when

    entropy              -sum_c p_c ln p_c          < T        (BranchyNet, arXiv 1709.01686)
    normalised_entropy   -sum_c p_c ln p_c / ln C   < T
    confidence           max_c p_c                  > T
    margin               p_1 - p_2 (two largest)    > T
    patience             exits up to here, in a row, with this arg max  >= T

0 ln 0 = 0; arg max ties go to the lowest class. The last exit has no threshold and takes the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Node, Value
from branchgraph.ir.lowering import Lowering
from branchgraph.ir.op import LABEL, Cotangents, Op, Wanted, require, require_float
from branchgraph.ir.ops.elementwise import LogicalAnd, cast, compare
from branchgraph.ir.ops.reduce import ArgMax
from branchgraph.ir.types import DType, TensorType

#: Criterion to the relation between its score and the threshold that lets a sample leave.
RELATIONS = {
    "entropy": "less",
    "normalised_entropy": "less",
    "confidence": "greater",
    "margin": "greater",
    "patience": "greater_equal",
}


def _check_criterion(criterion: str) -> None:
    if criterion not in RELATIONS:
        raise GraphError(f"exit criterion {criterion!r} is none of {', '.join(RELATIONS)}")


@dataclass(frozen=True)
class Exit(Op, opcode="exit", operands=("logits", "threshold?", "*previous")):
    """Marks logits [N, C] as a way out. The value is the logits themselves.

    Without a threshold it is the last exit. `previous` are the logits of the exits before this one,
    for the criterion `patience`. Training keeps every row; inference lowers exits to row selection.
    """

    name: str = field(metadata=LABEL)
    criterion: str = "entropy"
    declared = True

    def check(self) -> None:
        _check_criterion(self.criterion)

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        logits, *rest = inputs
        require_float(logits)
        require(logits.rank == 2, f"logits must be [N, classes], got {logits}")
        if rest:
            threshold, *previous = rest
            scalar = threshold == TensorType((), DType.F64)
            require(scalar, f"threshold must be f64[], got {threshold}")
            for p in previous:
                require(p == logits, f"previous logits must be {logits}, got {p}")
            wanted = "only the criterion patience reads previous exits"
            require(not previous or self.criterion == "patience", wanted)
        return (logits,)

    def lower(self, inputs: tuple[Value, ...], lowering: Lowering) -> tuple[Value, ...]:
        return inputs[:1]

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return True


@dataclass(frozen=True)
class ExitScore(Op, opcode="exit_score", operands=("logits",)):
    """The number a criterion compares with its threshold, one a row, in float64: f64[N]."""

    criterion: str

    def check(self) -> None:
        _check_criterion(self.criterion)
        if self.criterion == "patience":
            raise GraphError("patience has no score of one exit; it is written with arg_max")

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        (logits,) = inputs
        require_float(logits)
        require(logits.rank == 2, f"logits must be [N, classes], got {logits}")
        return (TensorType(logits.shape[:1], DType.F64),)

    def evaluate(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        logits = inputs[0].astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        e = np.exp(shifted)
        total = e.sum(axis=1)
        if self.criterion == "confidence":
            return (1.0 / total,)
        if self.criterion == "margin":
            top = (
                np.partition(e, -2, axis=1)[:, -2:]
                if e.shape[1] > 1
                else np.pad(e, ((0, 0), (1, 0)))
            )
            return ((top[:, 1] - top[:, 0]) / total,)
        # -sum p ln p with p = e/total:  ln total - sum p shifted;  0 * -inf counts as 0.
        finite = np.where(e > 0, shifted, 0.0)
        entropy = np.log(total) - (e * finite).sum(axis=1) / total
        if self.criterion == "normalised_entropy":
            entropy = entropy / np.log(max(logits.shape[1], 2))
        return (entropy,)

    def gradient(self, node: Node, cotangents: Cotangents, wanted: Wanted) -> Cotangents:
        return (None,)

    def row_wise(self, inputs: tuple[TensorType, ...], rows: tuple[bool, ...]) -> bool:
        return True


def leaves(criterion: str, logits: Value, threshold: Value, previous: tuple[Value, ...]) -> Value:
    """bool[N]: which rows leave at an exit with these logits."""
    _check_criterion(criterion)
    score = (
        _patience(logits, previous)
        if criterion == "patience"
        else logits.graph.emit(ExitScore(criterion=criterion), logits)
    )
    return compare(RELATIONS[criterion], score, threshold)


def _patience(logits: Value, previous: tuple[Value, ...]) -> Value:
    """How many exits in a row, this one included, agree with this arg max; f64[N]."""
    graph = logits.graph
    mine = graph.emit(ArgMax(axis=1), logits)
    count: Value | None = None
    run: Value | None = None
    for earlier in reversed(previous):
        agrees = compare("equal", mine, graph.emit(ArgMax(axis=1), earlier))
        run = agrees if run is None else graph.emit(LogicalAnd(), run, agrees)
        step = cast(run, DType.F64)
        count = step if count is None else count + step
    zero = cast(mine, DType.F64) * 0.0
    return (zero if count is None else count) + 1.0
