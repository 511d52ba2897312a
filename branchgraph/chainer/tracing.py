"""`trace(model, spec)`: the declared graph of a Chainer model, mode not yet chosen.

The model is called on arrays of three batch sizes; nothing is computed, only recorded. What differs
between the recordings must be affine in the batch size, and becomes a dimension over `N`:

    d(n) = a + b n,   b = (d(n2) - d(n1)) / (n2 - n1),   checked at n3

Batch normalisation and dropout are recorded as declared ops while a model is traced. Parameters and
running statistics become states named after their paths; their values come along in a store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from branchgraph.chainer.configuration import using_config
from branchgraph.chainer.recorder import Call, Holder, Tensor, recorder
from branchgraph.chainer.variable import Parameter, Variable
from branchgraph.ir.dims import Dim, DimLike
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.op import Op
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType

#: Batch sizes of the recordings: two to solve for, one to check.
_SIZES = (2, 3, 5)
_BATCH = Dim.symbol("N")


def trace(
    model: Callable[..., Any], *specs: Sequence[Any], name: str = "traced", dtype: Any = np.float32
) -> tuple[Graph, Store]:
    """(declared graph, store) of `model` on inputs of the given shapes, axis 0 written `"N"`.

    `model` is a link or any callable; its outputs become `y0`, `y1`, ... A shape may be followed by
    a dtype: `(("N", 1, 28, 28), "float32")`. Raises `GraphError` when the model reads values while
    it is traced, or when its structure depends on the batch size.
    """
    recordings = [_Recording(model, specs, size, dtype) for size in _SIZES]
    return _Generalised(model, recordings, name).graph()


class _Recording:
    """Calls of the model at one batch size, in order, without running them."""

    def __init__(self, model: Callable[..., Any], specs: Sequence[Any], size: int, dtype: Any):
        self.size = size
        record = recorder()
        record.flush()
        self.inputs = [Variable(np.zeros(*_shape(s, size, dtype))) for s in specs]
        try:
            with using_config("tracing", True), using_config("lazy", True):
                result = model(*self.inputs)
                outputs = result if isinstance(result, (tuple, list)) else (result,)
                if any(v._tensor is None or v._tensor.array is not None for v in outputs):
                    raise GraphError("the model reads values while it is traced, or is no function")
                self.outputs = [v._tensor for v in outputs]
        finally:
            record.pending.clear()
        self.calls = _in_order(self.outputs)


def _shape(spec: Any, size: int, dtype: Any) -> tuple[tuple[int, ...], Any]:
    if len(spec) == 2 and isinstance(spec[0], (tuple, list)):
        spec, dtype = spec
    return tuple(size if d == "N" else int(d) for d in spec), dtype


def _in_order(outputs: Iterable[Tensor]) -> list[Call]:
    """Calls below `outputs`, inputs first."""
    done: dict[int, Call] = {}
    stack = [t.call for t in reversed(list(outputs)) if t.call is not None]
    while stack:
        call = stack[-1]
        missing = [t.call for t in call.inputs if t.call and id(t.call) not in done]
        if id(call) in done or not missing:
            done[id(call)] = call
            stack.pop()
        else:
            stack.extend(reversed(missing))
    return list(done.values())


class _Generalised:
    """One graph over `N` from recordings at several sizes."""

    def __init__(self, model: Callable[..., Any], recordings: list[_Recording], name: str) -> None:
        self.recordings = recordings
        self.new = Graph(name)
        self.store = Store()
        self.values: dict[int, Value] = {}
        self.states: dict[int, Value] = {}
        self.names = {id(p): path for path, p in _named(model)}

    def graph(self) -> tuple[Graph, Store]:
        first = self.recordings[0]
        same = {tuple(type(c.op) for c in r.calls) for r in self.recordings}
        if len(same) != 1:
            raise GraphError("the model records other operations at other batch sizes")
        for position, variable in enumerate(first.inputs):
            shape = self._solve([r.inputs[position].shape for r in self.recordings])
            self.values[id(variable)] = self.new.input(f"x{position}", shape, variable.dtype)
        streams = 0
        for calls in zip(*(r.calls for r in self.recordings)):
            op = self._op([c.op for c in calls])
            if hasattr(op, "stream"):
                op = dataclasses.replace(op, stream=streams)
                streams += 1
            operands = [self._operand([c.inputs[i] for c in calls])
                        for i in range(len(calls[0].inputs))]  # fmt: skip
            results = self.new.apply(op, *operands)
            for reference, value in zip(calls[0].outputs, results):
                tensor = reference()
                if tensor is not None:
                    self.values[id(tensor)] = value
        for k, tensor in enumerate(first.outputs):
            self.new.output(f"y{k}", self.values[id(tensor)])
        return self.new, self.store

    def _op(self, ops: list[Op | None]) -> Op:
        """One op whose attributes hold for every recorded size."""
        first = ops[0]
        assert first is not None
        if all(op == first or hasattr(first, "stream") for op in ops):
            return first
        fields = {f.name: [getattr(op, f.name) for op in ops] for f in dataclasses.fields(first)}
        return dataclasses.replace(first, **{k: self._solve(v) for k, v in fields.items()})

    def _solve(self, seen: list[Any]) -> Any:
        """The value of an attribute at every size: equal, or affine in the batch size."""
        if all(v == seen[0] for v in seen):
            return seen[0]
        if isinstance(seen[0], tuple) and len({len(v) for v in seen}) == 1:
            return tuple(self._solve(list(each)) for each in zip(*seen))
        return self._affine(seen)

    def _affine(self, seen: list[Any]) -> DimLike:
        n1, n2, n3 = _SIZES
        if all(isinstance(v, int) and not isinstance(v, bool) for v in seen):
            slope, rest = divmod(seen[1] - seen[0], n2 - n1)
            base = seen[0] - slope * n1
            if rest == 0 and base + slope * n3 == seen[2]:
                return base + slope * _BATCH
        raise GraphError(f"an attribute is {seen} at batch sizes {_SIZES}: not affine in the batch")

    def _operand(self, tensors: list[Tensor]) -> Value:
        tensor = tensors[0]
        owner = tensor.owner
        for key in (id(tensor), id(owner)):
            if key in self.values:
                return self.values[key]
        if isinstance(owner, (Parameter, Holder)):
            return self._state(owner, tensor)
        arrays = [t.array for t in tensors]
        if tensor.array is None or any(
            a is None or not np.array_equal(a, arrays[0]) for a in arrays
        ):
            raise GraphError(
                "a value that depends on the batch was made outside recorded operations"
            )
        return self._constant(tensor)

    def _state(self, owner: Parameter | Holder, tensor: Tensor) -> Value:
        if id(owner) not in self.states:
            role = Role.PARAMETER if isinstance(owner, Parameter) else Role.STATISTIC
            name = self.names.get(id(owner), f"state{len(self.states)}").lstrip("/")
            array = owner.array
            assert array is not None
            state = State(name, array.shape, DType.of(array.dtype), role)
            self.store[state] = array
            self.states[id(owner)] = self.new.read(state)
        return self.states[id(owner)]

    def _constant(self, tensor: Tensor) -> Value:
        """A number becomes a filled constant, an array a constant state."""
        array = tensor.array
        assert array is not None
        if array.shape == ():
            return self.new.emit(Full(float(array), (), tensor.type.dtype))
        state = State(f"constant{len(self.states)}", array.shape, tensor.type.dtype, Role.CONSTANT)
        self.store[state] = array
        self.states[id(tensor)] = self.new.read(state)
        return self.states[id(tensor)]


def _named(model: Any) -> list[tuple[str, Any]]:
    """Paths of parameters, and of running statistics, if the model is a link."""
    found: list[tuple[str, Any]] = list(getattr(model, "namedparams", lambda: [])())
    for path, link in getattr(model, "namedlinks", lambda: [])():
        for name, holder in getattr(link, "_holders", {}).items():
            found.append((f"{path.rstrip('/')}/{name}", holder))
    return found
