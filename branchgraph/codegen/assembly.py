"""LLVM assembly written line by line: values are strings, loops are context managers.

    f = Function(["x", "y", "n"], lanes=16)           # y = relu(x), n a multiple of 16
    x, y, n = f.arguments                             # i64: addresses and numbers
    start, end = f.share(n, 16)                       # of this thread
    with f.loop(start, end, 16) as loop:
        offset = f.mul(loop.index, 4)
        f.store(f.relu(f.load(f.add(x, offset))), f.add(y, offset))
    routine(f.text()).call([x_address, y_address, 4096], threads=2)

Addresses and counts are i64 in bytes; vectors have `lanes` floats. Results are rounded as IEEE 754
says, but products that are added up may be fused (`contract`), and NaN and infinities are kept.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Loop:
    """A loop that is being written."""

    index: str
    #: Values that go from turn to turn, as a turn finds them; behind the loop, the last ones.
    carried: list[str]
    #: What a turn makes of them; the body sets it.
    following: list[str] = field(default_factory=list)


class Function:
    """`void kernel(ptr arguments)`, whose body grows with every call."""

    def __init__(self, arguments: Sequence[str], *, lanes: int) -> None:
        """`arguments` name the 64-bit numbers that the function finds behind its pointer."""
        self.lanes = lanes
        #: The type of vectors.
        self.vector = f"<{lanes} x float>"
        self._mask_type = f"<{lanes} x i1>"
        self._lines: list[str] = []
        self._declared: set[str] = set()
        self._count = 0
        self._block = ""
        self._label("entry")
        #: The arguments' values.
        self.arguments = [self._argument(number) for number in range(len(arguments))]

    def _argument(self, number: int) -> str:
        place = self.value(f"getelementptr i64, ptr %arguments, i64 {number}")
        return self.value(f"load i64, ptr {place}")

    def text(self) -> str:
        """The module with this function, `kernel`."""
        declarations = "\n".join(sorted(self._declared))
        body = "\n".join(self._lines)
        head = "define void @kernel(ptr noalias %arguments)"
        return f'{declarations}\n{head} "no-trapping-math"="true" {{\n{body}\n  ret void\n}}\n'

    # -- lines ---------------------------------------------------------------------------------

    def value(self, expression: str) -> str:
        """A new value, of any expression of LLVM."""
        name = self._fresh("%v")
        self._lines.append(f"  {name} = {expression}")
        return name

    def do(self, statement: str) -> None:
        """A statement without a value."""
        self._lines.append(f"  {statement}")

    def declare(self, declaration: str) -> None:
        """A function of LLVM or OpenMP that the body calls."""
        self._declared.add(f"declare {declaration}")

    def _fresh(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def _label(self, name: str) -> None:
        self._lines.append(f"{name}:")
        self._block = name

    # -- whole numbers -------------------------------------------------------------------------

    def add(self, a: str | int, b: str | int) -> str:
        return self.value(f"add nsw i64 {a}, {b}")

    def sub(self, a: str | int, b: str | int) -> str:
        return self.value(f"sub nsw i64 {a}, {b}")

    def mul(self, a: str | int, b: str | int) -> str:
        return self.value(f"mul nsw i64 {a}, {b}")

    def div(self, a: str | int, b: str | int) -> str:
        return self.value(f"udiv i64 {a}, {b}")

    def rem(self, a: str | int, b: str | int) -> str:
        return self.value(f"urem i64 {a}, {b}")

    def least(self, a: str | int, b: str | int) -> str:
        less = self.value(f"icmp slt i64 {a}, {b}")
        return self.value(f"select i1 {less}, i64 {a}, i64 {b}")

    def most(self, a: str | int, b: str | int) -> str:
        more = self.value(f"icmp sgt i64 {a}, {b}")
        return self.value(f"select i1 {more}, i64 {a}, i64 {b}")

    def within(self, index: str, size: str | int) -> str:
        """Whether 0 <= index < size."""
        return self.value(f"icmp ult i64 {index}, {size}")

    def both(self, a: str, b: str) -> str:
        """Whether two conditions hold."""
        return self.value(f"and i1 {a}, {b}")

    def choose(self, condition: str, a: str, b: str) -> str:
        """One of two whole numbers."""
        return self.value(f"select i1 {condition}, i64 {a}, i64 {b}")

    # -- memory --------------------------------------------------------------------------------

    def pointer(self, address: str, offset: int = 0) -> str:
        """An address, `offset` bytes further on, as a pointer."""
        base = self.value(f"inttoptr i64 {address} to ptr")
        return self.value(f"getelementptr i8, ptr {base}, i64 {offset}") if offset else base

    def load(self, address: str, offset: int = 0, used: int | None = None) -> str:
        """A vector. If only `used` lanes lie there, the others are 0 and not read."""
        place = self.pointer(address, offset)
        if used is None or used == self.lanes:
            return self.value(f"load {self.vector}, ptr {place}, align 4")
        name = f"@llvm.masked.load.v{self.lanes}f32.p0"
        self.declare(f"{self.vector} {name}(ptr, i32 immarg, {self._mask_type}, {self.vector})")
        return self.value(
            f"call {self.vector} {name}(ptr {place}, i32 4, {self._mask(used)},"
            f" {self.vector} zeroinitializer)"
        )

    def store(self, value: str, address: str, offset: int = 0, used: int | None = None) -> None:
        """Write a vector, or its first `used` lanes."""
        place = self.pointer(address, offset)
        if used is None or used == self.lanes:
            self.do(f"store {self.vector} {value}, ptr {place}, align 4")
            return
        name = f"@llvm.masked.store.v{self.lanes}f32.p0"
        self.declare(f"void {name}({self.vector}, ptr, i32 immarg, {self._mask_type})")
        self.do(f"call void {name}({self.vector} {value}, ptr {place}, i32 4, {self._mask(used)})")

    def _mask(self, used: int) -> str:
        bits = ", ".join(f"i1 {'true' if k < used else 'false'}" for k in range(self.lanes))
        return f"{self._mask_type} <{bits}>"

    def load_whole(self, address: str, offset: int = 0) -> str:
        """A 64-bit whole number."""
        return self.value(f"load i64, ptr {self.pointer(address, offset)}, align 8")

    def load_scalar(self, address: str, offset: int = 0) -> str:
        """A float."""
        return self.value(f"load float, ptr {self.pointer(address, offset)}, align 4")

    def gather(self, address: str, stride: int, offset: int = 0, used: int | None = None) -> str:
        """A vector of floats that lie `stride` bytes apart; lanes behind `used` are 0."""
        result = "zeroinitializer"
        for lane in range(self.lanes if used is None else used):
            one = self.load_scalar(address, offset + lane * stride)
            result = self.value(f"insertelement {self.vector} {result}, float {one}, i32 {lane}")
        return result

    def scatter(
        self, value: str, address: str, stride: int, offset: int = 0, used: int | None = None
    ) -> None:
        """Write the lanes of a vector, or the first `used`, `stride` bytes apart."""
        for lane in range(self.lanes if used is None else used):
            one = self.value(f"extractelement {self.vector} {value}, i32 {lane}")
            self.do(
                f"store float {one}, ptr {self.pointer(address, offset + lane * stride)}, align 4"
            )

    # -- vectors -------------------------------------------------------------------------------

    @property
    def zero(self) -> str:
        """A vector of zeros."""
        return "zeroinitializer"

    def constant(self, number: float) -> str:
        """A vector of one number, rounded to float32."""
        (rounded,) = struct.unpack("<f", struct.pack("<f", number))
        (bits,) = struct.unpack("<Q", struct.pack("<d", rounded))
        return "<" + ", ".join([f"float 0x{bits:016X}"] * self.lanes) + ">"

    def spread(self, scalar: str) -> str:
        """A vector of one float."""
        one = self.value(f"insertelement {self.vector} poison, float {scalar}, i32 0")
        return self.value(
            f"shufflevector {self.vector} {one}, {self.vector} poison,"
            f" <{self.lanes} x i32> zeroinitializer"
        )

    def vadd(self, a: str, b: str) -> str:
        return self.value(f"fadd contract {self.vector} {a}, {b}")

    def vsub(self, a: str, b: str) -> str:
        return self.value(f"fsub contract {self.vector} {a}, {b}")

    def vmul(self, a: str, b: str) -> str:
        return self.value(f"fmul contract {self.vector} {a}, {b}")

    def fma(self, a: str, b: str, c: str) -> str:
        """a b + c, rounded once."""
        v, name = self.vector, f"@llvm.fma.v{self.lanes}f32"
        self.declare(f"{v} {name}({v}, {v}, {v})")
        return self.value(f"call {v} {name}({v} {a}, {v} {b}, {v} {c})")

    def relu(self, a: str) -> str:
        """max(a, 0); NaN stays NaN."""
        below = self.value(f"fcmp olt {self.vector} {a}, zeroinitializer")
        return self.value(
            f"select {self._mask_type} {below}, {self.vector} zeroinitializer, {self.vector} {a}"
        )

    def maximum(self, a: str, b: str) -> str:
        """The larger of a and b in every lane; NaN if one is."""
        v, name = self.vector, f"@llvm.maximum.v{self.lanes}f32"
        self.declare(f"{v} {name}({v}, {v})")
        return self.value(f"call nsz {v} {name}({v} {a}, {v} {b})")

    def shuffled(self, a: str, b: str, order: Sequence[int]) -> str:
        """Lanes of a (from 0) and of b (from `lanes`) in any order."""
        indices = ", ".join(f"i32 {lane}" for lane in order)
        return self.value(
            f"shufflevector {self.vector} {a}, {self.vector} {b}, <{self.lanes} x i32> <{indices}>"
        )

    def transposed(self, rows: Sequence[str]) -> list[str]:
        """The columns of `lanes` rows: halves of vectors change places, then quarters, and on."""
        found, step = list(rows), self.lanes // 2
        while step:
            left = [n if not n & step else n - step + self.lanes for n in range(self.lanes)]
            right = [n + step if not n & step else n + self.lanes for n in range(self.lanes)]
            for n in range(self.lanes):
                if not n & step:
                    a, b = found[n], found[n + step]
                    found[n], found[n + step] = (
                        self.shuffled(a, b, left),
                        self.shuffled(a, b, right),
                    )
            step //= 2
        return found

    def lane_sum(self, a: str) -> str:
        """The sum of all lanes, as a float; pairs are added first, then their sums."""
        name = f"@llvm.vector.reduce.fadd.v{self.lanes}f32"
        self.declare(f"float {name}(float, {self.vector})")
        return self.value(f"call reassoc float {name}(float -0.0, {self.vector} {a})")

    def store_scalar(self, value: str, address: str, offset: int = 0) -> None:
        """Write a float."""
        self.do(f"store float {value}, ptr {self.pointer(address, offset)}, align 4")

    @contextmanager
    def vectors(self, lanes: int) -> Iterator[None]:
        """Vectors of another length for a while."""
        before = self.lanes
        self._set_lanes(lanes)
        yield
        self._set_lanes(before)

    def _set_lanes(self, lanes: int) -> None:
        self.lanes = lanes
        self.vector, self._mask_type = f"<{lanes} x float>", f"<{lanes} x i1>"

    # -- vectors, rounded after every operation ------------------------------------------------

    def exact(self, operation: str, a: str, b: str) -> str:
        """`fadd`, `fsub`, `fmul` or `fdiv`, rounded once and never fused with another."""
        return self.value(f"{operation} {self.vector} {a}, {b}")

    def negative(self, a: str) -> str:
        """-a, of NaN and zeros too."""
        return self.value(f"fneg {self.vector} {a}")

    def function(self, name: str, a: str) -> str:
        """A function of LLVM: `sqrt` and `fabs`, exact, or `exp` and `log` of the C library."""
        v, full = self.vector, f"@llvm.{name}.v{self.lanes}f32"
        self.declare(f"{v} {full}({v})")
        return self.value(f"call {v} {full}({v} {a})")

    # -- masks: a bit for each lane ------------------------------------------------------------

    def compare(self, relation: str, a: str, b: str) -> str:
        """The lanes where a relation of LLVM (`olt`, `oeq`, `une`, `uno`, ...) holds."""
        return self.value(f"fcmp {relation} {self.vector} {a}, {b}")

    def pick(self, mask: str, a: str, b: str) -> str:
        """a in the lanes of the mask, else b."""
        v = self.vector
        return self.value(f"select {self._mask_type} {mask}, {v} {a}, {v} {b}")

    def any_lane(self, a: str, b: str) -> str:
        """The lanes of either mask."""
        return self.value(f"or {self._mask_type} {a}, {b}")

    def first_lanes(self, count: str) -> str:
        """The lanes below `count`, a value."""
        numbers = ", ".join(f"i64 {lane}" for lane in range(self.lanes))
        wide = f"<{self.lanes} x i64>"
        one = self.value(f"insertelement {wide} poison, i64 {count}, i32 0")
        every = self.value(
            f"shufflevector {wide} {one}, {wide} poison, <{self.lanes} x i32> zeroinitializer"
        )
        return self.value(f"icmp ult {wide} <{numbers}>, {every}")

    def load_lanes(self, address: str, mask: str) -> str:
        """A vector whose lanes outside the mask are 0 and not read."""
        v, m, name = self.vector, self._mask_type, f"@llvm.masked.load.v{self.lanes}f32.p0"
        self.declare(f"{v} {name}(ptr, i32 immarg, {m}, {v})")
        place = self.pointer(address)
        return self.value(f"call {v} {name}(ptr {place}, i32 4, {m} {mask}, {v} zeroinitializer)")

    def store_lanes(self, value: str, address: str, mask: str) -> None:
        """Write the lanes of the mask."""
        v, m, name = self.vector, self._mask_type, f"@llvm.masked.store.v{self.lanes}f32.p0"
        self.declare(f"void {name}({v}, ptr, i32 immarg, {m})")
        self.do(f"call void {name}({v} {value}, ptr {self.pointer(address)}, i32 4, {m} {mask})")

    def load_mask(self, address: str, mask: str | None = None) -> str:
        """A mask from bytes that are 0 or 1, one a lane; those outside `mask` are not read."""
        bytes_, m = f"<{self.lanes} x i8>", self._mask_type
        place = self.pointer(address)
        if mask is None:
            found = self.value(f"load {bytes_}, ptr {place}, align 1")
        else:
            name = f"@llvm.masked.load.v{self.lanes}i8.p0"
            self.declare(f"{bytes_} {name}(ptr, i32 immarg, {m}, {bytes_})")
            found = self.value(
                f"call {bytes_} {name}(ptr {place}, i32 1, {m} {mask}, {bytes_} zeroinitializer)"
            )
        return self.value(f"icmp ne {bytes_} {found}, zeroinitializer")

    def store_mask(self, value: str, address: str, mask: str | None = None) -> None:
        """A mask as bytes that are 0 or 1; those outside `mask` are left as they are."""
        bytes_, m = f"<{self.lanes} x i8>", self._mask_type
        made = self.value(f"zext {m} {value} to {bytes_}")
        place = self.pointer(address)
        if mask is None:
            self.do(f"store {bytes_} {made}, ptr {place}, align 1")
            return
        name = f"@llvm.masked.store.v{self.lanes}i8.p0"
        self.declare(f"void {name}({bytes_}, ptr, i32 immarg, {m})")
        self.do(f"call void {name}({bytes_} {made}, ptr {place}, i32 1, {m} {mask})")

    def where_positive(self, gate: str, a: str) -> str:
        """`a` where `gate` is above 0, else 0."""
        above = self.value(f"fcmp ogt {self.vector} {gate}, zeroinitializer")
        return self.value(
            f"select {self._mask_type} {above}, {self.vector} {a}, {self.vector} zeroinitializer"
        )

    # -- control -------------------------------------------------------------------------------

    @contextmanager
    def loop(
        self, start: str | int, end: str | int, step: str | int = 1, carried: Sequence[str] = ()
    ) -> Iterator[Loop]:
        """`for index in range(start, end, step)`; `carried` are vectors to start with."""
        head, body, done = (self._fresh(n) for n in ("head", "body", "done"))
        before = self._block
        self.do(f"br label %{head}")
        self._label(head)
        index = self._fresh("%i")
        names = [self._fresh("%c") for _ in carried]
        place = len(self._lines)
        self._lines.extend([""] * (1 + len(names)))
        goes_on = self.value(f"icmp slt i64 {index}, {end}")
        self.do(f"br i1 {goes_on}, label %{body}, label %{done}")
        self._label(body)
        loop = Loop(index, names)
        yield loop
        after = self.add(index, step)
        last = self._block
        self.do(f"br label %{head}")
        self._lines[place] = f"  {index} = phi i64 [{start}, %{before}], [{after}, %{last}]"
        for k, (name, first, again) in enumerate(zip(names, carried, loop.following)):
            self._lines[place + 1 + k] = (
                f"  {name} = phi {self.vector} [{first}, %{before}], [{again}, %{last}]"
            )
        self._label(done)

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """What is done if `condition` holds."""
        then, done = self._fresh("then"), self._fresh("done")
        self.do(f"br i1 {condition}, label %{then}, label %{done}")
        self._label(then)
        yield
        self.do(f"br label %{done}")
        self._label(done)

    def thread(self) -> str:
        """The number of this thread, from 0."""
        return self._openmp("omp_get_thread_num")

    def threads(self) -> str:
        """How many threads run this function."""
        return self._openmp("omp_get_num_threads")

    def share(self, total: str | int, multiple: int = 1) -> tuple[str, str]:
        """(start, end) of this thread's part of range(total), `start` a multiple of `multiple`."""
        threads = self.threads()
        groups = self.div(self.add(total, multiple - 1), multiple)
        each = self.mul(self.div(self.add(groups, self.sub(threads, 1)), threads), multiple)
        start = self.mul(self.thread(), each)
        return start, self.least(self.add(start, each), total)

    def barrier(self) -> None:
        """Wait until all threads have come here."""
        self.declare("void @GOMP_barrier()")
        self.do("call void @GOMP_barrier()")

    def _openmp(self, name: str) -> str:
        self.declare(f"i32 @{name}()")
        return self.value(f"sext i32 {self.value(f'call i32 @{name}()')} to i64")
