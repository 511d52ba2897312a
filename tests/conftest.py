"""What all tests share: the `--slow` switch and the skipping of GPU tests."""

from __future__ import annotations

import os

import pytest

# What is fused must not depend on the clock, nor on what this user's cache remembers.
os.environ["BRANCHGRAPH_TUNING"] = "cost"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {"gpu": pytest.mark.skip(reason="no GPU backend in this version")}
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="takes minutes; run with --slow")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)
