"""The drawing for the terminal."""

import re

import pytest
from pictured import ODD, named, network, training

from branchgraph.ir.builder import conv, relu
from branchgraph.ir.graph import Graph
from branchgraph.ir.text import format_graph
from branchgraph.show import to_text
from branchgraph.show.style import LOOKS, Kind, kind


def line_of(text: str, part: str) -> str:
    (found,) = [line for line in text.splitlines() if part in line]
    return found


def test_every_op_has_a_line_with_its_symbol() -> None:
    g = network()
    lines = to_text(g).splitlines()
    for i, node in enumerate(g.nodes):
        line = next(line for line in lines if line.lstrip().startswith(f"%{i} "))
        assert LOOKS[kind(node)].symbol in line


def test_lines_say_layer_shape_and_parameters() -> None:
    line = line_of(to_text(network()), "stem conv")
    assert "stem conv 3x3, 4, pad 1" in line
    assert "N×4×8×8" in line
    assert line.endswith("112 params")


def test_branches_and_scopes_are_blocks() -> None:
    text = to_text(network())
    for mark in ("┏ branch early", "╭ scope block", "│ ┏ branch left", "│ ┏ branch right"):
        assert mark in text
    assert text.count("┏") == text.count("┗") == 3
    assert "│ ┃ ■ conv 1x1, 4, stride 2" in text


def test_a_merge_lists_what_it_joins_as_seen_from_its_place() -> None:
    line = line_of(to_text(network()), "⊕ join")
    assert "join sum ← left/conv, right/" in line.replace("%", "right/")


def test_a_line_names_what_it_reads_unless_it_is_the_line_above() -> None:
    text = to_text(network())
    assert "←" not in line_of(text, "bn batch norm")
    assert "← %2" in line_of(text, "groups 2")


def test_exits_are_marked_with_criterion_and_threshold() -> None:
    text = to_text(network())
    assert "⇥ early exit entropy < 0.25" in text
    assert "⇥ final exit takes the rest" in text


def test_totals_lead_and_the_legend_ends() -> None:
    text = to_text(network())
    assert text.startswith("net · ")
    assert "parameters · " in text.splitlines()[0]
    legend = text[text.index("\n\n") :]
    assert "⊕ merge" in legend
    assert LOOKS[Kind.LOSS].words not in legend


@pytest.mark.parametrize("width", [10, 60, 100, 160])
def test_lines_fit_the_width(width: int) -> None:
    for graph in (network(), training(network()), named("很长的名字" * 9)):
        lines = to_text(graph, width=width, states=True, updates=True).splitlines()
        wide = max(sum(1 + (ord(c) > 0x2E80) for c in line) for line in lines)
        assert wide <= max(width, 60)


def test_numbers_are_those_of_the_machine_form() -> None:
    assert "%0 = conv(" in format_graph(network())
    assert line_of(to_text(network()), "stem conv").lstrip().startswith("%0 ")


def test_updates_are_listed_when_asked() -> None:
    step = training(network())
    assert "nodes of gradients and updates not drawn" in " ".join(to_text(step).split())
    text = to_text(step, updates=True)
    assert text.count("↺ update of ") == len(step.updates)
    assert text.count("↺ gradient of ") == len(step.gradients)


@pytest.mark.parametrize("name", ODD)
def test_odd_names_stay_on_their_line(name: str) -> None:
    text = to_text(named(name), states=True)
    plain = named(re.sub("[^/]", "x", name))
    assert len(text.splitlines()) == len(to_text(plain, states=True).splitlines())
    text.encode()


def test_empty_and_unfinished_graphs_are_drawn() -> None:
    assert to_text(Graph("empty")).startswith("empty · 0 parameters")
    g = Graph("unfinished")
    relu(conv(g.input("x", ("N", 1, 4, 4)), 2, 3))
    assert "ƒ ReLU" in to_text(g)
