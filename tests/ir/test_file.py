"""A file gives back what was saved, bit for bit, and a failed save leaves the old file alone."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from builders import branches_of_every_kind, one_norm_applied_twice, random_graphs, randomised
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open

import branchgraph.ir.atomic as atomic
import branchgraph.ir.file as file_module
from branchgraph.ir.atomic import replacing
from branchgraph.ir.builder import dense, relu
from branchgraph.ir.errors import BranchgraphError, FormatError, MissingError
from branchgraph.ir.file import load, load_graph, load_values, save
from branchgraph.ir.gradient import differentiate
from branchgraph.ir.graph import Graph
from branchgraph.ir.optimisers import Adam
from branchgraph.ir.state import State, Store
from branchgraph.ir.text import Labels, format_graph, parse_graph
from branchgraph.ir.types import DType
from branchgraph.ir.verify import verify
from branchgraph.passes.specialise import specialise
from branchgraph.training import joint_loss


def by_label(graph: Graph, store: Store) -> dict[str, np.ndarray]:
    return {label: store[s] for s, label in Labels(graph).states.items() if s in store}


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for label, value in first.items():
        assert value.dtype == second[label].dtype
        assert value.shape == second[label].shape
        assert value.tobytes() == second[label].tobytes()


def assert_round_trip(path: Path, graph: Graph, store: Store) -> None:
    save(path, graph, store)
    loaded, values = load(path)
    verify(loaded)
    assert format_graph(loaded) == format_graph(graph)
    assert format_graph(load_graph(path)) == format_graph(graph)
    assert_same_bits(by_label(graph, store), by_label(loaded, values))


def reading(*states: State) -> Graph:
    graph = Graph("reads")
    for i, state in enumerate(states):
        graph.output(f"y{i}", graph.read(state))
    return graph


def small() -> tuple[Graph, Store]:
    graph = Graph("small")
    graph.output("y", relu(dense(graph.input("x", ("N", 3)), 2, name="fc")))
    return graph, Store.initialised(graph.states, seed=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.bg"


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [branches_of_every_kind, one_norm_applied_twice])
def test_networks_round_trip(build, path: Path) -> None:  # type: ignore[no-untyped-def]
    graph = build()
    assert_round_trip(path, graph, randomised(graph))


def test_a_training_step_with_slots_and_random_key_round_trips(path: Path) -> None:
    training = specialise(branches_of_every_kind(), training=True)
    step = Adam().attach(differentiate(joint_loss(training)))
    assert_round_trip(path, step, randomised(step))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=random_graphs())
def test_random_networks_round_trip(graph: Graph, path: Path) -> None:
    assert_round_trip(path, graph, randomised(graph))


@pytest.mark.parametrize("dtype", DType)
def test_every_dtype_keeps_its_bits(dtype: DType, path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 256, 24 * dtype.itemsize).astype(np.uint8)
    values = (bits & 1 if dtype is DType.BOOL else bits).view(dtype.numpy).reshape(2, 3, 4)
    state = State("w", (2, 3, 4), dtype)
    save(path, reading(state), Store({state: values}))
    graph, store = load(path, allow_nonfinite=True)
    assert store[graph.states[0]].dtype == dtype.numpy
    assert store[graph.states[0]].tobytes() == values.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0, 2)])
def test_scalars_and_empty_arrays_round_trip(shape: tuple[int, ...], path: Path) -> None:
    state = State("w", shape)
    assert_round_trip(path, reading(state), Store.initialised([state]))


def test_states_that_share_a_name_keep_their_own_values(path: Path) -> None:
    states = [State("w", (2,)) for _ in range(3)]
    store = Store({s: np.full(2, i, np.float32) for i, s in enumerate(states)})
    assert_round_trip(path, reading(*states), store)
    graph, loaded = load(path)
    assert [s.name for s in graph.states] == ["w", "w", "w"]
    assert [loaded[s][0] for s in graph.states] == [0, 1, 2]


def test_states_that_share_a_name_stay_apart_when_nodes_read_them_out_of_order(path: Path) -> None:
    first, second = State("w", ()), State("w", ())
    graph = Graph("order")
    one, two = graph.read(first), graph.read(second)
    graph.output("a", relu(two))
    graph.output("b", relu(one))
    store = Store({first: np.float32(1), second: np.float32(2)})
    assert_round_trip(path, graph, store)
    other = Store()
    load_values(path, graph, other)
    assert (other[first], other[second]) == (1, 2)


def test_states_that_nothing_uses_and_states_only_updated_survive(path: Path) -> None:
    unused, updated, used = State("unused", ()), State("updated", ()), State("used", ())
    graph = Graph("corners")
    graph.read(unused)
    graph.update(updated, graph.read(used))
    store = Store.initialised(graph.states)
    assert_round_trip(path, graph, store)
    loaded, _ = load(path)
    assert [s.name for s in loaded.reads] == ["unused", "used"]


def test_unusual_names_and_no_states_round_trip(path: Path) -> None:
    names = ["état ü", 'quote"and\\', "graph", "a~2", "a", "", "x\ny"]
    states = [State(n, ()) for n in [*names, *names]]
    assert_round_trip(path, reading(*states), Store.initialised(states))
    assert_round_trip(path, reading(), Store())


def test_a_state_without_a_value_stays_without_one(path: Path) -> None:
    known, unknown = State("known", (1,)), State("unknown", (1,))
    save(path, reading(known, unknown), Store.initialised([known]))
    graph, store = load(path)
    assert [(s.name, s in store) for s in graph.states] == [("known", True), ("unknown", False)]


def test_other_values_of_the_store_stay_out(path: Path) -> None:
    graph, store = small()
    store[State("elsewhere", ())] = np.zeros(())
    save(path, graph, store)
    assert len(load(path)[1]) == len(graph.states)


def test_a_file_is_plain_safetensors(path: Path) -> None:
    graph, store = small()
    save(path, graph, store)
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == {"fc.weight", "fc.bias"}
        assert file.metadata() == {
            "format": "branchgraph", "version": "1", "needs": "0.1.0", "graph": format_graph(graph),
        }  # fmt: skip


def test_loaded_values_may_be_edited_and_the_file_replaced(path: Path) -> None:
    graph, store = small()
    save(path, graph, store)
    loaded, values = load(path)
    for state in loaded.states:
        values[state][:] = 7
    save(path, loaded, values)
    again, values = load(path)
    assert all((values[s] == 7).all() for s in again.states)


def test_strided_values_are_saved_as_they_read(path: Path) -> None:
    state = State("w", (3, 2))
    store = Store()
    store.commit(state, np.arange(6, dtype=np.float32).reshape(2, 3).T)
    assert_round_trip(path, reading(state), store)


@pytest.mark.parametrize("value", [np.zeros((3, 2)), np.zeros((2, 3), np.float32)])
def test_a_value_that_is_not_what_its_state_declares_is_refused(
    value: np.ndarray, path: Path
) -> None:
    state, store = State("w", (3, 2)), Store()
    store.commit(state, value)
    with pytest.raises(BranchgraphError, match=r"net.bg: state w is declared f32\[3, 2\], but"):
        save(path, reading(state), store)


def test_the_name_that_safetensors_keeps_is_refused(path: Path) -> None:
    state = State("__metadata__", ())
    with pytest.raises(BranchgraphError, match="rename it"):
        save(path, reading(state), Store.initialised([state]))


# -- values into a store in use --------------------------------------------------------------------


def test_values_go_to_the_states_of_another_graph_by_label(path: Path) -> None:
    graph, store = small()
    save(path, graph, store)
    same, other = small()[0], Store()
    load_values(path, same, other)
    assert_same_bits(by_label(same, other), by_label(graph, store))


def test_states_that_one_side_lacks_are_named_unless_partial(path: Path) -> None:
    a, b, c = State("a", ()), State("b", ()), State("c", ())
    save(path, reading(a, b), Store({a: np.float32(1), b: np.float32(2)}))
    store = Store()
    with pytest.raises(FormatError, match="the file misses c and has unexpected a") as caught:
        load_values(path, reading(b, c), store)
    assert "partial=True" in str(caught.value)
    assert len(store) == 0
    load_values(path, reading(b, c), store, partial=True)
    assert (store[b], c in store) == (2, False)


def test_a_state_saved_without_a_value_keeps_the_one_it_has(path: Path) -> None:
    a, b = State("a", ()), State("b", ())
    save(path, reading(a, b), Store({a: np.float32(1)}))
    store = Store({b: np.float32(5)})
    load_values(path, reading(a, b), store)
    assert (store[a], store[b]) == (1, 5)


def test_a_value_of_another_shape_leaves_the_store_as_it_was(path: Path) -> None:
    a, w = State("a", ()), State("w", (2, 3))
    save(path, reading(a, w), Store.initialised([a, w]))
    store = Store()
    with pytest.raises(FormatError, match=r"state w: expected F32\[3, 2\] .* got F32\[2, 3\]"):
        load_values(path, reading(a, State("w", (3, 2))), store)
    assert len(store) == 0


# -- values that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32, DType.F64])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_need_a_word(dtype: DType, number: float, path: Path) -> None:
    state = State("w", (5,), dtype)
    save(path, reading(state), Store({state: np.array([0, number, 1, number, 2])}))
    with pytest.raises(FormatError, match=r"net.bg: state w: .*2 of 5.*allow_nonfinite=True"):
        load(path)
    graph, store = load(path, allow_nonfinite=True)
    assert np.count_nonzero(np.isfinite(store[graph.states[0]])) == 3


# -- files appear whole or not at all --------------------------------------------------------------


@contextlib.contextmanager
def nothing_changes(path: Path) -> Iterator[None]:
    """What stands at `path` and beside it is the same afterwards."""
    before, listing = path.read_bytes(), sorted(os.listdir(path.parent))
    yield
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == listing


def large() -> tuple[Graph, Store]:
    state = State("w", (2**16,))
    return reading(state), Store.initialised([state])


@pytest.fixture
def saved(path: Path) -> Path:
    save(path, *small())
    return path


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_exception_while_writing_leaves_the_old_file(
    error: type[BaseException], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arrays: object, name: Path, metadata: object) -> None:
        Path(name).write_bytes(b"half")
        raise error

    monkeypatch.setattr(file_module, "save_file", fail)
    with nothing_changes(saved), pytest.raises(error):
        save(saved, *large())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_refusing_system_leaves_the_old_file_and_says_why(
    call: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic.os, call, refuse)
    message = r"net.bg: cannot be written: Permission denied; .*unchanged"
    with nothing_changes(saved), pytest.raises(BranchgraphError, match=message):
        save(saved, *large())


@pytest.mark.parametrize("room", [0, 100, 5000, 2**17])
def test_a_full_disk_leaves_the_old_file(room: int, saved: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    graph, store = large()
    with nothing_changes(saved):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(BranchgraphError, match=r"net.bg: cannot be written: .*Make room"):
                save(saved, graph, store)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_is_silently_cut_short_never_replaces_a_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = file_module.save_file

    def cut_short(arrays: object, name: Path, metadata: object) -> None:
        write(arrays, name, metadata)
        os.truncate(name, os.path.getsize(name) - 1)

    monkeypatch.setattr(file_module, "save_file", cut_short)
    with nothing_changes(saved), pytest.raises(BranchgraphError, match=r"net.bg: cannot be"):
        save(saved, *large())


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"there is no folder .*absent; create it first"):
        save(tmp_path / "absent" / "net.bg", *small())


def test_a_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(BranchgraphError, match="expected the name of a file, got a folder"):
        save(tmp_path, *small())


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(MissingError, match=r"net.bg: there is no such file"):
        load(path)


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_permissions_and_links_outlive_a_save(tmp_path: Path) -> None:
    target, link = tmp_path / "epoch1.bg", tmp_path / "latest.bg"
    save(target, *small())
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    target.chmod(0o640)
    link.symlink_to(target)
    save(link, *large())
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert load_graph(target).name == "reads"


def test_replacing_writes_any_kind_of_file(tmp_path: Path) -> None:
    target = tmp_path / "log.csv"
    for content in ("first", "second"):
        with replacing(target) as temporary:
            temporary.write_text(content)
        assert target.read_text() == content
    assert os.listdir(tmp_path) == ["log.csv"]


def test_relative_paths_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    graph, store = small()
    save("net.bg", graph, store)
    assert format_graph(load("net.bg")[0]) == format_graph(graph)


def test_parsed_text_declares_the_same_labels() -> None:
    graph = branches_of_every_kind()
    labels = Labels(graph).states.values()
    assert list(Labels(parse_graph(format_graph(graph))).states.values()) == list(labels)
