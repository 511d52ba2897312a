"""Recordings of the original frameworks, replayed on oneDNN by the tests that replay them on NumPy.

The tests below are those of the front ends, networks and exits, collected once more in this module,
where the name `numpy` leads to the oneDNN backend. Those that run the same kernels once more (ops
one by one, 10,000 images at 17 thresholds) run with `--slow`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from branchgraph.chainer import recorder
from branchgraph.compiler import backend
from tests.backends.libdnnl import require_libdnnl
from tests.chainer.test_goldens import GROUPS, replayer
from tests.chainer.test_goldens import test_every_recorded_case_passes as replay
from tests.mx.test_operator_goldens import (
    recorded,
    test_arrays_are_overwritten_as_by_mxnet,
    test_gradients_and_states_are_those_of_mxnet,
    test_outputs_are_those_of_mxnet,
    test_random_outputs_keep_the_relations_of_the_recorded_ones,
)
from tests.nets.test_deepfusion import (
    test_networks_infer_as_in_mxnet,
    test_networks_train_as_in_mxnet,
)
from tests.passes.test_lower_exits import (
    published,
    test_every_criterion_follows_its_definition,
    test_logits_and_entropies_of_the_published_network,
    test_rows_that_stay_get_the_logits_that_no_input_reaches,
    test_selected_rows_get_the_logits_of_their_exit_in_input_order,
)
from tests.passes.test_lower_exits import (
    test_all_seventeen_published_rows_are_reproduced_exactly as reproduce_published_rows,
)

require_libdnnl()

__all__ = [
    "published",
    "recorded",
    "replayer",
    "test_arrays_are_overwritten_as_by_mxnet",
    "test_every_criterion_follows_its_definition",
    "test_gradients_and_states_are_those_of_mxnet",
    "test_logits_and_entropies_of_the_published_network",
    "test_networks_infer_as_in_mxnet",
    "test_networks_train_as_in_mxnet",
    "test_outputs_are_those_of_mxnet",
    "test_random_outputs_keep_the_relations_of_the_recorded_ones",
    "test_rows_that_stay_get_the_logits_that_no_input_reaches",
    "test_selected_rows_get_the_logits_of_their_exit_in_input_order",
]


@pytest.fixture(scope="module", autouse=True)
def _on_onednn() -> Iterator[None]:
    """`numpy` is oneDNN here; programs that the Chainer recorder remembers stay outside."""
    remembered = recorder.recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backend._MODULES, "numpy", backend._MODULES["onednn"])
        patch.setattr(remembered, "_programs", {})
        yield


@pytest.mark.parametrize("group", GROUPS)
def test_every_recorded_case_passes(replayer: ModuleType, group: str) -> None:
    replay(replayer, group, True)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_recorded_case_passes_op_by_op(replayer: ModuleType, group: str) -> None:
    replay(replayer, group, False)


@pytest.mark.slow
def test_all_seventeen_published_rows_are_reproduced_exactly(published: Any) -> None:
    reproduce_published_rows(published)
