"""The networks of the field, declared with the native builder and reached by specification string.

network("b_lenet")            network("lenet:size=8,kernel=3,widths=16+32+64")
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from branchgraph.ir.errors import FormatError
from branchgraph.ir.graph import Graph
from branchgraph.ir.spec import arguments_for, parse_spec
from branchgraph.nets.branchynet import b_lenet, lenet


@dataclass(frozen=True)
class Network:
    """One network function and its options."""

    name: str
    build: Callable[..., Graph]

    @property
    def options(self) -> dict[str, Any]:
        """Option name to default value."""
        parameters = inspect.signature(self.build).parameters
        return {name: p.default for name, p in parameters.items()}

    @property
    def summary(self) -> str:
        """The first line of the network's docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0]


NETWORKS: dict[str, Network] = {
    n.name: n for n in (Network("lenet", lenet), Network("b_lenet", b_lenet))
}


def network(spec: str) -> Graph:
    """The network a specification string names, freshly declared.

    Raises `FormatError` for an unknown network or option, listing what there is.
    """
    name, raw = parse_spec(spec)
    if name not in NETWORKS:
        raise FormatError(f"unknown network {name!r}; known: {', '.join(sorted(NETWORKS))}")
    build = NETWORKS[name].build
    hints = typing.get_type_hints(build)
    annotations = {k: hints[k] for k in inspect.signature(build).parameters}
    return build(**arguments_for(raw, annotations, f"network {name}"))


__all__ = ["NETWORKS", "Network", "b_lenet", "lenet", "network"]
