"""Class activation maps and the loss over heat maps (vbranch, section 2.11)."""

from __future__ import annotations

import numpy as np
import pytest

from branchgraph.ir.activation_maps import class_activation_map, heat_map_loss
from branchgraph.ir.errors import ShapeError
from branchgraph.ir.gradient import vjp
from branchgraph.ir.graph import Graph
from branchgraph.ir.interpret import interpret
from branchgraph.ir.types import DType
from tests.builders import EXACT


def net(channels: int = 3, size: tuple[int, int] | None = None) -> Graph:
    graph = Graph("map")
    h = graph.input("h", ("N", channels, 4, 2), DType.F64)
    graph.output("cam", class_activation_map(h, size))
    return graph


def activations(n: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 3, 4, 2))


def test_a_map_is_the_mean_over_channels_between_its_least_and_greatest() -> None:
    h = activations()
    got = interpret(net(), {"h": h}).outputs["cam"]
    mean = h.mean(axis=1)
    for image, cam in zip(mean, got):
        np.testing.assert_allclose(cam, (image - image.min()) / np.ptp(image), **EXACT)
    assert got.shape == (2, 4, 2)


def test_maps_are_resized_before_they_are_normalised() -> None:
    h = activations()
    got = interpret(net(size=(8, 4)), {"h": h}).outputs["cam"]

    def twice(n: int) -> np.ndarray:
        """Linear interpolation of n pixels at the centres of 2 n."""
        at = np.clip((np.arange(2 * n) + 0.5) / 2 - 0.5, 0, n - 1)
        return np.stack([np.interp(at, np.arange(n), row) for row in np.eye(n)], axis=1)

    resized = np.einsum("ih,nhw,jw->nij", twice(4), h.mean(axis=1), twice(2))
    for image, cam in zip(resized, got):
        np.testing.assert_allclose(cam, (image - image.min()) / np.ptp(image), **EXACT)
        assert (cam.min(), cam.max()) == (0, 1)


def test_a_map_without_contrast_is_zero() -> None:
    got = interpret(net(), {"h": np.full((1, 3, 4, 2), 5.0)}).outputs["cam"]
    np.testing.assert_array_equal(got, np.zeros((1, 4, 2)))


def test_the_loss_is_the_sum_over_heat_maps_and_its_gradient_is_exact() -> None:
    graph = net(size=(8, 4))
    cam, heat = graph.outputs["cam"], graph.input("heat", ("N", 8, 4), DType.F64)
    loss = graph.output("loss", heat_map_loss(cam, heat))
    graph.output("slope", vjp(graph, {loss: None}, [graph.inputs["h"]])[graph.inputs["h"]])
    rng = np.random.default_rng(1)
    h, hot, way = activations(), rng.random((2, 8, 4)), rng.normal(size=(2, 3, 4, 2))

    def at(t: float) -> dict[str, np.ndarray]:
        return interpret(graph, {"h": h + t * way, "heat": hot}).outputs

    np.testing.assert_allclose(at(0)["loss"], (hot * at(0)["cam"]).sum(), **EXACT)
    numeric = (at(1e-6)["loss"] - at(-1e-6)["loss"]) / 2e-6
    assert float((at(0)["slope"] * way).sum()) == pytest.approx(float(numeric), rel=1e-6)


def test_other_shapes_are_refused() -> None:
    graph = Graph("net")
    with pytest.raises(ShapeError, match=r"a class activation map needs \[N, C, H, W\]"):
        class_activation_map(graph.input("x", ("N", 4)))
    cam, heat = graph.input("cam", ("N", 4, 2)), graph.input("heat", ("N", 2, 4))
    with pytest.raises(ShapeError, match=r"a heat map is \[N, H, W\] like the map"):
        heat_map_loss(cam, heat)
