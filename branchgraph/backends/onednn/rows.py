"""Numbers of rows that are known only while a program runs, and the sizes planned for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ctypes import c_int64

from branchgraph.ir.dims import DimLike


class Counts(Mapping[str, int]):
    """Numbers of rows by symbol. Each lies in a cell of its own, where kernels find it too."""

    def __init__(self) -> None:
        self._cells: dict[str, c_int64] = {}

    def cell(self, symbol: str) -> c_int64:
        """Where the number is, the same for ever."""
        return self._cells.setdefault(symbol, c_int64())

    def of(self, size: DimLike) -> int:
        """A dimension of this run."""
        return size if isinstance(size, int) else int(size.substitute(self))  # type: ignore[arg-type]

    def cell_of(self, size: DimLike) -> c_int64:
        """A cell that holds `size`, a number or a symbol, in every run."""
        return c_int64(size) if isinstance(size, int) else self.cell(size.symbols[0])

    def __getitem__(self, symbol: str) -> int:
        return self._cells[symbol].value

    def __setitem__(self, symbol: str, rows: int) -> None:
        self.cell(symbol).value = rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)


def bucket(rows: int) -> int:
    """The number of rows planned for `rows`: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ..."""
    size = 1
    while size < rows:
        if size * 3 // 2 >= rows and size > 1:
            return size * 3 // 2
        size *= 2
    return size if rows else 0


def all_stay(planned: int, rows: int) -> bool:
    """Whether a plan for `planned` of `rows` rows is never used for fewer than all of them."""
    return planned == rows and (rows == 0 or bucket(rows - 1) < rows)
