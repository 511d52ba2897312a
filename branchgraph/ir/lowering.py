"""What a declared op is told when training or inference is chosen.

`specialise` makes one `Lowering` for a graph and hands it to every declared op. Through it, ops
read the latest value of a state within the run, set new ones, and obtain the key and step of the
random streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.initialisers import Zeros
from branchgraph.ir.state import Role, State
from branchgraph.ir.types import DType

#: When running statistics move: `forward` in order of application (Chainer, PyTorch), `backward`
#: in reverse order as gradients visit the layers (MXNet), `none` leaves them alone.
Timing = Literal["forward", "backward", "none"]


class Lowering:
    """One choice of mode for one graph."""

    def __init__(
        self, graph: Graph, *, training: bool, statistics: Timing, randomness: str
    ) -> None:
        self.graph = graph
        self.training = training
        self.randomness = randomness
        self.statistics = statistics
        self._latest: dict[State, Value] = {}
        self._delayed: list[Callable[[], None]] = []

    def latest(self, value: Value) -> Value:
        """The value of a state at this point of the run: what was set last, else what is stored."""
        if value.state is None:
            return value
        return self._latest.get(value.state, value)

    def set(self, target: Value, value: Value) -> None:
        """Let the state that `target` reads take `value` at the end of the run."""
        if target.state is None:
            raise GraphError(
                f"{target.label} is no state, so it cannot be updated; materialise(graph) first"
            )
        self._latest[target.state] = value

    def on_statistics(self, rule: Callable[[], None]) -> None:
        """Run `rule`, which emits the update of a running statistic, when the timing says so."""
        if self.statistics == "forward":
            rule()
        elif self.statistics == "backward":
            self._delayed.append(rule)

    def random_key(self) -> tuple[Value, Value]:
        """Key (u32[2]) and step (i64[]) of the counter-based streams, as states of the graph."""
        key = self._state("random.key", (2,), DType.U32, Role.KEY)
        step = self._state("random.step", (), DType.I64, Role.STEP)
        if step.state not in self._latest:
            one = self.graph.constant(1, DType.I64)
            self.set(step, step + one)
        return key, step

    def _state(self, name: str, shape: tuple[int, ...], dtype: DType, role: Role) -> Value:
        for state, value in self.graph.reads.items():
            if state.name == name and state.role is role:
                return value
        return self.graph.read(State(name, shape, dtype, role, Zeros()))

    def finish(self) -> dict[State, Value]:
        """The updates that the mode attaches."""
        for rule in reversed(self._delayed):
            rule()
        return self._latest
