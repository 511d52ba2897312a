"""User programs give Chainer's numbers, lazily and op by op."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from goldens import EXTRACT
from programs import PROGRAMS, batches, setup

import branchgraph.chainer as chainer
from branchgraph.chainer.recorder import recorder

#: float32 training of a dozen steps: rounding grows through batch normalisation.
AS_CHAINER = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    """What Chainer 7.8.1 gave (see tools/record_chainer_programs.py)."""
    return dict(np.load(EXTRACT / "chainer" / "programs.npz"))


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "op by op"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_a_program_gives_the_numbers_of_chainer(
    program: Any, lazy: bool, recorded: dict[str, np.ndarray]
) -> None:
    with chainer.using_config("lazy", lazy):
        found = program(chainer)
    prefix = program.__name__ + "/"
    assert {prefix + name for name in found} == {k for k in recorded if k.startswith(prefix)}
    for name, array in found.items():
        np.testing.assert_allclose(array, recorded[prefix + name], err_msg=name, **AS_CHAINER)


@pytest.mark.parametrize("read_first", [False, True], ids=["read last", "read before backward"])
@pytest.mark.parametrize("name", ["MomentumSGD", "Adam"])
def test_a_hundred_iterations_compile_twice_at_most(name: str, read_first: bool) -> None:
    net, optimizer = setup(chainer, name)
    data = batches(100)
    recorder().flush()
    before = recorder().compilations
    for x, t in data:
        loss = chainer.functions.softmax_cross_entropy(net(x), t)
        if read_first:
            loss.array  # noqa: B018  (reading runs the forward pass)
        net.cleargrads()
        loss.backward()
        optimizer.update()
        loss.array  # noqa: B018
    assert recorder().compilations - before <= 2
