"""User-defined functions: `FunctionNode` (new style) and `Function` (old style).

They are opaque: their Python runs when they are applied, on arrays, so everything pending runs
first. Their backward is called during back-propagation; new-style ones get and return variables, so
what they compute there is recorded like anything else.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from branchgraph.chainer.configuration import config, using_config
from branchgraph.chainer.recorder import Call, Tensor, recorder, type_of
from branchgraph.chainer.variable import Variable, as_variable


@dataclass(frozen=True)
class TypeInfo:
    """What `check_type_forward` sees of one input."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


class TypeInfos(tuple):  # type: ignore[type-arg]
    """The inputs of a function for `check_type_forward`."""

    def size(self) -> int:
        """Number of inputs."""
        return len(self)


class FunctionNode:
    """A differentiable function written by the user.

    Override `forward(inputs)` (or `forward_cpu`), which takes and returns tuples of arrays, and
    `backward(target_input_indexes, grad_outputs)`, which takes and returns tuples of variables.
    """

    inputs: tuple[Variable, ...] = ()
    outputs: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self._retained_inputs: tuple[int, ...] = ()
        self._retained_outputs: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """The name of the function in pictures and messages."""
        return type(self).__name__

    def forward(self, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """Arrays to arrays."""
        return self.forward_cpu(inputs)

    def forward_cpu(self, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """Arrays to arrays on the CPU."""
        raise NotImplementedError(f"{self.label} defines neither forward nor forward_cpu")

    def backward(
        self, target_input_indexes: tuple[int, ...], grad_outputs: tuple[Variable | None, ...]
    ) -> Sequence[Variable | None]:
        """Gradients of the inputs asked for; none by default."""
        return (None,) * len(target_input_indexes)

    def check_type_forward(self, in_types: TypeInfos) -> None:
        """Raise `InvalidType` when the inputs do not fit; overridden by the user."""

    def retain_inputs(self, indexes: Sequence[int]) -> None:
        """Keep inputs for `backward`; called inside `forward`."""
        self._retained_inputs = tuple(indexes)

    def retain_outputs(self, indexes: Sequence[int]) -> None:
        """Keep outputs for `backward`; called inside `forward`."""
        self._retained_outputs = tuple(indexes)

    def get_retained_inputs(self) -> tuple[Variable, ...]:
        """The inputs that `forward` kept, as variables."""
        return tuple(self.inputs[i] for i in self._retained_inputs)

    def get_retained_outputs(self) -> tuple[Variable, ...]:
        """The outputs that `forward` kept, as variables."""
        kept = (self._call.outputs[i]() for i in self._retained_outputs)
        return tuple(
            Variable._of(t) if t is not None else Variable(a)
            for t, a in zip(kept, self._output_arrays)
        )

    def apply(self, inputs: Sequence[Any]) -> tuple[Variable, ...]:
        """Apply the function to variables or arrays."""
        return _apply(self, tuple(as_variable(v) for v in inputs), self.forward, self._pull_back)

    def _pull_back(
        self, cotangents: Sequence[Tensor | None], wanted: tuple[bool, ...], traced: bool
    ) -> list[Tensor | None]:
        targets = tuple(i for i, w in enumerate(wanted) if w)
        given = tuple(None if c is None else Variable._of(c) for c in cotangents)
        with using_config("enable_backprop", traced):
            found = self.backward(targets, given)
        result: list[Tensor | None] = [None] * len(wanted)
        for i, gradient in zip(targets, found):
            result[i] = None if gradient is None else gradient._operand()
        return result

    _call: Call
    _output_arrays: tuple[np.ndarray, ...] = ()


class Function:
    """An old-style function: `forward(inputs)` and `backward(inputs, grad_outputs)` on arrays."""

    def __call__(self, *inputs: Any) -> Any:
        variables = tuple(as_variable(v) for v in inputs)
        outputs = _apply(self, variables, self.forward, self._pull_back)
        return outputs[0] if len(outputs) == 1 else outputs

    @property
    def label(self) -> str:
        """The name of the function in pictures and messages."""
        return type(self).__name__

    inputs: tuple[Variable, ...] = ()
    _call: Call
    _output_arrays: tuple[np.ndarray, ...] = ()

    def forward(self, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """Arrays to arrays."""
        return self.forward_cpu(inputs)

    def forward_cpu(self, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """Arrays to arrays on the CPU."""
        raise NotImplementedError(f"{self.label} defines neither forward nor forward_cpu")

    def backward(
        self, inputs: tuple[np.ndarray, ...], grad_outputs: tuple[np.ndarray | None, ...]
    ) -> tuple[np.ndarray | None, ...]:
        """Gradients of all inputs, on arrays."""
        return self.backward_cpu(inputs, grad_outputs)

    def backward_cpu(
        self, inputs: tuple[np.ndarray, ...], grad_outputs: tuple[np.ndarray | None, ...]
    ) -> tuple[np.ndarray | None, ...]:
        """Gradients of all inputs on the CPU; none by default."""
        return (None,) * len(inputs)

    def check_type_forward(self, in_types: TypeInfos) -> None:
        """Raise `InvalidType` when the inputs do not fit; overridden by the user."""

    def _pull_back(
        self, cotangents: Sequence[Tensor | None], wanted: tuple[bool, ...], traced: bool
    ) -> list[Tensor | None]:
        record = recorder()
        arrays = tuple(record.value(t) for t in self._call.inputs)
        given = tuple(None if c is None else record.value(c) for c in cotangents)
        found = self.backward(arrays, given)
        return [None if g is None else Tensor(type_of(g), g) for g in found]


def _apply(node: Any, inputs: tuple[Variable, ...], forward: Any, pull_back: Any) -> Any:
    """Run a user's function now, and note the call for back-propagation."""
    record = recorder()
    tensors = tuple(v._operand() for v in inputs)
    arrays = tuple(record.value(t) for t in tensors)
    if config.type_check:
        node.check_type_forward(TypeInfos(TypeInfo(a.shape, a.dtype) for a in arrays))
    results = forward(arrays)
    if not isinstance(results, tuple):
        raise TypeError(
            f"forward of {node.label} must return a tuple, got {type(results).__name__}"
        )
    call = Call(None, tensors)
    call.backward = lambda call, cotangents, wanted, traced: pull_back(cotangents, wanted, traced)
    needs = config.enable_backprop and any(t.requires_grad for t in tensors)
    outputs = tuple(
        Tensor(type_of(a), a, call=call if needs else None, index=i, requires_grad=needs)
        for i, a in enumerate(np.asarray(a) for a in results)
    )
    call.outputs = tuple(weakref.ref(t) for t in outputs)
    node.inputs, node._call = inputs, call
    node._output_arrays = tuple(t.array for t in outputs)
    return tuple(Variable._of(t) for t in outputs)
