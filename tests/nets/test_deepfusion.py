"""Deep Fusion networks against MXNet's recordings and the published counts."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import networkx as nx
import numpy as np
import pytest

from branchgraph.compiler import compile
from branchgraph.ir.builder import softmax
from branchgraph.ir.cost import cost, parameter_count
from branchgraph.ir.errors import FormatError, GraphError
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Node, Value
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.initialisers import HeNormal, Ones, Uniform, Zeros
from branchgraph.ir.interpret import Run, interpret
from branchgraph.ir.ops.loss import CrossEntropy
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.ir.verify import verify
from branchgraph.mx.params import load_checkpoint
from branchgraph.nets.catalogue import Catalogue
from branchgraph.nets.deepfusion import (
    NETWORKS,
    exchange_name,
    fusion,
    fusion_network,
    stage_blocks,
    two,
    zero,
)
from branchgraph.passes.specialise import specialise
from branchgraph.show.counts import counts
from tests.goldens import golden

CATALOGUE = Catalogue(NETWORKS)
network = CATALOGUE.network

SMALL = ("plain", "resnet", "half", "side", "cross", "fuse3", "fuse6", "ensemble")
#: Networks of the recordings that go by another name here.
RENAMED = {"symbol_cross": "cross_imagenet", "symbol_resnet": "resnet_imagenet"}

#: float32 against float32 with sums in another order, through a whole network; another kernel set
#: of MXNet agrees with the recordings to 1e-6, 1e-5 and 4e-6.
OUTPUT = 1e-5
GRADIENT = 1e-4
STATISTIC = 1e-5

NETS = [
    *(f"{n}_d{d}w1c10_s{s}" for s in (11, 12) for n, d in (
        ("plain", 5), ("resnet", 8), ("half", 14), ("side", 14), ("cross", 14), ("fuse3", 5),
        ("fuse6", 8), ("ensemble", 5),
    )),
    "cross_d14w1c10_s13_hw28", "plain_d5w2c100_s14", "ensemble_d5w2c10_s14",
    "cross_d21w1c10_s15", "fuse6_d11w1c10_s15",
]  # fmt: skip


# -- counts ----------------------------------------------------------------------------------------


def stage_parameters(graph: Graph) -> list[int]:
    """Parameters of the stem, the three stages and the head."""
    found: Counter[str] = Counter()
    for state in graph.states:
        if state.role is Role.PARAMETER:
            found[state.name.partition("/")[0]] += math.prod(state.shape)
    return [found[k] for k in ("g0", "g1", "g2", "g3", "cls")]


@pytest.mark.parametrize(
    ("spec", "stages", "total", "total_100"),
    [
        ("depth=110", [464, 84_096, 326_016, 1_299_200, 650], 1_710_426, 1_716_276),
        (
            "depth=62,widen=4",
            [1_856, 739_840, 2_823_680, 11_283_456, 2_570],
            14_851_402,
            14_874_532,
        ),
        (
            "depth=98,widen=4",
            [1_856, 1_183_744, 4_596_224, 18_367_488, 2_570],
            24_151_882,
            24_175_012,
        ),
    ],
)
def test_merge_and_run_has_the_parameters_of_the_layer_table(
    spec: str, stages: list[int], total: int, total_100: int
) -> None:
    graph = network(f"cross:{spec}")
    assert stage_parameters(graph) == stages
    assert parameter_count(graph) == sum(stages) == total
    assert parameter_count(network(f"cross:{spec},classes=100")) == total_100


@pytest.mark.parametrize(
    ("block_depth", "depth", "blocks"),
    [
        (4, 110, (9, 9, 9)), (4, 62, (5, 5, 5)), (4, 98, (8, 8, 8)), (4, 56, (4, 4, 5)),
        (4, 21, (1, 1, 2)), (1, 7, (1, 2, 2)), (1, 11, (3, 3, 3)), (4, 14, (1, 1, 1)),
        (4, 13, (0, 1, 1)), (4, 2, (0, 0, 0)),
    ],
)  # fmt: skip
def test_depth_that_does_not_fit_is_dropped(
    block_depth: int, depth: int, blocks: tuple[int, ...]
) -> None:
    assert stage_blocks("net", depth, block_depth) == blocks


@pytest.mark.parametrize(
    ("name", "blocks"), [("plain", 1), ("resnet", 2), ("half", 4), ("side", 4), ("cross", 4)]
)
def test_every_depth_from_stem_and_head_on_builds(name: str, blocks: int) -> None:
    for depth in range(2, 3 * blocks + 4):
        graph = network(f"{name}:depth={depth},size=8")
        verify(graph)
        stages = {n.scope[0].name for n in graph.nodes if n.scope}
        assert (stages >= {"g1", "g2", "g3"}) == (depth >= 2 + 3 * blocks)


# -- names -----------------------------------------------------------------------------------------


def leaves(graph: Graph, mean_first: bool) -> Iterator[Value | str]:
    """Inputs, states and labels in the order in which MXNet lists the variables of its symbol.

    That is depth first from the outputs. The networks of 32x32 images add the branch to the mean,
    those of ImageNet the mean to the branch.
    """
    seen: set[Value] = set()
    for output, root in graph.outputs.items():
        stack = [root]
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.producer is None:
                yield value
                continue
            operands = list(value.producer.inputs)
            if value.producer.op.opcode == "sum":
                operands.sort(key=lambda v: is_mean(v) is not mean_first)
            stack.extend(reversed(operands))
        yield f"softmax{output.removeprefix('logits')}_label"


def is_mean(value: Value) -> bool:
    return value.producer is not None and value.producer.op.opcode == "mean"


def listed(graph: Graph, mean_first: bool) -> tuple[list[str], list[str]]:
    """Lines `<name> <shape>` of MXNet's arguments, and names of its auxiliary states."""
    arguments, auxiliary = [], []
    for leaf in leaves(graph, mean_first):
        if isinstance(leaf, str):
            arguments.append(f"{leaf} (1,)")
        elif leaf.state is None:
            arguments.append(f"data {(1, *leaf.shape[1:])}")
        elif leaf.state.role is Role.STATISTIC:
            auxiliary.append(exchange_name(leaf.state))
        else:
            arguments.append(f"{exchange_name(leaf.state)} {leaf.state.shape}")
    return arguments, auxiliary


def sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def spec_of(entry: dict[str, Any]) -> str:
    name = RENAMED.get(entry["network"], entry["network"])
    if name in SMALL:
        return f"{name}:depth={entry['depth']},widen={entry['widen']},classes={entry['classes']}"
    return f"{name}:classes={entry['classes']}"


@pytest.mark.parametrize("name", [*SMALL, *RENAMED])
def test_arguments_have_the_names_and_shapes_of_mxnet(name: str) -> None:
    table = json.loads(golden("mxnet/graph_table.json").read_text())
    entries = [e for e in table if e["network"] == name]
    assert len(entries) == (15 if name in SMALL else 1)
    for entry in entries:
        graph = network(spec_of(entry))
        assert parameter_count(graph) == entry["parameters"]
        assert f"{parameter_count(graph) / 1e6:.4f}M" == entry["logged_parameters"]
        arguments, auxiliary = listed(graph, mean_first=name in SMALL)
        assert (len(arguments), len(auxiliary)) == (entry["arguments"], entry["aux"])
        assert sha256(arguments) == entry["arguments_sha256"], spec_of(entry)
        assert sha256(auxiliary) == entry["aux_sha256"], spec_of(entry)
        ours = Counter(n.op.opcode for n in graph.nodes)
        theirs = entry["node_ops"]
        assert (ours["conv"], ours["batch_norm"], ours["relu"], ours["dense"]) == (
            theirs["Convolution"],
            theirs["BatchNorm"],
            theirs["Activation"],
            theirs["FullyConnected"],
        )


# -- numbers ---------------------------------------------------------------------------------------


def training_graph(graph: Graph, wrt: Iterable[State]) -> Graph:
    """Outputs: probabilities, and `grad/<argument>` of the cross-entropy summed over the batch.

    That is the gradient of SoftmaxOutput as it comes: probabilities minus one-hot labels.
    """
    new = specialise(graph, training=True, statistics="backward")
    labels = new.input("labels", ("N",), DType.I64)
    losses = [new.emit(CrossEntropy(), v, labels) for v in new.outputs.values()]
    wanted = {exchange_name(s): new.read(s) for s in wrt} | {"data": new.inputs["x"]}
    found = vjp(new, dict.fromkeys(losses), wanted.values())
    as_probabilities(new)
    for name, value in wanted.items():
        new.output(f"grad/{name}", found[value])
    return new


def as_probabilities(graph: Graph) -> None:
    """Replace the outputs `logits<t>` by `softmax<t>_output`."""
    logits = dict(graph.outputs)
    graph.keep(output=lambda name: False)
    for name, value in logits.items():
        graph.output(f"softmax{name.removeprefix('logits')}_output", softmax(value))


class Recorded:
    """A network of the recordings bound to its checkpoint by exchange names."""

    def __init__(self, tag: str) -> None:
        with np.load(golden(f"mxnet/nets/{tag}.npz")) as stored:
            self.arrays = dict(stored)
        match = re.match(r"(\w+)_d(\d+)w(\d+)c(\d+)_s", tag)
        assert match
        name, depth, widen, classes = match.groups()
        size = self.arrays["data"].shape[-1]
        self.graph = network(f"{name}:depth={depth},widen={widen},classes={classes},size={size}")
        checkpoint = load_checkpoint(golden(f"mxnet/nets/{tag}-0000.params"))
        values = {**checkpoint.arguments, **checkpoint.auxiliary}
        self.states = {exchange_name(s): s for s in self.graph.states}
        assert self.states.keys() == values.keys()
        self.store = Store({s: values[n] for n, s in self.states.items()})

    def expected(self, kind: str) -> dict[str, np.ndarray]:
        start = f"{kind}/"
        return {k[len(start) :]: v for k, v in self.arrays.items() if k.startswith(start)}


def near(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Within `tolerance` of the largest expected element."""
    assert actual.shape == expected.shape, what
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, err_msg=what)


@pytest.mark.parametrize("tag", NETS)
def test_networks_infer_as_in_mxnet(tag: str) -> None:
    net = Recorded(tag)
    graph = specialise(net.graph, training=False)
    as_probabilities(graph)
    found = compile(graph, store=net.store).run({"x": net.arrays["data"]})
    assert list(found) == list(net.expected("infer"))
    for name, expected in net.expected("infer").items():
        near(found[name], expected, OUTPUT, name)


@pytest.mark.parametrize("tag", NETS)
def test_networks_train_as_in_mxnet(tag: str) -> None:
    net = Recorded(tag)
    trained = [s for s in net.states.values() if s.role.trainable]
    step = compile(training_graph(net.graph, trained), store=net.store)
    labels = net.arrays["label"].astype(np.int64)
    found = step.run({"x": net.arrays["data"], "labels": labels})
    for name, expected in net.expected("train").items():
        near(found[name], expected, OUTPUT, name)
    gradients = net.expected("grad")
    assert set(gradients) == {n.removeprefix("grad/") for n in found if n.startswith("grad/")}
    for name, expected in gradients.items():
        near(found[f"grad/{name}"], expected, GRADIENT, name)
    moved = net.expected("aux_new")
    assert set(moved) == {n for n, s in net.states.items() if s.role is Role.STATISTIC}
    for name, expected in moved.items():
        near(net.store[net.states[name]], expected, STATISTIC, name)


class Recipe:
    """A network of ImageNet whose parameters are drawn as the recordings say."""

    def __init__(self, name: str) -> None:
        self.meta = json.loads(golden(f"mxnet/nets/recipe_{name}_s31.json").read_text())
        with np.load(golden(f"mxnet/nets/recipe_{name}_s31.npz")) as stored:
            self.arrays = dict(stored)
        self.graph = network(RENAMED[name])
        self.states = {exchange_name(s): s for s in self.graph.states}
        self.store = Store()
        draw = np.random.RandomState(self.meta["seed"])
        for name, shape in self.meta["arguments"]:
            if name in self.states:
                self.store[self.states[name]] = self._drawn(draw, name, shape)
        for key, value in self.arrays.items():
            if key.startswith("aux/"):
                self.store[self.states[key.removeprefix("aux/")]] = value
        draw = np.random.RandomState(self.meta["seed"] + 500)
        self.data = draw.normal(0, 1, self.meta["input_shape"]).astype(np.float32)
        self.labels = draw.randint(0, self.meta["num_classes"], len(self.data))

    def _drawn(self, draw: np.random.RandomState, name: str, shape: list[int]) -> np.ndarray:
        if name.endswith("gamma"):
            values = draw.uniform(0.6, 1.4, shape)
        elif name.endswith(("beta", "bias")):
            values = draw.normal(0, 0.1, shape)
        elif "fc" in name:
            values = draw.uniform(-1, 1, shape) * np.sqrt(1 / np.prod(shape[1:])) * 2
        else:
            values = draw.normal(0, 1, shape) * np.sqrt(2 / np.prod(shape[1:]))
        return values.astype(np.float32)

    def check(self) -> None:
        for name, first in self.meta["first4"].items():
            np.testing.assert_array_equal(self.store[self.states[name]].ravel()[:4], first)
        np.testing.assert_array_equal(self.data.ravel()[:4], self.meta["data_first4"])
        np.testing.assert_array_equal(self.labels, self.arrays["label"])


@pytest.mark.parametrize("name", RENAMED)
def test_networks_of_imagenet_infer_as_in_mxnet(name: str) -> None:
    recipe = Recipe(name)
    recipe.check()
    graph = specialise(recipe.graph, training=False)
    as_probabilities(graph)
    found = interpret(graph, {"x": recipe.data}, recipe.store, precision=DType.F64)
    near(found.outputs["softmax_output"], recipe.arrays["infer/softmax_output"], 1e-6, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RENAMED)
def test_networks_of_imagenet_train_as_in_mxnet(name: str) -> None:
    recipe = Recipe(name)
    trained = [s for s in recipe.states.values() if s.role.trainable]
    graph = training_graph(recipe.graph, trained)
    feeds = {"x": recipe.data, "labels": recipe.labels}
    found: Run = interpret(graph, feeds, recipe.store, precision=DType.F64)
    near(found.outputs["softmax_output"], recipe.arrays["train/softmax_output"], 1e-10, "softmax")
    for argument, grad in recipe.meta["grads"].items():
        actual = found.outputs[f"grad/{argument}"]
        direction = np.random.RandomState(zlib.crc32(argument.encode())).standard_normal
        summary = (np.linalg.norm(actual), actual.sum(), (actual * direction(actual.shape)).sum())
        recorded = (grad["l2"], grad["sum"], grad["dot"])
        tolerance = 1e-8 * grad["l2"] * math.sqrt(actual.size)
        np.testing.assert_allclose(summary, recorded, rtol=0, atol=tolerance, err_msg=argument)
        np.testing.assert_allclose(
            actual.ravel()[:8], grad["first8"], rtol=1e-6, atol=1e-8 * grad["l2"], err_msg=argument
        )
    for state, value in found.updates.items():
        expected = recipe.arrays[f"aux_new/{exchange_name(state)}"]
        near(value, expected.astype(np.float32), 1e-6, exchange_name(state))


# -- structure -------------------------------------------------------------------------------------


def drawn_name(node: Node) -> str:
    """The name under which the original draws a convolution or dense layer."""
    name = re.sub(r"^n(\d)/(?!fc)", r"uncouple0\1", node.path)
    if name.startswith("uncouple"):
        return name.removesuffix("/conv").replace("/", "_")
    return re.sub(r"^n(\d)/", r"n\1", name).replace("/", "_")


def drawn(graph: Graph) -> nx.MultiDiGraph:
    """Convolutions, dense layers, sums and the input; what lies between is left out."""
    picture = nx.MultiDiGraph()
    place: dict[Value, list[Node | str]] = {v: ["data"] for v in graph.inputs.values()}
    picture.add_node("data", label="data")
    for node in graph.nodes:
        data = [v for v in node.inputs if v.state is None]
        sources = [p for v in data for p in place[v]]
        if node.op.opcode in ("conv", "dense", "sum", "mean"):
            label = "+" if node.op.opcode in ("sum", "mean") else drawn_name(node)
            picture.add_node(node, label=label)
            picture.add_edges_from((p, node) for p in sources)
            sources = [node]
        place[node.output] = sources
    return picture


def recorded_drawing(name: str) -> nx.MultiDiGraph:
    recorded = json.loads(golden(f"mxnet/show_model/{name}_d26.json").read_text())
    picture = nx.MultiDiGraph()
    for node in recorded["nodes"]:
        label = "+" if node["label"] == "+" else node["id"].rpartition("_")[0]
        picture.add_node(node["id"], label=label)
    picture.add_edges_from((source, consumer) for consumer, source in recorded["edges"])
    return picture


@pytest.mark.parametrize("name", SMALL)
def test_networks_connect_as_the_original_draws_them(name: str) -> None:
    ours, theirs = drawn(network(f"{name}:depth=26")), recorded_drawing(name)

    def labels(picture: nx.MultiDiGraph) -> Counter[str]:
        return Counter(dict(picture.nodes(data="label")).values())

    assert labels(ours) == labels(theirs)
    assert nx.is_isomorphic(
        ours,
        theirs,
        node_match=lambda a, b: a["label"] == b["label"],
        edge_match=lambda a, b: len(a) == len(b),
    )


def test_pictures_count_the_merges_and_branches() -> None:
    found = counts(network("cross:depth=26"))
    assert (found.merges, found.gates, found.exits) == (17, 0, 0)
    branches = network("cross:depth=26").branches()
    assert set(branches) == {
        *(f"g{s}/b{b}/d{i}" for s in (1, 2, 3) for b in (1, 2) for i in (1, 2)),
        *(f"g{s}/b1/l{i}" for s in (2, 3) for i in (1, 2)),
    }


def path_lengths(graph: Graph, at: Value) -> Counter[int]:
    """How many paths from the images to `at` have how many layers, projections left out."""
    found: dict[Value, Counter[int]] = {v: Counter({0: 1}) for v in graph.inputs.values()}
    for node in graph.nodes:
        layer = node.op.opcode in ("conv", "dense") and "/line/" not in node.path
        total: Counter[int] = Counter()
        for value in node.inputs:
            for length, paths in found.get(value, {}).items():
                total[length + layer] += paths
        found[node.output] = total
    return found[at]


def moments(lengths: Counter[int]) -> tuple[float, float]:
    paths = lengths.total()
    mean = sum(k * n for k, n in lengths.items()) / paths
    return mean, math.sqrt(sum((k - mean) ** 2 * n for k, n in lengths.items()) / paths)


@pytest.mark.parametrize("blocks", [9, 24])
def test_paths_are_as_long_as_the_theory_says(blocks: int) -> None:
    # B = 2 layers a branch: BL + 2, 2BL/3 + 2 and BL/3 + 2 on average (Zhao et al., section 3.2)
    depth = 4 * blocks + 2

    def at_head(name: str) -> tuple[float, float]:
        graph = network(f"{name}:depth={depth}")
        return moments(path_lengths(graph, graph.outputs["logits"]))

    assert at_head("resnet") == pytest.approx((2 * blocks + 2, math.sqrt(2 * blocks)))
    assert at_head("half") == pytest.approx((4 * blocks / 3 + 2, math.sqrt(8 * blocks / 9)))
    graph = network(f"cross:depth={depth}")
    last = graph.find(f"g3/b{blocks // 3 - 1}/relu1").output
    mean, deviation = moments(path_lengths(graph, last))
    assert mean == pytest.approx(2 * (blocks - 1) / 3 + 1)
    assert deviation == pytest.approx(math.sqrt(8 * (blocks - 1) / 9))
    # the last block adds m once for both streams, so half its paths go through a branch
    assert at_head("cross")[0] == pytest.approx(mean + 2)


@pytest.mark.parametrize(
    ("spec", "longest"),
    [
        ("cross:depth=110", 56), ("cross:depth=62", 32), ("cross:depth=98", 50),
        ("cross:depth=56", 28), ("half:depth=110", 56), ("side:depth=26", 14),
        ("plain:depth=26", 26), ("resnet:depth=26", 26), ("fuse3:depth=26", 26),
        ("fuse6:depth=26", 26), ("cross_imagenet", 50), ("resnet_imagenet", 98),
        ("cross_imagenet:form=first", 44), ("resnet_imagenet:form=first", 101),
    ],
)  # fmt: skip
def test_the_longest_path_is_the_true_depth(spec: str, longest: int) -> None:
    graph = network(spec)
    assert max(path_lengths(graph, graph.outputs["logits"])) == longest


def test_networks_of_imagenet_merge_everywhere_but_in_first_blocks() -> None:
    def merges(spec: str) -> tuple[int, int, int]:
        ops = Counter(n.op.opcode for n in network(spec).nodes)
        return ops["mean"], ops["sum"], ops["concat"]

    assert merges("cross_imagenet") == (12, 24, 1)
    assert merges("resnet_imagenet") == (0, 28, 0)
    assert merges("cross_imagenet:form=first") == (14, 29, 0)
    assert merges("resnet_imagenet:form=first") == (0, 33, 0)


def test_sub_networks_of_the_ensemble_share_all_but_statistics() -> None:
    graph = network("ensemble:depth=26")
    assert list(graph.outputs) == [f"logits{t}" for t in range(1, 9)]
    readers = Counter(
        v.state.name for n in graph.nodes for v in n.inputs if v.state and v.state.role.trainable
    )
    assert readers["g0.weight"] == readers["fc.weight"] == 8
    assert set(readers.values()) == {4, 8}
    means = [n.inputs[3].state for n in graph.nodes if n.op.opcode == "batch_norm"]
    assert len(set(means)) == len(means) == 8 + 12 + 12 * 8
    assert {n.op.decay for n in graph.nodes if n.op.opcode == "batch_norm"} == {0.99}
    paths = [max(path_lengths(graph, v)) for v in graph.outputs.values()]
    assert paths == [5, 12, 12, 19, 12, 19, 19, 26]


def test_initial_values_follow_the_original() -> None:
    states = {exchange_name(s): s.init for s in network("cross:depth=14").states}
    assert states["g0_conv_weight"] == HeNormal(27)
    assert states["g2_b1_l1_line_conv_weight"] == HeNormal(16)
    assert states["cls_fc_weight"] == Uniform(-0.125, 0.125)
    assert states["cls_fc_bias"] == states["g0_bn_beta"] == states["g0_bn_moving_mean"] == Zeros()
    assert states["g0_bn_gamma"] == states["g0_bn_moving_var"] == Ones()
    shared = {exchange_name(s): s.init for s in network("ensemble:depth=5").states}
    assert shared["g2_b1_right2_weight"] == HeNormal(144)
    assert shared["fc_weight"] == Uniform(-0.125, 0.125)
    large = {exchange_name(s): s.init for s in network("cross_imagenet").states}
    assert large["g4_b2_deep1r_bn3_moving_var"] == Zeros()


def test_an_own_block_makes_an_own_network() -> None:
    block = fusion({"p0": zero, "p1": two, "p2": two, "p3": two})
    graph = fusion_network("three", 14, 1, 10, 32, 4, block)
    verify(graph)
    assert set(graph.branches()) >= {"g1/b1/p1", "g2/b1/p0", "g3/b1/p3"}
    assert max(path_lengths(graph, graph.outputs["logits"])) == 8
    units = 3 * 2 * 9 * (16**2 + 32**2 + 64**2) - 9 * 3 * (16 * 32 + 32 * 64)
    projections = 16 * 32 + 32 * 64
    norms = 2 * (16 + 6 * 16 + 7 * 32 + 7 * 64)
    assert parameter_count(graph) == 27 * 16 + units + projections + norms + 650


def test_the_size_of_images_is_an_option() -> None:
    assert (
        str(network("cross:depth=14,size=28").find("g3/b1/relu1").output.type.shape[2:]) == "(7, 7)"
    )
    wide = network("ensemble:depth=5,size=40")
    assert {s.shape for s in wide.states if s.name == "fc.weight"} == {(10, 64 * 9)}
    assert network("resnet_imagenet:size=256").outputs["logits"].shape[1] == 1000


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_network_verifies_and_its_text_parses_back(name: str) -> None:
    graph = network(name)
    verify(graph)
    assert structural_hash(parse_graph(format_graph(graph))) == structural_hash(graph)
    assert CATALOGUE[name].summary
    assert CATALOGUE[name].family == "Deep Fusion"
    assert cost(graph).per_sample().macs > 0


def test_a_deep_network_is_declared_in_a_moment() -> None:
    start = time.process_time()
    network("cross:depth=110,widen=1")
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("plain:depth=1", GraphError, "plain: depth is at least 2, and at least 5 for a block in"),
        ("resnet:depth=0", GraphError, "at least 8 for a block in every stage, got 0"),
        ("cross:depth=1", GraphError, "at least 14 for a block in every stage, got 1"),
        ("fuse3:depth=4", GraphError, "fuse3: depth is at least 5, got 4"),
        ("fuse6:depth=7", GraphError, "fuse6: depth is at least 8, got 7"),
        ("ensemble:depth=4", GraphError, "ensemble: depth is at least 5, got 4"),
        ("cross:widen=0", GraphError, "cross: widen is at least 1, got 0"),
        ("half:classes=0", GraphError, "half: classes is at least 1"),
        ("side:size=0", GraphError, "side: size is at least 1"),
        ("ensemble:size=28", GraphError, "ensemble: size is at least 29, got 28"),
        ("cross_imagenet:size=192", GraphError, "cross_imagenet: size is at least 193"),
        ("cross_imagenet:form=first,size=196", GraphError, "size is at least 197"),
        ("resnet_imagenet:form=last", GraphError, "form 'last' is none of final, first"),
        ("cross_imagenet:depth=50", FormatError, "no option 'depth'"),
        ("cross:depth=deep", FormatError, "cross:depth: expected int, got 'deep'"),
    ],
)
def test_what_cannot_be_built_says_what_can(spec: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        network(spec)
