"""Files that appear whole or not at all.

    with replacing("net.bg") as temporary:
        write(temporary)

The new content is written beside the target under another name, forced to the disk, and renamed
over the target. Until the rename the old file stands untouched; whatever goes wrong before it, a
full disk included, leaves the old file and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from branchgraph.ir.errors import BranchgraphError, MissingError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty file in the folder of `path`, renamed to `path` when the block ends well.

    A link is followed, and an existing file keeps its permissions. Raises `MissingError` when the
    folder does not exist and `BranchgraphError` when an `OSError` comes up, in the block too; other
    exceptions of the block pass through. In all these cases `path` is what it was before.
    """
    target = Path(os.path.realpath(path))
    _check_target(target, os.fspath(path))
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            permissions = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
            yield temporary
            temporary.chmod(permissions)  # a writer may have put another file under the name
            _to_disk(temporary, os.O_RDWR)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BranchgraphError(
            f"{os.fspath(path)}: cannot be written: {error.strerror or error}; what stood there "
            "before is unchanged. Make room, check the permissions, or choose another folder"
        ) from error
    if os.name == "posix":
        with contextlib.suppress(OSError):  # not every file system can force a folder to the disk
            _to_disk(target.parent, os.O_RDONLY)


def _check_target(target: Path, shown: str) -> None:
    if not target.parent.is_dir():
        raise MissingError(
            f"{shown}: there is no folder {target.parent}; create it first, "
            "or choose a folder that exists"
        )
    if target.is_dir():
        raise BranchgraphError(f"{shown}: expected the name of a file, got a folder; add a name")


def _to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
