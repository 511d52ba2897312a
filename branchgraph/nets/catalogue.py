"""Networks by specification string: `b_lenet`, `cross:depth=26,widen=1`, `pd_a_resnet18`."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from branchgraph.ir.errors import FormatError
from branchgraph.ir.graph import Graph
from branchgraph.ir.spec import arguments_for, parse_spec
from branchgraph.ir.state import State


@dataclass(frozen=True)
class Network:
    """One network function: its family and its options are what its module and signature say."""

    name: str
    build: Callable[..., Graph]
    family: str
    #: The name under which weights of a state are exchanged; its own where there is none.
    exchange: Callable[[State], str] = lambda state: state.name

    @property
    def options(self) -> dict[str, Any]:
        """Option name to default value."""
        parameters = inspect.signature(self.build).parameters
        return {name: p.default for name, p in parameters.items()}

    @property
    def summary(self) -> str:
        """The first line of the network's docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0]

    def declare(self, raw: dict[str, str]) -> Graph:
        """The network with options given as text."""
        hints = typing.get_type_hints(self.build)
        annotations = {k: hints[k] for k in self.options}
        return self.build(**arguments_for(raw, annotations, f"network {self.name}"))


class Catalogue(dict[str, Network]):
    """Networks by name. A name that ends in digits may stand for the option `depth`."""

    def __init__(self, *families: Iterable[Network]) -> None:
        super().__init__()
        for net in chain(*families):
            if net.name in self:
                raise ValueError(f"two networks are called {net.name}")
            self[net.name] = net

    def network(self, spec: str) -> Graph:
        """The network a specification string names, freshly declared.

        `resnet18` is short for `resnet:depth=18` where the network has that option and no other has
        the name. Raises `FormatError` for an unknown network or option, listing what there is.
        """
        found, raw = self.find(spec)
        return found.declare(raw)

    def find(self, spec: str) -> tuple[Network, dict[str, str]]:
        """The network function that `spec` names, and the options it gives, as text."""
        name, raw = parse_spec(spec)
        if name not in self:
            name, raw = self._with_depth(name, raw)
        return self[name], raw

    def _with_depth(self, name: str, raw: dict[str, str]) -> tuple[str, dict[str, str]]:
        match = re.fullmatch(r"(\w*?[A-Za-z])(\d+)", name)
        short = match.group(1) if match else ""
        if match is None or short not in self or "depth" not in self[short].options:
            raise FormatError(f"unknown network {name!r}; known: {', '.join(sorted(self))}")
        if "depth" in raw:
            raise FormatError(f"{name}: the depth is given twice, in the name and as depth=")
        return short, {**raw, "depth": match.group(2)}


def family(
    name: str, *builds: Callable[..., Graph], exchange: Callable[[State], str] | None = None
) -> tuple[Network, ...]:
    """Networks of one family, each under the name of its function."""
    named = {} if exchange is None else {"exchange": exchange}
    return tuple(Network(build.__name__, build, name, **named) for build in builds)
