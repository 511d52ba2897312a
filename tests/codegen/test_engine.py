"""Compiling and calling: once a text, on as many threads as asked for, or a reason why not."""

from __future__ import annotations

import numpy as np
import pytest

from branchgraph.codegen import engine
from branchgraph.codegen.assembly import Function
from branchgraph.ir.errors import MissingError


def needs_compiler() -> None:
    if engine.missing():
        pytest.skip(engine.missing())


def scaled(factor: float, lanes: int) -> str:
    """(x, y, n): y = factor x over n elements, a multiple of `lanes`."""
    f = Function(["x", "y", "n"], lanes=lanes)
    x, y, n = f.arguments
    start, end = f.share(n, lanes)
    with f.loop(start, end, lanes) as loop:
        offset = f.mul(loop.index, 4)
        value = f.vmul(f.load(f.add(x, offset)), f.constant(factor))
        f.store(value, f.add(y, offset))
    return f.text()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_elements(threads: int) -> None:
    needs_compiler()
    lanes = engine.lanes()
    routine = engine.made(scaled, 2.5, lanes)
    for n in (0, lanes, 7 * lanes, 1024):
        x, y = np.arange(n + 1, dtype=np.float32), np.zeros(n + 1, np.float32)
        call, arguments, _ = routine.call([x.ctypes.data, y.ctypes.data, n], threads)
        call(*arguments)
        np.testing.assert_array_equal(y[:n], 2.5 * x[:n])
        assert y[n] == 0


def test_equal_texts_are_compiled_once() -> None:
    needs_compiler()
    lanes = engine.lanes()
    assert engine.routine(scaled(3.0, lanes)) is engine.routine(scaled(3.0, lanes))
    assert engine.made(scaled, 3.0, lanes) is engine.routine(scaled(3.0, lanes))
    assert engine.routine(scaled(4.0, lanes)) is not engine.routine(scaled(3.0, lanes))


def test_lanes_that_are_not_there_are_neither_read_nor_written() -> None:
    needs_compiler()
    lanes = engine.lanes()
    f = Function(["x", "y"], lanes=lanes)
    x, y = f.arguments
    f.store(f.vadd(f.load(x, 0, 3), f.constant(1.0)), y, 0, 3)
    source, target = np.arange(3, dtype=np.float32), np.zeros(lanes, np.float32)
    call, arguments, _ = engine.routine(f.text()).call([source.ctypes.data, target.ctypes.data], 1)
    call(*arguments)
    np.testing.assert_array_equal(target, [1, 2, 3, *[0] * (lanes - 3)])


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine.VARIABLE, "0")
    assert engine.missing() == "switched off by $BRANCHGRAPH_GENERATED=0"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MissingError("llvmlite is not installed: pip install llvmlite")

    monkeypatch.delenv(engine.VARIABLE, raising=False)
    monkeypatch.setattr(engine, "_compiler", refuse)
    assert "pip install llvmlite" in engine.missing()
