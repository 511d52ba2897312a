"""The weights of a plain network in a branched one (vbranch, section 3 and acceptance check 2)."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from branchgraph.ir.builder import dense
from branchgraph.ir.errors import GraphError
from branchgraph.ir.graph import Graph
from branchgraph.ir.state import Role, Store
from branchgraph.nets.vbranch import SharingWarning, fcn, slice_into
from tests.builders import EXACT
from tests.nets.vbranch_nets import batch, outputs, scattered, small


def check_branches_are_the_plain_network(name: str, **options: object) -> None:
    plain = small(name)
    weights, x = scattered(plain), batch(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SharingWarning)
        branched = small(name, branches=2, **options)
    expected = outputs(plain, weights, x=x)["logits"]
    assert np.ptp(expected) > 0.1
    for value in outputs(branched, slice_into(plain, weights, branched), x=x).values():
        np.testing.assert_allclose(value, expected, **EXACT)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", ["fcn", "cnn", "densenet_bc"])
def test_every_branch_computes_what_the_plain_network_does(
    name: str, share: float, legacy: bool
) -> None:
    check_branches_are_the_plain_network(name, shared=(share,), legacy_layout=legacy)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("fcn", (0.3, 1.0, 0.5)),
        ("fcn", (0.0, 0.7, 1.0)),
        ("cnn", (0.5, 0.2, 0.9)),
        ("cnn", (0.0, 1.0, 0.5)),
        ("densenet_bc", (0.0, 1.0, 0.5)),
        ("densenet_bc", (0.6, 0.3, 0.0)),
    ],
)
def test_layers_with_different_shares_may_follow_each_other(
    name: str, shares: tuple[float, ...], legacy: bool
) -> None:
    check_branches_are_the_plain_network(name, shared=shares, legacy_layout=legacy)


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("vbranch_resnet", (0.0,)),
        ("vbranch_resnet", (0.3,)),
        ("vbranch_resnet", (0.5, 0.0, 1.0, 0.25)),
        ("vbranch_resnet", (1.0,)),
        ("densenet", (0.0, 0.29, 1.0, 0.5)),
    ],
)
def test_large_networks_can_be_sliced_too(name: str, shares: tuple[float, ...]) -> None:
    check_branches_are_the_plain_network(name, shared=shares)


def test_running_statistics_follow_their_channels() -> None:
    plain, branched = (small("densenet_bc", branches=b, shared=(0.5,)) for b in (1, 2))
    weights = scattered(plain)
    store = slice_into(plain, weights, branched)
    layer = "conv2_block1_1_bn.running_mean"  # behind a convolution: the plain order
    (before,) = [weights[s] for s in plain.states if s.name == layer]
    after = [store[s] for s in branched.states if s.name.endswith(f"/{layer}")]
    np.testing.assert_array_equal(after, [before, before])
    behind = "pool2_bn.running_mean"  # behind concatenations: all shared halves first
    (before,) = [weights[s] for s in plain.states if s.name == behind]
    after = [store[s] for s in branched.states if s.name.endswith(f"/{behind}")]
    shared = [*range(5), 10, 11, 15, 16]
    order = [*shared, *(k for k in range(20) if k not in shared)]
    np.testing.assert_array_equal(after, [before[order]] * 2)


def test_the_second_bias_of_a_half_starts_at_zero() -> None:
    options = {"sizes": (4, 4), "features": 3, "shared": (0.5,), "legacy_layout": True}
    plain, branched = fcn(**options), fcn(branches=2, **options)
    store = slice_into(plain, scattered(plain), branched)
    zero = {s.name for s in branched.states if s.role is Role.PARAMETER and not store[s].any()}
    assert zero == {
        f"branch{i}/{layer}.bias_{half}"
        for i in (1, 2) for layer in ("fc2", "fc") for half in ("us", "uu")
    }  # fmt: skip


def test_a_plain_network_takes_the_weights_as_they_are() -> None:
    plain, again = small("densenet_bc"), small("densenet_bc")
    weights = scattered(plain)
    store = slice_into(plain, weights, again)
    for before, after in zip(plain.states, again.states):
        np.testing.assert_array_equal(weights[before], store[after])


def test_another_network_is_refused() -> None:
    plain, other = fcn("v1"), fcn("v2", branches=2, shared=(0.5,))
    with pytest.raises(GraphError, match=r"fcn has no state fc2\.weight for fc2"):
        slice_into(plain, scattered(plain), other)
    narrow = fcn(sizes=(8,), branches=2, shared=(0.5,))
    with pytest.raises(GraphError, match=r"the plain state is \[512, 784\], expected \[8, 784\]"):
        slice_into(plain, scattered(plain), narrow)


def test_an_order_that_cannot_be_followed_is_refused() -> None:
    plain = Graph("net")
    plain.output("y", dense(plain.input("x", ("N", 2, 3)), 4, name="fc"))
    with pytest.raises(GraphError, match=r"fc\.weight: cannot tell in which order the channels"):
        slice_into(plain, Store.initialised(plain.states), plain)
