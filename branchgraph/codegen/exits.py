"""Exits: the criterion of rows of logits, and the rows that go on or come back.

The score of a row z of C logits, in float64 as the ops define it, with m = max z:

    e_c = exp(z_c - m)      S = sum_c e_c

    entropy              ln S - (sum_c e_c (z_c - m)) / S           where 0 * -inf counts as 0
    normalised_entropy   entropy / ln max(C, 2)
    confidence           1 / S
    margin               (1 - exp(second largest - m)) / S

Classes lie along the lanes; those that are missing in the last vector are -inf, which adds nothing.
NaN and +inf make S, and so the score, NaN, and comparisons with NaN do not hold.

exp(x), x <= 0: with n = round(x / ln 2) and r = x - n ln 2, where ln 2 is the sum of a part whose
products with n are exact and the rest (Cody and Waite, "Software Manual for the Elementary
Functions", 1980), |r| <= ln 2 / 2 and

    exp(x) = 2^n sum_{k <= 13} r^k / k!              truncated by less than 2^-57 of the result

n comes from adding 1.5 * 2^52, which leaves it in the last bits. Below -708 the result is 0.

ln(x), x >= 1: x = 2^k f with f in [sqrt 1/2, sqrt 2), d = f - 1, s = d / (2 + d), |s| <= 0.1716,

    ln f = 2 artanh s = d - d^2/2 + s (d^2/2 + R)    since 2 s = d - s d = d - d^2/2 + s d^2/2
    R = sum_{1 <= j <= 10} 2 s^(2j) / (2j + 1)       truncated by less than 2^-58

and k ln 2 is added in two parts again; d is exact, and the terms after it are small beside it.
Either is within 2 units in the last place of the exact value.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

from branchgraph.codegen.assembly import Function

#: Criteria with a score of one exit.
CRITERIA = ("entropy", "normalised_entropy", "confidence", "margin")
#: Comparisons of a score with a threshold, as LLVM calls them; none holds for NaN.
RELATIONS = {"less": "olt", "less_equal": "ole", "greater": "ogt", "greater_equal": "oge"}

#: Vectors of classes that are written one after the other; more are looped over.
_UNROLLED = 8
_FLOAT, _DOUBLE = 4, 8
_LN2_HIGH = float.fromhex("0x1.62e42feep-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_ROUND = 1.5 * 2.0**52
_SMALLEST = -708.0


def score(criterion: str, classes: int, lanes: int) -> str:
    """Scores of rows of float32 logits.

    Arguments: addresses of the logits [rows, classes], the number of rows (int64) and the scores
    (float64 [rows]).
    """
    f = Function(("logits", "rows", "scores"), lanes=lanes)
    logits, rows, scores = f.arguments
    row = _Row(f, classes, criterion)
    with f.loop(0, f.value(f"load i64, ptr {f.pointer(rows)}")) as loop:
        found = row.score(f.add(logits, f.mul(loop.index, classes * _FLOAT)))
        f.do(f"store double {found}, ptr {_at(f, scores, loop.index, _DOUBLE)}")
    return f.text()


def decision(criterion: str, classes: int, lanes: int, relation: str) -> str:
    """Which rows of float32 logits stay: those whose score is not in `relation` to the threshold.

    Arguments: addresses of the logits [rows, classes], the number of rows (int64), the threshold
    (float64), the mask (a byte a row, 1 where it stays) and the number of those that stay (int64).
    """
    f = Function(("logits", "rows", "threshold", "mask", "count"), lanes=lanes)
    logits, rows, threshold, mask, count = f.arguments
    row = _Row(f, classes, criterion)
    staying = _Slot(f, "i64", "0")
    limit = f.value(f"load double, ptr {f.pointer(threshold)}")
    with f.loop(0, f.value(f"load i64, ptr {f.pointer(rows)}")) as loop:
        found = row.score(f.add(logits, f.mul(loop.index, classes * _FLOAT)))
        leaves = f.value(f"fcmp {RELATIONS[relation]} double {found}, {limit}")
        stays = f.value(f"xor i1 {leaves}, true")
        f.do(f"store i8 {f.value(f'zext i1 {stays} to i8')}, ptr {_at(f, mask, loop.index, 1)}")
        staying.put(f.add(staying.get(), f.value(f"zext i1 {stays} to i64")))
    f.do(f"store i64 {staying.get()}, ptr {f.pointer(count)}")
    return f.text()


def gather(sizes: Sequence[int]) -> str:
    """The rows with a 1 in the mask, one behind the other, for tensors of `sizes` bytes a row.

    Arguments: addresses of the mask, the number of rows (int64), then source and target of each
    tensor.
    """
    names = [n for k in range(len(sizes)) for n in (f"source{k}", f"target{k}")]
    f = Function(["mask", "rows", *names], lanes=1)
    mask, rows, *places = f.arguments
    kept = _Slot(f, "i64", "0")
    end = f.value(f"load i64, ptr {f.pointer(rows)}")
    with f.loop(0, end) as loop, f.when(_flag(f, mask, loop.index)):
        number = kept.get()
        for size, source, target in zip(sizes, places[::2], places[1::2]):
            _copy(f, _at(f, target, number, size), _at(f, source, loop.index, size), size)
        kept.put(f.add(number, 1))
    return f.text()


def scatter(size: int, *, base: bool) -> str:
    """Rows of `size` bytes put back where the mask has a 1, among those of a base or zeros.

    Arguments: addresses of the mask, the number of rows of the result (int64), the kept rows, the
    base and the result.
    """
    f = Function(("mask", "rows", "kept", "base", "result"), lanes=1)
    mask, rows, source, base_at, result = f.arguments
    kept = _Slot(f, "i64", "0")
    with f.loop(0, f.value(f"load i64, ptr {f.pointer(rows)}")) as loop:
        target = _at(f, result, loop.index, size)
        flag = _flag(f, mask, loop.index)
        with f.when(flag):
            number = kept.get()
            _copy(f, target, _at(f, source, number, size), size)
            kept.put(f.add(number, 1))
        with f.when(f.value(f"xor i1 {flag}, true")):
            if base:
                _copy(f, target, _at(f, base_at, loop.index, size), size)
            else:
                f.declare("void @llvm.memset.p0.i64(ptr, i8, i64, i1 immarg)")
                f.do(f"call void @llvm.memset.p0.i64(ptr {target}, i8 0, i64 {size}, i1 false)")
    return f.text()


def exponential(lanes: int) -> str:
    """exp of `lanes // 2` float64 numbers at most 0; arguments: where they lie, where it goes."""
    f = Function(("x", "y"), lanes=lanes)
    x, y = f.arguments
    doubles = _Doubles(f)
    value = f.value(f"load {doubles.type}, ptr {f.pointer(x)}, align 8")
    f.do(f"store {doubles.type} {_exp(doubles, value)}, ptr {f.pointer(y)}, align 8")
    return f.text()


def logarithm() -> str:
    """ln of one float64 number of at least 1; arguments: where it lies, where it goes."""
    f = Function(("x", "y"), lanes=2)
    x, y = f.arguments
    value = f.value(f"load double, ptr {f.pointer(x)}")
    f.do(f"store double {_log(f, value)}, ptr {f.pointer(y)}")
    return f.text()


# -- one row ---------------------------------------------------------------------------------------


class _Row:
    """The score of one row."""

    def __init__(self, f: Function, classes: int, criterion: str) -> None:
        self.f = f
        self.classes = classes
        self.criterion = criterion
        self.doubles = _Doubles(f)
        lowest = self.doubles.constant(-math.inf)
        zero = self.doubles.constant(0.0)
        self.lowest, self.zero = lowest, zero
        vector = self.doubles.type
        self.first, self.second = _Slot(f, vector, lowest), _Slot(f, vector, lowest)
        self.total, self.weighted = _Slot(f, vector, zero), _Slot(f, vector, zero)

    def score(self, logits: str) -> str:
        f, v = self.f, self.doubles
        self.first.put(self.lowest)
        self.second.put(self.lowest)
        self.total.put(self.zero)
        self.weighted.put(self.zero)
        self._each(logits, self._largest)
        first, second = v.two_largest(self.first.get(), self.second.get())
        top = v.spread(first)
        self._each(logits, lambda z: self._sums(v.binary("fsub", z, top)))
        total = v.sum(self.total.get())
        if self.criterion == "confidence":
            return f.value(f"fdiv double {_number(1.0)}, {total}")
        if self.criterion == "margin":
            below = _exp(v, v.binary("fsub", v.spread(second), top))
            gap = f.value(f"fsub double {_number(1.0)}, {v.lane(below, 0)}")
            return f.value(f"fdiv double {gap}, {total}")
        mean = f.value(f"fdiv double {v.sum(self.weighted.get())}, {total}")
        entropy = f.value(f"fsub double {_log(f, total)}, {mean}")
        if self.criterion == "normalised_entropy":
            largest = math.log(max(self.classes, 2))
            return f.value(f"fdiv double {entropy}, {_number(largest)}")
        return entropy

    def _each(self, logits: str, use: Callable[[str], None]) -> None:
        """`use` the logits, vector by vector."""
        f, v = self.f, self.doubles
        full, rest = divmod(self.classes, v.lanes)
        if full > _UNROLLED:
            with f.loop(0, full * v.lanes * _FLOAT, v.lanes * _FLOAT) as loop:
                use(v.load_floats(f.add(logits, loop.index)))
        else:
            for k in range(full):
                use(v.load_floats(logits, k * v.lanes * _FLOAT))
        if rest:
            use(v.load_floats(logits, full * v.lanes * _FLOAT, rest, missing=-math.inf))

    def _largest(self, z: str) -> None:
        v, first = self.doubles, self.first.get()
        if self.criterion == "margin":
            self.second.put(v.larger(self.second.get(), v.smaller(first, z)))
        self.first.put(v.larger(first, z))

    def _sums(self, shifted: str) -> None:
        f, v = self.f, self.doubles
        e = _exp(v, shifted)
        self.total.put(v.binary("fadd", self.total.get(), e))
        if self.criterion in ("entropy", "normalised_entropy"):
            none = f.value(f"fcmp oeq {v.type} {e}, {self.zero}")
            finite = v.select(none, self.zero, shifted)
            self.weighted.put(v.fma(e, finite, self.weighted.get()))


# -- vectors of float64 ----------------------------------------------------------------------------


class _Doubles:
    """Vectors with half as many float64 lanes as a function has float32 lanes."""

    def __init__(self, f: Function) -> None:
        self.f = f
        self.lanes = f.lanes // 2
        self.type = f"<{self.lanes} x double>"
        self.bits = f"<{self.lanes} x i64>"

    def constant(self, number: float) -> str:
        return "<" + ", ".join([f"double {_number(number)}"] * self.lanes) + ">"

    def whole(self, number: int) -> str:
        return "<" + ", ".join([f"i64 {number}"] * self.lanes) + ">"

    def binary(self, operation: str, a: str, b: str) -> str:
        return self.f.value(f"{operation} {self.type} {a}, {b}")

    def fma(self, a: str, b: str, c: str) -> str:
        name, t = f"@llvm.fma.v{self.lanes}f64", self.type
        self.f.declare(f"{t} {name}({t}, {t}, {t})")
        return self.f.value(f"call {t} {name}({t} {a}, {t} {b}, {t} {c})")

    def select(self, condition: str, a: str, b: str) -> str:
        mask = f"<{self.lanes} x i1>"
        return self.f.value(f"select {mask} {condition}, {self.type} {a}, {self.type} {b}")

    def larger(self, a: str, b: str) -> str:
        """The larger one; `a` where `b` is NaN."""
        return self.select(self.f.value(f"fcmp ogt {self.type} {b}, {a}"), b, a)

    def smaller(self, a: str, b: str) -> str:
        """The smaller one; `a` where `b` is NaN."""
        return self.select(self.f.value(f"fcmp olt {self.type} {b}, {a}"), b, a)

    def spread(self, scalar: str) -> str:
        one = self.f.value(f"insertelement {self.type} poison, double {scalar}, i32 0")
        return self._shuffled(one, [0] * self.lanes)

    def lane(self, a: str, number: int) -> str:
        return self.f.value(f"extractelement {self.type} {a}, i32 {number}")

    def load_floats(
        self, address: str, offset: int = 0, used: int | None = None, missing: float = 0.0
    ) -> str:
        """Floats made wider; lanes behind the `used` ones hold `missing` and are not read."""
        f = self.f
        narrow = f"<{self.lanes} x float>"
        place = f.pointer(address, offset)
        if used is None:
            value = f.value(f"load {narrow}, ptr {place}, align 4")
        else:
            name = f"@llvm.masked.load.v{self.lanes}f32.p0"
            mask = f"<{self.lanes} x i1>"
            flags = ", ".join(f"i1 {str(k < used).lower()}" for k in range(self.lanes))
            other = ", ".join([f"float {_number(missing)}"] * self.lanes)
            f.declare(f"{narrow} {name}(ptr, i32 immarg, {mask}, {narrow})")
            value = f.value(
                f"call {narrow} {name}(ptr {place}, i32 4, {mask} <{flags}>, {narrow} <{other}>)"
            )
        return f.value(f"fpext {narrow} {value} to {self.type}")

    def sum(self, a: str) -> str:
        """The sum of the lanes."""
        for half in self._halves():
            a = self.binary("fadd", a, self._rotated(a, half))
        return self.lane(a, 0)

    def two_largest(self, first: str, second: str) -> tuple[str, str]:
        """Of all lanes of both, where `second` is nowhere larger than `first`."""
        for half in self._halves():
            a, b = self._rotated(first, half), self._rotated(second, half)
            second = self.larger(self.smaller(first, a), self.larger(second, b))
            first = self.larger(first, a)
        return self.lane(first, 0), self.lane(second, 0)

    def _halves(self) -> list[int]:
        return [1 << k for k in reversed(range(self.lanes.bit_length() - 1))]

    def _rotated(self, a: str, by: int) -> str:
        return self._shuffled(a, [(k + by) % self.lanes for k in range(self.lanes)])

    def _shuffled(self, a: str, lanes: Sequence[int]) -> str:
        places = ", ".join(f"i32 {k}" for k in lanes)
        return self.f.value(
            f"shufflevector {self.type} {a}, {self.type} poison, <{len(lanes)} x i32> <{places}>"
        )


def _exp(v: _Doubles, x: str) -> str:
    """exp of a vector of numbers at most 0; NaN stays NaN."""
    f = v.f
    shifter = v.constant(_ROUND)
    t = v.fma(x, v.constant(1 / math.log(2)), shifter)
    n = v.binary("fsub", t, shifter)
    r = v.fma(n, v.constant(-_LN2_HIGH), x)
    r = v.fma(n, v.constant(-_LN2_LOW), r)
    y = v.constant(1 / math.factorial(13))
    for k in reversed(range(13)):
        y = v.fma(y, r, v.constant(1 / math.factorial(k)))
    bits = f.value(f"bitcast {v.type} {t} to {v.bits}")
    exponent = f.value(f"shl {v.bits} {bits}, {v.whole(52)}")
    biased = f.value(f"add {v.bits} {exponent}, {v.whole(1023 << 52)}")
    power = f.value(f"bitcast {v.bits} {biased} to {v.type}")
    vanishes = f.value(f"fcmp olt {v.type} {x}, {v.constant(_SMALLEST)}")
    return v.select(vanishes, v.constant(0.0), v.binary("fmul", y, power))


def _log(f: Function, x: str) -> str:
    """ln of one number of at least 1; NaN and infinity stay as they are."""
    (root,) = struct.unpack("<q", struct.pack("<d", math.sqrt(0.5)))
    bits = f.value(f"bitcast double {x} to i64")
    k = f.value(f"ashr i64 {f.value(f'sub i64 {bits}, {root}')}, 52")
    part = f.value(f"sub i64 {bits}, {f.value(f'shl i64 {k}, 52')}")
    fraction = f.value(f"bitcast i64 {part} to double")
    d = f.value(f"fsub double {fraction}, {_number(1.0)}")
    s = f.value(f"fdiv double {d}, {f.value(f'fadd double {d}, {_number(2.0)}')}")
    square = f.value(f"fmul double {s}, {s}")
    series = _number(2 / 21)
    for j in reversed(range(1, 10)):
        series = _fma(f, series, square, _number(2 / (2 * j + 1)))
    half = f.value(f"fmul double {f.value(f'fmul double {d}, {d}')}, {_number(0.5)}")
    power = f.value(f"sitofp i64 {k} to double")
    tail = _fma(
        f, s, _fma(f, series, square, half), f.value(f"fmul double {power}, {_number(_LN2_LOW)}")
    )
    near = f.value(f"fsub double {d}, {f.value(f'fsub double {half}, {tail}')}")
    result = _fma(f, power, _number(_LN2_HIGH), near)
    finite = f.value(f"fcmp olt double {x}, {_number(math.inf)}")
    return f.value(f"select i1 {finite}, double {result}, double {x}")


def _fma(f: Function, a: str, b: str, c: str) -> str:
    f.declare("double @llvm.fma.f64(double, double, double)")
    return f.value(f"call double @llvm.fma.f64(double {a}, double {b}, double {c})")


def _number(value: float) -> str:
    """A constant of type float or double (a float must be exact)."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", value))
    return f"0x{bits:016X}"


# -- memory ----------------------------------------------------------------------------------------


class _Slot:
    """A variable; LLVM makes registers of them."""

    def __init__(self, f: Function, type_: str, start: str) -> None:
        self.f, self.type = f, type_
        self.place = f.value(f"alloca {type_}")
        self.put(start)

    def get(self) -> str:
        return self.f.value(f"load {self.type}, ptr {self.place}")

    def put(self, value: str) -> None:
        self.f.do(f"store {self.type} {value}, ptr {self.place}")


def _at(f: Function, address: str, index: str, size: int) -> str:
    """A pointer to element `index` of `size` bytes."""
    return f.pointer(f.add(address, f.mul(index, size)))


def _flag(f: Function, mask: str, index: str) -> str:
    byte = f.value(f"load i8, ptr {_at(f, mask, index, 1)}")
    return f.value(f"icmp ne i8 {byte}, 0")


def _copy(f: Function, target: str, source: str, size: int) -> None:
    f.declare("void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1 immarg)")
    f.do(f"call void @llvm.memcpy.p0.p0.i64(ptr {target}, ptr {source}, i64 {size}, i1 false)")


__all__ = [
    "CRITERIA",
    "RELATIONS",
    "decision",
    "exponential",
    "gather",
    "logarithm",
    "scatter",
    "score",
]
