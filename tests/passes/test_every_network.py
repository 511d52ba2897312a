"""Every network of `nets` x every pass: what matches, what is refused and why, whether claims hold.

`TABLE` has a row for each network in a small form and a column for each pass, in the order of
`PASSES`; a cell says

    12    so many matches        12+   at least so many (heuristics may find more one day)
    a     none, but a refusal (or a `BranchgraphError`) whose text has `REASONS["a"]`
    .     nothing that the pass looks for is there

How a column chooses its options and the form of the network it works on is said in `PASSES`.
Where a pass claims `equal` or `exact`, the numbers are compared in float64 and it is applied again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from branchgraph.ir.errors import BranchgraphError
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph, Node
from branchgraph.ir.op import Op
from branchgraph.ir.ops.activation import Relu
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.ops.exit import Exit
from branchgraph.ir.ops.linear import Dense
from branchgraph.ir.optimisers import SGD, MaskSGD
from branchgraph.ir.state import Role, Store
from branchgraph.nets import NETWORKS, network
from branchgraph.passes.base import Pass, Result
from branchgraph.passes.checking import check_claim
from branchgraph.passes.insert_exits.trunk import Trunk
from branchgraph.passes.pipeline import pipeline
from branchgraph.passes.specialise import specialise
from branchgraph.passes.split_ensemble import branches_of
from branchgraph.training.loss import joint_loss

#: The networks in forms that take milliseconds, but for those in `LARGE`.
SPECS = """
lenet:size=8,kernel=3
b_lenet:size=8,kernel=3
alexnet:size=16
b_alexnet:size=16
resnet_a:blocks=1
b_resnet:blocks=1
fcn:sizes=8+6,features=12
cnn:stages=6+8,layers=1,size=8
vbranch_resnet:depth=18,size=8+8,outputs=6
densenet:depth=121,size=32+32
densenet_bc:depth=10,growth=4,size=8
imagenet_resnet:width=4,size=32,classes=5
pd_a_resnet:width=8,size=32,classes=5,groups=4
pd_b_resnet:width=8,size=32,classes=5,groups=4,reduction=4
ac_resnet:width=4,size=32,classes=5
se_resnet:width=8,size=32,classes=5,reduction=4
ge_resnet:width=8,size=32,classes=5,reduction=4
cbam_resnet:width=8,size=32,classes=5,reduction=4
pd_perceptron:size=6,hidden=8,form=pd_b
plain:depth=14,size=8
resnet:depth=14,size=8
half:depth=14,size=8
side:depth=14,size=8
cross:depth=14,size=8
fuse3:depth=14,size=8
fuse6:depth=14,size=8
ensemble:depth=14,size=29
cross_imagenet:size=193,classes=5
resnet_imagenet:size=193,classes=5
resnext:depth=11,width=2,cardinality=2,size=8,channels=1
masked_resnext:depth=11,width=1,cardinality=4,channels=1,size=8
masked_resnet:depth=14,k=2,size=8,widths=4+6+8
branch_connect:size=8,branches=3,stem=4,widths=6
repvgg:size=32,classes=5
dbb_resnet:width=8,size=32,classes=5
inception_v3:size=75,classes=5,auxiliary=false
"""
NETS = {spec.partition(":")[0]: spec for spec in SPECS.split()}

#: Networks of many nodes or large weights; their numbers are compared with --slow.
LARGE = {
    "cross_imagenet", "resnet_imagenet", "inception_v3", "vbranch_resnet", "densenet", "repvgg",
    "pd_b_resnet", "dbb_resnet", "ensemble", "cbam_resnet",
}  # fmt: skip


# -- forms of a network, and how options are chosen ------------------------------------------------


def declared(graph: Graph) -> Graph:
    return graph


def inference(graph: Graph) -> Graph:
    """With fixed statistics, every exit computed."""
    return specialise(graph, training=False, exits="all")


def hardened(graph: Graph) -> Graph:
    """With the gates that the initial scores choose, if it has gates."""
    if not any(s.role is Role.GATE for s in graph.states):
        return graph
    return Pass.from_spec("harden_gates").apply(graph, values=values(graph))


def with_exits(graph: Graph) -> Graph:
    """With an early exit at 0.6 of the MACs, if it has none and there is a place."""
    if exits(graph):
        return graph
    try:
        return pipeline("insert_exits:at=0.6,head=pool").apply(graph)
    except BranchgraphError:
        return graph


def branched(graph: Graph) -> Graph:
    """Two branches that share half of every layer, if it has none and may be branched."""
    try:
        return graph if branches_of(graph) else pipeline("share_weights").apply(graph)
    except BranchgraphError:
        return graph


def step(graph: Graph) -> Graph:
    """A training step: forward, backward and updates."""
    training = differentiate(joint_loss(specialise(graph, training=True)))
    return SGD(gates=MaskSGD()).attach(training)


def low_step(graph: Graph) -> Graph:
    """A training step in mixed precision with a dynamic loss scale."""
    return step(pipeline("cast:dtype=f16,dynamic=true").apply(graph))


def exits(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if isinstance(n.op, Exit)]


def values(graph: Graph) -> Store:
    """The initial values of the gate scores, which no pass but `harden_gates` asks for."""
    return Store.initialised([s for s in graph.states if s.role is Role.GATE], 0)


def first(graph: Graph, *kinds: type[Op]) -> Node:
    """The first node of these kinds that has a name, which the others may lack."""
    return next(n for n in graph.nodes if isinstance(n.op, kinds) and n.name)


def first_value(graph: Graph) -> str:
    relus = [n for n in graph.nodes if isinstance(n.op, Relu) and n.name]
    return relus[0].path if relus else first(graph, Conv, Dense).path


def wider(graph: Graph) -> str:
    layer = first(graph, Conv, Dense)
    channels = layer.output.shape[1]
    assert isinstance(channels, int)
    return f"widen:layer={layer.path},to={channels + 3}"


def elsewhere(graph: Graph) -> str:
    """Moves the first exit to the last other place with a name and as many channels, if any."""
    if not exits(graph):
        return "move_exit:exit=exit1,to=" + first_value(graph)
    passages = [p.node for p in Trunk(graph, exits(graph)[-1].output).passages()]
    tap = next(n for n in passages if any(_in_exit(user) for user in n.output.users))
    named = [n for n in passages if n.name and n.output.shape[1:2] == tap.output.shape[1:2]]
    return f"move_exit:exit=exit1,to={[tap, *(n for n in named if n is not tap)][-1].path}"


def _in_exit(node: Node) -> bool:
    return any(part.branch and part.name == "exit1" for part in node.scope)


def one_branch(graph: Graph) -> str:
    return f"split_ensemble:branch={next(iter(branches_of(graph)), 'branch1')}"


@dataclass(frozen=True)
class Column:
    """A pass as it is applied: its specification, or what finds it, and the form it works on."""

    spec: str | Callable[[Graph], str]
    form: Callable[[Graph], Graph] = declared
    #: Options for which a second application finds nothing.
    settles: bool = True

    def of(self, graph: Graph) -> Pass:
        return Pass.from_spec(self.spec if isinstance(self.spec, str) else self.spec(graph))


PASSES = {
    "dead_code": Column("dead_code", step),
    "common_subexpressions": Column("common_subexpressions", step),
    "constants": Column("constants", step),
    "canonical": Column("canonical"),
    "specialise": Column("specialise"),
    "fold_batch_norm": Column("fold_batch_norm", inference),
    "fuse_branches": Column("fuse_branches", inference),
    "fuse_siblings": Column("fuse_siblings", inference),
    "fuse_means": Column("fuse_means"),
    "harden_gates": Column("harden_gates"),
    "prune_gates": Column("prune_gates", hardened),
    "prune_channels": Column("prune_channels", hardened),
    "insert_exits": Column("insert_exits:at=0.6,head=pool"),
    "move_exit": Column(elsewhere, with_exits),
    "remove_exits": Column("remove_exits", with_exits),
    "share_weights": Column("share_weights:branches=2,shared=0.5"),
    "split_ensemble": Column(one_branch, branched),
    "widen": Column(wider, settles=False),
    "deepen": Column(lambda g: f"deepen:after={first_value(g)}", settles=False),
    "merge_and_run": Column("merge_and_run:to=half"),
    "cast": Column("cast"),
    "skip_overflow": Column("skip_overflow", low_step),
}

REASONS = {
    "a": "it differs in stride|it would not pay",
    "b": "a product for each sample costs as much",
    "c": "it has an exit already",
    "d": "no value that every sample passes",
    "e": "needs one output, the logits",
    "f": "no exit 'exit1'",
    "g": "its head does not fit",
    "h": "adds channels to halves",
    "i": "groups would be cut",
    "j": "would mix their halves",
    "k": "only layers and norms can share",
    "l": "an exit decides for the whole network",
    "m": "is no ensemble|there are no branches",
    "n": "does not treat channels one by one",
    "o": "tied to it, has 32 channels",
    "p": "does not end a unit behind the stem",
    "q": "start from no one value",
    "r": "no square convolution|convolutions that are not 3x3",
    "s": "it has the form half already",
    "t": "stands behind .* already",
}

TABLE = """
lenet           1    . . .   .  .   1+   . . .  .  . 1 g 2   5 1 1 1 p  12 1
b_lenet         1   5+ . .   .  .   1+  1+ . .  .  . 1 t 2   l m 1 1 p  19 1
alexnet         1   2+ . .   2  .    .   . . .  .  . 1 1 2   8 1 n 1 p  21 1
b_alexnet       1  11+ . .   2  .    .   . . .  .  . 1 g 3   l m n 1 p  37 1
resnet_a        1  56+ . .   7  7   7+   . . .  .  . 1 1 2   h m o 1 q  21 1
b_resnet        1  80+ . .   9  9   9+   a . .  .  . c 1 3   l m o 1 q  32 1
fcn             1   6+ . .   2  2   2+   . . .  .  . d f .   3 1 1 1 p   5 1
cnn             1  10+ . .   3  3   3+   . . .  .  . 1 1 2   4 1 1 1 p   7 1
vbranch_resnet  1  82+ . .  21 21  21+  1+ . .  .  . 1 g 2  22 1 1 1 r  47 1
densenet        1 482+ . . 121 59  59+   . . .  .  . 1 1 2 121 1 1 1 p 301 1
densenet_bc     1  34+ . .   9  3   3+   . . .  .  . 1 t 2  10 1 1 1 r  22 1
imagenet_resnet 1 179+ . .  20 20  20+  3+ . .  .  . 1 1 2  21 1 1 1 1  48 1
pd_a_resnet     1 819+ . .  84 84 100+ 16+ . .  .  . 1 1 2   i m n 1 q 144 1
pd_b_resnet     1 831+ . .  84 84  96+ 16+ . .  .  . 1 1 2   i m n 1 q 256 1
ac_resnet       1 499+ . .  52 52  68+ 16+ . .  .  . 1 1 2  53 1 1 1 q 112 1
se_resnet       1 187+ . .  20 20  20+  3+ . .  .  . 1 1 2  37 1 1 1 q 104 1
ge_resnet       1 307+ . .  32 32  32+  3+ . .  .  . 1 1 2   i m 1 1 q  78 1
cbam_resnet     1 300+ . .  28 28  28+ 19+ . .  .  . 1 1 2  61 1 n 1 q 176 1
pd_perceptron   1    . . .   .  .    b  2+ . .  .  . d f .   j m 1 1 q  17 1
plain           1  50+ . .  13 13  13+   . . .  .  . 1 1 2  14 1 1 1 1  27 1
resnet          1  58+ . .  15 15  15+  2+ . .  .  . 1 1 2  16 1 1 1 1  35 1
half            1  58+ . .  15 15  15+  6+ . .  .  . 1 1 2  16 1 1 1 s  29 1
side            1  50+ . .  13 13  13+  6+ . .  .  . 1 1 2  14 1 1 1 1  27 1
cross           1  68+ . .  17 17  17+ 10+ 1 .  .  . 1 1 2  18 1 1 1 1  38 1
fuse3           1  62+ . .  16 16  16+  3+ . .  .  . 1 1 2  17 1 1 1 1  33 1
fuse6           1  62+ . .  16 16  16+  3+ . .  .  . 1 1 2  17 1 1 1 1  36 1
ensemble        1 444+ . .  68 68  68+  3+ . .  .  . e f .  76 1 1 1 p 152 1
cross_imagenet  1 393+ . .  96 96  96+  1+ . .  .  . 1 1 2  98 1 1 1 r 233 1
resnet_imagenet 1 382+ . .  96 96  96+   . . .  .  . 1 1 2  98 1 1 1 r 224 1
resnext         1 116+ . .  13 13  13+  1+ . .  .  . 1 1 2   i m 1 1 r  27 1
masked_resnext  4 517+ . 3  53 49  61+ 11+ . 2 40 40 1 1 2   k m 1 1 q 149 1
masked_resnet   6 171+ . 4  21 13  13+   . . 4 22 22 1 1 2   k m n 1 q  72 1
branch_connect  3  42+ . 1   6  4   7+  2+ . 1  4  4 1 1 2   k m 1 1 p  20 1
repvgg          1 589+ . .  61 44  66+   a . .  .  . 1 1 2  45 1 1 1 r  89 1
dbb_resnet      1 967+ . . 100 84 118+ 32+ . .  .  . 1 1 2  85 1 1 1 q 128 1
inception_v3    1 911+ . .  95 94  94+ 10+ . .  .  . 1 t 2  95 1 1 1 r 204 1
"""


# -- the test --------------------------------------------------------------------------------------


def cells() -> dict[str, dict[str, str]]:
    """Network to pass to what the table says of them."""
    table = (line.split() for line in TABLE.strip().splitlines())
    return {name: dict(zip(PASSES, row, strict=True)) for name, *row in table}


def applied(column: Column, graph: Graph) -> Result | str:
    """What the pass did, or why it raised."""
    try:
        return column.of(graph).run(graph, values=values(graph))
    except BranchgraphError as error:
        return str(error)


def differs(cell: str, result: Result | str) -> str:
    """What is not as the cell says, or nothing."""
    matches = 0 if isinstance(result, str) else len(result.report.matches)
    reasons = [result] if isinstance(result, str) else [why for _, why in result.report.refusals]
    if cell.rstrip("+").isdigit():
        least = int(cell.rstrip("+"))
        fits = matches >= least if cell.endswith("+") else matches == least
    elif cell == ".":
        fits = not matches and not reasons
    else:
        fits = not matches and any(re.search(REASONS[cell], why) for why in reasons)
    return "" if fits else f"expected {cell}, got {matches} matches, {reasons[:3]}"


def rows(name: str) -> Iterator[tuple[str, Column, Graph, Result | str]]:
    """Every pass with the form of the network that it works on and what it did."""
    graph = network(NETS[name])
    forms = {make: make(graph) for make in {column.form for column in PASSES.values()}}
    for title, column in PASSES.items():
        form = forms[column.form]
        yield title, column, form, applied(column, form)


def check_numbers(column: Column, form: Graph, result: Result | str) -> None:
    """The claim holds, and a second application finds nothing."""
    step = column.of(form)
    if isinstance(result, str) or not result.report.matches or step.claim == "different":
        return
    check_claim(form, result.graph, step.claim)
    if column.settles:
        assert not step.run(result.graph, values=values(form)).report.matches


def test_every_network_and_every_pass_is_in_the_table() -> None:
    assert list(NETS) == list(NETWORKS)
    assert set(PASSES) == set(Pass.registry)
    table = cells()
    assert list(table) == list(NETS)
    assert {cell for row in table.values() for cell in row.values()} >= set(REASONS)


@pytest.mark.parametrize("name", NETS)
def test_passes_run_over_the_network(name: str) -> None:
    row, wrong = cells()[name], {}
    for title, column, form, result in rows(name):
        wrong[title] = differs(row[title], result)
        if name not in LARGE:
            check_numbers(column, form, result)
    assert not {title: text for title, text in wrong.items() if text}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LARGE))
def test_claims_hold_on_large_networks(name: str) -> None:
    for _, column, form, result in rows(name):
        check_numbers(column, form, result)
