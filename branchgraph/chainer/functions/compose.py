"""What composed functions share: checks, numbers, sums and shapes of variables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from branchgraph.chainer.functions.record import as_variable, record
from branchgraph.chainer.variable import Variable
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.op import Op
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.ops.elementwise import Add, Cast, Compare, Divide, Multiply, Subtract, Where
from branchgraph.ir.ops.reduce import ReduceMean, ReduceSum
from branchgraph.ir.ops.reshape import Reshape, Transpose
from branchgraph.ir.types import DType

# -- checks --------------------------------------------------------------------------------------


def expect(condition: bool, rule: str) -> None:
    """`ShapeError(rule)`, which `function` turns into `InvalidType`, unless `condition`."""
    if not condition:
        raise ShapeError(rule)


def floating(value: Any, name: str = "x") -> Variable:
    """A variable of a floating dtype."""
    x = as_variable(value)
    if x.dtype.kind != "f":
        raise ShapeError(f"{name} must be floating, got {x.dtype}")
    return x


def alike(*values: Any) -> tuple[Variable, ...]:
    """Floating variables of one dtype and one shape."""
    xs = tuple(floating(v) for v in values)
    for x in xs[1:]:
        expect(x.dtype == xs[0].dtype, f"dtypes must be equal, got {xs[0].dtype} and {x.dtype}")
        expect(x.shape == xs[0].shape, f"shapes must be equal, got {xs[0].shape} and {x.shape}")
    return xs


def labels(value: Any, shape: tuple[int, ...]) -> Variable:
    """Labels: a variable of signed integers of `shape`."""
    t = as_variable(value)
    expect(t.dtype.kind == "i", f"labels must be signed integers, got {t.dtype}")
    expect(t.shape == shape, f"labels must have shape {shape}, got {t.shape}")
    return t


def chosen(reduce: str, *known: str) -> str:
    """`reduce`, or `ValueError` naming what is known."""
    if reduce not in known:
        raise ValueError(f"reduce must be one of {', '.join(map(repr, known))}, got {reduce!r}")
    return reduce


def along(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    expect(-rank <= axis < rank, f"axis {axis} is outside an array of {rank} axes")
    return axis % rank


# -- arithmetic with hyper-parameters ------------------------------------------------------------


def number(value: float, like: Variable) -> Variable:
    """A hyper-parameter in the dtype of `like`; it is compiled in."""
    return record(Full(float(value), (), DType.of(like.dtype)))


def scaled(x: Variable, factor: float) -> Variable:
    """factor x."""
    return record(Multiply(), x, number(factor, x))


def shifted(x: Variable, offset: float) -> Variable:
    """x + offset."""
    return record(Add(), x, number(offset, x))


def divided(x: Variable, divisor: Variable | float) -> Variable:
    """x / divisor."""
    by = divisor if isinstance(divisor, Variable) else number(divisor, x)
    return record(Divide(), x, by)


def sum_of(a: Variable, b: Variable) -> Variable:
    """a + b."""
    return record(Add(), a, b)


def difference(a: Variable, b: Variable) -> Variable:
    """a - b."""
    return record(Subtract(), a, b)


def product(a: Variable, b: Variable | np.ndarray) -> Variable:
    """a b."""
    return record(Multiply(), a, b)


def square(x: Variable) -> Variable:
    """x^2."""
    return record(Multiply(), x, x)


def compared(x: Variable, relation: str, value: float) -> Variable:
    """Where `x relation value`, as bool."""
    return record(Compare(relation), x, number(value, x))


def selected(condition: Variable, a: Variable, b: Variable) -> Variable:
    """a where the condition holds, else b."""
    return record(Where(), condition, a, b)


def cast_to(x: Variable, dtype: np.dtype) -> Variable:
    """x in another dtype; x itself when it has it."""
    return x if x.dtype == dtype else record(Cast(DType.of(dtype)), x)


def beside(value: Any, x: Variable) -> Variable:
    """A floating parameter in the dtype of the floating `x`."""
    return cast_to(floating(value, "a parameter"), x.dtype)


# -- reductions and shapes -----------------------------------------------------------------------


def total(x: Variable, axes: Iterable[int] | None = None, keepdims: bool = False) -> Variable:
    """The sum over axes, all of them by default."""
    return record(ReduceSum(_ascending(axes, x), keepdims), x)


def average_of(x: Variable, axes: Iterable[int] | None = None, keepdims: bool = False) -> Variable:
    """The mean over axes, all of them by default."""
    return record(ReduceMean(_ascending(axes, x), keepdims), x)


def _ascending(axes: Iterable[int] | None, x: Variable) -> tuple[int, ...]:
    return tuple(range(x.ndim)) if axes is None else tuple(sorted(along(a, x.ndim) for a in axes))


def reduced(x: Variable, reduce: str) -> Variable:
    """x summed, averaged or left alone."""
    steps = {"sum": total, "mean": average_of, "no": lambda v: v}
    return steps[chosen(reduce, *steps)](x)


def shaped(x: Variable, *shape: int) -> Variable:
    """x under another shape; one size may be -1."""
    known = int(np.prod([s for s in shape if s >= 0], dtype=np.int64))
    full = tuple(s if s >= 0 else x.size // max(known, 1) for s in shape)
    return x if full == x.shape else record(Reshape(full), x)


def permuted(x: Variable, order: Iterable[int]) -> Variable:
    """x with its axes in another order."""
    axes = tuple(order)
    return x if axes == tuple(range(x.ndim)) else record(Transpose(axes), x)


def aligned(y: Variable, x: Variable, axis: int = 1) -> Variable:
    """y with unit axes, so that its axes meet those of `x` from `axis` on."""
    end = axis + y.ndim
    fits = end <= x.ndim and y.shape == x.shape[axis:end]
    expect(fits, f"shape {y.shape} must meet {x.shape} from axis {axis} on")
    return shaped(y, *(1,) * axis, *y.shape, *(1,) * (x.ndim - end))


def matrix(x: Variable) -> Variable:
    """x as [N, features]."""
    return shaped(x, x.shape[0], x.size // max(x.shape[0], 1))


def recorded(op: Op, *values: Any) -> Variable:
    """`record` of floating values."""
    return record(op, *(floating(v) for v in values))
