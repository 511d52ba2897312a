"""Random pipelines over random networks: every step is checked, matches and refusals are counted.

A seed gives a network (`random_flaws.net`) and a pipeline of one to six passes, drawn from those
that the network is meant for, those that suit it, and all others, with random options. A pass that
refuses outright takes no place in the pipeline. After each step

    always          the graph verifies (every pass verifies its result)
    equal, exact    the claim holds for every part that was rewritten and for the whole
    different       the text of the graph parses back; so does that of the last graph
    SETTLED         a second application finds nothing

A reason kind is the text of a refusal with names and numbers masked: one of REASONS, where `*`
stands for them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from random_flaws import net
from random_nets import Dice, Net

from branchgraph.ir.cost import deployed_cost
from branchgraph.ir.errors import RefusalError
from branchgraph.ir.graph import Graph, Node
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.exit import Exit
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.rebuild import clone
from branchgraph.ir.state import Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.ir.verify import verify
from branchgraph.passes import share_weights as _registered  # noqa: F401
from branchgraph.passes.base import Claim, Pass, Report
from branchgraph.passes.cast import MixedPrecision
from branchgraph.passes.checking import check_claim, random_store
from branchgraph.passes.fuse_branches import FuseBranches
from branchgraph.passes.fuse_siblings import FuseSiblings
from branchgraph.passes.harden_gates import HardenGates
from branchgraph.passes.insert_exits import InsertExits, MoveExit, RemoveExits
from branchgraph.passes.insert_exits.trunk import Trunk
from branchgraph.passes.materialise import materialise
from branchgraph.passes.merge_and_run import FORMS, MergeAndRun
from branchgraph.passes.net2net import Deepen, Widen
from branchgraph.passes.prune_channels import PruneChannels
from branchgraph.passes.prune_gates import PruneGates
from branchgraph.passes.share_weights import ShareWeights
from branchgraph.passes.specialise import Specialise
from branchgraph.passes.split_ensemble import SplitEnsemble, branches_of

# -- reasons --------------------------------------------------------------------------------------

_LATER = "it has gradients; prune before differentiating"
_GATES = (
    "its gate is closed, but it is the last exit",
    "its gate is closed, but it takes samples still; prune_gates:exits=true removes it",
    "it is still learned; harden_gates first",
    "its gate depends on the input *",
    "its gate depends on the state *",
    "the value of its gate is not known before the mode is chosen",
    "its update observes parts that stay, too",
    "it has the rows that an exit left; prune before lowering exits",
)

_MOVES = (
    "its gate is closed, but * behind it moves the running statistics of * in training; "
    "specialise first"
)

#: Passes of the package; tests may define others.
PASSES = sorted(k for k, cls in Pass.registry.items() if cls.__module__.startswith("branchgraph."))
_NOT_FIXED = "its statistics are not fixed; specialise(training=False)"

#: What every pass may refuse, read out of its module.
REASONS: dict[str, tuple[str, ...]] = {
    "cast": ("it stands in a scope that is kept in f32",),
    "deepen": (
        "it makes no single value of samples",
        "a layer needs [N, C, ...], got *",
        "the identity layer * stands behind it already",
        "* is not idempotent: applied twice it is another function",
    ),
    "fold_batch_norm": (
        _NOT_FIXED,
        "no convolution or dense layer feeds it",
        "* is read elsewhere too",
    ),
    "fuse_branches": (
        f"R*: {_NOT_FIXED}",
        "R*: no convolution or dense layer feeds it, but *",
        "R*: * is read elsewhere too",
        "R*: spatial axis * is padded between two convolutions, and beyond its border the first is "
        "not zero",
        "R*: a bias meets zero padding, and the size is not known for a bias map; bind it",
        "R*: a bias meets zero padding; bias_maps=true repairs it with a bias for each position",
        "R*: it would raise MACs from * to *; grow=true asks for it all the same",
        "R*: it would save no MACs and raise weights from * to *; grow=true asks for it all the "
        "same",
        "R*: *: the divisor leaves the padding out, so it depends on the position",
        "R*: *: windows overhang the end and the divisor leaves that out",
        "R*: * stands between the layers and their sum; it is not linear",
        "R*: the layers have different strides",
        "R*: the operands are no layers of one value",
        "R*: it puts a concatenation of the inputs in; concats=true asks for it",
        "R*: a product for each sample costs as much as the dense layers",
        "R*: the kernels of * are no mixtures of fixed ones",
    ),
    "fuse_siblings": (
        "it would not pay: * kernel starts saved, * elements moved, * multiplications by zero",
        "one of them is computed from another, or from values as deep",
        "an exit stands between them",
        "a stack has layers on axis 0, where exits thin out rows",
        *(
            f"it differs in {name}: *, beside *"
            for name in ("stride", "dilation", "groups", "size of the output",
                         "pads between the taps", "dtype", "rows", "attributes")
        ),
    ),
    "harden_gates": (
        "the graph trains it; harden the declared graph",
        "harden_gates needs the values of the scores, which a graph does not hold; give a .bg "
        "file, or call harden(graph, store)",
        "gate * is not finite under the given scores",
        "no gate of it has a profile; profile_gates(graph) first",
    ),
    "insert_exits": (
        "* loss weights for * exits before the last one",
        "insert_exits needs one output, the logits; there are: *",
        "logits must be [N, classes], got *",
        "at=* is a place that is meant already",
        "it has an exit already",
        "it has * results",
        "it stands behind the last result",
        "it has no row for every sample: *",
        "the head needs *, got *",
    ),
    "merge_and_run": (
        "no blocks of the Deep Fusion family were found in it",
        "something stands between the block of * and the one before",
        "its last block does not join the streams",
        "* is read outside its blocks",
        "the block * has * shortcuts",
        "* averages * lines for * bodies",
        "the line * has * convolutions",
        "the block * has no two parts with parameters",
        "a body of the block * has convolutions that are not 3x3",
        "* does not end a unit behind the stem",
        "the parts that * belongs to start from no one value",
        "* is no chain of convolutions, declared batch norms and, between them, ReLU",
        "* is no square convolution in one group that keeps the size",
        "the stage of * channels has * units, which do not make *",
        "it has the form * already",
    ),
    "move_exit": (
        "insert_exits needs one output, the logits; there are: *",
        "it is the last exit, which takes the rest",
        "its head reads * values: *",
        "it stands behind * already",
        "* belongs to its own head",
        "* is no value on the way to the last exit",
        "* has an exit already",
        "its head does not fit *",
    ),
    "prune_channels": (
        _LATER, *_GATES, _NOT_FIXED,
        "constant channels stay: its padding is 0, *",
        "its weight is read elsewhere too",
        "its gate is not one number a channel",
        "no layer takes up its gate",
    ),
    "prune_gates": (
        _LATER, *_GATES, "its gate is closed, but * reads it", _MOVES,
    ),
    "remove_exits": ("there must be one last exit, there are *", "no early exit; there are: *"),
    "share_weights": (
        "the network is branched already",
        "it has updates or gradients; share weights before specialising",
        "no output depends on what would be branched",
        "after_mean needs logits [N, classes], got *",
        "*: its * is no state but an expression; materialise it, or share weights before the pass "
        "that wrote it",
        "*: it reads * as * does, but their halves differ",
        "*: it reads *, which has no number of channels",
        "*: a share of * of * channels: expected *",
        "*: its * groups would be cut; share all or nothing of it, and do the same with "
        "concatenations before it",
        "*: its batch statistics are read; share weights before specialising",
        "*: it reads the state *; only layers and norms can share",
        "*: halves cannot be followed through *",
        "*: * is broadcast along other axes than its own",
        "*: halves differ (shared+unique channels: *); share as much in all layers that it joins",
        "*: its operands have their channels in different orders",
        "*: it reduces the batch, which moves the channels to another axis",
        "*: * along the channels would mix their halves",
        "*: it adds channels to halves of *; share all or nothing before it",
        "*: it reads neighbouring channels, whose order a concatenation changed",
        "*: * has no number of channels",
        "*: it does not keep the batch and the channels on their axes",
        "*: a reshape to * cuts across the halves of * channels",
        "*: an exit decides for the whole network; remove_exits first, or insert exits into a "
        "branch that split_ensemble took out",
        "* channels are too few for * branches that overlap *",
        "* channels are too few for * branches",
        "*: masks of a grouped convolution would cut groups",
        "*: a reshape other than flattening cannot be masked",
        "*: it mixes channels that different branches keep",
        "*: its operands have different masks",
    ),
    "skip_overflow": ("no loss scale to move; cast with dynamic=true first",),
    "specialise": (
        "exits select rows, so the batch of * must be a symbol such as N, got *",
        "output * needs every row, which early exits do not compute; drop it or use "
        "specialise(..., exits='all')",
        "exactly the last exit has no threshold, got these without one: *",
        "* mixes rows of the batch after an exit, where some have left",
    ),
    "split_ensemble": (
        "there are no branches",
        "* is no ensemble: expected branches with outputs of their own or merged into one output, "
        "found *",
        "it has gradients of the whole ensemble; split before differentiating",
    ),
    "widen": (
        "only convolutions in one group and dense layers are widened",
        "it has * channels, which is not less than *",
        "* is a result of the network",
        "* is an input and cannot be widened alike",
        "operands of * cannot be widened alike",
        "* cannot be widened alike",
        "* reads its channels as a parameter",
        "* does not treat channels one by one",
        "* lines up operands of different ranks",
        "*, tied to it, has * channels",
        "* mixes channels with other axes",
        "* has no concrete number of channels: *",
    ),
}  # fmt: skip


#: Reasons that no random graph reaches: why, and the test that has the refusal.
UNREACHED: dict[str, tuple[str, str]] = {
    "one of its results is computed from another, *": (
        "said by rules of users; patterns of the package have results of one depth",
        "test_rewriting.py::test_results_that_are_computed_from_each_other_are_refused",
    ),
    "pad_values=true divides by scales, none of which may be 0: give the values of the states, by "
    "a .bg file or run(graph, values=store)": (
        "the option pad_values is drawn with values of states",
        "test_fuse_branches.py::test_padding_by_channel_needs_the_values_of_the_states",
    ),
    "a scale of * is 0, and no padding stands for its shift; bias_maps=true repairs it for a known "
    "size": (
        "random states have no scale of 0",
        "test_fuse_branches.py::test_a_value_for_each_channel_is_padded_where_no_scale_is_zero",
    ),
    "unsafe_profile needs the recorded profile, which a graph does not hold; give a .bg file, or "
    "call HardenGates(unsafe_profile=True).apply(graph, values=store)": (
        "networks are not run over data, so they have no profile",
        "test_gate_profiles.py::test_what_is_missing_is_said",
    ),
    "its profile has no runs; run the profiled network over data first": (
        "networks are not run over data, so they have no profile",
        "test_gate_profiles.py::test_what_is_missing_is_said",
    ),
    "its gate was not the same for all rows of * recorded runs": (
        "networks are not run over data, so they have no profile",
        "test_gate_profiles.py::test_gates_that_never_moved_are_fixed_on_request_and_pruned",
    ),
    "* stands behind the last exit, which leaves no samples to it; move_exit or remove_exits "
    "first": (
        "networks have their last exit at the end, and passes leave it there",
        "test_lower_exits.py::test_an_exit_behind_the_last_one_is_refused",
    ),
    "it is no part of the branches": (
        "options that name layers behind the trunk (half_merges, cam) are not drawn",
        "test_share_weights_layers.py::test_half_merges_that_cannot_be_are_refused",
    ),
    "halves can be merged only where channels stand as in the plain network": (
        "the option half_merges is not drawn",
        "test_share_weights_layers.py::test_half_merges_that_cannot_be_are_refused",
    ),
    "another layer reads * too, but is widened otherwise": (
        "masks that widen layers are not drawn",
        "test_mask_branches.py::test_a_weight_that_two_layers_read_is_widened_in_one_way",
    ),
    "it cannot be widened: *": (
        "masks that widen layers are not drawn",
        "test_mask_branches.py::test_what_cannot_be_widened_is_refused",
    ),
    "* is no state but an expression; materialise it first": (
        "the pass refuses expressions before it widens, in other words",
        "test_refusals_of_fusion_and_sharing.py::test_only_states_are_widened",
    ),
    "it would save none of * MACs; grow=true asks for it all the same": (
        "two products of random sizes are equal by chance only",
        "test_refusals_of_fusion_and_sharing.py::"
        "test_what_is_not_fused_stays_and_the_reason_is_said",
    ),
}

#: Sentences of the modules of the passes that are no reasons, or end one that is listed.
NO_REASONS: tuple[str, ...] = (
    "*: * matched, * refused, parameters * -> *, MACs * -> *",
    "MACs are unknown where sizes multiply symbols; bind all but the batch",
    "the part rewritten at *",
    "the update of * (*)",
    "the gradient of * (*)",
    "*, fed NaN and infinities",
    "*, which is gone,",
    "the update of *, which is *,",
    "*, *, * MACs",
    "exact for this size",
    "needs at least 0",
    "needs at least 1 channel",
    "the first is *, at *",
    "blocks of * units",
    "not constant; bias_maps=true repairs it with a bias for each position",
)


@cache
def _patterns(spelling: str) -> list[tuple[str, re.Pattern[str]]]:
    """Kinds with their patterns, the one with the most text of its own first."""
    kinds = sorted(REASONS.get(spelling, ()), key=lambda kind: -len(kind.replace("*", "")))
    return [(k, re.compile(".*".join(map(re.escape, k.split("*"))), re.DOTALL)) for k in kinds]


def kind_of(spelling: str, reason: str) -> str:
    """The reason kind of a refusal, `unlisted: ...` if there is none."""
    for kind, pattern in _patterns(spelling):
        if pattern.fullmatch(reason):
            return kind
    return f"unlisted: {reason}"


# -- one run --------------------------------------------------------------------------------------


class Failed(AssertionError):
    """A pass did not do what it says; the message has the seed and the passes."""


@dataclass
class Outcome:
    """What the pipeline of one seed did."""

    seed: int
    graph: str = ""
    steps: list[str] = field(default_factory=list)
    matches: Counter[str] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    applied: Counter[str] = field(default_factory=Counter)


#: Passes after which a second application finds nothing.
SETTLED = frozenset({
    "dead_code", "fold_batch_norm", "fuse_branches", "fuse_means", "fuse_siblings", "harden_gates",
    "insert_exits", "merge_and_run", "prune_gates", "prune_channels", "remove_exits",
    "skip_overflow", "specialise", "widen",
})  # fmt: skip
#: Steps that are tried beside those of the pipeline, since they refuse outright: as many as the
#: network is meant for and some more, but no more than MOST_REFUSED.
MORE_REFUSED, MOST_REFUSED = 3, 15
#: Of so many seeds one has its texts parsed, which takes as long as all other checks.
TEXTS = 4


def run(seed: int) -> Outcome:
    """Draw a network and a pipeline, apply and check it; raises `Failed`."""
    made = net(seed)
    d, options = Dice(seed + 2**32), Dice(seed + 2**33)
    outcome = Outcome(seed, made.graph.name)
    graph, meant = made.graph, list(made.meant)
    text = seed % TEXTS == 0
    left = d.pick((1, 2, 3, 4, *(5,) * 4, *(6,) * 4))
    tries = min(len(meant) + MORE_REFUSED, MOST_REFUSED)
    while left and tries:
        step = _next(d, options, made, meant, graph)
        if step is None:
            tries -= 1
            continue
        outcome.steps.append(step.name)
        try:
            new = _applied(d, step, graph, outcome)
            if new is not None and text and (left == 1 or step.claim == "different"):
                _round_trip(new)
        except Exception as error:
            raise _failure(outcome, error) from error
        if new is None:
            tries -= 1
        else:
            graph, left = new, left - 1
    return outcome


def _failure(outcome: Outcome, error: Exception) -> Failed:
    passes = "".join(f"\n    {step}" for step in outcome.steps)
    what = f"{type(error).__name__}: {error}"
    return Failed(f"seed {outcome.seed}, {outcome.graph}, after{passes}\n  {what}")


def _applied(d: Dice, step: Pass, graph: Graph, outcome: Outcome) -> Graph | None:
    """The graph after a step, all of it checked; None if the pass refused outright."""
    spelling = step.spelling
    values = _values(d, step, graph)
    outcome.applied[spelling] += 1
    try:
        new, report = _run(step, graph, values, record=step.claim != "different")
    except RefusalError as error:
        outcome.refusals[spelling, kind_of(spelling, str(error))] += 1
        return None
    outcome.matches[spelling] += len(report.matches)
    outcome.refusals.update((spelling, kind_of(spelling, why)) for _, why in report.refusals)
    if report.matches or new.size != graph.size:
        claim = _claim(step, graph)
        check_claim(graph, new, claim, report=report, seed=outcome.seed % 1000)
    if not report.matches:
        return None
    if spelling in SETTLED:
        _, again = _run(step, new, _values(d, step, new, given=True))
        assert not again.matches, f"a second application matches {again.matches}"
    # Repeated running statistics are expressions; training needs states.
    return materialise(new)[0] if isinstance(step, Widen) else new


def _run(
    step: Pass, graph: Graph, values: Store | None, record: bool = False
) -> tuple[Graph, Report]:
    """What `Pass.run` does, but that costs are left out and a mere copy is not verified again."""
    if isinstance(step, Specialise):
        result = step.run(graph)
        return result.graph, result.report
    report, new = Report(step.name, values=values), clone(graph)
    if record:
        report.known = frozenset(new.nodes)
    step.rewrite(new, report)
    if report.matches or not _copied(graph, new):
        verify(new)
        deployed_cost(new)
    return new, report


def _copied(graph: Graph, new: Graph) -> bool:
    """Whether one graph has the nodes, reads and roots of the other, in their order."""
    return _wiring(graph) == _wiring(new)


def _wiring(graph: Graph) -> list[object]:
    """All that a graph is made of, values as numbers."""
    number = {v: i for i, v in enumerate([*graph.inputs.values(), *graph.reads.values()])}
    wires: list[object] = [*graph.inputs, *graph.reads]
    for node in graph.nodes:
        wires += (id(node.op), *(number[v] for v in node.inputs))
        for value in node.outputs:
            number[value] = len(number)
    for roots in (graph.outputs, graph.updates, graph.gradients):
        wires += ((key, number[value]) for key, value in roots.items())
    return wires


def _claim(step: Pass, graph: Graph) -> Claim:
    """What is checked of a pass: what it claims.

    NumPy adds up the elements of a broadcast array in another order than those of a filled one, so
    a constant that was broadcast and is folded may move the last digit of a sum.
    """
    folded = step.spelling == "constants"
    if folded and any(n.op.opcode == "broadcast_to" for n in graph.nodes):
        return "exact"
    return step.claim


def _round_trip(graph: Graph) -> None:
    """The text says all of a graph."""
    text = format_graph(graph)
    assert format_graph(parse_graph(text)) == text, "the text does not parse back"


def _values(d: Dice, step: Pass, graph: Graph, given: bool = False) -> Store | None:
    padded = isinstance(step, FuseBranches) and step.pad_values
    if not padded and step.spelling != "harden_gates":
        return None
    states, known = graph.states, given or padded or d.chance(0.65)
    return random_store(set(states), states, d.seed % 1000) if known else None


# -- drawing passes -------------------------------------------------------------------------------


def _next(d: Dice, options: Dice, made: Net, meant: list[Pass], graph: Graph) -> Pass | None:
    """The next pass: one the network is meant for, one that suits it, or any."""
    if meant and d.chance(0.9):
        step = meant.pop(0)
        return step if legal(step, made, graph) else None
    spelling = d.pick(d.pick((made.suited,) * 5 + (_HOUSEKEEPING,) * 4 + (PASSES,)))
    step = _DRAWN[spelling](d, graph) if spelling in _DRAWN else Pass.registry[spelling]()
    step = _varied(options, step) if step else None
    return step if step is not None and legal(step, made, graph) else None


def _varied(d: Dice, step: Pass) -> Pass:
    """A drawn step with options that motifs do not choose, by dice that draw nothing else."""
    if isinstance(step, FuseBranches):
        return replace(step, pad_values=d.chance(0.4))
    if isinstance(step, PruneChannels):
        return replace(step, bias_maps=d.chance(0.4))
    if isinstance(step, HardenGates):
        return replace(step, unsafe_profile=d.chance(0.6))
    if isinstance(step, ShareWeights):
        rules = ("mean", "sum", "sequential") if step.merge == "none" else ("mean", "sum")
        step = replace(step, gradient=d.pick(rules), inputs=d.pick(("one", "one", "each")))
        stacked = step.layout == "quadrants" and d.chance(0.25)
        return replace(step, lowering="stacked") if stacked else step
    return step


_HOUSEKEEPING = ("canonical", "common_subexpressions", "constants", "dead_code")
_LOW = (DType.F16, DType.BF16)


def legal(step: Pass, made: Net, graph: Graph) -> bool:
    """Whether the options of a pass fit a graph at all; others are errors, no refusals."""
    if isinstance(step, MixedPrecision):
        return not graph.gradients
    if isinstance(step, PruneChannels) and graph.gradients:
        return True
    if step.claim == "exact":
        # Sums in another order: of low precision they are rounded to other numbers, and of
        # infinities of both signs they may be NaN.
        low = any(v.dtype in _LOW for n in graph.nodes for v in n.outputs)
        if low or not made.finite:
            return False
    if step.spelling == "skip_overflow":
        return bool(graph.gradients and graph.updates)
    if isinstance(step, MoveExit):
        names = [n.op.name for n in graph.nodes if isinstance(n.op, Exit)]
        return names.count(step.exit) == 1 and step.to in _places(graph)
    if isinstance(step, SplitEnsemble):
        found = branches_of(graph)
        return len(found) < 2 or step.branch in found
    if isinstance(step, (Widen, Deepen)):
        return (step.layer if isinstance(step, Widen) else step.after) in _places(graph)
    if isinstance(step, InsertExits):
        return set(step.after) <= _places(graph) and (not step.at or _has_passages(step, graph))
    if isinstance(step, ShareWeights):
        layers = {n.name for n in graph.nodes if isinstance(n.op, (Conv, Dense))}
        return set(step.layers) <= layers and (not step.after or step.after in _places(graph))
    return True


def _has_passages(step: InsertExits, graph: Graph) -> bool:
    """Whether exits by share have places."""
    last = [n.output for n in graph.nodes if isinstance(n.op, Exit) and len(n.inputs) == 1]
    outputs = last or list(graph.outputs.values())
    if len(outputs) != 1 or len(outputs[0].shape) != 2:
        return False
    trunk = Trunk(graph, outputs[0])
    fit = [p for p in trunk.passages() if len(p.node.output.shape) > 2]
    return bool(fit) and fit[0].macs <= min(step.at) * trunk.macs


def _places(graph: Graph) -> set[str]:
    """Paths, and names of single nodes, that find one node."""
    paths = Counter(n.path for n in graph.nodes)
    return {n.path for n in graph.nodes if n.name and paths[n.path] == 1}


def _place(d: Dice, graph: Graph, fits: Callable[[Node], bool] = lambda n: True) -> str:
    """The path of one node that fits, empty if there is none."""
    paths = _places(graph)
    found = [n.path for n in graph.nodes if n.path in paths and fits(n)]
    return d.pick(found) if found else ""


def _widen(d: Dice, graph: Graph) -> Pass | None:
    layer = _place(d, graph, lambda n: isinstance(n.op, (Conv, Dense)) or d.chance(0.1))
    return (
        Widen(layer, d.number(2, 9), d.pick(("random", "cyclic")), d.number(0, 9))
        if layer
        else None
    )


def _deepen(d: Dice, graph: Graph) -> Pass | None:
    place = _place(d, graph)
    return Deepen(place, d.pick((1, 3)), d.chance(0.3)) if place else None


def _insert_exits(d: Dice, graph: Graph) -> Pass | None:
    places = tuple(dict.fromkeys(p for p in (_place(d, graph) for _ in range(2)) if p))
    return InsertExits(after=places, head=d.pick(("pool", "dense", "conv"))) if places else None


def _move_exit(d: Dice, graph: Graph) -> Pass | None:
    names = [n.op.name for n in graph.nodes if isinstance(n.op, Exit)]
    place = _place(d, graph)
    return MoveExit(d.pick(names), place) if names and place else None


def _fuse_branches(d: Dice, graph: Graph) -> Pass:
    rules: Iterable[str] = ("all",)
    if d.chance(0.2):
        rules = dict.fromkeys(f"R{d.number(1, 16)}" for _ in range(4))
    return FuseBranches(tuple(rules), d.chance(0.25), d.chance(0.25), d.chance(0.2))


def _share_weights(d: Dice, graph: Graph) -> Pass:
    step = ShareWeights(d.number(2, 3), (d.pick((0.0, 0.25, 0.5, 1.0)),), legacy_bias=d.chance(0.2))
    if d.chance(0.3):
        step = ShareWeights(2, layout="masks", overlap=d.pick((0.0, 0.5, 1.0)))
    return replace(step, merge=d.pick(("none", "none", "mean", "sum")))


def _split(d: Dice, graph: Graph) -> Pass:
    return SplitEnsemble(d.pick(list(branches_of(graph)) or ["branch1"]))


def _cast(d: Dice, graph: Graph) -> Pass:
    scopes = [n.path for n in graph.nodes if n.op.opcode in ("conv", "dense") and n.name]
    keep = tuple(dict.fromkeys(d.some(scopes, 0, 2))) if scopes else ()
    scale = d.pick((1.0, 8.0))
    return MixedPrecision(d.pick((DType.F16, DType.BF16)), keep, scale, d.chance(0.3))


_DRAWN: dict[str, Callable[[Dice, Graph], Pass | None]] = {
    "cast": _cast,
    "deepen": _deepen,
    "fuse_branches": _fuse_branches,
    "fuse_siblings": lambda d, g: FuseSiblings(
        launch=d.pick((250_000, 10**9, 100)), training=d.chance(0.2), stack=d.chance(0.8)
    ),
    "harden_gates": lambda d, g: HardenGates(d.pick((None, None, 0.5)), d.chance(0.3)),
    "insert_exits": _insert_exits,
    "merge_and_run": lambda d, g: MergeAndRun(d.pick(tuple(FORMS))),
    "move_exit": _move_exit,
    "prune_gates": lambda d, g: PruneGates(d.chance(0.4)),
    "remove_exits": lambda d, g: RemoveExits(d.pick(((), ("exit1",)))),
    "share_weights": _share_weights,
    "specialise": lambda d, g: Specialise(d.chance(0.3), d.pick(("all", "all", "select"))),
    "split_ensemble": _split,
    "widen": _widen,
}


# -- counting -------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts over many seeds."""

    graphs: int = 0
    matches: Counter[str] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    applied: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, seed: int) -> None:
        """Run a seed and count."""
        self.graphs += 1
        try:
            found = run(seed)
        except Failed as error:
            self.failures.append(str(error))
            return
        self.matches += found.matches
        self.refusals += found.refusals
        self.applied += found.applied

    def merge(self, other: Tally) -> None:
        """Add the counts of other seeds."""
        self.graphs += other.graphs
        self.matches += other.matches
        self.refusals += other.refusals
        self.applied += other.applied
        self.failures += other.failures

    def to_json(self) -> dict[str, object]:
        """The counts as JSON takes them."""
        return {
            "graphs": self.graphs,
            "matches": dict(self.matches),
            "applied": dict(self.applied),
            "refusals": [[*key, count] for key, count in self.refusals.items()],
            "failures": self.failures,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Tally:
        """The counts that `to_json` wrote."""
        refusals = Counter({(p, k): n for p, k, n in found["refusals"]})
        matches, applied = Counter(found["matches"]), Counter(found["applied"])
        return cls(found["graphs"], matches, refusals, applied, found["failures"])

    def rows(self) -> Iterable[tuple[str, int, int, list[tuple[str, int]]]]:
        """Every pass: applications, matches, and refusals of each kind."""
        for spelling in PASSES:
            kinds = [(k, self.refusals[spelling, k]) for k in REASONS.get(spelling, ())]
            yield spelling, self.applied[spelling], self.matches[spelling], kinds

    @property
    def unlisted(self) -> list[str]:
        """Refusals that are in no table."""
        return sorted({f"{p}: {k}" for p, k in self.refusals if k.startswith("unlisted: ")})

    def __str__(self) -> str:
        lines = [f"{self.graphs:,} graphs, {sum(self.applied.values()):,} applications of passes"]
        for spelling, applied, matches, kinds in self.rows():
            lines.append(f"{spelling}: {applied:,} applications, {matches:,} matches")
            lines += (f"  {count:7,}  {kind}" for kind, count in kinds)
        return "\n".join([*lines, *self.unlisted, *self.failures])
