"""DOT sources say what is in the graph: boxes, edges, clusters, kinds, labels and legend."""

import html
import re

import pygraphviz
import pytest
from families import densenet
from pictured import ODD, named, network, training

from branchgraph.ir.builder import (
    batch_norm,
    concat,
    conv,
    dense,
    merge_sum,
    relu,
    scale_gradient,
)
from branchgraph.ir.graph import Graph
from branchgraph.ir.ops.conv import Conv
from branchgraph.ir.state import State
from branchgraph.passes.specialise import specialise
from branchgraph.show import to_dot
from branchgraph.show.style import LOOKS, Kind, kind


def parse(dot: str) -> pygraphviz.AGraph:
    return pygraphviz.AGraph(string=dot)


def drawn(picture: pygraphviz.AGraph) -> list[pygraphviz.Node]:
    return [n for n in picture.nodes() if not n.startswith("legend")]


def kinds(picture: pygraphviz.AGraph) -> list[str]:
    return sorted(n.attr["class"] for n in drawn(picture))


def words(label: str) -> str:
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", label).split()))


def labels(picture: pygraphviz.AGraph) -> list[str]:
    return [words(n.attr["label"]) for n in drawn(picture)]


def clusters(dot: str) -> dict[str, set[str]]:
    """Nodes of each cluster by its label (which pygraphviz does not read where it is HTML-like)."""
    named = dict(re.findall(r"subgraph (cluster_\w+) {[^{}]*?label=<<B>(.*?)</B>>", dot))
    picture = parse(dot)
    return {named[s.name]: set(map(str, s.nodes())) for s in inside(picture) if s.name in named}


def inside(picture: pygraphviz.AGraph) -> list[pygraphviz.AGraph]:
    """Subgraphs at every depth; they live as long as `picture` does."""
    inner = picture.subgraphs()
    return inner + [deeper for s in inner for deeper in inside(s)]


def look(dot: str, label: str, attribute: str) -> str:
    """An attribute of the cluster that is labelled `label`, from the source."""
    (block,) = re.findall(rf"subgraph cluster_\w+ {{([^{{}}]*?)label=<<B>{label}</B>>", dot)
    (value,) = re.findall(rf'{attribute}="?([^" ]*)', block)
    return str(value)


def test_every_op_has_its_box_when_layers_are_not_stacked() -> None:
    g = network()
    picture = parse(to_dot(g, stack=False))
    assert len(drawn(picture)) == len(g.nodes) + len(g.inputs) - 1, "the threshold is folded"
    expected = [kind(n).value for n in g.nodes] + ["input"]
    assert kinds(picture) == sorted(expected)


def test_edges_are_the_reads_of_data() -> None:
    g = network()
    picture = parse(to_dot(g, stack=False, legend=False))
    reads = [v for n in g.nodes for v in n.inputs if not v.state and v.shape != ()]
    assert picture.number_of_edges() == len(reads)
    shapes = [e.attr["label"].strip() for e in picture.edges()]
    assert "N×3×8×8" in shapes
    assert "N×4×4×4" in shapes


def test_edges_go_without_shapes_when_asked() -> None:
    assert "N×4×4×4" in to_dot(network())
    plain = parse(to_dot(network(), shapes=False, legend=False))
    assert not any((e.attr["label"] or "").strip() for e in plain.edges())


def test_the_steps_of_a_layer_share_a_box() -> None:
    picture = parse(to_dot(network()))
    assert kinds(picture) == sorted(
        [
            "input",
            "trainable normalisation activation",
            *("pooling other", "trainable", "exit"),
            *("trainable", "trainable", "gate", "merge"),
            *("random pooling", "trainable", "exit"),
        ]
    )


def test_a_batch_norm_before_a_convolution_belongs_to_it() -> None:
    g = Graph("pre")
    x = g.input("x", ("N", 4, 8, 8))
    g.output("y", conv(relu(batch_norm(x)), 4, 3, name="conv"))
    assert "normalisation activation trainable" in kinds(parse(to_dot(g)))


def test_a_value_that_is_read_twice_ends_its_box() -> None:
    g = Graph("twice")
    h = conv(g.input("x", ("N", 4, 8, 8)), 4, 1)
    g.output("y", merge_sum(h, relu(h)))
    assert {"trainable", "activation", "merge"} <= set(kinds(parse(to_dot(g))))


def test_branches_are_tinted_clusters_and_scopes_are_pale_ones() -> None:
    dot = to_dot(network())
    found = clusters(dot)
    assert set(found) == {"early", "block", "left", "right"}
    looks = {name: look(dot, name, "class") for name in ("early", "left", "right", "block")}
    assert looks == {"early": "branch", "left": "branch", "right": "branch", "block": "scope"}
    assert look(dot, "left", " fillcolor") != look(dot, "block", " fillcolor")
    assert len(found["early"]) == 3
    assert len(found["left"]) == 1
    assert found["left"] < found["block"]


def test_labels_say_the_key_attributes_in_the_spelling_of_the_field() -> None:
    said = "\n".join(labels(parse(to_dot(network()))))
    for text in (
        "stem conv 3x3, 4, pad 1 112 params",
        "conv 3x3, 4, stride 2, pad 1, groups 2 76 params",
        "max pool 2x2/2",
        "global average pool",
        "fc dense 10",
        "early exit entropy < 0.25",
        "final exit takes the rest",
        "gate by gate.score",
        "dropout 0.3",
        "join sum",
    ):
        assert text in said, text


def test_kinds_differ_by_shape_and_colour() -> None:
    picture = parse(to_dot(network()))
    shapes = {n.attr["class"].split()[0]: n.attr["shape"] for n in drawn(picture)}
    assert shapes["gate"] == "diamond"
    assert shapes["merge"] == "invtrapezium"
    assert shapes["exit"] == "doubleoctagon"
    assert shapes["trainable"] == "box"
    assert len({(look.shape, look.fill) for look in LOOKS.values()}) > 12
    assert len({look.symbol for look in LOOKS.values()}) == len(LOOKS) == len(Kind)


def test_the_legend_lists_the_kinds_present_and_no_others() -> None:
    picture = parse(to_dot(network()))
    legend = picture.get_node("legend").attr["label"]
    present = {k for n in drawn(picture) for k in n.attr["class"].split()}
    shown = {k.value for k, look in LOOKS.items() if f">{look.words}" in legend}
    assert shown == present
    assert "loss" not in shown
    assert "merge (trapezium)" in legend
    assert "legend" not in to_dot(network(), legend=False)


def test_the_title_counts_parameters_and_multiplications() -> None:
    g = Graph("small <net>")
    g.output("y", dense(g.input("x", ("N", 4)), 3))
    (title,) = re.findall(r"graph \[.*label=(<<TABLE.*?</TABLE>>)", to_dot(g))
    assert words(title) == "small <net> 15 parameters · 12 MACs per sample >"


def test_states_and_thresholds_are_drawn_when_asked() -> None:
    g = network()
    assert "state" not in kinds(parse(to_dot(g)))
    picture = parse(to_dot(g, states=True))
    assert kinds(picture).count("state") == len(g.states)
    assert "early.threshold = 0.25" in labels(picture)
    assert "stem.weight param" in labels(picture)


def test_parameter_expressions_are_folded_into_the_layer_that_reads_them() -> None:
    g = Graph("quadrants")
    x = g.input("x", ("N", 2, 4, 4))
    halves = [g.read(State(f"half{i}", (3, 2, 1, 1))) for i in range(2)]
    g.output("y", g.emit(Conv((1, 1), (0,) * 4, (1, 1), 1), x, concat(*halves, axis=0), name="c"))
    picture = parse(to_dot(g))
    assert kinds(picture) == ["input", "output", "trainable"]
    assert "c conv 1x1, 6 12 params" in labels(picture)
    assert "merge" in kinds(parse(to_dot(g, states=True)))


def test_shared_parameters_are_said_to_be_shared() -> None:
    g = Graph("shared")
    x = g.input("x", ("N", 2, 4, 4))
    weight = g.read(State("w", (2, 2, 1, 1)))
    op = Conv((1, 1), (0,) * 4, (1, 1), 1)
    g.output("y", g.emit(op, g.emit(op, x, weight, name="a"), weight, name="b"))
    said = labels(parse(to_dot(g)))
    assert "a conv 1x1, 2 4 params" in said
    assert "b conv 1x1, 2 4 params shared" in said


def test_0d_operands_are_named_in_the_label() -> None:
    g = Graph("scaled")
    x = g.input("x", ("N", 2))
    rate = g.input("rate", (), default=0.5)
    g.output("y", scale_gradient(x * rate * 3.0, rate))
    said = "\n".join(labels(parse(to_dot(g))))
    assert "multiply · × rate (0.5)" in said
    assert "multiply · × 3" in said


def test_gradients_and_updates_are_counted_and_drawn_when_asked() -> None:
    step = training(network())
    forward = parse(to_dot(step))
    assert "update" not in kinds(forward)
    assert re.search(r"\d+ nodes of gradients and updates not drawn", to_dot(step))
    everything = parse(to_dot(step, updates=True))
    assert kinds(everything).count("update") == len(step.updates) + len(step.gradients)
    assert "not drawn" not in to_dot(step, updates=True)
    assert {"loss", "output"} <= set(kinds(forward))


def test_an_unfinished_graph_is_drawn_whole() -> None:
    g = Graph("unfinished")
    relu(conv(g.input("x", ("N", 1, 4, 4)), 2, 3))
    assert "trainable activation" in kinds(parse(to_dot(g)))
    assert parse(to_dot(Graph("empty"))).number_of_nodes() == 0


def test_only_small_pictures_rank_across_clusters() -> None:
    assert "newrank" in to_dot(densenet(4))
    assert "newrank" not in to_dot(densenet(14)), "it takes too long where there are many edges"


def test_an_exit_stands_for_its_output() -> None:
    assert "output" not in kinds(parse(to_dot(network())))
    lowered = parse(to_dot(specialise(network(), training=False)))
    assert kinds(lowered).count("output") == 2
    assert "rows" in kinds(lowered)


@pytest.mark.parametrize("options", [{}, {"states": True}, {"stack": False}, {"updates": True}])
def test_the_same_graph_gives_the_same_text(options: dict[str, bool]) -> None:
    assert to_dot(network(), **options) == to_dot(network(), **options)


@pytest.mark.parametrize("name", ODD)
def test_odd_names_do_not_break_the_source(name: str) -> None:
    for options in ({}, {"states": True}):
        picture = parse(to_dot(named(name), **options))
        assert {"input", "output"} < set(kinds(picture))
        svg = picture.draw(format="svg", prog="dot").decode()
        assert svg.rstrip().endswith("</svg>")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("back\\slash\\N", "back\\slash\\N"),
        ("a\nb", "a\\nb"),
        ("<b>bold</b>", "&lt;b&gt;bold&lt;/b&gt;"),
        ("R&D", "R&amp;D"),
        ("größe 層", "größe 層"),
    ],
)
def test_odd_names_are_shown_as_they_are(name: str, shown: str) -> None:
    svg = parse(to_dot(named(name))).draw(format="svg", prog="dot").decode()
    written = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert written.count(shown) >= 4, "title, input, layer, output"


def test_long_names_are_cut() -> None:
    assert not any("x" * 49 in label for label in labels(parse(to_dot(named("x" * 200)))))
