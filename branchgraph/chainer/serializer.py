"""The protocol between objects and files: `obj.serialize(s)` calls `value = s(key, value)`.

A serializer stores the value and returns it; a deserializer returns what it read. `s[name]` is the
serializer of a child.
"""

from __future__ import annotations

from typing import Any


class AbstractSerializer:
    """Both directions."""

    def __getitem__(self, key: str) -> AbstractSerializer:
        raise NotImplementedError

    def __call__(self, key: str, value: Any) -> Any:
        raise NotImplementedError


class Serializer(AbstractSerializer):
    """Writes an object."""

    def save(self, obj: Any) -> None:
        """Write `obj`."""
        obj.serialize(self)


class Deserializer(AbstractSerializer):
    """Reads into an object."""

    def load(self, obj: Any) -> None:
        """Read `obj`."""
        obj.serialize(self)
