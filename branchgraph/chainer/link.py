"""Link, Chain, ChainList: parameters and children by name.

Everywhere the order is: own parameters by name, then children by name (Chain) or by number
(ChainList), depth first. Paths start with a slash: `/conv1/W`, `/blocks/0/W`.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, overload

import numpy as np

from branchgraph.chainer import initializers
from branchgraph.chainer.recorder import recorder
from branchgraph.chainer.serializer import AbstractSerializer
from branchgraph.chainer.variable import Parameter

COPY_MODES = ("share", "copy", "init")


def _check_mode(mode: str) -> None:
    if mode not in COPY_MODES:
        raise ValueError(f"mode is one of {', '.join(COPY_MODES)}, got {mode!r}")


class _Cpu:
    """The only device of a link."""

    name = "@numpy"
    xp = np

    def __repr__(self) -> str:
        return f"<device {self.name}>"


CPU = _Cpu()


class Link:
    """Parameters and persistent values under names, and a computation `forward` on them.

    A keyword argument is a parameter: a shape, or (shape, dtype).
    """

    def __init__(self, **params: Any) -> None:
        self._params: set[str] = set()
        self._persistent: set[str] = set()
        self._within_init_scope = False
        self.name: str | None = None
        for name, value in params.items():
            shape, dtype = _shape_and_dtype(value)
            self.add_param(name, shape, dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = getattr(self, "forward", None)
        if forward is None:
            raise AttributeError(
                f"{type(self).__name__} has no forward: define it to call the link"
            )
        return forward(*args, **kwargs)

    # -- registration --------------------------------------------------------------------------

    @property
    def within_init_scope(self) -> bool:
        """Whether assignments register now."""
        return getattr(self, "_within_init_scope", False)

    @contextlib.contextmanager
    def init_scope(self) -> Iterator[None]:
        """Parameters (and, in a Chain, links) assigned in this block are registered."""
        if "_params" not in self.__dict__:
            raise RuntimeError(
                f"{type(self).__name__}: call super().__init__() before init_scope()"
            )
        old = self.within_init_scope
        self._within_init_scope = True
        try:
            yield
        finally:
            self._within_init_scope = old

    def __setattr__(self, name: str, value: Any) -> None:
        if self.within_init_scope and isinstance(value, Parameter):
            value.name = name
            self._params.add(name)
            self._persistent.discard(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._params.discard(name)
        self._persistent.discard(name)
        super().__delattr__(name)

    def add_param(
        self, name: str, shape: Any = None, dtype: Any = np.float32, initializer: Any = None
    ) -> None:
        """Register a parameter, full of NaN without an initialiser."""
        self._check_free(name, "parameter")
        if initializer is None:
            initializer = initializers.NaN(dtype)
        elif np.isscalar(initializer):
            initializer = initializers.Constant(initializer, dtype)
        with self.init_scope():
            setattr(self, name, Parameter(initializer, shape))

    def add_persistent(self, name: str, value: Any) -> None:
        """Register a value that is saved but not trained."""
        self._check_free(name, "persistent value")
        self._persistent.add(name)
        self._params.discard(name)
        setattr(self, name, value)

    def register_persistent(self, name: str) -> None:
        """Register an attribute that exists as persistent."""
        if not hasattr(self, name):
            raise AttributeError(f"cannot register the persistent value {name}: no such attribute")
        self._persistent.add(name)
        self._params.discard(name)

    def _check_free(self, name: str, what: str) -> None:
        if name in self.__dict__:
            raise AttributeError(f"cannot register a new {what} {name}: the attribute exists")

    # -- names ---------------------------------------------------------------------------------

    def _named_children(self) -> Iterable[tuple[str, Link]]:
        """Children in order, under the names that paths show."""
        return ()

    def children(self) -> Iterator[Link]:
        """Direct children."""
        return (child for _, child in self._named_children())

    def namedparams(self, include_uninit: bool = True) -> Iterator[tuple[str, Parameter]]:
        """All parameters of the subtree with their paths."""
        for name in sorted(self._params):
            parameter = getattr(self, name)
            if include_uninit or parameter.is_initialized:
                yield f"/{name}", parameter
        for name, child in self._named_children():
            for path, parameter in child.namedparams(include_uninit):
                yield f"/{name}{path}", parameter

    def params(self, include_uninit: bool = True) -> Iterator[Parameter]:
        """All parameters of the subtree."""
        return (parameter for _, parameter in self.namedparams(include_uninit))

    def namedlinks(self, skipself: bool = False) -> Iterator[tuple[str, Link]]:
        """All links of the subtree with their paths; the root is `/`."""
        if not skipself:
            yield "/", self
        for name, child in self._named_children():
            yield f"/{name}", child
            for path, link in child.namedlinks(skipself=True):
                yield f"/{name}{path}", link

    def links(self, skipself: bool = False) -> Iterator[Link]:
        """All links of the subtree."""
        return (link for _, link in self.namedlinks(skipself))

    # -- values and gradients ------------------------------------------------------------------

    def cleargrads(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.params():
            parameter.cleargrad()

    def zerograds(self) -> None:
        """Set all gradients to zeros; deprecated in favour of `cleargrads`."""
        warnings.warn("zerograds is deprecated; use cleargrads", DeprecationWarning, stacklevel=2)
        for parameter in self.params():
            if parameter.is_initialized:
                parameter.zerograd()

    def count_params(self) -> int:
        """The number of trainable elements; warns of parameters that have no shape yet."""
        total = 0
        for path, parameter in self.namedparams():
            if parameter.is_initialized:
                total += parameter.size
            else:
                warnings.warn(f"{path} is not initialised and is not counted", stacklevel=2)
        return total

    def copyparams(self, link: Link, copy_persistent: bool = True) -> None:
        """Take the values of a link of the same structure, persistents included."""
        recorder().flush()
        for name in self._params:
            getattr(self, name).copydata(getattr(link, name))
        if copy_persistent:
            for name in self._persistent:
                self._copy_persistent(name, getattr(link, name))
        for (_, mine), other in zip(self._named_children(), self._matching(link)):
            mine.copyparams(other, copy_persistent)

    def _copy_persistent(self, name: str, value: Any) -> None:
        mine = getattr(self, name)
        if isinstance(mine, np.ndarray) and isinstance(value, np.ndarray):
            np.copyto(mine, value)
        else:
            setattr(self, name, copy.deepcopy(value))

    def addgrads(self, link: Link) -> None:
        """Add the gradients of a link of the same structure."""
        for name in self._params:
            getattr(self, name).addgrad(getattr(link, name))
        for (_, mine), other in zip(self._named_children(), self._matching(link)):
            mine.addgrads(other)

    def _matching(self, link: Link) -> list[Link]:
        """The children of another link that correspond to ours."""
        others = dict(link._named_children())
        return [others[name] for name, _ in self._named_children()]

    def enable_update(self) -> None:
        """Let optimizers update all parameters."""
        self._set_update(True)

    def disable_update(self) -> None:
        """Keep optimizers from updating any parameter."""
        self._set_update(False)

    def _set_update(self, enabled: bool) -> None:
        for parameter in self.params():
            if parameter.update_rule is not None:
                parameter.update_rule.enabled = enabled

    @property
    def update_enabled(self) -> bool:
        """Whether an optimizer updates at least one parameter."""
        rules = [p.update_rule for p in self.params()]
        return any(rule is not None and rule.enabled for rule in rules)

    # -- copies --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        recorder().flush()
        return self.__dict__

    def copy(self, mode: str = "share") -> Any:
        """A copy: 'share' keeps the arrays, 'copy' copies them, 'init' draws new initial values."""
        _check_mode(mode)
        if mode == "share":
            return self._share()
        made = copy.deepcopy(self)
        made.name = None
        if mode == "init":
            for parameter in made.params(include_uninit=False):
                if parameter.initializer is not None:
                    parameter.initialize(parameter.shape)
        return made

    def _share(self) -> Any:
        made = copy.copy(self)
        made.name = None
        made._params = set(self._params)
        made._persistent = set(self._persistent)
        for name in made._params:
            shared = copy.copy(getattr(self, name))
            shared.cleargrad()
            made.__dict__[name] = shared
        return made

    def repeat(self, n_repeat: int, mode: str = "init") -> Any:
        """A Sequential of `n_repeat` copies of this link."""
        from branchgraph.chainer.sequential import Sequential

        _check_mode(mode)
        return Sequential(*[self.copy(mode) for _ in range(n_repeat)])

    # -- files ---------------------------------------------------------------------------------

    def serialize(self, serializer: AbstractSerializer) -> None:
        """Write or read all parameters and persistent values."""
        recorder().flush()
        for name in sorted(self._params):
            parameter = getattr(self, name)
            value = serializer(name, parameter.array)
            if not parameter.is_initialized and value is not None:
                parameter.initialize(value.shape)
                np.copyto(parameter.array, value, casting="same_kind")
        for name in sorted(self._persistent):
            setattr(self, name, serializer(name, getattr(self, name)))
        for name, child in self._named_children():
            child.serialize(serializer[name])

    # -- devices -------------------------------------------------------------------------------

    @property
    def xp(self) -> Any:
        """The array module, NumPy."""
        return np

    @property
    def device(self) -> Any:
        """The CPU."""
        return CPU

    def to_cpu(self) -> Any:
        """The link itself: its data are on the CPU."""
        return self

    to_intel64 = to_cpu

    def to_gpu(self, device: Any = None) -> Any:
        """There are no GPU arrays here."""
        raise RuntimeError("GPU arrays are not available; compile the model for a GPU instead")

    def to_device(self, device: Any) -> Any:
        """The link itself for a CPU device."""
        name = getattr(device, "name", device)
        if name in ("@numpy", "@intel64", "native") or (isinstance(name, int) and name < 0):
            return self
        return self.to_gpu(device)

    # -- text ----------------------------------------------------------------------------------

    @property
    def printable_specs(self) -> Iterator[tuple[str, Any]]:
        """The arguments that `str` shows."""
        return iter(())

    def __str__(self) -> str:
        specs = ", ".join(f"{key}={value}" for key, value in self.printable_specs)
        return f"{type(self).__name__}({specs})"


def _shape_and_dtype(value: Any) -> tuple[Any, Any]:
    pair = isinstance(value, tuple) and len(value) == 2
    if pair and not isinstance(value[1], (int, np.integer)):
        return value
    return value, np.float32


def _nested(name: str, rows: Iterable[tuple[Any, Any]]) -> str:
    """A name and indented rows (key): value."""
    lines = []
    for key, value in rows:
        text = str(value).replace("\n", "\n  ")
        lines.append(f"  ({key}): {text},\n")
    return f"{name}(\n{''.join(lines)})" if lines else f"{name}()"


class Chain(Link):
    """A link with children under attribute names."""

    def __init__(self, **links: Link) -> None:
        super().__init__()
        self._children: set[str] = set()
        for name, link in links.items():
            self.add_link(name, link)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.within_init_scope and isinstance(value, Link):
            if hasattr(self, name):
                raise AttributeError(f"cannot register a new link {name}: the attribute exists")
            value.name = name
            self._children.add(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._children.discard(name)
        super().__delattr__(name)

    def __getitem__(self, name: str) -> Link:
        return self.__dict__[name]  # type: ignore[no-any-return]

    def add_link(self, name: str, link: Link) -> None:
        """Register a child."""
        self._check_free(name, "link")
        if not isinstance(link, Link):
            raise TypeError(f"a child is a Link, got {type(link).__name__} as {name}")
        with self.init_scope():
            setattr(self, name, link)

    def _named_children(self) -> Iterable[tuple[str, Link]]:
        return [(name, self.__dict__[name]) for name in sorted(self._children)]

    def _share(self) -> Any:
        made = super()._share()
        made._children = set(self._children)
        for name, child in self._named_children():
            made.__dict__[name] = child.copy("share")
            made.__dict__[name].name = name
        return made

    def __str__(self) -> str:
        return _nested(type(self).__name__, self._named_children())


class ChainList(Link):
    """A link with numbered children."""

    def __init__(self, *links: Link) -> None:
        super().__init__()
        self._children: list[Link] = []
        for link in links:
            self.append(link)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.within_init_scope and isinstance(value, Link):
            raise TypeError("a ChainList cannot register a link by name; append it instead")
        super().__setattr__(name, value)

    @overload
    def __getitem__(self, index: int) -> Link: ...
    @overload
    def __getitem__(self, index: slice) -> list[Link]: ...
    def __getitem__(self, index: int | slice) -> Link | list[Link]:
        return self._children[index]

    def __setitem__(self, index: int | slice, value: Any) -> None:
        self._children[index] = value
        self._number()

    def __delitem__(self, index: int | slice) -> None:
        del self._children[index]
        self._number()

    def __len__(self) -> int:
        return len(self._children)

    def __iter__(self) -> Iterator[Link]:
        return iter(self._children)

    def append(self, link: Link) -> None:
        """Add a child at the end."""
        self.insert(len(self), link)

    def add_link(self, link: Link) -> None:
        """Add a child at the end."""
        self.append(link)

    def insert(self, index: int, link: Link) -> None:
        """Add a child before `index`; those behind it get new numbers."""
        if not isinstance(link, Link):
            raise TypeError(f"a child is a Link, got {type(link).__name__}")
        self._children.insert(index, link)
        self._number()

    def _number(self) -> None:
        for name, child in self._named_children():
            child.name = name

    def _named_children(self) -> Iterable[tuple[str, Link]]:
        return [(str(i), child) for i, child in enumerate(self._children)]

    def _share(self) -> Any:
        made = super()._share()
        made._children = [child.copy("share") for child in self._children]
        made._number()
        return made

    def __str__(self) -> str:
        return _nested(type(self).__name__, self._named_children())
