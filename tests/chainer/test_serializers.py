"""Files of models: Chainer's layout both ways, and files that are damaged or hostile."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

import branchgraph.chainer as chainer
import branchgraph.chainer.functions as F
import branchgraph.chainer.links as L
from branchgraph.chainer.serializers import (
    DictionarySerializer,
    NpzDeserializer,
    load_npz,
    save_npz,
)
from branchgraph.ir.errors import BranchgraphError, FormatError

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


class Net(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.blocks = chainer.ChainList(L.Linear(3, 4), L.BatchNormalization(4))
            self.head = L.Linear(None, 2)
        self.add_persistent("epoch", 7)
        self.add_persistent("note", "first")
        self.add_persistent("extra", None)

    def forward(self, x):
        return self.head(F.relu(self.blocks[1](self.blocks[0](x))))


KEYS = {
    "blocks/0/W", "blocks/0/b", "blocks/1/N", "blocks/1/avg_mean", "blocks/1/avg_var",
    "blocks/1/beta", "blocks/1/gamma", "epoch", "extra", "head/W", "head/b", "note",
}  # fmt: skip


def used() -> Net:
    net = Net()
    net(X)
    net(X)
    return net


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_npz(tmp_path / "model", used())
    return tmp_path / "model"


def entries(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=True) as archive:
        return dict(archive)


# -- layout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [True, False])
def test_a_file_has_one_entry_a_value_and_no_suffix_is_added(
    tmp_path: Path, compression: bool
) -> None:
    net = used()
    save_npz(tmp_path / "model", net, compression)
    found = entries(tmp_path / "model")
    assert set(found) == KEYS
    assert found["blocks/1/N"].dtype == np.int64
    assert found["blocks/1/N"].shape == ()
    assert found["extra"].dtype == object
    np.testing.assert_array_equal(found["blocks/1/avg_mean"], net.blocks[1].avg_mean)


def test_an_uninitialised_parameter_is_an_entry_of_none(tmp_path: Path) -> None:
    save_npz(tmp_path / "model", Net())
    found = entries(tmp_path / "model")
    assert set(found) == KEYS
    assert found["head/W"].dtype == object
    assert found["head/W"][()] is None


def test_values_come_back(saved: Path) -> None:
    net = Net()
    load_npz(saved, net)
    stored = entries(saved)
    np.testing.assert_array_equal(net.head.W.array, stored["head/W"])
    np.testing.assert_array_equal(net.blocks[1].avg_var, stored["blocks/1/avg_var"])
    assert np.isnan(net.head.W.grad).all()
    assert net.epoch == 7
    assert type(net.epoch) is int
    assert net.note == "first"
    assert net.extra is None


def test_open_files_and_dictionaries(tmp_path: Path) -> None:
    stream = io.BytesIO()
    save_npz(stream, {"a/file": np.arange(3), "b": 1.5})
    stream.seek(0)
    with np.load(stream) as archive:
        assert archive["a/file"].tolist() == [0, 1, 2]
    stream = io.BytesIO()
    net = used()
    save_npz(stream, net)
    stream.seek(0)
    other = Net()
    load_npz(stream, other)
    np.testing.assert_array_equal(other.head.W.array, net.head.W.array)


def test_writing_is_whole_or_not_at_all(saved: Path) -> None:
    before = saved.read_bytes()

    class Broken(chainer.Link):
        def serialize(self, serializer) -> None:
            serializer("a", 1)
            raise OSError("disk full")

    with pytest.raises((OSError, BranchgraphError)):
        save_npz(saved, Broken())
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


# -- reading rules ---------------------------------------------------------------------------------


def rewritten(saved: Path, **changes) -> Path:
    found = {**entries(saved), **{k.replace("__", "/"): v for k, v in changes.items()}}
    path = saved.with_name("changed")
    save_npz(path, {k: v for k, v in found.items() if v is not Ellipsis})
    return path


def test_a_missing_entry_is_an_error_when_strict(saved: Path) -> None:
    part = rewritten(saved, head__b=...)
    net = Net()
    net.head.b.array[...] = 3
    with pytest.raises(KeyError, match="head/b is not a file in the archive"):
        load_npz(part, net)
    load_npz(part, net, strict=False)
    assert net.head.b.array.tolist() == [3, 3]


def test_entries_too_many_do_not_matter(saved: Path) -> None:
    load_npz(rewritten(saved, nobody__W=np.zeros(3)), Net())


@pytest.mark.parametrize(
    "ignored", ["head/b", lambda key: key == "head/b", ["nothing", lambda key: "/b" in key]]
)
def test_ignored_names_are_left_alone(saved: Path, ignored) -> None:
    net = Net()
    load_npz(rewritten(saved, head__b=np.ones(2, np.float32)), net, ignore_names=ignored)
    assert net.head.b.array.tolist() == [0, 0]


def test_none_keeps_a_parameter_and_clears_a_persistent(saved: Path) -> None:
    net = used()
    W = net.head.W.array.copy()
    load_npz(rewritten(saved, head__W=None, epoch=None, blocks__1__avg_mean=None), net)
    np.testing.assert_array_equal(net.head.W.array, W)
    assert net.epoch is None
    assert net.blocks[1].avg_mean is None


def test_casts_within_a_kind(saved: Path) -> None:
    net = Net()
    load_npz(rewritten(saved, head__b=np.array([1.5, 2.5], np.float64)), net)
    assert net.head.b.dtype == np.float32
    assert net.head.b.array.tolist() == [1.5, 2.5]
    with pytest.raises(TypeError, match="head/b"):
        load_npz(rewritten(saved, head__b=np.ones(2, np.complex64)), Net())
    with pytest.raises(TypeError, match="epoch"):
        load_npz(rewritten(saved, epoch=np.array(1.5)), Net())
    with pytest.raises(ValueError, match=r"head/b.*\(3,\)"):
        load_npz(rewritten(saved, head__b=np.ones(3, np.float32)), Net())
    load_npz(rewritten(saved, head__b=np.ones((), np.float32)), net)
    assert net.head.b.array.tolist() == [1, 1]


def test_a_prefix_inside_the_file(saved: Path, tmp_path: Path) -> None:
    prefixed = {f"updater/model:main/{k}": v for k, v in entries(saved).items()}
    save_npz(tmp_path / "snapshot", prefixed)
    net = Net()
    load_npz(tmp_path / "snapshot", net, path="updater/model:main/")
    np.testing.assert_array_equal(net.head.W.array, entries(saved)["head/W"])


def test_keys_of_very_old_files_start_with_a_slash(saved: Path, tmp_path: Path) -> None:
    save_npz(tmp_path / "old", {f"/{k}": v for k, v in entries(saved).items()})
    load_npz(tmp_path / "old", Net())


def test_loading_comes_behind_what_was_recorded(saved: Path) -> None:
    net = used()
    with chainer.using_config("train", False):
        expected = net(X).array
        y = net(X)
    load_npz(saved, net)
    np.testing.assert_array_equal(y.array, expected)


def test_the_protocol_of_user_classes(tmp_path: Path) -> None:
    class State:
        value, child = 1, None

        def serialize(self, serializer) -> None:
            self.reading = isinstance(serializer, chainer.Deserializer)
            self.value = serializer("value", self.value)
            self.child = serializer["inner"]("child", self.child)

    target: dict = {}
    state = State()
    state.child = np.arange(2)
    DictionarySerializer(target, "root/").save(state)
    assert sorted(target) == ["root/inner/child", "root/value"]
    assert not state.reading
    other = State()
    NpzDeserializer(target, "root/").load(other)
    assert other.reading
    assert other.child.tolist() == [0, 1]
    save_npz(tmp_path / "state", state)
    with np.load(tmp_path / "state") as archive:
        NpzDeserializer(archive).load(other)


# -- damaged and hostile files ---------------------------------------------------------------------


def raw(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def npy(shape: str, descr: str = "'<f4'", data: bytes = b"") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


class Lone(chainer.Link):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.W = chainer.Parameter()


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    code = pickle.dumps(np.array(Bomb(), object))
    link = Lone()
    load_npz(raw(tmp_path / "f", "W.npy", npy("()", "'|O'", code)), link)
    assert not link.W.is_initialized
    with pytest.raises(FormatError, match="Python objects"):
        load_npz(raw(tmp_path / "f", "W.npy", npy("(2,)", "'|O'", code)), link)


@pytest.mark.parametrize(
    "content",
    [
        npy("(1000000, 1000000)"),
        npy("(3,)", data=b"\0" * 8),
        npy("(1,)", data=b"\0" * 8),
        npy("(-1, -2)", data=b"\0" * 8),
        npy("(1000000000000,)", "'|V0'"),
        npy("(" * 4000),
        npy("(2,)", "'nonsense'", b"\0" * 8),
        b"\x93NUMPY\x09\x00",
        b"nothing",
        b"",
    ],
    ids=[
        "huge",
        "short",
        "long",
        "negative",
        "sizeless",
        "nested",
        "dtype",
        "version",
        "text",
        "empty",
    ],
)
def test_a_header_must_declare_what_the_entry_holds(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(FormatError, match="W"):
        load_npz(raw(tmp_path / "f", "W.npy", content), Lone())


def test_a_shape_that_does_not_fit_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = raw(tmp_path / "f", "b.npy", npy("(10000000,)", "'|u1'", bytes(10_000_000)))
    with pytest.raises(ValueError, match="10000000"):
        load_npz(bomb, L.Linear(2, 2), strict=False)


def test_an_entry_that_claims_more_than_its_bytes_can_hold(tmp_path: Path) -> None:
    path = raw(tmp_path / "f", "W.npy", npy("(1000000000,)"))
    content = bytearray(path.read_bytes())
    size = (len(npy("(1000000000,)")) + 4_000_000_000).to_bytes(4, "little")
    central = content.rindex(b"PK\x01\x02")
    content[central + 24 : central + 28] = size
    path.write_bytes(content)
    with pytest.raises(FormatError, match="W"):
        load_npz(path, Lone())


def test_other_compressions_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "f", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("W.npy", npy("()", data=b"\0" * 4))
    with pytest.raises(FormatError, match="deflated"):
        load_npz(tmp_path / "f", Lone())


@pytest.mark.parametrize("name", ["../W.npy", "a/../../W.npy", "a\\..\\W.npy"])
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="unsafe"):
        load_npz(raw(tmp_path / "f", name, npy("()", data=b"\0" * 4)), Lone())


def test_an_entry_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "f", "w") as archive:
        archive.writestr("W.npy", npy("()", data=b"\0" * 4))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("W.npy", npy("()", data=b"\0" * 4))
    with pytest.raises(FormatError, match="two entries"):
        load_npz(tmp_path / "f", Lone())


def test_files_cut_off_or_of_another_kind(saved: Path) -> None:
    content = saved.read_bytes()
    for part in (content[: len(content) // 2], content[:-10], b"", b"no zip"):
        saved.write_bytes(part)
        with pytest.raises(FormatError):
            load_npz(saved, Net())
    with pytest.raises(FileNotFoundError):
        load_npz(saved.with_name("absent"), Net())


def test_a_flipped_byte_is_found(saved: Path) -> None:
    save_npz(saved, used(), compression=False)
    content = bytearray(saved.read_bytes())
    content[content.index(b"NUMPY") + 130] ^= 0xFF
    saved.write_bytes(content)
    with pytest.raises(FormatError):
        load_npz(saved, Net())


def test_no_damage_gives_an_error_of_another_kind(saved: Path) -> None:
    rng = np.random.default_rng(0)
    content = saved.read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), 3):
            damaged[position] = rng.integers(0, 256)
        saved.write_bytes(damaged[: rng.integers(len(content) // 2, len(content) + 500)])
        with contextlib.suppress(FormatError, KeyError, ValueError, TypeError):
            load_npz(saved, Net())
