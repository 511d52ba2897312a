"""Chainer's configuration: thread-local values over global ones.

`using_config(name, value)` sets a value for a block; names that Chainer knows have its defaults,
other names are accepted. `lazy` is ours: False runs every operation when it is recorded.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

DEFAULTS: dict[str, Any] = {
    "autotune": False,
    "compute_mode": None,
    "cudnn_deterministic": False,
    "cudnn_fast_batch_normalization": False,
    "debug": False,
    "dtype": np.dtype(np.float32),
    "enable_backprop": True,
    "in_recomputing": False,
    "keep_graph_on_report": False,
    "lazy": True,
    "lazy_grad_sum": False,
    "schedule_func": None,
    "tracing": False,
    "train": True,
    "type_check": True,
    "use_cudnn": "auto",
    "use_cudnn_tensor_core": "auto",
    "use_ideep": "never",
    "use_static_graph": True,
    "warn_nondeterministic": False,
}


class GlobalConfig:
    """Values that every thread sees unless it sets its own."""

    def __init__(self) -> None:
        self.__dict__.update(DEFAULTS)

    def show(self, file: TextIO | None = None) -> None:
        """Print all values, one a line, sorted by name."""
        _show(self.__dict__, file)


class LocalConfig:
    """Values of this thread, falling back to the global ones."""

    def __init__(self, global_config: GlobalConfig) -> None:
        super().__setattr__("_global", global_config)
        super().__setattr__("_local", threading.local())

    def __getattr__(self, name: str) -> Any:
        own = self._local.__dict__
        if name in own:
            return own[name]
        return getattr(self._global, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._local, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._local, name)

    def show(self, file: TextIO | None = None) -> None:
        """Print the values this thread sees, one a line, sorted by name."""
        _show({**self._global.__dict__, **self._local.__dict__}, file)


def _show(values: dict[str, Any], file: TextIO | None) -> None:
    width = max(map(len, values))
    for name in sorted(values):
        print(f"{name:<{width}} {values[name]!r}", file=file or sys.stdout)


global_config = GlobalConfig()
config = LocalConfig(global_config)


def flag(name: str) -> Any:
    """`getattr(config, name)` for a name that has a default: the quick way for every call."""
    own = _OWN.__dict__
    return own[name] if name in own else _SHARED[name]


_OWN: threading.local = config._local
_SHARED = global_config.__dict__


@contextlib.contextmanager
def using_config(name: str, value: Any, config: Any = config) -> Iterator[None]:
    """Set a configuration value inside the block."""
    own = config._local.__dict__ if isinstance(config, LocalConfig) else config.__dict__
    had, old = name in own, own.get(name)
    setattr(config, name, value)
    try:
        yield
    finally:
        if had:
            setattr(config, name, old)
        else:
            delattr(config, name)


def no_backprop_mode() -> contextlib.AbstractContextManager[None]:
    """Operations inside are not recorded for back-propagation."""
    return using_config("enable_backprop", False)


def force_backprop_mode() -> contextlib.AbstractContextManager[None]:
    """Operations inside are recorded although a surrounding block says otherwise."""
    return using_config("enable_backprop", True)
