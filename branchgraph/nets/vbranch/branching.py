"""From the layers of one branch to a network of B branches, and the options all networks share."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from branchgraph.ir.builder import concat, merge_mean, merge_sum
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value, branch
from branchgraph.ir.initialisers import GlorotUniform
from branchgraph.ir.sharing import Halves, shared_channels
from branchgraph.nets.units import Fans, he_fan_in
from branchgraph.nets.vbranch.halves import Layers, SharedStates

#: Cross-branch merges (section 2.6) by name.
MERGES: dict[str, Callable[..., Value]] = {"sum": merge_sum, "mean": merge_mean, "concat": concat}
#: Initial weights by name; the reference drew Glorot's until 2019-11-05.
INITIALISERS: dict[str, Fans] = {"he_normal": he_fan_in, "glorot_uniform": GlorotUniform}

#: The layers of a network: from a branch's input to its output.
Body = Callable[[Layers, Halves], Halves]


def merge_branches(how: str, *branches: Halves, name: str = "merge") -> Halves:
    """The branches as one plain tensor: `sum`, `mean` or `concat` of their merged halves."""
    return Halves(MERGES[how](*(h.merged().value for h in branches), name=name))


@dataclass(frozen=True)
class Branching:
    """How a network is branched.

    `branches` = 1 is the plain network: nothing is shared, and its output is `logits`. Otherwise
    `shared` says which fraction of the channels is (one number for all layers, or one a part), and
    the outputs are `branch1` to `branchB`, or `logits` after a `merge` (none, sum, mean, concat).
    `inputs` is `one` that all branches read, `x`, or `each`: `x1` to `xB`.

    `gradient` is the rule for shared states: the `mean` over branches, the `sum`, or `sequential`,
    where a step updates for one branch after another (`passes.share_weights.sequential_step`). With
    a merge there is one loss, and they have its gradient.

    `batch_stats` normalises with the statistics of the batch in inference too, `init` is he_normal
    or glorot_uniform, `legacy_layout` the reference's layout of weights (see `halves`).
    """

    branches: int = 1
    shared: tuple[float, ...] = (0.0,)
    inputs: str = "one"
    merge: str = "none"
    batch_stats: bool = False
    init: str = "he_normal"
    legacy_layout: bool = False
    gradient: str = "mean"

    def __post_init__(self) -> None:
        if self.branches < 1:
            raise GraphError(f"branches: expected at least 1, got {self.branches}")
        self._one_of("inputs", ("one", "each"))
        self._one_of("merge", ("none", *MERGES))
        self._one_of("init", INITIALISERS)
        self._one_of("gradient", ("mean", "sum", "sequential"))
        if self.gradient == "sequential" and self.merge != "none":
            raise GraphError("gradient=sequential needs a loss a branch; a merge leaves one")
        for share in self.shared:
            shared_channels(float(share), 1)

    def _one_of(self, option: str, known: Iterable[str]) -> None:
        value = getattr(self, option)
        if value not in known:
            raise GraphError(f"{option} {value!r} is none of {', '.join(known)}")

    def shares(self, parts: int, what: str) -> tuple[float, ...]:
        """One shared fraction for each of `parts`; `what` names them in messages."""
        shares = tuple(map(float, self.shared))
        if len(shares) not in (1, parts):
            raise GraphError(
                f"shared: expected one number for all or {parts} ({what}), got {len(shares)}"
            )
        return shares * parts if len(shares) == 1 else shares

    def declare(self, name: str, shape: tuple[int, ...], body: Body) -> Graph:
        """The graph of `branches` times `body` over inputs [N, *shape]."""
        graph = Graph(name)
        outputs = self._outputs(graph, self._inputs(graph, shape), body)
        if len(outputs) == 1:
            graph.output("logits", outputs[0].value)
        elif self.merge != "none":
            graph.output("logits", merge_branches(self.merge, *outputs).value)
        else:
            for i, h in enumerate(outputs, start=1):
                graph.output(f"branch{i}", h.value)
        return graph

    def _inputs(self, graph: Graph, shape: tuple[int, ...]) -> list[Value]:
        if self.inputs == "one" or self.branches == 1:
            return [graph.input("x", ("N", *shape))] * self.branches
        return [graph.input(f"x{i + 1}", ("N", *shape)) for i in range(self.branches)]

    def _outputs(self, graph: Graph, inputs: list[Value], body: Body) -> list[Halves]:
        """The branches one after another; a branch keeps its halves in its own layers."""
        plain = self.branches == 1
        mean = self.merge == "none" and self.gradient == "mean"
        shared = None if plain else SharedStates(graph, self.branches, mean)
        layers = Layers(shared, self.legacy_layout, self.batch_stats, INITIALISERS[self.init])
        outputs = []
        for i, x in enumerate(inputs, start=1):
            with nullcontext() if plain else branch(f"branch{i}"):
                outputs.append(body(layers, Halves(x)).merged())
        return outputs


def branched(build: Callable[..., Graph]) -> Callable[..., Graph]:
    """A network function from `build(branching, ...)`: the fields of `Branching` become options."""
    common = inspect.signature(Branching).parameters
    own = list(inspect.signature(build).parameters.values())[1:]

    @functools.wraps(build)
    def network(*args: Any, **options: Any) -> Graph:
        branching = {k: options.pop(k) for k in common if k in options}
        return build(Branching(**branching), *args, **options)

    named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in common.values()]
    hints = {**typing.get_type_hints(build), **typing.get_type_hints(Branching)}
    network.__signature__ = inspect.Signature([*own, *named])  # type: ignore[attr-defined]
    network.__annotations__ = {k: hints[k] for k in (*(p.name for p in own), *common, "return")}
    return network
