"""Any single network as B branches that share a fraction of every layer.

    share_weights:branches=4,shared=0.5                       half of the channels of every layer
    share_weights:shared=0+0.5,layers=fc                      nothing of fc, half of the others

`quadrants` (vbranch, section 2): the weight of branch i is assembled from blocks,

    W_i = [[W_ss, W_us_i],      W_ss exists once and is read with the mean gradient over branches,
           [W_su_i, W_uu_i]]    the other blocks exist once a branch             (`ir.sharing`)

`masks` (arXiv 1803.05872; section 2.11): all weights exist once and every branch keeps its own part
of the d channels of each layer, `select(y, mask_i)`        (`passes.share_weights.mask_branches`).

From a named node `after` on, so that what comes before stays one trunk. Each branch reads the same
inputs or has its `inputs` each; then the trunk's weights are shared whole. Outputs `branch1` to
`branchB`, or one after a `merge`: of logits by sum, mean ("before mean") or concat, or of their
softmax by mean (`after_mean`).

New states are cut from the old ones: `report.origin` is the graph that does so. With its values
(`materialise.evaluate_origin`) every branch computes what the plain network does,

    W_ss = W[:s, :a]   W_us = W[:s, a:]   W_su = W[s:, :a]   W_uu = W[s:, a:]

where columns are in the order in which halves reach the layer (`channel_halves`).

Gradients of shared states are the `mean` over branches, their `sum`, or those of one branch after
another, each in an update of its own (`sequential_step`). `branch_losses` takes the loss of every
branch, that of its class activation map included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from branchgraph.ir.activation_maps import class_activation_map
from branchgraph.ir.builder import concat, merge_mean, merge_sum, softmax, unused_stream
from branchgraph.ir.errors import GraphError, RefusalError, ShapeError
from branchgraph.ir.graph import Graph, Node, Value, at
from branchgraph.ir.sharing import SharedReads
from branchgraph.ir.state import Role, State
from branchgraph.passes.base import Pass, Report
from branchgraph.passes.clean import drop_inputs, keep_only, needed
from branchgraph.passes.share_weights.branch_copies import BranchCopy, Origin
from branchgraph.passes.share_weights.branch_losses import branch_losses
from branchgraph.passes.share_weights.channel_halves import LAYERS, Followed, follow, refuse, taken
from branchgraph.passes.share_weights.mask_branches import (
    ConnectedDecay,
    MaskedBranch,
    Masks,
    WideStates,
    connections,
)
from branchgraph.passes.share_weights.quadrants import Blocks, QuadrantBranch, once, stack
from branchgraph.passes.share_weights.sequential import sequential_step
from branchgraph.passes.split_ensemble import branches_of

__all__ = ["MERGES", "ConnectedDecay", "ShareWeights", "branch_losses", "sequential_step"]

#: Merges of the branches' outputs by name.
MERGES: dict[str, Callable[..., Value]] = {
    "sum": merge_sum,
    "mean": merge_mean,
    "concat": concat,
    "after_mean": merge_mean,
}


@dataclass(frozen=True)
class ShareWeights(Pass, spelling="share_weights", claim="different"):
    """`branches` copies of the network that share a part of every layer.

    `shared` is a fraction of the output channels from 0 to 1, truncated to channels, or a whole
    number of channels from 2 on. One number serves all layers (convolutions and dense layers), and
    several are given in their order; with `layers` (paths, names or scopes) they are for these,
    and one number more is for all others, which share nothing without it.

    `legacy_bias` has a bias a block, as the published parameter counts do; with
    `legacy_convolutions` only 1x1 convolutions are one matrix for all at s = n. The halves of the
    nodes named in `half_merges` become one plain value. With the `lowering` stacked, shared blocks
    are applied to all branches at once, instead of weights that are assembled for each.

    For `layout` masks there are `overlap`, the part of a branch's channels that all have; `wide`
    layers (heads, or all) of B times the channels; and `tile`, zeros filled by the channels that
    are kept.

    `gradient` is the rule for shared states: mean, sum or sequential; masks and merges have the
    plain gradient of one loss. `cam` names activations of which every branch gives the class
    activation map as the output `<branch>.cam` [N, H, W], at `cam_size` if that is given.
    """

    branches: int = 2
    shared: tuple[float, ...] = (0.5,)
    layers: tuple[str, ...] = ()
    legacy_bias: bool = False
    legacy_convolutions: bool = False
    half_merges: tuple[str, ...] = ()
    lowering: str = "assembled"
    layout: str = "quadrants"
    overlap: float = 0.0
    wide: str = "none"
    tile: bool = False
    after: str = ""
    merge: str = "none"
    inputs: str = "one"
    gradient: str = "mean"
    cam: str = ""
    cam_size: tuple[int, ...] = ()

    @staticmethod
    def of(
        branches: int, shared: float | Sequence[float] | Mapping[str, float], rest: float = 0.0
    ) -> ShareWeights:
        """From one share for all layers, one a layer, or a mapping and one for the `rest`."""
        if isinstance(shared, Mapping):
            shares = (*map(float, shared.values()), float(rest))
            return ShareWeights(branches, shares, tuple(shared))
        every = shared if isinstance(shared, Sequence) else (shared,)
        return ShareWeights(branches, tuple(map(float, every)))

    def check(self) -> None:
        if self.branches < 2:
            raise GraphError(f"branches: expected at least 2, got {self.branches}")
        for option, known in (
            ("layout", ("quadrants", "masks")),
            ("merge", ("none", *MERGES)),
            ("inputs", ("one", "each")),
            ("wide", ("none", "heads", "all")),
            ("lowering", ("assembled", "stacked")),
            ("gradient", ("mean", "sum", "sequential")),
        ):
            if getattr(self, option) not in known:
                raise GraphError(
                    f"{option} {getattr(self, option)!r} is none of {', '.join(known)}"
                )
        for share in self.shared:
            if not 0 <= share <= 1 and not (share >= 2 and share.is_integer()):
                raise GraphError(f"shared: expected 0 to 1 or a number of channels, got {share}")
        if not 0 <= self.overlap <= 1:
            raise GraphError(f"overlap: expected 0 to 1, got {self.overlap}")
        self._check_combination()

    def _check_combination(self) -> None:
        masks = self.layout == "masks"
        if self.overlap and not masks:
            raise GraphError("overlap is for layout=masks; quadrants have shared")
        if (self.wide != "none" or self.tile) and not masks:
            raise GraphError("wide and tile are for layout=masks")
        if self.layers and masks:
            raise GraphError("layers are for layout=quadrants; masks have one overlap")
        quadrants = self.half_merges or self.legacy_bias or self.legacy_convolutions
        if masks and (quadrants or self.lowering != "assembled"):
            raise GraphError(
                "half_merges, legacy_bias, legacy_convolutions and lowering are for "
                "layout=quadrants"
            )
        if self.layers and len(self.shared) not in (len(self.layers), len(self.layers) + 1):
            raise GraphError(
                f"shared: expected one number for each of {len(self.layers)} layers, and perhaps "
                f"one for the others, got {len(self.shared)}"
            )
        if self.gradient == "sequential" and self.merge != "none":
            raise GraphError("gradient=sequential needs a loss a branch; a merge leaves one")
        if self.cam_size and (not self.cam or len(self.cam_size) != 2 or min(self.cam_size) < 1):
            raise GraphError(
                f"cam_size: expected HEIGHT+WIDTH of the maps of cam, got {self.cam_size}"
            )

    @property
    def mean(self) -> bool:
        """Whether shared states have the mean gradient over branches."""
        return self.gradient == "mean" and self.merge == "none" and self.layout == "quadrants"

    def connected_decay(self, graph: Graph, rate: float) -> ConnectedDecay:
        """Weight decay of the branches of `graph`, for weights between channels a branch keeps.

        For layout=masks; `graph` is the plain network.
        """
        if self.layout != "masks":
            raise GraphError("connected_decay is for layout=masks; quadrants have no masks")
        nodes = _behind(graph, self.after)
        masks = Masks(nodes, self.branches, self.overlap, self.wide)
        return ConnectedDecay(rate, connections(nodes, masks))

    def rewrite(self, graph: Graph, report: Report) -> None:
        # Branches that share all they compute have outputs, but no nodes of their own.
        if {"branch1", "branch2"} <= {*branches_of(graph), *graph.outputs}:
            report.refused("branch1", "the network is branched already")
            return
        if graph.updates or graph.gradients:
            raise RefusalError("it has updates or gradients; share weights before specialising")
        _Sharing(self, graph, report).run()

    def shares(self, layers: Sequence[Node]) -> dict[Node, float]:
        """The share of each layer; masks leave layers whole."""
        if self.layout == "masks":
            return dict.fromkeys(layers, 1.0)
        if not self.layers:
            if len(self.shared) not in (1, len(layers)):
                raise GraphError(
                    f"shared: expected one number, or one for each of {len(layers)} layers "
                    f"({', '.join(n.path for n in layers)}), got {len(self.shared)}"
                )
            return dict(zip(layers, self.shared * len(layers)))
        rest = self.shared[len(self.layers) :] or (0.0,)
        found = dict.fromkeys(layers, rest[0])
        for name, share in zip(self.layers, self.shared):
            named = [n for n in layers if name in (n.path, n.name)] or [
                n for n in layers if n.path.startswith(f"{name}/")
            ]
            if not named:
                known = ", ".join(n.path for n in layers)
                raise GraphError(f"layers: there is no layer {name!r}; there are: {known}")
            found.update(dict.fromkeys(named, share))
        return found


class _Sharing:
    """One application of the pass."""

    def __init__(self, options: ShareWeights, graph: Graph, report: Report) -> None:
        self.options = options
        self.graph = graph
        self.report = report
        #: What differs between branches, and what is copied for each.
        self.behind = _behind(graph, options.after)
        self.nodes = graph.nodes if options.inputs == "each" else self.behind
        self.followed = self._follow()
        self.reads = SharedReads(graph, options.branches, options.mean)
        self.origin = Origin(graph.name)

    def _follow(self) -> Followed:
        """The halves of all channels; a trunk that is copied is shared whole, and then plain."""
        options, behind = self.options, set(self.behind)
        layers = [n for n in self.nodes if isinstance(n.op, LAYERS)]
        inside = [n for n in layers if n in behind]
        shares = {**dict.fromkeys(layers, 1.0), **options.shares(inside)}
        copied = len(self.nodes) > len(self.behind)
        merged = {self._node(name) for name in options.half_merges}
        if copied:
            merged |= {v.producer for v in self._trunk() if v.producer is not None}
        return follow(self.nodes, shares, merged, options.legacy_convolutions, copied)

    def _node(self, name: str) -> Node:
        """A node of the branches, by its name."""
        node = self.graph.find(name)
        if node not in set(self.behind):
            refuse(node, "it is no part of the branches")
        return node

    def run(self) -> None:
        copies = self._copies()
        behind = set(self.behind)
        for copy in copies:
            copy.run(n for n in self.nodes if n not in behind)
            self._enter(copy)
        self._branch(copies)
        self._declare(copies)
        self._clean()
        for node in self.followed.layers:
            self.report.matched(node)
        self._note(copies)
        self.report.origin = self.origin.graph

    def _branch(self, copies: Sequence[BranchCopy]) -> None:
        """Copy what differs: branch after branch, or node after node."""
        quadrants = [c for c in copies if isinstance(c, QuadrantBranch)]
        if self.options.lowering == "assembled" or not quadrants:
            for copy in copies:
                copy.run(self.behind)
            return
        for node in self.behind:
            if once(node, quadrants):
                continue
            stack(node, quadrants)
            for copy in quadrants:
                copy.run((node,))

    # -- the branches ------------------------------------------------------------------------------

    def _copies(self) -> list[BranchCopy]:
        streams = unused_stream(self.graph)
        starts = self._starts()
        if self.options.layout == "masks":
            return self._masked(starts, streams)
        blocks = Blocks(self.reads, self.origin)
        legacy = self.options.legacy_bias
        return [
            QuadrantBranch(
                self.graph, k, self.origin, start, streams, self.followed, blocks, legacy
            )
            for k, start in enumerate(starts, start=1)
        ]

    def _masked(self, starts: list[dict[Value, Value]], streams: int) -> list[BranchCopy]:
        options = self.options
        masks = Masks(self.behind, options.branches, options.overlap, options.wide)
        wide = WideStates(self.graph, self.origin)
        return [
            MaskedBranch(self.graph, k, self.origin, start, streams, masks, wide, options.tile)
            for k, start in enumerate(starts, start=1)
        ]

    def _enter(self, copy: BranchCopy) -> None:
        """Masks of the values of the trunk that a branch reads."""
        if isinstance(copy, MaskedBranch):
            with at(copy.place()):
                for value in self._trunk():
                    copy.trunk(value)

    def _starts(self) -> list[dict[Value, Value]]:
        """What the branches read in place of inputs and values of the trunk."""
        count = self.options.branches
        if self.options.inputs == "one":
            common = {v: self.reads.scaled(v) for v in self._trunk()}
            return [dict(common) for _ in range(count)]
        fed = [v for v in self.graph.inputs.values() if v.shape]
        return [
            {v: self.graph.input(f"{v.name}{k}", v.shape, v.dtype) for v in fed}
            for k in range(1, count + 1)
        ]

    def _trunk(self) -> list[Value]:
        """Values that branches read and that are computed before them."""
        inside = set(self.behind)
        read = dict.fromkeys(v for n in self.behind for v in n.inputs)
        return [v for v in read if v.producer is not None and v.producer not in inside]

    # -- outputs -----------------------------------------------------------------------------------

    def _declare(self, copies: Sequence[BranchCopy]) -> None:
        """The outputs of the branches, each its own or all merged."""
        inside = set(self.behind)
        outputs = {k: v for k, v in self.graph.outputs.items() if v.producer in inside}
        if not outputs:
            raise RefusalError("no output depends on what would be branched")
        self.graph.keep(output=lambda name: name not in outputs)
        for name, value in outputs.items():
            results = [self._result(copy, value) for copy in copies]
            if self.options.merge != "none":
                self._merge(name, results)
                continue
            for copy, result in zip(copies, results):
                own = copy.name if len(outputs) == 1 else f"{copy.name}.{name}"
                self.graph.output(own, result)
        if self.options.cam:
            for copy in copies:
                self._map(copy, self._node(self.options.cam))

    def _map(self, copy: BranchCopy, node: Node) -> None:
        """The class activation map of a branch."""
        h = copy.mapped[node.outputs[0]]
        with at(copy.place()):
            try:
                cam = class_activation_map(h, self.options.cam_size or None)  # type: ignore[arg-type]
            except ShapeError as error:
                refuse(node, str(error))
        self.graph.output(f"{copy.name}.cam", cam)

    def _result(self, copy: BranchCopy, value: Value) -> Value:
        """An output of a branch, its channels in the order of the plain network."""
        result, channels = copy.mapped[value], self.followed.channels.get(value)
        with at(copy.place()):
            if self.options.layout == "quadrants" and channels and not channels.in_order:
                result = taken(result, 1, tuple(np.argsort(channels.order).tolist()))
            if self.options.merge == "after_mean":
                if len(result.shape) != 2:
                    raise RefusalError(f"after_mean needs logits [N, classes], got {result.type}")
                result = softmax(result, name="probabilities")
        return result

    def _merge(self, name: str, results: Sequence[Value]) -> None:
        renamed = "probabilities" if self.options.merge == "after_mean" else name
        with at(()):
            self.graph.output(renamed, MERGES[self.options.merge](*results, name="merge"))

    # -- tidying -----------------------------------------------------------------------------------

    def _clean(self) -> None:
        """Take out what only the plain network needed."""
        keep_only(self.graph, needed(self.graph.roots))
        if self.options.inputs == "each":
            drop_inputs(self.graph, lambda value: not _needed(value))

    def _note(self, copies: Sequence[BranchCopy]) -> None:
        """What is trained, and layers whose sharing is none."""
        own = {s for copy in copies for s in copy.states}
        shared = _parameters(s for s in self.graph.states if s not in own)
        self.report.noted(
            f"trained: {shared:,} shared and {_parameters(copies[0].states):,} of each of "
            f"{self.options.branches} branches"
        )
        for node, layer in self.followed.layers.items():
            if self.options.layout == "quadrants" and layer.cut.unshared:
                self.report.noted(
                    f"{node.path} shares channels, but none that it reads is shared: each branch "
                    "makes them"
                )


def _behind(graph: Graph, after: str) -> list[Node]:
    """The nodes behind `after`, or all."""
    if not after:
        return graph.nodes
    reached = set(graph.find(after).outputs)
    found = []
    for node in graph.nodes:
        if any(v in reached for v in node.inputs):
            reached.update(node.outputs)
            found.append(node)
    return found


def _parameters(states: Iterable[State]) -> int:
    return sum(prod(s.shape) for s in states if s.role is Role.PARAMETER)


def _needed(value: Value) -> bool:
    return bool(value.users) or not value.shape or value in value.graph.roots
