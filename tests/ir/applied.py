"""Functions of values applied to arrays: results, derivatives, and derivatives by differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph, Value
from branchgraph.ir.interpret import interpret
from branchgraph.ir.ops.constant import Full
from branchgraph.ir.types import DType

Build = Callable[..., Value]

#: float64 against float64 by another order of summation.
SAME_FORMULA = {"rtol": 1e-12, "atol": 1e-12}
#: Central differences of step 1e-6 err by step^2 and by 1e-16 / step, both far below this.
DERIVATIVE = {"rtol": 1e-6, "atol": 1e-7}
STEP = 1e-6


def declared(build: Build, *arrays: np.ndarray) -> tuple[Graph, list[Value], Value]:
    """A graph with an input for every array, and `build` applied to them."""
    graph = Graph("applied")
    values = [graph.input(f"x{i}", x.shape, DType.of(x.dtype)) for i, x in enumerate(arrays)]
    return graph, values, build(*values)


def result(build: Build, *arrays: np.ndarray) -> np.ndarray:
    """`build` applied to arrays."""
    arrays = tuple(np.asarray(x) for x in arrays)
    graph, _, y = declared(build, *arrays)
    graph.output("y", y)
    return interpret(graph, {f"x{i}": x for i, x in enumerate(arrays)}).outputs["y"]


def gradients(build: Build, *arrays: np.ndarray, dy: np.ndarray | None = None) -> list[np.ndarray]:
    """Cotangents of the floating arrays; `dy` is ones by default."""
    arrays = tuple(np.asarray(x) for x in arrays)
    graph, values, y = declared(build, *arrays)
    wanted = [v for v in values if v.dtype.is_float]
    found = vjp(graph, {y: graph.input("dy", y.shape, y.dtype)}, wanted)
    for value in wanted:
        zeros = Full(0.0, value.shape, value.dtype)
        graph.output(f"d{value.name}", found.get(value) or graph.emit(zeros))
    feeds = {f"x{i}": x for i, x in enumerate(arrays)}
    shape = tuple(int(str(d)) for d in y.shape)
    feeds["dy"] = np.ones(shape) if dy is None else dy
    return list(interpret(graph, feeds).outputs.values())


def assert_derivatives(build: Build, *arrays: np.ndarray) -> None:
    """The gradients of `build` are those of central differences in float64."""
    y = result(build, *arrays)
    dy = np.cos(np.arange(y.size) + 0.5).reshape(y.shape)
    found = iter(gradients(build, *arrays, dy=dy))
    for i, x in enumerate(arrays):
        if x.dtype.kind != "f":
            continue
        slope = np.zeros(x.shape)
        for at in np.ndindex(x.shape):
            sides = []
            for step in (STEP, -STEP):
                moved = x.copy()
                moved[at] += step
                sides.append(result(build, *arrays[:i], moved, *arrays[i + 1 :]))
            slope[at] = ((sides[0] - sides[1]) * dy).sum() / (2 * STEP)
        np.testing.assert_allclose(next(found), slope, **DERIVATIVE, err_msg=f"operand {i}")
