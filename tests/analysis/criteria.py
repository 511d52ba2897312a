"""A network whose exits go by any criterion."""

from __future__ import annotations

from builders import image_input

from branchgraph.ir.builder import conv, dense, exit, global_average_pool, relu
from branchgraph.ir.graph import Graph, branch


def three_exits(criterion: str) -> Graph:
    """Three early exits and a last one, close enough to agree now and then."""
    graph = Graph("three")
    h = relu(conv(image_input(graph), 4, 3, pad=1))
    previous = []
    for k in (1, 2, 3):
        with branch(f"exit{k}"):
            logits = dense(global_average_pool(h), 4)
            earlier = previous if criterion == "patience" else ()
            exit(logits, f"exit{k}", criterion=criterion, threshold=0.0, previous=earlier)
            previous.append(logits)
        h = relu(conv(h, 4, 3, pad=1))
    exit(dense(global_average_pool(h), 4), "exit4", last=True)
    return graph
