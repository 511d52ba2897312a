"""Variable and Parameter: Chainer's arrays that remember where they came from.

Operations record; `array` and `grad` run what is pending when they are asked for. Back-propagation
visits calls by descending rank, as Chainer does, and records the backward calls; only leaves keep
gradients unless `retain_grad` is set, and leaf gradients accumulate until they are cleared.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from branchgraph.chainer.configuration import config, using_config
from branchgraph.chainer.recorder import Call, Holder, Tensor, recorder, type_of
from branchgraph.chainer.template import gradients
from branchgraph.ir.ops.merge import Sum


class Variable:
    """An array with a history.

    `data` must be a NumPy array. `requires_grad` says whether it receives a gradient.
    """

    __array_priority__ = 200

    # What a recorded value starts with; instances set their own when they differ.
    _data: np.ndarray | None = None
    _grad: Tensor | None = None
    name: str | None = None

    def __init__(
        self, data: np.ndarray | None = None, *, name: str | None = None,
        grad: np.ndarray | None = None, requires_grad: bool = True, **removed: Any,
    ) -> None:  # fmt: skip
        if "volatile" in removed:
            raise ValueError(
                "volatile was removed in Chainer v2; use chainer.no_backprop_mode() instead"
            )
        if removed:
            raise TypeError(f"Variable got unexpected arguments: {', '.join(removed)}")
        if data is not None and not isinstance(data, np.ndarray):
            raise TypeError(f"data must be a numpy.ndarray, got {type(data).__name__}")
        self._data = data
        self._tensor: Tensor | None = None
        self._grad = None
        self.requires_grad = requires_grad
        self.name = name
        if grad is not None:
            self.grad = grad

    @classmethod
    def _of(cls, tensor: Tensor) -> Variable:
        """The variable of a recorded value."""
        made = Variable.__new__(Variable)
        made._tensor = tensor
        made.requires_grad = tensor.requires_grad
        if tensor.owner is None:
            tensor.owner = weakref.ref(made)
        return made

    # -- values --------------------------------------------------------------------------------

    def _operand(self) -> Tensor:
        """The tensor that an operation recorded now reads: a copy, if the array is the user's."""
        if self._tensor is not None:
            return self._tensor
        array = self._data
        if array is None:
            raise ValueError("a variable without data cannot be used in a computation")
        copied = array.copy()
        return Tensor(type_of(copied), copied, None, 0, self.requires_grad, self)

    @property
    def array(self) -> np.ndarray | None:
        """The value; running what is pending if need be."""
        if self._data is None and self._tensor is not None:
            self._data = recorder().value(self._tensor)
        return self._data

    @array.setter
    def array(self, value: np.ndarray | None) -> None:
        self._data = value
        self._tensor = None

    data = array

    @property
    def shape(self) -> tuple[int, ...]:
        if self._tensor is not None:
            return self._tensor.type.shape  # type: ignore[return-value]
        assert self._data is not None
        return self._data.shape

    @property
    def dtype(self) -> np.dtype:
        if self._tensor is not None:
            return self._tensor.type.dtype.numpy
        assert self._data is not None
        return self._data.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def xp(self) -> Any:
        """The array module, NumPy."""
        return np

    @property
    def creator(self) -> Call | None:
        """The call that made this value, None for leaves and outside back-propagation."""
        if self._tensor is None or self._tensor.call is None or not self._traced():
            return None
        return self._tensor.call

    creator_node = creator

    def _traced(self) -> bool:
        return self._tensor is not None and self._tensor.requires_grad

    @property
    def rank(self) -> int:
        return self._tensor.rank if self._tensor is not None else 0

    @property
    def node(self) -> Variable:
        """The variable itself: its history is kept with it."""
        return self

    # -- gradients -----------------------------------------------------------------------------

    @property
    def grad(self) -> np.ndarray | None:
        """The gradient; running what is pending if need be."""
        return None if self._grad is None else recorder().value(self._grad)

    @grad.setter
    def grad(self, value: np.ndarray | None) -> None:
        if value is None:
            self._grad = None
            return
        if not isinstance(value, np.ndarray):
            raise TypeError(f"grad must be a numpy.ndarray, got {type(value).__name__}")
        if value.shape != self.shape:
            raise ValueError(f"grad has shape {value.shape}, the data has {self.shape}")
        if value.dtype != self.dtype:
            raise TypeError(f"grad has dtype {value.dtype}, the data has {self.dtype}")
        self._grad = Tensor(type_of(value), value)

    @property
    def grad_var(self) -> Variable | None:
        """The gradient as a variable."""
        return None if self._grad is None else Variable._of(self._grad)

    @grad_var.setter
    def grad_var(self, value: Variable | None) -> None:
        self._grad = None if value is None else value._operand()

    def cleargrad(self) -> None:
        """Forget the gradient."""
        self._grad = None

    def zerograd(self) -> None:
        """Set the gradient to zeros (deprecated in Chainer)."""
        self._grad = Tensor(type_of(zeros := np.zeros(self.shape, self.dtype)), zeros)

    def addgrad(self, other: Variable) -> None:
        """Add the gradient of another variable."""
        if other._grad is not None:
            self._accumulate(other._grad)

    def _accumulate(self, cotangent: Tensor) -> None:
        if self._grad is None:
            self._grad = cotangent
        else:
            (self._grad,) = recorder().call(Sum(), self._grad, cotangent)

    def backward(
        self, retain_grad: bool = False, enable_double_backprop: bool = False,
        loss_scale: float | None = None,
    ) -> None:  # fmt: skip
        """Back-propagate from this variable; a single number starts from 1 (or the loss scale)."""
        if self._grad is None:
            if self.size != 1:
                raise TypeError(
                    f"backward of a variable of shape {self.shape} needs its grad set first"
                )
            value = 1.0 if loss_scale is None else loss_scale
            start = np.full(self.shape, value, self.dtype)
            self._grad = Tensor(type_of(start), start)
        seed = self._grad
        with using_config("enable_backprop", enable_double_backprop):
            _propagate([(self, seed)], retain_grad, enable_double_backprop)
        if not retain_grad and self._traced():
            self._grad = None

    def unchain(self) -> None:
        """Cut the history off: this variable becomes a leaf."""
        if self._tensor is not None and self._tensor.call is not None:
            value = recorder().value(self._tensor)
            self._tensor = Tensor(type_of(value), value, owner=weakref.ref(self))
            self.requires_grad = True

    def unchain_backward(self) -> None:
        """Cut off everything this variable was computed from."""
        self.unchain()

    # -- shapes and operators ------------------------------------------------------------------

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d variable")
        return self.shape[0]

    def __iter__(self) -> Iterator[Variable]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, slices: Any) -> Variable:
        return _function("get_item")(self, slices)

    def reshape(self, *shape: Any) -> Variable:
        """The same elements under another shape; one size may be -1."""
        given = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return _function("reshape")(self, tuple(given))

    def transpose(self, *axes: Any) -> Variable:
        """Axes permuted, reversed by default."""
        if not axes:
            return _function("transpose")(self)
        given = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        return _function("transpose")(self, None if given is None else tuple(given))

    @property
    def T(self) -> Variable:
        """Axes reversed."""
        return self.transpose()

    def mean(self, axis: Any = None, *, weights: Any = None, keepdims: bool = False) -> Variable:
        """The mean over axes."""
        return _function("average")(self, axis, weights, keepdims)

    def item(self) -> Any:
        """The only element as a Python scalar."""
        assert self.array is not None
        return self.array.item()

    def copydata(self, other: Variable) -> None:
        """Take the values of another variable into this one's array."""
        if other.array is None:
            return
        if self.array is None:
            self.array = other.array.copy()
        else:
            np.copyto(self.array, other.array)

    def to_cpu(self) -> None:
        """Data are on the CPU already."""

    def __bool__(self) -> bool:
        raise TypeError("the truth of a Variable is not defined; compare its .array")

    __hash__ = None  # type: ignore[assignment]

    def _no_comparison(self, other: object) -> Any:
        raise TypeError("Variables are not compared; compare their .array")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _no_comparison  # type: ignore[assignment]

    def __repr__(self) -> str:
        text = repr(self.array).replace("array(", "", 1)
        body = text[: text.rindex("]") + 1] if "]" in text else str(self.array)
        name = f" {self.name}" if self.name else ""
        return f"variable{name}({body})"

    def __neg__(self) -> Variable:
        return _function("neg")(self)

    def __abs__(self) -> Variable:
        return _function("absolute")(self)

    def __add__(self, other: Any) -> Variable:
        return _function("add_operator")(self, other)

    def __radd__(self, other: Any) -> Variable:
        return _function("add_operator")(self, other)

    def __sub__(self, other: Any) -> Variable:
        return _function("subtract_operator")(self, other)

    def __rsub__(self, other: Any) -> Variable:
        return _function("subtract_operator")(other, self)

    def __mul__(self, other: Any) -> Variable:
        return _function("multiply_operator")(self, other)

    def __rmul__(self, other: Any) -> Variable:
        return _function("multiply_operator")(self, other)

    def __truediv__(self, other: Any) -> Variable:
        return _function("divide_operator")(self, other)

    def __rtruediv__(self, other: Any) -> Variable:
        return _function("divide_operator")(other, self)

    def __floordiv__(self, other: Any) -> Variable:
        return _function("floor_divide_operator")(self, other)

    def __rfloordiv__(self, other: Any) -> Variable:
        return _function("floor_divide_operator")(other, self)

    def __pow__(self, other: Any) -> Variable:
        return _function("power_operator")(self, other)

    def __rpow__(self, other: Any) -> Variable:
        return _function("power_operator")(other, self)

    def __matmul__(self, other: Any) -> Variable:
        return _function("matmul")(self, other)

    def __rmatmul__(self, other: Any) -> Variable:
        return _function("matmul")(other, self)


class Parameter(Variable):
    """A trainable leaf: an initialiser until its shape is known, then an array updated in place."""

    def __init__(
        self, initializer: Any = None, shape: Any = None, name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name=name)
        self.update_rule: Any = None
        self._holder: Holder | None = None
        self._clear_on_initialize = False
        self._unset_gradient = True
        if initializer is None:
            initializer = float("nan")
        if isinstance(initializer, np.ndarray) and shape is None:
            self.initializer = None
            self._hold(initializer)
            return
        self.initializer = initializer
        if shape is not None:
            self.initialize((shape,) if isinstance(shape, int) else tuple(shape))

    def _hold(self, array: np.ndarray) -> None:
        self._holder = Holder(array)
        nan = np.full_like(array, np.nan) if array.dtype.kind == "f" else np.zeros_like(array)
        self._grad = Tensor(type_of(nan), nan)

    @property
    def is_initialized(self) -> bool:
        """Whether the array exists."""
        return self._holder is not None

    def initialize(self, shape: tuple[int, ...]) -> None:
        """Allocate the array and fill it by the initialiser; the gradient is NaN until cleared."""
        from branchgraph.chainer.initializers import generate_array

        cleared = self._grad is None and not self._unset_gradient
        self._hold(generate_array(self.initializer, shape))
        if cleared:
            self._grad = None

    def _operand(self) -> Tensor:
        if self._holder is None:
            raise RuntimeError(f"parameter {self.name!r} is not initialised yet")
        if self._holder.pending is not None:
            recorder().flush()  # what is read is a leaf, so that it receives a gradient
        return self._holder.tensor(requires_grad=self.requires_grad, owner=self)

    @property
    def array(self) -> np.ndarray | None:
        """The value, up to date; its holder may edit it."""
        return None if self._holder is None else self._holder.array

    @array.setter
    def array(self, value: np.ndarray) -> None:
        if self._holder is None:
            self._hold(value)
        else:
            self._holder.array = value

    data = array

    @property
    def shape(self) -> tuple[int, ...]:
        if self._holder is None:
            raise AttributeError("an uninitialised parameter has no shape")
        return self._holder._array.shape

    @property
    def dtype(self) -> np.dtype:
        if self._holder is None:
            return np.dtype(getattr(self.initializer, "dtype", None) or config.dtype)
        return self._holder._array.dtype

    @property
    def grad(self) -> np.ndarray | None:
        """The gradient; NaN from the initialisation until it is cleared."""
        if self._holder is None and self._grad is None and self._unset_gradient:
            raise RuntimeError("the gradient of an uninitialised parameter was not cleared")
        return Variable.grad.__get__(self)

    @grad.setter
    def grad(self, value: np.ndarray | None) -> None:
        Variable.grad.__set__(self, value)

    def cleargrad(self) -> None:
        """Forget the gradient."""
        super().cleargrad()
        self._unset_gradient = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the values and leave the history of the gradient behind."""
        grad = None if self._grad is None else recorder().value(self._grad)
        recorder().flush()
        return {**self.__dict__, "_grad": None if grad is None else Tensor(type_of(grad), grad)}

    def update(self) -> None:
        """Apply the update rule, if there is one."""
        if self.update_rule is not None:
            self.update_rule.update(self)


def as_variable(value: Any) -> Variable:
    """Variables pass through; an array becomes a variable that needs no gradient."""
    if isinstance(value, Variable):
        return value
    return Variable(value, requires_grad=False)


def _function(name: str) -> Callable[..., Any]:
    """A function by name: functions are built on variables, so they are looked up when called."""
    from branchgraph.chainer import functions

    return getattr(functions, name)  # type: ignore[no-any-return]


# -- back-propagation ------------------------------------------------------------------------------


def _propagate(seeds: Sequence[tuple[Variable, Tensor]], retain_grad: bool, traced: bool) -> None:
    """Walk the calls below `seeds` by descending rank and give leaves their gradients."""
    flowing: dict[int, tuple[Tensor, list[Tensor]]] = {}
    queue: list[tuple[int, int, Call]] = []
    seen: set[int] = set()

    def reach(tensor: Tensor, cotangent: Tensor) -> None:
        if tensor.call is None or not tensor.requires_grad:
            if tensor.requires_grad and isinstance(tensor.owner, Variable):
                tensor.owner._accumulate(cotangent)
            return
        flowing.setdefault(id(tensor), (tensor, []))[1].append(cotangent)
        if id(tensor.call) not in seen:
            seen.add(id(tensor.call))
            heapq.heappush(queue, (-tensor.call.rank, len(seen), tensor.call))

    for variable, seed in seeds:
        if variable._tensor is not None:
            reach(variable._tensor, seed)
    while queue:
        _, _, call = heapq.heappop(queue)
        cotangents = [_arrived(reference(), flowing, retain_grad) for reference in call.outputs]
        wanted = tuple([t.requires_grad for t in call.inputs])
        backward = call.backward or gradients
        for tensor, cotangent in zip(call.inputs, backward(call, cotangents, wanted, traced)):
            if cotangent is not None and tensor.requires_grad:
                reach(tensor, cotangent)


def _arrived(
    tensor: Tensor | None, flowing: dict[int, tuple[Tensor, list[Tensor]]], retain_grad: bool
) -> Tensor | None:
    """The sum of what flowed to an output; kept as its variable's gradient if that is wanted."""
    if tensor is None or id(tensor) not in flowing:
        return None
    parts = flowing.pop(id(tensor))[1]
    total = parts[0] if len(parts) == 1 else recorder().call(Sum(), *parts)[0]
    if retain_grad and isinstance(tensor.owner, weakref.ref):
        variable = tensor.owner()
        if variable is not None:
            variable._grad = total
    return total
