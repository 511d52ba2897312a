"""Random pipelines over random networks: claims hold, and every pass matches and refuses.

`tools/random_passes.py` runs more seeds and prints the counts; `docs/random_passes.md` has them for
the long campaign.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_flaws import THEMES, net
from random_pipelines import REASONS, Tally, kind_of, run

from branchgraph.ir.verify import verify
from branchgraph.passes.base import Pass

#: Seeds of a chunk, chunks of every run, and of one with `--slow`.
CHUNK, CHUNKS, SLOW = 125, 4, 16
#: What 2 000 graphs hold of every pass and of every reason kind.
MATCHES, REFUSALS = 200, 50
#: The part of that which is asserted: a few reasons are rarer still (docs/random_passes.md).
SHARE = 0.3

#: Seeds that once failed, and what failed.
REGRESSIONS: dict[int, str] = {
    5636: "prune_channels forgot a closed gate over constant channels",
    3243: "the same, behind hardened gates",
}

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


def shortages(found: Tally, share: float) -> list[tuple[str, str, int]]:
    """Passes and reasons of which there are fewer than `share` of what 2 000 graphs hold."""
    part = share * found.graphs / 2000
    rows = list(found.rows())
    few = [(p, "matches", n) for p, _, n, _ in rows if n < MATCHES * part]
    return few + [(p, k, n) for p, _, _, kinds in rows for k, n in kinds if n < REFUSALS * part]


def test_every_pass_matches_and_refuses_for_every_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not shortages(counted(CHUNKS, capsys), SHARE)


@pytest.mark.slow
def test_two_thousand_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    found = counted(SLOW, capsys)
    assert found.graphs == 2000
    assert not found.failures
    assert not shortages(found, SHARE)


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_seeds_that_once_failed(seed: int) -> None:
    run(seed)


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


def test_reasons_are_told_apart() -> None:
    assert set(REASONS) <= set(Pass.registry)
    assert kind_of("fuse_branches", "R8: conv2 is read elsewhere too") == (
        "R*: * is read elsewhere too"
    )
    assert kind_of("deepen", "no such thing").startswith("unlisted: ")
