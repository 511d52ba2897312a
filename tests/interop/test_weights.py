"""Weights of other programs: read by content, assigned whole or not at all."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from branchgraph.interop.weights import assign, collect, read_arrays, write_arrays
from branchgraph.ir.errors import FormatError, MissingError
from branchgraph.ir.state import Role, State, Store

WEIGHT = State("conv.weight", (2, 3))
MEAN = State("bn.running_mean", (2,), role=Role.STATISTIC)
NAMES = {WEIGHT: "conv1.weight", MEAN: "bn1.running_mean"}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"conv1.weight": rng.normal(size=(2, 3)), "bn1.running_mean": rng.normal(size=2)}


def assigned(found: dict[str, np.ndarray], **options: bool) -> Store:
    store = Store.initialised(NAMES)
    assign(store, found, NAMES, **options)
    return store


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".params"])
def test_every_kind_of_file_comes_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    write_arrays(path, {k: v.astype(np.float32) for k, v in arrays().items()})
    disguised = path.rename(tmp_path / "weights")  # the content tells the kind
    found = read_arrays(disguised)
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32))


def test_mxnet_prefixes_are_dropped(tmp_path: Path) -> None:
    write_arrays(tmp_path / "w.params", {"arg:w": np.ones(2), "aux:m": np.zeros(2)})
    assert read_arrays(tmp_path / "w.params").keys() == {"w", "m"}


def test_values_are_cast_and_collected_again() -> None:
    store = assigned(arrays())
    assert store[WEIGHT].dtype == np.float32
    np.testing.assert_array_equal(
        collect(store, NAMES)["conv1.weight"], arrays()["conv1.weight"].astype(np.float32)
    )


@pytest.mark.parametrize("prefix", ["module.", "module.1.", "1."])
def test_prefixes_of_wrappers_fall(prefix: str) -> None:
    store = assigned({prefix + k: v for k, v in arrays().items()})
    np.testing.assert_allclose(store[MEAN], arrays()["bn1.running_mean"], rtol=1e-6)


def test_counts_of_batches_are_ignored() -> None:
    assigned({**arrays(), "bn1.num_batches_tracked": np.array(7), "bn1/N": np.array(7)})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "lack conv1.weight, bn1.running_mean"),
        ({"conv1.weight": np.ones((2, 3))}, "lack bn1.running_mean"),
        ({**arrays(), "conv2.weight": np.ones(2)}, "have unexpected conv2.weight"),
        (
            {**arrays(), "conv1.weight": np.ones((3, 2))},
            r"expected f32\[2, 3\] .* got float64\[3, 2\]",
        ),
        ({**arrays(), "conv1.weight": np.ones((2, 3), int)}, "got int64"),
        ({**arrays(), "conv1.weight": np.full((2, 3), np.nan)}, "NaN or infinity"),
    ],
    ids=["nothing", "missing", "unexpected", "shape", "dtype", "nan"],
)
def test_what_does_not_fit_changes_nothing(found: dict[str, np.ndarray], message: str) -> None:
    store = Store.initialised(NAMES)
    before = collect(store, NAMES)
    with pytest.raises(FormatError, match=message):
        assign(store, found, NAMES)
    for name, array in collect(store, NAMES).items():
        np.testing.assert_array_equal(array, before[name])


def test_partial_takes_what_there_is() -> None:
    store = assigned({"conv1.weight": np.ones((2, 3)), "other": np.ones(1)}, partial=True)
    assert store[WEIGHT].min() == 1


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap()))
    with pytest.raises(FormatError, match="safetensors.torch.save_file"):
        read_arrays(tmp_path / "model.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(FormatError, match="never loaded"):
        read_arrays(tmp_path / "old.pt")


def test_files_that_are_none_of_these_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"nothing\.npz: there is no such file"):
        read_arrays(tmp_path / "nothing.npz")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(FormatError, match="empty"):
        read_arrays(tmp_path / "empty")
    with pytest.raises(FormatError, match="must end in"):
        write_arrays(tmp_path / "w.pt", {})
    write_arrays(tmp_path / "w.npz", arrays())
    whole = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError):
        read_arrays(tmp_path / "cut.npz")
