"""Files made to harm, for every reader of data; run as a program it reads them under a limit.

python hostile_files.py FOLDER      a line of JSON an attack: name, error, message, seconds
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from cifar_files import TEN, archive_of, batch, pickled, records, write_folder

#: What a reader may take beside what the process has already, in bytes.
ROOM = 512 * 2**20

MEGA = bytes(2**20)
GOOD_BATCH = records(*batch(0, 10))
GOOD_PICKLE = pickled(*batch(0, 10))
BIN = "cifar-10-batches-bin"


def repeated(head: bytes, block: bytes, times: int, window: int = -15) -> bytes:
    """Deflated data of `head` and `times` blocks, in the time that one block takes."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, window)
    first = squeeze.compress(head + block) + squeeze.flush(zlib.Z_FULL_FLUSH)
    again = squeeze.compress(block) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return first + again * (times - 1)


# -- idx and the binary version of CIFAR -----------------------------------------------------------

IDX: dict[str, tuple[Callable[[], bytes], str]] = {
    "gzip that goes on for 2 GiB": (
        lambda: repeated(b"\0\0\x08\1" + struct.pack(">I", 100), MEGA, 2048, 31), "got more"),
    "gzip that declares 2 GiB and holds nothing": (
        lambda: gzip.compress(b"\0\0\x08\1" + struct.pack(">I", 2**31)), "declared, got 0"),
    "plain file that declares 2 GiB": (
        lambda: b"\0\0\x08\1" + struct.pack(">I", 2**31), "declared, got 0"),
    "sizes whose product wraps around": (
        lambda: b"\0\0\x08\4" + struct.pack(">4I", *[2**16] * 4), "the limit is"),
    "sizes beside a zero": (
        lambda: b"\0\0\x08\3" + struct.pack(">3I", 0, 2**32 - 1, 2**32 - 1), "the limit is"),
}  # fmt: skip

BINARY: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty batch": (lambda: b"", "expected records of 3073 bytes, got 0"),
    "one byte short": (lambda: GOOD_BATCH[:-1], "no whole number of them"),
    "one byte more": (lambda: GOOD_BATCH + b"\0", "no whole number of them"),
    "a label out of range": (lambda: b"\x0a" + GOOD_BATCH[1:], "labels in 0..9, got 10"),
    "a record more than published": (lambda: bytes(3073 * 10_001), "has at most 30730000"),
    "many times the published size": (lambda: bytes(2**28), "has at most 30730000"),
    "a pickle in its place": (lambda: GOOD_PICKLE, "no whole number of them"),
}

# -- tar.gz ----------------------------------------------------------------------------------------


def member(name: str, size: int | bytes, kind: bytes = b"0", **changes: bytes) -> bytes:
    """A tar header that may say anything, with a right sum unless that is changed."""
    digits = b"%011o\0" % size if isinstance(size, int) else size
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[124 : 124 + len(digits)] = digits
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar  \0"
    block[148:156] = changes.get("sum", b"%06o\0 " % sum(block))
    return bytes(block)


def content(text: bytes) -> bytes:
    return text + bytes(-len(text) % 512)


def packed(*parts: bytes) -> bytes:
    return gzip.compress(b"".join(parts) + bytes(1024), 1)


def good_members() -> dict[str, bytes]:
    return {f"{BIN}/{name}.bin": GOOD_BATCH for name in TEN}


def damaged_archive(change: Callable[[bytearray], object]) -> bytes:
    archive = bytearray(archive_of(good_members()))
    change(archive)
    return bytes(archive)


def linked(kind: bytes) -> bytes:
    """All files, the first of them a link to another."""
    members = list(good_members().items())
    link = member(members[0][0], 0, kind)
    rest = b"".join(member(n, len(c)) + content(c) for n, c in members[1:])
    return packed(link, rest)


FIRST = f"{BIN}/data_batch_1.bin"
TAR: dict[str, tuple[Callable[[], bytes], str]] = {
    "no gzip": (lambda: archive_of(good_members(), "w"), "broken gzip data"),
    "empty archive file": (lambda: b"", "the archive is cut short"),
    "gzip cut short": (lambda: archive_of(good_members())[:-20], "cut short"),
    "gzip with a wrong sum": (
        lambda: damaged_archive(lambda a: a.__setitem__(-6, a[-6] ^ 1)), "broken gzip data"),
    "gzip of text": (lambda: gzip.compress(b"hello" * 200), "no tar archive"),
    "archive without its end": (lambda: gzip.compress(member("a", 0)), "the archive is cut short"),
    "archive of nothing": (lambda: packed(), "no cifar-10-batches-bin/data_batch_1.bin"),
    "zeros without end": (lambda: repeated(b"", MEGA, 4096, 31), "holds more than the files"),
    "a stranger of 4 GiB": (
        lambda: repeated(member("big", 2**32), MEGA, 4096, 31), "holds more than the files"),
    "a stranger that declares 8 GiB": (
        lambda: packed(member("big", 2**33 - 1)), "holds more than the files"),
    "a batch of 4 GiB": (
        lambda: repeated(member(FIRST, 2**32), MEGA, 4096, 31), "the limit is 30730000"),
    "a batch that declares more than it holds": (
        lambda: packed(member(FIRST, 30_730_000)), "the archive is cut short"),
    "an extended header of 2 GiB": (
        lambda: repeated(member("x", 2**31, b"x"), MEGA, 2048, 31), "holds more than the files"),
    "a long name of 2 GiB": (
        lambda: repeated(member("L", 2**31, b"L"), MEGA, 2048, 31), "holds more than the files"),
    "a size that is negative": (
        lambda: packed(member(FIRST, b"-0000000001\0")), "no octal number"),
    "a size in base 256": (
        lambda: packed(member(FIRST, b"\x80" + b"\xff" * 11)), "no octal number"),
    "a header with a wrong sum": (
        lambda: packed(member(FIRST, 0, sum=b"000001\0 ")), "a header whose sum is wrong"),
    "a million members": (
        lambda: repeated(b"", member("a", 0) * 1024, 1024, 31), "more than 1000 members"),
    "a batch twice": (
        lambda: packed(*[member(FIRST, 3073), content(bytes(3073))] * 2), "two members"),
    "names that climb": (
        lambda: archive_of({f"../{n}": c for n, c in good_members().items()}), "in the archive"),
    "absolute names": (
        lambda: packed(*(member(f"/{n}", 3073) + content(bytes(3073)) for n in good_members())),
        "in the archive"),
    "a symbolic link": (lambda: linked(b"2"), "no cifar-10-batches-bin/data_batch_1.bin"),
    "a hard link": (lambda: linked(b"1"), "no cifar-10-batches-bin/data_batch_1.bin"),
    "a device": (lambda: linked(b"3"), "no cifar-10-batches-bin/data_batch_1.bin"),
    "a sparse file": (lambda: linked(b"S"), "no cifar-10-batches-bin/data_batch_1.bin"),
}  # fmt: skip

# -- the Python version of CIFAR -------------------------------------------------------------------


class Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("a pickle was run",)


def doubled(times: int) -> bytes:
    """Tuples of tuples, each holding the one before twice: small, but endless when printed."""
    return b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * times


def without(key: bytes) -> bytes:
    return GOOD_PICKLE.replace(b"U" + bytes([len(key)]) + key, b"U" + bytes([len(key)]) + key[::-1])


EMPTY_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
PICKLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty pickle": (lambda: b"", "the file is cut short"),
    "text for a pickle": (lambda: b"hello", "was not remembered"),
    "a pickle cut short": (lambda: GOOD_PICKLE[:-5000], "the file is cut short"),
    "no dictionary": (lambda: pickle.dumps([1]), "expected a pickled dictionary, got list"),
    "a call in protocol 0": (lambda: pickle.dumps(Harm(), 0), "not allowed"),
    "a call in protocol 2": (lambda: pickle.dumps(Harm(), 2), "'__builtin__ print', which is not"),
    "a call in protocol 4": (lambda: pickle.dumps({"data": Harm()}, 4), "'builtins print', which"),
    "a call of os.system": (lambda: b"cos\nsystem\n(U\x02lstR.", "'os system', which is not"),
    "a call by INST": (lambda: b"(U\x02lsios\nsystem\n.", "0x69, which is not allowed"),
    "a call by OBJ": (lambda: b"(cnumpy\nndarray\nU\x02lso.", "0x6f, which is not allowed"),
    "an object by NEWOBJ": (lambda: b"cnumpy\nndarray\n)\x81.", "0x81, which is not allowed"),
    "a persistent name": (lambda: b"Pname\n.", "0x50, which is not allowed"),
    "an extension": (lambda: b"\x82\x01.", "0x82, which is not allowed"),
    "ndarray called itself": (
        lambda: b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.", "a call of numpy ndarray"),
    "an array of objects": (
        lambda: GOOD_PICKLE.replace(b"U\x02u1", b"U\x02O8"), "a call of numpy dtype"),
    "a dtype that is a list": (lambda: b"cnumpy\ndtype\n]\x85R.", "a call of numpy dtype"),
    "a state for a list": (lambda: b"]Nb.", "lacks its array"),
    "a shape that is larger": (
        lambda: GOOD_PICKLE.replace(b"K\x01M\x04\x00M\x00\x0c", b"K\x01M\xff\xffM\xff\xff"),
        "holds fewer or more"),
    "a shape that is negative": (
        lambda: GOOD_PICKLE.replace(b"M\x00\x0c\x86", b"J\xff\xff\xff\xff\x86"),
        "holds fewer or more"),
    "a second array": (lambda: EMPTY_ARRAY * 2, "a second array"),
    "a string of 2 GiB": (lambda: b"T\xff\xff\xff\x7fab", "the file is cut short"),
    "bytes of 16 EiB": (lambda: b"\x8e" + b"\xff" * 8 + b"ab", "the file is cut short"),
    "thirty million lists": (lambda: b"]" * 30_000_000, "more than 1000000 instructions"),
    "lists in lists": (lambda: b"]" * 900_000 + b"a" * 899_999 + b".", "dictionary, got list|than"),
    "marks without end": (lambda: b"(" * 2_000_000, "more than 1000000 instructions"),
    "a name of endless tuples": (lambda: doubled(99) + b"h\x00h\x00\x93.", "no short text"),
    "a call of endless tuples": (
        lambda: doubled(99) + b"cnumpy\ndtype\nh\x00R.", "a call of numpy dtype"),
    "a key of endless tuples": (lambda: doubled(99) + b"}h\x00Ns.", "keys are not text"),
    "labels of endless tuples": (
        lambda: GOOD_PICKLE.replace(
            b"]q\x05(K\x00K\x01K\x02K\x03e", b"](" + doubled(99)[2:] + b"e"),
        "expected labels as a list"),
    "no mark": (lambda: b"t.", "lacks its mark"),
    "no operand": (lambda: b"\x86.", "lacks its operand"),
    "nothing at the end": (lambda: b".", "lacks its operand"),
    "a value not remembered": (lambda: b"h\x07.", "was not remembered"),
    "no labels": (lambda: without(b"labels"), "expected labels as a list"),
    "no data": (lambda: without(b"data"), "expected data of bytes"),
    "too few labels": (
        lambda: GOOD_PICKLE.replace(b"K\x00K\x01", b"K\x01", 1), "a list of 4 numbers"),
    "labels that are huge": (
        lambda: GOOD_PICKLE.replace(b"K\x00K\x01", b"\x8a\xff" + b"\x7f" * 255 + b"K\x01", 1),
        "a list of 4 numbers"),
    "a label out of range in a pickle": (
        lambda: GOOD_PICKLE.replace(b"K\x00K\x01K\x02", b"K\x00K\x63K\x02"), "0..9, got 99"),
}  # fmt: skip

# -- npz -------------------------------------------------------------------------------------------


def npy(shape: str, descr: str = "'<f4'", data: bytes = b"", order: str = "False") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def archive(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as file:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, data in members:
            file.writestr(name, data)
    return stream.getvalue()


def one(data: bytes) -> bytes:
    return archive(("W.npy", data))


def forged(deflated: bytes, size: int, entries: int = 1) -> bytes:
    """A zip file whose entries all are the same deflated data, said to unpack to `size` bytes."""
    fields = (0, 8, 0, 0, 0, len(deflated), size)
    local = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, *fields, 5, 0) + b"00000"
    names = [b"%05d" % i for i in range(entries)]
    listed = b"".join(
        struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, *fields, 5, 0, 0, 0, 0, 0, 0)
        + name
        for name in names
    )
    start = len(local) + len(deflated)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, entries, entries, len(listed), start, 0)
    return local + deflated + listed + end


def long_header() -> bytes:
    """A header said to take 4 GiB, of which 200 MiB come from a small entry."""
    size = 200 * 2**20
    head = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1)
    return forged(repeated(head + bytes(2**20 - len(head)), MEGA, 199), size)


def many_entries() -> bytes:
    """A list of 400 000 entries."""
    listed = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, *[0] * 14) * 400_000
    return listed + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 65535, 65535, len(listed), 0, 0)


def many_entries_in_64_bits() -> bytes:
    """The same, where the short list of sizes says nothing."""
    short = many_entries()[:-22]
    wide = struct.pack(
        "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 400_000, 400_000, len(short), 0
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(short), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, 46, 0, 0)
    return short + wide + locator + end


def bomb(size: int, entries: int = 1) -> bytes:
    """`size` bytes of zeros that really are there, in about a thousandth of them."""
    head = npy(f"({size - 128},)", "'|u1'").ljust(128)
    fill = head + bytes(2**20 - len(head))
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + fill[10:127] + b"\n"
    return forged(repeated(head + bytes(2**20 - 128), MEGA, size // 2**20 - 1), size, entries)


def flagged(bit: int) -> bytes:
    """An entry with a flag set in both of its headers."""
    data = bytearray(one(npy("()", data=bytes(4))))
    data[6] |= bit
    data[data.index(b"PK\x01\x02") + 8] |= bit
    return bytes(data)


SOUND = npy("(2, 3)", data=bytes(24))
NPZ: dict[str, tuple[Callable[[], bytes], str]] = {
    "an empty file": (lambda: b"", "not an .npz file"),
    "text for an archive": (lambda: b"hello", "not an .npz file"),
    "a bare array": (lambda: SOUND, "not an .npz file"),
    "an archive cut short": (lambda: one(SOUND)[:-30], "not an .npz file"),
    "an archive without its beginning": (lambda: one(SOUND)[60:], "damaged|not an .npz file"),
    "an array of objects": (lambda: one(npy("(2,)", "'|O'", pickle.dumps(Harm()))), "objects"),
    "objects in a record": (lambda: one(npy("(2,)", "[('a', '|O')]", bytes(16))), "objects"),
    "a record": (lambda: one(npy("(2,)", "[('a', '<f4')]", bytes(8))), "numbers or text"),
    "a time": (lambda: one(npy("(1,)", "'<M8[s]'", bytes(8))), "numbers or text"),
    "names that climb in an archive": (lambda: archive(("../W.npy", SOUND)), "unsafe name"),
    "names that climb within": (lambda: archive(("a/../../W.npy", SOUND)), "unsafe name"),
    "names of another system": (lambda: archive(("..\\W.npy", SOUND)), "unsafe name"),
    "names that cannot be shown": (lambda: archive(("a\x1b[2J.npy", SOUND)), "unsafe name"),
    "a name of 60 000 characters": (lambda: archive(("W" * 60_000, SOUND)), "unsafe name"),
    "a name twice": (lambda: archive(("W.npy", SOUND), ("W.npy", SOUND)), "two entries 'W'"),
    "a name twice by its slash": (lambda: archive(("W.npy", SOUND), ("/W.npy", SOUND)), "two ent"),
    "a name twice by its end": (lambda: archive(("W.npy", SOUND), ("W", SOUND)), "two entries"),
    "a shape of 10^18": (lambda: one(npy("(1000000000, 1000000000)")), "holds 0"),
    "a shape that wraps around": (lambda: one(npy("(4294967296, 4294967296)")), "holds 0"),
    "a shape of negatives": (lambda: one(npy("(-2, -3)", data=bytes(24))), "holds 24|header"),
    "a shape of texts": (lambda: one(npy("('a',)")), "no valid .npy header"),
    "a shape of floats": (lambda: one(npy("(2.0,)", data=bytes(8))), "no valid .npy header"),
    "a shape that is no tuple": (lambda: one(npy("6", data=bytes(24))), "no valid .npy header"),
    "a shape of many axes": (
        lambda: one(npy(str((1,) * 40), data=bytes(4))), "numbers or text"),
    "elements without size": (lambda: one(npy("(1000000000000,)", "'|V0'")), "holds 0"),
    "elements of 4 GiB": (lambda: one(npy("(1,)", "'<U1000000000'")), "holds 0|header"),
    "a dtype that there is not": (lambda: one(npy("(2,)", "'nonsense'")), "no valid .npy header"),
    "a dtype that is a call": (lambda: one(npy("(2,)", "print(1)")), "no valid .npy header"),
    "a header that is a call": (
        lambda: one(npy("(2,)").replace(b"{'descr'", b"exec('1')")), "no valid .npy header"),
    "a header of brackets": (lambda: one(npy("(" * 4000)), "no valid .npy header"),
    "a header of a large power": (lambda: one(npy("(9**9**9,)")), "no valid .npy header"),
    "a header of many digits": (lambda: one(npy(f"({'9' * 6000},)")), "no valid .npy header|holds"),
    "a header in Fortran's order that lies": (
        lambda: one(npy("(2, 3)", data=bytes(20), order="True")), "holds 20"),
    "a header of another version": (
        lambda: one(b"\x93NUMPY\x09\x00" + bytes(20)), "expected a .npy entry"),
    "an entry of nothing": (lambda: one(b""), "expected a .npy entry"),
    "an entry that is short": (lambda: one(npy("(3,)", data=bytes(8))), "holds 8"),
    "an entry that is long": (lambda: one(npy("(1,)", data=bytes(8))), "holds 8"),
    "an entry by bzip2": (
        lambda: archive(("W.npy", SOUND), method=zipfile.ZIP_BZIP2), "stored or deflated"),
    "an entry by lzma": (
        lambda: archive(("W.npy", SOUND), method=zipfile.ZIP_LZMA), "stored or deflated"),
    "an entry that is encrypted": (lambda: flagged(1), "is encrypted"),
    "an entry that is a patch": (lambda: flagged(0x20), "damaged or unreadable"),
    "a header of 4 GiB": (long_header, "a .npy header of more than"),
    "4 GiB that are not there": (
        lambda: forged(zlib.compress(npy("(1000000000,)"))[2:-4], 4_000_000_000), "cannot hold"),
    "a GiB that is there": (lambda: bomb(2**30), "would unpack from"),
    "the same bytes for many entries": (
        lambda: bomb(2**26, 1000), "would unpack from|Overlapped"),
    "many small entries of zeros": (
        lambda: archive(*((f"{i}.npy", npy("(8000000,)", "'|u1'", bytes(8_000_000)))
                          for i in range(40))), "would unpack from"),
    "a long list of entries": (many_entries, "the limit is 8388608"),
    "a long list of entries in 64 bits": (many_entries_in_64_bits, "the limit is 8388608"),
}  # fmt: skip


# -- reading them ----------------------------------------------------------------------------------


def read_idx_file(root: Path, data: bytes) -> None:
    from branchgraph.data.idx import read_idx

    (root / "images").write_bytes(data)
    read_idx(root / "images")


def read_cifar(root: Path, data: bytes, path: str) -> None:
    from branchgraph.data.cifar import load_cifar10

    if not path.endswith(".gz"):
        write_folder(root, path.partition("/")[0])
    (root / path).write_bytes(data)
    load_cifar10(root)


def read_binary(root: Path, data: bytes) -> None:
    read_cifar(root, data, f"{BIN}/data_batch_1.bin")


def read_archive(root: Path, data: bytes) -> None:
    read_cifar(root, data, "cifar-10-binary.tar.gz")


def read_pickle(root: Path, data: bytes) -> None:
    read_cifar(root, data, "cifar-10-batches-py/data_batch_1")


def read_npz(root: Path, data: bytes) -> None:
    from branchgraph.ir.npz import open_npz

    (root / "weights.npz").write_bytes(data)
    with open_npz(root / "weights.npz") as entries:
        for name in entries:
            entries[name]


READERS: dict[str, tuple[Callable[[Path, bytes], None], dict[str, tuple[Callable[[], bytes], str]]]]
READERS = {
    "idx": (read_idx_file, IDX),
    "binary": (read_binary, BINARY),
    "tar": (read_archive, TAR),
    "pickle": (read_pickle, PICKLE),
    "npz": (read_npz, NPZ),
}


def attacks() -> list[tuple[str, str, str]]:
    """Reader, name and expected words of every attack."""
    return [
        (r, name, words) for r, (_, table) in READERS.items() for name, (_, words) in table.items()
    ]


def main(folder: Path) -> None:
    """Read everything with little room, and tell how it went."""
    import resource

    import numpy  # noqa: F401 - before the limit is set

    import branchgraph.data
    import branchgraph.ir.npz  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    for number, (reader, name, _) in enumerate(attacks()):
        read, table = READERS[reader]
        data = table[name][0]()
        root = folder / str(number)
        root.mkdir()
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
        start = time.perf_counter()
        try:
            read(root, data)
            error, message = "none", "it was read"
        except BaseException as raised:  # MemoryError and RecursionError too
            error, message = type(raised).__name__, str(raised)
        seconds = time.perf_counter() - start
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        del data
        print(json.dumps([reader, name, error, message, seconds]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
