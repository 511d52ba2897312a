"""RepVGG, ACNet and diverse branch blocks: published parameters, and that they are convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from builders import randomised

from branchgraph.compiler import compile
from branchgraph.ir.builder import conv
from branchgraph.ir.cost import cost, parameter_count
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.interpret import interpret
from branchgraph.ir.state import Store
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.ir.verify import verify
from branchgraph.nets.catalogue import Catalogue
from branchgraph.nets.paradise_blocks import ac, pd_a
from branchgraph.nets.reparameterised import NETWORKS, REPVGG, acnet, dbb, repvgg, repvgg_unit
from branchgraph.passes.specialise import specialise

Unit = Callable[[Value], Value]

CATALOGUE = Catalogue(NETWORKS)


# -- counts ----------------------------------------------------------------------------------------

#: Variant to millions of parameters, in training and deployed, as the table of MMClassification
#: has them (papers/repvgg in its documentation). The paper truncates: A0 8.30, B0 14.33 deployed.
PUBLISHED = {
    "a0": (9.11, 8.31),
    "a1": (14.09, 12.79),
    "a2": (28.21, 25.50),
    "b0": (15.82, 14.34),
    "b1": (57.42, 51.83),
    "b1g2": (45.78, 41.36),
}


def deployed_parameters(graph: Graph) -> int:
    """One biased 3x3 convolution for each unit, and the classifier."""
    kept = [n for n in graph.nodes if n.path.endswith("square/conv") or n.op.opcode == "dense"]
    return sum(n.inputs[1].type.size + n.inputs[1].shape[0] for n in kept)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_repvgg_has_the_published_parameters(variant: str) -> None:
    graph = repvgg(variant)
    counts = (parameter_count(graph), deployed_parameters(graph))
    assert tuple(round(c / 1e6, 2) for c in counts) == PUBLISHED[variant]


def test_repvgg_a0_and_b0_have_exactly_these_parameters() -> None:
    a0, b0 = repvgg("a0"), repvgg("b0")
    assert (parameter_count(a0), deployed_parameters(a0)) == (9_108_968, 8_309_384)
    assert (parameter_count(b0), deployed_parameters(b0)) == (15_817_960, 14_339_048)
    assert [cost(g).per_sample().macs // 10**6 for g in (a0, b0)] == [1512, 3397]


def test_a_diverse_branch_resnet_has_the_parameters_of_its_branches() -> None:
    channels = [(64, 64)] * 4
    for c in (64, 128, 256):
        channels += [(c, 2 * c)] + [(2 * c, 2 * c)] * 3
    # square and sequence 9 each, point and average 1 each, the sequence's own 1x1; batch norms
    added = sum(9 * i * o + i * o + i * o + i * i + 2 * (o + o + i + 2 * o) for i, o in channels)
    assert parameter_count(CATALOGUE.network("dbb_resnet18")) == 11_689_512 + added


@pytest.mark.parametrize(
    "spec",
    ["dbb_resnet18", "dbb_resnet50:features=true", *(f"repvgg:variant={v}" for v in REPVGG)],
)
def test_every_network_verifies_and_its_text_parses_back(spec: str) -> None:
    graph = CATALOGUE.network(spec)
    verify(graph)
    assert structural_hash(parse_graph(format_graph(graph))) == structural_hash(graph)


# -- units are convolutions ------------------------------------------------------------------------

#: Unit (6 channels to 6) to its kernel, stride and groups.
UNITS: dict[str, tuple[Unit, int, int, int]] = {
    "pd_a": (partial(pd_a, filters=6, groups=3), 3, 1, 1),
    "pd_a, stride 2": (partial(pd_a, filters=6, groups=2, stride=2), 3, 2, 1),
    "skeleton": (partial(ac, filters=6), 3, 1, 1),
    "repvgg": (partial(repvgg_unit, filters=6), 3, 1, 1),
    "repvgg, stride 2": (partial(repvgg_unit, filters=6, stride=2), 3, 2, 1),
    "repvgg, groups": (partial(repvgg_unit, filters=6, groups=2), 3, 1, 2),
    "acnet": (partial(acnet, filters=6), 3, 1, 1),
    "acnet, 5x5, stride 2": (partial(acnet, filters=6, kernel=5, stride=2), 5, 2, 1),
    "dbb": (partial(dbb, filters=6), 3, 1, 1),
    "dbb, 5x5, stride 2": (partial(dbb, filters=6, kernel=5, stride=2), 5, 2, 1),
    "dbb, groups": (partial(dbb, filters=6, groups=2), 3, 1, 2),
    "dbb, depthwise": (partial(dbb, filters=6, groups=6), 3, 1, 6),
}


def inference(unit: Unit) -> Callable[[np.ndarray], np.ndarray]:
    """The unit as a function of x [N, C, H, W] in float64, with random states."""

    def run(x: np.ndarray) -> np.ndarray:
        graph = Graph("unit")
        graph.output("y", unit(graph.input("x", ("N", *x.shape[1:]))))
        plain = specialise(graph, training=False)
        return interpret(plain, {"x": x}, randomised(graph), DType.F64).outputs["y"]

    return run


@pytest.mark.parametrize("name", UNITS)
def test_units_are_one_convolution_in_inference_borders_included(name: str) -> None:
    unit, kernel, stride, groups = UNITS[name]
    run, half = inference(unit), kernel // 2
    constant = run(np.zeros((1, 6, 9, 9)))
    bias = constant[0, :, 0, 0]
    np.testing.assert_allclose(constant, np.broadcast_to(bias[:, None, None], constant.shape))
    weight = np.zeros((6, 6, kernel, kernel))
    for i, j in np.ndindex(kernel, kernel):
        # Seen from the window centred at (4, 4), an impulse shows one tap of every kernel.
        impulses = np.zeros((6, 6, 9, 9))
        impulses[range(6), range(6), 4 + i - half, 4 + j - half] = 1.0
        weight[:, :, i, j] = (run(impulses)[:, :, 4 // stride, 4 // stride] - bias).T
    x = np.random.default_rng(1).normal(size=(2, 6, 8, 7))
    np.testing.assert_allclose(
        run(x), convolved(x, weight, bias, stride), rtol=1e-9, atol=1e-10
    )  # fmt: skip
    owner = np.arange(6) * groups // 6
    assert np.abs(weight[owner[:, None] != owner[None, :]]).max(initial=0) < 1e-12


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    graph = Graph("fused")
    kernel = weight.shape[2]
    h = graph.input("x", ("N", *x.shape[1:]), DType.F64)
    graph.output("y", conv(h, 6, kernel, stride=stride, pad=kernel // 2))
    return interpret(graph, {"x": x}, Store(dict(zip(graph.states, (weight, bias))))).outputs["y"]


def test_branches_are_declared() -> None:
    def branches(unit: Unit) -> set[str]:
        graph = Graph("unit")
        graph.output("y", unit(graph.input("x", ("N", 6, 8, 8))))
        return {b.partition("/")[2] for b in graph.branches()}

    assert branches(partial(repvgg_unit, filters=6)) == {"square", "point", "identity"}
    assert branches(partial(repvgg_unit, filters=8)) == {"square", "point"}
    assert branches(partial(dbb, filters=6)) == {"square", "point", "sequence", "average"}
    skeleton = {"skeleton/vertical", "skeleton/horizontal"}
    assert branches(partial(acnet, filters=6)) == {"square"} | skeleton


def test_a_network_runs() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    logits = compile(repvgg("a0", size=32, classes=4))(x=x)["logits"]
    assert logits.shape == (2, 4)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(repvgg, "c0"), "variant is one of a0, a1, a2, b0"),
        (partial(CATALOGUE.network, "dbb_resnet20"), "dbb_resnet: depth is one of 18, 34"),
        (lambda: dbb(image(), 6, kernel=4), "the kernel is odd and at least 3, got 4"),
        (lambda: acnet(image(), 6, kernel=5, pad=1), "use pad >= 2"),
        (lambda: repvgg_unit(image(), 6, groups=4), "6 channels and 6 filters in 4 groups"),
    ],
)
def test_options_that_make_no_network_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        make()


def image() -> Value:
    return Graph("g").input("x", ("N", 6, 8, 8))
