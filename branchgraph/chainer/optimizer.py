"""Chainer's optimizers: hyperparameters, update rules, hooks and the life of an update.

Updates are recorded: parameters and states are holders, gradients are tensors that may be pending,
and `Optimizer.update` runs everything at its end, so an iteration is one program. What a rule or a
hook does to arrays of given types is traced once on a scratch graph and replayed (`replay`).
Numbers such as learning rates are fed as 0-d arrays, so changing them compiles nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, ClassVar

import numpy as np

from branchgraph.chainer.recorder import Holder, Tensor, recorder, type_of
from branchgraph.chainer.serializer import Deserializer
from branchgraph.chainer.template import replay
from branchgraph.chainer.variable import Parameter
from branchgraph.ir.graph import Value
from branchgraph.ir.ops.elementwise import cast
from branchgraph.ir.optimisers import Optimiser
from branchgraph.ir.types import DType


def fed(number: float, dtype: Any) -> Tensor:
    """A number as a 0-d array that the program is fed."""
    array = np.array(number, DType.of(dtype).numpy)
    return Tensor(type_of(array), array)


# -- hyperparameters -------------------------------------------------------------------------------


class Hyperparameter:
    """Named numbers; those not set here are the parent's current ones."""

    def __init__(self, parent: Hyperparameter | None = None) -> None:
        self._parent = parent

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._parent is None:
            raise AttributeError(f"there is no hyperparameter {name!r}")
        return getattr(self._parent, name)

    @property
    def parent(self) -> Hyperparameter | None:
        """Where numbers not set here come from."""
        return self._parent

    def own(self) -> dict[str, Any]:
        """The numbers set here."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def get_dict(self) -> dict[str, Any]:
        """All numbers, the parent's included."""
        inherited = {} if self._parent is None else self._parent.get_dict()
        return {**inherited, **self.own()}

    def __repr__(self) -> str:
        listed = ", ".join(f"{k}={v}" for k, v in sorted(self.get_dict().items()))
        return f"Hyperparameter({listed})"


class HyperparameterProxy:
    """An attribute of an optimizer that reads and writes its hyperparameter of that name."""

    def __init__(self, attr_name: str) -> None:
        self._name = attr_name
        self.__doc__ = f"The hyperparameter {attr_name}, of all parameters that do not override it."

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else getattr(instance.hyperparam, self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance.hyperparam, self._name, value)


# -- hooks -----------------------------------------------------------------------------------------


class _Hooks:
    """Hooks by name in the order they were added, those before an update and those after it."""

    def __init__(self) -> None:
        self.by_timing: dict[str, dict[str, Callable[..., Any]]] = {"pre": {}, "post": {}}

    def add(self, hook: Callable[..., Any], name: str | None, timing: str) -> None:
        if not callable(hook):
            raise TypeError(f"a hook must be callable, got {type(hook).__name__}")
        if timing not in ("pre", "post", "auto"):
            raise ValueError(f"timing must be 'pre', 'post' or 'auto', got {timing!r}")
        if timing == "auto":
            timing = getattr(hook, "timing", "pre")
        if name is None:
            name = getattr(hook, "name", None) or getattr(hook, "__name__", None)
        if name is None:
            raise ValueError("the hook has no name of its own; give add_hook a name")
        if any(name in hooks for hooks in self.by_timing.values()):
            raise KeyError(f"a hook {name!r} is there already")
        self.by_timing[timing][name] = hook

    def remove(self, name: str) -> None:
        for hooks in self.by_timing.values():
            if name in hooks:
                del hooks[name]
                return
        raise KeyError(f"there is no hook {name!r}")

    def at(self, timing: str) -> list[Callable[..., Any]]:
        return list(self.by_timing[timing].values())


# -- update rules ----------------------------------------------------------------------------------


class States(MutableMapping[str, np.ndarray]):
    """An update rule's arrays by name; reading one runs what is pending."""

    def __init__(self) -> None:
        self.holders: dict[str, Holder] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.holders[name].array

    def __setitem__(self, name: str, array: np.ndarray) -> None:
        if name in self.holders:
            self.holders[name].array = array
        else:
            self.holders[name] = Holder(np.asarray(array))

    def __delitem__(self, name: str) -> None:
        del self.holders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.holders)

    def __len__(self) -> int:
        return len(self.holders)

    def __deepcopy__(self, memo: dict[int, Any]) -> States:
        copied = States()
        for name, array in self.items():
            copied[name] = array.copy()
        return copied

    def __repr__(self) -> str:
        return repr(dict(self))


class UpdateRule:
    """How one parameter is updated. `t` counts its updates; `enabled = False` freezes it.

    Subclasses write `init_state(param)`, which fills `self.state`, and `update_core(param)`.
    """

    #: Names that `init_state` gives, for reading states before the parameter exists.
    state_names: tuple[str, ...] = ()

    def __init__(self, parent_hyperparam: Hyperparameter | None = None) -> None:
        self.hyperparam = Hyperparameter(parent_hyperparam)
        self.enabled = True
        self.t = 0
        self._state: States | None = None
        self._hooks = _Hooks()

    @property
    def state(self) -> States | None:
        """Arrays by name; None before the first update."""
        return self._state

    def add_hook(
        self, hook: Callable[..., Any], name: str | None = None, timing: str = "auto"
    ) -> None:
        """Call `hook(rule, param)` before or after each update of the parameter."""
        self._hooks.add(hook, name, timing)

    def remove_hook(self, name: str) -> None:
        """Forget a hook."""
        self._hooks.remove(name)

    def update(self, param: Parameter) -> None:
        """Count, make the states if they are missing, and update between the hooks."""
        if not self.enabled:
            return
        self.t += 1
        self._prepare(param)
        for hook in self._hooks.at("pre"):
            hook(self, param)
        self.update_core(param)
        for hook in self._hooks.at("post"):
            hook(self, param)

    def _prepare(self, param: Parameter) -> None:
        if not param.is_initialized:
            return
        if self._state is None:
            self._state = States()
            self.init_state(param)

    def init_state(self, param: Parameter) -> None:
        """Fill `self.state` for a parameter; by default there is nothing to keep."""

    def update_core(self, param: Parameter) -> None:
        """Update the parameter by its gradient."""
        self.update_core_cpu(param)

    def update_core_cpu(self, param: Parameter) -> None:
        """Where rules written for Chainer put their NumPy code."""
        raise NotImplementedError(f"{type(self).__name__} has no update_core")

    def serialize(self, serializer: Any) -> None:
        """Write or read t and the states, under their names; hyperparameters are not kept."""
        self.t = serializer("t", self.t)
        if self._state is not None:
            for name in self._state:
                self._state[name] = serializer(name, self._state[name])
        elif isinstance(serializer, Deserializer):
            self._read_states(serializer)

    def _read_states(self, serializer: Any) -> None:
        """Take states of a file before there are any; none if the file was written so early."""
        found = States()
        for name in self.state_names or self._names_by_trial():
            try:
                array = serializer(name, None)
            except KeyError:
                if self.t > 0 and self.enabled:
                    raise
                return
            if array is None:
                return
            found[name] = np.array(array)
        self._state = found

    def _names_by_trial(self) -> tuple[str, ...]:
        """The states that `init_state` makes, found on a copy with a parameter of one element."""
        trial = copy.copy(self)
        trial._state = States()
        trial.init_state(Parameter(np.zeros(1, np.float32)))
        return tuple(trial._state)


class RecordedRule(UpdateRule):
    """An update rule of the graph, `branchgraph.ir.optimisers`, on one parameter.

    `names` takes Chainer's names of hyperparameters to fields of the rule. Rules of which `widened`
    is true calculate float16 parameters in float32.
    """

    def __init__(
        self, parent_hyperparam: Hyperparameter, native: type[Optimiser], names: Mapping[str, str],
        widened: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(parent_hyperparam)
        self.native = native
        self.names = names
        self.widened = widened
        rate = next((k for k, v in names.items() if v == "learning_rate"), None)
        self._rate = rate
        #: The learning rate at the start, which AdaBound's bounds are relative to.
        self.initial_rate = None if rate is None else getattr(parent_hyperparam, rate)

    @property
    def state_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The slots of the rule."""
        return tuple(self._current().starts)

    def init_state(self, param: Parameter) -> None:
        assert self._state is not None
        for name, start in self._current().starts.items():
            self._state[name] = np.full(param.shape, start, param.dtype)

    def update_core(self, param: Parameter) -> None:
        holder, gradient = param._holder, param._grad
        if holder is None or gradient is None:
            return
        assert self._state is not None
        rule, own = self._current(), DType.of(param.dtype)
        dtype = DType.F32 if self.widened and own is DType.F16 else own
        if self.widened and getattr(rule, "eps", 0.0) != 0.0:
            _check_eps(rule.eps, dtype)  # type: ignore[attr-defined]
        scalars = self._scalars(rule, dtype)
        slots = self._state.holders
        names, numbers = tuple(slots), tuple(scalars)
        flags = tuple(v for v in vars(rule).values() if isinstance(v, bool))

        def build(p: Value, g: Value, *rest: Value) -> tuple[Value, ...]:
            wide = [cast(v, dtype) for v in rest[: len(names)]]
            before, fitted = dict(zip(names, wide)), dict(zip(numbers, rest[len(names) :]))
            moved, after = rule.rule(cast(p, dtype), cast(g, dtype), before, fitted)
            return tuple(cast(v, own) for v in (moved, *(after[n] for n in names)))

        made = replay(
            (type(rule), flags, names, numbers), build,
            holder.tensor(), gradient, *[s.tensor() for s in slots.values()], *scalars.values(),
        )  # fmt: skip
        for target, value in zip((holder, *slots.values()), made):
            recorder().assign(target, value)

    def _current(self) -> Optimiser:
        """The rule with the hyperparameters of this moment."""
        values = {ours: getattr(self.hyperparam, k) for k, ours in self.names.items()}
        return self.native(**values)

    def _scalars(self, rule: Optimiser, dtype: DType) -> dict[str, Tensor]:
        """What the rule reads, fed; rules that follow the optimizer alike share the feeds.

        They share by where the numbers come from, never by their values: a schedule on which two
        numbers meet must give the same program as before.
        """
        parent = self.hyperparam.parent
        shared = None
        if parent is not None and not self.hyperparam.own():
            shared = parent.__dict__.setdefault("_fed", {})
            key = (self.native, dtype, self.t)
            values = tuple(parent.get_dict().items())
            if key in shared and shared[key][0] == (values, self.initial_rate):
                return shared[key][1]  # type: ignore[no-any-return]
        rate = rule.learning_rate
        if self.initial_rate:
            rule.learning_rate = self.initial_rate
        tensors = {}
        for name, number in rule.scalars(rate, float(self.t)).items():
            assert not isinstance(number, Value)
            tensors[name] = fed(number, dtype)
        if shared is not None:
            for old in [k for k in shared if k[2] != self.t]:
                del shared[old]
            shared[key] = ((values, self.initial_rate), tensors)
        return tensors


def _check_eps(eps: float, dtype: DType) -> None:
    if dtype.numpy.type(eps) == 0:
        raise ValueError(f"eps = {eps} is 0 in {dtype.numpy.name}, in which the update is computed")


# -- optimizers ------------------------------------------------------------------------------------


class Optimizer:
    """Base: a target link, the counts `t` and `epoch`, and hooks."""

    target: Any = None
    t = 0
    epoch = 0
    _hooks: _Hooks | None = None
    #: Whether the updater counts epochs, so that `new_epoch()` by hand is a mistake.
    use_auto_new_epoch = False

    def setup(self, link: Any) -> Optimizer:
        """Take a link as the target and start counting from 0."""
        if not callable(getattr(link, "params", None)):
            raise TypeError(f"the target of an optimizer is a link, got {type(link).__name__}")
        self.target = link
        self.t = 0
        self.epoch = 0
        self._hooks = _Hooks()
        return self

    def update(self, lossfun: Callable[..., Any] | None = None, *args: Any, **kwds: Any) -> None:
        """Update the parameters of the target."""
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def new_epoch(self, auto: bool = False) -> None:
        """Count an epoch."""
        if not auto and self.use_auto_new_epoch:
            raise RuntimeError("the updater counts epochs already; do not call new_epoch() as well")
        self.epoch += 1

    def add_hook(
        self, hook: Callable[..., Any], name: str | None = None, timing: str = "auto"
    ) -> None:
        """Call `hook(opt)`, or `hook(rule, param)` each, before or after each update."""
        if self._hooks is None:
            raise RuntimeError("call setup(link) before add_hook: it starts with no hooks")
        self._hooks.add(hook, name, timing)

    def remove_hook(self, name: str) -> None:
        """Forget a hook."""
        if self._hooks is None:
            raise RuntimeError("call setup(link) before remove_hook")
        self._hooks.remove(name)

    def call_hooks(self, timing: str = "pre") -> None:
        """Call the hooks of a timing in the order they were added."""
        for hook in self._hooks.at(timing) if self._hooks is not None else ():
            self.call_hook(hook)

    def call_hook(self, hook: Callable[..., Any]) -> None:
        """Call one hook, on the optimizer or on each parameter."""
        if getattr(hook, "call_for_each_param", False):
            for param in self.target.params():
                hook(param.update_rule, param)
        else:
            hook(self)

    def serialize(self, serializer: Any) -> None:
        """Write or read t, epoch and what the rule of each parameter keeps."""
        self.t = serializer("t", self.t)
        self.epoch = serializer("epoch", self.epoch)
        for name, param in self.target.namedparams():
            if getattr(param, "update_rule", None) is not None:
                param.update_rule.serialize(serializer[name])


class GradientMethod(Optimizer):
    """Optimizers that update each parameter by its gradient, with a rule for each.

    Subclasses write `create_update_rule()`, or name the rule of the graph: `native` and `names`,
    Chainer's names of its hyperparameters to the rule's.
    """

    native: ClassVar[type[Optimiser] | None] = None
    names: ClassVar[Mapping[str, str]] = {}
    widened: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in cls.names:
            if not hasattr(cls, name):
                setattr(cls, name, HyperparameterProxy(name))

    def __init__(self, model: Any = None, **hyperparameters: Any) -> None:
        super().__init__()
        self.hyperparam = Hyperparameter()
        for name, value in hyperparameters.items():
            setattr(self.hyperparam, name, value)
        if model is not None:
            self.setup(model)

    def setup(self, link: Any) -> GradientMethod:
        """Take a link as the target; each parameter it has now gets an update rule."""
        super().setup(link)
        for param in link.params():
            param.update_rule = self.create_update_rule()
        return self

    def create_update_rule(self) -> UpdateRule:
        """A rule for one parameter, which follows this optimizer's hyperparameters."""
        if self.native is None:
            raise NotImplementedError(f"{type(self).__name__} has no create_update_rule")
        return RecordedRule(self.hyperparam, self.native, self.names, self.widened)

    def reallocate_cleared_grads(self) -> None:
        """Give parameters that took no part in the loss a gradient of zeros."""
        for param in self.target.params():
            if param.is_initialized and param._grad is None:
                zeros = np.zeros(param.shape, param.dtype)
                param._grad = Tensor(type_of(zeros), zeros)

    def update(self, lossfun: Callable[..., Any] | None = None, *args: Any, **kwds: Any) -> None:
        """One update; with `lossfun`, of the gradient of `lossfun(*args, **kwds)`.

        Parameters without a gradient are updated with zeros: decay and momentum move them too.
        """
        if lossfun is not None:
            loss = lossfun(*args, **kwds)
            self.target.cleargrads()
            loss.backward()
            del loss
        self.reallocate_cleared_grads()
        self.call_hooks("pre")
        self.t += 1
        for param in self.target.params():
            param.update()
        self.reallocate_cleared_grads()
        self.call_hooks("post")
        recorder().flush()

    def use_cleargrads(self, use: bool = True) -> None:
        """Gradients are always cleared; kept for old code."""
        warnings.warn(
            "use_cleargrads is deprecated: gradients are always cleared",
            DeprecationWarning, stacklevel=2,
        )  # fmt: skip


_MOVED = ("WeightDecay", "Lasso", "GradientClipping", "GradientHardClipping", "GradientLARS",
          "GradientNoise", "exponential_decay_noise")  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from branchgraph.chainer import optimizer_hooks

    warnings.warn(
        f"optimizer.{name} moved; use optimizer_hooks.{name}", DeprecationWarning, stacklevel=2
    )
    return getattr(optimizer_hooks, name)
