"""Fetching data sets from their official places, and checking those that are there.

A file is loaded into `NAME.part`, goes on from there after an interruption, and gets its name when
its size and published checksum are right; so a file with a name is whole. Nothing larger than the
published size is taken, and a server may send us on to https addresses only.

Sizes and MD5 checksums are those that the publishers and their mirrors give. MD5 is what was
published; it finds damage, and https keeps others from changing what comes.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from branchgraph.data import cifar, datasets, load, mnist
from branchgraph.data.folder import data_folder
from branchgraph.data.idx import read_idx
from branchgraph.ir.errors import BranchgraphError, FormatError, MissingError

#: Seconds without a byte after which a server counts as gone.
TIMEOUT = 30.0

_CHUNK = 2**18
_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)\Z", re.ASCII)


@dataclass(frozen=True)
class Remote:
    """One published file: its path under the data folder, size in bytes, and MD5."""

    path: str
    size: int
    md5: str

    @property
    def name(self) -> str:
        """The last part of the path, which is its name at the publisher's too."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """Where a data set is published."""

    base: str
    files: tuple[Remote, ...]


_TORONTO = "https://www.cs.toronto.edu/~kriz/"
SOURCES: dict[str, Source] = {
    "cifar10": Source(
        _TORONTO, (Remote("cifar-10-binary.tar.gz", 170052171, "c32a1d4ab5d03f1284b67883e8d87530"),)
    ),
    "cifar100": Source(
        _TORONTO,
        (Remote("cifar-100-binary.tar.gz", 168513733, "03b5dce01913d631647c71ecec9e9cb8"),),
    ),
    "mnist": Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        tuple(
            Remote(f"mnist/{name}.gz", size, md5)
            for name, size, md5 in (
                ("train-images-idx3-ubyte", 9912422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                ("train-labels-idx1-ubyte", 28881, "d53e105ee54ea40749a09fcbcd1e9432"),
                ("t10k-images-idx3-ubyte", 1648877, "9fb629c4189551a2d022fa330f9573f3"),
                ("t10k-labels-idx1-ubyte", 4542, "ec29112dd5afa0611ce80d1b7f02629c"),
            )
        ),
    ),
}
#: SHA-256 of the elements in MNIST's files, however the files are packed.
MNIST_CONTENT = {
    "train-images-idx3-ubyte": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "train-labels-idx1-ubyte": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "t10k-images-idx3-ubyte": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "t10k-labels-idx1-ubyte": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}


class Progress(Protocol):
    """What a download tells of itself: a tqdm bar, for one."""

    def update(self, n: int) -> Any:
        """So many bytes more are there."""


class _Silence:
    def update(self, n: int) -> None: ...


# -- fetching --------------------------------------------------------------------------------------


def fetch(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    base: str | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Bring the files of the data set `name` into `folder`, else the data folder.

    Files that are there with the published checksum are left alone. `base` is another address that
    serves the same files. Raises `MissingError` when the place cannot be reached, naming the files
    to bring by other means, and `FormatError` when what comes is not what was published.
    """
    source = source_of(name)
    root = data_folder("") if folder is None else Path(folder)
    address = source.base if base is None else base
    bar = progress or _Silence()
    done = []
    for remote in source.files:
        target = root / remote.path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and md5(target) == remote.md5:
                bar.update(remote.size)
            else:
                _download(urllib.parse.urljoin(address, remote.name), target, remote, bar)
        except _Unreachable as problem:
            raise MissingError(_by_hand(name, root, address, str(problem))) from None
        except OSError as error:
            raise BranchgraphError(
                f"{target}: cannot be written: {error.strerror or error}; make room, check the "
                "permissions, or set BRANCHGRAPH_DATA to another folder"
            ) from error
        done.append(target)
    return done


def source_of(name: str) -> Source:
    """Where `name` is published, or `MissingError`."""
    if name in SOURCES:
        return SOURCES[name]
    if name in datasets():
        raise MissingError(
            f"{name} comes with scikit-learn, there is nothing to fetch; install it: "
            "python -m pip install 'branchgraph[demo]'"
        )
    raise MissingError(f"no data set {name!r} to fetch; there are: {', '.join(sorted(SOURCES))}")


class _Unreachable(Exception):
    """No server, no file there, or a connection that ended; what came is kept."""


def _by_hand(name: str, root: Path, address: str, problem: str) -> str:
    files = "; ".join(
        f"{urllib.parse.urljoin(address, r.name)} ({r.size} bytes, MD5 {r.md5}) to {root / r.path}"
        for r in SOURCES[name].files
    )
    return (
        f"{name}: {problem}. Run the command again to go on where it stopped; or, where there is "
        f"no network, bring these files yourself: {files}"
    )


def _download(url: str, target: Path, remote: Remote, bar: Progress) -> None:
    """Load `url` into a .part file, going on with what is there, and give it its name."""
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    if have > remote.size:
        part.unlink()
        have = 0
    bar.update(have)
    if have < remote.size:
        _go_on(url, part, have, remote, bar)
    if md5(part) != remote.md5:
        part.unlink()
        raise FormatError(
            f"{url}: expected {remote.size} bytes with MD5 {remote.md5}, got others; they were "
            "thrown away. Run the command again, or tell us if the publisher changed the file"
        )
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, target)


def _go_on(url: str, part: Path, have: int, remote: Remote, bar: Progress) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "branchgraph"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with _answering(url) as answer:
        response = answer.open(request, part)
        if response.status != 206 or not _starts_at(response, have):
            bar.update(-have)  # it does not go on, it starts again
            have = 0
        with response, open(part, "ab" if have else "wb") as file:
            while chunk := response.read1(_CHUNK):
                have += len(chunk)
                if have > remote.size:
                    break
                file.write(chunk)
                bar.update(len(chunk))
    if have > remote.size:
        part.unlink()
        raise FormatError(f"{url}: sends more than the published {remote.size} bytes; nothing kept")
    if have < remote.size:
        raise _Unreachable(f"{url} ended after {have} of {remote.size} bytes")


def _starts_at(response: Any, have: int) -> bool:
    match = _RANGE.match(response.headers.get("Content-Range", ""))
    return match is not None and int(match.group(1)) == have


class _Answer:
    """Opens addresses with http and https only."""

    def __init__(self) -> None:
        self.opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _OnlyHttps(),
        ):
            self.opener.add_handler(handler)

    def open(self, request: urllib.request.Request, part: Path) -> Any:
        """The response; what is in `part` goes where the server cannot go on from its end."""
        try:
            response = self.opener.open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            raise
        if response is None:
            raise FormatError(f"{request.full_url}: expected an http or https address")
        return response


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    # Called before urllib looks at the scheme, so that the refusal says why.
    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = urllib.parse.urljoin(req.full_url, headers.get("location", ""))
        if urllib.parse.urlsplit(target).scheme != "https":
            fp.close()
            raise FormatError(
                f"{req.full_url}: sends us on to {target[:200]!r}; only https is followed"
            )
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@contextmanager
def _answering(url: str) -> Iterator[_Answer]:
    """Turns what goes wrong on the way into `_Unreachable`."""
    try:
        yield _Answer()
    except urllib.error.HTTPError as error:
        error.close()
        raise _Unreachable(f"{url} answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise _Unreachable(f"{url} cannot be reached ({error.reason})") from None
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _Unreachable(f"the connection to {url} broke ({error!r})") from None


def md5(path: Path) -> str:
    """The MD5 of a file, in hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# -- checking --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """How it stands with a data set: 0 usable, 1 missing, 2 broken; a line for each finding."""

    name: str
    code: int
    lines: tuple[str, ...]

    @property
    def word(self) -> str:
        """The code in a word."""
        return ("usable", "missing", "broken")[self.code]


def check(name: str) -> Condition:
    """Look where `load` looks, compare checksums where they are known, and load the data set."""
    if name not in datasets():
        raise MissingError(f"no data set {name!r}; there are: {', '.join(datasets())}")
    lines = [f"looked in {data_folder('')}"] if name in SOURCES else []
    try:
        for path in _there(name):
            lines.append(_found(name, path))
        lines.append(repr(load(name)))
    except (MissingError, FormatError) as error:
        return Condition(name, 1 if isinstance(error, MissingError) else 2, (*lines, str(error)))
    return Condition(name, 0, tuple(lines))


def _there(name: str) -> list[Path]:
    """The files that `load` will read."""
    if name == "mnist":
        return mnist.found()
    kinds = {kind.name: kind for kind in (cifar.CIFAR10, cifar.CIFAR100)}
    if name not in kinds:
        return []
    version, place = cifar.found(kinds[name])
    return [place / file for file in version.files] if place.is_dir() else [place]


def _found(name: str, path: Path) -> str:
    if not path.is_file():
        return f"{path}: not there"
    return f"{path}: {path.stat().st_size} bytes, {_verdict(name, path)}"


def _verdict(name: str, path: Path) -> str:
    """What the checksum says; wrong ones are no error where a converter writes such files too."""
    content = MNIST_CONTENT.get(path.name.removesuffix(".gz"))
    if name == "mnist" and content is not None:
        same = hashlib.sha256(read_idx(path).data).hexdigest() == content
        return "content as published" if same else "readable, but not the published content"
    archives = {r.name: r for source in SOURCES.values() for r in source.files}
    if path.name not in archives:
        return "no checksum known"
    if md5(path) != archives[path.name].md5:
        raise FormatError(
            f"{path}: not the published file (MD5 {archives[path.name].md5}); remove it and run: "
            f"branchgraph data fetch {name}"
        )
    return "checksum as published"
