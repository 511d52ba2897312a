"""Object code of kernels in the user's cache folder, so that each is compiled once a machine.

    <cache>/kernels/<key>.o      32 bytes SHA-256 of what follows, then an ELF object

The key is made of the text, the processor and the compiler's version. What a file holds is run, so
the folder is used only while it belongs to the user and nobody else may write there; a file that is
cut short or damaged is as good as none. A folder that cannot be used costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

import platformdirs

#: Bytes that the folder may hold; the files that were used longest ago go first.
_MOST = 64 << 20
_CHECK = hashlib.sha256().digest_size


class Objects:
    """The files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def of_user() -> Objects:
        """Those of the user's cache folder."""
        return Objects(Path(platformdirs.user_cache_dir("branchgraph")) / "kernels")

    def get(self, key: str) -> bytes | None:
        """What was put under `key`, if it is there and whole."""
        path = self._path(key)
        try:
            if not self._own():
                return None
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        check, code = content[:_CHECK], content[_CHECK:]
        return code if code and hashlib.sha256(code).digest() == check else None

    def put(self, key: str, code: bytes) -> None:
        """Keep `code`; the file appears as a whole or not at all."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._own():
                return
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".new")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(code).digest() + code)
                os.replace(name, self._path(key))
            except BaseException:
                os.unlink(name)
                raise
            self._trim()
        except OSError:
            return

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.o"

    def _own(self) -> bool:
        """Whether the folder is the user's, and nobody else may write there."""
        found = os.lstat(self.folder)
        others = stat.S_IWGRP | stat.S_IWOTH
        return (
            stat.S_ISDIR(found.st_mode)
            and found.st_uid == os.getuid()
            and not found.st_mode & others
        )

    def _trim(self) -> None:
        files = [(e.stat().st_mtime, e.stat().st_size, e.path) for e in os.scandir(self.folder)]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= _MOST:
                return
            os.unlink(path)
            total -= size
