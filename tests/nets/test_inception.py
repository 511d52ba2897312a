"""Inception-v3: exact parameters, shapes of its blocks, and a run."""

from __future__ import annotations

import numpy as np
import pytest

from branchgraph.compiler import compile
from branchgraph.ir.cost import cost, parameter_count
from branchgraph.ir.errors import GraphError
from branchgraph.ir.hash import structural_hash
from branchgraph.ir.text import format_graph, parse_graph
from branchgraph.ir.verify import verify
from branchgraph.nets.catalogue import Catalogue
from branchgraph.nets.inception import NETWORKS, inception_v3

CATALOGUE = Catalogue(NETWORKS)


def test_parameters_are_the_published_ones() -> None:
    whole, trunk = inception_v3(), inception_v3(auxiliary=False)
    assert parameter_count(whole) == 27_161_264
    assert parameter_count(trunk) == 23_834_568
    assert round(cost(trunk).per_sample().macs / 1e9, 2) == 5.71


def test_blocks_have_the_published_shapes() -> None:
    graph = inception_v3()
    shapes = [
        str(n.output.type).removeprefix("f32") for n in graph.nodes
        if n.op.opcode == "concat" and len(n.inputs) > 2
    ]  # fmt: skip
    assert shapes == [
        "[N, 256, 35, 35]", *["[N, 288, 35, 35]"] * 2, *["[N, 768, 17, 17]"] * 5,
        "[N, 1280, 8, 8]", *["[N, 2048, 8, 8]"] * 2,
    ]  # fmt: skip
    outputs = {k: str(v.type) for k, v in graph.outputs.items()}
    assert outputs == {"auxiliary": "f32[N, 1000]", "logits": "f32[N, 1000]"}


def test_blocks_have_declared_branches() -> None:
    branches = set(inception_v3().branches())
    assert {f"mixed5/1/{b}" for b in ("point", "five", "double", "pool")} <= branches
    assert {f"mixed6/1/{b}" for b in ("point", "seven", "double", "pool")} <= branches
    assert {f"mixed7/0/{b}" for b in ("three", "seven", "pool")} <= branches
    assert {f"mixed7/2/{b}" for b in ("point", "three", "double", "pool")} <= branches
    assert "auxiliary" in branches


@pytest.mark.parametrize("spec", ["inception_v3", "inception_v3:auxiliary=false,size=75"])
def test_the_network_verifies_and_its_text_parses_back(spec: str) -> None:
    graph = CATALOGUE.network(spec)
    verify(graph)
    assert structural_hash(parse_graph(format_graph(graph))) == structural_hash(graph)


def test_the_smallest_images_pass() -> None:
    x = np.random.default_rng(0).normal(size=(1, 3, 75, 75)).astype(np.float32)
    logits = compile(inception_v3(auxiliary=False, size=75, classes=7))(x=x)["logits"]
    assert logits.shape == (1, 7)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("auxiliary", "size", "message"),
    [
        (True, 298, "298x298 vanish on the way; size is >= 299, or 75 without the auxiliary"),
        (False, 74, "size is >= 75$"),
    ],
)
def test_smaller_images_are_refused(auxiliary: bool, size: int, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        inception_v3(auxiliary, size=size)
