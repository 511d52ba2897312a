"""Random networks for passes that take a whole network or one layer of it, and what they refuse.

Each builder makes one network that is fit for its pass or has one flaw, and says which application
of the pass it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from random_nets import (
    CHANNELS,
    CLASSES,
    ENDLESS,
    GATES,
    LINEAR,
    LOOSE,
    MEANS,
    SCORES,
    SIBLINGS,
    Dice,
    Net,
    column,
    folding,
    gated_norm,
    headed,
    image,
    known,
    learned,
    norm_used_twice,
    trunk,
    undecided_gate,
)

from branchgraph.ir.builder import (
    batch_norm,
    concat,
    conv,
    dense,
    dropout,
    exit,
    flatten,
    gate,
    global_average_pool,
    lrn,
    max_pool,
    merge_mean,
    merge_sum,
    relu,
    reshape,
    sigmoid,
    softmax,
    tanh,
)
from branchgraph.ir.functions import pad, reduce_mean, reduce_sum, transpose
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Value, branch
from branchgraph.ir.op import make
from branchgraph.ir.ops.linear import MatMul
from branchgraph.ir.ops.norm import BatchNormTraining
from branchgraph.ir.ops.reshape import Slice, Split
from branchgraph.ir.optimisers import SGD, MaskSGD
from branchgraph.ir.state import Role
from branchgraph.ir.types import DType
from branchgraph.nets.units import MXNET
from branchgraph.passes.base import Pass
from branchgraph.passes.cast import MixedPrecision, SkipOverflow
from branchgraph.passes.fold_batch_norm import FoldBatchNorm
from branchgraph.passes.fuse_branches import FuseBranches
from branchgraph.passes.fuse_means import FuseMeans
from branchgraph.passes.fuse_siblings import FuseSiblings
from branchgraph.passes.harden_gates import HardenGates
from branchgraph.passes.insert_exits import InsertExits, MoveExit, RemoveExits
from branchgraph.passes.merge_and_run import FORMS, MergeAndRun
from branchgraph.passes.net2net import Deepen, Widen
from branchgraph.passes.prune_channels import PruneChannels
from branchgraph.passes.prune_gates import PruneGates
from branchgraph.passes.share_weights import ShareWeights
from branchgraph.passes.specialise import Specialise, specialise
from branchgraph.passes.split_ensemble import SplitEnsemble
from branchgraph.training.loss import joint_loss

#: Golden ratio and others: steps by which seeds take turns at choices.
THEME_STEP, FLAW_STEP = 0.6180339887498949, 0.7548776662466927


# -- networks of motifs ----------------------------------------------------------------------------


def linear(d: Dice) -> Net:
    h = trunk(d, image(d, "linear"), LINEAR, 8, 10, *[folding] * d.chance(0.8))
    steps: list[Pass] = [FoldBatchNorm()] if d.chance(0.9) else []
    fusing = FuseBranches(bias_maps=d.chance(0.1), concats=d.chance(0.1), grow=d.chance(0.05))
    suited = ("fuse_branches", "fold_batch_norm", "specialise", "cast")
    return Net(_formed(d, headed(h), 0.75), [*steps, fusing, FuseSiblings(launch=10**12)], suited)


def averaged(d: Dice) -> Net:
    h = trunk(d, image(d, "averaged"), MEANS, 2, 4)
    return Net(
        _formed(d, headed(h)),
        [FuseMeans(), FoldBatchNorm(), FuseSiblings(launch=10**12)],
        ("fuse_means",),
    )


def beside(d: Dice) -> Net:
    h = trunk(d, image(d, "beside"), (*SIBLINGS, *LOOSE[:2]), 3, 5)
    step = FuseSiblings(launch=d.pick((100, 10**6, 10**12, 10**12)))
    return Net(_formed(d, headed(h)), [step], ("fuse_siblings", "fuse_branches"))


def gated(d: Dice) -> Net:
    mode = d.pick((*("declared",) * 3, "inference", *("training",) * 3))
    first = {
        "training": (norm_used_twice,),
        "declared": (*d.shuffled(gated_norm, norm_used_twice), undecided_gate),
    }
    graph = headed(trunk(d, image(d, "gated"), GATES, 3, 5, *first.get(mode, ())))
    if mode != "declared":
        graph = specialise(graph, training=mode == "training")
    steps = d.shuffled(*_PRUNING)
    folded = [FoldBatchNorm()] if mode == "inference" else []
    return Net(graph, [*steps, *folded], ("prune_gates", "prune_channels"))


_PRUNING: tuple[Pass, ...] = (PruneGates(), PruneChannels())


def scored(d: Dice) -> Net:
    h = trunk(d, image(d, "scored"), SCORES[: d.pick((4, 5))], 3, 5)
    steps = d.shuffled(HardenGates(), HardenGates(), PruneGates(), PruneChannels())
    graph = headed(h)
    finite = not any(node.name.startswith(ENDLESS) for node in graph.nodes)
    return Net(_formed(d, graph, 0.2), steps, ("harden_gates", "cast"), finite)


def _formed(d: Dice, graph: Graph, p: float = 0.4) -> Graph:
    return specialise(graph, training=d.chance(0.15)) if d.chance(p) else graph


# -- training --------------------------------------------------------------------------------------


def trained(d: Dice) -> Net:
    """A training step, most often of a low precision with a loss scale that moves."""
    x = Graph("trained").input("x", ("N", CHANNELS))
    h = x if d.chance(0.4) else dense(x, 4, bias=False, name="fc1")
    h = relu(batch_norm(h) if d.chance(0.2) else h)
    scores = d.chance(0.5)
    if scores:
        h = gate(h, learned(h, (4,), Role.GATE))
    whole = d.chance(0.45)
    if whole:
        for name in ("branch1", "branch2"):
            with branch(name):
                h = dropout(h, 0.1) if d.chance(0.25) else h
                x.graph.output(name, dense(h, CLASSES, bias=False, name="fc"))
    else:
        x.graph.output("logits", dense(h, CLASSES, name="fc"))
    graph = x.graph
    if d.chance(0.96):
        graph = MixedPrecision(dtype=DType.F16, loss_scale=8.0, dynamic=True).apply(graph)
    graph = differentiate(joint_loss(specialise(graph, training=True)))
    rule = SGD(learning_rate=0.1, gates=MaskSGD()) if scores else SGD(learning_rate=0.1)
    steps: list[Pass] = d.shuffled(PruneGates(), PruneChannels(), ShareWeights())[:2]
    steps += [SplitEnsemble("branch1")] * whole + [HardenGates()] * scores  # type: ignore[operator]
    return Net(rule.attach(graph), [SkipOverflow(), *d.shuffled(*steps)], ("skip_overflow",))


# -- one layer ------------------------------------------------------------------------------------


def one_layer(d: Dice) -> Net:
    """Layers `wide1`, `wide2`, ..., some fit to be widened, some with a flaw behind them."""
    flaws = d.shuffled(*_WIDE_FLAWS)[:5]
    # Products of two symbols are no sizes.
    x = image(d, "one_layer", batch=2 if {_open_channels, _gram} & {*flaws} else "N")
    h, count = x, 0
    for build in d.shuffled(*flaws, *d.shuffled(*_WIDE_FIT)[: d.chance(0.6)]):
        count += 1
        h = build(d, conv(h, CHANNELS, 3, pad=1, name=f"wide{count}"))
        h = conv(h, CHANNELS, 1, name=f"back{count}")
    logits = dense(global_average_pool(relu(h, name="last")), CLASSES, name="fc")
    x.graph.output("logits", logits)
    steps: list[Pass] = [
        Widen(f"wide{k}", to=d.number(4, 9), mapping=d.pick(("random", "cyclic")))
        for k in range(1, count + 1)
    ]
    steps += [Widen("last", to=9)] if d.chance(0.5) else []
    return Net(_formed(d, x.graph, 0.3), d.shuffled(*steps), ("deepen", "widen"))


def deeper(d: Dice) -> Net:
    """Values behind which an identity layer may stand, and others."""
    x = image(d, "deeper")
    scale = relu(learned(x, (CHANNELS, CHANNELS, 1, 1)))
    scale.producer.name = "scale"  # type: ignore[union-attr]
    h = relu(conv(x, CHANNELS, 1, weight=scale, name="c1"), name="r1")
    h = d.pick((sigmoid, tanh))(h, name="act")
    h = relu(merge_sum(h, conv(h, CHANNELS, 3, pad=1, name="c2"), name="sum"), name="r2")
    rows = h.graph.emit(make("reduce_max", axes=(1, 2, 3)), h, name="rows")
    x.graph.output("rows", rows)
    x.graph.output("logits", dense(global_average_pool(h), CLASSES, name="fc"))
    steps = d.shuffled(*(Deepen(name, kernel=1) for name in ("scale", "act", "rows")))
    place = d.pick(("r1", "r2", "sum", "c2"))
    return Net(x.graph, [*steps, Deepen(place), Deepen(place)], ("deepen",))


def _tied_norms(d: Dice, h: Value) -> Value:
    return merge_sum(relu(batch_norm(h)), conv(tanh(h), CHANNELS, 1)) * 2.0


def _flat(d: Dice, h: Value) -> Value:
    v = dense(concat(max_pool(h, 2), max_pool(relu(h), 2)), CHANNELS)
    return tanh(conv(h, CHANNELS, 1)) * column(v)


def _tied_to_others(d: Dice, h: Value) -> Value:
    return merge_sum(concat(h, relu(h)), conv(h.graph.inputs["x"], 8, 1))


def _out_of_order(d: Dice, h: Value) -> Value:
    other = conv(h.graph.inputs["x"], CHANNELS, 1)
    return merge_sum(concat(h, other), concat(other, h))


def _open_channels(d: Dice, h: Value) -> Value:
    v = global_average_pool(h)
    z = v.graph.inputs.get("open") or v.graph.input("open", (2, "C"))
    concat(v, z)  # read by nobody, so that no result is reached
    return relu(h)


def _as_result(d: Dice, h: Value) -> Value:
    h.graph.output("features", relu(h))
    return relu(h)


def _of_a_sample(d: Dice, h: Value) -> Value:
    shift = reshape(reduce_mean(tanh(h), (0, 2, 3)), (CHANNELS, 1, 1))
    return relu(h) + shift


def _gram(d: Dice, h: Value) -> Value:
    """What a layer makes is the right factor of a product."""
    v = global_average_pool(conv(h.graph.inputs["x"], CHANNELS, 1))
    factor = h.graph.emit(MatMul(transpose_b=True), v, global_average_pool(h))
    h.graph.output("gram", reduce_sum(factor, (0, 1)))
    return relu(h)


def _mixed_axes(d: Dice, h: Value) -> Value:
    n, c, height, width = h.shape
    tall = reshape(relu(h), (n, 2, 2 * int(str(height)), width))
    return reshape(tanh(tall), (n, c, height, width))


_WIDE_FIT: tuple[Callable[[Dice, Value], Value], ...] = (_tied_norms, _flat)
_WIDE_FLAWS: tuple[Callable[[Dice, Value], Value], ...] = (
    _as_result,
    lambda d, h: merge_sum(relu(h), h.graph.inputs["x"]),
    lambda d, h: merge_sum(relu(h), softmax(tanh(h.graph.inputs["x"]))),
    lambda d, h: softmax(h) if d.chance() else lrn(h),
    _of_a_sample,
    _tied_to_others,
    _out_of_order,
    _mixed_axes,
    _open_channels,
    _open_channels,
    _open_channels,
    _gram,
)


# -- families -------------------------------------------------------------------------------------


def family(d: Dice) -> Net:
    """A network of the Deep Fusion family, or one with a flaw."""
    x = Graph("family").input("x", ("N", 2, 5, 5))
    stem = MXNET.unit(x, CHANNELS, 3, name="stem")
    fit = d.chance(0.4)
    form = d.pick(("resnet", "half", "side", "cross", "plain", "fuse3"))
    h = _blocks(d, stem, form) if fit else d.pick(_FAMILY_FLAWS)(d, stem)
    x.graph.output("logits", MXNET.head(h, CLASSES))
    steps = d.shuffled(*map(MergeAndRun, FORMS))
    own: list[Pass] = [MergeAndRun(form)] if fit else []
    return Net(x.graph, [*own, *steps], ("merge_and_run",))


def _body(h: Value, units: int, kernel: int = 3) -> Value:
    for k in range(units):
        h = MXNET.unit(h, CHANNELS, kernel, activate=k < units - 1)
    return h


def _blocks(d: Dice, h: Value, form: str) -> Value:
    """Blocks of four units, so that most forms can be made of them."""
    if form in ("resnet", "fuse3"):
        for _ in range(2):
            h = relu(merge_sum(h, _body(h, 2)))
        return h
    if form in ("half", "side"):
        lines = [h] if form == "half" else []
        return relu(merge_sum(*lines, _body(h, 2), _body(h, 2)))
    if form == "plain":
        for _ in range(4):
            h = MXNET.unit(h, CHANNELS, 3)
        return h
    a, b = _crossed(h, h)
    return _joining(a, b) if d.chance() else _joining(h, h)


def _crossed(a: Value, b: Value) -> tuple[Value, Value]:
    mean = merge_mean(a, b)
    return relu(merge_sum(_body(a, 2), mean)), relu(merge_sum(_body(b, 2), mean))


def _joining(a: Value, b: Value) -> Value:
    return relu(merge_sum(merge_mean(a, b), _body(a, 2), _body(b, 2)))


def _apart(d: Dice, h: Value) -> Value:
    h = relu(merge_sum(h, _body(h, 2)))
    h = max_pool(h, 3, stride=1, pad=1)
    return relu(merge_sum(h, _body(h, 2)))


def _streams(d: Dice, h: Value) -> Value:
    a, b = _crossed(h, h)
    return a + b


def _read_outside(d: Dice, h: Value) -> Value:
    h = relu(merge_sum(h, _body(h, 2)), name="inner")
    h.graph.output("features", h)
    return relu(merge_sum(h, _body(h, 2)))


def _uneven_streams(d: Dice, h: Value) -> Value:
    return relu(merge_sum(merge_mean(h, _body(h, 1), _body(h, 1)), _body(h, 2), _body(h, 2)))


def _long_line(d: Dice, h: Value) -> Value:
    return relu(merge_sum(merge_mean(_body(h, 2), h), _body(h, 2), _body(h, 2)))


def _of_two(d: Dice, h: Value) -> Value:
    other = max_pool(h, 3, stride=1, pad=1)
    return relu(merge_sum(_body(h, 2), _body(other, 2)))


def _odd_units(d: Dice, h: Value) -> Value:
    for _ in range(3):
        h = MXNET.unit(h, CHANNELS, 3)
    return h


_FAMILY_FLAWS: tuple[Callable[[Dice, Value], Value], ...] = (
    lambda d, h: h,
    lambda d, h: _body(h, 1),
    _apart,
    *[_streams] * 2,
    *[_read_outside] * 3,
    *[lambda d, h: relu(merge_sum(h, _body(h, 2), h))] * 3,
    *[_uneven_streams] * 3,
    *[_long_line] * 2,
    *[lambda d, h: relu(merge_sum(h, h))] * 2,
    *[lambda d, h: relu(merge_sum(h, _body(h, 2, kernel=5)))] * 3,
    *[lambda d, h: relu(max_pool(MXNET.unit(h, CHANNELS, 3), 3, stride=1, pad=1))] * 2,
    *[_of_two] * 3,
    *[lambda d, h: relu(merge_sum(h, conv(relu(_body(h, 1)), CHANNELS, 3, pad=1)))] * 2,
    *[lambda d, h: relu(merge_sum(h, batch_norm(conv(h, CHANNELS, 3, pad=1, groups=2))))] * 2,
    *[_odd_units] * 3,
)


# -- exits ----------------------------------------------------------------------------------------


def exits(d: Dice) -> Net:
    """A chain of layers with exits, or with a flaw."""
    graph = Graph("exits")
    h = graph.input("x", (3 if d.chance(0.35) else "N", CHANNELS, 6, 6))
    way_out = d.pick(("exit",) * 7 + ("two", "two", "two", "cube", "cube", "plain", "plain"))
    averaged = d.pick((1, 1, 2, None))
    early = 0.1 if way_out in ("cube", "plain") else 0.9 if averaged else 0.7
    count = d.number(2, 3)
    for k in range(1, count + 1):
        h = relu(conv(h, CHANNELS, 3, pad=1, name=f"conv{k}"), name=f"relu{k}")
        if k < count and d.chance(early):
            _early(d, h, f"exit{k}")
        if k == averaged:
            h = h * graph.emit(make("reduce_mean", axes=(0,), keepdims=True), h, name="average")
    if d.chance(0.75):
        h = concat(*graph.apply(Split(axis=1, sizes=(2, 2)), h, name="parts"))
    _last(graph, dense(global_average_pool(h, name="pool"), CLASSES, name="fc"), way_out)
    if d.chance(0.1 if averaged else 0.8):
        graph.output("more", relu(h, name="more"))
    return Net(graph, _exit_steps(d, graph, count), ("insert_exits", "specialise", "remove_exits"))


def _early(d: Dice, h: Value, name: str) -> None:
    with branch(name):
        exit(dense(global_average_pool(h), CLASSES), name, threshold=d.pick((0.3, 0.9)))


def _last(graph: Graph, logits: Value, kind: str) -> None:
    """The way out: an exit, two of them, or an output that is none."""
    if kind == "cube":
        graph.output("logits", reshape(logits, (logits.shape[0], CLASSES, 1)))
    elif kind == "plain":
        graph.output("logits", logits)
    else:
        exit(logits, "last", last=True)
    if kind == "two":
        exit(tanh(logits), "other", last=True)


def _exit_steps(d: Dice, graph: Graph, count: int) -> list[Pass]:
    names = [n.name for n in graph.nodes if n.name and not n.name.startswith(("exit", "dense"))]
    odd = [n for n in names if n in ("average", "parts", "more", "last")]
    some = tuple(dict.fromkeys([*odd, *d.some(names, 1, 2)]))
    number = d.pick((0, 0, len(some), 5))
    low: list[Pass] = [Specialise(exits="select")] * d.chance(0.9 if "average" in names else 0.4)
    return low + d.shuffled(
        InsertExits(after=some, head=d.pick(("pool", "conv", "dense")), weights=(1.0,) * number),
        InsertExits(after=(f"relu{count}", "conv1"), head=d.pick(("pool", "dense"))),
        *[InsertExits(after=("conv1",), head="pool", weights=(1.0,) * 5)] * 2,
        *[InsertExits(after=(*odd, "pool"), head="conv")] * 2,
        InsertExits(after=("relu1",), head="dense"),
        InsertExits(after=("relu1", "conv2"), head="pool"),
        *[InsertExits(at=(0.45, 0.46), head=head) for head in ("pool", "pool", "conv", "dense")],
        *[Specialise(exits="select")] * 2,
        RemoveExits(d.pick(((), ("exit1",), ("exit9",)))),
        RemoveExits(("exit8",)),
    )


def moving(d: Dice) -> Net:
    """Exits that can hang elsewhere, or cannot for a reason."""
    graph = Graph("moving")
    h = graph.input("x", ("N", CHANNELS, 6, 6))
    for k in (1, 2, 3, 4):
        h = relu(conv(h, CHANNELS, 3, pad=1, name=f"conv{k}"), name=f"relu{k}")
        if k in (1, 3):
            with branch(f"exit{k}"):
                v = global_average_pool(h, name=f"pool{k}") if d.chance(0.7) else flatten(h)
                logits = dense(v, CLASSES, name=f"fc{k}")
                if d.chance(0.3):
                    other = next(n.output for n in graph.nodes if n.name == "conv1")
                    logits = logits + dense(global_average_pool(other), CLASSES)
                exit(logits, f"exit{k}", threshold=0.5, criterion=d.pick(("entropy", "patience")))
    graph.output("aside", tanh(h, name="aside"))
    h = max_pool(h, 2, name="small")
    logits = dense(global_average_pool(h), CLASSES, name="fc")
    if d.chance(0.8):
        exit(logits, "last", last=True)
    else:
        graph.output("logits", logits)
    ways = (
        ("last", "relu2"), ("exit1", "relu1"), ("exit1", "relu1"), ("exit1", "exit1/fc1"),
        ("exit3", "aside"), ("exit1", "relu3"), ("exit3", "relu1"), ("exit1", "small"),
        ("exit3", "fc"), ("exit1", "aside"), ("exit3", "exit3/fc3"),
        ("exit1", "relu2"), ("exit3", "relu4"), ("exit3", "relu2"),
        ("exit3", "relu2"),
    )  # fmt: skip
    steps: list[Pass] = [MoveExit(*way) for way in d.shuffled(*ways)]
    graph.keep(output=lambda name: name != "aside" or d.chance(0.6))
    return Net(
        graph, [*steps, RemoveExits(("exit9",)), RemoveExits()], ("move_exit", "remove_exits")
    )


def closed_exits(d: Dice) -> Net:
    """Exits behind closed gates."""
    graph, read = Graph("closed_exits"), d.chance(0.5)
    h = graph.input("x", ("N", CHANNELS))
    for k in (1, 2):
        h = relu(dense(h, CHANNELS, name=f"fc{k}"))
        with branch(f"exit{k}"):
            logits = dense(h, CLASSES)
            exit(gate(logits, known(logits, d.pick((0.0, 0.0, 0.0, 1.0)))), f"exit{k}")
        if read:
            graph.output(f"read{k}", tanh(graph.outputs[f"exit{k}"]))
    logits = dense(h, CLASSES, name="fc")
    exit(gate(logits, known(logits, 0.0)) if d.chance(0.7) else logits, "last", last=True)
    low = [Specialise(exits="select")] * (not read and d.chance(0.6))
    steps = d.shuffled(PruneGates(), PruneGates(exits=True), PruneChannels())
    return Net(graph, [*low, *steps], ("prune_gates", "prune_channels", "remove_exits"))


def around_exits(d: Dice) -> Net:
    """Layers of one kind before and behind exits."""
    graph = Graph("around")
    g = graph.input("x", ("N", 4))
    a, b = dense(tanh(g), 4), dense(relu(g), 4)
    with branch("exit1"):
        exit(a if d.chance() else dense(a, 4), "exit1", threshold=0.5)
    with branch("exit2"):
        exit(dense(relu(b), 4), "exit2", threshold=0.5)
    exit(dense(tanh(b), 4) + dense(sigmoid(b), 4) * dense(b, 4), "last", last=True)
    steps: list[Pass] = [FuseSiblings(launch=10**9), Specialise(exits="select")]
    return Net(graph, steps, ("fuse_siblings", "remove_exits"))


# -- sharing --------------------------------------------------------------------------------------


def plain(d: Dice) -> Net:
    """A plain network for `share_weights`: fit, or with flaws one after another.

    Shared behind `place3`, only the flaws that stand behind it are met. Halves are followed before
    channels are masked, so flaws of masks keep to themselves; constants are met without `after`.
    """
    x = Graph("plain").input("x", ("N", CHANNELS, 6, 6))
    h = relu(conv(x, CHANNELS, 3, pad=1, name="c0"), name="place0")
    kind = d.turn(("fit", "constant", *("masks",) * 3, *("halves",) * 4), FLAW_STEP)
    steps: list[Pass] = [ShareWeights(2, (7.0,))] * d.chance(0.5)
    steps += [ShareWeights(2, after="fc")] * d.chance(0.4)
    if kind == "fit":
        h = _sharable(d, h)
        steps += [
            ShareWeights(k, merge="after_mean", after=p) for k in (2, 3) for p in ("", "place0")
        ]
        steps += [ShareWeights(2, (d.pick((0.25, 0.5, 1.0)),), merge=d.pick(("none", "mean"))),
                  SplitEnsemble("branch1")]  # fmt: skip
        x.graph.output("features", h)
    elif kind == "constant":
        h = _restored(d.pick((_on_constant, _with_constant))(d, h), h)
        steps += [ShareWeights(k, (share,)) for k in (2, 3) for share in (0.25, 0.5)]
    else:
        flaws = _MASK_FLAWS if kind == "masks" else _SHARE_FLAWS
        for k, (build, step) in enumerate(d.shuffled(*flaws)[:12], start=1):
            steps.append(replace(step, after=f"place{k - 1}"))
            y = build(d, relu(conv(h, CHANNELS, 1, name=f"c{k}")))
            h = relu(_restored(y, h), name=f"place{k}")
    steps = steps if kind == "fit" else d.shuffled(*steps)
    x.graph.output("logits", dense(global_average_pool(h), CLASSES, name="fc"))
    return Net(x.graph, steps, ("share_weights", "split_ensemble"))


def _restored(y: Value, like: Value) -> Value:
    """A value with as many channels as before."""
    if len(y.shape) == 2:
        return tanh(like) + column(y)
    if len(y.shape) == 3:
        y = reshape(y, like.shape)
    return y if y.type == like.type else conv(y, CHANNELS, 1)


def _sharable(d: Dice, h: Value) -> Value:
    y = relu(batch_norm(conv(h, 6, 3, pad=1)))
    return max_pool(concat(h, y) if d.chance() else y, 2)


def ensemble(d: Dice) -> Net:
    """Branches with outputs of their own or merged, or what is no ensemble."""
    x = image(d, "ensemble")
    h = relu(conv(x, CHANNELS, 3, pad=1, name="c1"))
    made = []
    for k in range(1, d.number(2, 3) + 1):
        with branch(f"branch{k}"):
            made.append(dense(global_average_pool(conv(h, 3, 3, name="c")), CLASSES, name="fc"))
    kind = d.pick(("own", "own", "own", "mean", "mean", "lost", "none"))
    if kind == "own":
        for k, value in enumerate(made, start=1):
            x.graph.output(f"branch{k}", value)
    elif kind == "mean":
        x.graph.output("logits", merge_mean(*made))
    elif kind == "lost":
        x.graph.output("logits", tanh(merge_sum(*made)))
    else:
        x = image(d, "single")
        x.graph.output("logits", dense(global_average_pool(conv(x, 4, 3)), CLASSES))
    steps: list[Pass] = [SplitEnsemble("branch1"), ShareWeights(2)]
    return Net(x.graph, d.shuffled(*steps, steps[0]), ("split_ensemble", "share_weights"))


HALF = ShareWeights(2, (0.5,))
MASKS = ShareWeights(2, layout="masks", overlap=0.5)
APART = ShareWeights(2, layout="masks")
#: A quarter of `odd` is shared, half of the others.
UNEVEN, TIED = (ShareWeights(2, (0.25, 0.5), layers=(name,)) for name in ("odd", "tied"))
Sharing = tuple[Callable[[Dice, Value], Value], Pass]


def _tied_layers(d: Dice, h: Value) -> Value:
    w = learned(h, (CHANNELS, CHANNELS, 1, 1))
    return conv(relu(conv(h, CHANNELS, 1, weight=w, name="tied")), CHANNELS, 1, weight=w)


def _on_constant(d: Dice, h: Value) -> Value:
    c = h.graph.emit(make("full", value=0.5, shape=("N", CHANNELS), dtype=DType.F32))
    return merge_sum(global_average_pool(h), dense(tanh(c), CHANNELS))


def _statistics_read(d: Dice, h: Value) -> Value:
    gamma, beta = learned(h, (CHANNELS,)), learned(h, (CHANNELS,))
    y, mean, _ = h.graph.apply(BatchNormTraining(), h, gamma, beta)
    h.graph.output("mean", mean)
    return y


def _beside_matrix(d: Dice, h: Value) -> Value:
    return h + h.graph.input("bias", h.shape[2:])


def _unequal(d: Dice, h: Value) -> Value:
    return merge_sum(conv(h, CHANNELS, 1, name="odd"), conv(h, CHANNELS, 1))


def _orders(d: Dice, h: Value) -> Value:
    return merge_sum(concat(h, relu(h)), conv(h, 8, 1))


def _reduced(d: Dice, h: Value) -> Value:
    return relu(h) + reshape(reduce_mean(h, (0, 2, 3)), (CHANNELS, 1, 1))


def _with_constant(d: Dice, h: Value) -> Value:
    full = h.graph.emit(make("full", value=0.5, shape=("N", 2, 6, 6), dtype=DType.F32))
    return conv(concat(h, full), CHANNELS, 1)


def _rows_reshaped(d: Dice, h: Value) -> Value:
    tall = reshape(h, (h.shape[0] * CHANNELS, 1, 6, 6))
    return reshape(relu(tall), h.shape)


def _with_exit(d: Dice, h: Value) -> Value:
    with branch("exit1"):
        exit(dense(global_average_pool(h), CLASSES), "exit1", threshold=0.5)
    return h


def _sliced(d: Dice, h: Value) -> Value:
    return h.graph.emit(Slice(axis=1, start=1, size=2), h)


_SHARE_FLAWS: tuple[Sharing, ...] = (
    (lambda d, h: conv(h, CHANNELS, 1, weight=learned(h, (4, 4, 1, 1)) * 0.5), HALF),
    (_tied_layers, TIED),
    (lambda d, h: conv(h, CHANNELS, 3, pad=1, groups=2), HALF),
    (_statistics_read, HALF),
    (lambda d, h: h * learned(h, (CHANNELS, 1, 1)), HALF),
    (lambda d, h: transpose(h, (0, 1, 3, 2)), HALF),
    (_beside_matrix, HALF),
    (_unequal, UNEVEN),
    (_orders, HALF),
    (_reduced, HALF),
    (_sliced, HALF),
    (lambda d, h: pad(h, (0, 1, 0, 0), (0, 1, 0, 0)), HALF),
    (lambda d, h: lrn(concat(h, relu(h))), HALF),
    (_rows_reshaped, HALF),
    (lambda d, h: reshape(h, ("N", 2, 72)), HALF),
    (_with_exit, HALF),
)


def _reshaped_vector(d: Dice, h: Value) -> Value:
    blocks = reshape(dense(h, 2 * CHANNELS), (h.shape[0], CHANNELS, 2))
    return reduce_sum(blocks, (2,))


def _over_channels(d: Dice, h: Value) -> Value:
    return h * h.graph.emit(make("reduce_sum", axes=(1,), keepdims=True), h)


_MASK_FLAWS: tuple[Sharing, ...] = (
    (lambda d, h: conv(h, 5, 1), ShareWeights(2, layout="masks", overlap=0.9)),
    (lambda d, h: conv(h, 2, 1), ShareWeights(3, layout="masks")),
    (lambda d, h: conv(h, CHANNELS, 3, pad=1, groups=2), APART),
    (_reshaped_vector, MASKS),
    (_over_channels, MASKS),
    (lambda d, h: merge_sum(h, h.graph.inputs["x"]), MASKS),
)


# -- all ------------------------------------------------------------------------------------------

#: Themes with their weights.
THEMES: tuple[tuple[float, Callable[[Dice], Net]], ...] = (
    (0.28, linear),
    (0.075, averaged),
    (0.19, beside),
    (0.28, gated),
    (0.24, scored),
    (0.45, trained),
    (0.38, one_layer),
    (0.12, deeper),
    (0.40, family),
    (0.38, exits),
    (0.24, moving),
    (0.15, closed_exits),
    (0.065, around_exits),
    (0.39, plain),
    (0.26, ensemble),
)


def net(seed: int) -> Net:
    """The network of a seed."""
    d = Dice(seed)
    place = d.stratum(THEME_STEP) * sum(w for w, _ in THEMES)
    for weight, theme in THEMES:
        place -= weight
        if place < 0:
            return theme(d)
    return THEMES[-1][1](d)
