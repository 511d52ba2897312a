"""The lazy recorder: operations are noted when they are called and run when a value is asked for.

A `Tensor` is a value that is known or pending; a `Call` is one op applied to tensors. Pending calls
form a program; `Recorder.flush` looks it up by its structure, compiles it on a miss, and runs it.
Backward passes and updates are calls too (`template.py`), so a training iteration is one program,
found again in the next iteration.

What a program returns is what somebody still holds: calls hold their inputs strongly and their
outputs weakly, so after the pending list is let go, the tensors that live are the ones to compute.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from branchgraph.chainer.configuration import flag
from branchgraph.compiler import Executable, compile
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.op import Op
from branchgraph.ir.types import DType, TensorType

#: A pending program is run when it has so many calls, so that one never asked for cannot grow.
MOST_PENDING = 20_000


class Tensor:
    """A value of concrete shape: known (`array`) or pending (`call`)."""

    __slots__ = ("__weakref__", "array", "call", "index", "owner", "rank", "requires_grad", "type")

    def __init__(
        self,
        type: TensorType,
        array: np.ndarray | None = None,
        call: Call | None = None,
        index: int = 0,
        requires_grad: bool = False,
        owner: Any = None,
    ) -> None:
        self.type = type
        self.array = array
        self.call = call
        self.index = index
        self.requires_grad = requires_grad
        #: The leaf variable that receives the gradient, or a weak reference to the variable of an
        #: intermediate value.
        self.owner = owner
        #: Distance from the leaves along the longest path.
        self.rank = 0 if call is None else call.rank + 1


class Call:
    """One op on tensors. `backward` is set for functions whose gradient is Python code."""

    __slots__ = ("backward", "inputs", "number", "op", "outputs", "rank")

    def __init__(self, op: Op | None, inputs: tuple[Tensor, ...], number: int = -1) -> None:
        self.op = op
        #: Number of the op on these types, unique in the recorder.
        self.number = number
        self.inputs = inputs
        self.outputs: tuple[weakref.ref[Tensor], ...] = ()
        rank = 0
        for tensor in inputs:
            if tensor.rank > rank:
                rank = tensor.rank
        self.rank = rank
        self.backward: Callable[..., Any] | None = None


class Holder:
    """An array that programs update in place: a parameter's, a running statistic's.

    While an update is pending, `tensor` is the value to come; `array` runs what is pending.
    """

    __slots__ = ("_array", "pending")

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.pending: Tensor | None = None

    @property
    def array(self) -> np.ndarray:
        """The array, up to date; its holder may edit it, so what was recorded before runs first."""
        recorder().flush()
        return self._array

    @array.setter
    def array(self, value: np.ndarray) -> None:
        if self.pending is not None:
            recorder().flush()
        self._array = value

    def tensor(self, **attributes: Any) -> Tensor:
        """The value at this point of the program."""
        if self.pending is not None:
            return self.pending
        attributes.setdefault("owner", self)
        return Tensor(type_of(self._array), self._array, **attributes)


_TYPES: dict[tuple[tuple[int, ...], np.dtype], TensorType] = {}


def type_of(array: np.ndarray) -> TensorType:
    """The type of an array."""
    key = (array.shape, array.dtype)
    found = _TYPES.get(key)
    if found is None:
        found = _TYPES[key] = TensorType(array.shape, DType.of(array.dtype))
    return found


@dataclass(frozen=True)
class _Signature:
    """An op on given types: its number, for keys, and the types of its results."""

    number: int
    types: tuple[TensorType, ...]


class Recorder:
    """What one thread has recorded and not run yet, and the programs it has compiled."""

    def __init__(self) -> None:
        self.pending: list[Call] = []
        self.updated: list[Holder] = []
        self.compilations = 0
        self._signatures: dict[tuple[Any, ...], _Signature] = {}
        self._programs: dict[tuple[Any, ...], Executable] = {}

    # -- recording -----------------------------------------------------------------------------

    def call(self, op: Op, *inputs: Tensor, traced: bool = True) -> tuple[Tensor, ...]:
        """Record one op; `ShapeError` when the types of its operands do not fit.

        Results need gradients when an input does and `traced` is true.
        """
        types = tuple([t.type for t in inputs])
        signature = self._signatures.get((op, types))
        if signature is None:
            signature = self._sign(op, types)
        call = Call(op, inputs, signature.number)
        needs = traced and True in [t.requires_grad for t in inputs]
        outputs: tuple[Tensor, ...]
        if len(signature.types) == 1:  # the common case, without building lists
            output = Tensor(signature.types[0], None, call, 0, needs)
            outputs, call.outputs = (output,), (weakref.ref(output),)
        else:
            outputs = tuple(
                [Tensor(t, None, call, i, needs) for i, t in enumerate(signature.types)]
            )
            call.outputs = tuple([weakref.ref(t) for t in outputs])
        self.pending.append(call)
        if not flag("lazy") or len(self.pending) >= MOST_PENDING:
            self.flush()
        return outputs

    def _sign(self, op: Op, types: tuple[TensorType, ...]) -> _Signature:
        op.check_arity(len(types))
        signature = _Signature(len(self._signatures), op.infer(*types))
        self._signatures[op, types] = signature
        return signature

    def assign(self, holder: Holder, value: Tensor) -> None:
        """Let `holder` take `value` when the program runs; later reads see it at once."""
        if holder.pending is None:
            self.updated.append(holder)
        holder.pending = value
        if not flag("lazy"):
            self.flush()

    def value(self, tensor: Tensor) -> np.ndarray:
        """The array of `tensor`, running what is pending if it is not known yet."""
        if tensor.array is None:
            self.flush()
        if tensor.array is None:
            raise RuntimeError("a tensor was asked for that no pending program computes")
        return tensor.array

    # -- running -------------------------------------------------------------------------------

    def flush(self) -> None:
        """Run everything that is pending, updates included."""
        if not self.pending and not self.updated:
            return
        program = _Pending(self.pending, self.updated)
        self.pending, self.updated = [], []
        alive = program.let_go()
        key = (*program.key, tuple([n for n, _ in alive]))
        executable = self._programs.get(key)
        if executable is None:
            executable = self._programs[key] = self._compile(program, [n for n, _ in alive])
        results = list(executable.run(program.feeds).values())
        for (_, tensor), array in zip(alive, results):
            tensor.array = array
        for holder, array in zip(program.holders, results[len(alive) :]):
            np.copyto(holder._array, array)

    def _compile(self, program: _Pending, wanted: list[int]) -> Executable:
        self.compilations += 1
        graph = Graph("recorded")
        values: dict[int, Value] = {}
        for number, type in program.leaves:
            values[number] = graph.input(f"v{number}", type.shape, type.dtype)
        for op, inputs, outputs in program.steps:
            assert op is not None
            results = graph.apply(op, *(values[n] for n in inputs))
            values.update(zip(outputs, results))
        for position, number in enumerate((*wanted, *program.assigned)):
            graph.output(f"o{position}", values[number])
        return compile(graph)


class _Pending:
    """A pending program in numbers: leaves, steps, and which tensors are still weakly known.

    Built once an iteration for every call, so it is one loop over local names.
    """

    def __init__(self, calls: list[Call], updated: list[Holder]) -> None:
        self.feeds: dict[str, np.ndarray] = {}
        self.leaves: list[tuple[int, TensorType]] = []
        self.steps: list[tuple[Op | None, tuple[int, ...], tuple[int, ...]]] = []
        self.results: list[tuple[int, weakref.ref[Tensor]]] = []
        self.holders = updated
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []
        self._count = 0
        self._calls: list[Call] | None = calls
        trace = self._number_calls(calls)
        self.assigned: list[int] = []
        for holder in updated:
            assert holder.pending is not None
            number = self._numbers.get(id(holder.pending))
            self.assigned.append(self._leaf(holder.pending) if number is None else number)
            holder.pending = None
        self.key = (tuple(trace), tuple(self.leaves), tuple(self.assigned))

    def _number_calls(self, calls: list[Call]) -> list[int]:
        """Number every tensor by first use; the flat trace of op and operand numbers."""
        numbers, kept, trace = self._numbers, self._kept, []
        for call in calls:
            inputs = []
            for tensor in call.inputs:
                number = numbers.get(id(tensor))
                inputs.append(self._leaf(tensor) if number is None else number)
            trace.append(call.number)
            trace += inputs
            start = self._count
            for reference in call.outputs:
                output = reference()
                if output is not None:
                    numbers[id(output)] = self._count
                    kept.append(output)  # ids stay unique while numbers are given
                    self.results.append((self._count, reference))
                self._count += 1
            self.steps.append((call.op, tuple(inputs), tuple(range(start, self._count))))
        return trace

    def _leaf(self, tensor: Tensor) -> int:
        """The number of a tensor that comes from outside the program."""
        if tensor.array is None:
            raise RuntimeError("a pending tensor is read whose call was lost")
        number = self._numbers[id(tensor)] = self._count
        self._count += 1
        self._kept.append(tensor)
        self.leaves.append((number, tensor.type))
        self.feeds[f"v{number}"] = tensor.array
        return number

    def let_go(self) -> list[tuple[int, Tensor]]:
        """Forget the calls; the pending tensors that somebody else holds, with their numbers.

        Values outside back-propagation forget where they came from first, the latest before those
        they were made of: else a parameter's gradient would keep all of the backward pass.
        """
        self._calls = None
        self._kept.clear()
        for _, reference in reversed(self.results):
            tensor = reference()
            if tensor is not None and not tensor.requires_grad:
                tensor.call = None
        alive = []
        for number, reference in self.results:
            tensor = reference()
            if tensor is not None:
                alive.append((number, tensor))
        return alive


_THREAD = threading.local()


def recorder() -> Recorder:
    """The recorder of this thread."""
    found = getattr(_THREAD, "recorder", None)
    if found is None:
        found = _THREAD.recorder = Recorder()
    return found  # type: ignore[no-any-return]
