"""States, the only leaves with memory, and the stores that hold their values.

A parameter, a running statistic, an optimiser slot, a step count, a gate score and the key of the
random streams are all states; they differ in `role`. Graphs name states and never hold values; a
`Store` holds the values and may serve many graphs at once (training, inference, a fused form).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from branchgraph.ir.dims import format_shape
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.initialisers import Initialiser, Zeros
from branchgraph.ir.types import DType, TensorType


class Role(Enum):
    """What a state is for; its value is the spelling in text."""

    PARAMETER = "param"
    STATISTIC = "statistic"
    SLOT = "slot"
    STEP = "step"
    GATE = "gate"
    LOSS_SCALE = "loss_scale"
    KEY = "key"
    CONSTANT = "constant"

    @property
    def trainable(self) -> bool:
        """Whether a loss is differentiated with respect to it by default."""
        return self in (Role.PARAMETER, Role.GATE)


@dataclass(frozen=True, eq=False)
class State:
    """A leaf with memory: shape and dtype are concrete, identity is the object itself.

    Two states may carry the same name; text and files tell them apart by a suffix.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType = DType.F32
    role: Role = Role.PARAMETER
    init: Initialiser = field(default_factory=Zeros)

    def __post_init__(self) -> None:
        for size in self.shape:
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ShapeError(
                    f"state {self.name}: shape {format_shape(self.shape)} must be concrete sizes"
                )

    @property
    def type(self) -> TensorType:
        """Shape and dtype as of any other value."""
        return TensorType(self.shape, self.dtype)

    def __repr__(self) -> str:
        return f"State({self.name}: {self.type} {self.role.value})"


class Store:
    """Values of states.

    Arrays handed out are the store's own: their holder may edit them and the
    next run sees it, and a run that updates the state writes into the same array. `version` tells
    backends, which keep packed copies, whether anything may have changed.

    >>> store = Store.initialised(graph.states, seed=0)          # doctest: +SKIP
    """

    def __init__(self, values: Mapping[State, np.ndarray] | None = None) -> None:
        self._values: dict[State, np.ndarray] = {}
        self._version = 0
        #: What was handed out, with the bytes it held when `version` was last asked.
        self._handed: dict[State, bytes | None] = {}
        for state, value in (values or {}).items():
            self[state] = value

    @staticmethod
    def initialised(states: Iterable[State], seed: int = 0) -> Store:
        """A store with every state at its initial value."""
        store = Store()
        store.initialise(states, seed)
        return store

    def initialise(self, states: Iterable[State], seed: int = 0) -> None:
        """Give every state that has no value yet its initial one.

        Each state draws from its own stream, derived from (seed, name, how often the name came
        before), so adding a branch to a network leaves the initial values of the rest alone.
        """
        seen: dict[str, int] = {}
        for state in states:
            occurrence = seen.get(state.name, 0)
            seen[state.name] = occurrence + 1
            if state in self._values:
                continue
            self._version += 1
            if state.role is Role.KEY:
                words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
                self._values[state] = np.array(words, dtype=np.uint32)
                continue
            name_hash = zlib.crc32(state.name.encode())
            rng = np.random.default_rng([seed & (2**63 - 1), name_hash, occurrence])
            drawn = state.init.values(state.shape, rng)
            self._values[state] = np.asarray(drawn).astype(state.dtype.numpy)

    def __getitem__(self, state: State) -> np.ndarray:
        array = self.peek(state)
        self._handed.setdefault(state, None)
        return array

    def peek(self, state: State) -> np.ndarray:
        """The array of `state` for reading now: for backends, which neither edit nor keep it."""
        try:
            return self._values[state]
        except KeyError:
            raise GraphError(
                f"state {state.name} has no value; call store.initialise(graph.states) "
                "or load a file"
            ) from None

    def __setitem__(self, state: State, value: np.ndarray) -> None:
        array = np.asarray(value)
        if array.shape != state.shape:
            raise ShapeError(
                f"state {state.name}: expected shape {format_shape(state.shape)}, "
                f"got {format_shape(array.shape)}"
            )
        self._version += 1
        self._values[state] = array.astype(state.dtype.numpy)

    def version(self) -> int:
        """A number that differs from an earlier one if any value may have changed since.

        Besides writes it counts edits of arrays that were handed out: while somebody holds one (or
        a view of it), which the reference count tells, its bytes are compared with those before.
        """
        for state, before in list(self._handed.items()):
            array = self._values[state]
            now = array.tobytes()
            if now != before:
                self._version += 1
            if sys.getrefcount(array) > _ALONE:
                self._handed[state] = now
            else:
                del self._handed[state]
        return self._version

    def written(self, state: State) -> None:
        """Say that the array of `state` was written where it lies: for backends."""
        self._version += 1

    def commit(self, state: State, value: np.ndarray) -> None:
        """Write `value` into the array of `state`, which its holders go on seeing.

        A state without a value takes `value` over. For backends, which have checked the type.
        """
        self._version += 1
        if state in self._values:
            np.copyto(self._values[state], value)
        else:
            self._values[state] = value
            self._handed.setdefault(state, None)

    def __contains__(self, state: State) -> bool:
        return state in self._values

    def __iter__(self) -> Iterator[State]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def copy(self) -> Store:
        """A store with its own copies of all values."""
        return Store({s: v.copy() for s, v in self._values.items()})


def _references_of_one() -> int:
    """What `sys.getrefcount` says in `version` of an array that only a dictionary holds."""
    holder = {None: np.zeros(0)}
    array = holder[None]
    return sys.getrefcount(array)


_ALONE = _references_of_one()
