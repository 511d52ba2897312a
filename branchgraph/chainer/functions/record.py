"""How a function is written: Chainer's arguments in, recorded ops out.

    @function
    def relu(x):
        return record(Relu(), x)

`record` takes variables, arrays (they need no gradient) and gives variables. `function` turns the
graph's shape errors into Chainer's `InvalidType`, naming the function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from branchgraph.chainer.configuration import flag
from branchgraph.chainer.recorder import Tensor, recorder, type_of
from branchgraph.chainer.type_check import invalid
from branchgraph.chainer.variable import Variable, as_variable
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.op import Op

F = TypeVar("F", bound=Callable[..., Any])


def function(f: F) -> F:
    """Mark a public function: shape errors become `InvalidType` with its name."""

    @functools.wraps(f)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return f(*args, **kwargs)
        except ShapeError as error:
            raise invalid(f.__name__, error) from None

    return cast(F, called)


def operand(value: Variable | np.ndarray) -> Tensor:
    """The tensor that a recorded op reads."""
    if isinstance(value, Variable):
        return value._operand()
    copied = np.array(value)
    return Tensor(type_of(copied), copied)


@functools.lru_cache(maxsize=4096, typed=True)
def made(op: type[Op], *fields: Any) -> Op:
    """`op(*fields)`, made once: constructing and checking an op costs more than recording it."""
    return op(*fields)


def record_all(op: Op, *inputs: Variable | np.ndarray) -> tuple[Variable, ...]:
    """Record one op; a variable for each of its outputs."""
    tensors = [operand(v) for v in inputs]
    outputs = recorder().call(op, *tensors, traced=flag("enable_backprop"))
    return tuple([Variable._of(t) for t in outputs])


def record(op: Op, *inputs: Variable | np.ndarray) -> Variable:
    """Record an op with one output."""
    tensors = [v._operand() if isinstance(v, Variable) else operand(v) for v in inputs]
    return Variable._of(recorder().call(op, *tensors, traced=flag("enable_backprop"))[0])


def constant(value: float, like: Variable) -> Variable:
    """A Python number as a 0-d array of the dtype of `like`.

    It is fed, not compiled in, so a number that varies from iteration to iteration compiles once.
    """
    return Variable(np.array(value, like.dtype), requires_grad=False)


def pair(value: Any, axes: int = 2) -> tuple[int, ...]:
    """An int or a tuple as one number an axis."""
    if hasattr(value, "__getitem__"):
        return tuple(int(v) for v in value)
    return (int(value),) * axes


def check_removed(name: str, given: dict[str, Any], advice: dict[str, str]) -> None:
    """`ValueError` with advice for arguments Chainer removed, `TypeError` for unknown ones."""
    for key in given:
        if key in advice:
            raise ValueError(f"{name}: the argument {key} is not supported any more; {advice[key]}")
        raise TypeError(f"{name}() got an unexpected keyword argument {key!r}")


__all__ = [
    "as_variable",
    "check_removed",
    "constant",
    "function",
    "made",
    "operand",
    "pair",
    "record",
    "record_all",
]
