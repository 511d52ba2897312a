"""Opening a file of a data set, and what can go wrong with it, said in one way."""

from __future__ import annotations

import contextlib
import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from typing import IO

from branchgraph.ir.errors import FormatError, MissingError


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], kind: str) -> Iterator[IO[bytes]]:
    """The file at `path`, said to be `kind` ("an idx file"), for the block that reads it.

    Raises `MissingError` when there is no file and `FormatError` when it is no regular file, or the
    block comes upon gzip data that are broken or a file that cannot be read.
    """
    shown = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FormatError(f"{shown}: expected {kind}, got something that is no file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise MissingError(f"{shown}: there is no such file; check the path") from None
    except EOFError:
        raise FormatError(f"{shown}: the gzip data is cut short; download the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise FormatError(
            f"{shown}: broken gzip data ({error}); download the file again"
        ) from error
    except OSError as error:
        raise FormatError(
            f"{shown}: cannot be read: {error.strerror or error}; check the permissions"
        ) from error
