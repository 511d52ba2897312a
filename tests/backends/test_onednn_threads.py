"""Threads by kernel: small ones have one, and executables do not disturb each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from branchgraph.backends.onednn import library
from branchgraph.backends.onednn.threads import switch, using, worth
from branchgraph.compiler import Executable, compile
from branchgraph.ir.builder import conv, dense, max_pool, relu
from branchgraph.ir.graph import Graph
from tests.backends.against_numpy import all_kernels, assert_agree, roundings
from tests.builders import randomised


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = library.threads()
    yield
    library.set_threads(before)


def layers() -> Graph:
    """Kernels of very different sizes."""
    graph = Graph("layers")
    h = relu(conv(graph.input("x", ("N", 3, 24, 24)), 32, 3, pad=1))
    h = max_pool(relu(conv(h, 32, 3, pad=1)), 2)
    graph.output("y", dense(max_pool(relu(conv(h, 2, 1)), 6), 5))
    return graph


def images(n: int) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, 3, 24, 24)).astype(np.float32)


def made_for(run: Executable) -> set[int]:
    return {k.threads for k in all_kernels(run)}


def test_work_decides() -> None:
    assert worth(0, 64, 8) == 1
    assert worth(10_000, 0, 8) == 1
    assert worth(10_000_000, 0, 8) == 8
    assert worth(0, 10_000_000, 8) == 8
    assert worth(10_000_000, 0, 1) == 1


def test_small_kernels_have_one_thread_and_numbers_stay_right() -> None:
    graph = layers()
    store = randomised(graph)
    reference = compile(graph, "numpy", store=store.copy())
    run = compile(graph, "onednn", store=store.copy(), threads=2)
    for n in (1, 8, 1, 32):
        feeds = {"x": images(n)}
        assert_agree(run.run(feeds), reference.run(feeds), roundings(graph, N=n))
    assert made_for(run) == {1, 2}


def test_one_thread_is_one_thread() -> None:
    run = compile(layers(), "onednn", store=randomised(layers()), threads=1)
    run.run({"x": images(8)})
    assert made_for(run) == {1}


def test_executables_with_other_threads_take_turns() -> None:
    graph = layers()
    store = randomised(graph)
    runs = {n: compile(graph, "onednn", store=store.copy(), threads=n) for n in (1, 2)}
    feeds = {"x": images(8)}
    first = {n: run.run(feeds)["y"] for n, run in runs.items()}
    for count in (1, 2, 2, 1, 2, 1, 1):
        library.set_threads(3 - count)
        np.testing.assert_array_equal(runs[count].run(feeds)["y"], first[count])
        assert library.threads() == count


def test_a_run_in_another_thread_sets_the_number_there() -> None:
    graph = layers()
    run = compile(graph, "onednn", store=randomised(graph), threads=2)
    run.run({"x": images(4)})
    found: list[int] = []

    def elsewhere() -> None:
        library.set_threads(1)
        run.run({"x": images(4)})
        found.append(library.threads())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [2]


def test_a_number_for_a_while() -> None:
    library.set_threads(2)
    with using(1, 2):
        assert library.threads() == 1
    assert library.threads() == 2
    for call, arguments, _ in switch(1):
        assert call(*arguments) is None
    assert library.threads() == 1
