"""States, stores and initial values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from branchgraph.ir.attributes import format_value
from branchgraph.ir.errors import GraphError, ShapeError
from branchgraph.ir.initialisers import (
    Constant,
    GlorotUniform,
    HeNormal,
    IdentityKernel,
    Initialiser,
    LeCunNormal,
    Normal,
    Ones,
    Uniform,
    Zeros,
)
from branchgraph.ir.state import Role, State, Store
from branchgraph.ir.types import DType


def test_states_are_told_apart_by_identity() -> None:
    one, other = State("w", (2,)), State("w", (2,))
    store = Store({one: np.ones(2), other: np.zeros(2)})
    assert store[one].sum() == 2
    assert store[other].sum() == 0


def test_a_store_checks_shapes_and_converts_dtypes() -> None:
    state = State("w", (2,), DType.F16)
    store = Store({state: np.array([1.0, 2.0])})
    assert store[state].dtype == np.float16
    with pytest.raises(ShapeError, match=r"state w: expected shape \[2\], got \[3\]"):
        store[state] = np.ones(3)


def test_a_value_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(GraphError, match="state w has no value; call store.initialise"):
        Store()[State("w", ())]


def test_a_store_copies_what_it_is_given() -> None:
    given = np.ones(2, np.float32)
    state = State("w", (2,))
    store = Store({state: given})
    given[0] = 9
    assert store[state][0] == 1
    copy = store.copy()
    store[state][0] = 5
    assert copy[state][0] == 1


def test_initial_values_depend_on_seed_name_and_occurrence_only() -> None:
    def draw(names: list[str], seed: int = 0) -> list[np.ndarray]:
        states = [State(n, (4,), init=Normal(std=1.0)) for n in names]
        store = Store.initialised(states, seed)
        return [store[s] for s in states]

    a, b = draw(["a", "b"])
    again, between, same = draw(["b", "x", "a"])
    assert (again == b).all()
    assert (same == a).all()
    assert (between != a).all()
    first, second = draw(["a", "a"])
    assert (first == a).all()
    assert (first != second).all()
    assert (draw(["a"], seed=1)[0] != a).all()


def test_initialising_again_keeps_values() -> None:
    state = State("w", (2,))
    store = Store({state: np.array([1.0, 2.0])})
    store.initialise([state], seed=3)
    assert store[state].tolist() == [1.0, 2.0]


def test_the_key_of_the_random_streams_is_the_seed() -> None:
    key = State("random.key", (2,), DType.U32, Role.KEY)
    assert Store.initialised([key], seed=5 + 7 * 2**32)[key].tolist() == [5, 7]


SPREADS = {
    Normal(std=0.3): 0.3,
    Uniform(low=-1.0, high=1.0): 1 / math.sqrt(3),
    LeCunNormal(fan_in=50): math.sqrt(1 / 50),
    LeCunNormal(fan_in=50, scale=2.0): 2 * math.sqrt(1 / 50),
    HeNormal(fan=50): math.sqrt(2 / 50),
    GlorotUniform(fan_in=30, fan_out=20): math.sqrt(2 / 50),
}


@pytest.mark.parametrize("init", SPREADS, ids=lambda i: i.spelling)
def test_random_initialisers_have_the_published_spread(init: Initialiser) -> None:
    values = init.values((200, 100), np.random.default_rng(0))
    # 20 000 draws: the standard deviation is within 2 %, the mean within 3 % of it.
    assert values.std() == pytest.approx(SPREADS[init], rel=0.02)
    assert abs(values.mean()) < 0.03 * SPREADS[init]


@pytest.mark.parametrize(("init", "value"), [(Zeros(), 0), (Ones(), 1), (Constant(value=2.5), 2.5)])
def test_constant_initialisers(init: Initialiser, value: float) -> None:
    assert (init.values((3,), np.random.default_rng(0)) == value).all()


def test_an_identity_kernel_gives_back_its_input() -> None:
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(IdentityKernel().values((3, 3), rng), np.eye(3))
    kernel = IdentityKernel().values((2, 2, 3, 5), rng)
    assert kernel.sum() == 2
    assert kernel[0, 0, 1, 2] == kernel[1, 1, 1, 2] == 1


def test_every_initialiser_is_tested_and_registered() -> None:
    tested = {type(i).spelling for i in SPREADS} | {"zeros", "ones", "constant", "identity_kernel"}
    assert tested == set(Initialiser.registry)


def test_a_state_needs_concrete_sizes() -> None:
    with pytest.raises(ShapeError, match="concrete sizes"):
        State("w", (-1,))


def test_dtypes_have_one_spelling() -> None:
    for dtype in DType:
        assert DType.of(str(dtype)) is dtype is DType.of(dtype.numpy)
        assert format_value(dtype) == dtype.value
    with pytest.raises(ShapeError, match="unknown dtype 'c64'; known: bool"):
        DType.of("c64")


def test_the_version_tells_writes_and_edits_by_those_who_hold_an_array() -> None:
    state = State("a", (3,))
    store = Store({state: np.zeros(3)})
    version = store.version()
    assert store.version() == version
    held = store[state]
    held[0] = 1.0
    assert store.version() != version
    version = store.version()
    assert store.version() == version  # held, not edited
    view = held[1:]
    del held
    view[0] = 2.0
    assert store.version() != version
    del view
    version = store.version()
    store[state][2] = 3.0  # edited and let go between two looks
    assert store.version() != version


@pytest.mark.parametrize("write", ["set", "commit", "written"])
def test_every_write_is_another_version(write: str) -> None:
    state = State("a", (3,))
    store = Store({state: np.zeros(3)})
    version = store.version()
    if write == "set":
        store[state] = np.ones(3)
    elif write == "commit":
        store.commit(state, np.ones(3))
    else:
        store.written(state)
    assert store.version() != version
