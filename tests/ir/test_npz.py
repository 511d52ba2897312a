"""Arrays come out of .npz archives as they went in; attacks are tabled in tests/data."""

from __future__ import annotations

import io
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from branchgraph.ir import npz
from branchgraph.ir.errors import FormatError, MissingError
from branchgraph.ir.npz import open_npz

ARRAYS: dict[str, np.ndarray] = {
    "rows": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "big-endian": np.arange(3, dtype=">i4"),
    "nothing": np.zeros((0, 3), np.uint8),
    "number": np.array(7),
    "truth": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "text": np.array(["ab", "c"]),
    "a/path of/names": np.ones(2, np.float16),
    "unicode é": np.ones(1),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_round_trip(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path / "a.npz", **ARRAYS)
    with open_npz(tmp_path / "a.npz") as archive:
        assert sorted(archive) == sorted(ARRAYS)
        assert len(archive) == len(ARRAYS)
        for name, expected in ARRAYS.items():
            read = archive[name]
            assert read is not None
            assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
            np.testing.assert_array_equal(read, expected)
            assert read.flags.writeable


def test_open_files_are_read_and_stay_open() -> None:
    stream = io.BytesIO()
    np.savez(stream, a=np.arange(3))
    with open_npz(stream) as archive:
        assert archive["a"].tolist() == [0, 1, 2]
        assert "b" not in archive
        with pytest.raises(KeyError):
            archive["b"]
    assert not stream.closed


def test_other_floats_come_as_their_bytes() -> None:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(2, ml_dtypes.bfloat16))
    with open_npz(stream) as archive:
        assert archive["a"].view(ml_dtypes.bfloat16).tolist() == [1, 1]


def test_none_is_none_and_other_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", none=np.array(None), some=np.array([None]))
    with open_npz(tmp_path / "a.npz") as archive:
        assert archive["none"] is None
        with pytest.raises(FormatError, match="some: an array of Python objects is not read"):
            archive["some"]


def test_a_check_sees_the_shape_first(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros((2, 3)))

    def check(shape: tuple[int, ...]) -> None:
        raise ValueError(f"got {shape}")

    with open_npz(tmp_path / "a.npz") as archive, pytest.raises(ValueError, match=r"got \(2, 3\)"):
        archive.read("a", check)


def test_much_may_be_packed_well_but_not_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(10**6))
    with open_npz(tmp_path / "a.npz") as archive:
        assert archive["a"].shape == (10**6,)
    monkeypatch.setattr(npz, "LARGEST_SMALL", 10**6)
    with (
        pytest.raises(FormatError, match="save it again uncompressed"),
        open_npz(tmp_path / "a.npz"),
    ):
        pass
    np.savez(tmp_path / "a.npz", a=np.zeros(10**6))
    with open_npz(tmp_path / "a.npz") as archive:
        assert archive["a"].shape == (10**6,)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(MissingError, match=r"a\.npz: there is no such file"),
        open_npz(tmp_path / "a.npz"),
    ):
        pass
