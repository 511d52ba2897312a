"""Random pipelines over random networks: claims hold, and every pass matches and refuses.

`tools/random_passes.py` runs more seeds and prints the counts; `docs/random_passes.md` has them for
the long campaign.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from math import exp
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_flaws import THEMES, net
from random_nets import CHANNELS, ENDLESS, Dice, endless_gate, headed, image, known, learned
from random_pipelines import NO_REASONS, REASONS, UNREACHED, Tally, kind_of, legal, run

import branchgraph.passes
from branchgraph.ir import gates
from branchgraph.ir.builder import concat, conv, gate, relu
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Role
from branchgraph.ir.verify import verify
from branchgraph.passes.base import Pass
from branchgraph.passes.checking import check_claim, random_store
from branchgraph.passes.fuse_branches import FuseBranches
from branchgraph.passes.harden_gates import HardenGates
from branchgraph.passes.prune_channels import PruneChannels
from branchgraph.passes.prune_gates import PruneGates

#: Seeds of a chunk, chunks of every run, and of one with `--slow`.
CHUNK, CHUNKS, SLOW = 125, 4, 16
#: What 2 000 graphs hold of every pass and of every reason kind.
MATCHES, REFUSALS, GRAPHS = 200, 50, 2000
#: Fewer graphs scatter: they hold what a Poisson count of their share is below so rarely.
RARE = 1e-4

_tallies: dict[int, Tally] = {}


def tally_of(chunk: int) -> Tally:
    """The counts of a chunk of seeds, run once."""
    if chunk not in _tallies:
        found = Tally()
        for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
            found.add(seed)
        _tallies[chunk] = found
    return _tallies[chunk]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_step_keeps_its_claim(chunk: int) -> None:
    found = tally_of(chunk)
    assert not found.failures, "\n\n".join(found.failures)
    assert not found.unlisted


def counted(chunks: int, capsys: pytest.CaptureFixture[str]) -> Tally:
    """The counts of the first chunks, printed."""
    whole = Tally()
    for chunk in range(chunks):
        whole.merge(tally_of(chunk))
    with capsys.disabled():
        print(f"\n{whole}")
    return whole


def floor(number: int, graphs: int) -> int:
    """The least count that is no shortage among `graphs`, of `number` among 2 000.

    In fewer graphs the count k scatters about m = number graphs / 2 000. If it were a Poisson
    count, it would be below the floor in one of 10 000 runs: sum_{i < floor} m^i e^-m / i! <= 1e-4.
    """
    if graphs >= GRAPHS:
        return number * graphs // GRAPHS
    mean = number * graphs / GRAPHS
    term = below = exp(-mean)
    k = 0
    while below <= RARE:
        k += 1
        term *= mean / k
        below += term
    return k


def shortages(found: Tally) -> list[tuple[str, str, int]]:
    """Passes and reasons of which there are fewer than the floor."""
    matches, refusals = floor(MATCHES, found.graphs), floor(REFUSALS, found.graphs)
    rows = list(found.rows())
    few = [(p, "matches", n) for p, _, n, _ in rows if n < matches]
    return few + [(p, k, n) for p, _, _, kinds in rows for k, n in kinds if n < refusals]


def test_the_floors_of_fewer_graphs_leave_room_for_scatter() -> None:
    assert [floor(REFUSALS, n) for n in (0, 2000, 4000)] == [0, 50, 100]
    assert floor(REFUSALS, 500) == 2
    assert floor(MATCHES, 500) == 26


def test_every_pass_matches_and_refuses_for_every_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not shortages(counted(CHUNKS, capsys))


def test_two_thousand_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    found = counted(SLOW, capsys)
    assert found.graphs == GRAPHS
    assert not found.failures
    assert not shortages(found)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(10**6, 2**31))
def test_any_seed(seed: int) -> None:
    run(seed)


@pytest.mark.parametrize("theme", range(len(THEMES)))
def test_networks_of_a_seed_are_the_same_twice(theme: int) -> None:
    one, two = net(theme), net(theme)
    verify(one.graph)
    assert [n.path for n in one.graph.nodes] == [n.path for n in two.graph.nodes]
    assert one.meant == two.meant


# -- what once failed ------------------------------------------------------------------------------
# As networks and passes of their own, since a seed means another network when a motif changes.


def closed_constants(hardened: bool) -> Graph:
    """Channels that are constant, relu of a bias, behind a gate that closes some of them."""
    x = image(Dice(0), "closed_constants")
    constant = relu(conv(gate(x, known(x, 0.0)), CHANNELS, 1, name="constant"))
    shut = known(x, 0.0, 1.0, 0.0, 1.0)
    if hardened:
        shut = gates.hard(learned(x, (CHANNELS, 1, 1), Role.GATE))
    return headed(relu(conv(concat(gate(constant, shut), x), CHANNELS, 1, name="reader")))


@pytest.mark.parametrize("hardened", [False, True])
def test_closed_gates_over_constant_channels_are_not_forgotten(hardened: bool) -> None:
    """Once `prune_channels` took the channels for the constants behind the gate."""
    graph = closed_constants(hardened)
    if hardened:
        store = random_store(set(graph.states), graph.states)
        (score,) = (s for s in graph.states if s.role is Role.GATE)
        store[score] = np.array([-1.0, 1.0, -1.0, 1.0]).reshape(score.shape)
        graph = HardenGates().run(graph, values=store).graph
    result = PruneChannels().run(graph, record=True)
    assert result.report.matches
    check_claim(graph, result.graph, "exact", report=result.report)


def test_no_exact_pass_meets_gates_that_are_not_finite() -> None:
    """`exact` speaks of finite parameters: once `fuse_branches` moved such a gate before a sum."""
    endless = [made for made in map(net, range(200)) if not made.finite]
    assert endless
    for made in endless:
        assert not any(legal(p, made, made.graph) for p in (FuseBranches(), PruneChannels()))
        assert all(legal(p, made, made.graph) for p in (PruneGates(), HardenGates()))
    graph = headed(endless_gate(Dice(0), image(Dice(0), "endless")))
    assert any(node.name.startswith(ENDLESS) for node in graph.nodes)


# -- the table of reasons --------------------------------------------------------------------------

#: Functions whose words are no reasons: other errors, and notes.
_OTHER_WORDS = re.compile(r"(?!Refusal)\w*Error|noted|raise_\w+")
#: Fewer words are names of rules, of ops and of types.
_LEAST_WORDS = 4


def said_by(source: str, errors: bool = False) -> Iterator[str]:
    """Sentences of a module that are no documentation, no error and no note; `*` for fields.

    `errors` takes in errors and notes: some refusals repeat the words of another error.
    """
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            skipped |= {s.value for s in node.body if isinstance(s, ast.Expr)} - set(_calls(node))
        elif isinstance(node, ast.Call) and _OTHER_WORDS.fullmatch(_name(node.func)) and not errors:
            skipped |= set(ast.walk(node))
        elif isinstance(node, ast.JoinedStr):
            skipped |= set(ast.walk(node)) - {node}
    for node in ast.walk(tree):
        text = "" if node in skipped else _text(node).strip()
        if len(text.split()) >= _LEAST_WORDS:
            yield text


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    return (n for n in ast.walk(node) if isinstance(n, ast.Call))


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(v) if isinstance(v, ast.Constant) else "*" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def is_in(sentence: str, kinds: list[str]) -> bool:
    """Whether a kind has the words of a sentence: all of them, or as a part of its own."""
    words = re.compile(".*".join(map(re.escape, sentence.split("*"))), re.DOTALL)
    filled = [re.compile(".*".join(map(re.escape, k.split("*"))), re.DOTALL) for k in kinds]
    return any(words.search(k) for k in kinds) or any(k.fullmatch(sentence) for k in filled)


def test_no_reason_of_a_pass_is_missing() -> None:
    """Every sentence in the modules of the passes is a listed reason or known to be none.

    So a reason that a pass learns fails here until it is listed, and then random graphs must
    reach it.
    """
    kinds = [*(k for listed in REASONS.values() for k in listed), *UNREACHED, *NO_REASONS]
    root = Path(branchgraph.passes.__file__).parent
    missing = [
        f"{path.relative_to(root)}: {sentence}"
        for path in sorted(root.rglob("*.py"))
        for sentence in said_by(path.read_text(encoding="utf-8"))
        if not is_in(sentence, kinds)
    ]
    assert not missing, "\n".join(missing)


def test_every_listed_reason_is_said_by_a_pass() -> None:
    root = Path(branchgraph.passes.__file__).parents[1]
    paths = [p for room in ("passes", "ir") for p in (root / room).rglob("*.py")]
    said = {s for path in paths for s in said_by(path.read_text(encoding="utf-8"), errors=True)}
    kinds = [*(k for kinds in REASONS.values() for k in kinds), *UNREACHED]
    listed = [k.removeprefix("R").removeprefix("*: ") for k in kinds]  # behind where it was
    assert not [k for k in listed if not any(is_in(s, [k]) or is_in(k, [s]) for s in said)]


def test_reasons_that_no_graph_reaches_are_refused_elsewhere() -> None:
    """Each names a test, which is there."""
    for reason, (_, test) in UNREACHED.items():
        name, _, function = test.partition("::")
        found = list(Path(__file__).parents[1].rglob(name))
        assert found, f"{reason}: no file {name}"
        assert f"def {function}(" in found[0].read_text(encoding="utf-8"), f"{reason}: no {test}"


def test_reasons_are_told_apart() -> None:
    assert set(REASONS) <= set(Pass.registry)
    assert kind_of("fuse_branches", "R8: conv2 is read elsewhere too") == (
        "R*: * is read elsewhere too"
    )
    assert kind_of("deepen", "no such thing").startswith("unlisted: ")
