"""Ctrl-C and a polite kill wait for the end of a step, when everything can be saved.

    with held_interrupts() as check:
        for ...:
            step()
            check()          # raises KeyboardInterrupt here if one came

In the midst of a step some states are of the new and some of the old update. A second Ctrl-C is not
held back. Outside the main thread, where Python delivers no signals, nothing is changed.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_HELD = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """A function that raises `KeyboardInterrupt` if SIGINT or SIGTERM came since."""
    came: list[int] = []

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    def hold(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, hold) for number in _HELD}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
