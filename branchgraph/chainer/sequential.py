"""Sequential: links and functions one behind the other. Only the links are numbered in paths.

The numbers are those of Chainer's checkpoints, which are not always those of the order: a link that
is added counts directly behind the first link before it. Of `Sequential(a, b, relu, c)` a is 0,
c is 1 and b is 2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from branchgraph.chainer.link import ChainList, Link, _nested

Layer = Callable[..., Any]


class Sequential(ChainList):
    """Layers applied in order; a layer that returns a tuple passes on several arguments."""

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self._layers: list[Layer] = []
        self.extend(layers)

    def forward(self, *x: Any) -> Any:
        """The last layer's result."""
        if not self._layers:
            raise RuntimeError("an empty Sequential cannot be called; append a layer first")
        value: Any = x
        for layer in self._layers:
            value = layer(*value) if isinstance(value, tuple) else layer(value)
        return value

    # -- a list of layers ----------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._layers)

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        _check_layers(value if isinstance(index, slice) else [value])
        if isinstance(index, slice):
            layers = list(self._layers)
            layers[index] = value
            self.clear()
            self.extend(layers)
            return
        at = range(len(self))[index]
        del self[at]
        self.insert(at, value)

    def __delitem__(self, index: Any) -> None:
        removed = self._layers[index] if isinstance(index, slice) else [self._layers[index]]
        del self._layers[index]
        for layer in removed:
            if isinstance(layer, Link):
                del self._children[[child is layer for child in self._children].index(True)]
        self._number()

    def __contains__(self, layer: object) -> bool:
        return any(own is layer for own in self._layers)

    def __reversed__(self) -> Iterator[Any]:
        return reversed(self._layers)

    def __add__(self, other: Any) -> Sequential:
        if not isinstance(other, Sequential):
            return NotImplemented
        return Sequential(*self._layers, *other._layers)

    def __iadd__(self, other: Any) -> Sequential:
        self.extend(other)
        return self

    def append(self, layer: Layer) -> None:
        """Add a layer at the end."""
        self.insert(len(self), layer)

    def insert(self, index: int, layer: Layer) -> None:
        """Add a layer before `index`."""
        _check_layers([layer])
        at = slice(index, None).indices(len(self))[0]
        if isinstance(layer, Link):
            before = (i for i, own in enumerate(self._layers[:at]) if isinstance(own, Link))
            self._children.insert(next(before, 0) + 1 if at else 0, layer)
        self._layers.insert(at, layer)
        self._number()

    def extend(self, layers: Iterable[Layer]) -> None:
        """Add layers at the end."""
        for layer in layers:
            self.append(layer)

    def pop(self, index: int = -1) -> Layer:
        """Take a layer out."""
        layer = self._layers[index]
        del self[index]
        return layer

    def remove(self, layer: Layer) -> None:
        """Take the first occurrence of a layer out."""
        del self[self.index(layer)]

    def index(self, layer: Layer, start: int = 0, end: int | None = None) -> int:
        """The position of a layer."""
        return self._layers.index(layer, start, len(self) if end is None else end)

    def count(self, layer: Layer) -> int:
        """How often a layer occurs."""
        return self._layers.count(layer)

    def clear(self) -> None:
        """Take all layers out."""
        del self[:]

    def remove_by_layer_type(self, type_name: str) -> None:
        """Take out the layers of a type, or functions of a name."""
        for i in reversed(range(len(self))):
            if _type_name(self._layers[i]) == type_name:
                del self[i]

    def count_by_layer_type(self, type_name: str) -> int:
        """How many layers have a type, or a function name."""
        return sum(_type_name(layer) == type_name for layer in self._layers)

    def flatten(self) -> Sequential:
        """The same layers with those of nested Sequentials in their place."""
        flat: list[Layer] = []
        for layer in self._layers:
            flat.extend(layer.flatten() if isinstance(layer, Sequential) else [layer])
        return Sequential(*flat)

    # -- copies and text -----------------------------------------------------------------------

    def _share(self) -> Any:
        made = super()._share()
        shared = {id(own): child for own, child in zip(self._children, made._children)}
        made._layers = [shared.get(id(layer), layer) for layer in self._layers]
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(Link.__getstate__(self), memo))
        return made

    def __reduce__(self) -> Any:
        for layer in self._layers:
            if getattr(layer, "__name__", "") == "<lambda>":
                raise ValueError(
                    "a Sequential with a lambda cannot be pickled; use a named function"
                )
        return _empty, (type(self),), Link.__getstate__(self)

    def __copy__(self) -> Any:
        made = type(self).__new__(type(self))
        made.__dict__.update(Link.__getstate__(self))
        return made

    def __str__(self) -> str:
        rows = [(i, k if isinstance(k, Link) else _type_name(k)) for i, k in enumerate(self)]
        return _nested(type(self).__name__, rows)


def _empty(cls: type[Sequential]) -> Sequential:
    return cls.__new__(cls)


def _check_layers(layers: Iterable[Layer]) -> None:
    for layer in layers:
        if not callable(layer):
            raise TypeError(f"a layer is a link or a callable, got {type(layer).__name__}")


def _type_name(layer: Layer) -> str:
    return type(layer).__name__ if isinstance(layer, Link) else getattr(
        layer, "__name__", type(layer).__name__
    )  # fmt: skip
