"""How the time to rewrite a graph grows with its size.

    python benchmarks/rewriting.py [--sizes 1000 3000 10000]

Three kinds of graph of N nodes, each with one set of rules, rewritten until nothing is left:

    residual   blocks h + relu(relu(conv(h))): two rules, matches all along one path
    chain      relu(relu(relu(...))): one rule, every rewrite makes the next match
    star       N / 3 pairs tanh(relu(x)) of one x, added up in a tree: one value everybody reads
    siblings   the pairs of a star made one by a rule over all readers of x

Prints nodes, rewrites, seconds, and rewrites and nodes a second. Rewrites alone: the copy and the
verification that `Pass.run` adds are timed by themselves in the last column.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from branchgraph.ir.builder import conv, merge_sum, relu, tanh
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.match import Pattern
from branchgraph.ir.rebuild import clone
from branchgraph.ir.state import State
from branchgraph.ir.verify import verify
from branchgraph.passes.base import Report
from branchgraph.passes.rewriting import Rule, apply_rules

RELU_TWICE = Rule(Pattern(lambda p, x: p.relu(p.relu(x))), lambda m: relu(m["x"]))
ADD_TO_SUM = Rule(Pattern(lambda p, a, b: p.add(a, b)), lambda m: merge_sum(m["a"], m["b"]))
TANH_RELU = Rule(Pattern(lambda p, x: p.tanh(p.relu(x))), lambda m: tanh(m["x"]))
READERS = Rule(
    Pattern(lambda p, x: p.siblings("pairs", x, lambda p, x: p.tanh(p.relu(x)))),
    lambda m: (tanh(m["x"]),) * len(m.each("pairs")),
)


def residual(size: int) -> Graph:
    graph = Graph("residual")
    h = graph.input("x", ("N", 4, 8, 8))
    weight = graph.read(State("weight", (4, 4, 1, 1)))
    for _ in range(size // 4):
        h = h + relu(relu(conv(h, 4, 1, weight=weight, bias=False, name="conv")))
    graph.output("y", h)
    return graph


def chain(size: int) -> Graph:
    graph = Graph("chain")
    h = graph.input("x", ("N", 4))
    for _ in range(size):
        h = relu(h)
    graph.output("y", h)
    return graph


def star(size: int) -> Graph:
    graph = Graph("star")
    x: Value = graph.input("x", ("N", 4))
    level = [tanh(relu(x)) for _ in range(size // 3)]
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2])
        level = [*(a + b for a, b in pairs), *(level[-1:] if len(level) % 2 else ())]
    graph.output("y", level[0])
    return graph


KINDS: dict[str, tuple[Callable[[int], Graph], tuple[Rule, ...]]] = {
    "residual": (residual, (RELU_TWICE, ADD_TO_SUM)),
    "chain": (chain, (RELU_TWICE,)),
    "star": (star, (TANH_RELU,)),
    "siblings": (star, (READERS,)),
}


def measure(kind: str, size: int) -> tuple[int, int, float, float]:
    """Nodes, rewritten nodes, seconds of rewriting, seconds of copying and verifying."""
    build, rules = KINDS[kind]
    graph = build(size)
    start = time.perf_counter()
    copy = clone(graph)
    copied = time.perf_counter() - start
    report = Report(kind)
    start = time.perf_counter()
    apply_rules(copy, rules, report)
    rewriting = time.perf_counter() - start
    start = time.perf_counter()
    verify(copy)
    return graph.size, len(report.matches), rewriting, copied + time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 3000, 10000])
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many is printed")
    options = parser.parse_args()
    print("| graph | nodes | rewrites | seconds | rewrites/s | nodes/s | copy and verify |")
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for size in options.sizes:
            rounds = [measure(kind, size) for _ in range(options.rounds)]
            nodes, rewrites, seconds, rest = min(rounds, key=lambda r: r[2])
            print(
                f"| {kind} | {nodes:,} | {rewrites:,} | {seconds:.3f} | {rewrites / seconds:,.0f} "
                f"| {nodes / seconds:,.0f} | {rest:.3f} |"
            )


if __name__ == "__main__":
    main()
