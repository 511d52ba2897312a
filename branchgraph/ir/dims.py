"""Dimensions: affine integer forms over symbols, such as `N`, `3*N` or `720*N + 2`.

A concrete dimension is a plain `int`; a `Dim` always holds at least one symbol. Arithmetic that
stays affine returns an `int` or a `Dim`; arithmetic that does not (`N*N`, `N//2`) raises
`DimensionError` and asks for a concrete size in words.

    d = c_0 + sum_k c_k * s_k,    c_k integers, s_k symbols (non-negative sizes)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from branchgraph.ir.errors import DimensionError, FormatError, ShapeError

#: Larger sizes are refused on reading, so that a hostile file cannot ask for the address space.
LARGEST_DIMENSION = 2**40

_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_TERM = re.compile(r"(?:(\d{1,18})\*)?([A-Za-z_][A-Za-z0-9_]*)\Z|(\d{1,18})\Z")


class Dim:
    """An affine integer form over at least one symbol; immutable and hashable."""

    __slots__ = ("_hash", "constant", "terms")

    def __init__(self, terms: Iterable[tuple[str, int]], constant: int = 0) -> None:
        self.terms: tuple[tuple[str, int], ...] = tuple(sorted(t for t in terms if t[1] != 0))
        self.constant = constant
        self._hash = hash((self.terms, constant))
        if not self.terms:
            raise DimensionError("a Dim needs a symbol; use a plain int for a concrete dimension")

    @staticmethod
    def symbol(name: str) -> Dim:
        """The dimension that is the symbol `name` itself."""
        if not _SYMBOL.match(name):
            raise DimensionError(f"{name!r} is no symbol name (letters, digits and _ only)")
        return Dim(((name, 1),))

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the symbols in the form, sorted."""
        return tuple(name for name, _ in self.terms)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dim):
            return NotImplemented
        return self.terms == other.terms and self.constant == other.constant

    def __add__(self, other: DimLike) -> DimLike:
        if isinstance(other, int):
            return Dim(self.terms, self.constant + other)
        sums = dict(self.terms)
        for name, coefficient in other.terms:
            sums[name] = sums.get(name, 0) + coefficient
        return _affine(sums, self.constant + other.constant)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return Dim(((name, -c) for name, c in self.terms), -self.constant)

    def __sub__(self, other: DimLike) -> DimLike:
        return self + (-other)

    def __rsub__(self, other: DimLike) -> DimLike:
        return -self + other

    def __mul__(self, other: DimLike) -> DimLike:
        if isinstance(other, int):
            return _affine({n: c * other for n, c in self.terms}, self.constant * other)
        raise DimensionError(
            f"{self} * {other} is not affine; give one a concrete size with bind(graph, ...)"
        )

    __rmul__ = __mul__

    def __floordiv__(self, other: DimLike) -> DimLike:
        """Floor division, affine when `other` divides every coefficient."""
        if self == other:
            return 1
        if isinstance(other, int) and other > 0:
            if all(c % other == 0 for _, c in self.terms):
                return _affine({n: c // other for n, c in self.terms}, self.constant // other)
        elif isinstance(other, Dim):
            quotient = _exact_quotient(self, other)
            if quotient is not None:
                return quotient
        raise DimensionError(
            f"({self}) // ({other}) is not affine; give a concrete size with bind(graph, ...)"
        )

    def __mod__(self, other: int) -> int:
        if all(c % other == 0 for _, c in self.terms):
            return self.constant % other
        raise DimensionError(f"({self}) mod {other} depends on the size; give it a concrete value")

    def substitute(self, bindings: Mapping[str, DimLike]) -> DimLike:
        """The form with every symbol named in `bindings` replaced."""
        result: DimLike = self.constant
        for name, coefficient in self.terms:
            value = bindings.get(name)
            result = result + coefficient * (Dim(((name, 1),)) if value is None else value)
        return result

    def __str__(self) -> str:
        parts = [name if c == 1 else f"{c}*{name}" for name, c in self.terms]
        if self.constant:
            parts.append(str(self.constant))
        return " + ".join(parts).replace("+ -", "- ")

    def __repr__(self) -> str:
        return f"Dim({self})"


DimLike = int | Dim
Shape = tuple[DimLike, ...]


def _affine(coefficients: Mapping[str, int], constant: int) -> DimLike:
    terms = [(n, c) for n, c in coefficients.items() if c != 0]
    return Dim(terms, constant) if terms else constant


def _exact_quotient(a: Dim, b: Dim) -> int | None:
    """k with a = k * b, if there is one."""
    name, coefficient = b.terms[0]
    k, remainder = divmod(dict(a.terms).get(name, 0), coefficient)
    return k if remainder == 0 and b * k == a else None


def as_dim(value: DimLike | str) -> DimLike:
    """`value` as a dimension: an int, a Dim, or text such as `"N"` or `"3*N + 2"`."""
    if isinstance(value, str):
        return parse_dim(value)
    if isinstance(value, Dim):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ShapeError(f"{value!r} is no dimension; use an int or a symbol such as 'N'")
    number = value.__index__()
    if not 0 <= number <= LARGEST_DIMENSION:
        raise ShapeError(f"dimension {number} is outside 0..{LARGEST_DIMENSION}")
    return number


def as_shape(shape: Iterable[DimLike | str]) -> Shape:
    """A tuple of dimensions from ints, Dims and texts."""
    return tuple(as_dim(d) for d in shape)


def parse_dim(text: str) -> DimLike:
    """The dimension written as `text`, the inverse of `str`."""
    result: DimLike = 0
    for signed in text.replace("-", "+-").split("+"):
        term = signed.strip()
        if not term:
            continue
        sign = -1 if term.startswith("-") else 1
        match = _TERM.match(term.lstrip("-").strip())
        if match is None:
            raise FormatError(f"{text!r} is no dimension; write for example 28, N or 3*N + 2")
        coefficient, name, number = match.groups()
        if name is None:
            result = result + sign * int(number)
        else:
            result = result + sign * int(coefficient or 1) * Dim.symbol(name)
    if not text.strip():
        raise FormatError("an empty text is no dimension; write for example 28 or N")
    return result


def product(dims: Iterable[DimLike]) -> DimLike:
    """The product of dimensions; at most one of them may be symbolic."""
    result: DimLike = 1
    for d in dims:
        result = result * d
    return result


def is_positive(d: DimLike) -> bool:
    """False when `d` is known to be smaller than 1; symbols are taken to be at least 1."""
    if isinstance(d, int):
        return d >= 1
    return d.constant + sum(c for _, c in d.terms) >= 1 or any(c > 0 for _, c in d.terms)


def substitute_shape(shape: Shape, bindings: Mapping[str, DimLike]) -> Shape:
    """`shape` with the symbols of `bindings` replaced."""
    return tuple(d.substitute(bindings) if isinstance(d, Dim) else d for d in shape)


def bind_shape(shape: Shape, actual: tuple[int, ...], bindings: dict[str, int], what: str) -> None:
    """Solve the symbols of `shape` from `actual` into `bindings`, or raise `ShapeError`.

    Symbols already bound must agree. `what` names the value in messages.
    """
    if len(shape) != len(actual):
        raise ShapeError(
            f"{what}: expected shape {format_shape(shape)}, got {format_shape(actual)}"
        )
    for axis, (declared, size) in enumerate(zip(shape, actual)):
        rest = declared.substitute(bindings) if isinstance(declared, Dim) else declared
        if isinstance(rest, Dim) and len(rest.terms) == 1:
            name, coefficient = rest.terms[0]
            value, remainder = divmod(size - rest.constant, coefficient)
            if remainder == 0 and value >= 0:
                bindings[name] = value
                continue
        if rest != size:
            known = ", ".join(f"{k} = {v}" for k, v in sorted(bindings.items()))
            raise ShapeError(
                f"{what}: expected shape {format_shape(shape)}, got {format_shape(actual)} "
                f"(axis {axis} is {declared}{'; ' + known if known else ''})"
            )


def format_shape(shape: Iterable[DimLike]) -> str:
    """`[N, 3, 32, 32]`."""
    return "[" + ", ".join(str(d) for d in shape) + "]"
