"""Softmax cross-entropy of rows, for so few numbers that calls of a library take longer.

    m = max_c x[n, c]        y[n] = ln sum_c e^(x[n, c] - m) - (x[n, label[n]] - m)

One number after the other, with the exponential and the logarithm of the C library, whose errors
are below one unit in the last place. NaN anywhere in a row, and infinity, make NaN, as in NumPy. A
label outside its row is taken for 0, and sets a flag that the caller looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from branchgraph.codegen import engine
from branchgraph.codegen.assembly import Function


def call(
    x: int, labels: int, y: int, flag: int, shape: tuple[int, int]
) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """A prepared call on addresses: x of [rows, classes] float32, 64-bit labels, y, 64-bit flag.

    Raises `MissingError` where nothing can be compiled.
    """
    return engine.routine(kernel()).call([x, labels, y, flag, *shape], 1)


def kernel() -> str:
    """The function, on vectors of one float."""
    f = Function(["x", "labels", "y", "flag", "rows", "classes"], lanes=1)
    x, labels, y, flag, rows, classes = f.arguments
    with f.loop(0, rows) as row:
        start = f.add(x, f.mul(row.index, f.mul(classes, 4)))
        with f.loop(0, classes, carried=[f.load(start)]) as largest:
            (known,) = largest.carried
            new = f.load(f.add(start, f.mul(largest.index, 4)))
            keep = f.any_lane(f.compare("ogt", known, new), f.compare("uno", known, known))
            largest.following = [f.pick(keep, known, new)]
        (most,) = largest.carried
        with f.loop(0, classes, carried=[f.zero]) as total:
            shifted = f.exact("fsub", f.load(f.add(start, f.mul(total.index, 4))), most)
            total.following = [f.exact("fadd", total.carried[0], f.function("exp", shifted))]
        label = f.load_whole(f.add(labels, f.mul(row.index, 8)))
        valid = f.within(label, classes)
        named = f.load(f.add(start, f.mul(f.choose(valid, label, "0"), 4)))
        logarithm = f.function("log", total.carried[0])
        loss = f.exact("fsub", logarithm, f.exact("fsub", named, most))
        f.store(loss, f.add(y, f.mul(row.index, 4)))
        with f.when(f.value(f"xor i1 {valid}, true")):
            f.do(f"store i64 1, ptr {f.pointer(flag)}, align 8")
    return f.text()


__all__ = ["call", "kernel"]
