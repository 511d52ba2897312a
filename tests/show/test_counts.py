"""Counts of nodes, branches, merges, gates and exits, of the network and of its picture."""

import re

import pytest
from families import FAMILIES, densenet, disentangled, ensemble, resnet, resnext, with_exits
from pictured import network, training

from branchgraph.ir.graph import Graph
from branchgraph.show import Counts, counts, to_dot


def test_the_counts_of_networks() -> None:
    assert counts(with_exits()) == Counts(28, 2, 0, 0, 3, 11, 0)
    assert counts(disentangled()) == Counts(15, 6, 2, 0, 0, 9, 0)
    found = counts(disentangled(gated=True))
    assert (found.branches, found.merges, found.gates) == (7, 2, 4)
    found = counts(densenet(4))
    assert (found.merges, found.repeats) == (2 * 4, 0)
    assert counts(Graph("empty")) == Counts(0, 0, 0, 0, 0, 0, 0)


def test_what_is_drawn_once_counts_as_often_as_it_is_there() -> None:
    found = counts(resnet(9))
    assert (found.nodes, found.merges, found.repeats) == (198, 27, 3)
    found = counts(resnext(8, modules=3))
    assert (found.branches, found.gates, found.merges, found.repeats) == (24, 24, 3, 2)
    found = counts(ensemble(8))
    assert (found.branches, found.merges, found.boxes) == (8, 1, 5)


def test_fewer_boxes_are_drawn_than_without_collapsing() -> None:
    whole, drawn = counts(resnet(9), collapse=False), counts(resnet(9))
    assert (whole.boxes, drawn.boxes) == (1 + 27 * 3 + 2 + 2, 20)
    assert (whole.nodes, whole.repeats) == (drawn.nodes, 0)


def test_gradients_and_updates_do_not_count() -> None:
    step = training(network())
    assert counts(step).nodes < len(step.nodes)
    assert counts(step).gates == counts(network()).gates == 1


@pytest.mark.parametrize("collapse", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_boxes_are_those_of_the_picture(name: str, collapse: bool) -> None:
    g = FAMILIES[name]()
    source = to_dot(g, collapse=collapse, legend=False)
    boxes = set(re.findall(r"\t(n\d+) \[", source))
    assert len(boxes) == counts(g, collapse=collapse).boxes
